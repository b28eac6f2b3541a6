"""Native kernels of training, on torch's threads: what stands between the products with matrices.

Values are float32 or bfloat16, each tensor of its own, and rows may lie apart; sums, and all that is not an activation,
are float32.  Dropout is a seed: the kernels find again what they dropped, no mask is kept.

Letters: T tokens, K inputs and N outputs of a matrix, R rank, C channels, and those of `ops.ssd_varlen`.
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


def _rows(x_TD: Tensor | None) -> tuple[int, int, bool]:
    if x_TD is None:
        return 0, 0, False
    assert x_TD.stride(1) == 1
    return x_TD.data_ptr(), x_TD.stride(0), x_TD.dtype == torch.bfloat16


def rows(x: Tensor) -> Tensor:
    """x as (T, D) whose rows are whole."""
    x_TD = x.flatten(0, -2)
    return x_TD if x_TD.stride(1) == 1 else x_TD.contiguous()


# ── low rank


def lora_a(x_TK: Tensor, w_KR: Tensor, dropout: Dropout = NONE) -> Tensor:
    """dropout(x) w, float32."""
    (T, K), R = x_TK.shape, w_KR.shape[1]
    y_TR = torch.empty(T, R)
    native.extension.lora_a(_rows(x_TK), w_KR.data_ptr(), y_TR.data_ptr(), T, K, R, dropout)
    return y_TR


def lora_b(x_TR: Tensor, w_RN: Tensor, base_TN: Tensor | None, dtype: torch.dtype, dropout: Dropout = NONE) -> Tensor:
    """base + dropout(x w)"""
    (T, R), N = x_TR.shape, w_RN.shape[1]
    y_TN = torch.empty(T, N, dtype=dtype)
    native.extension.lora_b(x_TR.data_ptr(), w_RN.data_ptr(), _rows(base_TN), _rows(y_TN), T, R, N, dropout)
    return y_TN


def lora_grad(a_TR: Tensor, x_TK: Tensor, dropout: Dropout = NONE) -> Tensor:
    """aᵀ dropout(x), (R, K) float32."""
    (T, K), R = x_TK.shape, a_TR.shape[1]
    y_RK = torch.empty(R, K)
    native.extension.lora_grad(a_TR.data_ptr(), _rows(x_TK), y_RK.data_ptr(), T, R, K, False, dropout)
    return y_RK


def lora_grad_rows(x_TK: Tensor, a_TR: Tensor) -> Tensor:
    """xᵀ a, (K, R) float32."""
    (T, K), R = x_TK.shape, a_TR.shape[1]
    y_KR = torch.empty(K, R)
    native.extension.lora_grad(a_TR.data_ptr(), _rows(x_TK), y_KR.data_ptr(), T, R, K, True, NONE)
    return y_KR


# ── sums, gate


def add_mixed(a_TD: Tensor, b_TD: Tensor, dtype: torch.dtype) -> Tensor:
    """a + b, whatever the dtypes of the two."""
    y_TD = torch.empty(a_TD.shape, dtype=dtype)
    native.extension.add_mixed(_rows(a_TD), _rows(b_TD), _rows(y_TD), *a_TD.shape)
    return y_TD


def silu_gate(g_TD: Tensor, u_TD: Tensor, dtype: torch.dtype) -> Tensor:
    """silu(g) · u"""
    y_TD = torch.empty(g_TD.shape, dtype=dtype)
    native.extension.silu_gate(_rows(g_TD), _rows(u_TD), _rows(y_TD), *g_TD.shape)
    return y_TD


def silu_gate_backward(g_TD: Tensor, u_TD: Tensor, dy_TD: Tensor) -> tuple[Tensor, Tensor]:
    """The gradients of g and u, in their dtypes."""
    dg_TD, du_TD = torch.empty(g_TD.shape, dtype=g_TD.dtype), torch.empty(u_TD.shape, dtype=u_TD.dtype)
    native.extension.silu_gate_backward(_rows(g_TD), _rows(u_TD), _rows(dy_TD), _rows(dg_TD), _rows(du_TD), *g_TD.shape)
    return dg_TD, du_TD


# ── convolution


def conv1d_varlen(
    x_TC: Tensor, weight_KC: Tensor, bias_C: Tensor | None, reach_T: Tensor, dtype: torch.dtype
) -> Tensor:
    """weight: by lag;  reach: the lags of each token that stay in its document."""
    (T, C), y_TC = x_TC.shape, torch.empty(x_TC.shape, dtype=dtype)
    bias = 0 if bias_C is None else bias_C.data_ptr()
    native.extension.conv1d_varlen(
        _rows(x_TC), weight_KC.data_ptr(), bias, reach_T.data_ptr(), _rows(y_TC), T, C, len(weight_KC)
    )
    return y_TC


def conv1d_varlen_backward(
    x_TC: Tensor, weight_KC: Tensor, bias_C: Tensor | None, reach_T: Tensor, dy_TC: Tensor
) -> tuple[Tensor, Tensor, Tensor | None]:
    """The gradients of x, in its dtype, weight and bias."""
    (T, C), dx_TC, dweight_KC = x_TC.shape, torch.empty(x_TC.shape, dtype=x_TC.dtype), torch.empty_like(weight_KC)
    bias, dbias_C = (0, None) if bias_C is None else (bias_C.data_ptr(), torch.empty_like(bias_C))
    native.extension.conv1d_varlen_backward(
        _rows(x_TC), weight_KC.data_ptr(), bias, reach_T.data_ptr(), _rows(dy_TC), _rows(dx_TC),
        dweight_KC.data_ptr(), 0 if dbias_C is None else dbias_C.data_ptr(), T, C, len(weight_KC),
    )  # fmt: skip
    return dx_TC, dweight_KC, dbias_C


# ── scan


def decay_weights(high_KHQ: Tensor, low_KHQ: Tensor, scores_KGQQ: Tensor, dtype: torch.dtype) -> Tensor:
    """exp(a_t − a_j) · scores, (K · H, Q, Q);  a = high + low, scores are zero for j > t, Q is a multiple of 16."""
    (K, H, Q), G = high_KHQ.shape, scores_KGQQ.shape[1]
    w = torch.empty(K * H, Q, Q, dtype=dtype)
    native.extension.decay_weights(
        high_KHQ.data_ptr(), low_KHQ.data_ptr(), scores_KGQQ.data_ptr(), _rows(w.flatten(0, 1)), K, H, G, Q
    )
    return w


def decay_weights_backward(high_KHQ: Tensor, low_KHQ: Tensor, scores_KGQQ: Tensor, dw: Tensor) -> tuple[Tensor, Tensor]:
    """The gradients of scores (K, G, Q, Q), for j > t too much zero, and of a (K, H, Q)."""
    (K, H, Q), G = high_KHQ.shape, scores_KGQQ.shape[1]
    ds, rows, columns = torch.empty_like(scores_KGQQ), torch.empty(K, H, Q), torch.empty(K, H, Q // 16, Q)
    native.extension.decay_weights_backward(
        high_KHQ.data_ptr(), low_KHQ.data_ptr(), scores_KGQQ.data_ptr(), _rows(dw.flatten(0, 1)), ds.data_ptr(),
        rows.data_ptr(), columns.data_ptr(), K, H, G, Q,
    )  # fmt: skip
    return ds, rows - columns.sum(2)


class Layout(NamedTuple):
    """By token (T, H · P), by head (K · H, Q, P), by group (K · G, Q, H / G · P)."""

    chunks: int
    chunk: int
    heads: int
    groups: int
    head_dim: int

    def by_head(self, dtype: torch.dtype) -> Tensor:
        return torch.empty(self.chunks * self.heads, self.chunk, self.head_dim, dtype=dtype)

    def by_group(self, dtype: torch.dtype) -> Tensor:
        return torch.empty(
            self.chunks * self.groups, self.chunk, self.heads // self.groups * self.head_dim, dtype=dtype
        )


def _matrix(t: Tensor | None) -> tuple[int, int, bool]:
    """A contiguous (…, D)."""
    return _rows(None if t is None else t.flatten(0, -2))


def _at(t: Tensor | None) -> int:
    assert t is None or (t.is_contiguous() and t.dtype == torch.float32)
    return 0 if t is None else t.data_ptr()


def to_heads(
    x_TI: Tensor, scale_TH: Tensor | None, other_TH: Tensor | None, layout: Layout, dtype: torch.dtype,
    meets: Tensor | None = None,
) -> tuple[Tensor, Tensor | None, Tensor | None]:  # fmt: skip
    """scale · x by head, other · x by group where there is another scale, and of this Σ_p with `meets`, (T, H)."""
    by_head, by_group = layout.by_head(dtype), None if other_TH is None else layout.by_group(dtype)
    dots = None if meets is None else torch.empty(len(x_TI), layout.heads)
    native.extension.to_heads(
        _rows(x_TI), _at(scale_TH), _at(other_TH), _matrix(by_head), _matrix(by_group), _matrix(meets), _at(dots),
        layout,
    )  # fmt: skip
    return by_head, by_group, dots


def from_heads(
    by_head: Tensor, by_group: Tensor | None, scale_TH: Tensor | None, x_TI: Tensor, D_H: Tensor | None, layout: Layout
) -> Tensor:
    """by_head + scale · by_group + D x, (T, H · P) in the dtype of x."""
    y_TI = torch.empty(x_TI.shape, dtype=x_TI.dtype)
    native.extension.from_heads(
        _matrix(by_head), _matrix(by_group), _at(scale_TH), _rows(x_TI), _at(D_H), _rows(y_TI), layout
    )  # fmt: skip
    return y_TI


def from_heads_backward(
    by_head: Tensor, by_group: Tensor | None, scale_TH: Tensor | None, x_TI: Tensor, dy_TI: Tensor, dt_TH: Tensor,
    D_H: Tensor | None, layout: Layout,
) -> tuple[Tensor, Tensor, Tensor | None]:  # fmt: skip
    """For du = by_head + scale · by_group: dt · du + D dy in the dtype of x, Σ_p x du, and of this the second part."""
    dx_TI, dots_TH = torch.empty(x_TI.shape, dtype=x_TI.dtype), torch.empty(dt_TH.shape)
    left_TH = None if by_group is None else torch.empty(dt_TH.shape)
    native.extension.from_heads_backward(
        _matrix(by_head), _matrix(by_group), _at(scale_TH), _rows(x_TI), _rows(dy_TI), _at(dt_TH), _at(D_H),
        _rows(dx_TI), _at(dots_TH), _at(left_TH), layout,
    )  # fmt: skip
    return dx_TI, dots_TH, left_TH


def state_passing(x: Tensor, g_BHCC: Tensor, layout: Layout, *, back: bool = False) -> Tensor:
    """y_c = Σ_{k<c} g_ck x_k of the states (K · G, N, H / G · P) of each row's chunks; back: y_k = Σ_{c>k} g_ck x_c."""
    y, C = torch.empty_like(x), g_BHCC.shape[3]
    native.extension.state_passing(_matrix(x), _at(g_BHCC), _matrix(y), C, x.shape[1], back, layout)
    return y


