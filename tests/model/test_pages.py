"""Texts share what they remember of a common beginning, and nobody notices but the memory.

A text's twin is the plain list of its tokens: whatever states and snapshots did, the keys and values that are read back
are those of the list.  Free and fresh memory is NaN, so that nothing stale can look right.
"""

from __future__ import annotations

import gc
from collections.abc import Iterator
from itertools import pairwise
from pathlib import Path
from typing import Any

import psutil
import pytest
import torch
from hypothesis import given, settings
from hypothesis import strategies as st
from safetensors import safe_open

import tiny
from tiercel.mixers.attention.config import AttentionConfig
from tiercel.model import state_file
from tiercel.model.batch import Batch
from tiercel.model.pages import PAGE
from tiercel.model.state import State, nbytes_together
from tiercel.ops.cpu import native
from tiercel.runtime import allocator as pools
from tiercel.runtime.allocator import CachingAllocator

LAYERS = [AttentionConfig(heads=2, kv_heads=2, head_dim=4), AttentionConfig(heads=6, kv_heads=3, head_dim=20)]
CPU = torch.device("cpu")


@pytest.fixture(autouse=True)
def spoiled(monkeypatch: pytest.MonkeyPatch) -> Iterator[None]:
    monkeypatch.setattr(pools, "poison", True)
    yield


def new_state(pool: CachingAllocator | None = None, dtype: torch.dtype = torch.float32) -> State:
    return State([[config] for config in LAYERS], dtype, CPU, "", CachingAllocator() if pool is None else pool)


def kv(layer: int, tokens: list[int]) -> torch.Tensor:
    """What these tokens leave in a layer, (2, K, T, P)."""
    config = LAYERS[layer]
    scale = torch.arange(1, 2 * config.kv_heads * config.head_dim + 1).view(2, config.kv_heads, 1, config.head_dim)
    return torch.tensor(tokens, dtype=torch.float32).view(-1, 1) * scale


def extend(state: State, tokens: list[int], *, natively: bool = False) -> None:
    """A forward's part in it, by the kernels or by torch."""
    state.reserve(len(tokens))
    for i, (config, [memory]) in enumerate(zip(LAYERS, state.layers, strict=True)):
        k, v = kv(i, tokens)
        if natively:
            k_TM, v_TM = (t.transpose(0, 1).flatten(1).contiguous() for t in (k, v))
            batch = Batch([len(tokens)], [state])
            native.extension.store_kv(
                batch.metadata_for(memory), k_TM.data_ptr(), v_TM.data_ptr(), 0, 0,
                k_TM.stride(0), 0, config.kv_heads, config.head_dim,
            )  # fmt: skip
        else:
            all_k, all_v = memory.extend(k, v)
            assert all_k.shape[1] == state.length + len(tokens)
            assert torch.equal(all_k[:, -len(tokens) :], k) and torch.equal(all_v[:, -len(tokens) :], v)
            assert all_k.isfinite().all() and all_v.isfinite().all()
    state.length += len(tokens)


def check(state: State, tokens: list[int]) -> None:
    assert state.length == len(tokens)
    for i, [memory] in enumerate(state.layers):
        k, v = kv(i, tokens)
        got = memory.tensors()
        assert torch.equal(got["k"], k) and torch.equal(got["v"], v)


def in_a_row(state: State, tokens: list[int]) -> None:
    """All keys and values as torch's attention gets them, in a forward of one token that is interrupted then."""
    state.reserve(1)
    for i, [memory] in enumerate(state.layers):
        expected = kv(i, [*tokens, 7])
        got = memory.extend(*kv(i, [7]))
        assert torch.equal(torch.stack(got), expected)


OPERATIONS = st.lists(
    st.tuples(
        st.sampled_from("extend extend extend natively fork snapshot restore trim trim free forget save read".split()),
        st.integers(0, 7),
        st.sampled_from([1, 1, 2, 31, 33, PAGE - 1, PAGE, PAGE + 1, 3 * PAGE]),
        st.floats(0, 1),
    ),
    min_size=5,
    max_size=40,
)


