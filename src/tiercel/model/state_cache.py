"""States of many sequences on a device: every sequence has a slot in tensors that never move.

`model.state.State` is one sequence on the CPU; here all share their tensors, so that one kernel serves all of them and
a step can be captured as a graph: it finds lengths, committed positions and pages on the device, through slot numbers.

    length_S, committed_S   tokens of a slot, and where its pending inputs begin (the same in every layer)
    scratch_S               the position that a slot's scratch buffers stand at (the same in every layer)
    sampled_S               the token sampled last for a slot, which the next step may take from there
    groups                  which pages hold a slot's keys and values, for each attention window
    layers                  `mixers.paged.PagedSlots` and `mixers.recurrent.RecurrentSlots`

A slot is cut to any length from `min_pos` on by changing a number.  The committed position moves on lazily, at the
first token after a full chunk.  The host has its own copy of all these numbers: it never asks the device.
"""

from __future__ import annotations

from collections.abc import Callable, Iterator, Sequence
from itertools import accumulate
from typing import NamedTuple, Protocol

import torch
from torch import Tensor

from tiercel.errors import RequestError
from tiercel.mixers.attention.rope import RopeConfig
from tiercel.mixers.attention.rotary import frequencies
from tiercel.mixers.backend import Backend
from tiercel.mixers.paged import PagedSlots, PageGroup
from tiercel.mixers.recurrent import RecurrentSlots
from tiercel.mixers.spec import MixerSpec
from tiercel.model.config import ModelConfig
from tiercel.model.pages import PAGE, min_pos, released_pages
from tiercel.model.ragged import END, NEXT, SLOT, Piece, RaggedPlan

MAX_PREFILL = 8192  # tokens of one sequence in one forward, at most

LayerSlots = PagedSlots | RecurrentSlots


class Network(Protocol):
    """What a cache needs of a `Decoder`."""

    config: ModelConfig

    @property
    def dtype(self) -> torch.dtype: ...
    @property
    def device(self) -> torch.device: ...


