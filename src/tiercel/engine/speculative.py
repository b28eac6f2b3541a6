"""Speculative decoding: draft the next tokens, compute them in one forward, keep those that are sampled anyway.

    speculation = Speculation(NgramDrafter(), costs)
    draft = speculation.draft(tokens, rows)               [] where drafting does not pay
    logits = runner.forward([[last, *draft]], [state], logits_to_keep=len(draft) + 1)
    ...                                                   sample row after row, up to the first that differs
    state.trim(…)                                         rejected draft tokens leave the state
    speculation.record(len(draft), accepted)

The sampler's draw is a function of (seed, index, position) alone, so every row is sampled as if it came alone, and a
draft token is accepted while it equals the sample: the output is the same with and without speculation, also when
it is sampled.  The sampler (penalties, a grammar) only sees accepted tokens.

Speculation is used where it is faster: computing k draft tokens costs more than one step (measured, `StepCosts`), and
pays only where enough of them are accepted (measured, `Speculation`).  A drafter that is wrong is used less and less.
"""

from __future__ import annotations

import time
from bisect import bisect
from collections import Counter, defaultdict
from collections.abc import Sequence
from dataclasses import dataclass
from typing import Protocol

from tiercel.sampling.fields import is_integer, refuse

DRAFT_LENGTHS = (1, 3, 7)  # tokens; only a few lengths, because each needs a captured graph (model/graph_cache.py)
MAX_DRAFT_TOKENS = DRAFT_LENGTHS[-1]
MIN_SPEEDUP = 1.05  # that a draft must promise
MIN_SPEEDUP_IN_BATCH = 1.2  # the same beside other sequences, where each new row count needs two uncaptured steps
MIN_COOLDOWN_TOKENS, MAX_COOLDOWN_TOKENS = 8, 256  # until a drafter that did not pay is tried again
UNCAPTURED_STEPS = 2  # first steps of each list of lengths, which are slower: the second is captured
PAST_WEIGHT = 0.9  # of earlier measurements in a moving average
EXTRA_ROW_COST = 0.2  # of one row's, before anything is measured: 8 rows cost 2 to 4 times one row on known CPUs


class Drafter(Protocol):
    """Propose next tokens for one sequence.  tokens: prompt and output so far; they only grow."""

    def match_class(self, tokens: Sequence[int]) -> int:
        """Return a small number for how likely a draft is accepted, under which results are counted; −1: no draft."""

    def propose(self, tokens: Sequence[int], k: int) -> list[int]:
        """Return up to k next tokens."""

    def release(self) -> None:
        """Give up states and memory; the sequence has finished or was preempted."""


class NgramDrafter:
    """Prompt lookup: propose what followed the last tokens when they came before.

    The position copied from is followed as long as its tokens are accepted; otherwise it is the latest one after the
    longest equal n-gram.  A token costs one table entry for each n.

    Args:
        min_n: tokens of the shortest n-gram.
        max_n: tokens of the longest.
    """

    def __init__(self, min_n: int = 2, max_n: int = 4) -> None:
        self.sizes = range(max_n, min_n - 1, -1)
        self._after: dict[tuple[int, ...], int] = {}  # n-gram → where its continuation begins
        self._num_indexed = 0  # tokens whose n-grams (those that end before them) are in the table
        self._position = 0  # that is copied from; 0: none
        self._num_matched = 0  # equal tokens before it

    def match_class(self, tokens: Sequence[int]) -> int:
        """Return 0, 1 or 2 by the length of the match."""
        self._follow(tokens)
        return -1 if not self._position else 0 if self._num_matched < 4 else 1 if self._num_matched < 8 else 2

    def propose(self, tokens: Sequence[int], k: int) -> list[int]:
        """Return the k tokens that followed the match."""
        self._follow(tokens)
        if not self._position:
            return []
        out = list(tokens[self._position : self._position + k])
        while len(out) < k:  # the copy overlaps the end of the sequence: it repeats
            out += out[: k - len(out)]
        return out

    def release(self) -> None:
        """Do nothing: the table is small."""

    def _follow(self, tokens: Sequence[int]) -> None:
        for end in range(self._num_indexed, len(tokens)):
            matches = self._position and tokens[self._position] == tokens[end]
            self._position, self._num_matched = (self._position + 1, self._num_matched + 1) if matches else (0, 0)
            for size in self.sizes:
                if size <= end:
                    self._after[tuple(tokens[end - size : end])] = end
        self._num_indexed = len(tokens)
        if not self._position:
            self._look_up(tokens)

    def _look_up(self, tokens: Sequence[int]) -> None:
        for size in self.sizes:
            position = self._after.get(tuple(tokens[-size:])) if size <= len(tokens) else None
            if position is not None:
                self._position, self._num_matched = position, size
                return


