"""The Mamba-1 scan equals the plain recurrence, and does not depend on how a text is cut."""

import pytest
import torch

from tiercel.mixers.mamba1.reference import selective_scan, selective_scan_reference


def inputs(L, I, N, seed=0, decay=1.0):
    g = torch.Generator().manual_seed(seed)
    r = lambda *shape: torch.randn(*shape, generator=g)  # noqa: E731
    dt = torch.nn.functional.softplus(r(L, I)) * 0.3
    return r(L, N), r(L, I), dt, -decay * torch.rand(I, N, generator=g) - 0.01, r(L, N), r(N, I)


@pytest.mark.parametrize("L, I, N", [(1, 1, 1), (7, 3, 5), (64, 8, 16), (65, 4, 2), (200, 6, 16)])
def test_the_scan_is_the_recurrence(L, I, N):
    C, x, dt, A, B, S = inputs(L, I, N)
    y, last = selective_scan(C, x, dt, A, B, S)
    y_true, last_true = selective_scan_reference(C, x, dt, A, B, S)
    torch.testing.assert_close(y.double(), y_true, atol=1e-4, rtol=1e-5)
    torch.testing.assert_close(last.double(), last_true, atol=1e-5, rtol=1e-5)


@pytest.mark.parametrize("cut", [1, 3, 63, 64, 100])
def test_states_are_bit_equal_however_the_text_is_cut(cut):
    C, x, dt, A, B, S = inputs(130, 6, 16)
    whole, last = selective_scan(C, x, dt, A, B, S)
    first, middle = selective_scan(C[:cut], x[:cut], dt[:cut], A, B[:cut], S)
    second, end = selective_scan(C[cut:], x[cut:], dt[cut:], A, B[cut:], middle)
    assert torch.equal(torch.cat((first, second)), whole) and torch.equal(end, last)


def test_without_C_only_the_state_advances():
    C, x, dt, A, B, S = inputs(70, 6, 4)
    y, last = selective_scan(None, x, dt, A, B, S)
    assert y.shape == (0, 6) and torch.equal(last, selective_scan(C, x, dt, A, B, S)[1])


def test_extreme_decays_stay_finite():
    C, x, dt, A, B, S = inputs(100, 6, 16, decay=1e5)
    y, last = selective_scan(C, x, dt, A, B, S)
    assert y.isfinite().all() and last.isfinite().all()
