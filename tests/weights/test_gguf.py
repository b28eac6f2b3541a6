"""GGUF files: what llama.cpp's package wrote we read, what we write it reads, and nothing hostile gets through."""

import os
import struct
import tracemalloc
from pathlib import Path
from typing import Any

import gguf
import numpy as np
import pytest
import torch

from growth import Calls
from tiercel.errors import FormatError, RequestError, UnsupportedError
from tiercel.quant import PACKINGS
from tiercel.weights.gguf import TENSOR_NUMBERS, GGUFFile, Typed, write_gguf
from tiercel.weights.stored import OutTensor, StoredTensor

METADATA: dict[str, Any] = {
    "general.architecture": "llama",
    "a.u8": Typed("u8", 255),
    "a.i8": Typed("i8", -128),
    "a.u16": Typed("u16", 65535),
    "a.i16": Typed("i16", -32768),
    "a.u32": 4294967295,
    "a.i32": Typed("i32", -(2**31)),
    "a.u64": Typed("u64", 2**64 - 1),
    "a.i64": Typed("i64", -(2**63)),
    "a.f32": 0.25,
    "a.f64": Typed("f64", 1e300),
    "a.yes": True,
    "a.text": "ünï\n\0 🦅",
    "a.empty": "",
    "a.texts": ["", "a", "日本"],
    "a.numbers": [1, 2, 3],
    "a.floats": [0.5, -1.5],
    "a.bools": [True, False],
    "a.bytes": Typed("[u8]", [0, 255]),
    "a.none": Typed("[str]", []),
}
TYPES = {key: key.removeprefix("a.") for key in METADATA}  # most keys are called after their type
TYPES |= {"general.architecture": "str", "a.yes": "bool", "a.text": "str", "a.empty": "str"}
TYPES |= {"a.texts": "[str]", "a.numbers": "[u32]", "a.floats": "[f32]"}
TYPES |= {"a.bools": "[bool]", "a.bytes": "[u8]", "a.none": "[str]"}


def plain(value: Any) -> Any:
    return value.value if isinstance(value, Typed) else value


def out(name: str, tensor: torch.Tensor, type: str) -> OutTensor:
    rows = (lambda start, stop: tensor[start:stop]) if tensor.ndim else (lambda start, stop: tensor)
    return OutTensor(name, tuple(tensor.shape), type, rows)


def some_tensors() -> dict[str, torch.Tensor]:
    generator = torch.Generator().manual_seed(5)
    return {
        "token_embd.weight": torch.randn(11, 8, generator=generator),
        "output_norm.weight": torch.randn(8, generator=generator),
        "experts": torch.randn(3, 2, 5, generator=generator),
        "four": torch.randn(2, 3, 1, 2, generator=generator),
    }


# -- reading ------------------------------------------------------------------------------------------


def judge_writes(path: Path) -> dict[str, np.ndarray]:
    """A file by the gguf package with every packing; returns the tensors as it gives them, packed ones as bytes."""
    writer = gguf.GGUFWriter(path, "llama")
    writer.add_uint32("llama.block_count", 2)
    writer.add_float32("llama.eps", 1e-5)
    writer.add_array("tokenizer.ggml.tokens", [f"t{i}é" for i in range(300)])
    writer.add_array("tokenizer.ggml.scores", [0.5 * i for i in range(300)])
    random = np.random.default_rng(1)
    tensors: dict[str, np.ndarray] = {"f32": random.normal(size=(3, 5)).astype(np.float32)}
    tensors["f16"] = random.normal(size=(2, 3, 4)).astype(np.float16)
    for name, tensor in tensors.items():
        writer.add_tensor(name, tensor)
    for type in PACKINGS:
        size = PACKINGS[type][1]
        raw = random.integers(0, 60, (4, 2 * size), dtype=np.uint8)  # small bytes: no NaN scales
        tensors[type] = raw
        writer.add_tensor(type, raw, raw_dtype=gguf.GGMLQuantizationType[type])
    writer.write_header_to_file()
    writer.write_kv_data_to_file()
    writer.write_tensors_to_file()
    writer.close()
    return tensors


