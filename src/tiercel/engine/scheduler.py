"""Who runs in the next step, and how much of each prompt is read in it.

Everybody who answers gets a token in every step.  What is left of the step's tokens goes to prompts, and while
somebody answers that is little: what is read in `patience` seconds, and BESIDE tokens where even that takes longer, so
that a long prompt stretches a stream and does not stop it.

Of the prompts the shortest goes first, but nobody is overtaken by more tokens than its own prompt still has.
"""

from __future__ import annotations

from collections import deque
from collections.abc import Callable, Iterator
from dataclasses import dataclass, field

from tiercel.engine.request import Sequence

BESIDE = 64  # prompt tokens that a step may always read beside running answers: fewer are not read much sooner
PATIENCE = 0.2  # seconds that running answers may wait for a step that reads prompts too


@dataclass
class ScheduledSequence:
    """One choice's part of a step: `count` of its tokens are read, and `drafts` of what may come after them."""

    choice: Sequence
    count: int
    drafts: list[int] = field(default_factory=list)

    @property
    def tokens(self) -> list[int]:
        start = self.choice.length
        return self.choice.tokens[start : start + self.count] + self.drafts


class Scheduler:
    """waiting, running: choices in order of arrival.  slots: how many may run at once.  beside: prompt tokens of a step
    in which somebody answers."""

    def __init__(self, slots: int, step_tokens: int, patience: float = PATIENCE) -> None:
        self.slots, self.step_tokens, self.patience, self.beside = slots, step_tokens, patience, BESIDE
        self.waiting: deque[Sequence] = deque()
        self.running: list[Sequence] = []
        self.crowded = False  # somebody had to go back to the queue: nobody else comes in before somebody leaves

    @property
    def taken(self) -> int:
        return sum(self._slots_for(choice) for choice in list(self.running))

    def free_beside(self, leader: Sequence) -> int:
        """Slots for those that fork from it."""
        return self.slots - 1 - sum(self._slots_for(choice) for choice in self.running if choice is not leader)

    def _slots_for(self, choice: Sequence) -> int:
        return min(choice.places, self.slots)

    @property
    def queued(self) -> int:
        """Answers that wait for a slot."""
        return sum(choice.places for choice in list(self.waiting))

    def admit(self) -> Iterator[Sequence]:
        """Those whose turn has come.  Nobody passes the first of the queue, also when it wants many slots."""
        while self.waiting and not (self.crowded and self.running):
            if self.taken + self._slots_for(self.waiting[0]) > self.slots:
                return
            choice = self.waiting.popleft()
            self.running.append(choice)
            yield choice

    def leave(self, choice: Sequence) -> None:
        """It has finished, or was given up."""
        if choice in self.running:
            self.running.remove(choice)
            self.crowded = False
        elif choice in self.waiting:
            self.waiting.remove(choice)

    def back(self, choice: Sequence) -> None:
        """From its slot to the queue, to the place its arrival gives it."""
        self.running.remove(choice)
        self.wait(choice)

    def wait(self, choice: Sequence) -> None:
        """Into the queue, in order of arrival."""
        at = next((i for i, other in enumerate(self.waiting) if _order(other) > _order(choice)), len(self.waiting))
        self.waiting.insert(at, choice)

    def took(self, read: int, seconds: float) -> None:
        """A step that read so many tokens of prompts took so long."""
        if read >= BESIDE:
            now = int(self.patience * read / seconds)
            self.beside = max(BESIDE, (self.beside + now) // 2)

    def plan(self, stop: Callable[[Sequence], int]) -> list[ScheduledSequence]:
        """The rows of the next step.  stop(choice): the length that it must not read past in one forward."""
        if single := next((choice for choice in self.running if choice.alone), None):
            return [ScheduledSequence(single, min(stop(single) - single.length, self.step_tokens))]
        rows = [ScheduledSequence(choice, 1) for choice in self.running if choice.pending == 1]
        budget = max(self.step_tokens - len(rows), 1)
        if rows:
            budget = min(budget, self.beside)
        readers = [choice for choice in self.running if choice.pending > 1]
        readers.sort(key=lambda choice: (choice.pending - choice.overtaken, _order(choice)))
        given = {id(choice): 0 for choice in readers}
        for choice in readers:
            count = min(stop(choice) - choice.length, budget)
            if count > 0:
                rows.append(ScheduledSequence(choice, count))
                given[id(choice)] = count
                budget -= count
        total = sum(given.values())
        for choice in readers:
            choice.overtaken += total - given[id(choice)]
        return rows


def _order(choice: Sequence) -> tuple[int, int]:
    return choice.request.number, choice.index
