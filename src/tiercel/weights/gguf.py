"""GGUF, the one-file format of llama.cpp: read (versions 2 and 3) and written (version 3), little endian.

    "GGUF"  version u32  tensor count u64  metadata count u64
    metadata:  key str, type u32, value           str: length u64, UTF-8   array: type u32, length u64, values
    tensors:   name str, axes u32, sizes u64 …, type u32, offset u64        innermost axis first
    padding to `general.alignment` (32), then the data; every tensor begins at a multiple of it

Specification: ggml docs/gguf.md.  Every count is compared with the bytes that are left, and with the
limits below, before anything is made of it.  A model split by llama.cpp over several files
("name-00001-of-00003.gguf") is opened by its first part.
"""

from __future__ import annotations

import itertools
import re
import struct
from collections.abc import Iterator, Sequence
from pathlib import Path
from types import TracebackType
from typing import Any, NamedTuple

from tiercel.errors import FormatError, RequestError, UnsupportedError
from tiercel.quant import PACKINGS
from tiercel.runtime.atomic import atomic_write
from tiercel.weights.stored import PLAIN, File, OutTensor, StoredTensor, bytes_of

HEADER_BYTES = 64 << 20
MAX_TENSORS = 1_000_000
MAX_KEYS = 65_536
MAX_ELEMENTS = 4 << 20  # of all arrays together; the largest vocabularies have 1.5 M with their merges
MAX_NAME_BYTES = 256
LONGEST_KEY = 65_535
MAX_AXES = 4
MAX_PARTS = 512

SCALARS = {  # number in the file: name, struct code
    0: ("u8", "B"),
    1: ("i8", "b"),
    2: ("u16", "H"),
    3: ("i16", "h"),
    4: ("u32", "I"),
    5: ("i32", "i"),
    6: ("f32", "f"),
    7: ("bool", "?"),
    10: ("u64", "Q"),
    11: ("i64", "q"),
    12: ("f64", "d"),
}
STRING, ARRAY = 8, 9
VALUE_NUMBERS = {name: number for number, (name, _) in SCALARS.items()} | {"str": STRING}

_PLAIN = {"F32": 0, "F16": 1, "I8": 24, "I16": 25, "I32": 26, "I64": 27, "F64": 28, "BF16": 30}
_BLOCKS = {"Q4_0": 2, "Q4_1": 3, "Q5_0": 6, "Q5_1": 7, "Q8_0": 8}
_SUPER_BLOCKS = {"Q2_K": 10, "Q3_K": 11, "Q4_K": 12, "Q5_K": 13, "Q6_K": 14}
_IMPORTANCE = {"IQ2_XXS": 16, "IQ2_XS": 17, "IQ3_XXS": 18, "IQ1_S": 19, "IQ4_NL": 20, "IQ3_S": 21, "IQ2_S": 22}
_OTHER = {"Q8_1": 9, "Q8_K": 15, "IQ4_XS": 23, "IQ1_M": 29, "TQ1_0": 34, "TQ2_0": 35, "MXFP4": 39, "NVFP4": 40}
TENSOR_NUMBERS = _PLAIN | _BLOCKS | _SUPER_BLOCKS | _IMPORTANCE | _OTHER | {"Q1_0": 41, "Q2_0": 42}
TENSOR_TYPES = {number: name for name, number in TENSOR_NUMBERS.items()}

PART = re.compile(r"(.+)-(\d{5})-of-(\d{5})\.gguf", re.ASCII)


class Typed(NamedTuple):
    """A metadata value with its type: "u8" … "u64", "i8" … "i64", "f32", "f64", "bool", "str", or "[u32]" of such."""

    type: str
    value: Any


