"""What a layer remembers, and how far back it can be cut.

Attention remembers keys and values: a cache that can be cut at any token, in pages that texts share (pages.py).  A
recurrent state cannot: it exists only where somebody kept it.  Mamba-2's chunked form needs the state only where a
chunk starts, so its layer keeps

    the committed state S at a chunk boundary `base`, and the open inputs since then (pre-conv columns, x, B, dt)

A step reads S and does not write it; S is rewritten once per chunk.  Cutting back to any token since `base`
is then a change of `length`.  The boundary moves on lazily, at the next call, so whatever the last call
added (up to a chunk of it) can always be taken back: verify k drafted tokens, keep a of them, trim.
Mamba-1 decays per channel and state and has no chunked form: its layer keeps the running state too, and
cutting back replays the open inputs (no matrix product is repeated).

Everybody else only asks:

    length · oldest · trim(n) → bool · snapshot() / restore(s) · fork() · nbytes / pages · save(path)

Boundaries are absolute multiples of the chunk, so prefill, chunked prefill and decode meet the same grid.

Kernels read and write the same memory.  They find it through one run of int64 words that keeps its address as long
as the state lives (`Words` in ops/cpu/kernels.h), so a recorded step stays valid while the text grows:

    State      length · address of the partial sums of a split attention · how many key segments these have room for
               · address of the table of pages
    attention  byte of a page where its keys begin · for each kv head a counter of a kernel's finished pieces
    recurrent  base · a counter · addresses of columns, x, dt, B, S · Mamba-1: address of the running state, its length

Letters: K conv kernel or kv heads, C conv channels, H heads, P head dim, N state, G groups, I inner width, T tokens.
"""

from __future__ import annotations

import hashlib
from abc import ABC, abstractmethod
from collections.abc import Iterable, Mapping, Sequence
from dataclasses import dataclass
from functools import cached_property
from pathlib import Path

import numpy as np
import torch
from torch import Tensor

import tiercel
from tiercel.errors import FormatError, RequestError
from tiercel.model.config import LARGEST, AttentionConfig, Mamba1Config, Mamba2Config, Mixer
from tiercel.model.pages import PAGE, Page, Pages
from tiercel.model.pool import Pool, memory
from tiercel.ops.scan import selective_scan

TILE = 32  # keys that kernels read together: pages are whole tiles
SEGMENT = 1024  # keys of one partial sum, where few queries meet many keys (SEGMENT in ops/cpu/kernels.h)
SPLIT = 8  # new tokens up to which that is done
LONGEST_CHUNK = 64  # S is rewritten at least this often, whatever chunk the model was trained with: the form is exact

Words = np.ndarray


class LayerState(ABC):
    """What one mixer remembers of one text; `length` is the whole State's."""

    words: Words  # its own run of the State's
    at: int  # where that begins

    def __init__(self, config: Mixer, dtype: torch.dtype, device: torch.device) -> None:
        self.config, self.dtype, self.device = config, dtype, device

    @property
    @abstractmethod
    def size(self) -> int:
        """How many words."""

    def attach(self, words: Words, at: int) -> None:
        """Live in these words of a State."""
        self.all_words, self.words, self.at = words, words[at : at + self.size], at
        self.publish()

    @abstractmethod
    def publish(self) -> None:
        """Write the addresses of all buffers into the words."""

    @property
    def length(self) -> int:
        return int(self.all_words[0])

    @property
    def base(self) -> int:
        """Nothing before this token can be cut."""
        return 0

    @property
    @abstractmethod
    def buffers(self) -> Mapping[str, Tensor]:
        """Everything allocated, pages aside."""

    @abstractmethod
    def tensors(self) -> dict[str, Tensor]:
        """What is remembered, exactly the valid part: views, but of pages a copy."""

    @abstractmethod
    def adopt(self, tensors: dict[str, Tensor], length: int, base: int) -> None:
        """Remember these instead; the tensors are copied.  Shapes are the caller's promise."""

    @abstractmethod
    def shapes(self, length: int, base: int) -> dict[str, tuple[int, ...]]:
        """The shapes `tensors` has at such a length and base: what a file is checked against."""


