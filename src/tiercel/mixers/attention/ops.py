"""Attention over the states of a batch: one signature for every backend."""

from __future__ import annotations

from typing import Any, Protocol

from torch import Tensor

from tiercel.mixers.backend import Backend


class AttentionOp(Protocol):
    def __call__(
        self,
        batch: Any,
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
        """Turn q (T, H · P) and k (T, K · P), store k and v (T, K · P) in pages, attend → (T, H · P).

        Args:
            batch: the sequences and this layer of their states, as the backend's `metadata_for` gives them.
            turn: cos and sin (T, R / 2) of the rotary angles; None for no rotation.
            window: keys that a query sees at most, itself included; None for all.
            round: on a GPU, also quantize few rows of the output to int8, for a packed matrix.
        """


def attention_op(backend: Backend) -> AttentionOp:
    if backend == "triton":
        from tiercel.mixers.attention.gpu import attention as on_gpu

        return on_gpu
    from tiercel.mixers.attention.cpu import attention

    return attention
