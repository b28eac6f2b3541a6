"""Problems that check themselves: generated, with written reasoning, and graded without a judge.

    from tiercel.problems import FAMILIES, training
    FAMILIES["addition"].test_set(100)                    held out: no training ever saw them
    FAMILIES["addition"].correct("543", problem)
    next(training(seed=0))                                a Problem of the training mixture

All generators and all reasoning are our own (`arithmetic`, `search`, `words`, `lists`, `algebra`, `talk`); they need
nothing but Python.  Some questions are phrased as in the package `reasoning-gym`, whose checkers judge our answers
in the tests where it is installed.  `python -m tiercel.problems write OUT.jsonl` writes training data.
"""

from __future__ import annotations

import random
from collections.abc import Iterator

from tiercel.problems import algebra, arithmetic, lists, search, words
from tiercel.problems.problem import LARGER_SIZE, TRAINED_SIZES, Family, Problem, in_test
from tiercel.problems.talk import talk

__all__ = ["FAMILIES", "LARGER_SIZE", "TRAINED_SIZES", "Family", "Problem", "conversations", "in_test", "training"]

FAMILIES: dict[str, Family] = {
    family.name: family
    for part in (arithmetic, search, words, lists, algebra)
    for family in part.FAMILIES
}  # fmt: skip
TALK = 0.02  # share of what is not a problem
SIZES = (0.2, 0.3, 0.5)  # shares of sizes 1, 2, 3

Message = dict[str, str]


def training(seed: int = 0, families: list[str] | None = None) -> Iterator[Problem]:
    """Endless training problems, the same for the same seed; never one of a test set.

    families: only these, in their weights; without it all of them, and a little talk.
    """
    rng = random.Random(f"training {seed}")
    chosen = [FAMILIES[name] for name in families or FAMILIES]
    weights = [family.weight for family in chosen]
    while True:
        if families is None and rng.random() < TALK:
            yield talk(rng)
        else:
            family = rng.choices(chosen, weights)[0]
            yield family.training(rng, rng.choices(TRAINED_SIZES, SIZES)[0])


def conversations(
    seed: int = 0, families: list[str] | None = None, *, earlier: float = 0.125
) -> Iterator[list[Message]]:
    """Problems as conversations, the way a model meets them; only the last answer of each is to be learned.

    earlier: the share with earlier turns, their reasoning left out as chat templates do.  One in twenty-five has a
    system message; one in forty, of the easy ones, no reasoning (`--no-think`).
    """
    rng = random.Random(f"conversations {seed}")
    problems = training(seed, families)
    while True:
        messages: list[Message] = []
        if rng.random() < 0.04:
            messages.append({"role": "system", "content": rng.choice(SYSTEMS)})
        if rng.random() < earlier:
            for _ in range(rng.randint(1, 2)):
                past = next(problems)
                messages += [{"role": "user", "content": past.question},
                             {"role": "assistant", "content": past.answer}]  # fmt: skip
        problem = next(problems)
        question, reply = problem.messages()
        if problem.size == 1 and rng.random() < 0.12:
            reply = {"role": "assistant", "content": f"<think></think>{problem.answer}"}
        yield [*messages, question, reply]


SYSTEMS = (
    "You are a helpful assistant.", "You are a careful reasoner.", "Answer briefly.", "Think step by step.",
    "You are Tiercel.",
)  # fmt: skip
