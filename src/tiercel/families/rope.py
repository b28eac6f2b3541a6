"""Rotary settings in the spellings of configs and of GGUF metadata.

Hugging Face 5.x: `rope_parameters` {rope_type, rope_theta, factor, …}.  4.x: `rope_theta` beside `rope_scaling`
{type or rope_type, factor, …}.  GGUF: `rope.freq_base`, `rope.scaling.*`, and the tensor `rope_freqs.weight` with
the divisors that llama3 scaling amounts to.
"""

from __future__ import annotations

import math
from collections.abc import Mapping, Sequence
from typing import Any

from tiercel.errors import FormatError, UnsupportedError
from tiercel.families.family import Metadata
from tiercel.families.fields import Fields
from tiercel.mixers.attention.rope import RopeConfig

TYPES = {name: name for name in ("none", "linear", "dynamic", "llama3", "yarn", "longrope", "proportional")}
TYPES |= {"default": "none", "su": "longrope"}
LONGROPE = "rope_factors_short.weight", "rope_factors_long.weight"  # tensors of divisors in GGUF
GGUF_ROPE_KEYS = frozenset(
    "dimension_count freq_base scale_linear scaling.type scaling.factor scaling.attn_factor scaling.finetuned "
    "scaling.original_context_length scaling.yarn_ext_factor scaling.yarn_attn_factor scaling.yarn_beta_fast "
    "scaling.yarn_beta_slow".split()
)


def read_rope(f: Fields, *, theta: float, max_length: int, fraction: float = 1.0) -> RopeConfig:
    """theta and fraction: what this family uses where the file is silent."""
    base = f.number("rope_theta", theta, positive=True)
    fraction = f.number("partial_rotary_factor", fraction, positive=True)
    original = f.size("original_max_position_embeddings", max_length)
    new, old = f.table("rope_parameters"), f.table("rope_scaling")
    r = old if old is not None and old.data else new
    if new is not None and old is not None and old.data and "rope_theta" not in old.data:
        # transformers 5 takes rope_scaling and drops the other table, whose theta may be the only one
        said = new.number("rope_theta", base, positive=True)
        if said != base:
            raise UnsupportedError(
                f"{f.where}: rope_parameters says rope_theta {said:g} and rope_scaling replaces it without one: "
                "put rope_theta into rope_scaling"
            )
    if r is None:
        return RopeConfig(theta=base, fraction=fraction)
    r.seen.update(("type", "rope_type"))
    name = r.data.get("rope_type", r.data.get("type", "default"))
    if not isinstance(name, str) or name not in TYPES:
        raise UnsupportedError(f"{r.where}: rope type {name!r:.60} is not supported; known: {', '.join(TYPES)}")
    kind = TYPES[name]
    base = r.number("rope_theta", base, positive=True)
    fraction = r.number("partial_rotary_factor", fraction, positive=True)
    original = r.size("original_max_position_embeddings", original)
    scaling: dict[str, Any] = {}
    if kind != "none":
        scaling = {"scaling": kind, "original_length": original}
    if kind in ("linear", "dynamic", "llama3", "yarn"):
        scaling["factor"] = r.number("factor", positive=True)
    if kind == "proportional":
        scaling["factor"] = r.number("factor", 1.0, positive=True)
    if kind == "llama3":
        scaling["low_freq_factor"] = r.number("low_freq_factor", positive=True)
        scaling["high_freq_factor"] = r.number("high_freq_factor", positive=True)
        if scaling["high_freq_factor"] <= scaling["low_freq_factor"]:
            raise FormatError(f"{r.where}: high_freq_factor must be above low_freq_factor")
    elif kind == "yarn":
        scaling["beta_fast"] = r.number("beta_fast", 32.0, positive=True)
        scaling["beta_slow"] = r.number("beta_slow", 1.0, positive=True)
        scaling["truncate"] = r.flag("truncate", True)
        for key in ("attention_factor", "mscale", "mscale_all_dim"):
            if r.data.get(key) is not None:
                scaling[key] = r.number(key)
        r.ignore("finetuned", *("attention_factor", "mscale", "mscale_all_dim"))
    elif kind == "longrope":
        scaling |= _longrope(r, original, max_length)
    r.ignore("factor", "finetuned") if kind in ("none", "longrope") else None
    r.done()
    return RopeConfig(theta=base, fraction=fraction, **scaling)


