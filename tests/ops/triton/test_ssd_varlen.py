"""The scan for training on a GPU: what it computes and what is learned from it are the reference's."""

import pytest
import torch

pytest.importorskip("triton", reason="pip install triton")

from ops.triton.conftest import DEVICE
from tiercel.mixers.mamba2.triton_varlen import ssd_varlen
from tiercel.mixers.mamba2.varlen import ssd_documents
from tiercel.model.varlen import VarlenBatch

NAMES = ["C", "x", "dt", "A", "B", "D"]


def inputs(T, H, P, G, N, decay=1.0):
    g = torch.Generator().manual_seed(T + H)
    C, x, B = (torch.randn(T, *shape, generator=g) for shape in ((G, N), (H, P), (G, N)))
    dt, A = torch.rand(T, H, generator=g) * 0.3, -decay * (torch.rand(H, generator=g) + 0.05)
    return [C, x, dt, A, B, torch.randn(H, generator=g)]


def starts(lengths):
    flags = torch.zeros(len(lengths), sum(lengths[0]), dtype=torch.bool)
    for row, documents in zip(flags, lengths, strict=True):
        row[torch.tensor([0, *documents[:-1]]).cumsum(0)] = True
    return flags


def both_ways(run, given, weigh):
    given = [t.detach().clone().requires_grad_() for t in given]
    y = run(*given)
    (y * weigh.to(y)).sum().backward()
    return y.detach(), [t.grad for t in given]


def differences(lengths, H, P, G, N, decay=1.0, skip=True, dtype=torch.float32):
    """Of y and of each gradient from the reference in float64, relative to their norms."""
    rows = VarlenBatch(starts(lengths))
    given = inputs(rows.tokens, H, P, G, N, decay)[: 6 if skip else 5]
    given = [t.to(dtype) if i in (0, 1, 4) else t for i, t in enumerate(given)]
    weigh = torch.randn(rows.tokens, H, P, generator=torch.Generator().manual_seed(1))
    document_BL = rows.document_BL.to(DEVICE)

    def reference(*t):
        return ssd_documents(*t, *[None] * (not skip), rows)

    there = [t.to(DEVICE) for t in given]
    y, grads = both_ways(lambda *t: ssd_varlen(*t, *[None] * (not skip), document_BL), there, weigh)
    expected, expected_grads = both_ways(reference, [t.double() for t in given], weigh)
    assert y.dtype == torch.float32 and [g.dtype for g in grads] == [t.dtype for t in given]
    pairs = zip(["y", *NAMES], [y, *grads], [expected, *expected_grads], strict=False)
    return {name: float((a.cpu() - b).norm() / (b.norm() + 1e-30)) for name, a, b in pairs}


@pytest.mark.parametrize(
    "H, P, G, N, lengths",
    [
        *((6, 5, 3, 7, lengths) for lengths in ([[1]], [[9], [9]], [[5, 40, 1, 1, 29, 14], [90]], [[64, 100, 37]])),
        (1, 1, 1, 1, [[9], [9]]),
        (2, 24, 1, 70, [[64, 100, 37]]),
        (4, 70, 2, 16, [[5, 40, 1, 1, 29, 14], [90]]),
    ],
)
def test_answers_and_gradients_are_the_references(H, P, G, N, lengths):
    errors = differences(lengths, H, P, G, N)
    assert max(errors.values()) < 1e-4, errors


def test_without_a_skip():
    assert max(differences([[70, 60]], 2, 8, 1, 16, skip=False).values()) < 1e-4


def test_a_document_of_many_chunks():
    errors = differences([[5, 270, 21], [296]], 2, 8, 1, 16, decay=0.03)
    assert max(errors.values()) < 1e-4, errors


@pytest.mark.parametrize("decay", [1e-4, 300.0])
def test_extreme_decays(decay):
    errors = differences([[100, 31, 69]], 2, 8, 1, 16, decay)
    assert max(errors.values()) < 1e-4, errors


def test_views_of_one_tensor_serve_as_inputs():
    """x, B and C as the convolution leaves them: columns of one tensor."""
    T, H, P, G, N = 70, 2, 8, 1, 16
    C, x, dt, A, B, D = (t.to(DEVICE) for t in inputs(T, H, P, G, N))
    document_BL = torch.zeros(1, T, dtype=torch.long, device=DEVICE)
    whole = torch.cat([t.flatten(1) for t in (x, B, C)], 1)
    views = [
        t.unflatten(1, size) for t, size in zip(whole.split([16, 16, 16], 1), [(H, P), (G, N), (G, N)], strict=True)
    ]
    expected = ssd_varlen(C, x, dt, A, B, D, document_BL)
    assert torch.equal(ssd_varlen(views[2], views[0], dt, A, views[1], D, document_BL), expected)


def test_a_document_gets_nothing_from_the_one_before():
    T, shape = 100, (2, 8, 1, 16)
    document_BL = (torch.arange(T) >= 37).long().unsqueeze(0).to(DEVICE)
    given = [t.to(DEVICE) for t in inputs(T, *shape)]
    other = [t.to(DEVICE) for t in inputs(T + 1, *shape)]
    changed = [torch.cat([b[:37], a[37:]]) if len(a) == T else a for a, b in zip(given, other, strict=True)]
    y, z = (ssd_varlen(*t, document_BL) for t in (given, changed))
    assert torch.equal(y[37:], z[37:]) and not torch.equal(y[:37], z[:37])


@pytest.mark.skipif(DEVICE == "cpu", reason="the interpreter does not multiply bfloat16 matrices")
@pytest.mark.parametrize("dtype", [torch.float32, torch.bfloat16])
def test_under_autocast_products_are_rounded(dtype):
    with torch.autocast(DEVICE, torch.bfloat16):
        errors = differences([[64, 100, 37]], 4, 64, 1, 128, dtype=dtype)
    assert max(errors.values()) < 2e-2, errors


@pytest.mark.skipif(DEVICE == "cpu", reason="needs a GPU")
def test_rows_on_a_gpu_take_the_kernels():
    rows = VarlenBatch(starts([[64, 100, 37]])).to(DEVICE)
    given = [t.to(DEVICE) for t in inputs(rows.tokens, 4, 16, 2, 24)]
    assert torch.equal(ssd_documents(*given, rows), ssd_varlen(*given, rows.document_BL))
