"""Log-probabilities of sampled tokens."""

from __future__ import annotations

from dataclasses import dataclass
from typing import TYPE_CHECKING

if TYPE_CHECKING:
    from torch import Tensor


@dataclass(frozen=True)
class Logprob:
    """A token's log-probability (natural), and its rank among all V tokens (1: the likeliest)."""

    logprob: float
    rank: int
    decoded_token: str | None = None


def top_logprobs(logits_V: Tensor, chosen: int, count: int) -> dict[int, Logprob]:
    """Return {token id: Logprob}: the chosen token first, then the `count` likeliest, from logits (V,)."""
    import torch

    logprobs_V = torch.log_softmax(logits_V.to(torch.float32), dim=-1)
    rank = int((logprobs_V >= logprobs_V[chosen]).sum())
    out = {chosen: Logprob(float(logprobs_V[chosen]), rank)}
    values, ids = torch.topk(logprobs_V, min(count, len(logprobs_V)))
    for place, (value, token) in enumerate(zip(values.tolist(), ids.tolist(), strict=True), start=1):
        out.setdefault(token, Logprob(value, place))
    return out
