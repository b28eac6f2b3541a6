"""Granite: Llama with four scales (granite), with experts (granitemoe), with Mamba-2 (granitemoehybrid, Granite 4-H).

    x = embedding_multiplier · E;  x = x + residual_multiplier · f(norm x), f a mixer or a feed-forward
    logits = head(norm x) / logits_scaling;  attention scores · attention_multiplier

    granite           rotated attention, gated MLP            granitemoe, granitemoeshared   experts, and a shared one
    granitemoehybrid  Mamba-2 or attention, rotated where `position_embedding_type` is "rope"; experts and a shared one,
                      or the shared one alone where num_local_experts is 0

transformers `modeling_granitemoehybrid.py`; llama.cpp `granite`, `granitemoe` and `granitehybrid`, with the scales as
metadata.  Its converter (0c1e570) finds no attention layers in folders saved by transformers 5, whose `layer_types` say
"full_attention".
"""

from __future__ import annotations

from collections.abc import Iterable, Iterator, Mapping
from dataclasses import replace
from typing import Any

from tiercel.errors import UnsupportedError
from tiercel.families.falcon_h1 import mamba2_limits, read_gguf_mamba2, read_mamba2, write_gguf_mamba2
from tiercel.families.family import (
    Family,
    Metadata,
    TensorMapping,
    gguf_sizes,
    joined,
    module_rows,
    norm_rows,
    paired,
    tensor_shape,
    top_rows,
)
from tiercel.families.fields import Fields
from tiercel.families.llama import ACTIVATIONS
from tiercel.families.rope import fixed_length, gguf_rope_limits, read_gguf_rope, read_rope, write_gguf_rope, write_rope
from tiercel.feed_forward.gated_mlp.config import GatedMLPConfig
from tiercel.feed_forward.moe.config import MoEConfig
from tiercel.mixers.attention.config import AttentionConfig
from tiercel.mixers.mamba2.config import Mamba2Config
from tiercel.model.config import LayerConfig, ModelConfig

ATTENDS = {"full_attention": True, "attention": True, "linear_attention": False, "mamba": False}
SHARED_GATE_UP, SHARED_DOWN = "shared_mlp.input_linear.weight", "shared_mlp.output_linear.weight"
EXPERTS = {
    "router.weight": "block_sparse_moe.router.layer.weight",
    "gate": "block_sparse_moe.input_linear.weight",
    "up": "block_sparse_moe.input_linear.weight",
    "down": "block_sparse_moe.output_linear.weight",
    "shared.gate.weight": SHARED_GATE_UP,
    "shared.up.weight": SHARED_GATE_UP,
    "shared.down.weight": SHARED_DOWN,
}
FUSED = {  # transformers 5 in memory
    "router.weight": "block_sparse_moe.router.weight",
    "gate": "block_sparse_moe.experts.gate_up_proj",
    "up": "block_sparse_moe.experts.gate_up_proj",
    "down": "block_sparse_moe.experts.down_proj",
}


