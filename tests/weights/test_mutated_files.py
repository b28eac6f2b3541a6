"""Thousands of damaged files: each opens and then reads to the last tensor, or is a FormatError. Nothing else.

Every case is made from its number alone, so a failure names the case that repeats it.
TIERCEL_FUZZ=n runs n cases of each kind instead of 2,000.
"""

import json
import os
import random
import re
import shutil
import struct
import tracemalloc
from collections.abc import Callable, Iterator
from pathlib import Path
from typing import Any

import gguf
import numpy as np
import pytest
import safetensors
import torch

from growth import Calls
from tiercel.errors import FormatError
from tiercel.quant import PACKINGS
from tiercel.weights.gguf import GGUFFile, Typed, write_gguf
from tiercel.weights.safetensors import SafetensorsFolder, write_safetensors
from tiercel.weights.stored import PLAIN, OutTensor

CASES = int(os.environ.get("TIERCEL_FUZZ", "2000"))
EXTREMES = [0, 1, 2, 3, 5, 8, 31, 32, 33, 255, 256, 2**31 - 1, 2**31, 2**32 - 1, 2**32, 2**42 + 1]
EXTREMES += [2**62, 2**63 - 1, 2**63, 2**64 - 32, 2**64 - 1]
CALLS, MEMORY = 50_000, 4 << 20  # of one case; the seeds have less than 8 KiB

Opened = GGUFFile | SafetensorsFolder


# -- the oracle ---------------------------------------------------------------------------------------


def survives(open: Callable[[Path], Opened], path: Path, also: Callable[[Path, Opened], None]) -> bool:
    """Whether the file opens; if it does, every tensor reads and `also` holds.  Any other end fails the test."""
    size = sum(p.stat().st_size for p in path.rglob("*")) if path.is_dir() else path.stat().st_size
    tracemalloc.reset_peak()
    before = tracemalloc.get_traced_memory()[0]
    try:
        with Calls() as calls:
            opened = open(path)
    except FormatError as error:
        assert str(error) and "\n" not in str(error) and len(str(error)) < 1000
        return False
    finally:
        assert calls.count < CALLS
        assert tracemalloc.get_traced_memory()[1] - before < MEMORY
    with opened:
        assert sum(tensor.nbytes for tensor in opened.tensors.values()) <= size
        for tensor in opened.tensors.values():
            rows = tensor.rows()
            assert (rows.shape, rows.dtype) == (tensor.shape, tensor.dtype)
            assert tensor.raw().numel() == tensor.nbytes
        also(path, opened)
    return True


def run(make: Callable[[random.Random], None], check: Callable[[], bool], kind: str, cases: int) -> list[bool]:
    opened = []
    tracemalloc.start()
    try:
        for case in range(cases):
            make(random.Random(f"{kind} {case}"))
            try:
                opened.append(check())
            except Exception as error:
                raise AssertionError(f"{kind} case {case}: {error!r}") from error
    finally:
        tracemalloc.stop()
    return opened


def neither_all_nor_none(opened: list[bool]) -> bool:
    """Mutations that are all refused, or all harmless, would test nothing."""
    return 0.02 < sum(opened) / len(opened) < 0.8


def out(name: str, tensor: torch.Tensor, type: str) -> OutTensor:
    return OutTensor(name, tuple(tensor.shape), type, lambda start, stop: tensor[start:stop])


# -- damage to bytes ----------------------------------------------------------------------------------


def bit_flip(data: bytearray, random: random.Random) -> None:
    data[random.randrange(len(data))] ^= 1 << random.randrange(8)


def cut(data: bytearray, random: random.Random) -> None:
    del data[random.randrange(len(data)) :]


def remove(data: bytearray, random: random.Random) -> None:
    at = random.randrange(len(data))
    del data[at : at + random.choice([1, 4, 8, 32, 100])]


