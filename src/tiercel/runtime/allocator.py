"""Caching allocator for the states of sequences.

A state is megabytes, written once and given up a second later: KV pages, a recurrent state and its pending inputs,
snapshots of both.  From the system such memory is slow every time: it comes in small pages, each cleared when it is
first touched, and returns to the system as soon as it is free.  That is 3 GB/s on one machine, and 0.4 in a virtual
one whose host has to find the memory, too: 100 ms for a snapshot of a 0.5B.

So an allocator has segments in the system's large pages, and in them blocks, each the memory of tensors.  A block is
free again the moment the last view of it is gone (reference counting).  Free neighbours are joined; a new block is the
first that fits, where memory was touched before if possible; whole segments go back when more is free than is kept.
`prefault` touches memory before it is needed.
"""

from __future__ import annotations

import contextlib
import ctypes
import math
import mmap
import os
import threading
from bisect import bisect_left
from collections import deque
from collections.abc import Iterator, Mapping, Sequence
from typing import Any

import numpy as np
import torch
from torch import Tensor

poison = os.environ.get("TIERCEL_POISON") == "1"  # fill memory with NaN when it is new and when it is free: for tests

HUGE_PAGE_BYTES = 2 << 20
ALIGNMENT_BYTES = 64  # a cache line

Shape = tuple[Sequence[int], torch.dtype]


def map_memory(nbytes: int) -> np.ndarray:
    """Return bytes (uint8) from the system, in its large pages where it has some; they go back to it whole."""
    if not hasattr(mmap, "MAP_PRIVATE"):
        return np.frombuffer(mmap.mmap(-1, nbytes), dtype=np.uint8)
    # private: what Python maps by default is shared, and gets no large pages
    block = mmap.mmap(-1, nbytes, flags=mmap.MAP_PRIVATE | mmap.MAP_ANONYMOUS)
    if hasattr(mmap, "MADV_HUGEPAGE"):
        with contextlib.suppress(OSError):  # a kernel without them
            block.madvise(mmap.MADV_HUGEPAGE)
    return np.frombuffer(block, dtype=np.uint8)


def memory(*shape: int, dtype: torch.dtype, device: torch.device) -> Tensor:
    """Return memory of no allocator, which can be written in and out of inference mode."""
    with torch.inference_mode(False):
        new = torch.empty(shape, dtype=dtype, device=device)
    return new.fill_(torch.nan) if poison else new


class Block(np.ndarray):
    """Some bytes of a segment.  numpy's views of it have no `segment`: only the one that a tensor holds frees it."""

    segment: Segment | None = None
    place: tuple[int, int]

    def __del__(self) -> None:
        if self.segment is not None:
            self.segment.allocator.release(self)


