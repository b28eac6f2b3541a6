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
from collections.abc import Iterable, Iterator, Mapping
from pathlib import Path
from typing import Any

from tiercel.errors import FormatError, RequestError
from tiercel.families.family import Family, TensorMapping
from tiercel.feed_forward.registry import FEED_FORWARDS
from tiercel.mixers.checks import MAX_LAYERS
from tiercel.mixers.registry import MIXERS
from tiercel.model.config import LayerConfig, ModelConfig
from tiercel.model.parameters import parameters


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
    """Describe a network by a list of layer words, repeated.  Sizes that are not given follow the width.

    Args:
        layers: words: "mamba2", "attention+mamba2" (side by side), "attention/moe", "mamba2/-" (no feed-forward), …
        width: of the residual stream.
        vocab_size: tokens.
        repeat: how often the words follow each other.
        heads: of attention.
        kv_heads: heads of keys and values; as many as `heads` without.
        head_dim: channels of an attention head.
        window: tokens that attention sees; all without.
        rope_theta: base of the rotary embedding; None: no positions (recurrent layers carry the order).
        state: state size of recurrent layers.
        groups: of Mamba-2's B and C.
        expand: inner width of recurrent layers over the width.
        mamba_head_dim: channels of a Mamba-2 head.
        ffn_width: hidden channels of a feed-forward or an expert; four times the width without.
        experts: of a mixture.
        active: experts of a token.
        tied: whether the embedding is the head, too.
        max_length: the context in tokens.
        norm_eps: of all norms.
        chunk: tokens after which a recurrent state is committed at the latest.

    Returns:
        The network as data, for a pattern file or `Decoder`.

    Raises:
        RequestError: a word that is not known.
        FormatError: sizes that cannot be.
    """
    words = layers.split() if isinstance(layers, str) else [str(word) for word in layers]
    if not words or not 0 < repeat * len(words) <= MAX_LAYERS:
        raise RequestError("a pattern needs at least one layer, such as 'mamba2 mamba2 mamba2 attention'")
    sizes = dict(
        heads=heads, kv_heads=kv_heads, head_dim=head_dim, window=window, rope_theta=rope_theta, state=state,
        groups=groups, expand=expand, mamba_head_dim=mamba_head_dim, ffn_width=ffn_width, experts=experts,
        active=active, chunk=chunk,
    )  # fmt: skip
    return ModelConfig(
        vocab_size=vocab_size,
        width=width,
        layers=tuple(_layer(word, width, sizes) for word in words) * repeat,
        norm_eps=norm_eps,
        tied=tied,
        max_length=max_length,
    )


def _layer(word: str, width: int, sizes: Mapping[str, Any]) -> LayerConfig:
    mixers, _, ffn = word.partition("/")
    names, ffn = mixers.replace("∥", "+").replace("|", "+").split("+"), ffn or "mlp"
    of_mixers, of_ffn = MIXERS.words(), FEED_FORWARDS.words()
    for name, known in [*((name, [*of_mixers]) for name in names), (ffn, [*of_ffn, "-"])]:
        if name not in known:
            raise RequestError(f"pattern: {name!r} in {word!r} is not known; choose from {', '.join(known)}")
    return LayerConfig(
        mixers=tuple(of_mixers[name].from_pattern(width, **sizes) for name in names),
        feed_forward=None if ffn == "-" else of_ffn[ffn].from_pattern(width, **sizes),
    )


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
    for name, param in parameters(config).items():
        yield TensorMapping(name, name, None, keep_fp32=param.keep_fp32)


def write(config: ModelConfig) -> dict[str, Any]:
    return {"model_type": "tiercel", "architectures": ["Tiercel"]} | config.to_dict()


PATTERN = Family("pattern", ("tiercel",), read, write=write)
