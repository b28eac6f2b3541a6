"""Nemotron-H and Nemotron 3: layers of one part each, Mamba-2, attention without positions, an MLP or experts.

    x = x + part(norm x)        M mamba2    * attention    - mlp    E experts
    mlp       down(relu(up x)²)
    experts   sigmoid router with a bias for the choice, groups, a factor; relu² experts, in a narrower space where
              `moe_latent_size` is given (the router and the shared expert see the whole width)

transformers `modeling_nemotron_h.py`; llama.cpp `nemotron_h` and `nemotron_h_moe`.  Steps are not clamped: NVIDIA's own
code, vLLM and llama.cpp do not, transformers 5.24 does so in forwards of several tokens only (issue 48989).  Draft
heads (multi-token prediction) are left out.
"""

from __future__ import annotations

from collections.abc import Iterable, Iterator, Mapping
from dataclasses import replace
from typing import Any

from tiercel.errors import FormatError, UnsupportedError
from tiercel.families.falcon_h1 import mamba2_limits, read_gguf_mamba2, write_gguf_mamba2
from tiercel.families.family import (
    Family,
    Metadata,
    TensorMapping,
    kv_heads,
    module_rows,
    paired,
    tensor_shape,
    top_rows,
)
from tiercel.families.fields import Fields
from tiercel.families.llama import ACTIVATIONS
from tiercel.feed_forward.gated_mlp.config import GatedMLPConfig
from tiercel.feed_forward.moe.config import MoEConfig
from tiercel.mixers.attention.config import AttentionConfig
from tiercel.mixers.mamba2.config import Mamba2Config
from tiercel.model.config import LayerConfig, ModelConfig

LETTERS = {"M": "linear_attention", "*": "full_attention", "-": "mlp", "E": "moe"}
KINDS = {kind: kind for kind in LETTERS.values()} | {"mamba": "linear_attention", "attention": "full_attention"}
OLD = {  # names of transformers 4 and of NVIDIA's own code
    "n_groups": "mamba_n_groups", "conv_kernel": "mamba_d_conv", "expand": "mamba_expand",
    "time_step_limit": "mamba_dt_limit", "use_conv_bias": "mamba_conv_bias", "chunk_size": "mamba_chunk_size",
    "head_dim": "attention_head_dim", "n_routed_experts": "num_local_experts", "layers_block_type": "layer_types",
}  # fmt: skip
EPS = 1e-20  # transformers: added to the sum of the chosen scores


def read(hf_config: Mapping[str, Any]) -> tuple[ModelConfig, Iterable[TensorMapping]]:
    f = Fields(dict(hf_config))
    for name, old in OLD.items():
        if (value := f.data.pop(old, None)) is not None:
            f.data.setdefault(name, value)
    width, heads = f.size("hidden_size", 4096), f.size("num_attention_heads", 32)
    activation = f.choice("mlp_hidden_act", "relu2", ACTIVATIONS | {"relu2": "relu2"})
    bias, mamba_bias = f.flag("mlp_bias", False), f.flag("use_bias", False)
    f.only("mamba_hidden_act", "silu", "swish")
    f.only("sliding_window", None)
    mamba2 = Mamba2Config(
        heads=f.size("mamba_num_heads", 128),
        head_dim=f.size("mamba_head_dim", 64),
        state=f.size("ssm_state_size", 128),
        groups=f.size("n_groups", 8),
        conv=f.size("conv_kernel", 4, largest=256),
        conv_bias=f.flag("use_conv_bias", True),
        in_bias=mamba_bias,
        out_bias=mamba_bias,
        dt_limit=f.limits("time_step_limit"),
        chunk=f.size("chunk_size", 128, largest=65536),
    )
    attention = AttentionConfig(
        heads=heads,
        kv_heads=f.size("num_key_value_heads", heads if "num_key_value_heads" in f.data else 8),
        head_dim=f.size("head_dim", 128),
    )
    mlp = GatedMLPConfig(width=f.size("intermediate_size", 21504), activation=activation, bias=bias, gated=False)
    kinds = _kinds(f)
    parts: dict[str, LayerConfig] = {
        "linear_attention": LayerConfig(mixers=(mamba2,)),
        "full_attention": LayerConfig(mixers=(attention,)),
        "mlp": LayerConfig(mixers=(), feed_forward=mlp),
    }
    moe = _experts(f, activation, bias)
    if "moe" in kinds:
        parts["moe"] = LayerConfig(mixers=(), feed_forward=moe)
    config = ModelConfig(
        vocab_size=f.size("vocab_size", 131072),
        width=width,
        layers=tuple(parts[kind] for kind in kinds),
        norm_eps=f.number("layer_norm_epsilon", f.data.get("norm_eps", f.data.get("rms_norm_eps", 1e-5))),
        tied=f.flag("tie_word_embeddings", False),
        max_length=f.size("max_position_embeddings", 4096),
    )
    f.ignore(  # not read by transformers 5.24, or about training and draft heads
        "expand", "norm_eps", "rms_norm_eps", "residual_in_fp32", "mamba_ssm_cache_dtype", "mamba_proj_bias",
        "num_hidden_layers", "time_step_min", "time_step_max", "time_step_floor", "time_step_rank", "mamba_dt_min",
        "mamba_dt_max", "mamba_dt_init_floor", "n_shared_experts", "output_router_logits", "moe_shared_expert_overlap",
        "num_nextn_predict_layers", "mtp_layers_block_type", "mtp_hybrid_override_pattern", "rope_theta",
        "partial_rotary_factor", "rope_scaling", "rope_parameters", "hidden_act",
    )  # fmt: skip
    f.only("attention_bias", False)
    f.done()
    return config, rows(config)


