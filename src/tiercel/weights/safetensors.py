"""safetensors: the weight format without code in it; one file, or a folder with an index over shards.

    length u64 · JSON header of that many bytes · data

    header   {"name": {"dtype": "BF16", "shape": [4096, 1024], "data_offsets": [begin, end]}, …,
              "__metadata__": {"format": "pt"}}              offsets count from the end of the header

The rules are those of the `safetensors` library (README, "Format"), and a file that it refuses is
refused here: no key twice, data without holes or overlaps, from the header to the last byte.
The library maps the file, so that its pages stay resident beside the tensors made of them; this
reader takes rows by position.
"""

from __future__ import annotations

import itertools
import json
import math
import re
import struct
import warnings
from collections.abc import Sequence
from pathlib import Path
from types import TracebackType
from typing import Any

from tiercel.errors import FormatError, RequestError, UnsupportedError
from tiercel.runtime.atomic import atomic_write
from tiercel.weights.stored import PLAIN, File, OutTensor, StoredTensor, bytes_of

HEADER_BYTES = 100_000_000
INDEX_BYTES = 64 << 20
MAX_TENSORS = 1_000_000
MAX_SHARDS = 512
MAX_NAME_BYTES = 256
MAX_AXES = 16
MAX_INT = 1 << 63

SINGLE = "model.safetensors"
INDEX = "model.safetensors.index.json"
SHARD = re.compile(r"[A-Za-z0-9._-]+\.safetensors")
OWN_SHARD = re.compile(r"model-\d{5}-of-\d{5}\.safetensors", re.ASCII)  # the names `write_safetensors` gives
UNREAD = re.compile(r"(F4|F6|F8)(_\w+)?|U16|U32|U64|C64", re.ASCII)


class SafetensorsFolder:
    """Open safetensors: `tensors` by name, `metadata` of all shards (the first to name a key wins).

    path: one file, or a folder holding model.safetensors or shards with model.safetensors.index.json.
    Raises FormatError for anything unsound, UnsupportedError for dtypes without a reader.
    """

    def __init__(self, path: str | Path) -> None:
        self.tensors: dict[str, StoredTensor] = {}
        self.metadata: dict[str, str] = {}
        self._files: list[File] = []
        path = Path(path)
        try:
            if not path.is_dir():
                self._add(path)
            elif (path / INDEX).exists() and not _stale(path):
                self._add_shards(path)
            elif (path / SINGLE).exists():
                self._add(path / SINGLE)
            else:
                raise FormatError(_nothing_in(path))
        except OSError as error:
            self.close()
            raise FormatError(f"cannot open {path}: {error.strerror or error}") from error
        except BaseException:
            self.close()
            raise

    def _add(self, path: Path, names: set[str] | None = None) -> set[str]:
        """Add a file's tensors, those of `names` only where it is given; the names of all it holds."""
        self._files.append(File(path))
        tensors, metadata = _read_file(self._files[-1])
        self.tensors |= {name: tensor for name, tensor in tensors.items() if names is None or name in names}
        self.metadata = metadata | self.metadata
        return set(tensors)

    def _add_shards(self, folder: Path) -> None:
        """Every tensor comes from the shard that the index names; what else a shard holds is left out."""
        index = folder / INDEX
        for shard, names in _read_index(index).items():
            if not (folder / shard).exists():
                raise FormatError(f"{folder}: {shard} is named by {INDEX} and missing; fetch it again")
            found = self._add(folder / shard, names)
            if names - found:
                raise FormatError(f"{index}: tensor {min(names - found)!r} is not in {shard}")
            if left := found - names:
                what = f"its tensor {min(left)!r}" + (f" and {len(left) - 1} more" if len(left) > 1 else "")
                warnings.warn(f"{folder / shard}: {INDEX} does not name {what} there; left out", stacklevel=4)

    def close(self) -> None:
        for file in self._files:
            file.close()

    def __enter__(self) -> SafetensorsFolder:
        return self

    def __exit__(self, kind: type[BaseException] | None, error: BaseException | None, at: TracebackType | None) -> None:
        self.close()


def open_safetensors(path: str | Path) -> SafetensorsFolder:
    """Opens a .safetensors file or a folder of them; see SafetensorsFolder."""
    return SafetensorsFolder(path)


def _stale(folder: Path) -> bool:
    """Whether an index is left over from an earlier model: it names no shard that is there, and one file is.

    Of one file beside an index with shards, the index decides, with a warning.
    """
    if not (folder / SINGLE).exists():
        return False
    shards = _read_index(folder / INDEX)
    stale = not any((folder / shard).exists() for shard in shards)
    if not stale and SINGLE not in shards:
        warnings.warn(f"{folder / SINGLE} is left out: {INDEX} names other files", stacklevel=5)
    return stale


def _nothing_in(folder: Path) -> str:
    pickles = sorted(p.name for pattern in ("*.bin", "*.pt", "*.pth", "*.ckpt") for p in folder.glob(pattern))
    found = f"; {pickles[0]} can run code when it is opened and is refused: convert it first" if pickles else ""
    return f"{folder} has neither {SINGLE} nor {INDEX}{found}"


