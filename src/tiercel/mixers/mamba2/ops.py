"""Mamba-2 over the states of a batch: one signature for every backend."""

from __future__ import annotations

from typing import Any, Protocol

from torch import Tensor

from tiercel.mixers.backend import Backend


class Mamba2Op(Protocol):
    def __call__(
        self,
        batch: Any,
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
        """Convolution, dt, scan and D x from z | x B C | dt, one row a token → (T, H · P).

        Args:
            batch: the sequences and this layer of their states, as the backend's `metadata_for` gives them.
            A_H: −exp(A_log), float32, as all parameters here.
            chunk: tokens of a chunk, at whose ends the state is committed.
        """


class GatedNormOp(Protocol):
    def __call__(
        self,
        y_TI: Tensor,
        z_TI: Tensor,
        weight_I: Tensor | None,
        eps: float,
        groups: int,
        gate_first: bool,
        *,
        round: bool = False,
    ) -> Tensor:
        """norm(y · silu(z)), norm(y) · silu(z) or, without a weight, y · silu(z); the rows of z may lie apart.

        Args:
            groups: runs of I / groups channels with a norm each.
            round: on a GPU, also quantize few rows of the output to int8, for a packed matrix.
        """


def mamba2_op(backend: Backend) -> Mamba2Op:
    if backend == "triton":
        from tiercel.mixers.mamba2.gpu import mamba2 as on_gpu

        return on_gpu
    from tiercel.mixers.mamba2.cpu import mamba2

    return mamba2


def gated_norm_op(backend: Backend) -> GatedNormOp:
    if backend == "triton":
        from tiercel.ops.triton.norm import gated_norm as on_gpu

        return on_gpu
    from tiercel.ops.cpu.native import gated_norm

    return gated_norm