def _kinds(f: Fields) -> list[str]:
    """What every layer is: by `layers_block_type`, by `hybrid_override_pattern`, or transformers' default."""
    pattern, types = f.data.get("hybrid_override_pattern"), f.data.get("layers_block_type")
    f.ignore("hybrid_override_pattern", "layers_block_type")
    if types is None and pattern is not None:
        if not isinstance(pattern, str) or not pattern or set(pattern) - set(LETTERS):
            raise UnsupportedError(
                f"{f.where}: hybrid_override_pattern = {pattern!r:.80} must be made of the letters {' '.join(LETTERS)}"
            )
        types = [LETTERS[letter] for letter in pattern]
    types = ["linear_attention", "moe", "full_attention", "mlp"] if types is None else types
    if not isinstance(types, list) or not types or not all(isinstance(t, str) and t in KINDS for t in types):
        raise UnsupportedError(f"{f.where}: layers_block_type must list {', '.join(KINDS)}, not {types!r:.80}")
    return [KINDS[kind] for kind in types]


def _experts(f: Fields, activation: str, bias: bool) -> MoEConfig | None:
    experts, active = f.size("n_routed_experts", 8, largest=65536), f.size("num_experts_per_tok", 2)
    if active > experts:
        raise FormatError(f"{f.where}: num_experts_per_tok = {active} of n_routed_experts = {experts}")
    return MoEConfig(
        width=f.size("moe_intermediate_size", 7688),
        experts=experts,
        active=active,
        renormalize=f.flag("norm_topk_prob", True),
        activation=activation,
        scores="sigmoid",
        correction=True,
        groups=f.size("n_group", 1),
        active_groups=f.size("topk_group", 1),
        renormalize_eps=EPS,
        scale=f.number("routed_scaling_factor", 1.0, positive=True),
        gated=False,
        latent=f.size_or_none("moe_latent_size") or 0,
        latent_bias=bias,
        shared_width=f.size("moe_shared_expert_intermediate_size", 7688),
        shared_bias=bias,
    )


def rows(config: ModelConfig) -> Iterator[TensorMapping]:
    """Names of the hub's files; NVIDIA's latest begin with `model.` instead."""
    for row in _hub_rows(config):
        others = tuple(other for name in (row.hf, *row.aliases) if (other := _renamed(name)) != name)
        yield replace(row, aliases=(*row.aliases, *others))


def _renamed(name: str | tuple[str, ...]) -> str | tuple[str, ...]:
    if isinstance(name, tuple):
        return tuple(one.replace("backbone.", "model.", 1) for one in name)
    return name.replace("backbone.", "model.", 1)


