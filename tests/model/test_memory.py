"""What texts remember lies in memory that they leave each other: no two of them in the same bytes, none lost, and no
more kept than is said.

The twin is a list of the runs that are out, each with a number that fills it.
"""

from __future__ import annotations

import copy
import gc
import itertools
import threading
from typing import Any

import psutil
import pytest
import torch
from hypothesis import given, settings
from hypothesis import strategies as st

import tiny
from tiercel.runtime import allocator as pools
from tiercel.runtime.allocator import ALIGNMENT_BYTES, CachingAllocator

CPU = torch.device("cpu")
MB = 1 << 20


@pytest.fixture
def small(monkeypatch: pytest.MonkeyPatch) -> None:
    """Slabs of 64 KB, so that there are many, for runs of any size."""
    monkeypatch.setattr(CachingAllocator, "SEGMENT_BYTES", 64 << 10)
    monkeypatch.setattr(CachingAllocator, "SMALL_BLOCK_BYTES", 1)
    monkeypatch.setattr(CachingAllocator, "PREFAULT_BYTES", 4096)
    monkeypatch.setattr(CachingAllocator, "MAX_FREE_BYTES", 128 << 10)


@settings(max_examples=200, deadline=None, derandomize=True)
@given(
    operations=st.lists(
        st.tuples(
            st.sampled_from("take take take free free ahead view".split()), st.integers(0, 90_000), st.integers(0)
        ),
        min_size=5,
        max_size=80,
    )
)
@pytest.mark.usefixtures("small")
def test_runs_never_meet_and_nothing_is_lost(operations: list[Any]) -> None:
    pool = CachingAllocator()
    out: list[tuple[torch.Tensor, int]] = []
    for number, (what, size, which) in enumerate(operations):
        if what == "take":
            out.append((pool.empty_bytes(size, CPU).fill_(number % 251), number % 251))
            assert out[-1][0].shape == (size,) and (not size or out[-1][0].data_ptr() % ALIGNMENT_BYTES == 0)
        elif what == "free" and out:
            del out[which % len(out)]
        elif what == "view" and out:  # a part of it keeps all of it
            out[which % len(out)] = out[which % len(out)][0][1::2], out[which % len(out)][1]
        elif what == "ahead":
            before = pool.nbytes
            assert pool.prefault(size) == (before < size and size >= CachingAllocator.PREFAULT_BYTES)
            assert pool.nbytes >= min(before + 1, size) or size < CachingAllocator.PREFAULT_BYTES
        assert all((run == value).all() for run, value in out)
        held = sum(-(-run.untyped_storage().nbytes() // ALIGNMENT_BYTES) * ALIGNMENT_BYTES for run, _ in out)
        free = sum(stop - start for segment in pool.segments for start, stop in segment.free)
        assert held + free == sum(segment.nbytes for segment in pool.segments)
        assert held + pool.nbytes == sum(segment.touched for segment in pool.segments)
        assert all(segment.largest >= max((b - a for a, b in segment.free), default=0) for segment in pool.segments)
        assert all(a[1] < b[0] for segment in pool.segments for a, b in itertools.pairwise(segment.free))
    out.clear()
    assert pool.nbytes <= CachingAllocator.MAX_FREE_BYTES + CachingAllocator.SEGMENT_BYTES


@pytest.mark.usefixtures("small")
def test_memory_that_was_used_is_used_again_before_any_other() -> None:
    pool = CachingAllocator()
    first = [pool.empty_bytes(10_000, CPU) for _ in range(9)]  # two segments
    addresses = {run.data_ptr() for run in first}
    first[3:] = []  # in the first segment some memory is left that nobody has touched
    again = [pool.empty_bytes(10_000, CPU) for _ in range(6)]
    assert {run.data_ptr() for run in again} <= addresses


def test_slabs_go_back_to_the_system_with_the_last_who_used_them() -> None:
    process, pool = psutil.Process(), CachingAllocator()
    before = process.memory_info().rss
    runs = [pool.empty_bytes(3 * MB, CPU).fill_(1) for _ in range(100)]
    assert process.memory_info().rss - before > 280 * MB
    runs[1:] = []
    assert 128 * MB - CachingAllocator.SEGMENT_BYTES <= pool.nbytes <= 128 * MB  # some is kept for the next
    assert process.memory_info().rss - before < 140 * MB
    pool.max_free_bytes = 0
    runs.clear()
    assert pool.nbytes == 0 and pool.segments == []
    assert process.memory_info().rss - before < 10 * MB
    runs.append(pool.empty_bytes(3 * MB, CPU))
    assert copy.deepcopy(pool).segments == []


@pytest.mark.parametrize("nbytes", [20_000, 200_000, 240 << 10, 3 * MB])
def test_runs_take_little_more_than_their_bytes(nbytes: int) -> None:
    """Whole large pages, whatever the segment."""
    process, pool, count = psutil.Process(), CachingAllocator(), 100 * MB // nbytes
    before = process.memory_info().rss
    runs = [pool.empty_bytes(nbytes, CPU).fill_(1) for _ in range(count)]
    assert process.memory_info().rss - before < 1.1 * count * nbytes + 2 * MB
    del runs


def test_memory_asked_for_ahead_is_there() -> None:
    process, pool = psutil.Process(), CachingAllocator()
    before, turns = process.memory_info().rss, 0
    while pool.prefault(100 * MB):
        turns += 1
    assert turns == 100 * MB // CachingAllocator.PREFAULT_BYTES and 100 * MB <= pool.nbytes < 104 * MB
    assert process.memory_info().rss - before > 95 * MB
    runs = [pool.empty_bytes(10 * MB, CPU).fill_(1) for _ in range(9)]  # the last begin a new segment
    assert process.memory_info().rss - before < 115 * MB
    assert not pool.prefault(1 * MB), "not worth a segment"
    del runs


@pytest.mark.usefixtures("small")
def test_threads_take_and_give_at_once() -> None:
    pool, wrong = CachingAllocator(), []

    def work(seed: int) -> None:
        generator, mine = torch.Generator().manual_seed(seed), []
        for _ in range(400):
            size = int(torch.randint(1, 30_000, (1,), generator=generator))
            mine.append(pool.empty_bytes(size, CPU).fill_(seed))
            if len(mine) > 7:
                run = mine.pop(size % 7)
                wrong.extend([seed] if not (run == seed).all() else [])

    threads = [threading.Thread(target=work, args=(seed,)) for seed in range(4)]
    for thread in threads:
        thread.start()
    for thread in threads:
        thread.join()
    assert not wrong
    gc.collect()
    assert 0 <= pool.nbytes <= sum(segment.nbytes for segment in pool.segments)
    assert pool._held == 0


@pytest.mark.usefixtures("small")
@torch.no_grad()
def test_a_text_that_ends_leaves_all_its_memory_to_the_next(monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr(pools, "poison", True)
    network = tiny.network("attention+mamba2 mamba1 attention mamba2", max_length=512)
    pool = CachingAllocator()
    text = torch.randint(0, 300, (200,), generator=torch.Generator().manual_seed(1))

    def read() -> tuple[torch.Tensor, Any]:
        state = network.new_state(allocator=pool)
        network(text[:150], state)
        middle = state.snapshot()
        logits = network(text[150:], state)
        return logits, (middle, state.snapshot(ending=True))

    expected, snapshots = read()
    touched = pool.nbytes + pool._held
    del snapshots
    for _ in range(5):
        assert torch.equal(read()[0], expected)
    assert pool._held == 0
    assert pool.nbytes <= touched


def test_small_things_come_in_small_slabs() -> None:
    pool = CachingAllocator()
    kept = [pool.empty_bytes(1000, CPU) for _ in range(2000)]
    assert len(kept) == 2000 and [segment.nbytes for segment in pool.segments] == [2 * MB]


def test_a_dtype_and_a_mode_of_torch_make_no_difference() -> None:
    pool = CachingAllocator()
    shapes = {"a": ((3, 5), torch.bfloat16), "b": ((0, 7), torch.float32), "c": ((200_000,), torch.float32)}
    with torch.inference_mode():
        several = pool.empty_many(shapes, CPU)
    assert not any(tensor.is_inference() for tensor in several.values())
    for name, (shape, dtype) in shapes.items():
        assert several[name].shape == shape and several[name].dtype == dtype and several[name].is_contiguous()
        several[name].fill_(1)
    assert several["a"].sum() == 15 and several["c"].sum() == 200_000
