"""Checkpoints in safetensors: what the library wrote we read byte for byte, what it refuses we refuse."""

import json
import os
import struct
import tracemalloc
from collections.abc import Callable
from pathlib import Path
from typing import Any

import pytest
import safetensors
import safetensors.torch
import torch
from safetensors.torch import save_file

from tiercel.errors import FormatError, RequestError, TiercelError, UnsupportedError
from tiercel.runtime.atomic import atomic_write
from tiercel.weights.safetensors import open_safetensors, write_safetensors
from tiercel.weights.stored import PLAIN, OutTensor, StoredTensor, torch_dtype


def some_tensors() -> dict[str, torch.Tensor]:
    """One of every dtype, and the shapes that are easy to get wrong."""
    generator = torch.Generator().manual_seed(3)
    whole = torch.randint(-100, 100, (5, 7), generator=generator)
    tensors = {name: whole.to(torch_dtype(name)) for name in PLAIN}
    tensors |= {
        "scalar": torch.tensor(2.5),
        "empty": torch.zeros(0, 0).half(),
        "line": torch.randn(9, generator=generator),
    }
    return tensors | {"block": torch.randn(3, 4, 5, generator=generator).bfloat16()}


def out(name: str, tensor: torch.Tensor, type: str | None = None) -> OutTensor:
    names = {torch_dtype(name): name for name in PLAIN}
    rows = (lambda start, stop: tensor[start:stop]) if tensor.ndim else (lambda start, stop: tensor)
    return OutTensor(name, tuple(tensor.shape), type or names[tensor.dtype], rows)


def written(path: Path, header: Any, data: bytes = b"") -> Path:
    text = header if isinstance(header, bytes) else json.dumps(header).encode()
    path.write_bytes(struct.pack("<Q", len(text)) + text + data)
    return path


def library_opens(path: Path) -> bool:
    try:
        with safetensors.safe_open(path, "pt") as file:
            names = file.keys()
            return all(file.get_tensor(name) is not None for name in names)
    except (safetensors.SafetensorError, RuntimeError, OSError):
        return False


# -- reading ------------------------------------------------------------------------------------------


def test_what_the_library_wrote_reads_byte_for_byte(tmp_path: Path):
    tensors = some_tensors()
    safetensors.torch.save_file(tensors, tmp_path / "model.safetensors", {"format": "pt", "who": "ünïcode"})
    for path in (tmp_path, tmp_path / "model.safetensors"):
        with open_safetensors(path) as opened:
            assert opened.metadata == {"format": "pt", "who": "ünïcode"}
            assert opened.tensors.keys() == tensors.keys()
            for name, stored in opened.tensors.items():
                assert stored.dtype == tensors[name].dtype and stored.shape == tuple(tensors[name].shape)
                assert stored.nbytes == tensors[name].nbytes
                assert torch.equal(stored.rows(), tensors[name])


def test_rows_come_alone_as_values_and_as_bytes(tmp_path: Path):
    tensors = some_tensors()
    safetensors.torch.save_file(tensors, tmp_path / "model.safetensors")
    with open_safetensors(tmp_path) as opened:
        assert torch.equal(opened.tensors["block"].rows(1, 2), tensors["block"][1:2])
        assert torch.equal(opened.tensors["line"].rows(4), tensors["line"][4:])
        assert opened.tensors["F32"].rows(2, 2).shape == (0, 7)
        assert opened.tensors["scalar"].rows().item() == opened.tensors["scalar"].rows(0, 1).item() == 2.5
        assert torch.equal(opened.tensors["BF16"].raw(1, 4), tensors["BF16"][1:4].view(torch.uint8))


def test_rows_are_the_readers_own(tmp_path: Path):
    safetensors.torch.save_file({"a": torch.ones(3)}, tmp_path / "model.safetensors")
    with open_safetensors(tmp_path) as opened:
        opened.tensors["a"].rows().zero_()
        assert opened.tensors["a"].rows().tolist() == [1, 1, 1]


def test_a_file_that_shrinks_while_it_is_open_is_an_error_not_a_crash(tmp_path: Path):
    path = tmp_path / "model.safetensors"
    safetensors.torch.save_file({"a": torch.ones(100_000)}, path)
    with open_safetensors(path) as opened:
        os.truncate(path, 5000)
        assert opened.tensors["a"].rows(0, 10).tolist() == [1] * 10
        with pytest.raises(FormatError, match=r"shrunk from .* to 5000"):
            opened.tensors["a"].rows()


