"""A path becomes a model: every tensor accounted for, memory asked for before it is taken, and back to files."""

import json
import subprocess
import sys
from types import SimpleNamespace

import pytest
import torch
from safetensors.torch import load_file, save_file

import tiercel
import tiny
from tiercel.errors import DoesNotFit, FormatError, ModelNotFound, RequestError, UnsupportedError
from tiercel.model.layers import named_weights
from tiercel.weights.checkpoint import open_checkpoint
from tiercel.weights.export import export
from tiercel.weights.load import load


@pytest.fixture
def folder(tmp_path):
    return tiny.checkpoint(tmp_path / "model")


def edit(folder, change):
    tensors = load_file(folder / "model.safetensors")
    change(tensors)
    save_file(tensors, folder / "model.safetensors")


def edit_config(folder, **fields):
    path = folder / "config.json"
    path.write_text(json.dumps(json.loads(path.read_text()) | fields))


def test_a_saved_pattern_is_a_checkpoint_like_any_other(folder):
    network, tokenizer, layout = load(folder)
    network.unpack()
    tokens = torch.arange(40)
    assert torch.equal(network(tokens), tiny.network(native=False)(tokens))
    assert tokenizer is not None and layout.family.name == "pattern"


@pytest.mark.parametrize(
    "change, says",
    [
        (lambda t: t.pop("layers.1.mixers.mamba1.D"), "'layers.1.mixers.mamba1.D' is missing"),
        (lambda t: t.update(surprise=torch.zeros(3)), "has no tensor 'surprise'"),
        (lambda t: t.update({"norm.weight": torch.zeros(31)}), "norm.weight is 31, the config says 32"),
        (
            lambda t: t.update({"embed.weight": torch.zeros(32, 300)}),
            "embed.weight is 32 × 300, the config says 300 × 32",
        ),
    ],
)
def test_a_file_that_does_not_fit_its_config_is_refused_by_name(folder, change, says):
    edit(folder, change)
    with pytest.raises(FormatError, match=says):
        load(folder)


def test_more_layers_than_tensors_are_refused_at_once(folder):
    config = json.loads((folder / "config.json").read_text())
    config["layers"][0]["repeat"] = 1000
    edit_config(folder, layers=config["layers"])
    with pytest.raises(FormatError, match="tensors cannot make"):
        load(folder)


def test_absurd_sizes_take_no_memory(folder):
    edit_config(folder, vocab_size=2**31 - 1, width=2**30)
    with pytest.raises(FormatError, match="no such model exists"):
        load(folder)


def test_what_does_not_fit_is_refused_with_both_numbers(folder, monkeypatch):
    monkeypatch.setattr("psutil.virtual_memory", lambda: SimpleNamespace(available=100_000))
    with pytest.raises(DoesNotFit, match=r"float32 weights needs .* KB of memory and 100 KB are free"):
        load(folder)


def test_a_pattern_file_is_a_fresh_network_the_same_every_time(tmp_path):
    (tmp_path / "net.json").write_text('{"pattern": "mamba2 attention", "width": 32, "vocab_size": 50}')
    one, two = tiercel.load(tmp_path / "net.json"), tiercel.load(tmp_path / "net.json")
    logits = one.logits([1, 2, 3])
    assert logits.isfinite().all() and torch.equal(logits, two.logits([1, 2, 3]))
    one.export(tmp_path / "saved")
    assert torch.equal(tiercel.load(tmp_path / "saved").logits([1, 2, 3]), logits)


def test_a_pattern_too_large_for_this_machine_is_refused(tmp_path):
    (tmp_path / "net.json").write_text('{"pattern": "attention", "width": 16384, "vocab_size": 50, "repeat": 200}')
    with pytest.raises(DoesNotFit, match="free"):
        tiercel.load(tmp_path / "net.json")


@pytest.mark.parametrize("asked, held", [("auto", torch.float32), ("bf16", torch.bfloat16), ("half", torch.float16)])
def test_matrices_are_held_in_the_dtype_asked_for_and_the_recurrence_stays_wide(folder, asked, held):
    network, _, _ = load(folder, dtype=asked)
    mamba1 = network.layers[1].mixers["mamba1"]
    assert network.dtype == mamba1.in_proj.weight.dtype == held
    assert mamba1.A_log.dtype == mamba1.conv.dtype == mamba1.dt_bias.dtype == torch.float32
    assert network(torch.arange(20)).isfinite().all()
    with pytest.raises(RequestError, match="choose auto"):
        load(folder, dtype="int3")


