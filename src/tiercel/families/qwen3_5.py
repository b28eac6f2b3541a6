"""Qwen3.5, Qwen3.6 and Qwen3-Next: gated delta rule in three layers of four, gated attention in the fourth.

    qwen3_5      a gated MLP
    qwen3_5_moe  experts, and one for every token behind a sigmoid gate; router weights sum to 1
    qwen3_next   the same; projections of a linear layer lie key head by key head in its files

transformers `modeling_qwen3_5.py`, `modeling_qwen3_5_moe.py`, `modeling_qwen3_next.py`.  Norms are 1 + w, but for the
gated norm of the linear layers; q_proj holds query and gate, head by head.  The vision tower (`model.visual.*`) and the
multi-token prediction head (`mtp.*`) of a checkpoint are left out.  llama.cpp architectures `qwen35`, `qwen35moe`,
`qwen3next`: in the first two value head h reads key head h mod key_heads, and so it does here; in folders, and in the
third, it reads h // (value_heads / key_heads).
"""

from __future__ import annotations

from collections.abc import Iterable, Iterator, Mapping
from dataclasses import replace
from typing import Any, NamedTuple

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
from tiercel.families.llama import ACTIVATIONS
from tiercel.families.qwen3 import sparse
from tiercel.families.rope import (
    fixed_length,
    gguf_rope_limits,
    read_gguf_rope,
    read_rope,
    write_gguf_rope,
    write_rope,
)
from tiercel.feed_forward.gated_mlp.config import GatedMLPConfig
from tiercel.feed_forward.moe.config import MoEConfig
from tiercel.mixers.attention.config import AttentionConfig
from tiercel.mixers.gated_delta.config import GatedDeltaConfig
from tiercel.mixers.spec import Transform
from tiercel.model.config import LayerConfig, ModelConfig

PLUS_ONE = Transform("plus_one")


def read(hf_config: Mapping[str, Any]) -> tuple[ModelConfig, Iterable[TensorMapping]]:
    nested = isinstance(hf_config.get("text_config"), dict)  # a checkpoint with a vision tower
    f = Fields(dict(hf_config["text_config"] if nested else hf_config))
    kind = next(kind for kind in SIZES if hf_config["model_type"].startswith(kind))
    default = SIZES[kind]
    width, heads = f.size("hidden_size", default.width), f.size("num_attention_heads", 16)
    depth = f.layers(default.layers)
    context = f.size("max_position_embeddings", 32768)
    rope = _rope(f, context)
    bias, activation = f.flag("attention_bias", False), f.choice("hidden_act", "silu", ACTIVATIONS)
    attention = AttentionConfig(
        heads=heads,
        kv_heads=f.size("num_key_value_heads", default.kv_heads),
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
        tiled=kind != "qwen3_next",
    )
    full = attends(f, depth)
    f.ignore("mamba_ssm_dtype", "mtp_num_hidden_layers", "mtp_use_dedicated_embeddings", "output_gate_type")
    f.only("attn_output_gate", True)
    feed_forwards = _feed_forwards(f, kind, depth, activation)
    config = ModelConfig(
        vocab_size=f.size("vocab_size", default.vocab_size),
        width=width,
        layers=tuple(
            LayerConfig(mixers=(attention if there else delta,), feed_forward=feed_forward)
            for there, feed_forward in zip(full, feed_forwards, strict=True)
        ),
        norm_eps=f.number("rms_norm_eps", 1e-6),
        tied=(_outer(hf_config) if nested else f).flag("tie_word_embeddings", False),
        max_length=fixed_length(rope, context),
    )
    if nested:
        f.ignore("tie_word_embeddings")
    f.done()
    return config, rows(config, "model.language_model" if nested else "model")


class Sizes(NamedTuple):
    """What a config leaves out."""

    width: int
    layers: int
    kv_heads: int
    vocab_size: int


