"""Memory that texts leave each other.

What a text remembers is megabytes, written once and given up a second later: pages of keys and values, a recurrent
state and its open inputs, snapshots of both.  From the system such memory is slow every time.  It comes in small pages,
each cleaned when it is touched first, and goes back as soon as it is free.  That is 3 GB/s on our machine, and 0.4 in a
virtual one whose host has to find the memory, too: 100 ms for a snapshot of a 0.5B.

So a network has a pool: slabs in the system's large pages, and in them runs of bytes, each a tensor's memory.  A run is
free again the moment the last view of it is gone: Python counts.  Free neighbours become one, a new run is the first
that fits, where memory was used before if possible, and whole slabs go back when more is free than is kept.  `ahead`
touches memory for those who will come.
"""

from __future__ import annotations

import contextlib
import ctypes
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

spoil = os.environ.get("TIERCEL_SPOIL") == "1"  # fill memory with NaN when it is new and when it is free: for tests

HUGE = 2 << 20  # bytes of the system's large pages
ALIGN = 64  # bytes of a cache line

Shape = tuple[Sequence[int], torch.dtype]


def mapped(nbytes: int) -> np.ndarray:
    """So many bytes (uint8) from the system itself, in its large pages where it has some; they go back to it whole."""
    if not hasattr(mmap, "MAP_PRIVATE"):
        return np.frombuffer(mmap.mmap(-1, nbytes), dtype=np.uint8)
    # private: what Python maps by default is shared, and gets no large pages
    block = mmap.mmap(-1, nbytes, flags=mmap.MAP_PRIVATE | mmap.MAP_ANONYMOUS)
    if hasattr(mmap, "MADV_HUGEPAGE"):
        with contextlib.suppress(OSError):  # a kernel without them
            block.madvise(mmap.MADV_HUGEPAGE)
    return np.frombuffer(block, dtype=np.uint8)


def memory(*shape: int, dtype: torch.dtype, device: torch.device) -> Tensor:
    """Memory of nobody's pool, that can be written to in and out of inference mode."""
    with torch.inference_mode(False):
        new = torch.empty(shape, dtype=dtype, device=device)
    return new.fill_(torch.nan) if spoil else new


class Block(np.ndarray):
    """Some bytes of a slab.  numpy's own views of it have no `slab`: only the one that a tensor holds gives it back."""

    slab: Segment | None = None
    place: tuple[int, int]

    def __del__(self) -> None:
        if self.slab is not None:
            self.slab.pool.give(self)


