"""Packed blocks unpack to the very floats llama.cpp's own package gives, whatever the bytes."""

import math
import os
import warnings
from pathlib import Path

import gguf
import numpy as np
import pytest
import torch

from tiercel.quant import CHUNK_VALUES, PACKINGS, dequantize


def judge(type: str, raw: np.ndarray) -> torch.Tensor:
    with warnings.catch_warnings():
        warnings.simplefilter("ignore", RuntimeWarning)  # 0 · inf and inf − inf in random scales
        return torch.from_numpy(gguf.quants.dequantize(raw, gguf.GGMLQuantizationType[type]))


def same_bits(ours: torch.Tensor, theirs: torch.Tensor) -> bool:
    """Equal bit for bit; any NaN stands for any other."""
    ours, theirs = (torch.where(x.isnan(), math.nan, x).view(torch.int32) for x in (ours, theirs))
    return torch.equal(ours, theirs)


def test_every_type_that_real_files_carry_is_here():
    assert set(PACKINGS) == {"Q4_0", "Q4_1", "Q5_0", "Q5_1", "Q8_0", "Q2_K", "Q3_K", "Q4_K", "Q5_K", "Q6_K"}


@pytest.mark.parametrize("type", PACKINGS)
def test_block_sizes_are_those_of_the_format(type: str):
    assert PACKINGS[type] == gguf.GGML_QUANT_SIZES[gguf.GGMLQuantizationType[type]]


@pytest.mark.parametrize("type", PACKINGS)
def test_random_bytes_unpack_bit_for_bit(type: str):
    values, size = PACKINGS[type]
    raw = np.random.default_rng(len(type) + size).integers(0, 256, (300, 3 * size), dtype=np.uint8)
    ours = dequantize(type, torch.from_numpy(raw))
    assert ours.dtype == torch.float32 and ours.shape == (300, 3 * values)
    assert same_bits(ours, judge(type, raw))
    assert ours.isnan().any() and ours.isfinite().float().mean() > 0.8  # random scales hold NaN, but few


@pytest.mark.parametrize("type", PACKINGS)
def test_rows_longer_than_one_chunk_are_joined_without_a_seam(type: str):
    values, size = PACKINGS[type]
    blocks = CHUNK_VALUES // values + 3
    raw = np.random.default_rng(1).integers(0, 60, (1, blocks * size), dtype=np.uint8)  # small bytes: no NaN scales
    ours = dequantize(type, torch.from_numpy(raw))
    assert ours.isfinite().all()
    assert same_bits(ours, judge(type, raw))


@pytest.mark.parametrize("type", PACKINGS)
def test_any_shape_keeps_its_leading_axes(type: str):
    values, size = PACKINGS[type]
    raw = torch.randint(0, 60, (2, 5, 2 * size), dtype=torch.uint8, generator=torch.Generator().manual_seed(0))
    whole = dequantize(type, raw)
    assert whole.shape == (2, 5, 2 * values)
    assert same_bits(whole[1, 3], dequantize(type, raw[1, 3]))
    assert dequantize(type, raw[:0]).shape == (0, 5, 2 * values)


def test_a_block_computed_by_hand():
    """Q4_1 with d = 0.5, m = −1, nibbles 0…15 below and 15…0 above."""
    scales = np.array([0.5, -1.0], dtype=np.float16).view(np.uint8)
    raw = torch.from_numpy(np.concatenate([scales, [j | (15 - j) << 4 for j in range(16)]]).astype(np.uint8))
    expected = [0.5 * j - 1 for j in range(16)] + [0.5 * (15 - j) - 1 for j in range(16)]
    assert dequantize("Q4_1", raw).tolist() == expected


@pytest.mark.skipif("TIERCEL_TEST_SMOLLM2" not in os.environ, reason="TIERCEL_TEST_SMOLLM2 names no GGUF file")
def test_the_tensors_of_a_real_model_unpack_bit_for_bit():
    reader = gguf.GGUFReader(Path(os.environ["TIERCEL_TEST_SMOLLM2"]))
    packed = [t for t in reader.tensors if t.tensor_type.name in PACKINGS]
    assert {t.tensor_type.name for t in packed} == {"Q4_1", "Q8_0"}
    for tensor in packed[:: max(1, len(packed) // 20)]:
        type, raw = tensor.tensor_type.name, np.array(tensor.data[:512])
        assert same_bits(dequantize(type, torch.from_numpy(raw)), judge(type, raw))
