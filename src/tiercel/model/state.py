"""State of a network for one sequence: one `LayerState` for every mixer of every layer.

    length · min_pos · trim(n) → bool · snapshot() / restore(s) · fork() · nbytes / pages · save(path)

Kernels find everything through one run of int64s that keeps its address for the state's lifetime, so a captured step
stays valid while the sequence grows (`StateDescriptor` in ops/cpu/kernels.h):

    length · address of the partial sums of a split attention · how many key segments these have room for
    · the fields of every layer
"""

from __future__ import annotations

from collections.abc import Iterable, Sequence
from dataclasses import dataclass
from functools import cached_property
from typing import Protocol

import numpy as np
import torch
from torch import Tensor

from tiercel.errors import RequestError
from tiercel.mixers.paged import PagedState, page_buffers
from tiercel.mixers.recurrent import RecurrentState
from tiercel.mixers.spec import MixerSpec
from tiercel.model.layer_state import LENGTH, LayerState
from tiercel.model.pages import PAGE, Page, PageRun, Pages, min_pos
from tiercel.runtime.allocator import CachingAllocator, memory

SEGMENT = 1024  # keys of one partial sum, where few queries meet many keys (SEGMENT in ops/cpu/kernels.h)
SPLIT = 8  # new tokens up to which that is done


@dataclass(frozen=True)
class Snapshot:
    """A state at `length`; immutable, can be restored any number of times, by any state of the network.

    runs      keys and values of every page group, in pages that are shared, not copied
    windows   of those groups
    layers    copies of every recurrent layer's tensors, and its committed position
    """

    length: int
    runs: tuple[PageRun, ...]
    windows: tuple[int | None, ...]
    layers: tuple[tuple[dict[str, Tensor], int], ...]

    @property
    def pages(self) -> tuple[Page, ...]:
        """All pages."""
        return tuple(page for run in self.runs for page in run.pages)

    @cached_property
    def own_nbytes(self) -> int:
        """Bytes without the pages."""
        return sum(t.nbytes for tensors, _ in self.layers for t in tensors.values())

    @cached_property
    def min_pos(self) -> int:
        """The least length a state restored from it can be trimmed to."""
        kept = [min_pos(run.first, window) for run, window in zip(self.runs, self.windows, strict=True)]
        return max([*kept, *(position for _, position in self.layers)], default=0)

    @property
    def nbytes(self) -> int:
        """Bytes with all pages, shared or not; `nbytes_together` counts them once."""
        return self.own_nbytes + sum(page.nbytes for page in self.pages)


class Held(Protocol):
    """A state or a snapshot, on any device."""

    @property
    def own_nbytes(self) -> int: ...
    @property
    def pages(self) -> Sequence[Page]: ...


def nbytes_together(held: Iterable[Held]) -> int:
    """Bytes of several states and snapshots, shared pages counted once, free pages of allocators not at all."""
    pages: set[Page] = set()
    own = 0
    for one in held:
        own += one.own_nbytes
        pages.update(one.pages)
    return own + sum(page.nbytes for page in pages)


