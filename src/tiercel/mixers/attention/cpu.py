"""Native attention (cpu.cpp): rotary angles, keys and values into pages, causal grouped-query attention.

References: `rotary.py`, `sdpa.py`.  Letters: T tokens, H heads, K key/value heads, P head dim, R rotated dims.
"""

from __future__ import annotations

from torch import Tensor

from tiercel.ops.cpu import native
from tiercel.ops.cpu.batch import BatchMetadata
from tiercel.ops.cpu.native import address


def rotary(batch: BatchMetadata, f_R: Tensor, scale: float) -> tuple[Tensor, Tensor]:
    """cos and sin (T, R / 2) of every new token's position."""
    R = f_R.shape[0]
    cos_TR, sin_TR = native.empty(batch.tokens, R), native.empty(batch.tokens, R)
    native.extension.rotary(batch, address(f_R), address(cos_TR), address(sin_TR), R, scale)
    return cos_TR, sin_TR


def attention(
    batch: BatchMetadata,
    q_TI: Tensor,
    k_TM: Tensor,
    v_TM: Tensor,
    turn: tuple[Tensor, Tensor] | None,
    *,
    heads: int,
    kv_heads: int,
    scale: float,
    window: int | None,
    round: bool = False,
) -> Tensor:
    """As `AttentionOp`; `round` is of no use here."""
    q_TI, k_TM, v_TM = q_TI.float(), k_TM.float(), v_TM.float()
    cos_TR, sin_TR = turn if turn is not None else (None, None)
    R = 0 if cos_TR is None else cos_TR.shape[1]
    P = q_TI.shape[1] // heads
    y_TI = native.empty(batch.tokens, heads * P)
    cos, sin = address(cos_TR), address(sin_TR)
    native.extension.store_kv(batch, address(k_TM), address(v_TM), cos, sin, k_TM.stride(0), R, kv_heads, P)
    native.extension.paged_attention(
        batch, address(q_TI), cos, sin, address(y_TI), q_TI.stride(0), R, heads, kv_heads, P, window or 0, scale
    )  # fmt: skip
    return y_TI
