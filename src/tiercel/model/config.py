"""What a network is, as data: standard library only, so `plan` and `show` need no torch.

    ModelConfig   embed → layers → norm → logits
    LayerConfig   mixers that run in parallel on one normalised input, and an optional feed-forward
    mixers        `mixers.spec.MixerSpec`: those of `mixers/registry.py`
    feed-forward  `mixers.spec.FeedForwardSpec`: those of `feed_forward/registry.py`

Letters used across the package: B batch rows, L length, D width, H heads, P head dim, N state,
G groups, K conv kernel, V vocabulary, C chunk, F feed-forward width, E experts, I inner width.
"""

from __future__ import annotations

import dataclasses
import math
from dataclasses import dataclass
from typing import Any, TypeVar

from tiercel.feed_forward.registry import FEED_FORWARDS
from tiercel.mixers.checks import MAX_LAYERS, check, check_sizes
from tiercel.mixers.registry import MIXERS
from tiercel.mixers.spec import FeedForwardSpec, MixerSpec, ModuleSpec, Registry

S = TypeVar("S", bound=ModuleSpec)


@dataclass(frozen=True, kw_only=True)
class LayerConfig:
    """Mixers run in parallel on one normalised input and are summed, at most one of a kind; then a feed-forward."""

    mixers: tuple[MixerSpec, ...]
    feed_forward: FeedForwardSpec | None = None
    pre_norm: bool = True  # of the inputs of the mixers and of the feed-forward
    post_norm: bool = False  # of their outputs, before the residual; both: "sandwich"

    def __post_init__(self) -> None:
        check(self.pre_norm or self.post_norm, "a layer needs norms before or after its mixers")
        kinds = [mixer.kind for mixer in self.mixers]
        check(bool(kinds) or self.feed_forward is not None, "a layer needs a mixer or a feed-forward")
        check(len(set(kinds)) == len(kinds), f"a layer holds at most one mixer of a kind, not {kinds}")

    @property
    def parts(self) -> tuple[ModuleSpec, ...]:
        """Its mixers, then its feed-forward where it has one."""
        return self.mixers if self.feed_forward is None else (*self.mixers, self.feed_forward)


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
    embed_scale: float = 1.0  # what embeddings are multiplied by (Granite)
    residual_scale: float = 1.0  # what a layer's outputs are multiplied by before they are added (Granite)
    max_length: int = 8192

    def __post_init__(self) -> None:
        check_sizes(self, "vocab_size", "width", "max_length")
        check(0 < len(self.layers) <= MAX_LAYERS, f"a model has 1 to {MAX_LAYERS} layers, not {len(self.layers)}")
        check(math.isfinite(self.norm_eps) and 0 <= self.norm_eps < 1, f"norm_eps must be small, not {self.norm_eps!r}")
        check(math.isfinite(self.logit_scale), f"logit_scale must be finite, not {self.logit_scale!r}")
        for name in ("embed_scale", "residual_scale"):
            check(1e-6 < abs(getattr(self, name)) < 1e6, f"{name} must be near 1, not {getattr(self, name)!r}")

    def first(self, kind: type[S]) -> S | None:
        """Return the first mixer or feed-forward of a kind, or None."""
        return next((part for layer in self.layers for part in layer.parts if isinstance(part, kind)), None)

    @property
    def stream_eps(self) -> float:
        """Of norms of the residual stream, which is held divided by `residual_scale`: x + s · y = s · (x / s + y)."""
        return self.norm_eps / self.residual_scale**2

    def to_dict(self) -> dict[str, Any]:
        """Plain JSON values; equal neighbouring layers are written once with a `repeat`.

        The scales are left out at their default: fingerprints of sessions that were saved before them stay the same.
        """
        data = {f.name: getattr(self, f.name) for f in dataclasses.fields(self) if f.name != "layers"}
        for name in ("embed_scale", "residual_scale"):
            if data[name] == 1.0:
                del data[name]
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
            known = type(repeat) is int and 0 < repeat <= MAX_LAYERS
            check(known, f"repeat must be a whole number from 1 to {MAX_LAYERS}, not {repeat!r}")
            layers += [_layer_from_dict({k: v for k, v in run.items() if k != "repeat"})] * repeat
            check(len(layers) <= MAX_LAYERS, f"a model has at most {MAX_LAYERS} layers")
        found: ModelConfig = _build(cls, data | {"layers": tuple(layers)})
        return found


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
    return out | {name: getattr(layer, name) for name in ("pre_norm", "post_norm") if layer.post_norm}


def _layer_from_dict(data: dict[str, Any]) -> LayerConfig:
    norms = {name: data[name] for name in ("pre_norm", "post_norm") if name in data}
    unknown = set(data) - {"mixers", "feed_forward", *norms}
    check(not unknown, f"unknown layer field {sorted(unknown)[:1]}")
    mixers = data.get("mixers")
    check(isinstance(mixers, list), "a layer needs a list of mixers")
    assert isinstance(mixers, list)
    check(all(isinstance(value, bool) for value in norms.values()), "pre_norm and post_norm must be true or false")
    feed_forward = data.get("feed_forward")
    return LayerConfig(
        mixers=tuple(_part(mixer, MIXERS) for mixer in mixers),
        feed_forward=None if feed_forward is None else _part(feed_forward, FEED_FORWARDS),
        **norms,
    )


def _part(data: Any, registry: Registry[S]) -> S:
    check(isinstance(data, dict), f"a {registry.what} must be a table of fields, not {data!r}")
    data = dict(data)
    kind = data.pop("kind", None)
    cls = registry[kind if isinstance(kind, str) else str(kind)]
    for name, table in cls.tables.items():
        if isinstance(data.get(name), dict):
            data[name] = _build(table, data[name])
    for key, value in data.items():
        if isinstance(value, list):
            data[key] = tuple(math.inf if v == "inf" else v for v in value)
    found: S = _build(cls, data)
    return found


def _build(cls: Any, data: dict[str, Any]) -> Any:
    fields = {f.name: f for f in dataclasses.fields(cls)}
    unknown = set(data) - set(fields)
    check(not unknown, f"{cls.__name__} has no field {sorted(map(str, unknown))[:1]}")
    data = {
        k: tuple(math.inf if v == "inf" else v for v in value) if isinstance(value, list) else value
        for k, value in data.items()
    }
    for name, value in data.items():
        annotation = fields[name].type
        annotation = annotation if isinstance(annotation, str) else annotation.__name__
        check(_fits(value, annotation), f"{cls.__name__}.{name} cannot be {value!r}")
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
