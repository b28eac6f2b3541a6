"""A packed copy of a checkpoint: the types of its recipe, the values of its types, and nothing half-written."""

import json
import sys
from pathlib import Path

import gguf
import pytest
import torch
from safetensors.torch import load_file, save_file

import tiercel
from tiercel.errors import FormatError, RequestError, UnsupportedError
from tiercel.families import from_hf
from tiercel.quant import PACKED_TYPES, dequantize
from tiercel.weights import fidelity, importance
from tiercel.weights.checkpoint import open_checkpoint, parameter_shapes
from tiercel.weights.export import NetworkSource, export
from tiercel.weights.load import load
from tiercel.weights.quantize import quantize
from tiercel.weights.quantized import quantized

sys.path.insert(0, str(Path(__file__).parents[1] / "golden"))
from make_recipes import CONFIGS, fresh_network

MUP = dict(
    lm_head_multiplier=1.37, embedding_multiplier=0.61, mlp_multipliers=[1.73, 0.57], key_multiplier=2.3,
    attention_in_multiplier=1.45, attention_out_multiplier=-0.66, ssm_in_multiplier=0.71, ssm_out_multiplier=1.31,
    ssm_multipliers=[1.52, 0.63, 1.81, 0.54, 1.67], max_position_embeddings=1024,
)  # fmt: skip
MODELS = {
    "llama": CONFIGS["llama"] | dict(num_hidden_layers=2, tie_word_embeddings=True),
    "mixtral": CONFIGS["mixtral"] | dict(num_hidden_layers=1, num_local_experts=3),
    "falcon-h1": CONFIGS["falcon-h1"] | dict(num_hidden_layers=2, tie_word_embeddings=True) | MUP,
    "jamba": CONFIGS["jamba"] | dict(num_hidden_layers=5, attn_layer_period=4, attn_layer_offset=3, num_experts=2),
}


@pytest.fixture(scope="module")
def folders(tmp_path_factory):
    """name → a bf16 Hugging Face folder with random weights, made once."""
    made = {}

    def make(name: str) -> Path:
        if name not in made:
            made[name] = tmp_path_factory.mktemp(name) / "model"
            layout = from_hf(MODELS[name])
            export(NetworkSource(fresh_network(layout, torch.bfloat16), layout), made[name])
        return made[name]

    return make


def same(view, path: Path, close: float = 0.0) -> None:
    """Every tensor of the written file has the view's type and values; close: relative to the largest, of NF4."""
    back, shapes = open_checkpoint(path), parameter_shapes(view.layout)
    for row in view.layout.rows:
        if row.ours == "head.weight":  # of its own in GGUF only
            continue
        count = shapes[row.ours][0]
        mine, theirs = view.read(row, 0, count).float(), back.read(row, 0, count).float()
        if view.stored(row) in PACKED_TYPES:
            assert back.stored(row) == view.stored(row), row.ours
            assert torch.equal(dequantize(back.stored(row), back.raw(row, 0, count)), theirs)
        loose = close * mine.abs().max() if view.stored(row) == "NF4" else mine.abs().max() * 4e-3  # bf16, unfolded
        exact = view.stored(row) in PACKED_TYPES and view.stored(row) != "NF4"
        assert torch.equal(mine, theirs) if exact else (mine - theirs).abs().max() <= loose, row.ours


@pytest.mark.parametrize("recipe", ["q4_k_m", "q8_0", "q2_k"])
@pytest.mark.parametrize("name", ["llama", "mixtral", "jamba"])
def test_a_gguf_file_holds_the_types_and_values_of_its_recipe(name, recipe, folders, tmp_path):
    found = quantize(folders(name), tmp_path / "m.gguf", recipe)
    same(quantized(open_checkpoint(folders(name)), recipe), tmp_path / "m.gguf")
    reader = gguf.GGUFReader(tmp_path / "m.gguf")
    assert reader.fields["general.file_type"].contents() == {"q4_k_m": 15, "q8_0": 7, "q2_k": 10}[recipe]
    assert reader.fields["general.quantization_version"].contents() == 2
    for tensor in reader.tensors:
        if "conv1d" in tensor.name or "ssm_a" in tensor.name or "norm" in tensor.name or "gate_inp" in tensor.name:
            assert tensor.tensor_type.name == "F32"
    assert sum(found["types"].values()) == len(parameter_shapes(from_hf(MODELS[name])))
    assert any("norm" not in n for n in found["unpacked"]) == (name != "llama")


def test_a_tied_embedding_with_a_scale_becomes_two_matrices_as_llama_cpp_needs_them(folders, tmp_path):
    quantize(folders("falcon-h1"), tmp_path / "m.gguf", "q4_k_m")
    types = {tensor.name: tensor.tensor_type.name for tensor in gguf.GGUFReader(tmp_path / "m.gguf").tensors}
    assert types["token_embd.weight"] == "Q4_K" and types["output.weight"] == "Q6_K"
    assert types["blk.0.ssm_in.weight"] == "Q4_K" and types["blk.0.ssm_conv1d.weight"] == "F32"
    quantize(folders("falcon-h1"), tmp_path / "m.gguf", "q8_0")
    tokens = torch.arange(30) % 64
    unpacked, packed = (load(path, dtype="float32")[0](tokens) for path in (folders("falcon-h1"), tmp_path / "m.gguf"))
    assert (packed - unpacked).norm() < 0.05 * unpacked.norm()


