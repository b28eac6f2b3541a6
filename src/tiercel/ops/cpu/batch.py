"""What native kernels read of a batch, and the convolution that mixers share: all sequences in one op.

Kernels also read and write the sequences' states (`model/state.py`), which they find through a `BatchMetadata`.
Activations are float32; conv_state, x, B, keys and values are rounded to the state's dtype before anything reads them,
so that a token meets the same numbers in its own call and in every later one.
"""

from __future__ import annotations

from typing import NamedTuple

from torch import Tensor

from tiercel.ops.cpu import native
from tiercel.ops.cpu.native import address


class BatchMetadata(NamedTuple):
    """The sequences of a batch and one layer of their states, as kernels read them; valid as long as the Batch lives.

    address   of the slices, (sequences, 3) int64: state descriptor, first token, new tokens
    layer     where the layer's descriptor begins in a state's
    is_bf16   whether states keep bfloat16, else float32
    tokens    new tokens of all sequences
    """

    address: int
    sequences: int
    layer: int
    is_bf16: bool
    tokens: int


def causal_conv1d(
    batch: BatchMetadata,
    x_TC: Tensor,
    weight_KC: Tensor,
    bias_C: Tensor | None,
    dt: tuple[Tensor, Tensor, tuple[float, float]] | None = None,
) -> tuple[Tensor, Tensor | None]:
    """silu of the causal convolution over history and new inputs; all rows may lie apart by the same stride.

    dt: dt (T, H), its bias (H,) and limits, for softplus(dt + bias).  → (T, C) and dt (T, H) if given, float32.
    """
    (K, C), T = weight_KC.shape, batch.tokens
    y_TC = native.empty(T, C)
    dt_TH, bias_H, limits = (None, None, (0.0, 0.0)) if dt is None else dt
    assert dt_TH is None or dt_TH.stride(0) == x_TC.stride(0)
    H = 0 if bias_H is None else bias_H.shape[0]
    out_TH = native.empty(T, H) if H else None
    native.extension.causal_conv1d(
        batch, address(x_TC), address(weight_KC), address(bias_C), address(dt_TH), address(bias_H), address(y_TC),
        address(out_TH), x_TC.stride(0), C, K, H, *limits,
    )  # fmt: skip
    return y_TC, out_TH