class State:
    """State of one sequence.

    Args:
        mixers: the specs of every layer's mixers.
        dtype: of keys, values and pending inputs; committed states are float32.
        device: of all buffers.
        model: fingerprint of the network, for files.
        allocator: where memory comes from and goes back to.
        adapter: the LoRA adapter that the sequence uses (model/lora.py).
    """

    PARTIALS, SEGMENTS, HEADER = 1, 2, 3

    def __init__(
        self,
        mixers: Sequence[Sequence[MixerSpec]],
        dtype: torch.dtype,
        device: torch.device,
        model: str,
        allocator: CachingAllocator,
        adapter: str | None = None,
    ) -> None:
        self.mixers, self.dtype, self.device, self.model = mixers, dtype, device, model
        self.allocator, self.adapter = allocator, adapter
        self.layers = [[_layer_state(spec, dtype, device, allocator) for spec in layer] for layer in mixers]
        self.parts = [part for layer in self.layers for part in layer]
        self._paged = [part for part in self.parts if isinstance(part, PagedState)]
        self.recurrent = [part for part in self.parts if isinstance(part, RecurrentState)]
        self._chunks = list({part.chunk: part for part in self.recurrent}.values())  # one of each: they move together
        self.groups = self._page_groups()
        self._windowed = [pages for pages in self.groups if pages.window is not None]
        self.descriptor = np.zeros(self.HEADER + sum(part.size for part in self.parts), dtype=np.int64)
        offset = self.HEADER
        for part in self.parts:
            part.attach(self.descriptor, offset)
            offset += part.size
        self._committed = [part.offset + RecurrentState.COMMITTED for part in self.recurrent]
        self._tables = [pages.table for pages in self.groups]  # as published
        self._partials = memory(0, dtype=torch.float32, device=torch.device("cpu"))

    def _page_groups(self) -> list[Pages]:
        """One group for each attention window; every paged layer gets its place in its group's pages."""
        sizes: dict[int | None, int] = {}
        for part in self._paged:
            part.start = sizes.get(part.spec.window, 0)
            sizes[part.spec.window] = part.start + part.page_size
        groups = {
            window: Pages(self.allocator, size, self.dtype, self.device, window) for window, size in sizes.items()
        }
        for part in self._paged:
            part.pages = groups[part.spec.window]
        return list(groups.values())

    @property
    def pages(self) -> list[Page]:
        """All pages held, of every group."""
        return [page for pages in self.groups for page in pages.alive()]

    @property
    def length(self) -> int:
        """Tokens read."""
        return int(self.descriptor[LENGTH])

    @length.setter
    def length(self, length: int) -> None:
        self.descriptor[LENGTH] = length

    @property
    def address(self) -> int:
        """Of the descriptor; the same for the state's lifetime."""
        return self.descriptor.ctypes.data

    @property
    def min_pos(self) -> int:
        """The least length `trim` can reach."""
        position = int(self.descriptor[self._committed].max()) if self._committed else 0
        for pages in self._windowed:
            position = max(position, pages.min_pos)
        return position

    def min_pos_after(self, added: int) -> int:
        """What `min_pos` will be after one forward of `added` tokens."""
        kept = [pages.min_pos_after(self.length) if added else pages.min_pos for pages in self._windowed]
        return max([*kept, *(part.committed_pos_after(added) for part in self._chunks)], default=0)

    @property
    def rollback_tokens(self) -> int:
        """Tokens of the last forward that `trim` can always take back; 0: all of them, however many.

        The smallest chunk of a recurrent layer, or a window of attention.
        """
        return min(
            [*(part.chunk for part in self.recurrent), *(p.window for p in self._windowed if p.window)], default=0
        )

    @property
    def own_nbytes(self) -> int:
        """Bytes allocated, without the pages."""
        return sum(b.nbytes for part in self.parts for b in part.buffers.values()) + self._partials.nbytes

    @property
    def nbytes(self) -> int:
        """Bytes allocated, with all pages, shared or not; `nbytes_together` counts them once."""
        return self.own_nbytes + sum(page.nbytes for page in self.pages)

    def reserve(self, added: int) -> None:
        """Have room for `added` more tokens, and release what they do not see; before every forward."""
        used = self.length
        for part in self._paged:
            if part.gathered > used:
                part.cut(used)  # what an interrupted forward added
        changed = False
        for pages in self.groups:
            if not pages.ready(used, used + added):
                pages.reserve(used, used + added)
                changed = True
        if changed:
            self._publish()

    def _publish(self) -> None:
        """Write addresses of moved page tables, and have room for partial sums of as many keys as there are."""
        segments = -(-max(pages.capacity for pages in self.groups) // SEGMENT)
        if segments > max(1, self.descriptor[self.SEGMENTS]):
            values = max(part.spec.segment_values for part in self._paged)
            self._partials = memory(segments * SPLIT * values, dtype=torch.float32, device=self.device)
            self.descriptor[self.PARTIALS : self.SEGMENTS + 1] = self._partials.data_ptr(), segments
        if any(pages.table is not table for pages, table in zip(self.groups, self._tables, strict=True)):
            self._tables = [pages.table for pages in self.groups]
            for part in self._paged:
                part.publish()

    def trim(self, length: int) -> bool:
        """Cut the sequence back to its first `length` tokens; pages behind them are free at once.

        Returns:
            False, and nothing changed, where that is not possible: length is below `min_pos` or above `length`.
        """
        if not self.min_pos <= length <= self.length:
            return False
        self.length = length
        self._cut(length)
        return True

    def _cut(self, length: int) -> None:
        for pages in self.groups:
            pages.cut(length)
        for part in self._paged:
            part.cut(length)

    def validate(self) -> None:
        """Make sure that a forward can go on from here.

        Raises:
            RequestError: a forward was interrupted after its inputs were folded in.
        """
        if self.min_pos > self.length:
            raise RequestError("this state was interrupted while it grew and cannot go on: start a new one")

    def snapshot(self, *, ending: bool = False) -> Snapshot:
        """Copy the state: pages are shared, the rest is copied.

        Args:
            ending: the state is not used afterwards, so that its committed states, most of it, are not copied.
        """
        layers = tuple((part.snapshot_tensors(ending=ending), part.committed_pos) for part in self.recurrent)
        return self.share_pages(layers)

    def share_pages(self, layers: tuple[tuple[dict[str, Tensor], int], ...]) -> Snapshot:
        """A snapshot with these tensors of the recurrent layers."""
        runs = tuple(pages.share(self.length) for pages in self.groups)
        return Snapshot(self.length, runs, tuple(pages.window for pages in self.groups), layers)

    def restore(self, snapshot: Snapshot) -> None:
        """Set the state to a snapshot of the same network."""
        self.length = 0
        self._cut(0)  # also what torch's attention has in a row: it may be another sequence's
        for pages, run in zip(self.groups, snapshot.runs, strict=True):
            pages.assign(run)
        if self.groups:
            self._publish()
        for part, (tensors, committed_pos) in zip(self.recurrent, snapshot.layers, strict=True):
            part.load(tensors, snapshot.length, committed_pos)
        self.length = snapshot.length

    def assign(self, length: int, parts: Sequence[tuple[dict[str, Tensor], int]]) -> None:
        """Set the state to tensors and committed position of every layer state, whose shapes are those of `shapes`."""
        self.length = 0
        self._cut(0)
        for part, (_, committed_pos) in zip(self.parts, parts, strict=True):
            if isinstance(part, PagedState):
                part.pages.begin(committed_pos // PAGE, length)
        if self.groups:
            self._publish()
        for part, (tensors, committed_pos) in zip(self.parts, parts, strict=True):
            part.load(tensors, length, committed_pos)
        self.length = length

    def fork(self) -> State:
        """Return a second state that continues from here on its own."""
        twin = State(self.mixers, self.dtype, self.device, self.model, self.allocator, self.adapter)
        twin.restore(self.share_pages(tuple((part.tensors(), part.committed_pos) for part in self.recurrent)))
        return twin


def _layer_state(spec: MixerSpec, dtype: torch.dtype, device: torch.device, allocator: CachingAllocator) -> LayerState:
    """An empty state for one mixer."""
    pages = page_buffers(spec)
    if not pages:
        return RecurrentState(spec, dtype, device, allocator)
    if len(pages) < len(spec.buffers()):
        raise RequestError(
            f"a {spec.kind} layer keeps pages and a recurrent state: one mixer can have only one of them"
        )
    return PagedState(spec, dtype, device)
