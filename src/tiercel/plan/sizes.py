"""What a config says about size before a byte of the model is read.

parameters   `Param`s of every layer, summed
KV           page buffers of every layer, per token
state        sequence buffers of every layer, whatever the length
open inputs  pending buffers of two chunks, which are kept so that a sequence can be cut
"""

from __future__ import annotations

from collections.abc import Callable, Iterator
from typing import Any

from tiercel.errors import DoesNotFit
from tiercel.mixers.spec import MAX_CHUNK, Lifetime, MixerSpec
from tiercel.model.config import LayerConfig, ModelConfig
from tiercel.model.parameters import layer_parameters, parameters


def parameter_count(config: ModelConfig) -> int:
    """Exact number of values in the checkpoint; a tied output projection counts once."""
    embedding = config.vocab_size * config.width * (1 if config.tied else 2)
    layers = _each_layer(config, lambda layer, D: sum(p.values for _, p in layer_parameters(layer, D)))
    return embedding + config.width + sum(layers)


def kv_bytes_per_token(config: ModelConfig, bytes: int = 2) -> int:
    """What attention keeps of one token of one sequence; `bytes` per value.

    A sliding window bounds the sum over the tokens, not this number.
    """
    return bytes * _kept(config, "page")


def state_bytes(config: ModelConfig, bytes: int = 4) -> int:
    """What the state-space mixers keep of one sequence, however long it is; `bytes` per value.

    The committed state alone: the convolution's last columns and the open chunk come on top and are
    a few per cent of it.
    """
    return bytes * _kept(config, "sequence")


PAGE = 64  # tokens of a page of keys and values (model/pages.py)
PREFILL_TOKENS = 512  # of a prompt in one forward


def kv_bytes(config: ModelConfig, context: int, bytes: int = 2) -> int:
    """Page buffers of one sequence of `context` tokens at most, in whole pages; `bytes` per value.

    Layers with a window release the pages before it: they have those of the window and of one forward.
    """

    def of(layer: LayerConfig, D: int) -> int:
        total = 0
        for mixer in layer.mixers:
            pages = -(-context // PAGE)
            if mixer.window is not None:
                pages = min(pages, -(-(mixer.window + PREFILL_TOKENS) // PAGE) + 1)
            total += pages * PAGE * sum(b.values for b in mixer.buffers() if b.lifetime == "page")
        return total

    return bytes * sum(_each_layer(config, of))


def open_bytes(config: ModelConfig, bytes: int = 2, *, snapshot: bool = False) -> int:
    """Pending inputs of two chunks and scratch buffers of one sequence; `bytes` per value of the model's dtype.

    snapshot: what a snapshot copies instead: one chunk, no scratch (it keeps what is pending where it was taken; that
    is half a chunk to a chunk and a half).
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


# ── buffers


def _kept(config: ModelConfig, lifetime: Lifetime) -> int:
    """Values of all buffers of a lifetime."""

    def count(layer: LayerConfig, D: int) -> int:
        return sum(b.values for mixer in layer.mixers for b in mixer.buffers() if b.lifetime == lifetime)

    return sum(_each_layer(config, count))


def _open_bytes(mixer: MixerSpec, bytes: int, snapshot: bool) -> int:
    total = 0
    for b in mixer.buffers():
        size = bytes if b.dtype == "model" else 4
        if b.lifetime == "pending":
            rows = min(mixer.chunk, MAX_CHUNK) * (1 if snapshot else 2)
            total += size * (b.history + rows) * b.values
        elif b.lifetime == "scratch" and not snapshot:
            total += size * b.values
    return total


def _each_layer(config: ModelConfig, count: Callable[[LayerConfig, int], int]) -> list[int]:
    """`count` of every layer; equal layers are worked out once."""
    known: dict[LayerConfig, int] = {}
    return [
        known[layer] if layer in known else known.setdefault(layer, count(layer, config.width))
        for layer in config.layers
    ]


def shapes(config: ModelConfig) -> Iterator[tuple[str, tuple[int, ...], bool]]:
    """Name, shape, and whether it is at least float32 (norms, convolutions, decays, routers), of every parameter."""
    for name, p in parameters(config).items():
        yield name, p.shape, p.keep_fp32


# ── the picture


def _layer_picture(layer: LayerConfig) -> str:
    mixers = " ∥ ".join(mixer.label for mixer in layer.mixers)
    if not layer.mixers and layer.feed_forward is not None:
        return layer.feed_forward.label
    if layer.feed_forward is None:
        return mixers if len(layer.mixers) == 1 else f"({mixers})"
    return f"({mixers} + {layer.feed_forward.label})"


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
