"""The chunked Mamba-2 scan equals the plain recurrence, for any shape, cut and starting state."""

import pytest
import torch

from tiercel.mixers.mamba2.chunked import ssd, ssd_reference

SHAPES = [  # L, H, P, G, N, chunk
    (1, 1, 1, 1, 1, 1),
    (5, 2, 3, 1, 4, 8),
    (8, 4, 2, 2, 4, 8),
    (9, 6, 5, 3, 7, 8),
    (37, 4, 8, 4, 16, 16),
    (130, 3, 4, 1, 8, 128),
    (63, 2, 16, 2, 64, 7),
]


def inputs(L, H, P, G, N, seed=0, dt=0.3, decay=1.0):
    g = torch.Generator().manual_seed(seed)
    r = lambda *shape: torch.randn(*shape, generator=g)  # noqa: E731
    return (
        r(L, G, N),
        r(L, H, P),
        torch.nn.functional.softplus(r(L, H)) * dt,
        -decay * torch.rand(H, generator=g) - 0.01,
        r(L, G, N),
        r(H, N, P),
    )


@pytest.mark.parametrize("L, H, P, G, N, chunk", SHAPES)
def test_the_chunked_form_is_the_recurrence(L, H, P, G, N, chunk):
    C, x, dt, A, B, S = inputs(L, H, P, G, N)
    y, _ = ssd(C, x, dt, A, B, S, chunk=chunk)
    torch.testing.assert_close(y.double(), ssd_reference(C, x, dt, A, B, S)[0], atol=1e-4, rtol=1e-5)


@pytest.mark.parametrize("L, H, P, G, N, chunk", SHAPES)
def test_the_committed_state_is_the_recurrences_at_every_boundary(L, H, P, G, N, chunk):
    C, x, dt, A, B, S = inputs(L, H, P, G, N)
    for commit in range(0, L + 1, chunk):
        _, committed = ssd(C, x, dt, A, B, S, chunk=chunk, commit=commit)
        expected = ssd_reference(C[:commit], x[:commit], dt[:commit], A, B[:commit], S)[1] if commit else S.double()
        torch.testing.assert_close(committed.double(), expected, atol=1e-4, rtol=1e-5)


@pytest.mark.parametrize("queries", [1, 2, 7, 20, 37])
def test_asking_for_the_last_outputs_only_gives_the_same_outputs(queries):
    C, x, dt, A, B, S = inputs(37, 4, 8, 2, 16)
    whole, _ = ssd(C, x, dt, A, B, S, chunk=16)
    last, _ = ssd(C[-queries:], x, dt, A, B, S, chunk=16)
    torch.testing.assert_close(last, whole[-queries:], atol=1e-5, rtol=1e-5)


@pytest.mark.parametrize("chunk", [1, 3, 16, 64, 256])
def test_the_result_does_not_depend_on_the_chunk(chunk):
    C, x, dt, A, B, S = inputs(100, 4, 8, 2, 16)
    y, _ = ssd(C, x, dt, A, B, S, chunk=chunk)
    torch.testing.assert_close(y, ssd(C, x, dt, A, B, S, chunk=100)[0], atol=1e-4, rtol=1e-5)


@pytest.mark.parametrize("dt, decay", [(100.0, 1000.0), (1e-3, 1e-4), (50.0, 1e-3)])
def test_extreme_decays_stay_finite_and_true(dt, decay):
    C, x, dts, A, B, S = inputs(200, 4, 8, 2, 16, dt=dt, decay=decay)
    y, committed = ssd(C, x, dts, A, B, S, chunk=64, commit=192)
    expected, _ = ssd_reference(C, x, dts, A, B, S)
    assert y.isfinite().all() and committed.isfinite().all()
    assert ((y - expected).norm() / expected.norm()).item() < 1e-5


def test_a_long_text_does_not_drift():
    """32,768 tokens, heads that hardly decay among them: the float32 state stays true."""
    L, H = 32_768, 4
    C, x, dt, _, B, S = inputs(L, H, 2, 1, 4)
    A = -torch.tensor([1e-4, 1e-2, 1.0, 30.0])
    y, _ = ssd(C, x, dt, A, B, S, chunk=128)
    expected, _ = ssd_reference(C, x, dt, A, B, S)
    error = (y - expected).norm(dim=(0, 2)) / expected.norm(dim=(0, 2))
    assert error.max().item() < 1e-5


def test_gradients_flow_through_the_chunked_form():
    inputs_ = [t.requires_grad_() for t in inputs(9, 2, 2, 1, 3)]
    C, x, dt, A, B, S = inputs_
    got = torch.autograd.grad(ssd(C, x, dt, A, B, S, chunk=4)[0].square().sum(), inputs_)
    expected = torch.autograd.grad(ssd_reference(C, x, dt, A, B, S)[0].square().sum(), inputs_)
    for a, b in zip(got, expected, strict=True):
        torch.testing.assert_close(a, b, atol=1e-4, rtol=1e-4)
