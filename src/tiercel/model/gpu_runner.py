"""A network on a GPU: states in slots; steps, and prefills of any rows together, captured as CUDA graphs.

Snapshots lie in the host's memory and look like those of `model.state`, so prefix cache, sessions and files hold
either; of a sequence that grows only the pages that are new are copied again.
"""

from __future__ import annotations

from collections.abc import Sequence

import numpy as np
import torch
from torch import Tensor

from tiercel.errors import RequestError
from tiercel.mixers.paged import PageGroup, on_host
from tiercel.model.cuda_graphs import CAPTURE_SIZES, CUDAGraphRunner, PrefillRunner, prefill
from tiercel.model.decoder import Decoder
from tiercel.model.device_sampler import GREEDY, sample, way_of
from tiercel.model.gpu_layout import fuse
from tiercel.model.pages import PAGE, Page, PageRun
from tiercel.model.state import Snapshot, State
from tiercel.model.state_cache import MAX_PREFILL, StateCache
from tiercel.runtime.allocator import CachingAllocator
from tiercel.sampling.sampler import Draw

EXTRA_SLOTS = 2  # for short-lived states: restarts, snapshots that are read from files
MEMORY_SHARE = 0.85  # of the free memory that slots may take
USABLE_PAGES = 0.9  # of all pages that running sequences may take, so that a step always finds the ones it needs


