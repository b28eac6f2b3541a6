"""Shapes of published models, as their config.json says them: `tiercel bench falcon-h1:7b --random q4_k_m`.

Enough to build a network of the true size with weights of one's own, without a download.  Sources: the files
themselves for 0.5B, 7B (= H1R-7B) and the 90M; the 1.5B, 1.5B-Deep, 3B and 34B follow TII's table of shapes and the
closed form of their multipliers, which reproduces every published value (`muP` below).
"""

from __future__ import annotations

from typing import Any

from tiercel.errors import ModelNotFound

R2 = 2**0.5


def _falcon_h1(
    layers: int,
    width: int,
    ffn: int,
    heads: int,
    head_dim: int,
    mamba: tuple[int, int, int],
    vocab: int,
    context: int,
    norm: bool,
    kv_heads: int = 2,
    groups: int = 1,
    **multipliers: Any,
) -> dict[str, Any]:
    """mamba: heads, head dim, state."""
    H, P, N = mamba
    return {
        "architectures": ["FalconH1ForCausalLM"],
        "model_type": "falcon_h1",
        "vocab_size": vocab,
        "hidden_size": width,
        "intermediate_size": ffn,
        "num_hidden_layers": layers,
        "num_attention_heads": heads,
        "num_key_value_heads": kv_heads,
        "head_dim": head_dim,
        "mamba_d_ssm": H * P,
        "mamba_n_heads": H,
        "mamba_d_head": P,
        "mamba_d_state": N,
        "mamba_n_groups": groups,
        "mamba_d_conv": 4,
        "mamba_chunk_size": 128,
        "mamba_rms_norm": norm,
        "mamba_norm_before_gate": False,
        "rope_theta": 1e11,
        "max_position_embeddings": context,
        "tie_word_embeddings": False,
        **_mup(width, ffn, heads * head_dim, head_dim, H * P, N),
        **multipliers,
    }


def _mup(D: int, F: int, A: int, P: int, I: int, N: int) -> dict[str, Any]:
    """muP from a tuned base of width 1280: D width, F feed-forward, A = attention heads · P, I Mamba width, N state."""
    return {
        "embedding_multiplier": 4 * R2,
        "lm_head_multiplier": 40 / D,
        "key_multiplier": 2**-2.5 * (1280 / D) ** 2 * (128 / P) ** 0.5,
        "attention_out_multiplier": 0.5 * (1280 / D) * (768 / A),
        "mlp_multipliers": [2**-0.5 * 1280 / D, 0.25 * (1280 / D) * (3840 / F)],
        "ssm_in_multiplier": 1280 / D,
        "ssm_out_multiplier": 2**-2.5 * 2048 / I,
        "ssm_multipliers": [R2 / 4, 0.25, 2**-2.5 * 256 / N, 0.5, R2 / 4],
    }


def _llama(layers: int, width: int, ffn: int, heads: int, kv_heads: int, vocab: int, **others: Any) -> dict[str, Any]:
    return {
        "architectures": ["LlamaForCausalLM"],
        "model_type": "llama",
        "vocab_size": vocab,
        "hidden_size": width,
        "intermediate_size": ffn,
        "num_hidden_layers": layers,
        "num_attention_heads": heads,
        "num_key_value_heads": kv_heads,
        "head_dim": width // heads,
        "rms_norm_eps": 1e-5,
        "rope_theta": 10_000.0,
        "max_position_embeddings": 4096,
        "tie_word_embeddings": False,
        **others,
    }


def _qwen3(layers: int, width: int, ffn: int, heads: int, kv_heads: int, **others: Any) -> dict[str, Any]:
    """Qwen3's configs: heads of 128 whatever the width."""
    return {
        "architectures": ["Qwen3ForCausalLM"], "model_type": "qwen3", "vocab_size": 151936, "hidden_size": width,
        "intermediate_size": ffn, "num_hidden_layers": layers, "num_attention_heads": heads,
        "num_key_value_heads": kv_heads, "head_dim": 128, "rms_norm_eps": 1e-6, "rope_theta": 1_000_000.0,
        "max_position_embeddings": 40960, "tie_word_embeddings": False, **others,
    }  # fmt: skip