def test_a_file_of_the_gguf_package_reads_value_for_value(tmp_path: Path):
    tensors = judge_writes(tmp_path / "x.gguf")
    with GGUFFile(tmp_path / "x.gguf") as file:
        assert file.metadata["llama.block_count"] == 2 and file.types["llama.block_count"] == "u32"
        assert file.metadata["llama.eps"] == np.float32(1e-5) and file.types["llama.eps"] == "f32"
        assert file.metadata["tokenizer.ggml.tokens"] == [f"t{i}é" for i in range(300)]
        assert file.metadata["tokenizer.ggml.scores"] == [0.5 * i for i in range(300)]
        assert file.types["tokenizer.ggml.tokens"] == "[str]"
        assert file.tensors.keys() == tensors.keys()
        for name, stored in file.tensors.items():
            type = gguf.GGMLQuantizationType[stored.type]
            assert torch.equal(stored.rows().float(), torch.from_numpy(gguf.quants.dequantize(tensors[name], type)))
            assert stored.nbytes == tensors[name].nbytes


@pytest.mark.parametrize("type", PACKINGS)
def test_packed_rows_come_alone_as_values_and_as_bytes(type: str, tmp_path: Path):
    raw = judge_writes(tmp_path / "x.gguf")[type]
    with GGUFFile(tmp_path / "x.gguf") as file:
        stored = file.tensors[type]
        assert stored.dtype == torch.float32 and stored.shape == (4, 2 * PACKINGS[type][0])
        assert torch.equal(stored.rows(1, 3), stored.rows()[1:3])
        assert np.array_equal(stored.raw(1, 3).numpy(), raw[1:3])


def test_sixteen_bit_rows_keep_their_dtype(tmp_path: Path):
    write_gguf(tmp_path / "x.gguf", {}, [out("b", torch.ones(3, 2), "BF16"), out("h", torch.ones(3, 2), "F16")])
    with GGUFFile(tmp_path / "x.gguf") as file:
        assert file.tensors["b"].rows(1, 2).dtype == file.tensors["b"].dtype == torch.bfloat16
        assert file.tensors["h"].rows(1, 2).dtype == file.tensors["h"].dtype == torch.float16


def test_a_file_that_shrinks_while_it_is_open_is_an_error_not_a_crash(tmp_path: Path):
    path = tmp_path / "x.gguf"
    write_gguf(path, {}, [out("a", torch.ones(1000, 100), "F32")])
    with GGUFFile(path) as file:
        os.truncate(path, 5000)
        assert file.tensors["a"].rows(0, 2).sum() == 200
        with pytest.raises(FormatError, match=r"shrunk from .* to 5000"):
            file.tensors["a"].rows()


# -- hostile files, built by hand ---------------------------------------------------------------------


def string(text: str | bytes) -> bytes:
    data = text.encode() if isinstance(text, str) else text
    return struct.pack("<Q", len(data)) + data


def value(number: int, body: bytes = b"") -> bytes:
    return struct.pack("<I", number) + body


def info(
    name: str = "a", shape: tuple[int, ...] = (4,), type: int = 0, offset: int = 0, axes: int | None = None
) -> bytes:
    front = struct.pack(f"<I{len(shape)}Q", len(shape) if axes is None else axes, *shape)
    return string(name) + front + struct.pack("<IQ", type, offset)


def made(
    *tensors: bytes,
    keys: tuple[bytes, ...] = (),
    data: int = 64,
    version: int = 3,
    counts: tuple[int, int] | None = None,
) -> bytes:
    """A file of these metadata keys (key and value) and tensor infos, and `data` zero bytes."""
    front = b"GGUF" + struct.pack("<IQQ", version, *(counts or (len(tensors), len(keys)))) + b"".join(keys + tensors)
    return front + bytes(-len(front) % 32) + bytes(data)


SOUND = made(info(), info("b", offset=32), keys=(string("k") + value(4, b"\1\0\0\0"),))
EXTREMES = [2**31 - 1, 2**31, 2**32 - 1, 2**32, 2**62, 2**63 - 1, 2**63, 2**64 - 1]