def repeat(data: bytearray, random: random.Random) -> None:
    at = random.randrange(len(data))
    data[at:at] = data[at : at + random.choice([1, 4, 8, 32, 100])]


def move(data: bytearray, random: random.Random) -> None:
    """A piece of the file over another place of it: the splice that keeps lengths."""
    at, to, length = random.randrange(len(data)), random.randrange(len(data)), random.choice([4, 8, 24, 64])
    data[to : to + length] = data[at : at + length][: len(data) - to]


BYTES = [bit_flip, cut, remove, repeat, move]


# -- GGUF ---------------------------------------------------------------------------------------------


def gguf_seeds(folder: Path) -> list[bytes]:
    metadata: dict[str, Any] = {
        "general.architecture": "llama",
        "n": 3,
        "x": 0.5,
        "yes": True,
        "none": Typed("[u64]", []),
    }
    metadata |= {
        "tokens": ["a", "bc", "é"],
        "scores": [0.5, 1.5],
        "bytes": Typed("[u8]", [1, 2]),
        "d": Typed("f64", 2.0),
    }
    tensors = [out(name, torch.randn(4, 8), name) for name in ("F32", "F16", "BF16")]
    write_gguf(folder / "a", metadata, tensors)
    write_gguf(folder / "b", {"general.alignment": 64} | metadata, [*tensors, out("line", torch.ones(5), "F32")])
    writer = gguf.GGUFWriter(folder / "c", "llama")
    for type in PACKINGS:
        raw = np.random.default_rng(0).integers(0, 60, (2, PACKINGS[type][1]), dtype=np.uint8)
        writer.add_tensor(type, raw, raw_dtype=gguf.GGMLQuantizationType[type])
    for write in (
        writer.write_header_to_file,
        writer.write_kv_data_to_file,
        writer.write_tensors_to_file,
        writer.close,
    ):
        write()
    seeds = [(folder / name).read_bytes() for name in "abc"]
    return [*seeds, seeds[0][:4] + struct.pack("<I", 2) + seeds[0][8:]]


def gguf_fields(data: bytes) -> Iterator[tuple[int, str]]:
    """(offset, struct code) of every count, length, type, size and offset of a sound file."""

    def read(at: int, code: str) -> int:
        return struct.unpack_from("<" + code, data, at)[0]

    yield from ((4, "I"), (8, "Q"), (16, "Q"))
    widths, at = {0: 1, 1: 1, 2: 2, 3: 2, 4: 4, 5: 4, 6: 4, 7: 1, 10: 8, 11: 8, 12: 8}, 24
    for _ in range(read(16, "Q")):
        yield at, "Q"
        at += 8 + read(at, "Q")
        yield at, "I"
        number, count = read(at, "I"), 1
        at += 4
        if number == 9:
            yield from ((at, "I"), (at + 4, "Q"))
            number, count = read(at, "I"), read(at + 4, "Q")
            at += 12
        for _ in range(count):
            yield at, {1: "B", 2: "H", 4: "I", 8: "Q"}[widths.get(number, 8)]
            at += 8 + read(at, "Q") if number == 8 else widths[number]
    for _ in range(read(8, "Q")):
        yield at, "Q"
        at += 8 + read(at, "Q")
        yield at, "I"
        axes = read(at, "I")
        yield from ((at + 4 + 8 * i, "Q") for i in range(axes))
        at += 4 + 8 * axes
        yield from ((at, "I"), (at + 4, "Q"))
        at += 12


def set_field(data: bytearray, fields: list[tuple[int, str]], random: random.Random) -> None:
    at, code = random.choice(fields)
    width = struct.calcsize(code)
    old = int.from_bytes(data[at : at + width], "little")
    new = random.choice([*EXTREMES, old + 1, old - 1, old * 2, old + 32, old ^ 1, random.randrange(42)])
    data[at : at + width] = (new % (1 << 8 * width)).to_bytes(width, "little")


