"""Which checkpoint is which model: a family reads foreign configs and lists its weights, once, for both directions.

A `TensorMapping` says: this tensor of ours is that tensor of a Hugging Face folder and that one of a GGUF file,
and what happens in between.  Read forwards the rows load a checkpoint, backwards they export it; an unmatched name on
either side is an error.  Multipliers (muP) are part of the rows: ours = theirs × scale on the Hugging Face side,
nothing on the GGUF side, where llama.cpp's converter folds them too.

Forms, what a tensor looks like on the other side (applied in `weights.transforms`):

    conv       (C, K) here, (C, 1, K) there
    column     (H) here, (H, 1) there
    groups     (I) here, (G, I / G) there
    neg_exp    A_log here, A = −exp(A_log) there
    interleave rows of q and k: rotate-half here, neighbouring pairs there (llama.cpp's `llama` architecture)
"""

from __future__ import annotations

from collections.abc import Callable, Iterable, Iterator, Mapping
from dataclasses import dataclass, field
from functools import cached_property
from typing import Any

from tiercel.errors import FormatError, UnsupportedError
from tiercel.feed_forward.gated_mlp.config import GatedMLPConfig
from tiercel.feed_forward.moe.config import MoEConfig
from tiercel.mixers.attention.config import AttentionConfig
from tiercel.mixers.mamba1.config import Mamba1Config
from tiercel.mixers.mamba2.config import Mamba2Config
from tiercel.model.config import ModelConfig

Runs = tuple[tuple[int, float], ...]  # (how many rows, their multiplier), along dim 0


@dataclass(frozen=True)
class Transform:
    """One of the forms above, with the number it needs (groups, heads)."""

    name: str
    n: int = 0


@dataclass(frozen=True)
class TensorMapping:
    """One tensor of ours and its two foreign lives."""

    ours: str
    hf: str | tuple[str, ...]  # a tuple is stacked along a new first axis (experts)
    gguf: str | None
    scale: float | Runs = 1.0  # ours = hf × scale
    hf_form: Transform | None = None
    gguf_forms: tuple[Transform, ...] = ()
    keep_fp32: bool = False  # norms, convolutions, decay: kept wide and never packed
    fused: tuple[str, int, int] | None = None  # transformers 5.x in memory: part k of n along dim 1 of that tensor
    aliases: tuple[str, ...] = ()  # other names the Hugging Face tensor goes by


@dataclass(frozen=True)
class Layout:
    """One checkpoint understood: the network, its weight table, and the config it came with."""

    family: Family
    config: ModelConfig
    table: Iterable[TensorMapping]  # made row by row: a config may promise more layers than its file has
    hf_config: Mapping[str, Any] | None = None

    @cached_property
    def rows(self) -> tuple[TensorMapping, ...]:
        return tuple(self.table)


@dataclass(frozen=True)
class Family:
    """read/table: Hugging Face side.  The GGUF side is optional; `limits` says why a config cannot go there."""

    name: str
    model_types: tuple[str, ...]
    read: Callable[[Mapping[str, Any]], tuple[ModelConfig, Iterable[TensorMapping]]]
    gguf: str | None = None  # llama.cpp's architecture name
    read_gguf: Callable[[Mapping[str, Any], Mapping[str, Any]], tuple[ModelConfig, Iterable[TensorMapping]]] | None = (
        None
    )
    write_gguf: Callable[[ModelConfig], dict[str, Any]] | None = None
    write: Callable[[ModelConfig], dict[str, Any]] | None = None
    limits: Callable[[ModelConfig], Iterable[str]] = field(default=lambda config: ())

    def layout(self, hf_config: Mapping[str, Any]) -> Layout:
        config, rows = self.read(hf_config)
        return Layout(self, config, rows, hf_config)

    def gguf_layout(self, metadata: Mapping[str, Any], tensors: Mapping[str, Any]) -> Layout:
        assert self.read_gguf is not None
        config, rows = self.read_gguf(metadata, tensors)
        return Layout(self, config, rows)


