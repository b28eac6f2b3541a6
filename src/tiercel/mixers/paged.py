"""State of a mixer with page buffers (attention): keys and values of every token, in pages.

    CPU      `PagedState`   pages of one sequence, shared copy-on-write (model/pages.py)
    device   `PagedSlots`   pages of all sequences in one tensor for each buffer, (pages, heads, PAGE, head dim)

The descriptor of a layer: address of its group's page table · byte of a page where the layer's buffers begin · for each
kv head a counter of finished tiles (`AttentionDescriptor` in ops/cpu/kernels.h).

Letters: K kv heads, P head dim, T tokens so far, L new ones.
"""

from __future__ import annotations

import math
from collections.abc import Iterator, Mapping, Sequence
from functools import cached_property, lru_cache

import numpy as np
import torch
from torch import Tensor

from tiercel.mixers.spec import Buffer, MixerSpec
from tiercel.model.layer_state import LayerState
from tiercel.model.pages import PAGE, Pages, min_pos, released_pages
from tiercel.runtime.allocator import memory

TILE = 32  # keys that kernels read together: pages are whole tiles


class PagedState(LayerState):
    """Page buffers of one layer and sequence; trims by length.

    Kernels read pages where they lie.  torch's attention wants all keys in a row: `extend` writes the pages, which
    are what is shared and saved, and keeps a second copy in a row, to which each call adds its new tokens.  So on plain
    torch (no extension, another device, float16) a running sequence takes its keys and values twice; a snapshot does
    not, nor does a fork until it runs.
    """

    TABLE, START, FINISHED = 0, 1, 2

    pages: Pages  # of the layer's group
    start: int  # where in a page this layer begins, in values

    def __init__(self, spec: MixerSpec, dtype: torch.dtype, device: torch.device) -> None:
        super().__init__(spec, dtype, device)
        self.page_buffers = page_buffers(spec)
        self.rows = {b.name: self._row(b, 0) for b in self.page_buffers}  # each (K, capacity, P)
        self.first = self.gathered = 0  # tokens that the rows have: from `first` up to `gathered`

    def _row(self, buffer: Buffer, capacity: int) -> Tensor:
        return memory(*buffer.shape[:-1], capacity, buffer.shape[-1], dtype=self.dtype, device=self.device)

    @property
    def size(self) -> int:
        return self.FINISHED + self.page_buffers[0].shape[0]

    @property
    def page_size(self) -> int:
        """Values of one page."""
        return PAGE * sum(b.values for b in self.page_buffers)

    def publish(self) -> None:
        self.descriptor[self.TABLE] = self.pages.table.ctypes.data
        self.descriptor[self.START] = self.start * self.dtype.itemsize

    @property
    def committed_pos(self) -> int:
        return self.pages.first * PAGE

    def _pieces(self, start: int, stop: int) -> Iterator[tuple[slice, dict[str, Tensor]]]:
        """Tokens from `start` to `stop`, page by page: which, and their part of each buffer."""
        while start < stop:
            first = start % PAGE
            count = min(PAGE - first, stop - start)
            parts = split_page(self.page_buffers, self.pages[start // PAGE].memory, self.start)
            yield slice(start, start + count), {name: t[:, first : first + count] for name, t in parts.items()}
            start += count

    def _write(self, tensors: Mapping[str, Tensor], start: int) -> None:
        length = next(iter(tensors.values())).shape[1]
        for span, parts in self._pieces(start, start + length):
            for name, part in parts.items():
                part.copy_(tensors[name][:, span.start - start : span.stop - start])

    def extend(self, *new: Tensor) -> tuple[Tensor, ...]:
        """Add L tokens to every page buffer.

        Args:
            new: (K, L, P) for each, in the order of the spec's table.

        Returns:
            For each (K, T, P): everything held of it, the new tokens included.
        """
        start, stop = self.length, self.length + new[0].shape[1]
        self._write({b.name: t for b, t in zip(self.page_buffers, new, strict=True)}, start)
        first = self.committed_pos
        if first != self.first or stop - first > next(iter(self.rows.values())).shape[1]:
            # by half as much more than there are: growing costs a copy
            capacity = -(-max(stop - first, (start - first) * 3 // 2, PAGE) // TILE) * TILE
            self.rows = {b.name: self._row(b, capacity) for b in self.page_buffers}
            self.first = self.gathered = first
        for span, parts in self._pieces(self.gathered, stop):
            for name, part in parts.items():
                self.rows[name][:, span.start - first : span.stop - first] = part
        self.gathered = stop
        return tuple(row[:, : stop - first] for row in self.rows.values())

    def cut(self, length: int) -> None:
        """Tokens from `length` on are not what they were."""
        self.gathered = max(min(self.gathered, length), self.first)

    @property
    def buffers(self) -> Mapping[str, Tensor]:
        return self.rows

    def tensors(self) -> dict[str, Tensor]:
        first, out = self.committed_pos, {}
        out = {b.name: self._row(b, self.length - first) for b in self.page_buffers}
        for span, parts in self._pieces(first, self.length):
            for name, part in parts.items():
                out[name][:, span.start - first : span.stop - first] = part
        return out

    def load(self, tensors: Mapping[str, Tensor], length: int, committed_pos: int) -> None:
        self._write(tensors, committed_pos)

    def shapes(self, length: int, committed_pos: int) -> dict[str, tuple[int, ...]]:
        window = self.spec.window
        if committed_pos and (window is None or committed_pos % PAGE or committed_pos + window - 1 > length):
            raise ValueError("keys and values do not begin where they can")
        return {b.name: (*b.shape[:-1], length - committed_pos, b.shape[-1]) for b in self.page_buffers}


class PageGroup:
    """Pages of the layers with one attention window.

    table     (slots, most pages of a sequence) int32: page i of a slot has its tokens i · PAGE …; 0: none
    numbers   the same for each slot on the host
    first     how many of a slot's pages were released, as no later token sees them
    new       (slot, page, number) of pages that the table does not have yet
    free      numbers of free pages; number 0 is no sequence's
    """

    def __init__(self, window: int | None, count: int, pages: int, most_pages: int, device: torch.device) -> None:
        self.window, self.count = window, pages
        self.table = torch.zeros(count, most_pages, dtype=torch.int32, device=device)
        self.free = list(range(1, pages + 1))[::-1]
        self.numbers: list[list[int]] = [[] for _ in range(count)]
        self.first = [0] * count
        self.new: list[tuple[int, int, int]] = []
        self.layers: list[PagedSlots] = []

    @cached_property
    def page_nbytes(self) -> int:
        """Bytes of one page."""
        return sum(layer.nbytes // (self.count + 1) for layer in self.layers)

    def held(self, slot: int) -> list[int]:
        """Numbers of the pages that a slot has."""
        return self.numbers[slot][self.first[slot] :]

    def missing(self, slot: int, used: int, length: int) -> int:
        """How many more free pages there must be so that a slot of `used` tokens can have `length`."""
        first = min(released_pages(used, self.window), len(self.numbers[slot]))
        return -(-length // PAGE) - len(self.numbers[slot]) - max(first - self.first[slot], 0)

    def reserve(self, slot: int, used: int, length: int) -> None:
        """Release a slot's pages before the window of token `used`, then have pages up to `length`."""
        numbers, first = self.numbers[slot], self.first[slot]
        released = min(released_pages(used, self.window), len(numbers))
        if released > first:
            self.free += numbers[first:released][::-1]
            numbers[first:released] = [0] * (released - first)
            self.first[slot] = released
        self._grow(slot, length)

    def _grow(self, slot: int, length: int) -> None:
        numbers = self.numbers[slot]
        if (count := -(-length // PAGE) - len(numbers)) > 0:
            for page in range(len(numbers), len(numbers) + count):
                numbers.append(self.free.pop())
                self.new.append((slot, page, numbers[-1]))

    def publish(self) -> None:
        """Write new pages into the table, in one copy; before a forward."""
        if self.new:
            host = on_host(np.array(self.new, dtype=np.int64).T, self.table.device)
            slot_N, page_N, number_N = host.to(self.table.device, non_blocking=True)
            self.table[slot_N, page_N] = number_N.int()
            self.new = []

    def begin(self, slot: int, first: int, length: int) -> None:
        """Give an empty slot pages for the tokens up to `length`, none before number `first`."""
        self.numbers[slot], self.first[slot] = [0] * first, first
        self._grow(slot, length)

    def release(self, slot: int) -> None:
        """Free all pages of a slot."""
        self.free += self.held(slot)[::-1]
        self.numbers[slot], self.first[slot] = [], 0

    def min_pos(self, slot: int) -> int:
        """The least length that can be continued with the pages a slot has."""
        return min_pos(self.first[slot], self.window)

    def on_device(self, numbers: Sequence[int]) -> Tensor:
        """Page numbers, to index a layer's buffers with."""
        return torch.tensor(numbers, device=self.table.device)


def on_host(array: np.ndarray, device: torch.device) -> Tensor:
    """An array as a tensor that can be copied to a device without waiting for it."""
    t = torch.from_numpy(np.ascontiguousarray(array))
    return t.pin_memory() if device.type == "cuda" else t


class PagedSlots:
    """Page buffers of one layer for all sequences on a device.  group: of layers with the same window."""

    group: PageGroup

    def __init__(self, spec: MixerSpec, pages: int, dtype: torch.dtype, device: torch.device) -> None:
        self.spec = spec
        self.buffers = {
            b.name: torch.zeros(pages, *b.shape[:-1], PAGE, b.shape[-1], dtype=dtype, device=device)
            for b in page_buffers(spec)
        }

    def __getitem__(self, name: str) -> Tensor:
        return self.buffers[name]

    @property
    def nbytes(self) -> int:
        return sum(t.nbytes for t in self.buffers.values())

    def copy(self, source: Tensor, target: Tensor) -> None:
        """Copy pages, by number."""
        for t in self.buffers.values():
            t[target] = t[source]

    def read(self, numbers: Tensor) -> Tensor:
        """Pages by number, each flat as a `Page` has this layer's part: (pages, values)."""
        return torch.cat([t[numbers].flatten(1) for t in self.buffers.values()], 1)

    def write(self, numbers: Tensor, flat: Tensor) -> None:
        """Set pages by number to what `read` returned."""
        sizes = [t[0].numel() for t in self.buffers.values()]
        for t, part in zip(self.buffers.values(), flat.split(sizes, 1), strict=True):
            t[numbers] = part.view(-1, *t.shape[1:])

    @property
    def page_size(self) -> int:
        """Values of one page."""
        return sum(t[0].numel() for t in self.buffers.values())


@lru_cache(maxsize=256)
def page_buffers(spec: MixerSpec) -> tuple[Buffer, ...]:
    """The page buffers of a spec."""
    return tuple(b for b in spec.buffers() if b.lifetime == "page")


def split_page(buffers: tuple[Buffer, ...], page: Tensor, start: int) -> dict[str, Tensor]:
    """A layer's part of a page's flat memory: each buffer (K, PAGE, P)."""
    out = {}
    for b in buffers:
        size = PAGE * math.prod(b.shape)
        out[b.name] = page[start : start + size].view(*b.shape[:-1], PAGE, b.shape[-1])
        start += size
    return out
