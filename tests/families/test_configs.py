"""Foreign configs are read strictly, and patterns of one's own are configs like any other."""

import copy
import dataclasses
import json
import math
import os
import random

import pytest

from growth import Calls
from tiercel.errors import FormatError, RequestError, UnsupportedError
from tiercel.families import from_gguf, from_hf
from tiercel.families.family import Metadata
from tiercel.families.pattern import pattern, read_file
from tiercel.families.rope import read_gguf_rope
from tiercel.feed_forward.gated_mlp.config import GatedMLPConfig
from tiercel.feed_forward.moe.config import MoEConfig
from tiercel.mixers.attention.config import AttentionConfig
from tiercel.mixers.attention.rope import RopeConfig
from tiercel.mixers.mamba1.config import Mamba1Config
from tiercel.mixers.mamba2.config import Mamba2Config
from tiercel.model.config import ModelConfig
from tiercel.model.parameters import parameters
from tiercel.plan import parameter_count

SEVEN_B = {
    "architectures": ["FalconH1ForCausalLM"], "model_type": "falcon_h1", "attention_bias": False,
    "attention_in_multiplier": 1.0, "attention_out_multiplier": 0.1041666667, "attn_layer_indices": None,
    "embedding_multiplier": 5.656854249492381, "head_dim": 128, "hidden_act": "silu", "hidden_size": 3072,
    "intermediate_size": 12288, "key_multiplier": 0.0306903985, "lm_head_multiplier": 0.0130208333,
    "mamba_chunk_size": 128, "mamba_conv_bias": True, "mamba_d_conv": 4, "mamba_d_head": 128, "mamba_d_ssm": 3072,
    "mamba_d_state": 256, "mamba_expand": 2, "mamba_n_groups": 1, "mamba_n_heads": 24,
    "mamba_norm_before_gate": False, "mamba_proj_bias": False, "mamba_rms_norm": True, "mamba_use_mlp": True,
    "max_position_embeddings": 262144, "mlp_bias": False, "mlp_expansion_factor": 8,
    "mlp_multipliers": [0.2946278255, 0.0325520833], "num_attention_heads": 12, "num_hidden_layers": 44,
    "num_key_value_heads": 2, "projectors_bias": False, "rms_norm_eps": 1e-05, "rope_scaling": None,
    "rope_theta": 100000000000.0, "sliding_window": None, "ssm_in_multiplier": 0.4166666667,
    "ssm_multipliers": [0.3535533906, 0.25, 0.1767766953, 0.5, 0.3535533906], "ssm_out_multiplier": 0.1178511302,
    "tie_word_embeddings": False, "torch_dtype": "bfloat16", "transformers_version": "4.57.0", "vocab_size": 130048,
}  # fmt: skip
LLAMA = {
    "model_type": "llama", "hidden_size": 64, "intermediate_size": 96, "num_hidden_layers": 2,
    "num_attention_heads": 4, "vocab_size": 97, "rope_theta": 5e5,
    "rope_scaling": {"rope_type": "llama3", "factor": 8.0, "low_freq_factor": 1.0, "high_freq_factor": 4.0,
                     "original_max_position_embeddings": 8192},
}  # fmt: skip
JAMBA = {
    "model_type": "jamba", "hidden_size": 64, "intermediate_size": 96, "num_hidden_layers": 8, "num_experts": 4,
    "num_attention_heads": 4, "num_key_value_heads": 2, "vocab_size": 97,
}  # fmt: skip
MAMBA2 = {
    "model_type": "mamba2", "hidden_size": 64, "num_heads": 8, "head_dim": 16, "vocab_size": 97,
    "num_hidden_layers": 2, "n_groups": 2, "state_size": 16, "time_step_limit": [0.0, {"__float__": "Infinity"}],
}  # fmt: skip
SEEDS = [
    SEVEN_B,
    LLAMA,
    JAMBA,
    MAMBA2,
    {"pattern": "mamba2 attention", "width": 64, "vocab_size": 97, "model_type": "tiercel"},
]


def test_olmo_hybrid_without_positions_in_each_spelling() -> None:
    config = {"model_type": "olmo_hybrid", "num_hidden_layers": 4}
    for null in ({"rope_theta": None}, {"rope_parameters": None}, {"rope_parameters": {"rope_theta": None}},
                 {"rope_parameters": {"rope_type": None}}, {"rope_theta": None, "rope_scaling": None}):  # fmt: skip
        assert from_hf(config | null).config.layers[3].mixers[0].rope is None, null
    for theta, said in ((1e4, {}), (5e5, {"rope_theta": 5e5, "rope_scaling": None}),
                        (7e3, {"rope_parameters": {"rope_theta": 7e3}})):  # fmt: skip
        assert from_hf(config | said).config.layers[3].mixers[0].rope.theta == theta


