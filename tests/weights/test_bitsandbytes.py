"""NF4 as bitsandbytes lays it out: its matrices are read as it reads them, ours are written as it writes them."""

import json
from pathlib import Path

import pytest
import torch
from safetensors.torch import load_file, save_file

from tiercel.errors import FormatError, UnsupportedError
from tiercel.quant import dequantize, quantize
from tiercel.weights.bitsandbytes import dynamic_levels, joined, tensors
from tiercel.weights.safetensors import open_safetensors, write_safetensors

GOLDEN = Path(__file__).parents[1] / "golden" / "bitsandbytes.safetensors"
CASES = ["plain", "nested", "wide blocks", "across rows", "cut short"]
STATE = "plain.weight.quant_state.bitsandbytes__nf4"


@pytest.fixture(scope="module")
def golden():
    return load_file(GOLDEN)


@pytest.fixture(scope="module")
def matrices():
    return joined(open_safetensors(GOLDEN).tensors)


@pytest.mark.parametrize("name", CASES)
def test_a_matrix_is_read_as_bitsandbytes_reads_it(name: str, matrices, golden):
    matrix, expected = matrices[f"{name}.weight"], golden[f"{name}.expected"]
    assert matrix.shape == tuple(expected.shape)
    rows = matrix.rows()
    assert torch.equal(rows.to(expected.dtype), expected)
    for start, stop in ((0, 1), (1, 3), (len(expected) - 1, len(expected))):
        assert torch.equal(matrix.rows(start, stop), rows[start:stop])


def test_rows_of_whole_blocks_stay_packed_and_others_are_unpacked(matrices, golden):
    for name in ("plain", "nested", "wide blocks"):
        matrix = matrices[f"{name}.weight"]
        assert matrix.type == "NF4"
        assert torch.equal(dequantize("NF4", matrix.raw(2, 9)), matrix.rows(2, 9))
    assert matrices["across rows.weight"].type == "BF16" and matrices["across rows.weight"].dtype == torch.bfloat16
    assert matrices["cut short.weight"].type == "F32"


def test_we_pack_to_the_same_levels(matrices, golden):
    ours = quantize("NF4", golden["plain.original"])
    assert torch.equal(ours, matrices["plain.weight"].raw())


def test_what_we_write_is_what_bitsandbytes_would(tmp_path, golden):
    x = golden["nested.original"]
    raw = quantize("NF4", x)
    out = list(tensors("nested.weight", (40, 512), lambda a, b: raw[a:b], "bfloat16", 7))
    write_safetensors(tmp_path, out)
    ours, names = load_file(tmp_path / "model.safetensors"), [n for n in golden if n.startswith("nested.weight")]
    assert sorted(ours) == sorted(names)
    for name in names:
        if "quant_state" in name:
            mine, theirs = (json.loads(bytes(t[name].tolist())) for t in (ours, golden))
            assert mine.pop("nested_offset") == pytest.approx(theirs.pop("nested_offset"), rel=1e-6) and mine == theirs
        else:
            assert ours[name].dtype == golden[name].dtype and ours[name].shape == golden[name].shape
            assert torch.allclose(ours[name].float(), golden[name].float(), rtol=1e-6, atol=1e-9), name
    assert torch.equal(dynamic_levels(), golden["nested.weight.nested_quant_map"])
    back = joined(open_safetensors(tmp_path).tensors)["nested.weight"]
    assert (back.rows() - x.float()).norm() < 0.11 * x.float().norm()


def broken(change):
    """The plain case with something changed."""

    def build(path: Path) -> Path:
        found = {name: x for name, x in load_file(GOLDEN).items() if name.startswith("plain.weight")}
        change(found)
        save_file(found, path / "model.safetensors")
        return path

    return build


def state(**changes):
    def change(found):
        about = json.loads(bytes(found[STATE].tolist())) | changes
        found[STATE] = torch.tensor(list(json.dumps(about).encode()), dtype=torch.uint8)

    return change


@pytest.mark.parametrize(
    "change, error, says",
    [
        (lambda t: t.pop("plain.weight"), FormatError, "1536 × 1 bytes"),
        (lambda t: t.pop("plain.weight.absmax"), FormatError, "absmax must be 48"),
        (lambda t: t.pop("plain.weight.quant_map"), UnsupportedError, "other levels"),
        (lambda t: t["plain.weight.quant_map"].mul_(2), UnsupportedError, "other levels"),
        (lambda t: t.update({"plain.weight": torch.zeros(9, 1, dtype=torch.uint8)}), FormatError, "1536 × 1 bytes"),
        (lambda t: t.update({STATE: torch.tensor(list(b"{"), dtype=torch.uint8)}), FormatError, "not JSON"),
        (lambda t: t.update({STATE: torch.zeros(70_000, dtype=torch.uint8)}), FormatError, "70000 bytes"),
        (lambda t: t.update({STATE: torch.tensor(list(b"[" * 60_000), dtype=torch.uint8)}), FormatError, "not JSON"),
        (lambda t: t.update({"plain.weight.absmax": torch.zeros(48, dtype=torch.uint8)}), FormatError, "nested_"),
        (state(blocksize=63), FormatError, "no NF4 matrix"),
        (state(blocksize="64"), FormatError, "no NF4 matrix"),
        (state(shape=[24, 0]), FormatError, "no NF4 matrix"),
        (state(shape=[10**15, 10**15]), FormatError, "no NF4 matrix"),
        (state(shape=[1 << 30, 1 << 30]), FormatError, "bytes of nibbles"),
        (state(dtype="int3"), FormatError, "no NF4 matrix"),
        (lambda t: t.update({STATE.replace("nf4", "fp4"): t.pop(STATE)}), UnsupportedError, "plain.weight is .* fp4"),
    ],
)
def test_what_is_not_sound_is_refused_by_name(change, error, says, tmp_path):
    folder = broken(change)(tmp_path)
    with pytest.raises(error, match=says):
        joined(open_safetensors(folder).tensors)