def _lfm2(
    layers: int, width: int, ffn: int, heads: int, attends: str = "2 5 8 10 12 14", **others: Any
) -> dict[str, Any]:
    """LFM2's configs: ffn before the rule of two thirds; attends: the layers with attention."""
    return {
        "architectures": ["Lfm2ForCausalLM"], "model_type": "lfm2", "vocab_size": 65536, "hidden_size": width,
        "intermediate_size": ffn, "num_hidden_layers": layers, "num_attention_heads": heads, "num_key_value_heads": 8,
        "layer_types": ["full_attention" if i in map(int, attends.split()) else "conv" for i in range(layers)],
        "conv_L_cache": 3, "norm_eps": 1e-5, "rope_theta": 1_000_000.0, "max_position_embeddings": 128_000,
        "tie_word_embeddings": True, **others,
    }  # fmt: skip


def _granite(
    layers: int, width: int, shared: int, heads: tuple[int, int], mamba: tuple[int, int], attends: str, **others: Any
) -> dict[str, Any]:
    """Granite 4-H: (heads, key/value heads), Mamba heads and their width; attends: the layers with attention."""
    return {
        "architectures": ["GraniteMoeHybridForCausalLM"], "model_type": "granitemoehybrid", "vocab_size": 100352,
        "hidden_size": width, "num_hidden_layers": layers, "num_attention_heads": heads[0],
        "num_key_value_heads": heads[1], "intermediate_size": shared, "shared_intermediate_size": shared,
        "layer_types": ["attention" if i in map(int, attends.split()) else "mamba" for i in range(layers)],
        "mamba_n_heads": mamba[0], "mamba_d_head": mamba[1], "mamba_d_state": 128, "mamba_n_groups": 1,
        "mamba_d_conv": 4, "mamba_expand": 2, "mamba_chunk_size": 256, "rms_norm_eps": 1e-5,
        "position_embedding_type": "nope", "attention_multiplier": 0.015625, "embedding_multiplier": 12.0,
        "residual_multiplier": 0.22, "logits_scaling": 8.0, "num_local_experts": 0, "num_experts_per_tok": 0,
        "max_position_embeddings": 131072, "tie_word_embeddings": True, **others,
    }  # fmt: skip


def _nemotron_h(pattern: str, width: int, **others: Any) -> dict[str, Any]:
    """Nemotron-H and Nemotron 3, attention heads of 128."""
    return {
        "architectures": ["NemotronHForCausalLM"], "model_type": "nemotron_h", "vocab_size": 131072,
        "hidden_size": width, "hybrid_override_pattern": pattern, "head_dim": 128, "ssm_state_size": 128, "n_groups": 8,
        "conv_kernel": 4, "chunk_size": 128, "layer_norm_epsilon": 1e-5, "max_position_embeddings": 262144,
        "tie_word_embeddings": False, **others,
    }  # fmt: skip


def _qwen3_5(layers: int, width: int, ffn: int, heads: int, kv_heads: int, value_heads: int, **others: Any) -> Any:
    """Qwen3.5's and Qwen3.6's text configs: attention heads of 256, sixteen key heads of 128 in linear layers."""
    return {
        "architectures": ["Qwen3_5ForCausalLM"], "model_type": "qwen3_5_text", "vocab_size": 248320,
        "hidden_size": width, "intermediate_size": ffn, "num_hidden_layers": layers, "num_attention_heads": heads,
        "num_key_value_heads": kv_heads, "head_dim": 256, "linear_num_key_heads": 16,
        "linear_num_value_heads": value_heads, "linear_key_head_dim": 128, "linear_value_head_dim": 128,
        "linear_conv_kernel_dim": 4, "full_attention_interval": 4, "rms_norm_eps": 1e-6,
        "rope_theta": 10_000_000.0, "partial_rotary_factor": 0.25, "max_position_embeddings": 262144,
        "tie_word_embeddings": False, **others,
    }  # fmt: skip


