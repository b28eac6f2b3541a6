"""Decode on a device: a step of B sequences captured as a CUDA graph and replayed, for some sizes B.

What changes from step to step is read on the device: tokens and slot numbers from two buffers, lengths, committed
positions and pages through those numbers.  A step of fewer rows than its graph is padded with slot −1, which kernels
ignore.  Nothing waits for the host: the next tokens may be written into `tokens` by the device itself.
"""

from __future__ import annotations

from bisect import bisect_left
from collections.abc import Callable, Sequence
from typing import TYPE_CHECKING, Any

import torch
from torch import Tensor

from tiercel.model.device_sampler import DeviceSampler
from tiercel.model.ragged import Capacity, Piece, RaggedPlan
from tiercel.model.state_cache import DeviceBatch, StateCache

if TYPE_CHECKING:
    from tiercel.model.decoder import Decoder

CAPTURE_SIZES = (1, 2, 4, 8, 16, 32, 64, 96, 128, 192, 256)
PREFILL_SIZES = (64, 128, 192, 256, 384, 512, 768, 1024, 1536, 2048)  # tokens; longer ones keep the device busy anyway
TOKENS_PER_ROW = 32  # of a captured prefill, the number of rows it has room for


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
        self.graph = _captured(network, slots, self._forward, pool)

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


class CapturedPrefill:
    """New tokens of several sequences recorded as a forward: `read` fills its buffers and tables and runs it."""

    def __init__(self, network: Decoder, slots: StateCache, tokens: int, pool: Any = None) -> None:
        self.network, self.slots = network, slots
        rows = min(slots.count, max(4, tokens // TOKENS_PER_ROW))
        self.plan = RaggedPlan(Capacity.of(tokens, rows, slots.chunk), slots.device)
        self.tokens = torch.zeros(tokens, dtype=torch.int64, device=slots.device)
        self.graph = _captured(network, slots, self._forward, pool)

    def _forward(self) -> None:
        batch = DeviceBatch.for_plan(self.slots, self.plan)
        self.logits = self.network.compute(self.tokens, batch, [self.slots], 1)

    def read(self, tokens_T: Tensor, pieces: Sequence[Piece]) -> Tensor:
        """Logits of each row's last token (B, V), valid until the next prefill."""
        self.plan.fill(pieces)
        self.tokens[: len(tokens_T)] = tokens_T
        if self.graph is None:
            with torch.no_grad():
                self._forward()
        else:
            self.graph.replay()
        return self.logits[: len(pieces)]


def _captured(
    network: Decoder, slots: StateCache, forward: Callable[[], None], pool: Any
) -> torch.cuda.CUDAGraph | None:
    """The forward as a graph; None where there are none."""
    if slots.device.type != "cuda" or not all(m.captured for layer in network.config.layers for m in layer.parts):
        return None
    beside = torch.cuda.Stream()
    beside.wait_stream(torch.cuda.current_stream())
    with torch.cuda.stream(beside), torch.no_grad():
        for _ in range(2):  # kernels are compiled and workspaces made before the recording
            forward()
    torch.cuda.current_stream().wait_stream(beside)
    graph = torch.cuda.CUDAGraph()
    with torch.cuda.graph(graph, pool=pool), torch.no_grad():
        forward()
    return graph


def prefill(
    network: Decoder, slots: StateCache, numbers: Sequence[int], tokens: Sequence[Tensor], logits_to_keep: int = 1
) -> Tensor:
    """Add tokens to some slots; logits of the last `logits_to_keep` of each, one slot after another, (·, V) float32.

    Raises:
        RequestError: a sequence becomes too long, or there are not enough pages.
    """
    lengths = [len(row) for row in tokens]
    for slot, length in zip(numbers, lengths, strict=True):
        slots.reserve(slot, slots.length[slot] + length)
    pieces, batch = slots.pieces(numbers, lengths), DeviceBatch(slots, numbers, lengths)
    logits_TV = network.compute(torch.cat(list(tokens)), batch, [slots], logits_to_keep)
    slots.count_pieces(pieces)
    return logits_TV


class PrefillRunner:
    """Prefills of any length: captured up to the largest of PREFILL_SIZES, each when first needed."""

    def __init__(self, network: Decoder, slots: StateCache, ladder: Sequence[int] = PREFILL_SIZES) -> None:
        self.network, self.slots, self.ladder = network, slots, sorted(ladder)
        self.graphs: dict[int, CapturedPrefill] = {}
        self.pool = torch.cuda.graph_pool_handle() if slots.device.type == "cuda" else None

    def read(self, slots: Sequence[int], rows: Sequence[Tensor]) -> Tensor:
        """Add tokens to some slots → logits of the last of each (B, V), valid until the next prefill."""
        lengths = [len(row) for row in rows]
        graph = self._of(self.slots.pieces(slots, lengths))
        if graph is None:
            return prefill(self.network, self.slots, slots, rows)
        for slot, length in zip(slots, lengths, strict=True):
            self.slots.reserve(slot, self.slots.length[slot] + length)
        pieces = self.slots.pieces(slots, lengths)
        logits_BV = graph.read(torch.cat(list(rows)), pieces)
        self.slots.count_pieces(pieces)
        return logits_BV

    def _of(self, pieces: Sequence[Piece]) -> CapturedPrefill | None:
        """The smallest with room for these."""
        need = Capacity.needed(pieces)
        at = bisect_left(self.ladder, need.tokens)
        if at == len(self.ladder):
            return None
        size = self.ladder[at]
        rows = min(self.slots.count, max(4, size // TOKENS_PER_ROW))
        if any(n > most for n, most in zip(need, Capacity.of(size, rows, self.slots.chunk), strict=True)):
            return None
        if size not in self.graphs:
            self.graphs[size] = CapturedPrefill(self.network, self.slots, size, self.pool)
        return self.graphs[size]


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
