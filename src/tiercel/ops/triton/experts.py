"""Products of every token with its own experts' matrices, without the host: a captured step may hold them.

Pairs of token and expert are sorted by expert; a program has ROWS pairs of one expert and finds it in a table of how
many tiles the experts before it have.  Formula: `ops.moe`; P pairs, token · K + which of its experts.
"""

from __future__ import annotations

from typing import NamedTuple

import torch
import triton
import triton.language as tl
from torch import Tensor

from tiercel.ops.triton import interpreted
from tiercel.ops.triton.activation import activated

FEW_ROWS, MANY_ROWS = 16, 64  # pairs of a program: with at most sixteen for each expert, and with more
COLUMNS, DEPTH = 64, 64  # outputs of a program, inputs at a time


class Pairs(NamedTuple):
    """Pairs sorted by expert.  order_P: their numbers · first_E: where an expert's begin, (E + 1) · last_E: tiles of
    an expert and those before it · tiles, rows: at most how many tiles, of how many pairs"""

    order_P: Tensor
    first_E: Tensor
    last_E: Tensor
    tiles: int
    rows: int

    @classmethod
    def of(cls, chosen_TK: Tensor, experts: int) -> Pairs:
        """Sort the choices of all tokens, on their device."""
        count = chosen_TK.numel()
        rows = FEW_ROWS if count <= FEW_ROWS * experts else MANY_ROWS
        sorted_P, order_P = chosen_TK.flatten().sort(stable=True)
        first_E = torch.searchsorted(sorted_P, torch.arange(experts + 1, device=sorted_P.device))
        last_E = ((first_E.diff() + rows - 1) // rows).cumsum(0)
        tiles = count // rows + min(experts, count)
        return cls(order_P.int(), first_E.int(), last_E.int(), tiles, rows)


@triton.jit
def _multiply(x, w, columns, inputs, rows, real, N, D, BN: tl.constexpr, BD: tl.constexpr, EXACT: tl.constexpr):
    """rows of x times a matrix w (N, D), transposed; its outputs `columns`."""
    sum_ = tl.zeros((rows.shape[0], BN), tl.float32)
    for d0 in range(0, D, BD):
        d = d0 + inputs
        x_RD = tl.load(x + rows[:, None] * D + d[None, :], real[:, None] & (d < D)[None, :], 0.0)
        w_DN = tl.load(
            w + columns[None, :].to(tl.int64) * D + d[:, None], (columns < N)[None, :] & (d < D)[:, None], 0.0
        )
        if EXACT:
            sum_ += tl.dot(x_RD.to(tl.float32), w_DN.to(tl.float32), input_precision="ieee")
        else:
            sum_ += tl.dot(x_RD, w_DN)
    return sum_


@triton.jit
def _experts(
    x, gate, up, weights, y, order, first_E, last_E, E, N, D, EACH,
    GATED: tl.constexpr, WEIGHTED: tl.constexpr, ACTIVATION: tl.constexpr, ROWS: tl.constexpr, BE: tl.constexpr,
    BN: tl.constexpr, BD: tl.constexpr, EXACT: tl.constexpr,
):  # fmt: skip
    """y of a pair (P, N): act(gate x) · up x, act(up x), or weight · up x.  EACH: pairs that share a row of x."""
    tile = tl.program_id(1)
    e = tl.arange(0, BE)
    before = (tl.load(last_E + e, e < E, 2147483647) <= tile).to(tl.int32)
    expert = tl.sum(before, 0)
    if expert < E:
        begun = tl.load(last_E + expert - 1, expert > 0, 0)
        i = tl.load(first_E + expert) + (tile - begun) * ROWS + tl.arange(0, ROWS)
        real = i < tl.load(first_E + expert + 1)
        pair = tl.load(order + i, real, 0).to(tl.int64)
        columns, inputs = tl.program_id(0) * BN + tl.arange(0, BN), tl.arange(0, BD)
        matrix = expert.to(tl.int64) * N * D
        h = _multiply(x, up + matrix, columns, inputs, pair // EACH, real, N, D, BN, BD, EXACT)
        if GATED:
            g = _multiply(x, gate + matrix, columns, inputs, pair // EACH, real, N, D, BN, BD, EXACT)
            h = h * activated(g, ACTIVATION)
        elif WEIGHTED:
            h = h * tl.load(weights + pair, real, 0.0)[:, None]
        else:
            h = activated(h, ACTIVATION)
        at = y + pair[:, None] * N + columns[None, :]
        tl.store(at, h.to(y.dtype.element_ty), real[:, None] & (columns < N)[None, :])


def moe(
    x_TD: Tensor, weights_TK: Tensor, chosen_TK: Tensor, gate_EFD: Tensor | None, up_EFD: Tensor, down_EDF: Tensor,
    activation: str,
) -> Tensor:  # fmt: skip
    """As `ops.moe.moe`, for plain matrices in the dtype of x: (T, D) float32."""
    x_TD, (E, F, D), K = x_TD.contiguous(), up_EFD.shape, chosen_TK.shape[1]
    pairs = Pairs.of(chosen_TK, E)
    count, device = chosen_TK.numel(), x_TD.device
    h_PF = torch.empty(count, F, dtype=x_TD.dtype, device=device)
    y_PD = torch.empty(count, D, dtype=torch.float32, device=device)
    weights_P = weights_TK.float().flatten()
    same = dict(
        ROWS=pairs.rows, BE=triton.next_power_of_2(E), BN=COLUMNS, BD=DEPTH,
        EXACT=interpreted or x_TD.dtype == torch.float32, ACTIVATION=activation,
    )  # fmt: skip
    tables = pairs.order_P, pairs.first_E, pairs.last_E, E
    _experts[(triton.cdiv(F, COLUMNS), pairs.tiles)](
        x_TD, up_EFD if gate_EFD is None else gate_EFD, up_EFD, weights_P, h_PF, *tables, F, D, K,
        GATED=gate_EFD is not None, WEIGHTED=False, **same,
    )  # fmt: skip
    _experts[(triton.cdiv(D, COLUMNS), pairs.tiles)](
        h_PF, down_EDF, down_EDF, weights_P, y_PD, *tables, D, F, 1, GATED=False, WEIGHTED=True, **same
    )
    return y_PD.view(-1, K, D).sum(1)
