"""Gemma 3, its text model: windows in five layers of six, norms before and after, two rotary bases.

    x = √width · embedding          the table is tied to the output and not scaled itself
    norms are 1 + w in a folder, those of q and k too; in GGUF the 1 is added
    attention divides by √query_pre_attn_scalar; layers with a window turn by their own base, without scaling

transformers `modeling_gemma3.py`, which rounds √width to the dtype of the table: with bfloat16 weights it differs there
from this and from llama.cpp (architecture `gemma3`).  The vision tower of a checkpoint is left out.
"""

from __future__ import annotations

from collections.abc import Iterable, Iterator, Mapping
from dataclasses import replace
from typing import Any

from tiercel.errors import FormatError, UnsupportedError
from tiercel.families.family import Family, Metadata, TensorMapping, gguf_sizes, module_rows, tensor_shape, top_rows
from tiercel.families.fields import Fields
from tiercel.families.llama import ACTIVATIONS
from tiercel.families.rope import (
    fixed_length,
    gguf_rope_limits,
    read_gguf_rope,
    read_ropes,
    write_gguf_rope,
    write_rope,
)
from tiercel.families.wrapped import VISION, wrapped_rows
from tiercel.feed_forward.gated_mlp.config import GatedMLPConfig
from tiercel.mixers.attention.config import AttentionConfig
from tiercel.mixers.attention.rope import RopeConfig
from tiercel.mixers.spec import Transform
from tiercel.model.config import LayerConfig, ModelConfig

PLUS_ONE = Transform("plus_one")
SLIDING, FULL = "sliding_attention", "full_attention"
NORMS = {  # ours: in a folder, in GGUF
    "mixer_norm": ("input_layernorm", "attn_norm"),
    "mixer_post_norm": ("post_attention_layernorm", "post_attention_norm"),
    "ffn_norm": ("pre_feedforward_layernorm", "ffn_norm"),
    "ffn_post_norm": ("post_feedforward_layernorm", "post_ffw_norm"),
}
LAYERS_27B = 62  # llama.cpp scales attention otherwise in models of this depth


def read(hf_config: Mapping[str, Any]) -> tuple[ModelConfig, Iterable[TensorMapping]]:
    nested = hf_config.get("model_type") == "gemma3"  # a checkpoint with a vision tower
    f = Fields(dict(hf_config["text_config"] if nested and "text_config" in hf_config else hf_config))
    width, heads = f.size("hidden_size", 2304), f.size("num_attention_heads", 8)
    depth = f.layers(26)
    context = f.size("max_position_embeddings", 131_072)
    ropes = read_ropes(f, {FULL: 1e6, SLIDING: 1e4}, max_length=context, old=("rope_theta", "rope_local_base_freq"))
    bias = f.flag("attention_bias", False)
    kinds, window = _kinds(f, depth), f.size_or_none("sliding_window", 4096)
    if window is None and SLIDING in kinds:
        raise FormatError(f"{f.where}: sliding_window is null, but there are layers of {SLIDING}")
    attention = AttentionConfig(
        heads=heads,
        kv_heads=f.size("num_key_value_heads", 4),
        head_dim=f.size("head_dim", 256),
        qkv_bias=bias,
        out_bias=bias,
        scale=f.number("query_pre_attn_scalar", 256, positive=True) ** -0.5,
        qk_norm=True,
    )
    of_kind = {
        FULL: replace(attention, rope=ropes[FULL]),
        SLIDING: replace(attention, rope=ropes[SLIDING], window=window),
    }
    activation = f.choice("hidden_activation", "gelu_pytorch_tanh", ACTIVATIONS)
    mlp = GatedMLPConfig(width=f.size("intermediate_size", 9216), activation=activation)
    f.only("use_bidirectional_attention", False)
    f.ignore("hidden_act")  # older files have both, and this one is not read
    config = ModelConfig(
        vocab_size=f.size("vocab_size", 262_208),
        width=width,
        layers=tuple(LayerConfig(mixers=(of_kind[kind],), feed_forward=mlp, post_norm=True) for kind in kinds),
        norm_eps=f.number("rms_norm_eps", 1e-6),
        tied=bool(hf_config.get("tie_word_embeddings", True)) if nested else f.flag("tie_word_embeddings", True),
        embed_scale=width**0.5,
        max_length=fixed_length(ropes[FULL], context),
    )
    if nested:
        f.ignore("tie_word_embeddings")
    f.done()
    return config, wrapped_rows(rows(config)) if nested else rows(config)


