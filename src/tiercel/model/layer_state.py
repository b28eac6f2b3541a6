"""What a layer remembers of a text, and how far back it can be cut.

Attention remembers keys and values: a cache that can be cut at any token, in pages that texts share (pages.py).  A
recurrent state cannot: it exists only where somebody kept it.  Mamba-2's chunked form needs the state only where a
chunk starts, so its layer keeps

    the committed state S at a chunk boundary `base`, and the open inputs since then (pre-conv columns, x, B, dt)

A step reads S and does not write it; S is rewritten once per chunk.  Cutting back to any token since `base`
is then a change of `length`.  The boundary moves on lazily, at the next call, so whatever the last call
added (up to a chunk of it) can always be taken back: verify k drafted tokens, keep a of them, trim.
Mamba-1 decays per channel and state and has no chunked form: its layer keeps the running state too, and
cutting back replays the open inputs (no matrix product is repeated).

Boundaries are absolute multiples of the chunk, so prefill, chunked prefill and decode meet the same grid.

Kernels read and write the same memory.  They find it through words, int64s at an address that stays (state.py):

    attention  byte of a page where its keys begin · for each kv head a counter of a kernel's finished pieces
    recurrent  base · a counter · addresses of columns, x, dt, B, S · Mamba-1: address of the running state, its length

Letters: K conv kernel or kv heads, C conv channels, H heads, P head dim, N state, G groups, I inner width, T tokens.
"""

from __future__ import annotations

from abc import ABC, abstractmethod
from collections.abc import Iterable, Mapping

import numpy as np
import torch
from torch import Tensor

from tiercel.errors import RequestError
from tiercel.mixers.attention.config import AttentionConfig
from tiercel.mixers.checks import LARGEST
from tiercel.mixers.mamba1.config import Mamba1Config
from tiercel.mixers.mamba1.reference import selective_scan
from tiercel.mixers.mamba2.config import Mamba2Config
from tiercel.model.config import Mixer
from tiercel.model.pages import PAGE, Pages
from tiercel.runtime.allocator import CachingAllocator, memory

TILE = 32  # keys that kernels read together: pages are whole tiles
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
        pool: CachingAllocator,
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
        self.base = LARGEST  # interrupted in the middle of this, the state is of no use, and `validate` will say so
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

    def __init__(self, config: Mamba2Config, dtype: torch.dtype, device: torch.device, pool: CachingAllocator) -> None:
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

    def __init__(self, config: Mamba1Config, dtype: torch.dtype, device: torch.device, pool: CachingAllocator) -> None:
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


def layer_state(config: Mixer, dtype: torch.dtype, device: torch.device, pool: CachingAllocator) -> LayerState:
    """An empty memory for one mixer; keys, values and inputs in `dtype`, S and dt in float32."""
    if isinstance(config, AttentionConfig):
        return AttentionState(config, dtype, device)
    if isinstance(config, Mamba2Config):
        return Mamba2State(config, dtype, device, pool)
    if isinstance(config, Mamba1Config):
        return Mamba1State(config, dtype, device, pool)
    raise RequestError(f"there is no state for {config.kind} layers")
