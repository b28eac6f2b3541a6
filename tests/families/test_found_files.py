"""Checkpoints as they are found: another head beside tied embeddings, experts in tensors of their own."""

from __future__ import annotations

from pathlib import Path
from typing import Any

import pytest
import torch

from families import nasty
from tiercel.errors import FormatError
from tiercel.quant import PACKED_TYPES
from tiercel.weights.checkpoint import open_checkpoint
from tiercel.weights.export import export
from tiercel.weights.gguf import GGUFFile, Typed, write_gguf
from tiercel.weights.load import load
from tiercel.weights.quantize import quantize
from tiercel.weights.stored import OutTensor

IDS = nasty.tokens(19)
TIED = [name for name, made in nasty.NASTY.items() if made.config.get("tie_word_embeddings")]


def logits(path: Path) -> torch.Tensor:
    with torch.inference_mode():
        return load(path, dtype="float32")[0](IDS)


@pytest.mark.parametrize("name", TIED)
def test_a_head_that_differs_from_the_tied_embedding_is_kept(built, tmp_path, name):
    folder = nasty.copy(built(name).folder, tmp_path / "m")
    other = torch.randn(nasty.VOCAB, built(name).judge.config.hidden_size, generator=torch.Generator().manual_seed(5))
    nasty.edit_tensors(folder, lambda tensors: tensors.update({"lm_head.weight": other}))
    untied = nasty.copy(folder, tmp_path / "untied")
    nasty.edit_config(untied, lambda config: config.update(tie_word_embeddings=False))
    with pytest.warns(UserWarning, match="lm_head.weight differs: both are kept"):
        found = logits(folder)
    assert torch.equal(found, logits(untied))
    assert (found - nasty.whole(nasty.load_hf(untied), IDS)).abs().max() < 1e-4
    assert (found - logits(built(name).folder)).abs().max() > 0.1


@pytest.mark.parametrize("name", ["llama-tied", "h1-gate_first", "mamba-tied"])
def test_a_head_that_is_the_tied_embedding_is_one(built, tmp_path, name):
    folder = nasty.copy(built(name).folder, tmp_path / "m")
    embeddings = ("model.embed_tokens.weight", "backbone.embeddings.weight")

    def add(tensors: dict[str, Any]) -> None:
        tensors["lm_head.weight"] = next(tensors[name] for name in embeddings if name in tensors).clone()

    nasty.edit_tensors(folder, add)
    assert open_checkpoint(folder).layout.config.tied
    assert torch.equal(logits(folder), logits(built(name).folder))


def per_expert(file: Path, out: Path, without: str = "") -> Path:
    """The same GGUF file in the form of before April 2024: a tensor for each expert."""
    tensors: list[OutTensor] = []
    with GGUFFile(file) as opened:
        for tensor in opened.tensors.values():
            read = tensor.raw if tensor.type in PACKED_TYPES else tensor.rows
            if "_exps." not in tensor.name:
                tensors.append(OutTensor(tensor.name, tensor.shape, tensor.type, read))
                continue
            for e in range(tensor.shape[0]):
                name = tensor.name.replace("_exps.", f".{e}.")
                expert = read(e, e + 1)[0]
                tensors.append(OutTensor(name, tensor.shape[1:], tensor.type, lambda a, b, x=expert: x[a:b]))
        metadata = {key: Typed(opened.types[key], value) for key, value in opened.metadata.items()}
        write_gguf(out, metadata, [tensor for tensor in tensors if tensor.name != without])
    return out


@pytest.mark.parametrize("recipe", [None, "q8_0", "q4_0"])
def test_experts_in_tensors_of_their_own_are_stacked(built, tmp_path, recipe):
    file = tmp_path / "m.gguf"
    if recipe is None:
        export(built("mixtral-top2").folder, file)
    else:
        quantize(built("mixtral-top2").folder, file, recipe)
    assert torch.equal(logits(per_expert(file, tmp_path / "old.gguf")), logits(file))


def test_an_expert_that_is_missing_is_named(built, tmp_path):
    export(built("mixtral-top2").folder, tmp_path / "m.gguf")
    with pytest.raises(FormatError, match=r"the tensor 'blk.1.ffn_down.3.weight' is missing"):
        load(per_expert(tmp_path / "m.gguf", tmp_path / "old.gguf", without="blk.1.ffn_down.3.weight"))