def test_rows_read_the_same_where_the_system_has_no_positional_read(tmp_path: Path, monkeypatch: pytest.MonkeyPatch):
    monkeypatch.delattr(os, "preadv")
    tensors = some_tensors()
    safetensors.torch.save_file(tensors, tmp_path / "model.safetensors")
    with open_safetensors(tmp_path) as opened:
        assert all(torch.equal(opened.tensors[name].rows(), tensor) for name, tensor in tensors.items())
        os.truncate(tmp_path / "model.safetensors", 200)
        with pytest.raises(FormatError, match=r"shrunk from .* to 200"):
            opened.tensors["F64"].rows()


F32 = {"dtype": "F32", "shape": [2], "data_offsets": [0, 8]}
BROKEN: dict[str, tuple[Any, bytes]] = {
    "hole before": ({"a": F32 | {"data_offsets": [4, 12]}}, bytes(12)),
    "hole between": ({"a": F32, "b": F32 | {"data_offsets": [12, 20]}}, bytes(20)),
    "overlap": ({"a": F32, "b": F32 | {"data_offsets": [4, 12]}}, bytes(12)),
    "the same bytes twice": ({"a": F32, "b": F32}, bytes(8)),
    "trailing bytes": ({"a": F32}, bytes(9)),
    "too few bytes": ({"a": F32}, bytes(7)),
    "shape against bytes": ({"a": F32 | {"shape": [3]}}, bytes(8)),
    "negative shape": ({"a": F32 | {"shape": [-1, -2]}}, bytes(8)),
    "huge shape": ({"a": F32 | {"shape": [2**63]}}, bytes(8)),
    "product wraps to the right size": ({"a": F32 | {"shape": [2**62 + 1, 2]}}, bytes(8)),
    "product wraps before a zero": ({"a": {"dtype": "F32", "shape": [2**62, 2**62, 0], "data_offsets": [0, 0]}}, b""),
    "strides wrap beside a zero": ({"a": {"dtype": "F32", "shape": [0, 2**62], "data_offsets": [0, 0]}}, b""),
    "reversed offsets": ({"a": F32 | {"data_offsets": [8, 0]}}, bytes(8)),
    "float offsets": ({"a": F32 | {"data_offsets": [0, 8.0]}}, bytes(8)),
    "three offsets": ({"a": F32 | {"data_offsets": [0, 4, 8]}}, bytes(8)),
    "a bool for a size": ({"a": F32 | {"shape": [2, True]}}, bytes(8)),
    "unknown dtype": ({"a": F32 | {"dtype": "F33"}}, bytes(8)),
    "dtype not text": ({"a": F32 | {"dtype": 32}}, bytes(8)),
    "missing field": ({"a": {"dtype": "F32", "shape": [2]}}, bytes(8)),
    "unknown field": ({"a": F32 | {"stride": [1]}}, bytes(8)),
    "entry not a table": ({"a": ["F32", [2], [0, 8]]}, bytes(8)),
    "metadata not text": ({"__metadata__": {"a": 1}, "a": F32}, bytes(8)),
    "long name": ({"a" * 257: F32}, bytes(8)),
    "key twice": (b'{"a":%s,"a":%s}' % ((json.dumps(F32).encode(),) * 2), bytes(8)),
    "field twice": (b'{"a":{"dtype":"F32","dtype":"F32","shape":[2],"data_offsets":[0,8]}}', bytes(8)),
    "minus zero": (b'{"a":{"dtype":"F32","shape":[2],"data_offsets":[-0,8]}}', bytes(8)),
    "4301 digits": (b'{"a":{"dtype":"F32","shape":[%s],"data_offsets":[0,8]}}' % (b"9" * 4301), bytes(8)),
    "infinity": (b'{"a":{"dtype":"F32","shape":[Infinity],"data_offsets":[0,8]}}', bytes(8)),
    "half a character": (b'{"\\ud800":%s}' % json.dumps(F32).encode(), bytes(8)),
    "not UTF-8": (b'{"\xff":%s}' % json.dumps(F32).encode(), bytes(8)),
    "depth": (b'{"a":' * 100_000, b""),
    "brackets": (b'{"a":' + b"[" * 3_000_000, b""),
    "not a table": (b"[]", b""),
    "leading space": (b" {}", b""),
    "unfinished": (b'{"a":', b""),
    "empty header": (b"", b""),
}


