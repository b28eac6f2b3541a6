"""A network on a machine: what it takes, part by part, how fast it will be, whether it fits, and what would.

weights     every matrix in the packing it is held in, filled up to the kernels' panels
KV          whole pages of 64 tokens for every sequence
states      committed state (float32) and open inputs of every sequence
snapshots   copies of states that a conversation can go back to, SNAPSHOTS_PER_SLOT of them
working     what one forward of 512 tokens needs between layers
process     Python, torch, the tokenizer's tables

step of R rows = Σ matrices + R · (keys, values and states read) + layers · a layer's own time
prompt of n tokens = Σ products + attention (n² / 2 pairs) + scan + what lies between products + the layers' own time
"""

from __future__ import annotations

import dataclasses
import math
from collections import Counter, defaultdict
from collections.abc import Iterator, Mapping
from dataclasses import dataclass
from typing import Any

from tiercel.errors import RequestError
from tiercel.mixers.spec import Cost
from tiercel.model.config import LayerConfig, ModelConfig
from tiercel.model.parameters import parameters
from tiercel.plan.machines import Machine, Product
from tiercel.plan.sizes import PREFILL_TOKENS, kv_bytes, kv_bytes_per_token, open_bytes, parameter_count, state_bytes
from tiercel.quant import PACKED_TYPES, fits, held_bytes, recipes, row_bytes

SNAPSHOTS_PER_SLOT = (
    4  # last user turn, end of the prompt and one before it, end of the answer (engine/snapshot_policy.py)
)
# Resident bytes of a process that answers, the network aside, read from /proc on Linux with torch 2.13: 240 MB after
# the imports, 25 of libraries met while loading, 20 that kernels and small outputs take at the first forward.
CPU_PROCESS_BYTES = 285_000_000
GPU_PROCESS_BYTES = 600_000_000  # a CUDA context and the kernels
TOKENIZER_BYTES_PER_TOKEN = 1_200  # bytes for each word of the vocabulary: SmolLM2's 49,152 take 58 MB
FLOATS = {"float32": "F32", "f32": "F32", "float": "F32", "bfloat16": "BF16", "bf16": "BF16",
          "float16": "F16", "f16": "F16", "half": "F16"}  # fmt: skip
FLOAT_BYTES = {"F32": 4, "BF16": 2, "F16": 2}
CONTEXT_TOKENS = (4096, 32_768, 131_072, 262_144)
SMALLER = ("q8_0", "q6_k", "q5_k_m", "q4_k_m", "q3_k_m", "q2_k")


@dataclass(frozen=True)
class Matrix:
    """What is held under one name, and how."""

    name: str
    kind: str
    shape: tuple[int, ...]
    keep_fp32: bool

    @property
    def values(self) -> int:
        return math.prod(self.shape)

    def nbytes(self, panels: bool) -> int:
        if self.kind in FLOAT_BYTES and (not panels or self.keep_fp32 or len(self.shape) < 2):
            return FLOAT_BYTES[self.kind] * self.values
        *experts, N, K = self.shape
        one = held_bytes(self.kind, N, K) if panels else N * row_bytes(self.kind, K)
        return math.prod(experts) * one


