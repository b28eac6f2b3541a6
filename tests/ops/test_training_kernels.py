"""The kernels of training on every instruction set, against torch's formulas in float64.

What they are for is tested where it is used: scans, convolutions and attention in tests/train/test_packed_rows.py.
"""

import pytest
import torch

from tiercel.mixers.attention.varlen import Products
from tiercel.mixers.mamba2.varlen import Chunks, ssd_varlen
from tiercel.ops.conv1d_varlen import PastRows, conv1d_varlen
from tiercel.ops.cpu import native, training
from tiercel.ops.norm import Normed
from tiercel.ops.pointwise import Gate, add

pytestmark = pytest.mark.skipif(not native.available, reason="no kernels here")
HALF, TOLERANCE = torch.bfloat16, {torch.float32: 2e-6, torch.bfloat16: 8e-3}


@pytest.fixture(params=[] if native.extension is None else native.extension.available(), autouse=True)
def isa(request):
    torch.manual_seed(0)
    native.extension.choose(request.param)
    yield request.param
    native.extension.choose(native.isa)


def near(found, expected, tolerance):
    expected = expected.double()
    assert (found.double() - expected).abs().max() <= tolerance * expected.abs().max()


@pytest.mark.parametrize("dtype", TOLERANCE)
@pytest.mark.parametrize("T, K, R", [(19, 70, 16), (300, 256, 5), (1, 33, 40)])
def test_low_rank_products_with_dropout(dtype, T, K, R):
    x, dropout = torch.randn(T, 2 * K).to(dtype)[:, :K], training.Dropout.of(0.25)  # rows that lie apart
    w, a, b = torch.randn(K, R), torch.randn(T, R), torch.randn(R, K)
    kept = training.lora_b(torch.ones(T, 1), torch.ones(1, K), None, torch.float32, dropout).double()
    assert set(kept.unique().tolist()) <= {0.0, 1.0}
    dropped = x.double() * kept
    near(training.lora_a(x, w, dropout), dropped @ w.double(), 2e-6)
    near(training.lora_grad(a, x, dropout), a.double().t() @ dropped, 2e-6)
    near(training.lora_grad_rows(x, a), x.double().t() @ a.double(), 2e-6)
    near(training.lora_b(a, b, None, torch.float32, dropout), (a.double() @ b.double()) * kept, 2e-6)
    near(training.lora_b(a, b, x, dtype), x.double() + a.double() @ b.double(), TOLERANCE[dtype])


def test_dropout_drops_its_share_and_not_always_the_same():
    masks = [
        training.lora_b(torch.ones(512, 1), torch.ones(1, 512), None, torch.float32, training.Dropout.of(0.05)) == 0
        for _ in range(2)
    ]
    for mask in masks:
        assert abs(mask.float().mean() - 0.05) < 0.002  # 4.7 deviations
        assert (mask.float().mean(0) - 0.05).abs().max() < 0.06
        assert (mask.float().mean(1) - 0.05).abs().max() < 0.06
        for shift in (1, 16, 32):  # two values of one random number are 16 columns apart
            assert abs((mask & mask.roll(shift, 1)).float().mean() - 0.0025) < 0.0005
    assert abs((masks[0] & masks[1]).float().mean() - 0.0025) < 0.0005