def agrees_with_the_gguf_package(path: Path, opened: Opened) -> None:
    reader = gguf.GGUFReader(path)
    assert [tensor.name for tensor in reader.tensors] == list(opened.tensors)
    for theirs in reader.tensors:
        ours = opened.tensors[theirs.name]
        assert (ours.type, ours.offset) == (theirs.tensor_type.name, theirs.data_offset)
        assert ours.raw().numpy().tobytes() == theirs.data.tobytes()
    for key, value in opened.metadata.items():
        field = reader.get_field(key)
        assert field is not None and repr(field.contents()) == repr(value)  # repr: a NaN is itself


def test_damaged_gguf_files(tmp_path: Path):
    seeds = [(seed, list(gguf_fields(seed))) for seed in gguf_seeds(tmp_path)]
    path = tmp_path / "x.gguf"

    def make(random: random.Random) -> None:
        seed, fields = random.choice(seeds)
        data = bytearray(seed)
        for _ in range(random.choice([1, 1, 1, 2, 3])):
            if random.random() < 0.75:
                set_field(data, fields, random)
            else:
                random.choice(BYTES)(data, random)
                break  # the fields have moved
        path.write_bytes(data)

    opened = run(make, lambda: survives(GGUFFile, path, agrees_with_the_gguf_package), "gguf", CASES)
    assert neither_all_nor_none(opened)


def test_sound_seeds_open(tmp_path: Path):
    path = tmp_path / "x"
    tracemalloc.start()
    for seed in gguf_seeds(tmp_path):
        assert len(seed) < 8192 and len(list(gguf_fields(seed))) > 20
        path.write_bytes(seed)
        assert survives(GGUFFile, path, agrees_with_the_gguf_package)
    for seed in safetensors_seeds(tmp_path):
        path.write_bytes(seed)
        assert survives(SafetensorsFolder, path, agrees_with_the_library)
    tracemalloc.stop()


# -- safetensors --------------------------------------------------------------------------------------


def safetensors_seeds(folder: Path) -> list[bytes]:
    every = [out(f"layer.{name}", torch.ones(2, 3), name) for name in PLAIN]
    few = [out("a", torch.randn(4, 4), "F32"), out("é", torch.randn(0, 4), "BF16"), out("", torch.randn(7), "F16")]
    write_safetensors(folder / "every", every, metadata={"format": "pt", "x": "y"})
    write_safetensors(folder / "few", few)
    return [(folder / name / "model.safetensors").read_bytes() for name in ("every", "few")]


NUMBER = re.compile(r"-?\d+")
WORD = re.compile(r'"[^"]*"')
WORDS = [
    '"F32"',
    '"I8"',
    '"F8_E4M3"',
    '"BOOL"',
    '"a"',
    '"shape"',
    '"dtype"',
    '"data_offsets"',
    '"__metadata__"',
    '"\\ud800"',
]
VALUES = ["null", "true", "[]", "{}", "-1", "-0", "1.0", "1e400", "NaN", '"1"', "[[[[1]]]]", '{"a":1}']


def damage_json(text: str, random: random.Random) -> str:
    """One token of a JSON text changed, swapped, repeated or removed."""
    places = list((WORD if random.random() < 0.3 else NUMBER).finditer(text)) or list(WORD.finditer(text))
    if not places:
        return text + "}"
    place, other = random.choice(places), random.choice(places)
    old = place.group()
    if random.random() < 0.3:
        new = random.choice([*VALUES, "", old + old, other.group()])
    elif old.startswith('"'):
        new = random.choice([*WORDS, other.group(), '"../' + old[1:]])
    else:
        new = str(random.choice([*EXTREMES, int(old) + 1, int(old) - 1, int(old) + 4, -int(old)]))
    return text[: place.start()] + new + text[place.end() :]


