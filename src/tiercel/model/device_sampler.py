"""Sampling on a device, so that a step's token is the next one's input before the host has seen it.

A draw is a function of (seed, index of the sample, position) as on the CPU: the host computes the uniform number of
each row (`Sampler.draw_at`) and uploads it with the row's parameters.
"""

from __future__ import annotations

from collections.abc import Callable, Sequence
from functools import partial

import numpy as np
import torch
from torch import Tensor

from tiercel.mixers.paged import on_host
from tiercel.model.state_cache import StateCache
from tiercel.ops.sampling import MAX_TOP_K, choose, choose_few
from tiercel.sampling.sampler import Draw

Run = Callable[[], None]
GREEDY = Draw(0.0, 0.0, 0, 1.0, 0.0)


def greedy(logits_BV: Tensor, *_: Tensor) -> Tensor:
    """The likeliest token of each row."""
    return logits_BV.argmax(1)


WAYS: dict[str, Callable[..., Tensor]] = {"greedy": greedy, "few": choose_few, "any": choose}


def way_of(draws: Sequence[Draw]) -> str:
    """The fastest of WAYS that serves all these."""
    if not any(draw.temperature for draw in draws):
        return "greedy"
    return "few" if all(not draw.temperature or 0 < draw.top_k <= MAX_TOP_K for draw in draws) else "any"


def sample(logits_BV: Tensor, table_6B: Tensor, slots: StateCache, way: str, num_tokens: int) -> Tensor:
    """Sample a token of each row (B,) int64, −1 where no logit is finite; it becomes its slot's `sampled_S`.

    Args:
        table_6B: float64: slot (−1: none), temperature, min_p, top_k, top_p and uniform number of each row.
        num_tokens: rows of the vocabulary that may be sampled.
    """
    slot_B, t_B, min_p_B, k_B, top_p_B, u_B = table_6B
    logits_BV = logits_BV[:, :num_tokens]
    token_B = WAYS[way](logits_BV, t_B.float(), min_p_B, k_B.long(), top_p_B, u_B)
    slots.sampled_S[slots.indices(slot_B)] = token_B
    return torch.where(logits_BV.amax(1).isfinite(), token_B, -1)


class LogitsSampler:
    """Samples the rows of the logits that a forward leaves; captured where that is.

    captured: makes a run of a function; then the logits are always the same tensor
    """

    def __init__(self, rows: int, slots: StateCache, captured: Callable[[Run], Run]) -> None:
        self.rows, self.slots, self.captured = rows, slots, captured
        self.table_6B = torch.zeros(6, rows, dtype=torch.float64, device=slots.device)
        self.token_B = torch.zeros(rows, dtype=torch.int64, device=slots.device)
        self.runs: dict[tuple[str, int], Run] = {}

    def __call__(self, logits_BV: Tensor, numbers: Sequence[int], draws: Sequence[Draw], num_tokens: int) -> Tensor:
        """The tokens of the first rows (B', V), valid until the next call."""
        key = way_of(draws), num_tokens
        run: Run = partial(_sample, self.token_B, logits_BV, self.table_6B, self.slots, *key)
        if self.slots.device.type == "cuda" and key[0] != "any":  # which takes much memory
            if key not in self.runs:
                self.table_6B[0] = -1
                self.runs[key] = self.captured(run)
            run = self.runs[key]
        table = np.zeros((6, self.rows))
        table[0] = -1
        table[0, : len(numbers)] = numbers
        table[1:, : len(numbers)] = np.array(draws).T
        self.table_6B.copy_(on_host(table, self.slots.device), non_blocking=True)
        run()
        return self.token_B[: len(numbers)]


@torch.no_grad()
def _sample(token_B: Tensor, logits_BV: Tensor, table_6B: Tensor, slots: StateCache, way: str, num_tokens: int) -> None:
    token_B.copy_(sample(logits_BV, table_6B, slots, way, num_tokens))