@dataclass
class AcceptanceRecord:
    """Results of drafts of one match class.

    accepted, rejected: decaying counts; a first draft is expected to be accepted
    cooldown: tokens until the drafter is tried again · next_cooldown: the same after the next draft that did not pay
    """

    accepted: float = 1.5
    rejected: float = 0.5
    cooldown: int = 0
    next_cooldown: int = MIN_COOLDOWN_TOKENS

    @property
    def rate(self) -> float:
        """Probability that a draft token is accepted."""
        return self.accepted / (self.accepted + self.rejected)

    def record(self, num_proposed: int, num_accepted: int) -> None:
        """Count a draft's result."""
        decay = PAST_WEIGHT**2
        self.accepted = decay * self.accepted + num_accepted
        self.rejected = decay * self.rejected + (num_accepted < num_proposed)


class StepCosts:
    """Seconds of a step by its number of tokens: measured, interpolated, or estimated where nothing is measured yet.

    recent: results of drafts of all sequences by match class, the expectation for a new sequence
    """

    def __init__(self) -> None:
        self._seconds: dict[int, float] = {}
        self._num_steps: Counter[int] = Counter()
        self.recent: defaultdict[int, AcceptanceRecord] = defaultdict(AcceptanceRecord)

    def record(self, rows: int, seconds: float) -> None:
        """Take note of a step of `rows` tokens, none of them a prompt's."""
        self._num_steps[rows] += 1
        if self._num_steps[rows] <= UNCAPTURED_STEPS:
            return
        expected = self._seconds.get(rows, self.of(rows) if self._seconds else seconds)
        # one slow step (other programs used the cores) says little, a fast one says more
        weight = 1 - PAST_WEIGHT if seconds > expected else 1 - PAST_WEIGHT**3
        if rows in self._seconds:
            self._seconds[rows] = expected + weight * (min(seconds, 2 * expected) - expected)
        else:
            self._seconds[rows] = min(seconds, 2 * expected)

    def of(self, rows: int) -> float:
        """Return the seconds of a step of `rows` tokens; before anything is measured only ratios have a meaning."""
        known = sorted(self._seconds)
        if not known:
            return 1 + EXTRA_ROW_COST * (rows - 1)
        at = bisect(known, rows)
        if at and (known[at - 1] == rows or at < len(known)):
            low = known[at - 1]
            high = known[min(at, len(known) - 1)]
            a, b = self._seconds[low], self._seconds[high]
            return a if high == low or low == rows else a + (max(b, a) - a) * (rows - low) / (high - low)
        near = known[at - 1] if at else known[0]
        return self._seconds[near] * (1 + EXTRA_ROW_COST * (rows - 1)) / (1 + EXTRA_ROW_COST * (near - 1))