BROKEN = {
    "empty file": b"",
    "magic only": b"GGUF",
    "other magic": b"GGML" + SOUND[4:],
    "version 1": made(version=1),
    "version 4": made(version=4),
    "version 0": made(version=0),
    "big endian": b"GGUF" + struct.pack(">IQQ", 3, 0, 0),
    "array of 2^63, 43 bytes": b"GGUF"
    + struct.pack("<IQQ", 3, 0, 1)
    + string("aaa")
    + value(9, struct.pack("<IQ", 0, 2**63)),
    "array of arrays": made(keys=(string("k") + value(9, struct.pack("<IQ", 9, 1) + struct.pack("<IQ", 4, 0)),)),
    "array of type 255": made(keys=(string("k") + value(9, struct.pack("<IQ", 255, 0)),)),
    "value of type 13": made(keys=(string("k") + value(13, b"\0" * 8),)),
    "bool of 2": made(keys=(string("k") + value(7, b"\2"),)),
    "key twice": made(keys=(string("k") + value(0, b"\1"),) * 2),
    "empty key": made(keys=(string("") + value(0, b"\1"),)),
    "key of 70,000 bytes": made(keys=(string("k" * 70_000) + value(0, b"\1"),)),
    "key not UTF-8": made(keys=(string(b"\xff") + value(0, b"\1"),)),
    "text not UTF-8": made(keys=(string("k") + value(8, string(b"\xff")),)),
    "tensor twice": made(info(), info(offset=32)),
    "name of 257 bytes": made(info("a" * 257)),
    "five axes": made(info(shape=(1,) * 5)),
    "2^32 − 1 axes": made(info(axes=2**32 - 1)),
    "size 0": made(info(shape=(4, 0))),
    "size −1": made(info(shape=(2**64 - 1,))),
    "sizes wrap to 0": made(info(shape=(2**32, 2**32))),
    "sizes wrap to 4": made(info(shape=(2**62 + 1, 4))),
    "two huge tensors": made(info(shape=(2**62 - 8,)), info("b", shape=(2**62,), offset=2**64 - 32)),
    "unknown type": made(info(type=255)),
    "type −1": made(info(type=2**32 - 1)),
    "removed type": made(info(type=4)),
    "half a block": made(info(shape=(48,), type=8)),
    "a block over two rows": made(info(shape=(16, 2), type=8)),
    "offset unaligned": made(info(offset=4)),
    "offset beyond": made(info(offset=2**40)),
    "offset at the end": made(info(offset=64)),
    "overlap": made(info(), info("b")),
    "overlap by length": made(info(shape=(12,)), info("b", offset=32)),
    "more tensors than bytes": made(counts=(3, 0)),
    "more keys than bytes": made(counts=(0, 9)),
    "split without its name": made(keys=(string("split.count") + value(2, b"\2\0"),)),
    "split count as text": made(keys=(string("split.count") + value(8, string("2")),)),
}
BROKEN |= {
    f"alignment {n}": made(keys=(string("general.alignment") + value(4, struct.pack("<I", n)),))
    for n in (0, 1, 3, 12, 2**31)
}
BROKEN |= {"alignment as i32": made(keys=(string("general.alignment") + value(5, struct.pack("<i", 32)),))}
BROKEN |= {f"{n} tensors": made(counts=(n, 0)) for n in EXTREMES}
BROKEN |= {f"{n} keys": made(counts=(0, n)) for n in EXTREMES}
BROKEN |= {f"text of {n}": made(keys=(string("k") + value(8, struct.pack("<Q", n)),)) for n in EXTREMES}
BROKEN |= {
    f"array of {n} × type {type}": made(keys=(string("k") + value(9, struct.pack("<IQ", type, n)),))
    for n in EXTREMES
    for type in (0, 7, 8, 12)
}


@pytest.mark.parametrize("kind", BROKEN)
def test_a_broken_file_is_one_clear_error_at_once(kind: str, tmp_path: Path):
    path = tmp_path / "x.gguf"
    path.write_bytes(BROKEN[kind])
    tracemalloc.start()
    with Calls() as calls, pytest.raises(FormatError) as error:
        GGUFFile(path)
    assert calls.count < 5_000
    assert tracemalloc.get_traced_memory()[1] < 2 << 20
    tracemalloc.stop()
    assert str(path) in str(error.value) and "\n" not in str(error.value) and len(str(error.value)) < 600


def test_broken_files_are_broken_by_one_thing_only(tmp_path: Path):
    """The table above means what it says: its sound twin opens, and so do the edges of what is allowed."""
    path = tmp_path / "x.gguf"
    path.write_bytes(SOUND)
    with GGUFFile(path) as file:
        assert file.metadata == {"k": 1} and [t.rows().tolist() for t in file.tensors.values()] == [[0.0] * 4] * 2
    path.write_bytes(made(info(shape=()), version=2))
    with GGUFFile(path) as file:
        assert file.tensors["a"].rows().shape == ()


def test_every_truncation_is_refused(tmp_path: Path):
    path = tmp_path / "x.gguf"
    write_gguf(path, METADATA, [out(name, tensor, "F32") for name, tensor in some_tensors().items()])
    whole = path.read_bytes()
    padding = -some_tensors()["four"].nbytes % 32
    for length in reversed(range(len(whole) - padding)):
        os.truncate(path, length)
        with pytest.raises(FormatError):
            GGUFFile(path)