@pytest.mark.parametrize("recipe", ["q4_k_m", "int8"])
@pytest.mark.parametrize("name", MODELS)
def test_a_folder_of_ours_holds_any_type_and_reads_back(name, recipe, folders, tmp_path):
    quantize(folders(name), tmp_path / "out", recipe)
    config = json.loads((tmp_path / "out" / "config.json").read_text())
    assert config["quantization_config"] == {"quant_method": "tiercel"}
    same(quantized(open_checkpoint(folders(name)), recipe), tmp_path / "out")
    assert tiercel.load(tmp_path / "out", dtype="float32").logits([1, 2, 3]).isfinite().all()


@pytest.mark.parametrize("name", MODELS)
def test_an_nf4_folder_is_in_bitsandbytes_layout(name, folders, tmp_path):
    quantize(folders(name), tmp_path / "out", "nf4")
    view = quantized(open_checkpoint(folders(name)), "nf4")
    matrices = {row.ours for row in view.layout.rows if isinstance(row.hf, str)}  # experts stay as they are
    view.kinds = {ours: kind for ours, kind in view.kinds.items() if kind == "NF4" and ours in matrices}
    same(view, tmp_path / "out", close=0.02)
    asked = json.loads((tmp_path / "out" / "config.json").read_text())["quantization_config"]
    assert asked["quant_method"] == "bitsandbytes" and asked["bnb_4bit_use_double_quant"]
    assert "lm_head" in asked["llm_int8_skip_modules"]
    names = load_file(tmp_path / "out" / "model.safetensors").keys()
    assert sum(name.endswith(".quant_state.bitsandbytes__nf4") for name in names) >= len(view.kinds)
    export(tmp_path / "out", tmp_path / "again")  # NF4 stays NF4
    same(view, tmp_path / "again", close=0.02)


def test_export_of_a_packed_gguf_file_keeps_its_blocks(folders, tmp_path):
    for name in ("llama", "jamba"):
        quantize(folders(name), tmp_path / f"{name}.gguf", "q5_k_s", name="one")
        export(tmp_path / f"{name}.gguf", tmp_path / "two.gguf", name="one")
        assert (tmp_path / "two.gguf").read_bytes() == (tmp_path / f"{name}.gguf").read_bytes()
    export(tmp_path / "llama.gguf", tmp_path / "wide.gguf", dtype="bf16")
    assert {t.tensor_type.name for t in gguf.GGUFReader(tmp_path / "wide.gguf").tensors} == {"F32", "BF16"}
    export(tmp_path / "llama.gguf", tmp_path / "folder")  # for readers who know no blocks
    assert "quantization_config" not in json.loads((tmp_path / "folder" / "config.json").read_text())


def test_what_is_packed_already_is_taken_as_it_is_or_packed_again(folders, tmp_path):
    quantize(folders("llama"), tmp_path / "one.gguf", "q8_0")
    assert quantize(tmp_path / "one.gguf", tmp_path / "two.gguf", "q8_0")["was_packed"] == {"Q8_0": 15}
    one, two = (open_checkpoint(tmp_path / f"{n}.gguf") for n in ("one", "two"))
    for row in one.layout.rows:
        assert torch.equal(one.read(row, 0, 4), two.read(row, 0, 4))
    quantize(tmp_path / "one.gguf", tmp_path / "three.gguf", "q4_k_m")
    same(quantized(one, "q4_k_m"), tmp_path / "three.gguf")


def test_what_cannot_be_packed_is_refused_and_leaves_nothing(folders, tmp_path):
    folder = tmp_path / "bad"
    layout = from_hf(MODELS["llama"])
    network = fresh_network(layout, torch.float32)
    network.layers[1].feed_forward.up.weight[3, 5] = float("inf")
    export(NetworkSource(network, layout), folder)
    for recipe, out in (("q4_k_m", "m.gguf"), ("q4_0", "m.gguf"), ("int8", "out"), ("nf4", "out")):
        with pytest.raises(RequestError, match=r"layers.1.feed_forward.up.weight: NaN and infinity"):
            quantize(folder, tmp_path / out, recipe)
        assert not (tmp_path / "m.gguf").exists() and not list(tmp_path.glob("out/*.safetensors"))
    with pytest.raises(RequestError, match="choose one of q4_0, q4_1"):
        quantize(folders("llama"), tmp_path / "m.gguf", "q3")
    for recipe in ("int8", "nf4"):
        with pytest.raises(RequestError, match=f"GGUF files have no {recipe}"):
            quantize(folders("llama"), tmp_path / "m.gguf", recipe)
    with pytest.raises(RequestError, match="is what is being read"):
        quantize(folders("llama"), folders("llama"), "int8")