class Segment:
    """bytes: all of it · free: (start, stop) of what is, in order, no two of them neighbours · largest: of these, or
    more · touched: everything before this has been, nothing behind it"""

    def __init__(self, pool: CachingAllocator, nbytes: int) -> None:
        self.pool, self.nbytes = pool, nbytes
        all_ = mapped(nbytes + HUGE)
        begin = -all_.ctypes.data % HUGE
        self.bytes = all_[begin : begin + nbytes]
        self.free, self.largest = [(0, nbytes)], nbytes
        self.touched = 0

    def take(self, nbytes: int, stop: int) -> Block | None:
        """The first run of so many free bytes that ends before `stop`."""
        if nbytes > self.largest:
            return None
        for i, (start, end) in enumerate(self.free):
            if start + nbytes > stop:
                return None
            if end - start >= nbytes:
                self.free[i : i + 1] = [(start + nbytes, end)] if end - start > nbytes else []
                self.touched = max(self.touched, start + nbytes)
                run: Block = self.bytes[start : start + nbytes].view(Block)
                run.slab, run.place = self, (start, start + nbytes)
                return run
        self.largest = max((end - start for start, end in self.free), default=0)
        return None

    def give(self, start: int, stop: int) -> None:
        i = bisect_left(self.free, (start, stop))
        if i < len(self.free) and self.free[i][0] == stop:
            stop = self.free.pop(i)[1]
        if i and self.free[i - 1][1] == start:
            i -= 1
            start = self.free.pop(i)[0]
        self.free.insert(i, (start, stop))
        self.largest = max(self.largest, stop - start)

    def touch(self, start: int, stop: int) -> int:
        """Touch these bytes, which nobody did, and say how many.  Two threads take half the time where the system's
        host has to find the memory: 0.9 GB/s for 0.4."""
        self.touched = min(stop, self.nbytes)
        address, half = self.bytes.ctypes.data, max(start, (start + self.touched) // 2 // HUGE * HUGE)
        other = threading.Thread(target=ctypes.memset, args=(address + half, 0, self.touched - half))
        other.start()
        ctypes.memset(address + start, 0, half - start)
        other.join()
        return self.touched - start

    @property
    def unused(self) -> bool:
        return self.free == [(0, self.nbytes)]


class CachingAllocator:
    """A network has one, and so has what passes (memory.py); a copy of a network begins with an empty one.  From any
    thread.

    keep: bytes of free memory up to which slabs that nobody uses are kept
    """

    KEEP = 128 << 20
    SLAB = 64 << 20  # bytes asked for at once; but for a run below SMALL
    SMALL, FEW = 256 << 10, HUGE  # only FEW: small networks stay small
    STEP = 2 * HUGE  # bytes touched at once while nobody waits
    AT_ONCE = 4 * HUGE  # and where somebody does, in large slabs

    def __init__(self, keep: int | None = None) -> None:
        self.slabs: list[Segment] = []
        self.keep = self.KEEP if keep is None else keep
        self._held = self._touched = 0  # bytes of runs that are out, and of slabs that were touched
        self._lucky: Segment | None = None
        self._given: deque[tuple[Segment, int, int]] = deque()  # runs that came back, not yet in their slabs
        self._lock = threading.Lock()

    def __deepcopy__(self, memo: Any) -> CachingAllocator:
        return CachingAllocator()

    def __reduce__(self) -> Any:
        return CachingAllocator, ()

    @property
    def nbytes(self) -> int:
        """Memory that is free and was touched: it costs, and is there at once."""
        self._settle()
        return self._touched - self._held

    def take(self, nbytes: int, device: torch.device) -> Tensor:
        """So many bytes (uint8), aligned for everybody; what they are is undefined.  They can be written to in and out
        of inference mode."""
        with torch.inference_mode(False):
            if device.type != "cpu" or nbytes == 0:
                new = torch.empty(nbytes, dtype=torch.uint8, device=device)
            else:
                new = torch.from_numpy(self._run(-(-nbytes // ALIGN) * ALIGN))[:nbytes]
            return new.fill_(255) if spoil else new  # 255s are NaN in every dtype of ours

    def several(self, shapes: Mapping[str, Shape], device: torch.device) -> dict[str, Tensor]:
        """Tensors that come and go together, in one run."""
        starts, end = {}, 0
        for name, (shape, dtype) in shapes.items():
            starts[name] = end
            end += -(-int(np.prod(shape)) * dtype.itemsize // ALIGN) * ALIGN
        run, out = self.take(end, device), {}
        with torch.inference_mode(False):
            for name, (shape, dtype) in shapes.items():
                nbytes = int(np.prod(shape)) * dtype.itemsize
                out[name] = run[starts[name] : starts[name] + nbytes].view(dtype).view(tuple(shape))
        return out

    def one(self, *shape: int, dtype: torch.dtype, device: torch.device) -> Tensor:
        return self.several({"it": (shape, dtype)}, device)["it"]

    def ahead(self, nbytes: int) -> bool:
        """Touch a little more memory where less than so many bytes are free and touched; whether that was done."""
        if nbytes < self.STEP or self.nbytes >= nbytes:
            return False
        with self._lock:
            slab = next((slab for slab in self.slabs if slab.touched < slab.nbytes), None) or self._new(self.SLAB)
            self._touched += slab.touch(slab.touched, slab.touched + self.STEP)
        return True

    def give(self, run: Block) -> None:
        """Called by a run that nobody holds any more; perhaps in the middle of `take`, as garbage is collected."""
        if spoil:
            run.fill(255)
        assert run.slab is not None
        self._given.append((run.slab, *run.place))
        self._settle()

    def _run(self, nbytes: int) -> Block:
        with self._lock:
            self._put_back()
            self._held += nbytes
            for slab in self._by_luck():
                if (run := slab.take(nbytes, slab.touched)) is not None:
                    self._lucky = slab
                    return run
            for slab in self.slabs:
                if (run := self._fresh(slab, nbytes)) is not None:
                    return run
            run = self._fresh(self._new(nbytes), nbytes)
            assert run is not None
            return run

    def _by_luck(self) -> Iterator[Segment]:
        """All slabs, the one first that had room last: a state's many runs are taken one after another."""
        if self._lucky is not None:
            yield self._lucky
        yield from self.slabs

    def _fresh(self, slab: Segment, nbytes: int) -> Block | None:
        """A run of which some was never touched."""
        before = slab.touched
        run = slab.take(nbytes, slab.nbytes)
        if run is not None and slab.nbytes > self.AT_ONCE:
            self._touched += slab.touch(before, max(slab.touched, before + self.AT_ONCE))
        else:
            self._touched += slab.touched - before
        return run

    def _new(self, nbytes: int) -> Segment:
        self.slabs.append(Segment(self, max(nbytes, self.FEW if nbytes < self.SMALL else self.SLAB)))
        return self.slabs[-1]

    def give_back(self) -> None:
        """Slabs that nobody uses, to the system."""
        with self._lock:
            kept, self.keep = self.keep, 0
            self._put_back()
            self.keep = kept

    def _settle(self) -> None:
        if self._given and self._lock.acquire(blocking=False):
            try:
                self._put_back()
            finally:
                self._lock.release()

    def _put_back(self) -> None:
        """What was given, into its slabs; the lock is held."""
        while self._given:
            slab, start, stop = self._given.popleft()
            slab.give(start, stop)
            self._held -= stop - start
        while self._touched - self._held > self.keep:
            unused = next((slab for slab in self.slabs if slab.unused), None)
            if unused is None:
                break
            self.slabs.remove(unused)
            self._lucky = None if self._lucky is unused else self._lucky
            self._touched -= unused.touched


default_allocator = CachingAllocator()  # of states that are made without a runner