# -- reading ------------------------------------------------------------------------------------------


def _read_json(data: bytes, path: Path) -> dict[str, Any]:
    """A JSON table; what Python's parser lets through beyond JSON is refused too."""

    def table(pairs: list[tuple[str, Any]]) -> dict[str, Any]:
        found = dict(pairs)
        if len(found) != len(pairs):
            keys = sorted(key for key, _ in pairs)
            raise ValueError(f"{next(a for a, b in itertools.pairwise(keys) if a == b)!r} appears twice")
        return found

    def refused(text: str) -> None:
        raise ValueError(f"{text} is not a number here")

    def integer(text: str) -> int:
        if text == "-0":  # a float to the library
            refused(text)
        return int(text)

    _check_counts(data, path)
    try:
        text = data.decode()
        content = json.loads(text, object_pairs_hook=table, parse_constant=refused, parse_int=integer)
    except (ValueError, RecursionError) as error:
        raise FormatError(f"{path}: the JSON cannot be read: {error}") from error
    if not isinstance(content, dict):
        raise FormatError(f"{path}: the JSON must be a table, not a {type(content).__name__}")
    return content


def _read_index(path: Path) -> dict[str, set[str]]:
    """Shard → the names it must hold."""
    file = File(path)
    if file.size > INDEX_BYTES:
        raise FormatError(f"{path} has {file.size} bytes; an index has at most {INDEX_BYTES >> 20} MiB")
    weight_map = _read_json(file.read(0, file.size), path).get("weight_map")
    file.close()
    if not isinstance(weight_map, dict) or not weight_map:
        raise FormatError(f"{path}: weight_map must be a table of tensor names and files")
    shards: dict[str, set[str]] = {}
    for name, shard in weight_map.items():
        if not isinstance(shard, str) or not SHARD.fullmatch(shard):
            raise FormatError(
                f"{path}: weight_map puts {name!r:.80} into {shard!r:.80}, which is not the name of a shard"
            )
        shards.setdefault(shard, set()).add(name)
    if len(shards) > MAX_SHARDS or len(weight_map) > MAX_TENSORS:
        raise FormatError(f"{path} names {len(shards)} shards; at most {MAX_SHARDS} are read")
    return shards


def _read_file(file: File) -> tuple[dict[str, StoredTensor], dict[str, str]]:
    if file.size < 8:
        raise FormatError(
            f"{file.path} has {file.size} bytes; a safetensors file begins with 8 for the header's length"
        )
    (length,) = struct.unpack("<Q", file.read(0, 8))
    if length > min(HEADER_BYTES, file.size - 8):
        raise FormatError(f"{file.path}: the header claims {length} bytes of {file.size}; fetch the file again")
    data = file.read(8, length)
    if not data.startswith(b"{"):
        raise FormatError(f"{file.path} is not a safetensors file: its header begins with {data[:8]!r}, not '{{'")
    header = _read_json(data, file.path)
    metadata = _metadata(header.pop("__metadata__", {}), file.path)
    tensors = {name: _tensor(name, entry, file, 8 + length) for name, entry in header.items()}
    _check_layout(tensors, file, 8 + length)
    return tensors, metadata


def _check_counts(data: bytes, path: Path) -> None:
    """Before 100 MB of brackets become objects; MOST_TENSORS entries have seven commas each at most."""
    for mark, most in ((b"{", 2 * MAX_TENSORS), (b"[", 2 * MAX_TENSORS), (b",", 8 * MAX_TENSORS)):
        if data.count(mark) > most:
            raise FormatError(f"{path}: more than {most} {mark.decode()!r} in its JSON; no model has that")


def _metadata(table: Any, path: Path) -> dict[str, str]:
    if not isinstance(table, dict) or not all(isinstance(v, str) and _sound(k + v) for k, v in table.items()):
        raise FormatError(f"{path}: __metadata__ must be a table of strings")
    return table


def _sound(text: str) -> bool:
    """No half of a UTF-16 pair, which JSON can spell and UTF-8 cannot hold."""
    try:
        text.encode()
    except UnicodeEncodeError:
        return False
    return True