def state_passing_grad(x: Tensor, dy: Tensor, count: int, layout: Layout) -> Tensor:
    """The gradient of g, (B, H, C, C)."""
    dg_BHCC = torch.empty(layout.chunks // count, layout.heads, count, count)
    native.extension.state_passing_grad(_matrix(x), _matrix(dy), _at(dg_BHCC), count, x.shape[1], layout)
    return dg_BHCC


# ── attention


def causal_softmax_(scores: Tensor, window: int | None) -> None:
    """In place, over the keys each query sees; (…, L queries, L keys) contiguous."""
    native.extension.causal_softmax(_matrix(scores), scores.numel() // scores.shape[-1], scores.shape[-1], window or 0)


def causal_softmax_backward_(weights: Tensor, dweights: Tensor, window: int | None) -> None:
    """The gradient of scores in place of that of weights."""
    L = weights.shape[-1]
    native.extension.causal_softmax_backward(_matrix(weights), _matrix(dweights), weights.numel() // L, L, window or 0)


# ── loss


def cross_entropy_(logits_TV: Tensor, targets_T: Tensor) -> Tensor:
    """−log causal_softmax(logits)[target], (T,); the logits become its gradient, in their dtype."""
    losses_T = torch.empty(len(logits_TV))
    native.extension.cross_entropy(
        _rows(logits_TV), targets_T.contiguous().data_ptr(), _at(losses_T), *logits_TV.shape
    )  # fmt: skip
    return losses_T


# ── norm


def rms_norm_train(x_TD: Tensor, weight_D: Tensor, eps: float, dtype: torch.dtype) -> tuple[Tensor, Tensor]:
    """w · x r, and r = 1 / √(mean(x²) + eps), (T, 1)."""
    y_TD, r_T1 = torch.empty(x_TD.shape, dtype=dtype), torch.empty(len(x_TD), 1)
    native.extension.rms_norm_train(_rows(x_TD), _at(weight_D), _rows(y_TD), _at(r_T1), *x_TD.shape, eps)
    return y_TD, r_T1


def rms_norm_train_backward(x_TD: Tensor, weight_D: Tensor, r_T1: Tensor, dy_TD: Tensor) -> Tensor:
    """The gradient of x, in its dtype."""
    dx_TD = torch.empty(x_TD.shape, dtype=x_TD.dtype)
    native.extension.rms_norm_train_backward(
        _rows(x_TD), _at(weight_D), _at(r_T1), _rows(dy_TD), _rows(dx_TD), *x_TD.shape
    )
    return dx_TD