class GGUFFile:
    """An open GGUF file: `metadata` (plain values, arrays as lists), their `types` by name, `tensors` by name.

    `{key: Typed(types[key], value)}` writes the metadata back exactly.  Raises FormatError for anything
    that is not a sound GGUF file, UnsupportedError for tensor types without a reader.
    """

    def __init__(self, path: str | Path) -> None:
        self.metadata: dict[str, Any] = {}
        self.types: dict[str, str] = {}
        self.tensors: dict[str, StoredTensor] = {}
        self._files: list[File] = []
        try:
            header = self._open(Path(path))
            self.metadata, self.types, self.tensors = header.metadata, header.types, header.tensors
            self._join_parts(header)
        except OSError as error:
            self.close()
            raise FormatError(f"cannot open {path}: {error.strerror or error}") from error
        except BaseException:
            self.close()
            raise

    def _open(self, path: Path) -> _Header:
        self._files.append(File(path))
        return _Header(self._files[-1])

    def _join_parts(self, first: _Header) -> None:
        """The tensors of the other parts, and no `split.*` keys: the model is whole again."""
        count, promised = (first.whole_number(key, 0) for key in ("split.count", "split.tensors.count"))
        for part, path in _other_parts(first, count):
            header = self._open(path)
            place = header.whole_number("split.no", -1), header.whole_number("split.count", -1)
            if place != (part, count):
                raise header.error(f"says it is part {place[0] + 1} of {place[1]}, not {part + 1} of {count}")
            twice = self.tensors.keys() & header.tensors.keys()
            if twice:
                raise header.error(f"tensor {min(twice)!r} is also in an earlier part")
            self.tensors |= header.tensors
        if count > 1 and promised != len(self.tensors):
            raise first.error(f"the {count} parts hold {len(self.tensors)} tensors, but promise {promised}")
        for key in ("split.no", "split.count", "split.tensors.count"):
            self.metadata.pop(key, None)
            self.types.pop(key, None)

    def close(self) -> None:
        for file in self._files:
            file.close()

    def __enter__(self) -> GGUFFile:
        return self

    def __exit__(self, kind: type[BaseException] | None, error: BaseException | None, at: TracebackType | None) -> None:
        self.close()


def _other_parts(first: _Header, count: int) -> Iterator[tuple[int, Path]]:
    """(number from 0, path) of parts 2 … count, siblings of the first by name; nothing for an unsplit file."""
    if count <= 1:
        return
    path, number = first.file.path, first.whole_number("split.no", 0)
    name = PART.fullmatch(path.name)
    if name is None or int(name[2]) != number + 1 or int(name[3]) != count or count > MAX_PARTS:
        raise first.error(f"is part {number + 1} of {count}; it must be called NAME-{number + 1:05}-of-{count:05}.gguf")
    if number != 0:
        raise first.error(f"is part {number + 1} of {count}; open {name[1]}-00001-of-{count:05}.gguf")
    for part in range(1, count):
        sibling = path.with_name(f"{name[1]}-{part + 1:05}-of-{count:05}.gguf")
        if not sibling.exists():
            raise first.error(f"has {count} parts and {sibling.name} is missing beside it; fetch it too")
        yield part, sibling


