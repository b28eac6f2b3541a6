"""Nemotron-H and Granite beside what parity says: other names of the same tensors, and files that do not fit."""

from __future__ import annotations

from collections.abc import Callable
from pathlib import Path
from typing import Any

import pytest
import torch

import tiercel
from families import nasty
from tiercel.errors import FormatError, UnsupportedError
from tiercel.weights.checkpoint import open_checkpoint

PARITY = 1e-4


def logits(folder: Path) -> torch.Tensor:
    with torch.no_grad():
        return tiercel.load(folder, dtype="float32").network(nasty.tokens(40))


def changed(built: Callable, name: str, out: Path, tensors: Callable | None = None, **fields: Any) -> Path:
    folder = nasty.copy(built(name).folder, out)
    nasty.edit_config(folder, lambda config: config.update(fields))
    if tensors is not None:
        nasty.edit_tensors(folder, tensors)
    return folder


def as_in_memory(tensors: dict[str, torch.Tensor]) -> None:
    """The names of transformers 5's modules."""
    names = {"backbone.": "model.", "input_linear.weight": "experts.gate_up_proj", "router.layer.": "router.",
             "block_sparse_moe.output_linear.weight": "block_sparse_moe.experts.down_proj"}  # fmt: skip
    for name in sorted(tensors):
        x, new = tensors.pop(name), name
        for old, other in names.items():
            new = new if "shared_mlp" in new else new.replace(old, other)
        tensors[new] = x
    for kind in ("up", "down"):
        for block in sorted({name.split("experts.0.")[0] for name in tensors if f"experts.0.{kind}_proj" in name}):
            count = len([name for name in tensors if name.startswith(f"{block}experts.") and f".{kind}_proj.w" in name])
            each = [tensors.pop(f"{block}experts.{e}.{kind}_proj.weight") for e in range(count)]
            tensors[f"{block}experts.{kind}_proj"] = torch.stack(each)


@pytest.mark.parametrize("name", ["nemotron_h-experts", "granite-experts"])
def test_names_of_modules_are_names_of_files_too(name: str, built: Callable, tmp_path: Path) -> None:
    expected = built(name).logits(nasty.tokens(40))
    assert (logits(changed(built, name, tmp_path / "m", as_in_memory)) - expected).abs().max() < PARITY


def test_steps_are_not_clamped(built: Callable, tmp_path: Path) -> None:
    """transformers 5.24 clamps them to time_step_min in forwards of several tokens, and in none of one."""
    expected = built("nemotron_h-dense").logits(nasty.tokens(40))
    model = changed(built, "nemotron_h-dense", tmp_path / "m", time_step_min=0.7)
    assert (logits(model) - expected).abs().max() < PARITY


@pytest.mark.parametrize(
    ("name", "field"), [("nemotron_h-experts", "n_routed_experts"), ("granite-experts", "num_local_experts")]
)
@pytest.mark.parametrize("by", [4, -4])
def test_an_expert_count_that_does_not_match_is_refused(
    name: str, field: str, by: int, built: Callable, tmp_path: Path
) -> None:
    count = nasty.NASTY[name].config[field] + by
    fields = {field: count} if by > 0 or name.startswith("nemotron") else {field: count, "num_experts_per_tok": 1}
    with pytest.raises(FormatError, match=r"router|gate\.weight|experts|_linear"):
        open_checkpoint(changed(built, name, tmp_path / "m", **fields))


@pytest.mark.parametrize(
    ("name", "fields"),
    [("nemotron_h-experts", {"block_configs": [{"block_type": "moe"}]}), ("nemotron_h-dense", {"attention_bias": True}),
     ("nemotron_h-dense", {"layers_block_type": ["mamba", "rwkv"]}), ("granite-hybrid", {"qk_norm": True}),
     ("granite-hybrid", {"layer_types": ["mamba"]}), ("granite-dense", {"normalization_function": "layernorm"})],
)  # fmt: skip
def test_what_is_not_understood_is_refused_by_name(
    name: str, fields: dict[str, Any], built: Callable, tmp_path: Path
) -> None:
    with pytest.raises(UnsupportedError, match=next(iter(fields))):
        open_checkpoint(changed(built, name, tmp_path / "m", **fields))


def test_draft_heads_are_left_out_with_one_line(built: Callable, tmp_path: Path) -> None:
    model = changed(
        built, "nemotron_h-latent", tmp_path / "m", lambda t: t.update({"mtp.layers.0.enorm.weight": torch.ones(40)}),
        num_nextn_predict_layers=1,
    )  # fmt: skip
    with pytest.warns(UserWarning, match=r"1 tensors are left out.*mtp\."):
        found = logits(model)
    assert (found - built("nemotron_h-latent").logits(nasty.tokens(40))).abs().max() < PARITY
