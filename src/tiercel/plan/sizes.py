"""What a config says about size before a byte of the model is read.

parameters   per matrix rows × columns, summed (formula per part below)
KV           2 · kv_heads · head_dim per attention layer and token
state        H · P · N per Mamba-2 layer, I · N per Mamba-1 layer and sequence, whatever the length
open inputs  of two chunks of each state-space layer: what `model/layer_state.py` keeps so that a text can be cut
"""

from __future__ import annotations

from collections.abc import Callable, Iterator
from typing import Any

from tiercel.errors import DoesNotFit
from tiercel.feed_forward.gated_mlp.config import GatedMLPConfig
from tiercel.feed_forward.moe.config import MoEConfig
from tiercel.mixers.attention.config import AttentionConfig
from tiercel.mixers.mamba1.config import Mamba1Config
from tiercel.mixers.mamba2.config import Mamba2Config
from tiercel.model.config import FeedForward, LayerConfig, Mixer, ModelConfig


def parameter_count(config: ModelConfig) -> int:
    """Exact number of values in the checkpoint; a tied output projection counts once."""
    embedding = config.vocab_size * config.width * (1 if config.tied else 2)
    return embedding + config.width + sum(_each_layer(config, _layer_parameters))


def kv_bytes_per_token(config: ModelConfig, bytes: int = 2) -> int:
    """What attention keeps of one token of one sequence; `bytes` per value.

    A sliding window bounds the sum over the tokens, not this number.
    """
    return bytes * sum(_each_layer(config, _kv_values))


def state_bytes(config: ModelConfig, bytes: int = 4) -> int:
    """What the state-space mixers keep of one sequence, however long it is; `bytes` per value.

    The committed state alone: the convolution's last columns and the open chunk come on top and are
    a few per cent of it.
    """
    return bytes * sum(_each_layer(config, _state_values))


PAGE = 64  # tokens of a page of keys and values (model/pages.py)
LONGEST_CHUNK = 64  # tokens after which S is rewritten at the latest (model/layer_state.py)


def open_bytes(config: ModelConfig, bytes: int = 2, *, snapshot: bool = False) -> int:
    """What comes on top of the committed state of one sequence: columns, x, B and dt of two chunks; `bytes` per value.

    Mamba-1 layers hold the running state as well.  snapshot: what a snapshot copies instead: one chunk, no running
    state (it keeps what is open where it was taken; that is half a chunk to a chunk and a half).
    """
    return sum(_each_layer(config, lambda layer, D: sum(_open_bytes(m, bytes, snapshot) for m in layer.mixers)))


def pattern(config: ModelConfig) -> str:
    """The layers as a picture: `44 × (attention ∥ mamba2 + gated_mlp)`.

    Equal neighbours are counted, and so is a group that repeats: `4 × [3 × mamba2, attention]`.
    """
    layers = [_layer_picture(layer) for layer in config.layers]
    period = _period(layers)
    runs = _runs(layers[:period])
    times = len(layers) // period
    if times == 1:
        return ", ".join(runs)
    return f"{times} × {runs[0]}" if len(runs) == 1 else f"{times} × [{', '.join(runs)}]"


def check_fits(needed: int, what: str) -> None:
    """Raises DoesNotFit when `needed` bytes are more than the machine has free now."""
    import psutil

    free = psutil.virtual_memory().available
    if needed > free:
        raise DoesNotFit(
            f"{what} needs {human_bytes(needed)} of memory and {human_bytes(free)} are free: "
            "close something, or choose a smaller dtype or model"
        )


def human_bytes(count: float) -> str:
    """Decimal units as Ollama and disk makers write them: `98 MB`, `4.6 GB`."""
    for unit in ("B", "KB", "MB", "GB", "TB"):
        if count < 1000 or unit == "TB":
            break
        count /= 1000
    return f"{count:.0f} {unit}" if count >= 10 or unit == "B" else f"{count:.1f} {unit}"


# ── parameters of each part, D the model's width


def _layer_parameters(layer: LayerConfig, D: int) -> int:
    mixers = D + sum(_mixer_parameters(mixer, D) for mixer in layer.mixers)  # one norm before all of them
    return mixers + (0 if layer.feed_forward is None else D + _feed_forward_parameters(layer.feed_forward, D))


