"""Countdown: reach a target with three numbers, each used once.  Our own generator and search.

The reasoning searches backwards: with one number set aside, what would the other two have to make, and do they?

    6:3+7=10,7-3=4,3*7=21;27+6=33,27-6=21 yes      of 6, 3, 7 to make 27: what the others make; what is needed
    3*7                                            and the answer is (3*7)+6
"""

from __future__ import annotations

import ast
import random
from fractions import Fraction
from itertools import permutations

from tiercel.problems.problem import LARGER_SIZE, Family, Problem

ASK = (
    "Make {t} from {n}.", "Use {n} to make {t}.", "Reach {t} with the numbers {n}.",
    "Calculate {t} using all of these numbers: {n}. Each number may be used at most once.",
    "Using the numbers {n}, each once, make {t}.", "Countdown: {n}, target {t}", "How can {n} make {t}?",
    "Find an expression with {n} that equals {t}.",
)  # fmt: skip


def countdown(rng: random.Random, size: int) -> Problem:
    low, high = {1: (1, 6), 2: (1, 9), 3: (2, 12), LARGER_SIZE: (13, 20)}[size]
    while True:
        chosen = [rng.randint(low, high) for _ in range(3)]
        target = _target(rng, chosen)
        if target is not None and 0 < target <= (150 if size != LARGER_SIZE else 500):
            break
    listed = rng.choice((", ", ", ", " ")).join(map(str, chosen))
    if rng.random() < 0.3:
        listed = f"{chosen[0]}, {chosen[1]} and {chosen[2]}"
    question = rng.choice(ASK).format(n=listed, t=target)
    thinking, answer = search(chosen, target)
    key = f"{sorted(chosen)} {target}"
    return Problem("countdown", question, thinking, answer, key, size, {"numbers": chosen, "target": target})


def _target(rng: random.Random, chosen: list[int]) -> int | None:
    """What some expression of the three gives, where that is whole."""
    a, b, c = rng.choice(list(permutations(chosen)))
    inner = rng.choice(_pairs(a, b))[1]
    outer = rng.choice(_pairs(inner, c))[1]
    return outer


def _pairs(a: int, b: int) -> list[tuple[str, int]]:
    """What two numbers make: their sum, difference, product and, where it is whole, quotient."""
    high, low = max(a, b), min(a, b)
    made = [(f"{a}+{b}", a + b), (f"{high}-{low}", high - low), (f"{a}*{b}", a * b)]
    if low > 0 and high % low == 0:
        made.append((f"{high}/{low}", high // low))
    return made


def _needs(target: int, c: int) -> list[tuple[str, int, str]]:
    """(what is written, what the other two must make, the answer with {} for their expression)."""
    needs = [(f"{target}+{c}", target + c, f"{{}}-{c}")]
    if target >= c:
        needs.append((f"{target}-{c}", target - c, f"{{}}+{c}"))
    if c > target:
        needs.append((f"{c}-{target}", c - target, f"{c}-{{}}"))
    if target % c == 0:
        needs.append((f"{target}/{c}", target // c, f"{{}}*{c}"))
    needs.append((f"{target}*{c}", target * c, f"{{}}/{c}"))
    if c % target == 0:
        needs.append((f"{c}/{target}", c // target, f"{c}/{{}}"))
    return needs


def search(chosen: list[int], target: int) -> tuple[str, str]:
    """Return (reasoning, answer) of the search in its fixed order; there must be a solution."""
    lines = []
    for i, c in enumerate(chosen):
        a, b = (n for j, n in enumerate(chosen) if j != i)
        made = _pairs(a, b)
        line = f"{c}:" + ",".join(f"{text}={value}" for text, value in made) + ";"
        tried = []
        for text, need, shape in _needs(target, c):
            tried.append(f"{text}={need}")
            for inner, value in made:
                if value == need:
                    answer = shape.format(f"({inner})")
                    lines.append(line + ",".join(tried) + " yes")
                    return "\n".join([*lines, inner]), answer
        lines.append(line + ",".join(tried) + " no")
    raise AssertionError(f"{chosen} cannot make {target}")


def reaches(answer: str, problem: Problem) -> bool:
    """Whether the expression uses each number once and gives the target: any solution counts."""
    text = answer.strip().rstrip(".").split("=")[0].replace("×", "*").replace("÷", "/")
    try:
        used: list[int] = []
        value = _value(ast.parse(text[:200], mode="eval").body, used)
    except (SyntaxError, ValueError, ZeroDivisionError, RecursionError):
        return False
    return value == problem.data["target"] and sorted(used) == sorted(problem.data["numbers"])


def _value(node: ast.expr, used: list[int]) -> Fraction:
    if isinstance(node, ast.Constant) and type(node.value) is int:
        used.append(node.value)
        return Fraction(node.value)
    if isinstance(node, ast.BinOp):
        a, b = _value(node.left, used), _value(node.right, used)
        match node.op:
            case ast.Add():
                return a + b
            case ast.Sub():
                return a - b
            case ast.Mult():
                return a * b
            case ast.Div():
                return a / b
    raise ValueError("only numbers and + - * /")


FAMILIES = (
    Family("countdown", countdown, ("3 of 1–6", "3 of 1–9", "3 of 2–12", "3 of 13–20"), 1.5, reaches),
)  # fmt: skip
