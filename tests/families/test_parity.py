"""The same numbers as transformers, for every family, however the tokens arrive.

Logits have a spread near 1 (asserted), so 1e-4 is a relative bound too.
"""

from __future__ import annotations

from collections.abc import Callable
from pathlib import Path
from typing import Any

import pytest
import torch

import tiercel
from families import nasty

PARITY = 1e-4  # against transformers
ALONE = 1e-5  # against ourselves: batch or alone
LONG = 300  # beyond two chunk boundaries of 128

every_model = pytest.mark.parametrize("name", list(nasty.NASTY))
MIXTURES = [
    name
    for name, n in nasty.NASTY.items()
    if ("num_experts" in n.config and name != "jamba-dense") or n.family == "mixtral"
]


@pytest.fixture(scope="module")
def loaded(built: Callable[[str], Any]) -> Callable[[str], Any]:
    done: dict[str, Any] = {}

    def load(name: str) -> Any:
        if name not in done:
            done[name] = tiercel.load(built(name).folder, dtype="float32").network
        return done[name]

    return load


def apart(a: torch.Tensor, b: torch.Tensor) -> float:
    assert a.shape == b.shape and a.dtype == b.dtype == torch.float32
    assert a.isfinite().all() and b.isfinite().all()
    return float((a - b).abs().max())


@torch.no_grad()
def in_chunks(net: Any, tokens: torch.Tensor, sizes: list[int]) -> torch.Tensor:
    """(L, V): one state, fed pieces of the given sizes; the last size repeats to the end."""
    state, parts, start, i = net.new_state(), [], 0, 0
    while start < len(tokens):
        size = sizes[min(i, len(sizes) - 1)]
        parts += net([tokens[start : start + size]], [state])
        start, i = start + size, i + 1
        assert state.length == min(start, len(tokens))
    return torch.cat(parts)


# -- against transformers --------------------------------------------------------------------------


@every_model
@torch.no_grad()
def test_whole_sequence_equals_transformers(name: str, built: Callable, loaded: Callable) -> None:
    tokens = nasty.tokens(LONG)
    expected = built(name).logits(tokens)
    assert 0.5 < expected.std() < 3, "the judge itself is degenerate"
    assert apart(loaded(name)(tokens), expected) < PARITY


@every_model
def test_step_by_step_equals_transformers(name: str, built: Callable, loaded: Callable) -> None:
    tokens = nasty.tokens(40, seed=1)
    assert apart(in_chunks(loaded(name), tokens, [1]), built(name).logits(tokens)) < PARITY


@every_model
def test_steps_over_a_chunk_boundary_equal_transformers(name: str, built: Callable, loaded: Callable) -> None:
    tokens = nasty.tokens(136, seed=2)
    assert apart(in_chunks(loaded(name), tokens, [122, 1]), built(name).logits(tokens)) < PARITY


@every_model
@pytest.mark.parametrize(("size", "length"), [(3, 140), (7, 140), (130, LONG)])
def test_chunks_equal_transformers(name: str, size: int, length: int, built: Callable, loaded: Callable) -> None:
    tokens = nasty.tokens(length, seed=size)
    assert apart(in_chunks(loaded(name), tokens, [size]), built(name).logits(tokens)) < PARITY


@pytest.mark.parametrize(("name", "length"), [("llama-longrope", 512), ("llama-dynamic", 1024)])
def test_a_scaling_that_would_rewrite_the_past_ends_the_context(name: str, length: int, loaded: Callable) -> None:
    """Beyond it transformers turns every earlier key anew; we end the context there (mixers/attention/rotary.py)."""
    assert loaded(name).config.max_length == length


# -- rows together and alone -----------------------------------------------------------------------


@every_model
@torch.no_grad()
def test_rows_of_different_length_and_age_equal_rows_alone(name: str, loaded: Callable) -> None:
    """A fresh row, one in decode, one about to cross a chunk, one across two chunks, one of a single token."""
    net = loaded(name)
    ages, lengths = [0, 33, 126, 5, 0], [17, 1, 5, 260, 1]
    rows = [nasty.tokens(age + length, seed=50 + i) for i, (age, length) in enumerate(zip(ages, lengths, strict=True))]
    together, alone = [net.new_state() for _ in rows], [net.new_state() for _ in rows]
    for states in (together, alone):
        for row, age, state in zip(rows, ages, states, strict=True):
            if age:
                net([row[:age]], [state])
    out = net([row[age:] for row, age in zip(rows, ages, strict=True)], together)
    for row, age, state, got, shared in zip(rows, ages, alone, out, together, strict=True):
        assert apart(got, net([row[age:]], [state])[0]) < ALONE
        assert shared.length == state.length == len(row)
    # and what each remembers is its own: one more step, again together and alone
    more = [nasty.tokens(1, seed=70 + i) for i in range(len(rows))]
    out = net(more, together)
    for token, state, got in zip(more, alone, out, strict=True):
        assert apart(got, net([token], [state])[0]) < ALONE


