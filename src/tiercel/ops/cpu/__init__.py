"""The native kernels, under the names of their references one level up; tensors in, tensors out.

An extension module does the work (`module.cpp`); where it was not built, or TIERCEL_ISA=torch asks for it, the
network runs on the torch references.  TIERCEL_ISA=avx512 | avx2 | portable forces an instruction set.

Everything here is float32 between ops and without gradients.  While a `Tape` records, every call is noted with its
addresses, and outputs come from memory that stays: the step can then be run again without Python.
"""

from __future__ import annotations

import os

import torch
from torch import Tensor

from tiercel.errors import RequestError

try:
    from tiercel.ops.cpu import _native
except ImportError:  # not built for this interpreter or machine
    _native = None  # type: ignore[assignment]

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


def empty(*shape: int) -> Tensor:
    """Memory for an output, float32."""
    return torch.empty(shape)


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


SUPER_BLOCKS = {"Q2_K": 0, "Q3_K": 1, "Q4_K": 2, "Q5_K": 3, "Q6_K": 4}


def quantize(type: str, x: Tensor, weights: Tensor | None, out: Tensor) -> None:
    """`quant.quantize` for SUPER_BLOCKS, bit for bit; all tensors contiguous, weights (n) float32."""
    rows, width = x.shape
    at = 0 if weights is None else weights.data_ptr()
    _native.quantize(SUPER_BLOCKS[type], x.data_ptr(), at, out.data_ptr(), rows, width, out.shape[1])