def _mixer_parameters(mixer: Mixer, D: int) -> int:
    match mixer:
        case AttentionConfig():
            return _attention_parameters(mixer, D)
        case Mamba1Config():
            return _mamba1_parameters(mixer, D)
        case Mamba2Config():
            return _mamba2_parameters(mixer, D)


def _attention_parameters(c: AttentionConfig, D: int) -> int:
    q, kv = c.heads * c.head_dim, c.kv_heads * c.head_dim
    biases = (q + 2 * kv if c.qkv_bias else 0) + (D if c.out_bias else 0)
    return D * (q + 2 * kv) + q * D + biases


def _mamba1_parameters(c: Mamba1Config, D: int) -> int:
    I, N, R = c.inner, c.state, c.dt_rank
    projections = D * 2 * I + I * (R + 2 * N) + (R * I + I) + I * D + (2 * I + D if c.proj_bias else 0)
    recurrence = I * N + I  # A_log and D
    norms = R + 2 * N if c.inner_norms else 0
    return projections + (c.conv + c.conv_bias) * I + recurrence + norms


def _mamba2_parameters(c: Mamba2Config, D: int) -> int:
    rows = c.inner + c.channels + c.heads  # z, xBC, dt
    projections = D * rows + (rows if c.in_bias else 0) + c.inner * D + (D if c.out_bias else 0)
    recurrence = 3 * c.heads  # A_log, D and the dt bias
    norm = 0 if c.gated_norm == "none" else c.inner
    return projections + (c.conv + c.conv_bias) * c.channels + recurrence + norm


def _feed_forward_parameters(c: FeedForward, D: int) -> int:
    match c:
        case GatedMLPConfig():
            return 3 * D * c.width + (2 * c.width + D if c.bias else 0)
        case MoEConfig():
            return c.experts * 3 * D * c.width + c.experts * D  # the router on top


# ── values kept per token and per sequence


def _kv_values(layer: LayerConfig, D: int) -> int:
    return sum(2 * m.kv_heads * m.head_dim for m in layer.mixers if isinstance(m, AttentionConfig))


def _state_values(layer: LayerConfig, D: int) -> int:
    mamba1 = sum(m.inner * m.state for m in layer.mixers if isinstance(m, Mamba1Config))
    return mamba1 + sum(m.inner * m.state for m in layer.mixers if isinstance(m, Mamba2Config))


def _open_bytes(mixer: Mixer, bytes: int, snapshot: bool) -> int:
    if isinstance(mixer, AttentionConfig):
        return 0
    rows = min(mixer.chunk, LONGEST_CHUNK) * (1 if snapshot else 2)
    if isinstance(mixer, Mamba2Config):
        B, running, dt = mixer.groups * mixer.state, 0, mixer.heads
        channels = mixer.channels
    else:
        B, running, dt = mixer.state, 0 if snapshot else 4 * mixer.inner * mixer.state, mixer.inner
        channels = mixer.inner
    values = (mixer.conv - 1 + rows) * channels + rows * (mixer.inner + B)
    return bytes * values + 4 * rows * dt + running


def _each_layer(config: ModelConfig, count: Callable[[LayerConfig, int], int]) -> list[int]:
    """`count` of every layer; equal layers are worked out once."""
    known: dict[LayerConfig, int] = {}
    return [
        known[layer] if layer in known else known.setdefault(layer, count(layer, config.width))
        for layer in config.layers
    ]


# ── the shape of every parameter


def shapes(config: ModelConfig) -> Iterator[tuple[str, tuple[int, ...], bool]]:
    """Name, shape, and whether it is kept wide (norms, convolutions, decays, routers), of every parameter."""
    V, D = config.vocab_size, config.width
    yield "embed.weight", (V, D), False
    yield "norm.weight", (D,), True
    if not config.tied:
        yield "head.weight", (V, D), False
    for i, layer in enumerate(config.layers):
        yield f"layers.{i}.mixer_norm.weight", (D,), True
        for mixer in layer.mixers:
            for name, shape, keep_fp32 in _mixer_shapes(mixer, D):
                yield f"layers.{i}.mixers.{mixer.kind}.{name}", shape, keep_fp32
        if layer.feed_forward is not None:
            yield f"layers.{i}.ffn_norm.weight", (D,), True
            for name, shape, keep_fp32 in _feed_forward_shapes(layer.feed_forward, D):
                yield f"layers.{i}.feed_forward.{name}", shape, keep_fp32


