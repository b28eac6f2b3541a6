"""A step recorded once and run again without Python, as CUDA graphs do on a GPU.

While a tape records, the forward runs as always; every native call is noted with its addresses, and outputs come from
the tape's own memory, which stays (a block is given out again when the tensor in it has died: the order of calls is
the same at every run).  What changes from step to step is read through memory too: token ids from a buffer, states
through the rows of the batch.

A step can be recorded when native calls are all it does.  A guard watches what torch is asked for meanwhile: views
are free; anything else would be missing at the next run, so the tape is `broken` and names it.
"""

from __future__ import annotations

from collections import defaultdict
from collections.abc import Iterator
from contextlib import contextmanager
from typing import Any

import numpy as np
import torch
from torch import Tensor
from torch.utils._python_dispatch import TorchDispatchMode
from torch.utils._pytree import tree_leaves

from tiercel.ops import cpu


class _Guard(TorchDispatchMode):
    """Names the first thing torch itself computes: whose answer is not a view of what it was given."""

    found: str | None = None

    @classmethod
    def _should_skip_dynamo(cls) -> bool:
        """Else torch imports its compiler at our first call: 120 MB, and a second."""
        return False

    def __torch_dispatch__(self, func: Any, types: Any, args: Any = (), kwargs: Any = None) -> Any:
        out = func(*args, **(kwargs or {}))
        given = {_storage(t) for t in tree_leaves((args, kwargs)) if isinstance(t, Tensor)}
        computed = any(_storage(t) not in given for t in tree_leaves(out) if isinstance(t, Tensor))
        if self.found is None and (computed or func._schema.is_mutable):
            self.found = func.overloadpacket.__name__
        return out


def _storage(t: Tensor) -> int:
    return t.untyped_storage().data_ptr()


class _Block:
    """Memory that goes back to its tape when the last tensor in it is gone."""

    def __init__(self, graph: CapturedGraph, memory: np.ndarray) -> None:
        self.graph, self.memory = graph, memory
        self.__array_interface__ = memory.__array_interface__

    def __del__(self) -> None:
        self.graph.roundings.pop(self.memory.ctypes.data, None)
        self.graph.free[self.memory.nbytes].append(self.memory)


class CapturedGraph:
    """ops: the native calls in order · broken: what could not be recorded, or None"""

    def __init__(self) -> None:
        self.ops = cpu._native.Ops()
        self.free: defaultdict[int, list[np.ndarray]] = defaultdict(list)
        self.memory: list[np.ndarray] = []
        self.roundings: defaultdict[int, dict[tuple[int, ...], Tensor]] = defaultdict(dict)  # by the block they are of
        self.broken: str | None = None

    @contextmanager
    def recording(self) -> Iterator[None]:
        """Note all native calls of this thread."""
        guard = _Guard()
        cpu.recorder = self
        cpu._native.record(self.ops)
        try:
            with guard:
                yield
        finally:
            cpu._native.stop()
            cpu.recorder = None
            self.roundings.clear()
        self.broken = guard.found

    def empty(self, *shape: int) -> Tensor:
        """Memory of the tape for one output, float32."""
        size = -(-int(np.prod(shape)) // 64) * 64
        again = self.free[size * 4]
        if not again:
            self.memory.append(np.empty(size, np.float32))
            again.append(self.memory[-1])
        flat = torch.from_numpy(np.asarray(_Block(self, again.pop())))
        return flat[: int(np.prod(shape))].view(shape)

    # Blocks are written once: native ops have outputs of their own, and torch may not write while a tape records.  So
    # what was made of one is right until its tensor dies.

    def rounded(self, x: Tensor, how: tuple[int, ...]) -> Tensor | None:
        """What `keep_rounded` was given for these numbers, as long as they are there."""
        return self.roundings.get(x.data_ptr(), {}).get(how)

    def keep_rounded(self, x: Tensor, how: tuple[int, ...], rounded: Tensor) -> None:
        if any(block.ctypes.data == x.data_ptr() for block in self.memory):
            self.roundings[x.data_ptr()][how] = rounded

    @property
    def nbytes(self) -> int:
        return sum(block.nbytes for block in self.memory)

    def run(self) -> None:
        self.ops.run()
