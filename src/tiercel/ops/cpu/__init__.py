"""The native kernels, under the names of their references one level up; tensors in, tensors out.

An extension module does the work (`module.cpp`); where it was not built, or TIERCEL_ISA=torch asks for it, the
network runs on the torch references.  TIERCEL_ISA=avx512 | avx2 | portable forces an instruction set.

Everything here is float32 between ops and without gradients.  While a `CapturedGraph` records, every call is noted with
its addresses, and outputs come from memory that stays: the step can then be run again without Python.
"""

from __future__ import annotations

import contextlib
import math
import os
from collections.abc import Iterator, Sequence
from typing import TYPE_CHECKING

import torch
from torch import Tensor

from tiercel.errors import RequestError
from tiercel.quant import panel_bytes as panel_bytes
from tiercel.runtime.workspace import LARGE, passing

if TYPE_CHECKING:
    from tiercel.ops.cpu.capture import CapturedGraph

try:
    from tiercel.ops.cpu import _native  # type: ignore[attr-defined]
except ImportError:  # not built for this interpreter or machine
    _native = None

WANTED = os.environ.get("TIERCEL_ISA", "")


def _choose() -> str:
    """The instruction set in use; "torch" when there are no kernels or none are wanted."""
    if WANTED == "torch" or (_native is None and not WANTED):
        return "torch"
    there = [] if _native is None else _native.available()
    if WANTED and WANTED not in there:
        raise RequestError(f"TIERCEL_ISA={WANTED} is not here; this machine has {', '.join([*there, 'torch'])}")
    if WANTED:
        _native.choose(WANTED)
    _native.set_threads(torch.get_num_threads())
    return _native.isa()


isa = _choose()
there = isa != "torch"


@contextlib.contextmanager
def alone(native: bool) -> Iterator[None]:
    """On this thread torch has one thread meanwhile, if `native`: the kernels have their own, and what is left for
    torch, copies and sampling, is small.  On a busy machine every loop of its on two threads waits for a core: a copy
    of a 0.5B's state took 700 ms beside two busy programs, and 5 ms so."""
    threads = torch.get_num_threads()
    if native:
        torch.set_num_threads(1)
    try:
        yield
    finally:
        torch.set_num_threads(threads)


recorder: CapturedGraph | None = None  # the tape that records


def empty(*shape: int) -> Tensor:
    """Memory for an output, float32."""
    if recorder is not None:
        return recorder.empty(*shape)
    nbytes = 4 * math.prod(shape)
    return torch.empty(shape) if nbytes < LARGE else passing(nbytes).view(torch.float32).view(shape)


def takes(*tensors: Tensor) -> bool:
    """Whether a kernel can be given these: plain float32 in this machine's memory, and no gradient is wanted."""
    if not there or torch.is_grad_enabled():
        return False
    return all(t.dtype == torch.float32 and t.device.type == "cpu" and t.is_contiguous() for t in tensors)


