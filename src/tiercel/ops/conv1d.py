"""Causal depthwise convolution: each output channel depends on the last K inputs of that channel.

    y_t = b + Σ_{k<K} w_k · x_{t−K+1+k}          (w_{K−1} meets the current token)

The K − 1 columns before the first output come with the input, so a chunk, a step and a whole
sequence are the same sum in the same order: the result does not depend on how a prompt was cut.
"""

from __future__ import annotations

import torch
from torch import Tensor


def conv1d(x_TC: Tensor, weight_CK: Tensor, bias_C: Tensor | None) -> Tensor:
    """x: (K − 1 + L, C), oldest first, with the K − 1 columns of history → (L, C) float32."""
    K = weight_CK.shape[1]
    L = x_TC.shape[0] - (K - 1)
    x_TC, weight_KC = x_TC.float(), weight_CK.float().t().contiguous()
    y_LC = x_TC[:L] * weight_KC[0]
    for k in range(1, K):
        y_LC.addcmul_(x_TC[k : k + L], weight_KC[k])  # in place: fresh memory would cost more than the sum
    return y_LC if bias_C is None else y_LC.add_(bias_C)


def conv1d_reference(x_TC: Tensor, weight_CK: Tensor, bias_C: Tensor | None) -> Tensor:
    """The same, one output at a time, in float64."""
    K = weight_CK.shape[1]
    rows = [(x_TC[t : t + K].double().t() * weight_CK.double()).sum(1) for t in range(x_TC.shape[0] - K + 1)]
    y_LC = torch.stack(rows) if rows else x_TC.new_zeros(0, x_TC.shape[1], dtype=torch.float64)
    return y_LC if bias_C is None else y_LC + bias_C.double()
