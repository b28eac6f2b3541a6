"""Native training kernels of the Mamba-2 scan (cpu_train.cpp); letters as in `varlen.py`."""

from __future__ import annotations

from typing import NamedTuple

import torch
from torch import Tensor

from tiercel.ops.cpu import native
from tiercel.ops.cpu.training import f32, matrix, strided


def decay_weights(high_KHQ: Tensor, low_KHQ: Tensor, scores_KGQQ: Tensor, dtype: torch.dtype) -> Tensor:
    """exp(a_t − a_j) · scores, (K · H, Q, Q);  a = high + low, scores are zero for j > t, Q is a multiple of 16."""
    (K, H, Q), G = high_KHQ.shape, scores_KGQQ.shape[1]
    w = torch.empty(K * H, Q, Q, dtype=dtype)
    native.extension.decay_weights(
        high_KHQ.data_ptr(), low_KHQ.data_ptr(), scores_KGQQ.data_ptr(), strided(w.flatten(0, 1)), K, H, G, Q
    )
    return w


def decay_weights_backward(high_KHQ: Tensor, low_KHQ: Tensor, scores_KGQQ: Tensor, dw: Tensor) -> tuple[Tensor, Tensor]:
    """The gradients of scores (K, G, Q, Q), for j > t too much zero, and of a (K, H, Q)."""
    (K, H, Q), G = high_KHQ.shape, scores_KGQQ.shape[1]
    ds, rows, columns = torch.empty_like(scores_KGQQ), torch.empty(K, H, Q), torch.empty(K, H, Q // 16, Q)
    native.extension.decay_weights_backward(
        high_KHQ.data_ptr(), low_KHQ.data_ptr(), scores_KGQQ.data_ptr(), strided(dw.flatten(0, 1)), ds.data_ptr(),
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


def to_heads(
    x_TI: Tensor, scale_TH: Tensor | None, other_TH: Tensor | None, layout: Layout, dtype: torch.dtype,
    meets: Tensor | None = None,
) -> tuple[Tensor, Tensor | None, Tensor | None]:  # fmt: skip
    """scale · x by head, other · x by group where there is another scale, and of this Σ_p with `meets`, (T, H)."""
    by_head, by_group = layout.by_head(dtype), None if other_TH is None else layout.by_group(dtype)
    dots = None if meets is None else torch.empty(len(x_TI), layout.heads)
    native.extension.to_heads(
        strided(x_TI), f32(scale_TH), f32(other_TH), matrix(by_head), matrix(by_group), matrix(meets), f32(dots),
        layout,
    )  # fmt: skip
    return by_head, by_group, dots


def from_heads(
    by_head: Tensor, by_group: Tensor | None, scale_TH: Tensor | None, x_TI: Tensor, D_H: Tensor | None, layout: Layout
) -> Tensor:
    """by_head + scale · by_group + D x, (T, H · P) in the dtype of x."""
    y_TI = torch.empty(x_TI.shape, dtype=x_TI.dtype)
    native.extension.from_heads(
        matrix(by_head), matrix(by_group), f32(scale_TH), strided(x_TI), f32(D_H), strided(y_TI), layout
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
        matrix(by_head), matrix(by_group), f32(scale_TH), strided(x_TI), strided(dy_TI), f32(dt_TH), f32(D_H),
        strided(dx_TI), f32(dots_TH), f32(left_TH), layout,
    )  # fmt: skip
    return dx_TI, dots_TH, left_TH


def state_passing(x: Tensor, g_BHCC: Tensor, layout: Layout, *, back: bool = False) -> Tensor:
    """y_c = Σ_{k<c} g_ck x_k of the states (K · G, N, H / G · P) of each row's chunks; back: y_k = Σ_{c>k} g_ck x_c."""
    y, C = torch.empty_like(x), g_BHCC.shape[3]
    native.extension.state_passing(matrix(x), f32(g_BHCC), matrix(y), C, x.shape[1], back, layout)
    return y


def state_passing_grad(x: Tensor, dy: Tensor, count: int, layout: Layout) -> Tensor:
    """The gradient of g, (B, H, C, C)."""
    dg_BHCC = torch.empty(layout.chunks // count, layout.heads, count, count)
    native.extension.state_passing_grad(matrix(x), matrix(dy), f32(dg_BHCC), count, x.shape[1], layout)
    return dg_BHCC
