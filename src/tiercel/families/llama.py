"""Llama and its relatives: attention and a gated MLP in every layer.

    llama    the plain case                      mistral  a sliding window in every layer
    qwen2    biases on q, k, v; a window in late layers        mixtral  experts for the MLP, two of eight per token

transformers `modeling_llama.py`, `modeling_mistral.py`, `modeling_qwen2.py`, `modeling_mixtral.py`; in GGUF
llama, mistral and mixtral are one architecture, `llama`, whose q and k rows are interleaved.
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
    paired,
    tensor_shape,
    top_rows,
)
from tiercel.families.fields import Fields
from tiercel.families.rope import fixed_length, gguf_rope_limits, read_gguf_rope, read_rope, write_gguf_rope, write_rope
from tiercel.feed_forward.gated_mlp.config import GatedMLPConfig
from tiercel.feed_forward.moe.config import MoEConfig
from tiercel.mixers.attention.config import AttentionConfig
from tiercel.model.config import LayerConfig, ModelConfig

MIXTRAL_EXPERT = {"gate": "w1", "up": "w3", "down": "w2"}
ACTIVATIONS = {"silu": "silu", "swish": "silu", "gelu": "gelu", "gelu_pytorch_tanh": "gelu_tanh", "relu": "relu"}


def read(hf_config: Mapping[str, Any]) -> tuple[ModelConfig, Iterable[TensorMapping]]:
    f = Fields(dict(hf_config))
    kind = f.data.get("model_type")
    width, heads, depth = (
        f.size("hidden_size"),
        f.size("num_attention_heads"),
        f.layers(),
    )
    context = f.size("max_position_embeddings", {"llama": 2048, "qwen2": 32768}.get(str(kind), 131072))
    rope = read_rope(f, theta=1e6 if kind == "mixtral" else 1e4, max_length=context)
    bias = f.flag("attention_bias", False) if kind == "llama" else False
    attention = AttentionConfig(
        heads=heads,
        kv_heads=f.size("num_key_value_heads", {"mistral": 8, "mixtral": 8, "qwen2": 32}.get(str(kind), heads)),
        head_dim=f.size("head_dim", max(width // heads, 1)),
        rope=rope,
        qkv_bias=bias or kind == "qwen2",
        out_bias=bias,
    )
    activation = f.choice("hidden_act", "silu", ACTIVATIONS)
    ffn_width = f.size("intermediate_size")
    feed_forward: GatedMLPConfig | MoEConfig = GatedMLPConfig(
        width=ffn_width, activation=activation, bias=f.flag("mlp_bias", False) if kind == "llama" else False
    )
    if kind == "mixtral":
        experts = f.size("num_local_experts", f.data.get("num_experts", 8), largest=65536)
        feed_forward = MoEConfig(
            width=ffn_width, experts=experts, active=f.size("num_experts_per_tok", 2), activation=activation
        )
        f.ignore("num_experts", "output_router_logits", "router_aux_loss_coef", "router_jitter_noise")
    of_layers = windows(f, kind, depth)
    layer = {w: LayerConfig(mixers=(_windowed(attention, w),), feed_forward=feed_forward) for w in set(of_layers)}
    config = ModelConfig(
        vocab_size=f.size("vocab_size"),
        width=width,
        layers=tuple(layer[w] for w in of_layers),
        norm_eps=f.number("rms_norm_eps", 1e-5 if kind == "mixtral" else 1e-6),
        tied=f.flag("tie_word_embeddings", False),
        max_length=fixed_length(rope, context),
    )
    f.only("pretraining_tp", 1, *range(2, 65))  # only splits a product, never its result
    f.done()
    return config, rows(config)


def windows(f: Fields, kind: Any, depth: int) -> list[int | None]:
    """The sliding window of every layer."""
    if kind == "llama":
        return [None] * depth
    window = f.size_or_none("sliding_window", 4096 if kind in ("mistral", "qwen3") else None)
    if kind not in ("qwen2", "qwen3"):
        return [window] * depth
    first = f.count("max_window_layers", 28)
    if not f.flag("use_sliding_window", False):
        window = None
    types = f.layer_types(depth, ("full_attention", "sliding_attention"))
    if types is None:
        return [window if i >= first else None for i in range(depth)]
    return [window if kind == "sliding_attention" else None for kind in types]


def _windowed(attention: AttentionConfig, window: int | None) -> AttentionConfig:
    return replace(attention, window=window) if window else attention


def rows(config: ModelConfig, *, pairs: bool = True) -> Iterator[TensorMapping]:
    """pairs: GGUF keeps q and k interleaved (architecture `llama`), not so for qwen2."""
    yield from top_rows(config, embed="model.embed_tokens.weight", norm="model.norm.weight")
    for i, layer in enumerate(config.layers):
        hf = f"model.layers.{i}"
        attention, feed_forward = layer.mixers[0], layer.feed_forward
        assert isinstance(attention, AttentionConfig)
        interleaved = pairs and not (attention.qkv_bias and not attention.out_bias)
        forms = paired(attention.heads, attention.kv_heads) if interleaved else {}
        yield from norm_rows(i, f"{hf}.input_layernorm.weight", f"{hf}.post_attention_layernorm.weight")
        yield from module_rows(i, attention, config.width, f"{hf}.self_attn", gguf_forms=forms)
        assert feed_forward is not None
        if isinstance(feed_forward, MoEConfig):
            yield from module_rows(
                i,
                feed_forward,
                config.width,
                f"{hf}.block_sparse_moe",
                names={name: f"experts.{{e}}.{theirs}.weight" for name, theirs in MIXTRAL_EXPERT.items()},
                fused=fused_experts(f"{hf}.mlp.experts"),
                aliases={"router.weight": (f"{hf}.mlp.gate.weight",)},
            )
        else:
            yield from module_rows(i, feed_forward, config.width, f"{hf}.mlp")


def read_gguf(metadata: Mapping[str, Any], tensors: Mapping[str, Any]) -> tuple[ModelConfig, Iterable[TensorMapping]]:
    arch = metadata["general.architecture"]
    m = Metadata(metadata, arch)
    width, heads, depth = m.size("embedding_length"), m.size("attention.head_count"), m.layers()
    head_dim = m.size("attention.key_length", max(width // heads, 1))
    rope = read_gguf_rope(m, tensors, head_dim)
    attention = AttentionConfig(
        heads=heads,
        kv_heads=m.size("attention.head_count_kv", heads),
        head_dim=head_dim,
        rope=rope,
        qkv_bias="blk.0.attn_q.bias" in tensors,
        out_bias="blk.0.attn_output.bias" in tensors,
    )
    experts = metadata.get(f"{arch}.expert_count", 0)
    feed_forward: GatedMLPConfig | MoEConfig
    if experts:
        feed_forward = MoEConfig(
            width=m.size("feed_forward_length"), experts=m.size("expert_count"), active=m.size("expert_used_count")
        )
    else:
        bias = "blk.0.ffn_gate.bias" in tensors
        feed_forward = GatedMLPConfig(width=m.size("feed_forward_length"), bias=bias)
    context = m.size("context_length")
    config = ModelConfig(
        vocab_size=tensor_shape(tensors, "token_embd.weight")[0],
        width=width,
        layers=(LayerConfig(mixers=(attention,), feed_forward=feed_forward),) * depth,
        norm_eps=m.number("attention.layer_norm_rms_epsilon"),
        tied="output.weight" not in tensors,
        max_length=fixed_length(rope, context),
    )
    return config, rows(config, pairs=arch == "llama")


def write_gguf(config: ModelConfig) -> dict[str, Any]:
    attention, feed_forward = config.layers[0].mixers[0], config.layers[0].feed_forward
    assert isinstance(attention, AttentionConfig) and attention.rope is not None and feed_forward is not None
    out = gguf_sizes(config, attention, feed_forward.width)
    if isinstance(feed_forward, MoEConfig):
        out |= {"expert_count": feed_forward.experts, "expert_used_count": feed_forward.active}
    return out | write_gguf_rope(attention.rope, attention.head_dim)


def limits(config: ModelConfig) -> Iterator[str]:
    attention, feed_forward = config.layers[0].mixers[0], config.layers[0].feed_forward
    assert isinstance(attention, AttentionConfig) and isinstance(feed_forward, GatedMLPConfig | MoEConfig)
    for layer in config.layers:
        mixer = layer.mixers[0]
        assert isinstance(mixer, AttentionConfig)
        if mixer.window is not None and mixer.window < config.max_length:
            yield f"llama.cpp has no sliding window of {mixer.window} in this architecture"
    if feed_forward.activation != "silu":
        yield f"llama.cpp computes silu here, not {feed_forward.activation}"
    yield from gguf_rope_limits(attention.rope)


def qwen2_limits(config: ModelConfig) -> Iterator[str]:
    attention = config.layers[0].mixers[0]
    assert isinstance(attention, AttentionConfig)
    yield from limits(config)
    if attention.heads * attention.head_dim != config.width:
        yield "llama.cpp needs heads × head_dim = hidden size in qwen2"


def write(config: ModelConfig, kind: str = "") -> dict[str, Any]:
    """A config.json for a network that came from a GGUF file."""
    attention, feed_forward = config.layers[0].mixers[0], config.layers[0].feed_forward
    assert isinstance(attention, AttentionConfig) and attention.rope is not None
    assert isinstance(feed_forward, GatedMLPConfig | MoEConfig)
    moe = isinstance(feed_forward, MoEConfig)
    kind = kind or ("mixtral" if moe else "llama")
    names = {"llama": "LlamaForCausalLM", "mixtral": "MixtralForCausalLM", "qwen2": "Qwen2ForCausalLM"}
    out: dict[str, Any] = {
        "architectures": [names[kind]],
        "model_type": kind,
        "vocab_size": config.vocab_size,
        "hidden_size": config.width,
        "intermediate_size": feed_forward.width,
        "num_hidden_layers": len(config.layers),
        "num_attention_heads": attention.heads,
        "num_key_value_heads": attention.kv_heads,
        "head_dim": attention.head_dim,
        "hidden_act": feed_forward.activation,
        "max_position_embeddings": config.max_length,
        "rms_norm_eps": config.norm_eps,
        "tie_word_embeddings": config.tied,
    } | write_rope(attention.rope)
    if isinstance(feed_forward, MoEConfig):
        out |= {
            "num_local_experts": feed_forward.experts,
            "num_experts_per_tok": feed_forward.active,
            "sliding_window": None,
        }
    elif kind == "llama":
        out |= {"mlp_bias": feed_forward.bias, "attention_bias": attention.out_bias}
        if attention.qkv_bias != attention.out_bias:
            raise UnsupportedError("biases on q, k, v without one on o have no place in a llama config.json")
    return out


def write_qwen2(config: ModelConfig) -> dict[str, Any]:
    return write(config, "qwen2")


LLAMA = Family(
    "llama", ("llama", "mistral", "mixtral"), read, gguf="llama", read_gguf=read_gguf, write_gguf=write_gguf,
    write=write, limits=limits,
)  # fmt: skip
QWEN2 = Family(
    "qwen2", ("qwen2",), read, gguf="qwen2", read_gguf=read_gguf, write_gguf=write_gguf, write=write_qwen2,
    limits=qwen2_limits,
)  # fmt: skip
