"""What a GPU does while the host hands out a step: the next one.

Where requests leave the choice of their tokens to the device, the inputs of the next step are there before the host
has seen them.  So the order of a step is: choose on the device → send the choice to the host → begin the next forward
→ wait for the choice alone → hand it out, while the device works.  The forward that was begun is claimed by the next
step; who has ended meanwhile has read its last token for nothing.
"""

from __future__ import annotations

from collections.abc import Sequence
from typing import NamedTuple

import torch
from torch import Tensor

from tiercel.engine.scheduler import ScheduledSequence
from tiercel.ops.sampling import choose


class InFlightStep(NamedTuple):
    """A forward of one token for each row that nobody has handed out: each row's state as it was, and its logits."""

    rows: list[ScheduledSequence]
    states: list[object]
    logits: Sequence[Tensor]

    def claim(self) -> tuple[list[ScheduledSequence], list[Tensor]]:
        """The rows that still are where they were, with their logits."""
        found = [
            (row, logits)
            for row, state, logits in zip(self.rows, self.states, self.logits, strict=True)
            if row.choice.state is state and row.choice.finish_reason is None
        ]
        return [row for row, _ in found], [logits for _, logits in found]


class PendingTokens:
    """The next tokens of all rows whose request leaves it to the device, on their way to the host."""

    def __init__(self, rows: Sequence[ScheduledSequence], logits: Sequence[Tensor]) -> None:
        free = [
            (row.choice.sampler, row_logits[-1])
            for row, row_logits in zip(rows, logits, strict=True)
            if row.choice.length == len(row.choice.tokens) and not row.drafts and row.choice.sampler.device_sampled
        ]
        self.samplers = [sampler for sampler, _ in free]
        if not free:
            return
        logits_BV = torch.stack([logits_V for _, logits_V in free])
        params = [sampler.params for sampler in self.samplers]
        columns = [
            [0.0 if p.greedy else p.temperature for p in params],
            [p.min_p for p in params],
            [float(max(p.top_k, 0)) for p in params],
            [p.top_p for p in params],
            [sampler.next_uniform for sampler in self.samplers],
        ]
        t, min_p, k, top_p, u = torch.tensor(columns, dtype=torch.float64).to(logits_BV.device, non_blocking=True)
        self.tokens_B = choose(logits_BV, t.float(), min_p, k.long(), top_p, u)
        finite = logits_BV.amax(1).isfinite()  # the sampler says what is wrong with the others
        told_B, self.there = torch.where(finite, self.tokens_B, -1), None
        if told_B.is_cuda:
            self.told_B = torch.empty(len(free), dtype=torch.int64, pin_memory=True)
            self.told_B.copy_(told_B, non_blocking=True)
            self.there = torch.cuda.Event()
            self.there.record()
        else:
            self.told_B = told_B

    def __len__(self) -> int:
        return len(self.samplers)

    def settle(self) -> None:
        """Wait until the tokens are here, and tell the samplers."""
        if not self.samplers:
            return
        if self.there is not None:
            self.there.synchronize()
        for sampler, token in zip(self.samplers, self.told_B.tolist(), strict=True):
            sampler.device_token = token if token >= 0 else None
