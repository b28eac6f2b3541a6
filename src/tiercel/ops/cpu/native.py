"""The native kernels, under the names of their references in `tiercel.ops`; tensors in, tensors out.

An extension module does the work (`module.cpp`).  Where it was not built, or with TIERCEL_ISA=torch, the network runs
on the torch references.  TIERCEL_ISA=avx512 | avx2 | portable selects an instruction set.

Everything here is float32 between ops and without gradients.  While a `CapturedGraph` records, every call is noted with
its addresses, and outputs come from the graph's own memory: the step can then be run again without Python.

Letters: T tokens, N outputs and K inputs of a matrix, D width, B bytes of a row.
"""

from __future__ import annotations

import contextlib
import math
import os
import threading
from collections.abc import Iterator, Sequence
from typing import Any, Protocol

import torch
from torch import Tensor

from tiercel.errors import RequestError
from tiercel.quant import panel_bytes as panel_bytes
from tiercel.runtime.workspace import MIN_WORKSPACE_BYTES, workspace

extension: Any
try:
    from tiercel.ops.cpu import _native as extension  # type: ignore[attr-defined, no-redef]
except ImportError:  # not built for this interpreter or machine
    extension = None

REQUESTED_ISA = os.environ.get("TIERCEL_ISA", "")


def _choose() -> str:
    """The instruction set in use; "torch" without kernels or by request."""
    if REQUESTED_ISA == "torch" or (extension is None and not REQUESTED_ISA):
        return "torch"
    found = [] if extension is None else extension.available()
    if REQUESTED_ISA and REQUESTED_ISA not in found:
        raise RequestError(f"TIERCEL_ISA={REQUESTED_ISA} is not here; this machine has {', '.join([*found, 'torch'])}")
    if REQUESTED_ISA:
        extension.choose(REQUESTED_ISA)
    extension.set_threads(torch.get_num_threads())
    return str(extension.isa())


isa = _choose()
available = isa != "torch"


@contextlib.contextmanager
def single_threaded(on: bool) -> Iterator[None]:
    """Give torch one thread on this thread meanwhile, if `on`.

    The kernels have threads of their own, and what is left for torch, copies and sampling, is small.  On a busy machine
    each torch loop on two threads waits for a core: a copy of a 0.5B's state took 700 ms beside two busy programs, and
    5 ms on one thread.
    """
    threads = torch.get_num_threads()
    if on:
        torch.set_num_threads(1)
    try:
        yield
    finally:
        torch.set_num_threads(threads)


class Recorder(Protocol):
    """What notes native calls: `ops.cpu.capture.CapturedGraph`."""

    def empty(self, *shape: int) -> Tensor: ...
    def quantized(self, x: Tensor, how: tuple[int, ...]) -> Tensor | None: ...
    def keep_quantized(self, x: Tensor, how: tuple[int, ...], quantized: Tensor) -> None: ...


class _Recording(threading.local):
    """The graph that records the calls of this thread: models of one process run in threads of their own."""

    graph: Recorder | None = None


recording = _Recording()


def empty(*shape: int) -> Tensor:
    """Uninitialised memory for an output, float32."""
    if recording.graph is not None:
        return recording.graph.empty(*shape)
    nbytes = 4 * math.prod(shape)
    return torch.empty(shape) if nbytes < MIN_WORKSPACE_BYTES else workspace(nbytes).view(torch.float32).view(shape)


def address(t: Tensor | None) -> int:
    """Where a float32 tensor's numbers are; 0 for None."""
    return 0 if t is None else t.data_ptr()


def takes(*tensors: Tensor) -> bool:
    """Whether a kernel takes these: contiguous float32 in CPU memory, and no gradient is wanted."""
    if not available or torch.is_grad_enabled():
        return False
    return all(t.dtype == torch.float32 and t.device.type == "cpu" and t.is_contiguous() for t in tensors)


