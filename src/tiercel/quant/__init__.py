"""How numbers are packed: the block types of GGUF files, and int8 and NF4 beside them; there and back.

A row of values is cut into blocks of 32, 64 or 256; each block carries its own scales.  `legacy.py`, `kquants.py`,
`int8.py` and `nf4.py` draw the bytes; here are the sizes (known without torch: headers are read with them), and the
two functions that unpack and pack any of them.  `recipes.py` says which tensor gets which.
"""

from __future__ import annotations

import math
from typing import TYPE_CHECKING, NamedTuple

from tiercel.errors import RequestError

if TYPE_CHECKING:
    from torch import Tensor

CHUNK_VALUES = 1 << 19  # 2 MiB of float32 at a time: temporaries stay in the cache
LARGEST = 65504.0  # of float16


class Packing(NamedTuple):
    values: int  # per block
    bytes: int  # per block


PACKINGS: dict[str, Packing] = {
    "Q4_0": Packing(32, 18),
    "Q4_1": Packing(32, 20),
    "Q5_0": Packing(32, 22),
    "Q5_1": Packing(32, 24),
    "Q8_0": Packing(32, 34),
    "Q2_K": Packing(256, 84),
    "Q3_K": Packing(256, 110),
    "Q4_K": Packing(256, 144),
    "Q5_K": Packing(256, 176),
    "Q6_K": Packing(256, 210),
}

BLOCKS = PACKINGS | {"NF4": Packing(64, 36)}  # a block of INT8 is the whole row
PACKED_TYPES = (*BLOCKS, "INT8")  # the last two are not of GGUF files


def block_size(type: str) -> tuple[int, int]:
    """(values, bytes) of one block of a GGUF type."""
    return PACKINGS[type]


def fits(type: str, values: int) -> bool:
    """Whether a row of so many values can be packed: whole blocks."""
    return values > 0 and (type == "INT8" or values % BLOCKS[type].values == 0)


def row_bytes(type: str, values: int) -> int:
    """What a row of values takes; INT8: one float32 scale and a byte for each."""
    assert fits(type, values), f"{values} values are not whole blocks of {type}"
    if type == "INT8":
        return 4 + values
    packing = BLOCKS[type]
    return values // packing.values * packing.bytes


def panel_bytes(type: str, outputs: int, inputs: int) -> int:
    """What a matrix takes in the kernels' panels: rows filled up to sixteen, rows of numbers to whole vectors."""
    panels = -(-outputs // 16)
    if type == "INT8":
        return panels * (64 + -(-inputs // 32) * 512)
    if type in ("BF16", "F32"):
        return panels * (-(-inputs // 2) * 64 if type == "BF16" else inputs * 64)
    return panels * 16 * row_bytes(type, inputs)


def held_bytes(type: str, outputs: int, inputs: int) -> int:
    """What a matrix takes once it is complete: bfloat16 lies in twelve bits (ops/cpu/twelve.h).

    A block of 128 weights with an exponent beyond the usual ones keeps its sixteen bits: 1 % of a Gaussian's.
    """
    whole = panel_bytes(type, outputs, inputs)
    if type != "BF16":
        return whole
    panels, blocks = -(-outputs // 16), -(-inputs // 8)
    head = 8 + 64 + 64 * -(-blocks // 512)  # where it begins, its exponents, a bit for each block
    return min(whole, panels * (head + round(blocks * (192 + 0.01 * 64))))


def dequantize(type: str, raw: Tensor) -> Tensor:
    """(…, bytes per row) uint8 → (…, values per row) float32; whole blocks in every row."""
    import torch

    from tiercel.quant import int8, kquants, legacy, nf4

    assert raw.dtype == torch.uint8
    if type == "INT8":
        return int8.dequantize(raw.reshape(-1, raw.shape[-1])).view(*raw.shape[:-1], raw.shape[-1] - 4)
    packing = BLOCKS[type]
    assert raw.shape[-1] % packing.bytes == 0
    if type == "NF4":
        unpack = nf4.dequantize
    else:
        unpack = getattr(kquants if packing.values == 256 else legacy, type.lower())  # (n, bytes) → (n, values)
    blocks = raw.reshape(-1, packing.bytes)
    out = torch.empty(len(blocks), packing.values)
    step = CHUNK_VALUES // packing.values
    for start in range(0, len(blocks), step):
        out[start : start + step] = unpack(blocks[start : start + step])
    return out.view(*raw.shape[:-1], raw.shape[-1] // packing.bytes * packing.values)


def quantize(type: str, x: Tensor, importance: Tensor | None = None) -> Tensor:
    """(rows, n) floats → (rows, row_bytes(type, n)) uint8.

    importance: (n), how much the squared errors of a column count, best the mean square of the input it is
    multiplied with.  Only its proportions matter.  Types whose scales are not searched ignore it.
    Raises RequestError for values that the type cannot hold: NaN, infinity, magnitudes beyond float16's.
    """
    import torch

    assert x.dim() == 2, "a matrix is quantized row by row"
    out = torch.empty(x.shape[0], row_bytes(type, x.shape[1]), dtype=torch.uint8)
    w = None if importance is None else weights(importance, x.shape[1])
    step = max(1, CHUNK_VALUES // x.shape[1])
    for start in range(0, x.shape[0], step):
        rows = x[start : start + step].float()
        check(type, rows)
        _pack(type, rows, w, out[start : start + step])
    return out


def _pack(type: str, x: Tensor, w: Tensor | None, out: Tensor) -> None:
    from tiercel.quant import int8, nf4, pack

    if type == "INT8":
        out.copy_(int8.quantize(x))
        return
    packing = BLOCKS[type]
    blocks = x.reshape(-1, packing.values)
    if type == "NF4":
        packed = nf4.quantize(blocks)
    else:
        packed = getattr(pack, type.lower())(blocks, None if w is None else w.expand_as(x).reshape(blocks.shape))
    out.copy_(packed.view_as(out))


def weights(importance: Tensor, values: int) -> Tensor:
    """An importance as the searches take it: mean 1, and never quite 0, for another text may use an idle channel."""
    w = importance.double()
    if w.shape != (values,) or not bool((w >= 0).all()) or not bool(w.isfinite().all()):
        raise RequestError(f"an importance must be {values} finite numbers from 0")
    mean = w.mean()
    return (w / mean + 1e-3).float() if mean > 0 else w.float() + 1


def check(type: str, x: Tensor) -> None:
    """RequestError for values that the type cannot hold."""
    low, high = x.aminmax()  # both NaN if anything is
    most = max(-float(low), float(high))
    if not most < math.inf:
        raise RequestError("NaN and infinity cannot be packed")
    if most > LARGEST and type in PACKINGS:
        raise RequestError(f"a value of magnitude {most:g} cannot be packed as {type}, whose scales are float16")
