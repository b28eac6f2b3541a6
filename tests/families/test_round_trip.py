"""Nothing is lost on the way out and in again: Hugging Face folder → ours → folder, and → GGUF → ours.

A tensor that no multiplier touches comes back bit for bit; one that was folded and unfolded comes back within
one rounding of its dtype (the neighbouring number at most).
"""

from __future__ import annotations

import json
from collections.abc import Callable
from pathlib import Path

import pytest
import torch
from safetensors.torch import load_file

import tiercel
from families import nasty
from golden import nano
from tiercel.errors import UnsupportedError
from tiercel.weights.export import export

SAME = 1e-5
H1 = [name for name in nasty.NASTY if name.startswith("h1-")]
#: what llama.cpp's files can say; every other nasty model has a switch that they cannot
IN_GGUF = ["h1-no_norm", "llama-biases", "llama-tied", "llama-linear", "llama-llama3", "llama-yarn",
           "llama-yarn_factor", "mistral-full", "qwen2-tied", "falcon_mamba-tied", "qwen3-tied",
           "qwen3_moe-renormalized", "mixtral-top2", "lfm2-tied", "gemma3-tied", "phi3-longrope",
           "lfm2_moe-renormalized", "qwen3_5-square",
           "qwen3_5_moe-square", "qwen3_next-square", "nemotron_h-dense", "nemotron_h-latent",
           "granite-hybrid", "granite-moe"]  # fmt: skip
NOT_IN_GGUF = [name for name in nasty.NASTY if name not in IN_GGUF]
#: the tensors of Falcon-H1 that multipliers are folded into, by the end of their names
FOLDED = (
    "embed_tokens.weight", "lm_head.weight", "q_proj.weight", "k_proj.weight", "k_proj.bias", "v_proj.weight",
    "o_proj.weight", "o_proj.bias", "mamba.in_proj.weight", "mamba.in_proj.bias", "mamba.out_proj.weight",
    "mamba.out_proj.bias", "gate_proj.weight", "gate_proj.bias", "down_proj.weight", "down_proj.bias",
)  # fmt: skip

both_dtypes = pytest.mark.parametrize("dtype", ["float32", "bfloat16"])


def ulps(a: torch.Tensor, b: torch.Tensor) -> int:
    """How many numbers of their dtype lie between the two, at most; −0 and 0 are one."""
    assert a.dtype == b.dtype and a.shape == b.shape and a.isfinite().all() and b.isfinite().all()
    whole = {torch.float32: torch.int32, torch.bfloat16: torch.int16}[a.dtype]

    def order(x: torch.Tensor) -> torch.Tensor:
        bits = x.contiguous().view(whole).long()
        return torch.where(bits < 0, -(bits + (1 << (x.element_size() * 8 - 1))), bits)

    return int((order(a) - order(b)).abs().max())


def compare(before: dict[str, torch.Tensor], after: dict[str, torch.Tensor], folded: tuple[str, ...]) -> None:
    assert set(before) == set(after)
    assert not folded or any(name.endswith(folded) for name in before)
    for name, tensor in before.items():
        assert tensor.dtype == after[name].dtype, name
        assert ulps(tensor, after[name]) <= (1 if name.endswith(folded) else 0), name


@torch.no_grad()
def logits(path: Path, tokens: torch.Tensor) -> torch.Tensor:
    return tiercel.load(path, dtype="float32").network(tokens)


def apart(a: torch.Tensor, b: torch.Tensor) -> float:
    assert a.shape == b.shape
    return float((a - b).abs().max())


@pytest.fixture
def folder(built: Callable, tmp_path: Path) -> Callable[[str, str], Path]:
    """A nasty model's folder in float32, or saved again by transformers in bfloat16."""

    def make(name: str, dtype: str) -> Path:
        model = built(name)
        if dtype == "float32":
            return model.folder
        narrow = nasty.load_hf(model.folder).to(torch.bfloat16)
        nasty.save(narrow, tmp_path / "bfloat16")
        return tmp_path / "bfloat16"

    return make


# -- folder → folder -------------------------------------------------------------------------------


@both_dtypes
@pytest.mark.parametrize("name", list(nasty.NASTY))
def test_a_folder_comes_back_as_it_was(name: str, dtype: str, folder: Callable, tmp_path: Path) -> None:
    source = folder(name, dtype)
    out = export(source, tmp_path / "out")
    folded = FOLDED if name in H1 else ()
    compare(load_file(source / "model.safetensors"), load_file(out / "model.safetensors"), folded)
    assert json.loads((out / "config.json").read_text()) == json.loads((source / "config.json").read_text())
    tokens = nasty.tokens(40)
    theirs = nasty.whole(nasty.load_hf(out), tokens)
    assert apart(theirs, nasty.whole(nasty.load_hf(source), tokens)) < (SAME if dtype == "float32" else 0.2)


@both_dtypes
@pytest.mark.parametrize("name", H1)
def test_a_network_in_memory_is_unfolded_on_the_way_out(
    name: str, dtype: str, folder: Callable, tmp_path: Path
) -> None:
    """Folding into the dtype of the checkpoint is a rounding, and unfolding is another: two neighbours at most."""
    source = folder(name, dtype)
    out = tiercel.load(source).export(tmp_path / "out")
    before, after = load_file(source / "model.safetensors"), load_file(out / "model.safetensors")
    assert set(before) == set(after)
    for key, tensor in before.items():
        assert ulps(tensor, after[key].to(tensor.dtype)) <= (2 if key.endswith(FOLDED) else 0), key


# -- folder → GGUF → ours --------------------------------------------------------------------------


