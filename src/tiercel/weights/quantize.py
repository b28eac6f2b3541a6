"""A checkpoint becomes a packed one, by a recipe: on its way into memory, or on its way into a file.

    load      Quantized(checkpoint, …) is a Source like the checkpoint itself, and packs the rows it is asked for
    quantize  the same, written: a .gguf file that llama.cpp runs, or a folder (NF4 as transformers reads it,
              other types in the layout of `packed_folder`)

A few rows are unpacked at any time, so that a 7B checkpoint needs no more memory than its packed form.
"""

from __future__ import annotations

from collections import Counter
from collections.abc import Callable, Mapping
from dataclasses import dataclass, field
from pathlib import Path
from typing import Any

from torch import Tensor

from tiercel.errors import RequestError
from tiercel.families.family import Layout, TensorMapping
from tiercel.model.parameters import output_parameter, parameters
from tiercel.quant import PACKED_TYPES, dequantize
from tiercel.quant.recipes import RECIPES, find, quant_types
from tiercel.tokenizer.tokenizer import Tokenizer
from tiercel.weights.checkpoint import Source, open_checkpoint, parameter_shapes
from tiercel.weights.export import export
from tiercel.weights.stored import bytes_of, pack

Importance = Mapping[str, Tensor]  # our name of a matrix → (n) mean square of its inputs
Progress = Callable[[int, int], None]  # (values packed, values in all)


@dataclass
class Quantized:
    """A source whose matrices are packed as they are read.  kinds: our name → type, the rest stays as stored."""

    base: Source
    kinds: Mapping[str, str]
    file_type: int | None = None
    importance: Importance = field(default_factory=dict)
    seen: Callable[[int], None] | None = None  # called with the number of values packed

    @property
    def layout(self) -> Layout:
        return self.base.layout

    def stored(self, row: TensorMapping) -> str:
        return self.kinds.get(row.ours) or self.base.stored(row)

    def raw(self, row: TensorMapping, start: int, stop: int) -> Tensor:
        kind = self.stored(row)
        assert kind in PACKED_TYPES, f"{row.ours} is {kind}"
        if self.base.stored(row) == kind:
            raw = self.base.raw(row, start, stop)
            self._saw(raw.shape[:-1].numel() * _values(kind, raw.shape[-1]))
            return raw
        x = self.base.read(row, start, stop)
        self._saw(x.numel())
        return pack(row.ours, kind, x, self.importance.get(row.ours))

    def read(self, row: TensorMapping, start: int, stop: int) -> Tensor:
        if row.ours not in self.kinds:
            return self.base.read(row, start, stop)
        return dequantize(self.kinds[row.ours], self.raw(row, start, stop))

    def tokenizer(self) -> Tokenizer | None:
        return self.base.tokenizer()

    def _saw(self, values: int) -> None:
        if self.seen is not None:
            self.seen(values)


def _values(kind: str, nbytes: int) -> int:
    """Number of values in a packed row of that many bytes."""
    from tiercel.quant import BLOCKS

    return nbytes - 4 if kind == "INT8" else nbytes // BLOCKS[kind].bytes * BLOCKS[kind].values


def recipe_named(name: str) -> str:
    """The recipe meant by a name, or RequestError with the names there are."""
    found = find(name)
    if found is None:
        raise RequestError(f"there is no recipe {name!r}; choose one of {', '.join(RECIPES)}")
    return found


def quantized(source: Source, recipe: str, importance: Importance | None = None) -> Quantized:
    """A source seen through a recipe ("q4_k_m", "int8", "nf4" …)."""
    recipe = recipe_named(recipe)
    chosen = quant_types(parameters(source.layout.config), recipe, importance=importance is not None)
    return Quantized(source, chosen, RECIPES[recipe].file_type, importance or {})


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
    if gguf and config.tied and config.logit_scale != 1.0:  # the output becomes a tensor of its own there
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
