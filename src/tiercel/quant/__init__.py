"""How numbers are packed: the block types of GGUF files and their way back to float32.

A row of values is cut into blocks of 32 or 256; each block carries its own scales.  `legacy.py` and
`kquants.py` draw the bytes; here are the sizes (known without torch: headers are read with them), and the one
function that unpacks any of them.
"""

from __future__ import annotations

from typing import TYPE_CHECKING, NamedTuple

if TYPE_CHECKING:
    from torch import Tensor

CHUNK_VALUES = 1 << 19  # 2 MiB of float32 at a time: temporaries stay in the cache


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


def block_size(type: str) -> tuple[int, int]:
    """(values, bytes) of one block."""
    return PACKINGS[type]


def dequantize(type: str, raw: Tensor) -> Tensor:
    """(…, bytes per row) uint8 → (…, values per row) float32; whole blocks in every row."""
    import torch

    from tiercel.quant import kquants, legacy

    packing = PACKINGS[type]
    assert raw.dtype == torch.uint8 and raw.shape[-1] % packing.bytes == 0
    unpack = getattr(kquants if packing.values == 256 else legacy, type.lower())  # (n, bytes) → (n, values)
    blocks = raw.reshape(-1, packing.bytes)
    out = torch.empty(len(blocks), packing.values)
    step = CHUNK_VALUES // packing.values
    for start in range(0, len(blocks), step):
        out[start : start + step] = unpack(blocks[start : start + step])
    return out.view(*raw.shape[:-1], raw.shape[-1] // packing.bytes * packing.values)
