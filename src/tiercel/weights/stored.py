"""Tensors in files, a few rows at a time: read from one, written to another, never whole in memory twice.

Files are read by position from an open descriptor and not mapped: pages do not stay resident beside
the tensors made of them, and a file that shrinks while it is read is a FormatError, not a signal.
"""

from __future__ import annotations

import math
import os
import stat
import threading
import weakref
from collections.abc import Callable, Iterator
from dataclasses import dataclass
from pathlib import Path
from typing import TYPE_CHECKING, Protocol

from tiercel.errors import FormatError, RequestError
from tiercel.quant import PACKED_TYPES, dequantize, fits, row_bytes

if TYPE_CHECKING:
    import torch
    from torch import Tensor

PLAIN: dict[str, tuple[str, int]] = {  # name in files: name in torch, bytes of a value
    "F64": ("float64", 8),
    "F32": ("float32", 4),
    "F16": ("float16", 2),
    "BF16": ("bfloat16", 2),
    "I64": ("int64", 8),
    "I32": ("int32", 4),
    "I16": ("int16", 2),
    "I8": ("int8", 1),
    "U8": ("uint8", 1),
    "BOOL": ("bool", 1),
}
WRITE_BYTES = 16 << 20  # what a tensor on its way out takes at a time


class File:
    """A regular file opened for reading; every read names its position and is checked against the size."""

    def __init__(self, path: Path) -> None:
        self.path = path
        self._lock = threading.Lock()
        try:  # a pipe would block on open, so it is opened without waiting and then refused
            self._descriptor = os.open(path, os.O_RDONLY | getattr(os, "O_BINARY", 0) | getattr(os, "O_NONBLOCK", 0))
        except (OSError, ValueError) as error:
            raise FormatError(f"cannot open {path}: {getattr(error, 'strerror', None) or error}") from error
        self.close = weakref.finalize(self, os.close, self._descriptor)  # called once, at exit at the latest
        status = os.fstat(self._descriptor)
        self.size = status.st_size
        if not stat.S_ISREG(status.st_mode):
            self.close()
            raise FormatError(f"cannot open {path}: it is not a regular file")

    def read(self, offset: int, count: int) -> bytes:
        buffer = bytearray(count)
        self.read_into(memoryview(buffer), offset)
        return bytes(buffer)

    def read_into(self, buffer: memoryview, offset: int) -> None:
        """Fills `buffer` from `offset` on.  Raises FormatError when the file has become too short."""
        assert self.close.alive, f"{self.path} is closed"
        done = 0
        while done < len(buffer):
            try:
                count = self._read_some(buffer[done:], offset + done)
            except OSError as error:
                raise FormatError(f"cannot read {self.path} at byte {offset + done}: {error.strerror}") from error
            if count == 0:
                size = os.fstat(self._descriptor).st_size
                raise FormatError(f"{self.path} has shrunk from {self.size} to {size} bytes; fetch it again")
            done += count

    def _read_some(self, buffer: memoryview, offset: int) -> int:
        if hasattr(os, "preadv"):
            return os.preadv(self._descriptor, [buffer], offset)
        with self._lock:  # Windows has one position per descriptor
            os.lseek(self._descriptor, offset, os.SEEK_SET)
            data = os.read(self._descriptor, len(buffer))
        buffer[: len(data)] = data
        return len(data)


def torch_dtype(type: str) -> torch.dtype:
    """What values of a stored type become: the same, float32 for packed types."""
    import torch

    dtype = getattr(torch, PLAIN[type][0] if type in PLAIN else "float32")
    assert isinstance(dtype, torch.dtype)
    return dtype


def bytes_of(type: str, shape: tuple[int, ...]) -> int | None:
    """What a tensor takes in a file, or None when its last axis is not made of whole blocks."""
    if type in PLAIN:
        return math.prod(shape) * PLAIN[type][1]
    if 0 in shape:
        return 0
    return math.prod(shape[:-1]) * row_bytes(type, shape[-1]) if shape and fits(type, shape[-1]) else None


class Stored(Protocol):
    """A tensor lying in files, read on demand: one piece of a file, or several that belong together."""

    @property
    def name(self) -> str: ...
    @property
    def shape(self) -> tuple[int, ...]: ...
    @property
    def type(self) -> str: ...
    @property
    def nbytes(self) -> int: ...
    @property
    def dtype(self) -> torch.dtype: ...
    def rows(self, start: int = 0, stop: int | None = None) -> Tensor: ...
    def raw(self, start: int = 0, stop: int | None = None) -> Tensor: ...


@dataclass(frozen=True)
class Concatenated:
    """Stored tensors, one below the other."""

    parts: tuple[Stored, ...]

    @property
    def names(self) -> tuple[str, ...]:
        return tuple(part.name for part in self.parts)

    @property
    def name(self) -> str:
        return self.parts[0].name

    @property
    def shape(self) -> tuple[int, ...]:
        return (sum(part.shape[0] for part in self.parts), *self.parts[0].shape[1:])

    @property
    def type(self) -> str:
        return self.parts[0].type

    @property
    def nbytes(self) -> int:
        return sum(part.nbytes for part in self.parts)

    @property
    def dtype(self) -> torch.dtype:
        return self.parts[0].dtype

    def rows(self, start: int = 0, stop: int | None = None) -> Tensor:
        return self._read("rows", start, stop)

    def raw(self, start: int = 0, stop: int | None = None) -> Tensor:
        return self._read("raw", start, stop)

    def _read(self, how: str, start: int, stop: int | None) -> Tensor:
        import torch

        stop, found, first = self.shape[0] if stop is None else stop, [], 0
        for part in self.parts:
            a, b = max(start - first, 0), min(stop - first, part.shape[0])
            if a < b:
                found.append(getattr(part, how)(a, b))
            first += part.shape[0]
        return torch.cat(found)


