"""Forwards on a device, captured as CUDA graphs and replayed: steps of B sequences, and prompts, for some sizes.

What changes from one to the next is read on the device: tokens and slot numbers from tables, lengths, committed
positions and pages through those numbers.  A step of fewer rows than its graph is padded with slot −1, which kernels
ignore.  Nothing waits for the host: a token of −1 stands for the one that was sampled last for its slot.
"""

from __future__ import annotations

import gc
from bisect import bisect_left
from collections.abc import Callable, Sequence
from typing import TYPE_CHECKING, Any

import numpy as np
import torch
from torch import Tensor

from tiercel.mixers.paged import on_host
from tiercel.model.device_sampler import LogitsSampler
from tiercel.model.ragged import Capacity, Piece, RaggedPlan
from tiercel.model.state_cache import DeviceBatch, StateCache

if TYPE_CHECKING:
    from tiercel.model.decoder import Decoder

Ids = Sequence[Sequence[int]]  # of each row, on the host

CAPTURE_SIZES = (1, 2, 4, 8, 16, 32, 64, 96, 128, 192, 256)
PREFILL_SIZES = (64, 128, 192, 256, 384, 512, 768, 1024, 1536, 2048)  # tokens; longer ones keep the device busy anyway
TOKENS_PER_ROW = 32  # of a captured prefill, the number of rows it has room for


class CapturedCUDAStep:
    """One captured step: tokens (B) and slot_B in, logits (B, V) out; all three stay where they are.

    tokens: −1: the slot's `sampled_S`
    """

    def __init__(self, network: Decoder, slots: StateCache, rows: int, pool: Any = None) -> None:
        self.network, self.slots = network, slots
        self.table = torch.full((2, rows), -1, dtype=torch.int64, device=slots.device)
        self.tokens, self.slot_B = self.table
        self.run_forward = captured(slots, self._forward, pool)
        self.sampler = LogitsSampler(rows, slots, lambda run: captured(slots, run, pool))

    def _forward(self) -> None:
        slot_B = self.slot_B.int()
        tokens_B = torch.where(self.tokens < 0, self.slots.sampled_S[self.slots.indices(slot_B)], self.tokens)
        self.logits = self.network.compute(tokens_B, DeviceBatch.for_step(self.slots, slot_B), [self.slots])
        self.slots.advance(slot_B)

    def run(self) -> Tensor:
        """Run the step on the contents of the buffers; its logits."""
        self.run_forward()
        return self.logits


class CapturedPrefill:
    """New tokens of several sequences recorded as a forward: `read` fills its tables and runs it."""

    def __init__(self, network: Decoder, slots: StateCache, tokens: int, pool: Any = None) -> None:
        self.network, self.slots = network, slots
        rows = min(slots.count, max(4, tokens // TOKENS_PER_ROW))
        self.plan = RaggedPlan(Capacity.of(tokens, rows, slots.chunk), slots.device)
        self.plan.id_T.zero_()
        self.run_forward = captured(slots, self._forward, pool)

    def _forward(self) -> None:
        batch = DeviceBatch.for_plan(self.slots, self.plan)
        self.logits = self.network.compute(self.plan.id_T.long(), batch, [self.slots], 1)
        self.slots.move(self.plan)

    def read(self, ids: Ids, pieces: Sequence[Piece]) -> Tensor:
        """Logits of each row's last token (B, V), valid until the next prefill."""
        self.plan.fill(pieces, ids)
        self.run_forward()
        return self.logits[: len(pieces)]


class Replay:
    """A captured function; calling it runs it again."""

    def __init__(self, graph: torch.cuda.CUDAGraph) -> None:
        self.graph = graph

    def __call__(self) -> None:
        self.graph.replay()


def captured(slots: StateCache, run: Callable[[], None], pool: Any) -> Callable[[], None]:
    """The function as a graph; where there are none, itself without gradients."""
    if slots.device.type != "cuda":
        return torch.no_grad()(run)
    beside = torch.cuda.Stream()
    beside.wait_stream(torch.cuda.current_stream())
    with torch.cuda.stream(beside), torch.no_grad():
        for _ in range(2):  # kernels are compiled and workspaces made before the recording
            run()
    torch.cuda.current_stream().wait_stream(beside)
    graph, collects = torch.cuda.CUDAGraph(), gc.isenabled()
    gc.disable()  # a graph that is freed during a capture ends it
    try:
        with torch.cuda.graph(graph, pool=pool), torch.no_grad():
            run()
    finally:
        if collects:
            gc.enable()
    return Replay(graph)


def prefill(
    network: Decoder, slots: StateCache, numbers: Sequence[int], tokens: Sequence[Sequence[int] | Tensor],
    logits_to_keep: int = 1,
) -> Tensor:  # fmt: skip
    """Add tokens to some slots; logits of the last `logits_to_keep` of each, one slot after another, (·, V) float32.

    Raises:
        RequestError: a sequence becomes too long, or there are not enough pages.
    """
    ids = [row.tolist() if isinstance(row, Tensor) else row for row in tokens]
    pieces = _begin(slots, numbers, ids)
    batch = DeviceBatch(slots, pieces, ids)
    logits_TV = network.compute(batch.plan.id_T.long(), batch, [slots], logits_to_keep)
    slots.move(batch.plan)
    slots.count_pieces(pieces)
    return logits_TV


def _begin(slots: StateCache, numbers: Sequence[int], ids: Ids) -> list[Piece]:
    """Pages for new tokens, and the parts of their forward."""
    for slot, row in zip(numbers, ids, strict=True):
        slots.reserve(slot, slots.length[slot] + len(row))
    slots.publish()
    return slots.pieces(numbers, [len(row) for row in ids])


class PrefillRunner:
    """Prefills of any length: captured up to the largest of PREFILL_SIZES, each when first needed."""

    def __init__(self, network: Decoder, slots: StateCache, ladder: Sequence[int] = PREFILL_SIZES) -> None:
        self.network, self.slots, self.ladder = network, slots, sorted(ladder)
        self.graphs: dict[int, CapturedPrefill] = {}
        self.pool = torch.cuda.graph_pool_handle() if slots.device.type == "cuda" else None

    def read(self, slots: Sequence[int], ids: Ids) -> Tensor:
        """Add tokens to some slots → logits of the last of each (B, V), valid until the next prefill."""
        graph = self._of(self.slots.pieces(slots, [len(row) for row in ids]))
        if graph is None:
            return prefill(self.network, self.slots, slots, ids)
        pieces = _begin(self.slots, slots, ids)
        logits_BV = graph.read(ids, pieces)
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
        return self._captured(size)

    def _captured(self, size: int) -> CapturedPrefill:
        if size not in self.graphs:
            self.graphs[size] = CapturedPrefill(self.network, self.slots, size, self.pool)
        return self.graphs[size]

    def capture(self) -> None:
        """Capture every size of the ladder that a sequence can have."""
        for size in self.ladder:
            if size <= self.slots.max_length:
                self._captured(size)


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
        return self.launch(numbers, tokens.tolist()).logits[: len(numbers)]

    def launch(self, numbers: Sequence[int], tokens: Sequence[int]) -> CapturedCUDAStep:
        """The same, with tokens on the host; −1: the slot's `sampled_S`.  The step that was run."""
        graph = self.of(len(numbers))
        self.slots.begin_step(numbers)
        table = np.full(graph.table.shape, -1)
        table[:, : len(numbers)] = tokens, numbers
        graph.table.copy_(on_host(table, self.slots.device), non_blocking=True)
        graph.run()
        self.slots.count_step(numbers)
        return graph
