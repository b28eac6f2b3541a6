"""Packed products on a GPU against the numbers that the packed bytes stand for."""

import pytest
import torch

pytest.importorskip("triton", reason="pip install triton")

from ops.triton.conftest import DEVICE
from tiercel import quant
from tiercel.ops.pointwise import gate_reference
from tiercel.ops.qtensor import QTensor
from tiercel.ops.triton import fp8, tiled
from tiercel.ops.triton.linear import TYPES, gated, in_fp8, on_device, plain
from tiercel.ops.triton.tiled import Tile


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


@pytest.mark.parametrize("T", [1, 4, 19])
@pytest.mark.parametrize("type, K", [("Q8_0", 96), ("INT8", 40), ("INT8", 1), ("NF4", 64)])
def test_odd_widths(type, K, T):
    q, there = pair(type, 7, K)
    x = torch.randn(T, K)
    expected = x @ q.numbers().T
    assert (there.multiply(x.to(DEVICE)).cpu() - expected).norm() <= 2e-2 * expected.norm()


@pytest.mark.parametrize(
    "type, by",
    [(type, by) for type in TYPES for by in (Tile(16, 1, 4, 2), Tile(128, 4, 8, 2, 16, 8))]
    + [("Q4_K", Tile(32, 4, 4, 3, 5)), ("Q8_0", Tile(64, 2, 4, 2, 2))],
)
def test_tiles_and_pieces_of_some_rows(type, by):
    q, there = pair(type, 133, 2304)
    x, b = torch.randn(11, 2304), torch.randn(133)
    expected = x @ q.numbers().T * 0.7 + b
    got = tiled.product(
        x.to(DEVICE), type, (133, 2304), there.bytes, bias_N=b.to(DEVICE), scale=0.7, by=by
    ).cpu()  # fmt: skip
    assert (got - expected).norm() <= 1e-2 * expected.norm()
    if DEVICE == "cpu" and type != "NF4":  # the interpreter rounds nothing but the levels of NF4
        assert (got - expected).norm() <= 1e-5 * expected.norm()


@pytest.mark.parametrize("T", [5, 8, 9, 32, 33, 64])
@pytest.mark.parametrize("N, K", [(64, 64), (3072, 3072), (3072, 12288), (12288, 3072), (130048, 3072), (8, 1 << 20)])
def test_a_chosen_tile_leaves_every_piece_work(T, N, K):
    by = tiled.tile(T, N, K)
    assert by.pieces == 1 or by.groups * by.pieces * tiled.STEPS <= K // 64


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


@pytest.mark.parametrize("type", TYPES)
def test_gate_and_up_of_packed_matrices(type):
    (a, gate), (b, up) = pair(type, 9, 768), pair(type, 9, 768)
    x = torch.randn(2, 768) / 8
    got = gated(x.to(DEVICE), gate, up, "silu").cpu()
    expected = gate_reference(x @ a.numbers().T, x @ b.numbers().T, "silu")
    assert (got - expected).norm() <= 2e-2 * expected.norm()


@pytest.mark.parametrize("T", [1, 2, 3, 40, 600])
@pytest.mark.parametrize("N, K", [(5, 64), (48, 320)])
def test_fp8_products_are_those_of_its_numbers(T, N, K):
    """Weights are what `numbers` says; inputs are rounded to three bits and one scale a row."""
    x, W, b = (torch.randn(*shape, device=DEVICE) for shape in ((T, K), (N, K), (N,)))
    W = W * torch.rand(N, 1, device=DEVICE)
    m = in_fp8(W)
    assert (m.numbers() - W).norm() <= 0.03 * W.norm()
    s = x.abs().amax(1, keepdim=True) / 448
    x8 = (x / s).to(torch.float8_e4m3fn).float() * s
    assert (x8 - x).norm() <= 0.03 * x.norm()
    got, expected = m.multiply(x, b, 0.7), x8 @ m.numbers().T * 0.7 + b
    assert got.dtype == torch.float32 and (got - expected).norm() <= 4e-3 * expected.norm()
    m.exact = True
    torch.testing.assert_close(m.multiply(x, b, 0.7), x @ m.numbers().T * 0.7 + b, atol=1e-3, rtol=1e-3)


def test_fp8_rounds_a_row_the_same_whatever_is_beside_it():
    x, m = torch.randn(40, 128, device=DEVICE), in_fp8(torch.randn(48, 128, device=DEVICE))
    alone, beside = (fp8.quantize_rows(rows) for rows in (x[:1], x))
    assert all(torch.equal(a, b[:1]) for a, b in zip(alone, beside, strict=True))
    got, expected = m.multiply(x)[:1], m.multiply(x[:1])  # of many rows the answer is rounded to bfloat16 on a GPU
    assert (got - expected).norm() <= 4e-3 * expected.norm()


def test_fp8_with_a_gate_and_onto_a_sum():
    x, base = torch.randn(2, 128, device=DEVICE), torch.randn(2, 16, device=DEVICE)
    m, up = (in_fp8(torch.randn(16, 128, device=DEVICE) / 8) for _ in range(2))
    expected = gate_reference(m.multiply(x), up.multiply(x), "silu")
    torch.testing.assert_close(gated(x, m, up, "silu"), expected, atol=1e-4, rtol=1e-4)
    torch.testing.assert_close(m.fused(x, base=base), base + m.multiply(x), atol=1e-4, rtol=1e-4)
    joined = type(m).joined([m, up])
    assert all(torch.equal(a.numbers(), b.numbers()) for a, b in zip(joined.split([16, 16]), (m, up), strict=True))
