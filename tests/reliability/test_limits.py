"""R4, R5, R12: what is too large is refused before memory or time is spent on it."""

from __future__ import annotations

import json
import subprocess
import sys
from pathlib import Path

import pytest

import tiny
from families.test_configs import JAMBA, LLAMA, MAMBA2, SEVEN_B
from tiercel.errors import DoesNotFit, FormatError, TiercelError
from tiercel.families import from_hf
from tiercel.mixers.checks import MAX_LAYERS
from tiercel.runtime.free_memory import check_free
from tiercel.serve.body import MAX_VALUES, cost_of
from tiercel.tokenizer.control import WINDOW_CHARS, Added, Controls
from tiercel.tokenizer.tokenizer import Tokenizer
from tiercel.weights.stored import File

LONG = "x" * 70_000


@pytest.mark.parametrize("config", [SEVEN_B, LLAMA, JAMBA, MAMBA2], ids=lambda config: config["model_type"])
def test_more_layers_than_any_model_has_are_refused_before_any_is_made(config):
    for layers in (MAX_LAYERS + 1, 100_000, 10**30):
        with pytest.raises(FormatError, match="num_hidden_layers"):
            from_hf(config | {"num_hidden_layers": layers})
    with pytest.raises(FormatError):
        from_hf({"model_type": "tiercel", "pattern": "mamba2 " * (MAX_LAYERS + 1), "width": 64, "vocab_size": 97})


@pytest.mark.parametrize("change", [
    {"hidden_act": LONG}, {"model_type": LONG}, {LONG: 1}, {"quantization_config": {LONG: LONG}},
    {"rms_norm_eps": LONG}, {"layer_types": [LONG] * 2}, {"vocab_size": 10**5000}, {"head_dim": [10**5000]},
], ids=lambda change: next(iter(change))[:20])  # fmt: skip
def test_no_message_is_longer_than_a_screen(change):
    with pytest.raises(TiercelError) as error:
        from_hf(LLAMA | change)
    assert len(str(error.value)) <= 1000


def test_a_long_message_keeps_what_to_do_next():
    text = str(FormatError("the value " + LONG + " is wrong; write another"))
    assert text.startswith("the value xxx") and text.endswith("; write another") and len(text) <= 1000


@pytest.fixture(scope="module")
def folder(tmp_path_factory) -> Path:
    return tiny.checkpoint(tmp_path_factory.mktemp("limits"))


@pytest.mark.parametrize("ids", [[256, 256, 258], [1, 2, 3], [300, 257, 258], [257, 256, 258], [-1, 257, 258],
                                 [1 << 31, 257, 258], [10**6, 257, 258]])  # fmt: skip
def test_added_tokens_with_other_ids_are_saved_or_refused(folder, tmp_path, ids):
    written = json.loads((folder / "tokenizer.json").read_text())
    for entry, id in zip(written["added_tokens"], ids, strict=True):
        entry["id"] = id
    (tmp_path / "tokenizer.json").write_text(json.dumps(written))
    try:
        tokenizer = Tokenizer.from_folder(tmp_path)
    except FormatError:
        assert ids not in ([257, 256, 258], [300, 257, 258])
        return
    tokenizer.save(tmp_path / "out")
    again = Tokenizer.from_folder(tmp_path / "out")
    text = "<|end|>a<|user|>"
    assert (
        again.encode(text, special=True)
        == tokenizer.encode(text, special=True)
        == [ids[0], again.encode("a")[0], ids[1]]
    )


def test_a_tokenizer_that_cannot_have_its_memory_says_so_and_the_process_goes_on(folder):
    code = """
import resource, sys, tiercel
from pathlib import Path
from tiercel.errors import DoesNotFit
from tiercel.tokenizer.tokenizer import Tokenizer
tokenizer = Tokenizer.from_folder(Path(sys.argv[1]))
pages = int(Path("/proc/self/statm").read_text().split()[0])
limit = pages * resource.getpagesize() + (200 << 20)
resource.setrlimit(resource.RLIMIT_AS, (limit, limit))
try:
    tokenizer.encode("why " * 2_000_000)
except DoesNotFit as error:
    print(len(tokenizer.encode("goes on")), error)
"""
    done = subprocess.run([sys.executable, "-c", code, folder], capture_output=True, text=True)
    assert done.stdout.startswith("7 a text of 8000000 characters needs about"), done.stderr[-300:]


def test_memory_is_compared_before_it_is_taken(monkeypatch):
    monkeypatch.setattr("tiercel.runtime.free_memory.free_bytes", lambda: 100 << 20)
    check_free(99 << 20, "x")
    with pytest.raises(DoesNotFit, match="x needs about 101 MiB and 100 MiB are free"):
        check_free(101 << 20, "x")


@pytest.mark.parametrize("text, cost", [
    ("[1,2,3]", 6), ('{"a":"b,:[{"}', 8), ('{"a,":"\\\\","b":"\\","}', 13), ('["\\"",[],{}]', 14), ('"unclosed,', 1),
])  # fmt: skip
def test_values_are_counted_outside_of_strings(text, cost):
    """Commas, and four for each colon and bracket; a string may add up to one."""
    assert cost <= cost_of(text.encode(), cost - 1)


def test_prose_of_any_length_has_few_values():
    for text in ('a, b: [c] {d} "e" ', "\\\\", '\\"', "\n"):
        assert cost_of(json.dumps({"a": text * 400_000}).encode(), MAX_VALUES) < 20


def test_control_tokens_are_found_across_windows():
    controls = Controls([Added(1, "<|end|>", True), Added(2, "<|end|>>", True), Added(3, "|>", True)])
    for at in range(WINDOW_CHARS - 10, WINDOW_CHARS + 3):
        text = "y" * at + "<|end|>>" + "z" * WINDOW_CHARS + "|>"
        found = [(token.id if token else None, start, stop) for token, start, stop in controls.cut(text)]
        end = at + 8 + WINDOW_CHARS
        assert found == [(None, 0, at), (2, at, at + 8), (None, at + 8, end), (3, end, end + 2)]
    assert list(controls.cut("")) == []


def test_files_close_once_and_without_noise_at_exit(folder, tmp_path):
    file = File(folder / "model.safetensors")
    file.close()
    file.close()
    with pytest.raises(FormatError):
        File(tmp_path)
    code = "import sys, pathlib; from tiercel.weights.stored import File; sys.kept = File(pathlib.Path(sys.argv[1]))"
    done = subprocess.run([sys.executable, "-c", code, folder / "model.safetensors"], capture_output=True, text=True)
    assert (done.returncode, done.stderr) == (0, "")
