"""Qwen3.5 and Qwen3.6, dense: gated delta rule in three layers of four, gated attention in the fourth.

transformers `modeling_qwen3_5.py`.  Norms are 1 + w, but for the gated norm of the linear layers; q_proj holds query
and gate, head by head.  The vision tower (`model.visual.*`) and the multi-token prediction head (`mtp.*`) of a
checkpoint are left out.  Its GGUF form (`qwen35`, value heads in another order) is not written or read yet.
"""

from __future__ import annotations

from collections.abc import Iterable, Iterator, Mapping
from dataclasses import replace
from typing import Any

from tiercel.errors import UnsupportedError
from tiercel.families.family import Family, TensorMapping, module_rows, norm_rows, top_rows
from tiercel.families.fields import Fields
from tiercel.families.llama import ACTIVATIONS
from tiercel.families.rope import fixed_length, read_rope
from tiercel.feed_forward.gated_mlp.config import GatedMLPConfig
from tiercel.mixers.attention.config import AttentionConfig
from tiercel.mixers.gated_delta.config import GatedDeltaConfig
from tiercel.mixers.spec import Transform
from tiercel.model.config import LayerConfig, ModelConfig

PLUS_ONE = Transform("plus_one")


def read(hf_config: Mapping[str, Any]) -> tuple[ModelConfig, Iterable[TensorMapping]]:
    nested = isinstance(hf_config.get("text_config"), dict)  # a checkpoint with a vision tower
    f = Fields(dict(hf_config["text_config"] if nested else hf_config))
    width, heads = f.size("hidden_size", 4096), f.size("num_attention_heads", 16)
    depth = f.layers(32)
    context = f.size("max_position_embeddings", 32768)
    rope = _rope(f, context)
    bias, activation = f.flag("attention_bias", False), f.choice("hidden_act", "silu", ACTIVATIONS)
    attention = AttentionConfig(
        heads=heads,
        kv_heads=f.size("num_key_value_heads", 4),
        head_dim=f.size("head_dim", 256),
        rope=rope,
        qkv_bias=bias,
        out_bias=bias,
        qk_norm=True,
        output_gate=True,
    )
    f.only("hidden_act", "silu", "swish")  # it is the activation of the convolution, too
    delta = GatedDeltaConfig(
        key_heads=f.size("linear_num_key_heads", 16),
        value_heads=f.size("linear_num_value_heads", 32),
        key_dim=f.size("linear_key_head_dim", 128),
        value_dim=f.size("linear_value_head_dim", 128),
        conv=f.size("linear_conv_kernel_dim", 4, largest=256),
    )
    mlp = GatedMLPConfig(width=f.size("intermediate_size", 12288), activation=activation)
    f.ignore("mamba_ssm_dtype", "mtp_num_hidden_layers", "mtp_use_dedicated_embeddings", "output_gate_type")
    f.only("attn_output_gate", True)
    config = ModelConfig(
        vocab_size=f.size("vocab_size", 248320),
        width=width,
        layers=tuple(LayerConfig(mixers=(attention if full else delta,), feed_forward=mlp) for full in _full(f, depth)),
        norm_eps=f.number("rms_norm_eps", 1e-6),
        tied=bool(hf_config.get("tie_word_embeddings", False)) if nested else f.flag("tie_word_embeddings", False),
        max_length=fixed_length(rope, context),
    )
    if nested:
        f.ignore("tie_word_embeddings")
    f.done()
    return config, rows(config, "model.language_model" if nested else "model")


def _rope(f: Fields, context: int) -> Any:
    """For text the three position rows of mrope are equal, and it is plain partial rope."""
    for key in ("rope_parameters", "rope_scaling"):
        if isinstance(table := f.data.get(key), dict):
            f.data[key] = {k: v for k, v in table.items() if k not in ("mrope_section", "mrope_interleaved")}
            if f.data[key].get("rope_type", f.data[key].get("type")) == "mrope":
                f.data[key]["rope_type"] = "default"
    return read_rope(f, theta=1e4, max_length=context, fraction=0.25)


def _full(f: Fields, depth: int) -> list[bool]:
    """Whether each layer attends."""
    interval = f.size("full_attention_interval", 4)
    types = f.data.get("layer_types")
    f.ignore("layer_types")
    if types is None:
        return [(i + 1) % interval == 0 for i in range(depth)]
    known = {"full_attention": True, "linear_attention": False}
    if not isinstance(types, list) or len(types) != depth or not all(isinstance(t, str) and t in known for t in types):
        raise UnsupportedError(f"{f.where}: layer_types must name full_attention or linear_attention for each layer")
    return [known[t] for t in types]


def rows(config: ModelConfig, root: str) -> Iterator[TensorMapping]:
    for row in top_rows(config, embed=f"{root}.embed_tokens.weight", norm=f"{root}.norm.weight"):
        yield replace(row, hf_form=PLUS_ONE) if row.ours == "norm.weight" else row
    for i, layer in enumerate(config.layers):
        hf, mixer = f"{root}.layers.{i}", layer.mixers[0]
        for row in norm_rows(i, f"{hf}.input_layernorm.weight", f"{hf}.post_attention_layernorm.weight"):
            yield replace(row, hf_form=PLUS_ONE)
        if isinstance(mixer, AttentionConfig):
            both = {f"gate.{leaf}": f"q_proj.{leaf}" for leaf in ("weight", "bias")}
            for row in module_rows(i, mixer, config.width, f"{hf}.self_attn", names=both):
                name = row.ours.rpartition(".mixers.attention.")[2].partition(".")[0]
                form = {"q": Transform("query", mixer.heads), "gate": Transform("gate", mixer.heads)}.get(name)
                yield replace(row, hf_form=PLUS_ONE if name in ("q_norm", "k_norm") else form)
        else:
            yield from module_rows(i, mixer, config.width, f"{hf}.linear_attn")
        assert layer.feed_forward is not None
        yield from module_rows(i, layer.feed_forward, config.width, f"{hf}.mlp")


QWEN3_5 = Family("qwen3_5", ("qwen3_5", "qwen3_5_text"), read, left_out=("model.visual.", "mtp."))