Shapes = Iterator[tuple[str, tuple[int, ...], bool]]


def _linear(name: str, N: int, K: int, bias: bool) -> Shapes:
    yield f"{name}.weight", (N, K), False
    if bias:
        yield f"{name}.bias", (N,), False


def _mixer_shapes(c: Mixer, D: int) -> Shapes:
    match c:
        case AttentionConfig():
            q, kv = c.heads * c.head_dim, c.kv_heads * c.head_dim
            for name, N in (("q", q), ("k", kv), ("v", kv)):
                yield from _linear(name, N, D, c.qkv_bias)
            yield from _linear("o", D, q, c.out_bias)
        case Mamba2Config():
            yield from (("A_log", (c.heads,), True), ("D", (c.heads,), True), ("dt_bias", (c.heads,), True))
            yield from _convolution(c.channels, c)
            if c.gated_norm != "none":
                yield "out_norm", (c.inner,), True
            yield from _linear("in_proj", c.inner + c.channels + c.heads, D, c.in_bias)
            yield from _linear("out_proj", D, c.inner, c.out_bias)
        case Mamba1Config():
            I, N, R = c.inner, c.state, c.dt_rank
            yield from (("A_log", (I, N), True), ("D", (I,), True), ("dt_bias", (I,), True))
            yield from _convolution(I, c)
            yield from _linear("in_proj", 2 * I, D, c.proj_bias)
            yield from _linear("out_proj", D, I, c.proj_bias)
            yield from (("x_proj.weight", (R + 2 * N, I), False), ("dt.weight", (I, R), False))
            if c.inner_norms:
                yield from ((f"{name}_norm.weight", (size,), True) for name, size in (("dt", R), ("B", N), ("C", N)))


def _convolution(channels: int, c: Mamba1Config | Mamba2Config) -> Shapes:
    yield "conv", (channels, c.conv), True
    if c.conv_bias:
        yield "conv_bias", (channels,), True


def _feed_forward_shapes(c: FeedForward, D: int) -> Shapes:
    if isinstance(c, MoEConfig):
        yield "router.weight", (c.experts, D), True
        for name, N, K in (("gate", c.width, D), ("up", c.width, D), ("down", D, c.width)):
            yield name, (c.experts, N, K), False
        return
    for name, N, K in (("gate", c.width, D), ("up", c.width, D), ("down", D, c.width)):
        yield from _linear(name, N, K, c.bias)


# ── the picture


def _layer_picture(layer: LayerConfig) -> str:
    mixers = " ∥ ".join(mixer.kind for mixer in layer.mixers)
    if layer.feed_forward is None:
        return mixers if len(layer.mixers) == 1 else f"({mixers})"
    return f"({mixers} + {_feed_forward_picture(layer.feed_forward)})"


def _feed_forward_picture(c: FeedForward) -> str:
    return f"moe {c.active} of {c.experts}" if isinstance(c, MoEConfig) else c.kind


def _period(items: list[str]) -> int:
    """Length of the shortest prefix that, repeated, gives the whole list (Knuth-Morris-Pratt borders)."""
    border = [0] * len(items)
    for i in range(1, len(items)):
        k = border[i - 1]
        while k and items[i] != items[k]:
            k = border[k - 1]
        border[i] = k + (items[i] == items[k])
    period = len(items) - border[-1]
    return period if len(items) % period == 0 else len(items)


def _runs(items: list[Any]) -> list[str]:
    runs: list[list[Any]] = []
    for item in items:
        if runs and runs[-1][1] == item:
            runs[-1][0] += 1
        else:
            runs.append([1, item])
    return [item if count == 1 else f"{count} × {item}" for count, item in runs]
