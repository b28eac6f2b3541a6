"""Attention of the newest positions over all: every mask, grouping and cut equals one query at a time."""

import pytest
import torch

from tiercel.mixers.attention import sdpa as op
from tiercel.mixers.attention.sdpa import attention, attention_reference


def qkv(H, K, L, T, D, seed=0):
    g = torch.Generator().manual_seed(seed)
    return [torch.randn(n, length, D, generator=g) for n, length in ((H, L), (K, T), (K, T))]


@pytest.mark.parametrize("H, K", [(1, 1), (4, 4), (6, 2), (5, 1)])
@pytest.mark.parametrize("L, T", [(1, 1), (1, 9), (9, 9), (4, 9), (2, 40)])
@pytest.mark.parametrize("window", [None, 1, 3, 9, 100])
def test_equal_to_one_query_at_a_time(H, K, L, T, window):
    q, k, v = qkv(H, K, L, T, 8)
    y = attention(q, k, v, scale=0.3, window=window)
    torch.testing.assert_close(y.double(), attention_reference(q, k, v, scale=0.3, window=window), atol=1e-5, rtol=1e-5)


@pytest.mark.parametrize("window", [None, 5])
def test_blocks_of_queries_do_not_show(monkeypatch, window):
    q, k, v = qkv(4, 2, 23, 41, 8)
    whole = attention(q, k, v, scale=0.3, window=window)
    monkeypatch.setattr(op, "BLOCK", 4)
    torch.testing.assert_close(attention(q, k, v, scale=0.3, window=window), whole, atol=1e-6, rtol=1e-5)


def test_the_future_is_not_seen():
    q, k, v = qkv(2, 2, 6, 6, 4)
    before = attention(q, k, v, scale=1.0)[:, :5]
    k[:, 5], v[:, 5] = 1e4, 1e4
    assert torch.equal(attention(q, k, v, scale=1.0)[:, :5], before)
