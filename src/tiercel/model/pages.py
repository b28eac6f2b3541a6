"""Memory for keys and values, shared between texts that begin alike.

A page is memory for PAGE tokens of one text: for every attention layer, one layer after another, keys and values of
all its kv heads, (2, K, PAGE, P).  All layers share a page because they grow, are cut and are shared together; so a
long text is some hundred objects, not some ten thousand.

A page is alive as long as any text or snapshot holds it.  With its last holder gone, that moment, its memory goes to
the pool for the next text (pool.py).  Who shares its pages writes to none of them any more: full ones need no
writing, the last one is copied before the next token (`Pages.reserve`).
"""

from __future__ import annotations

from collections.abc import Sequence
from typing import Any

import numpy as np
import torch
from torch import Tensor

from tiercel.runtime.allocator import CachingAllocator

# tokens of a page (PAGE in ops/cpu/kernels.h): whole tiles of keys, and what a snapshot's last page may waste
PAGE = 64


class Page:
    """Compared by identity: a page held twice is one page.  `memory` is flat; a layer knows where its part begins."""

    __slots__ = ("address", "memory")

    def __init__(self, memory: Tensor) -> None:
        self.memory, self.address = memory, memory.data_ptr()

    @property
    def nbytes(self) -> int:
        return self.memory.nbytes


class Pages(Sequence[Page]):
    """The pages of one text, in order.

    shared: so many of the first ones others may hold too, so they are not written to.
    table (capacity) int64: their addresses, for kernels; moves when it grows.
    """

    def __init__(self, pool: CachingAllocator, size: int, dtype: torch.dtype, device: torch.device) -> None:
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

    def precomputed(self, used: int, length: int) -> bool:
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
        return Page(self.pool.one(self.size, dtype=self.dtype, device=self.device))

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
