"""What machines can do in a second.  Bytes, bytes a second, operations a second (a multiply and an add are two).

Of this machine the speeds are measured (`bench/probe.py`); the table holds machines one might buy or rent.  Memory
bandwidth there is the maker's figure; what our kernels get of it comes from our own measurements, named beside.
"""

from __future__ import annotations

import math
from collections.abc import Mapping
from dataclasses import dataclass, field

from tiercel.errors import RequestError
from tiercel.quant import held_bytes

GB, TERA = 1e9, 1e12


@dataclass(frozen=True)
class Product:
    """A matrix of one packing: bytes of it that one row reads, operations for eight rows and for 512."""

    one: float
    few: float
    many: float


RATES = ("attend", "attend_read", "scan", "scan_read", "scan1", "scan1_read", "flow")


@dataclass(frozen=True)
class Machine:
    """memory, free: bytes in all, and what a model may take.  gpu: no panels, a CUDA context instead of our process

    products    by packing; "packed" stands for every packed type that is not named
    attend      operations of attention while a prompt is read · attend_read: bytes of keys and values in a step
    scan        state values · tokens while a prompt is read · scan_read: bytes of states in a step (Mamba-1: scan1)
    layer_s     seconds of one layer of a step, products aside
    flow        bytes of the numbers between two products while a prompt is read
    """

    name: str
    memory: int
    free: int
    products: Mapping[str, Product] = field(default_factory=dict)
    attend: float = 1.0
    attend_read: float = 1.0
    scan: float = 1.0
    scan_read: float = 1.0
    scan1: float = 1.0
    scan1_read: float = 1.0
    layer_s: float = 0.0
    flow: float = math.inf
    read: float = 0.0
    gpu: bool = False
    source: str = ""

    def product(self, kind: str) -> Product:
        return self.products.get(kind) or self.products["F32" if kind in ("F32", "F16") else "packed"]

    def rate(self, name: str) -> float:
        """What bounds a mixer's work (`mixers.spec.Cost`); RequestError for a name that is no rate of machines."""
        if name not in RATES:
            raise RequestError(f"machines have no rate {name!r}; known: {', '.join(RATES)}")
        value: float = getattr(self, name)
        return value

    @property
    def measured(self) -> bool:
        """Whether its speeds are known."""
        return bool(self.products)


# ── this machine, from pieces of work whose seconds `bench/probe.py` measures

PROBE = 3  # goes up when what the probe measures changes: seconds of another probe are not taken over
PROBE_BYTES = 1 << 28  # bytes
LARGE_SHAPE, SMALL_SHAPE = (16_384, 4096), (2048, 2048)  # matrices beyond the caches and within
FEW_ROWS, MANY_ROWS = 8, 512  # rows
LAYERS, CONTEXT, WIDE = 4, 4096, 2048
# What whole networks take over the sum of these pieces: one number for all steps, one for the products of all prompts,
# chosen with benchmarks/plan_vs_measured.py's combinations on two Zen-5 cores (2026-11-27), where steps then come out
# within -16 and +17 %, prompts within -9 and +18 %.  Not checked on combinations or machines they were not chosen with.
STEP, PROMPT = 1.22, 1.12


@dataclass(frozen=True)
class Piece:
    """A network of LAYERS small layers, after `context` tokens."""

    layers: str
    context: int
    sizes: Mapping[str, int]


_HEADS = {"heads": 8, "kv_heads": 2, "head_dim": 64}
_BIG2, _SMALL2 = ({"expand": n, "mamba_head_dim": 64, "state": state} for n, state in ((24, 128), (1, 16)))
PROBES: dict[str, Piece] = {
    "layer": Piece("attention", 0, {"heads": 1, "head_dim": 16}),
    "layer wide": Piece("attention", 0, {"heads": 1, "head_dim": 16, "width": 32, "ffn_width": WIDE}),
    "attention near": Piece("attention/-", 0, _HEADS),
    "attention far": Piece("attention/-", CONTEXT, _HEADS),
    "mamba2 big": Piece("mamba2/-", 0, _BIG2),
    "mamba2 small": Piece("mamba2/-", 0, _SMALL2),
    "mamba1 big": Piece("mamba1/-", 0, {"expand": 24, "state": 16}),
    "mamba1 small": Piece("mamba1/-", 0, {"expand": 1, "state": 16}),
}


