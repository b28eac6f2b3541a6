"""A source seen through a quantization recipe: matrices are packed as they are read."""

from __future__ import annotations

from collections.abc import Callable, Mapping
from dataclasses import dataclass, field

from torch import Tensor

from tiercel.errors import RequestError
from tiercel.families.family import Layout, TensorMapping
from tiercel.model.parameters import parameters
from tiercel.quant import BLOCKS, PACKED_TYPES, dequantize
from tiercel.quant.recipes import RECIPES, find, quant_types
from tiercel.tokenizer.tokenizer import Tokenizer
from tiercel.weights.checkpoint import Source
from tiercel.weights.stored import pack

Importance = Mapping[str, Tensor]  # our name of a matrix → (n) mean square of its inputs


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
