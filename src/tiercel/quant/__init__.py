"""Packed number formats: their sizes, and conversion to and from float32.

`types.py` has the sizes (no torch), `convert.py` the two directions; `recipes.py` says which tensor gets which type.
"""

from tiercel.quant.convert import CHUNK_VALUES, FLOAT16_MAX, check, dequantize, quantize, weights
from tiercel.quant.types import (
    BLOCKS,
    PACKED_TYPES,
    PACKINGS,
    Packing,
    fits,
    held_bytes,
    panel_bytes,
    row_bytes,
)

__all__ = [
    "BLOCKS",
    "CHUNK_VALUES",
    "FLOAT16_MAX",
    "PACKED_TYPES",
    "PACKINGS",
    "Packing",
    "check",
    "dequantize",
    "fits",
    "held_bytes",
    "panel_bytes",
    "quantize",
    "row_bytes",
    "weights",
]
