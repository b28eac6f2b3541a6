"""How the tokens of texts in slots are chosen on the device, so that a step's token is the next one's input.

A draw is a function of (seed, choice, position) as on the CPU: the host computes its numbers ahead, AHEAD of them at a
time, and the device takes one for each token.
"""

from __future__ import annotations

import torch
from torch import Tensor

from tiercel.ops.sampling import choose
from tiercel.sampling.params import SamplingParams
from tiercel.sampling.sampler import uniform

AHEAD = 64  # numbers that a slot has; `refill` before they are used up


class DeviceSampler:
    """One row for each slot: temperature, min_p, top_k, top_p, numbers to draw with and how many were used."""

    def __init__(self, count: int, device: torch.device) -> None:
        self.temperature_S, self.min_p_S = torch.zeros(count, device=device), torch.zeros(count, device=device)
        self.top_k_S = torch.zeros(count, dtype=torch.int64, device=device)
        self.top_p_S = torch.ones(count, dtype=torch.float64, device=device)
        self.u_SA = torch.zeros(count, AHEAD, dtype=torch.float64, device=device)
        self.used_S = torch.zeros(count, dtype=torch.int64, device=device)

    def set(self, slot: int, params: SamplingParams, seed: int, choice: int, said: int) -> None:
        """The slot's text goes on with its token number `said`; penalties and bans are not the device's."""
        self.temperature_S[slot] = 0.0 if params.greedy else params.temperature
        self.min_p_S[slot], self.top_p_S[slot] = params.min_p, params.top_p
        self.top_k_S[slot] = max(params.top_k, 0)
        self.refill(slot, seed, choice, said)

    def refill(self, slot: int, seed: int, choice: int, said: int) -> None:
        """AHEAD more numbers, from token number `said` on."""
        numbers = [uniform(seed, choice, said + i) for i in range(AHEAD)]
        self.u_SA[slot] = torch.tensor(numbers, dtype=torch.float64).to(self.u_SA.device, non_blocking=True)
        self.used_S[slot] = 0

    def choose(self, logits_BV: Tensor, slot_B: Tensor) -> Tensor:
        """(B) int64, without the host.  Rows without a sequence (−1) draw with slot 0's numbers and use none."""
        S = slot_B.clamp(min=0).long()
        u_B = self.u_SA[S, self.used_S[S] % AHEAD]
        self.used_S.index_put_((S,), (slot_B >= 0).long(), accumulate=True)
        return choose(logits_BV, self.temperature_S[S], self.min_p_S[S], self.top_k_S[S], self.top_p_S[S], u_B)