class StateCache:
    """States of `count` sequences of at most `max_length` tokens for one network, on its device.

    Args:
        network: whose layers they are of.
        count: slots.
        max_length: tokens of one sequence.
        pages: of PAGE tokens for all sequences together; all slots at full length when not given.  Layers with a
            window have no more than they can need.

    Raises:
        RequestError: the layers' chunks differ, or one has no kernels for GPUs.
    """

    def __init__(self, network: Network, count: int, max_length: int, pages: int | None = None) -> None:
        self.device, self.dtype = network.device, network.dtype
        most_pages = -(-max_length // PAGE)
        self.max_length, self.count = max_length, count
        pages = count * most_pages if pages is None else pages
        self.length, self.committed, self.scratch = [0] * count, [0] * count, [-1] * count
        # of one slot more, which stands for rows without a sequence
        self._positions = torch.zeros(3, count + 1, dtype=torch.int32, device=self.device)
        self.length_S, self.committed_S, self.scratch_S = self._positions[:, :count]
        self.scratch_S.fill_(-1)
        self.sampled_S = torch.zeros(count + 1, dtype=torch.int64, device=self.device)
        self._frequencies: dict[tuple[RopeConfig, int], tuple[Tensor, float]] = {}
        self.free = list(range(count))[::-1]
        self._groups: dict[int | None, PageGroup] = {}
        for window in dict.fromkeys(
            m.window for layer in network.config.layers for m in layer.mixers if not m.recurrent
        ):
            most = pages if window is None else min(pages, count * (-(-(window + MAX_PREFILL) // PAGE) + 1))
            self._groups[window] = PageGroup(window, count, most, most_pages, self.device)
        self.layers = [[self._slots(m) for m in layer.mixers] for layer in network.config.layers]
        self.recurrent = [part for part in self.parts if isinstance(part, RecurrentSlots)]
        chunks = {part.chunk for part in self.recurrent}
        if len(chunks) > 1:
            raise RequestError(f"all layers must have one chunk to run on a GPU, not {sorted(chunks)}")
        self.chunk = chunks.pop() if chunks else 1
        self._windows = any(window is not None for window in self._groups)
        self.side_stream = torch.cuda.Stream() if self.device.type == "cuda" else None

    def _slots(self, spec: MixerSpec) -> LayerSlots:
        if not spec.has_gpu_kernels:
            raise RequestError(f"{spec.kind} layers have no kernels for GPUs yet: run this model on the CPU")
        if spec.recurrent:
            return RecurrentSlots(spec, self.count, self.dtype, self.device)
        group = self._groups[spec.window]
        layer = PagedSlots(spec, group.count + 1, self.dtype, self.device)
        layer.group = group
        group.layers.append(layer)
        return layer

    @property
    def parts(self) -> Iterator[LayerSlots]:
        """The state of every mixer, in their order."""
        return (part for layer in self.layers for part in layer)

    @property
    def groups(self) -> list[PageGroup]:
        """The page groups, in the order of `State.groups`."""
        return list(self._groups.values())

    @property
    def nbytes(self) -> int:
        return sum(part.nbytes for part in self.parts)

    def frequencies(self, rope: RopeConfig, head_dim: int) -> tuple[Tensor, float]:
        """`mixers.attention.rotary.frequencies`, on the device."""
        key = (rope, head_dim)
        if key not in self._frequencies:
            f_R, scale = frequencies(rope, head_dim)
            self._frequencies[key] = f_R.to(self.device), scale
        return self._frequencies[key]

    # ── slots

    def take(self) -> int:
        """An empty slot.

        Raises:
            RequestError: all are taken.
        """
        if not self.free:
            raise RequestError(f"all {self.count} slots are taken")
        slot = self.free.pop()
        self.set_position(slot, 0, 0)  # kernels take committed states before the first commit for zero
        return slot

    def release(self, slot: int) -> None:
        """Free a slot and its pages."""
        for group in self.groups:
            group.release(slot)
        self.free.append(slot)

    def reserve(self, slot: int, length: int) -> None:
        """Have pages for a sequence of `length` tokens, and release those that its new tokens do not see.

        Raises:
            RequestError: too long for a slot, or not enough pages are free; nothing is changed then.
        """
        if length > self.max_length:
            raise RequestError(f"{length} tokens do not fit a slot of {self.max_length}")
        used = self.length[slot]
        for group in self.groups:
            if (missing := group.missing(slot, used, length)) > len(group.free):
                raise RequestError(f"{missing} more pages of {PAGE} tokens are needed, {len(group.free)} are free")
        for group in self.groups:
            group.reserve(slot, used, length)

    def begin(self, slot: int, length: int, firsts: Sequence[int]) -> None:
        """Give an empty slot pages for `length` tokens, in each group from its number in `firsts` on."""
        for group, first in zip(self.groups, firsts, strict=True):
            if (missing := -(-length // PAGE) - first) > len(group.free):
                raise RequestError(f"{missing} more pages of {PAGE} tokens are needed, {len(group.free)} are free")
        for group, first in zip(self.groups, firsts, strict=True):
            group.begin(slot, first, length)

    def copy(self, source: int, slot: int) -> None:
        """Make an empty slot hold what another holds; nothing is shared."""
        self.begin(slot, self.length[source], [group.first[source] for group in self.groups])
        for group in self.groups:
            to = group.held(slot)
            of = group.held(source)[: len(to)]
            for layer in group.layers if to else ():
                layer.copy(group.on_device(of), group.on_device(to))
        for part in self.recurrent:
            part.copy(source, slot)
        self.set_position(slot, self.length[source], self.committed[source], self.scratch[source])

    def trim(self, slot: int, length: int) -> bool:
        """Cut a sequence to its first `length` tokens; False, and nothing changed, where that is not kept."""
        if not self.min_pos(slot) <= length <= self.length[slot]:
            return False
        self.set_position(slot, length, self.committed[slot], self.scratch[slot])
        return True

    def min_pos(self, slot: int) -> int:
        """The least length `trim` can reach."""
        kept = [group.min_pos(slot) for group in self.groups]
        return max([*kept, self.committed[slot] if self.recurrent else 0])

    def min_pos_after(self, slot: int, added: int) -> int:
        """What `min_pos` will be after a forward of `added` tokens."""
        kept = [
            min_pos(max(group.first[slot], released_pages(self.length[slot], group.window)), group.window)
            for group in self.groups
        ]
        return max([*kept, self.committed_after(slot, added) if self.recurrent else 0])

    def set_position(self, slot: int, length: int, committed: int, scratch: int = -1) -> None:
        """Set the length of a slot, its committed position and that of its scratch buffers."""
        self.length[slot], self.committed[slot], self.scratch[slot] = length, committed, scratch
        self.length_S[slot], self.committed_S[slot], self.scratch_S[slot] = length, committed, scratch

    # ── forwards

    def publish(self) -> None:
        """Write what `reserve` changed to the device; before a forward."""
        for group in self.groups:
            group.publish()

    def begin_step(self, slots: Sequence[int]) -> None:
        """Before a step of these slots: have room for its tokens."""
        for slot in slots:
            length = self.length[slot]
            if length % PAGE == 0 or length >= self.max_length or self._windows:  # else its last page has room
                self.reserve(slot, length + 1)
        self.publish()

    def count_step(self, slots: Sequence[int]) -> None:
        """After it: what `advance` has done on the device."""
        for slot in slots:
            self.committed[slot] = self.committed_after(slot, 1)
            self.length[slot] += 1
            self.scratch[slot] = self.length[slot]

    def advance(self, slot_B: Tensor) -> None:
        """One token more in each of these slots; on the device, −1: no sequence."""
        B = self.indices(slot_B)
        length, committed, _ = self._positions[:, B]
        moved = torch.maximum(committed, length // self.chunk * self.chunk)
        self._positions[:, B] = torch.stack((length + 1, moved, length + 1))

    def indices(self, slot_B: Tensor) -> Tensor:
        """Slots, to index what has one more of them: the last for −1."""
        return torch.where(slot_B < 0, self.count, slot_B).long()

    def move(self, plan: RaggedPlan) -> None:
        """On the device, after a forward of a plan: the lengths and committed positions of its rows."""
        end_B, next_B = plan.rows[END], plan.rows[NEXT]
        self._positions[:, self.indices(plan.rows[SLOT])] = torch.stack((end_B, next_B, end_B))

    def pieces(self, slots: Sequence[int], lengths: Sequence[int]) -> list[Piece]:
        """The parts of a forward that adds `lengths` tokens to `slots`."""
        return [
            Piece(slot, self.length[slot], self.length[slot] + n, self.committed[slot], self.committed_after(slot, n))
            for slot, n in zip(slots, lengths, strict=True)
        ]

    def count_pieces(self, pieces: Sequence[Piece]) -> None:
        """After a forward of these: what `move` has done on the device."""
        for piece in pieces:
            self.length[piece.slot], self.committed[piece.slot] = piece.end, piece.next_base
            self.scratch[piece.slot] = piece.end

    def committed_after(self, slot: int, added: int) -> int:
        """The committed position after adding tokens: as late as it may be while one of them can still be cut."""
        return max(self.committed[slot], (self.length[slot] + added - 1) // self.chunk * self.chunk)


class SlotMetadata(NamedTuple):
    """The state of one mixer in all slots, and the batch."""

    state: LayerSlots
    batch: DeviceBatch


class DeviceBatch:
    """New tokens of sequences in slots: what `model.batch.Batch` is for States.

    step: one token of each sequence, found through `slot_T` on the device alone, so that a graph may capture it.
    """

    native = True
    backend: Backend = "triton"
    adapters: Sequence[str | None] = ()
    last_B: Tensor | None = None  # the tokens whose logits are wanted, where they are found on the device

    def __init__(self, slots: StateCache, pieces: Sequence[Piece], ids: Sequence[Sequence[int]] | None = None) -> None:
        self.lengths = lengths = [piece.end - piece.start for piece in pieces]
        ends = list(accumulate(lengths))
        self.spans = [slice(end - length, end) for end, length in zip(ends, lengths, strict=True)]
        self._read(slots, RaggedPlan.exact(pieces, slots.device, ids))

    def _read(self, slots: StateCache, plan: RaggedPlan) -> None:
        self.slots, self.plan, self.step = slots, plan, False
        self.slot_T, self.position_T = plan.slot_T, plan.position_T
        self._rotary: dict[tuple[RopeConfig, int], tuple[Tensor, Tensor]] = {}

    @classmethod
    def for_plan(cls, slots: StateCache, plan: RaggedPlan) -> DeviceBatch:
        """Rows that a captured forward finds in the plan's tables."""
        batch = cls.__new__(cls)
        batch._read(slots, plan)
        batch.lengths, batch.spans = [plan.capacity.tokens], [slice(0, plan.capacity.tokens)]
        batch.last_B = plan.last_B
        return batch

    @classmethod
    def for_step(cls, slots: StateCache, slot_B: Tensor) -> DeviceBatch:
        """A step of the slots that a tensor (B,) int32 names on the device; −1: no sequence."""
        batch = cls.__new__(cls)
        B = len(slot_B)
        batch.slots, batch.step, batch.slot_T, batch._rotary = slots, True, slot_B, {}
        batch.lengths, batch.spans = [1] * B, [slice(i, i + 1) for i in range(B)]
        batch.position_T = slots.length_S[slot_B.clamp(min=0).long()]
        return batch

    def metadata_for(self, state: LayerSlots) -> SlotMetadata:
        """What the ops of one mixer need besides their inputs."""
        return SlotMetadata(state, self)

    def side_by_side(self, runs: Sequence[Callable[[], Tensor]]) -> list[Tensor]:
        """The outputs of a layer's mixers; in a step on a GPU computed at the same time: each alone is small."""
        side = self.slots.side_stream
        if not self.step or side is None or len(runs) == 1:
            return [run() for run in runs]
        here = torch.cuda.current_stream()
        side.wait_stream(here)
        with torch.cuda.stream(side):
            answers = [run() for run in runs[:-1]]
        last = runs[-1]()
        here.wait_stream(side)
        return [*answers, last]

    def rotary(self, rope: RopeConfig, head_dim: int) -> tuple[Tensor, Tensor]:
        """cos and sin (T, R / 2) float32, computed once for all layers that share them."""
        key = (rope, head_dim)
        if key not in self._rotary:
            f_R, scale = self.slots.frequencies(rope, head_dim)
            angle_TR = torch.outer(self.position_T.float(), f_R)
            self._rotary[key] = (angle_TR.cos() * scale, angle_TR.sin() * scale)
        return self._rotary[key]
