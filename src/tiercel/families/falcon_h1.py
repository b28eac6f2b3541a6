"""Falcon-H1 and Falcon-H1R: in every layer attention and Mamba-2 side by side, then a gated MLP.

    x = x + attention(norm x) + mamba2(norm x);   x = x + mlp(norm x)

Fourteen muP multipliers act in the original's forward pass (transformers `modeling_falcon_h1.py`).  Each is linear
in a weight, so the weight table folds them and the network itself has none:

    embed · embedding      q, v · attention_in      k · attention_in · key      o · attention_out
    in_proj · ssm_in · [z | x | B | C | dt runs]     out_proj · ssm_out      gate · mlp[0]      down · mlp[1]
    head · lm_head         (tied: the embedding holds `embedding`, the logits keep lm_head / embedding)

Two traps for a port: the key multiplier acts before the rotation, and a bias of in_proj meets the five runs but
not ssm_in.  llama.cpp folds the same way.
"""

from __future__ import annotations

from collections.abc import Iterable, Iterator, Mapping
from typing import Any

from tiercel.errors import FormatError
from tiercel.families.family import (
    Family,
    Metadata,
    Scales,
    TensorMapping,
    gguf_sizes,
    module_rows,
    norm_rows,
    tensor_shape,
    top_rows,
)
from tiercel.families.fields import Fields
from tiercel.families.rope import fixed_length, gguf_rope_limits, read_gguf_rope, read_rope, write_gguf_rope, write_rope
from tiercel.feed_forward.gated_mlp.config import GatedMLPConfig
from tiercel.mixers.attention.config import AttentionConfig
from tiercel.mixers.mamba2.config import Mamba2Config
from tiercel.model.config import LayerConfig, ModelConfig

ONES = {
    "embedding": 1.0,
    "lm_head": 1.0,
    "key": 1.0,
    "attention_in": 1.0,
    "attention_out": 1.0,
    "ssm_in": 1.0,
    "ssm_out": 1.0,
}


