"""Speculation: guess the next tokens, have the network check them in one pass, keep what it would have said.

    spec = Speculation(NgramDrafter(), costs)
    draft = spec.draft(tokens, rows)                      [] where guessing does not pay
    logits = network([[last, *draft]], [state], logits_to_keep=len(draft) + 1)
    ...                                                   sample row after row, up to the first that is not the guess
    state.trim(…)                                         guesses that were wrong are forgotten
    spec.note(len(draft), right)

The sampler's draw is a function of (seed, choice, position) alone, so every row is sampled as if it came alone, and a
guess counts while it equals the sample: the answer is the same with and without speculation, sampled ones too.
Nothing is ever taken back from the sampler (penalties, a grammar): it only sees tokens that stay.

Never slower: checking k guesses costs more than one step (measured, `StepCosts`), and pays only where enough of them
are right (measured, `Speculation`).  A drafter that is wrong is asked less and less often.
"""

from __future__ import annotations

import time
from bisect import bisect
from collections import Counter, defaultdict
from collections.abc import Sequence
from dataclasses import dataclass
from typing import Protocol

import torch
from torch import Tensor

from tiercel.model.decoder import Decoder
from tiercel.model.state import Snapshot
from tiercel.sampling.sampler import Sampler, draw, uniform

LENGTHS = (1, 3, 7)  # guesses in one step: a few kinds of step, because each is recorded once (model/graph_cache.py)
MOST = LENGTHS[-1]
GAIN, SHARED_GAIN = 1.05, 1.2  # what a draft must promise to be worth its trouble; beside others each number of rows is
# a kind of step of its own, the first two of which are slow
FIRST_REST, LONGEST_REST = 8, 256  # tokens until a drafter that did not pay is asked again
FIRST_STEPS = 2  # of a kind are slower: the second is recorded
MEMORY = 0.9  # weight of the past in what is measured


class Drafter(Protocol):
    """Guesses for one text.  `tokens`: prompt and answer so far; they only ever grow."""

    def strength(self, tokens: Sequence[int]) -> int:
        """How good a guess will be, as a small number that its record is kept under; −1: there is none."""

    def propose(self, tokens: Sequence[int], k: int) -> list[int]:
        """Up to k next tokens."""

    def note(self, accepted: int) -> None:
        """So many of the last proposal were right."""


class NgramDrafter:
    """Prompt lookup: what followed when the text last said this.

    The place being copied from is followed as long as it is right; otherwise the latest one where the longest run of
    `longest` … `shortest` tokens was the same.  Reading a token costs one entry for each length.
    """

    def __init__(self, shortest: int = 2, longest: int = 4) -> None:
        self.sizes = range(longest, shortest - 1, -1)
        self._after: dict[tuple[int, ...], int] = {}  # run of tokens → where its continuation begins
        self._read = 0  # tokens whose runs (those that end before them) are known
        self._place = 0  # where the text goes on as it does now; 0: nowhere
        self._matched = 0  # how many tokens before that are the same

    def strength(self, tokens: Sequence[int]) -> int:
        self._follow(tokens)
        return -1 if not self._place else 0 if self._matched < 4 else 1 if self._matched < 8 else 2

    def propose(self, tokens: Sequence[int], k: int) -> list[int]:
        self._follow(tokens)
        if not self._place:
            return []
        out = list(tokens[self._place : self._place + k])
        while len(out) < k:  # the copy overlaps the end of the text: it goes round
            out += out[: k - len(out)]
        return out

    def note(self, accepted: int) -> None:
        """Nothing to learn: the next tokens say it."""

    def _follow(self, tokens: Sequence[int]) -> None:
        for end in range(self._read, len(tokens)):
            right = self._place and tokens[self._place] == tokens[end]
            self._place, self._matched = (self._place + 1, self._matched + 1) if right else (0, 0)
            for size in self.sizes:
                if size <= end:
                    self._after[tuple(tokens[end - size : end])] = end
        self._read = len(tokens)
        if not self._place:
            self._look_up(tokens)

    def _look_up(self, tokens: Sequence[int]) -> None:
        for size in self.sizes:
            place = self._after.get(tuple(tokens[-size:])) if size <= len(tokens) else None
            if place is not None:
                self._place, self._matched = place, size
                return