def matrices(
    config: ModelConfig, stored: Mapping[str, str] | str, dtype: str = "auto", quantize: str | None = None
) -> list[Matrix]:
    """Every parameter in the type `weights.load` will hold it in.

    stored: type of each parameter, or of all, as the file has them.  Raises RequestError for names not known.
    """
    table = parameters(config)
    kinds = dict.fromkeys(table, stored) if isinstance(stored, str) else dict(stored)
    if quantize is not None:
        if dtype != "auto":
            raise RequestError(f"choose one: --dtype {dtype} or --quantize {quantize}")
        if (recipe := recipes.find(quantize)) is None:
            raise RequestError(f"no recipe {quantize!r}; known: {', '.join(recipes.RECIPES)}")
        kinds |= recipes.quant_types(table, recipe)
    if dtype == "auto":
        largest = kinds.get(max(table, key=lambda name: table[name].values), "BF16")
        plain = "F32" if largest in ("F32", "F64") or largest in PACKED_TYPES else "BF16"
    elif (found := FLOATS.get(dtype)) is not None:
        plain = found
    else:
        raise RequestError(f"dtype {dtype!r} is not known; choose auto, float32, bfloat16 or float16")

    def kind(name: str, shape: tuple[int, ...], keep_fp32: bool) -> str:
        if keep_fp32 or len(shape) < 2:
            return "F32"
        own = kinds.get(name, plain)
        return own if dtype == "auto" and own in PACKED_TYPES and fits(own, shape[-1]) else plain

    return [Matrix(name, kind(name, p.shape, p.keep_fp32), p.shape, p.keep_fp32) for name, p in table.items()]


@dataclass(frozen=True)
class Forecast:
    """Bytes and tokens a second; None where the machine's speeds are not known.

    state_bytes_per_sequence: committed, float32; open inputs come on top · decode_tok_s: all slots together
    cache: what snapshots may take; given or SNAPSHOTS_PER_SLOT for each slot
    """

    parameters: int
    precision: str
    context: int
    slots: int
    device: str
    weights_bytes: int
    kv_bytes_per_token: int
    kv_bytes: int
    state_bytes_per_sequence: int
    open_bytes_per_sequence: int
    state_bytes: int
    snapshot_bytes: int
    snapshots_bytes: int
    working_bytes: int
    process_bytes: int
    total_bytes: int
    free_bytes: int
    fits: bool
    prefill_tok_s: float | None
    decode_tok_s: float | None

    def to_dict(self) -> dict[str, Any]:
        return dataclasses.asdict(self)

    @property
    def cache_bytes(self) -> int:
        """What one sequence's memory takes: the number a context is paid with."""
        return (self.kv_bytes + self.state_bytes) // self.slots


def forecast(
    config: ModelConfig,
    machine: Machine,
    *,
    stored: Mapping[str, str] | str = "BF16",
    dtype: str = "auto",
    quantize: str | None = None,
    context: int,
    slots: int = 1,
    tokenizer: bool = True,
    cache: int | None = None,
) -> Forecast:
    """Raises RequestError for what cannot be asked."""
    if context < 1 or slots < 1:
        raise RequestError(f"a plan needs a context and slots from 1, not {context} and {slots}")
    held = matrices(config, stored, dtype, quantize)
    size = _state_size(held)
    weights = sum(matrix.nbytes(not machine.gpu) for matrix in held)
    kv = slots * kv_bytes(config, context, size)
    state, opened = state_bytes(config), open_bytes(config, size)
    snapshot = state + open_bytes(config, size, snapshot=True)
    snapshots = (SNAPSHOTS_PER_SLOT * slots * snapshot if state else 0) if cache is None else cache
    working = _working(config, slots)
    process = (GPU_PROCESS_BYTES if machine.gpu else CPU_PROCESS_BYTES) + (
        TOKENIZER_BYTES_PER_TOKEN * config.vocab_size if tokenizer else 0
    )
    total = weights + kv + slots * (state + opened) + snapshots + working + process
    speed = machine.measured
    return Forecast(
        parameters=parameter_count(config),
        precision=_precision(held),
        context=context,
        slots=slots,
        device=machine.name,
        weights_bytes=weights,
        kv_bytes_per_token=kv_bytes_per_token(config, size),
        kv_bytes=kv,
        state_bytes_per_sequence=state,
        open_bytes_per_sequence=opened,
        state_bytes=slots * (state + opened),
        snapshot_bytes=snapshot,
        snapshots_bytes=snapshots,
        working_bytes=working,
        process_bytes=process,
        total_bytes=total,
        free_bytes=machine.free,
        fits=total <= machine.free,
        prefill_tok_s=_rounded(context / prefill_seconds(config, held, machine, context)) if speed else None,
        decode_tok_s=_rounded(slots / step_seconds(config, held, machine, context, slots)) if speed else None,
    )


