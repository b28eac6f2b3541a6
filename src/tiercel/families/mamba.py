"""Mamba, Falcon-Mamba and Mamba-2 on their own: one mixer a layer, no feed-forward, a constant memory.

transformers `modeling_mamba.py`, `modeling_falcon_mamba.py`, `modeling_mamba2.py`.  Falcon-Mamba is Mamba with RMS
norms without weights on dt, B and C; llama.cpp gives them the model's epsilon, transformers one of their own.  Two
spellings of the folder exist for each tensor name (`backbone.embedding.weight` in checkpoints of state-spaces/mamba,
`backbone.embeddings.weight` in transformers).
"""

from __future__ import annotations

import math
from collections.abc import Iterable, Iterator, Mapping
from dataclasses import replace
from typing import Any

from tiercel.errors import FormatError
from tiercel.families.falcon_h1 import mamba2_limits, read_gguf_mamba2, write_gguf_mamba2
from tiercel.families.family import (
    Family,
    Metadata,
    TensorMapping,
    module_rows,
    norm_rows,
    tensor_shape,
    top_rows,
)
from tiercel.families.fields import Fields
from tiercel.mixers.mamba1.config import Mamba1Config
from tiercel.mixers.mamba2.config import Mamba2Config
from tiercel.model.config import LayerConfig, ModelConfig

NORM_EPS = "ssm.dt_b_c_rms_eps"  # ours: llama.cpp has no key for it and takes the model's
CONTEXT = 1 << 20  # nothing in these models ends at a length; llama.cpp writes the same number


def read(hf_config: Mapping[str, Any]) -> tuple[ModelConfig, Iterable[TensorMapping]]:
    f = Fields(dict(hf_config))
    width = f.size("hidden_size")
    bias, conv_bias = f.flag("use_bias", False), f.flag("use_conv_bias", True)
    inner = int(f.number("expand", 2.0, positive=True) * width)
    kernel = f.size("conv_kernel", 4, largest=256)
    f.only("hidden_act", "silu", "swish")
    mixer: Mamba1Config | Mamba2Config
    kind = f.data.get("model_type")
    if kind in ("mamba", "falcon_mamba"):
        falcon = kind == "falcon_mamba"
        inner = f.size("intermediate_size", inner)
        auto = f.data.get("time_step_rank", "auto") == "auto"
        mixer = Mamba1Config(
            inner=inner,
            state=f.size("state_size", 16),
            conv=kernel,
            dt_rank=math.ceil(width / 16) if auto else f.size("time_step_rank"),
            conv_bias=conv_bias,
            proj_bias=bias,
            inner_norms=falcon,
            norm_weights=not falcon,
            norm_eps=f.number("mixer_rms_eps", 1e-6) if falcon else None,
        )
    else:
        mixer = Mamba2Config(
            heads=f.size("num_heads", 128),
            head_dim=f.size("head_dim", 64),
            state=f.size("state_size", 128),
            groups=f.size("n_groups", 8),
            conv=kernel,
            conv_bias=conv_bias,
            in_bias=bias,
            out_bias=bias,
            dt_limit=f.limits("time_step_limit"),
            chunk=f.size("chunk_size", 256, largest=65536),
        )
        if mixer.inner != inner:
            raise FormatError(f"{f.where}: num_heads × head_dim = {mixer.inner} must be expand × hidden_size = {inner}")
    config = ModelConfig(
        vocab_size=f.size("vocab_size"),
        width=width,
        layers=(LayerConfig(mixers=(mixer,)),) * f.layers(),
        norm_eps=f.number("layer_norm_epsilon", 1e-5),
        tied=f.flag("tie_word_embeddings", kind in ("mamba", "falcon_mamba")),
        residual_fp32=f.flag("residual_in_fp32", True),
        max_length=f.size("max_position_embeddings", CONTEXT),
    )
    f.ignore("time_step_rank", "time_step_scale", "time_step_min", "time_step_max", "time_step_floor")
    f.ignore("time_step_init_scheme", "d_model", "d_inner", "n_layer", "ssm_cfg", "fused_add_norm", "intermediate_size")
    f.ignore("pad_vocab_size_multiple", "layer_types", "norm_before_gate")  # transformers gates first whatever it says
    f.only("rms_norm", True)
    f.done()
    return config, rows(config)


def rows(config: ModelConfig) -> Iterator[TensorMapping]:
    for row in top_rows(config, embed="backbone.embeddings.weight", norm="backbone.norm_f.weight"):
        yield replace(row, aliases=("backbone.embedding.weight",)) if row.ours == "embed.weight" else row
    for i, layer in enumerate(config.layers):
        hf = f"backbone.layers.{i}"
        yield from norm_rows(i, f"{hf}.norm.weight", None)
        yield from module_rows(i, layer.mixers[0], config.width, f"{hf}.mixer")


