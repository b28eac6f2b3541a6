"""Nano checkpoints that any machine can rebuild bit for bit, without transformers.

    build(name, folder)      config.json and model.safetensors, float32, as Hugging Face lays them out
    TOKENS                   the 150 tokens that the golden logits belong to

Every number comes from the raw 64-bit stream of PCG64, which numpy guarantees never to change: the top
24 bits make a float in [-1, 1) exactly.  Sizes are those that llama.cpp can run (Jamba: expand 2, conv bias).
"""

from __future__ import annotations

import json
from pathlib import Path
from typing import Any

import numpy as np
from safetensors.numpy import save_file

VOCAB = 96
Shapes = dict[str, tuple[int, ...]]


def _numbers(seed: int, count: int) -> np.ndarray:
    raw = np.random.PCG64(seed).random_raw(count)
    return ((raw >> np.uint64(40)).astype(np.float64) / 2**23 - 1.0).astype(np.float32)


TOKENS: list[int] = [int(v) for v in (_numbers(7, 150).astype(np.float64) + 1) * VOCAB / 2]

_ROPE = {"rope_type": "default", "rope_theta": 5000.0}
_ATTENTION = dict(
    vocab_size=VOCAB, hidden_size=64, intermediate_size=96, num_hidden_layers=3, num_attention_heads=4,
    num_key_value_heads=2, max_position_embeddings=2048, hidden_act="silu", bos_token_id=1, eos_token_id=2,
    tie_word_embeddings=False, dtype="float32",
)  # fmt: skip
_H1 = _ATTENTION | dict(
    model_type="falcon_h1", architectures=["FalconH1ForCausalLM"], num_attention_heads=6, head_dim=24,
    rms_norm_eps=1e-5, rope_parameters={"rope_type": "default", "rope_theta": 1e6},
    mamba_d_ssm=48, mamba_n_heads=6, mamba_d_head=8, mamba_d_state=16, mamba_n_groups=2, mamba_d_conv=4,
    mamba_chunk_size=128, mamba_expand=2, mamba_rms_norm=True, mamba_norm_before_gate=False, mamba_conv_bias=True,
    mamba_proj_bias=False, projectors_bias=False, attention_bias=False, mlp_bias=False,
    attention_in_multiplier=1.1, attention_out_multiplier=0.7, key_multiplier=0.6, lm_head_multiplier=0.9,
    embedding_multiplier=1.7, mlp_multipliers=[0.8, 1.3], ssm_in_multiplier=1.2, ssm_out_multiplier=0.5,
    ssm_multipliers=[0.9, 1.1, 0.8, 1.3, 0.7],
)  # fmt: skip

_QWEN3_5 = _ATTENTION | dict(
    model_type="qwen3_5_text", architectures=["Qwen3_5ForCausalLM"], rms_norm_eps=1e-6,
    num_attention_heads=2, num_key_value_heads=1, head_dim=128,
    num_hidden_layers=4, full_attention_interval=3, rope_parameters=_ROPE | {"partial_rotary_factor": 0.5},
    linear_num_key_heads=2, linear_num_value_heads=6, linear_key_head_dim=16, linear_value_head_dim=16,
    linear_conv_kernel_dim=4, attention_bias=False, tie_word_embeddings=True,
    layer_types=["linear_attention", "linear_attention", "full_attention", "linear_attention"],
)  # fmt: skip
_EXPERTS = dict(
    intermediate_size=80, num_experts=6, num_experts_per_tok=2, moe_intermediate_size=40,
    shared_expert_intermediate_size=56,
)  # fmt: skip

