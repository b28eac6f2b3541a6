"""What a network remembers of a text.

Layers remember in different ways (layer_state.py).  Everybody else only asks:

    length · oldest · trim(n) → bool · snapshot() / restore(s) · fork() · nbytes / pages · save(path)

Kernels find everything through one run of int64 words that keeps its address as long as the state lives (`Words` in
ops/cpu/kernels.h), so a recorded step stays valid while the text grows:

    length · address of the partial sums of a split attention · how many key segments these have room for
    · address of the table of pages · the words of every layer
"""

from __future__ import annotations

from collections.abc import Iterable, Sequence
from dataclasses import dataclass
from functools import cached_property
from pathlib import Path
from typing import TYPE_CHECKING

import numpy as np
import torch
from torch import Tensor

from tiercel.errors import RequestError
from tiercel.model.config import Mixer
from tiercel.model.layer_state import AttentionState, LayerState, RecurrentState, layer_state
from tiercel.model.pages import Page, Pages
from tiercel.runtime.allocator import CachingAllocator, memory

if TYPE_CHECKING:
    from tiercel.model.runner import SequenceState

SEGMENT = 1024  # keys of one partial sum, where few queries meet many keys (SEGMENT in ops/cpu/kernels.h)
SPLIT = 8  # new tokens up to which that is done


@dataclass(frozen=True)
class Snapshot:
    """What was remembered at `length`; immutable, can be restored any number of times, by any state of the network.

    Keys and values are in pages that are shared, not copied; `layers` are copies of what recurrent layers remember.
    """

    length: int
    pages: tuple[Page, ...]
    layers: tuple[tuple[dict[str, Tensor], int], ...]  # tensors and base of every recurrent layer state

    @cached_property
    def own_nbytes(self) -> int:
        """Without the pages."""
        return sum(t.nbytes for tensors, _ in self.layers for t in tensors.values())

    @property
    def min_pos(self) -> int:
        """The shortest length a state restored from it can be trimmed to."""
        return max((base for _, base in self.layers), default=0)

    @property
    def nbytes(self) -> int:
        """With all of them, whoever else holds them; `nbytes_together` counts them once."""
        return self.own_nbytes + sum(page.nbytes for page in self.pages)


def nbytes_together(held: Iterable[SequenceState | Snapshot]) -> int:
    """What several states and snapshots take, pages that they share counted once.  Free pages in pools do not count."""
    pages: set[Page] = set()
    own = 0
    for one in held:
        own += one.own_nbytes
        pages.update(one.pages)
    return own + sum(page.nbytes for page in pages)


