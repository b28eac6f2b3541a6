"""The files a measurement needs: a name becomes something every engine can open.

    ours            a path, or {model, random}: weights made in memory, in packed form
    llama.cpp       one .gguf file: the model's own, or written for the occasion
    transformers    a folder in bfloat16: the model's own, or written for the occasion

Where a peer takes part, ours opens the very file the peer does, as far as it is in the same precision.
"""

from __future__ import annotations

from dataclasses import dataclass
from pathlib import Path
from typing import TYPE_CHECKING, Any

from tiercel.errors import ModelNotFound, RequestError, UnsupportedError
from tiercel.families import from_gguf, from_hf
from tiercel.families.family import Layout
from tiercel.families.pattern import PATTERN, read_file, rows
from tiercel.families.shapes import SHAPES, find
from tiercel.hub import local_models
from tiercel.hub.download import read_json
from tiercel.quant import recipes
from tiercel.weights.gguf import GGUFFile

if TYPE_CHECKING:
    from tiercel.bench.case import Case, Report
    from tiercel.weights.random import RandomSource

FLOATS = ("f32", "bf16", "f16")


@dataclass(frozen=True)
class Files:
    """What each engine opens; `ours` is the part of a worker's order that says so."""

    ours: dict[str, Any]
    gguf: Path | None = None
    folder: Path | None = None


def prepare(case: Case, scratch: Path, report: Report) -> Files:
    """Find the model, and write what is missing into `scratch`."""
    source: Path | RandomSource
    if case.random is None:
        source = local_models.resolve(case.model, pull=True, progress=report)
        if source.suffix in (".json", ".toml") and case.vs:
            raise RequestError(f"{case.model} is a pattern and has no weights that a peer could read; add --random")
        gguf = source if source.suffix == ".gguf" else next(iter(sorted(source.glob("*.gguf"))), None)
        folder = source if (source / "config.json").is_file() else None
        ours: dict[str, Any] = {"path": str(source)}
    else:
        _check(case)
        gguf, folder, ours = case.write, None, {"model": case.model, "random": case.random}
    if "llama.cpp" in case.vs or case.write is not None:
        if case.random is not None or gguf is None:
            gguf = gguf or scratch / "model.gguf"
            write(case, gguf, report)
        ours = {"path": str(gguf)} if case.random is not None else ours
    if "transformers" in case.vs and folder is None:
        folder = scratch / "folder"
        write(case, folder, report)
        if case.random in FLOATS:
            ours = {"path": str(folder)}
    return Files(ours, gguf, folder)


def _check(case: Case) -> None:
    """What cannot be had is said before anything starts."""
    layout = random_layout(case.model)
    recipe = recipes.find(case.random or "")
    if recipe and recipes.RECIPES[recipe].file_type is None and (case.write or "llama.cpp" in case.vs):
        raise UnsupportedError(f"GGUF files have no {recipe}, and llama.cpp reads nothing else; try q4_k_m or q8_0")
    if "transformers" in case.vs and layout.hf_config is None:
        raise UnsupportedError(f"{case.model} is a network of its own: transformers has no class for it")


def write(case: Case, out: Path, report: Report) -> None:
    """The case's model as a .gguf file, or as a folder in bfloat16."""
    from tiercel.weights.export import export

    report(f"writing {out.name}", 0, 0)
    source: Any = local_models.resolve(case.model) if case.random is None else random_source(case.model, case.random)
    export(source, out, dtype=None if out.suffix == ".gguf" else "bfloat16", name=case.model)


def random_source(name: str, recipe: str, seed: int = 0) -> RandomSource:
    """Random weights of a named shape, config or pattern.  recipe: a name of `quant.recipes`, f32, bf16 or f16."""
    from tiercel.weights.random import RandomSource, kinds_of

    layout = random_layout(name)
    return RandomSource(layout, kinds_of(layout, recipe), seed)


def random_layout(name: str) -> Layout:
    """The network behind a named shape, a config.json, a pattern file, a model folder or a .gguf file."""
    if (published := find(name)) is not None:
        return from_hf(published)
    path = Path(name)
    path = path / "config.json" if path.is_dir() else path
    if path.suffix == ".gguf" and path.is_file():
        with GGUFFile(path) as file:
            return from_gguf(file.metadata, file.tensors)
    if path.suffix not in (".json", ".toml") or not path.is_file():
        raise ModelNotFound(f"no shape {name!r}; known: {', '.join(SHAPES)}, a config.json, or a pattern file")
    if path.suffix == ".json" and isinstance(found := read_json(path), dict) and "model_type" in found:
        return from_hf(found)
    config = read_file(path)
    return Layout(PATTERN, config, rows(config))