def _experts(ffn: int, experts: int, active: int) -> dict[str, Any]:
    """What `_qwen3_5` needs beside; ffn: width of an expert, and of the one for all tokens."""
    return {
        "architectures": ["Qwen3_5MoeForCausalLM"], "model_type": "qwen3_5_moe_text", "num_experts": experts,
        "num_experts_per_tok": active, "moe_intermediate_size": ffn, "shared_expert_intermediate_size": ffn,
    }  # fmt: skip


GRANITE_40 = "5 15 25 35"  # layers with attention of the 40-layer models
NEMOTRON_3_NANO = "MEMEM*EMEMEM*EMEMEM*EMEMEM*EMEMEM*EMEMEMEM*EMEMEMEME"


def _gemma3(layers: int, width: int, ffn: int, heads: int, kv_heads: int, window: int, **others: Any) -> dict[str, Any]:
    """Gemma 3's text configs; what they leave out has the class's own value."""
    return {
        "architectures": ["Gemma3ForCausalLM"], "model_type": "gemma3_text", "hidden_size": width,
        "intermediate_size": ffn, "num_hidden_layers": layers, "num_attention_heads": heads,
        "num_key_value_heads": kv_heads, "sliding_window": window, "rope_theta": 1_000_000.0, **others,
    }  # fmt: skip


