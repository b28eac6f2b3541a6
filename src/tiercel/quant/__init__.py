"""How numbers are packed: the block types of GGUF files and their way back to float32.

A row of values is cut into blocks of 32 or 256; each block carries its own scales.  `legacy.py` and
`kquants.py` draw the bytes; here is the table, and the one function that unpacks any of them.
"""

from __future__ import annotations

from collections.abc import Callable
from typing import NamedTuple

import torch
from torch import Tensor

from tiercel.quant import kquants, legacy

CHUNK_VALUES = 1 << 19  # 2 MiB of float32 at a time: temporaries stay in the cache


class Packing(NamedTuple):
    values: int  # per block
    bytes: int  # per block
    unpack: Callable[[Tensor], Tensor]  # (n, bytes) uint8 → (n, values) float32


PACKINGS: dict[str, Packing] = {
    "Q4_0": Packing(32, 18, legacy.q4_0),
    "Q4_1": Packing(32, 20, legacy.q4_1),
    "Q5_0": Packing(32, 22, legacy.q5_0),
    "Q5_1": Packing(32, 24, legacy.q5_1),
    "Q8_0": Packing(32, 34, legacy.q8_0),
    "Q2_K": Packing(256, 84, kquants.q2_k),
    "Q3_K": Packing(256, 110, kquants.q3_k),
    "Q4_K": Packing(256, 144, kquants.q4_k),
    "Q5_K": Packing(256, 176, kquants.q5_k),
    "Q6_K": Packing(256, 210, kquants.q6_k),
}


def block_size(type: str) -> tuple[int, int]:
    """(values, bytes) of one block."""
    return PACKINGS[type].values, PACKINGS[type].bytes


def dequantize(type: str, raw: Tensor) -> Tensor:
    """(…, bytes per row) uint8 → (…, values per row) float32; whole blocks in every row."""
    packing = PACKINGS[type]
    assert raw.dtype == torch.uint8 and raw.shape[-1] % packing.bytes == 0
    blocks = raw.reshape(-1, packing.bytes)
    out = torch.empty(len(blocks), packing.values)
    step = CHUNK_VALUES // packing.values
    for start in range(0, len(blocks), step):
        out[start : start + step] = packing.unpack(blocks[start : start + step])
    return out.view(*raw.shape[:-1], raw.shape[-1] // packing.bytes * packing.values)
