"""Which sequences take part in the next step, and how many tokens of each.

Every decoding sequence gets a token in every step.  The rest of the step's token budget goes to prompts; while
sequences decode it is limited to what is computed in `max_decode_delay` seconds, and to MIN_PREFILL_TOKENS where even
those take longer, so that a long prompt delays running streams without stopping them.

Prefills run shortest-first with aging: a prompt is delayed by at most as many tokens as it has left.
"""

from __future__ import annotations

import math
from collections import deque
from collections.abc import Callable, Iterator
from dataclasses import dataclass, field
from typing import TYPE_CHECKING

from tiercel.engine.request import Sequence, SequenceStatus
from tiercel.sampling.sampler import Draw

if TYPE_CHECKING:
    from tiercel.model.runner import LaunchedStep, SequenceState

MIN_PREFILL_TOKENS = 64  # prompt tokens that a step may always compute beside decodes: fewer take hardly less time
MAX_DECODE_DELAY_SECONDS = 0.2


@dataclass
class ScheduledSequence:
    """A sequence's part of a step: `num_scheduled_tokens` of its tokens, and the draft tokens after them.

    state: what it runs on, once it has begun · samples: its last token is followed by one to sample
    draw: how the device samples that; None: the host does
    """

    sequence: Sequence
    num_scheduled_tokens: int
    draft_tokens: list[int] = field(default_factory=list)
    state: SequenceState | None = None
    samples: bool = False
    draw: Draw | None = None

    @property
    def tokens(self) -> list[int]:
        """Tokens of the forward, draft tokens included; [] for one that only the device has yet."""
        start = self.sequence.num_computed_tokens
        return self.sequence.tokens[start : start + self.num_scheduled_tokens] + self.draft_tokens

    @property
    def num_tokens(self) -> int:
        """Tokens of the forward, draft tokens included."""
        return self.num_scheduled_tokens + len(self.draft_tokens)

    @property
    def valid(self) -> bool:
        """Whether its sequence goes on with the state that it has begun with."""
        sequence = self.sequence
        return self.state is not None and sequence.state is self.state and sequence.finish_reason is None

    def begin(self) -> None:
        """Note what the forward runs on and what follows it."""
        sequence = self.sequence
        self.state = sequence.state
        self.samples = self.num_scheduled_tokens == sequence.num_pending_tokens
        if self.samples:
            self.draw = sequence.sampler.draw_at(sequence.num_output_tokens + sequence.num_in_flight)


@dataclass
class ScheduledStep:
    """One forward.  launched: where it was started, and the device samples · began: when, by time.perf_counter"""

    rows: list[ScheduledSequence]
    launched: LaunchedStep | None = None
    began: float = 0.0

    @property
    def num_tokens(self) -> int:
        """Tokens of all sequences, draft tokens included."""
        return sum(row.num_tokens for row in self.rows)

    @property
    def num_prefill_tokens(self) -> int:
        """Tokens of sequences that have more than one to compute."""
        return sum(row.num_scheduled_tokens for row in self.rows if row.num_scheduled_tokens > 1)

    @property
    def logits_to_keep(self) -> int:
        """Positions of a sequence that are sampled at most: one, and one for each draft token."""
        return 1 + max(len(row.draft_tokens) for row in self.rows)