def _state_size(held: list[Matrix]) -> int:
    """Bytes of a value that states keep of the inputs (model/decoder.py): bfloat16 beside packed matrices."""
    return 4 if held[0].kind == "F32" else 2


def _precision(held: list[Matrix]) -> str:
    count: Counter[str] = Counter()
    for matrix in held:
        if not matrix.keep_fp32 and len(matrix.shape) > 1:
            count[matrix.kind] += matrix.values
    return " + ".join(kind for kind, values in count.most_common(2) if values > 0.02 * count.total())


def _rounded(speed: float) -> float:
    return float(f"{speed:.4g}")


def _working(config: ModelConfig, slots: int) -> int:
    """float32 of PREFILL_TOKENS tokens in memory at once in the widest layer, and the logits of all slots."""
    return (
        4 * PREFILL_TOKENS * (4 * config.width + max(map(_layer_width, set(config.layers))))
        + 4 * slots * config.vocab_size
    )


def _layer_width(layer: LayerConfig) -> int:
    """Values of one token between the norms of a layer."""
    mixers = sum(cost.width for cost in _mixer_costs(layer, 1, 0))
    return max(mixers, layer.feed_forward.cost(1).width if layer.feed_forward else 0)


def _mixer_costs(layer: LayerConfig, tokens: int, context: int) -> list[Cost]:
    return [mixer.cost(tokens, context) for mixer in layer.mixers]


# ── speed


def step_seconds(config: ModelConfig, held: list[Matrix], machine: Machine, context: int, rows: int = 1) -> float:
    """One token of each of `rows` sequences, all of them at this length."""
    nbytes: dict[str, float] = defaultdict(float)
    for layer, count in Counter(config.layers).items():
        for mixer in layer.mixers:
            size = 4 if mixer.recurrent else _state_size(held)
            for rate, values in mixer.cost(1, context).reads.items():
                nbytes[rate] += count * size * values
    read = sum(total / machine.rate(rate) for rate, total in nbytes.items())
    layers = len(config.layers) * machine.layer_s
    return _products(config, held, machine, rows) + rows * read + layers


def prefill_seconds(config: ModelConfig, held: list[Matrix], machine: Machine, tokens: int) -> float:
    """A prompt from empty, PREFILL_TOKENS at a time."""
    calls, last = divmod(tokens, PREFILL_TOKENS)
    products = calls * _products(config, held, machine, PREFILL_TOKENS, prompt=True)
    products += _products(config, held, machine, last, prompt=True) if last else 0.0
    ops: dict[str, float] = defaultdict(float)
    between = 0
    for layer, count in Counter(config.layers).items():
        costs = _mixer_costs(layer, tokens, 0)
        between += count * (4 * config.width + sum(cost.between for cost in costs))
        between += count * layer.feed_forward.cost(tokens).between if layer.feed_forward else 0
        for cost in costs:
            for rate, number in cost.ops.items():
                ops[rate] += count * number
    mixers = sum(number / machine.rate(rate) for rate, number in ops.items())
    layers = (calls + bool(last)) * len(config.layers) * machine.layer_s
    return products + mixers + 4 * tokens * between / machine.flow + layers


def _products(config: ModelConfig, held: list[Matrix], machine: Machine, rows: int, prompt: bool = False) -> float:
    """Seconds of all products with `rows` rows.  prompt: logits of the last token alone."""
    values: Counter[tuple[str, int]] = Counter()
    nbytes: Counter[tuple[str, int]] = Counter()
    for matrix, met, share in _read(config, held, rows, prompt):
        values[matrix.kind, met] += int(matrix.values * share)
        nbytes[matrix.kind, met] += int(matrix.nbytes(not machine.gpu) * share)
    return sum(_seconds(machine.product(kind), nbytes[kind, met], values[kind, met], met) for kind, met in values)