@pytest.mark.parametrize("type", ["IQ2_XXS", "IQ4_XS", "Q8_K", "TQ1_0", "MXFP4"])
def test_a_packing_without_a_reader_is_refused_by_name_and_number(type: str, tmp_path: Path):
    path = tmp_path / "x.gguf"
    path.write_bytes(made(info("blk.0", (256,), TENSOR_NUMBERS[type])))
    with pytest.raises(UnsupportedError, match=rf"'blk.0' is {type} \(type {TENSOR_NUMBERS[type]}\)"):
        GGUFFile(path)


def test_type_numbers_are_those_of_the_format():
    known = {type.name: int(type) for type in gguf.GGMLQuantizationType}
    assert {name: number for name, number in TENSOR_NUMBERS.items() if name in known} == known


def test_a_header_longer_than_the_limit_is_refused(tmp_path: Path, monkeypatch: pytest.MonkeyPatch):
    monkeypatch.setattr("tiercel.weights.gguf.HEADER_BYTES", 1 << 17)
    path = tmp_path / "x.gguf"
    path.write_bytes(made(keys=(string("k") + value(8, string("x" * (1 << 17))),)))
    with pytest.raises(FormatError, match="longer than"):
        GGUFFile(path)


def test_only_regular_files_are_opened(tmp_path: Path):
    os.mkfifo(tmp_path / "pipe")
    for path, why in (
        (tmp_path / "pipe", "not a regular file"),
        (tmp_path, "not a regular"),
        (tmp_path / "no", "No such"),
    ):
        with pytest.raises(FormatError, match=why):
            GGUFFile(path)


# -- writing ------------------------------------------------------------------------------------------


@pytest.mark.parametrize("type", ["F32", "F16", "BF16"])
def test_the_gguf_package_reads_what_we_write(type: str, tmp_path: Path):
    path, tensors = tmp_path / "x.gguf", some_tensors()
    write_gguf(path, METADATA, [out(name, tensor, type) for name, tensor in tensors.items()])
    reader = gguf.GGUFReader(path)
    for key, expected in METADATA.items():
        field = reader.get_field(key)
        assert field is not None and field.contents() == plain(expected)
    dtype = {"F32": torch.float32, "F16": torch.float16, "BF16": torch.bfloat16}[type]
    assert [t.name for t in reader.tensors] == list(tensors)
    for theirs in reader.tensors:
        assert theirs.tensor_type.name == type and theirs.data_offset % 32 == 0
        numbers = torch.from_numpy(gguf.quants.dequantize(np.array(theirs.data), theirs.tensor_type))
        assert torch.equal(numbers, tensors[theirs.name].to(dtype).float())
        assert theirs.shape.tolist() == list(tensors[theirs.name].shape)[::-1]


def test_what_is_written_reads_back_and_writes_again_to_the_same_bytes(tmp_path: Path):
    tensors = some_tensors()
    write_gguf(tmp_path / "a", METADATA, [out(name, tensor, "BF16") for name, tensor in tensors.items()])

    def again(t: StoredTensor) -> OutTensor:
        return OutTensor(t.name, t.shape, t.type, t.rows)

    with GGUFFile(tmp_path / "a") as file:
        assert file.metadata == {key: plain(value) for key, value in METADATA.items()}
        assert file.types == TYPES
        metadata = {key: Typed(file.types[key], value) for key, value in file.metadata.items()}
        write_gguf(tmp_path / "b", metadata, [again(t) for t in file.tensors.values()])
    assert (tmp_path / "a").read_bytes() == (tmp_path / "b").read_bytes()


def test_an_alignment_in_the_metadata_is_kept(tmp_path: Path):
    metadata = {"general.alignment": 128}
    write_gguf(tmp_path / "x", metadata, [out(name, tensor, "F32") for name, tensor in some_tensors().items()])
    offsets = [tensor.data_offset for tensor in gguf.GGUFReader(tmp_path / "x").tensors]
    assert all(offset % 128 == 0 for offset in offsets)
    with GGUFFile(tmp_path / "x") as file:
        assert [t.offset for t in file.tensors.values()] == offsets
        assert all(torch.equal(t.rows(), some_tensors()[name]) for name, t in file.tensors.items())


MISFITS = [-1, 2**32, 1e39, None, [], [1, "a"], ["a", 1], [1, 2.5], [[1]], {}, Typed("u8", 256), Typed("u8", 1.5)]
MISFITS += [Typed("f16", 1.0), Typed("str", 3), Typed("[[u8]]", [1]), Typed("bool", "no"), Typed("[u8]", 1)]