@pytest.mark.parametrize(
    ("change", "names_it"),
    [
        ({"hidden_act": "gelu_pytorch_tanh"}, "hidden_act"),
        ({"layer_types": ["full_attention"]}, "layer_types must name"),
        ({"layer_types": ["mamba"] * 4}, "layer_types must name"),
        ({"linear_num_value_heads": 20}, "20 value heads cannot share 16 key heads"),
        ({"attn_output_gate": False}, "attn_output_gate = False"),
        ({"num_experts": 8}, "num_experts = 8 is not known"),
        ({"vision_config": {"depth": 2}, "text_config": 5}, "vision_config"),
    ],
)
def test_a_qwen3_5_config_that_asks_for_more_is_refused_by_name(change, names_it) -> None:
    config = {"model_type": "qwen3_5_text", "num_hidden_layers": 4, "hidden_size": 64}
    assert from_hf(config).config.width == 64
    with pytest.raises(FormatError, match=names_it):
        from_hf(config | change)


def test_the_published_7b_is_what_it_says():
    layout = from_hf(SEVEN_B)
    assert parameter_count(layout.config) == 7_585_648_736
    attention, mamba2 = layout.config.layers[43].mixers
    assert (attention.head_dim, attention.rope.theta) == (128, 1e11)  # not 3072 / 12
    assert (mamba2.heads, mamba2.head_dim, mamba2.gated_norm, mamba2.chunk) == (24, 128, "gate_first", 128)
    scale = {row.ours.removeprefix("layers.0."): row.scale for row in layout.rows}
    assert scale["mixers.attention.k.weight"] == pytest.approx(0.0306903985)
    assert [round(s / 0.4166666667, 6) for _, s in scale["mixers.mamba2.in_proj.weight"]] == [
        0.353553, 0.25, 0.176777, 0.5, 0.353553,
    ]  # fmt: skip


@pytest.mark.parametrize(
    "change, names_it",
    [
        ({"hidden_act": "gelu_new"}, "hidden_act = 'gelu_new'"),
        ({"rope_scaling": {"rope_type": "ntk-aware", "factor": 2}}, "'ntk-aware'"),
        ({"sliding_window": 4096}, "sliding_window = 4096"),
        ({"quantization_config": {"bits": 4}}, "quantization_config"),
        ({"final_logit_softcapping": 30.0}, "final_logit_softcapping = 30.0"),
        ({"residual_multiplier": 0.22}, "residual_multiplier = 0.22"),
        ({"num_attention_heads": "12"}, "num_attention_heads must be a whole number"),
        ({"num_attention_heads": 12.5}, "num_attention_heads must be a whole number"),
        ({"num_hidden_layers": 10**9}, "num_hidden_layers must be a whole number"),
        ({"vocab_size": -1}, "vocab_size must be a whole number"),
        ({"hidden_size": None}, "'hidden_size' is missing"),
        ({"head_dim": 0}, "head_dim must be a whole number"),
        ({"mamba_n_groups": 5}, "cannot share 5 groups"),
        ({"num_key_value_heads": 5}, "cannot share 5 key/value heads"),
        ({"mamba_d_state": 2**31}, "mamba_d_state"),
        ({"mamba_chunk_size": 0}, "mamba_chunk_size"),
        ({"mamba_d_head": 64}, "must be the inner width"),
        ({"rms_norm_eps": -1.0}, "norm_eps"),
        ({"rms_norm_eps": math.nan}, "rms_norm_eps must be a finite number"),
        ({"key_multiplier": 0.0}, "key_multiplier must not be zero"),
        ({"key_multiplier": math.inf}, "key_multiplier must be a finite number"),
        ({"ssm_multipliers": [1.0, 2.0]}, "ssm_multipliers must be a list of 5"),
        ({"rope_theta": 0}, "rope_theta must be a positive number"),
        ({"tie_word_embeddings": "yes"}, "tie_word_embeddings must be true or false"),
        ({"model_type": "mystery"}, "model_type 'mystery' is not supported; known:"),
        ({"model_type": ["falcon_h1"]}, "is not supported"),
        ({"mamba_d_ssm": 2**30, "mamba_expand": 1e200}, ""),
    ],
)
def test_what_cannot_be_is_refused_by_name(change, names_it):
    with pytest.raises(FormatError) as error:
        from_hf(SEVEN_B | change)
    assert names_it in str(error.value) and "\n" not in str(error.value)