CONFIGS: dict[str, dict[str, Any]] = {
    "falcon-h1": _H1,
    "falcon-h1-no-norm": _H1 | {"mamba_rms_norm": False, "mamba_n_groups": 1},
    "llama": _ATTENTION | dict(
        model_type="llama", architectures=["LlamaForCausalLM"], head_dim=20, rms_norm_eps=1e-4, rope_parameters=_ROPE,
        attention_bias=False, mlp_bias=False,
    ),
    "qwen2": _ATTENTION | dict(
        model_type="qwen2", architectures=["Qwen2ForCausalLM"], rms_norm_eps=1e-6,
        rope_parameters=_ROPE, use_sliding_window=False, tie_word_embeddings=True,
    ),
    "mamba2": dict(
        model_type="mamba2", architectures=["Mamba2ForCausalLM"], vocab_size=VOCAB, hidden_size=48, num_heads=8,
        head_dim=12, state_size=16, num_hidden_layers=3, layer_norm_epsilon=1e-5, expand=2, conv_kernel=4, n_groups=2,
        use_bias=False, use_conv_bias=True, hidden_act="silu", chunk_size=64, bos_token_id=1, eos_token_id=2,
        tie_word_embeddings=False, dtype="float32",
    ),
    "lfm2": _ATTENTION | dict(
        model_type="lfm2", architectures=["Lfm2ForCausalLM"], norm_eps=1e-4, rope_parameters=_ROPE,
        num_hidden_layers=4, layer_types=["conv", "full_attention", "conv", "full_attention"], conv_L_cache=4,
        conv_bias=False, block_auto_adjust_ff_dim=False, block_ffn_dim_multiplier=1.0, block_multiple_of=256,
        tie_word_embeddings=True,
    ),
    "qwen35": _QWEN3_5,
    "qwen35moe": _QWEN3_5 | _EXPERTS | dict(
        model_type="qwen3_5_moe_text", architectures=["Qwen3_5MoeForCausalLM"], tie_word_embeddings=False,
    ),
    "qwen3next": _QWEN3_5 | _EXPERTS | dict(
        model_type="qwen3_next", architectures=["Qwen3NextForCausalLM"], norm_topk_prob=True, decoder_sparse_step=1,
        mlp_only_layers=[],
    ),
    "lfm2moe": {key: value for key, value in _ATTENTION.items() if key != "hidden_act"} | dict(
        model_type="lfm2_moe", architectures=["Lfm2MoeForCausalLM"], norm_eps=1e-4, rope_parameters=_ROPE,
        num_hidden_layers=4, layer_types=["conv", "full_attention", "conv", "conv"], conv_L_cache=3, conv_bias=False,
        moe_intermediate_size=48, num_dense_layers=1, num_experts=6, num_experts_per_tok=2, use_expert_bias=True,
        norm_topk_prob=True, routed_scaling_factor=1.0, tie_word_embeddings=True,
    ),
    "gemma3": {key: value for key, value in _ATTENTION.items() if key != "hidden_act"} | dict(
        model_type="gemma3_text", architectures=["Gemma3ForCausalLM"], rms_norm_eps=1e-5, num_hidden_layers=7,
        head_dim=20, query_pre_attn_scalar=20, sliding_window=11, sliding_window_pattern=6,
        hidden_activation="gelu_pytorch_tanh", rope_theta=5000.0, rope_local_base_freq=300.0,
        rope_scaling={"rope_type": "linear", "factor": 2.5}, attention_bias=False, tie_word_embeddings=True,
    ),
    "phi3": _ATTENTION | dict(
        model_type="phi3", architectures=["Phi3ForCausalLM"], rms_norm_eps=1e-4, sliding_window=None, pad_token_id=0,
        original_max_position_embeddings=512, rope_parameters=_ROPE | {
            "rope_type": "longrope", "partial_rotary_factor": 0.75, "original_max_position_embeddings": 512,
            "short_factor": [1.0, 1.1, 1.3, 1.6, 2.0, 2.5], "long_factor": [1.2, 1.5, 2.0, 3.0, 4.0, 6.0],
        },
    ),
    "jamba": _ATTENTION | dict(
        model_type="jamba", architectures=["JambaForCausalLM"], rms_norm_eps=1e-6,
        num_hidden_layers=4, attn_layer_period=3, attn_layer_offset=1, expert_layer_period=2, expert_layer_offset=1,
        num_experts=4, num_experts_per_tok=2, mamba_d_state=16, mamba_d_conv=4, mamba_expand=2, mamba_dt_rank=5,
        mamba_conv_bias=True, mamba_proj_bias=False,
    ),
}  # fmt: skip
_NEMOTRON = _ATTENTION | dict(
    model_type="nemotron_h", architectures=["NemotronHForCausalLM"], layer_norm_epsilon=1e-4, head_dim=24,
    layers_block_type=["linear_attention", "mlp", "full_attention", "mlp", "linear_attention"], ssm_state_size=16,
    mamba_num_heads=6, mamba_head_dim=8, n_groups=2, conv_kernel=4, chunk_size=64, mlp_hidden_act="relu2",
)  # fmt: skip
_NEMOTRON_MOE = dict(
    layers_block_type=["linear_attention", "moe", "full_attention", "linear_attention", "moe"], n_routed_experts=8,
    num_experts_per_tok=3, moe_intermediate_size=32, moe_shared_expert_intermediate_size=48, routed_scaling_factor=2.5,
)  # fmt: skip
_GRANITE = _ATTENTION | dict(
    model_type="granitemoehybrid", architectures=["GraniteMoeHybridForCausalLM"], rms_norm_eps=1e-4,
    embedding_multiplier=6.0, residual_multiplier=0.4, attention_multiplier=0.2, logits_scaling=1.5,
    position_embedding_type=None, layer_types=["linear_attention", "full_attention", "linear_attention"],
    mamba_n_heads=8, mamba_d_head=16, mamba_n_groups=1, mamba_d_state=16, mamba_d_conv=4, mamba_expand=2,
    num_local_experts=5, num_experts_per_tok=2, intermediate_size=32, shared_intermediate_size=48,
)  # fmt: skip
CONFIGS |= {
    "nemotron_h": _NEMOTRON,
    "nemotron_h_moe": _NEMOTRON | _NEMOTRON_MOE,
    "nemotron_h_moe-latent": _NEMOTRON | _NEMOTRON_MOE | dict(moe_latent_size=32, norm_topk_prob=False),
    "granitehybrid": _GRANITE,
    "granitehybrid-dense": _GRANITE | dict(num_local_experts=0, num_experts_per_tok=0),
    "granite": _GRANITE | dict(layer_types=["full_attention"] * 3, position_embedding_type="rope",
                               rope_parameters=_ROPE, num_local_experts=0, num_experts_per_tok=0),
}  # fmt: skip