@pytest.mark.parametrize(
    "asked, says",
    [
        ({"quant_method": "gptq", "bits": 4}, "'gptq' checkpoints are not read"),
        ({"quant_method": "bitsandbytes", "load_in_8bit": True}, "8-bit bitsandbytes checkpoints are not read"),
        ("int4", "None checkpoints are not read"),
    ],
)
def test_other_packings_are_refused_in_one_line(asked, says, folders, tmp_path):
    config = json.loads((folders("llama") / "config.json").read_text()) | {"quantization_config": asked}
    (tmp_path / "config.json").write_text(json.dumps(config))
    (tmp_path / "model.safetensors").write_bytes((folders("llama") / "model.safetensors").read_bytes())
    with pytest.raises(UnsupportedError, match=says):
        open_checkpoint(tmp_path)


TABLES = ["[]", '{"nobody": "Q4_K"}', '{"model.norm.weight": "Q4_K"}', '{"model.embed_tokens.weight": "Q9"}',
          '{"model.embed_tokens.weight": "Q4_K"}']  # fmt: skip


@pytest.mark.parametrize("table", [None, *TABLES])
def test_a_table_of_types_that_is_not_sound_is_refused(table, folders, tmp_path):
    config = json.loads((folders("llama") / "config.json").read_text())
    (tmp_path / "config.json").write_text(json.dumps(config | {"quantization_config": {"quant_method": "tiercel"}}))
    tensors = load_file(folders("llama") / "model.safetensors")
    save_file(tensors, tmp_path / "model.safetensors", {} if table is None else {"tiercel.packed": table})
    with pytest.raises(FormatError, match=r"tiercel\.packed|cannot be rows of"):
        open_checkpoint(tmp_path)


def test_progress_counts_every_value(folders, tmp_path):
    for recipe, out in (("q4_k_m", "m.gguf"), ("nf4", "nf4"), ("int8", "int8")):
        seen: list[tuple[int, int]] = []
        quantize(folders("mixtral"), tmp_path / out, recipe, progress=lambda *at, seen=seen: seen.append(at))
        assert seen[-1][0] == seen[-1][1] and seen == sorted(seen), recipe


def test_an_importance_is_what_every_matrix_sees_and_survives_a_file(folders, tmp_path):
    network, _, layout = load(folders("mixtral"), dtype="float32")
    tokens = (torch.arange(700) * 7 % 64).tolist()
    learned = importance.gather(network, tokens)
    assert learned.tokens == 700
    down = {name for name in parameter_shapes(layout) if name.endswith("down")}
    matrices = {name for name in quantized(open_checkpoint(folders("mixtral")), "int8").kinds}
    assert matrices - down - {"embed.weight"} <= learned.by_name.keys()
    x = network.embed(torch.tensor(tokens))
    seen = network.layers[0].mixer_norm(x).square().mean(0)
    assert torch.allclose(learned.by_name["layers.0.mixers.attention.q.weight"], seen, rtol=1e-4)
    importance.save(learned, tmp_path / "i.safetensors")
    back = importance.read(tmp_path / "i.safetensors", layout)
    assert back.tokens == 700 and all(torch.equal(back.by_name[n], x) for n, x in learned.by_name.items())
    with pytest.raises(FormatError, match="belongs to another network"):
        importance.read(tmp_path / "i.safetensors", from_hf(MODELS["jamba"]))
    with pytest.raises(FormatError, match="is no importance file"):
        importance.read(folders("mixtral") / "model.safetensors", layout)
    found = quantize(folders("mixtral"), tmp_path / "m.gguf", "q4_k_m", importance=learned.by_name)
    assert found["importance"] == len(matrices - down) - 1
    same(quantized(open_checkpoint(folders("mixtral")), "q4_k_m", learned.by_name), tmp_path / "m.gguf")


def test_the_report_finds_more_lost_where_more_was_taken(folders):
    source = open_checkpoint(folders("falcon-h1"))
    tokens = (torch.arange(1100) ** 2 % 61).tolist()
    fine, coarse = (fidelity.measure(quantized(source, recipe), tokens) for recipe in ("q8_0", "q2_k"))
    assert [cost.packed for cost in fine.costs] == ["all", "attention", "mamba", "feed-forward", "embedding and output"]
    assert all(a.kl < b.kl and a.position == 512 for a, b in zip(fine.costs, coarse.costs, strict=True))
    assert fine.costs[0].top1 > 0.9 and fine.costs[0].positions == 2 * fidelity.SPAN
    assert fine.skipped == {8192: "the model's context ends at 1,024"}
    assert fidelity.Report.from_json(json.loads(json.dumps(fine.to_json()))) == fine
    assert any("not measured" in line for line in fidelity.table(fine))
    with pytest.raises(RequestError, match="at least 512 tokens: the text has 20 tokens, not 512"):
        fidelity.measure(quantized(source, "q8_0"), tokens[:20])