def _kinds(f: Fields, depth: int) -> list[str]:
    """The kind of every layer: `layer_types`, or a full one in `sliding_window_pattern`."""
    every = f.size("sliding_window_pattern", 6)
    return f.layer_types(depth, (FULL, SLIDING)) or [SLIDING if (i + 1) % every else FULL for i in range(depth)]


def rows(config: ModelConfig) -> Iterator[TensorMapping]:
    for row in top_rows(config, embed="model.embed_tokens.weight", norm="model.norm.weight"):
        yield replace(row, hf_form=PLUS_ONE) if row.ours == "norm.weight" else row
    for i, layer in enumerate(config.layers):
        hf = f"model.layers.{i}"
        for ours, (theirs, gguf) in NORMS.items():
            yield TensorMapping(
                f"layers.{i}.{ours}.weight", f"{hf}.{theirs}.weight", f"blk.{i}.{gguf}.weight", hf_form=PLUS_ONE,
                keep_fp32=True,
            )  # fmt: skip
        for row in module_rows(i, layer.mixers[0], config.width, f"{hf}.self_attn"):
            yield replace(row, hf_form=PLUS_ONE) if "_norm." in row.ours else row
        assert layer.feed_forward is not None
        yield from module_rows(i, layer.feed_forward, config.width, f"{hf}.mlp")


