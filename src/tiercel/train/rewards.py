"""Problems with rewards that can be checked.  Tasks are numbered: the same number is the same problem, in every run.

    problems(["sorting"], sizes=(3,))        tiercel.problems: problems of the training split, made on the spot
    questions("file.jsonl", exact)           {"question": …, "answer": …}, in an order that follows from the seed
    gym("basic_arithmetic")                  a task of the package reasoning-gym, graded by its own checker

A reward is any function (answer, wanted) → number; the answer is the text after the reasoning.
"""

from __future__ import annotations

import importlib
import json
import random
from collections.abc import Callable, Sequence
from dataclasses import dataclass
from pathlib import Path
from typing import Any

from tiercel.errors import FormatError, RequestError
from tiercel.problems import FAMILIES, LARGER_SIZE, TRAINED_SIZES, Problem

Reward = Callable[[str, Any], float]


@dataclass(frozen=True)
class Task:
    """question: the user's message, or token ids.  reward(answer): the worth of an answer."""

    question: str | Sequence[int]
    reward: Callable[[str], float]


Tasks = Callable[[int], Task]


def problems(names: Sequence[str], sizes: Sequence[int] = TRAINED_SIZES, seed: int = 0) -> Tasks:
    """1 for a right answer, 0 otherwise.  No problem is ever one of a test set, also of the larger size."""
    if unknown := [name for name in names if name not in FAMILIES]:
        raise RequestError(f"there are no problems named {unknown[0]!r}; choose from {', '.join(FAMILIES)}")
    if wrong := [size for size in sizes if size not in (*TRAINED_SIZES, LARGER_SIZE)]:
        raise RequestError(f"problems have sizes 1 to {LARGER_SIZE}, not {wrong[0]}")

    def task(number: int) -> Task:
        rng = random.Random(f"grpo {seed} {number}")
        family, size = FAMILIES[rng.choice(list(names))], rng.choice(list(sizes))
        while (problem := family.make(rng, size)).held_out:
            pass
        return of_problem(problem)

    return task


def of_problem(problem: Problem) -> Task:
    return Task(problem.question, lambda answer: float(FAMILIES[problem.family].correct(answer, problem)))


def held_out(names: Sequence[str], sizes: Sequence[int] = TRAINED_SIZES, n: int = 100, seed: int = 0) -> list[Task]:
    """n of the test set of each, of these sizes in equal parts; the same for the same arguments."""
    found: list[Task] = []
    for name in names if n else ():
        for i, size in enumerate(sizes):
            count = n * (i + 1) // len(sizes) - n * i // len(sizes)
            more = {"larger": True} if size == LARGER_SIZE else {"size": size}
            found += map(of_problem, FAMILIES[name].test_set(count, seed=seed, **more))
    return found


def questions(path: str | Path, reward: Reward, seed: int = 0) -> Tasks:
    """Every line once, in a new order in every epoch."""
    found = all_of(path, reward)

    def task(number: int) -> Task:
        epoch, at = divmod(number, len(found))
        return found[random.Random(f"{seed} {epoch}").sample(range(len(found)), len(found))[at]]

    return task


def all_of(path: str | Path, reward: Reward) -> list[Task]:
    """The lines in their order.  FormatError names the first that is no problem."""
    try:
        lines = Path(path).read_text().splitlines()
    except (OSError, UnicodeDecodeError) as error:
        raise FormatError(f"{path} cannot be read: {error}") from None
    found = []
    for number, line in enumerate(lines, 1):
        if not line.strip():
            continue
        try:
            example = json.loads(line)
        except ValueError as error:
            raise FormatError(f"{path}:{number}: not JSON: {error}") from None
        if not isinstance(example, dict) or not isinstance(example.get("question"), str) or "answer" not in example:
            raise FormatError(f'{path}:{number}: a problem is {{"question": …, "answer": …}}, not {line[:60]!r}')
        found.append(_question(example, reward))
    if not found:
        raise FormatError(f"{path} holds no problems")
    return found


def _question(example: dict[str, Any], reward: Reward) -> Task:
    return Task(example["question"], lambda answer: float(reward(answer, example["answer"])))


def gym(name: str, seed: int = 0, size: int = 100_000) -> Tasks:
    try:
        import reasoning_gym
    except ImportError:
        raise RequestError("reasoning-gym is not installed: pip install reasoning-gym") from None
    try:
        entries = reasoning_gym.create_dataset(name, seed=seed, size=size)
    except ValueError as error:
        raise RequestError(f"reasoning-gym: {error}") from None

    def task(number: int) -> Task:
        entry = entries[number % size]
        return Task(entry["question"], lambda answer: float(entries.score_answer(answer, entry)))

    return task


# ── rewards ──────────────────────────────────────────────────────────────────────────────────────────────


def exact(answer: str, wanted: Any) -> float:
    """The same text but for case, spaces and a final full stop."""

    def plain(text: str) -> str:
        return " ".join(text.casefold().split()).rstrip(".")

    return float(plain(answer) == plain(str(wanted)))


def math(answer: str, wanted: Any) -> float:
    """The same number or expression, as math-verify understands both."""
    try:
        from math_verify import parse, verify
    except ImportError:
        raise RequestError("this reward needs math-verify: pip install math-verify") from None
    # no timeouts of its own: they need signals, which only a main thread gets
    return float(verify(parse(str(wanted), parsing_timeout=None), parse(answer, parsing_timeout=None),
                        timeout_seconds=None))  # fmt: skip


def named(name: str) -> Reward:
    """exact, math, or module:function for one of the caller's own."""
    if name in ("exact", "math"):
        return exact if name == "exact" else math
    module, _, function = name.partition(":")
    try:
        found: Reward = getattr(importlib.import_module(module), function)
    except (ImportError, AttributeError, ValueError) as error:
        raise RequestError(f"no reward {name!r}: choose exact, math or module:function ({error})") from None
    return found
