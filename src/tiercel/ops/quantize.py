"""float32 matrices → packed ones.

    packed row = argmin Σ w (value(row) − x)²      over the scales, minima and levels of the type's blocks

`quant.quantize` is the reference for every type; the searched super-blocks have a kernel that gives the same bytes
about ten times faster.
"""

from __future__ import annotations

import torch
from torch import Tensor

from tiercel import quant
from tiercel.ops.cpu import native

CHUNK_VALUES = 1 << 22  # as float32 at a time


def quantize(type: str, x: Tensor, importance: Tensor | None = None) -> Tensor:
    """(rows, n) floats → (rows, bytes) uint8; the bytes of `quant.quantize`."""
    if not native.available or type not in native.SUPER_BLOCKS:
        return quant.quantize(type, x, importance)
    out = torch.empty(x.shape[0], quant.row_bytes(type, x.shape[1]), dtype=torch.uint8)
    weights = None if importance is None else quant.weights(importance, x.shape[1])
    step = max(1, CHUNK_VALUES // x.shape[1])
    for start in range(0, x.shape[0], step):
        rows = x[start : start + step].float().contiguous()
        quant.check(type, rows)
        native.quantize(type, rows, weights, out[start : start + step])
    return out