def read_gguf(metadata: Mapping[str, Any], tensors: Mapping[str, Any]) -> tuple[ModelConfig, Iterable[TensorMapping]]:
    m = Metadata(metadata, metadata["general.architecture"])
    width, heads, depth = m.size("embedding_length"), m.size("attention.head_count"), m.layers()
    head_dim = m.size("attention.key_length", max(width // heads, 1))
    rope = read_gguf_rope(m, tensors, head_dim, ignored=("freq_base_swa",))
    if metadata.get(f"{m.arch}.final_logit_softcapping"):
        raise UnsupportedError("GGUF metadata: final_logit_softcapping is not supported")
    scalar = width // heads if depth == LAYERS_27B else head_dim
    attention = AttentionConfig(
        heads=heads,
        kv_heads=m.size("attention.head_count_kv", heads),
        head_dim=head_dim,
        rope=rope,
        scale=scalar**-0.5,
        qk_norm=True,
    )
    window = metadata.get(f"{m.arch}.attention.sliding_window") or None
    local = replace(
        attention,
        rope=RopeConfig(theta=m.number("rope.freq_base_swa", 10_000.0), fraction=rope.fraction),
        window=window,
    )
    mlp = GatedMLPConfig(width=m.size("feed_forward_length"), activation="gelu_tanh")
    sliding = [False] * depth if window is None else _sliding(m, depth)
    config = ModelConfig(
        vocab_size=tensor_shape(tensors, "token_embd.weight")[0],
        width=width,
        layers=tuple(
            LayerConfig(mixers=(local if slides else attention,), feed_forward=mlp, post_norm=True)
            for slides in sliding
        ),
        norm_eps=m.number("attention.layer_norm_rms_epsilon"),
        tied="output.weight" not in tensors,
        embed_scale=width**0.5,
        max_length=m.size("context_length"),
    )
    return config, rows(config)


def _sliding(m: Metadata, depth: int) -> list[bool]:
    """Whether each layer has the window: a list, or all but every n-th."""
    pattern = m.metadata.get(f"{m.arch}.attention.sliding_window_pattern")
    if isinstance(pattern, list):
        if len(pattern) != depth or not all(isinstance(value, int) for value in pattern):
            raise FormatError(f"GGUF metadata: {m.arch}.attention.sliding_window_pattern must list {depth} layers")
        return [bool(value) for value in pattern]
    every = m.size("attention.sliding_window_pattern", 6)
    return [(i + 1) % every != 0 for i in range(depth)]


def _parts(config: ModelConfig) -> tuple[AttentionConfig | None, AttentionConfig | None, GatedMLPConfig]:
    """Attention of the layers without and with a window, as far as there are such, and the MLP."""
    mixers, mlp = [layer.mixers[0] for layer in config.layers], config.layers[0].feed_forward
    assert isinstance(mlp, GatedMLPConfig)
    found = [m for m in mixers if isinstance(m, AttentionConfig)]
    full, local = (next((m for m in found if bool(m.window) == slides), None) for slides in (False, True))
    return full, local, mlp


def write_gguf(config: ModelConfig) -> dict[str, Any]:
    full, local, mlp = _parts(config)
    any_ = full or local
    assert any_ is not None and any_.rope is not None
    out = gguf_sizes(config, any_, mlp.width) | write_gguf_rope(any_.rope, any_.head_dim)
    if local is not None and local.rope is not None:
        out |= {"attention.sliding_window": local.window, "rope.freq_base_swa": local.rope.theta}
        slides = [bool(getattr(layer.mixers[0], "window", None)) for layer in config.layers]
        if slides != [(i + 1) % 6 != 0 for i in range(len(slides))]:
            out["attention.sliding_window_pattern"] = slides
    return out


def limits(config: ModelConfig) -> Iterator[str]:
    full, local, mlp = _parts(config)
    any_ = full or local
    assert any_ is not None
    if any_.qkv_bias or any_.out_bias:
        yield "llama.cpp has no biases in this architecture"
    if mlp.activation != "gelu_tanh":
        yield f"llama.cpp computes gelu by tanh here, not {mlp.activation}"
    scalar = config.width // any_.heads if len(config.layers) == LAYERS_27B else any_.head_dim
    if any_.scale is None or abs(any_.scale * scalar**0.5 - 1) > 1e-6:
        yield f"llama.cpp divides the scores of such a model by √{scalar} (query_pre_attn_scalar)"
    if local is not None and (local.rope is None or local.rope.scaling != "none" or full is None):
        yield "llama.cpp needs layers without a window, and does not scale the rotation of those with one"
    yield from gguf_rope_limits(any_.rope)


def write(config: ModelConfig) -> dict[str, Any]:
    """A config.json for a network that came from a GGUF file."""
    full, local, mlp = _parts(config)
    any_ = full or local
    assert any_ is not None and any_.rope is not None and any_.scale is not None
    kinds = [SLIDING if getattr(layer.mixers[0], "window", None) else FULL for layer in config.layers]
    out: dict[str, Any] = {
        "architectures": ["Gemma3ForCausalLM"],
        "model_type": "gemma3_text",
        "vocab_size": config.vocab_size,
        "hidden_size": config.width,
        "intermediate_size": mlp.width,
        "num_hidden_layers": len(config.layers),
        "num_attention_heads": any_.heads,
        "num_key_value_heads": any_.kv_heads,
        "head_dim": any_.head_dim,
        "query_pre_attn_scalar": round(any_.scale**-2),
        "sliding_window": local.window if local else None,
        "layer_types": kinds,
        "hidden_activation": "gelu_pytorch_tanh",
        "max_position_embeddings": config.max_length,
        "rms_norm_eps": config.norm_eps,
        "tie_word_embeddings": config.tied,
    }
    if local is not None and local.rope is not None:
        out["rope_local_base_freq"] = local.rope.theta
    return out | write_rope(any_.rope)


GEMMA3 = Family(
    "gemma3", ("gemma3_text", "gemma3"), read, gguf="gemma3", read_gguf=read_gguf, write_gguf=write_gguf, write=write,
    limits=limits, left_out=VISION,
)  # fmt: skip