# ── rows that several families share ─────────────────────────────────────────────────────────────────────


def top_rows(
    config: ModelConfig, *, embed: str, norm: str, embed_scale: float = 1.0, head_scale: float = 1.0
) -> Iterator[TensorMapping]:
    """Embedding, final norm, output projection (none when tied)."""
    yield TensorMapping("embed.weight", embed, "token_embd.weight", scale=embed_scale)
    yield TensorMapping("norm.weight", norm, "output_norm.weight", keep_fp32=True)
    if not config.tied:
        yield TensorMapping("head.weight", "lm_head.weight", "output.weight", scale=head_scale)


def norm_rows(i: int, hf_mixer: str, hf_ffn: str | None, gguf_ffn: str = "ffn_norm.weight") -> Iterator[TensorMapping]:
    yield TensorMapping(f"layers.{i}.mixer_norm.weight", hf_mixer, f"blk.{i}.attn_norm.weight", keep_fp32=True)
    if hf_ffn is not None:
        yield TensorMapping(f"layers.{i}.ffn_norm.weight", hf_ffn, f"blk.{i}.{gguf_ffn}", keep_fp32=True)


def attention_rows(
    i: int, c: AttentionConfig, hf: str, *, into: float = 1.0, key: float = 1.0, out: float = 1.0, pairs: bool = False
) -> Iterator[TensorMapping]:
    """q, k, v, o under `hf`.  into, key, out: Falcon-H1's multipliers; pairs: GGUF keeps q and k interleaved."""
    ours = f"layers.{i}.mixers.attention"
    for name, gguf, heads, scale in (
        ("q", "attn_q", c.heads, 1.0),
        ("k", "attn_k", c.kv_heads, key),
        ("v", "attn_v", 0, 1.0),
    ):
        transforms = (Transform("interleave", heads),) if pairs and heads else ()
        yield TensorMapping(
            f"{ours}.{name}.weight",
            f"{hf}.{name}_proj.weight",
            f"blk.{i}.{gguf}.weight",
            into * scale,
            gguf_forms=transforms,
        )
        if c.qkv_bias:
            yield TensorMapping(
                f"{ours}.{name}.bias", f"{hf}.{name}_proj.bias", f"blk.{i}.{gguf}.bias", scale, gguf_forms=transforms
            )
    yield TensorMapping(f"{ours}.o.weight", f"{hf}.o_proj.weight", f"blk.{i}.attn_output.weight", out)
    if c.out_bias:
        yield TensorMapping(f"{ours}.o.bias", f"{hf}.o_proj.bias", f"blk.{i}.attn_output.bias", out)


def mamba1_rows(i: int, c: Mamba1Config, hf: str) -> Iterator[TensorMapping]:
    ours, gguf = f"layers.{i}.mixers.mamba1", f"blk.{i}"
    yield TensorMapping(f"{ours}.in_proj.weight", f"{hf}.in_proj.weight", f"{gguf}.ssm_in.weight")
    yield TensorMapping(
        f"{ours}.conv", f"{hf}.conv1d.weight", f"{gguf}.ssm_conv1d.weight", hf_form=Transform("conv"), keep_fp32=True
    )
    if c.conv_bias:
        yield TensorMapping(f"{ours}.conv_bias", f"{hf}.conv1d.bias", f"{gguf}.ssm_conv1d.bias", keep_fp32=True)
    yield TensorMapping(f"{ours}.x_proj.weight", f"{hf}.x_proj.weight", f"{gguf}.ssm_x.weight")
    yield TensorMapping(f"{ours}.dt.weight", f"{hf}.dt_proj.weight", f"{gguf}.ssm_dt.weight")
    yield TensorMapping(f"{ours}.dt_bias", f"{hf}.dt_proj.bias", f"{gguf}.ssm_dt.bias", keep_fp32=True)
    yield TensorMapping(
        f"{ours}.A_log", f"{hf}.A_log", f"{gguf}.ssm_a", gguf_forms=(Transform("neg_exp"),), keep_fp32=True
    )
    yield TensorMapping(f"{ours}.D", f"{hf}.D", f"{gguf}.ssm_d", keep_fp32=True)
    if c.inner_norms:
        for name in ("dt", "B", "C"):
            theirs = name.lower()
            yield TensorMapping(
                f"{ours}.{name}_norm.weight",
                f"{hf}.{theirs}_layernorm.weight",
                f"{gguf}.ssm_{theirs}_norm.weight",
                keep_fp32=True,
            )
    yield TensorMapping(f"{ours}.out_proj.weight", f"{hf}.out_proj.weight", f"{gguf}.ssm_out.weight")
    if c.proj_bias:
        yield TensorMapping(f"{ours}.in_proj.bias", f"{hf}.in_proj.bias", None)
        yield TensorMapping(f"{ours}.out_proj.bias", f"{hf}.out_proj.bias", None)


