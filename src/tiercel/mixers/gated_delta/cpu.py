"""Native gated delta rule (cpu.cpp): convolution and chunked rule over the sequences' states.

Reference: `chunked.py`.  Letters: T tokens, C conv channels, J taps, G key heads, H value heads, K and V their widths.
"""

from __future__ import annotations

from torch import Tensor

from tiercel.ops.cpu import native
from tiercel.ops.cpu.batch import BatchMetadata, causal_conv1d
from tiercel.ops.cpu.native import address


def gated_delta(
    batch: BatchMetadata,
    qkv_TC: Tensor,
    b_TH: Tensor,
    dt_TH: Tensor,
    weight_JC: Tensor,
    dt_bias_H: Tensor,
    A_H: Tensor,
    *,
    key_heads: int,
    key_dim: int,
    value_dim: int,
    chunk: int,
    beta_max: float,
    tiled: bool,
) -> Tensor:
    """As `GatedDeltaOp`."""
    qkv_TC, H = qkv_TC.float(), A_H.shape[0]
    b_TH, dt_TH = b_TH.float().contiguous(), dt_TH.float().contiguous()
    mixed_TC, _ = causal_conv1d(batch, qkv_TC, weight_JC, None)
    o_TI, u_TI = native.empty(batch.tokens, H * value_dim), native.empty(batch.tokens, H * value_dim)
    native.extension.gated_delta(
        batch, address(mixed_TC), address(b_TH), address(dt_TH), address(dt_bias_H), address(A_H), address(qkv_TC),
        address(o_TI), address(u_TI), qkv_TC.stride(0), key_heads, H, key_dim, value_dim, weight_JC.shape[0], chunk,
        beta_max, tiled,
    )  # fmt: skip
    return o_TI
