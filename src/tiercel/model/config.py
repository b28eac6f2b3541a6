"""What a network is, as data: standard library only, so `plan` and `show` need no torch.

    ModelConfig   embed → layers → norm → logits
    LayerConfig   mixers that run in parallel on one normalised input, and an optional feed-forward
    mixers        AttentionConfig · Mamba1Config · Mamba2Config
    feed-forward  GatedMLPConfig · MoEConfig

Letters used across the package: B batch rows, L length, D width, H heads, P head dim, N state,
G groups, K conv kernel, V vocabulary, C chunk, F feed-forward width, E experts, I inner width.
"""

from __future__ import annotations

import dataclasses
import math
from dataclasses import dataclass
from typing import Any, ClassVar

from tiercel.errors import FormatError

LARGEST = 1 << 31  # no field of a real model reaches this; a hostile file does


def check(ok: bool, message: str) -> None:
    if not ok:
        raise FormatError(message)


def check_sizes(config: Any, *names: str) -> None:
    """Every named field is a whole number in 1 … 2³¹."""
    for name in names:
        value = getattr(config, name)
        check(
            type(value) is int and 0 < value < LARGEST,
            f"{type(config).__name__}.{name} must be a whole number from 1 to 2^31, not {value!r}",
        )


@dataclass(frozen=True, kw_only=True)
class RopeConfig:
    """Rotary position embedding (Su et al. 2021), rotate-half pairing.

    scaling: none · linear · dynamic · llama3 · yarn · longrope  (names and formulas of transformers' rope_utils)
    factors: per-frequency divisors where the file gives them (longrope, GGUF `rope_freqs.weight`)
    """

    theta: float = 10_000.0
    fraction: float = 1.0  # share of the head dim that is rotated, from the front
    scaling: str = "none"
    factor: float = 1.0
    original_length: int | None = None
    low_freq_factor: float = 1.0  # llama3
    high_freq_factor: float = 4.0  # llama3
    beta_fast: float = 32.0  # yarn
    beta_slow: float = 1.0  # yarn
    attention_factor: float | None = None  # yarn, longrope: scales cos and sin
    mscale: float | None = None  # yarn
    mscale_all_dim: float | None = None  # yarn
    truncate: bool = True  # yarn: round the correction range to whole dimensions
    factors: tuple[float, ...] | None = None
    long_factors: tuple[float, ...] | None = None  # longrope, beyond original_length

    def __post_init__(self) -> None:
        check(math.isfinite(self.theta) and self.theta > 0, f"rope theta must be positive, not {self.theta!r}")
        check(0 < self.fraction <= 1, f"rope fraction must be in (0, 1], not {self.fraction!r}")
        check(math.isfinite(self.factor) and self.factor > 0, f"rope factor must be positive, not {self.factor!r}")


@dataclass(frozen=True, kw_only=True)
class AttentionConfig:
    """Grouped-query attention; causal always, windowed when `window` is given."""

    kind: ClassVar[str] = "attention"
    heads: int
    kv_heads: int
    head_dim: int
    rope: RopeConfig | None = None
    window: int | None = None  # a token sees itself and window − 1 before it
    qkv_bias: bool = False
    out_bias: bool = False
    scale: float | None = None  # None: head_dim^-0.5

    def __post_init__(self) -> None:
        check_sizes(self, "heads", "kv_heads", "head_dim")
        check(self.heads % self.kv_heads == 0, f"{self.heads} heads cannot share {self.kv_heads} key/value heads")
        check(self.rope is None or self.head_dim % 2 == 0, f"rotary needs an even head_dim, not {self.head_dim}")
        if self.window is not None:
            check_sizes(self, "window")


@dataclass(frozen=True, kw_only=True)
class Mamba1Config:
    """Selective scan (Gu & Dao 2023).  inner_norms: RMS norms on dt, B and C after x_proj (Jamba)."""

    kind: ClassVar[str] = "mamba1"
    inner: int
    state: int
    conv: int = 4
    dt_rank: int
    conv_bias: bool = True
    proj_bias: bool = False  # on in_proj and out_proj
    inner_norms: bool = False
    chunk: int = 128

    def __post_init__(self) -> None:
        check_sizes(self, "inner", "state", "conv", "dt_rank", "chunk")


