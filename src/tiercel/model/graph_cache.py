"""Forwards of few tokens, recorded once and run again: at 0.5B a step is 36 layers in some 12 ms, and the Python
between them would be a third of that.

A recording is for a list of row lengths and `logits_to_keep`, not for certain states: these are found through rows of
the batch.  The first forward of a kind runs as it is, the second is recorded, the rest are run from the tape, as long
as the modules are the ones that were recorded.  What cannot be recorded (experts chosen in Python, adapters, hooks)
is run as it is, always.
"""

from __future__ import annotations

from collections import OrderedDict
from collections.abc import Sequence
from typing import TYPE_CHECKING, Any

import torch
from torch import Tensor, nn

from tiercel.model.batch import Batch
from tiercel.model.state import State
from tiercel.ops.cpu.capture import CapturedGraph

if TYPE_CHECKING:
    from tiercel.model.decoder import Decoder

MOST_TOKENS = 16  # larger forwards do so much that the calls do not count
MAX_CAPTURED_GRAPHS = 24


class CapturedStep:
    """One recorded forward."""

    def __init__(
        self, network: Decoder, tokens_T: Tensor, batch: Batch, states: Sequence[State], logits_to_keep: int | None
    ) -> None:
        self.batch, self.graph = batch, CapturedGraph()
        with torch.inference_mode(False):  # it is written again outside of that mode, too
            self.tokens_T = tokens_T.clone()
        self.parts = [
            (part._modules, name, child, child._forward_hooks)
            for part in network.modules()
            for name, child in part._modules.items()
            if child is not None and not isinstance(part, nn.ModuleList)
        ]
        with torch.inference_mode(), self.graph.recording():
            self.logits = network._run(self.tokens_T, batch, states, logits_to_keep)

    def holds(self) -> bool:
        """Whether the modules are those that were recorded, and nobody listens to them."""
        return all(children.get(name) is child and not hooks for children, name, child, hooks in self.parts)

    def answers(self) -> list[Tensor]:
        """The logits of each row, the caller's own."""
        # not clone(): from 32,768 numbers on that wakes torch's threads, which keep ours from their cores for a while
        return [torch.from_numpy(row.numpy().copy()) for row in self.logits]

    def run(self, tokens_T: Tensor, states: Sequence[State]) -> None:
        self.tokens_T.copy_(tokens_T)
        self.batch.refill(states)
        self.graph.run()


class GraphCache:
    """The recordings of a network, the least recently used of them forgotten first."""

    def __init__(self) -> None:
        self.seen: OrderedDict[Any, CapturedStep | str | None] = OrderedDict()

    def __deepcopy__(self, memo: Any) -> GraphCache:
        return GraphCache()

    def __reduce__(self) -> Any:
        return GraphCache, ()

    def clear(self) -> None:
        self.seen.clear()

    def run(
        self,
        network: Decoder,
        tokens_T: Tensor,
        lengths: list[int],
        states: Sequence[State],
        logits_to_keep: int | None,
    ) -> list[Tensor]:
        """Logits of each row, from a recording where there is one."""
        key = (tuple(lengths), logits_to_keep, states[0].dtype)
        worn = any(state.adapter is not None for state in states)
        if worn or not network.native or len(tokens_T) > MOST_TOKENS:
            return network._run(tokens_T, Batch(lengths, states, tokens_T.device), states, logits_to_keep)
        known = self.seen.get(key)
        if isinstance(known, CapturedStep) and not known.holds():
            del self.seen[key]
            known = None
        if isinstance(known, CapturedStep):
            self.seen.move_to_end(key)
            known.run(tokens_T, states)
            return known.answers()
        batch = Batch(lengths, states, tokens_T.device)
        if key in self.seen and known is None and batch.native:
            step = CapturedStep(network, tokens_T, batch, states, logits_to_keep)
            self.seen[key] = step if step.graph.capture_error is None else step.graph.capture_error
            return step.answers()
        self.seen.setdefault(key, None)
        while len(self.seen) > MAX_CAPTURED_GRAPHS:
            self.seen.popitem(last=False)
        return network._run(tokens_T, batch, states, logits_to_keep)
