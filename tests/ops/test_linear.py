"""Packed products: every type, shape, instruction set and thread count against the numbers they stand for."""

import pytest
import torch

from tiercel import quant
from tiercel.ops.cpu import native
from tiercel.ops.qtensor import NUMBERS, QTensor, multiply_reference

TYPES = [*quant.PACKED_TYPES, *NUMBERS]
FORMS = [*TYPES, *(["BF16_12"] if native.available else [])]  # bfloat16 once it is complete
ISAS = native.extension.available() if native.available else []
needs_kernels = pytest.mark.skipif(not native.available, reason="no native kernels here")


@pytest.fixture(params=ISAS or ["torch"])
def isa(request):
    """Every instruction set this machine has."""
    if not native.available:
        pytest.skip("no native kernels here")
    native.extension.choose(request.param)
    yield request.param
    native.extension.choose(native.isa)


@pytest.fixture(autouse=True)
def threads():
    yield
    if native.available:
        native.extension.set_threads(torch.get_num_threads())


def matrix(type: str, N: int, K: int) -> QTensor:
    """Random values packed as a quantizer would."""
    W = torch.randn(N, K) * torch.rand(N, 1)
    if type == "BF16_12":
        return bf12(W.bfloat16())
    q = QTensor(type, (N, K))
    q.put(0, W if type in NUMBERS else quant.quantize(type, W))
    return q


def bf12(W_NK: torch.Tensor) -> QTensor:
    """Held in twelve bits, also where that takes more."""
    q = QTensor("BF16", (W_NK.shape[0], W_NK.shape[1]))
    q.put(0, W_NK)
    q.data, q.stored_type = native.compress_bf12(q.data, q.shape), "BF16_12"
    return q


def shapes(type: str) -> list[tuple[int, int]]:
    if type in ("INT8", "BF16_12", *NUMBERS):
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


@pytest.mark.parametrize("type", FORMS)
def test_rows_are_the_reference_bit_for_bit(type, isa):
    for N, K in shapes(type):
        q = matrix(type, N, K)
        which = torch.tensor([N - 1, 0, N // 2, 0])
        assert torch.equal(q.rows(which), q.numbers()[which].float())


@pytest.mark.parametrize("type", FORMS)
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


@pytest.mark.parametrize("type", FORMS)
@pytest.mark.parametrize("exact", [False, True])
def test_a_token_meets_the_same_operations_whoever_is_beside_it(type, exact, isa):
    N, K = 50, 2048 + 512
    q, x = matrix(type, N, K), torch.randn(41, K)
    q.exact = exact
    whole = q.multiply(x)
    for threads in (1, 2, 3):
        native.extension.set_threads(threads)
        assert torch.equal(q.multiply(x), whole)
        assert torch.equal(torch.cat([q.multiply(part) for part in x.split(13)]), whole)
        assert torch.equal(torch.cat([q.multiply(row) for row in x.split(1)]), whole)


@pytest.mark.parametrize("type", ["Q4_K", "Q6_K", "INT8", "BF16", "BF16_12"])
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


def bit_patterns(N: int, K: int) -> dict[str, torch.Tensor]:
    """bfloat16 matrices whose exponents are few, many, all, none, and none that are finite."""
    gaussian = torch.randn(N, K)
    pruned = torch.where(torch.rand(N, K) < 0.5, gaussian, 0.0)
    any_bits = torch.randint(-(2**15), 2**15, (N, K), dtype=torch.int16).view(torch.bfloat16)
    outlier = gaussian.clone()
    outlier[N // 2, K // 2] = float("-inf")
    return {
        "gaussian": gaussian, "pruned": pruned, "any": any_bits, "outlier": outlier,
        "wide": gaussian * torch.exp(4 * torch.randn(N, K)), "subnormal": torch.full((N, K), -1e-40),
        "zero": torch.zeros(N, K), "minus zero": -torch.zeros(N, K), "largest": torch.full((N, K), 3.3e38),
    }  # fmt: skip


@pytest.mark.parametrize(("N", "K"), [(1, 1), (16, 8), (33, 100), (5, 7), (17, 1031), (40, 4100)])
def test_twelve_bits_are_the_sixteen(N, K, isa):
    """Whatever bits, shapes and exponents: what comes out, rows and products are those of the plain panels."""
    for name, W in bit_patterns(N, K).items():
        W = W.bfloat16()
        plain = QTensor("BF16", (N, K))
        plain.put(0, W)
        short = bf12(W)
        assert torch.equal(short.raw(), W.view(torch.uint8)), name
        assert torch.equal(short.raw(N // 2), W[N // 2 :].view(torch.uint8)), name
        which = torch.tensor([N - 1, 0])
        assert torch.equal(short.rows(which).view(torch.int32), plain.rows(which).view(torch.int32)), name
        for T in (1, 2, 12, 13, 200):
            x = torch.randn(T, K)
            for exact in (False, True):
                plain.exact = short.exact = exact
                a, b = plain.multiply(x), short.multiply(x)
                assert torch.equal(a.isnan(), b.isnan()) and torch.equal(a.nan_to_num(), b.nan_to_num()), (name, T)


@needs_kernels
def test_a_complete_matrix_is_never_larger_and_mostly_a_quarter_smaller():
    q = QTensor("BF16", (256, 1024))
    q.put(0, torch.randn(256, 1024))
    whole = q.nbytes
    q.complete()
    assert q.nbytes < 0.78 * whole and abs(q.nbytes / quant.held_bytes("BF16", 256, 1024) - 1) < 0.02
    for shape in ((1, 1), (64, 64)):
        any_bits = QTensor("BF16", shape)
        any_bits.put(0, torch.randint(0, 256, (shape[0], 2 * shape[1]), dtype=torch.uint8))
        whole = any_bits.nbytes
        any_bits.complete()
        assert any_bits.nbytes <= whole
    with pytest.raises(AssertionError):
        q.put(0, torch.zeros(16, 1024))


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
    monkeypatch.setattr(native, "available", False)
    q, x = matrix("Q4_K", 20, 512), torch.randn(3, 512)
    assert not q.repacked and q.nbytes == 20 * 288
    torch.testing.assert_close(q.multiply(x), x @ q.numbers().T)
    assert torch.equal(q.rows(torch.tensor([19])), q.numbers()[19:])


def test_the_same_bytes_as_the_file():
    for type in quant.BLOCKS:
        K = 4 * quant.BLOCKS[type].values
        assert QTensor(type, (64, K)).nbytes == 64 * quant.row_bytes(type, K)
