"""Sampling on a device for the sequences in slots, so that a step's token is the next one's input.

A draw is a function of (seed, index of the sample, position) as on the CPU: the host computes the uniform numbers in
advance, UNIFORM_NUMBERS of them at a time, and the device takes one for each token.
"""

from __future__ import annotations

import torch
from torch import Tensor

from tiercel.ops.sampling import choose
from tiercel.sampling.params import SamplingParams
from tiercel.sampling.sampler import uniform

UNIFORM_NUMBERS = 64  # that a slot has; `refill` before they are used up


class DeviceSampler:
    """Sampling parameters of every slot, its uniform numbers and how many of them were used."""

    def __init__(self, count: int, device: torch.device) -> None:
        self.temperature_S, self.min_p_S = torch.zeros(count, device=device), torch.zeros(count, device=device)
        self.top_k_S = torch.zeros(count, dtype=torch.int64, device=device)
        self.top_p_S = torch.ones(count, dtype=torch.float64, device=device)
        self.u_SA = torch.zeros(count, UNIFORM_NUMBERS, dtype=torch.float64, device=device)
        self.used_S = torch.zeros(count, dtype=torch.int64, device=device)

    def set(self, slot: int, params: SamplingParams, seed: int, index: int, position: int) -> None:
        """Set a slot's parameters from output token `position` on; penalties and bans are not applied here."""
        self.temperature_S[slot] = 0.0 if params.greedy else params.temperature
        self.min_p_S[slot], self.top_p_S[slot] = params.min_p, params.top_p
        self.top_k_S[slot] = max(params.top_k, 0)
        self.refill(slot, seed, index, position)

    def refill(self, slot: int, seed: int, index: int, position: int) -> None:
        """UNIFORM_NUMBERS more, from output token `position` on."""
        numbers = [uniform(seed, index, position + i) for i in range(UNIFORM_NUMBERS)]
        self.u_SA[slot] = torch.tensor(numbers, dtype=torch.float64).to(self.u_SA.device, non_blocking=True)
        self.used_S[slot] = 0

    def choose(self, logits_BV: Tensor, slot_B: Tensor) -> Tensor:
        """(B) int64, without the host.  Rows without a sequence (slot −1) draw with slot 0's numbers and use none."""
        S = slot_B.clamp(min=0).long()
        u_B = self.u_SA[S, self.used_S[S] % UNIFORM_NUMBERS]
        self.used_S.index_put_((S,), (slot_B >= 0).long(), accumulate=True)
        return choose(logits_BV, self.temperature_S[S], self.min_p_S[S], self.top_k_S[S], self.top_p_S[S], u_B)