def read_ropes(
    f: Fields, thetas: Mapping[str, float], *, max_length: int, old: Sequence[str] = ()
) -> dict[str, RopeConfig]:
    """A rotary setting for each kind of layer.

    Args:
        thetas: what each kind of layer uses where the file is silent.
        old: where transformers 4 kept the theta of each kind; its `rope_scaling` is that of the first one.
    """
    tables = f.data.get("rope_parameters")
    f.ignore("rope_parameters")
    tables = {} if tables is None else tables
    if not isinstance(tables, dict) or not set(tables) <= set(thetas):
        raise UnsupportedError(f"{f.where}: rope_parameters must be a table for each of {', '.join(thetas)}")
    tables = {kind: dict(Fields(tables.get(kind) or {}, f"{f.where}: {kind}").data) for kind in thetas}
    if old and (scaling := f.table("rope_scaling")) is not None:
        tables[next(iter(thetas))] |= scaling.data
    usual = {kind: f.number(name, thetas[kind], positive=True) for kind, name in zip(thetas, old, strict=False)}
    return {
        kind: read_rope(
            Fields({"rope_parameters": table}, f"{f.where}: {kind}"), theta=usual.get(kind, thetas[kind]),
            max_length=max_length,
        )
        for kind, table in tables.items()
    }  # fmt: skip


def _longrope(r: Fields, original: int, max_length: int) -> dict[str, Any]:
    """The factors for texts up to the original length; see `mixers.attention.rotary`."""
    short = r.numbers("short_factor")
    long = r.numbers("long_factor", ())
    if not short or not all(value > 0 for value in short):
        raise FormatError(f"{r.where}: short_factor must be positive numbers")
    factor = r.number("factor", max_length / original, positive=True)
    grown = math.sqrt(1 + math.log(factor) / math.log(original)) if factor > 1 and original > 1 else 1.0
    return {
        "factors": short,
        "long_factors": long or None,
        "attention_factor": r.number("attention_factor", grown, positive=True),
    }


def fixed_length(rope: RopeConfig | None, max_length: int) -> int:
    """How long a text may be before this scaling would rewrite its past."""
    if rope is not None and rope.scaling in ("dynamic", "longrope") and rope.original_length is not None:
        return min(max_length, rope.original_length)
    return max_length


def write_rope(rope: RopeConfig) -> dict[str, Any]:
    """`rope_theta` and `rope_scaling`, which both generations of transformers read."""
    if rope.factors is not None and rope.scaling != "longrope":
        raise UnsupportedError("rotary divisors from a GGUF file have no place in a Hugging Face config")
    if rope.attention_factor is not None and rope.scaling not in ("yarn", "longrope"):
        raise UnsupportedError("an attention factor without yarn has no place in a Hugging Face config")
    out: dict[str, Any] = {"rope_theta": rope.theta}
    if rope.fraction != 1.0:
        out["partial_rotary_factor"] = rope.fraction
    if rope.scaling != "none":
        scaling: dict[str, Any] = {"rope_type": rope.scaling, "factor": rope.factor}
        if rope.original_length is not None and rope.scaling != "linear":
            scaling["original_max_position_embeddings"] = rope.original_length
        if rope.scaling == "llama3":
            scaling |= {"low_freq_factor": rope.low_freq_factor, "high_freq_factor": rope.high_freq_factor}
        if rope.scaling == "yarn":
            scaling |= {"beta_fast": rope.beta_fast, "beta_slow": rope.beta_slow}
            if rope.attention_factor is not None:
                scaling["attention_factor"] = rope.attention_factor
        if rope.scaling == "longrope":
            factors = rope.factors or ()
            scaling |= {"short_factor": [*factors], "long_factor": [*(rope.long_factors or factors)]}
            scaling["attention_factor"] = rope.attention_factor or 1.0
        out["rope_scaling"] = scaling
    return out


