"""A checkpoint becomes a packed one, by a recipe: on its way into memory, or on its way into a file.

    load      Quantized(checkpoint, …) is a Source like the checkpoint itself, and packs the rows it is asked for
    quantize  the same, written: a .gguf file that llama.cpp runs, or a folder (NF4 as transformers reads it,
              other types in the layout of `packed_folder`)

A few rows are unpacked at any time, so that a 7B checkpoint needs no more memory than its packed form.
"""

from __future__ import annotations

from collections import Counter
from collections.abc import Callable
from pathlib import Path
from typing import Any

from tiercel.errors import RequestError
from tiercel.model.parameters import output_parameter, parameters
from tiercel.quant import PACKED_TYPES
from tiercel.quant.recipes import RECIPES, quant_types
from tiercel.weights.checkpoint import Source, open_checkpoint, parameter_shapes
from tiercel.weights.export import export
from tiercel.weights.quantized import Importance, quantized, recipe_named
from tiercel.weights.stored import bytes_of

Progress = Callable[[int, int], None]  # (values packed, values in all)


def quantize(
    source: Source | str | Path,
    out: str | Path,
    recipe: str,
    *,
    importance: Importance | None = None,
    name: str | None = None,
    progress: Progress | None = None,
) -> dict[str, Any]:
    """Write a packed copy of a checkpoint; answers what became of its tensors.

    out: a name ending in .gguf, or a folder.  Raises RequestError for a recipe or values that the target cannot hold;
    nothing is left then.
    """
    source = open_checkpoint(source) if isinstance(source, (str, Path)) else source
    out, recipe = Path(out), recipe_named(recipe)
    gguf = out.suffix == ".gguf"
    if gguf and RECIPES[recipe].file_type is None:
        raise RequestError(f"GGUF files have no {recipe}; give a folder, or take q8_0 or q4_k_m")
    shapes = parameter_shapes(source.layout)
    view = quantized(source, recipe, importance)
    config = source.layout.config
    if (
        gguf and config.tied and config.logit_scale != 1.0 and not source.layout.family.gguf_scales
    ):  # the output becomes a tensor of its own there
        params = parameters(config) | {"head.weight": output_parameter(config)}
        view.kinds = quant_types(params, recipe, importance=importance is not None)
    if recipe == "nf4":  # transformers reads no other type beside it, and no packed experts
        view.kinds = {ours: kind for ours, kind in view.kinds.items() if kind == "NF4" and len(shapes[ours]) == 2}
    packed = {row.ours: shapes[row.ours] for row in source.layout.rows if row.ours in view.kinds}
    view.seen = _counter(progress, sum(_size(shape) for shape in packed.values()) * (2 if recipe == "nf4" else 1))
    again = Counter(source.stored(row) for row in source.layout.rows if source.stored(row) in PACKED_TYPES)
    export(view, out, name=name, private=not gguf and recipe != "nf4")
    return {
        "out": str(out),
        "recipe": recipe,
        "types": dict(Counter(view.stored(row) for row in source.layout.rows)),
        "bytes": sum(bytes_of(view.stored(row), shapes[row.ours]) or 0 for row in source.layout.rows),
        "unpacked": [row.ours for row in source.layout.rows if len(shapes[row.ours]) > 1 and row.ours not in packed],
        "was_packed": dict(again),
        "importance": len(importance.keys() & packed.keys()) if importance is not None else None,
    }


def _size(shape: tuple[int, ...]) -> int:
    size = 1
    for n in shape:
        size *= n
    return size


def _counter(progress: Progress | None, total: int) -> Callable[[int], None] | None:
    if progress is None:
        return None
    done = 0

    def saw(values: int) -> None:
        nonlocal done
        done += values
        progress(min(done, total), total)

    return saw
