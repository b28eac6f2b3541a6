"""Tiny random models in which nothing is left at its default, and the judge that runs them.

A model whose multipliers are 1, whose biases are 0 and whose groups are one cannot tell a right
implementation from a wrong one.  Here every size, multiplier, bias, eps, theta and switch differs
from its default and from its neighbours, and every parameter is random, so that forgetting any
single one moves the logits.  `transformers` builds, saves and judges: its whole forward in float32,
batch of one, no cache, eager attention.  Its cached steps are no judge (5.23): a one-token step of Mamba-2
forgets time_step_limit, and Bamba restarts its positions at every call.

    make(name, folder)       build, randomise, save; returns the transformers model
    whole(model, tokens)     (L, V) float32 logits
    NASTY                    name → family, config
"""

from __future__ import annotations

import json
import shutil
from collections.abc import Callable
from dataclasses import dataclass
from pathlib import Path
from typing import Any

import torch
from safetensors.torch import load_file, save_file

VOCAB = 97
EAGER = {"attn_implementation": "eager", "experts_implementation": "eager"}


@dataclass(frozen=True)
class Nasty:
    """`config` holds the arguments of transformers' config class for `family`."""

    family: str
    config: dict[str, Any]


def _h1(**changes: Any) -> Nasty:
    """Falcon-H1 with fourteen distinct multipliers; none near 1, so that setting one to 1 shows."""
    config = dict(
        vocab_size=VOCAB, hidden_size=40, intermediate_size=56, num_hidden_layers=3, rms_norm_eps=0.011,
        num_attention_heads=4, num_key_value_heads=2, head_dim=14, max_position_embeddings=1024,
        mamba_d_ssm=72, mamba_n_heads=6, mamba_d_head=12, mamba_n_groups=3, mamba_d_state=10, mamba_d_conv=4,
        mamba_chunk_size=24, mamba_expand=3, rope_parameters={"rope_type": "default", "rope_theta": 1234.5},
        lm_head_multiplier=1.37, embedding_multiplier=0.61, mlp_multipliers=[1.73, 0.57], key_multiplier=2.3,
        attention_in_multiplier=1.45, attention_out_multiplier=0.66, ssm_in_multiplier=0.71, ssm_out_multiplier=1.31,
        ssm_multipliers=[1.52, 0.63, 1.81, 0.54, 1.67],
    )  # fmt: skip
    return Nasty("falcon_h1", config | changes)


def _llama(scaling: dict[str, Any], **changes: Any) -> Nasty:
    config = dict(
        vocab_size=VOCAB, hidden_size=36, intermediate_size=50, num_hidden_layers=3, rms_norm_eps=0.013,
        num_attention_heads=6, num_key_value_heads=2, head_dim=14, max_position_embeddings=1024,
        rope_parameters={"rope_type": "default", "rope_theta": 777.0} | scaling,
    )  # fmt: skip
    return Nasty("llama", config | changes)


_LLAMA3 = dict(rope_type="llama3", factor=6.0, low_freq_factor=1.5, high_freq_factor=5.0)
_YARN = dict(rope_type="yarn", factor=3.5, original_max_position_embeddings=64, beta_fast=13.0, beta_slow=0.7)
_SHORT, _LONG = [1.0, 1.1, 1.3, 1.2, 1.5, 1.4, 1.9], [1.2, 2.0, 3.1, 4.2, 5.5, 7.0, 9.0]