@pytest.mark.parametrize("kind", BROKEN)
def test_a_broken_header_is_one_clear_error(kind: str, tmp_path: Path):
    path = written(tmp_path / "x.safetensors", *BROKEN[kind])
    with pytest.raises(FormatError) as error:
        open_safetensors(path)
    assert str(path) in str(error.value) and "\n" not in str(error.value) and len(str(error.value)) < 600


def test_broken_headers_are_broken_by_one_thing_only(tmp_path: Path):
    """The table above means what it says: its sound twin opens."""
    open_safetensors(written(tmp_path / "x.safetensors", {"a": F32}, bytes(8))).close()


@pytest.mark.parametrize("length", [0, 1, 9, 2**31, 2**63 - 1, 2**64 - 1, 100_000_001])
def test_a_header_length_beyond_the_file_takes_no_memory(length: int, tmp_path: Path):
    path = tmp_path / "x.safetensors"
    path.write_bytes(struct.pack("<Q", length) + b"{}      ")
    tracemalloc.start()
    with pytest.raises(FormatError):
        open_safetensors(path)
    assert tracemalloc.get_traced_memory()[1] < 1 << 20
    tracemalloc.stop()


@pytest.mark.parametrize("dtype", ["F8_E4M3", "F8_E5M2", "F4", "U16", "C64"])
def test_a_dtype_without_mathematics_here_is_refused_by_name(dtype: str, tmp_path: Path):
    path = written(tmp_path / "x.safetensors", {"a": F32 | {"dtype": dtype}}, bytes(8))
    with pytest.raises(UnsupportedError, match=f"'a' is {dtype}"):
        open_safetensors(path)


def test_only_regular_files_are_opened(tmp_path: Path):
    os.mkfifo(tmp_path / "pipe.safetensors")
    for path, why in ((tmp_path / "pipe.safetensors", "not a regular file"), (tmp_path / "none", "No such file")):
        with pytest.raises(FormatError, match=why):
            open_safetensors(path)


# -- folders ------------------------------------------------------------------------------------------


def sharded(folder: Path) -> dict[str, torch.Tensor]:
    tensors = {name: tensor for name, tensor in some_tensors().items() if tensor.numel()}
    write_safetensors(folder, [out(*item) for item in tensors.items()], shard_bytes=300)
    assert len(list(folder.glob("*.safetensors"))) > 2
    return tensors


def test_a_sharded_folder_is_one_model(tmp_path: Path):
    tensors = sharded(tmp_path)
    with open_safetensors(tmp_path) as opened:
        assert opened.tensors.keys() == tensors.keys() and opened.metadata == {"format": "pt"}
        assert all(torch.equal(opened.tensors[name].rows(), tensor) for name, tensor in tensors.items())


def test_a_missing_shard_is_named_with_what_to_do(tmp_path: Path):
    sharded(tmp_path)
    shard = sorted(tmp_path.glob("*.safetensors"))[1]
    shard.unlink()
    with pytest.raises(FormatError, match=rf"{shard.name} is named by .* missing; fetch it again"):
        open_safetensors(tmp_path)


NOT_SHARDS = ["../x.safetensors", "/etc/x.safetensors", "a/x.safetensors", "C:\\x.safetensors", "\\\\h\\x.safetensors"]
NOT_SHARDS += ["x.bin", "x.safetensors\n", "\0.safetensors", "", "a" * 300 + ".safetensors", 3, None]


@pytest.mark.parametrize("name", NOT_SHARDS)
def test_an_index_reaches_only_its_own_folder(name: Any, tmp_path: Path):
    sharded(tmp_path)
    written(tmp_path.parent / "x.safetensors", {"a": F32}, bytes(8))
    (tmp_path / "model.safetensors.index.json").write_text(json.dumps({"weight_map": {"a": name}}))
    with pytest.raises(FormatError):
        open_safetensors(tmp_path)