class Segment:
    """Memory from the system.

    bytes: all of it · free: (start, stop) of free ranges, in order and joined · largest: bytes of the largest of
    them, or more · touched: bytes from the start that were touched
    """

    def __init__(self, allocator: CachingAllocator, nbytes: int) -> None:
        self.allocator, self.nbytes = allocator, nbytes
        all_ = map_memory(nbytes + HUGE_PAGE_BYTES)
        begin = -all_.ctypes.data % HUGE_PAGE_BYTES
        self.bytes = all_[begin : begin + nbytes]
        self.free, self.largest = [(0, nbytes)], nbytes
        self.touched = 0

    def take(self, nbytes: int, stop: int) -> Block | None:
        """Return the first block of free bytes that ends before `stop`; None where there is none."""
        if nbytes > self.largest:
            return None
        for i, (start, end) in enumerate(self.free):
            if start + nbytes > stop:
                return None
            if end - start >= nbytes:
                self.free[i : i + 1] = [(start + nbytes, end)] if end - start > nbytes else []
                self.touched = max(self.touched, start + nbytes)
                block: Block = self.bytes[start : start + nbytes].view(Block)
                block.segment, block.place = self, (start, start + nbytes)
                return block
        self.largest = max((end - start for start, end in self.free), default=0)
        return None

    def release(self, start: int, stop: int) -> None:
        """Add a range to the free ones, joined with its neighbours."""
        i = bisect_left(self.free, (start, stop))
        if i < len(self.free) and self.free[i][0] == stop:
            stop = self.free.pop(i)[1]
        if i and self.free[i - 1][1] == start:
            i -= 1
            start = self.free.pop(i)[0]
        self.free.insert(i, (start, stop))
        self.largest = max(self.largest, stop - start)

    def touch(self, start: int, stop: int) -> int:
        """Touch these bytes and return how many.  Two threads take half the time where the system's host has to find
        the memory: 0.9 GB/s for 0.4."""
        self.touched = min(stop, self.nbytes)
        address, middle = self.bytes.ctypes.data, (start + self.touched) // 2
        half = max(start, middle // HUGE_PAGE_BYTES * HUGE_PAGE_BYTES)
        other = threading.Thread(target=ctypes.memset, args=(address + half, 0, self.touched - half))
        other.start()
        ctypes.memset(address + start, 0, half - start)
        other.join()
        return self.touched - start

    @property
    def unused(self) -> bool:
        """Whether all of it is free."""
        return self.free == [(0, self.nbytes)]


class CachingAllocator:
    """Allocates from segments, from any thread; a copy begins empty.

    max_free_bytes: free memory up to which unused segments are kept
    """

    MAX_FREE_BYTES = 128 << 20
    SEGMENT_BYTES = 64 << 20
    SMALL_BLOCK_BYTES = 256 << 10  # blocks below come in small segments, so that small networks stay small
    SMALL_SEGMENT_BYTES = HUGE_PAGE_BYTES
    PREFAULT_BYTES = 2 * HUGE_PAGE_BYTES  # touched by one call of `prefault`
    ALLOCATION_PREFAULT_BYTES = 4 * HUGE_PAGE_BYTES  # touched beyond a new block, in large segments

    def __init__(self, max_free_bytes: int | None = None) -> None:
        self.segments: list[Segment] = []
        self.max_free_bytes = self.MAX_FREE_BYTES if max_free_bytes is None else max_free_bytes
        self._held = self._touched = 0  # bytes of blocks in use, and of segments that were touched
        self._last_segment: Segment | None = None
        self._freed: deque[tuple[Segment, int, int]] = deque()  # freed blocks, not yet in their segments
        self._lock = threading.Lock()

    def __deepcopy__(self, memo: Any) -> CachingAllocator:
        return CachingAllocator()

    def __reduce__(self) -> Any:
        return CachingAllocator, ()

    @property
    def nbytes(self) -> int:
        """Bytes that are free and were touched: resident, and ready for use."""
        self._try_collect()
        return self._touched - self._held

    def empty_bytes(self, nbytes: int, device: torch.device) -> Tensor:
        """Return uninitialised bytes (uint8), aligned to a cache line, which can be written in and out of inference
        mode."""
        with torch.inference_mode(False):
            if device.type != "cpu" or nbytes == 0:
                new = torch.empty(nbytes, dtype=torch.uint8, device=device)
            else:
                new = torch.from_numpy(self._allocate(-(-nbytes // ALIGNMENT_BYTES) * ALIGNMENT_BYTES))[:nbytes]
            return new.fill_(255) if poison else new  # 255s are NaN in every dtype of ours

    def empty_many(self, shapes: Mapping[str, Shape], device: torch.device) -> dict[str, Tensor]:
        """Return tensors that are freed together, in one block."""
        spans, end = [], 0
        for shape, dtype in shapes.values():
            nbytes = math.prod(shape) * dtype.itemsize
            spans.append((end, end + nbytes))
            end += -(-nbytes // ALIGNMENT_BYTES) * ALIGNMENT_BYTES
        block, out = self.empty_bytes(end, device), {}
        with torch.inference_mode(False):
            for (name, (shape, dtype)), (start, stop) in zip(shapes.items(), spans, strict=True):
                out[name] = block[start:stop].view(dtype).view(tuple(shape))
        return out

    def empty(self, *shape: int, dtype: torch.dtype, device: torch.device) -> Tensor:
        """Return an uninitialised tensor."""
        return self.empty_many({"it": (shape, dtype)}, device)["it"]

    def prefault(self, nbytes: int) -> bool:
        """Touch PREFAULT_BYTES more where fewer than `nbytes` are free and touched; whether that was needed."""
        if nbytes < self.PREFAULT_BYTES or self.nbytes >= nbytes:
            return False
        with self._lock:
            untouched = (each for each in self.segments if each.touched < each.nbytes)
            segment = next(untouched, None) or self._new(self.SEGMENT_BYTES)
            self._touched += segment.touch(segment.touched, segment.touched + self.PREFAULT_BYTES)
        return True

    def release(self, block: Block) -> None:
        """Free a block: called when its last view is gone, perhaps during an allocation, by the garbage collector."""
        if poison:
            block.fill(255)
        assert block.segment is not None
        self._freed.append((block.segment, *block.place))
        self._try_collect()

    def _allocate(self, nbytes: int) -> Block:
        with self._lock:
            self._collect_freed()
            self._held += nbytes
            for segment in self._last_used_first():
                if (block := segment.take(nbytes, segment.touched)) is not None:
                    self._last_segment = segment
                    return block
            for segment in self.segments:
                if (block := self._take_untouched(segment, nbytes)) is not None:
                    return block
            block = self._take_untouched(self._new(nbytes), nbytes)
            assert block is not None
            return block

    def _last_used_first(self) -> Iterator[Segment]:
        """Yield all segments, first the one that had room last: a state's blocks are allocated one after another."""
        if self._last_segment is not None:
            yield self._last_segment
        yield from self.segments

    def _take_untouched(self, segment: Segment, nbytes: int) -> Block | None:
        """Return a block of which some bytes were never touched."""
        before = segment.touched
        block = segment.take(nbytes, segment.nbytes)
        if block is not None and segment.nbytes > self.ALLOCATION_PREFAULT_BYTES:
            self._touched += segment.touch(before, max(segment.touched, before + self.ALLOCATION_PREFAULT_BYTES))
        else:
            self._touched += segment.touched - before
        return block

    def _new(self, nbytes: int) -> Segment:
        least = self.SMALL_SEGMENT_BYTES if nbytes < self.SMALL_BLOCK_BYTES else self.SEGMENT_BYTES
        self.segments.append(Segment(self, max(nbytes, least)))
        return self.segments[-1]

    def trim(self) -> None:
        """Return unused segments to the system."""
        with self._lock:
            kept, self.max_free_bytes = self.max_free_bytes, 0
            self._collect_freed()
            self.max_free_bytes = kept

    def _try_collect(self) -> None:
        if self._freed and self._lock.acquire(blocking=False):
            try:
                self._collect_freed()
            finally:
                self._lock.release()

    def _collect_freed(self) -> None:
        """Move freed blocks into their segments; the lock is held."""
        while self._freed:
            segment, start, stop = self._freed.popleft()
            segment.release(start, stop)
            self._held -= stop - start
        while self._touched - self._held > self.max_free_bytes:
            unused = next((segment for segment in self.segments if segment.unused), None)
            if unused is None:
                break
            self.segments.remove(unused)
            self._last_segment = None if self._last_segment is unused else self._last_segment
            self._touched -= unused.touched


default_allocator = CachingAllocator()  # of states that are made without a runner
