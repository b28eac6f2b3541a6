"""Native kernels of training, on torch's threads: what stands between the products with matrices.

Values are float32 or bfloat16, each tensor of its own, and rows may lie apart; sums, and all that is not an activation,
are float32.  Dropout is a seed: the kernels find again what they dropped, no mask is kept.

Letters: T tokens, K inputs and N outputs of a matrix, R rank, C channels, and those of `mixers.mamba2.varlen`.
"""

from __future__ import annotations

from typing import NamedTuple

import torch
from torch import Tensor

from tiercel.ops.cpu import native

TAPS = 0 if native.extension is None else native.extension.TAPS  # of a convolution at most


class Dropout(NamedTuple):
    """below: what is dropped of 65536."""

    seed: int
    below: int

    @classmethod
    def of(cls, p: float) -> Dropout:
        return NONE if p == 0 else cls(int(torch.empty((), dtype=torch.int64).random_()), round(p * 65536))


NONE = Dropout(0, 0)


def takes(*tensors: Tensor) -> bool:
    """Whether the kernels can be given these, whether or not gradients are wanted."""
    return native.available and all(
        t.device.type == "cpu" and t.dtype in (torch.float32, torch.bfloat16) for t in tensors
    )


def strided(x_TD: Tensor | None) -> tuple[int, int, bool]:
    if x_TD is None:
        return 0, 0, False
    assert x_TD.stride(1) == 1
    return x_TD.data_ptr(), x_TD.stride(0), x_TD.dtype == torch.bfloat16


def rows(x: Tensor) -> Tensor:
    """x as (T, D) whose rows are whole."""
    x_TD = x.flatten(0, -2)
    return x_TD if x_TD.stride(1) == 1 else x_TD.contiguous()


def matrix(t: Tensor | None) -> tuple[int, int, bool]:
    """A contiguous (…, D)."""
    return strided(None if t is None else t.flatten(0, -2))


def f32(t: Tensor | None) -> int:
    assert t is None or (t.is_contiguous() and t.dtype == torch.float32)
    return 0 if t is None else t.data_ptr()


# ── low rank


def lora_a(x_TK: Tensor, w_KR: Tensor, dropout: Dropout = NONE) -> Tensor:
    """dropout(x) w, float32."""
    (T, K), R = x_TK.shape, w_KR.shape[1]
    y_TR = torch.empty(T, R)
    native.extension.lora_a(strided(x_TK), w_KR.data_ptr(), y_TR.data_ptr(), T, K, R, dropout)
    return y_TR


def lora_b(x_TR: Tensor, w_RN: Tensor, base_TN: Tensor | None, dtype: torch.dtype, dropout: Dropout = NONE) -> Tensor:
    """base + dropout(x w)"""
    (T, R), N = x_TR.shape, w_RN.shape[1]
    y_TN = torch.empty(T, N, dtype=dtype)
    native.extension.lora_b(x_TR.data_ptr(), w_RN.data_ptr(), strided(base_TN), strided(y_TN), T, R, N, dropout)
    return y_TN


def lora_grad(a_TR: Tensor, x_TK: Tensor, dropout: Dropout = NONE) -> Tensor:
    """aᵀ dropout(x), (R, K) float32."""
    (T, K), R = x_TK.shape, a_TR.shape[1]
    y_RK = torch.empty(R, K)
    native.extension.lora_grad(a_TR.data_ptr(), strided(x_TK), y_RK.data_ptr(), T, R, K, False, dropout)
    return y_RK


def lora_grad_rows(x_TK: Tensor, a_TR: Tensor) -> Tensor:
    """xᵀ a, (K, R) float32."""
    (T, K), R = x_TK.shape, a_TR.shape[1]
    y_KR = torch.empty(K, R)
    native.extension.lora_grad(a_TR.data_ptr(), strided(x_TK), y_KR.data_ptr(), T, R, K, True, NONE)
    return y_KR


# ── sums, gate


def add_mixed(a_TD: Tensor, b_TD: Tensor, dtype: torch.dtype) -> Tensor:
    """a + b, whatever the dtypes of the two."""
    y_TD = torch.empty(a_TD.shape, dtype=dtype)
    native.extension.add_mixed(strided(a_TD), strided(b_TD), strided(y_TD), *a_TD.shape)
    return y_TD


