"""Qwen3 and Qwen3-MoE: Llama with an RMS norm on every head of q and k, before the rotation.

    qwen3      a window in the layers from `max_window_layers` on, where `use_sliding_window` is set
    qwen3_moe  experts in every `decoder_sparse_step`-th layer; router weights are the softmax over all experts

transformers `modeling_qwen3.py`, `modeling_qwen3_moe.py`; llama.cpp architectures `qwen3` and `qwen3moe`, the latter
always renormalises the weights of the chosen experts.
"""

from __future__ import annotations

from collections.abc import Iterable, Iterator, Mapping
from dataclasses import replace
from typing import Any

from tiercel.errors import UnsupportedError
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
from tiercel.families.llama import ACTIVATIONS, windows
from tiercel.families.rope import fixed_length, gguf_rope_limits, read_gguf_rope, read_rope, write_gguf_rope, write_rope
from tiercel.feed_forward.gated_mlp.config import GatedMLPConfig
from tiercel.feed_forward.moe.config import MoEConfig
from tiercel.mixers.attention.config import AttentionConfig
from tiercel.model.config import LayerConfig, ModelConfig


def read(hf_config: Mapping[str, Any]) -> tuple[ModelConfig, Iterable[TensorMapping]]:
    f = Fields(dict(hf_config))
    moe = f.data.get("model_type") == "qwen3_moe"
    width, heads = f.size("hidden_size"), f.size("num_attention_heads")
    depth = f.layers()
    context = f.size("max_position_embeddings", 32768)
    rope = read_rope(f, theta=1e4, max_length=context)
    bias, activation = f.flag("attention_bias", False), f.choice("hidden_act", "silu", ACTIVATIONS)
    attention = AttentionConfig(
        heads=heads,
        # null is as many as heads in qwen3; transformers refuses it in qwen3_moe
        kv_heads=f.size("num_key_value_heads", (4 if moe else 32) if "num_key_value_heads" not in f.data else heads),
        head_dim=f.size("head_dim", max(width // heads, 1) if moe else 128),
        rope=rope,
        qkv_bias=bias,
        out_bias=bias,
        qk_norm=True,
    )
    dense = GatedMLPConfig(width=f.size("intermediate_size", 6144 if moe else 22016), activation=activation)
    experts = _experts(f, activation) if moe else None
    has_experts = sparse(f, depth) if moe else [False] * depth
    if moe:
        window = f.size_or_none("sliding_window", 4096) if f.flag("use_sliding_window", False) else None
        f.ignore("sliding_window", "max_window_layers", "layer_types")
        of_layers = [window] * depth
    else:
        of_layers = windows(f, "qwen3", depth)
    config = ModelConfig(
        vocab_size=f.size("vocab_size"),
        width=width,
        layers=tuple(
            LayerConfig(
                mixers=(replace(attention, window=window) if window else attention,),
                feed_forward=experts if is_sparse else dense,
            )
            for window, is_sparse in zip(of_layers, has_experts, strict=True)
        ),
        norm_eps=f.number("rms_norm_eps", 1e-6),
        tied=f.flag("tie_word_embeddings", False),
        max_length=fixed_length(rope, context),
    )
    f.done()
    return config, rows(config)


def _experts(f: Fields, activation: str) -> MoEConfig:
    f.ignore("num_local_experts", "output_router_logits", "router_aux_loss_coef")
    return MoEConfig(
        width=f.size("moe_intermediate_size", 768),
        experts=f.size("num_experts", f.data.get("num_local_experts", 128), largest=65536),
        active=f.size("num_experts_per_tok", 8),
        renormalize=f.flag("norm_topk_prob", False),
        activation=activation,
    )


def sparse(f: Fields, depth: int) -> list[bool]:
    """Whether each layer has experts."""
    step, dense = f.size("decoder_sparse_step", 1), f.indices("mlp_only_layers", depth)
    return [i not in dense and (i + 1) % step == 0 for i in range(depth)]


def rows(config: ModelConfig) -> Iterator[TensorMapping]:
    yield from top_rows(config, embed="model.embed_tokens.weight", norm="model.norm.weight")
    for i, layer in enumerate(config.layers):
        hf, feed_forward = f"model.layers.{i}", layer.feed_forward
        assert feed_forward is not None
        yield from norm_rows(i, f"{hf}.input_layernorm.weight", f"{hf}.post_attention_layernorm.weight")
        yield from module_rows(i, layer.mixers[0], config.width, f"{hf}.self_attn")
        fused = fused_experts(f"{hf}.mlp.experts") if isinstance(feed_forward, MoEConfig) else {}
        yield from module_rows(i, feed_forward, config.width, f"{hf}.mlp", fused=fused)


def read_gguf(metadata: Mapping[str, Any], tensors: Mapping[str, Any]) -> tuple[ModelConfig, Iterable[TensorMapping]]:
    m = Metadata(metadata, metadata["general.architecture"])
    width, heads = m.size("embedding_length"), m.size("attention.head_count")
    head_dim = m.size("attention.key_length", max(width // heads, 1))
    attention = AttentionConfig(
        heads=heads,
        kv_heads=m.size("attention.head_count_kv", heads),
        head_dim=head_dim,
        rope=read_gguf_rope(m, tensors, head_dim),
        qkv_bias="blk.0.attn_q.bias" in tensors,
        out_bias="blk.0.attn_output.bias" in tensors,
        qk_norm=True,
    )
    feed_forward: GatedMLPConfig | MoEConfig
    if m.arch == "qwen3moe":
        feed_forward = MoEConfig(
            width=m.size("expert_feed_forward_length"),
            experts=m.size("expert_count"),
            active=m.size("expert_used_count"),
        )
    else:
        feed_forward = GatedMLPConfig(width=m.size("feed_forward_length"))
    config = ModelConfig(
        vocab_size=tensor_shape(tensors, "token_embd.weight")[0],
        width=width,
        layers=(LayerConfig(mixers=(attention,), feed_forward=feed_forward),) * m.layers(),
        norm_eps=m.number("attention.layer_norm_rms_epsilon"),
        tied="output.weight" not in tensors,
        max_length=m.size("context_length"),
    )
    return config, rows(config)


def _parts(config: ModelConfig) -> tuple[AttentionConfig, GatedMLPConfig | MoEConfig]:
    attention, feed_forward = config.layers[0].mixers[0], config.layers[0].feed_forward
    assert isinstance(attention, AttentionConfig) and attention.rope is not None
    assert isinstance(feed_forward, GatedMLPConfig | MoEConfig)
    return attention, feed_forward


def write_gguf(config: ModelConfig) -> dict[str, Any]:
    attention, feed_forward = _parts(config)
    assert attention.rope is not None
    out = gguf_sizes(config, attention, feed_forward.width)
    if isinstance(feed_forward, MoEConfig):
        out |= {
            "expert_count": feed_forward.experts,
            "expert_used_count": feed_forward.active,
            "expert_feed_forward_length": feed_forward.width,
        }
    return out | write_gguf_rope(attention.rope, attention.head_dim)


def limits(config: ModelConfig) -> Iterator[str]:
    attention, feed_forward = _parts(config)
    if len({layer.feed_forward for layer in config.layers}) > 1:
        yield "llama.cpp has experts in all layers of qwen3moe or in none"
    if any(getattr(layer.mixers[0], "window", None) for layer in config.layers):
        yield "llama.cpp has no sliding window in this architecture"
    if attention.qkv_bias or attention.out_bias:
        yield "llama.cpp has no biases in this architecture"
    if feed_forward.activation != "silu":
        yield f"llama.cpp computes silu here, not {feed_forward.activation}"
    if isinstance(feed_forward, MoEConfig) and not feed_forward.renormalize:
        yield "llama.cpp renormalises the weights of chosen experts (norm_topk_prob)"
    yield from gguf_rope_limits(attention.rope)


def write(config: ModelConfig) -> dict[str, Any]:
    """A config.json for a network that came from a GGUF file."""
    attention, feed_forward = _parts(config)
    assert attention.rope is not None
    if attention.qkv_bias != attention.out_bias:
        raise UnsupportedError("biases on q, k, v without one on o have no place in a qwen3 config.json")
    moe = isinstance(feed_forward, MoEConfig)
    out: dict[str, Any] = {
        "architectures": ["Qwen3MoeForCausalLM" if moe else "Qwen3ForCausalLM"],
        "model_type": "qwen3_moe" if moe else "qwen3",
        "vocab_size": config.vocab_size,
        "hidden_size": config.width,
        "intermediate_size": feed_forward.width,
        "num_hidden_layers": len(config.layers),
        "num_attention_heads": attention.heads,
        "num_key_value_heads": attention.kv_heads,
        "head_dim": attention.head_dim,
        "attention_bias": attention.qkv_bias,
        "hidden_act": feed_forward.activation,
        "max_position_embeddings": config.max_length,
        "rms_norm_eps": config.norm_eps,
        "tie_word_embeddings": config.tied,
    }
    if isinstance(feed_forward, MoEConfig):
        out |= {
            "num_experts": feed_forward.experts,
            "num_experts_per_tok": feed_forward.active,
            "moe_intermediate_size": feed_forward.width,
            "norm_topk_prob": feed_forward.renormalize,
        }
    return out | write_rope(attention.rope)


QWEN3 = Family(
    "qwen3", ("qwen3",), read, gguf="qwen3", read_gguf=read_gguf, write_gguf=write_gguf, write=write, limits=limits
)
QWEN3_MOE = Family(
    "qwen3_moe", ("qwen3_moe",), read, gguf="qwen3moe", read_gguf=read_gguf, write_gguf=write_gguf, write=write,
    limits=limits,
)  # fmt: skip
