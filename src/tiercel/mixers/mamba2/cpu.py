"""Native Mamba-2 (cpu.cpp): convolution and chunked scan over the sequences' states.

Reference: `chunked.py`.  Letters: T tokens, I inner, C conv channels, K taps, H heads, P head dim, G groups, N state.
"""

from __future__ import annotations

from torch import Tensor

from tiercel.ops.cpu import native
from tiercel.ops.cpu.batch import BatchMetadata, causal_conv1d
from tiercel.ops.cpu.native import address


def mamba2(
    batch: BatchMetadata,
    zxBCdt_TD: Tensor,
    weight_KC: Tensor,
    bias_C: Tensor | None,
    dt_bias_H: Tensor,
    A_H: Tensor,
    D_H: Tensor,
    *,
    head_dim: int,
    groups: int,
    state: int,
    chunk: int,
    dt_limit: tuple[float, float],
) -> Tensor:
    """As `Mamba2Op`."""
    zxBCdt_TD = zxBCdt_TD.float()
    (K, C), H, stride = weight_KC.shape, A_H.shape[0], zxBCdt_TD.stride(0)
    I = H * head_dim
    in_TC, raw_TH = zxBCdt_TD[:, I : I + C], zxBCdt_TD[:, I + C :]
    xBC_TC, dt_TH = causal_conv1d(batch, in_TC, weight_KC, bias_C, (raw_TH, dt_bias_H, dt_limit))
    y_TI = native.empty(batch.tokens, I)
    native.extension.ssd(
        batch, address(xBC_TC), address(dt_TH), address(A_H), address(D_H), address(in_TC), address(y_TI), stride,
        H, head_dim, groups, state, K, chunk,
    )  # fmt: skip
    return y_TI