NASTY: dict[str, Nasty] = {
    # no gated norm, as Falcon-H1-0.5B; three groups
    "h1-no_norm": _h1(mamba_rms_norm=False),
    # every bias there is, tied embeddings (both multipliers must survive), norm after the gate over two groups
    "h1-gate_first": _h1(
        mamba_rms_norm=True, mamba_norm_before_gate=False, mamba_n_groups=2, mamba_chunk_size=16, mamba_d_conv=3,
        attention_bias=True, mlp_bias=True, mamba_proj_bias=True, projectors_bias=True, tie_word_embeddings=True,
    ),
    # norm before the gate, no conv bias, clamped steps, more heads than groups
    "h1-norm_first": _h1(
        mamba_rms_norm=True, mamba_norm_before_gate=True, mamba_n_groups=3, mamba_conv_bias=False, mamba_d_conv=2,
        mamba_proj_bias=True, time_step_limit=[0.12, 0.83], num_key_value_heads=1, mamba_chunk_size=40,
    ),
    # the inner width from `mamba_expand`, one group, head_dim left to the fallback
    "h1-expand": _h1(
        mamba_rms_norm=True, mamba_norm_before_gate=False, mamba_n_groups=1, mamba_d_ssm=None, mamba_n_heads=5,
        mamba_d_head=24, mamba_expand=3, head_dim=10, num_key_value_heads=4, projectors_bias=True, mlp_bias=True,
    ),
    "llama-biases": _llama({}, attention_bias=True, mlp_bias=True),
    "llama-tied": _llama({}, tie_word_embeddings=True, num_key_value_heads=6, head_dim=6),
    "llama-linear": _llama({"rope_type": "linear", "factor": 2.7}),
    "llama-dynamic": _llama({"rope_type": "dynamic", "factor": 2.2}),
    "llama-llama3": _llama({**_LLAMA3, "original_max_position_embeddings": 32}, attention_bias=True),
    "llama-yarn": _llama(_YARN, mlp_bias=True),
    "llama-yarn_mscale": _llama({**_YARN, "mscale": 1.4, "mscale_all_dim": 0.6, "truncate": False}),
    "llama-yarn_factor": _llama({**_YARN, "attention_factor": 1.23}),
    "llama-longrope": _llama(
        {"rope_type": "longrope", "factor": 4.0, "original_max_position_embeddings": 512,
         "short_factor": _SHORT, "long_factor": _LONG},
    ),
    "mistral-window": Nasty("mistral", dict(
        vocab_size=VOCAB, hidden_size=42, intermediate_size=58, num_hidden_layers=3, rms_norm_eps=0.017,
        num_attention_heads=7, num_key_value_heads=1, head_dim=12, max_position_embeddings=900, sliding_window=19,
        rope_parameters={"rope_type": "default", "rope_theta": 431.0},
    )),
    "mistral-full": Nasty("mistral", dict(
        vocab_size=VOCAB, hidden_size=42, intermediate_size=30, num_hidden_layers=2, rms_norm_eps=0.019,
        num_attention_heads=6, num_key_value_heads=3, head_dim=8, max_position_embeddings=800, sliding_window=None,
        rope_parameters={"rope_type": "default", "rope_theta": 222.0}, tie_word_embeddings=True,
    )),
    "qwen2-mixed_window": Nasty("qwen2", dict(
        vocab_size=VOCAB, hidden_size=48, intermediate_size=62, num_hidden_layers=4, rms_norm_eps=0.023,
        num_attention_heads=4, num_key_value_heads=2, max_position_embeddings=700, use_sliding_window=True,
        sliding_window=13, max_window_layers=2, rope_parameters={"rope_type": "default", "rope_theta": 654.0},
    )),
    "qwen2-tied": Nasty("qwen2", dict(
        vocab_size=VOCAB, hidden_size=48, intermediate_size=34, num_hidden_layers=2, rms_norm_eps=0.029,
        num_attention_heads=8, num_key_value_heads=2, max_position_embeddings=600, use_sliding_window=False,
        sliding_window=11, rope_parameters={"rope_type": "default", "rope_theta": 99.0}, tie_word_embeddings=True,
    )),
    "mixtral-top3": Nasty("mixtral", dict(
        vocab_size=VOCAB, hidden_size=32, intermediate_size=22, num_hidden_layers=3, rms_norm_eps=0.031,
        num_attention_heads=4, num_key_value_heads=2, head_dim=10, max_position_embeddings=1000, sliding_window=23,
        num_local_experts=5, num_experts_per_tok=3, rope_parameters={"rope_type": "default", "rope_theta": 345.0},
    )),
    "mixtral-top2": Nasty("mixtral", dict(
        vocab_size=VOCAB, hidden_size=30, intermediate_size=26, num_hidden_layers=2, rms_norm_eps=0.037,
        num_attention_heads=5, num_key_value_heads=5, max_position_embeddings=500, num_local_experts=7,
        num_experts_per_tok=2, tie_word_embeddings=True,
        rope_parameters={"rope_type": "default", "rope_theta": 55.0},
    )),
    "mamba-biases": Nasty("mamba", dict(
        vocab_size=VOCAB, hidden_size=38, state_size=11, num_hidden_layers=3, layer_norm_epsilon=0.041, expand=3,
        conv_kernel=3, use_bias=True, use_conv_bias=True, time_step_rank=5, tie_word_embeddings=False,
        residual_in_fp32=False,
    )),
    "mamba-tied": Nasty("mamba", dict(
        vocab_size=VOCAB, hidden_size=34, state_size=7, num_hidden_layers=4, layer_norm_epsilon=0.043, expand=2,
        conv_kernel=5, use_bias=False, use_conv_bias=False, time_step_rank="auto", tie_word_embeddings=True,
    )),
    "mamba2-groups2": Nasty("mamba2", dict(
        vocab_size=VOCAB, hidden_size=36, num_heads=6, head_dim=12, state_size=14, num_hidden_layers=3, expand=2,
        layer_norm_epsilon=0.047, conv_kernel=3, n_groups=2, use_bias=True, use_conv_bias=True, chunk_size=20,
        time_step_limit=[0.09, 0.71], tie_word_embeddings=False, residual_in_fp32=False,
    )),
    "mamba2-groups3": Nasty("mamba2", dict(
        vocab_size=VOCAB, hidden_size=30, num_heads=9, head_dim=10, state_size=8, num_hidden_layers=4, expand=3,
        layer_norm_epsilon=0.021, conv_kernel=5, n_groups=3, use_bias=False, use_conv_bias=False, chunk_size=28,
        tie_word_embeddings=True,
    )),
    "bamba-biases": Nasty("bamba", dict(
        vocab_size=VOCAB, hidden_size=40, intermediate_size=52, num_hidden_layers=4, rms_norm_eps=0.027,
        num_attention_heads=5, num_key_value_heads=1, head_dim=12, max_position_embeddings=1100,
        attn_layer_indices=[1, 2], mamba_n_heads=8, mamba_d_head=15, mamba_n_groups=4, mamba_d_state=9, mamba_d_conv=3,
        mamba_expand=3, mamba_chunk_size=32, mamba_conv_bias=True, mamba_proj_bias=True, attention_bias=True,
        mlp_bias=True, time_step_limit=[0.07, 0.77], rope_parameters={"rope_type": "default", "rope_theta": 321.0},
    )),
    "bamba-plain": Nasty("bamba", dict(
        vocab_size=VOCAB, hidden_size=32, intermediate_size=44, num_hidden_layers=3, rms_norm_eps=0.033,
        num_attention_heads=4, num_key_value_heads=2, max_position_embeddings=1200, attn_layer_indices=[2],
        mamba_n_heads=4, mamba_n_groups=2, mamba_d_state=12, mamba_d_conv=2, mamba_expand=2, mamba_chunk_size=36,
        mamba_conv_bias=False, tie_word_embeddings=True, rope_parameters={"rope_type": "default", "rope_theta": 210.0},
    )),
    "jamba-experts": Nasty("jamba", dict(
        vocab_size=VOCAB, hidden_size=36, intermediate_size=28, num_hidden_layers=6, rms_norm_eps=0.039,
        num_attention_heads=6, num_key_value_heads=3, max_position_embeddings=1300, num_experts_per_tok=3,
        num_experts=5, expert_layer_period=3, expert_layer_offset=2, attn_layer_period=5, attn_layer_offset=2,
        mamba_d_state=9, mamba_d_conv=3, mamba_expand=3, mamba_dt_rank=5, mamba_conv_bias=True, mamba_proj_bias=True,
    )),
    "jamba-dense": Nasty("jamba", dict(
        vocab_size=VOCAB, hidden_size=40, intermediate_size=32, num_hidden_layers=4, rms_norm_eps=0.049,
        num_attention_heads=4, num_key_value_heads=1, max_position_embeddings=1400, num_experts=1,
        num_experts_per_tok=1, expert_layer_period=2, expert_layer_offset=0, attn_layer_period=4, attn_layer_offset=1,
        mamba_d_state=5, mamba_d_conv=5, mamba_expand=2, mamba_dt_rank="auto", mamba_conv_bias=False,
        tie_word_embeddings=True,
    )),
    "falcon_mamba-biases": Nasty("falcon_mamba", dict(
        vocab_size=VOCAB, hidden_size=38, state_size=11, num_hidden_layers=3, layer_norm_epsilon=0.041, expand=3,
        conv_kernel=3, use_bias=True, use_conv_bias=True, time_step_rank=5, tie_word_embeddings=False,
        mixer_rms_eps=0.053,
    )),
    "falcon_mamba-tied": Nasty("falcon_mamba", dict(
        vocab_size=VOCAB, hidden_size=32, state_size=7, num_hidden_layers=4, layer_norm_epsilon=0.043, expand=16,
        intermediate_size=64, conv_kernel=5, use_bias=False, time_step_rank="auto", tie_word_embeddings=True,
        mixer_rms_eps=0.019,
    )),
    "qwen3-mixed_window": Nasty("qwen3", dict(
        vocab_size=VOCAB, hidden_size=44, intermediate_size=50, num_hidden_layers=4, rms_norm_eps=0.021,
        num_attention_heads=6, num_key_value_heads=2, head_dim=12, max_position_embeddings=700, attention_bias=True,
        use_sliding_window=True, sliding_window=11, max_window_layers=2,
        rope_parameters={"rope_type": "default", "rope_theta": 543.0},
    )),
    "qwen3-tied": Nasty("qwen3", dict(
        vocab_size=VOCAB, hidden_size=40, intermediate_size=34, num_hidden_layers=2, rms_norm_eps=0.027,
        num_attention_heads=3, num_key_value_heads=1, head_dim=16, max_position_embeddings=600,
        rope_parameters={"rope_type": "yarn", "rope_theta": 99.0, "factor": 3.0,
                         "original_max_position_embeddings": 64},
        tie_word_embeddings=True,
    )),
    "qwen3_moe-mixed": Nasty("qwen3_moe", dict(
        vocab_size=VOCAB, hidden_size=32, intermediate_size=46, moe_intermediate_size=22, num_hidden_layers=4,
        rms_norm_eps=0.029, num_attention_heads=4, num_key_value_heads=2, head_dim=10, max_position_embeddings=900,
        num_experts=5, num_experts_per_tok=3, norm_topk_prob=False, decoder_sparse_step=2, mlp_only_layers=[1],
        use_sliding_window=True, sliding_window=17, rope_parameters={"rope_type": "default", "rope_theta": 345.0},
    )),
    "qwen3_5-shared_keys": Nasty("qwen3_5_text", dict(
        vocab_size=VOCAB, hidden_size=40, intermediate_size=54, num_hidden_layers=4, rms_norm_eps=0.017,
        num_attention_heads=6, num_key_value_heads=2, head_dim=24, max_position_embeddings=800,
        linear_num_key_heads=2, linear_num_value_heads=6, linear_key_head_dim=12, linear_value_head_dim=20,
        linear_conv_kernel_dim=3, full_attention_interval=2,
        rope_parameters={"rope_type": "default", "rope_theta": 321.0, "partial_rotary_factor": 0.5},
    )),
    "qwen3_5-tied": Nasty("qwen3_5_text", dict(
        vocab_size=VOCAB, hidden_size=32, intermediate_size=46, num_hidden_layers=4, rms_norm_eps=0.023,
        num_attention_heads=4, num_key_value_heads=4, head_dim=16, max_position_embeddings=600,
        linear_num_key_heads=3, linear_num_value_heads=3, linear_key_head_dim=16, linear_value_head_dim=8,
        linear_conv_kernel_dim=4, attention_bias=True, tie_word_embeddings=True,
        rope_parameters={"rope_type": "default", "rope_theta": 77.0, "partial_rotary_factor": 0.25},
    )),
    "gemma3-biases": Nasty("gemma3_text", dict(
        vocab_size=VOCAB, hidden_size=40, intermediate_size=54, num_hidden_layers=4, rms_norm_eps=0.018,
        num_attention_heads=4, num_key_value_heads=1, head_dim=14, max_position_embeddings=900, attention_bias=True,
        query_pre_attn_scalar=23, sliding_window=13, hidden_activation="gelu", tie_word_embeddings=False,
        layer_types=["sliding_attention", "full_attention", "full_attention", "sliding_attention"],
        rope_parameters={"full_attention": {"rope_type": "linear", "rope_theta": 543.0, "factor": 2.4},
                         "sliding_attention": {"rope_type": "default", "rope_theta": 67.0}},
    )),
    "gemma3-tied": Nasty("gemma3_text", dict(
        vocab_size=VOCAB, hidden_size=36, intermediate_size=42, num_hidden_layers=4, rms_norm_eps=0.028,
        num_attention_heads=6, num_key_value_heads=2, head_dim=10, max_position_embeddings=700,
        query_pre_attn_scalar=10, sliding_window=17, sliding_window_pattern=3,
        rope_parameters={"full_attention": {"rope_type": "linear", "rope_theta": 432.0, "factor": 1.8},
                         "sliding_attention": {"rope_type": "default", "rope_theta": 55.0}},
    )),
    "lfm2-biases": Nasty("lfm2", dict(
        vocab_size=VOCAB, hidden_size=40, intermediate_size=70, num_hidden_layers=5, norm_eps=0.019,
        num_attention_heads=5, num_key_value_heads=1, max_position_embeddings=900, conv_bias=True, conv_L_cache=5,
        block_multiple_of=12, block_ffn_dim_multiplier=1.3,
        layer_types=["conv", "full_attention", "conv", "conv", "full_attention"],
        tie_word_embeddings=False, rope_parameters={"rope_type": "default", "rope_theta": 432.0},
    )),
    "lfm2_moe-scaled": Nasty("lfm2_moe", dict(
        vocab_size=VOCAB, hidden_size=36, intermediate_size=50, moe_intermediate_size=22, num_hidden_layers=4,
        norm_eps=0.023, num_attention_heads=6, num_key_value_heads=3, max_position_embeddings=800, conv_bias=True,
        conv_L_cache=4, num_dense_layers=1, num_experts=7, num_experts_per_tok=3, routed_scaling_factor=1.7,
        norm_topk_prob=False, layer_types=["conv", "full_attention", "conv", "conv"], tie_word_embeddings=False,
        rope_parameters={"rope_type": "default", "rope_theta": 234.0},
    )),
    "lfm2_moe-renormalized": Nasty("lfm2_moe", dict(
        vocab_size=VOCAB, hidden_size=32, intermediate_size=46, moe_intermediate_size=26, num_hidden_layers=3,
        norm_eps=0.017, num_attention_heads=4, num_key_value_heads=1, max_position_embeddings=600, num_experts=5,
        num_experts_per_tok=2, num_dense_layers=2, layer_types=["full_attention", "conv", "conv"],
        rope_parameters={"rope_type": "default", "rope_theta": 77.0},
    )),
    "lfm3-all": Nasty("lfm3", dict(
        vocab_size=VOCAB, hidden_size=36, intermediate_size=50, num_hidden_layers=5, norm_eps=0.027,
        num_attention_heads=4, num_key_value_heads=2, head_dim=12, max_position_embeddings=800, conv_bias=True,
        conv_L_cache=5, attention_bias=True, sliding_window=15, tie_word_embeddings=False,
        layer_types=["conv", "sliding_attention", "full_attention", "conv", "conv"],
        rope_parameters={
            "full_attention": {"rope_type": "proportional", "rope_theta": 321.0, "partial_rotary_factor": 0.7},
            "sliding_attention": {"rope_type": "default", "rope_theta": 45.0},
        },
    )),
    "lfm3-plain": Nasty("lfm3", dict(
        vocab_size=VOCAB, hidden_size=32, intermediate_size=44, num_hidden_layers=5, norm_eps=0.021,
        num_attention_heads=4, num_key_value_heads=1, head_dim=16, max_position_embeddings=600, sliding_window=19,
        use_sandwich_norm=False, use_attention_gate=False,
    )),
    "phi3-partial": Nasty("phi3", dict(
        vocab_size=VOCAB, hidden_size=40, intermediate_size=54, num_hidden_layers=3, rms_norm_eps=0.019,
        num_attention_heads=4, num_key_value_heads=2, max_position_embeddings=700, sliding_window=21,
        rope_parameters={"rope_type": "default", "rope_theta": 543.0, "partial_rotary_factor": 0.6},
        original_max_position_embeddings=700,
    )),
    "phi3-longrope": Nasty("phi3", dict(
        vocab_size=VOCAB, hidden_size=32, intermediate_size=38, num_hidden_layers=2, rms_norm_eps=0.031,
        num_attention_heads=4, num_key_value_heads=1, max_position_embeddings=2048, tie_word_embeddings=True,
        original_max_position_embeddings=512,
        rope_parameters={"rope_type": "longrope", "rope_theta": 321.0, "partial_rotary_factor": 0.75,
                         "short_factor": [1.0, 1.2, 1.5], "long_factor": [1.3, 2.2, 4.0]},
    )),
    "lfm2-tied": Nasty("lfm2", dict(
        vocab_size=VOCAB, hidden_size=48, intermediate_size=58, num_hidden_layers=3, norm_eps=0.031,
        num_attention_heads=6, num_key_value_heads=2, max_position_embeddings=700, conv_L_cache=3,
        block_auto_adjust_ff_dim=False, full_attn_idxs=[1],
        rope_parameters={"rope_type": "default", "rope_theta": 88.0},
    )),
    # dense and expert layers in any order, groups, biases, every switch
    "nemotron_h-experts": Nasty("nemotron_h", dict(
        vocab_size=VOCAB, hidden_size=36, intermediate_size=50, layer_norm_epsilon=0.021, num_attention_heads=6,
        num_key_value_heads=2, head_dim=10, max_position_embeddings=900, ssm_state_size=9, mamba_num_heads=6,
        mamba_head_dim=14, n_groups=3, conv_kernel=3, use_conv_bias=True, chunk_size=24, use_bias=True, mlp_bias=True,
        layers_block_type=["mlp", "linear_attention", "moe", "moe", "full_attention", "linear_attention", "moe"],
        n_routed_experts=12, num_experts_per_tok=3, n_group=4, topk_group=2, moe_intermediate_size=22,
        moe_shared_expert_intermediate_size=26, routed_scaling_factor=2.5, norm_topk_prob=True, time_step_min=1e-9,
    )),
    "nemotron_h-latent": Nasty("nemotron_h", dict(
        vocab_size=VOCAB, hidden_size=40, intermediate_size=38, layer_norm_epsilon=0.033, num_attention_heads=4,
        num_key_value_heads=4, head_dim=12, max_position_embeddings=700, ssm_state_size=12, mamba_num_heads=4,
        mamba_head_dim=10, n_groups=2, conv_kernel=4, use_conv_bias=False, chunk_size=32,
        layers_block_type=["linear_attention", "moe", "full_attention", "moe"], moe_latent_size=18,
        n_routed_experts=7, num_experts_per_tok=4, moe_intermediate_size=20, moe_shared_expert_intermediate_size=30,
        routed_scaling_factor=1.7, norm_topk_prob=False, time_step_min=1e-9,
    )),
    "nemotron_h-dense": Nasty("nemotron_h", dict(
        vocab_size=VOCAB, hidden_size=32, intermediate_size=44, layer_norm_epsilon=0.041, num_attention_heads=3,
        num_key_value_heads=1, head_dim=14, max_position_embeddings=800, ssm_state_size=8, mamba_num_heads=8,
        mamba_head_dim=8, n_groups=4, conv_kernel=2, chunk_size=16, time_step_min=1e-9,
        layers_block_type=["linear_attention", "mlp", "full_attention", "mlp", "linear_attention"],
    )),
    "granite-experts": Nasty("granitemoehybrid", dict(
        vocab_size=VOCAB, hidden_size=36, intermediate_size=22, shared_intermediate_size=26, num_hidden_layers=4,
        rms_norm_eps=0.023, num_attention_heads=6, num_key_value_heads=2, max_position_embeddings=900,
        embedding_multiplier=3.7, logits_scaling=0.9, residual_multiplier=0.43,
        attention_multiplier=0.31, num_local_experts=5, num_experts_per_tok=3, position_embedding_type=None,
        layer_types=["linear_attention", "full_attention", "linear_attention", "linear_attention"], mamba_n_heads=6,
        mamba_d_head=18, mamba_n_groups=2, mamba_d_state=9, mamba_d_conv=3, mamba_expand=3, mamba_chunk_size=24,
        mamba_proj_bias=True, time_step_limit=[0.08, 0.75],
    )),
    "granite-hybrid": Nasty("granitemoehybrid", dict(
        vocab_size=VOCAB, hidden_size=32, intermediate_size=99, shared_intermediate_size=46, num_hidden_layers=4,
        rms_norm_eps=0.031, num_attention_heads=4, num_key_value_heads=4, max_position_embeddings=800,
        embedding_multiplier=5.1, logits_scaling=0.6, residual_multiplier=0.61, attention_multiplier=0.27,
        num_local_experts=0, num_experts_per_tok=0, position_embedding_type="rope",
        layer_types=["linear_attention", "linear_attention", "full_attention", "linear_attention"], mamba_n_heads=8,
        mamba_d_head="auto", mamba_d_state=12, mamba_expand=2, mamba_conv_bias=False, tie_word_embeddings=True,
        rope_parameters={"rope_type": "default", "rope_theta": 234.0},
    )),
    "granite-dense": Nasty("granite", dict(
        vocab_size=VOCAB, hidden_size=40, intermediate_size=54, num_hidden_layers=3, rms_norm_eps=0.027,
        num_attention_heads=5, num_key_value_heads=1, max_position_embeddings=700, attention_bias=True, mlp_bias=True,
        embedding_multiplier=2.3, logits_scaling=1.4, residual_multiplier=0.52, attention_multiplier=0.4,
        rope_parameters={"rope_type": "default", "rope_theta": 345.0},
    )),
    "granite-moe": Nasty("granitemoeshared", dict(
        vocab_size=VOCAB, hidden_size=32, intermediate_size=24, num_hidden_layers=2, rms_norm_eps=0.037,
        num_attention_heads=4, num_key_value_heads=2, max_position_embeddings=600, embedding_multiplier=4.1,
        logits_scaling=0.5, residual_multiplier=0.7, attention_multiplier=0.33, num_local_experts=7,
        num_experts_per_tok=2, shared_intermediate_size=30, tie_word_embeddings=True,
        rope_parameters={"rope_type": "default", "rope_theta": 66.0},
    )),
    "qwen3_5-square": Nasty("qwen3_5_text", dict(
        vocab_size=VOCAB, hidden_size=48, intermediate_size=40, num_hidden_layers=4, rms_norm_eps=1e-5,
        num_attention_heads=4, num_key_value_heads=2, head_dim=16, max_position_embeddings=900,
        linear_num_key_heads=2, linear_num_value_heads=6, linear_key_head_dim=16, linear_value_head_dim=16,
        linear_conv_kernel_dim=4, layer_types=["linear_attention", "linear_attention", "full_attention",
                                               "linear_attention"],
        rope_parameters={"rope_type": "default", "rope_theta": 432.0, "partial_rotary_factor": 0.5},
    )),
    "qwen3_5_moe-shared_keys": Nasty("qwen3_5_moe_text", dict(
        vocab_size=VOCAB, hidden_size=40, num_hidden_layers=4, rms_norm_eps=0.019, num_attention_heads=6,
        num_key_value_heads=2, head_dim=24, max_position_embeddings=800, linear_num_key_heads=2,
        linear_num_value_heads=6, linear_key_head_dim=12, linear_value_head_dim=20, linear_conv_kernel_dim=3,
        full_attention_interval=2, moe_intermediate_size=22, shared_expert_intermediate_size=34, num_experts=7,
        num_experts_per_tok=3, attention_bias=True,
        rope_parameters={"rope_type": "default", "rope_theta": 321.0, "partial_rotary_factor": 0.5},
    )),
    "qwen3_5_moe-square": Nasty("qwen3_5_moe_text", dict(
        vocab_size=VOCAB, hidden_size=48, num_hidden_layers=3, rms_norm_eps=0.027, num_attention_heads=4,
        num_key_value_heads=2, head_dim=16, max_position_embeddings=900, linear_num_key_heads=2,
        linear_num_value_heads=4, linear_key_head_dim=16, linear_value_head_dim=16, linear_conv_kernel_dim=4,
        moe_intermediate_size=24, shared_expert_intermediate_size=32, num_experts=6, num_experts_per_tok=2,
        layer_types=["linear_attention", "full_attention", "linear_attention"],
        rope_parameters={"rope_type": "default", "rope_theta": 432.0, "partial_rotary_factor": 0.5},
    )),
    "qwen3_next-mixed": Nasty("qwen3_next", dict(
        vocab_size=VOCAB, hidden_size=40, intermediate_size=46, num_hidden_layers=4, rms_norm_eps=0.019,
        num_attention_heads=6, num_key_value_heads=2, head_dim=24, max_position_embeddings=800,
        linear_num_key_heads=2, linear_num_value_heads=6, linear_key_head_dim=12, linear_value_head_dim=20,
        linear_conv_kernel_dim=3, layer_types=["linear_attention", "full_attention"] * 2, decoder_sparse_step=2,
        mlp_only_layers=[1], moe_intermediate_size=22, shared_expert_intermediate_size=34, num_experts=7,
        num_experts_per_tok=3, norm_topk_prob=False, attention_bias=True,
        rope_parameters={"rope_type": "default", "rope_theta": 321.0, "partial_rotary_factor": 0.5},
    )),
    "qwen3_next-square": Nasty("qwen3_next", dict(
        vocab_size=VOCAB, hidden_size=48, intermediate_size=40, num_hidden_layers=4, rms_norm_eps=0.027,
        num_attention_heads=4, num_key_value_heads=2, head_dim=16, max_position_embeddings=900,
        linear_num_key_heads=2, linear_num_value_heads=4, linear_key_head_dim=16, linear_value_head_dim=16,
        linear_conv_kernel_dim=4, moe_intermediate_size=24, shared_expert_intermediate_size=32, num_experts=6,
        num_experts_per_tok=2,
        rope_parameters={"rope_type": "default", "rope_theta": 432.0, "partial_rotary_factor": 0.25},
    )),
    "olmo_hybrid-rope": Nasty("olmo_hybrid", dict(
        vocab_size=VOCAB, hidden_size=40, intermediate_size=54, num_hidden_layers=4, rms_norm_eps=0.019,
        num_attention_heads=4, num_key_value_heads=2, max_position_embeddings=800, attention_bias=True,
        linear_num_key_heads=2, linear_num_value_heads=6, linear_key_head_dim=12, linear_value_head_dim=20,
        linear_conv_kernel_dim=3, layer_types=["linear_attention", "full_attention"] * 2,
        rope_parameters={"rope_type": "default", "rope_theta": 234.0},
    )),
    "olmo_hybrid-no_positions": Nasty("olmo_hybrid", dict(
        vocab_size=VOCAB, hidden_size=36, intermediate_size=46, num_hidden_layers=3, rms_norm_eps=0.013,
        num_attention_heads=3, max_position_embeddings=700, linear_allow_neg_eigval=False, tie_word_embeddings=True,
        layer_types=["linear_attention", "full_attention", "linear_attention"],
        rope_parameters={"rope_type": "default", "rope_theta": None},
    )),
    "qwen3_moe-renormalized": Nasty("qwen3_moe", dict(
        vocab_size=VOCAB, hidden_size=32, intermediate_size=22, moe_intermediate_size=24, num_hidden_layers=3,
        rms_norm_eps=0.037, num_attention_heads=4, num_key_value_heads=4, head_dim=8, max_position_embeddings=500,
        num_experts=7, num_experts_per_tok=2, norm_topk_prob=True, tie_word_embeddings=True,
        rope_parameters={"rope_type": "default", "rope_theta": 55.0},
    )),
}  # fmt: skip

