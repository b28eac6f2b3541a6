"""Native kernels of what depends on a row's own past: attention, convolution and scans, for all rows in one op.

Their references are `ops/attention.py`, `rotary.py`, `conv1d.py`, `ssd.py`, `scan.py` and `norm.py`; here they also
read and write the rows' states (`model/state.py`), which they find through `texts`, what `Batch.texts` returns.
Activations are float32; columns, x, B, keys and values are rounded to the state's dtype before anything reads them,
so that a token meets the same numbers in its own call and in every later one.
"""

from __future__ import annotations

from collections.abc import Sequence
from typing import NamedTuple

from torch import Tensor

from tiercel.ops import cpu


class Texts(NamedTuple):
    """Where the rows of a batch are, and one layer part in their states.  Valid as long as the Batch lives."""

    address: int
    rows: int
    part: int
    half: bool
    tokens: int


def _at(t: Tensor | None, offset: int = 0) -> int:
    return 0 if t is None else t.data_ptr() + 4 * offset


def rotary(texts: Texts, f_R: Tensor, scale: float) -> tuple[Tensor, Tensor]:
    """cos and sin (T, R / 2) of every new token's position."""
    R = f_R.shape[0]
    cos_TR, sin_TR = cpu.empty(texts.tokens, R), cpu.empty(texts.tokens, R)
    cpu._native.rotary(texts, _at(f_R), _at(cos_TR), _at(sin_TR), R, scale)
    return cos_TR, sin_TR


def attention(
    texts: Texts,
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
    """Turn q (T, H · P) and k (T, K · P), remember k and v, attend → (T, H · P)."""
    q_TI, k_TM, v_TM = q_TI.float(), k_TM.float(), v_TM.float()
    cos_TR, sin_TR = turn if turn is not None else (None, None)
    R = 0 if cos_TR is None else cos_TR.shape[1]
    P = q_TI.shape[1] // heads
    y_TI = cpu.empty(texts.tokens, heads * P)
    cos, sin = _at(cos_TR), _at(sin_TR)
    cpu._native.remember(texts, _at(k_TM), _at(v_TM), cos, sin, k_TM.stride(0), R, kv_heads, P)
    cpu._native.attend(
        texts, _at(q_TI), cos, sin, _at(y_TI), q_TI.stride(0), R, heads, kv_heads, P, window or 0, scale
    )  # fmt: skip
    return y_TI


def mamba2(
    texts: Texts,
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
    xBC_TC, dt_TH, y_TI = cpu.empty(texts.tokens, C), cpu.empty(texts.tokens, H), cpu.empty(texts.tokens, I)
    columns, dt = _at(zxBCdt_TD, I), _at(zxBCdt_TD, I + C)
    cpu._native.conv(
        texts, columns, _at(weight_KC), _at(bias_C), dt, _at(dt_bias_H), _at(xBC_TC), _at(dt_TH), stride,
        C, K, H, *dt_limit,
    )  # fmt: skip
    cpu._native.ssd(
        texts, _at(xBC_TC), _at(dt_TH), _at(A_H), _at(D_H), columns, _at(y_TI), stride,
        H, head_dim, groups, state, K, chunk,
    )  # fmt: skip
    return y_TI


def gated_norm(
    y_TI: Tensor, z_TI: Tensor, weight_I: Tensor | None, eps: float, groups: int, gate_first: bool
) -> Tensor:
    """norm(y · silu(z)), norm(y) · silu(z) or, without a weight, y · silu(z); z's rows may lie apart."""
    z_TI = z_TI.float()
    T, I = y_TI.shape
    out_TI = cpu.empty(T, I)
    cpu._native.gated_norm(
        _at(y_TI), _at(z_TI), _at(weight_I), _at(out_TI), T, I, z_TI.stride(0), groups, eps, gate_first
    )  # fmt: skip
    return out_TI


def conv1d(texts: Texts, x_TC: Tensor, weight_KC: Tensor, bias_C: Tensor | None) -> Tensor:
    """silu of the causal convolution over history and new columns, whose rows may lie apart → (T, C)."""
    K, C = weight_KC.shape
    y_TC = cpu.empty(texts.tokens, C)
    cpu._native.conv(
        texts, _at(x_TC), _at(weight_KC), _at(bias_C), 0, 0, _at(y_TC), 0, x_TC.stride(0), C, K, 0, 0.0, 0.0
    )  # fmt: skip
    return y_TC


def select(
    texts: Texts, x_TS: Tensor, norms: Sequence[Tensor | None], rank: int, state: int, eps: float
) -> tuple[Tensor, Tensor, Tensor]:
    """The parts dt (T, R), B and C (T, N) of Mamba-1's x_proj, each normed where it has a weight."""
    widths = rank, state, state
    dt_TR, B_TN, C_TN = (cpu.empty(texts.tokens, width) for width in widths)
    addresses = [_at(norm) for norm in norms] + [_at(dt_TR), _at(B_TN), _at(C_TN)]
    cpu._native.select(_at(x_TS), *addresses, texts.tokens, *widths, eps, texts.half)
    return dt_TR, B_TN, C_TN


def selective_scan(
    texts: Texts,
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
    """(scan(x, softplus(dt + bias), A, B, C) + D x) · silu(z) → (T, I); xz: what in_proj made, columns | z."""
    T, I = x_TI.shape
    N = A_NI.shape[0]
    y_TI = cpu.empty(T, I)
    cpu._native.scan(
        texts, _at(x_TI), _at(dt_TI), _at(dt_bias_I), _at(B_TN), _at(C_TN), _at(A_NI), _at(D_I),
        _at(xz_TI, I), _at(xz_TI), _at(y_TI), xz_TI.stride(0), I, N, taps, chunk,
    )  # fmt: skip
    return y_TI
