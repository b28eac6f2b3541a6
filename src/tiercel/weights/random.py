"""Weights from a config alone, made in the form they are kept in: to measure a network without a download.

    packed types    random bytes; the scales of every block are set so that values have mean 0 and the spread a
                    fresh network has (`model.layers.deviation`)
    BF16, F16, F32  uniform, of the same spread
    the rest        vectors, convolutions, decays, routers: `model.layers.fresh`

A tensor is cut into tiles of rows, and each tile has a generator of its own, seeded by (seed, name, number of the
tile): the same bytes come whichever rows are asked for, at some 2 GB/s.
"""

from __future__ import annotations

import math
import zlib
from collections.abc import Callable, Mapping
from functools import cached_property
from typing import NamedTuple

import numpy as np
import torch
from torch import Tensor

from tiercel.errors import RequestError
from tiercel.families.family import Layout, TensorMapping
from tiercel.mixers.spec import Param
from tiercel.model.initialize import deviation, fresh
from tiercel.model.parameters import parameters
from tiercel.quant import BLOCKS, PACKED_TYPES, dequantize, recipes, row_bytes
from tiercel.quant.nf4 import LEVELS
from tiercel.tokenizer.tokenizer import Tokenizer
from tiercel.weights.stored import torch_dtype

TILE_VALUES = 1 << 18
FLOATS = ("f32", "bf16", "f16")
_Make = Callable[[np.random.SFC64, int], np.ndarray]  # (generator of a tile, rows of the tile) → the tile


class Scales(NamedTuple):
    """Where a block keeps its scales, and what random bytes make of them."""

    d: int  # byte of d, a float16 (float32 in NF4 and INT8)
    m: int | None  # byte of the minimum, for types that have one
    ratio: float  # minimum / d that gives mean 0
    spread: float  # standard deviation of a value for d = 1


def _uniform(low: int, high: int) -> tuple[float, float]:
    """Mean and mean square of the whole numbers low … high."""
    n = range(low, high + 1)
    return sum(n) / len(n), sum(i * i for i in n) / len(n)


def _affine(bits: int) -> tuple[float, float]:
    """d·q + m with m = −mean(q)·d."""
    mean, square = _uniform(0, 2**bits - 1)
    return -mean, math.sqrt(square - mean**2)


def _scaled(bits: int, scale_bits: int) -> tuple[float, float]:
    """d·s·q − dmin·m, s and m of equal bits, dmin = E[q]·d:   var = E[s²] E[q²] − E[s]² E[q]² + E[q]² var(m)."""
    (q, qq), (s, ss) = _uniform(0, 2**bits - 1), _uniform(0, 2**scale_bits - 1)
    return q, math.sqrt(ss * qq - (s * q) ** 2 + q * q * (ss - s * s))


def _centred(low: int, high: int, scale: tuple[int, int] = (1, 1)) -> float:
    """d·s·q with signed q and s: the mean is next to nothing."""
    return math.sqrt(_uniform(low, high)[1] * _uniform(*scale)[1])


SCALES = {
    "Q4_0": Scales(0, None, 0.0, _centred(-8, 7)),
    "Q4_1": Scales(0, 2, *_affine(4)),
    "Q5_0": Scales(0, None, 0.0, _centred(-16, 15)),
    "Q5_1": Scales(0, 2, *_affine(5)),
    "Q8_0": Scales(0, None, 0.0, _centred(-128, 127)),
    "Q2_K": Scales(80, 82, *_scaled(2, 4)),
    "Q3_K": Scales(108, None, 0.0, _centred(-4, 3, (-32, 31))),
    "Q4_K": Scales(0, 2, *_scaled(4, 6)),
    "Q5_K": Scales(0, 2, *_scaled(5, 6)),
    "Q6_K": Scales(208, None, 0.0, _centred(-32, 31, (-128, 127))),
    "NF4": Scales(0, None, 0.0, math.sqrt(sum(level * level for level in LEVELS) / 16)),
    "INT8": Scales(0, None, 0.0, _centred(-127, 127)),
}