FAMILIES = sorted({nasty.family for nasty in NASTY.values()})


def make(name: str, folder: Path) -> Any:
    """Builds NASTY[name] with transformers, randomises every parameter and saves it to `folder`."""
    from transformers import AutoConfig, AutoModelForCausalLM

    nasty = NASTY[name]
    config = AutoConfig.for_model(nasty.family, bos_token_id=1, eos_token_id=2, pad_token_id=0, **nasty.config)
    model = AutoModelForCausalLM.from_config(config, dtype=torch.float32, **EAGER).eval()
    randomize(model, seed=1000 + list(NASTY).index(name))
    save(model, folder)
    return model


def save(model: Any, folder: Path) -> None:
    """As `save_pretrained`, in the layout of published files."""
    model.save_pretrained(folder)
    if model.config.model_type == "olmo_hybrid":
        edit_tensors(folder, as_published(model.config))


def load_hf(folder: Path) -> Any:
    """A saved folder read back by transformers, float32 and eager; refuses a partly matching file."""
    from transformers import AutoModelForCausalLM

    model, report = AutoModelForCausalLM.from_pretrained(folder, dtype=torch.float32, output_loading_info=True, **EAGER)
    assert not report["missing_keys"] and not report["unexpected_keys"], report
    return model.eval()


