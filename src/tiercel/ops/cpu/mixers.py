"""Native kernels of mixers: attention, convolution and scans of all sequences of a batch in one op.

Their references are `ops/attention.py`, `rotary.py`, `conv1d.py`, `norm.py` and those in `mixers/`; here they also read
and write the sequences' states (`model/state.py`), which they find through a `BatchMetadata`.  Activations are float32;
conv_state, x, B, keys and values are rounded to the state's dtype before anything reads them, so that a token meets the
same numbers in its own call and in every later one.
"""

from __future__ import annotations

from collections.abc import Sequence
from typing import NamedTuple

from torch import Tensor

from tiercel.ops.cpu import native


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


def _at(t: Tensor | None, offset: int = 0) -> int:
    return 0 if t is None else t.data_ptr() + 4 * offset


def rotary(batch: BatchMetadata, f_R: Tensor, scale: float) -> tuple[Tensor, Tensor]:
    """cos and sin (T, R / 2) of every new token's position."""
    R = f_R.shape[0]
    cos_TR, sin_TR = native.empty(batch.tokens, R), native.empty(batch.tokens, R)
    native.extension.rotary(batch, _at(f_R), _at(cos_TR), _at(sin_TR), R, scale)
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
) -> Tensor:
    """Turn q (T, H · P) and k (T, K · P), store k and v in pages, attend → (T, H · P)."""
    q_TI, k_TM, v_TM = q_TI.float(), k_TM.float(), v_TM.float()
    cos_TR, sin_TR = turn if turn is not None else (None, None)
    R = 0 if cos_TR is None else cos_TR.shape[1]
    P = q_TI.shape[1] // heads
    y_TI = native.empty(batch.tokens, heads * P)
    cos, sin = _at(cos_TR), _at(sin_TR)
    native.extension.store_kv(batch, _at(k_TM), _at(v_TM), cos, sin, k_TM.stride(0), R, kv_heads, P)
    native.extension.paged_attention(
        batch, _at(q_TI), cos, sin, _at(y_TI), q_TI.stride(0), R, heads, kv_heads, P, window or 0, scale
    )  # fmt: skip
    return y_TI


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
    """From z | x B C | dt, one row per token: convolution, dt, scan, D x → (T, H · P)."""
    zxBCdt_TD = zxBCdt_TD.float()
    K, C = weight_KC.shape
    H, stride = A_H.shape[0], zxBCdt_TD.stride(0)
    I = H * head_dim
    xBC_TC, dt_TH, y_TI = native.empty(batch.tokens, C), native.empty(batch.tokens, H), native.empty(batch.tokens, I)
    conv_in, dt = _at(zxBCdt_TD, I), _at(zxBCdt_TD, I + C)
    native.extension.causal_conv1d(
        batch, conv_in, _at(weight_KC), _at(bias_C), dt, _at(dt_bias_H), _at(xBC_TC), _at(dt_TH), stride,
        C, K, H, *dt_limit,
    )  # fmt: skip
    native.extension.ssd(
        batch, _at(xBC_TC), _at(dt_TH), _at(A_H), _at(D_H), conv_in, _at(y_TI), stride,
        H, head_dim, groups, state, K, chunk,
    )  # fmt: skip
    return y_TI


def gated_norm(
    y_TI: Tensor, z_TI: Tensor, weight_I: Tensor | None, eps: float, groups: int, gate_first: bool
) -> Tensor:
    """norm(y · silu(z)), norm(y) · silu(z) or, without a weight, y · silu(z); z's rows may lie apart."""
    z_TI = z_TI.float()
    T, I = y_TI.shape
    out_TI = native.empty(T, I)
    native.extension.gated_norm(
        _at(y_TI), _at(z_TI), _at(weight_I), _at(out_TI), T, I, z_TI.stride(0), groups, eps, gate_first
    )  # fmt: skip
    return out_TI


def conv1d(batch: BatchMetadata, x_TC: Tensor, weight_KC: Tensor, bias_C: Tensor | None) -> Tensor:
    """silu of the causal convolution over history and new inputs, whose rows may lie apart → (T, C)."""
    K, C = weight_KC.shape
    y_TC = native.empty(batch.tokens, C)
    native.extension.causal_conv1d(
        batch, _at(x_TC), _at(weight_KC), _at(bias_C), 0, 0, _at(y_TC), 0, x_TC.stride(0), C, K, 0, 0.0, 0.0
    )  # fmt: skip
    return y_TC


def split_norm(
    batch: BatchMetadata, x_TS: Tensor, norms: Sequence[Tensor | None], rank: int, state: int, eps: float
) -> tuple[Tensor, Tensor, Tensor]:
    """Split Mamba-1's x_proj into dt (T, R), B and C (T, N), each normed where it has a weight."""
    widths = rank, state, state
    dt_TR, B_TN, C_TN = (native.empty(batch.tokens, width) for width in widths)
    addresses = [_at(norm) for norm in norms] + [_at(dt_TR), _at(B_TN), _at(C_TN)]
    native.extension.split_norm(_at(x_TS), *addresses, batch.tokens, *widths, eps, batch.is_bf16)
    return dt_TR, B_TN, C_TN


def selective_scan(
    batch: BatchMetadata,
    x_TI: Tensor,
    dt_TI: Tensor,
    dt_bias_I: Tensor,
    B_TN: Tensor,
    C_TN: Tensor,
    A_NI: Tensor,
    D_I: Tensor,
    xz_TI: Tensor,
    *,
    taps: int,
    chunk: int,
) -> Tensor:
    """(scan(x, softplus(dt + bias), A, B, C) + D x) · silu(z) → (T, I); xz: output of in_proj."""
    T, I = x_TI.shape
    N = A_NI.shape[0]
    y_TI = native.empty(T, I)
    native.extension.selective_scan(
        batch, _at(x_TI), _at(dt_TI), _at(dt_bias_I), _at(B_TN), _at(C_TN), _at(A_NI), _at(D_I),
        _at(xz_TI, I), _at(xz_TI), _at(y_TI), xz_TI.stride(0), I, N, taps, chunk,
    )  # fmt: skip
    return y_TI