def _tensor(name: str, entry: Any, file: File, start: int) -> StoredTensor:
    where = f"{file.path}: tensor {name[:MAX_NAME_BYTES]!r}"
    if len(name.encode(errors="replace")) > MAX_NAME_BYTES or not _sound(name):
        raise FormatError(f"{where} must have a name of at most {MAX_NAME_BYTES} bytes of UTF-8")
    if not isinstance(entry, dict) or entry.keys() != {"dtype", "shape", "data_offsets"}:
        raise FormatError(f"{where} needs dtype, shape and data_offsets and nothing else")
    dtype, shape, offsets = entry["dtype"], entry["shape"], entry["data_offsets"]
    if not _whole_numbers(shape, MAX_AXES) or not _whole_numbers(offsets, 2) or len(offsets) != 2:
        raise FormatError(f"{where} has shape {shape!r:.60} and data_offsets {offsets!r:.60}; both are lists of sizes")
    if not isinstance(dtype, str) or dtype not in PLAIN:
        if isinstance(dtype, str) and UNREAD.fullmatch(dtype):
            raise UnsupportedError(f"{where} is {dtype}, which is not read here; use a BF16 or F32 checkpoint")
        raise FormatError(f"{where} has the unknown dtype {dtype!r:.60}")
    nbytes = bytes_of(dtype, tuple(shape))
    largest = math.prod(size or 1 for size in shape) * PLAIN[dtype][1]  # strides count past a size of 0
    if nbytes is None or offsets[1] - offsets[0] != nbytes or largest >= MAX_INT:
        raise FormatError(f"{where} of {dtype} {shape} cannot lie in {offsets[1] - offsets[0]} bytes")
    return StoredTensor(name, tuple(shape), dtype, nbytes, file, start + offsets[0])


def _whole_numbers(value: Any, most: int) -> bool:
    return isinstance(value, list) and len(value) <= most and all(type(v) is int and 0 <= v < MAX_INT for v in value)


def _check_layout(tensors: dict[str, StoredTensor], file: File, start: int) -> None:
    """One after the other from the header to the end of the file."""
    for tensor in sorted(tensors.values(), key=lambda tensor: (tensor.offset, tensor.nbytes)):
        if tensor.offset != start:
            raise FormatError(
                f"{file.path}: tensor {tensor.name!r} begins at byte {tensor.offset}, "
                f"{'inside' if tensor.offset < start else 'after a hole behind'} the one before it"
            )
        start += tensor.nbytes
    if start != file.size:
        raise FormatError(f"{file.path} has {file.size} bytes, but its tensors end at {start}; fetch it again")


# -- writing ------------------------------------------------------------------------------------------


def write_safetensors(
    folder: Path, tensors: Sequence[OutTensor], *, metadata: dict[str, str] | None = None, shard_bytes: int = 5 * 10**9
) -> None:
    """Writes model.safetensors into `folder`, or shards of at most `shard_bytes` (and one tensor) with an index.

    Row by row, every file atomic.  What an earlier model left under these names is removed; while shards
    are being replaced there is no index, so that old and new are never read together.
    """
    if len({tensor.name for tensor in tensors}) != len(tensors):
        raise RequestError("two tensors of one name cannot be in a checkpoint")
    folder.mkdir(parents=True, exist_ok=True)
    shards = _shards(tensors, shard_bytes)
    if len(shards) == 1:
        write_safetensors_file(folder / SINGLE, shards[0], metadata)
        _remove(folder, {SINGLE})
        return
    names = [f"model-{i:05}-of-{len(shards):05}.safetensors" for i in range(1, len(shards) + 1)]
    (folder / INDEX).unlink(missing_ok=True)
    for name, shard in zip(names, shards, strict=True):
        write_safetensors_file(folder / name, shard, metadata)
    weight_map = {tensor.name: name for name, shard in zip(names, shards, strict=True) for tensor in shard}
    index = {"metadata": {"total_size": sum(tensor.nbytes for tensor in tensors)}, "weight_map": weight_map}
    with atomic_write(folder / INDEX) as file:
        file.write(json.dumps(index, indent=2, sort_keys=True).encode() + b"\n")
    _remove(folder, {INDEX, *names})


def _shards(tensors: Sequence[OutTensor], shard_bytes: int) -> list[list[OutTensor]]:
    """In the order given, as many as fit; a larger tensor has a shard of its own."""
    shards: list[list[OutTensor]] = [[]]
    size = 0
    for tensor in tensors:
        if shards[-1] and size + tensor.nbytes > shard_bytes:
            shards.append([])
            size = 0
        shards[-1].append(tensor)
        size += tensor.nbytes
    return shards


def _remove(folder: Path, keep: set[str]) -> None:
    stale = [SINGLE, INDEX, *(path.name for path in folder.iterdir() if OWN_SHARD.fullmatch(path.name))]
    for name in stale:
        if name not in keep:
            (folder / name).unlink(missing_ok=True)


def write_safetensors_file(path: Path, tensors: Sequence[OutTensor], metadata: dict[str, str] | None) -> None:
    """One file.  Wide dtypes first, then by name, as the library writes: tensors begin at multiples of their items."""
    ordered = sorted(tensors, key=lambda tensor: (-PLAIN[tensor.type][1], tensor.name))
    header: dict[str, Any] = {"__metadata__": {"format": "pt"} if metadata is None else metadata}
    offset = 0
    for tensor in ordered:
        offsets = [offset, offset + tensor.nbytes]
        header[tensor.name] = {"dtype": tensor.type, "shape": list(tensor.shape), "data_offsets": offsets}
        offset = offsets[1]
    text = json.dumps(header, separators=(",", ":"), ensure_ascii=False).encode()
    text += b" " * (-len(text) % 8)
    with atomic_write(path) as file:
        file.write(struct.pack("<Q", len(text)) + text)
        for tensor in ordered:
            for block in tensor.blocks():
                file.write(block)