def test_what_would_change_the_mathematics_is_unsupported_rather_than_broken():
    for change in ({"hidden_act": "gelu"}, {"logits_scaling": 8.0}):
        with pytest.raises(UnsupportedError):
            from_hf(SEVEN_B | change)


@pytest.mark.parametrize(
    "name",
    "gradient_checkpointing pad_token max_new_tokens use_flash_attention_2 "
    "tokenizer_padding_side label_smoothing bos_token learning_rate fp16 stop_strings".split(),
)
@pytest.mark.parametrize("config", [SEVEN_B, LLAMA, JAMBA], ids=lambda config: config["model_type"])
def test_bookkeeping_of_trainers_and_clients_is_let_through(config, name):
    assert from_hf(config | {name: "x"}).config == from_hf(config).config


@pytest.mark.parametrize("config", [SEVEN_B, LLAMA], ids=lambda config: config["model_type"])
def test_rope_scaling_replaces_rope_parameters_as_in_transformers_5(config):
    theta = config["rope_theta"]
    config = {key: value for key, value in config.items() if not key.startswith("rope_")}
    linear = {"rope_type": "linear", "factor": 4.0}
    parameters = {"rope_type": "linear", "factor": 2.0, "rope_theta": theta}
    both = from_hf(config | {"rope_parameters": parameters, "rope_scaling": linear | {"rope_theta": theta}})
    assert both.config == from_hf(config | {"rope_theta": theta, "rope_scaling": linear}).config
    with pytest.raises(UnsupportedError, match="put rope_theta into rope_scaling"):
        from_hf(config | {"rope_parameters": parameters, "rope_scaling": linear})


LINEAR4, YARN = RopeConfig(theta=1e4, scaling="linear", factor=4.0), {"scaling.type": "yarn", "scaling.factor": 4.0}
YARN4 = RopeConfig(theta=1e4, scaling="yarn", factor=4.0, original_length=2048)


@pytest.mark.parametrize("arch", ["llama", "qwen2", "falcon-h1"])
@pytest.mark.parametrize(
    "keys, rope",
    [
        ({"scale_linear": 4.0}, LINEAR4),
        ({"scaling.factor": 4.0}, LINEAR4),
        ({"scaling.type": "linear", "scale_linear": 4.0}, LINEAR4),
        ({"scaling.factor": 4.0, "scale_linear": 2.0}, LINEAR4),
        ({"scaling.factor": 0.0, "scale_linear": 2.0}, RopeConfig()),
        ({"scaling.type": "linear"}, RopeConfig()),
        ({"scaling.type": "none", "scaling.factor": 4.0}, RopeConfig()),
        ({"scaling.attn_factor": 1.5}, RopeConfig(attention_factor=1.5)),
        (YARN, YARN4),
        (YARN | {"scaling.attn_factor": 2.0}, dataclasses.replace(YARN4, attention_factor=2 * (1 + math.log(4) / 10))),
        (YARN | {"scaling.original_context_length": 512}, dataclasses.replace(YARN4, original_length=512)),
    ],
)
def test_older_rotary_keys_of_gguf_are_read_as_llama_cpp_reads_them(arch, keys, rope):
    metadata = {f"{arch}.rope.{key}": value for key, value in keys.items()} | {f"{arch}.context_length": 2048}
    assert read_gguf_rope(Metadata(metadata, arch), {}, 16) == rope


@pytest.mark.parametrize("key", ["rope.scaling.yarn_ext_factor", "rope.dimension_sections", "rope.freq_base_swa"])
def test_rotary_keys_of_gguf_that_have_no_equal_are_refused_by_name(key):
    with pytest.raises(UnsupportedError, match=f"llama.{key} = "):
        read_gguf_rope(Metadata({f"llama.{key}": 7.0}, "llama"), {}, 16)


def test_what_cannot_matter_is_let_through():
    from_hf(
        SEVEN_B
        | {"_name_or_path": "x", "auto_map": {"AutoModel": "x.Y"}, "use_cache": False, "new_flag": None, "off": False}
    )


@pytest.mark.parametrize("spelling", ["4.x", "5.x"])
def test_both_spellings_of_rotary_settings(spelling):
    config = copy.deepcopy(LLAMA)
    if spelling == "5.x":
        config["rope_parameters"] = config.pop("rope_scaling") | {"rope_theta": config.pop("rope_theta")}
    rope = from_hf(config).config.layers[0].mixers[0].rope
    assert (rope.theta, rope.scaling, rope.factor, rope.original_length) == (5e5, "llama3", 8.0, 8192)