def mamba2_rows(
    i: int, c: Mamba2Config, hf: str, *, into: float = 1.0, parts: Iterable[float] = (1.0,) * 5, out: float = 1.0
) -> Iterator[TensorMapping]:
    """parts: Falcon-H1's multipliers of z, x, B, C and dt; the bias of in_proj is scaled by them but not by `into`."""
    ours, gguf = f"layers.{i}.mixers.mamba2", f"blk.{i}"
    GN = c.groups * c.state
    runs = tuple(zip((c.inner, c.inner, GN, GN, c.heads), parts, strict=True))
    yield TensorMapping(f"{ours}.in_proj.weight", f"{hf}.in_proj.weight", f"{gguf}.ssm_in.weight", _runs(runs, into))
    if c.in_bias:
        yield TensorMapping(f"{ours}.in_proj.bias", f"{hf}.in_proj.bias", None, _runs(runs, 1.0))
    yield TensorMapping(
        f"{ours}.conv", f"{hf}.conv1d.weight", f"{gguf}.ssm_conv1d.weight", hf_form=Transform("conv"), keep_fp32=True
    )
    if c.conv_bias:
        yield TensorMapping(f"{ours}.conv_bias", f"{hf}.conv1d.bias", f"{gguf}.ssm_conv1d.bias", keep_fp32=True)
    yield TensorMapping(f"{ours}.dt_bias", f"{hf}.dt_bias", f"{gguf}.ssm_dt.bias", keep_fp32=True)
    column = Transform("column")
    yield TensorMapping(
        f"{ours}.A_log", f"{hf}.A_log", f"{gguf}.ssm_a", gguf_forms=(Transform("neg_exp"), column), keep_fp32=True
    )
    yield TensorMapping(f"{ours}.D", f"{hf}.D", f"{gguf}.ssm_d", gguf_forms=(column,), keep_fp32=True)
    if c.gated_norm != "none":
        transforms = (Transform("groups", c.groups),)
        yield TensorMapping(
            f"{ours}.out_norm", f"{hf}.norm.weight", f"{gguf}.ssm_norm.weight", gguf_forms=transforms, keep_fp32=True
        )
    yield TensorMapping(f"{ours}.out_proj.weight", f"{hf}.out_proj.weight", f"{gguf}.ssm_out.weight", out)
    if c.out_bias:
        yield TensorMapping(f"{ours}.out_proj.bias", f"{hf}.out_proj.bias", None, out)


def _runs(runs: Runs, factor: float) -> float | Runs:
    """Runs times a factor; a single number where all are equal."""
    scaled = tuple((count, scale * factor) for count, scale in runs)
    return scaled if len({scale for _, scale in scaled}) > 1 else scaled[0][1]