@torch.no_grad()
def whole(model: Any, tokens: torch.Tensor) -> torch.Tensor:
    """(L, V) float32 logits of one row, no cache."""
    return model(tokens[None], use_cache=False).logits[0].float()


def tokens(length: int, seed: int = 0) -> torch.Tensor:
    return torch.randint(VOCAB, (length,), generator=torch.Generator().manual_seed(seed))


@torch.no_grad()
def randomize(model: Any, seed: int) -> None:
    """Every parameter random, on a scale that keeps hidden states and logits near 1."""
    generator = torch.Generator().manual_seed(seed)
    tied = model.config.tie_word_embeddings
    biases = {name: buffer for name, buffer in model.named_buffers() if name.endswith("bias")}  # of routers
    for name, parameter in sorted({**dict(model.named_parameters()), **biases}.items()):
        parameter.copy_(_draw(name, parameter.shape, tied, generator))
        if "norm" in name and model.config.model_type.startswith("gemma"):
            parameter -= 1  # 1 + w is what multiplies; larger ones sharpen attention until float32 is not enough


def _draw(name: str, shape: torch.Size, tied: bool, generator: torch.Generator) -> torch.Tensor:
    def uniform(low: float, high: float) -> torch.Tensor:
        return torch.rand(shape, generator=generator) * (high - low) + low

    normal = torch.randn(shape, generator=generator)
    last = name.rsplit(".", 1)[-1]
    if last == "A_log":
        return uniform(-2.0, 1.0)  # memories from one token to a few tens
    if last == "dt_bias" or name.endswith("dt_proj.bias"):
        return uniform(-2.5, 0.5)
    if last == "D" or last == "bias":
        return 0.5 * normal
    if "norm" in name:
        return uniform(0.5, 1.5)
    if "conv1d" in name or "conv.conv" in name:
        return 0.45 * normal
    if "embed" in name:
        return normal * (shape[-1] ** -0.5 if tied else 1.0)
    return normal * _gain(name) * shape[-1] ** -0.5