@pytest.mark.parametrize("stored, held", [("bf16", torch.bfloat16), ("f16", None)])
def test_auto_keeps_bfloat16_and_finds_float16_a_faster_home(folder, tmp_path, stored, held):
    export(folder, tmp_path / "narrow", dtype=stored)
    network, _, _ = load(tmp_path / "narrow")
    assert network.dtype == held if held else network.dtype in (torch.bfloat16, torch.float32)


def test_progress_counts_every_byte_once(folder):
    seen = []
    network, _, _ = load(folder, progress=lambda done, total: seen.append((done, total)))
    total = sum(weight.nbytes for _, weight in named_weights(network) if not isinstance(weight, list))
    total += sum(q.nbytes for _, weight in named_weights(network) if isinstance(weight, list) for q in weight)
    assert seen[-1] == (total, total) and [done for done, _ in seen] == sorted(done for done, _ in seen)


def test_loading_takes_little_more_memory_than_the_model(tmp_path):
    """Peak memory of a process that loads: the model, and as a constant a matrix on its way and what malloc keeps."""
    (tmp_path / "net.json").write_text(
        '{"pattern": "attention+mamba2", "width": 1024, "vocab_size": 8000, "repeat": 4, "tied": false}'
    )
    script = """
import re, sys, torch
from pathlib import Path
from tiercel.weights.export import export, NetworkSource
from tiercel.weights.load import load
# not ru_maxrss: a new program inherits the peak of the process that started it
peak = lambda: int(re.search(r"VmHWM:\\s*(\\d+) kB", Path("/proc/self/status").read_text())[1]) * 1024
torch.set_num_threads(1)
tiny, _, _ = load(sys.argv[2]); tiny(torch.arange(3)); before = peak()
network, _, _ = load(sys.argv[1], dtype=sys.argv[3])
from tiercel.model.layers import named_weights
size = sum(weight.nbytes for _, weight in named_weights(network))
print(peak() - before, size)
"""
    (tmp_path / "tiny.json").write_text('{"pattern": "attention", "width": 8, "vocab_size": 9}')
    tiercel.load(tmp_path / "net.json").export(tmp_path / "big", dtype="bf16")
    for dtype in ("bf16", "f32"):
        command = [sys.executable, "-c", script, tmp_path / "big", tmp_path / "tiny.json", dtype]
        taken, size = map(float, subprocess.run(command, check=True, capture_output=True, text=True).stdout.split())
        assert size > 150e6 and size <= taken < 1.05 * size + 128e6, (dtype, taken, size)


@pytest.mark.parametrize("name", ["nowhere", "nowhere.gguf"])
def test_a_missing_path_says_so(tmp_path, name):
    with pytest.raises(ModelNotFound):
        open_checkpoint(tmp_path / name)


def test_a_folder_without_a_model_says_what_was_looked_for(tmp_path):
    with pytest.raises(FormatError, match=r"neither config\.json nor a \.gguf file"):
        open_checkpoint(tmp_path)


# ── out ──


def test_what_cannot_be_said_in_the_target_leaves_nothing_behind(folder, tmp_path):
    with pytest.raises(UnsupportedError, match="no GGUF form"):
        export(folder, tmp_path / "out.gguf")
    assert not (tmp_path / "out.gguf").exists()


def test_exporting_onto_the_source_is_refused(folder):
    with pytest.raises(RequestError, match="what is being read"):
        export(folder, folder)


def test_an_exported_folder_keeps_its_tokenizer_and_settings(folder, tmp_path):
    (folder / "generation_config.json").write_text('{"temperature": 0.5}')
    export(folder, tmp_path / "out")
    for name in ("config.json", "tokenizer.json", "tokenizer_config.json", "generation_config.json"):
        assert (tmp_path / "out" / name).is_file()
    assert tiercel.load(tmp_path / "out").default_params().temperature == 0.5


def test_a_network_changed_in_memory_is_what_gets_exported(folder, tmp_path):
    model = tiercel.load(folder)
    with torch.no_grad():
        model.network.norm.weight.mul_(2)
    model.export(tmp_path / "changed")
    assert torch.equal(tiercel.load(tmp_path / "changed").logits([1, 2]), model.logits([1, 2]))
