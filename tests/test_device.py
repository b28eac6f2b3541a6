"""device="cuda" where there is none is refused in one line; what is said of a device is checked."""

import pytest
import torch

import tiercel
import tiny
from tiercel.bench.case import Case
from tiercel.errors import RequestError


@pytest.mark.skipif(torch.cuda.is_available(), reason="there is a GPU")
def test_a_gpu_that_is_not_there(tmp_path):
    with pytest.raises(RequestError, match="needs") as error:
        tiercel.load(tiny.checkpoint(tmp_path / "model", "attention"), device="cuda")
    assert "\n" not in str(error.value)


def test_bench_takes_cpu_or_cuda():
    assert Case("m", device="cuda").device == "cuda"
    with pytest.raises(RequestError, match="cpu or cuda"):
        Case("m", device="gpu")
    with pytest.raises(RequestError, match=r"llama\.cpp is measured on the CPU"):
        Case("m", device="cuda", vs=("llama.cpp",))