def read(hf_config: Mapping[str, Any]) -> tuple[ModelConfig, Iterable[TensorMapping]]:
    f = Fields(dict(hf_config))
    width, heads = f.size("hidden_size"), f.size("num_attention_heads")
    context = f.size("max_position_embeddings", 8192)
    rope = read_rope(f, theta=1e5, max_length=context)
    bias = f.flag("attention_bias", False)
    attention = AttentionConfig(
        heads=heads,
        kv_heads=f.size("num_key_value_heads", heads if "num_key_value_heads" in f.data else 8),
        head_dim=f.size("head_dim", max(width // heads, 1)),  # published files always say it: 12 × 128 ≠ 3072 in the 7B
        rope=rope,
        qkv_bias=bias,
        out_bias=bias,
    )
    f.only("hidden_act", "silu", "swish")
    layer = LayerConfig(
        mixers=(attention, read_mamba2(f, width)),
        feed_forward=GatedMLPConfig(width=f.size("intermediate_size"), bias=f.flag("mlp_bias", False)),
    )
    multipliers = {name: f.multiplier(f"{name}_multiplier") for name in ONES}
    ssm, mlp = f.multipliers("ssm_multipliers", 5), f.multipliers("mlp_multipliers", 2)
    tied = f.flag("tie_word_embeddings", False)
    config = ModelConfig(
        vocab_size=f.size("vocab_size"),
        width=width,
        layers=(layer,) * f.layers(),
        norm_eps=f.number("rms_norm_eps", 1e-5),
        tied=tied,
        logit_scale=multipliers["lm_head"] / multipliers["embedding"] if tied else 1.0,
        max_length=fixed_length(rope, context),
    )
    f.ignore("attn_layer_indices", "mamba_use_mlp", "mlp_expansion_factor", "expansion_factor", "layer_types")
    f.only("sliding_window", None)
    f.done()
    return config, rows(config, multipliers, ssm, mlp)


def read_mamba2(f: Fields, width: int) -> Mamba2Config:
    """The `mamba_*` fields, as Falcon-H1 and Bamba spell them."""
    expand = f.number("mamba_expand", 2.0, positive=True)
    inner = f.size_or_none("mamba_d_ssm", 1024) or int(expand * width)
    heads = f.size("mamba_n_heads", 128)
    if inner % heads:
        raise FormatError(f"{f.where}: mamba_n_heads = {heads} must divide the inner width {inner}")
    if f.data.get("mamba_d_head", "auto") != "auto" and f.size("mamba_d_head") * heads != inner:
        raise FormatError(f"{f.where}: mamba_d_head × mamba_n_heads must be the inner width {inner}")
    f.ignore("mamba_d_head")
    f.ignore("time_step_min", "time_step_max", "time_step_floor", "time_step_rank")  # how dt was initialised
    before = f.flag("mamba_norm_before_gate", True)
    gated_norm = ("norm_first" if before else "gate_first") if f.flag("mamba_rms_norm", False) else "none"
    return Mamba2Config(
        heads=heads,
        head_dim=inner // heads,
        state=f.size("mamba_d_state", 256),
        groups=f.size("mamba_n_groups", 1),
        conv=f.size("mamba_d_conv", 4, largest=256),
        conv_bias=f.flag("mamba_conv_bias", True),
        in_bias=f.flag("mamba_proj_bias", False),
        out_bias=f.flag("projectors_bias", False),
        gated_norm=gated_norm,
        dt_limit=f.limits("time_step_limit"),
        chunk=f.size("mamba_chunk_size", 256, largest=65536),
    )


def rows(
    config: ModelConfig,
    m: Mapping[str, float] = ONES,
    ssm: Iterable[float] = (1.0,) * 5,
    mlp: Iterable[float] = (1.0, 1.0),
) -> Iterator[TensorMapping]:
    gate, down = mlp
    ssm = tuple(ssm)
    into, out = m["attention_in"], m["attention_out"]
    of_attention = {
        "q.weight": into, "k.weight": into * m["key"], "k.bias": m["key"], "v.weight": into, "o.weight": out,
        "o.bias": out,
    }  # fmt: skip
    of_mamba2: Scales = {
        "in_proj.weight": [scale * m["ssm_in"] for scale in ssm], "in_proj.bias": ssm, "out_proj.weight": m["ssm_out"],
        "out_proj.bias": m["ssm_out"],
    }  # fmt: skip
    of_mlp = {"gate.weight": gate, "gate.bias": gate, "down.weight": down, "down.bias": down}
    yield from top_rows(
        config,
        embed="model.embed_tokens.weight",
        norm="model.final_layernorm.weight",
        embed_scale=m["embedding"],
        head_scale=m["lm_head"],
    )
    for i, layer in enumerate(config.layers):
        hf = f"model.layers.{i}"
        attention, mamba2 = layer.mixers
        assert layer.feed_forward is not None
        yield from norm_rows(i, f"{hf}.input_layernorm.weight", f"{hf}.pre_ff_layernorm.weight", gguf_ffn="ffn_norm")
        yield from module_rows(i, attention, config.width, f"{hf}.self_attn", scales=of_attention)
        yield from module_rows(i, mamba2, config.width, f"{hf}.mamba", scales=of_mamba2)
        yield from module_rows(i, layer.feed_forward, config.width, f"{hf}.feed_forward", scales=of_mlp)


def read_gguf(metadata: Mapping[str, Any], tensors: Mapping[str, Any]) -> tuple[ModelConfig, Iterable[TensorMapping]]:
    m = Metadata(metadata, "falcon-h1")
    head_dim = m.size("attention.key_length")
    rope = read_gguf_rope(m, tensors, head_dim)
    attention = AttentionConfig(
        heads=m.size("attention.head_count"), kv_heads=m.size("attention.head_count_kv"), head_dim=head_dim, rope=rope
    )
    layer = LayerConfig(
        mixers=(attention, read_gguf_mamba2(m, tensors)),
        feed_forward=GatedMLPConfig(width=m.size("feed_forward_length")),
    )
    config = ModelConfig(
        vocab_size=tensor_shape(tensors, "token_embd.weight")[0],
        width=m.size("embedding_length"),
        layers=(layer,) * m.layers(),
        norm_eps=m.number("attention.layer_norm_rms_epsilon"),
        tied="output.weight" not in tensors,
        max_length=m.size("context_length"),
    )
    return config, rows(config)


def read_gguf_mamba2(m: Metadata, tensors: Mapping[str, Any], layer: int = 0) -> Mamba2Config:
    """The `ssm.*` keys; what is optional shows in the tensors of `layer`."""
    inner, heads = m.size("ssm.inner_size"), m.size("ssm.time_step_rank")
    if inner % heads:
        raise FormatError(f"GGUF metadata: {heads} heads do not divide the inner width {inner}")
    return Mamba2Config(
        heads=heads,
        head_dim=inner // heads,
        state=m.size("ssm.state_size"),
        groups=m.size("ssm.group_count"),
        conv=m.size("ssm.conv_kernel"),
        conv_bias=f"blk.{layer}.ssm_conv1d.bias" in tensors,
        gated_norm="gate_first" if f"blk.{layer}.ssm_norm.weight" in tensors else "none",
    )


def write_gguf(config: ModelConfig) -> dict[str, Any]:
    attention, mamba2 = config.layers[0].mixers
    assert isinstance(attention, AttentionConfig) and isinstance(mamba2, Mamba2Config) and attention.rope is not None
    assert config.layers[0].feed_forward is not None
    out = gguf_sizes(config, attention, config.layers[0].feed_forward.width)
    return out | write_gguf_mamba2(mamba2) | write_gguf_rope(attention.rope, attention.head_dim)


def write_gguf_mamba2(c: Mamba2Config) -> dict[str, Any]:
    return {
        "ssm.conv_kernel": c.conv,
        "ssm.inner_size": c.inner,
        "ssm.state_size": c.state,
        "ssm.time_step_rank": c.heads,
        "ssm.group_count": c.groups,
    }


def mamba2_limits(c: Mamba2Config) -> Iterator[str]:
    if c.in_bias or c.out_bias:
        yield "llama.cpp has no biases on the Mamba-2 projections"
    if c.gated_norm == "norm_first":
        yield "llama.cpp gates before the norm, never after it"
    if c.dt_limit != (0.0, float("inf")):
        yield "llama.cpp does not clamp dt"


def limits(config: ModelConfig) -> Iterator[str]:
    attention, mamba2 = config.layers[0].mixers
    assert isinstance(attention, AttentionConfig) and isinstance(mamba2, Mamba2Config)
    feed_forward = config.layers[0].feed_forward
    assert isinstance(feed_forward, GatedMLPConfig)
    yield from mamba2_limits(mamba2)
    if attention.qkv_bias or attention.out_bias or feed_forward.bias:
        yield "llama.cpp has no biases in falcon-h1"
    if attention.rope is not None and attention.rope.scaling == "llama3":
        yield "llama.cpp has no llama3 rotary scaling in falcon-h1"
    yield from gguf_rope_limits(attention.rope)


def write(config: ModelConfig) -> dict[str, Any]:
    """A config.json for a network that came from a GGUF file: its multipliers are folded, so all are 1."""
    attention, c = config.layers[0].mixers
    assert isinstance(attention, AttentionConfig) and isinstance(c, Mamba2Config) and attention.rope is not None
    feed_forward = config.layers[0].feed_forward
    assert isinstance(feed_forward, GatedMLPConfig)
    return {
        "architectures": ["FalconH1ForCausalLM"],
        "model_type": "falcon_h1",
        "vocab_size": config.vocab_size,
        "hidden_size": config.width,
        "intermediate_size": feed_forward.width,
        "num_hidden_layers": len(config.layers),
        "num_attention_heads": attention.heads,
        "num_key_value_heads": attention.kv_heads,
        "head_dim": attention.head_dim,
        "max_position_embeddings": config.max_length,
        "rms_norm_eps": config.norm_eps,
        "tie_word_embeddings": config.tied,
        "mamba_d_ssm": c.inner,
        "mamba_n_heads": c.heads,
        "mamba_d_head": c.head_dim,
        "mamba_n_groups": c.groups,
        "mamba_d_state": c.state,
        "mamba_d_conv": c.conv,
        "mamba_chunk_size": c.chunk,
        "mamba_conv_bias": c.conv_bias,
        "mamba_rms_norm": c.gated_norm != "none",
        "mamba_norm_before_gate": c.gated_norm == "norm_first",
        "lm_head_multiplier": config.logit_scale,
    } | write_rope(attention.rope)  # fmt: skip


FALCON_H1 = Family(
    "falcon_h1", ("falcon_h1",), read, gguf="falcon-h1", read_gguf=read_gguf, write_gguf=write_gguf, write=write,
    limits=limits,
)  # fmt: skip
