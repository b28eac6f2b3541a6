"""Launch the next step before this one's tokens are on the host.

Where requests let the device sample their tokens, the inputs of the next step are on the device before the host has
seen them.  So the order of a step is: sample on the device → start the copy to the host → launch the next forward →
wait for the copy → process the outputs, while the device computes.  The next call of `Engine.step` claims that
forward; a sequence that finished meanwhile has computed its last token in vain.
"""

from __future__ import annotations

from collections.abc import Sequence
from typing import NamedTuple

import torch
from torch import Tensor

from tiercel.engine.scheduler import ScheduledSequence, ScheduledStep
from tiercel.ops.sampling import MAX_TOP_K, choose, choose_few


class InFlightStep(NamedTuple):
    """A forward of one token for each sequence whose outputs are not processed yet."""

    rows: list[ScheduledSequence]
    states: list[object]  # of each sequence, when it was launched
    logits: list[Tensor]

    def unfinished(self) -> InFlightStep | None:
        """The part of sequences that run on with the states it was launched with; None where there is none."""
        valid = [
            part
            for part in zip(self.rows, self.states, self.logits, strict=True)
            if part[0].sequence.state is part[1] and part[0].sequence.finish_reason is None
        ]
        return InFlightStep(*(list(column) for column in zip(*valid, strict=True))) if valid else None

    def claim(self) -> ScheduledStep | None:
        """The step as it was scheduled, of `unfinished` sequences."""
        step = self.unfinished()
        return None if step is None else ScheduledStep(step.rows, list(step.logits))


class PendingTokens:
    """The next tokens of all sequences that are sampled on the device, on their way to the host.

    tokens_B: the tokens on the device
    """

    def __init__(self, rows: Sequence[ScheduledSequence], logits: Sequence[Tensor]) -> None:
        sampled = [
            (sampler, row_logits[-1, : sampler.num_tokens])
            for row, row_logits in zip(rows, logits, strict=True)
            if (sampler := row.sequence.sampler).device_sampled
            and not row.sequence.num_pending_tokens
            and not row.draft_tokens
        ]
        self.samplers = [sampler for sampler, _ in sampled]
        if not sampled:
            return
        logits_BV = torch.stack([logits_V for _, logits_V in sampled])
        params = [sampler.params for sampler in self.samplers]
        columns = [
            [0.0 if p.greedy else p.temperature for p in params],
            [p.min_p for p in params],
            [float(max(p.top_k, 0)) for p in params],
            [p.top_p for p in params],
            [sampler.next_uniform for sampler in self.samplers],
        ]
        t, min_p, k, top_p, u = torch.tensor(columns, dtype=torch.float64).to(logits_BV.device, non_blocking=True)
        few = all(p.greedy or 0 < p.top_k <= MAX_TOP_K for p in params)
        self.tokens_B = (choose_few if few else choose)(logits_BV, t.float(), min_p, k.long(), top_p, u)
        finite = logits_BV.amax(1).isfinite()  # of the others the sampler reports what is wrong
        checked_B = torch.where(finite, self.tokens_B, -1)
        self._copied: torch.cuda.Event | None = None
        if checked_B.is_cuda:
            self._host_B = torch.empty(len(sampled), dtype=torch.int64, pin_memory=True)
            self._host_B.copy_(checked_B, non_blocking=True)
            self._copied = torch.cuda.Event()
            self._copied.record()
        else:
            self._host_B = checked_B

    def __len__(self) -> int:
        return len(self.samplers)

    def wait(self) -> None:
        """Wait until the tokens are on the host, and hand them to the samplers."""
        if not self.samplers:
            return
        if self._copied is not None:
            self._copied.synchronize()
        for sampler, token in zip(self.samplers, self._host_B.tolist(), strict=True):
            sampler.device_token = token if token >= 0 else None
