"""What many texts remember on a device: every text has a slot in tensors that never move.

`model.state.State` is one text on the CPU; here all texts share their tensors, so that one kernel serves all of them
and a step can be recorded as a graph: it finds lengths, bases and pages on the device, through numbers of slots.

    length_S, base_S   how many tokens a slot holds, and where its open chunk begins (the same in every layer)
    table              which pages hold a slot's keys and values (the same in every layer)
    attention          k, v (pages, K, PAGE, P)
    Mamba-2            S (slots, H, N, P) float32 before token `base`; rings of the open inputs, the one of position p
                       at p mod their size: columns, x, dt, B

A slot is cut to any length from `base` on by changing a number.  The boundary moves on lazily, at the first token after
a full chunk.  The host has its own copy of lengths and bases: it never asks the device.
"""

from __future__ import annotations

from collections.abc import Callable, Sequence
from typing import TYPE_CHECKING, Any, NamedTuple

import torch
from torch import Tensor

from tiercel.errors import RequestError
from tiercel.mixers.attention.config import AttentionConfig
from tiercel.mixers.attention.rope import RopeConfig
from tiercel.mixers.attention.rotary import frequencies
from tiercel.mixers.backend import Backend
from tiercel.mixers.mamba2.config import Mamba2Config
from tiercel.model.config import Mixer
from tiercel.model.layer_state import LONGEST_CHUNK
from tiercel.model.pages import PAGE

if TYPE_CHECKING:
    from tiercel.model.decoder import Decoder


class AttentionSlots:
    """Keys and values of all texts, in pages."""

    def __init__(self, config: AttentionConfig, pages: int, dtype: torch.dtype, device: torch.device) -> None:
        shape = pages, config.kv_heads, PAGE, config.head_dim
        self.k, self.v = (torch.zeros(shape, dtype=dtype, device=device) for _ in range(2))

    @property
    def nbytes(self) -> int:
        return self.k.nbytes + self.v.nbytes


class Mamba2Slots:
    """Committed states and rings of open inputs."""

    def __init__(self, config: Mamba2Config, slots: int, dtype: torch.dtype, device: torch.device) -> None:
        H, P, N, G = config.heads, config.head_dim, config.state, config.groups
        self.chunk = min(config.chunk, LONGEST_CHUNK)
        R = self.ring = 2 * self.chunk
        self.S = torch.zeros(slots, H, N, P, device=device)
        self.columns = torch.zeros(slots, R + config.conv - 1, config.channels, dtype=dtype, device=device)
        self.x = torch.zeros(slots, H, R, P, dtype=dtype, device=device)
        self.B = torch.zeros(slots, G, R, N, dtype=dtype, device=device)
        self.dt = torch.zeros(slots, H, R, device=device)

    @property
    def nbytes(self) -> int:
        return sum(t.nbytes for t in (self.S, self.columns, self.x, self.B, self.dt))

    def recall(self, slot: int, base: int, stop: int, xBC_LC: Tensor, dt_LH: Tensor) -> None:
        """The open inputs from base to stop, into the first rows of x | B | C and dt; C is not kept."""
        at = torch.arange(base, stop, device=xBC_LC.device) % self.ring
        x, B = (ring[slot][:, at].transpose(0, 1).flatten(1) for ring in (self.x, self.B))
        xBC_LC[: len(at), : x.shape[1]] = x
        xBC_LC[: len(at), x.shape[1] : x.shape[1] + B.shape[1]] = B
        dt_LH[: len(at)] = self.dt[slot][:, at].t()

    def remember(self, slot: int, base: int, next_base: int, xBC_LC: Tensor, dt_LH: Tensor) -> None:
        """Keep the inputs from next_base on; row 0 is that of base."""
        kept = next_base - base
        at = torch.arange(next_base, base + len(xBC_LC), device=xBC_LC.device) % self.ring
        (H, P), (G, N) = (ring.shape[1:4:2] for ring in (self.x, self.B))
        x, B = xBC_LC[kept:, : H * P], xBC_LC[kept:, H * P : H * P + G * N]
        self.x[slot][:, at] = x.unflatten(1, (H, P)).transpose(0, 1)
        self.B[slot][:, at] = B.unflatten(1, (G, N)).transpose(0, 1)
        self.dt[slot][:, at] = dt_LH[kept:].t()

    def kept(self, slot: int, base: int, stop: int) -> dict[str, Tensor]:
        """Copies of one text's memory in the host's, as a `Mamba2State` has it."""
        at = torch.arange(base, stop, device=self.S.device)
        history = self.columns.shape[1] - self.ring
        before = torch.arange(base - history, stop, device=self.S.device)
        columns = self.columns[slot][before % self.columns.shape[1]]
        columns[before < 0] = 0
        here = {
            "columns": columns,
            "x": self.x[slot][:, at % self.ring].transpose(0, 1),
            "dt": self.dt[slot][:, at % self.ring].t(),
            "B": self.B[slot][:, at % self.ring].transpose(0, 1),
            **({"S": self.S[slot]} if base else {}),
        }
        return {name: t.contiguous().cpu().clone() for name, t in here.items()}

    def adopt(self, slot: int, base: int, stop: int, kept: dict[str, Tensor]) -> None:
        """Remember these instead."""
        at = torch.arange(base, stop) % self.ring
        history = self.columns.shape[1] - self.ring
        before = torch.arange(base - history, stop)
        new = {name: t.to(self.S.device) for name, t in kept.items()}
        real = before >= 0
        self.columns[slot, (before % self.columns.shape[1])[real].to(self.S.device)] = new["columns"][real]
        at = at.to(self.S.device)
        self.x[slot][:, at], self.B[slot][:, at] = new["x"].transpose(0, 1), new["B"].transpose(0, 1)
        self.dt[slot][:, at] = new["dt"].t()
        self.S[slot] = new.get("S", 0)


