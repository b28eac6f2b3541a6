"""Packing: what comes out unpacks to nearly what went in, at least as nearly as llama.cpp's does."""

import json
import sys
from pathlib import Path

import gguf
import pytest
import torch

from tiercel.errors import RequestError
from tiercel.ops.cpu import native
from tiercel.ops.quantize import quantize as picked
from tiercel.quant import FLOAT16_MAX, PACKED_TYPES, PACKINGS, dequantize, fits, quantize, row_bytes

GOLDEN = Path(__file__).parents[1] / "golden"
sys.path.insert(0, str(GOLDEN))
from quant_samples import importance, samples, squared_error  # noqa: E402

THEIRS = json.loads((GOLDEN / "quant_errors.json").read_text())
SAMPLES = samples()
PLAIN_ROUNDING = [type for type, packing in PACKINGS.items() if packing.values == 32]
SEARCHED = [type for type, packing in PACKINGS.items() if packing.values == 256]
HARD = {
    "zeros": torch.zeros(2, 512),
    "one value": torch.zeros(2, 512).index_fill(1, torch.tensor([77]), -3.0),
    "constant": torch.full((2, 512), 0.7),
    "negative constant": torch.full((2, 512), -0.7),
    "only positive": torch.rand(2, 512, generator=torch.Generator().manual_seed(1)) + 1,
    "a ramp": torch.linspace(-1, 1, 1024).view(2, 512),
    "the largest there is": torch.full((2, 512), FLOAT16_MAX) * torch.tensor([1.0, -1.0]).repeat(256),
    "tiny": torch.randn(2, 512, generator=torch.Generator().manual_seed(2)) * 1e-6,
    "denormal": torch.randn(2, 512, generator=torch.Generator().manual_seed(3)) * 1e-40,
    "one loud block": torch.randn(2, 512, generator=torch.Generator().manual_seed(4))
    * torch.tensor([1.0, 1e4]).repeat_interleave(256),
}


@pytest.mark.parametrize("type", PACKINGS)
@pytest.mark.parametrize("name", SAMPLES)
def test_errors_are_no_larger_than_llama_cpps(name: str, type: str):
    x, w = SAMPLES[name], importance()
    plain, weighted = THEIRS[name][type]
    ours = dequantize(type, picked(type, torch.from_numpy(x))).numpy()
    assert squared_error(x, ours, None) <= 1.01 * plain
    ours = dequantize(type, picked(type, torch.from_numpy(x), torch.from_numpy(w))).numpy()
    assert squared_error(x, ours, w) <= 1.01 * weighted


@pytest.mark.parametrize("type", PACKINGS)
def test_the_gguf_package_reads_our_blocks_as_we_do(type: str):
    for x in SAMPLES.values():
        raw = quantize(type, torch.from_numpy(x))
        theirs = gguf.quants.dequantize(raw.numpy(), gguf.GGMLQuantizationType[type])
        assert torch.equal(dequantize(type, raw), torch.from_numpy(theirs))


@pytest.mark.parametrize("type", PLAIN_ROUNDING)
def test_blocks_of_32_are_byte_for_byte_those_of_the_gguf_package(type: str):
    for x in SAMPLES.values():
        theirs = gguf.quants.quantize(x, gguf.GGMLQuantizationType[type])
        assert torch.equal(quantize(type, torch.from_numpy(x)), torch.from_numpy(theirs))


@pytest.mark.parametrize("type", PACKED_TYPES)
@pytest.mark.parametrize("name", HARD)
def test_hard_values_come_back_near_or_as_zero(name: str, type: str):
    x = HARD[name]
    y = dequantize(type, quantize(type, x))
    assert y.isfinite().all()
    step = 1 / (2 if type in ("Q2_K", "Q3_K", "NF4") else 7)  # of the largest magnitude, and float16 ends at 6e-8
    assert (y - x).abs().max() <= step * x.abs().max() + 5e-6
    if name == "zeros":
        assert not y.any()


@pytest.mark.parametrize("type", PACKED_TYPES)
def test_nothing_that_is_not_a_number_is_packed(type: str):
    for bad in (float("nan"), float("inf"), -float("inf")):
        x = torch.ones(3, 256)
        x[1, 100] = bad
        for pack in (quantize, picked):
            with pytest.raises(RequestError, match="NaN and infinity"):
                pack(type, x)
    if type in PACKINGS:
        with pytest.raises(RequestError, match="65600 cannot be packed"):
            picked(type, torch.full((1, 256), 65600.0))
    else:
        assert dequantize(type, picked(type, torch.full((1, 256), 1e30))).allclose(torch.tensor(1e30))


@pytest.mark.parametrize("type", PACKED_TYPES)
def test_row_sizes(type: str):
    assert fits(type, 768) and not fits(type, 0)
    assert quantize(type, torch.zeros(0, 768)).shape == (0, row_bytes(type, 768))
    assert quantize(type, torch.randn(3, 768).bfloat16()).shape == (3, row_bytes(type, 768))
    assert fits(type, 20) == (type == "INT8")


def test_many_rows_are_packed_like_few():
    x = torch.randn(700, 1024)
    for type in PACKED_TYPES:
        assert torch.equal(picked(type, x)[690:], picked(type, x[690:]))


def test_an_importance_moves_the_error_to_where_it_counts_less():
    x, w = torch.from_numpy(SAMPLES["normal"]), torch.ones(1024)
    w[::2] = 100
    for type in [t for t in PACKINGS if t != "Q8_0"]:
        off = [(dequantize(type, picked(type, x, v)) - x)[:, ::2].square().sum() for v in (None, w)]
        assert off[1] < off[0], type
        assert torch.equal(picked(type, x, w), picked(type, x, w * 1e-9)), "proportions are what counts"
    for bad in (torch.ones(3), -w, w * float("nan")):
        with pytest.raises(RequestError, match="importance"):
            picked("Q4_K", x, bad)
    assert torch.equal(picked("Q4_K", x, w * 0), quantize("Q4_K", x)), "nothing known is as good as nothing asked"


@pytest.mark.skipif(not native.available, reason="no kernels were built")
@pytest.mark.parametrize("type", SEARCHED)
def test_the_kernel_gives_the_references_bytes(type: str):
    """On the instruction set in use; TIERCEL_ISA chooses another."""
    cases = [(torch.from_numpy(x), w) for x in SAMPLES.values() for w in (None, torch.from_numpy(importance()))]
    cases += [(x, None) for x in HARD.values()] + [(torch.randn(7, 768), None), (torch.randn(1, 256).half(), None)]
    for x, w in cases:
        assert torch.equal(picked(type, x, w), quantize(type, x, w))


def test_int8_takes_one_scale_a_row_and_nf4_sixty_four_values_a_scale():
    x = torch.randn(5, 100)
    raw = quantize("INT8", x)
    scales = raw[:, :4].contiguous().view(torch.float32)
    assert torch.equal(scales, x.abs().amax(1, keepdim=True) / 127)
    assert (dequantize("INT8", raw) - x).abs().max() <= scales.max() / 2 * 1.0001
    raw = quantize("NF4", torch.tensor([[1.0] + [0.0] * 62 + [-1.0]]))
    assert raw.tolist() == [[0, 0, 128, 63, 0xF7, *[0x77] * 30, 0x70]]  # absmax 1; the first value in the high nibble