def rms_norm(x_TD: Tensor, weight_D: Tensor, eps: float) -> Tensor:
    """w · x / √(mean(x²) + eps)"""
    y_TD = empty(*x_TD.shape)
    width = x_TD.shape[-1]
    extension.rms_norm(x_TD.data_ptr(), weight_D.data_ptr(), y_TD.data_ptr(), x_TD.numel() // width, width, eps)
    return y_TD


def gated_norm(
    y_TI: Tensor, z_TI: Tensor, weight_I: Tensor | None, eps: float, groups: int, gate_first: bool, *,
    round: bool = False,
) -> Tensor:  # fmt: skip
    """As `mixers.mamba2.ops.GatedNormOp`; `round` is of no use here."""
    z_TI = z_TI.float()
    T, I = y_TI.shape
    out_TI = empty(T, I)
    extension.gated_norm(
        address(y_TI), address(z_TI), address(weight_I), address(out_TI), T, I, z_TI.stride(0), groups, eps, gate_first
    )  # fmt: skip
    return out_TI


def add(a: Tensor, b: Tensor) -> Tensor:
    """a + b"""
    y = empty(*a.shape)
    extension.add(a.data_ptr(), b.data_ptr(), y.data_ptr(), a.numel())
    return y


ACTIVATIONS = {"silu": 0, "gelu": 1, "gelu_tanh": 2, "relu": 3, "sigmoid": 4, "relu2": 5}


def gate(gate: Tensor, up: Tensor, activation: str) -> Tensor:
    """act(gate) · up"""
    y = empty(*gate.shape)
    extension.gate(gate.data_ptr(), up.data_ptr(), y.data_ptr(), gate.numel(), ACTIVATIONS[activation])
    return y


def activate(x: Tensor, activation: str) -> Tensor:
    """act(x)"""
    y = empty(*x.shape)
    extension.gate(x.data_ptr(), 0, y.data_ptr(), x.numel(), ACTIVATIONS[activation])
    return y


def add_gated(a_TD: Tensor, b_TD: Tensor, scores_T1: Tensor) -> Tensor:
    """a + σ(scores) · b"""
    y_TD = empty(*a_TD.shape)
    extension.add_gated(address(a_TD), address(b_TD), address(scores_T1), address(y_TD), *a_TD.shape)
    return y_TD


# ── matrices: see ops/qtensor.py

FORMATS: dict[str, int] = {} if extension is None else {name: i for i, name in enumerate(extension.formats)}
SUPER_BLOCKS = ("Q2_K", "Q3_K", "Q4_K", "Q5_K", "Q6_K")


def quantize(quant_type: str, x: Tensor, weights: Tensor | None, out: Tensor) -> None:
    """`quant.quantize` for SUPER_BLOCKS, bit for bit; all tensors contiguous, weights (n) float32."""
    rows, width = x.shape
    at = 0 if weights is None else weights.data_ptr()
    extension.quantize(FORMATS[quant_type], x.data_ptr(), at, out.data_ptr(), rows, width, out.shape[1])


def repack(quant_type: str, raw_NB: Tensor, panels: Tensor, shape: Sequence[int], start: int) -> None:
    """Interleave rows from `start`, a multiple of 16, into panels of 16 rows."""
    N, K = shape
    assert start % 16 == 0 and start + len(raw_NB) <= N and (len(raw_NB) % 16 == 0 or start + len(raw_NB) == N)
    extension.repack(raw_NB.data_ptr(), panels.data_ptr(), K, N, start, len(raw_NB), FORMATS[quant_type])


def unpack_rows(quant_type: str, raw_NB: Tensor, panels: Tensor, shape: Sequence[int], start: int) -> None:
    """Inverse of `repack`: write the file's bytes of rows from `start` into `raw_NB`."""
    N, K = shape
    assert start % 16 == 0 and start + len(raw_NB) <= N
    extension.unpack_rows(raw_NB.data_ptr(), panels.data_ptr(), K, N, start, len(raw_NB), FORMATS[quant_type])


def compress_bf12(panels: Tensor, shape: Sequence[int]) -> Tensor:
    """Panels of "BF16" as panels of "BF16_12", the same numbers: see bf12.h."""
    N, K = shape
    sizes = torch.empty(-(-N // 16), dtype=torch.int64)
    highest = torch.empty(len(sizes), dtype=torch.uint8)
    extension.compress_bf12(panels.data_ptr(), 0, sizes.data_ptr(), highest.data_ptr(), K, N)
    head = -(-sizes.nbytes // 64) * 64
    ends = sizes.cumsum(0) + head
    out = torch.empty(int(ends[-1]), dtype=torch.uint8)
    out[: sizes.nbytes] = (ends - sizes).view(torch.uint8)
    extension.compress_bf12(panels.data_ptr(), out.data_ptr(), sizes.data_ptr(), highest.data_ptr(), K, N)
    return out


def get_rows(quant_type: str, panels: Tensor, shape: Sequence[int], which_T: Tensor, scale: float = 1.0) -> Tensor:
    """Rows by number times `scale`, (T, K) float32."""
    y_TK = empty(len(which_T), shape[1])
    extension.get_rows(
        panels.data_ptr(), which_T.data_ptr(), y_TK.data_ptr(), shape[1], len(which_T), scale, FORMATS[quant_type]
    )  # fmt: skip
    return y_TK


# type: (inputs that share a scale, zero point of its unsigned quants), which the quantization of inputs depends on
INPUT_BLOCKS = {
    "Q4_0": (32, 8), "Q4_1": (32, 0), "Q5_0": (32, 16), "Q5_1": (32, 0), "Q8_0": (32, 128), "Q2_K": (16, 0),
    "Q3_K": (16, 4), "Q4_K": (32, 0), "Q5_K": (32, 0), "Q6_K": (16, 32), "INT8": (32, 128), "NF4": (32, 128),
}  # fmt: skip


def _quantized_input(quant_type: str, x_TK: Tensor) -> Tensor | None:
    """The inputs of a product as its kernel reads them; while capturing, once for all products with the same inputs."""
    is_bf16 = quant_type in ("BF16", "BF16_12")
    if quant_type not in INPUT_BLOCKS and not is_bf16:
        return None
    T, K = x_TK.shape
    sub, zero = INPUT_BLOCKS.get(quant_type, (0, 0))
    graph = recording.graph
    if graph is not None and (known := graph.quantized(x_TK, (T, K, sub, zero))) is not None:
        return known
    if is_bf16:
        quantized = empty(T, -(-K // 2))
        extension.inputs_to_bf16(x_TK.data_ptr(), quantized.data_ptr(), T, K)
    else:
        quantized = empty(T, -(-K // 32) * (9 + 64 // sub))
        extension.quantize_inputs(x_TK.data_ptr(), quantized.data_ptr(), T, K, sub, zero)
    if graph is not None:
        graph.keep_quantized(x_TK, (T, K, sub, zero), quantized)
    return quantized


def linear(
    quant_type: str,
    panels: Tensor,
    shape: Sequence[int],
    x_TK: Tensor,
    bias_N: Tensor | None,
    scale: float,
    exact: bool,
) -> Tensor:
    """scale · x Wᵀ + b, (T, N); exact: inputs stay float32."""
    N, K = shape
    T = x_TK.shape[0]
    y_TN = empty(T, N)
    quantized = None if exact or T == 1 else _quantized_input(quant_type, x_TK)
    extension.linear(
        panels.data_ptr(), panels.nbytes, x_TK.data_ptr(), 0 if quantized is None else quantized.data_ptr(),
        0 if bias_N is None else bias_N.data_ptr(), y_TN.data_ptr(), K, N, T, scale, FORMATS[quant_type], exact,
    )  # fmt: skip
    return y_TN


# ── experts: see ops/moe.py


class Router(Protocol):
    """What `moe.route` is asked for; `feed_forward.moe.config.MoEConfig` says what each is."""

    @property
    def active(self) -> int: ...
    @property
    def scores(self) -> str: ...
    @property
    def groups(self) -> int: ...
    @property
    def active_groups(self) -> int: ...
    @property
    def renormalize(self) -> bool: ...
    @property
    def renormalize_eps(self) -> float: ...
    @property
    def scale(self) -> float: ...


def route(scores_TE: Tensor, config: Router, correction_E: Tensor | None) -> tuple[Tensor, Tensor]:
    """`moe.route`; the experts' numbers are int32 in memory of float32."""
    T, E = scores_TE.shape
    weights_TK, chosen_TK = empty(T, config.active), empty(T, config.active)
    extension.route(
        address(scores_TE), address(correction_E), address(weights_TK), address(chosen_TK), T, E, config.active,
        config.groups, config.active_groups, config.renormalize_eps, config.scale, config.scores == "sigmoid",
        config.renormalize,
    )  # fmt: skip
    return weights_TK, chosen_TK


def experts(
    x_TD: Tensor, weights_TK: Tensor, chosen_TK: Tensor, tables: Sequence[Tensor | None], shape: Sequence[int],
    activation: str, exact: bool,
) -> Tensor:  # fmt: skip
    """`moe.moe`; tables: where gate, up and down of every expert are, and their formats; shape: (E, F, D)."""
    gate, up, down = (address(table) for table in tables)
    (T, K), (E, F, D) = chosen_TK.shape, shape
    h, y, out_TD = empty(T * K, F), empty(T * K, D), empty(T, D)
    u = empty(T * K, F) if gate else None
    extension.experts(
        gate, up, address(x_TD), address(chosen_TK), address(h), address(u), D, F, T, E, K, ACTIVATIONS[activation],
        False, exact,
    )  # fmt: skip
    extension.experts(0, down, address(h), address(chosen_TK), address(y), 0, F, D, T, E, K, -1, True, exact)
    extension.combine(address(y), address(weights_TK), address(chosen_TK), address(out_TD), D, T, E, K)
    return out_TD
