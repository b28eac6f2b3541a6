"""Convolution, norms, experts and rotary positions against their slow twins and by hand."""

import math

import pytest
import torch
import torch.nn.functional as F

from tiercel.mixers.attention.rope import RopeConfig
from tiercel.mixers.attention.rotary import frequencies, rotate
from tiercel.ops.conv1d import conv1d, conv1d_reference
from tiercel.ops.norm import gated_rms_norm, rms_norm, rms_norm_reference
from tiercel.ops.pointwise import ACTIVATIONS, gate, gate_reference


@pytest.mark.parametrize("L, C, K", [(1, 3, 4), (9, 5, 4), (2, 1, 1), (7, 6, 2)])
@pytest.mark.parametrize("bias", [True, False])
def test_convolution(L, C, K, bias):
    x, w = torch.randn(K - 1 + L, C), torch.randn(C, K)
    b = torch.randn(C) if bias else None
    torch.testing.assert_close(conv1d(x, w, b).double(), conv1d_reference(x, w, b), atol=1e-6, rtol=1e-6)


def test_convolution_is_bit_equal_however_it_is_cut():
    x, w, b = torch.randn(3 + 20, 6), torch.randn(6, 4), torch.randn(6)
    parts = [conv1d(x[i : i + 3 + 5], w, b) for i in range(0, 20, 5)]
    assert torch.equal(torch.cat(parts), conv1d(x, w, b))


def test_rms_norm_by_hand():
    x, w = torch.tensor([[3.0, 4.0]]), torch.tensor([1.0, 2.0])
    rms = math.sqrt((9 + 16) / 2 + 0.5)
    torch.testing.assert_close(rms_norm(x, w, 0.5), torch.tensor([[3 / rms, 8 / rms]]))


def gradients(f, *tensors):
    leaves = [t.clone().requires_grad_() for t in tensors]
    y = f(*leaves)
    return y, torch.autograd.grad(y, leaves, torch.linspace(-1, 1, y.numel()).view(y.shape))


def test_the_way_back_of_a_norm_and_of_a_gate_is_that_of_their_formulas():
    x, u, w = torch.randn(7, 12), torch.randn(7, 12), torch.rand(12)
    pairs = [((x, w), lambda x, w: rms_norm(x, w, 1e-5), lambda x, w: rms_norm_reference(x, w, 1e-5))]
    for name in ACTIVATIONS:
        pairs.append(((x, u), lambda g, u, n=name: gate(g, u, n), lambda g, u, n=name: gate_reference(g, u, n)))
    for given, ours, formula in pairs:
        (y, got), (wanted_y, wanted) = gradients(ours, *given), gradients(formula, *given)
        assert torch.allclose(y, wanted_y, atol=1e-6)
        assert all(torch.allclose(a, b, atol=1e-5) for a, b in zip(got, wanted, strict=True))


@pytest.mark.parametrize("groups", [1, 2, 3])
@pytest.mark.parametrize("gate_first", [True, False])
def test_gated_norm_takes_each_group_by_itself(groups, gate_first):
    y, z, w = torch.randn(4, 12), torch.randn(4, 12), torch.randn(12)
    got = gated_rms_norm(y, z, w, 1e-5, groups, gate_first)
    h = y * F.silu(z) if gate_first else y
    parts = [rms_norm(p, q, 1e-5) for p, q in zip(h.chunk(groups, 1), w.chunk(groups), strict=True)]
    expected = torch.cat(parts, 1)
    torch.testing.assert_close(got, expected if gate_first else expected * F.silu(z))


def test_rotation_keeps_lengths_and_sees_only_distance():
    f, scale = frequencies(RopeConfig(theta=100.0), 8)
    assert scale == 1.0

    def at(x, position):
        angle = torch.outer(torch.tensor([float(position)]), f)
        return rotate(x, angle.cos(), angle.sin())

    q, k = torch.randn(1, 1, 8), torch.randn(1, 1, 8)
    torch.testing.assert_close(at(q, 5).norm(), q.norm())
    torch.testing.assert_close((at(q, 9) * at(k, 4)).sum(), (at(q, 105) * at(k, 100)).sum(), atol=1e-4, rtol=1e-4)


def test_a_fraction_of_the_head_is_rotated_from_the_front():
    f, _ = frequencies(RopeConfig(fraction=0.5), 8)
    assert len(f) == 2
    angle = torch.outer(torch.tensor([3.0]), f)
    x = torch.randn(2, 1, 8)
    turned = rotate(x, angle.cos(), angle.sin())
    assert torch.equal(turned[..., 4:], x[..., 4:]) and not torch.equal(turned[..., :4], x[..., :4])