def build(name: str, folder: Path) -> Path:
    """Writes CONFIGS[name] and its weights; returns the folder."""
    config = CONFIGS[name]
    folder.mkdir(parents=True, exist_ok=True)
    (folder / "config.json").write_text(json.dumps(config, indent=2))
    tensors = {
        key: _weight(i, key, shape, config["model_type"].startswith(("qwen3_", "gemma")))
        for i, (key, shape) in enumerate(_shapes(config).items())
    }
    save_file(tensors, folder / "model.safetensors", metadata={"format": "pt"})
    return folder


def _weight(index: int, name: str, shape: tuple[int, ...], plus_one: bool = False) -> np.ndarray:
    u = _numbers(100 + index, int(np.prod(shape))).reshape(shape)
    last = name.rsplit(".", 1)[-1]
    if last == "A_log":
        return u * np.float32(1.5) - np.float32(0.5)
    if last == "dt_bias" or name.endswith("dt_proj.bias"):
        return u * np.float32(1.5) - np.float32(1.0)
    if last in ("D", "bias", "expert_bias") or "conv1d" in name or "conv.conv" in name:
        return u
    if "norm" in name and plus_one and "linear_attn" not in name:
        return u * np.float32(0.5)
    if "norm" in name:
        return u * np.float32(0.5) + np.float32(1.0)
    if "embed" in name:
        return u * np.float32(0.25)
    return u * np.float32(2.0 / np.sqrt(shape[-1]))


def _by_table(c: dict[str, Any]) -> Shapes:
    """Names and shapes as the family's weight table has them."""
    from tiercel.families import from_hf
    from tiercel.weights.checkpoint import parameter_shapes
    from tiercel.weights.transforms import foreign_shape

    layout = from_hf(c)
    ours, shapes = parameter_shapes(layout), {}
    for row in layout.rows:
        shape = ours[row.ours]
        if isinstance(row.hf, tuple):
            shapes |= dict.fromkeys(row.hf, shape[1:])
        elif row.fused:
            shapes[row.hf] = (shape[0], row.fused[2] * shape[1], shape[2])
        else:
            shapes[row.hf] = foreign_shape(row.hf_form, shape) if row.hf_form else shape
    return shapes


def _shapes(c: dict[str, Any]) -> Shapes:
    if c["model_type"] in ("nemotron_h", "granitemoehybrid"):
        return _by_table(c)
    if c["model_type"] == "mamba2":
        return _mamba2(c)
    shapes: Shapes = {"model.embed_tokens.weight": (c["vocab_size"], c["hidden_size"])}
    for i in range(c["num_hidden_layers"]):
        layer = {
            "falcon_h1": _falcon_h1,
            "jamba": _jamba,
            "lfm2": _lfm2,
            "lfm2_moe": _lfm2,
            "gemma3_text": _gemma3,
            "phi3": _phi3,
        }.get(c["model_type"], _qwen3_5 if "linear_num_key_heads" in c else _llama)
        shapes |= {f"model.layers.{i}.{name}": shape for name, shape in layer(c, i).items()}
    final = {
        "falcon_h1": "final_layernorm",
        "jamba": "final_layernorm",
        "lfm2": "embedding_norm",
        "lfm2_moe": "embedding_norm",
    }.get(c["model_type"], "norm")
    shapes[f"model.{final}.weight"] = (c["hidden_size"],)
    if not c["tie_word_embeddings"]:
        shapes["lm_head.weight"] = (c["vocab_size"], c["hidden_size"])
    return shapes