def _gain(name: str) -> float:
    """Products of three projections (q·k·v, x·B·C) grow fast: kept small, so that float32 itself stays within 2e-5."""
    if "router" in name or "gate.weight" in name:
        return 2.0  # decided experts, so that the choice is not a coin toss
    return 0.7 if any(part in name for part in ("q_proj", "k_proj", "in_proj", "x_proj")) else 1.0


# -- the same model, spelled or stored otherwise ---------------------------------------------------


def copy(folder: Path, out: Path) -> Path:
    return Path(shutil.copytree(folder, out))


def edit_config(folder: Path, change: Callable[[dict[str, Any]], None]) -> None:
    path = folder / "config.json"
    config = json.loads(path.read_text())
    change(config)
    path.write_text(json.dumps(config))


def edit_tensors(folder: Path, change: Callable[[dict[str, torch.Tensor]], None]) -> None:
    path = folder / "model.safetensors"
    tensors = load_file(path)
    change(tensors)
    save_file({name: tensor.contiguous() for name, tensor in tensors.items()}, path, metadata={"format": "pt"})


def as_published(config: Any) -> Callable[[dict[str, torch.Tensor]], None]:
    """OLMo-Hybrid as on the hub: transformers 5.24 saves convolutions in equal parts, and renames a norm too many."""
    keys = config.linear_num_key_heads * config.linear_key_head_dim
    values = config.linear_num_value_heads * config.linear_value_head_dim

    def change(tensors: dict[str, torch.Tensor]) -> None:
        for i, kind in enumerate(config.layer_types):
            hf = f"model.layers.{i}"
            if kind == "full_attention":
                norm = tensors.pop(f"{hf}.feedforward_layer_norm.weight")
                tensors[f"{hf}.post_attention_layernorm.weight"] = norm
                continue
            names = [f"{hf}.linear_attn.{part}_conv1d.weight" for part in "qkv"]
            whole = torch.cat([tensors[name] for name in names])
            tensors |= dict(zip(names, whole.split([keys, keys, values]), strict=True))

    return change