def silu_gate(g_TD: Tensor, u_TD: Tensor, dtype: torch.dtype) -> Tensor:
    """silu(g) · u"""
    y_TD = torch.empty(g_TD.shape, dtype=dtype)
    native.extension.silu_gate(strided(g_TD), strided(u_TD), strided(y_TD), *g_TD.shape)
    return y_TD


def silu_gate_backward(g_TD: Tensor, u_TD: Tensor, dy_TD: Tensor) -> tuple[Tensor, Tensor]:
    """The gradients of g and u, in their dtypes."""
    dg_TD, du_TD = torch.empty(g_TD.shape, dtype=g_TD.dtype), torch.empty(u_TD.shape, dtype=u_TD.dtype)
    native.extension.silu_gate_backward(
        strided(g_TD), strided(u_TD), strided(dy_TD), strided(dg_TD), strided(du_TD), *g_TD.shape
    )
    return dg_TD, du_TD


# ── convolution


def conv1d_varlen(
    x_TC: Tensor, weight_KC: Tensor, bias_C: Tensor | None, reach_T: Tensor, dtype: torch.dtype, silu: bool
) -> Tensor:
    """weight: by lag;  reach: the lags of each token that stay in its document."""
    (T, C), y_TC = x_TC.shape, torch.empty(x_TC.shape, dtype=dtype)
    bias = 0 if bias_C is None else bias_C.data_ptr()
    native.extension.conv1d_varlen(
        strided(x_TC), weight_KC.data_ptr(), bias, reach_T.data_ptr(), strided(y_TC), T, C, len(weight_KC),
        silu,
    )  # fmt: skip
    return y_TC


def conv1d_varlen_backward(
    x_TC: Tensor, weight_KC: Tensor, bias_C: Tensor | None, reach_T: Tensor, dy_TC: Tensor, silu: bool
) -> tuple[Tensor, Tensor, Tensor | None]:
    """The gradients of x, in its dtype, weight and bias."""
    (T, C), dx_TC, dweight_KC = x_TC.shape, torch.empty(x_TC.shape, dtype=x_TC.dtype), torch.empty_like(weight_KC)
    bias, dbias_C = (0, None) if bias_C is None else (bias_C.data_ptr(), torch.empty_like(bias_C))
    native.extension.conv1d_varlen_backward(
        strided(x_TC), weight_KC.data_ptr(), bias, reach_T.data_ptr(), strided(dy_TC), strided(dx_TC),
        dweight_KC.data_ptr(), 0 if dbias_C is None else dbias_C.data_ptr(), T, C, len(weight_KC), silu,
    )  # fmt: skip
    return dx_TC, dweight_KC, dbias_C


# ── loss


def cross_entropy_(logits_TV: Tensor, targets_T: Tensor) -> Tensor:
    """−log causal_softmax(logits)[target], (T,); the logits become its gradient, in their dtype."""
    losses_T = torch.empty(len(logits_TV))
    native.extension.cross_entropy(
        strided(logits_TV), targets_T.contiguous().data_ptr(), f32(losses_T), *logits_TV.shape
    )  # fmt: skip
    return losses_T


# ── norm


def rms_norm_train(x_TD: Tensor, weight_D: Tensor, eps: float, dtype: torch.dtype) -> tuple[Tensor, Tensor]:
    """w · x r, and r = 1 / √(mean(x²) + eps), (T, 1)."""
    y_TD, r_T1 = torch.empty(x_TD.shape, dtype=dtype), torch.empty(len(x_TD), 1)
    native.extension.rms_norm_train(strided(x_TD), f32(weight_D), strided(y_TD), f32(r_T1), *x_TD.shape, eps)
    return y_TD, r_T1


def rms_norm_train_backward(x_TD: Tensor, weight_D: Tensor, r_T1: Tensor, dy_TD: Tensor) -> Tensor:
    """The gradient of x, in its dtype."""
    dx_TD = torch.empty(x_TD.shape, dtype=x_TD.dtype)
    native.extension.rms_norm_train_backward(
        strided(x_TD), f32(weight_D), f32(r_T1), strided(dy_TD), strided(dx_TD), *x_TD.shape
    )
    return dx_TD