class GPURunner:
    """Runs `network`; a `Runner`.

    Args:
        network: on its device.
        count: sequences at once.
        max_length: tokens of one.
        pages: of PAGE tokens for all of them together; when not given as many as they may need, or as fit the GPU.

    Raises:
        RequestError: the slots do not fit, or a layer has no kernels for GPUs.
    """

    native = False
    supports_async = True
    max_num_batched_tokens, max_decode_delay = 8192, 0.05
    max_captured_tokens = 0  # steps are captured by `CUDAGraphRunner`

    def __init__(self, network: Decoder, count: int, max_length: int, pages: int | None = None) -> None:
        fuse(network)
        self.network, self.config, self.adapters = network, network.config, network.adapters
        probe = StateCache(network, 1, PAGE, pages=1)
        self.own_nbytes = sum(part.nbytes for part in probe.recurrent)
        nbytes = sum(group.page_nbytes for group in probe.groups)
        del probe
        count += EXTRA_SLOTS
        wanted = count * -(-max_length // PAGE)
        if pages is None and self.device.type == "cuda" and nbytes:
            room = torch.cuda.mem_get_info()[0] * MEMORY_SHARE - count * self.own_nbytes
            pages = min(wanted, int(room) // nbytes)
            if pages < 1:
                raise RequestError(f"{count} slots do not fit this GPU: serve fewer at once")
        self.slots = StateCache(network, count, max_length, wanted if pages is None else pages)
        self.graphs = CUDAGraphRunner(network, self.slots, sorted({n for n in CAPTURE_SIZES if n < count} | {count}))
        self.prefills = PrefillRunner(network, self.slots)
        self.allocator = CachingAllocator()

    @property
    def device(self) -> torch.device:
        return self.network.device

    @property
    def state_bytes(self) -> int:
        """See `Runner.state_bytes`."""
        pages = sum(int(group.count * USABLE_PAGES) * group.page_nbytes for group in self.slots.groups)
        return pages + self.slots.count * self.own_nbytes

    def memory_targets(self, slots: int) -> tuple[int, int]:
        """See `Runner.memory_targets`: slots have their memory, only snapshots need some."""
        return self.allocator.MAX_FREE_BYTES, 0

    def new_state(self, adapter: str | None = None) -> SlotHandle:
        """See `Runner.new_state`."""
        if adapter is not None:
            raise RequestError(
                f"adapter {adapter!r}: adapters are served on the CPU; merge it (tiercel merge) for a GPU"
            )
        return SlotHandle(self)

    def host_state(self, adapter: str | None = None) -> State:
        """See `Runner.host_state`."""
        mixers = [layer.mixers for layer in self.config.layers]
        return State(mixers, self.slots.dtype, torch.device("cpu"), self.network.fingerprint, self.allocator)

    def capture(self) -> None:
        """Capture steps and prefills of every size, and the sampling of steps, before the first request."""
        for size in self.graphs.sizes:
            graph = self.graphs.of(size)
            for draw in (GREEDY, GREEDY._replace(temperature=1.0, top_k=1)):
                graph.sampler(graph.logits, [-1] * size, [draw] * size, self.config.vocab_size)
        self.prefills.capture()

    def forward(
        self, tokens: Sequence[Tensor], states: Sequence[SlotHandle], *, logits_to_keep: int = 1
    ) -> list[Tensor]:
        """See `Runner.forward`."""
        launched = LaunchedStep(len(tokens))
        self._launch(launched, [row.tolist() for row in tokens], states, logits_to_keep)
        return launched.logits

    def launch(
        self, tokens: Sequence[Sequence[int] | None], states: Sequence[SlotHandle], draws: Sequence[Draw | None],
        num_tokens: int,
    ) -> LaunchedStep:  # fmt: skip
        """See `AsyncRunner.launch`."""
        launched = LaunchedStep(len(tokens))
        self._launch(launched, tokens, states, 1, [draw or GREEDY for draw in draws], num_tokens)
        launched.record()
        return launched

    def _launch(
        self, launched: LaunchedStep, tokens: Sequence[Sequence[int] | None], states: Sequence[SlotHandle],
        logits_to_keep: int, draws: Sequence[Draw] | None = None, num_tokens: int = 0,
    ) -> None:  # fmt: skip
        """Rows of one token in a captured step, the others in another forward."""
        numbers = [state.slot for state in states]
        steps = [i for i, row in enumerate(tokens) if row is None or len(row) == 1]
        prompts = [i for i, row in enumerate(tokens) if row is not None and len(row) > 1]
        with torch.no_grad():
            if steps:
                slots = [numbers[i] for i in steps]
                graph = self.graphs.launch(slots, [-1 if (row := tokens[i]) is None else row[0] for i in steps])
                sampled = (
                    None if draws is None else graph.sampler(graph.logits, slots, [draws[i] for i in steps], num_tokens)
                )
                launched.add(steps, graph.logits[: len(steps)].clone().unsqueeze(1).unbind(), sampled)
            if prompts:
                slots, ids = [numbers[i] for i in prompts], [tokens[i] or () for i in prompts]
                logits = self._prefill(slots, ids, logits_to_keep).clone()
                sampled = None
                if draws is not None:
                    table = np.array([(slot, *draws[i]) for slot, i in zip(slots, prompts, strict=True)]).T
                    way = way_of([draws[i] for i in prompts])
                    sampled = sample(
                        logits,
                        on_host(table, self.device).to(self.device, non_blocking=True),
                        self.slots,
                        way,
                        num_tokens,
                    )
                launched.add(prompts, logits.split([min(logits_to_keep, len(row)) for row in ids]), sampled)

    def _prefill(self, slots: list[int], ids: list[Sequence[int]], logits_to_keep: int) -> Tensor:
        """Logits of the last tokens of each row; rows of more than MAX_PREFILL are read in parts."""
        for i, row in enumerate(ids):
            stop = len(row) - MAX_PREFILL
            for at in range(0, stop, MAX_PREFILL):
                self.prefills.read([slots[i]], [row[at : min(at + MAX_PREFILL, stop)]])
        ids = [row[-MAX_PREFILL:] for row in ids]
        if logits_to_keep == 1:
            return self.prefills.read(slots, ids)
        return prefill(self.network, self.slots, slots, ids, logits_to_keep)


class LaunchedStep:
    """A forward that was started on a device, and the tokens sampled there.

    logits: (L, V) float32 of each state, as `Runner.forward` returns them
    """

    def __init__(self, rows: int) -> None:
        self.logits: list[Tensor] = [torch.empty(0)] * rows
        self._parts: list[tuple[list[int], Tensor]] = []
        self._done: torch.cuda.Event | None = None

    def add(self, rows: list[int], logits: Sequence[Tensor], sampled_B: Tensor | None) -> None:
        """Add the results of some rows, and start the copy of their tokens to the host."""
        for i, each in zip(rows, logits, strict=True):
            self.logits[i] = each
        if sampled_B is not None:
            host_B = torch.empty(len(rows), dtype=torch.int64, pin_memory=sampled_B.is_cuda)
            self._parts.append((rows, host_B.copy_(sampled_B, non_blocking=True)))

    def record(self) -> None:
        """Note that all was added."""
        if self._parts[0][1].is_pinned():
            self._done = torch.cuda.Event()
            self._done.record()

    def wait(self) -> list[int]:
        """Wait for the tokens of all states; −1: no logit was finite."""
        if self._done is not None:
            self._done.synchronize()
        tokens = [-1] * len(self.logits)
        for rows, host_B in self._parts:
            for i, token in zip(rows, host_B.tolist(), strict=True):
                tokens[i] = token
        return tokens


class SlotHandle:
    """One sequence's slot, with what the engine asks of a state; the slot is free when nothing refers to this."""

    pages: Sequence[Page] = ()  # sequences share none on the device

    def __init__(self, runner: GPURunner) -> None:
        self.slot = -1
        self.runner, self.slots = runner, runner.slots
        self.slot = self.slots.take()
        self.copies: list[list[Page | None]] = [[] for _ in self.slots.groups]  # of full pages, which do not change

    def __del__(self) -> None:
        if self.slot >= 0:
            self.slots.release(self.slot)

    @property
    def length(self) -> int:
        """Tokens read."""
        return self.slots.length[self.slot]

    @property
    def min_pos(self) -> int:
        """The least length `trim` can reach."""
        return self.slots.min_pos(self.slot)

    def min_pos_after(self, added: int) -> int:
        """What `min_pos` will be after one forward of `added` tokens."""
        return self.slots.min_pos_after(self.slot, added)

    @property
    def rollback_tokens(self) -> int:
        """See `State.rollback_tokens`."""
        windows = [group.window for group in self.slots.groups if group.window is not None]
        return min([*windows, *([self.slots.chunk] if self.slots.recurrent else [])], default=0)

    @property
    def own_nbytes(self) -> int:
        """Bytes of the slot and its pages."""
        slot, groups = self.slot, self.slots.groups
        pages = sum((len(group.numbers[slot]) - group.first[slot]) * group.page_nbytes for group in groups)
        return self.runner.own_nbytes + pages

    nbytes = own_nbytes

    def trim(self, length: int) -> bool:
        """See `State.trim`."""
        if not self.slots.trim(self.slot, length):
            return False
        for copies in self.copies:
            del copies[length // PAGE :]
        return True

    def snapshot(self, *, ending: bool = False) -> Snapshot:
        """Copy the state to the host's memory, in any case."""
        slots, length, committed = self.slots, self.length, self.slots.committed[self.slot]
        runs = tuple(self._run(group, copies) for group, copies in zip(slots.groups, self.copies, strict=True))
        layers = tuple((part.tensors(self.slot, committed, length), committed) for part in slots.recurrent)
        return Snapshot(length, runs, tuple(group.window for group in slots.groups), layers)

    def _run(self, group: PageGroup, copies: list[Page | None]) -> PageRun:
        """A group's pages in the host's memory; those that are full are copied once."""
        first, full, stop = group.first[self.slot], self.length // PAGE, -(-self.length // PAGE)
        copies[:first] = [None] * min(first, len(copies))
        copies += [None] * (first - len(copies))
        copies += self._copied(group, range(len(copies), full))
        held = [page for page in copies[first:full] if page is not None]
        return PageRun(first, (*held, *self._copied(group, range(max(full, first), stop))))

    def _copied(self, group: PageGroup, which: range) -> list[Page]:
        """Copies of some pages: what the group's layers have there, one after another (model/pages.py)."""
        if not which:
            return []
        numbers = group.on_device([group.numbers[self.slot][i] for i in which])
        flat = torch.cat([layer.read(numbers) for layer in group.layers], 1).cpu()
        allocator = self.runner.allocator
        return [Page(allocator.empty(len(row), dtype=row.dtype, device=row.device).copy_(row)) for row in flat]

    def restore(self, snapshot: Snapshot) -> None:
        """Set the state to a snapshot of the same network.

        Raises:
            RequestError: one of a CPU with more pending inputs than a slot has, or not enough pages.
        """
        slots, slot, length = self.slots, self.slot, snapshot.length
        committed = max((position for _, position in snapshot.layers), default=0)
        if length - committed > slots.chunk and snapshot.layers:
            raise RequestError("this state was saved on a CPU and cannot go on here: read the text again")
        for group in slots.groups:
            group.release(slot)
        slots.set_position(slot, 0, 0)
        slots.begin(slot, length, [run.first for run in snapshot.runs])
        for group, run in zip(slots.groups, snapshot.runs, strict=True):
            if run.pages:
                numbers = group.on_device(group.held(slot)[: len(run.pages)])
                flat = torch.stack([page.memory for page in run.pages]).to(slots.device)
                parts = flat.split([layer.page_size for layer in group.layers], 1)
                for layer, part in zip(group.layers, parts, strict=True):
                    layer.write(numbers, part)
        for part, (tensors, position) in zip(slots.recurrent, snapshot.layers, strict=True):
            part.load(slot, position, tensors)
        self.copies = [[*[None] * run.first, *run.pages][: length // PAGE] for run in snapshot.runs]
        slots.set_position(slot, length, committed)

    def fork(self) -> SlotHandle:
        """Return a second state that continues from here on its own."""
        twin = SlotHandle(self.runner)
        self.slots.copy(self.slot, twin.slot)
        twin.copies = [list(copies) for copies in self.copies]
        return twin