def spell_old(config: dict[str, Any]) -> None:
    """A config.json as transformers 4.x wrote it: rope_theta and rope_scaling, torch_dtype, no layer types."""
    config["transformers_version"] = "4.57.6"
    config["torch_dtype"] = config.pop("dtype", "float32")
    kinds = config.get("layers_block_type") or config.get("layer_types")
    if config["model_type"] == "nemotron_h":
        letters = {"linear_attention": "M", "full_attention": "*", "mlp": "-", "moe": "E"}
        config["hybrid_override_pattern"] = "".join(letters[kind] for kind in kinds)
        pairs = (("conv_kernel", "mamba_d_conv"), ("n_groups", "mamba_n_groups"), ("head_dim", "attention_head_dim"))
        for new, old in pairs:
            config[old] = config.pop(new)
    if config["model_type"] == "granitemoehybrid":
        config["layers_block_type"] = [{"linear_attention": "mamba"}.get(kind, "attention") for kind in kinds]
        config.pop("layer_types")
    linear = "linear_attention" in config.get("layer_types", [])  # these types were written, and the fraction beside
    if config["model_type"] == "lfm2":  # the words of its first files
        config["full_attn_idxs"] = [i for i, kind in enumerate(config["layer_types"]) if kind == "full_attention"]
        config["block_ff_dim"], config["tie_embedding"] = (
            config.pop("intermediate_size"),
            config.pop("tie_word_embeddings"),
        )
    rope = config.pop("rope_parameters", None)
    if config["model_type"] == "lfm3":  # is younger
        config["rope_parameters"] = rope
        return
    by_kind = rope is not None and "full_attention" in rope  # the theta of windows had a field of its own
    if by_kind:
        config["rope_local_base_freq"] = rope["sliding_attention"]["rope_theta"]
        rope = rope["full_attention"]
    if not (linear or by_kind or config["model_type"] in ("granitemoehybrid", "lfm2_moe")):
        for derived in ("layer_types", "layers_block_type"):
            config.pop(derived, None)
    if rope is not None:
        config["rope_theta"] = rope.pop("rope_theta")
        fraction = rope.pop("partial_rotary_factor", None)
        if linear or config["model_type"] == "phi3":
            config["partial_rotary_factor"] = fraction
        kind = rope.pop("rope_type")
        config["rope_scaling"] = (
            None if kind == "default" else {"type" if kind == "linear" else "rope_type": kind} | rope
        )