def read_gguf_rope(
    m: Metadata, tensors: Mapping[str, Any], head_dim: int, *, theta: float = 10_000.0, ignored: Sequence[str] = ()
) -> RopeConfig:
    """The `rope.*` keys, as llama.cpp's `load_hparams` and `llama_context` read them (commit 0c1e570).

    No type is linear; no factor is `rope.scale_linear`, and without that 1; yarn's original length is the context
    length; attn_factor multiplies cos and sin.  ignored: more keys, which do not matter in this architecture.

    Raises:
        UnsupportedError: a key or a value that has no equal here, by name.
    """
    rotated = m.size("rope.dimension_count", head_dim)
    if rotated > head_dim:
        raise FormatError(f"GGUF metadata: {rotated} rotated dims of a head of {head_dim}")
    prefix = f"{m.arch}.rope."
    known = GGUF_ROPE_KEYS.union(ignored)
    unknown = [key for key in m.metadata if key.startswith(prefix) and key.removeprefix(prefix) not in known]
    if unknown:
        raise UnsupportedError(f"GGUF metadata: {unknown[0]:.80} = {m.metadata[unknown[0]]!r:.40} is not supported")
    kind = m.metadata.get(f"{prefix}scaling.type", "linear")
    if kind not in ("none", "linear", "yarn"):
        raise UnsupportedError(f"GGUF metadata: rope scaling {kind!r:.60} is not supported; known: none, linear, yarn")
    key = "rope.scaling.factor" if f"{prefix}scaling.factor" in m.metadata else "rope.scale_linear"
    factor = m.number(key, 0.0) or 1.0  # zero is none
    if factor < 0:
        raise FormatError(f"GGUF metadata: {prefix}scaling.factor must be positive, not {factor!r:.40}")
    for key, usual in ("yarn_ext_factor", 1.0 if kind == "yarn" else 0.0), ("yarn_attn_factor", 1.0):
        if (value := m.number(f"rope.scaling.{key}", usual)) not in (usual, -1.0):
            raise UnsupportedError(f"GGUF metadata: {prefix}scaling.{key} = {value:g} is not supported, only {usual:g}")
    scaling: dict[str, Any] = {}
    if kind != "none" and factor != 1.0:
        scaling = {"scaling": kind, "factor": factor}
    if scaling and kind == "yarn":
        length = m.size("context_length", 0) if f"{m.arch}.context_length" in m.metadata else None
        scaling["original_length"] = m.size("rope.scaling.original_context_length", length)
        scaling["beta_fast"] = m.number("rope.scaling.yarn_beta_fast", 32.0)
        scaling["beta_slow"] = m.number("rope.scaling.yarn_beta_slow", 1.0)
    if (grown := m.number("rope.scaling.attn_factor", 1.0)) != 1.0:
        if grown <= 0:
            raise FormatError(f"GGUF metadata: {prefix}scaling.attn_factor must be positive, not {grown!r:.40}")
        scaling["attention_factor"] = grown * _yarn_growth(scaling.get("scaling", "none"), factor)
    if (factors := _divisors(tensors, "rope_freqs.weight", rotated)) is not None:
        scaling["factors"] = factors
    if (short := _divisors(tensors, LONGROPE[0], rotated)) is not None:
        long, length = _divisors(tensors, LONGROPE[1], rotated), m.size("rope.scaling.original_context_length")
        scaling |= {"scaling": "longrope", "factors": short, "long_factors": long, "original_length": length}
        scaling.setdefault("attention_factor", 1.0)
    return RopeConfig(theta=m.number("rope.freq_base", theta), fraction=rotated / head_dim, **scaling)


def _divisors(tensors: Mapping[str, Any], name: str, rotated: int) -> tuple[float, ...] | None:
    """A tensor of divisors of the frequencies, where the file has it."""
    if (stored := tensors.get(name)) is None:
        return None
    if tuple(stored.shape) != (rotated // 2,):
        raise FormatError(f"{name} must hold {rotated // 2} divisors")
    found = tuple(stored.rows().tolist())
    if not all(math.isfinite(value) and value > 0 for value in found):
        raise FormatError(f"{name} must hold positive divisors")
    return found


def _yarn_growth(scaling: str, factor: float) -> float:
    """What llama.cpp multiplies cos and sin by where attn_factor is 1."""
    return 1.0 + 0.1 * math.log(factor) if scaling == "yarn" and factor > 1 else 1.0


def write_gguf_rope(rope: RopeConfig, head_dim: int) -> dict[str, Any]:
    out: dict[str, Any] = {"rope.freq_base": rope.theta, "rope.dimension_count": int(head_dim * rope.fraction)}
    if rope.scaling in ("linear", "yarn"):
        out |= {"rope.scaling.type": rope.scaling, "rope.scaling.factor": rope.factor}
    if rope.scaling == "yarn":
        out["rope.scaling.original_context_length"] = rope.original_length
        out |= {"rope.scaling.yarn_beta_fast": rope.beta_fast, "rope.scaling.yarn_beta_slow": rope.beta_slow}
    if rope.scaling == "longrope":
        out["rope.scaling.original_context_length"] = rope.original_length
    if rope.attention_factor is not None:
        out["rope.scaling.attn_factor"] = rope.attention_factor / _yarn_growth(rope.scaling, rope.factor)
    return out


def gguf_rope_limits(rope: RopeConfig | None, *, partial: bool = False, longrope: bool = False) -> list[str]:
    """Why these settings cannot be said in GGUF; partial, longrope: what the architecture can have."""
    if rope is None:
        return []
    reasons = []
    if rope.fraction != 1.0 and not partial:
        reasons.append("llama.cpp rotates whole heads in this architecture")
    if rope.scaling in ("dynamic", "proportional") or (rope.scaling == "longrope" and not longrope):
        reasons.append(f"{rope.scaling} rotary scaling has no equal in llama.cpp")
    if rope.mscale is not None or not rope.truncate:
        reasons.append("this yarn setting (mscale or truncate) has no equal in llama.cpp")
    return reasons