def _attention(c: dict[str, Any], bias: bool) -> Shapes:
    d, hd = c["hidden_size"], c.get("head_dim", c["hidden_size"] // c["num_attention_heads"])
    q, kv = c["num_attention_heads"] * hd, c["num_key_value_heads"] * hd
    shapes: Shapes = {f"self_attn.{n}_proj.weight": (rows, d) for n, rows in (("q", q), ("k", kv), ("v", kv))}
    if bias:
        shapes |= {f"self_attn.{n}_proj.bias": (rows,) for n, rows in (("q", q), ("k", kv), ("v", kv))}
    return shapes | {"self_attn.o_proj.weight": (d, q)}


def _mlp(c: dict[str, Any], prefix: str) -> Shapes:
    d, f = c["hidden_size"], c["intermediate_size"]
    return {f"{prefix}.{n}.weight": s for n, s in (("gate_proj", (f, d)), ("up_proj", (f, d)), ("down_proj", (d, f)))}


def _norms(c: dict[str, Any], *names: str) -> Shapes:
    return {f"{name}.weight": (c["hidden_size"],) for name in names}


def _llama(c: dict[str, Any], i: int) -> Shapes:
    norms = _norms(c, "input_layernorm", "post_attention_layernorm")
    return norms | _attention(c, bias=c["model_type"] == "qwen2") | _mlp(c, "mlp")


def _ssd(d: int, inner: int, groups: int, state: int, heads: int, kernel: int, norm: bool) -> Shapes:
    channels = inner + 2 * groups * state
    shapes: Shapes = {
        "in_proj.weight": (inner + channels + heads, d), "conv1d.weight": (channels, 1, kernel),
        "conv1d.bias": (channels,), "dt_bias": (heads,), "A_log": (heads,), "D": (heads,),
        "out_proj.weight": (d, inner),
    }  # fmt: skip
    return shapes | ({"norm.weight": (inner,)} if norm else {})


def _falcon_h1(c: dict[str, Any], i: int) -> Shapes:
    mixer = _ssd(c["hidden_size"], c["mamba_d_ssm"], c["mamba_n_groups"], c["mamba_d_state"], c["mamba_n_heads"],
                 c["mamba_d_conv"], c["mamba_rms_norm"])  # fmt: skip
    norms = _norms(c, "input_layernorm", "pre_ff_layernorm")
    return norms | _attention(c, False) | {f"mamba.{k}": s for k, s in mixer.items()} | _mlp(c, "feed_forward")


def _mamba2(c: dict[str, Any]) -> Shapes:
    d = c["hidden_size"]
    shapes: Shapes = {"backbone.embeddings.weight": (c["vocab_size"], d)}
    mixer = _ssd(d, c["expand"] * d, c["n_groups"], c["state_size"], c["num_heads"], c["conv_kernel"], True)
    for i in range(c["num_hidden_layers"]):
        shapes[f"backbone.layers.{i}.norm.weight"] = (d,)
        shapes |= {f"backbone.layers.{i}.mixer.{k}": s for k, s in mixer.items()}
    return shapes | {"backbone.norm_f.weight": (d,), "lm_head.weight": (c["vocab_size"], d)}


def _qwen3_5(c: dict[str, Any], i: int) -> Shapes:
    d, hd = c["hidden_size"], c["head_dim"]
    shapes = _norms(c, "input_layernorm", "post_attention_layernorm") | (
        _experts(c) if "num_experts" in c else _mlp(c, "mlp")
    )
    if c["layer_types"][i] == "full_attention":
        q = {"self_attn.q_proj.weight": (2 * c["num_attention_heads"] * hd, d)}
        return shapes | _attention(c, False) | q | {f"self_attn.{n}_norm.weight": (hd,) for n in "qk"}
    keys = c["linear_num_key_heads"] * c["linear_key_head_dim"]
    H, V = c["linear_num_value_heads"], c["linear_value_head_dim"]
    mixer: Shapes = {
        "in_proj_qkv.weight": (2 * keys + H * V, d), "in_proj_z.weight": (H * V, d), "in_proj_b.weight": (H, d),
        "in_proj_a.weight": (H, d), "conv1d.weight": (2 * keys + H * V, 1, c["linear_conv_kernel_dim"]),
        "dt_bias": (H,), "A_log": (H,), "norm.weight": (V,), "out_proj.weight": (d, H * V),
    }  # fmt: skip
    if c["model_type"] == "qwen3_next":
        for name in ("qkv", "z", "b", "a"):
            del mixer[f"in_proj_{name}.weight"]
        mixer |= {"in_proj_qkvz.weight": (2 * keys + 2 * H * V, d), "in_proj_ba.weight": (2 * H, d)}
    return shapes | {f"linear_attn.{name}": shape for name, shape in mixer.items()}


def _phi3(c: dict[str, Any], i: int) -> Shapes:
    d, f, hd = c["hidden_size"], c["intermediate_size"], c["hidden_size"] // c["num_attention_heads"]
    shapes: Shapes = {
        "self_attn.qkv_proj.weight": ((c["num_attention_heads"] + 2 * c["num_key_value_heads"]) * hd, d),
        "self_attn.o_proj.weight": (d, d), "mlp.gate_up_proj.weight": (2 * f, d), "mlp.down_proj.weight": (d, f),
    }  # fmt: skip
    return _norms(c, "input_layernorm", "post_attention_layernorm") | shapes


def _gemma3(c: dict[str, Any], i: int) -> Shapes:
    norms = _norms(c, "input_layernorm", "post_attention_layernorm", "pre_feedforward_layernorm",
                   "post_feedforward_layernorm")  # fmt: skip
    return (
        norms | _attention(c, False) | {f"self_attn.{n}_norm.weight": (c["head_dim"],) for n in "qk"} | _mlp(c, "mlp")
    )


def _experts(c: dict[str, Any]) -> Shapes:
    d, routed = c["hidden_size"], c | {"intermediate_size": c["moe_intermediate_size"]}
    shared = c | {"intermediate_size": c["shared_expert_intermediate_size"]}
    shapes: Shapes = {"mlp.gate.weight": (c["num_experts"], d), "mlp.shared_expert_gate.weight": (1, d)}
    shapes |= _mlp(shared, "mlp.shared_expert")
    for e in range(c["num_experts"]):
        shapes |= _mlp(routed, f"mlp.experts.{e}")
    return shapes


def _lfm2(c: dict[str, Any], i: int) -> Shapes:
    d, f, norms = c["hidden_size"], c["intermediate_size"], _norms(c, "operator_norm", "ffn_norm")
    moe = i >= c.get("num_dense_layers", c["num_hidden_layers"])
    f = c["moe_intermediate_size"] if moe else f
    places = [f"feed_forward.experts.{e}" for e in range(c["num_experts"])] if moe else ["feed_forward"]
    shapes = norms | {f"{p}.{n}.weight": (d, f) if n == "w2" else (f, d) for p in places for n in ("w1", "w3", "w2")}
    if moe:
        shapes |= {"feed_forward.gate.weight": (c["num_experts"], d), "feed_forward.expert_bias": (c["num_experts"],)}
    if c["layer_types"][i] == "conv":
        return shapes | {"conv.in_proj.weight": (3 * d, d), "conv.conv.weight": (d, 1, c["conv_L_cache"]),
                         "conv.out_proj.weight": (d, d)}  # fmt: skip
    head_dim = d // c["num_attention_heads"]
    attention = {name.replace("o_proj", "out_proj"): shape for name, shape in _attention(c, False).items()}
    return shapes | attention | {f"self_attn.{n}_layernorm.weight": (head_dim,) for n in "qk"}


def _jamba(c: dict[str, Any], i: int) -> Shapes:
    d, n, r = c["hidden_size"], c["mamba_d_state"], c["mamba_dt_rank"]
    inner = c["mamba_expand"] * d
    shapes = _norms(c, "input_layernorm", "pre_ff_layernorm")
    if i % c["attn_layer_period"] == c["attn_layer_offset"]:
        shapes |= _attention(c, False)
    else:
        shapes |= {
            "mamba.in_proj.weight": (2 * inner, d), "mamba.conv1d.weight": (inner, 1, c["mamba_d_conv"]),
            "mamba.conv1d.bias": (inner,), "mamba.x_proj.weight": (r + 2 * n, inner),
            "mamba.dt_proj.weight": (inner, r), "mamba.dt_proj.bias": (inner,), "mamba.A_log": (inner, n),
            "mamba.D": (inner,), "mamba.out_proj.weight": (d, inner), "mamba.dt_layernorm.weight": (r,),
            "mamba.b_layernorm.weight": (n,), "mamba.c_layernorm.weight": (n,),
        }  # fmt: skip
    if i % c["expert_layer_period"] != c["expert_layer_offset"]:
        return shapes | _mlp(c, "feed_forward")
    for e in range(c["num_experts"]):
        shapes |= _mlp(c, f"feed_forward.experts.{e}")
    return shapes | {"feed_forward.router.weight": (c["num_experts"], d)}