class StateCache:
    """Memories of `count` texts of at most `max_length` tokens for one network, on its device.

    pages: how many pages there are for all texts together, all slots at full length when not given.  The first is
    nobody's.
    """

    def __init__(self, network: Decoder, count: int, max_length: int, pages: int | None = None) -> None:
        self.device, self.dtype = network.norm.weight.device, network.dtype
        self.most_pages = -(-max_length // PAGE)
        pages = 1 + (count * self.most_pages if pages is None else pages)
        self.max_length, self.count = max_length, count
        self.length, self.base = [0] * count, [0] * count
        self.length_S, self.base_S = (torch.zeros(count, dtype=torch.int32, device=self.device) for _ in range(2))
        self.table = torch.zeros(count, self.most_pages, dtype=torch.int32, device=self.device)
        self._frequencies: dict[tuple[RopeConfig, int], tuple[Tensor, float]] = {}
        self.free = list(range(count))[::-1]
        self.free_pages = list(range(1, pages))[::-1]
        self.pages: list[list[int]] = [[] for _ in range(count)]
        self.layers = [[self._memory(m, pages) for m in layer.mixers] for layer in network.config.layers]
        recurrent = [m for layer in self.layers for m in layer if isinstance(m, Mamba2Slots)]
        chunks = {m.chunk for m in recurrent}
        if len(chunks) > 1:
            raise RequestError(f"all layers must have one chunk to run on a GPU, not {sorted(chunks)}")
        self.chunk = chunks.pop() if chunks else 1
        self.beside = torch.cuda.Stream() if self.device.type == "cuda" else None

    def _memory(self, config: Mixer, pages: int) -> AttentionSlots | Mamba2Slots:
        if isinstance(config, AttentionConfig):
            return AttentionSlots(config, pages, self.dtype, self.device)
        if isinstance(config, Mamba2Config):
            return Mamba2Slots(config, self.count, self.dtype, self.device)
        raise RequestError("Mamba-1 layers have no kernels for GPUs yet: run this model on the CPU")

    @property
    def nbytes(self) -> int:
        return sum(memory.nbytes for layer in self.layers for memory in layer)

    def frequencies(self, rope: RopeConfig, head_dim: int) -> tuple[Tensor, float]:
        """`mixers.attention.rotary.frequencies`, on the device."""
        key = (rope, head_dim)
        if key not in self._frequencies:
            f_R, scale = frequencies(rope, head_dim)
            self._frequencies[key] = f_R.to(self.device), scale
        return self._frequencies[key]

    # ── slots

    def take(self) -> int:
        """An empty slot; RequestError when all are taken."""
        if not self.free:
            raise RequestError(f"all {self.count} slots are taken")
        slot = self.free.pop()
        for layer in self.layers:
            for memory in layer:
                if isinstance(memory, Mamba2Slots):
                    memory.S[slot] = 0
        self._set(slot, 0, 0)
        return slot

    def release(self, slot: int) -> None:
        """Forget a text; its slot and pages are free."""
        self.free_pages += self.pages[slot][::-1]
        self.pages[slot] = []
        self.free.append(slot)

    def reserve(self, slot: int, length: int) -> None:
        """Have pages for so many tokens in all; RequestError when there are not enough."""
        if length > self.max_length:
            raise RequestError(f"{length} tokens do not fit a slot of {self.max_length}")
        missing = -(-length // PAGE) - len(self.pages[slot])
        if missing <= 0:
            return
        if missing > len(self.free_pages):
            raise RequestError(f"{missing} more pages of {PAGE} tokens are needed, {len(self.free_pages)} are free")
        new = [self.free_pages.pop() for _ in range(missing)]
        first = len(self.pages[slot])
        self.pages[slot] += new
        self.table[slot, first : first + missing] = torch.tensor(new, dtype=torch.int32, device=self.device)

    def copy(self, source: int, slot: int) -> None:
        """Make an empty slot hold what another holds; nothing is shared."""
        self.reserve(slot, self.length[source])
        of, to = (torch.tensor(self.pages[s], device=self.device) for s in (source, slot))
        of = of[: len(to)]
        for layer in self.layers:
            for memory in layer:
                if isinstance(memory, Mamba2Slots):
                    for t in (memory.S, memory.columns, memory.x, memory.B, memory.dt):
                        t[slot] = t[source]
                elif len(of):
                    memory.k[to], memory.v[to] = memory.k[of], memory.v[of]
        self._set(slot, self.length[source], self.base[source])

    def trim(self, slot: int, length: int) -> bool:
        """Forget all but the first tokens.  False, and nothing changed, where that is not kept."""
        if not self.min_pos(slot) <= length <= self.length[slot]:
            return False
        self._set(slot, length, self.base[slot])
        return True

    def min_pos(self, slot: int) -> int:
        """The shortest length `trim` can reach."""
        return self.base[slot] if self.chunk > 1 else 0

    def _set(self, slot: int, length: int, base: int) -> None:
        self.length[slot], self.base[slot] = length, base
        self.length_S[slot], self.base_S[slot] = length, base

    # ── forwards

    def prefill(
        self, network: Decoder, slots: Sequence[int], rows: Sequence[Tensor], logits_to_keep: int = 1
    ) -> Tensor:
        """Add tokens to some texts → logits of the last `logits_to_keep` of each, (B · keep, V) float32."""
        for slot, row in zip(slots, rows, strict=True):
            self.reserve(slot, self.length[slot] + len(row))
        batch = DeviceBatch(self, slots, [len(row) for row in rows])
        logits_TV = network.run(torch.cat(list(rows)), batch, [self], logits_to_keep)
        for slot, length, base in zip(slots, batch.lengths, batch.next_bases, strict=True):
            self._set(slot, self.length[slot] + length, base)
        return logits_TV

    def begin_step(self, slots: Sequence[int]) -> None:
        """Before a step of these texts: room for its tokens."""
        for slot in slots:
            if slot >= 0:
                self.reserve(slot, self.length[slot] + 1)

    def count_step(self, slots: Sequence[int]) -> None:
        """After it: what `advance` has done on the device."""
        for slot in slots:
            if slot >= 0:
                self.base[slot] = self.base_after(slot, 1)
                self.length[slot] += 1

    def advance(self, slot_B: Tensor) -> None:
        """One token more in each of these; on the device, −1 for nobody."""
        B = slot_B.clamp(min=0).long()
        real = (slot_B >= 0).to(torch.int32)
        length, base = self.length_S[B], self.base_S[B]
        moved = torch.maximum(base, length // self.chunk * self.chunk)
        self.base_S.index_put_((B,), (moved - base) * real, accumulate=True)
        self.length_S.index_put_((B,), real, accumulate=True)

    def base_after(self, slot: int, added: int) -> int:
        """The boundary after adding tokens: as late as it may be while one of them can still be cut."""
        return max(self.base[slot], (self.length[slot] + added - 1) // self.chunk * self.chunk)


class Texts(NamedTuple):
    """One layer part's memory, and where the tokens of a batch belong in it."""

    memory: Any
    batch: DeviceBatch


class DeviceBatch:
    """New tokens of texts in slots: what `model.batch.Batch` is for States.

    step: one token for each row, found through `slot_T` on the device alone, which a graph may record.
    """

    native = True
    backend: Backend = "triton"
    adapters: Sequence[str | None] = ()

    def __init__(self, slots: StateCache, rows: Sequence[int], lengths: Sequence[int]) -> None:
        self.slots, self.rows, self.lengths, self.step = slots, list(rows), list(lengths), False
        self.starts = [slots.length[slot] for slot in rows]
        self.next_bases = [slots.base_after(slot, n) for slot, n in zip(rows, lengths, strict=True)]
        ends = torch.tensor(self.lengths).cumsum(0).tolist()
        self.spans = [slice(end - length, end) for end, length in zip(ends, self.lengths, strict=True)]
        places = zip(self.starts, self.lengths, strict=True)
        self.position_T = torch.cat([torch.arange(start, start + n, dtype=torch.int32) for start, n in places])
        self.position_T = self.position_T.to(slots.device)
        counts = torch.tensor(self.lengths)
        self.slot_T = torch.tensor(self.rows, dtype=torch.int32).repeat_interleave(counts).to(slots.device)
        self.first_T = torch.zeros_like(self.slot_T)
        self._rotary: dict[tuple[RopeConfig, int], tuple[Tensor, Tensor]] = {}

    @classmethod
    def for_step(cls, slots: StateCache, slot_B: Tensor) -> DeviceBatch:
        batch = cls.__new__(cls)
        B = len(slot_B)
        batch.slots, batch.step, batch.slot_T, batch._rotary = slots, True, slot_B, {}
        batch.lengths, batch.spans = [1] * B, [slice(i, i + 1) for i in range(B)]
        batch.position_T = slots.length_S[slot_B.clamp(min=0).long()]
        batch.first_T = torch.arange(B, dtype=torch.int32, device=slots.device)
        return batch

    def metadata_for(self, memory: AttentionSlots | Mamba2Slots) -> Texts:
        return Texts(memory, self)

    def side_by_side(self, runs: Sequence[Callable[[], Tensor]]) -> list[Tensor]:
        """What each of a layer's mixers answers; in a step on a GPU at the same time: each alone is small."""
        beside = self.slots.beside
        if not self.step or beside is None or len(runs) == 1:
            return [run() for run in runs]
        here = torch.cuda.current_stream()
        beside.wait_stream(here)
        with torch.cuda.stream(beside):
            answers = [run() for run in runs[:-1]]
        last = runs[-1]()
        here.wait_stream(beside)
        return [*answers, last]

    def rotary(self, rope: RopeConfig, head_dim: int) -> tuple[Tensor, Tensor]:
        """cos and sin (T, R / 2) float32, computed once for all layers that share them."""
        key = (rope, head_dim)
        if key not in self._rotary:
            f_R, scale = self.slots.frequencies(rope, head_dim)
            angle_TR = torch.outer(self.position_T.float(), f_R)
            self._rotary[key] = (angle_TR.cos() * scale, angle_TR.sin() * scale)
        return self._rotary[key]