class State:
    """What a network remembers of one text: one `LayerState` per mixer of every layer.

    mixers: of every layer.  model: its fingerprint, for files.  adapter: what its rows wear (model/lora.py).
    pool: where its memory comes from and goes back to; that of the network, so that texts leave each other theirs.
    """

    adapter: str | None = None

    LENGTH, PARTIALS, SEGMENTS, TABLE, HEADER = 0, 1, 2, 3, 4

    def __init__(
        self,
        mixers: Sequence[Sequence[Mixer]],
        dtype: torch.dtype,
        device: torch.device,
        model: str,
        pool: CachingAllocator,
    ) -> None:
        self.mixers, self.dtype, self.device, self.model, self.pool = mixers, dtype, device, model, pool
        self.layers = [[layer_state(config, dtype, device, pool) for config in layer] for layer in mixers]
        self._caches = [part for part in self.parts if isinstance(part, AttentionState)]
        self.recurrent = [part for part in self.parts if isinstance(part, RecurrentState)]
        self._chunks = list({part.chunk: part for part in self.recurrent}.values())  # one of each: they move together
        # memory that others may share: each a thing of its own, with `nbytes`
        self.pages = Pages(pool, sum(part.page_size for part in self._caches), dtype, device)
        start = 0
        for cache in self._caches:
            cache.pages, cache.start = self.pages, start
            start += cache.page_size
        self.words = np.zeros(self.HEADER + sum(part.size for part in self.parts), dtype=np.int64)
        at = self.HEADER
        for part in self.parts:
            part.attach(self.words, at)
            at += part.size
        self._bases = [part.at for part in self.recurrent]
        self._partials = memory(0, dtype=torch.float32, device=torch.device("cpu"))

    @property
    def parts(self) -> list[LayerState]:
        """What every mixer remembers, in their order."""
        return [part for layer in self.layers for part in layer]

    @property
    def length(self) -> int:
        """How many tokens."""
        return int(self.words[self.LENGTH])

    @length.setter
    def length(self, length: int) -> None:
        self.words[self.LENGTH] = length

    @property
    def address(self) -> int:
        """Where the words are; the same as long as the state lives."""
        return self.words.ctypes.data

    @property
    def min_pos(self) -> int:
        """The shortest length `trim` can reach."""
        return int(self.words[self._bases].max()) if self._bases else 0

    def min_pos_after(self, added: int) -> int:
        """What `min_pos` will be when so many more tokens have been read in one forward."""
        return max((part.base_after(added) for part in self._chunks), default=0)

    @property
    def rollback_tokens(self) -> int:
        """The smallest chunk of a layer: what a forward added last can be cut off, up to this; 0 means all of it."""
        return min((part.chunk for part in self.recurrent), default=0)

    @property
    def own_nbytes(self) -> int:
        """Bytes allocated, without the pages."""
        return sum(b.nbytes for part in self.parts for b in part.buffers.values()) + self._partials.nbytes

    @property
    def nbytes(self) -> int:
        """Bytes allocated, with all its pages, whoever else holds them; `nbytes_together` counts them once."""
        return self.own_nbytes + sum(page.nbytes for page in self.pages)

    def reserve(self, added: int) -> None:
        """Have room for so many more tokens; before every forward."""
        used = self.length
        for part in self._caches:
            part.cut(used)  # what a forward added that was interrupted
        if self._caches and not self.pages.precomputed(used, used + added):
            self.pages.reserve(used, used + added)
            self._publish()

    def _publish(self) -> None:
        """The pages are others: say where their table is, and have room for partial sums of so many keys."""
        segments = -(-self.pages.room // SEGMENT)
        if segments > max(1, self.words[self.SEGMENTS]):
            # a segment's result is, for each new token and head, a vector, its sum and its largest score
            row = max(part.heads * (part.head_dim + 2) for part in self._caches)
            self._partials = memory(segments * SPLIT * row, dtype=torch.float32, device=self._caches[0].device)
            self.words[self.PARTIALS : self.TABLE] = self._partials.data_ptr(), segments
        self.words[self.TABLE] = self.pages.table.ctypes.data

    def trim(self, length: int) -> bool:
        """Forget all but the first `length` tokens; pages behind them are free at once.

        False, and nothing changed, where that is not kept.
        """
        if not self.min_pos <= length <= self.length:
            return False
        self.length = length
        self._cut(length)
        return True

    def _cut(self, length: int) -> None:
        self.pages.cut(length)
        for part in self._caches:
            part.cut(length)

    def validate(self) -> None:
        """Make sure that a forward can go on from here: that none was interrupted after its inputs were folded in."""
        if self.min_pos > self.length:
            raise RequestError("this state was interrupted while it grew and cannot go on: start a new one")

    def snapshot(self, *, ending: bool = False) -> Snapshot:
        """A way back to here: pages shared, the rest copied; but S, which is most of it, is given away by a state that
        is not used after this (`ending`)."""
        layers = tuple((part.kept(ending), part.base) for part in self.recurrent)
        return Snapshot(self.length, self.pages.share(self.length), layers)

    def restore(self, snapshot: Snapshot) -> None:
        """Be as when the snapshot was taken."""
        self.length = 0
        self._cut(0)  # also what torch's attention has in a row: it may be another text's
        self.pages.adopt(snapshot.pages)
        if self._caches:
            self._publish()
        for part, (tensors, base) in zip(self.recurrent, snapshot.layers, strict=True):
            part.adopt(tensors, snapshot.length, base)
        self.length = snapshot.length

    def assign(self, length: int, parts: Iterable[tuple[dict[str, Tensor], int]]) -> None:
        """Remember these instead: tensors and base of every layer state.  Shapes are the caller's promise."""
        self.length = 0
        self._cut(0)
        self.reserve(length)
        for part, (tensors, base) in zip(self.parts, parts, strict=True):
            part.adopt(tensors, length, base)
        self.length = length

    def fork(self) -> State:
        """A second state that continues from here on its own."""
        twin = State(self.mixers, self.dtype, self.device, self.model, self.pool)
        twin.adapter = self.adapter
        recurrent = tuple((part.tensors(), part.base) for part in self.recurrent)
        twin.restore(Snapshot(self.length, self.pages.share(self.length), recurrent))
        return twin

    def save(self, path: str | Path, tokens: Sequence[int] = (), earlier: Sequence[Snapshot] = ()) -> None:
        """Write to a file that names the model, its dtype and our version; `Decoder.load_state` reads it.

        tokens: the text, for who reads the file.  earlier: snapshots of the same text at other lengths.
        """
        from tiercel.model import state_file

        state_file.save(self, Path(path), tokens, earlier)

    def load(self, path: str | Path) -> tuple[list[int], list[Snapshot]]:
        """Become what was saved; the tokens and earlier snapshots that were saved with it.

        FormatError when the file is damaged or belongs to another model, dtype or version.
        """
        from tiercel.model import state_file

        return state_file.load(self, Path(path))
