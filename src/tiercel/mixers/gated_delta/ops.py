"""The gated delta rule over the states of a batch: one signature for every backend."""

from __future__ import annotations

from typing import Any, Protocol

from torch import Tensor

from tiercel.mixers.backend import Backend


class GatedDeltaOp(Protocol):
    def __call__(
        self,
        batch: Any,
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
        """Convolution and gated delta rule, one row a token → (T, H · V) float32.

        Args:
            batch: the sequences and this layer of their states, as the backend's `metadata_for` gives them.
            qkv_TC, b_TH, dt_TH: the projections q | k | v, of β and of the decay's dt, before any activation.
            weight_JC: J taps of the convolution.
            A_H: −exp(A_log), float32, as all parameters here.
            chunk: tokens of a chunk, at whose ends the state is committed.
            tiled: value head h reads key head h mod G, else h // (H / G).
        """


def gated_delta_op(backend: Backend) -> GatedDeltaOp:
    if backend == "triton":
        from tiercel.mixers.gated_delta.gpu import gated_delta as on_gpu

        return on_gpu
    from tiercel.mixers.gated_delta.cpu import gated_delta

    return gated_delta