def move_tensor(text: str, random: random.Random) -> str:
    """A tensor's place shifted, or taken from another tensor: overlaps and holes with every size still right."""
    header = json.loads(text)
    tensors = [entry for name, entry in header.items() if name != "__metadata__"]
    place, other = random.choice(tensors)["data_offsets"], random.choice(tensors)["data_offsets"]
    shift = random.choice([other[0] - place[0], place[1] - place[0], -1, 1, 4, 8])
    place[:] = [place[0] + shift, place[1] + shift]
    return json.dumps(header)


def damage_safetensors(seed: bytes, random: random.Random) -> bytes:
    (length,) = struct.unpack_from("<Q", seed)
    if random.random() < 0.3:
        data = bytearray(seed)
        random.choice(BYTES)(data, random)
        return bytes(data)
    if random.random() < 0.1:
        return struct.pack("<Q", random.choice([*EXTREMES, length - 1, length + 1])) + seed[8:]
    text = seed[8 : 8 + length].decode()
    if random.random() < 0.2:
        text = move_tensor(text, random)
    else:
        for _ in range(random.choice([1, 1, 2, 3])):
            text = damage_json(text, random)
    header = text.encode()
    return struct.pack("<Q", len(header)) + header + seed[8 + length :]


def agrees_with_the_library(path: Path, opened: Opened) -> None:
    with safetensors.safe_open(path, "pt") as theirs:
        assert set(theirs.keys()) == opened.tensors.keys()
        for name, tensor in opened.tensors.items():
            same = theirs.get_tensor(name).reshape(-1).view(torch.uint8)
            assert torch.equal(tensor.raw().reshape(-1), same)


def test_damaged_safetensors_files(tmp_path: Path):
    seeds, path = safetensors_seeds(tmp_path), tmp_path / "x.safetensors"

    def make(random: random.Random) -> None:
        path.write_bytes(damage_safetensors(random.choice(seeds), random))

    opened = run(make, lambda: survives(SafetensorsFolder, path, agrees_with_the_library), "safetensors", CASES)
    assert neither_all_nor_none(opened)


def test_every_truncation_of_a_safetensors_file_is_refused(tmp_path: Path):
    path = tmp_path / "x.safetensors"
    for seed in safetensors_seeds(tmp_path):
        path.write_bytes(seed)
        for length in reversed(range(len(seed))):
            os.truncate(path, length)
            with pytest.raises(FormatError):
                SafetensorsFolder(path)


# -- folders ------------------------------------------------------------------------------------------


def nothing_more(path: Path, opened: Opened) -> None:
    assert all(tensor.file.path.parent == path for tensor in opened.tensors.values())


@pytest.mark.filterwarnings("ignore:.*does not name its tensor")
def test_damaged_folders(tmp_path: Path):
    source, folder = tmp_path / "source", tmp_path / "folder"
    write_safetensors(source, [out(f"t{i}", torch.randn(4, 4), "F32") for i in range(6)], shard_bytes=128)
    shards = sorted(path.name for path in source.glob("*.safetensors"))
    index = (source / "model.safetensors.index.json").read_text()
    assert len(shards) == 3 and set(json.loads(index)["weight_map"].values()) == set(shards)

    def make(random: random.Random) -> None:
        shutil.rmtree(folder, ignore_errors=True)
        shutil.copytree(source, folder)
        shard = folder / random.choice(shards)
        match random.randrange(8):
            case 0:
                shard.unlink()
            case 1:
                shutil.copy(folder / random.choice(shards[1:]), folder / "other.safetensors")
                (folder / "other.safetensors").replace(shard)
            case 2:
                shard.write_bytes(damage_safetensors(shard.read_bytes(), random))
            case 3:
                data = bytearray(index.encode())
                random.choice(BYTES)(data, random)
                (folder / "model.safetensors.index.json").write_bytes(data)
            case _:
                (folder / "model.safetensors.index.json").write_text(damage_json(index, random))

    opened = run(make, lambda: survives(SafetensorsFolder, folder, nothing_more), "folder", max(1, CASES // 5))
    assert neither_all_nor_none(opened)