class ModelDrafter:
    """A smaller network with the same vocabulary guesses; its own state follows the text, trimmed where it was wrong.

    sampler: of the answer; the guesses are then drawn with the same numbers as the answer will be, which makes them
    right more often than the likeliest token would be.
    """

    def __init__(self, network: Decoder, sampler: Sampler | None = None) -> None:
        self.network, self.state = network, network.new_state()
        self.sampler = sampler if sampler is not None and not sampler.params.greedy else None
        self._read: list[int] = []  # what the state has read
        self._mark: Snapshot | None = None
        self._chunks = {part.chunk for layer in self.state.layers for part in layer if hasattr(part, "chunk")}

    def strength(self, tokens: Sequence[int]) -> int:
        return 0

    @torch.no_grad()
    def propose(self, tokens: Sequence[int], k: int) -> list[int]:
        self._go_back(tokens)
        start = self.state.length
        if any((len(tokens) + k) // chunk > len(tokens) // chunk for chunk in self._chunks):
            if start < len(tokens) - 1:  # read what is certain: the way back begins behind it
                self._step(tokens[start : len(tokens) - 1])
            self._mark = self.state.snapshot()
        out: list[int] = []
        new = list(tokens[self.state.length :])
        for _ in range(k):
            logits_V = self._step(new)
            out.append(self._choose(logits_V, len(out)))
            new = out[-1:]
        return out

    def note(self, accepted: int) -> None:
        """The next text says it."""

    def _choose(self, logits_V: Tensor, ahead: int) -> int:
        if self.sampler is None:
            return int(logits_V.argmax())
        params, position = self.sampler.params, len(self.sampler.output_ids) + ahead
        scaled_V = (logits_V - logits_V.max()).cpu() / params.temperature
        return draw(scaled_V, uniform(self.sampler.seed, self.sampler.index, position))

    def _step(self, tokens: Sequence[int]) -> Tensor:
        device = self.network.embed.weight.device
        row: Tensor = self.network(torch.tensor(list(tokens), device=device), self.state, logits_to_keep=1)[-1]
        self._read += tokens
        return row

    def _go_back(self, tokens: Sequence[int]) -> None:
        """Keep what the state shares with the text; at least the last token is read again, for its logits."""
        shared, most = 0, min(len(self._read), len(tokens) - 1)
        recent = max(most - 4 * MOST, 0)
        if self._read[:recent] == list(tokens[:recent]):
            shared = recent
        while shared < most and self._read[shared] == tokens[shared]:
            shared += 1
        if not self.state.trim(shared):
            if self._mark is not None and self._mark.length <= shared:
                self.state.restore(self._mark)
            else:
                self.state, self._mark = self.network.new_state(), None
        del self._read[self.state.length :]


@dataclass
class _Record:
    """Of guesses of one strength.  right, wrong: decaying counts; the very first guess is expected to be right."""

    right: float = 1.5
    wrong: float = 0.5
    rest: int = 0  # tokens to go until it is asked again
    next_rest: int = FIRST_REST

    @property
    def chance(self) -> float:
        return self.right / (self.right + self.wrong)

    def note(self, proposed: int, accepted: int) -> None:
        decay = MEMORY**2
        self.right = decay * self.right + accepted
        self.wrong = decay * self.wrong + (accepted < proposed)


class StepCosts:
    """Seconds of a step by how many rows it computes: measured, interpolated, guessed where nothing is known yet."""

    SLOPE = 0.2  # what a further row costs at first sight, of one row: 8 rows cost 2 to 4 on the CPUs we know

    def __init__(self) -> None:
        self._seconds: dict[int, float] = {}
        self._seen: Counter[int] = Counter()
        self.lately: defaultdict[int, _Record] = defaultdict(_Record)  # of all texts: what a new one may expect

    def note(self, rows: int, seconds: float) -> None:
        """A step of `rows` tokens, none of them a prompt's, took so long."""
        self._seen[rows] += 1
        if self._seen[rows] <= FIRST_STEPS:
            return
        expected = self._seconds.get(rows, self.of(rows) if self._seconds else seconds)
        # one slow step (somebody else wanted the cores) says little, a quick one says more
        weight = 1 - MEMORY if seconds > expected else 1 - MEMORY**3
        if rows in self._seconds:
            self._seconds[rows] = expected + weight * (min(seconds, 2 * expected) - expected)
        else:
            self._seconds[rows] = min(seconds, 2 * expected)

    def of(self, rows: int) -> float:
        """Seconds; only ratios mean something as long as nothing was measured."""
        known = sorted(self._seconds)
        if not known:
            return 1 + self.SLOPE * (rows - 1)
        at = bisect(known, rows)
        if at and (known[at - 1] == rows or at < len(known)):
            low = known[at - 1]
            high = known[min(at, len(known) - 1)]
            a, b = self._seconds[low], self._seconds[high]
            return a if high == low or low == rows else a + (max(b, a) - a) * (rows - low) / (high - low)
        near = known[at - 1] if at else known[0]
        return self._seconds[near] * (1 + self.SLOPE * (rows - 1)) / (1 + self.SLOPE * (near - 1))


class Speculation:
    """Whether to guess, how many tokens, and what came of it: for one answer.

    costs: shared by all that run in the same steps; the engine notes them.
    """

    def __init__(self, drafter: Drafter, costs: StepCosts, most: int = MOST) -> None:
        self.drafter, self.costs, self.most = drafter, costs, most
        self.proposed = self.accepted = 0
        self._records: dict[int, _Record] = {}
        self._strength = -1  # of the last guesses; −1: there were none
        self._drafting = 0.0  # seconds per guess
        self._length = 0

    def draft(self, tokens: Sequence[int], rows: int = 1, room: int = MOST) -> list[int]:
        """The guesses to check in the next step; [] where they would cost more than they bring.

        rows: how many rows the step has without them.  room: how many tokens the answer may still have, less one.
        """
        new, self._length = max(len(tokens) - self._length, 0), len(tokens)
        for record in self._records.values():
            record.rest = max(record.rest - new, 0)
        self._strength = -1
        began = time.perf_counter()
        strength = self.drafter.strength(tokens)
        if strength < 0 or room < 1:
            return []
        if strength not in self._records:
            p = self.costs.lately[strength].chance
            self._records[strength] = _Record(2 * p, 2 - 2 * p)
        record = self._records[strength]
        k = min(self._best(record, rows), room)
        k = max((length for length in LENGTHS if length <= k), default=0)
        if k == 0:
            return []
        guesses = self.drafter.propose(tokens, k)
        if guesses:
            spent = (time.perf_counter() - began) / len(guesses)
            self._drafting = MEMORY * self._drafting + (1 - MEMORY) * spent if self._drafting else spent
            self._strength = strength
        return guesses

    def _best(self, record: _Record, rows: int) -> int:
        """The length that makes most tokens in a second of everybody's; 1 for a try after a rest, where guesses
        that are all right would pay; else 0."""
        if record.rest:
            return 0
        base, p = self.costs.of(rows), record.chance
        best, more, could_pay = 0, 0.0, False
        speed = needed = (GAIN if rows == 1 else SHARED_GAIN) * rows / base
        for k in range(1, self.most + 1):
            more += p**k
            if k not in LENGTHS:
                continue
            # more rows never cost less: where they seem to, somebody else had the cores while few were measured
            seconds = max(self.costs.of(rows + k), base) + k * self._drafting
            could_pay |= (rows + k) / seconds > needed
            if (rows + more) / seconds > speed:
                best, speed = k, (rows + more) / seconds
        if best or not could_pay:
            return best
        # a try is paid by all who share the step
        record.rest, record.next_rest = record.next_rest * rows, min(2 * record.next_rest, LONGEST_REST)
        return 1

    def note(self, proposed: int, accepted: int) -> None:
        """Of the last draft so many tokens were right."""
        if not proposed:
            return
        self.proposed, self.accepted = self.proposed + proposed, self.accepted + accepted
        self.drafter.note(accepted)
        if self._strength < 0:
            return
        record = self._records[self._strength]
        record.note(proposed, accepted)
        self.costs.lately[self._strength].note(proposed, accepted)
        if accepted == proposed:
            record.rest, record.next_rest = 0, FIRST_REST


def prompt_lookup(choice: object) -> Drafter:
    """What guesses where nothing else was asked for: costs nothing, and is right where text is copied."""
    return NgramDrafter()
