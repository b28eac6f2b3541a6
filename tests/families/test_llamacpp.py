"""The numbers of llama.cpp: the same GGUF, written by us, run there once (golden/make_llamacpp.py) and here now.

Nano models: everything in float32 on both sides; measured difference at most 2e-5, bound 1e-4.

SmolLM2, 20 prompts, 64 tokens each.  llama.cpp multiplies the packed weights with activations rounded to 8 bits; we
unpack them and do not round.  On the unpacked file it does not round either, and there the text must be the same but
for steps at which its two best logits lie closer than float32 rounding.  On the packed file its own rounding moves
the gap between the two by 0.16 (root mean square) and less than 0.51 in 99 of 100 steps, measured by feeding it
both files the same tokens: a first difference must lie at a step with a gap below that.
"""

from __future__ import annotations

import dataclasses
import json
from pathlib import Path
from typing import Any

import numpy as np
import pytest
import torch

import tiercel
from golden import nano
from tiercel.weights.export import export

GOLDEN = Path(nano.__file__).parent
BOUND = 1e-4
BOUNDS = {"gemma3": 5e-3}  # ggml takes gelu from a table of float16 numbers (ggml-cpu/vec.h, GGML_GELU_FP16)
ROUNDING = 2e-3  # of float32 through 30 layers, on logits up to 30


@pytest.mark.parametrize("name", list(nano.CONFIGS))
@torch.no_grad()
def test_logits_of_our_gguf_equal_llama_cpps(name: str, tmp_path: Path) -> None:
    path = export(nano.build(name, tmp_path / name), tmp_path / "model.gguf")
    golden = np.load(GOLDEN / f"{name}.npz")
    network = tiercel.load(path, dtype="float32").network
    logits = network(torch.tensor(nano.TOKENS))[golden["positions"]]
    expected = torch.from_numpy(golden["logits"])
    assert logits.shape == expected.shape and 0.5 < expected.std() < 3
    assert float((logits - expected).abs().max()) < BOUNDS.get(name, BOUND)
    step_by_step, state = [], network.new_state()
    for token in nano.TOKENS:
        step_by_step += network([torch.tensor([token])], [state])
    assert float((torch.cat(step_by_step)[golden["positions"]] - expected).abs().max()) < BOUNDS.get(name, BOUND)


@torch.no_grad()
def test_a_gate_without_its_axis_of_one_is_read(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    """Older converters squeeze (1, D), and llama.cpp reads either."""
    folder = nano.build("qwen3next", tmp_path / "folder")
    right = tiercel.load(folder, dtype="float32").network(torch.tensor(nano.TOKENS))
    write = tiercel.weights.export.write_gguf

    def squeezed(path: Path, metadata: Any, tensors: Any) -> None:
        flat = [
            dataclasses.replace(t, shape=t.shape[1:], rows=lambda a, b, t=t: t.rows(0, 1)[0][a:b])
            if t.name.endswith("ffn_gate_inp_shexp.weight")
            else t
            for t in tensors
        ]
        assert sum(t.name.endswith("_shexp.weight") and len(t.shape) == 1 for t in flat) == 4
        write(path, metadata, flat)

    monkeypatch.setattr(tiercel.weights.export, "write_gguf", squeezed)
    path = export(folder, tmp_path / "model.gguf")
    assert float((tiercel.load(path, dtype="float32").network(torch.tensor(nano.TOKENS)) - right).abs().max()) < 1e-5


@torch.no_grad()
def test_prediction_heads_of_a_gguf_file_are_left_out_by_name(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    """llama.cpp's converter appends them as layers, which `block_count` counts."""
    folder = nano.build("qwen35", tmp_path / "folder")
    right = tiercel.load(folder, dtype="float32").network(torch.tensor(nano.TOKENS))
    write = tiercel.weights.export.write_gguf

    def with_head(path: Path, metadata: Any, tensors: Any) -> None:
        norm = next(t for t in tensors if t.name == "output_norm.weight")
        names = ("blk.4.nextn.enorm.weight", "blk.4.attn_norm.weight")
        more = [dataclasses.replace(norm, name=name) for name in names]
        metadata |= {"qwen35.block_count": 5, "qwen35.nextn_predict_layers": 1}
        metadata["qwen35.attention.recurrent_layers"] = [*metadata["qwen35.attention.recurrent_layers"], False]
        write(path, metadata, [*tensors, *more])

    monkeypatch.setattr(tiercel.weights.export, "write_gguf", with_head)
    path = export(folder, tmp_path / "model.gguf")
    with pytest.warns(UserWarning, match=r"2 tensors are left out, they are not read: blk\.4\.\*"):
        network = tiercel.load(path, dtype="float32").network
    assert float((network(torch.tensor(nano.TOKENS)) - right).abs().max()) < 1e-5


@pytest.fixture(scope="module")
def greedy(smollm2: Path) -> list[dict[str, Any]]:
    """Each golden run with our 64 greedy ids beside it."""
    network = tiercel.load(smollm2, dtype="float32").network
    runs = json.loads((GOLDEN / "smollm2.json").read_text())["runs"]
    return [run | {"ours": _continue(network, run["prompt_ids"], len(run["unpacked"]["ids"]))} for run in runs]


@torch.no_grad()
def _continue(network: Any, ids: list[int], count: int) -> list[int]:
    state, out, new = network.new_state(), [], torch.tensor(ids)
    for _ in range(count):
        out.append(int(network([new], [state], logits_to_keep=1)[0][-1].argmax()))
        new = torch.tensor(out[-1:])
    return out


def _differences(runs: list[dict[str, Any]], which: str) -> list[tuple[str, int, float]]:
    """(prompt, step, llama.cpp's gap there) of the first difference of every run that has one."""
    found = []
    for run in runs:
        steps = zip(run["ours"], run[which]["ids"], run[which]["gaps"], strict=True)
        first = next(((i, gap) for i, (ours, theirs, gap) in enumerate(steps) if ours != theirs), None)
        if first is not None:
            found.append((run["prompt"], *first))
    return found


@pytest.mark.slow
def test_greedy_text_of_smollm2_equals_llama_cpps_on_the_same_numbers(greedy: list[dict[str, Any]]) -> None:
    assert len(greedy) == 20 and all(len(run["ours"]) == 64 for run in greedy)
    assert [d for d in _differences(greedy, "unpacked") if d[2] > ROUNDING] == []


@pytest.mark.slow
def test_greedy_text_of_smollm2_leaves_llama_cpps_only_where_8_bit_activations_decide(
    greedy: list[dict[str, Any]],
) -> None:
    noise = json.loads((GOLDEN / "smollm2.json").read_text())["about"]["noise"]["p99"]
    differences = _differences(greedy, "packed")
    assert [d for d in differences if d[2] > noise] == []
    assert len(differences) < len(greedy)  # and some texts are the same from end to end


@pytest.mark.slow
def test_smollm2s_prompts_become_the_same_tokens(smollm2: Path) -> None:
    text = tiercel.load(smollm2, dtype="float32").text
    assert text is not None
    for run in json.loads((GOLDEN / "smollm2.json").read_text())["runs"]:
        assert text.encode(run["prompt"], bos=False) == run["prompt_ids"]
