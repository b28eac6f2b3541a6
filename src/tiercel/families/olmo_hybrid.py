"""OLMo-Hybrid: gated delta rule in three layers of four, attention in the fourth.

    linear     x + delta(norm x);   x + mlp(norm x)        β up to 2, values twice as wide as keys, norm eps 1e-5 inside
    attention  x + norm(attention x);   x + norm(mlp x)    no positions in the published weights, norms over all of q, k

transformers 5.24 `modeling_olmo_hybrid.py`.  Files have one convolution each for q, k and v; the same version saves
them cut into equal parts.  llama.cpp does not know the architecture.
"""

from __future__ import annotations

from collections.abc import Iterable, Iterator, Mapping
from typing import Any

from tiercel.families.family import Family, TensorMapping, module_rows, top_rows
from tiercel.families.fields import Fields
from tiercel.families.llama import ACTIVATIONS
from tiercel.families.qwen3_5 import attends
from tiercel.families.rope import fixed_length, read_rope
from tiercel.feed_forward.gated_mlp.config import GatedMLPConfig
from tiercel.mixers.attention.config import AttentionConfig
from tiercel.mixers.gated_delta.config import GatedDeltaConfig
from tiercel.model.config import LayerConfig, ModelConfig

OUT_NORM_EPS = 1e-5  # of the gated norm, whatever rms_norm_eps is


def read(hf_config: Mapping[str, Any]) -> tuple[ModelConfig, Iterable[TensorMapping]]:
    f = Fields(dict(hf_config))
    width, heads = f.size("hidden_size", 3840), f.size("num_attention_heads", 30)
    depth, context = f.layers(32), f.size("max_position_embeddings", 65536)
    key_heads = f.size("linear_num_key_heads", heads)
    key_dim = f.size("linear_key_head_dim", max(int(0.75 * width / key_heads), 1))
    rope = None if _without_positions(f) else read_rope(f, theta=1e4, max_length=context)
    bias, activation = f.flag("attention_bias", False), f.choice("hidden_act", "silu", ACTIVATIONS)
    f.only("hidden_act", "silu", "swish")  # it is the activation of the convolution, too
    attention = AttentionConfig(
        heads=heads,
        kv_heads=f.size("num_key_value_heads", heads),
        head_dim=f.size("head_dim", max(width // heads, 1)),
        rope=rope,
        qkv_bias=bias,
        out_bias=bias,
        qk_norm=True,
        norm_all_heads=True,
    )
    delta = GatedDeltaConfig(
        key_heads=key_heads,
        value_heads=f.size("linear_num_value_heads", heads),
        key_dim=key_dim,
        value_dim=f.size("linear_value_head_dim", 2 * key_dim),
        conv=f.size("linear_conv_kernel_dim", 4, largest=256),
        beta_max=2.0 if f.flag("linear_allow_neg_eigval", True) else 1.0,
        norm_eps=OUT_NORM_EPS,
    )
    f.ignore("linear_a_log_min", "linear_a_log_max", "linear_dt_min", "linear_dt_max", "linear_dt_init_floor")
    mlp = GatedMLPConfig(width=f.size("intermediate_size", 11008), activation=activation)
    linear = LayerConfig(mixers=(delta,), feed_forward=mlp)
    full = LayerConfig(mixers=(attention,), feed_forward=mlp, pre_norm=False, post_norm=True)
    config = ModelConfig(
        vocab_size=f.size("vocab_size", 100352),
        width=width,
        layers=tuple(full if there else linear for there in attends(f, depth, last=True)),
        norm_eps=f.number("rms_norm_eps", 1e-6),
        tied=f.flag("tie_word_embeddings", False),
        max_length=fixed_length(rope, context),
    )
    f.done()
    return config, rows(config)


def _without_positions(f: Fields) -> bool:
    """Whether a rotary setting is null, as in published files; 5.24 takes `rope_parameters: null` for its default."""
    table = f.data.get("rope_parameters", {})
    if table is None:
        table = {"rope_theta": f.data.get("rope_theta")}
    elif isinstance(table, dict) and "rope_theta" not in table and "rope_theta" in f.data:
        table = table | {"rope_theta": f.data["rope_theta"]}
    if isinstance(table, dict) and any(table.get(key, 0) is None for key in ("rope_theta", "rope_type")):
        f.ignore("rope_parameters", "rope_scaling", "rope_theta")
        return True
    return False


def rows(config: ModelConfig) -> Iterator[TensorMapping]:
    yield from top_rows(config, embed="model.embed_tokens.weight", norm="model.norm.weight")
    for i, layer in enumerate(config.layers):
        hf, mixer = f"model.layers.{i}", layer.mixers[0]
        linear = isinstance(mixer, GatedDeltaConfig)
        # names in published files, and those of the module; 5.24 renames them in attention layers, too
        norms = {"mixer": ("attention_layer_norm", "input_layernorm"),
                 "ffn": ("feedforward_layer_norm", "post_attention_layernorm")} if linear else {
                "mixer_post": ("post_attention_layernorm", "feedforward_layer_norm"),
                "ffn_post": ("post_feedforward_layernorm",)}  # fmt: skip
        for ours, names in norms.items():
            first, *others = (f"{hf}.{name}.weight" for name in names)
            yield TensorMapping(f"layers.{i}.{ours}_norm.weight", first, None, keep_fp32=True, aliases=tuple(others))
        if linear:
            names_: dict[str, str | tuple[str, ...]] = {
                "qkv.weight": tuple(f"{part}_proj.weight" for part in "qkv"),
                "conv": tuple(f"{part}_conv1d.weight" for part in "qkv"),
                "out_norm": "o_norm.weight", "out.weight": "o_proj.weight", "z.weight": "g_proj.weight",
                "a.weight": "a_proj.weight", "b.weight": "b_proj.weight",
            }  # fmt: skip
            yield from module_rows(i, mixer, config.width, f"{hf}.linear_attn", names=names_)
        else:
            yield from module_rows(i, mixer, config.width, f"{hf}.self_attn")
        assert layer.feed_forward is not None
        yield from module_rows(i, layer.feed_forward, config.width, f"{hf}.mlp")


OLMO_HYBRID = Family("olmo_hybrid", ("olmo_hybrid", "olmo3_2_hybrid"), read, left_out=("mtp.",))
