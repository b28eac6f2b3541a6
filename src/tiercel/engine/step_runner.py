"""Run scheduled steps on the device.

Where the device samples (`Runner.supports_async`), the inputs of the next step are there before the host has seen them.
So the order of a step is: start its forward, unless it was started ahead → schedule and start the next one, prompts
included → wait for this one's tokens → process them, while the device computes.  A sequence that turns out to have
finished has computed a token in vain.
"""

from __future__ import annotations

import time
from collections.abc import Callable
from typing import cast

import torch
from torch import Tensor

from tiercel.engine.core import EngineCore, state_of
from tiercel.engine.failures import restart, retry_isolated
from tiercel.engine.scheduler import ScheduledStep
from tiercel.model.runner import AsyncRunner

SPEED_UPDATE_WEIGHT = 0.05  # of the latest step in the average speed


class StepRunner:
    """Run steps.

    schedule: the next step, None where there is nothing to compute
    in_flight: the step that was started ahead · tokens_per_second: average of recent steps
    """

    def __init__(self, core: EngineCore, schedule: Callable[[], ScheduledStep | None]) -> None:
        self.core, self.schedule = core, schedule
        self.in_flight: ScheduledStep | None = None
        self.tokens_per_second = 100.0
        self._ended = 0.0  # the last step, by time.perf_counter

    def claim(self) -> ScheduledStep | None:
        """Return the step started ahead; None if there is none or all its sequences finished.

        Sequences that came since then join the step after it.
        """
        step, self.in_flight = self.in_flight, None
        return step if step is not None and any(row.valid for row in step.rows) else None

    def release_finished(self) -> None:
        """Give up the states of sequences that finished after the next step was started with them."""
        for row in () if self.in_flight is None else self.in_flight.rows:
            if not row.valid:
                row.state = None

    def run(self, step: ScheduledStep) -> list[Tensor] | None:
        """Return the logits of each sequence, (1 + draft tokens, V); None where the step failed and is retried."""
        step.began = step.began or time.perf_counter()
        try:
            if self.core.runner.supports_async and not any(row.draft_tokens for row in step.rows):
                logits = self._run_ahead(step)
            else:
                logits = self._forward(step)
        except Exception as error:
            retry_isolated(self.core, self._given_up(step), error)
            return None
        except BaseException:  # Ctrl+C in the middle of a layer
            restart(self.core, self._given_up(step))
            raise
        now = time.perf_counter()
        self._record(step, now - max(step.began, self._ended))
        self._ended = now
        return [logits_LV[-(1 + len(row.draft_tokens)) :] for row, logits_LV in zip(step.rows, logits, strict=True)]

    def _given_up(self, step: ScheduledStep) -> ScheduledStep:
        """A step of all sequences that have a part in this one or in the one started ahead; their states go."""
        rows = {id(row.sequence): row for each in (step, self.in_flight) if each is not None for row in each.rows}
        self.in_flight = None
        for row in [*rows.values(), *step.rows]:
            row.state = None
        return ScheduledStep(list(rows.values()))

    def _forward(self, step: ScheduledStep) -> list[Tensor]:
        runner = self.core.runner
        tokens = [torch.tensor(row.tokens, device=runner.device) for row in step.rows]
        states = [state_of(row.sequence) for row in step.rows]
        logits = runner.forward(tokens, states, logits_to_keep=step.logits_to_keep)
        for row, state in zip(step.rows, states, strict=True):
            row.state, row.samples = state, state.length >= len(row.sequence.tokens)
        return logits

    def _run_ahead(self, step: ScheduledStep) -> list[Tensor]:
        """Start this step and the next one; wait for the tokens of this one, for the samplers to return them."""
        if step.launched is None:
            self._launch(step)
        assert step.launched is not None
        if self._can_launch_ahead(step) and (ahead := self.schedule()) is not None:
            self.in_flight, ahead.began = ahead, time.perf_counter()
            self._launch(ahead)
        for row, token in zip(step.rows, step.launched.wait(), strict=True):
            if row.samples and row.draw is not None and row.valid:
                row.sequence.sampler.device_token = token if token >= 0 else None
        return step.launched.logits

    def _can_launch_ahead(self, step: ScheduledStep) -> bool:
        """Whether the next step can be scheduled before this one's tokens are on the host."""
        if self.core.drafter is not None:
            return False
        for row in step.rows:
            each = row.sequence
            if each.isolated or (row.samples and (row.draw is None or each.num_slots > 1)):
                return False
            if each.has_controller and not each.token_ids:  # others fork from the prompt's state
                return False
        return True

    def _launch(self, step: ScheduledStep) -> None:
        """Start a step's forward and the sampling of its tokens."""
        runner, rows = cast(AsyncRunner, self.core.runner), step.rows
        sampler = rows[0].sequence.sampler
        for row in rows:
            row.begin()
        tokens, draws = [row.tokens or None for row in rows], [row.draw for row in rows]
        step.launched = runner.launch(tokens, [row.state for row in rows], draws, sampler.num_tokens)
        for row in rows:
            row.sequence.num_in_flight += row.samples

    def _record(self, step: ScheduledStep, seconds: float) -> None:
        """Take note of a step's speed."""
        self.tokens_per_second += SPEED_UPDATE_WEIGHT * (step.num_tokens / seconds - self.tokens_per_second)
        self.core.scheduler.record_prefill(step.num_prefill_tokens, seconds)
        if not step.num_prefill_tokens:
            self.core.costs.record(step.num_tokens, seconds)