def from_probe(name: str, memory: int, free: int, seconds: Mapping[str, float]) -> Machine:
    """The rates behind those seconds; where two are subtracted, the rest is what differs between the two."""

    def more(a: str, b: str, what: str) -> float:
        return max(seconds[f"{a} {what}"] - seconds[f"{b} {what}"], seconds[f"{a} {what}"] / 20)

    def product(kind: str) -> Product:
        large, small = (shape[0] * shape[1] for shape in (LARGE_SHAPE, SMALL_SHAPE))
        return Product(
            held_bytes(kind, *LARGE_SHAPE) / seconds[f"{kind} one"] / STEP,
            2 * FEW_ROWS * large / seconds[f"{kind} few"] / STEP,
            2 * MANY_ROWS * small / seconds[f"{kind} many"] / PROMPT,
        )

    heads, kv_heads, P = _HEADS.values()
    cells2 = LAYERS * (64 * 24 * 128 - 64 * 16)
    cells1 = LAYERS * (64 * 24 * 16 - 64 * 16)
    return Machine(
        name, memory, free,
        {kind: product(kind) for kind in (key.removesuffix(" one") for key in seconds if key.endswith(" one"))},
        attend=LAYERS * 4 * heads * P * MANY_ROWS * CONTEXT / more("attention far", "attention near", "chunk"),
        attend_read=LAYERS * 2 * kv_heads * P * 2 * CONTEXT / more("attention far", "attention near", "step") / STEP,
        scan=cells2 * MANY_ROWS / more("mamba2 big", "mamba2 small", "chunk"),
        scan_read=4 * cells2 / more("mamba2 big", "mamba2 small", "step") / STEP,
        scan1=cells1 * MANY_ROWS / more("mamba1 big", "mamba1 small", "chunk"),
        scan1_read=4 * cells1 / more("mamba1 big", "mamba1 small", "step") / STEP,
        layer_s=seconds["layer step"] / LAYERS * STEP,
        flow=LAYERS * 3 * 4 * WIDE * MANY_ROWS / more("layer wide", "layer", "chunk"),
        read=PROBE_BYTES / seconds["read"],
        source="measured here; again with --measure, when it is quiet",
    )  # fmt: skip


# ── the table

# Operations per core and clock of our kernels where eight-bit products are AVX2's or AVX-512 VNNI's: docs/history.md,
# "packed products": Q4_K, two threads, 512 rows 340 GOP/s at 2.8 GHz (AVX2) and 700 at 2.6 GHz (VNNI), eight rows
# 250 and 355.  bf16 and float32 there: 32 lanes of FMA at three quarters.
PACKED = {"avx2": (45.0, 61.0), "vnni": (68.0, 130.0), "neon": (12.0, 16.0)}
FLOATS = {"avx2": (14.0, 24.0), "vnni": (20.0, 40.0), "neon": (8.0, 12.0)}
BANDWIDTH_SHARE = (
    0.74  # of the bandwidth that a step's weights are read with: benchmarks/results/cpu.json, 0.5b-decode 0.743
)
GPU_DECODE, GPU_PREFILL = 0.73, 0.55  # docs/gpu.md: decode over weights / bandwidth, prefill 8K over the product
GPU_Q4 = 0.40  # docs/gpu.md: Q4_K decode 190 tok/s where the weights alone allow 660; part of it is launches
GPU_LAYER_S = 2.8 / 1000 / 44  # docs/gpu.md: 4.8 ms of a Q4_K step, of which 2 ms are products, 44 layers


