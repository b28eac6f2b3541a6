"""A network on a GPU as the engine knows one: `new_state()` gives out slots, a call adds tokens to some of them.

Rows of one token are one recorded step (graphs.py), longer ones are read one after another.  Snapshots lie in the
host's memory and look like those of `model.state`, so prefix cache, sessions and files hold either; of a text that
grows only the pages that are new are copied again.
"""

from __future__ import annotations

from collections.abc import Sequence
from pathlib import Path

import torch
from torch import Tensor

from tiercel.errors import RequestError
from tiercel.model.cuda_graphs import CAPTURE_SIZES, CUDAGraphRunner
from tiercel.model.decoder import Decoder
from tiercel.model.gpu_layout import place
from tiercel.model.pages import Page
from tiercel.model.state import Snapshot, State
from tiercel.model.state_cache import PAGE, AttentionSlots, Mamba2Slots, StateCache
from tiercel.runtime.allocator import CachingAllocator

SPARE = 2  # slots for what lives a moment: a text that starts again, a session that is saved
SHARE = 0.85  # of the free memory that slots may take


class GPURunner:
    """count: texts at once, of at most `max_length` tokens.  pages: of PAGE tokens, for all of them together; when not
    given as many as they may need, or as fit the GPU."""

    native = False
    supports_async = True
    max_captured_tokens = 0  # steps are captured by `CUDAGraphRunner`

    def __init__(self, network: Decoder, count: int, max_length: int, pages: int | None = None) -> None:
        place(network)
        self.network, self.config, self.embed = network, network.config, network.embed
        self.adapters = network.adapters
        probe = StateCache(network, 1, PAGE, pages=1)
        self.page_nbytes = sum(m.nbytes // 2 for m in _parts(probe) if isinstance(m, AttentionSlots))
        self.own_nbytes = sum(m.nbytes for m in _parts(probe) if isinstance(m, Mamba2Slots))
        del probe
        count += SPARE
        wanted = count * -(-max_length // PAGE)
        if pages is None and network.embed.weight.device.type == "cuda" and self.page_nbytes:
            room = torch.cuda.mem_get_info()[0] * SHARE - count * self.own_nbytes
            pages = min(wanted, int(room) // self.page_nbytes)
            if pages < 1:
                raise RequestError(f"{count} slots do not fit this GPU: serve fewer at once")
        self.slots = StateCache(network, count, max_length, wanted if pages is None else pages)
        self.graphs = CUDAGraphRunner(network, self.slots, sorted({n for n in CAPTURE_SIZES if n < count} | {count}))
        self.allocator = CachingAllocator()

    @property
    def device(self) -> torch.device:
        return self.embed.weight.device

    def memory_targets(self, slots: int) -> tuple[int, int]:
        """See `Runner.memory_targets`: slots have their memory, only snapshots need some."""
        return self.allocator.KEEP, 0

    @property
    def fingerprint(self) -> str:
        return self.network.fingerprint

    @property
    def dtype(self) -> torch.dtype:
        return self.slots.dtype

    @property
    def state_bytes(self) -> int:
        """What running texts may take so that a step always finds the pages it needs."""
        pages = len(self.slots.free_pages) + sum(map(len, self.slots.pages))
        return int(pages * 0.9) * self.page_nbytes + self.slots.count * self.own_nbytes

    def new_state(self, adapter: str | None = None) -> SlotHandle:
        if adapter is not None:
            raise RequestError(
                f"adapter {adapter!r}: adapters are served on the CPU; merge it (tiercel merge) for a GPU"
            )
        return SlotHandle(self)

    def load_state(self, path: str | Path) -> SlotHandle:
        """A saved state; FormatError when it is damaged or was saved by another model or dtype."""
        state = self.new_state()
        state.load(path)
        return state

    def forward(
        self, tokens: Sequence[Tensor], states: Sequence[SlotHandle], *, logits_to_keep: int = 1
    ) -> list[Tensor]:
        """See `Runner.forward`."""
        out: list[Tensor | None] = [None] * len(tokens)
        steps = [i for i, row in enumerate(tokens) if len(row) == 1]
        with torch.no_grad():
            if steps:
                logits_BV = self.graphs.step([states[i].slot for i in steps], torch.cat([tokens[i] for i in steps]))
                for i, logits_V in zip(steps, logits_BV.clone(), strict=True):
                    out[i] = logits_V.unsqueeze(0)
            for i, row in enumerate(tokens):
                if len(row) > 1:
                    out[i] = self.slots.prefill(self.network, [states[i].slot], [row], logits_to_keep=logits_to_keep)
        return [logits for logits in out if logits is not None]


class SlotHandle:
    """One text's slot, with what the engine asks of a `State`; the slot is free when nobody holds this."""

    pages = ()  # texts share none on the device

    def __init__(self, owner: GPURunner) -> None:
        self.slot = -1
        self.owner, self.slots = owner, owner.slots
        self.slot = self.slots.take()
        self.kept: list[Page] = []  # copies of the first pages, which are full and stay what they are

    def __del__(self) -> None:
        if self.slot >= 0:
            self.slots.release(self.slot)

    @property
    def length(self) -> int:
        return self.slots.length[self.slot]

    @property
    def min_pos(self) -> int:
        return self.slots.min_pos(self.slot)

    def min_pos_after(self, added: int) -> int:
        """What `min_pos` will be when so many more tokens have been read in one forward."""
        return self.slots.base_after(self.slot, added) if self.rollback_tokens else 0

    @property
    def rollback_tokens(self) -> int:
        return self.slots.chunk if self.owner.own_nbytes else 0

    @property
    def own_nbytes(self) -> int:
        return self.owner.own_nbytes + len(self.slots.pages[self.slot]) * self.owner.page_nbytes

    nbytes = own_nbytes

    def trim(self, length: int) -> bool:
        """Forget all but the first `length` tokens; False, and nothing changed, where that is not kept."""
        if not self.slots.trim(self.slot, length):
            return False
        del self.kept[length // PAGE :]
        return True

    def snapshot(self, *, ending: bool = False) -> Snapshot:
        """A copy in the host's memory, in any case."""
        slots, length, base = self.slots, self.length, self.slots.base[self.slot]
        full = length // PAGE
        self.kept += self._copied(range(len(self.kept), full))
        pages = [*self.kept, *self._copied(range(full, -(-length // PAGE)))]
        layers = [
            (memory.kept(self.slot, base, length), base) for memory in _parts(slots) if isinstance(memory, Mamba2Slots)
        ]
        return Snapshot(length, tuple(pages), tuple(layers))

    def _copied(self, which: range) -> list[Page]:
        """Some of the text's pages: keys and values of all attention layers, one after another (model/pages.py)."""
        caches = [memory for memory in _parts(self.slots) if isinstance(memory, AttentionSlots)]
        if not caches or not which:
            return []
        numbers = torch.tensor([self.slots.pages[self.slot][i] for i in which], device=self.slots.device)
        flat = torch.cat([torch.stack((m.k[numbers], m.v[numbers]), 1).flatten(1) for m in caches], 1).cpu()
        pool = self.owner.allocator
        return [Page(pool.one(len(row), dtype=row.dtype, device=row.device).copy_(row)) for row in flat]

    def restore(self, snapshot: Snapshot) -> None:
        """Be as when the snapshot was taken.  RequestError for a CPU's with more open inputs than a slot has."""
        slots, slot, length = self.slots, self.slot, snapshot.length
        if length - snapshot.min_pos > slots.chunk and snapshot.layers:
            raise RequestError("this state was saved on a CPU and cannot go on here: read the text again")
        slots.reserve(slot, length)
        caches = [memory for memory in _parts(slots) if isinstance(memory, AttentionSlots)]
        if caches and snapshot.pages:
            numbers = torch.tensor(slots.pages[slot][: len(snapshot.pages)], device=slots.device)
            flat, at = torch.stack([page.memory for page in snapshot.pages]).to(slots.device), 0
            for m in caches:
                size = 2 * m.k[0].numel()
                kv = flat[:, at : at + size].view(len(numbers), 2, *m.k.shape[1:])
                m.k[numbers], m.v[numbers] = kv[:, 0], kv[:, 1]
                at += size
        recurrent = [memory for memory in _parts(slots) if isinstance(memory, Mamba2Slots)]
        for memory, (tensors, base) in zip(recurrent, snapshot.layers, strict=True):
            memory.adopt(slot, base, length, tensors)
        self.kept = list(snapshot.pages[: length // PAGE])
        slots._set(slot, length, snapshot.min_pos)

    def fork(self) -> SlotHandle:
        """A second text that continues from here on its own."""
        twin, slots = SlotHandle(self.owner), self.slots
        slots.copy(self.slot, twin.slot)
        twin.kept = list(self.kept)
        return twin

    def save(self, path: str | Path, tokens: Sequence[int] = (), earlier: Sequence[Snapshot] = ()) -> None:
        """As `State.save`."""
        host = self._on_host()
        host.restore(self.snapshot())
        host.save(path, tokens, earlier)

    def load(self, path: str | Path) -> tuple[list[int], list[Snapshot]]:
        """As `State.load`."""
        host = self._on_host()
        tokens, earlier = host.load(path)
        self.restore(host.snapshot())
        return tokens, earlier

    def _on_host(self) -> State:
        owner = self.owner
        mixers = [layer.mixers for layer in owner.config.layers]
        return State(mixers, self.slots.dtype, torch.device("cpu"), owner.fingerprint, owner.allocator)


def _parts(slots: StateCache) -> list[AttentionSlots | Mamba2Slots]:
    return [memory for layer in slots.layers for memory in layer]
