"""Asks llama.cpp how well it packs, and writes quant_errors.json beside this file.  Run by hand, once per version.

    python make_quant_errors.py LLAMA_CPP/build/bin/libggml-base.so     (llama.cpp of llama-cpp-python 0.3.36)

quant_errors.json: sample → type → [relative squared error, the same weighted by an importance it was told of].
Packed by ggml_quantize_chunk, unpacked by the gguf package.
"""

from __future__ import annotations

import ctypes
import json
import sys
from pathlib import Path

import gguf
import numpy as np
from quant_samples import importance, samples, squared_error

HERE = Path(__file__).parent
TYPES = ["Q4_0", "Q4_1", "Q5_0", "Q5_1", "Q8_0", "Q2_K", "Q3_K", "Q4_K", "Q5_K", "Q6_K"]


def pack(ggml: ctypes.CDLL, type: gguf.GGMLQuantizationType, x: np.ndarray, weights: np.ndarray | None) -> np.ndarray:
    values, size = gguf.GGML_QUANT_SIZES[type]
    out = np.zeros((x.shape[0], x.shape[1] // values * size), np.uint8)
    at = None if weights is None else weights.ctypes.data
    ggml.ggml_quantize_chunk(int(type), x.ctypes.data, out.ctypes.data, 0, *x.shape, at)
    return out


def main(library: str) -> None:
    ggml = ctypes.CDLL(library)
    i64, at = ctypes.c_int64, ctypes.c_void_p
    ggml.ggml_quantize_chunk.argtypes = [ctypes.c_int, at, at, i64, i64, i64, at]
    ggml.ggml_quantize_chunk.restype = ctypes.c_size_t
    found: dict[str, dict[str, list[float]]] = {}
    for name, x in samples().items():
        for kind in TYPES:
            type = gguf.GGMLQuantizationType[kind]
            ggml.ggml_quantize_init(int(type))
            both = [
                squared_error(x, gguf.quants.dequantize(pack(ggml, type, x, w), type), w) for w in (None, importance())
            ]
            found.setdefault(name, {})[kind] = both
    (HERE / "quant_errors.json").write_text(json.dumps(found, indent=1) + "\n")


if __name__ == "__main__":
    main(sys.argv[1])
