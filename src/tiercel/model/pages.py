"""Memory for keys and values, shared between texts that begin alike.

A page is memory for PAGE tokens of one text: for every attention layer, one layer after another, keys and values of
all its kv heads, (2, K, PAGE, P).  All layers share a page because they grow, are cut and are shared together; so a
long text is some hundred objects, not some ten thousand.

A page is alive as long as any text or snapshot holds it: Python counts.  With its last holder gone, that moment, its
memory goes to the pool for the next text.  Who shares its pages writes to none of them any more: full ones need no
writing, the last one is copied before the next token (`Pages.reserve`).
"""

from __future__ import annotations

import contextlib
import mmap
import os
from collections import defaultdict, deque
from collections.abc import Sequence
from typing import Any

import numpy as np
import torch
from torch import Tensor

# tokens of a page (PAGE in ops/cpu/kernels.h): whole tiles of keys, and what a snapshot's last page may waste
PAGE = 64

spoil = os.environ.get("TIERCEL_SPOIL") == "1"  # fill memory with NaN when it is new and when it is free: for tests


def memory(*shape: int, dtype: torch.dtype, device: torch.device) -> Tensor:
    """Memory that can be written to in and out of inference mode."""
    with torch.inference_mode(False):
        new = torch.empty(shape, dtype=dtype, device=device)
    return new.fill_(torch.nan) if spoil else new


LARGE = 2 << 20  # bytes of the system's large pages


def slab(count: int, size: int, dtype: torch.dtype) -> Sequence[Tensor]:
    """Memory of so many pages in one mapping, in the system's large pages where it has some: a step that reads the
    keys of 16,000 tokens is some percent faster than from small ones.  It goes back with the last of its pages."""
    nbytes = count * size * dtype.itemsize
    if hasattr(mmap, "MADV_HUGEPAGE"):
        # private: what Python maps by default is shared, and gets no large pages
        mapped = mmap.mmap(-1, nbytes + LARGE, flags=mmap.MAP_PRIVATE | mmap.MAP_ANONYMOUS)
        with contextlib.suppress(OSError):  # a kernel without them
            mapped.madvise(mmap.MADV_HUGEPAGE)
    else:
        mapped = mmap.mmap(-1, nbytes + LARGE)
    with torch.inference_mode(False):
        all_ = torch.frombuffer(mapped, dtype=torch.uint8)
        begin = -all_.data_ptr() % LARGE
        new = all_[begin : begin + nbytes].view(dtype).view(count, size)
        return (new.fill_(torch.nan) if spoil else new).unbind()


class Pool:
    """Free pages, so that texts that come and go do not ask the system for memory every time.

    A network has one.  It keeps at most KEPT bytes of each kind, so a copy of a network begins with an empty one.
    """

    KEPT = 128 << 20
    SLAB, SMALL = 32 << 20, 256 << 10  # bytes asked for at once; pages below so many are asked for one by one

    def __init__(self) -> None:
        self.free: defaultdict[Any, deque[Tensor]] = defaultdict(deque)  # by size, dtype, device
        self.untouched: defaultdict[Any, deque[Tensor]] = defaultdict(deque)  # the rest of a slab

    def __deepcopy__(self, memo: Any) -> Pool:
        return Pool()

    def __reduce__(self) -> Any:
        return Pool, ()

    @property
    def nbytes(self) -> int:
        return sum(free[0].nbytes * len(free) for free in self.free.values() if free)

    def take(self, size: int, dtype: torch.dtype, device: torch.device) -> Page:
        """A page of so many numbers; what they are is undefined."""
        kind, nbytes = (size, dtype, device), size * dtype.itemsize
        if free := self.free[kind]:
            return Page(self, free.pop())
        if device.type != "cpu" or nbytes < self.SMALL:
            return Page(self, memory(size, dtype=dtype, device=device))
        untouched = self.untouched[kind]
        if not untouched:
            untouched.extend(slab(max(1, self.SLAB // nbytes), size, dtype))
        return Page(self, untouched.popleft())

    def give(self, freed: Tensor) -> None:
        if spoil:
            freed.fill_(torch.nan)
        free = self.free[freed.numel(), freed.dtype, freed.device]
        if (len(free) + 1) * freed.nbytes <= self.KEPT:
            free.append(freed)


class Page:
    """Compared by identity: a page held twice is one page.  `memory` is flat; a layer knows where its part begins."""

    __slots__ = ("address", "memory", "pool")

    def __init__(self, pool: Pool, memory: Tensor) -> None:
        self.pool, self.memory, self.address = pool, memory, memory.data_ptr()

    def __del__(self) -> None:
        self.pool.give(self.memory)

    @property
    def nbytes(self) -> int:
        return self.memory.nbytes


class Pages(Sequence[Page]):
    """The pages of one text, in order.

    shared: so many of the first ones others may hold too, so they are not written to.
    table (capacity) int64: their addresses, for kernels; moves when it grows.
    """

    def __init__(self, pool: Pool, size: int, dtype: torch.dtype, device: torch.device) -> None:
        self.pool, self.size, self.dtype, self.device = pool, size, dtype, device
        self.held: list[Page] = []
        self.shared = 0
        self.table = np.zeros(16, dtype=np.int64)

    def __len__(self) -> int:
        return len(self.held)

    def __getitem__(self, index: Any) -> Any:
        return self.held[index]

    @property
    def room(self) -> int:
        """Tokens."""
        return len(self.held) * PAGE

    def ready(self, used: int, length: int) -> bool:
        """Whether tokens from `used` up to `length` can be written."""
        return length <= len(self.held) * PAGE and self.shared * PAGE <= used

    def reserve(self, used: int, length: int) -> None:
        """See to that: add pages, and copy the page of token `used` where it is shared.  Nothing else is copied."""
        self.cut(used)
        if self.shared * PAGE > used:
            last = used // PAGE
            page = self._new()
            page.memory.copy_(self.held[last].memory)
            self.held[last], self.shared = page, last
            self.table[last] = page.address
        while self.room < length:
            if len(self.held) == len(self.table):
                self.table = np.concatenate((self.table, np.zeros_like(self.table)))
            page = self._new()
            self.table[len(self.held)] = page.address
            self.held.append(page)

    def _new(self) -> Page:
        return self.pool.take(self.size, self.dtype, self.device)

    def cut(self, length: int) -> None:
        """Let go of what lies wholly behind the first `length` tokens."""
        kept = -(-length // PAGE)
        del self.held[kept:]
        self.shared = min(self.shared, kept)

    def share(self, length: int) -> tuple[Page, ...]:
        """The pages of the first `length` tokens, for somebody else too."""
        self.cut(length)
        self.shared = len(self.held)
        return tuple(self.held)

    def adopt(self, shared: Sequence[Page]) -> None:
        """Hold these instead, which others hold too."""
        self.held, self.shared = list(shared), len(shared)
        if len(self.held) > len(self.table):
            self.table = np.zeros(2 * len(self.held), dtype=np.int64)
        self.table[: len(self.held)] = [page.address for page in self.held]
