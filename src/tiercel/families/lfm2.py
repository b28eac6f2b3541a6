"""LFM2: gated short convolutions, and attention in a few layers.

    lfm2      attention with an RMS norm on every head of q and k, before the rotation; gated MLP, whose width a config
              may give before the rule of two thirds (`block_auto_adjust_ff_dim`)
    lfm2_moe  after `num_dense_layers` experts instead: sigmoid scores, a bias for the choice, renormalised weights
    lfm3      norms after mixers and MLPs, too; windows in some layers, a rotation for each kind; a gate on every head

transformers `modeling_lfm2.py`, `modeling_lfm2_moe.py`, `modeling_lfm3.py`; llama.cpp architectures `lfm2` and
`lfm2moe`, whose final norm is `token_embd_norm`.
"""

from __future__ import annotations

from collections.abc import Iterable, Iterator, Mapping
from dataclasses import replace
from typing import Any

from tiercel.errors import FormatError, UnsupportedError
from tiercel.families.family import (
    Family,
    Metadata,
    TensorMapping,
    fused_experts,
    gguf_sizes,
    module_rows,
    norm_rows,
    tensor_shape,
    top_rows,
)
from tiercel.families.fields import Fields
from tiercel.families.rope import (
    fixed_length,
    gguf_rope_limits,
    read_gguf_rope,
    read_rope,
    read_ropes,
    write_gguf_rope,
    write_rope,
)
from tiercel.feed_forward.gated_mlp.config import GatedMLPConfig
from tiercel.feed_forward.moe.config import MoEConfig
from tiercel.mixers.attention.config import AttentionConfig
from tiercel.mixers.short_conv.config import ShortConvConfig
from tiercel.model.config import LayerConfig, ModelConfig

ATTENTION_NAMES = {"o.weight": "out_proj.weight", "q_norm.weight": "q_layernorm.weight",
                   "k_norm.weight": "k_layernorm.weight"}  # fmt: skip
MLP_NAMES = {"gate.weight": "w1.weight", "up.weight": "w3.weight", "down.weight": "w2.weight"}
EXPERT_NAMES = {name: f"experts.{{e}}.{w}.weight" for name, w in (("gate", "w1"), ("up", "w3"), ("down", "w2"))}
EXPERT_NAMES["correction"] = "expert_bias"
SIGMOID = 2  # GGUF's expert_gating_func


