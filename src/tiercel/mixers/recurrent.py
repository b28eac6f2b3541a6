"""State of a recurrent mixer, committed by chunks, from its table of buffers; on the CPU and in slots of a device.

A recurrent state exists only where a copy was kept, so it cannot be cut at any token as a KV cache can.  A chunked scan
needs it only where a chunk starts; so a layer keeps

    the state at a chunk boundary, `committed_pos`              buffers of lifetime "sequence"
    the inputs since then (and of a convolution K − 1 before)   "pending"
    what makes a step cheap, such as the newest state           "scratch"; recomputed from the others after a cut

A step reads the committed state and does not write it; it is rewritten once per chunk.  Cutting a sequence back to any
token since `committed_pos` is then a change of its length.  The boundary moves on lazily, in the next call, so that
what the last call added (up to a chunk of it) can always be taken back: verify k draft tokens, accept a of them, trim.
Boundaries are absolute multiples of the chunk, so prefill, chunked prefill and decode meet the same ones.

The descriptor of a layer: committed_pos · a counter of finished tiles · the address of every buffer in the order of the
table · with scratch buffers, the position that these stand at (`RecurrentDescriptor` in ops/cpu/kernels.h).

Letters: L new tokens.
"""

from __future__ import annotations

from collections.abc import Mapping
from dataclasses import dataclass
from functools import lru_cache

import torch
from torch import Tensor

from tiercel.mixers.checks import MAX_SIZE
from tiercel.mixers.spec import MAX_CHUNK, Buffer, MixerSpec
from tiercel.model.layer_state import LayerState, dtype_of
from tiercel.runtime.allocator import CachingAllocator, Shape


def chunk_of(spec: MixerSpec) -> int:
    """Tokens between two boundaries of a mixer's state."""
    return min(spec.chunk, MAX_CHUNK)


@dataclass(frozen=True)
class _Layout:
    """A spec's buffers, worked out once: shapes in memory, by lifetime."""

    chunk: int
    pending: dict[str, Buffer]
    sequence: tuple[str, ...]
    scratch: tuple[str, ...]
    shapes: dict[str, Shape]  # of all, in the order of the table
    inputs: dict[str, Shape]  # of the pending ones


@lru_cache(maxsize=256)
def _layout(spec: MixerSpec, dtype: torch.dtype) -> _Layout:
    chunk, table = chunk_of(spec), spec.buffers()
    pending = {b.name: b for b in table if b.lifetime == "pending"}
    shapes: dict[str, Shape] = {
        b.name: (memory_shape(b, b.history + 2 * chunk) if b.name in pending else b.shape, dtype_of(b, dtype))
        for b in table
    }
    sequence, scratch = (tuple(b.name for b in table if b.lifetime == kind) for kind in ("sequence", "scratch"))
    return _Layout(chunk, pending, sequence, scratch, shapes, {name: shapes[name] for name in pending})


