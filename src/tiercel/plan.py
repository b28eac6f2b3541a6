"""Will it fit: what a config says about size before a byte of the model is read.  No torch.

parameters   per matrix rows × columns, summed (formula per part below)
KV           2 · kv_heads · head_dim per attention layer and token
state        H · P · N per Mamba-2 layer, I · N per Mamba-1 layer and sequence, whatever the length
"""

from __future__ import annotations

from collections.abc import Callable
from typing import Any

from tiercel.errors import DoesNotFit
from tiercel.model.config import (
    AttentionConfig,
    FeedForward,
    GatedMLPConfig,
    LayerConfig,
    Mamba1Config,
    Mamba2Config,
    Mixer,
    ModelConfig,
    MoEConfig,
)


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


def _each_layer(config: ModelConfig, count: Callable[[LayerConfig, int], int]) -> list[int]:
    """`count` of every layer; equal layers are worked out once."""
    known: dict[LayerConfig, int] = {}
    return [
        known[layer] if layer in known else known.setdefault(layer, count(layer, config.width))
        for layer in config.layers
    ]


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
