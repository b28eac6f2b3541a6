"""Jamba: one attention layer to seven Mamba-1, experts in every second layer, no positions at all.

    attention where i % attn_layer_period = attn_layer_offset, else Mamba-1 with norms on dt, B and C
    experts   where i % expert_layer_period = expert_layer_offset, else a gated MLP

transformers `modeling_jamba.py`.  Router weights are the softmax over all experts, not renormalised.
"""

from __future__ import annotations

import math
from collections.abc import Iterable, Iterator, Mapping
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
from tiercel.families.mamba import mamba1_limits, read_gguf_mamba1, write_gguf_mamba1
from tiercel.feed_forward.gated_mlp.config import GatedMLPConfig
from tiercel.feed_forward.moe.config import MoEConfig
from tiercel.mixers.attention.config import AttentionConfig
from tiercel.mixers.mamba1.config import Mamba1Config
from tiercel.model.config import LayerConfig, ModelConfig


def read(hf_config: Mapping[str, Any]) -> tuple[ModelConfig, Iterable[TensorMapping]]:
    f = Fields(dict(hf_config))
    width, heads, depth = (
        f.size("hidden_size"),
        f.size("num_attention_heads"),
        f.layers(),
    )
    attention = AttentionConfig(
        heads=heads, kv_heads=f.size("num_key_value_heads", 8), head_dim=f.size("head_dim", max(width // heads, 1))
    )
    f.only("hidden_act", "silu", "swish")
    auto = f.data.get("mamba_dt_rank", "auto") == "auto"
    mamba1 = Mamba1Config(
        inner=int(f.number("mamba_expand", 2.0, positive=True) * width),
        state=f.size("mamba_d_state", 16),
        conv=f.size("mamba_d_conv", 4, largest=256),
        dt_rank=math.ceil(width / 16) if auto else f.size("mamba_dt_rank"),
        conv_bias=f.flag("mamba_conv_bias", True),
        proj_bias=f.flag("mamba_proj_bias", False),
        inner_norms=f.flag("mamba_inner_layernorms", True),
    )
    ffn_width = f.size("intermediate_size")
    dense = GatedMLPConfig(width=ffn_width)
    experts = f.size("num_experts", f.data.get("num_local_experts", 16), largest=65536)
    active = f.size("num_experts_per_tok", 2)
    moe = MoEConfig(width=ffn_width, experts=experts, active=active, renormalize=False) if experts > 1 else dense
    attends = _every(f, "attn_layer_period", 8, "attn_layer_offset", 4)
    routes = _every(f, "expert_layer_period", 2, "expert_layer_offset", 1)
    kinds = {
        (a, e): LayerConfig(mixers=(attention,) if a else (mamba1,), feed_forward=moe if e else dense)
        for a in (True, False)
        for e in (True, False)
    }
    config = ModelConfig(
        vocab_size=f.size("vocab_size"),
        width=width,
        layers=tuple(kinds[attends(i), routes(i)] for i in range(depth)),
        norm_eps=f.number("rms_norm_eps", 1e-6),
        tied=f.flag("tie_word_embeddings", False),
        max_length=f.size("max_position_embeddings", 262144),
    )
    f.ignore(
        "mamba_dt_rank",
        "num_local_experts",
        "output_router_logits",
        "router_aux_loss_coef",
        "calc_logits_for_entire_prompt",
    )
    f.ignore("n_ctx", "layers_block_type", "layer_types", "layers_num_experts")
    f.only("sliding_window", None)
    f.done()
    return config, rows(config)


def _every(f: Fields, period: str, default_period: int, offset: str, default_offset: int) -> Any:
    """A question about layer i: i % period == offset."""
    p, o = f.size(period, default_period), f.count(offset, default_offset)
    if o >= p:
        raise FormatError(f"{f.where}: {offset} = {o} must be below {period} = {p}")
    return lambda i: i % p == o


def rows(config: ModelConfig) -> Iterator[TensorMapping]:
    yield from top_rows(config, embed="model.embed_tokens.weight", norm="model.final_layernorm.weight")
    for i, layer in enumerate(config.layers):
        hf, mixer, ffn = f"model.layers.{i}", layer.mixers[0], layer.feed_forward
        yield from norm_rows(i, f"{hf}.input_layernorm.weight", f"{hf}.pre_ff_layernorm.weight")
        part = "self_attn" if isinstance(mixer, AttentionConfig) else "mamba"
        yield from module_rows(i, mixer, config.width, f"{hf}.{part}")
        hf += ".feed_forward"
        assert ffn is not None
        names = {"router.weight": "router.weight"} if isinstance(ffn, MoEConfig) else {}
        fused = fused_experts(f"{hf}.experts")
        yield from module_rows(i, ffn, config.width, hf, names=names, fused=fused)


def read_gguf(metadata: Mapping[str, Any], tensors: Mapping[str, Any]) -> tuple[ModelConfig, Iterable[TensorMapping]]:
    m = Metadata(metadata, "jamba")
    width, heads, depth = m.size("embedding_length"), m.size("attention.head_count"), m.layers()
    kv_heads = m.sizes("attention.head_count_kv", depth)
    recurrent = next((i for i, n in enumerate(kv_heads) if n == 0), 0)
    mamba1 = read_gguf_mamba1(m, tensors, inner_norms=True, layer=recurrent)
    ffn_width = m.size("feed_forward_length")
    dense, moe = GatedMLPConfig(width=ffn_width), None
    if metadata.get("jamba.expert_count"):
        experts, active = m.size("expert_count"), m.size("expert_used_count")
        moe = MoEConfig(width=ffn_width, experts=experts, active=active, renormalize=False)
    layers = []
    for i, n in enumerate(kv_heads):
        mixer = AttentionConfig(heads=heads, kv_heads=n, head_dim=max(width // heads, 1)) if n else mamba1
        routed = moe is not None and f"blk.{i}.ffn_gate_inp.weight" in tensors
        layers.append(LayerConfig(mixers=(mixer,), feed_forward=moe if routed else dense))
    config = ModelConfig(
        vocab_size=tensor_shape(tensors, "token_embd.weight")[0],
        width=width,
        layers=tuple(layers),
        norm_eps=m.number("attention.layer_norm_rms_epsilon"),
        tied="output.weight" not in tensors,
        max_length=m.size("context_length"),
    )
    return config, rows(config)


def _parts(config: ModelConfig) -> tuple[AttentionConfig | None, Mamba1Config | None, MoEConfig | None]:
    """One of each kind that the model has."""
    return config.first(AttentionConfig), config.first(Mamba1Config), config.first(MoEConfig)


def write_gguf(config: ModelConfig) -> dict[str, Any]:
    attention, mamba1, moe = _parts(config)
    assert attention is not None and mamba1 is not None and config.layers[0].feed_forward is not None
    width = config.layers[0].feed_forward.width
    out = write_gguf_mamba1(mamba1) | gguf_sizes(config, attention, width, kv_by_layer=True, head_sizes=False)
    return out | {"expert_count": moe.experts if moe else 0, "expert_used_count": moe.active if moe else 0}


def limits(config: ModelConfig) -> Iterator[str]:
    attention, mamba1, _ = _parts(config)
    if attention is None or mamba1 is None:
        yield "llama.cpp's jamba needs layers of both kinds"
        return
    if attention.heads * attention.head_dim != config.width:
        yield "llama.cpp needs heads × head_dim = hidden size in jamba"
    yield from mamba1_limits(mamba1, config.width)


def write(config: ModelConfig) -> dict[str, Any]:
    """A config.json for a network that came from a GGUF file."""
    attention, mamba1, moe = _parts(config)
    assert attention is not None and mamba1 is not None and config.layers[0].feed_forward is not None
    a = _period([isinstance(layer.mixers[0], AttentionConfig) for layer in config.layers], "attention")
    e = _period([isinstance(layer.feed_forward, MoEConfig) for layer in config.layers], "expert") if moe else (2, 1)
    return {
        "architectures": ["JambaForCausalLM"],
        "model_type": "jamba",
        "vocab_size": config.vocab_size,
        "hidden_size": config.width,
        "intermediate_size": config.layers[0].feed_forward.width,
        "num_hidden_layers": len(config.layers),
        "num_attention_heads": attention.heads,
        "num_key_value_heads": attention.kv_heads,
        "rms_norm_eps": config.norm_eps,
        "tie_word_embeddings": config.tied,
        "max_position_embeddings": config.max_length,
        "attn_layer_period": a[0],
        "attn_layer_offset": a[1],
        "expert_layer_period": e[0],
        "expert_layer_offset": e[1],
        "num_experts": moe.experts if moe else 1,
        "num_experts_per_tok": moe.active if moe else 1,
        "mamba_d_state": mamba1.state,
        "mamba_d_conv": mamba1.conv,
        "mamba_expand": mamba1.inner // config.width,
        "mamba_dt_rank": mamba1.dt_rank,
        "mamba_conv_bias": mamba1.conv_bias,
        "mamba_proj_bias": mamba1.proj_bias,
    }


def _period(marks: list[bool], what: str) -> tuple[int, int]:
    """The (period, offset) whose layers are exactly those marked."""
    offset = marks.index(True)
    later = [i for i, mark in enumerate(marks) if mark and i > offset]
    for period in [later[0] - offset] if later else range(offset + 1, len(marks) + 1):
        if marks == [i % period == offset for i in range(len(marks))]:
            return period, offset
    raise UnsupportedError(f"the {what} layers of this model do not repeat evenly, as a jamba config.json needs")


JAMBA = Family(
    "jamba", ("jamba",), read, gguf="jamba", read_gguf=read_gguf, write_gguf=write_gguf, write=write, limits=limits
)