def _read(config: ModelConfig, held: list[Matrix], rows: int, prompt: bool) -> Iterator[tuple[Matrix, int, float]]:
    """The matrices that are multiplied with, how many rows each meets, and the share of it that is read."""
    for matrix in held:
        if matrix.keep_fp32 or len(matrix.shape) < 2 or (matrix.name == "embed.weight" and not config.tied):
            continue  # an embedding is looked up
        if len(matrix.shape) == 3:
            feed_forward = config.layers[int(matrix.name.split(".")[1])].feed_forward
            assert feed_forward is not None
            active, experts = feed_forward.routing()
            yield matrix, max(1, rows * active // experts), min(1.0, rows * active / experts)
        elif matrix.name in ("embed.weight", "head.weight"):
            yield matrix, 1 if prompt else rows, 1.0
        else:
            yield matrix, rows, 1.0


def _seconds(product: Product, nbytes: int, values: int, rows: int) -> float:
    """From one row to eight the time grows in a line; beyond, the rate goes from that of eight to that of 512."""
    one, eight = nbytes / product.one, 16 * values / product.few
    if rows < 8:
        return max(one, one + (eight - one) * (rows - 1) / 7)
    way = min(math.log(rows / 8) / math.log(PREFILL_TOKENS / 8), 1.0)
    return max(one, 2 * rows * values / float(product.few ** (1 - way) * product.many**way))


# ── beside it, and instead of it


def transformer_of(config: ModelConfig) -> ModelConfig:
    """A Llama-shaped network as deep and as wide, with the same vocabulary and as many parameters as whole blocks of
    256 allow (7B: 0.5 % fewer, 0.5B: 1.6 % more).

    Four query heads share a key head, as in Llama 3; the feed-forward takes what is left.
    """
    D, L = config.width, len(config.layers)
    head_dim = 128 if D >= 2048 else 64
    heads = max(4, D // head_dim // 4 * 4)
    mixer = {"kind": "attention", "heads": heads, "kv_heads": heads // 4, "head_dim": head_dim,
             "rope": {"theta": 500_000.0}}  # fmt: skip

    def shape(width: int) -> ModelConfig:
        layer = {"mixers": [mixer], "feed_forward": {"kind": "gated_mlp", "width": width}, "repeat": L}
        return ModelConfig.from_dict(config.to_dict() | {"layers": [layer]})

    smallest = shape(256)
    each = 3 * D * L
    width = 256 + max(0, round((parameter_count(config) - parameter_count(smallest)) / each / 256)) * 256
    return shape(width)


@dataclass(frozen=True)
class Setting:
    """How a model is asked for; `None` for precision: as stored."""

    context: int
    slots: int
    quantize: str | None

    def words(self) -> str:
        out = [f"--context {self.context}", f"--slots {self.slots}"]
        return " ".join(out + ([f"--quantize {self.quantize}"] if self.quantize else []))


def smaller(now: Forecast, quantize: str | None, packed: bool) -> Iterator[Setting]:
    """What to try in place of what does not fit, the nearest first: slots, then precision, then context, then more
    of them together.  packed: the file's own precision is packed already, and stays."""
    recipe = recipes.find(quantize or "")
    lower = () if packed else SMALLER[SMALLER.index(recipe) + 1 :] if recipe in SMALLER else SMALLER
    slots = [2**i for i in range(now.slots.bit_length() - 1, -1, -1) if 2**i < now.slots]
    contexts = [now.context >> i for i in range(1, 20) if now.context >> i >= 1024]
    at = Setting(now.context, now.slots, quantize)
    yield from (dataclasses.replace(at, slots=n) for n in slots)
    yield from (dataclasses.replace(at, quantize=name) for name in lower)
    yield from (dataclasses.replace(at, context=n) for n in contexts)
    for name in lower:
        yield from (Setting(now.context, n, name) for n in slots)
    fewest = slots[-1] if slots else now.slots
    yield from (Setting(n, fewest, name) for name in (quantize, *lower) for n in contexts)