def fuse_experts(tensors: dict[str, torch.Tensor]) -> None:
    """The other layout of a mixture of experts, as transformers 5 holds it: one tensor for all, gate above up."""
    first, second, third = (
        ("w1", "w3", "w2") if any(".w1." in name for name in tensors) else ("gate_proj", "up_proj", "down_proj")
    )
    away, home = "block_sparse_moe.", "mlp."  # of Mixtral
    blocks = sorted({name.split("experts.")[0] for name in tensors if "experts." in name})
    assert blocks, "no experts to fuse"
    for block in blocks:
        count = len({name for name in tensors if name.startswith(f"{block}experts.") and f".{third}." in name})
        part = {
            p: [tensors.pop(f"{block}experts.{e}.{p}.weight") for e in range(count)] for p in (first, second, third)
        }
        new = block.replace(away, home)
        tensors[f"{new}experts.gate_up_proj"] = torch.stack(
            [torch.cat([gate, up]) for gate, up in zip(part[first], part[second], strict=True)]
        )
        tensors[f"{new}experts.down_proj"] = torch.stack(part[third])
        if new != block:
            tensors[f"{new}gate.weight"] = tensors.pop(f"{block}gate.weight")


def quiet() -> None:
    """transformers tells at length that kernels for GPUs are missing, and draws progress bars; here neither helps."""
    from transformers.utils import logging

    logging.set_verbosity_error()
    logging.disable_progress_bar()