class _Header:
    """Everything before the data, read from the front as far as it is needed."""

    def __init__(self, file: File) -> None:
        self.file = file
        self.data = b""
        self.at = 0
        self.elements = 0
        self.types: dict[str, str] = {}
        self.metadata: dict[str, Any] = {}
        self.tensors: dict[str, StoredTensor] = {}
        tensors, keys = self._start()
        self._read_metadata(keys)
        self._read_tensors(tensors)
        self.data = b""

    def error(self, message: str) -> FormatError:
        return FormatError(f"{self.file.path}: {message}")

    # -- bytes ------------------------------------------------------------------------------------

    @property
    def left(self) -> int:
        return self.file.size - self.at

    def take(self, count: int, what: str) -> bytes:
        """The next `count` bytes."""
        begin, self.at = self.at, self.at + count
        if self.at > len(self.data):
            if self.at > self.file.size:
                raise self.error(f"{what} needs {count} bytes at {begin}, but the file has {self.file.size}")
            if self.at > HEADER_BYTES:
                raise self.error(f"the header is longer than {HEADER_BYTES >> 20} MiB")
            ahead = max(self.at, 2 * len(self.data), 1 << 16)  # doubling: long headers cost linear time
            ahead = min(ahead, self.file.size, HEADER_BYTES)
            self.data += self.file.read(len(self.data), ahead - len(self.data))
        return self.data[begin : self.at]

    def numbers(self, code: str, what: str, count: int = 1) -> tuple[Any, ...]:
        layout = struct.Struct(f"<{count}{code}")
        return layout.unpack(self.take(layout.size, what))

    def text(self, what: str, longest: int = HEADER_BYTES) -> str:
        (length,) = self.numbers("Q", what)
        if length > longest:
            raise self.error(f"{what} is {length} bytes long, more than {longest}")
        try:
            return self.take(length, what).decode()
        except UnicodeDecodeError as error:
            raise self.error(f"{what} is not UTF-8 at byte {self.at - length + error.start}") from error

    # -- metadata ---------------------------------------------------------------------------------

    def _start(self) -> tuple[int, int]:
        magic = self.take(4, "the magic")
        if magic != b"GGUF":
            raise self.error(f"a GGUF file begins with b'GGUF', not {magic!r}")
        (version,) = self.numbers("I", "the version")
        if version and version & 0xFFFF == 0:
            raise self.error("is a big-endian GGUF file; convert it to little endian")
        if version not in (2, 3):
            raise self.error(f"is GGUF version {version}; versions 2 and 3 can be read")
        tensors, keys = self.numbers("Q", "the counts", 2)
        if tensors > min(MAX_TENSORS, self.left // 24):
            raise self.error(f"claims {tensors} tensors in {self.left} bytes; the limit is {MAX_TENSORS}")
        if keys > min(MAX_KEYS, self.left // 13):
            raise self.error(f"claims {keys} metadata keys in {self.left} bytes; the limit is {MAX_KEYS}")
        return tensors, keys

    def _read_metadata(self, count: int) -> None:
        for _ in range(count):
            key = self.text("a metadata key", LONGEST_KEY)
            if not key or key in self.metadata:
                raise self.error(f"metadata key {key!r} " + ("appears twice" if key else "is empty"))
            (number,) = self.numbers("I", key)
            self.types[key], self.metadata[key] = self._array(key) if number == ARRAY else self._value(key, number)

    def _value(self, key: str, number: int) -> tuple[str, Any]:
        if number == STRING:
            return "str", self.text(key)
        if number not in SCALARS:
            raise self.error(f"metadata {key!r} has the unknown type {number}")
        name, _ = SCALARS[number]
        return name, self._scalars(key, number, 1)[0]

    def _array(self, key: str) -> tuple[str, list[Any]]:
        number, count = self.numbers("IQ", key)
        if number not in SCALARS and number != STRING:
            raise self.error(f"metadata {key!r} is an array of {'arrays' if number == ARRAY else f'type {number}'}")
        self.elements += count
        if count > self.left or self.elements > MAX_ELEMENTS:
            raise self.error(
                f"metadata {key!r} claims {count} elements in {self.left} bytes; the limit is {MAX_ELEMENTS}"
            )
        if number == STRING:
            return "[str]", [self.text(key) for _ in range(count)]
        return f"[{SCALARS[number][0]}]", self._scalars(key, number, count)

    def _scalars(self, key: str, number: int, count: int) -> list[Any]:
        name, code = SCALARS[number]
        if name == "bool":
            numbers = self.numbers("B", key, count)
            if max(numbers, default=0) > 1:
                raise self.error(f"metadata {key!r} holds {max(numbers)} where a bool is 0 or 1")
            return [bool(n) for n in numbers]
        return list(self.numbers(code, key, count))

    def whole_number(self, key: str, default: int) -> int:
        value = self.metadata.get(key, default)
        if type(value) is not int:
            raise self.error(f"metadata {key!r} must be a whole number, not {self.types[key]}")
        return value

    # -- tensors ----------------------------------------------------------------------------------

    def _read_tensors(self, count: int) -> None:
        alignment = self._alignment()
        infos = [self._tensor_info() for _ in range(count)]
        start = -(-self.at // alignment) * alignment
        for name, shape, type, offset in infos:
            if name in self.tensors:
                raise self.error(f"tensor {name!r} appears twice")
            self.tensors[name] = self._placed(name, shape, type, offset, start, alignment)
        ordered = sorted(self.tensors.values(), key=lambda tensor: tensor.offset)
        for one, other in itertools.pairwise(ordered):
            if one.offset + one.nbytes > other.offset:
                raise self.error(f"tensors {one.name!r} and {other.name!r} overlap")

    def _alignment(self) -> int:
        alignment: int = self.metadata.get("general.alignment", 32)
        if self.types.get("general.alignment", "u32") != "u32" or alignment not in [8 << i for i in range(10)]:
            raise self.error(f"general.alignment must be a u32 power of two from 8 to 4096, not {alignment!r}")
        return alignment

    def _tensor_info(self) -> tuple[str, tuple[int, ...], str, int]:
        """(name, shape, type, offset) as the file says, the type being one we read."""
        name = self.text("a tensor name", MAX_NAME_BYTES)
        (axes,) = self.numbers("I", name)
        if axes > MAX_AXES:
            raise self.error(f"tensor {name!r} has {axes} axes; at most {MAX_AXES} are possible")
        shape = self.numbers("Q", name, axes)[::-1]
        number, offset = self.numbers("IQ", name)
        type = TENSOR_TYPES.get(number)
        if type is None:
            raise self.error(f"tensor {name!r} has the unknown type {number}")
        if type not in PLAIN and type not in PACKINGS:
            raise UnsupportedError(f"{self.file.path}: tensor {name!r} is {type} (type {number}); take a Q4_K_M file")
        return name, shape, type, offset

    def _placed(
        self, name: str, shape: tuple[int, ...], type: str, offset: int, start: int, alignment: int
    ) -> StoredTensor:
        nbytes = bytes_of(type, shape)
        if 0 in shape or nbytes is None:
            raise self.error(f"tensor {name!r} of type {type} cannot have shape {list(shape)}")
        if offset % alignment:
            raise self.error(f"tensor {name!r} begins at {offset}, which is not a multiple of {alignment}")
        if start + offset + nbytes > self.file.size:
            end, size = start + offset + nbytes, self.file.size
            raise self.error(f"tensor {name!r} ends at byte {end}, but the file has {size}; fetch it again")
        return StoredTensor(name, shape, type, nbytes, self.file, start + offset)


def write_gguf(path: str | Path, metadata: dict[str, Any], tensors: Sequence[OutTensor]) -> None:
    """Writes a GGUF file, atomically and in row blocks; equal input gives equal bytes.

    Plain metadata values are written as u32, f32, bool, str, or an array of one of these; `Typed` says
    otherwise.  Raises RequestError for what the format or llama.cpp cannot hold.
    """
    alignment = _plain(metadata.get("general.alignment", 32))
    if alignment not in [8 << i for i in range(10)]:
        raise RequestError(f"general.alignment must be a power of two from 8 to 4096, not {alignment!r}")
    if len({tensor.name for tensor in tensors}) != len(tensors):
        raise RequestError("two tensors of one name cannot be in a GGUF file")
    header = [b"GGUF", struct.pack("<IQQ", 3, len(tensors), len(metadata))]
    header += [_string(key) + _encoded(key, _typed(key, value)) for key, value in metadata.items()]
    offset = 0
    for tensor in tensors:
        header.append(_info(tensor, offset))
        offset += tensor.nbytes + -tensor.nbytes % alignment
    front = b"".join(header)
    with atomic_write(Path(path)) as file:
        file.write(front + bytes(-len(front) % alignment))
        for tensor in tensors:
            for block in tensor.blocks():
                file.write(block)
            file.write(bytes(-tensor.nbytes % alignment))


def _info(tensor: OutTensor, offset: int) -> bytes:
    name = tensor.name.encode()
    if not 0 < len(name) < 64:  # GGML_MAX_NAME
        raise RequestError(f"llama.cpp reads tensor names of 1 to 63 bytes, not {tensor.name!r}")
    if len(tensor.shape) > MAX_AXES or 0 in tensor.shape or tensor.type not in TENSOR_NUMBERS:
        raise RequestError(f"{tensor.name} of shape {list(tensor.shape)} and type {tensor.type} has no place in GGUF")
    axes = struct.pack(f"<I{len(tensor.shape)}Q", len(tensor.shape), *tensor.shape[::-1])
    return _string(tensor.name) + axes + struct.pack("<IQ", TENSOR_NUMBERS[tensor.type], offset)


def _plain(value: Any) -> Any:
    return value.value if isinstance(value, Typed) else value


def _typed(key: str, value: Any) -> Typed:
    """The value with the type it is written as."""
    if isinstance(value, Typed):
        return value
    if isinstance(value, list) and value:
        return Typed(f"[{_typed(key, value[0]).type}]", value)
    for kind, name in ((bool, "bool"), (int, "u32"), (float, "f32"), (str, "str")):
        if isinstance(value, kind):
            return Typed(name, value)
    raise RequestError(f"metadata {key!r} cannot be {value!r}; give a number, bool, str, list of these, or Typed")


def _encoded(key: str, typed: Typed) -> bytes:
    """The type number and the value."""
    name, value = typed
    is_array = name.startswith("[") and isinstance(value, list)
    number = VALUE_NUMBERS.get(name[1:-1] if is_array else name)
    if number is None:
        raise RequestError(f"metadata {key!r} cannot be {value!r:.60} of type {name!r}")
    values = value if is_array else [value]
    try:
        if number == STRING:
            body = b"".join(map(_string, values))
        else:
            body = struct.pack(f"<{len(values)}{_code(number, values)}", *values)
    except (struct.error, OverflowError, AttributeError) as error:
        raise RequestError(f"metadata {key!r} does not fit {name}: {error}") from error
    front = struct.pack("<IIQ", ARRAY, number, len(values)) if is_array else struct.pack("<I", number)
    return front + body


def _code(number: int, values: list[Any]) -> str:
    """The struct code; any object would pass for a bool, so these are looked at."""
    name, code = SCALARS[number]
    if name == "bool" and not all(isinstance(value, bool) for value in values):
        raise struct.error("a bool is True or False")
    return code


def _string(text: str) -> bytes:
    data = text.encode()
    return struct.pack("<Q", len(data)) + data