class Speculation:
    """Decide for one sequence whether to draft, and how many tokens, from what came of earlier drafts.

    Args:
        drafter: proposes tokens for this sequence.
        costs: shared by all sequences of the same steps; the engine records them.
        lengths: of drafts, in tokens, ascending.
    """

    def __init__(self, drafter: Drafter, costs: StepCosts, lengths: Sequence[int] = DRAFT_LENGTHS) -> None:
        self.drafter, self.costs, self.lengths = drafter, costs, lengths
        self.proposed = self.accepted = 0
        self._records: dict[int, AcceptanceRecord] = {}
        self._match_class = -1  # of the last draft; −1: there was none
        self._draft_seconds = 0.0  # of one token
        self._length = self._drafted_length = 0  # tokens at the last call, and at the last draft

    def draft(self, tokens: Sequence[int], rows: int = 1, room: int = MAX_DRAFT_TOKENS) -> list[int]:
        """Return the draft tokens of the next step; [] where they would not pay.

        Args:
            tokens: prompt and output so far.
            rows: tokens of the step without them.
            room: tokens that the output may still have, less one.
        """
        new, self._length = max(len(tokens) - self._length, 0), len(tokens)
        for record in self._records.values():
            record.cooldown = max(record.cooldown - new, 0)
        self._match_class = -1
        began = time.perf_counter()
        match_class = self.drafter.match_class(tokens)
        if match_class < 0 or room < 1:
            return []
        if match_class not in self._records:
            p = self.costs.recent[match_class].rate
            self._records[match_class] = AcceptanceRecord(2 * p, 2 - 2 * p)
        record = self._records[match_class]
        k = min(self._best_length(record, rows), room)
        k = max((length for length in self.lengths if length <= k), default=0)
        if k == 0:
            return []
        draft_tokens = self.drafter.propose(tokens, k)
        if not draft_tokens:
            return []
        if len(tokens) - self._drafted_length <= MAX_DRAFT_TOKENS + 1:  # else the drafter caught up with the sequence
            spent, past = (time.perf_counter() - began) / len(draft_tokens), self._draft_seconds
            self._draft_seconds = PAST_WEIGHT * past + (1 - PAST_WEIGHT) * spent if past else spent
        self._drafted_length, self._match_class = len(tokens), match_class
        return draft_tokens

    def _best_length(self, record: AcceptanceRecord, rows: int) -> int:
        """Return the length with most expected tokens a second of all sequences.

        1 for a try after a cooldown, where a fully accepted draft would pay; else 0.
        """
        if record.cooldown:
            return 0
        base, p = self.costs.of(rows), record.rate
        best, more, could_pay = 0, 0.0, False
        speed = needed = (MIN_SPEEDUP if rows == 1 else MIN_SPEEDUP_IN_BATCH) * rows / base
        for k in range(1, self.lengths[-1] + 1):
            more += p**k
            if k not in self.lengths:
                continue
            # more rows never cost less: where they seem to, other programs used the cores while few were measured
            seconds = max(self.costs.of(rows + k), base) + k * self._draft_seconds
            could_pay |= (rows + k) / seconds > needed
            if (rows + more) / seconds > speed:
                best, speed = k, (rows + more) / seconds
        if best or not could_pay:
            return best
        # a try costs every sequence of the step
        record.cooldown = record.next_cooldown * rows
        record.next_cooldown = min(2 * record.next_cooldown, MAX_COOLDOWN_TOKENS)
        return 1

    def record(self, num_proposed: int, num_accepted: int) -> None:
        """Take note of the last draft's result."""
        if not num_proposed:
            return
        self.proposed, self.accepted = self.proposed + num_proposed, self.accepted + num_accepted
        if self._match_class < 0:
            return
        record = self._records[self._match_class]
        record.record(num_proposed, num_accepted)
        self.costs.recent[self._match_class].record(num_proposed, num_accepted)
        if num_accepted == num_proposed:
            record.cooldown, record.next_cooldown = 0, MIN_COOLDOWN_TOKENS


def draft_lengths(num_speculative_tokens: int | None) -> tuple[int, ...]:
    """Return the lengths of drafts, in tokens, up to this one; None: up to MAX_DRAFT_TOKENS.

    Raises:
        RequestError: it is not from 1 to MAX_DRAFT_TOKENS.
    """
    if num_speculative_tokens is None:
        return DRAFT_LENGTHS
    if not is_integer(num_speculative_tokens) or not 1 <= num_speculative_tokens <= MAX_DRAFT_TOKENS:
        raise refuse("num_speculative_tokens", num_speculative_tokens, f"a whole number from 1 to {MAX_DRAFT_TOKENS}")
    return (*(length for length in DRAFT_LENGTHS if length < num_speculative_tokens), num_speculative_tokens)


def prompt_lookup(sequence: object) -> Drafter:
    """Return the default drafter: it costs nothing, and is right where text is copied."""
    return NgramDrafter()
