"""Which checkpoint is which model: a family reads foreign configs and lists its weights, once, for both directions.

A `TensorMapping` says: this tensor of ours is that tensor of a Hugging Face folder and that one of a GGUF file,
and what happens in between.  Read forwards the rows load a checkpoint, backwards they export it; an unmatched name on
either side is an error.  Multipliers (muP) are part of the rows: ours = theirs × scale on the Hugging Face side,
nothing on the GGUF side, where llama.cpp's converter folds them too.

What a tensor looks like on the other side is a `mixers.spec.Transform` (applied in `weights.transforms`).
"""

from __future__ import annotations

from collections.abc import Callable, Iterable, Iterator, Mapping, Sequence
from dataclasses import dataclass, field
from functools import cached_property
from types import MappingProxyType
from typing import Any

from tiercel.errors import FormatError, UnsupportedError
from tiercel.mixers.attention.config import AttentionConfig
from tiercel.mixers.checks import MAX_LAYERS
from tiercel.mixers.spec import MixerSpec, ModuleSpec, Param, Transform
from tiercel.model.config import ModelConfig

_NOTHING: Mapping[str, Any] = MappingProxyType({})
Runs = tuple[tuple[int, float], ...]  # (how many rows, their multiplier), along dim 0


@dataclass(frozen=True)
class TensorMapping:
    """One tensor: our name, and its names in a Hugging Face folder and in a GGUF file."""

    ours: str
    hf: str | tuple[str, ...]  # a tuple is stacked along a new first axis (experts); with hf_rows: see there
    gguf: str | None
    scale: float | Runs = 1.0  # ours = hf × scale
    hf_form: Transform | None = None
    gguf_forms: tuple[Transform, ...] = ()
    keep_fp32: bool = False  # norms, convolutions, decays: at least float32, never packed
    fused: tuple[str, int, int] | None = (
        None  # part k of n along dim 1 of that tensor: in files too where hf is one name
    )
    aliases: tuple[str | tuple[str, ...], ...] = ()  # other names the Hugging Face tensor goes by
    hf_rows: tuple[int, ...] = ()  # the tensors of `hf` lie one below the other, of this many rows each
    hf_order: Transform | None = None  # heads change places, before `hf_form`

    @property
    def names(self) -> tuple[str, ...]:
        """All names of the Hugging Face tensor where it is one."""
        return tuple(name for name in (self.hf, *self.aliases) if isinstance(name, str))

    @property
    def hf_forms(self) -> tuple[Transform, ...]:
        """From ours to the Hugging Face tensor."""
        return tuple(form for form in (self.hf_order, self.hf_form) if form is not None)


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
    more_gguf: tuple[str, ...] = ()  # others that this family reads
    gguf_of: Callable[[ModelConfig], str] | None = None  # which of them a network is written as
    gguf_scales: bool = False  # its metadata hold the scales of `ModelConfig`
    read_gguf: Callable[[Mapping[str, Any], Mapping[str, Any]], tuple[ModelConfig, Iterable[TensorMapping]]] | None = (
        None
    )
    write_gguf: Callable[[ModelConfig], dict[str, Any]] | None = None
    write: Callable[[ModelConfig], dict[str, Any]] | None = None
    limits: Callable[[ModelConfig], Iterable[str]] = field(default=lambda config: ())
    left_out: tuple[str, ...] = ()  # prefixes of tensors in a folder that are no part of the text model

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


Scales = Mapping[str, "float | Sequence[float]"]  # a sequence: of `Param.parts`, one each