@pytest.mark.parametrize("bad", MISFITS)
def test_metadata_that_does_not_fit_its_type_is_refused(bad: Any, tmp_path: Path):
    with pytest.raises(RequestError, match="'k'"):
        write_gguf(tmp_path / "x", {"k": bad}, [])
    assert list(tmp_path.iterdir()) == []


def test_names_that_llama_cpp_cannot_read_are_refused(tmp_path: Path):
    for name in ("", "a" * 64):
        with pytest.raises(RequestError, match="1 to 63 bytes"):
            write_gguf(tmp_path / "x", {}, [out(name, torch.ones(1), "F32")])
    with pytest.raises(RequestError, match="one name"):
        write_gguf(tmp_path / "x", {}, [out("a", torch.ones(1), "F32")] * 2)


def test_a_write_that_fails_leaves_the_old_file_and_no_litter(tmp_path: Path):
    write_gguf(tmp_path / "x", {}, [out("a", torch.ones(3), "F32")])
    before = (tmp_path / "x").read_bytes()
    with pytest.raises(RequestError, match="F16 cannot hold"):
        write_gguf(tmp_path / "x", {}, [out("a", torch.full((3,), 1e6), "F16")])
    assert [path.name for path in tmp_path.iterdir()] == ["x"] and (tmp_path / "x").read_bytes() == before


# -- split files --------------------------------------------------------------------------------------


def split(folder: Path, count: int = 3) -> dict[str, torch.Tensor]:
    tensors = some_tensors()
    for part in range(count):
        metadata = {"split.no": Typed("u16", part), "split.count": Typed("u16", count)}
        metadata |= {"split.tensors.count": Typed("i32", len(tensors))}
        mine = list(tensors.items())[part::count]
        path = folder / f"m-{part + 1:05}-of-{count:05}.gguf"
        write_gguf(path, metadata | ({"k": 7} if part == 0 else {}), [out(*item, "F32") for item in mine])
    return tensors


def test_a_split_model_opens_by_its_first_part(tmp_path: Path):
    tensors = split(tmp_path)
    with GGUFFile(tmp_path / "m-00001-of-00003.gguf") as file:
        assert file.metadata == {"k": 7} and file.types == {"k": "u32"}
        assert file.tensors.keys() == tensors.keys()
        assert all(torch.equal(file.tensors[name].rows(), tensor) for name, tensor in tensors.items())


def test_a_split_model_with_something_wrong_says_what(tmp_path: Path):
    split(tmp_path)
    first, second, third = (tmp_path / f"m-0000{i}-of-00003.gguf" for i in (1, 2, 3))
    with pytest.raises(FormatError, match=r"part 2 of 3; open m-00001-of-00003\.gguf"):
        GGUFFile(second)
    whole = third.read_bytes()
    third.write_bytes(second.read_bytes())
    with pytest.raises(FormatError, match="says it is part 2 of 3, not 3 of 3"):
        GGUFFile(first)
    third.unlink()
    with pytest.raises(FormatError, match=r"m-00003-of-00003\.gguf is missing beside it"):
        GGUFFile(first)
    third.write_bytes(whole)
    first.rename(tmp_path / "other.gguf")
    with pytest.raises(FormatError, match="must be called NAME-00001-of-00003"):
        GGUFFile(tmp_path / "other.gguf")


# -- a real file --------------------------------------------------------------------------------------


@pytest.mark.skipif("TIERCEL_TEST_SMOLLM2" not in os.environ, reason="TIERCEL_TEST_SMOLLM2 names no GGUF file")
def test_a_real_model_opens_quickly_and_agrees_with_the_gguf_package():
    path = Path(os.environ["TIERCEL_TEST_SMOLLM2"])
    with Calls() as calls:
        file = GGUFFile(path)
    with file:
        entries = sum(len(value) for value in file.metadata.values() if isinstance(value, list)) + len(file.tensors)
        assert calls.count < 20 * entries + 10_000
        reader = gguf.GGUFReader(path)
        ours = {key: value for key, value in file.metadata.items() if not isinstance(value, list)}
        assert len(ours) > 20 and all(reader.get_field(key).contents() == value for key, value in ours.items())
        tokens = file.metadata["tokenizer.ggml.tokens"]
        assert len(tokens) == 49152 and tokens[:50] == reader.get_field("tokenizer.ggml.tokens").contents(slice(0, 50))
        for theirs in reader.tensors:
            stored = file.tensors[theirs.name]
            assert (stored.type, stored.offset) == (theirs.tensor_type.name, theirs.data_offset)
            assert stored.nbytes == theirs.n_bytes and list(stored.shape) == theirs.shape.tolist()[::-1]
