"""KV-cache pages, shared copy-on-write between sequences with a common prefix.

A page is memory for PAGE tokens of one sequence: for every layer of a page group, one layer after another, the layer's
page buffers, each (heads, PAGE, head dim).  Layers with the same attention window are one group: they grow, are cut,
shared and released together, so a long sequence is some hundred objects, not some ten thousand.

A page is alive as long as a sequence or snapshot refers to it; then its memory goes back to the allocator at once.
Shared pages are not written to: full ones need no writing, the last one is copied before the next token
(`Pages.reserve`).  Pages that lie wholly before the window of the next token are released by the next `reserve`.
"""

from __future__ import annotations

from collections.abc import Sequence
from typing import NamedTuple

import numpy as np
import torch
from torch import Tensor

from tiercel.runtime.allocator import CachingAllocator

# tokens of a page (PAGE in ops/cpu/kernels.h): whole tiles of keys, and what a snapshot's last page may waste
PAGE = 64


class Page:
    """Compared by identity: a page held twice is one page.  `memory` is flat; a layer has its own part of it."""

    __slots__ = ("address", "memory")

    def __init__(self, memory: Tensor) -> None:
        self.memory, self.address = memory, memory.data_ptr()

    @property
    def nbytes(self) -> int:
        return self.memory.nbytes


class PageRun(NamedTuple):
    """Pages of one group that others may hold too: those from number `first` on."""

    first: int
    pages: tuple[Page, ...]

    def cut(self, length: int) -> PageRun:
        """The pages of the first `length` tokens."""
        return PageRun(self.first, self.pages[: max(-(-length // PAGE) - self.first, 0)])


def released_pages(length: int, window: int | None) -> int:
    """How many pages lie wholly before what the token after the first `length` sees."""
    return 0 if window is None else max(length - window + 1, 0) // PAGE


def min_pos(first: int, window: int | None) -> int:
    """The least length that can be continued without the pages before number `first`."""
    return first * PAGE + window - 1 if window is not None and first else 0


class Pages:
    """The pages of one sequence and one group, in order.

    held      page i has tokens i · PAGE …; None where it was released
    first     how many were
    shared    how many of the first ones others may hold too, so that they are not written to
    table     (capacity,) int64, their addresses for kernels; moves when it grows
    window    of the group's layers; None: they see everything
    """

    def __init__(
        self, allocator: CachingAllocator, size: int, dtype: torch.dtype, device: torch.device, window: int | None
    ) -> None:
        self.allocator, self.size, self.dtype, self.device, self.window = allocator, size, dtype, device, window
        self.held: list[Page | None] = []
        self.first = self.shared = 0
        self.table = np.zeros(16, dtype=np.int64)

    def __getitem__(self, index: int) -> Page:
        page = self.held[index]
        assert page is not None, "this page was released"
        return page

    def alive(self) -> Sequence[Page]:
        """Those that are not released."""
        return [page for page in self.held if page is not None]

    @property
    def capacity(self) -> int:
        """Tokens."""
        return len(self.held) * PAGE

    @property
    def min_pos(self) -> int:
        """The least length that can be continued with these pages."""
        return min_pos(self.first, self.window)

    def min_pos_after(self, length: int) -> int:
        """What `min_pos` will be once the tokens after the first `length` are added."""
        return min_pos(max(self.first, released_pages(length, self.window)), self.window)

    def ready(self, used: int, length: int) -> bool:
        """Whether tokens from `used` up to `length` can be written and nothing is to be released."""
        if length > len(self.held) * PAGE or self.shared * PAGE > used:
            return False
        return self.window is None or released_pages(used, self.window) <= self.first

    def reserve(self, used: int, length: int) -> None:
        """Make it so: release pages before the window, add pages, copy the page of token `used` where it is shared."""
        self.cut(used)
        while self.first < min(released_pages(used, self.window), len(self.held)):
            self.held[self.first], self.table[self.first] = None, 0
            self.first += 1
        if self.shared * PAGE > used:
            last = used // PAGE
            page = self._new()
            page.memory.copy_(self[last].memory)
            self.held[last], self.shared = page, last
            self.table[last] = page.address
        self._grow(length)

    def begin(self, first: int, length: int) -> None:
        """Hold new pages for the tokens up to `length`, none before number `first`."""
        self.held, self.first, self.shared = [None] * first, first, 0
        self.table = np.zeros(16 + 2 * first, dtype=np.int64)
        self._grow(length)

    def _grow(self, length: int) -> None:
        while self.capacity < length:
            if len(self.held) == len(self.table):
                self.table = np.concatenate((self.table, np.zeros_like(self.table)))
            page = self._new()
            self.table[len(self.held)] = page.address
            self.held.append(page)

    def _new(self) -> Page:
        return Page(self.allocator.empty(self.size, dtype=self.dtype, device=self.device))

    def cut(self, length: int) -> None:
        """Release the pages wholly behind the first `length` tokens."""
        kept = -(-length // PAGE)
        del self.held[kept:]
        self.shared, self.first = min(self.shared, kept), min(self.first, kept)

    def share(self, length: int) -> PageRun:
        """The pages of the first `length` tokens, which are shared from now on."""
        self.cut(length)
        self.shared = len(self.held)
        return PageRun(self.first, tuple(self.alive()))

    def assign(self, run: PageRun) -> None:
        """Hold these shared pages instead."""
        self.held, self.first = [None] * run.first + list(run.pages), run.first
        self.shared = len(self.held)
        if len(self.held) > len(self.table):
            self.table = np.zeros(2 * len(self.held), dtype=np.int64)
        self.table[: len(self.held)] = [0 if page is None else page.address for page in self.held]