SIZES = {
    "qwen3_5_moe": Sizes(2048, 40, 2, 248320),
    "qwen3_5": Sizes(4096, 32, 4, 248320),
    "qwen3_next": Sizes(2048, 48, 2, 151936),
}


def _outer(hf_config: Mapping[str, Any]) -> Fields:
    """The fields beside `text_config`, all of the vision tower but one."""
    f = Fields(dict(hf_config))
    f.ignore("text_config", *(name for name in f.data if str(name).startswith(("vision_", "image_", "video_"))))
    f.ignore("tie_word_embeddings", "language_model_only")
    f.done()
    return f


def _feed_forwards(f: Fields, kind: str, depth: int, activation: str) -> list[GatedMLPConfig | MoEConfig]:
    """That of each layer."""
    if kind == "qwen3_5":
        return [GatedMLPConfig(width=f.size("intermediate_size", 12288), activation=activation)] * depth
    f.ignore("output_router_logits", "router_aux_loss_coef")
    moe = MoEConfig(
        width=f.size("moe_intermediate_size", 512),
        experts=f.size("num_experts", 512 if kind == "qwen3_next" else 256, largest=65536),
        active=f.size("num_experts_per_tok", 10 if kind == "qwen3_next" else 8),
        renormalize=f.flag("norm_topk_prob", True) if kind == "qwen3_next" else True,
        activation=activation,
        shared_width=f.size("shared_expert_intermediate_size", 512),
        shared_gate=True,
    )
    if kind == "qwen3_5_moe":
        f.only("norm_topk_prob", True)
        f.ignore("intermediate_size")
        return [moe] * depth
    dense = GatedMLPConfig(width=f.size("intermediate_size", 5632), activation=activation)
    return [moe if there else dense for there in sparse(f, depth)]


def _rope(f: Fields, context: int) -> Any:
    """For text the three position rows of mrope are equal, and it is plain partial rope."""
    for key in ("rope_parameters", "rope_scaling"):
        if isinstance(table := f.data.get(key), dict):
            f.data[key] = {k: v for k, v in table.items() if k not in ("mrope_section", "mrope_interleaved")}
            if f.data[key].get("rope_type", f.data[key].get("type")) == "mrope":
                f.data[key]["rope_type"] = "default"
    return read_rope(f, theta=1e4, max_length=context, fraction=0.25)


def attends(f: Fields, depth: int, *, last: bool = False) -> list[bool]:
    """Whether each layer attends; last: the last one does, where the pattern gives none."""
    interval = f.size("full_attention_interval", 4)
    types = f.layer_types(depth, ("full_attention", "linear_attention"))
    if types is None:
        found = [(i + 1) % interval == 0 for i in range(depth)]
        return found if any(found) or not last else [*found[:-1], True]
    return [kind == "full_attention" for kind in types]


def rows(config: ModelConfig, root: str = "model") -> Iterator[TensorMapping]:
    for row in top_rows(config, embed=f"{root}.embed_tokens.weight", norm=f"{root}.norm.weight"):
        yield replace(row, hf_form=PLUS_ONE) if row.ours == "norm.weight" else row
    for i, layer in enumerate(config.layers):
        hf, mixer, feed_forward = f"{root}.layers.{i}", layer.mixers[0], layer.feed_forward
        norms = norm_rows(
            i, f"{hf}.input_layernorm.weight", f"{hf}.post_attention_layernorm.weight", "post_attention_norm.weight"
        )
        for row in norms:
            yield replace(row, hf_form=PLUS_ONE)
        if isinstance(mixer, AttentionConfig):
            yield from attention_rows(i, mixer, config.width, f"{hf}.self_attn")
        else:
            assert isinstance(mixer, GatedDeltaConfig)
            yield from delta_rows(i, mixer, config.width, f"{hf}.linear_attn", by_head=_by_head(config))
        assert feed_forward is not None
        fused = fused_experts(f"{hf}.mlp.experts") if isinstance(feed_forward, MoEConfig) else {}
        yield from module_rows(i, feed_forward, config.width, f"{hf}.mlp", fused=fused)