def parameters(path: Path) -> dict[str, torch.Tensor]:
    network = tiercel.load(path, dtype="float32").network
    network.unpack()
    return dict(network.named_parameters())


def compare_networks(before: dict[str, torch.Tensor], after: dict[str, torch.Tensor]) -> None:
    """Bit for bit, but for A_log: GGUF holds −exp(A_log), whose logarithm is near 0 where A is near 1."""
    assert set(before) == set(after)
    for name, tensor in before.items():
        if name.endswith("A_log"):
            assert ulps(tensor.exp(), after[name].exp()) <= 4, name
        else:
            assert torch.equal(tensor, after[name]), name


@pytest.mark.parametrize("name", IN_GGUF)
def test_gguf_and_back_is_the_same_network(name: str, built: Callable, tmp_path: Path) -> None:
    model, tokens = built(name), nasty.tokens(150)
    out = export(model.folder, tmp_path / "model.gguf")
    compare_networks(parameters(model.folder), parameters(out))
    assert apart(logits(out, tokens), logits(model.folder, tokens)) < SAME
    assert apart(logits(out, tokens), model.logits(tokens)) < 1e-4


@pytest.mark.parametrize("name", list(nano.CONFIGS))
def test_gguf_and_back_is_the_same_network_for_each_of_llama_cpps_families(name: str, tmp_path: Path) -> None:
    folder = nano.build(name, tmp_path / name)
    out = export(folder, tmp_path / "model.gguf")
    compare_networks(parameters(folder), parameters(out))
    tokens = torch.tensor(nano.TOKENS)
    assert apart(logits(out, tokens), logits(folder, tokens)) < 2 * SAME  # A itself was rounded on the way


@pytest.mark.parametrize("name", ["h1-no_norm", "llama-biases", "qwen2-tied"])
def test_a_bfloat16_checkpoint_keeps_its_matrices_in_gguf(name: str, folder: Callable, tmp_path: Path) -> None:
    source = folder(name, "bfloat16")
    out = export(source, tmp_path / "model.gguf")
    ours, again = tiercel.load(source).network, tiercel.load(out).network
    ours.unpack(), again.unpack()
    before = {k: v for k, v in ours.named_parameters() if v.dim() == 2 and "conv" not in k}
    after = dict(again.named_parameters())
    assert len(before) >= 4
    for key, tensor in before.items():
        assert tensor.dtype == after[key].dtype == torch.bfloat16, key
        assert torch.equal(tensor, after[key]), key


@pytest.mark.parametrize("name", NOT_IN_GGUF)
def test_what_gguf_cannot_say_is_refused_before_anything_is_written(name: str, built: Callable, tmp_path: Path) -> None:
    with pytest.raises(UnsupportedError):
        export(built(name).folder, tmp_path / "model.gguf")
    assert list(tmp_path.iterdir()) == []


# -- GGUF as others read it ------------------------------------------------------------------------


@pytest.mark.parametrize("name", list(nano.CONFIGS))
def test_the_gguf_package_reads_what_we_write(name: str, tmp_path: Path) -> None:
    gguf = pytest.importorskip("gguf", reason="llama.cpp's own reader; pip install tiercel[dev]")
    reader = gguf.GGUFReader(export(nano.build(name, tmp_path / name), tmp_path / "model.gguf"))
    arch = name
    for variant in ("-no-norm", "-latent", "-dense"):
        arch = arch.removesuffix(variant)
    assert reader.get_field("general.architecture").contents() == arch
    assert reader.get_field(f"{arch}.vocab_size").contents() == nano.VOCAB
    if name.startswith("nemotron_h"):  # the converter takes a head of 64 for granted; llama.cpp's logits judge these
        return
    known = json.loads((Path(nano.__file__).parent / "converter.json").read_text())[name]
    ours = {t.name: [list(map(int, t.shape)), t.tensor_type.name] for t in reader.tensors}
    assert ours == known["tensors"]
    if arch.startswith("granite"):  # llama.cpp 0c1e570 finds no attention in folders of transformers 5
        return
    if name == "phi3":  # ours ends where longrope would turn earlier keys anew
        known["metadata"]["phi3.context_length"] = 512
    for key, value in known["metadata"].items():
        field = reader.get_field(key)
        assert field is not None, key
        assert field.contents() == (value if isinstance(value, str) else pytest.approx(value, rel=1e-6)), key


@pytest.mark.parametrize("name", IN_GGUF)
def test_a_gguf_becomes_a_folder_that_transformers_reads(name: str, built: Callable, tmp_path: Path) -> None:
    """Multipliers are gone by then: folded, all of them 1.  The logits are what counts."""
    model, tokens = built(name), nasty.tokens(40)
    through = export(model.folder, tmp_path / "model.gguf")
    if name == "llama-llama3":  # GGUF holds divisors; transformers has no field for them
        with pytest.raises(UnsupportedError, match="divisors"):
            export(through, tmp_path / "back")
        return
    back = export(through, tmp_path / "back")
    assert apart(nasty.whole(nasty.load_hf(back), tokens), model.logits(tokens)) < 1e-4


@pytest.mark.parametrize("name", list(nano.CONFIGS))
def test_a_nano_gguf_becomes_a_folder_that_transformers_reads(name: str, tmp_path: Path) -> None:
    pytest.importorskip("transformers", reason="the judge of every family; pip install tiercel[dev]")
    nasty.quiet()
    folder, tokens = nano.build(name, tmp_path / name), torch.tensor(nano.TOKENS[:40])
    back = export(export(folder, tmp_path / "model.gguf"), tmp_path / "back")
    expected = nasty.whole(nasty.load_hf(folder), tokens)
    assert apart(nasty.whole(nasty.load_hf(back), tokens), expected) < 1e-4
