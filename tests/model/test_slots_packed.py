"""A packed network in slots: steps of joined matrices that meet rounded inputs stay near the numbers of its weights."""

import copy

import pytest
import torch

pytest.importorskip("triton", reason="pip install triton")

import tiny
from ops.triton.conftest import DEVICE
from tiercel import quant
from tiercel.model.cuda_graphs import CUDAGraphRunner, prefill
from tiercel.model.gpu_layout import fuse
from tiercel.model.layers import Embedding, Linear, set_weight
from tiercel.model.state_cache import StateCache
from tiercel.ops.qtensor import QTensor
from tiercel.ops.triton.linear import on_device
from tiercel.ops.triton.norm import rms_norm
from tiercel.ops.triton.rounded import rounded

SIZES = dict(width=256, ffn_width=256, repeat=1, mamba_head_dim=128, head_dim=64, kv_heads=1, groups=2, state=16)


@pytest.fixture(
    scope="module",
    params=["Q4_K", *(pytest.param(type, marks=pytest.mark.slow) for type in ("Q6_K", "Q8_0", "INT8", "plain"))],
)
def networks(request):
    """One whose matrices are packed, and a plain one of the same numbers."""
    plain = tiny.network("attention+mamba2", native=False, **SIZES).requires_grad_(False)
    packed = copy.deepcopy(plain).to(DEVICE)
    for a, b in zip(plain.modules(), packed.modules(), strict=True):
        if request.param != "plain" and isinstance(a, (Linear, Embedding)) and quant.fits("Q6_K", a.weight.shape[1]):
            q = QTensor(request.param, tuple(a.weight.shape))
            q.put(0, quant.quantize(request.param, a.weight.detach()))
            a.weight.copy_(q.numbers())
            set_weight(b, "weight", on_device(q, DEVICE))
    plain._tie(), packed._tie()
    fuse(packed)
    return plain.to(DEVICE), packed, request.param


@pytest.mark.parametrize("rows", [1, pytest.param(3, marks=pytest.mark.slow)])
def test_steps(networks, rows):
    plain, packed, type = networks
    texts = [torch.randint(0, 300, (6 + i,), generator=torch.Generator().manual_seed(i)) for i in range(rows)]
    texts = [text.to(DEVICE) for text in texts]
    expected = [plain(text) for text in texts]
    slots = StateCache(packed, 4, 100)
    numbers = [slots.take() for _ in texts]
    for slot, text in zip(numbers, texts, strict=True):
        prefill(packed, slots, [slot], [text[:-2]])
    graphs = CUDAGraphRunner(packed, slots, (1, 4))
    for back in (2, 1):
        got = graphs.step(numbers, torch.stack([text[-back] for text in texts]))
        want = torch.stack([logits[-back] for logits in expected])
        error = float((got - want).norm() / want.norm())
        assert error < (1e-4 if type == "plain" else 0.05)
    assert packed.layers[0].joint is not None


def test_a_norm_rounds_what_it_gives():
    x, w = torch.randn(3, 96, device=DEVICE), torch.rand(96, device=DEVICE)
    once, r = rms_norm(x, w, 1e-5), rounded(rms_norm(x, w, 1e-5, round=True))
    value = r.q.float().view(3, 3, 32) * r.scales.unsqueeze(-1)
    assert (value.flatten(1) - once).norm() < 0.01 * once.norm()
    torch.testing.assert_close(r.sums, value.sum(-1), atol=1e-5, rtol=1e-5)