@dataclass(frozen=True, kw_only=True)
class Mamba2Config:
    """State space duality (Dao & Gu 2024): scalar decay per head, B and C shared within a group.

    gated_norm: "none"        y · silu(z)
                "gate_first"  norm(y · silu(z)), statistics over each group of inner / groups channels
                "norm_first"  norm(y) · silu(z)
    """

    kind: ClassVar[str] = "mamba2"
    heads: int
    head_dim: int
    state: int
    groups: int = 1
    conv: int = 4
    conv_bias: bool = True
    in_bias: bool = False
    out_bias: bool = False
    gated_norm: str = "gate_first"
    dt_limit: tuple[float, float] = (0.0, math.inf)
    chunk: int = 128

    def __post_init__(self) -> None:
        check_sizes(self, "heads", "head_dim", "state", "groups", "conv", "chunk")
        check(self.heads % self.groups == 0, f"{self.heads} heads cannot share {self.groups} groups")
        check(self.gated_norm in ("none", "gate_first", "norm_first"), f"unknown gated_norm {self.gated_norm!r}")
        check(
            len(self.dt_limit) == 2 and 0 <= self.dt_limit[0] <= self.dt_limit[1],
            f"dt_limit must be two numbers, low ≤ high, not {self.dt_limit!r}",
        )

    @property
    def inner(self) -> int:
        return self.heads * self.head_dim

    @property
    def channels(self) -> int:
        """Width of what the convolution sees: x, B and C."""
        return self.inner + 2 * self.groups * self.state


@dataclass(frozen=True, kw_only=True)
class GatedMLPConfig:
    """down(act(gate(x)) · up(x))."""

    kind: ClassVar[str] = "gated_mlp"
    width: int
    activation: str = "silu"
    bias: bool = False

    def __post_init__(self) -> None:
        check_sizes(self, "width")
        check(self.activation in ("silu", "gelu", "gelu_tanh", "relu"), f"unknown activation {self.activation!r}")


@dataclass(frozen=True, kw_only=True)
class MoEConfig:
    """Softmax over all experts, the `active` largest, weights renormalised to sum 1 or not."""

    kind: ClassVar[str] = "moe"
    width: int
    experts: int
    active: int
    renormalize: bool = True
    activation: str = "silu"

    def __post_init__(self) -> None:
        check_sizes(self, "width", "experts", "active")
        check(self.active <= self.experts, f"{self.active} active experts of {self.experts}")
        check(self.activation in ("silu", "gelu", "gelu_tanh", "relu"), f"unknown activation {self.activation!r}")


Mixer = AttentionConfig | Mamba1Config | Mamba2Config
FeedForward = GatedMLPConfig | MoEConfig


@dataclass(frozen=True, kw_only=True)
class LayerConfig:
    """Mixers run in parallel on one normalised input and are summed; at most one of a kind."""

    mixers: tuple[Mixer, ...]
    feed_forward: FeedForward | None = None

    def __post_init__(self) -> None:
        kinds = [mixer.kind for mixer in self.mixers]
        check(bool(kinds), "a layer needs at least one mixer")
        check(len(set(kinds)) == len(kinds), f"a layer holds at most one mixer of a kind, not {kinds}")


@dataclass(frozen=True, kw_only=True)
class ModelConfig:
    """The whole network.  `max_length` is the context in tokens the model was made for."""

    vocab_size: int
    width: int
    layers: tuple[LayerConfig, ...]
    norm_eps: float = 1e-5
    tied: bool = False  # the output projection is the embedding
    logit_scale: float = 1.0  # only a tied model with multipliers needs it: the rest is folded
    residual_fp32: bool = False
    max_length: int = 8192

    def __post_init__(self) -> None:
        check_sizes(self, "vocab_size", "width", "max_length")
        check(0 < len(self.layers) <= 100_000, f"a model has 1 to 100000 layers, not {len(self.layers)}")
        check(math.isfinite(self.norm_eps) and 0 <= self.norm_eps < 1, f"norm_eps must be small, not {self.norm_eps!r}")
        check(math.isfinite(self.logit_scale), f"logit_scale must be finite, not {self.logit_scale!r}")

    def to_dict(self) -> dict[str, Any]:
        """Plain JSON values; equal neighbouring layers are written once with a `repeat`."""
        data = {f.name: getattr(self, f.name) for f in dataclasses.fields(self) if f.name != "layers"}
        runs: list[dict[str, Any]] = []
        for layer in self.layers:
            plain = _layer_to_dict(layer)
            if runs and {k: v for k, v in runs[-1].items() if k != "repeat"} == plain:
                runs[-1]["repeat"] = runs[-1].get("repeat", 1) + 1
            else:
                runs.append(plain)
        return data | {"layers": runs}

    @classmethod
    def from_dict(cls, data: dict[str, Any]) -> ModelConfig:
        """Raises FormatError on an unknown field, a wrong type or a size that cannot be."""
        check(isinstance(data, dict), "a model config must be a table of fields")
        data = dict(data)
        runs = data.pop("layers", None)
        check(isinstance(runs, list) and bool(runs), "a model config needs a list of layers")
        layers: list[LayerConfig] = []
        for run in runs:
            check(isinstance(run, dict), "each layer must be a table of fields")
            repeat = run.get("repeat", 1)
            check(type(repeat) is int and 0 < repeat <= 100_000, f"repeat must be a whole number, not {repeat!r}")
            layers += [_layer_from_dict({k: v for k, v in run.items() if k != "repeat"})] * repeat
            check(len(layers) <= 100_000, "a model has at most 100000 layers")
        return _build(cls, data | {"layers": tuple(layers)})


