"""Packed products on a GPU against the numbers that the packed bytes stand for."""

import pytest
import torch

pytest.importorskip("triton", reason="pip install triton")

from ops.triton.conftest import DEVICE
from tiercel import quant
from tiercel.ops.linear import QTensor
from tiercel.ops.pointwise import gate_reference
from tiercel.ops.triton.linear import TYPES, gated, on_device, plain


def pair(type, N, K):
    q = QTensor(type, (N, K))
    q.put(0, quant.quantize(type, torch.randn(N, K) * torch.rand(N, 1)))
    return q, on_device(q, DEVICE)


@pytest.mark.parametrize("type", TYPES)
def test_the_same_numbers(type):
    q, there = pair(type, 17, 768)
    assert torch.equal(there.numbers().cpu(), q.numbers())
    which = torch.tensor([[3, 16], [0, 3]], device=DEVICE)
    assert torch.equal(there.rows(which).cpu(), q.numbers()[which.cpu()])


@pytest.mark.parametrize("type", TYPES)
@pytest.mark.parametrize("T", [1, 2, 3, 4, 19, 70])
@pytest.mark.parametrize("N, K", [(5, 256), (33, 2304)])
def test_products(type, T, N, K):
    q, there = pair(type, N, K)
    x, b = torch.randn(T, K), torch.randn(N)
    exact = x.double() @ q.numbers().double().T * 0.7 + b
    for name, tolerance in ((False, 1e-2), (True, 1e-5)):
        there.exact = name
        got = there.multiply(x.to(DEVICE), b.to(DEVICE), 0.7).cpu()
        assert got.dtype == torch.float32 and (got - exact).norm() <= tolerance * exact.norm()


def test_rows_of_x_may_lie_apart_and_outputs_follow_their_dtype():
    q, there = pair("Q4_K", 8, 256)
    x = torch.randn(3, 600, device=DEVICE).to(torch.bfloat16)[:, :256]
    got = there.multiply(x)
    expected = x.cpu().float() @ q.numbers().T
    assert got.dtype == torch.bfloat16 and (got.cpu().float() - expected).norm() <= 1e-2 * expected.norm()


def test_other_types_are_unpacked():
    q = QTensor("Q5_K", (4, 256))
    q.put(0, quant.quantize("Q5_K", torch.randn(4, 256)))
    there = on_device(q, DEVICE)
    assert there.dtype == torch.bfloat16
    torch.testing.assert_close(there.cpu().float(), q.numbers(), atol=0, rtol=4e-3)


@pytest.mark.parametrize("N, K", [(1, 1), (7, 1100), (130, 64)])
@pytest.mark.parametrize("T", [1, 2])
def test_a_plain_matrix_of_few_rows(N, K, T):
    x, w, b = (torch.randn(*shape, device=DEVICE) for shape in ((T, K), (N, 2 * K), (N,)))
    w = w[:, :K]
    torch.testing.assert_close(plain(x, w, b), x @ w.T + b, atol=1e-4, rtol=1e-4)
    torch.testing.assert_close(plain(x, w, None), x @ w.T, atol=1e-4, rtol=1e-4)


@pytest.mark.parametrize("activation", ["silu", "gelu", "gelu_tanh", "relu"])
def test_gate_and_up_at_once(activation):
    x, w, u = (torch.randn(*shape, device=DEVICE) / 4 for shape in ((1, 70), (9, 70), (9, 70)))
    expected = gate_reference(x @ w.T, x @ u.T, activation)
    torch.testing.assert_close(plain(x, w, None, u, activation), expected, atol=1e-4, rtol=1e-4)


def test_gate_and_up_of_packed_matrices():
    (a, gate), (b, up) = pair("Q4_K", 9, 768), pair("Q4_K", 9, 768)
    x = torch.randn(2, 768) / 8
    got = gated(x.to(DEVICE), gate, up, "silu").cpu()
    expected = gate_reference(x @ a.numbers().T, x @ b.numbers().T, "silu")
    assert (got - expected).norm() <= 2e-2 * expected.norm()
