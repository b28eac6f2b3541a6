"""Conversion between float32 and packed bytes; each type is in `legacy`, `kquants`, `int8`, `nf4` or `pack`."""

from __future__ import annotations

import math
from typing import TYPE_CHECKING

from tiercel.errors import RequestError
from tiercel.quant.types import BLOCKS, PACKINGS, row_bytes

if TYPE_CHECKING:
    from torch import Tensor

CHUNK_VALUES = 1 << 19  # 2 MiB of float32 at a time: temporaries stay in the cache
FLOAT16_MAX = 65504.0


def dequantize(quant_type: str, raw: Tensor) -> Tensor:
    """Unpack (…, bytes per row) uint8 → (…, values per row) float32; whole blocks in every row."""
    import torch

    from tiercel.quant import int8, kquants, legacy, nf4

    assert raw.dtype == torch.uint8
    if quant_type == "INT8":
        return int8.dequantize(raw.reshape(-1, raw.shape[-1])).view(*raw.shape[:-1], raw.shape[-1] - 4)
    packing = BLOCKS[quant_type]
    assert raw.shape[-1] % packing.bytes == 0
    if quant_type == "NF4":
        unpack = nf4.dequantize
    else:
        unpack = getattr(kquants if packing.values == 256 else legacy, quant_type.lower())  # (n, bytes) → (n, values)
    blocks = raw.reshape(-1, packing.bytes)
    out = torch.empty(len(blocks), packing.values)
    step = CHUNK_VALUES // packing.values
    for start in range(0, len(blocks), step):
        out[start : start + step] = unpack(blocks[start : start + step])
    return out.view(*raw.shape[:-1], raw.shape[-1] // packing.bytes * packing.values)


def quantize(quant_type: str, x: Tensor, importance: Tensor | None = None) -> Tensor:
    """Pack (rows, n) floats → (rows, row_bytes(quant_type, n)) uint8.

    Args:
        importance: (n), weights of the squared errors of each column, best the mean square of the input it is
            multiplied with.  Only its proportions matter.  Types whose scales are not searched ignore it.

    Raises:
        RequestError: values that the type cannot hold: NaN, infinity, magnitudes beyond float16's.
    """
    import torch

    assert x.dim() == 2, "a matrix is quantized row by row"
    out = torch.empty(x.shape[0], row_bytes(quant_type, x.shape[1]), dtype=torch.uint8)
    w = None if importance is None else weights(importance, x.shape[1])
    step = max(1, CHUNK_VALUES // x.shape[1])
    for start in range(0, x.shape[0], step):
        rows = x[start : start + step].float()
        check(quant_type, rows)
        _pack(quant_type, rows, w, out[start : start + step])
    return out


def _pack(quant_type: str, x: Tensor, w: Tensor | None, out: Tensor) -> None:
    from tiercel.quant import int8, nf4, pack

    if quant_type == "INT8":
        out.copy_(int8.quantize(x))
        return
    packing = BLOCKS[quant_type]
    blocks = x.reshape(-1, packing.values)
    if quant_type == "NF4":
        packed = nf4.quantize(blocks)
    else:
        packed = getattr(pack, quant_type.lower())(blocks, None if w is None else w.expand_as(x).reshape(blocks.shape))
    out.copy_(packed.view_as(out))


def weights(importance: Tensor, values: int) -> Tensor:
    """Importance as the searches take it: mean 1 and above 0, as another input may use a channel that was idle."""
    w = importance.double()
    if w.shape != (values,) or not bool((w >= 0).all()) or not bool(w.isfinite().all()):
        raise RequestError(f"an importance must be {values} finite numbers from 0")
    mean = w.mean()
    return (w / mean + 1e-3).float() if mean > 0 else w.float() + 1


def check(quant_type: str, x: Tensor) -> None:
    """Raise RequestError for values that the type cannot hold."""
    low, high = x.aminmax()  # both NaN if anything is
    largest = max(-float(low), float(high))
    if not largest < math.inf:
        raise RequestError("NaN and infinity cannot be packed")
    if largest > FLOAT16_MAX and quant_type in PACKINGS:
        raise RequestError(
            f"a value of magnitude {largest:g} cannot be packed as {quant_type}, whose scales are float16"
        )