_MIXERS: dict[str, Any] = {c.kind: c for c in (AttentionConfig, Mamba1Config, Mamba2Config)}
_FEED_FORWARDS: dict[str, Any] = {c.kind: c for c in (GatedMLPConfig, MoEConfig)}


def _plain(config: Any) -> dict[str, Any]:
    out: dict[str, Any] = {"kind": config.kind} if hasattr(config, "kind") else {}
    for f in dataclasses.fields(config):
        value = getattr(config, f.name)
        if value == f.default:
            continue
        if dataclasses.is_dataclass(value):
            value = _plain(value)
        elif isinstance(value, tuple):
            value = [("inf" if v == math.inf else v) for v in value]
        out[f.name] = value
    return out


def _layer_to_dict(layer: LayerConfig) -> dict[str, Any]:
    out: dict[str, Any] = {"mixers": [_plain(mixer) for mixer in layer.mixers]}
    if layer.feed_forward is not None:
        out["feed_forward"] = _plain(layer.feed_forward)
    return out


def _layer_from_dict(data: dict[str, Any]) -> LayerConfig:
    unknown = set(data) - {"mixers", "feed_forward"}
    check(not unknown, f"unknown layer field {sorted(unknown)[:1]}")
    mixers = data.get("mixers")
    check(isinstance(mixers, list), "a layer needs a list of mixers")
    assert isinstance(mixers, list)
    feed_forward = data.get("feed_forward")
    return LayerConfig(
        mixers=tuple(_part(mixer, _MIXERS, "mixer") for mixer in mixers),
        feed_forward=None if feed_forward is None else _part(feed_forward, _FEED_FORWARDS, "feed-forward"),
    )


def _part(data: Any, kinds: dict[str, Any], what: str) -> Any:
    check(isinstance(data, dict), f"a {what} must be a table of fields, not {data!r}")
    data = dict(data)
    kind = data.pop("kind", None)
    check(isinstance(kind, str) and kind in kinds, f"unknown {what} {kind!r}; known: {', '.join(kinds)}")
    if isinstance(data.get("rope"), dict):
        data["rope"] = _build(RopeConfig, data["rope"])
    for key, value in data.items():
        if isinstance(value, list):
            data[key] = tuple(math.inf if v == "inf" else v for v in value)
    return _build(kinds[kind], data)


def _build(cls: Any, data: dict[str, Any]) -> Any:
    fields = {f.name: f for f in dataclasses.fields(cls)}
    unknown = set(data) - set(fields)
    check(not unknown, f"{cls.__name__} has no field {sorted(map(str, unknown))[:1]}")
    data = {
        k: tuple(math.inf if v == "inf" else v for v in value) if isinstance(value, list) else value
        for k, value in data.items()
    }
    for name, value in data.items():
        check(_fits(value, str(fields[name].type)), f"{cls.__name__}.{name} cannot be {value!r}")
    missing = [n for n, f in fields.items() if n not in data and f.default is dataclasses.MISSING]
    check(not missing, f"{cls.__name__} needs {missing[:1]}")
    return cls(**data)


def _fits(value: Any, annotation: str) -> bool:
    """Whether a JSON value may stand where a field is annotated so (the annotations used above)."""
    if value is None:
        return "None" in annotation
    if isinstance(value, bool):
        return annotation.startswith("bool")
    if isinstance(value, int) and annotation.startswith(("int", "float")):
        return True
    if isinstance(value, float):
        return annotation.startswith("float")
    if isinstance(value, str):
        return annotation.startswith("str")
    if isinstance(value, tuple):
        if annotation.startswith("tuple[float"):
            return all(isinstance(v, (int, float)) and not isinstance(v, bool) for v in value)
        return annotation.startswith("tuple")
    return dataclasses.is_dataclass(value)
