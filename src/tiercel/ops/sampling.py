"""Logits → tokens of many rows where the logits are: what is left to chance in `sampling.Sampler`, without the host.

The same cuts in the same order (temperature → min_p → top_k → top_p), and the same draw: the first token whose
cumulative probability passes u.  Nothing here asks the host, so a recorded step may contain it.

Letters: B rows, V vocabulary.
"""

from __future__ import annotations

import math

import torch
from torch import Tensor


def choose(
    logits_BV: Tensor, temperature_B: Tensor, min_p_B: Tensor, top_k_B: Tensor, top_p_B: Tensor, u_B: Tensor
) -> Tensor:
    """(B) int64.  temperature 0: the likeliest · min_p 0, top_k 0, top_p 1: no cut · u in [0, 1), float64."""
    B, V = logits_BV.shape
    l_BV = logits_BV.float()
    l_BV = (l_BV - l_BV.amax(1, keepdim=True)) / torch.where(temperature_B > 0, temperature_B, 1.0).unsqueeze(1)
    l_BV = l_BV.masked_fill(l_BV < min_p_B.log().unsqueeze(1), -math.inf)
    sorted_BV, ids_BV = l_BV.sort(1, descending=True)
    k_B = torch.where((top_k_B > 0) & (top_k_B < V), top_k_B, V).long()
    out_BV = sorted_BV < sorted_BV.gather(1, k_B.unsqueeze(1) - 1)  # those that tie with the last stay
    probs_BV = torch.softmax(sorted_BV.masked_fill(out_BV, -math.inf), 1)
    before_BV = probs_BV.double().cumsum(1) - probs_BV
    out_BV |= (before_BV >= top_p_B.unsqueeze(1)) & (top_p_B < 1).unsqueeze(1)
    out_BV[:, 0] = False
    out_BV = torch.empty_like(out_BV).scatter_(1, ids_BV, out_BV)
    cumulative_BV = torch.softmax(l_BV.masked_fill(out_BV, -math.inf), 1).double().cumsum(1)
    total_B1 = cumulative_BV[:, -1:]
    drawn_B = (cumulative_BV <= u_B.unsqueeze(1) * total_B1).sum(1)
    drawn_B = torch.minimum(drawn_B, (cumulative_BV < total_B1).sum(1))  # u · total may round up to total
    return torch.where(temperature_B > 0, drawn_B, logits_BV.argmax(1))
