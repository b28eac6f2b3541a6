"""Sizes of packed types: the block types of GGUF files, and INT8 and NF4 beside them.  Standard library only.

A row of values is cut into blocks of 32, 64 or 256; each block carries its own scales.  `legacy.py`, `kquants.py`,
`int8.py` and `nf4.py` draw the bytes.
"""

from __future__ import annotations

from typing import NamedTuple


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


def fits(quant_type: str, values: int) -> bool:
    """Whether a row of this many values can be packed: whole blocks."""
    return values > 0 and (quant_type == "INT8" or values % BLOCKS[quant_type].values == 0)


def row_bytes(quant_type: str, values: int) -> int:
    """Bytes of a packed row; INT8: one float32 scale and a byte for each value."""
    assert fits(quant_type, values), f"{values} values are not whole blocks of {quant_type}"
    if quant_type == "INT8":
        return 4 + values
    packing = BLOCKS[quant_type]
    return values // packing.values * packing.bytes


def panel_bytes(quant_type: str, outputs: int, inputs: int) -> int:
    """Bytes of a matrix repacked for the CPU kernels: rows padded to 16, rows of numbers to whole vectors."""
    panels = -(-outputs // 16)
    if quant_type == "INT8":
        return panels * (64 + -(-inputs // 32) * 512)
    if quant_type in ("BF16", "F32"):
        return panels * (-(-inputs // 2) * 64 if quant_type == "BF16" else inputs * 64)
    return panels * 16 * row_bytes(quant_type, inputs)


def held_bytes(quant_type: str, outputs: int, inputs: int) -> int:
    """Bytes of a matrix once it is complete: bfloat16 is held in twelve bits (ops/cpu/bf12.h).

    A block of 128 weights with an exponent beyond the usual ones keeps its sixteen bits: 1 % of a Gaussian's.
    """
    whole = panel_bytes(quant_type, outputs, inputs)
    if quant_type != "BF16":
        return whole
    panels, blocks = -(-outputs // 16), -(-inputs // 8)
    head = 8 + 64 + 64 * -(-blocks // 512)  # where it begins, its exponents, a bit for each block
    return min(whole, panels * (head + round(blocks * (192 + 0.01 * 64))))
