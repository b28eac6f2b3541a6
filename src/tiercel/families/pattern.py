"""A network of one's own: a short list of layers, from Python or from a small file.

    pattern("mamba2 mamba2 mamba2 attention", width=256, repeat=4, vocab_size=512)      interleaved 3:1
    pattern("attention+mamba2", width=256, repeat=8, vocab_size=512)                    side by side, as Falcon-H1
    pattern("mamba1/-", width=256, repeat=8, vocab_size=512)                            no feed-forward, as Mamba

A word is one layer: mixers joined by `+` (or `∥`), then `/` and its feed-forward: mlp (the default), moe, or -.
The same as a file, JSON or TOML:   {"pattern": "mamba2 mamba2 mamba2 attention", "width": 256, "repeat": 4, …}
A saved network is a folder like any checkpoint: config.json with model_type "tiercel", safetensors with our names.
"""

from __future__ import annotations

import json
import math
from collections.abc import Iterable, Iterator, Mapping
from pathlib import Path
from typing import Any

from tiercel.errors import FormatError, RequestError
from tiercel.families.family import Family, TensorMapping
from tiercel.feed_forward.gated_mlp.config import GatedMLPConfig
from tiercel.feed_forward.moe.config import MoEConfig
from tiercel.mixers.attention.config import AttentionConfig
from tiercel.mixers.attention.rope import RopeConfig
from tiercel.mixers.mamba1.config import Mamba1Config
from tiercel.mixers.mamba2.config import Mamba2Config
from tiercel.model.config import FeedForward, LayerConfig, Mixer, ModelConfig

LAYERS_AT_MOST = 100_000


