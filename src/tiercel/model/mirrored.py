"""Tensor parallelism, the first process: a network and states whose changes the other processes repeat.

The engine, the sampler and the caches run in the first process alone.  Every forward, and every change of a state, is
an order that all processes carry out in the same sequence; only the sums inside a forward go between them
(tensor_parallel.py).  An order is a frame: its length in eight bytes (little-endian), then JSON.
"""

from __future__ import annotations

import itertools
import json
import struct
import threading
import weakref
from collections import deque
from collections.abc import Callable, Iterator, Sequence
from contextlib import contextmanager
from dataclasses import dataclass
from typing import IO, Any

import torch
from torch import Tensor

from tiercel.errors import RequestError, TiercelError
from tiercel.model.decoder import Decoder
from tiercel.model.state import Snapshot, State
from tiercel.model.varlen import VarlenBatch
from tiercel.runtime.allocator import CachingAllocator


class Group:
    """The other processes of a tensor-parallel network.

    pipes: to their standard inputs.  lock: held for a whole forward, so that all processes run forwards in one order.
    """

    def __init__(self, pipes: Sequence[IO[bytes]]) -> None:
        self.pipes, self.lock = pipes, threading.RLock()
        self.ids = itertools.count()
        self.dropped: deque[int] = deque()  # states and snapshots that are gone here

    def send(self, op: str, **order: Any) -> None:
        """Send an order.  Raises TiercelError when a process has ended."""
        with self.lock:
            dropped = [self.dropped.popleft() for _ in range(len(self.dropped))]
            data = json.dumps({"op": op, "dropped": dropped, **order}).encode("ascii")
            try:
                for pipe in self.pipes:
                    pipe.write(struct.pack("<Q", len(data)) + data)
                    pipe.flush()
            except OSError:
                raise TiercelError("a process of the tensor-parallel group has ended; load the model again") from None

    def track(self, thing: object) -> int:
        """Return an id for a state or snapshot; when it goes, the others drop theirs."""
        number = next(self.ids)
        weakref.finalize(thing, self.dropped.append, number).atexit = False
        return number


@dataclass(frozen=True)
class MirroredSnapshot(Snapshot):
    """A snapshot that the other processes have too."""

    id: int = -1


class MirroredState(State):
    """A state whose changes the other processes repeat on theirs."""

    def __init__(self, group: Group, *args: Any) -> None:
        super().__init__(*args)
        self.group, self.id = group, group.track(self)

    def trim(self, length: int) -> bool:
        """See `State.trim`."""
        trimmed = super().trim(length)
        if trimmed:
            self.group.send("trim", state=self.id, length=length)
        return trimmed

    def snapshot(self, *, ending: bool = False) -> Snapshot:
        """See `State.snapshot`."""
        plain = super().snapshot(ending=ending)
        made = MirroredSnapshot(plain.length, plain.runs, plain.windows, plain.layers)
        object.__setattr__(made, "id", self.group.track(made))
        self.group.send("snapshot", state=self.id, snapshot=made.id, ending=ending)
        return made

    def restore(self, snapshot: Snapshot) -> None:
        """See `State.restore`."""
        super().restore(snapshot)
        self.group.send("restore", state=self.id, snapshot=snapshot.id)  # type: ignore[attr-defined]

    def fork(self) -> State:
        """See `State.fork`."""
        twin = MirroredState(self.group, self.mixers, self.dtype, self.device, self.model, self.allocator, self.adapter)
        State.restore(twin, self.share_pages(tuple((part.tensors(), part.committed_pos) for part in self.recurrent)))
        self.group.send("fork", state=self.id, twin=twin.id)
        return twin


class MirroredDecoder(Decoder):
    """The first process's shard; `group` is set once the others are there."""

    group: Group

    def new_state(self, adapter: str | None = None, allocator: CachingAllocator | None = None) -> State:
        """See `Decoder.new_state`."""
        plain = super().new_state(adapter, allocator)
        state = MirroredState(self.group, plain.mixers, plain.dtype, plain.device, plain.model, plain.allocator)
        self.group.send("new", state=state.id)
        return state

    def host_state(self, adapter: str | None = None, allocator: CachingAllocator | None = None) -> State:
        """Refuse: a file holds the whole of a state, and this process has a part."""
        raise RequestError("a tensor-parallel model neither saves sessions nor opens them: load it without")

    def _rows(self, rows: list[Tensor], states: Sequence[State] | None, logits_to_keep: int | None) -> list[Tensor]:
        return super()._rows(rows, states or [self.new_state() for _ in rows], logits_to_keep)

    @contextmanager
    def growing(self, rows: Sequence[Tensor], states: Sequence[State]) -> Iterator[Tensor]:
        """See `Decoder.growing`; the other processes run the same forward."""
        self.check(rows, states)
        with self.group.lock:
            ids = [state.id for state in states]  # type: ignore[attr-defined]
            self.group.send("forward", rows=[row.tolist() for row in rows], states=ids)
            with super().growing(rows, states) as tokens_T:
                yield tokens_T

    def hidden_states(self, tokens: Tensor, context: State | VarlenBatch) -> Tensor:
        """See `Decoder.hidden_states`; for inference only."""
        if not isinstance(context, MirroredState):
            raise RequestError("a tensor-parallel model is for inference only; load it without tensor_parallel")
        return super().hidden_states(tokens, context)


@torch.no_grad()
def follow(network: Decoder, pipe: IO[bytes]) -> None:
    """Carry out the orders of the first process until its pipe closes."""
    held: dict[int, Any] = {}  # states and snapshots
    ops: dict[str, Callable[[dict[str, Any]], None]] = {
        "new": lambda o: held.__setitem__(o["state"], network.new_state()),
        "trim": lambda o: held[o["state"]].trim(o["length"]),
        "snapshot": lambda o: held.__setitem__(o["snapshot"], held[o["state"]].snapshot(ending=o["ending"])),
        "restore": lambda o: held[o["state"]].restore(held[o["snapshot"]]),
        "fork": lambda o: held.__setitem__(o["twin"], held[o["state"]].fork()),
        "forward": lambda o: _forward(network, o["rows"], o["states"], held),
    }
    while header := pipe.read(8):
        order = json.loads(pipe.read(struct.unpack("<Q", header)[0]))
        for number in order["dropped"]:
            held.pop(number, None)
        ops[order["op"]](order)


def _forward(network: Decoder, rows: list[list[int]], states: list[int], held: dict[int, Any]) -> None:
    network([torch.tensor(row) for row in rows], [held[number] for number in states], logits_to_keep=1)