@dataclass(frozen=True, slots=True)
class StoredTensor:
    """A tensor lying in a file, read on demand.

    shape: torch order, outermost axis first · type: as the file says, "F32", "BF16", "Q4_K", … (PLAIN, PACKED_TYPES)
    """

    name: str
    shape: tuple[int, ...]
    type: str
    nbytes: int
    file: File
    offset: int

    @property
    def dtype(self) -> torch.dtype:
        """What `rows` returns: the stored dtype, float32 for packed types."""
        return torch_dtype(self.type)

    def rows(self, start: int = 0, stop: int | None = None) -> Tensor:
        """Rows start … stop of the first axis, freshly allocated; a scalar has one row and keeps its shape ().

        Raises FormatError when the file has become shorter since it was opened.
        """
        raw = self.raw(start, stop)
        if self.type in PACKED_TYPES:
            return dequantize(self.type, raw)
        values = raw.ne(0) if self.type == "BOOL" else raw.view(-1).view(self.dtype)
        return values.view(self._shape(start, stop))

    def raw(self, start: int = 0, stop: int | None = None) -> Tensor:
        """The same rows as the file's own bytes: uint8, the last axis counted in bytes.

        Rows of a packed tensor with one axis are its values: start and stop must fall between blocks.
        """
        from tiercel.runtime.workspace import workspace

        shape = self._shape(start, stop)
        begin = bytes_of(self.type, (start, *self.shape[1:])) if self.shape else 0
        count, last = bytes_of(self.type, shape), bytes_of(self.type, shape[-1:])
        assert begin is not None and count is not None and last is not None, f"{self.name}: rows {start}:{stop}"
        raw = workspace(count)
        self.file.read_into(raw.numpy().data, self.offset + begin)
        return raw.view(*shape[:-1], last)

    def _shape(self, start: int, stop: int | None) -> tuple[int, ...]:
        count = self.shape[0] if self.shape else 1
        stop = count if stop is None else stop
        assert 0 <= start <= stop <= count, f"rows {start}:{stop} of {count}"
        return (stop - start, *self.shape[1:]) if self.shape else ()


@dataclass(frozen=True, slots=True)
class OutTensor:
    """A tensor to be written, made in row blocks: rows(start, stop) gives rows of the first axis in any dtype.

    type: "F32" "F16" "BF16", another name of PLAIN, or a packed type: then rows may come packed (uint8, the last axis
    in bytes), or as floats and are packed here.  A scalar is asked for rows(0, 1).
    """

    name: str
    shape: tuple[int, ...]
    type: str
    rows: Callable[[int, int], Tensor]

    @property
    def nbytes(self) -> int:
        nbytes = bytes_of(self.type, self.shape)
        assert nbytes is not None, f"{self.name}: {self.shape} is not made of blocks of {self.type}"
        return nbytes

    def blocks(self) -> Iterator[memoryview]:
        """The tensor's bytes in order, rounded to `type` once, to nearest even.

        Raises RequestError for finite values that float16 cannot hold: they would be written as infinity.
        """
        count = self.shape[0] if self.shape else 1
        step = max(1, WRITE_BYTES * count // max(1, self._wide_bytes))
        for start in range(0, count if self.nbytes else 0, step):
            stop = min(count, start + step)
            block = self.rows(start, stop).detach()
            if self.type in PACKED_TYPES:
                yield self._packed(block, stop - start)
                continue
            assert block.numel() * count == math.prod(self.shape) * (stop - start), f"{self.name} rows {start}:{stop}"
            yield self._rounded(block)

    @property
    def _wide_bytes(self) -> int:
        """What the tensor takes on its way: floats become packed rows."""
        return math.prod(self.shape) * 4 if self.type in PACKED_TYPES else self.nbytes

    def _packed(self, block: Tensor, rows: int) -> memoryview:
        import torch

        if block.dtype != torch.uint8:
            block = pack(self.name, self.type, block)
        expected = bytes_of(self.type, (rows, *self.shape[1:]))
        assert block.numel() == expected, f"{self.name}: {block.numel()} bytes where {expected} are due"
        return block.contiguous().view(-1).numpy().data

    def _rounded(self, block: Tensor) -> memoryview:
        import torch

        flat = block.to(torch_dtype(self.type)).contiguous().view(-1)
        if self.type == "F16" and block.dtype != torch.float16 and flat.isinf().sum() > block.isinf().sum():
            raise RequestError(f"{self.name} has values beyond 65504 that F16 cannot hold; write BF16 or F32")
        return flat.cpu().view(torch.uint8).numpy().data


def pack(name: str, type: str, x: Tensor, importance: Tensor | None = None) -> Tensor:
    """(…, n) floats → (…, bytes) uint8.  RequestError names the tensor that a type cannot hold."""
    from tiercel.ops.quantize import quantize

    try:
        packed = quantize(type, x.reshape(-1, x.shape[-1]), importance)
    except RequestError as error:
        raise RequestError(f"{name}: {error}") from error
    return packed.view(*x.shape[:-1], packed.shape[-1])
