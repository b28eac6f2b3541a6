"""What a layer remembers, and how far back it can be cut.

Attention remembers keys and values: a cache that can be cut at any token.  A recurrent state cannot: it
exists only where somebody kept it.  Mamba-2's chunked form needs the state only where a chunk starts, so
its layer keeps

    the committed state S at a chunk boundary `base`, and the open inputs since then (pre-conv columns, x, B, dt)

A step reads S and does not write it; S is rewritten once per chunk.  Cutting back to any token since `base`
is then a change of `length`.  The boundary moves on lazily, at the next call, so whatever the last call
added (up to a chunk of it) can always be taken back: verify k drafted tokens, keep a of them, trim.
Mamba-1 decays per channel and state and has no chunked form: its layer keeps the running state too, and
cutting back replays the open inputs (no matrix product is repeated).

Everybody else only asks:

    length · oldest · trim(n) → bool · snapshot() / restore(s) · fork() · nbytes · save(path)

Boundaries are absolute multiples of the chunk, so prefill, chunked prefill and decode meet the same grid.
Letters: K conv kernel, C conv channels, H heads, P head dim, N state, G groups, I inner width, L new tokens.
"""

from __future__ import annotations

import hashlib
from abc import ABC, abstractmethod
from collections.abc import Sequence
from dataclasses import dataclass
from pathlib import Path

import torch
from torch import Tensor

from tiercel.errors import FormatError, RequestError
from tiercel.model.config import AttentionConfig, LARGEST, Mamba1Config, Mamba2Config, Mixer
from tiercel.ops.scan import selective_scan


class LayerState(ABC):
    """What one mixer remembers of one text."""

    length: int = 0
    base: int = 0  # nothing before this token can be cut

    @abstractmethod
    def tensors(self) -> dict[str, Tensor]:
        """What is remembered, as views of exactly the valid part."""

    @abstractmethod
    def adopt(self, tensors: dict[str, Tensor], length: int, base: int) -> None:
        """Remember these instead; the tensors are copied.  Shapes are the caller's promise."""

    @abstractmethod
    def shapes(self, length: int, base: int) -> dict[str, tuple[int, ...]]:
        """The shapes `tensors` has at such a length and base: what a file is checked against."""

    @property
    @abstractmethod
    def buffers(self) -> Sequence[Tensor]:
        """Everything allocated."""