SHAPES: dict[str, dict[str, Any]] = {
    "falcon-h1:90m": _falcon_h1(24, 512, 768, 8, 64, (24, 32, 64), 32768, 262144, False, tie_word_embeddings=True,
                                embedding_multiplier=0.11083984375, lm_head_multiplier=0.078125, key_multiplier=1.0,
                                attention_out_multiplier=1.0, mlp_multipliers=[1.0, 1.0], ssm_in_multiplier=1.0,
                                ssm_out_multiplier=1.0, ssm_multipliers=[1.0] * 5),
    "falcon-h1:0.5b": _falcon_h1(36, 1024, 2048, 8, 64, (24, 64, 128), 32784, 16384, False),
    "falcon-h1:1.5b": _falcon_h1(24, 2048, 4608, 8, 128, (48, 64, 256), 65537, 131072, True),
    "falcon-h1:1.5b-deep": _falcon_h1(66, 1280, 3072, 6, 128, (24, 64, 256), 65537, 131072, False),
    "falcon-h1:3b": _falcon_h1(32, 2560, 6144, 10, 128, (32, 128, 256), 65537, 131072, False),
    "falcon-h1:7b": _falcon_h1(44, 3072, 12288, 12, 128, (24, 128, 256), 130048, 262144, True),
    "falcon-h1:34b": _falcon_h1(72, 5120, 21504, 20, 128, (32, 128, 256), 261120, 262144, True, kv_heads=4, groups=2),
    "mamba:2.8b": {
        "architectures": ["MambaForCausalLM"], "model_type": "mamba", "vocab_size": 50280, "hidden_size": 2560,
        "num_hidden_layers": 64, "state_size": 16, "expand": 2, "conv_kernel": 4, "time_step_rank": 160,
        "layer_norm_epsilon": 1e-5, "tie_word_embeddings": True,
    },
    "mamba2:2.7b": {
        "architectures": ["Mamba2ForCausalLM"], "model_type": "mamba2", "vocab_size": 50288, "hidden_size": 2560,
        "num_hidden_layers": 64, "state_size": 128, "expand": 2, "conv_kernel": 4, "num_heads": 80, "head_dim": 64,
        "n_groups": 1, "chunk_size": 256, "layer_norm_epsilon": 1e-5, "tie_word_embeddings": True,
    },
    "bamba:9b": {
        "architectures": ["BambaForCausalLM"], "model_type": "bamba", "vocab_size": 128256, "hidden_size": 4096,
        "intermediate_size": 14336, "num_hidden_layers": 32, "num_attention_heads": 32, "num_key_value_heads": 8,
        "attn_layer_indices": [9, 18, 27], "mamba_n_heads": 128, "mamba_d_head": 64, "mamba_d_state": 128,
        "mamba_n_groups": 1, "mamba_d_conv": 4, "mamba_expand": 2, "mamba_chunk_size": 256,
        "max_position_embeddings": 262144, "tie_word_embeddings": False,
    },
    "jamba:mini": {
        "architectures": ["JambaForCausalLM"], "model_type": "jamba", "vocab_size": 65536, "hidden_size": 4096,
        "intermediate_size": 14336, "num_hidden_layers": 32, "num_attention_heads": 32, "num_key_value_heads": 8,
        "attn_layer_period": 8, "attn_layer_offset": 4, "expert_layer_period": 2, "expert_layer_offset": 1,
        "num_experts": 16, "num_experts_per_tok": 2, "mamba_d_state": 16, "mamba_d_conv": 4, "mamba_expand": 2,
        "mamba_dt_rank": 256, "max_position_embeddings": 262144, "tie_word_embeddings": False,
    },
    "falcon-mamba:7b": {
        "architectures": ["FalconMambaForCausalLM"], "model_type": "falcon_mamba", "vocab_size": 65024,
        "hidden_size": 4096, "num_hidden_layers": 64, "state_size": 16, "expand": 16, "intermediate_size": 8192,
        "conv_kernel": 4, "time_step_rank": 256, "layer_norm_epsilon": 1e-5, "tie_word_embeddings": False,
    },
    "qwen3:0.6b": _qwen3(28, 1024, 3072, 16, 8, tie_word_embeddings=True),
    "qwen3:1.7b": _qwen3(28, 2048, 6144, 16, 8, tie_word_embeddings=True),
    "qwen3:4b": _qwen3(36, 2560, 9728, 32, 8, tie_word_embeddings=True),
    "qwen3:8b": _qwen3(36, 4096, 12288, 32, 8),
    "qwen3:30b-a3b": _qwen3(48, 2048, 6144, 32, 4, architectures=["Qwen3MoeForCausalLM"], model_type="qwen3_moe",
                            moe_intermediate_size=768, num_experts=128, num_experts_per_tok=8, norm_topk_prob=True),
    "lfm2:8b-a1b": _lfm2(
        24, 2048, 7168, 32, "2 6 10 14 18 21", architectures=["Lfm2MoeForCausalLM"], model_type="lfm2_moe",
        moe_intermediate_size=1792, num_experts=32, num_experts_per_tok=4, num_dense_layers=2, norm_topk_prob=True,
        use_expert_bias=True, routed_scaling_factor=1.0,
    ),
    "lfm3:1.7b": {"architectures": ["Lfm3ForCausalLM"], "model_type": "lfm3"},  # the class's own defaults
    "gemma3:270m": _gemma3(18, 640, 2048, 4, 1, 512, vocab_size=262144, max_position_embeddings=32768),
    "gemma3:1b": _gemma3(26, 1152, 6912, 4, 1, 512, vocab_size=262144, max_position_embeddings=32768),
    "gemma3:4b": _gemma3(34, 2560, 10240, 8, 4, 1024, rope_scaling={"rope_type": "linear", "factor": 8.0}),
    "gemma3:12b": _gemma3(48, 3840, 15360, 16, 8, 1024, rope_scaling={"rope_type": "linear", "factor": 8.0}),
    "gemma3:27b": _gemma3(62, 5376, 21504, 32, 16, 1024, rope_scaling={"rope_type": "linear", "factor": 8.0},
                          head_dim=128, query_pre_attn_scalar=168),
    "phi-4:14b": {
        "architectures": ["Phi3ForCausalLM"], "model_type": "phi3", "vocab_size": 100352, "hidden_size": 5120,
        "intermediate_size": 17920, "num_hidden_layers": 40, "num_attention_heads": 40, "num_key_value_heads": 10,
        "rms_norm_eps": 1e-5, "rope_theta": 250_000.0, "max_position_embeddings": 16384, "tie_word_embeddings": False,
        "original_max_position_embeddings": 16384,
    },
    "apriel-1.5:15b": _llama(48, 5120, 14336, 32, 8, 131072, architectures=["MistralForCausalLM"], model_type="mistral",
                             head_dim=128, rope_theta=1e9, max_position_embeddings=131072, sliding_window=None),
    "lfm2:350m": _lfm2(16, 1024, 6656, 16),
    "lfm2:700m": _lfm2(16, 1536, 10240, 24),
    "lfm2:1.2b": _lfm2(16, 2048, 12288, 32),
    "lfm2:2.6b": _lfm2(30, 2048, 10752, 32, "2 5 9 13 17 21 24 27", block_auto_adjust_ff_dim=False),
    "granite-4-h:350m": _granite(32, 768, 2048, (12, 4), (48, 32), "10 13 17 27"),
    "granite-4-h:1b": _granite(40, 1536, 4096, (12, 4), (48, 64), GRANITE_40),
    "granite-4-h:micro": _granite(40, 2048, 8192, (32, 8), (64, 64), GRANITE_40),
    "granite-4-h:tiny": _granite(40, 1536, 1024, (12, 4), (48, 64), GRANITE_40, intermediate_size=512,
                                 num_local_experts=64, num_experts_per_tok=6),
    "granite-4-h:small": _granite(40, 4096, 1536, (32, 8), (128, 64), GRANITE_40, intermediate_size=768,
                                  num_local_experts=72, num_experts_per_tok=10),
    "nemotron-3-nano:30b-a3b": _nemotron_h(NEMOTRON_3_NANO, 2688, num_attention_heads=32, num_key_value_heads=2,
                                           mamba_num_heads=64, mamba_head_dim=64, n_routed_experts=128,
                                           num_experts_per_tok=6, moe_intermediate_size=1856, n_shared_experts=1,
                                           moe_shared_expert_intermediate_size=3712, routed_scaling_factor=2.5),
    "qwen3.5:0.8b": _qwen3_5(24, 1024, 3584, 8, 2, 16, tie_word_embeddings=True),
    "qwen3.5:2b": _qwen3_5(24, 2048, 6144, 8, 2, 16, tie_word_embeddings=True),
    "qwen3.5:4b": _qwen3_5(32, 2560, 9216, 16, 4, 32, tie_word_embeddings=True),
    "qwen3.5:9b": _qwen3_5(32, 4096, 12288, 16, 4, 32),
    "qwen3.5:27b": _qwen3_5(64, 5120, 17408, 24, 4, 48),
    "qwen3.5:35b-a3b": _qwen3_5(40, 2048, 512, 16, 2, 32, **_experts(512, 256, 8)),
    "qwen3-next:80b-a3b": _qwen3_5(48, 2048, 512, 16, 2, 32, **_experts(512, 512, 10) | {
        "vocab_size": 151936, "architectures": ["Qwen3NextForCausalLM"], "model_type": "qwen3_next",
    }),
    "olmo-hybrid:7b": {
        "architectures": ["OlmoHybridForCausalLM"], "model_type": "olmo_hybrid", "vocab_size": 100352,
        "hidden_size": 3840, "intermediate_size": 11008, "num_hidden_layers": 32, "num_attention_heads": 30,
        "num_key_value_heads": 30, "linear_num_key_heads": 30, "linear_num_value_heads": 30,
        "linear_key_head_dim": 96, "linear_value_head_dim": 192, "linear_conv_kernel_dim": 4,
        "linear_allow_neg_eigval": True, "rms_norm_eps": 1e-6, "max_position_embeddings": 65536,
        "rope_parameters": {"rope_type": "default", "rope_theta": None}, "tie_word_embeddings": False,
    },
    "llama:7b": _llama(32, 4096, 11008, 32, 32, 32000),
    "smollm2:135m": _llama(30, 576, 1536, 9, 3, 49152, rope_theta=100_000.0, max_position_embeddings=8192,
                           tie_word_embeddings=True),
}  # fmt: skip
SHAPES["falcon-h1r:7b"] = SHAPES["falcon-h1:7b"]  # only weights and training differ
SHAPES |= {f"qwen3.6:{size}": SHAPES[f"qwen3.5:{size}"] for size in ("27b", "35b-a3b")}