class AttentionState(LayerState):
    """Keys and values of every token, this layer's part of the text's pages; trims by length.

    Kernels read pages where they lie.  torch's attention wants all keys in a row: `extend` writes the pages, which
    are what is shared and saved, and keeps a second copy in a row, `whole`, to which each call adds its new tokens.
    So on plain torch (no extension, another device, float16) a running text takes its keys and values twice; a
    snapshot does not, nor does a fork until it runs.
    """

    pages: Pages  # the text's
    start: int  # where in a page this layer begins, in numbers

    def __init__(self, config: AttentionConfig, dtype: torch.dtype, device: torch.device) -> None:
        super().__init__(config, dtype, device)
        self.heads, self.kv_heads, self.head_dim = config.heads, config.kv_heads, config.head_dim
        self.whole, self.gathered = self._row(0), 0  # (2, K, room, P), and how many of its tokens are there

    def _row(self, room: int) -> Tensor:
        return memory(2, self.kv_heads, room, self.head_dim, dtype=self.dtype, device=self.device)

    @property
    def size(self) -> int:
        return 1 + self.kv_heads

    @property
    def page_size(self) -> int:
        """Numbers of one page."""
        return 2 * self.kv_heads * PAGE * self.head_dim

    def publish(self) -> None:
        self.words[0] = self.start * self.dtype.itemsize

    def _pieces(self, start: int, stop: int) -> Iterable[tuple[slice, Tensor]]:
        """Tokens from `start` to `stop`, page by page: which, and their keys and values (2, K, some, P)."""
        while start < stop:
            first = start % PAGE
            count = min(PAGE - first, stop - start)
            part = self.pages[start // PAGE].memory[self.start : self.start + self.page_size]
            kv_2KTP = part.view(2, self.kv_heads, PAGE, self.head_dim)
            yield slice(start, start + count), kv_2KTP[:, :, first : first + count]
            start += count

    def _write(self, k_KLP: Tensor, v_KLP: Tensor, start: int) -> None:
        for span, (k, v) in self._pieces(start, start + k_KLP.shape[1]):
            new = slice(span.start - start, span.stop - start)
            k.copy_(k_KLP[:, new]), v.copy_(v_KLP[:, new])

    def extend(self, k_KLP: Tensor, v_KLP: Tensor) -> tuple[Tensor, Tensor]:
        """Add L tokens; all keys and values so far, (K, T, P)."""
        start, stop = self.length, self.length + k_KLP.shape[1]
        self._write(k_KLP, v_KLP, start)
        if stop > self.whole.shape[2]:  # by half as much more than there are: growing costs a copy
            longer = self._row(-(-max(stop, start + start // 2, PAGE) // TILE) * TILE)
            longer[:, :, : self.gathered] = self.whole[:, :, : self.gathered]
            self.whole = longer
        for span, kv_2KTP in self._pieces(self.gathered, stop):
            self.whole[:, :, span] = kv_2KTP
        self.gathered = stop
        return self.whole[0, :, :stop], self.whole[1, :, :stop]

    def cut(self, length: int) -> None:
        """Tokens from `length` on are not what they were."""
        self.gathered = min(self.gathered, length)

    @property
    def buffers(self) -> Mapping[str, Tensor]:
        return {"whole": self.whole}

    def tensors(self) -> dict[str, Tensor]:
        kv_2KTP = self._row(self.length)
        for span, part in self._pieces(0, self.length):
            kv_2KTP[:, :, span] = part
        return {"k": kv_2KTP[0], "v": kv_2KTP[1]}

    def adopt(self, tensors: dict[str, Tensor], length: int, base: int) -> None:
        self._write(tensors["k"], tensors["v"], 0)

    def shapes(self, length: int, base: int) -> dict[str, tuple[int, ...]]:
        if base != 0:
            raise ValueError("keys and values begin at the first token")
        return dict.fromkeys(("k", "v"), (self.kv_heads, length, self.head_dim))


class RecurrentState(LayerState):
    """What Mamba-1 and Mamba-2 share: S before token `base`, open inputs since, and the K − 1 columns before them.

    `columns` row i is the pre-conv input of token base − (K − 1) + i; the other inputs start at base.
    Two chunks of inputs are the most that a call leaves open.
    """

    BASE, DONE, FIRST_ADDRESS = 0, 1, 2
    history: int
    chunk: int
    columns: Tensor
    x: Tensor
    dt: Tensor
    B: Tensor
    S: Tensor

    def __init__(
        self,
        config: Mamba1Config | Mamba2Config,
        dtype: torch.dtype,
        device: torch.device,
        pool: Pool,
        *,
        channels: int,
        x: tuple[int, ...],
        dt: tuple[int, ...],
        B: tuple[int, ...],
        S: tuple[int, ...],
    ) -> None:
        super().__init__(config, dtype, device)
        self.history, self.chunk = config.conv - 1, min(config.chunk, LONGEST_CHUNK)
        self.pool, rows = pool, 2 * self.chunk
        inputs = pool.several(
            {
                "columns": ((self.history + rows, channels), dtype),
                # of a head's or group's tokens, one after another; named (L, H, P) and (L, G, N) like ops' arguments
                "x": ((*x[:-1], rows, x[-1]), dtype),
                "B": ((*B[:-1], rows, B[-1]), dtype),
                "dt": ((rows, *dt), torch.float32),
            },
            device,
        )
        self.columns, self.dt = inputs["columns"], inputs["dt"]
        self.x, self.B = inputs["x"].movedim(-2, 0), inputs["B"].movedim(-2, 0)
        self.S = pool.one(*S, dtype=torch.float32, device=device).zero_()
        self.columns[: self.history] = 0
        self._with_new: dict[str, Tensor] = {}

    @property
    def size(self) -> int:
        return self.FIRST_ADDRESS + len(self.buffers)

    def publish(self) -> None:
        addresses = [buffer.data_ptr() for buffer in self.buffers.values()]
        self.words[self.FIRST_ADDRESS : self.FIRST_ADDRESS + len(addresses)] = addresses

    @property
    def base(self) -> int:
        return int(self.words[self.BASE])

    @base.setter
    def base(self, base: int) -> None:
        self.words[self.BASE] = base

    def base_after(self, added: int) -> int:
        """What `base` will be when so many more tokens have been read."""
        return self._next_base(added) if added else self.base

    @property
    def open(self) -> int:
        """How many inputs are kept since the boundary."""
        return self.length - self.base

    @property
    def buffers(self) -> Mapping[str, Tensor]:
        return {"columns": self.columns, **self._inputs, "S": self.S}

    @property
    def _inputs(self) -> dict[str, Tensor]:
        return {"x": self.x, "dt": self.dt, "B": self.B}

    def window(self, columns_LC: Tensor) -> Tensor:
        """Take L pre-conv columns; those and the K − 1 before them, (K − 1 + L, C), for the convolution."""
        return self._append("columns", self.columns, columns_LC, self.history)[self.open :]

    def _append(self, name: str, buffer: Tensor, new: Tensor, history: int = 0) -> Tensor:
        """Everything since the boundary (and `history` rows before it), the new rows included.

        Where they fit they are written behind the open ones; `_advance` sees to the rest.
        """
        used, count = history + self.open, new.shape[0]
        if used + count <= buffer.shape[0]:
            buffer[used : used + count] = new
            whole = buffer[: used + count]
        else:
            whole = torch.cat((buffer[:used], new.to(buffer.dtype)))
        self._with_new[name] = whole
        return whole

    def _next_base(self, added: int) -> int:
        """The boundary after adding so many tokens: as late as it may be while all of them can still be cut."""
        keep = min(added, self.chunk)
        return max(self.base, (self.length + added - keep) // self.chunk * self.chunk)

    def _advance(self, base: int, S: Tensor) -> None:
        """S is the state before token `base`, the new boundary: forget the inputs before it."""
        shift = base - self.base
        self.base = LARGEST  # interrupted in the middle of this, the state is of no use, and `settle` will say so
        if S is not self.S:
            self.S.copy_(S)
        for name, whole in self._with_new.items():
            buffer, kept = self.buffers[name], whole[shift:]
            if whole.data_ptr() != buffer.data_ptr():
                buffer[: len(kept)] = kept
            elif shift:
                buffer[: len(kept)] = kept.clone()
        self._with_new = {}
        self.base = base

    def tensors(self) -> dict[str, Tensor]:
        """Without S before the first token: it is zero."""
        inputs = {name: tensor[: self.open] for name, tensor in self._inputs.items()}
        return {"columns": self.columns[: self.history + self.open], **inputs} | ({"S": self.S} if self.base else {})

    def kept(self, ending: bool) -> dict[str, Tensor]:
        """Copies of them; but S itself where this state is not used any more."""
        inputs = self.tensors()
        kept = {"S": S} if (S := inputs.pop("S", None)) is not None else {}
        if kept and not ending:
            kept = {"S": self.pool.one(*self.S.shape, dtype=self.S.dtype, device=self.device).copy_(self.S)}
        copies = self.pool.several({name: (t.shape, t.dtype) for name, t in inputs.items()}, self.device)
        return {name: copy.copy_(inputs[name]) for name, copy in copies.items()} | kept

    def adopt(self, tensors: dict[str, Tensor], length: int, base: int) -> None:
        self.base = LARGEST
        for name, tensor in tensors.items():
            self.buffers[name][: len(tensor)] = tensor
        if "S" not in tensors:
            self.S.zero_()
        self.base = base

    def shapes(self, length: int, base: int) -> dict[str, tuple[int, ...]]:
        if base % self.chunk or not 0 <= length - base <= 2 * self.chunk:
            raise ValueError("a boundary is where none can be")
        rows = dict.fromkeys(self._inputs, length - base) | {"columns": self.history + length - base}
        rows |= {"S": self.S.shape[0]} if base else {}
        return {name: (count, *self.buffers[name].shape[1:]) for name, count in rows.items()}


class Mamba2State(RecurrentState):
    """The committed state (H, N, P) float32 and the open chunk; trims by length down to `base`."""

    def __init__(self, config: Mamba2Config, dtype: torch.dtype, device: torch.device, pool: Pool) -> None:
        H, P, N, G = config.heads, config.head_dim, config.state, config.groups
        super().__init__(
            config, dtype, device, pool, channels=config.channels, x=(H, P), dt=(H,), B=(G, N), S=(H, N, P)
        )  # fmt: skip

    def extend(self, x_LHP: Tensor, dt_LH: Tensor, B_LGN: Tensor) -> tuple[Tensor, Tensor, Tensor, Tensor, int]:
        """Add L tokens (after `window`): x, dt, B of all open tokens, S before them, how many of them to commit."""
        commit = self._next_base(x_LHP.shape[0]) - self.base
        x, dt = self._append("x", self.x, x_LHP), self._append("dt", self.dt, dt_LH)
        return x, dt, self._append("B", self.B, B_LGN), self.S, commit

    def commit(self, S_HNP: Tensor, commit: int) -> None:
        """S is the state after `commit` of the open tokens."""
        self._advance(self.base + commit, S_HNP)


class Mamba1State(RecurrentState):
    """The running state (N, I), the state at `base` and the open inputs; trims by replay down to `base`."""

    RUNNING_LENGTH = -1

    def __init__(self, config: Mamba1Config, dtype: torch.dtype, device: torch.device, pool: Pool) -> None:
        I, N = config.inner, config.state
        super().__init__(config, dtype, device, pool, channels=I, x=(I,), dt=(I,), B=(N,), S=(N, I))
        self.running = pool.one(N, I, dtype=torch.float32, device=device).zero_()

    @property
    def size(self) -> int:
        return super().size + 1

    @property
    def buffers(self) -> Mapping[str, Tensor]:
        return {**super().buffers, "running": self.running}

    def scan(self, C_LN: Tensor, x_LI: Tensor, dt_LI: Tensor, A_IN: Tensor, B_LN: Tensor) -> Tensor:
        """Add L tokens (after `window`) and return their outputs (L, I) float32."""
        added, start = x_LI.shape[0], self.open
        base, length = self._next_base(added), self.length + added
        x, dt = self._append("x", self.x, x_LI), self._append("dt", self.dt, dt_LI)
        B = self._append("B", self.B, B_LN)

        def advance(S: Tensor, first: int, last: int) -> Tensor:
            return selective_scan(None, x[first:last], dt[first:last], A_IN, B[first:last], S)[1]

        S, running = self.S, self.running
        if self.words[self.RUNNING_LENGTH] != self.length:  # it was cut: replay
            running = advance(S, 0, start)
        cut = base - self.base  # the new boundary, counted in open inputs
        if 0 < cut <= start:
            S = advance(S, 0, cut)
        middle = max(cut - start, 0)  # it may lie among the new tokens: stop there on the way
        ys = []
        for part in (slice(0, middle), slice(middle, added)):
            if part.start < part.stop:
                y, running = selective_scan(C_LN[part], x_LI[part], dt_LI[part], A_IN, B_LN[part], running)
                ys.append(y)
                if part.stop == middle:
                    S = running
        self.words[self.RUNNING_LENGTH] = -1
        self.running.copy_(running)
        self._advance(base, S)
        self.words[self.RUNNING_LENGTH] = length
        return torch.cat(ys)

    def adopt(self, tensors: dict[str, Tensor], length: int, base: int) -> None:
        super().adopt(tensors, length, base)
        self.running.copy_(self.S)
        self.words[self.RUNNING_LENGTH] = base


def layer_state(config: Mixer, dtype: torch.dtype, device: torch.device, pool: Pool) -> LayerState:
    """An empty memory for one mixer; keys, values and inputs in `dtype`, S and dt in float32."""
    if isinstance(config, AttentionConfig):
        return AttentionState(config, dtype, device)
    if isinstance(config, Mamba2Config):
        return Mamba2State(config, dtype, device, pool)
    return Mamba1State(config, dtype, device, pool)


@dataclass(frozen=True)
class Snapshot:
    """What was remembered at `length`; immutable, can be restored any number of times, by any state of the network.

    Keys and values are in pages that are shared, not copied; `layers` are copies of what recurrent layers remember.
    """

    length: int
    pages: tuple[Page, ...]
    layers: tuple[tuple[dict[str, Tensor], int], ...]  # tensors and base of every recurrent layer state

    @cached_property
    def own_nbytes(self) -> int:
        """Without the pages."""
        return sum(t.nbytes for tensors, _ in self.layers for t in tensors.values())

    @property
    def oldest(self) -> int:
        """The shortest length a state restored from it can be trimmed to."""
        return max((base for _, base in self.layers), default=0)

    @property
    def nbytes(self) -> int:
        """With all of them, whoever else holds them; `nbytes_together` counts them once."""
        return self.own_nbytes + sum(page.nbytes for page in self.pages)


def nbytes_together(held: Iterable[State | Snapshot]) -> int:
    """What several states and snapshots take, pages that they share counted once.  Free pages in pools do not count."""
    pages: set[Page] = set()
    own = 0
    for one in held:
        own += one.own_nbytes
        pages.update(one.pages)
    return own + sum(page.nbytes for page in pages)


class State:
    """What a network remembers of one text: one `LayerState` per mixer of every layer.

    mixers: of every layer.  model: its fingerprint, for files.  adapter: what its rows wear (model/adapters.py).
    pool: where its memory comes from and goes back to; that of the network, so that texts leave each other theirs.
    """

    adapter: str | None = None

    FORMAT = "tiercel-state-3"
    LENGTH, PARTIALS, SEGMENTS, TABLE, HEADER = 0, 1, 2, 3, 4

    def __init__(
        self, mixers: Sequence[Sequence[Mixer]], dtype: torch.dtype, device: torch.device, model: str, pool: Pool
    ) -> None:
        self.mixers, self.dtype, self.device, self.model, self.pool = mixers, dtype, device, model, pool
        self.layers = [[layer_state(config, dtype, device, pool) for config in layer] for layer in mixers]
        self._caches = [part for part in self._parts if isinstance(part, AttentionState)]
        self._recurrent = [part for part in self._parts if isinstance(part, RecurrentState)]
        self._chunks = list({part.chunk: part for part in self._recurrent}.values())  # one of each: they move together
        self._pages = Pages(pool, sum(part.page_size for part in self._caches), dtype, device)
        start = 0
        for cache in self._caches:
            cache.pages, cache.start = self._pages, start
            start += cache.page_size
        self.words = np.zeros(self.HEADER + sum(part.size for part in self._parts), dtype=np.int64)
        at = self.HEADER
        for part in self._parts:
            part.attach(self.words, at)
            at += part.size
        self._bases = [part.at for part in self._recurrent]
        self._partials = memory(0, dtype=torch.float32, device=torch.device("cpu"))

    @property
    def _parts(self) -> list[LayerState]:
        return [part for layer in self.layers for part in layer]

    @property
    def length(self) -> int:
        """How many tokens."""
        return int(self.words[self.LENGTH])

    @length.setter
    def length(self, length: int) -> None:
        self.words[self.LENGTH] = length

    @property
    def address(self) -> int:
        """Where the words are; the same as long as the state lives."""
        return self.words.ctypes.data

    @property
    def oldest(self) -> int:
        """The shortest length `trim` can reach."""
        return int(self.words[self._bases].max()) if self._bases else 0

    def oldest_after(self, added: int) -> int:
        """What `oldest` will be when so many more tokens have been read in one forward."""
        return max((part.base_after(added) for part in self._chunks), default=0)

    @property
    def grid(self) -> int:
        """The smallest chunk of a layer: what a forward added last can be cut off, up to this; 0 means all of it."""
        return min((part.chunk for part in self._recurrent), default=0)

    @property
    def pages(self) -> Sequence[Page]:
        """Memory that others may share: each a thing of its own, with `nbytes`."""
        return self._pages

    @property
    def own_nbytes(self) -> int:
        """Bytes allocated, without the pages."""
        return sum(b.nbytes for part in self._parts for b in part.buffers.values()) + self._partials.nbytes

    @property
    def nbytes(self) -> int:
        """Bytes allocated, with all its pages, whoever else holds them; `nbytes_together` counts them once."""
        return self.own_nbytes + sum(page.nbytes for page in self._pages)

    def reserve(self, added: int) -> None:
        """Have room for so many more tokens; before every forward."""
        used = self.length
        for part in self._caches:
            part.cut(used)  # what a forward added that was interrupted
        if self._caches and not self._pages.ready(used, used + added):
            self._pages.reserve(used, used + added)
            self._publish()

    def _publish(self) -> None:
        """The pages are others: say where their table is, and have room for partial sums of so many keys."""
        segments = -(-self._pages.room // SEGMENT)
        if segments > max(1, self.words[self.SEGMENTS]):
            # a segment's result is, for each new token and head, a vector, its sum and its largest score
            row = max(part.heads * (part.head_dim + 2) for part in self._caches)
            self._partials = memory(segments * SPLIT * row, dtype=torch.float32, device=self._caches[0].device)
            self.words[self.PARTIALS : self.TABLE] = self._partials.data_ptr(), segments
        self.words[self.TABLE] = self._pages.table.ctypes.data

    def trim(self, length: int) -> bool:
        """Forget all but the first `length` tokens; pages behind them are free at once.

        False, and nothing changed, where that is not kept.
        """
        if not self.oldest <= length <= self.length:
            return False
        self.length = length
        self._cut(length)
        return True

    def _cut(self, length: int) -> None:
        self._pages.cut(length)
        for part in self._caches:
            part.cut(length)

    def settle(self) -> None:
        """Make sure that a forward can go on from here: that none was interrupted after its inputs were folded in."""
        if self.oldest > self.length:
            raise RequestError("this state was interrupted while it grew and cannot go on: start a new one")

    def snapshot(self, *, ending: bool = False) -> Snapshot:
        """A way back to here: pages shared, the rest copied; but S, which is most of it, is given away by a state that
        is not used after this (`ending`)."""
        layers = tuple((part.kept(ending), part.base) for part in self._recurrent)
        return Snapshot(self.length, self._pages.share(self.length), layers)

    def restore(self, snapshot: Snapshot) -> None:
        """Be as when the snapshot was taken."""
        self.length = 0
        self._cut(0)  # also what torch's attention has in a row: it may be another text's
        self._pages.adopt(snapshot.pages)
        if self._caches:
            self._publish()
        for part, (tensors, base) in zip(self._recurrent, snapshot.layers, strict=True):
            part.adopt(tensors, snapshot.length, base)
        self.length = snapshot.length

    def fork(self) -> State:
        """A second state that continues from here on its own."""
        twin = State(self.mixers, self.dtype, self.device, self.model, self.pool)
        twin.adapter = self.adapter
        recurrent = tuple((part.tensors(), part.base) for part in self._recurrent)
        twin.restore(Snapshot(self.length, self._pages.share(self.length), recurrent))
        return twin

    def save(self, path: str | Path, tokens: Sequence[int] = (), earlier: Sequence[Snapshot] = ()) -> None:
        """Write to a file that names the model, its dtype and our version; `Decoder.load_state` reads it.

        tokens: the text, for who reads the file.  earlier: snapshots of the same text at other lengths.
        """
        from safetensors.torch import save

        from tiercel.weights.atomic import atomic_write

        tensors = {"tokens": torch.tensor(tokens, dtype=torch.int32)} if tokens else {}
        for i, part in enumerate(self._parts):
            tensors |= {f"{i}.{k}": t.contiguous() for k, t in part.tensors().items()}
        places = []
        for j, snapshot in enumerate(earlier):
            places.append([snapshot.length, *(base for _, base in snapshot.layers)])
            for i, (layer, _) in enumerate(snapshot.layers):
                tensors |= {f"earlier.{j}.{i}.{k}": t.contiguous() for k, t in layer.items()}
        meta = self._about | {
            "length": str(self.length),
            "bases": ",".join(str(part.base) for part in self._parts),
            "earlier": ";".join(",".join(map(str, place)) for place in places),
            "sha256": BLANK,
        }
        data = save(tensors, meta)
        digest = hashlib.sha256(data).hexdigest()
        at = data.index(SUM) + len(SUM)
        with atomic_write(Path(path)) as file:
            file.write(memoryview(data)[:at])
            file.write(digest.encode())
            file.write(memoryview(data)[at + len(BLANK) :])

    @property
    def _about(self) -> dict[str, str]:
        """What must be the same where the state goes on."""
        return {
            "format": self.FORMAT,
            "version": tiercel.__version__,
            "dtype": str(self.dtype).removeprefix("torch."),
            "model": self.model,
        }

    def load(self, path: str | Path) -> tuple[list[int], list[Snapshot]]:
        """Become what was saved; the tokens and earlier snapshots that were saved with it.

        FormatError when the file is damaged or belongs to another model, dtype or version.
        """
        from safetensors import SafetensorError, safe_open

        try:
            with safe_open(str(path), framework="pt") as file:
                meta = dict(file.metadata() or {})
                for name, ours in self._about.items():
                    if meta.get(name) != ours:
                        raise FormatError(_differs(path, name, meta.get(name), ours))
                if not _sum_matches(Path(path)):
                    raise FormatError(f"{path} is damaged: its checksum does not match")
                length, bases = int(meta["length"]), [int(b) for b in meta["bases"].split(",")]
                places = [[int(n) for n in place.split(",")] for place in meta["earlier"].split(";") if place]
                expected = self._shapes(length, bases, places)
                if "tokens" in file.keys():  # noqa: SIM118  (a file, not a dict)
                    expected["tokens"] = (length,)
                if set(file.keys()) != set(expected):
                    raise FormatError(f"{path} does not hold the layers of this model")
                for name, shape in expected.items():
                    if tuple(file.get_slice(name).get_shape()) != shape:
                        raise FormatError(f"{path}: {name} has an unexpected shape")
                tensors = {name: file.get_tensor(name) for name in expected}
        except (OSError, SafetensorError, KeyError, ValueError) as error:
            raise FormatError(f"{path} cannot be read as a saved state: {error}") from error
        self.length = 0
        self._cut(0)
        self.reserve(length)
        for i, (part, base) in enumerate(zip(self._parts, bases, strict=True)):
            part.adopt({k: tensors[f"{i}.{k}"] for k in part.shapes(length, base)}, length, base)
        self.length = length
        return tensors["tokens"].tolist() if "tokens" in tensors else [], self._earlier(places, tensors)

    def _earlier(self, places: list[list[int]], tensors: dict[str, Tensor]) -> list[Snapshot]:
        """Snapshots of the first tokens of this text, from what a file holds."""
        pages = self._pages.share(self.length)
        out = []
        for j, (length, *bases) in enumerate(places):
            layers = [
                ({k: tensors[f"earlier.{j}.{i}.{k}"] for k in part.shapes(length, base)}, base)
                for i, (part, base) in enumerate(zip(self._recurrent, bases, strict=True))
            ]
            out.append(Snapshot(length, pages[: -(-length // PAGE)], tuple(layers)))
        return out

    def _shapes(self, length: int, bases: list[int], places: list[list[int]]) -> dict[str, tuple[int, ...]]:
        """Of every tensor that a file with these lengths must hold."""
        counts = [len(self._parts), *(len(self._recurrent) for _ in places)]
        texts = [(length, bases), *((place[0], place[1:]) for place in places)]
        for (end, starts), count in zip(texts, counts, strict=True):
            if len(starts) != count or not all(0 <= start <= end <= length < LARGEST for start in starts):
                raise ValueError("its lengths do not fit together")
        out: dict[str, tuple[int, ...]] = {}
        for i, (part, base) in enumerate(zip(self._parts, bases, strict=True)):
            out |= {f"{i}.{k}": shape for k, shape in part.shapes(length, base).items()}
        for j, (end, *starts) in enumerate(places):
            for i, (part, base) in enumerate(zip(self._recurrent, starts, strict=True)):
                out |= {f"earlier.{j}.{i}.{k}": shape for k, shape in part.shapes(end, base).items()}
        return out


BLANK, SUM = "0" * 64, b'"sha256":"'  # the checksum is of the whole file with zeros in its own place


def _sum_matches(path: Path) -> bool:
    with path.open("rb") as file:
        size = file.read(8)
        header = file.read(int.from_bytes(size, "little"))
        at = header.find(SUM) + len(SUM)
        digest = hashlib.sha256(size + header[:at] + BLANK.encode() + header[at + len(BLANK) :])
        while block := file.read(1 << 20):
            digest.update(block)
    return header[at : at + len(BLANK)] == digest.hexdigest().encode()


def _differs(path: str | Path, name: str, theirs: str | None, ours: str) -> str:
    if theirs is None or name == "format":
        return f"{path} is not a saved state of this version ({ours})"
    if name == "model":
        return f"{path} was saved by another model or dtype and cannot continue in this one"
    return f"{path} was saved with {name} {theirs[:40]} and cannot continue with {ours}: read the text again"