@pytest.mark.parametrize("dtype", TOLERANCE)
@pytest.mark.parametrize("T, V", [(1, 7), (5, 300), (9, 32784), (3, 16)])
def test_the_loss_of_logits_and_its_gradient_in_their_place(dtype, T, V):
    logits, targets = (4 * torch.randn(T, V)).to(dtype), torch.randint(0, V, (T,))
    logits[0, V // 2] = 80.0  # where one word has all the chance
    leaf = logits.double().requires_grad_()
    expected = torch.nn.functional.cross_entropy(leaf, targets, reduction="none")
    (gradient,) = torch.autograd.grad(expected.sum(), leaf)
    losses = training.cross_entropy_(logits, targets)
    assert (losses - expected).abs().max() <= 2e-6 * expected.max()
    near(logits, gradient, TOLERANCE[dtype])
    broken = torch.randn(T, V).to(dtype)
    broken[-1, V - 1] = float("nan")
    losses = training.cross_entropy_(broken, targets)
    assert losses[-1].isnan() and broken[-1].isnan().all() and losses[:-1].isfinite().all()


@pytest.mark.parametrize("types", [(torch.float32, HALF), (HALF, torch.float32)])
@pytest.mark.parametrize("shape", [(1, 1), (7, 50), (2, 3, 33)])
def test_a_sum_of_two_dtypes_is_in_the_wider_one(types, shape):
    a, b = (torch.randn(shape).to(dtype).requires_grad_() for dtype in types)
    y = add(a, b)
    assert y.dtype == torch.float32 and torch.equal(y, a + b)
    for leaf, gradient in zip((a, b), torch.autograd.grad(y, (a, b), torch.full(shape, 1.5)), strict=True):
        assert gradient.dtype == leaf.dtype and torch.equal(gradient, torch.full(shape, 1.5, dtype=leaf.dtype))


def both(function, given, dtypes):
    """Answers and gradients in these dtypes, and in float64, where torch does it."""
    out = []
    for cast in (lambda t, dtype: t.to(dtype), lambda t, dtype: t.to(dtype).double()):
        leaves = [cast(t, dtype).detach().requires_grad_() for t, dtype in zip(given, dtypes, strict=True)]
        y = function(*leaves)
        weigh = cast(torch.linspace(-1, 2, y.numel()).view(y.shape), dtypes[0]).to(y.dtype)
        out.append([y, *torch.autograd.grad(y, leaves, weigh)])
    return zip(*out, strict=True)


@pytest.mark.parametrize("dtype", TOLERANCE)
@pytest.mark.parametrize("T, D", [(5, 40), (70, 300)])
def test_gate_and_norm(dtype, T, D):
    for found, expected in both(lambda g, u: Gate.apply(g, u, "silu"), torch.randn(2, T, D), (dtype, dtype)):
        near(found, expected, TOLERANCE[dtype])
    given = torch.randn(T, D), torch.randn(D)
    for found, expected in both(lambda x, w: Normed.apply(x, w, 1e-5), given, (dtype, torch.float32)):
        near(found, expected, TOLERANCE[dtype])


@pytest.mark.parametrize("dtype", TOLERANCE)
@pytest.mark.parametrize("C, taps, silu", [(40, 4, True), (7, 2, True), (16, 8, True), (40, 3, False)])
def test_convolution(dtype, C, taps, silu):
    starts = torch.zeros(2, 30, dtype=torch.bool)
    starts[:, 0] = starts[0, 1] = starts[1, 11] = True
    index = torch.arange(30)
    pasts = PastRows(index - torch.where(starts, index, 0).cummax(1).values, taps)
    given = torch.randn(2, 30, C), torch.randn(C, taps), torch.randn(C)
    dtypes = dtype, torch.float32, torch.float32
    for found, expected in both(lambda x, w, b: conv1d_varlen(x, w, b, pasts, silu=silu), given, dtypes):
        near(found, expected, TOLERANCE[dtype])


@pytest.mark.parametrize("dtype", TOLERANCE)
@pytest.mark.parametrize("window", [None, 7])
def test_attention_by_products(dtype, window):
    q, k, v = torch.randn(2, 3, 2 * 50, 8), torch.randn(2, 3, 50, 8), torch.randn(2, 3, 50, 8)
    for found, expected in both(lambda *qkv: Products.apply(*qkv, window), (q, k, v), [dtype] * 3):
        near(found, expected, 3 * TOLERANCE[dtype])


@pytest.mark.parametrize("G", [1, 2])
@pytest.mark.parametrize("half", [False, True])
def test_scan(G, half):
    B, L, H, P, N = 2, 96, 4, 24, 16
    T = B * L
    document_BL = torch.zeros(B, L, dtype=torch.int64)
    document_BL[0, 40:], document_BL[1, 5:] = 1, 1
    C, x, Bs = torch.randn(T, G, N), torch.randn(T, H, P), torch.randn(T, G, N)
    given = C, x, torch.rand(T, H), -torch.rand(H), Bs, torch.randn(H)
    like = torch.bfloat16 if half else torch.float32
    dtypes = like, like, torch.float32, torch.float32, like, torch.float32

    def scan(*given):
        low = given[1].dtype == torch.bfloat16
        with torch.autocast("cpu", torch.bfloat16, enabled=low):
            return ssd_varlen(*given, Chunks.of(document_BL, 32, given[2].dtype))

    for found, expected in both(scan, given, dtypes):
        near(found, expected, 3e-2 if half else 1e-5)
