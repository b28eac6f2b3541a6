"""The gated short convolution over the states of a batch: one signature for every backend."""

from __future__ import annotations

from typing import Any, Protocol

from torch import Tensor

from tiercel.mixers.backend import Backend


class ShortConvOp(Protocol):
    def __call__(self, batch: Any, BCx: Tensor, weight_KC: Tensor, bias_C: Tensor | None, *, chunk: int) -> Tensor:
        """C · conv(B · x), one row a token → (T, C) float32; the states move on.

        Args:
            batch: the sequences and this layer of their states, as the backend's `metadata_for` gives them.
            BCx: (T, 3 C), the parts side by side.
            weight_KC, bias_C: float32.
            chunk: tokens of a chunk, at whose ends the state is committed.
        """


def short_conv_op(backend: Backend) -> ShortConvOp:
    if backend == "triton":
        from tiercel.mixers.short_conv.triton import short_conv as on_gpu

        return on_gpu
    from tiercel.mixers.short_conv.cpu import short_conv

    return short_conv