def pattern(
    layers: str | Iterable[str],
    *,
    width: int,
    vocab_size: int,
    repeat: int = 1,
    heads: int | None = None,
    kv_heads: int | None = None,
    head_dim: int | None = None,
    window: int | None = None,
    rope_theta: float | None = 10_000.0,
    state: int | None = None,
    groups: int = 1,
    expand: float = 2.0,
    mamba_head_dim: int = 64,
    ffn_width: int | None = None,
    experts: int = 8,
    active: int = 2,
    tied: bool = True,
    max_length: int = 8192,
    norm_eps: float = 1e-5,
    chunk: int = 128,
) -> ModelConfig:
    """A ModelConfig from a list of layer words, repeated.  Sizes that are not given follow the width.

    rope_theta None: attention without positions (the Mamba layers know the order).
    Raises RequestError for a word that is not known and FormatError for sizes that cannot be.
    """
    words = layers.split() if isinstance(layers, str) else [str(word) for word in layers]
    if not words or not 0 < repeat * len(words) <= LAYERS_AT_MOST:
        raise RequestError("a pattern needs at least one layer, such as 'mamba2 mamba2 mamba2 attention'")
    head_dim = head_dim or min(64, width)
    heads = heads or max(1, width // head_dim)
    inner = int(expand * width)
    mamba_head_dim = math.gcd(inner, mamba_head_dim)
    rope = None if rope_theta is None else RopeConfig(theta=float(rope_theta))
    kinds: dict[str, Any] = {
        "attention": lambda: AttentionConfig(
            heads=heads, kv_heads=kv_heads or heads, head_dim=head_dim, rope=rope, window=window
        ),
        "mamba1": lambda: Mamba1Config(inner=inner, state=state or 16, dt_rank=math.ceil(width / 16), chunk=chunk),
        "mamba2": lambda: Mamba2Config(
            heads=inner // mamba_head_dim, head_dim=mamba_head_dim, state=state or 128, groups=groups, chunk=chunk
        ),
        "mlp": lambda: GatedMLPConfig(width=ffn_width or 4 * width),
        "moe": lambda: MoEConfig(width=ffn_width or 4 * width, experts=experts, active=active),
        "-": lambda: None,
    }
    return ModelConfig(
        vocab_size=vocab_size,
        width=width,
        layers=tuple(_layer(word, kinds) for word in words) * repeat,
        norm_eps=norm_eps,
        tied=tied,
        max_length=max_length,
    )


def _layer(word: str, kinds: Mapping[str, Any]) -> LayerConfig:
    mixers, _, ffn = word.partition("/")
    names = mixers.replace("∥", "+").replace("|", "+").split("+")
    for name, known in [(n, ("attention", "mamba1", "mamba2")) for n in names] + [(ffn or "mlp", ("mlp", "moe", "-"))]:
        if name not in known:
            raise RequestError(f"pattern: {name!r} in {word!r} is not known; choose from {', '.join(known)}")
    parts: tuple[Mixer, ...] = tuple(kinds[name]() for name in names)
    feed_forward: FeedForward | None = kinds[ffn or "mlp"]()
    return LayerConfig(mixers=parts, feed_forward=feed_forward)


def read_file(path: str | Path) -> ModelConfig:
    """A pattern, or a whole ModelConfig, from a .json or .toml file of at most 1 MiB."""
    path = Path(path)
    try:
        if path.stat().st_size > 1 << 20:
            raise FormatError(f"{path} is too large for a pattern file")
        text = path.read_text(encoding="utf-8")
        if path.suffix == ".toml":
            import tomllib

            data: Any = tomllib.loads(text)
        else:
            data = json.loads(text)
    except (OSError, ValueError, RecursionError) as error:
        raise FormatError(f"{path} cannot be read as a pattern: {error}") from error
    return from_dict(data, str(path))


def from_dict(data: Any, where: str = "pattern") -> ModelConfig:
    if not isinstance(data, dict):
        raise FormatError(f"{where} must be a table of fields")
    data = {k: v for k, v in data.items() if k not in ("model_type", "architectures", "tiercel_version", "dtype")}
    if "pattern" not in data:
        return ModelConfig.from_dict(data)
    try:
        return pattern(data.pop("pattern"), **data)
    except (TypeError, ValueError, ArithmeticError, AttributeError) as error:
        raise FormatError(f"{where}: {error}") from error


def read(hf_config: Mapping[str, Any]) -> tuple[ModelConfig, Iterable[TensorMapping]]:
    config = from_dict(dict(hf_config), "config.json")
    return config, rows(config)


def rows(config: ModelConfig) -> Iterator[TensorMapping]:
    """Our own names on both sides; what they are follows from the configuration."""
    for name, keep_fp32 in names(config):
        yield TensorMapping(name, name, None, keep_fp32=keep_fp32)


def names(config: ModelConfig) -> Iterator[tuple[str, bool]]:
    """Every parameter of the network, and whether it is kept wide.  Standard library only, as `show` needs it."""
    yield "embed.weight", False
    yield "norm.weight", True
    if not config.tied:
        yield "head.weight", False
    for i, layer in enumerate(config.layers):
        yield f"layers.{i}.mixer_norm.weight", True
        for mixer in layer.mixers:
            for name, keep_fp32 in _mixer_names(mixer):
                yield f"layers.{i}.mixers.{mixer.kind}.{name}", keep_fp32
        ffn = layer.feed_forward
        if ffn is not None:
            yield f"layers.{i}.ffn_norm.weight", True
        if isinstance(ffn, MoEConfig):
            yield f"layers.{i}.feed_forward.router.weight", True
            yield from ((f"layers.{i}.feed_forward.{n}", False) for n in ("gate", "up", "down"))
        elif ffn is not None:
            yield from _linears(f"layers.{i}.feed_forward.", ("gate", "up", "down"), ffn.bias)


def _linears(prefix: str, linears: Iterable[str], bias: bool) -> Iterator[tuple[str, bool]]:
    for name in linears:
        yield f"{prefix}{name}.weight", False
        if bias:
            yield f"{prefix}{name}.bias", False


def _mixer_names(mixer: Mixer) -> Iterator[tuple[str, bool]]:
    if isinstance(mixer, AttentionConfig):
        yield from _linears("", ("q", "k", "v"), mixer.qkv_bias)
        yield from _linears("", ("o",), mixer.out_bias)
        return
    yield from ((name, True) for name in ("A_log", "D", "conv"))
    if mixer.conv_bias:
        yield "conv_bias", True
    if isinstance(mixer, Mamba2Config):
        yield "dt_bias", True
        if mixer.gated_norm != "none":
            yield "out_norm", True
        yield from _linears("", ("in_proj",), mixer.in_bias)
        yield from _linears("", ("out_proj",), mixer.out_bias)
    else:
        yield from _linears("", ("in_proj", "out_proj"), mixer.proj_bias)
        yield from (("x_proj.weight", False), ("dt.weight", False), ("dt_bias", True))
        if mixer.inner_norms:
            yield from ((f"{name}_norm.weight", True) for name in ("dt", "B", "C"))


def write(config: ModelConfig) -> dict[str, Any]:
    return {"model_type": "tiercel", "architectures": ["Tiercel"]} | config.to_dict()


PATTERN = Family("pattern", ("tiercel",), read, write=write)
