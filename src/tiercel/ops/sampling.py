"""Sample tokens of many rows on the device of the logits: `sampling.Sampler` without the host.

The same cuts in the same order (temperature → min_p → top_k → top_p), and the same draw: the first token whose
cumulative probability passes u.  Nothing here synchronizes with the host, so a captured step may contain it.

Letters: B rows, V vocabulary.
"""

from __future__ import annotations

import math

import torch
from torch import Tensor

MAX_TOP_K, CANDIDATES = 64, 256  # of `choose_few`: the most that top_k may keep, and the likeliest that are looked at
RUN = 16  # tokens whose maximum is looked at first


def choose_few(
    logits_BV: Tensor, temperature_B: Tensor, min_p_B: Tensor, top_k_B: Tensor, top_p_B: Tensor, u_B: Tensor
) -> Tensor:
    """`choose` where each row has temperature 0 or keeps at most MAX_TOP_K tokens, without sorting the vocabulary.

    Of more than CANDIDATES tokens that tie with the last that is kept, some are left out.
    """
    top_BC, ids_BC = likeliest(logits_BV.float())
    count = top_BC.shape[1]
    l_BC = (top_BC - top_BC[:, :1]) / torch.where(temperature_B > 0, temperature_B, 1.0).unsqueeze(1)
    l_BC = l_BC.masked_fill(l_BC < min_p_B.double().log().float().unsqueeze(1), -math.inf)
    k_B1 = top_k_B.clamp(1, count).unsqueeze(1)
    last_B1 = l_BC.gather(1, k_B1 - 1)
    out_BC = l_BC < last_B1
    probs_BC = torch.softmax(l_BC.masked_fill(out_BC, -math.inf), 1)
    before_BC = probs_BC.double().cumsum(1) - probs_BC
    out_BC |= (before_BC >= top_p_B.unsqueeze(1)) & (top_p_B < 1).unsqueeze(1)
    out_BC[:, 0] = False
    first_B = torch.where(top_BC == top_BC[:, :1], ids_BC, logits_BV.shape[1]).amin(1)
    ids_BC, order_BC = ids_BC.sort(1)
    kept_BC = l_BC.masked_fill(out_BC, -math.inf).gather(1, order_BC)
    cumulative_BC = torch.softmax(kept_BC, 1).double().cumsum(1)
    total_B1 = cumulative_BC[:, -1:]
    drawn_B1 = (cumulative_BC <= u_B.unsqueeze(1) * total_B1).sum(1, keepdim=True)
    drawn_B1 = torch.minimum(drawn_B1, (cumulative_BC < total_B1).sum(1, keepdim=True))
    drawn_B = ids_BC.gather(1, drawn_B1).squeeze(1)
    return torch.where(temperature_B > 0, drawn_B, first_B)


def likeliest(logits_BV: Tensor) -> tuple[Tensor, Tensor]:
    """The CANDIDATES largest of each row, from the largest on, and where they are.

    They lie in the CANDIDATES runs of RUN tokens with the largest maxima; so all but these are read once.
    """
    B, V = logits_BV.shape
    if V <= 2 * CANDIDATES * RUN:
        return logits_BV.topk(min(CANDIDATES, V), 1)
    whole = V // RUN * RUN
    runs_BNR = logits_BV[:, :whole].unflatten(1, (-1, RUN))
    best_BC = runs_BNR.amax(2).topk(CANDIDATES, 1, sorted=False).indices
    at_BM = (best_BC.unsqueeze(2) * RUN + torch.arange(RUN, device=logits_BV.device)).flatten(1)
    rest_BM = torch.arange(whole, V, device=logits_BV.device).expand(B, -1)
    at_BM = torch.cat((at_BM, rest_BM), 1)
    top_BC, order_BC = logits_BV.gather(1, at_BM).topk(CANDIDATES, 1)
    return top_BC, at_BM.gather(1, order_BC)


def choose(
    logits_BV: Tensor, temperature_B: Tensor, min_p_B: Tensor, top_k_B: Tensor, top_p_B: Tensor, u_B: Tensor
) -> Tensor:
    """(B) int64.  temperature 0: the likeliest · min_p 0, top_k 0, top_p 1: no cut · u in [0, 1), float64."""
    V = logits_BV.shape[1]
    l_BV = logits_BV.float()
    l_BV = (l_BV - l_BV.amax(1, keepdim=True)) / torch.where(temperature_B > 0, temperature_B, 1.0).unsqueeze(1)
    l_BV = l_BV.masked_fill(l_BV < min_p_B.double().log().float().unsqueeze(1), -math.inf)
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