@settings(max_examples=200, deadline=None, derandomize=True)
@given(operations=OPERATIONS)
def test_texts_that_share_pages_never_see_each_others_tokens(
    operations: list[Any], tmp_path_factory: pytest.TempPathFactory
) -> None:
    pool, path = CachingAllocator(), tmp_path_factory.getbasetemp() / "state"
    texts: list[tuple[State, list[int]]] = [(new_state(pool), [])]
    snapshots: list[tuple[Any, list[int]]] = []
    for i, (what, which, count, share) in enumerate(operations):
        which %= len(texts)
        state, tokens = texts[which]
        if what in ("extend", "natively"):
            new = [1 + (100 * i + j) % 997 for j in range(count)]
            extend(state, new, natively=what == "natively" and native.available)
            tokens += new
        elif what == "fork" and len(texts) < 6:
            texts.append((state.fork(), list(tokens)))
        elif what == "snapshot":
            snapshots.append((state.snapshot(), list(tokens)))
        elif what == "restore" and snapshots:
            snapshot, then = snapshots[count % len(snapshots)]
            state.restore(snapshot)
            tokens[:] = then
        elif what == "trim":
            assert state.trim(int(share * len(tokens)))
            del tokens[state.length :]
        elif what == "free" and len(texts) > 1:
            del texts[which]
        elif what == "forget" and snapshots:
            del snapshots[count % len(snapshots)]
        elif what == "save":
            state_file.save(state, path)
            state = new_state(pool)
            state_file.load(state, path)
            texts[which] = state, tokens
        elif what == "read":
            in_a_row(state, tokens)
        del state
        for each, twin in texts:
            check(each, twin)
            assert len(each.pages) >= -(-len(twin) // PAGE)
    together = nbytes_together([state for state, _ in texts] + [snapshot for snapshot, _ in snapshots])
    distinct = {id(page): page.nbytes for one, _ in texts + snapshots for page in one.pages}
    own = sum(one.own_nbytes for one, _ in texts + snapshots)
    assert together == sum(distinct.values()) + own


def test_a_fork_and_a_snapshot_of_a_long_text_take_no_memory_for_its_keys() -> None:
    state = new_state()
    extend(state, list(range(10 * PAGE + 5)), natively=native.available)
    one = nbytes_together([state])
    forks, marks = [state.fork() for _ in range(20)], [state.snapshot() for _ in range(20)]
    assert nbytes_together([state, *marks]) == one
    assert nbytes_together([state, *forks, *marks]) == one + sum(fork.own_nbytes for fork in forks)
    assert sum(mark.nbytes for mark in marks) >= 20 * 10 * marks[0].pages[0].nbytes  # each by itself counts all


def test_the_first_token_after_a_fork_copies_one_page() -> None:
    state = new_state()
    extend(state, list(range(5 * PAGE + 5)))
    fork, before = state.fork(), list(state.pages)
    extend(fork, [1])
    assert list(state.pages) == before == [*fork.pages[:5], before[5]]
    assert fork.pages[5] is not before[5]
    extend(fork, [2])  # it is the fork's own now
    mine = fork.pages[5]
    extend(fork, [3])
    assert fork.pages[5] is mine


def test_growing_copies_nothing() -> None:
    state = new_state()
    extend(state, list(range(3 * PAGE)), natively=native.available)
    before = [page.address for page in state.pages]
    for _ in range(50):
        extend(state, list(range(PAGE)), natively=native.available)
    assert [page.address for page in state.pages][:3] == before
    assert len(state.pages) == 53


def test_a_trim_frees_pages_at_once_unless_somebody_else_needs_them() -> None:
    pool = CachingAllocator()
    state = new_state(pool)
    extend(state, list(range(8 * PAGE)))
    page = state.pages[0].nbytes
    assert state.trim(3 * PAGE + 1) and pool.nbytes == 4 * page
    mark = state.snapshot()
    assert state.trim(10) and pool.nbytes == 4 * page
    del mark
    assert pool.nbytes == 7 * page
    del state
    assert pool.nbytes == 8 * page


def test_memory_is_flat_over_ten_thousand_forks() -> None:
    pool = CachingAllocator()
    state = new_state(pool)
    extend(state, list(range(2 * PAGE + 9)))
    kept: list[Any] = []
    process, sizes = psutil.Process(), []
    for i in range(10_000):
        fork = state.fork()
        fork.reserve(1)  # its own last page
        kept = [*kept[-7:], fork.snapshot(), fork]
        if i in (2000, 6000, 9999):
            gc.collect()
            sizes.append((process.memory_info().rss, pool.nbytes))
    page = state.pages[0].nbytes
    assert sizes[0][1] == sizes[1][1] == sizes[2][1] <= 2 * page
    # a leak grows in both halves; what else a process takes once comes in one
    assert min(later[0] - earlier[0] for earlier, later in pairwise(sizes)) < 1 << 20
    assert nbytes_together([state, *kept]) <= state.nbytes + 5 * page + sum(one.own_nbytes for one in kept)


@pytest.mark.parametrize("words", ["attention", "attention+mamba2 mamba1 attention mamba2"])
@torch.no_grad()
def test_a_network_goes_on_from_a_fork_bit_for_bit(words: str) -> None:
    """Recorded steps too: they find pages, moved tables and copied pages at every run."""
    network = tiny.network(words, max_length=4096)
    text = torch.randint(0, 300, (21 * PAGE,), generator=torch.Generator().manual_seed(1))  # beyond one segment
    state, alone, start = network.new_state(), network.new_state(), 16 * PAGE - 20
    network(text[:start], state), network(text[:start], alone)
    mark = state.snapshot()
    forks = [state.fork() for _ in range(3)]
    for t in text[start : start + 100].split(1):
        expected = network(t, alone)
        network(t + 1 if t < 299 else t - 1, state)  # goes another way
        for fork in forks:
            assert torch.equal(network(t, fork), expected)
    state.restore(mark)
    again = network(text[start:], state)[:100]
    torch.testing.assert_close(again, torch.cat(_steps(network, text, start)), atol=1e-4, rtol=0)


def _steps(network: Any, text: torch.Tensor, start: int) -> list[torch.Tensor]:
    state = network.new_state()
    network(text[:start], state)
    return [network(t, state) for t in text[start : start + 100].split(1)]


def test_a_states_file_is_the_same_however_its_pages_came_about(tmp_path: Path) -> None:
    state = new_state()
    extend(state, list(range(3 * PAGE)))
    fork = state.fork()
    assert state.trim(100) and fork.trim(100)
    extend(state, [5, 6]), extend(fork, [5, 6])
    plain = new_state()
    extend(plain, [*range(100), 5, 6])
    for i, one in enumerate((state, fork, plain)):
        state_file.save(one, tmp_path / str(i))
    saved = []
    for i in range(3):
        with safe_open(tmp_path / str(i), framework="pt") as file:
            saved.append({name: file.get_tensor(name) for name in file.keys()})  # noqa: SIM118
    assert all(torch.equal(saved[0][name], other[name]) for other in saved[1:] for name in saved[0])
