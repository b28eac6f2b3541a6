"""Bamba: Mamba-2 in most layers, attention in a few, a gated MLP in all; half of each head is rotated.

transformers `modeling_bamba.py`.  llama.cpp has no such architecture, so there is no GGUF side.
"""

from __future__ import annotations

from collections.abc import Iterable, Iterator, Mapping
from dataclasses import replace
from typing import Any

from tiercel.families.falcon_h1 import read_mamba2
from tiercel.families.family import Family, TensorMapping, module_rows, norm_rows, top_rows
from tiercel.families.fields import Fields
from tiercel.families.rope import fixed_length, read_rope
from tiercel.feed_forward.gated_mlp.config import GatedMLPConfig
from tiercel.mixers.attention.config import AttentionConfig
from tiercel.model.config import LayerConfig, ModelConfig


def read(hf_config: Mapping[str, Any]) -> tuple[ModelConfig, Iterable[TensorMapping]]:
    f = Fields(dict(hf_config))
    width, heads, depth = (
        f.size("hidden_size"),
        f.size("num_attention_heads"),
        f.layers(),
    )
    context = f.size("max_position_embeddings", 262144)
    rope = replace(read_rope(f, theta=1e4, max_length=context), fraction=0.5)  # transformers hard-codes it
    bias = f.flag("attention_bias", False)
    attention = AttentionConfig(
        heads=heads,
        kv_heads=f.size("num_key_value_heads", heads if "num_key_value_heads" in f.data else 8),
        head_dim=f.size("head_dim", max(width // heads, 1)),
        rope=rope,
        qkv_bias=bias,
        out_bias=bias,
    )
    f.only("hidden_act", "silu", "swish")
    f.data.setdefault("mamba_d_ssm", None)  # Bamba has no such field: its inner width is expand × hidden_size
    f.data |= {"mamba_rms_norm": True, "mamba_norm_before_gate": False}
    bias = f.flag("mamba_proj_bias", False)
    mamba2 = replace(read_mamba2(f, width), in_bias=bias, out_bias=bias)
    feed_forward = GatedMLPConfig(width=f.size("intermediate_size"), bias=f.flag("mlp_bias", False))
    attends = f.indices("attn_layer_indices", depth)
    layers = {
        True: LayerConfig(mixers=(attention,), feed_forward=feed_forward),
        False: LayerConfig(mixers=(mamba2,), feed_forward=feed_forward),
    }
    config = ModelConfig(
        vocab_size=f.size("vocab_size"),
        width=width,
        layers=tuple(layers[i in attends] for i in range(depth)),
        norm_eps=f.number("rms_norm_eps", 1e-5),
        tied=f.flag("tie_word_embeddings", False),
        max_length=fixed_length(rope, context),
    )
    f.ignore("z_loss_coefficient", "layer_types", "layers_block_type", "attn_rotary_emb")
    f.done()
    return config, rows(config)


def rows(config: ModelConfig) -> Iterator[TensorMapping]:
    yield from top_rows(config, embed="model.embed_tokens.weight", norm="model.final_layernorm.weight")
    for i, layer in enumerate(config.layers):
        hf, mixer = f"model.layers.{i}", layer.mixers[0]
        yield from norm_rows(i, f"{hf}.input_layernorm.weight", f"{hf}.pre_ff_layernorm.weight")
        assert layer.feed_forward is not None
        part = "self_attn" if isinstance(mixer, AttentionConfig) else "mamba"
        yield from module_rows(i, mixer, config.width, f"{hf}.{part}")
        yield from module_rows(i, layer.feed_forward, config.width, f"{hf}.feed_forward")


BAMBA = Family("bamba", ("bamba",), read)