def _cpu(name: str, gb: int, bandwidth: float, cores: int, ghz: float, isa: str, source: str) -> Machine:
    """cores: those that are fast; bandwidth in GB/s."""
    read, hz = bandwidth * GB, cores * ghz * 1e9
    few, many = (rate * hz for rate in PACKED[isa])
    slow_few, slow_many = (rate * hz for rate in FLOATS[isa])
    floats = Product(read * BANDWIDTH_SHARE, slow_few, slow_many)
    one = min(
        read * BANDWIDTH_SHARE, 0.2 * few
    )  # docs/history.md: from the cache 50 GB/s where eight rows reach 250 GOP/s
    return Machine(
        name, gb << 30, (gb << 30) - (3 << 30),
        {"packed": Product(one, few, many), "BF16": floats, "F32": floats},
        # shares of the clock from bench/probe.py on the two AVX2 cores of docs/history.md
        attend=15 * hz, attend_read=0.6 * read, scan=1.2 * hz, scan_read=0.6 * read, scan1=0.07 * hz,
        scan1_read=0.22 * hz, layer_s=2e-5, read=read, source=source,
        flow=min(2 * hz, 0.5 * read),  # the same on two Zen-5 cores
    )  # fmt: skip


def _gpu(name: str, gb: float, bandwidth: float, tflops: float, source: str) -> Machine:
    read, many = bandwidth * GB, tflops * TERA * GPU_PREFILL
    floats = Product(read * GPU_DECODE, many, many)
    return Machine(
        name, int(gb * GB), int(gb * GB - GB),
        {"packed": Product(read * GPU_Q4, many, many), "BF16": floats, "F32": Product(floats.one, many / 8, many / 8)},
        attend=many / 2, attend_read=0.5 * read, scan=many / 400, scan_read=0.5 * read, scan1=many / 2000,
        scan1_read=0.5 * read, layer_s=GPU_LAYER_S, read=read, gpu=True, source=source,
    )  # fmt: skip


MACHINES: dict[str, Machine] = {
    m.name: m
    for m in (
        # channels · transfers · 8 bytes: JEDEC; cores and clocks: makers' data sheets, all-core
        _cpu("laptop-ddr4", 16, 51.2, 4, 3.0, "avx2", "2 × DDR4-3200 (JEDEC), 4 cores of AVX2 at 3.0 GHz"),
        _cpu("laptop-ddr5", 32, 89.6, 8, 3.5, "avx2", "2 × DDR5-5600 (JEDEC), 8 cores of AVX2 at 3.5 GHz"),
        _cpu("laptop-lpddr5x", 32, 119.5, 8, 3.5, "vnni", "LPDDR5X-7467 × 128 bit, 8 Zen-5 cores"),
        _cpu("desktop-ddr5", 64, 96.0, 16, 4.5, "vnni", "2 × DDR5-6000, Ryzen 9950X (AMD)"),
        _cpu("epyc-genoa", 384, 460.8, 96, 3.1, "vnni", "12 × DDR5-4800, EPYC 9654 (AMD)"),
        _cpu("m1", 16, 68.25, 4, 3.2, "neon", "Apple M1; our kernels there are plain C: an estimate"),
        _cpu("m3-pro", 18, 150.0, 6, 4.0, "neon", "Apple M3 Pro; our kernels there are plain C: an estimate"),
        _cpu("m4-max", 64, 546.0, 12, 4.4, "neon", "Apple M4 Max; our kernels there are plain C: an estimate"),
        _gpu("l4", 24, 300, 121, "NVIDIA L4 data sheet, dense bf16"),
        _gpu("rtx-3090", 24, 936, 71, "NVIDIA GA102 white paper, dense bf16 with float32 sums"),
        _gpu("rtx-4090", 24, 1008, 165, "NVIDIA Ada white paper, dense bf16 with float32 sums"),
        _gpu("a100", 80, 2039, 312, "NVIDIA A100 80GB SXM data sheet"),
        _gpu("h100", 80, 3350, 989, "NVIDIA H100 SXM data sheet; shares measured there, docs/gpu.md"),
        _gpu("h200", 141, 4800, 989, "NVIDIA H200 SXM data sheet"),
    )
}


def machine(name: str) -> Machine:
    if name.lower() not in MACHINES:
        raise RequestError(f"no device {name!r}; known: this, {', '.join(MACHINES)}")
    return MACHINES[name.lower()]
