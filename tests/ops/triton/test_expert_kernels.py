"""Experts in kernels equal one token and one expert at a time: experts without tokens, with all, odd sizes."""

import pytest
import torch

pytest.importorskip("triton", reason="pip install triton")

from ops.triton.conftest import DEVICE
from tiercel.ops.moe import moe_reference
from tiercel.ops.triton import experts


@pytest.mark.parametrize("activation", ["silu", "gelu_tanh", "relu2"])
@pytest.mark.parametrize("gated", [True, False])
@pytest.mark.parametrize("T, E, K", [(1, 5, 2), (7, 3, 3), (150, 2, 1), (40, 9, 2)])
def test_experts_are_the_reference(T, E, K, gated, activation):
    g = torch.Generator().manual_seed(T)
    D, F = 70, 45
    x, weights = torch.randn(T, D, generator=g), torch.rand(T, K, generator=g)
    chosen = torch.rand(T, E, generator=g).topk(K).indices
    gate, up = (torch.randn(E, F, D, generator=g) / 8 for _ in range(2))
    down = torch.randn(E, D, F, generator=g) / 8
    if T == 40:
        chosen[:, 0] = 4  # many for one, none for some
        chosen[:, 1] = torch.where(chosen[:, 1] == 4, 5, chosen[:, 1])
    expected = moe_reference(x, weights, chosen, gate if gated else None, up, down, activation)
    given = [t.to(DEVICE) for t in (x, weights, chosen)]
    matrices = [None if t is None else t.to(DEVICE) for t in (gate if gated else None, up, down)]
    got = experts.moe(*given, *matrices, activation)
    torch.testing.assert_close(got.double().cpu(), expected, atol=1e-5, rtol=1e-5)