# Hub ids in lower case, without the endings that name a training or a form (`VARIANTS`).
HUB_IDS = {f"tiiuae/falcon-h1-{size}": f"falcon-h1:{size}" for size in "0.5b 1.5b 1.5b-deep 3b 7b 34b".split()} | {
    "tiiuae/falcon-h1-tiny-90m": "falcon-h1:90m", "tiiuae/falcon-h1r-7b": "falcon-h1r:7b",
    "tiiuae/falcon-mamba-7b": "falcon-mamba:7b", "state-spaces/mamba-2.8b": "mamba:2.8b",
    "state-spaces/mamba2-2.7b": "mamba2:2.7b", "ibm-ai-platform/bamba-9b-v1": "bamba:9b",
    "ibm-ai-platform/bamba-9b-v2": "bamba:9b", "ai21labs/jamba-v0.1": "jamba:mini",
    "ai21labs/ai21-jamba-1.5-mini": "jamba:mini", "ai21labs/ai21-jamba-mini-1.5": "jamba:mini",
    "meta-llama/llama-2-7b": "llama:7b", "huggingfacetb/smollm2-135m": "smollm2:135m",
    "allenai/olmo-hybrid-7b": "olmo-hybrid:7b", "qwen/qwen3.8-27b": "qwen3.5:27b",
} | {f"qwen/{name.replace(':', '-')}": name for name in SHAPES if name.startswith("qwen")} | {
    f"liquidai/lfm2-{size}": f"lfm2:{size}" for size in "350m 700m 1.2b 2.6b 8b-a1b".split()
} | {f"google/gemma-3-{size}": f"gemma3:{size}" for size in "270m 1b 4b 12b 27b".split()} | {
    "liquidai/lfm3-1.7b": "lfm3:1.7b", "microsoft/phi-4": "phi-4:14b",
    "servicenow-ai/apriel-1.5-15b-thinker": "apriel-1.5:15b",
} | {f"ibm-granite/granite-4.0-h-{size}": f"granite-4-h:{size}" for size in "350m 1b micro tiny small".split()} | {
    "nvidia/nvidia-nemotron-3-nano-30b-a3b": "nemotron-3-nano:30b-a3b",
    "nvidia/nvidia-nemotron-3-nano-30b-a3b-bf16": "nemotron-3-nano:30b-a3b",
}  # fmt: skip
HUB_IDS |= {name.replace(":", "-"): name for name in SHAPES}
VARIANTS = ("-gguf", "-it", "-instruct", "-base", "-chat", "-hf")


def find(name: str) -> dict[str, Any] | None:
    """The config.json of a published shape by its short name or its hub id, such as tiiuae/Falcon-H1R-7B; or None."""
    hub_id = name.lower()
    for variant in VARIANTS:
        hub_id = hub_id.removesuffix(variant)
    return SHAPES.get(name) or SHAPES.get(HUB_IDS.get(hub_id, ""))


def shape(name: str) -> dict[str, Any]:
    """`find`; ModelNotFound names the known ones."""
    found = find(name)
    if found is None:
        raise ModelNotFound(f"no shape {name!r}; known: {', '.join(SHAPES)}")
    return found
