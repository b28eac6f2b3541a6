"""Native training kernels of attention (cpu_train.cpp): causal softmax in place, and its gradient."""

from __future__ import annotations

from torch import Tensor

from tiercel.ops.cpu import native
from tiercel.ops.cpu.training import matrix


def causal_softmax_(scores: Tensor, window: int | None) -> None:
    """In place, over the keys each query sees; (…, L queries, L keys) contiguous."""
    native.extension.causal_softmax(matrix(scores), scores.numel() // scores.shape[-1], scores.shape[-1], window or 0)


def causal_softmax_backward_(weights: Tensor, dweights: Tensor, window: int | None) -> None:
    """The gradient of scores in place of that of weights."""
    L = weights.shape[-1]
    native.extension.causal_softmax_backward(matrix(weights), matrix(dweights), weights.numel() // L, L, window or 0)