class RecurrentState(LayerState):
    """State of one layer and sequence.

    Row i of a pending buffer is the input of token committed_pos − history + i.  Two chunks of inputs are the most that
    a call leaves pending.
    """

    COMMITTED, FINISHED, FIRST_ADDRESS = 0, 1, 2

    def __init__(self, spec: MixerSpec, dtype: torch.dtype, device: torch.device, allocator: CachingAllocator) -> None:
        super().__init__(spec, dtype, device)
        self.allocator, layout = allocator, _layout(spec, dtype)
        self.chunk, self._pending = layout.chunk, layout.pending
        self._sequence, self._scratch = layout.sequence, layout.scratch
        inputs = allocator.empty_many(layout.inputs, device)
        self._buffers: dict[str, Tensor] = {}
        for name, shape in layout.shapes.items():
            if (b := self._pending.get(name)) is not None:
                self._buffers[name] = inputs[name].movedim(-2, 0) if b.token_dim else inputs[name]
                if b.history:
                    self._buffers[name][: b.history] = 0
            else:
                self._buffers[name] = allocator.empty(*shape[0], dtype=shape[1], device=device).zero_()
        self._with_new: dict[str, Tensor] = {}

    @property
    def size(self) -> int:
        return self.FIRST_ADDRESS + len(self._buffers) + bool(self._scratch)

    def publish(self) -> None:
        addresses = [buffer.data_ptr() for buffer in self._buffers.values()]
        self.descriptor[self.FIRST_ADDRESS : self.FIRST_ADDRESS + len(addresses)] = addresses

    @property
    def committed_pos(self) -> int:
        return int(self.descriptor[self.COMMITTED])

    @committed_pos.setter
    def committed_pos(self, position: int) -> None:
        self.descriptor[self.COMMITTED] = position

    def committed_pos_after(self, added: int) -> int:
        """What `committed_pos` will be after a call of `added` tokens: as late as it may while all can be cut."""
        if not added:
            return self.committed_pos
        keep = min(added, self.chunk)
        return max(self.committed_pos, (self.length + added - keep) // self.chunk * self.chunk)

    @property
    def pending(self) -> int:
        """How many tokens' inputs are kept since the boundary."""
        return self.length - self.committed_pos

    @property
    def scratch_valid(self) -> bool:
        """Whether the scratch buffers are those of the current length."""
        return int(self.descriptor[self.size - 1]) == self.length

    @property
    def buffers(self) -> Mapping[str, Tensor]:
        return self._buffers

    def append(self, name: str, new: Tensor) -> Tensor:
        """Add L tokens' inputs to a pending buffer; all since the boundary (and the history before), the new included.

        Where they fit they are written behind the pending ones; `commit` sees to the rest.
        """
        buffer, used, count = self._buffers[name], self._pending[name].history + self.pending, new.shape[0]
        if used + count <= buffer.shape[0]:
            buffer[used : used + count] = new
            whole = buffer[: used + count]
        else:
            whole = torch.cat((buffer[:used], new.to(buffer.dtype)))
        self._with_new[name] = whole
        return whole

    def window(self, name: str, new: Tensor) -> Tensor:
        """`append`; only the new tokens and the history before them, for a convolution."""
        return self.append(name, new)[self.pending :]

    def commit(self, added: int, **values: Tensor) -> None:
        """End a call of `added` tokens: sequence buffers at the new boundary, scratch ones after the last token.

        Args:
            added: L of the call, whose inputs were given to `append`.
            values: the buffers' new values by name; a sequence buffer may be the very tensor.
        """
        position, length = self.committed_pos_after(added), self.length + added
        shift = position - self.committed_pos
        self.committed_pos = MAX_SIZE  # interrupted in the middle of this, the state is of no use: `State.validate`
        if self._scratch:
            self.descriptor[self.size - 1] = -1
        for name, value in values.items():
            if value is not self._buffers[name]:
                self._buffers[name].copy_(value)
        for name, whole in self._with_new.items():
            buffer, kept = self._buffers[name], whole[shift:]
            if whole.data_ptr() != buffer.data_ptr():
                buffer[: len(kept)] = kept
            elif shift:
                buffer[: len(kept)] = kept.clone()
        self._with_new = {}
        self.committed_pos = position
        if self._scratch:
            self.descriptor[self.size - 1] = length

    def tensors(self) -> dict[str, Tensor]:
        """Without the sequence buffers before the first boundary, where they are zero."""
        count = self.pending
        inputs = {name: self._buffers[name][: b.history + count] for name, b in self._pending.items()}
        return inputs | ({name: self._buffers[name] for name in self._sequence} if self.committed_pos else {})

    def snapshot_tensors(self, *, ending: bool) -> dict[str, Tensor]:
        """Copies of `tensors`; but the sequence buffers themselves where the state is not used any more."""
        kept = self.tensors()
        inputs = {name: kept[name] for name in self._pending}
        copies = self.allocator.empty_many({name: (t.shape, t.dtype) for name, t in inputs.items()}, self.device)
        out = {name: copy.copy_(inputs[name]) for name, copy in copies.items()}
        for name in self._sequence:
            if (t := kept.get(name)) is not None:
                out[name] = t if ending else self.allocator.empty(*t.shape, dtype=t.dtype, device=self.device).copy_(t)
        return out

    def load(self, tensors: Mapping[str, Tensor], length: int, committed_pos: int) -> None:
        self.committed_pos = MAX_SIZE
        for name, tensor in tensors.items():
            self._buffers[name][: len(tensor)] = tensor
        for name in self._sequence:
            if name not in tensors:
                self._buffers[name].zero_()
        if self._scratch:
            self.descriptor[self.size - 1] = -1
        self.committed_pos = committed_pos

    def shapes(self, length: int, committed_pos: int) -> dict[str, tuple[int, ...]]:
        count = length - committed_pos
        if committed_pos % self.chunk or not 0 <= count <= 2 * self.chunk:
            raise ValueError("a boundary is where none can be")
        shapes = {name: (b.history + count, *b.shape) for name, b in self._pending.items()}
        return shapes | ({name: tuple(self._buffers[name].shape) for name in self._sequence} if committed_pos else {})


class RecurrentSlots:
    """State of one layer for all sequences on a device, in slots; every buffer's first axis is the slot.

    A pending buffer is a ring: the input of position p is row p mod (history + 2 chunks).  At most a chunk of inputs is
    pending between two calls.
    """

    def __init__(self, spec: MixerSpec, slots: int, dtype: torch.dtype, device: torch.device) -> None:
        self.spec, self.chunk = spec, chunk_of(spec)
        self.ring = 2 * self.chunk
        self.table = {b.name: b for b in spec.buffers()}
        self.buffers = {
            name: torch.zeros(
                slots,
                *(memory_shape(b, self.ring + b.history) if b.lifetime == "pending" else b.shape),
                dtype=dtype_of(b, dtype),
                device=device,
            )
            for name, b in self.table.items()
        }

    def __getitem__(self, name: str) -> Tensor:
        return self.buffers[name]

    @property
    def nbytes(self) -> int:
        return sum(t.nbytes for t in self.buffers.values())

    def clear(self, slot: int) -> None:
        """Set a slot to an empty sequence."""
        for name, b in self.table.items():
            if b.lifetime == "sequence":
                self.buffers[name][slot] = 0

    def copy(self, source: int, target: int) -> None:
        """Copy a slot."""
        for t in self.buffers.values():
            t[target] = t[source]

    def _ring(self, name: str, slot: int) -> Tensor:
        """A pending buffer of one slot, (rows, *shape)."""
        return self.buffers[name][slot].movedim(self.table[name].token_dim, 0)

    def read(self, name: str, slot: int, start: int, stop: int) -> Tensor:
        """Inputs of positions from `start` to `stop`, (count, *shape); zero before the sequence."""
        ring = self._ring(name, slot)
        at = torch.arange(start, stop, device=ring.device)
        out = ring[at % len(ring)]
        if start < 0:
            out[at < 0] = 0
        return out

    def write(self, name: str, slot: int, start: int, values: Tensor) -> None:
        """Set the inputs of the positions from `start` on; those before the sequence are left out."""
        ring = self._ring(name, slot)
        stop = start + len(values)
        begin = max(start, 0, stop - len(ring))
        at = torch.arange(begin, stop, device=ring.device)
        ring[at % len(ring)] = values[begin - start :].to(ring.device, ring.dtype)

    def tensors(self, slot: int, committed_pos: int, length: int) -> dict[str, Tensor]:
        """Copies of a slot's state in the host's memory, as `RecurrentState.tensors` has it."""
        out = {}
        for name, b in self.table.items():
            if b.lifetime == "pending":
                out[name] = self.read(name, slot, committed_pos - b.history, length)
            elif b.lifetime == "sequence" and committed_pos:
                out[name] = self.buffers[name][slot]
        return {name: t.contiguous().cpu().clone() for name, t in out.items()}

    def load(self, slot: int, committed_pos: int, tensors: Mapping[str, Tensor]) -> None:
        """Set a slot to `tensors`."""
        self.clear(slot)
        for name, t in tensors.items():
            b = self.table[name]
            if b.lifetime == "pending":
                self.write(name, slot, committed_pos - b.history, t)
            else:
                self.buffers[name][slot] = t.to(self.buffers[name].device)


def memory_shape(buffer: Buffer, rows: int) -> tuple[int, ...]:
    """The shape of a pending buffer with room for `rows` tokens, as it lies in memory."""
    if buffer.token_dim == 0:
        return (rows, *buffer.shape)
    return (*buffer.shape[:-1], rows, buffer.shape[-1])
