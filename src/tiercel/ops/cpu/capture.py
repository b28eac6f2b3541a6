"""A step captured once and replayed without Python, as CUDA graphs do on a GPU.

While a graph records, the forward runs as always; every native call is noted with its addresses, and outputs come from
the graph's own memory, which stays (a block is reused when the tensor in it has died: the order of calls is the same at
every replay).  What changes from step to step is read through memory too: token ids from a buffer, states through the
slices of the batch.

A step can be captured when native calls are all it does.  A dispatch mode watches what torch computes meanwhile: views
are free; anything else would be missing at the replay, so `capture_error` names it.
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

from tiercel.ops.cpu import native


class _TorchOpDetector(TorchDispatchMode):
    """Records the first torch op whose output is not a view of its inputs."""

    found: str | None = None

    @classmethod
    def _should_skip_dynamo(cls) -> bool:
        """Keep torch from importing its compiler at the first call: 120 MB, and a second."""
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
    """Memory that returns to its graph when the last tensor in it is gone."""

    def __init__(self, graph: CapturedGraph, memory: np.ndarray) -> None:
        self.graph, self.memory = graph, memory
        self.__array_interface__ = memory.__array_interface__

    def __del__(self) -> None:
        self.graph.quantized_inputs.pop(self.memory.ctypes.data, None)
        self.graph.free[self.memory.nbytes].append(self.memory)


class CapturedGraph:
    """The native calls of one step, in order.

    capture_error   the torch op that could not be captured, or None
    """

    def __init__(self) -> None:
        self.ops = native.extension.Ops()
        self.free: defaultdict[int, list[np.ndarray]] = defaultdict(list)
        self.memory: list[np.ndarray] = []
        self.quantized_inputs: defaultdict[int, dict[tuple[int, ...], Tensor]] = defaultdict(dict)  # by their block
        self.capture_error: str | None = None

    @contextmanager
    def recording(self) -> Iterator[None]:
        """Note all native calls of this thread."""
        detector = _TorchOpDetector()
        native.recording.graph = self
        native.extension.record(self.ops)
        try:
            with detector:
                yield
        finally:
            native.extension.stop()
            native.recording.graph = None
            self.quantized_inputs.clear()
        self.capture_error = detector.found

    def empty(self, *shape: int) -> Tensor:
        """Memory of the graph for one output, float32."""
        size = -(-int(np.prod(shape)) // 64) * 64
        again = self.free[size * 4]
        if not again:
            self.memory.append(np.empty(size, np.float32))
            again.append(self.memory[-1])
        flat = torch.from_numpy(np.asarray(_Block(self, again.pop())))
        return flat[: int(np.prod(shape))].view(shape)

    # Blocks are written once: native ops have outputs of their own, and torch may not write during a capture.  So the
    # quantized form of a block is right until its tensor dies.

    def quantized(self, x: Tensor, how: tuple[int, ...]) -> Tensor | None:
        """What `keep_quantized` was given for these numbers, while they live."""
        return self.quantized_inputs.get(x.data_ptr(), {}).get(how)

    def keep_quantized(self, x: Tensor, how: tuple[int, ...], quantized: Tensor) -> None:
        """Keep the quantized form of x, where x is a block of the graph."""
        if any(block.ctypes.data == x.data_ptr() for block in self.memory):
            self.quantized_inputs[x.data_ptr()][how] = quantized

    @property
    def nbytes(self) -> int:
        return sum(block.nbytes for block in self.memory)

    def run(self) -> None:
        """Replay the step."""
        self.ops.run()
