"""Small forwards on the CPU, captured once and replayed.

At 0.5B a step is 36 layers in some 12 ms, and the Python between them would be a third of that.

A graph is for a list of row lengths and `logits_to_keep`, not for certain states: these are found through the rows of
the batch.  The first forward of a kind runs as it is, the second is captured, the rest are replayed, as long as the
network's modules and weights are the ones that were captured.  What cannot be captured (adapters, hooks, experts
that are trained) runs as it is, always.
"""

from __future__ import annotations

from collections import OrderedDict
from collections.abc import Sequence
from typing import Any

import torch
from torch import Tensor, nn

from tiercel.model.batch import Batch
from tiercel.model.decoder import Decoder
from tiercel.model.state import State
from tiercel.ops.cpu.capture import CapturedGraph

MAX_CAPTURED_TOKENS = 16  # larger forwards do so much that the calls do not count
MAX_CAPTURED_GRAPHS = 24


class CapturedStep:
    """One captured forward."""

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
            self.logits = network.logits(self.tokens_T, batch, states, logits_to_keep)

    def holds(self) -> bool:
        """Whether the modules are those that were captured, without forward hooks."""
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
    """The captured steps of a network; the least recently used goes first."""

    def __init__(self) -> None:
        self.seen: OrderedDict[Any, CapturedStep | str | None] = OrderedDict()
        self._layout_version = -1

    def run(
        self,
        network: Decoder,
        tokens_T: Tensor,
        lengths: list[int],
        states: Sequence[State],
        logits_to_keep: int | None,
    ) -> list[Tensor]:
        """`Decoder.logits`, replayed where the step was captured."""
        if network.layout_version != self._layout_version:
            self.seen.clear()
            self._layout_version = network.layout_version
        key = (tuple(lengths), logits_to_keep, states[0].dtype)
        adapted = any(state.adapter is not None for state in states)
        if adapted or not network.native or len(tokens_T) > MAX_CAPTURED_TOKENS:
            return network.logits(tokens_T, Batch(lengths, states, tokens_T.device), states, logits_to_keep)
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
        return network.logits(tokens_T, batch, states, logits_to_keep)