@every_model
@torch.no_grad()
def test_cached_equals_fresh_and_batch_of_one_equals_a_bare_row(name: str, loaded: Callable) -> None:
    net, tokens = loaded(name), nasty.tokens(90, seed=3)
    fresh = net(tokens)
    assert apart(net([tokens], [net.new_state()])[0], fresh) < ALONE
    assert apart(in_chunks(net, tokens, [37, 1, 52]), fresh) < PARITY


# -- the same model in other clothes ---------------------------------------------------------------


@every_model
@torch.no_grad()
def test_configs_in_the_spelling_of_transformers_4_load_alike(name: str, built: Callable, tmp_path: Path) -> None:
    model = built(name)
    old = nasty.copy(model.folder, tmp_path / "old")
    nasty.edit_config(old, nasty.spell_old)
    tokens = nasty.tokens(150, seed=4)
    assert apart(tiercel.load(old, dtype="float32").network(tokens), model.logits(tokens)) < PARITY


@pytest.mark.parametrize("name", MIXTURES)
@torch.no_grad()
def test_fused_experts_load_alike(name: str, built: Callable, tmp_path: Path) -> None:
    model = built(name)
    fused = nasty.copy(model.folder, tmp_path / "fused")
    nasty.edit_tensors(fused, nasty.fuse_experts)
    tokens = nasty.tokens(60, seed=5)
    assert apart(tiercel.load(fused, dtype="float32").network(tokens), model.logits(tokens)) < PARITY


@pytest.mark.parametrize("name", ["h1-gate_first", "llama-tied", "mamba-tied", "jamba-experts"])
@torch.no_grad()
def test_model_logits_are_the_networks(name: str, built: Callable) -> None:
    """The front door: `model.logits(ids)` takes plain numbers."""
    model, tokens = built(name), nasty.tokens(30, seed=6)
    logits = tiercel.load(model.folder, dtype="float32").logits(tokens.tolist())
    assert apart(logits, model.logits(tokens)) < PARITY


@torch.no_grad()
def test_olmo_hybrid_as_transformers_saves_it_loads_alike(built: Callable, tmp_path: Path) -> None:
    """5.24 cuts the convolutions into equal parts and renames a norm of the attention layers."""
    model = built("olmo_hybrid-rope")
    nasty.load_hf(model.folder).save_pretrained(tmp_path / "saved")
    saved = nasty.load_file(tmp_path / "saved" / "model.safetensors")
    assert set(saved) != set(nasty.load_file(model.folder / "model.safetensors"))
    tokens = nasty.tokens(60, seed=5)
    assert apart(tiercel.load(tmp_path / "saved", dtype="float32").network(tokens), model.logits(tokens)) < PARITY


@torch.no_grad()
def test_the_text_part_of_a_checkpoint_with_a_vision_tower(built: Callable, tmp_path: Path) -> None:
    model = built("qwen3_5-shared_keys")
    folder = nasty.copy(model.folder, tmp_path / "vision")

    def nest(config: dict[str, Any]) -> None:
        text = dict(config)
        config.clear()
        config |= {"model_type": "qwen3_5", "text_config": text, "vision_config": {"depth": 2}, "image_token_id": 5,
                   "architectures": ["Qwen3_5ForConditionalGeneration"], "tie_word_embeddings": False}  # fmt: skip

    def rename(tensors: dict[str, torch.Tensor]) -> None:
        for name in [name for name in tensors if name.startswith("model.")]:
            tensors[f"model.language_model.{name.removeprefix('model.')}"] = tensors.pop(name)
        tensors |= {name: torch.zeros(3, 3) for name in ("model.visual.patch_embed.proj.weight", "mtp.fc.weight")}

    nasty.edit_config(folder, nest)
    nasty.edit_tensors(folder, rename)
    tokens = nasty.tokens(60, seed=5)
    with pytest.warns(UserWarning, match=r"2 tensors are left out, they are not read: model\.visual\.\*, mtp\.\*"):
        network = tiercel.load(folder, dtype="float32").network
    assert apart(network(tokens), model.logits(tokens)) < PARITY


@pytest.mark.parametrize("name, outer", [("gemma3-tied", "gemma3"), ("mistral-full", "llava")])
@pytest.mark.parametrize("new", [False, True], ids=["4.x", "5.x"])
@torch.no_grad()
def test_the_text_part_of_a_vision_checkpoint_loads_alike(
    name: str, outer: str, new: bool, built: Callable, tmp_path: Path
) -> None:
    model, tokens = built(name), nasty.tokens(60, seed=8)
    folder = nasty.copy(model.folder, tmp_path / "vision")

    def inside(config: dict[str, Any]) -> None:
        text = dict(config)
        config.clear()
        config.update(model_type=outer, text_config=text, vision_config={"hidden_size": 8}, tie_word_embeddings=True)

    def prefixed(tensors: dict[str, torch.Tensor]) -> None:
        for key in list(tensors):
            inner = key.replace("model.", "model.language_model.", 1) if new else f"language_model.{key}"
            tensors[inner] = tensors.pop(key)
        tensors["vision_tower.patch.weight"] = torch.ones(2, 2)

    nasty.edit_config(folder, inside)
    nasty.edit_tensors(folder, prefixed)
    with pytest.warns(UserWarning, match="left out"):
        network = tiercel.load(folder, dtype="float32").network
    assert apart(network(tokens), model.logits(tokens)) < PARITY