def edit_index(folder: Path, change: Callable[[dict[str, str]], Any]) -> None:
    path = folder / "model.safetensors.index.json"
    index = json.loads(path.read_text())
    change(index["weight_map"])
    path.write_text(json.dumps(index))


def test_index_and_shards_must_agree(tmp_path: Path):
    sharded(tmp_path)
    edit_index(tmp_path, lambda names: names.pop("line"))
    with pytest.warns(UserWarning, match="does not name its tensor 'line'"), open_safetensors(tmp_path) as opened:
        assert "line" not in opened.tensors and "block" in opened.tensors
    edit_index(tmp_path, lambda names: names.update(line=names["block"], missing=names["block"]))
    with pytest.raises(FormatError, match=r"'(line|missing)' is not in"):
        open_safetensors(tmp_path)


def test_of_two_copies_the_index_decides(tmp_path: Path):
    tensors = sharded(tmp_path)
    index = json.loads((tmp_path / "model.safetensors.index.json").read_text())["weight_map"]
    other = next(file for file in index.values() if file != index["line"])
    inside = {name: tensors[name] for name, file in index.items() if file == other}
    save_file(inside | {"line": torch.full_like(tensors["line"], 3)}, tmp_path / other, metadata={"format": "pt"})
    with pytest.warns(UserWarning, match="does not name its tensor 'line'"), open_safetensors(tmp_path) as opened:
        assert all(torch.equal(opened.tensors[name].rows(), tensor) for name, tensor in tensors.items())


def test_an_index_with_shards_decides_over_a_single_file(tmp_path: Path):
    tensors = sharded(tmp_path)
    save_file({"line": torch.ones(3)}, tmp_path / "model.safetensors", metadata={"format": "pt"})
    with pytest.warns(UserWarning, match="model.safetensors is left out"), open_safetensors(tmp_path) as opened:
        assert all(torch.equal(opened.tensors[name].rows(), tensor) for name, tensor in tensors.items())
    for shard in tmp_path.glob("model-*.safetensors"):
        shard.unlink()
    with open_safetensors(tmp_path) as opened:  # an index without its shards is left over from another model
        assert opened.tensors.keys() == {"line"}


@pytest.mark.parametrize(
    "text", ["", "[]", "{}", '{"weight_map": []}', '{"weight_map": {}}', "{" * 5000, '{"a":1,"a":1}']
)
def test_a_broken_index_is_one_clear_error(text: str, tmp_path: Path):
    (tmp_path / "model.safetensors.index.json").write_text(text)
    with pytest.raises(FormatError, match=r"index\.json"):
        open_safetensors(tmp_path)


def test_a_folder_without_a_model_says_what_was_looked_for(tmp_path: Path):
    with pytest.raises(FormatError, match=r"neither model\.safetensors nor model\.safetensors\.index\.json$"):
        open_safetensors(tmp_path)
    (tmp_path / "pytorch_model.bin").write_bytes(b"\x80\x02.")
    with pytest.raises(FormatError, match=r"pytorch_model.bin can run code .* refused"):
        open_safetensors(tmp_path)


# -- writing ------------------------------------------------------------------------------------------


def test_the_library_reads_what_we_write(tmp_path: Path):
    tensors = some_tensors()
    write_safetensors(tmp_path, [out(*item) for item in tensors.items()])
    assert [path.name for path in tmp_path.iterdir()] == ["model.safetensors"]
    loaded = safetensors.torch.load_file(tmp_path / "model.safetensors")
    assert loaded.keys() == tensors.keys()
    assert all(torch.equal(loaded[name], tensor) for name, tensor in tensors.items())


def test_the_library_reads_every_shard_and_the_index_counts_the_bytes(tmp_path: Path):
    tensors = sharded(tmp_path)
    index = json.loads((tmp_path / "model.safetensors.index.json").read_text())
    assert index["metadata"]["total_size"] == sum(tensor.nbytes for tensor in tensors.values())
    for name, shard in index["weight_map"].items():
        assert torch.equal(safetensors.torch.load_file(tmp_path / shard)[name], tensors[name])