class Scheduler:
    """Queue and running sequences, in order of arrival.

    Args:
        slots: sequences that run at once.
        max_num_batched_tokens: tokens of one step.
        max_decode_delay: seconds that decoding sequences may wait for a step that also computes prompts; inf: any.

    Attributes:
        prefill_budget: prompt tokens of a step beside decodes, adapted to the measured speed.
        admission_paused: a sequence was preempted: nothing is admitted before a running one leaves.
    """

    def __init__(
        self, slots: int, max_num_batched_tokens: int, max_decode_delay: float = MAX_DECODE_DELAY_SECONDS
    ) -> None:
        self.slots, self.max_num_batched_tokens, self.max_decode_delay = slots, max_num_batched_tokens, max_decode_delay
        self.prefill_budget = MIN_PREFILL_TOKENS if max_decode_delay < math.inf else max_num_batched_tokens
        self.waiting: deque[Sequence] = deque()
        self.running: list[Sequence] = []
        self.admission_paused = False

    @property
    def used_slots(self) -> int:
        """Slots of running sequences and of those that will fork from them."""
        return sum(self._slots_for(sequence) for sequence in list(self.running))

    @property
    def num_waiting(self) -> int:
        """Sequences that wait for a slot."""
        return sum(sequence.num_slots for sequence in list(self.waiting))

    def free_slots_beside(self, parent: Sequence) -> int:
        """Slots for sequences that fork from `parent`."""
        return self.slots - 1 - sum(self._slots_for(other) for other in self.running if other is not parent)

    def _slots_for(self, sequence: Sequence) -> int:
        return min(sequence.num_slots, self.slots)

    def admit(self) -> Iterator[Sequence]:
        """Move sequences from the queue to free slots, strictly in order: also one that needs many slots is first."""
        while self.waiting and not (self.admission_paused and self.running):
            if self.used_slots + self._slots_for(self.waiting[0]) > self.slots:
                return
            sequence = self.waiting.popleft()
            self.add_running(sequence)
            yield sequence

    def add_running(self, sequence: Sequence) -> None:
        """Give a sequence a slot."""
        sequence.status = SequenceStatus.RUNNING
        self.running.append(sequence)

    def remove(self, sequence: Sequence) -> None:
        """Take out a sequence that has finished."""
        if sequence in self.running:
            self.running.remove(sequence)
            self.admission_paused = False
        elif sequence in self.waiting:
            self.waiting.remove(sequence)

    def preempt(self, sequence: Sequence) -> None:
        """Move a running sequence back to the queue, to the place of its arrival."""
        self.running.remove(sequence)
        self.enqueue(sequence, SequenceStatus.PREEMPTED)
        self.admission_paused = True

    def enqueue(self, sequence: Sequence, status: SequenceStatus = SequenceStatus.WAITING) -> None:
        """Insert a sequence into the queue in order of arrival."""
        later = (i for i, other in enumerate(self.waiting) if _arrival(other) > _arrival(sequence))
        self.waiting.insert(next(later, len(self.waiting)), sequence)
        sequence.status = status

    def record_prefill(self, num_tokens: int, seconds: float) -> None:
        """Adapt the prefill budget to a step that computed `num_tokens` of prompts."""
        if num_tokens >= MIN_PREFILL_TOKENS:
            affordable = int(min(self.max_decode_delay * num_tokens / seconds, self.max_num_batched_tokens))
            self.prefill_budget = max(MIN_PREFILL_TOKENS, (self.prefill_budget + affordable) // 2)

    def schedule(self, boundary: Callable[[Sequence], int]) -> list[ScheduledSequence]:
        """Return the parts of the next step.

        Args:
            boundary: the length that a sequence must not be computed past in one forward (snapshot_policy.py).
        """
        if single := next((sequence for sequence in self.running if sequence.isolated), None):
            count = min(boundary(single) - single.num_computed_tokens, self.max_num_batched_tokens)
            return [ScheduledSequence(single, count)]
        rows = [
            ScheduledSequence(sequence, 1)
            for sequence in self.running
            if sequence.num_pending_tokens == 1 and not sequence.ends_in_flight
        ]
        budget = max(self.max_num_batched_tokens - len(rows), 1)
        if rows:
            budget = min(budget, self.prefill_budget)
        prefills = [sequence for sequence in self.running if sequence.num_pending_tokens > 1]
        prefills.sort(key=lambda sequence: (sequence.num_pending_tokens - sequence.aging_credit, _arrival(sequence)))
        scheduled = {id(sequence): 0 for sequence in prefills}
        for sequence in prefills:
            count = min(boundary(sequence) - sequence.num_computed_tokens, budget)
            if count > 0:
                rows.append(ScheduledSequence(sequence, count))
                scheduled[id(sequence)] = count
                budget -= count
        total = sum(scheduled.values())
        for sequence in prefills:
            sequence.aging_credit += total - scheduled[id(sequence)]
        return rows


def _arrival(sequence: Sequence) -> tuple[int, int]:
    return sequence.request.arrival_index, sequence.index