class RandomSource:
    """A `weights.checkpoint.Source` without a file.

    kinds: our name → the type it is kept in, "Q4_K", "F16", …; other matrices are BF16, the rest F32.
    """

    def __init__(self, layout: Layout, kinds: Mapping[str, str], seed: int = 0) -> None:
        self.layout, self.kinds, self.seed = layout, kinds, seed

    @cached_property
    def params(self) -> dict[str, Param]:
        return parameters(self.layout.config)

    def stored(self, row: TensorMapping) -> str:
        plain = "F32" if row.keep_fp32 or len(self.params[row.ours].shape) < 2 else "BF16"
        return self.kinds.get(row.ours, plain)

    def tokenizer(self) -> Tokenizer | None:
        return None

    def read(self, row: TensorMapping, start: int, stop: int) -> Tensor:
        """Rows as a file of the stored type would give them: its own dtype, float32 for packed types."""
        kind = self.stored(row)
        if kind in PACKED_TYPES:
            return dequantize(kind, self.raw(row, start, stop))
        shape = self.params[row.ours].shape
        if row.keep_fp32 or len(shape) < 2:
            depth = len(self.layout.config.layers)
            g = torch.Generator().manual_seed(zlib.crc32(row.ours.encode(), self.seed))
            return fresh(self.params[row.ours], depth, g)[start:stop].to(torch_dtype(kind))
        wide = torch.from_numpy(self._tiles(row, start, stop, lambda g, rows: _values(g, (rows, *shape[1:]))))
        return (wide.float() * (self._deviation(row) * math.sqrt(12) / 65536)).to(torch_dtype(kind))

    def raw(self, row: TensorMapping, start: int, stop: int) -> Tensor:
        """The same rows as bytes: uint8, the last axis counted in bytes."""
        kind, shape = self.stored(row), self.params[row.ours].shape
        if kind not in PACKED_TYPES:
            return self.read(row, start, stop).contiguous().view(torch.uint8)
        inner = (*shape[1:-1], row_bytes(kind, shape[-1]))
        spread = self._deviation(row)
        return torch.from_numpy(self._tiles(row, start, stop, lambda g, rows: _packed(g, kind, (rows, *inner), spread)))

    def _deviation(self, row: TensorMapping) -> float:
        return deviation(self.params[row.ours], len(self.layout.config.layers))

    def _tiles(self, row: TensorMapping, start: int, stop: int, make: _Make) -> np.ndarray:
        """Rows start … stop, cut out of the tiles that hold them."""
        shape = self.params[row.ours].shape
        size = max(1, TILE_VALUES // math.prod(shape[1:]))
        key, parts = zlib.crc32(row.ours.encode()), []
        for tile in range(start // size, -(-stop // size)):
            g = np.random.SFC64(np.random.SeedSequence((self.seed, key, tile)))
            begin, end = tile * size, min((tile + 1) * size, shape[0])
            parts.append(make(g, end - begin)[max(start - begin, 0) : stop - begin])
        return np.concatenate(parts)  # one thread: torch would wait for a busy core


def kinds_of(layout: Layout, recipe: str) -> dict[str, str]:
    """`RandomSource.kinds` of a recipe: a name of `quant.recipes`, or f32, bf16, f16."""
    params = parameters(layout.config)
    if recipe in FLOATS:
        matrices = [name for name, param in params.items() if param.packs]
        return dict.fromkeys(matrices, recipe.upper())
    if (known := recipes.find(recipe)) is None:
        raise RequestError(f"no recipe {recipe!r}; known: {', '.join((*recipes.RECIPES, *FLOATS))}")
    return recipes.quant_types(params, known)


def _bytes(g: np.random.SFC64, count: int) -> np.ndarray:
    return g.random_raw(-(-count // 8)).view(np.uint8)[:count]


def _packed(g: np.random.SFC64, kind: str, shape: tuple[int, ...], spread: float) -> np.ndarray:
    scales = SCALES[kind]
    blocks = _bytes(g, math.prod(shape)).reshape(-1, BLOCKS[kind].bytes if kind in BLOCKS else shape[-1])
    if kind == "INT8":
        blocks[blocks == 0x80] = 0x81  # it has no −128
    number = np.float32 if kind in ("NF4", "INT8") else np.float16
    d = number(max(spread / scales.spread, 6e-8))  # the smallest float16
    _put(blocks, scales.d, d.tobytes())
    if scales.m is not None:
        _put(blocks, scales.m, number(float(d) * scales.ratio).tobytes())
    return blocks.reshape(shape)


def _put(blocks: np.ndarray, at: int, value: bytes) -> None:
    blocks[:, at : at + len(value)] = np.frombuffer(value, np.uint8)


def _values(g: np.random.SFC64, shape: tuple[int, ...]) -> np.ndarray:
    """Uniform whole numbers of 16 bits: fifty times faster than normal ones."""
    return _bytes(g, 2 * math.prod(shape)).view(np.int16).reshape(shape)