def test_tensors_are_written_a_few_rows_at_a_time(tmp_path: Path):
    asked = []

    def rows(start: int, stop: int) -> torch.Tensor:
        asked.append((start, stop))
        return torch.arange(start, stop).float().unsqueeze(1).expand(-1, 1 << 18)

    write_safetensors(tmp_path, [OutTensor("big", (40, 1 << 18), "F32", rows)])  # 40 MiB
    assert asked == [(0, 16), (16, 32), (32, 40)]
    with open_safetensors(tmp_path) as opened:
        assert opened.tensors["big"].rows()[:, 7].tolist() == list(range(40))


def test_values_are_rounded_once_to_the_type_asked_for(tmp_path: Path):
    values = torch.tensor([1.0, 1.00390625, 3.14159, -2e-40, 65519.0])
    write_safetensors(tmp_path, [out("b", values, "BF16"), out("h", values, "F16")])
    with open_safetensors(tmp_path) as opened:
        assert torch.equal(opened.tensors["b"].rows(), values.bfloat16())
        assert torch.equal(opened.tensors["h"].rows(), values.half())


def test_float16_is_refused_where_it_would_write_infinity(tmp_path: Path):
    with pytest.raises(RequestError, match="beyond 65504"):
        write_safetensors(tmp_path, [out("a", torch.tensor([70_000.0]), "F16")])
    assert list(tmp_path.iterdir()) == []


def test_a_write_that_fails_leaves_the_old_model_and_no_litter(tmp_path: Path):
    write_safetensors(tmp_path, [out("a", torch.ones(3))])
    before = (tmp_path / "model.safetensors").read_bytes()

    def broken(start: int, stop: int) -> torch.Tensor:
        raise KeyError("the source went away")

    with pytest.raises(KeyError):
        write_safetensors(tmp_path, [out("a", torch.zeros(3)), OutTensor("b", (3,), "F32", broken)])
    assert [path.name for path in tmp_path.iterdir()] == ["model.safetensors"]
    assert (tmp_path / "model.safetensors").read_bytes() == before


def test_a_folder_written_again_holds_only_the_new_model(tmp_path: Path):
    for shard_bytes in (300, 10**9, 600, 300):
        tensors = some_tensors()
        write_safetensors(tmp_path, [out(*item) for item in tensors.items()], shard_bytes=shard_bytes)
        with open_safetensors(tmp_path) as opened:
            assert opened.tensors.keys() == tensors.keys()
            assert {t.file.path for t in opened.tensors.values()} == set(tmp_path.glob("*.safetensors"))


def test_old_and_new_shards_are_never_read_together(tmp_path: Path):
    sharded(tmp_path)

    def broken(start: int, stop: int) -> torch.Tensor:
        raise KeyError("the source went away")

    with pytest.raises(KeyError):
        write_safetensors(tmp_path, [out("a", torch.ones(3)), OutTensor("b", (3,), "F32", broken)], shard_bytes=12)
    with pytest.raises(FormatError, match="neither"):
        open_safetensors(tmp_path)


def test_equal_models_are_equal_files(tmp_path: Path):
    items = [out(*item) for item in some_tensors().items()]
    write_safetensors(tmp_path / "a", items)
    write_safetensors(tmp_path / "b", items[::-1])
    assert (tmp_path / "a/model.safetensors").read_bytes() == (tmp_path / "b/model.safetensors").read_bytes()


def test_a_stored_tensor_can_be_written_as_it_is(tmp_path: Path):
    safetensors.torch.save_file(some_tensors(), tmp_path / "model.safetensors")

    def again(t: StoredTensor) -> OutTensor:
        return OutTensor(t.name, t.shape, t.type, t.rows)

    with open_safetensors(tmp_path) as opened:
        write_safetensors(tmp_path / "copy", [again(t) for t in opened.tensors.values()])
    copy = safetensors.torch.load_file(tmp_path / "copy/model.safetensors")
    assert all(torch.equal(copy[name], tensor) for name, tensor in some_tensors().items())


def test_a_folder_that_cannot_be_written_is_one_clear_error(tmp_path: Path):
    with pytest.raises(TiercelError, match="could not write"), atomic_write(tmp_path / "none" / "x"):
        pass


def test_differential_with_the_library_on_the_broken_table(tmp_path: Path):
    """We refuse all of them; the library refuses most, so the table is not merely our taste."""
    refused = [kind for kind in BROKEN if not library_opens(written(tmp_path / "x.safetensors", *BROKEN[kind]))]
    assert len(refused) > 0.7 * len(BROKEN)
