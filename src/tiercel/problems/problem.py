"""What a problem is, what a family of problems is, and which side of the split a problem lies on.

The split is a property of the problem, not of a seed or a file: the hash of its canonical form (operands without
their phrasing, in an order where order does not matter) decides whether it may be trained on or is held out.
"""

from __future__ import annotations

import hashlib
import random
import re
from collections.abc import Callable
from dataclasses import dataclass, field
from typing import Any

HELD_OUT = 10  # one problem in HELD_OUT is never trained on
TRAINED_SIZES = (1, 2, 3)  # sizes; what they mean is each family's own
LARGER_SIZE = 4  # beyond anything trained


@dataclass(frozen=True)
class Problem:
    """A question, the reasoning that leads to its answer, and the answer.

    key: the canonical form; "" for facts that are the alphabet of all others (3 + 4), which are always trained and
    never tested.  data: what a checker needs beside the answer (the numbers of a countdown).
    """

    family: str
    question: str
    thinking: str
    answer: str
    key: str
    size: int = 1
    data: dict[str, Any] = field(default_factory=dict)

    @property
    def held_out(self) -> bool:
        return bool(self.key) and in_test(f"{self.family} {self.key}")

    @property
    def reply(self) -> str:
        return f"<think>{self.thinking}</think>{self.answer}"

    def messages(self) -> list[dict[str, str]]:
        return [{"role": "user", "content": self.question}, {"role": "assistant", "content": self.reply}]


def in_test(key: str) -> bool:
    """Whether the problem of this canonical form is held out; the same on every machine and in every version."""
    return int.from_bytes(hashlib.blake2b(key.encode(), digest_size=8).digest(), "big") % HELD_OUT == 0


def same(answer: str, problem: Problem) -> bool:
    """Equal but for case, spaces and a final full stop."""
    return _plain(answer) == _plain(problem.answer)


def _plain(text: str) -> str:
    return " ".join(text.casefold().replace(", ", ",").replace("−", "-").split()).rstrip(".")


def numbers(text: str) -> list[int]:
    """The whole numbers in a text."""
    return [int(word) for word in re.findall(r"-?\d+", text.replace("−", "-"))]


@dataclass(frozen=True)
class Family:
    """Problems of one kind.

    make(rng, size): any problem of this size, held out or not.  sizes: what sizes 1, 2, 3 and larger mean.
    checks(answer, problem): whether the answer is right.  weight: its share of the training mixture.
    """

    name: str
    make: Callable[[random.Random, int], Problem]
    sizes: tuple[str, str, str, str]
    weight: float = 1.0
    checks: Callable[[str, Problem], bool] = same

    def correct(self, answer: str, problem: Problem) -> bool:
        return self.checks(answer, problem)

    def training(self, rng: random.Random, size: int) -> Problem:
        """A problem that may be trained on."""
        assert size in TRAINED_SIZES
        while (problem := self.make(rng, size)).held_out:
            pass
        return problem

    def test_set(self, n: int, larger: bool = False, seed: int = 0, size: int | None = None) -> list[Problem]:
        """n different problems that no training ever saw; the same for the same arguments.

        Sizes 1, 2 and 3 mixed, or only the given one; larger: beyond the trained sizes.  Fewer than n come where
        fewer exist (held-out problems of two digits times one).
        """
        rng = random.Random(f"test {self.name} {larger} {seed} {size}")
        found: dict[str, Problem] = {}
        missed = 0
        while len(found) < n and missed < 2000:
            missed += 1
            problem = self.make(rng, LARGER_SIZE if larger else size or rng.choice(TRAINED_SIZES))
            if problem.held_out:
                missed = 0 if problem.key not in found else missed
                found.setdefault(problem.key, problem)
        return list(found.values())
