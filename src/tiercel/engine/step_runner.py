"""Run scheduled steps on the device."""

from __future__ import annotations

import time
from collections.abc import Sequence as GenericSequence

import torch
from torch import Tensor

from tiercel.engine import snapshot_policy
from tiercel.engine.async_scheduling import InFlightStep, PendingTokens
from tiercel.engine.core import EngineCore, state_of
from tiercel.engine.failures import restart, retry_isolated
from tiercel.engine.scheduler import ScheduledSequence, ScheduledStep

SPEED_UPDATE_WEIGHT = 0.05  # of the latest step in the average speed


class StepRunner:
    """Run steps; where the device supports it, launch the next one before this one's tokens are on the host.

    in_flight: the step that was launched ahead · tokens_per_second: average of recent steps
    """

    def __init__(self, core: EngineCore) -> None:
        self.core = core
        self.in_flight: InFlightStep | None = None
        self.tokens_per_second = 100.0

    def claim(self) -> ScheduledStep | None:
        """Return the step launched ahead; None if there is none or all its sequences finished.

        Sequences that came since then join the step after it.
        """
        step, self.in_flight = self.in_flight, None
        return None if step is None else step.claim()

    def release_finished(self) -> None:
        """Give up the states of sequences that finished after the next step was launched with them."""
        if self.in_flight is not None:
            self.in_flight = self.in_flight.unfinished()

    def run(self, step: ScheduledStep) -> list[Tensor] | None:
        """Return the logits of each sequence, (1 + draft tokens, V); None where the step failed and is retried."""
        began = time.perf_counter()
        try:
            logits = self._forward(step) if step.logits is None else step.logits
            if self.core.runner.supports_async:
                self._sample_on_device(step.rows, logits)
        except Exception as error:
            self.in_flight = None
            retry_isolated(self.core, step, error)
            return None
        except BaseException:  # Ctrl+C in the middle of a layer
            self.in_flight = None
            restart(self.core, step)
            raise
        self._record(step, time.perf_counter() - began)
        return [logits_LV[-(1 + len(row.draft_tokens)) :] for row, logits_LV in zip(step.rows, logits, strict=True)]

    def _forward(self, step: ScheduledStep) -> list[Tensor]:
        runner = self.core.runner
        tokens = [torch.tensor(row.tokens, device=runner.device) for row in step.rows]
        states = [state_of(row.sequence) for row in step.rows]
        return runner.forward(tokens, states, logits_to_keep=step.logits_to_keep)

    def _sample_on_device(self, rows: list[ScheduledSequence], logits: GenericSequence[Tensor]) -> None:
        pending = PendingTokens(rows, logits)
        if len(pending) == len(rows) and self._can_launch_ahead(rows):
            self._launch(rows, pending.tokens_B)
        pending.wait()

    def _can_launch_ahead(self, rows: list[ScheduledSequence]) -> bool:
        """Whether the next step is one token for each of these: none arrives or forks, and one of them goes on."""
        scheduler = self.core.scheduler
        admits = scheduler.waiting and scheduler.used_slots < scheduler.slots
        if self.core.arrivals or admits or len(rows) != len(scheduler.running):
            return False
        sequences = [row.sequence for row in rows]
        if any(each.num_slots > 1 or (each.has_controller and not each.token_ids) for each in sequences):
            return False
        return any(each.max_output_tokens - each.num_output_tokens > 1 for each in sequences)

    def _launch(self, rows: list[ScheduledSequence], tokens_B: Tensor) -> None:
        """Launch the next forward, with tokens that are not on the host yet."""
        ahead = [ScheduledSequence(row.sequence, 1) for row in rows]
        snapshot_policy.take_due(ahead, self.core.cache)
        states = [state_of(row.sequence) for row in ahead]
        logits = self.core.runner.forward(torch.split(tokens_B.clamp(min=0), 1), states)
        self.in_flight = InFlightStep(ahead, list(states), logits)

    def _record(self, step: ScheduledStep, seconds: float) -> None:
        """Take note of a step's speed."""
        self.tokens_per_second += SPEED_UPDATE_WEIGHT * (step.num_tokens / seconds - self.tokens_per_second)
        self.core.scheduler.record_prefill(step.num_prefill_tokens, seconds)
        if not step.num_prefill_tokens:
            self.core.costs.record(step.num_tokens, seconds)