def _by_head(config: ModelConfig) -> bool:
    """Whether it is Qwen3-Next, whose files have the projections of a key head together."""
    return any(isinstance(m := layer.mixers[0], GatedDeltaConfig) and not m.tiled for layer in config.layers)


def delta_rows(i: int, c: GatedDeltaConfig, width: int, hf: str, *, by_head: bool) -> Iterator[TensorMapping]:
    """in_proj_qkvz and in_proj_ba hold [q | k | v | z] and [b | a] of key head after key head."""
    if not by_head:
        yield from module_rows(i, c, width, hf, orders=tiled(c))
        return
    each = c.value_heads // c.key_heads
    qkvz, ba = (c.key_dim, c.key_dim, each * c.value_dim, each * c.value_dim), (each, each)
    parts = {"qkv": ("qkvz", qkvz, (0, 1, 2)), "z": ("qkvz", qkvz, (3,)), "b": ("ba", ba, (0,)), "a": ("ba", ba, (1,))}
    names: dict[str, str | tuple[str, ...]] = {f"{name}.weight": f"in_proj_{p[0]}.weight" for name, p in parts.items()}
    for row in module_rows(i, c, width, hf, names=names):
        name = row.ours.rpartition(".mixers.gated_delta.")[2].removesuffix(".weight")
        if name not in parts:
            yield row
            continue
        theirs, sizes, take = parts[name]
        form = Transform("runs", c.key_heads, sizes, take)
        row = replace(row, hf_form=form)
        yield row if theirs == "qkvz" else replace(row, gguf=f"blk.{i}.ssm_ba.weight", gguf_forms=(form,))


def attention_rows(i: int, mixer: AttentionConfig, width: int, hf: str) -> Iterator[TensorMapping]:
    """q_proj and attn_q hold query and gate, head by head."""
    both = {f"gate.{leaf}": f"q_proj.{leaf}" for leaf in ("weight", "bias")}
    for row in module_rows(i, mixer, width, hf, names=both):
        name = row.ours.rpartition(".mixers.attention.")[2].partition(".")[0]
        if name in ("q_norm", "k_norm"):
            yield replace(row, hf_form=PLUS_ONE)
        elif name in ("q", "gate"):
            half = Transform("runs", mixer.heads, (1, 1), (("q", "gate").index(name),))
            yield replace(row, hf_form=half, gguf=f"blk.{i}.attn_q.{row.ours.rpartition('.')[2]}", gguf_forms=(half,))
        else:
            yield row