def _hub_rows(config: ModelConfig) -> Iterator[TensorMapping]:
    yield from top_rows(config, embed="backbone.embeddings.weight", norm="backbone.norm_f.weight")
    for i, layer in enumerate(config.layers):
        hf, part = f"backbone.layers.{i}", layer.parts[0]
        ours = f"layers.{i}.{'mixer' if layer.mixers else 'ffn'}_norm.weight"
        yield TensorMapping(ours, f"{hf}.norm.weight", f"blk.{i}.attn_norm.weight", keep_fp32=True)
        yield from module_rows(
            i,
            part,
            config.width,
            f"{hf}.mixer",
            names={
                p.name: p.hf.replace("shared_expert.", "shared_experts.")
                for p in part.params(config.width)
                if p.name.startswith("shared.")
            },
            gguf_forms=paired(part.heads, part.kv_heads) if isinstance(part, AttentionConfig) else {},
            fused={name: (f"model.layers.{i}.mixer.experts.{name}_proj", 0, 1) for name in ("up", "down")},
            aliases={"correction": (f"{hf}.mixer.gate.e_score_correction.bias",)},
        )


# ── GGUF ─────────────────────────────────────────────────────────────────────────────────────────────────


def read_gguf(metadata: Mapping[str, Any], tensors: Mapping[str, Any]) -> tuple[ModelConfig, Iterable[TensorMapping]]:
    m = Metadata(metadata, metadata["general.architecture"])
    width, heads, depth = m.size("embedding_length"), m.size("attention.head_count"), m.layers()
    if m.metadata.get(f"{m.arch}.nextn_predict_layers"):
        raise UnsupportedError(
            "GGUF metadata: draft heads inside a nemotron_h file are not read: convert with --no-mtp"
        )
    kv_heads, ffn = m.sizes("attention.head_count_kv", depth), m.sizes("feed_forward_length", depth)
    first = next((i for i in range(depth) if not kv_heads[i] and not ffn[i]), 0)
    mamba2 = read_gguf_mamba2(m, tensors, first) if f"blk.{first}.ssm_in.weight" in tensors else None
    layers = []
    for i in range(depth):
        if ffn[i]:
            layers.append(LayerConfig(mixers=(), feed_forward=_gguf_feed_forward(m, tensors, i, ffn[i])))
        elif kv_heads[i]:
            head_dim = m.size("attention.key_length", max(width // heads, 1))
            attention = AttentionConfig(heads=heads, kv_heads=kv_heads[i], head_dim=head_dim)
            layers.append(LayerConfig(mixers=(attention,)))
        elif mamba2 is not None:
            layers.append(LayerConfig(mixers=(mamba2,)))
        else:
            raise FormatError(f"GGUF metadata: layer {i} of {m.arch} has neither heads nor a feed-forward nor ssm_in")
    eps = "attention.layer_norm_rms_epsilon"
    config = ModelConfig(
        vocab_size=tensor_shape(tensors, "token_embd.weight")[0],
        width=width,
        layers=tuple(layers),
        norm_eps=m.number(eps if f"{m.arch}.{eps}" in metadata else "attention.layer_norm_epsilon"),
        tied="output.weight" not in tensors,
        max_length=m.size("context_length"),
    )
    return config, rows(config)


def _gguf_feed_forward(m: Metadata, tensors: Mapping[str, Any], i: int, width: int) -> GatedMLPConfig | MoEConfig:
    if f"blk.{i}.ffn_gate_inp.weight" not in tensors:
        bias = f"blk.{i}.ffn_up.bias" in tensors
        return GatedMLPConfig(width=width, activation="relu2", gated=False, bias=bias)
    return MoEConfig(
        width=m.sizes("expert_feed_forward_length", m.layers())[i],
        experts=m.size("expert_count"),
        active=m.sizes("expert_used_count", m.layers())[i],
        renormalize=bool(m.metadata.get(f"{m.arch}.expert_weights_norm", False)),
        activation="relu2",
        scores="sigmoid",
        correction=True,
        groups=m.size("expert_group_count", 1),
        active_groups=m.size("expert_group_used_count", 1),
        renormalize_eps=EPS,
        scale=m.number("expert_weights_scale", 0.0) or 1.0,
        gated=False,
        latent=m.size("moe_latent_size") if f"blk.{i}.ffn_latent_down.weight" in tensors else 0,
        shared_width=m.size("expert_shared_feed_forward_length"),
    )


def gguf_of(config: ModelConfig) -> str:
    return "nemotron_h" if config.first(MoEConfig) is None else "nemotron_h_moe"


def write_gguf(config: ModelConfig) -> dict[str, Any]:
    attention, mamba2, moe = config.first(AttentionConfig), config.first(Mamba2Config), config.first(MoEConfig)
    assert attention is not None and mamba2 is not None
    out = {
        "block_count": len(config.layers),
        "context_length": config.max_length,
        "embedding_length": config.width,
        "feed_forward_length": [layer.feed_forward.width if layer.feed_forward else 0 for layer in config.layers],
        "attention.head_count": attention.heads,
        "attention.head_count_kv": kv_heads(config),
        "attention.key_length": attention.head_dim,
        "attention.value_length": attention.head_dim,
        "attention.layer_norm_epsilon": config.norm_eps,
        "attention.layer_norm_rms_epsilon": config.norm_eps,
    } | write_gguf_mamba2(mamba2)
    if moe is not None:
        out |= {
            "expert_count": moe.experts,
            "expert_used_count": moe.active,
            "expert_feed_forward_length": moe.width,
            "expert_shared_feed_forward_length": moe.shared_width,
            "expert_shared_count": 1,
            "expert_weights_norm": moe.renormalize,
            "expert_weights_scale": moe.scale,
            "expert_group_count": moe.groups,
            "expert_group_used_count": moe.active_groups,
        }
        out |= {"moe_latent_size": moe.latent} if moe.latent else {}
    return out


def limits(config: ModelConfig) -> Iterator[str]:
    mamba2, moe = config.first(Mamba2Config), config.first(MoEConfig)
    kinds = {type(part) for layer in config.layers for part in layer.parts}
    if mamba2 is None or config.first(AttentionConfig) is None or len(kinds) < 3:
        yield "llama.cpp's nemotron_h needs Mamba-2, attention and feed-forward layers"
        return
    yield from mamba2_limits(mamba2)
    if len(kinds) == 4:
        yield "llama.cpp has experts in all feed-forward layers of nemotron_h_moe or in none"
    if any(layer.feed_forward is not None and layer.feed_forward.activation != "relu2" for layer in config.layers):  # type: ignore[attr-defined]
        yield "llama.cpp computes relu² here"
    if moe is not None and (moe.latent_bias or moe.shared_bias):
        yield "llama.cpp has no biases on shared and latent experts"


def write(config: ModelConfig) -> dict[str, Any]:
    """A config.json for a network that came from a GGUF file."""
    attention, c, moe = config.first(AttentionConfig), config.first(Mamba2Config), config.first(MoEConfig)
    mlp = config.first(GatedMLPConfig)
    if attention is None or c is None:
        raise UnsupportedError("a nemotron_h config.json needs layers with attention and with Mamba-2")
    names = {
        AttentionConfig: "full_attention",
        Mamba2Config: "linear_attention",
        GatedMLPConfig: "mlp",
        MoEConfig: "moe",
    }
    out = {
        "architectures": ["NemotronHForCausalLM"],
        "model_type": "nemotron_h",
        "vocab_size": config.vocab_size,
        "hidden_size": config.width,
        "layers_block_type": [names[type(layer.parts[0])] for layer in config.layers],
        "num_attention_heads": attention.heads,
        "num_key_value_heads": attention.kv_heads,
        "head_dim": attention.head_dim,
        "mlp_hidden_act": "relu2",
        "mlp_bias": bool(mlp and mlp.bias),
        "mamba_num_heads": c.heads,
        "mamba_head_dim": c.head_dim,
        "ssm_state_size": c.state,
        "n_groups": c.groups,
        "conv_kernel": c.conv,
        "use_conv_bias": c.conv_bias,
        "time_step_min": 1e-9,  # transformers 5.24 clamps there, and takes its logarithm
        "chunk_size": c.chunk,
        "layer_norm_epsilon": config.norm_eps,
        "tie_word_embeddings": config.tied,
        "max_position_embeddings": config.max_length,
    }
    out |= {"intermediate_size": mlp.width} if mlp else {}
    if moe is not None:
        out |= {
            "n_routed_experts": moe.experts,
            "num_experts_per_tok": moe.active,
            "moe_intermediate_size": moe.width,
            "moe_shared_expert_intermediate_size": moe.shared_width,
            "moe_latent_size": moe.latent or None,
            "norm_topk_prob": moe.renormalize,
            "routed_scaling_factor": moe.scale,
            "n_group": moe.groups,
            "topk_group": moe.active_groups,
        }
    return out


NEMOTRON_H = Family(
    "nemotron_h", ("nemotron_h",), read, gguf="nemotron_h", more_gguf=("nemotron_h_moe",), gguf_of=gguf_of,
    read_gguf=read_gguf, write_gguf=write_gguf, write=write, limits=limits, left_out=("mtp.",),
)  # fmt: skip