def mlp_rows(i: int, c: GatedMLPConfig, hf: str, *, gate: float = 1.0, down: float = 1.0) -> Iterator[TensorMapping]:
    for name, scale in (("gate", gate), ("up", 1.0), ("down", down)):
        ours, gguf = f"layers.{i}.feed_forward.{name}", f"blk.{i}.ffn_{name}"
        yield TensorMapping(f"{ours}.weight", f"{hf}.{name}_proj.weight", f"{gguf}.weight", scale)
        if c.bias:
            yield TensorMapping(f"{ours}.bias", f"{hf}.{name}_proj.bias", f"{gguf}.bias", scale)


def moe_rows(
    i: int, c: MoEConfig, hf: str, *, router: str, names: tuple[str, str, str], fused: str
) -> Iterator[TensorMapping]:
    """names: what an expert calls gate, up and down; fused: where transformers 5.x keeps them all."""
    ours, gguf = f"layers.{i}.feed_forward", f"blk.{i}"
    other = f"{fused.removesuffix('.experts')}.{router.rpartition('.')[2]}.weight"
    yield TensorMapping(
        f"{ours}.router.weight", f"{router}.weight", f"{gguf}.ffn_gate_inp.weight", keep_fp32=True, aliases=(other,)
    )
    places = {
        "gate": (f"{fused}.gate_up_proj", 0, 2),
        "up": (f"{fused}.gate_up_proj", 1, 2),
        "down": (f"{fused}.down_proj", 0, 1),
    }
    for name, theirs in zip(("gate", "up", "down"), names, strict=True):
        experts = tuple(f"{hf}.{e}.{theirs}.weight" for e in range(c.experts))
        yield TensorMapping(f"{ours}.{name}", experts, f"{gguf}.ffn_{name}_exps.weight", fused=places[name])


# ── GGUF metadata that several families share ────────────────────────────────────────────────────────────


class Metadata:
    """Typed access to the keys of one architecture; FormatError names the key."""

    def __init__(self, metadata: Mapping[str, Any], arch: str) -> None:
        self.metadata, self.arch = metadata, arch

    def _get(self, key: str, default: Any) -> Any:
        value = self.metadata.get(f"{self.arch}.{key}", default)
        if value is None:
            raise FormatError(f"GGUF metadata: the key {self.arch}.{key} is missing")
        return value

    def size(self, key: str, default: int | None = None) -> int:
        value = self._get(key, default)
        if type(value) is not int or not 0 < value < 1 << 31:
            raise FormatError(f"GGUF metadata: {self.arch}.{key} must be a whole number from 1, not {value!r:.60}")
        return value

    def number(self, key: str, default: float | None = None) -> float:
        value = self._get(key, default)
        if not isinstance(value, (int, float)) or isinstance(value, bool) or not abs(value) < 1e300:
            raise FormatError(f"GGUF metadata: {self.arch}.{key} must be a finite number, not {value!r:.60}")
        return float(value)

    def sizes(self, key: str, length: int) -> list[int]:
        """One number for all layers, or a list with one for each (zero allowed)."""
        value = self._get(key, None)
        values = value if isinstance(value, list) else [value] * length
        if len(values) != length or not all(type(v) is int and 0 <= v < 1 << 31 for v in values):
            raise FormatError(f"GGUF metadata: {self.arch}.{key} must give {length} layers a whole number each")
        return values

    def layers(self) -> int:
        count = self.size("block_count")
        if count > 100_000:
            raise FormatError(f"GGUF metadata: {count} layers are more than any model has")
        return count


def tensor_shape(tensors: Mapping[str, Any], name: str) -> tuple[int, ...]:
    if name not in tensors:
        raise FormatError(f"the GGUF file has no tensor {name!r}")
    return tuple(tensors[name].shape)


def refuse(reasons: Iterable[str], what: str) -> None:
    """Raise UnsupportedError with the first reason, if there is one."""
    for reason in reasons:
        raise UnsupportedError(f"{what}: {reason}")