def module_rows(
    i: int,
    spec: ModuleSpec,
    width: int,
    hf: str,
    *,
    names: Mapping[str, str | tuple[str, ...]] = _NOTHING,
    scales: Scales = _NOTHING,
    gguf_forms: Mapping[str, tuple[Transform, ...]] = _NOTHING,
    fused: Mapping[str, tuple[str, int, int]] = _NOTHING,
    aliases: Mapping[str, tuple[str | tuple[str, ...], ...]] = _NOTHING,
    hf_forms: Mapping[str, Transform] = _NOTHING,
    orders: Mapping[str, Transform] = _NOTHING,
) -> Iterator[TensorMapping]:
    """The rows of one mixer or feed-forward of layer i, from its `params`.

    hf: what its tensors' names begin with in a folder.  The other tables go by `Param.name`:
    names: below `hf`, where they differ from `Param.hf`; a tuple: one for each of `Param.parts`
    scales: multipliers, ours = theirs × scale
    gguf_forms: more changes of form on the way to GGUF
    fused, aliases, orders: as in `TensorMapping`
    hf_forms: changes of form in a folder, where they differ from `Param.hf_form`
    """
    part = f"mixers.{spec.kind}" if isinstance(spec, MixerSpec) else "feed_forward"
    for p in spec.params(width):
        name = names.get(p.name, p.hf)
        theirs: str | tuple[str, ...] = f"{hf}.{name}" if isinstance(name, str) else tuple(f"{hf}.{n}" for n in name)
        if "{e}" in name:
            theirs = tuple(f"{hf}.{name}".format(e=e) for e in range(p.shape[0]))
        yield TensorMapping(
            f"layers.{i}.{part}.{p.name}",
            theirs,
            None if p.gguf is None else f"blk.{i}.{p.gguf}",
            _scale(p, scales.get(p.name, 1.0)),
            hf_forms.get(p.name, p.hf_form),
            p.gguf_forms + gguf_forms.get(p.name, ()),
            p.keep_fp32,
            fused.get(p.name),
            aliases.get(p.name, ()),
            () if isinstance(name, str) else p.parts,
            orders.get(p.name),
        )


def _scale(param: Param, scale: float | Sequence[float]) -> float | Runs:
    """One number where all runs have the same."""
    if isinstance(scale, (int, float)):
        return scale
    return tuple(zip(param.parts, scale, strict=True)) if len(set(scale)) > 1 else scale[0]


def paired(heads: int, kv_heads: int) -> dict[str, tuple[Transform, ...]]:
    """gguf_forms of attention whose q and k rows GGUF keeps in neighbouring pairs (architecture `llama`)."""
    forms = {"q": (Transform("interleave", heads),), "k": (Transform("interleave", kv_heads),)}
    return {f"{name}.{leaf}": form for name, form in forms.items() for leaf in ("weight", "bias")}


def joined(sizes: Mapping[str, int]) -> dict[str, Transform]:
    """hf_forms of matrices that a file keeps in one tensor, one below the other; sizes: how their rows compare."""
    of_all = tuple(sizes.values())
    return {f"{name}.weight": Transform("runs", 1, of_all, (part,)) for part, name in enumerate(sizes)}


def fused_experts(hf: str) -> dict[str, tuple[str, int, int]]:
    """Where transformers 5.x keeps all experts under `hf`: gate above up in one tensor."""
    both = f"{hf}.gate_up_proj"
    return {"gate": (both, 0, 2), "up": (both, 1, 2), "down": (f"{hf}.down_proj", 0, 1)}


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
        if count > MAX_LAYERS:
            raise FormatError(f"GGUF metadata: block_count must be 1 to {MAX_LAYERS}, not {count}")
        return count


def kv_heads(config: ModelConfig) -> list[int]:
    """Key heads of every layer, 0 without attention."""
    found = ((part.kv_heads for part in layer.parts if isinstance(part, AttentionConfig)) for layer in config.layers)
    return [next(of_layer, 0) for of_layer in found]


def gguf_sizes(
    config: ModelConfig,
    attention: AttentionConfig,
    feed_forward: int | None,
    *,
    kv_by_layer: bool = False,
    head_sizes: bool = True,
) -> dict[str, Any]:
    """The sizes that llama.cpp asks of every architecture with attention, and the norms' epsilon.

    feed_forward: its width; None: it is written elsewhere
    kv_by_layer: some layers have none
    head_sizes: not where llama.cpp takes them from width and heads
    """
    out: dict[str, Any] = {
        "block_count": len(config.layers),
        "context_length": config.max_length,
        "embedding_length": config.width,
    }
    if feed_forward is not None:
        out["feed_forward_length"] = feed_forward
    out |= {
        "attention.head_count": attention.heads,
        "attention.head_count_kv": kv_heads(config) if kv_by_layer else attention.kv_heads,
    }
    if head_sizes:
        out |= {"attention.key_length": attention.head_dim, "attention.value_length": attention.head_dim}
    return out | {"attention.layer_norm_rms_epsilon": config.norm_eps}


def tensor_shape(tensors: Mapping[str, Any], name: str) -> tuple[int, ...]:
    if name not in tensors:
        raise FormatError(f"the GGUF file has no tensor {name!r}")
    return tuple(tensors[name].shape)


def refuse(reasons: Iterable[str], what: str) -> None:
    """Raise UnsupportedError with the first reason, if there is one."""
    for reason in reasons:
        raise UnsupportedError(f"{what}: {reason}")