def test_scalings_that_rewrite_the_past_stay_within_their_original_length():
    """Dynamic NTK changes every earlier key when the text grows: run only where it does not act."""
    config = LLAMA | {"max_position_embeddings": 4096, "rope_scaling": {"type": "dynamic", "factor": 2.0}}
    assert from_hf(config).config.max_length == 4096


def test_the_layer_pattern_of_a_hybrid_is_data():
    kinds = [layer.mixers[0].kind for layer in from_hf(JAMBA).config.layers]
    assert kinds == ["mamba1"] * 4 + ["attention"] + ["mamba1"] * 3
    experts = [isinstance(layer.feed_forward, MoEConfig) for layer in from_hf(JAMBA).config.layers]
    assert experts == [False, True] * 4


def test_gguf_metadata_is_read_as_strictly():
    for metadata in (
        {},
        {"general.architecture": 7},
        {"general.architecture": "gpt2"},
        {"general.architecture": "llama"},
    ):
        with pytest.raises(FormatError):
            from_gguf(metadata, {})


# ── 2,000 broken configs ──

ODD = [0, -1, 1, 2**31, 2**63, 10**30, 1.5, -0.0, math.nan, math.inf, 1e308]
ODD += ["", "x", "auto", None, True, False, [], {}, [1], ["a"], {"a": 1}, [[]], "\ud800"]


def mutated(rng):
    config = copy.deepcopy(rng.choice(SEEDS))
    for _ in range(rng.choice((1, 1, 2, 3))):
        place, key = config, rng.choice(list(config))
        if isinstance(place.get(key), dict) and place[key] and rng.random() < 0.7:
            place, key = place[key], rng.choice(list(place[key]))
        match rng.randrange(4):
            case 0:
                place.pop(key, None)
            case 1:
                place[rng.choice(["layers", "rope_parameters", "experts", "new_field", key + "_"])] = rng.choice(ODD)
            case _:
                place[key] = rng.choice(ODD)
    return config


def test_two_thousand_mutated_configs_meet_format_error_or_are_sound():
    rng = random.Random(11)
    refused = 0
    for i in range(int(os.environ.get("TIERCEL_FUZZ", 2000))):
        config = mutated(rng)
        with Calls() as calls:
            try:
                layout = from_hf(config)
                assert layout.config.layers
            except FormatError as error:
                refused += 1
                assert str(error) and "\n" not in str(error)
        assert calls.count < 50_000, f"case {i}: {config}"
    assert refused > 200


@pytest.mark.parametrize(
    "text", ["", "{", "[]", "null", "3", '{"model_type": "llama"}', "[" * 100_000, '{"a": NaN}', "\x00"]
)
def test_a_config_file_that_is_no_config(tmp_path, text):
    from tiercel.weights.checkpoint import open_checkpoint

    (tmp_path / "config.json").write_text(text)
    with pytest.raises(FormatError):
        open_checkpoint(tmp_path)


# ── patterns ──


def test_three_to_one_is_four_words():
    config = pattern("mamba2 mamba2 mamba2 attention", width=64, vocab_size=100, repeat=2)
    assert [layer.mixers[0].kind for layer in config.layers] == ["mamba2", "mamba2", "mamba2", "attention"] * 2
    assert all(isinstance(layer.feed_forward, GatedMLPConfig) for layer in config.layers)


@pytest.mark.parametrize("word", ["attention+mamba2", "attention∥mamba2", "attention|mamba2"])
def test_side_by_side(word):
    (layer,) = pattern([word], width=64, vocab_size=100).layers
    assert [type(mixer) for mixer in layer.mixers] == [AttentionConfig, Mamba2Config]


def test_feed_forwards_can_be_chosen_layer_by_layer():
    layers = pattern("mamba1/- attention/moe mamba2", width=64, vocab_size=100, experts=5, active=3).layers
    assert isinstance(layers[0].mixers[0], Mamba1Config) and layers[0].feed_forward is None
    assert layers[1].feed_forward == MoEConfig(width=256, experts=5, active=3)
    assert isinstance(layers[2].feed_forward, GatedMLPConfig)


@pytest.mark.parametrize("words", ["", "mamba3", "attention/mpl", "attention+attention", "+", "attention+"])
def test_a_word_that_is_not_known_is_named(words):
    with pytest.raises((RequestError, FormatError)):
        pattern(words, width=64, vocab_size=100)


