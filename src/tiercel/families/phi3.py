"""Phi-3 and Phi-4: Llama with q, k and v in one matrix, gate and up in another, and part of a head that turns.

transformers `modeling_phi3.py`.  "su" and "yarn" are names of longrope here.  llama.cpp architecture `phi3` keeps both
matrices as they are and longrope's divisors as tensors; it has no windows.
"""

from __future__ import annotations

from collections.abc import Iterable, Iterator, Mapping
from dataclasses import replace
from typing import Any

from tiercel.families.family import (
    Family,
    Metadata,
    TensorMapping,
    gguf_sizes,
    joined,
    module_rows,
    norm_rows,
    tensor_shape,
    top_rows,
)
from tiercel.families.fields import Fields
from tiercel.families.llama import ACTIVATIONS
from tiercel.families.rope import fixed_length, gguf_rope_limits, read_gguf_rope, read_rope, write_gguf_rope, write_rope
from tiercel.feed_forward.gated_mlp.config import GatedMLPConfig
from tiercel.mixers.attention.config import AttentionConfig
from tiercel.mixers.spec import Transform
from tiercel.model.config import LayerConfig, ModelConfig


def read(hf_config: Mapping[str, Any]) -> tuple[ModelConfig, Iterable[TensorMapping]]:
    f = Fields({"original_max_position_embeddings": 4096} | dict(hf_config))
    width, heads = f.size("hidden_size", 3072), f.size("num_attention_heads", 32)
    depth, context = f.layers(32), f.size("max_position_embeddings", 4096)
    for key in ("rope_scaling", "rope_parameters"):
        table = f.data.get(key)
        kind = table.get("rope_type", table.get("type")) if isinstance(table, dict) else None
        if isinstance(table, dict) and kind in ("su", "yarn"):
            f.data[key] = {name: value for name, value in table.items() if name != "type"} | {"rope_type": "longrope"}
    rope = read_rope(f, theta=1e4, max_length=context)
    attention = AttentionConfig(
        heads=heads,
        kv_heads=f.size("num_key_value_heads", heads),
        head_dim=f.size("head_dim", max(width // heads, 1)),
        rope=rope,
        window=f.size_or_none("sliding_window"),
        joined=True,
    )
    mlp = GatedMLPConfig(
        width=f.size("intermediate_size", 8192), activation=f.choice("hidden_act", "silu", ACTIVATIONS)
    )
    f.only("attention_bias", False)
    f.ignore("embd_pdrop", "resid_pdrop")
    config = ModelConfig(
        vocab_size=f.size("vocab_size", 32064),
        width=width,
        layers=(LayerConfig(mixers=(attention,), feed_forward=mlp),) * depth,
        norm_eps=f.number("rms_norm_eps", 1e-5),
        tied=f.flag("tie_word_embeddings", False),
        max_length=fixed_length(rope, context),
    )
    f.done()
    return config, rows(config)


def rows(config: ModelConfig) -> Iterator[TensorMapping]:
    yield from top_rows(config, embed="model.embed_tokens.weight", norm="model.norm.weight")
    for i, layer in enumerate(config.layers):
        hf, attention, mlp = f"model.layers.{i}", layer.mixers[0], layer.feed_forward
        assert isinstance(attention, AttentionConfig) and mlp is not None
        yield from norm_rows(i, f"{hf}.input_layernorm.weight", f"{hf}.post_attention_layernorm.weight")
        qkv = joined({"q": attention.heads, "k": attention.kv_heads, "v": attention.kv_heads})
        for row in module_rows(i, attention, config.width, f"{hf}.self_attn"):
            yield _within(row, qkv, f"{hf}.self_attn.qkv_proj.weight", f"blk.{i}.attn_qkv.weight")
        gate_up = joined({"gate": 1, "up": 1})
        for row in module_rows(i, mlp, config.width, f"{hf}.mlp"):
            yield _within(row, gate_up, f"{hf}.mlp.gate_up_proj.weight", f"blk.{i}.ffn_up.weight")


def _within(row: TensorMapping, forms: Mapping[str, Transform], hf: str, gguf: str) -> TensorMapping:
    form = forms.get(".".join(row.ours.split(".")[-2:]))
    return row if form is None else replace(row, hf=hf, hf_form=form, gguf=gguf, gguf_forms=(form,))


def read_gguf(metadata: Mapping[str, Any], tensors: Mapping[str, Any]) -> tuple[ModelConfig, Iterable[TensorMapping]]:
    m = Metadata(metadata, metadata["general.architecture"])
    width, heads = m.size("embedding_length"), m.size("attention.head_count")
    head_dim, context = max(width // heads, 1), m.size("context_length")
    rope = read_gguf_rope(m, tensors, head_dim)
    attention = AttentionConfig(
        heads=heads,
        kv_heads=m.size("attention.head_count_kv", heads),
        head_dim=head_dim,
        rope=rope,
        window=metadata.get(f"{m.arch}.attention.sliding_window") or None,
        joined=True,
    )
    mlp = GatedMLPConfig(width=m.size("feed_forward_length"))
    config = ModelConfig(
        vocab_size=tensor_shape(tensors, "token_embd.weight")[0],
        width=width,
        layers=(LayerConfig(mixers=(attention,), feed_forward=mlp),) * m.layers(),
        norm_eps=m.number("attention.layer_norm_rms_epsilon"),
        tied="output.weight" not in tensors,
        max_length=fixed_length(rope, context),
    )
    return config, rows(config)


def _parts(config: ModelConfig) -> tuple[AttentionConfig, GatedMLPConfig]:
    attention, mlp = config.layers[0].mixers[0], config.layers[0].feed_forward
    assert isinstance(attention, AttentionConfig) and attention.rope is not None and isinstance(mlp, GatedMLPConfig)
    return attention, mlp


def write_gguf(config: ModelConfig) -> dict[str, Any]:
    attention, mlp = _parts(config)
    assert attention.rope is not None
    out = gguf_sizes(config, attention, mlp.width, head_sizes=False) | {
        "attention.sliding_window": 0,
    }
    return out | write_gguf_rope(attention.rope, attention.head_dim)


def limits(config: ModelConfig) -> Iterator[str]:
    attention, mlp = _parts(config)
    if attention.window is not None and attention.window < config.max_length:
        yield f"llama.cpp has no sliding window of {attention.window} in this architecture"
    if attention.heads * attention.head_dim != config.width:
        yield "llama.cpp needs heads × head_dim = hidden size in phi3"
    if mlp.activation != "silu":
        yield f"llama.cpp computes silu here, not {mlp.activation}"
    yield from gguf_rope_limits(attention.rope, partial=True, longrope=True)


def write(config: ModelConfig) -> dict[str, Any]:
    """A config.json for a network that came from a GGUF file."""
    attention, mlp = _parts(config)
    assert attention.rope is not None
    return {
        "architectures": ["Phi3ForCausalLM"],
        "model_type": "phi3",
        "vocab_size": config.vocab_size,
        "hidden_size": config.width,
        "intermediate_size": mlp.width,
        "num_hidden_layers": len(config.layers),
        "num_attention_heads": attention.heads,
        "num_key_value_heads": attention.kv_heads,
        "hidden_act": mlp.activation,
        "sliding_window": attention.window,
        "max_position_embeddings": config.max_length,
        "original_max_position_embeddings": attention.rope.original_length or config.max_length,
        "rms_norm_eps": config.norm_eps,
        "tie_word_embeddings": config.tied,
        "pad_token_id": None,  # else transformers pads with 32000, whatever the vocabulary
    } | write_rope(attention.rope)


PHI3 = Family(
    "phi3", ("phi3",), read, gguf="phi3", read_gguf=read_gguf, write_gguf=write_gguf, write=write, limits=limits
)