def read(hf_config: Mapping[str, Any]) -> tuple[ModelConfig, Iterable[TensorMapping]]:
    f = Fields(dict(hf_config))
    hybrid, dense = f.data.get("model_type") == "granitemoehybrid", f.data.get("model_type") == "granite"
    width, heads = f.size("hidden_size", 4096), f.size("num_attention_heads", 32)
    depth, context = f.layers(32), f.size("max_position_embeddings", 2048)
    rotated = not hybrid or f.data.get("position_embedding_type") == "rope"
    rope = read_rope(f, theta=1e4, max_length=context) if rotated else None
    bias = f.flag("attention_bias", False)
    attention = AttentionConfig(
        heads=heads,
        kv_heads=f.size("num_key_value_heads", heads),
        head_dim=f.size("head_dim", max(width // heads, 1)),
        rope=rope,
        qkv_bias=bias,
        out_bias=bias,
        scale=f.multiplier("attention_multiplier"),
    )
    feed_forward = _feed_forward(f, hybrid, dense)
    attends = _attends(f, depth) if hybrid else [True] * depth
    mixers: dict[bool, AttentionConfig | Mamba2Config] = {True: attention}
    if hybrid:
        f.only("hidden_act", "silu", "swish")
        f.data |= {"mamba_d_ssm": None, "mamba_rms_norm": True, "mamba_norm_before_gate": False}
        proj_bias = f.flag("mamba_proj_bias", False)
        mixers[False] = replace(read_mamba2(f, width), in_bias=proj_bias, out_bias=proj_bias)
    config = ModelConfig(
        vocab_size=f.size("vocab_size", 32000),
        width=width,
        layers=tuple(LayerConfig(mixers=(mixers[a],), feed_forward=feed_forward) for a in attends),
        norm_eps=f.number("rms_norm_eps", 1e-6),
        tied=f.flag("tie_word_embeddings", False),
        logit_scale=1.0 / f.multiplier("logits_scaling"),
        embed_scale=f.multiplier("embedding_multiplier"),
        residual_scale=f.multiplier("residual_multiplier"),
        max_length=fixed_length(rope, context),
    )
    f.only("normalization_function", "rmsnorm")
    f.ignore("init_method", "output_router_logits", "router_aux_loss_coef", "layer_types", "layers_block_type")
    f.ignore("position_embedding_type", "rope_theta", "rope_scaling", "rope_parameters", "intermediate_size")
    f.done()
    return config, rows(config, plain_mlp=dense)


def _feed_forward(f: Fields, hybrid: bool, dense: bool) -> GatedMLPConfig | MoEConfig:
    activation = f.choice("hidden_act", "silu", ACTIVATIONS)
    if dense:
        bias = f.flag("mlp_bias", False)
        return GatedMLPConfig(width=f.size("intermediate_size", 11008), activation=activation, bias=bias)
    experts, active = f.count("num_local_experts", 8), f.count("num_experts_per_tok", 2)
    shared = f.count("shared_intermediate_size", 1024 if hybrid else 0)
    if hybrid and experts == 0:
        return GatedMLPConfig(width=shared, activation=activation)
    return MoEConfig(
        width=f.size("intermediate_size", 11008),
        experts=experts,
        active=active,
        activation=activation,
        shared_width=shared,
    )


def _attends(f: Fields, depth: int) -> list[bool]:
    """Whether each layer attends: all are Mamba-2 where the file is silent."""
    if "layer_types" not in f.data:
        f.data["layer_types"] = f.data.get("layers_block_type")
    types = f.layer_types(depth, ATTENDS)
    return [False] * depth if types is None else [ATTENDS[kind] for kind in types]


def rows(config: ModelConfig, *, plain_mlp: bool) -> Iterator[TensorMapping]:
    """plain_mlp: gate and up are two tensors, as in model_type granite."""
    yield from top_rows(config, embed="model.embed_tokens.weight", norm="model.norm.weight")
    for i, layer in enumerate(config.layers):
        hf, mixer, ffn = f"model.layers.{i}", layer.mixers[0], layer.feed_forward
        yield from norm_rows(i, f"{hf}.input_layernorm.weight", f"{hf}.post_attention_layernorm.weight")
        if isinstance(mixer, AttentionConfig):
            forms = paired(mixer.heads, mixer.kv_heads)
            yield from module_rows(i, mixer, config.width, f"{hf}.self_attn", gguf_forms=forms)
        else:
            yield from module_rows(i, mixer, config.width, f"{hf}.mamba")
        if isinstance(ffn, MoEConfig):
            fused = {name: (f"{hf}.{EXPERTS[name]}", part, 2) for part, name in enumerate(("gate", "up"))}
            aliases: Any = {name: (f"{hf}.{other}",) for name, other in FUSED.items()}
            yield from module_rows(
                i, ffn, config.width, hf, names=EXPERTS, fused=fused, aliases=aliases,
                hf_forms=joined({"shared.gate": 1, "shared.up": 1}),
            )  # fmt: skip
        elif isinstance(ffn, GatedMLPConfig) and not plain_mlp:
            names = {"gate.weight": SHARED_GATE_UP, "up.weight": SHARED_GATE_UP, "down.weight": SHARED_DOWN}
            yield from module_rows(i, ffn, config.width, hf, names=names, hf_forms=joined({"gate": 1, "up": 1}))
        elif ffn is not None:
            yield from module_rows(i, ffn, config.width, f"{hf}.mlp")


# ── GGUF ─────────────────────────────────────────────────────────────────────────────────────────────────


def read_gguf(metadata: Mapping[str, Any], tensors: Mapping[str, Any]) -> tuple[ModelConfig, Iterable[TensorMapping]]:
    m = Metadata(metadata, metadata["general.architecture"])
    width, heads, depth = m.size("embedding_length"), m.size("attention.head_count"), m.layers()
    head_dim = m.size("attention.key_length", max(width // heads, 1))
    rope = read_gguf_rope(m, tensors, head_dim) if metadata.get(f"{m.arch}.rope.scaling.finetuned", True) else None
    kv_heads = m.sizes("attention.head_count_kv", depth)
    recurrent = next((i for i, n in enumerate(kv_heads) if n == 0), None)
    mamba2 = None if recurrent is None else read_gguf_mamba2(m, tensors, recurrent)
    feed_forward: GatedMLPConfig | MoEConfig = GatedMLPConfig(
        width=m.size("feed_forward_length"), bias="blk.0.ffn_gate.bias" in tensors
    )
    if metadata.get(f"{m.arch}.expert_count"):
        shared = f"{m.arch}.expert_shared_feed_forward_length"
        feed_forward = MoEConfig(
            width=m.size("feed_forward_length"),
            experts=m.size("expert_count"),
            active=m.size("expert_used_count"),
            scale=m.number("expert_weights_scale", 0.0) or 1.0,
            shared_width=m.size("expert_shared_feed_forward_length") if metadata.get(shared) else 0,
        )
    attention = AttentionConfig(
        heads=heads,
        kv_heads=max(kv_heads) or heads,
        head_dim=head_dim,
        rope=rope,
        qkv_bias=any(name.endswith(".attn_q.bias") for name in tensors),
        out_bias=any(name.endswith(".attn_output.bias") for name in tensors),
        scale=m.number("attention.scale", 0.0) or None,
    )
    config = ModelConfig(
        vocab_size=tensor_shape(tensors, "token_embd.weight")[0],
        width=width,
        layers=tuple(
            LayerConfig(
                mixers=(replace(attention, kv_heads=n) if n or mamba2 is None else mamba2,), feed_forward=feed_forward
            )
            for n in kv_heads
        ),
        norm_eps=m.number("attention.layer_norm_rms_epsilon"),
        tied="output.weight" not in tensors,
        logit_scale=1.0 / (m.number("logit_scale", 0.0) or 1.0),
        embed_scale=m.number("embedding_scale", 0.0) or 1.0,
        residual_scale=m.number("residual_scale", 0.0) or 1.0,
        max_length=fixed_length(rope, m.size("context_length")),
    )
    return config, rows(config, plain_mlp=m.arch == "granite")


def _parts(config: ModelConfig) -> tuple[AttentionConfig | None, Mamba2Config | None, GatedMLPConfig | MoEConfig]:
    """One of each kind that the model has."""
    ffn = config.layers[0].feed_forward
    assert isinstance(ffn, GatedMLPConfig | MoEConfig)
    return config.first(AttentionConfig), config.first(Mamba2Config), ffn


def gguf_of(config: ModelConfig) -> str:
    _, mamba2, ffn = _parts(config)
    return "granitehybrid" if mamba2 is not None else "granitemoe" if isinstance(ffn, MoEConfig) else "granite"


def write_gguf(config: ModelConfig) -> dict[str, Any]:
    attention, mamba2, ffn = _parts(config)
    assert attention is not None
    out = gguf_sizes(config, attention, ffn.width, kv_by_layer=mamba2 is not None) | {
        "attention.scale": attention.scale or attention.head_dim**-0.5,
        "embedding_scale": config.embed_scale,
        "residual_scale": config.residual_scale,
        "logit_scale": 1.0 / config.logit_scale,
        "rope.scaling.finetuned": attention.rope is not None,
        "rope.dimension_count": attention.head_dim,
    }
    if isinstance(ffn, MoEConfig):
        out |= {"expert_count": ffn.experts, "expert_used_count": ffn.active}
        out |= {"expert_shared_feed_forward_length": ffn.shared_width} if ffn.shared_width else {}
    out |= write_gguf_mamba2(mamba2) if mamba2 is not None else {}
    return out | (write_gguf_rope(attention.rope, attention.head_dim) if attention.rope else {})


def limits(config: ModelConfig) -> Iterator[str]:
    attention, mamba2, ffn = _parts(config)
    if attention is None:
        yield "llama.cpp's granitehybrid needs layers with attention"
        return
    if mamba2 is not None:
        yield from mamba2_limits(mamba2)
        if mamba2.inner != 2 * config.width:
            yield f"llama.cpp needs an inner width of {2 * config.width} in granitehybrid, not {mamba2.inner}"
    if ffn.activation != "silu":
        yield f"llama.cpp computes silu here, not {ffn.activation}"
    if getattr(ffn, "bias", False) or attention.qkv_bias:
        yield "biases have no tests in llama.cpp's granite"
    yield from gguf_rope_limits(attention.rope)


def write(config: ModelConfig) -> dict[str, Any]:
    """A config.json for a network that came from a GGUF file."""
    attention, c, ffn = _parts(config)
    moe = isinstance(ffn, MoEConfig)
    if attention is None:
        raise UnsupportedError("a granite config.json needs layers with attention")
    if attention.qkv_bias != attention.out_bias:
        raise UnsupportedError("biases on q, k, v without one on o have no place in a granite config.json")
    kind = "granitemoehybrid" if c is not None else "granitemoeshared" if moe else "granite"
    names = {"granite": "Granite", "granitemoeshared": "GraniteMoeShared", "granitemoehybrid": "GraniteMoeHybrid"}
    out = {
        "architectures": [f"{names[kind]}ForCausalLM"],
        "model_type": kind,
        "vocab_size": config.vocab_size,
        "hidden_size": config.width,
        "intermediate_size": ffn.width,
        "num_hidden_layers": len(config.layers),
        "num_attention_heads": attention.heads,
        "num_key_value_heads": attention.kv_heads,
        "attention_bias": attention.out_bias,
        "hidden_act": ffn.activation,
        "max_position_embeddings": config.max_length,
        "rms_norm_eps": config.norm_eps,
        "tie_word_embeddings": config.tied,
        "embedding_multiplier": config.embed_scale,
        "residual_multiplier": config.residual_scale,
        "attention_multiplier": attention.scale or attention.head_dim**-0.5,
        "logits_scaling": 1.0 / config.logit_scale,
    }
    if attention.heads * attention.head_dim != config.width:
        out["head_dim"] = attention.head_dim
    if isinstance(ffn, MoEConfig):
        out |= {"num_local_experts": ffn.experts, "num_experts_per_tok": ffn.active}
        out["shared_intermediate_size"] = ffn.shared_width
    elif c is not None:
        out |= {"num_local_experts": 0, "num_experts_per_tok": 0, "shared_intermediate_size": ffn.width}
    else:
        out["mlp_bias"] = ffn.bias
    if c is not None:
        kinds = {AttentionConfig: "full_attention", Mamba2Config: "linear_attention"}
        out |= {
            "layer_types": [kinds[type(layer.mixers[0])] for layer in config.layers],
            "position_embedding_type": "rope" if attention.rope else None,
            "mamba_n_heads": c.heads,
            "mamba_d_head": c.head_dim,
            "mamba_n_groups": c.groups,
            "mamba_d_state": c.state,
            "mamba_d_conv": c.conv,
            "mamba_expand": c.inner // config.width,
            "mamba_conv_bias": c.conv_bias,
            "mamba_chunk_size": c.chunk,
        }
    return out | (write_rope(attention.rope) if attention.rope else {})


GRANITE = Family(
    "granite", ("granite", "granitemoe", "granitemoeshared", "granitemoehybrid"), read, gguf="granitehybrid",
    more_gguf=("granite", "granitemoe"), gguf_of=gguf_of, gguf_scales=True, read_gguf=read_gguf, write_gguf=write_gguf,
    write=write, limits=limits,
)  # fmt: skip