def read(hf_config: Mapping[str, Any]) -> tuple[ModelConfig, Iterable[TensorMapping]]:
    f = Fields(dict(hf_config))
    moe = f.data.get("model_type") == "lfm2_moe"
    width, heads = f.size("hidden_size", 2048 if moe else 2560), f.size("num_attention_heads", 32)
    depth = f.layers(32)
    context = f.size("max_position_embeddings", 128_000)
    rope = read_rope(f, theta=1e6, max_length=context)
    attention = AttentionConfig(
        heads=heads,
        kv_heads=f.size("num_key_value_heads", 8),
        head_dim=f.size("head_dim", max(width // heads, 1)),
        rope=rope,
        qk_norm=True,
    )
    conv = read_conv(f, width, taps=3)
    mlp = GatedMLPConfig(width=f.size("intermediate_size", 7168) if moe else _mlp_width(f))
    dense, experts = (f.count("num_dense_layers", 2), _experts(f)) if moe else (depth, None)
    if moe and f.data.get("layer_types") is None:
        raise FormatError(f"{f.where}: the field 'layer_types' is missing")
    for name, expected in ("block_dim", width), ("num_heads", heads), ("conv_dim", width), ("conv_dim_out", width):
        f.only(name, expected)  # the first training code's words for the same sizes
    for name in "block_use_swiglu", "use_pos_enc":
        f.only(name, True)
    f.only("hidden_act", "silu", "swish")
    f.ignore("block_norm_eps", "block_mlp_init_scale", "block_out_init_scale", "block_use_xavier_init")
    f.ignore("conv_use_xavier_init", "full_attn_idxs")
    config = ModelConfig(
        vocab_size=f.size("vocab_size", 65536),
        width=width,
        layers=tuple(
            LayerConfig(mixers=(attention if attends else conv,), feed_forward=mlp if i < dense else experts)
            for i, attends in enumerate(_attends(f, depth))
        ),
        norm_eps=f.number("norm_eps", 1e-5),
        tied=f.flag("tie_embedding", f.flag("tie_word_embeddings", True)),
        max_length=fixed_length(rope, context),
    )
    f.done()
    return config, rows(config)


def read_lfm3(hf_config: Mapping[str, Any]) -> tuple[ModelConfig, Iterable[TensorMapping]]:
    f = Fields(dict(hf_config))
    width, depth = f.size("hidden_size", 2048), f.layers(24)
    context = f.size("max_position_embeddings", 128_000)
    if f.data.get("rope_parameters") is None:
        half = {"rope_type": "proportional", "rope_theta": 1e6, "partial_rotary_factor": 0.5}
        f.data["rope_parameters"] = {"full_attention": half}
    ropes = read_ropes(f, {"full_attention": 1e6, "sliding_attention": 1e4}, max_length=context)
    bias, gated = f.flag("attention_bias", False), f.flag("use_attention_gate", True)
    attention = AttentionConfig(
        heads=f.size("num_attention_heads", 16),
        kv_heads=f.size("num_key_value_heads", 4),
        head_dim=f.size("head_dim", 128),
        qkv_bias=bias,
        out_bias=bias,
        qk_norm=True,
        output_gate=gated,
        gate_heads=gated,
    )
    kinds: dict[str, AttentionConfig | ShortConvConfig] = {
        kind: replace(attention, rope=rope) for kind, rope in ropes.items()
    }
    kinds["conv"] = read_conv(f, width, taps=7)
    window = f.size_or_none("sliding_window", 256)
    kinds["sliding_attention"] = replace(attention, rope=ropes["sliding_attention"], window=window)
    types = f.layer_types(depth, kinds) or [
        "full_attention" if i % 4 == 2 else "conv" if i % 4 or not i else "sliding_attention" for i in range(depth)
    ]
    if window is None and "sliding_attention" in types:
        raise FormatError(f"{f.where}: sliding_window is null, but there are layers of sliding_attention")
    mlp, sandwich = GatedMLPConfig(width=f.size("intermediate_size", 7680)), f.flag("use_sandwich_norm", True)
    f.only("hidden_act", "silu", "swish")
    config = ModelConfig(
        vocab_size=f.size("vocab_size", 128_000),
        width=width,
        layers=tuple(LayerConfig(mixers=(kinds[kind],), feed_forward=mlp, post_norm=sandwich) for kind in types),
        norm_eps=f.number("norm_eps", f.number("rms_norm_eps", 1e-5)),
        tied=f.flag("tie_word_embeddings", True),
        max_length=fixed_length(ropes["full_attention"], context),
    )
    f.done()
    return config, rows(config, names={})


def read_conv(f: Fields, width: int, *, taps: int) -> ShortConvConfig:
    return ShortConvConfig(
        channels=width, conv=f.size("conv_L_cache", taps, largest=256), bias=f.flag("conv_bias", False)
    )


def _experts(f: Fields) -> MoEConfig:
    f.ignore("output_router_logits", "router_aux_loss_coef")
    return MoEConfig(
        width=f.size("moe_intermediate_size", 1792),
        experts=f.size("num_experts", f.data.get("num_local_experts", 32), largest=65536),
        active=f.size("num_experts_per_tok", 4),
        renormalize=f.flag("norm_topk_prob", True),
        renormalize_eps=1e-6,
        scores="sigmoid",
        correction=f.flag("use_expert_bias", True),
        scale=f.number("routed_scaling_factor", 1.0, positive=True),
    )


def _mlp_width(f: Fields) -> int:
    """transformers' `Lfm2MLP`: two thirds of the field, times a number, up to the next multiple."""
    width = f.size("block_ff_dim", f.size("intermediate_size", 12288))
    multiple, factor = f.size("block_multiple_of", 256), f.number("block_ffn_dim_multiplier", 1.0, positive=True)
    if not f.flag("block_auto_adjust_ff_dim", True):
        return width
    width = int(2 * width / 3)
    if f.data.get("block_ffn_dim_multiplier", 1.0) is None:
        return width
    return -(-int(factor * width) // multiple) * multiple


def _attends(f: Fields, depth: int) -> list[bool]:
    """Whether each layer attends: by `layer_types`, by `full_attn_idxs`, or all."""
    types = f.layer_types(depth, ("full_attention", "conv"))
    if types is None:
        found = f.indices("full_attn_idxs", depth)
        return [f.data.get("full_attn_idxs") is None or i in found for i in range(depth)]
    return [kind == "full_attention" for kind in types]


def rows(config: ModelConfig, names: Mapping[str, str] = ATTENTION_NAMES) -> Iterator[TensorMapping]:
    """names: of the parts of attention."""
    for row in top_rows(config, embed="model.embed_tokens.weight", norm="model.embedding_norm.weight"):
        yield replace(row, gguf="token_embd_norm.weight") if row.ours == "norm.weight" else row
    for i, layer in enumerate(config.layers):
        hf, mixer = f"model.layers.{i}", layer.mixers[0]
        yield from norm_rows(i, f"{hf}.operator_norm.weight", f"{hf}.ffn_norm.weight")
        if layer.post_norm:
            for ours, theirs in ("mixer", "operator"), ("ffn", "ffn"):
                name = f"{hf}.post_{theirs}_norm.weight"
                yield TensorMapping(f"layers.{i}.{ours}_post_norm.weight", name, None, keep_fp32=True)
        if isinstance(mixer, AttentionConfig):
            other = {"gate.weight": (f"{hf}.self_attn.g_proj.weight",)}  # the module's name
            yield from module_rows(i, mixer, config.width, f"{hf}.self_attn", names=names, aliases=other)
        else:
            yield from module_rows(i, mixer, config.width, f"{hf}.conv")
        assert layer.feed_forward is not None
        moe = isinstance(layer.feed_forward, MoEConfig)
        yield from module_rows(
            i,
            layer.feed_forward,
            config.width,
            f"{hf}.feed_forward",
            names=EXPERT_NAMES if moe else MLP_NAMES,
            fused=fused_experts(f"{hf}.feed_forward.experts") if moe else {},
        )


def read_gguf(metadata: Mapping[str, Any], tensors: Mapping[str, Any]) -> tuple[ModelConfig, Iterable[TensorMapping]]:
    m = Metadata(metadata, metadata["general.architecture"])
    width, heads, depth = m.size("embedding_length"), m.size("attention.head_count"), m.layers()
    head_dim = max(width // heads, 1)
    rope = read_gguf_rope(m, tensors, head_dim)
    conv = ShortConvConfig(channels=width, conv=m.size("shortconv.l_cache"))
    mlp = GatedMLPConfig(width=m.size("feed_forward_length"))
    dense, experts = depth, None
    if m.arch == "lfm2moe":
        dense = m.sizes("leading_dense_block_count", 1)[0]
        experts = MoEConfig(
            width=m.size("expert_feed_forward_length"),
            experts=m.size("expert_count"),
            active=m.size("expert_used_count"),
            renormalize_eps=1e-6,
            scores="sigmoid",
            correction=True,
        )
        if m.size("expert_gating_func") != SIGMOID:
            raise UnsupportedError(f"GGUF metadata: {m.arch}.expert_gating_func must be {SIGMOID}, the sigmoid")
    mixers = [
        AttentionConfig(heads=heads, kv_heads=n, head_dim=head_dim, rope=rope, qk_norm=True) if n else conv
        for n in m.sizes("attention.head_count_kv", depth)
    ]
    config = ModelConfig(
        vocab_size=tensor_shape(tensors, "token_embd.weight")[0],
        width=width,
        layers=tuple(
            LayerConfig(mixers=(mixer,), feed_forward=mlp if i < dense else experts) for i, mixer in enumerate(mixers)
        ),
        norm_eps=m.number("attention.layer_norm_rms_epsilon"),
        tied="output.weight" not in tensors,
        max_length=m.size("context_length"),
    )
    return config, rows(config)


def _parts(
    config: ModelConfig,
) -> tuple[AttentionConfig | None, ShortConvConfig | None, GatedMLPConfig | None, MoEConfig | None]:
    """One of each kind that the model has."""
    mixers = config.first(AttentionConfig), config.first(ShortConvConfig)
    return *mixers, config.first(GatedMLPConfig), config.first(MoEConfig)


def _dense_layers(config: ModelConfig) -> int:
    return sum(isinstance(layer.feed_forward, GatedMLPConfig) for layer in config.layers)


def write_gguf(config: ModelConfig) -> dict[str, Any]:
    attention, conv, mlp, moe = _parts(config)
    assert attention is not None and attention.rope is not None and conv is not None and mlp is not None
    out = gguf_sizes(config, attention, mlp.width, kv_by_layer=True, head_sizes=False) | {
        "shortconv.l_cache": conv.conv,
    }
    if moe is not None:
        out |= {
            "leading_dense_block_count": _dense_layers(config),
            "expert_count": moe.experts,
            "expert_used_count": moe.active,
            "expert_feed_forward_length": moe.width,
            "expert_gating_func": SIGMOID,
        }
    return out | write_gguf_rope(attention.rope, attention.head_dim)


def limits(config: ModelConfig) -> Iterator[str]:
    attention, conv, mlp, moe = _parts(config)
    if attention is None or conv is None:
        yield "llama.cpp's lfm2 needs layers of both kinds"
        return
    if mlp is None:
        yield "llama.cpp's lfm2moe needs a layer without experts"
    if attention.heads * attention.head_dim != config.width:
        yield "llama.cpp needs heads × head_dim = hidden size in lfm2"
    if conv.bias or conv.conv < 2:
        yield "llama.cpp needs two taps and no biases in a short convolution"
    if moe is not None and not (moe.renormalize and moe.correction and moe.scale == 1.0):
        yield "llama.cpp needs norm_topk_prob, use_expert_bias and a routed_scaling_factor of 1 in lfm2moe"
    yield from gguf_rope_limits(attention.rope)


def write(config: ModelConfig) -> dict[str, Any]:
    """A config.json for a network that came from a GGUF file."""
    attention, conv, mlp, moe = _parts(config)
    assert attention is not None and attention.rope is not None and conv is not None and mlp is not None
    kinds = ["full_attention" if isinstance(layer.mixers[0], AttentionConfig) else "conv" for layer in config.layers]
    out: dict[str, Any] = {
        "architectures": ["Lfm2ForCausalLM" if moe is None else "Lfm2MoeForCausalLM"],
        "model_type": "lfm2" if moe is None else "lfm2_moe",
        "vocab_size": config.vocab_size,
        "hidden_size": config.width,
        "intermediate_size": mlp.width,
        "num_hidden_layers": len(config.layers),
        "num_attention_heads": attention.heads,
        "num_key_value_heads": attention.kv_heads,
        "layer_types": kinds,
        "conv_L_cache": conv.conv,
        "conv_bias": conv.bias,
        "max_position_embeddings": config.max_length,
        "norm_eps": config.norm_eps,
        "tie_word_embeddings": config.tied,
    }
    if moe is None:
        out["block_auto_adjust_ff_dim"] = False
    else:
        out |= {
            "num_dense_layers": _dense_layers(config),
            "moe_intermediate_size": moe.width,
            "num_experts": moe.experts,
            "num_experts_per_tok": moe.active,
            "norm_topk_prob": moe.renormalize,
            "use_expert_bias": moe.correction,
            "routed_scaling_factor": moe.scale,
        }
    return out | write_rope(attention.rope)


LFM2 = Family(
    "lfm2", ("lfm2",), read, gguf="lfm2", read_gguf=read_gguf, write_gguf=write_gguf, write=write, limits=limits
)
LFM2_MOE = Family(
    "lfm2_moe", ("lfm2_moe",), read, gguf="lfm2moe", read_gguf=read_gguf, write_gguf=write_gguf, write=write,
    limits=limits,
)  # fmt: skip
LFM3 = Family("lfm3", ("lfm3",), read_lfm3)