def rms_norm(x_TD: Tensor, weight_D: Tensor, eps: float) -> Tensor:
    y_TD = empty(*x_TD.shape)
    width = x_TD.shape[-1]
    _native.rms_norm(x_TD.data_ptr(), weight_D.data_ptr(), y_TD.data_ptr(), x_TD.numel() // width, width, eps)
    return y_TD


def add(a: Tensor, b: Tensor) -> Tensor:
    y = empty(*a.shape)
    _native.add(a.data_ptr(), b.data_ptr(), y.data_ptr(), a.numel())
    return y


ACTIVATIONS = {"silu": 0, "gelu": 1, "gelu_tanh": 2, "relu": 3}


def gate(gate: Tensor, up: Tensor, activation: str) -> Tensor:
    """act(gate) · up"""
    y = empty(*gate.shape)
    _native.gate(gate.data_ptr(), up.data_ptr(), y.data_ptr(), gate.numel(), ACTIVATIONS[activation])
    return y


# ── matrices: see ops/linear.py

FORMATS = {} if _native is None else {name: i for i, name in enumerate(_native.formats)}
SUPER_BLOCKS = ("Q2_K", "Q3_K", "Q4_K", "Q5_K", "Q6_K")


def quantize(type: str, x: Tensor, weights: Tensor | None, out: Tensor) -> None:
    """`quant.quantize` for SUPER_BLOCKS, bit for bit; all tensors contiguous, weights (n) float32."""
    rows, width = x.shape
    at = 0 if weights is None else weights.data_ptr()
    _native.quantize(FORMATS[type], x.data_ptr(), at, out.data_ptr(), rows, width, out.shape[1])


def to_panels(type: str, raw_NB: Tensor, panels: Tensor, shape: Sequence[int], start: int) -> None:
    """Put rows from `start`, a multiple of sixteen, in their place."""
    N, K = shape
    assert start % 16 == 0 and start + len(raw_NB) <= N and (len(raw_NB) % 16 == 0 or start + len(raw_NB) == N)
    _native.to_panels(raw_NB.data_ptr(), panels.data_ptr(), K, N, start, len(raw_NB), FORMATS[type])


def from_panels(type: str, raw_NB: Tensor, panels: Tensor, shape: Sequence[int], start: int) -> None:
    """The way back."""
    N, K = shape
    assert start % 16 == 0 and start + len(raw_NB) <= N
    _native.from_panels(raw_NB.data_ptr(), panels.data_ptr(), K, N, start, len(raw_NB), FORMATS[type])


def to_twelve(panels: Tensor, shape: Sequence[int]) -> Tensor:
    """Panels of "BF16" as those of "BF16_12", the same numbers: see twelve.h."""
    N, K = shape
    sizes = torch.empty(-(-N // 16), dtype=torch.int64)
    highest = torch.empty(len(sizes), dtype=torch.uint8)
    _native.to_twelve(panels.data_ptr(), 0, sizes.data_ptr(), highest.data_ptr(), K, N)
    head = -(-sizes.nbytes // 64) * 64
    ends = sizes.cumsum(0) + head
    out = torch.empty(int(ends[-1]), dtype=torch.uint8)
    out[: sizes.nbytes] = (ends - sizes).view(torch.uint8)
    _native.to_twelve(panels.data_ptr(), out.data_ptr(), sizes.data_ptr(), highest.data_ptr(), K, N)
    return out


def rows(type: str, panels: Tensor, shape: Sequence[int], which_T: Tensor) -> Tensor:
    y_TK = empty(len(which_T), shape[1])
    _native.rows(
        panels.data_ptr(), which_T.data_ptr(), y_TK.data_ptr(), shape[1], len(which_T), 1.0, FORMATS[type]
    )  # fmt: skip
    return y_TK


# type: inputs that share a scale, where its unsigned quants have their zero; what the rounding of inputs has to know
ROUNDED = {
    "Q4_0": (32, 8), "Q4_1": (32, 0), "Q5_0": (32, 16), "Q5_1": (32, 0), "Q8_0": (32, 128), "Q2_K": (16, 0),
    "Q3_K": (16, 4), "Q4_K": (32, 0), "Q5_K": (32, 0), "Q6_K": (16, 32), "INT8": (32, 128), "NF4": (32, 128),
}  # fmt: skip


def _rounded(type: str, x_TK: Tensor) -> Tensor | None:
    """The inputs of a product as its kernel wants them; a tape makes them once for all that read the same."""
    half = type in ("BF16", "BF16_12")
    if type not in ROUNDED and not half:
        return None
    T, K = x_TK.shape
    sub, zero = ROUNDED.get(type, (0, 0))
    if recorder is not None and (known := recorder.rounded(x_TK, (T, K, sub, zero))) is not None:
        return known
    if half:
        rounded = empty(T, -(-K // 2))
        _native.round_bf16(x_TK.data_ptr(), rounded.data_ptr(), T, K)
    else:
        rounded = empty(T, -(-K // 32) * (9 + 64 // sub))
        _native.round_inputs(x_TK.data_ptr(), rounded.data_ptr(), T, K, sub, zero)
    if recorder is not None:
        recorder.keep_rounded(x_TK, (T, K, sub, zero), rounded)
    return rounded


def linear(
    type: str, panels: Tensor, shape: Sequence[int], x_TK: Tensor, bias_N: Tensor | None, scale: float, exact: bool
) -> Tensor:
    N, K = shape
    T = x_TK.shape[0]
    y_TN = empty(T, N)
    rounded = None if exact or T == 1 else _rounded(type, x_TK)
    _native.linear(
        panels.data_ptr(), panels.nbytes, x_TK.data_ptr(), 0 if rounded is None else rounded.data_ptr(),
        0 if bias_N is None else bias_N.data_ptr(), y_TN.data_ptr(), K, N, T, scale, FORMATS[type], exact,
    )  # fmt: skip
    return y_TN