def tiled(c: GatedDeltaConfig) -> dict[str, Transform]:
    """How the value heads of a folder change places."""
    if not c.tiled or c.key_heads in (1, c.value_heads):
        return {}
    rows = {"qkv.weight": (c.value_dim, 2 * c.keys), "conv": (c.value_dim, 2 * c.keys), "z.weight": (c.value_dim, 0)}
    rows |= dict.fromkeys(("b.weight", "a.weight", "dt_bias", "A_log"), (1, 0))
    columns = Transform("tiled_columns", c.key_heads, (c.value_dim, c.value_heads // c.key_heads))
    return {name: Transform("tiled", c.key_heads, sizes) for name, sizes in rows.items()} | {"out.weight": columns}


def read_gguf(metadata: Mapping[str, Any], tensors: Mapping[str, Any]) -> tuple[ModelConfig, Iterable[TensorMapping]]:
    m = Metadata(metadata, metadata["general.architecture"])
    depth, head_dim = m.layers(), m.size("attention.key_length")
    depth -= m.sizes("nextn_predict_layers", 1)[0] if f"{m.arch}.nextn_predict_layers" in metadata else 0
    attention = AttentionConfig(
        heads=m.size("attention.head_count"),
        kv_heads=max(m.sizes("attention.head_count_kv", m.layers())),
        head_dim=head_dim,
        rope=read_gguf_rope(m, tensors, head_dim, ignored=("dimension_sections",)),
        qk_norm=True,
        output_gate=True,
    )
    value_heads, inner = m.size("ssm.time_step_rank"), m.size("ssm.inner_size")
    delta = GatedDeltaConfig(
        key_heads=m.size("ssm.group_count"),
        value_heads=value_heads,
        key_dim=m.size("ssm.state_size"),
        value_dim=max(inner // value_heads, 1),
        conv=m.size("ssm.conv_kernel"),
        tiled=m.arch != "qwen3next",
    )
    feed_forward: GatedMLPConfig | MoEConfig
    if m.arch == "qwen35":
        feed_forward = GatedMLPConfig(width=m.size("feed_forward_length"))
    else:
        feed_forward = MoEConfig(
            width=m.size("expert_feed_forward_length"),
            experts=m.size("expert_count"),
            active=m.size("expert_used_count"),
            shared_width=tensor_shape(tensors, "blk.0.ffn_gate_shexp.weight")[0],
            shared_gate=True,
            scale=m.number("expert_weights_scale", 1.0) or 1.0,
        )
    config = ModelConfig(
        vocab_size=tensor_shape(tensors, "token_embd.weight")[0],
        width=m.size("embedding_length"),
        layers=tuple(
            LayerConfig(
                mixers=(attention if f"blk.{i}.attn_q.weight" in tensors else delta,), feed_forward=feed_forward
            )
            for i in range(depth)
        ),
        norm_eps=m.number("attention.layer_norm_rms_epsilon"),
        tied="output.weight" not in tensors,
        max_length=m.size("context_length"),
    )
    return config, rows(config)


def _parts(config: ModelConfig) -> tuple[AttentionConfig | None, GatedDeltaConfig | None]:
    return config.first(AttentionConfig), config.first(GatedDeltaConfig)


def write_gguf(config: ModelConfig) -> dict[str, Any]:
    attention, delta = _parts(config)
    assert attention is not None and attention.rope is not None and delta is not None
    marks, feed_forward = (
        [isinstance(layer.mixers[0], AttentionConfig) for layer in config.layers],
        config.layers[0].feed_forward,
    )
    interval = marks.index(True) + 1  # for readers that do not know recurrent_layers
    out = gguf_sizes(config, attention, None) | {
        "attention.recurrent_layers": [not full for full in marks],
        "full_attention_interval": interval if marks == [(i + 1) % interval == 0 for i in range(len(marks))] else 4,
        "ssm.conv_kernel": delta.conv,
        "ssm.state_size": delta.key_dim,
        "ssm.group_count": delta.key_heads,
        "ssm.time_step_rank": delta.value_heads,
        "ssm.inner_size": delta.values,
    } | write_gguf_rope(attention.rope, attention.head_dim)  # fmt: skip
    if delta.tiled:
        pairs = int(attention.head_dim * attention.rope.fraction) // 2
        # pairs for each axis of an image's positions; text has the same position on all
        out["rope.dimension_sections"] = [(pairs + 2) // 3, (pairs + 1) // 3, pairs // 3, 0]
    if isinstance(feed_forward, MoEConfig):
        return out | {
            "feed_forward_length": feed_forward.active * feed_forward.width,
            "expert_count": feed_forward.experts,
            "expert_used_count": feed_forward.active,
            "expert_feed_forward_length": feed_forward.width,
            "expert_shared_feed_forward_length": feed_forward.shared_width,
        }
    assert feed_forward is not None
    return out | {"feed_forward_length": feed_forward.width}


def limits(config: ModelConfig) -> Iterator[str]:
    attention, delta = _parts(config)
    if attention is None or delta is None:
        yield "llama.cpp needs layers of both kinds in this architecture"
        return
    if delta.key_dim != delta.value_dim:
        yield f"llama.cpp needs keys as wide as values, not {delta.key_dim} and {delta.value_dim}"
    if attention.qkv_bias or attention.out_bias:
        yield "llama.cpp has no biases in this architecture"
    feed_forward = config.layers[0].feed_forward
    assert isinstance(feed_forward, GatedMLPConfig | MoEConfig)
    if feed_forward.activation != "silu":
        yield f"llama.cpp computes silu here, not {feed_forward.activation}"
    if len({layer.feed_forward for layer in config.layers}) > 1:
        yield "llama.cpp has experts in all layers of this architecture"
    if isinstance(feed_forward, GatedMLPConfig) != (delta.tiled and not isinstance(feed_forward, MoEConfig)):
        yield "llama.cpp has experts in all layers of qwen3next"
    if isinstance(feed_forward, MoEConfig) and not feed_forward.renormalize:
        yield "llama.cpp renormalises the weights of chosen experts (norm_topk_prob)"
    yield from gguf_rope_limits(attention.rope, partial=True)


def write(config: ModelConfig) -> dict[str, Any]:
    """A config.json for a network that came from a GGUF file."""
    attention, delta = _parts(config)
    if attention is None or delta is None or attention.rope is None:
        raise UnsupportedError("a qwen3_5 config.json needs layers of both kinds")
    feed_forward = config.layers[0].feed_forward
    assert isinstance(feed_forward, GatedMLPConfig | MoEConfig)
    kinds = [
        "full_attention" if isinstance(x.mixers[0], AttentionConfig) else "linear_attention" for x in config.layers
    ]
    moe = isinstance(feed_forward, MoEConfig)
    name, kind = ("Qwen3_5Moe" if moe else "Qwen3_5", "qwen3_5_moe_text" if moe else "qwen3_5_text")
    out = {
        "architectures": [f"{name if delta.tiled else 'Qwen3Next'}ForCausalLM"],
        "model_type": kind if delta.tiled else "qwen3_next",
        "vocab_size": config.vocab_size,
        "hidden_size": config.width,
        "num_hidden_layers": len(config.layers),
        "num_attention_heads": attention.heads,
        "num_key_value_heads": attention.kv_heads,
        "head_dim": attention.head_dim,
        "attention_bias": attention.qkv_bias,
        "hidden_act": feed_forward.activation,
        "layer_types": kinds,
        "linear_num_key_heads": delta.key_heads,
        "linear_num_value_heads": delta.value_heads,
        "linear_key_head_dim": delta.key_dim,
        "linear_value_head_dim": delta.value_dim,
        "linear_conv_kernel_dim": delta.conv,
        "max_position_embeddings": config.max_length,
        "rms_norm_eps": config.norm_eps,
        "tie_word_embeddings": config.tied,
    } | write_rope(attention.rope) | {"partial_rotary_factor": attention.rope.fraction}  # fmt: skip
    if isinstance(feed_forward, GatedMLPConfig):
        return out | {"intermediate_size": feed_forward.width}
    if feed_forward.scale != 1.0:
        raise UnsupportedError(f"a factor of {feed_forward.scale} on routed experts has no place in such a config.json")
    return out | {
        "num_experts": feed_forward.experts,
        "num_experts_per_tok": feed_forward.active,
        "moe_intermediate_size": feed_forward.width,
        "shared_expert_intermediate_size": feed_forward.shared_width,
    }


def _family(name: str, model_types: tuple[str, ...], gguf: str) -> Family:
    return Family(
        name, model_types, read, gguf=gguf, read_gguf=read_gguf, write_gguf=write_gguf, write=write, limits=limits,
        left_out=("model.visual.", "mtp."),
    )  # fmt: skip


QWEN3_5 = _family("qwen3_5", ("qwen3_5", "qwen3_5_text"), "qwen35")
QWEN3_5_MOE = _family("qwen3_5_moe", ("qwen3_5_moe", "qwen3_5_moe_text"), "qwen35moe")
QWEN3_NEXT = _family("qwen3_next", ("qwen3_next",), "qwen3next")
