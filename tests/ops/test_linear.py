"""Packed products: every type, shape, instruction set and thread count against the numbers they stand for."""

import pytest
import torch

from tiercel import quant
from tiercel.ops import cpu
from tiercel.ops.linear import NUMBERS, QTensor, multiply_reference

TYPES = [*quant.PACKED_TYPES, *NUMBERS]
ISAS = cpu._native.available() if cpu.there else []
needs_kernels = pytest.mark.skipif(not cpu.there, reason="no native kernels here")


@pytest.fixture(params=ISAS or ["torch"])
def isa(request):
    """Every instruction set this machine has."""
    if not cpu.there:
        pytest.skip("no native kernels here")
    cpu._native.choose(request.param)
    yield request.param
    cpu._native.choose(cpu.isa)


@pytest.fixture(autouse=True)
def threads():
    yield
    if cpu.there:
        cpu._native.set_threads(torch.get_num_threads())


def matrix(type: str, N: int, K: int) -> QTensor:
    """Random values packed as a quantizer would, and what else a file may hold: random bytes."""
    q = QTensor(type, (N, K))
    W = torch.randn(N, K) * torch.rand(N, 1)
    q.put(0, W if type in NUMBERS else quant.quantize(type, W))
    return q


def shapes(type: str) -> list[tuple[int, int]]:
    if type in ("INT8", *NUMBERS):
        return [(1, 1), (17, 33), (40, 512), (3, 1057)]
    block = quant.BLOCKS[type].values
    return [(1, block), (17, 3 * block), (40, 1024 + block), (64, 2048)]


@pytest.mark.parametrize("type", TYPES)
def test_what_goes_in_comes_out(type, isa):
    for N, K in shapes(type):
        q = QTensor(type, (N, K))
        raw = torch.randint(0, 256, (N, len(quant_row(type, K))), dtype=torch.uint8)
        for start in range(0, N, 16):
            q.put(start, raw[start : start + 16])
        assert torch.equal(q.raw(), raw)
        assert torch.equal(q.raw(N // 2, N), raw[N // 2 :])


def quant_row(type: str, K: int) -> range:
    return range(K * NUMBERS[type].itemsize if type in NUMBERS else quant.row_bytes(type, K))


@pytest.mark.parametrize("type", TYPES)
def test_rows_are_the_reference_bit_for_bit(type, isa):
    for N, K in shapes(type):
        q = matrix(type, N, K)
        which = torch.tensor([N - 1, 0, N // 2, 0])
        assert torch.equal(q.rows(which), q.numbers()[which].float())


@pytest.mark.parametrize("type", TYPES)
@pytest.mark.parametrize("T", [1, 2, 3, 7, 29])
def test_products(type, T, isa):
    for N, K in shapes(type):
        q, x, b = matrix(type, N, K), torch.randn(T, K), torch.randn(N)
        exact = x.double() @ q.numbers().double().T * 0.7 + b
        tolerance = 1e-2 if N > 1 else 4e-2  # of the norm: of one output it says little
        got = q.multiply(x, b, 0.7)
        assert got.dtype == torch.float32 and (got - exact).norm() <= tolerance * exact.norm()
        torch.testing.assert_close(multiply_reference(x, q, b, 0.7).double(), exact, atol=1e-4, rtol=1e-5)
        q.exact = True
        assert (q.multiply(x, b, 0.7) - exact).norm() <= 1e-5 * exact.norm()


@pytest.mark.parametrize("type", TYPES)
@pytest.mark.parametrize("exact", [False, True])
def test_a_token_meets_the_same_operations_whoever_is_beside_it(type, exact, isa):
    N, K = 50, 2048 + 512
    q, x = matrix(type, N, K), torch.randn(41, K)
    q.exact = exact
    whole = q.multiply(x)
    for threads in (1, 2, 3):
        cpu._native.set_threads(threads)
        assert torch.equal(q.multiply(x), whole)
        assert torch.equal(torch.cat([q.multiply(part) for part in x.split(13)]), whole)
        assert torch.equal(torch.cat([q.multiply(row) for row in x.split(1)]), whole)


@pytest.mark.parametrize("type", ["Q4_K", "Q6_K", "INT8", "BF16"])
def test_unusual_inputs(type, isa):
    q = matrix(type, 32, 256)
    for T in (1, 5):
        assert torch.equal(q.multiply(torch.zeros(T, 256)), torch.zeros(T, 32))
        tiny = q.multiply(torch.full((T, 256), 1e-30))
        assert tiny.isfinite().all()
        x = torch.randn(T, 256)
        x[T - 1, 3] = float("nan")
        y = q.multiply(x)
        assert y[T - 1].isnan().all() and y[: T - 1].isfinite().all()  # never hidden, never spread
        x[T - 1, 3] = float("inf")
        assert not q.multiply(x)[T - 1].isfinite().any()


@needs_kernels
def test_outputs_are_all_written():
    """Memory that was not computed would show: torch fills it with NaN here."""
    torch.utils.deterministic.fill_uninitialized_memory = True
    try:
        torch.use_deterministic_algorithms(True)
        for T in (1, 2, 50):
            assert matrix("Q5_K", 33, 512).multiply(torch.randn(T, 512)).isfinite().all()
    finally:
        torch.use_deterministic_algorithms(False)


def test_without_kernels_the_files_blocks_are_kept(monkeypatch):
    monkeypatch.setattr(cpu, "there", False)
    q, x = matrix("Q4_K", 20, 512), torch.randn(3, 512)
    assert not q.in_panels and q.nbytes == 20 * 288
    torch.testing.assert_close(q.multiply(x), x @ q.numbers().T)
    assert torch.equal(q.rows(torch.tensor([19])), q.numbers()[19:])


def test_the_same_bytes_as_the_file():
    for type in quant.BLOCKS:
        K = 4 * quant.BLOCKS[type].values
        assert QTensor(type, (64, K)).nbytes == 64 * quant.row_bytes(type, K)
