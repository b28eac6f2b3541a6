"""Decode on a device: a step of B texts recorded as a CUDA graph and run again, for a ladder of B.

What changes from step to step is read on the device: tokens and numbers of slots from two buffers, lengths, bases and
pages through those numbers.  A step of fewer rows than its graph pads with slot −1, which kernels ignore.  Nothing
waits for the host: the next tokens may be written into `tokens` by the device itself.
"""

from __future__ import annotations

from bisect import bisect_left
from collections.abc import Sequence
from typing import TYPE_CHECKING, Any

import torch
from torch import Tensor

from tiercel.model.device_sampler import DeviceSampler
from tiercel.model.state_cache import DeviceBatch, StateCache

if TYPE_CHECKING:
    from tiercel.model.decoder import Decoder

CAPTURE_SIZES = (1, 2, 4, 8, 16, 32)


class CapturedCUDAStep:
    """One recorded step: tokens (B) and slot_B in, logits (B, V) out; all three stay where they are.

    draws: how the next tokens are chosen; they are left in `tokens`, so the step may be run again at once.
    """

    def __init__(
        self, network: Decoder, slots: StateCache, rows: int, pool: Any = None, draws: DeviceSampler | None = None
    ) -> None:
        self.network, self.slots, self.draws = network, slots, draws
        self.tokens = torch.zeros(rows, dtype=torch.int64, device=slots.device)
        self.slot_B = torch.full((rows,), -1, dtype=torch.int32, device=slots.device)
        self.graph: torch.cuda.CUDAGraph | None = None
        if slots.device.type == "cuda" and all(m.captured for layer in network.config.layers for m in layer.parts):
            self._record(pool)

    def _record(self, pool: Any) -> None:
        beside = torch.cuda.Stream()
        beside.wait_stream(torch.cuda.current_stream())
        with torch.cuda.stream(beside), torch.no_grad():
            for _ in range(2):  # kernels are compiled and workspaces made before the recording
                self._forward()
        torch.cuda.current_stream().wait_stream(beside)
        self.graph = torch.cuda.CUDAGraph()
        with torch.cuda.graph(self.graph, pool=pool), torch.no_grad():
            self._forward()

    def _forward(self) -> None:
        batch = DeviceBatch.for_step(self.slots, self.slot_B)
        self.logits = self.network.compute(self.tokens, batch, [self.slots])
        self.slots.advance(self.slot_B)
        if self.draws is not None:
            self.tokens.copy_(self.draws.choose(self.logits, self.slot_B))

    def run(self) -> Tensor:
        """The step, with what is in the buffers."""
        if self.graph is None:
            with torch.no_grad():
                self._forward()
        else:
            self.graph.replay()
        return self.logits


class CUDAGraphRunner:
    """Steps of up to the largest number of rows in `ladder`, each recorded when first needed."""

    def __init__(self, network: Decoder, slots: StateCache, ladder: Sequence[int] = CAPTURE_SIZES) -> None:
        self.network, self.slots, self.ladder = network, slots, sorted(ladder)
        self.graphs: dict[int, CapturedCUDAStep] = {}

    def of(self, rows: int) -> CapturedCUDAStep:
        """The smallest that holds that many rows."""
        size = self.ladder[bisect_left(self.ladder, rows)]
        if size not in self.graphs:
            self.graphs[size] = CapturedCUDAStep(self.network, self.slots, size)
        return self.graphs[size]

    def step(self, numbers: Sequence[int], tokens: Tensor) -> Tensor:
        """One token more for each of these slots → logits (B, V), valid until the next step of this size."""
        graph, B = self.of(len(numbers)), len(numbers)
        self.slots.begin_step(numbers)
        graph.tokens[:B] = tokens
        graph.slot_B.fill_(-1)[:B] = torch.tensor(numbers, dtype=torch.int32).to(self.slots.device, non_blocking=True)
        logits = graph.run()
        self.slots.count_step(numbers)
        return logits[:B]