def read_gguf(metadata: Mapping[str, Any], tensors: Mapping[str, Any]) -> tuple[ModelConfig, Iterable[TensorMapping]]:
    m = Metadata(metadata, metadata["general.architecture"])
    mixer = read_gguf_mamba2(m, tensors) if m.arch == "mamba2" else read_gguf_mamba1(m, tensors)
    config = ModelConfig(
        vocab_size=tensor_shape(tensors, "token_embd.weight")[0],
        width=m.size("embedding_length"),
        layers=(LayerConfig(mixers=(mixer,)),) * m.layers(),
        norm_eps=m.number("attention.layer_norm_rms_epsilon"),
        tied="output.weight" not in tensors,
        residual_fp32=True,
        max_length=m.size("context_length", CONTEXT),
    )
    return config, rows(config)


def read_gguf_mamba1(
    m: Metadata, tensors: Mapping[str, Any], *, inner_norms: bool = False, layer: int = 0
) -> Mamba1Config:
    falcon = bool(m.metadata.get(f"{m.arch}.ssm.dt_b_c_rms"))
    return Mamba1Config(
        inner=m.size("ssm.inner_size"),
        state=m.size("ssm.state_size"),
        conv=m.size("ssm.conv_kernel"),
        dt_rank=m.size("ssm.time_step_rank"),
        conv_bias=f"blk.{layer}.ssm_conv1d.bias" in tensors,
        inner_norms=inner_norms or falcon,
        norm_weights=not falcon,
        norm_eps=m.number(NORM_EPS) if f"{m.arch}.{NORM_EPS}" in m.metadata else None,
    )


def write_gguf_mamba1(c: Mamba1Config) -> dict[str, Any]:
    return (
        {
            "ssm.conv_kernel": c.conv,
            "ssm.inner_size": c.inner,
            "ssm.state_size": c.state,
            "ssm.time_step_rank": c.dt_rank,
        }
        | ({} if c.norm_weights else {"ssm.dt_b_c_rms": True})
        | ({} if c.norm_eps is None else {NORM_EPS: c.norm_eps})
    )


def write_gguf(config: ModelConfig) -> dict[str, Any]:
    mixer = config.layers[0].mixers[0]
    assert isinstance(mixer, Mamba1Config | Mamba2Config)
    keys = write_gguf_mamba1(mixer) if isinstance(mixer, Mamba1Config) else write_gguf_mamba2(mixer)
    return keys | {
        "block_count": len(config.layers),
        "context_length": config.max_length,
        "embedding_length": config.width,
        "feed_forward_length": 0,  # unused; llama.cpp asks for it
        "attention.head_count": 0,  # likewise
        "attention.layer_norm_rms_epsilon": config.norm_eps,
    }


def mamba1_limits(c: Mamba1Config, width: int) -> Iterator[str]:
    if c.inner != 2 * width:
        yield "llama.cpp needs an expansion of 2 in Mamba-1"
    if c.proj_bias:
        yield "llama.cpp has no biases on the Mamba-1 projections"
    if not c.conv_bias:
        yield "llama.cpp needs a convolution bias in Mamba-1"


def limits(config: ModelConfig) -> Iterator[str]:
    mixer = config.layers[0].mixers[0]
    if isinstance(mixer, Mamba1Config):
        yield from mamba1_limits(mixer, config.width)
    else:
        assert isinstance(mixer, Mamba2Config)
        yield from mamba2_limits(mixer)
        if not mixer.conv_bias:
            yield "llama.cpp needs a convolution bias in Mamba-2"


def write(config: ModelConfig) -> dict[str, Any]:
    """A config.json for a network that came from a GGUF file."""
    c = config.layers[0].mixers[0]
    assert isinstance(c, Mamba1Config | Mamba2Config)
    out: dict[str, Any] = {
        "vocab_size": config.vocab_size,
        "hidden_size": config.width,
        "num_hidden_layers": len(config.layers),
        "layer_norm_epsilon": config.norm_eps,
        "tie_word_embeddings": config.tied,
        "residual_in_fp32": config.residual_fp32,
        "conv_kernel": c.conv,
        "state_size": c.state,
        "expand": c.inner / config.width,
        "use_conv_bias": c.conv_bias,
    }
    if out["expand"].is_integer():
        out["expand"] = int(out["expand"])
    if isinstance(c, Mamba1Config):
        names: dict[str, Any] = {"architectures": ["MambaForCausalLM"], "model_type": "mamba"}
        if not c.norm_weights:
            names = {"architectures": ["FalconMambaForCausalLM"], "model_type": "falcon_mamba"}
            out["mixer_rms_eps"] = config.norm_eps if c.norm_eps is None else c.norm_eps
        return out | names | {"intermediate_size": c.inner, "time_step_rank": c.dt_rank, "use_bias": c.proj_bias}
    assert isinstance(c, Mamba2Config)
    names = {"architectures": ["Mamba2ForCausalLM"], "model_type": "mamba2", "chunk_size": c.chunk}
    return out | names | {"num_heads": c.heads, "head_dim": c.head_dim, "n_groups": c.groups, "use_bias": c.in_bias}


MAMBA = Family(
    "mamba", ("mamba", "falcon_mamba"), read, gguf="mamba", read_gguf=read_gguf, write_gguf=write_gguf, write=write,
    limits=limits,
)  # fmt: skip
MAMBA2 = Family(
    "mamba2", ("mamba2",), read, gguf="mamba2", read_gguf=read_gguf, write_gguf=write_gguf, write=write, limits=limits
)
