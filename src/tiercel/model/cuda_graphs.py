"""Decode on a device: a step of B sequences captured as a CUDA graph and replayed, for some sizes B.

What changes from step to step is read on the device: tokens and slot numbers from two buffers, lengths, committed
positions and pages through those numbers.  A step of fewer rows than its graph is padded with slot −1, which kernels
ignore.  Nothing waits for the host: the next tokens may be written into `tokens` by the device itself.
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
    """One captured step: tokens (B) and slot_B in, logits (B, V) out; all three stay where they are.

    sampler: chooses the next tokens; they are left in `tokens`, so the step may be replayed at once.
    """

    def __init__(
        self, network: Decoder, slots: StateCache, rows: int, pool: Any = None, sampler: DeviceSampler | None = None
    ) -> None:
        self.network, self.slots, self.sampler = network, slots, sampler
        self.tokens = torch.zeros(rows, dtype=torch.int64, device=slots.device)
        self.slot_B = torch.full((rows,), -1, dtype=torch.int32, device=slots.device)
        self.graph: torch.cuda.CUDAGraph | None = None
        if slots.device.type == "cuda" and all(m.captured for layer in network.config.layers for m in layer.parts):
            self._capture(pool)

    def _capture(self, pool: Any) -> None:
        side = torch.cuda.Stream()
        side.wait_stream(torch.cuda.current_stream())
        with torch.cuda.stream(side), torch.no_grad():
            for _ in range(2):  # kernels are compiled and workspaces made before the capture
                self._forward()
        torch.cuda.current_stream().wait_stream(side)
        self.graph = torch.cuda.CUDAGraph()
        with torch.cuda.graph(self.graph, pool=pool), torch.no_grad():
            self._forward()

    def _forward(self) -> None:
        batch = DeviceBatch.for_step(self.slots, self.slot_B)
        self.logits = self.network.compute(self.tokens, batch, [self.slots])
        self.slots.advance(self.slot_B)
        if self.sampler is not None:
            self.tokens.copy_(self.sampler.choose(self.logits, self.slot_B))

    def run(self) -> Tensor:
        """Run the step on the contents of the buffers; its logits."""
        if self.graph is None:
            with torch.no_grad():
                self._forward()
        else:
            self.graph.replay()
        return self.logits


class CUDAGraphRunner:
    """Steps of up to the largest of `sizes` rows, each captured when first needed."""

    def __init__(self, network: Decoder, slots: StateCache, sizes: Sequence[int] = CAPTURE_SIZES) -> None:
        self.network, self.slots, self.sizes = network, slots, sorted(sizes)
        self.graphs: dict[int, CapturedCUDAStep] = {}

    def of(self, rows: int) -> CapturedCUDAStep:
        """The smallest captured step with room for `rows` rows."""
        size = self.sizes[bisect_left(self.sizes, rows)]
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