def test_a_small_file_is_a_network(tmp_path):
    fields = {"pattern": "mamba2 attention", "width": 64, "vocab_size": 100, "repeat": 3}
    (tmp_path / "net.json").write_text(json.dumps(fields))
    lines = [f"{k} = {json.dumps(v)}" for k, v in fields.items()]
    (tmp_path / "net.toml").write_text("\n".join(lines))
    expected = pattern("mamba2 attention", width=64, vocab_size=100, repeat=3)
    assert read_file(tmp_path / "net.json") == read_file(tmp_path / "net.toml") == expected
    (tmp_path / "whole.json").write_text(json.dumps(expected.to_dict()))
    assert read_file(tmp_path / "whole.json") == expected


@pytest.mark.parametrize(
    "fields",
    [
        {"pattern": "attention"},
        {"pattern": "attention", "width": 64, "vocab_size": 100, "depth": 3},
        {"pattern": 3, "width": 64, "vocab_size": 100},
        {"pattern": "attention", "width": "64", "vocab_size": 100},
        {"pattern": "attention", "width": 64, "vocab_size": 100, "repeat": 10**9},
        {"layers": []},
        {"layers": [{"mixers": [{"kind": "attention"}]}], "vocab_size": 3, "width": 4},
    ],
)
def test_a_broken_pattern_file_is_refused(tmp_path, fields):
    (tmp_path / "net.json").write_text(json.dumps(fields))
    with pytest.raises((FormatError, RequestError)):
        read_file(tmp_path / "net.json")


@pytest.mark.parametrize("words", ["mamba1/-", "attention+mamba2/moe mamba1", "mamba2 attention/-"])
def test_the_names_of_a_pattern_are_the_networks(words):
    from tiercel.model.decoder import Decoder

    config = pattern(words, width=32, vocab_size=50, tied=False)
    assert set(parameters(config)) == {name for name, _ in Decoder(config).named_parameters()}


def test_a_config_survives_its_own_json():
    for data in SEEDS:
        config = from_hf(data).config
        assert ModelConfig.from_dict(json.loads(json.dumps(config.to_dict()))) == config


GEMMA3 = {"model_type": "gemma3_text", "hidden_size": 64, "num_hidden_layers": 7, "intermediate_size": 96}
PHI3 = {"model_type": "phi3", "hidden_size": 64, "num_attention_heads": 4, "num_hidden_layers": 2}
LFM2 = {"model_type": "lfm2", "hidden_size": 64, "num_attention_heads": 8, "num_hidden_layers": 2}
LFM3 = {"model_type": "lfm3", "hidden_size": 64, "num_hidden_layers": 3}


@pytest.mark.parametrize(
    "config, change, names_it",
    [
        (GEMMA3, {"final_logit_softcapping": 30.0}, "final_logit_softcapping = 30.0"),
        (GEMMA3, {"attn_logit_softcapping": 50.0}, "attn_logit_softcapping = 50.0"),
        (GEMMA3, {"use_bidirectional_attention": True}, "use_bidirectional_attention = True"),
        (GEMMA3, {"rope_parameters": {"rope_type": "default", "rope_theta": 1e4}}, "a table for each of"),
        (GEMMA3, {"sliding_window": None}, "sliding_window is null"),
        (GEMMA3, {"layer_types": ["chunked_attention"] * 7}, "layer_types must name"),
        (PHI3, {"rope_scaling": {"type": "ntk", "factor": 2}}, "'ntk'"),
        (PHI3, {"mlp_bias": True}, "mlp_bias = True"),
        (LFM2, {"block_use_swiglu": False}, "block_use_swiglu = False"),
        (LFM2, {"conv_dim": 32}, "conv_dim = 32"),
        (LFM2, {"layer_types": ["conv", "sliding_attention"]}, "layer_types must name"),
        (LFM2, {"model_type": "lfm2_moe"}, "'layer_types' is missing"),
        (LFM3, {"rope_theta": 1e6}, "rope_theta = 1000000.0"),
        (LFM3, {"num_experts": 8}, "num_experts = 8"),
        ({"model_type": "llava", "text_config": {"model_type": "opt"}}, {}, "'opt' is not supported in llava"),
    ],
)
def test_what_these_families_do_not_have_is_refused_by_name(config, change, names_it):
    from_hf(config) if change else None
    with pytest.raises(FormatError) as error:
        from_hf(config | change)
    assert names_it in str(error.value) and "\n" not in str(error.value)