def _grown(buffer: Tensor, used: int, needed: int, dim: int) -> Tensor:
    """The buffer itself when `needed` fits, else a longer one (half as much again) with the used part copied."""
    if needed <= buffer.shape[dim]:
        return buffer
    shape = list(buffer.shape)
    shape[dim] = max(needed, used + used // 2, 64)
    longer = buffer.new_empty(shape)
    longer.narrow(dim, 0, used).copy_(buffer.narrow(dim, 0, used))
    return longer


class AttentionState(LayerState):
    """Keys and values of every token, (K, T, D); trims by length."""

    def __init__(self, config: AttentionConfig, dtype: torch.dtype, device: torch.device) -> None:
        self.k = torch.empty(config.kv_heads, 0, config.head_dim, dtype=dtype, device=device)
        self.v = torch.empty_like(self.k)

    def extend(self, k_KLD: Tensor, v_KLD: Tensor) -> tuple[Tensor, Tensor]:
        """Add L tokens; all keys and values so far, (K, T, D)."""
        start, stop = self.length, self.length + k_KLD.shape[1]
        self.k, self.v = _grown(self.k, start, stop, 1), _grown(self.v, start, stop, 1)
        self.k[:, start:stop], self.v[:, start:stop] = k_KLD, v_KLD
        self.length = stop
        return self.k[:, :stop], self.v[:, :stop]

    def tensors(self) -> dict[str, Tensor]:
        return {"k": self.k[:, : self.length], "v": self.v[:, : self.length]}

    def adopt(self, tensors: dict[str, Tensor], length: int, base: int) -> None:
        self.k, self.v, self.length = tensors["k"].clone(), tensors["v"].clone(), length

    def shapes(self, length: int, base: int) -> dict[str, tuple[int, ...]]:
        heads, _, dim = self.k.shape
        return {"k": (heads, length, dim), "v": (heads, length, dim)}

    @property
    def buffers(self) -> Sequence[Tensor]:
        return (self.k, self.v)


class RecurrentState(LayerState):
    """What Mamba-1 and Mamba-2 share: open inputs since `base`, and the K − 1 columns before them.

    `columns` row i is the pre-conv input of token base − (K − 1) + i; the other inputs start at base.
    """

    inputs: tuple[str, ...] = ("columns",)

    def __init__(self, kernel: int, channels: int, chunk: int, dtype: torch.dtype, device: torch.device) -> None:
        self.history, self.chunk = kernel - 1, chunk
        self.columns = torch.zeros(self.history, channels, dtype=dtype, device=device)

    @property
    def open(self) -> int:
        """How many inputs are kept since the boundary."""
        return self.length - self.base

    def window(self, columns_LC: Tensor) -> Tensor:
        """Remember L pre-conv columns; those and the K − 1 before them, (K − 1 + L, C), for the convolution."""
        return self._append("columns", columns_LC, self.history)[self.open :]

    def _append(self, name: str, new: Tensor, history: int = 0) -> Tensor:
        """Write new rows behind the open ones; everything since the boundary (and `history` rows before it)."""
        used = history + self.open
        buffer = _grown(getattr(self, name), used, used + new.shape[0], 0)
        buffer[used : used + new.shape[0]] = new
        setattr(self, name, buffer)
        return buffer[: used + new.shape[0]]

    def _next_base(self, added: int) -> int:
        """The boundary after adding so many tokens: as late as it may be while all of them can still be cut."""
        keep = min(added, self.chunk)
        return max(self.base, (self.length + added - keep) // self.chunk * self.chunk)

    def _advance(self, added: int, base: int) -> None:
        """Take note of the new tokens and forget the inputs before the new boundary."""
        shift, self.length, self.base = base - self.base, self.length + added, base
        if shift:
            for name in self.inputs:
                kept = getattr(self, name)[shift:][: self.open + (self.history if name == "columns" else 0)]
                setattr(self, name, kept.clone())

    def tensors(self) -> dict[str, Tensor]:
        return {
            name: getattr(self, name)[: self.open + (self.history if name == "columns" else 0)] for name in self.inputs
        }

    def adopt(self, tensors: dict[str, Tensor], length: int, base: int) -> None:
        self.length, self.base = length, base
        for name, tensor in tensors.items():
            setattr(self, name, tensor.clone())

    def shapes(self, length: int, base: int) -> dict[str, tuple[int, ...]]:
        rows = {name: length - base + (self.history if name == "columns" else 0) for name in self.inputs}
        return {name: (rows[name], *getattr(self, name).shape[1:]) for name in self.inputs}

    @property
    def buffers(self) -> Sequence[Tensor]:
        return [getattr(self, name) for name in self.inputs]


class Mamba2State(RecurrentState):
    """The committed state (H, P, N) float32 and the open chunk; trims by length down to `base`."""

    inputs = ("columns", "x", "dt", "B")

    def __init__(self, config: Mamba2Config, dtype: torch.dtype, device: torch.device) -> None:
        super().__init__(config.conv, config.channels, config.chunk, dtype, device)
        H, P, N, G = config.heads, config.head_dim, config.state, config.groups
        self.S = torch.zeros(H, P, N, device=device)
        self.x = torch.empty(0, H, P, dtype=dtype, device=device)
        self.B = torch.empty(0, G, N, dtype=dtype, device=device)
        self.dt = torch.empty(0, H, device=device)

    def extend(self, x_LHP: Tensor, dt_LH: Tensor, B_LGN: Tensor) -> tuple[Tensor, Tensor, Tensor, Tensor, int]:
        """Add L tokens (after `window`): x, dt, B of all open tokens, S before them, how many of them to commit."""
        commit = self._next_base(x_LHP.shape[0]) - self.base
        return self._append("x", x_LHP), self._append("dt", dt_LH), self._append("B", B_LGN), self.S, commit

    def commit(self, S_HPN: Tensor, added: int, commit: int) -> None:
        """S is the state after `commit` of the open tokens; `added` tokens are new."""
        self.S = S_HPN
        self._advance(added, self.base + commit)

    def tensors(self) -> dict[str, Tensor]:
        return super().tensors() | {"S": self.S}

    def shapes(self, length: int, base: int) -> dict[str, tuple[int, ...]]:
        return super().shapes(length, base) | {"S": tuple(self.S.shape)}

    @property
    def buffers(self) -> Sequence[Tensor]:
        return [*super().buffers, self.S]


class Mamba1State(RecurrentState):
    """The running state (I, N), the state at `base` and the open inputs; trims by replay down to `base`."""

    inputs = ("columns", "x", "dt", "B")

    def __init__(self, config: Mamba1Config, dtype: torch.dtype, device: torch.device) -> None:
        super().__init__(config.conv, config.inner, config.chunk, dtype, device)
        I, N = config.inner, config.state
        self.S = torch.zeros(I, N, device=device)  # before token `base`
        self.running, self.running_length = self.S, 0
        self.x = torch.empty(0, I, dtype=dtype, device=device)
        self.dt = torch.empty(0, I, device=device)
        self.B = torch.empty(0, N, dtype=dtype, device=device)

    def scan(self, C_LN: Tensor, x_LI: Tensor, dt_LI: Tensor, A_IN: Tensor, B_LN: Tensor) -> Tensor:
        """Add L tokens (after `window`) and return their outputs (L, I) float32."""
        added, start = x_LI.shape[0], self.open
        base = self._next_base(added)
        x, dt, B = self._append("x", x_LI), self._append("dt", dt_LI), self._append("B", B_LN)

        def advance(S: Tensor, first: int, last: int) -> Tensor:
            return selective_scan(None, x[first:last], dt[first:last], A_IN, B[first:last], S)[1]

        if self.running_length != self.length:  # it was cut: replay
            self.running = advance(self.S, 0, start)
        cut = base - self.base  # the new boundary, counted in open inputs
        if 0 < cut <= start:
            self.S = advance(self.S, 0, cut)
        middle = max(cut - start, 0)  # it may lie among the new tokens: stop there on the way
        ys = []
        for part in (slice(0, middle), slice(middle, added)):
            if part.start < part.stop:
                y, self.running = selective_scan(C_LN[part], x_LI[part], dt_LI[part], A_IN, B_LN[part], self.running)
                ys.append(y)
                if part.stop == middle:
                    self.S = self.running
        self._advance(added, base)
        self.running_length = self.length
        return torch.cat(ys)

    def tensors(self) -> dict[str, Tensor]:
        return super().tensors() | {"S": self.S}

    def adopt(self, tensors: dict[str, Tensor], length: int, base: int) -> None:
        super().adopt(tensors, length, base)
        self.running, self.running_length = self.S, self.base

    def shapes(self, length: int, base: int) -> dict[str, tuple[int, ...]]:
        return super().shapes(length, base) | {"S": tuple(self.S.shape)}

    @property
    def buffers(self) -> Sequence[Tensor]:
        return [*super().buffers, self.S, self.running]


def layer_state(config: Mixer, dtype: torch.dtype, device: torch.device) -> LayerState:
    """An empty memory for one mixer."""
    if isinstance(config, AttentionConfig):
        return AttentionState(config, dtype, device)
    if isinstance(config, Mamba2Config):
        return Mamba2State(config, dtype, device)
    return Mamba1State(config, dtype, device)


@dataclass(frozen=True)
class Snapshot:
    """A copy of what was remembered at `length`; immutable, can be restored any number of times."""

    length: int
    layers: tuple[tuple[dict[str, Tensor], int], ...]  # tensors and base of every layer state

    @property
    def nbytes(self) -> int:
        return sum(t.nbytes for tensors, _ in self.layers for t in tensors.values())


class State:
    """What a network remembers of one text: one `LayerState` per mixer of every layer."""

    FORMAT = "tiercel-state-1"

    def __init__(self, layers: Sequence[Sequence[LayerState]], model: str) -> None:
        self.layers, self.model, self.length = layers, model, 0

    @property
    def _parts(self) -> list[LayerState]:
        return [part for layer in self.layers for part in layer]

    @property
    def oldest(self) -> int:
        """The shortest length `trim` can reach."""
        return max(part.base for part in self._parts)

    @property
    def nbytes(self) -> int:
        """Bytes allocated."""
        return sum(buffer.nbytes for part in self._parts for buffer in part.buffers)

    def trim(self, length: int) -> bool:
        """Forget all but the first `length` tokens.  False, and nothing changed, where that is not kept."""
        if not self.oldest <= length <= self.length:
            return False
        self.length = length
        self.settle()
        return True

    def settle(self) -> None:
        """Bring every layer to `length`: after a trim, or after a forward that was interrupted half way."""
        for part in self._parts:
            if part.length != self.length:
                if not part.base <= self.length <= part.length:
                    raise RequestError("this state was interrupted while it grew and cannot go on: start a new one")
                part.length = self.length

    def snapshot(self) -> Snapshot:
        """A copy to come back to."""
        layers = [({k: t.clone() for k, t in part.tensors().items()}, part.base) for part in self._parts]
        return Snapshot(self.length, tuple(layers))

    def restore(self, snapshot: Snapshot) -> None:
        """Be as when the snapshot was taken."""
        self.length = snapshot.length
        for part, (tensors, base) in zip(self._parts, snapshot.layers, strict=True):
            part.adopt(tensors, snapshot.length, base)

    def fork(self) -> State:
        """A second state that continues from here on its own."""
        twin = State([[part.__class__.__new__(part.__class__) for part in layer] for layer in self.layers], self.model)
        twin.length = self.length
        for new, part in zip(twin._parts, self._parts, strict=True):
            new.__dict__.update(part.__dict__)
            new.adopt(part.tensors(), part.length, part.base)
        return twin

    def save(self, path: str | Path) -> None:
        """Write to a file that names the model; `Decoder.load_state` reads it."""
        from safetensors.torch import save

        from tiercel.weights.atomic import atomic_write

        tensors = {}
        for i, part in enumerate(self._parts):
            tensors |= {f"{i}.{k}": t.contiguous() for k, t in part.tensors().items()}
        bases = ",".join(str(part.base) for part in self._parts)
        meta = {"format": self.FORMAT, "model": self.model, "length": str(self.length), "bases": bases}
        meta["sha256"] = _digest(tensors, meta)
        with atomic_write(Path(path)) as file:
            file.write(save(tensors, meta))

    def load(self, path: str | Path) -> None:
        """Become what was saved.  FormatError when the file is damaged or belongs to another model."""
        from safetensors import SafetensorError, safe_open

        tensors: dict[str, Tensor] = {}
        try:
            with safe_open(str(path), framework="pt") as file:
                meta = dict(file.metadata() or {})
                if meta.get("format") != self.FORMAT:
                    raise FormatError(f"{path} is not a saved state of this version ({self.FORMAT})")
                if meta.get("model") != self.model:
                    raise FormatError(f"{path} was saved by another model or dtype and cannot continue in this one")
                length, bases = int(meta["length"]), [int(b) for b in meta["bases"].split(",")]
                expected = self._shapes(length, bases)
                if set(file.keys()) != set(expected):
                    raise FormatError(f"{path} does not hold the layers of this model")
                for name, shape in expected.items():
                    if tuple(file.get_slice(name).get_shape()) != shape:
                        raise FormatError(f"{path}: {name} has an unexpected shape")
                    tensors[name] = file.get_tensor(name)
        except (OSError, SafetensorError, KeyError, ValueError) as error:
            raise FormatError(f"{path} cannot be read as a saved state: {error}") from error
        if meta.pop("sha256", None) != _digest(tensors, meta):
            raise FormatError(f"{path} is damaged: its checksum does not match")
        layers = []
        for i, (part, base) in enumerate(zip(self._parts, bases, strict=True)):
            layers.append(({k: tensors[f"{i}.{k}"] for k in part.shapes(length, base)}, base))
        self.restore(Snapshot(length, tuple(layers)))

    def _shapes(self, length: int, bases: list[int]) -> dict[str, tuple[int, ...]]:
        if len(bases) != len(self._parts) or not all(0 <= base <= length < LARGEST for base in bases):
            raise ValueError("its lengths do not fit together")
        parts = enumerate(zip(self._parts, bases, strict=True))
        return {f"{i}.{k}": shape for i, (part, base) in parts for k, shape in part.shapes(length, base).items()}


def _digest(tensors: dict[str, Tensor], meta: dict[str, str]) -> str:
    h = hashlib.sha256(repr(sorted(meta.items())).encode())
    for name in sorted(tensors):
        h.update(name.encode())
        h.update(tensors[name].contiguous().view(torch.uint8).numpy().data)
    return h.hexdigest()
