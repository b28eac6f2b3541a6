"""Linear equations, expressions, remainders, common divisors, sequences: our own generators."""

from __future__ import annotations

import random
from itertools import pairwise

from tiercel.problems.problem import LARGER_SIZE, Family, Problem
from tiercel.problems.written import divide, multiply, work_out


def algebra(rng: random.Random, size: int) -> Problem:
    """k x + b = c, also as b + k x, k x − b, and x / k; whole solutions."""
    name = rng.choice("xxxynabzktm")
    top_k, top_x, top_b = {1: (1, 20, 20), 2: (9, 12, 40), 3: (9, 30, 60), LARGER_SIZE: (30, 60, 500)}[size]
    k, x, b = rng.randint(2, max(2, top_k)) if size > 1 else 1, rng.randint(1, top_x), rng.randint(1, top_b)
    if size == LARGER_SIZE:
        k, x, b = rng.randint(10, top_k), rng.randint(31, top_x), rng.randint(61, top_b)
    minus = rng.random() < 0.4
    if minus and k * x <= b:
        b = rng.randint(1, max(1, k * x - 1))
    term = name if k == 1 else rng.choice((f"{k}{name}", f"{k}*{name}", f"{k} * {name}", f"{k}{name}"))
    c = k * x - b if minus else k * x + b
    side = f"{term} - {b}" if minus else rng.choice((f"{term} + {b}", f"{term} + {b}", f"{b} + {term}"))
    equation = f"{side} = {c}" if rng.random() < 0.85 else f"{c} = {side}"
    if rng.random() < 0.2:
        equation = equation.replace(" ", "")
    question = rng.choice((
        "Solve {e}.", "Solve for {v}: {e}", "What is {v} if {e}?", "Find {v}: {e}", "{e}, what is {v}?",
        "If {e}, find {v}.",
        "solve {e}", "Solve the equation {e} for {v}.",
    )).format(e=equation, v=name)  # fmt: skip
    short = name if k == 1 else f"{k}{name}"
    lines, right = work_out(c, "+" if minus else "-", b)
    lines = [f"{short}={c}{'+' if minus else '-'}{b}", *lines]
    if k > 1:
        more, _ = work_out(right, "/", k)
        lines += [f"{name}={right}/{k}", *more]
    return Problem("algebra", question, "\n".join(lines), f"{name} = {x}", f"{k} {minus} {b} {c}", size)


def same_value(answer: str, problem: Problem) -> bool:
    """`x = 7` and `7` are one answer."""
    return answer.split("=")[-1].strip().rstrip(".") == problem.answer.split("=")[-1].strip()


def expressions(rng: random.Random, size: int) -> Problem:
    """Precedence and brackets; one operation is done a line."""
    many = {1: 2, 2: 2, 3: 3, LARGER_SIZE: 5}[size]
    while True:
        items = _expression(rng, many, brackets=size > 1 and rng.random() < 0.6)
        lines = _reduced(items)
        if lines is not None:
            break
    shown = " ".join(items).replace("( ", "(").replace(" )", ")")
    if rng.random() < 0.25:
        shown = shown.replace(" ", "")
    question = rng.choice((
        "What is {e}?", "{e}", "Evaluate {e}.", "Compute {e}.", "Calculate {e}.", "{e} = ?",
        "What is the value of {e}?",
    )).format(e=shown)  # fmt: skip
    return Problem("expressions", question, "\n".join(lines), lines[-1], "".join(items), size)


def _expression(rng: random.Random, many: int, brackets: bool) -> list[str]:
    items = [str(rng.randint(1, 12))]
    for _ in range(many):
        items += [rng.choice("++--**"), str(rng.randint(1, 12))]
    if brackets:
        start = 2 * rng.randrange(many)
        items[start : start + 3] = ["(", *items[start : start + 3], ")"]
    return items


def _reduced(items: list[str]) -> list[str] | None:
    """The expression after each operation, down to a number; None where a value gets awkward (below 0, above 300).

    A line is `3+4*5: 4*5=20`, and the next begins with what is left.  Products beyond the table are written out.
    """
    items, lines = list(items), []
    while len(items) > 1:
        inside = range(items.index("(") + 1, items.index(")")) if "(" in items else range(len(items))
        signs = [i for i in inside if items[i] in "+-*"]
        at = next((i for i in signs if items[i] == "*"), signs[0])
        a, sign, b = int(items[at - 1]), items[at], int(items[at + 1])
        value = {"+": a + b, "-": a - b, "*": a * b}[sign]
        if not 0 <= value <= 300:
            return None
        lines.append(f"{''.join(items)}: {a}{sign}{b}={value}")
        if sign == "*" and max(a, b) > 12:
            lines[-1] = f"{''.join(items)}:"
            lines += multiply(a, b)[0]
        items[at - 1 : at + 2] = [str(value)]
        if "(" in items and items.index(")") - items.index("(") == 2:
            del items[items.index(")")], items[items.index("(")]
    return [*lines, items[0]]


def modulo(rng: random.Random, size: int) -> Problem:
    b = rng.randint(2, 12) if size != LARGER_SIZE else rng.randint(13, 30)
    a = rng.randint(*{1: (1, 50), 2: (10, 99), 3: (100, 999), LARGER_SIZE: (1000, 9999)}[size])
    question = rng.choice((
        "What is {a} mod {b}?", "{a} mod {b}", "What is {a} modulo {b}?",
        "What is the remainder of {a} divided by {b}?",
        "{a} % {b}", "Compute {a} mod {b}.", "Find the remainder when {a} is divided by {b}.",
    )).format(a=a, b=b)  # fmt: skip
    lines, _, left = divide(a, b)
    return Problem("modulo", question, "\n".join(lines), str(left), f"{a} {b}", size)


def gcd(rng: random.Random, size: int) -> Problem:
    low, high = {1: (1, 20), 2: (1, 60), 3: (1, 99), LARGER_SIZE: (100, 400)}[size]
    common = rng.randint(1, max(2, high // 5)) if rng.random() < 0.6 else 1
    a, b = (rng.randint(-(-low // common), max(1, high // common)) * common for _ in range(2))
    question = rng.choice((
        "What is the gcd of {a} and {b}?", "gcd({a}, {b})", "Find the greatest common divisor of {a} and {b}.",
        "What is the greatest common divisor of {a} and {b}?", "Compute gcd({a}, {b}).",
        "Find the Greatest Common Divisor (GCD) of these numbers: {a}, {b}.",
    )).format(a=a, b=b)  # fmt: skip
    x, y, lines = max(a, b), min(a, b), []
    lines.append(f"{x},{y}")
    while y:
        lines.append(f"{x // y}*{y}={x // y * y},{x}-{x // y * y}={x % y}")
        x, y = y, x % y
    return Problem("gcd", question, "\n".join(lines), str(x), f"{min(a, b)} {max(a, b)}", size)


def sequences(rng: random.Random, size: int) -> Problem:
    """The next number: a constant difference, a constant factor, or differences that grow by a constant."""
    step = rng.randint(*{1: (1, 9), 2: (1, 12), 3: (1, 20), LARGER_SIZE: (21, 60)}[size])
    start = rng.randint(*{1: (0, 20), 2: (0, 40), 3: (0, 60), LARGER_SIZE: (100, 400)}[size])
    kind = rng.choice(("same", "down", "times", "grows") if size > 1 else ("same", "same", "down"))
    if kind == "same":
        items = [start + i * step for i in range(5)]
    elif kind == "down":
        items = [start + (4 - i) * step for i in range(5)]
    elif kind == "times":
        factor = rng.randint(2, 3) if size < LARGER_SIZE else 4
        items = [rng.randint(1, 6) if size < LARGER_SIZE else rng.randint(7, 20)]
        while len(items) < 5:
            items.append(items[-1] * factor)
    else:
        more, items, now = rng.randint(1, 5), [start], min(step, 12)
        while len(items) < 5:
            items.append(items[-1] + now)
            now += more
    shown, answer = items[:4], items[4]
    question = rng.choice((
        "What comes next: {n}?", "What is the next number: {n}, ...", "{n}, ?", "Continue the sequence: {n}",
        "Find the next number in the sequence {n}.", "What is the next number in {n}?",
    )).format(n=", ".join(map(str, shown)))  # fmt: skip
    if kind == "times":
        lines = [f"{b}/{a}={b // a}" for a, b in pairwise(shown)]
        work = work_out(shown[-1], "*", shown[1] // shown[0])[0]
        lines += [f"*{shown[1] // shown[0]}", *work]
    else:
        steps = [b - a for a, b in pairwise(shown)]
        lines = [f"{max(a, b)}-{min(a, b)}={abs(b - a)}" for a, b in pairwise(shown)]
        last = abs(answer - shown[-1])
        lines.append(f"{abs(steps[0])},{abs(steps[1])},{abs(steps[2])},{last}")
        lines += work_out(shown[-1], "+" if answer >= shown[-1] else "-", last)[0]
    return Problem("sequences", question, "\n".join(lines), str(answer), f"{shown}", size)


FAMILIES = (
    Family("algebra", algebra, ("x ± b = c", "k x ± b = c, x to 12", "x to 30, b to 60", "k to 30, x to 60"), 1.0,
           same_value),
    Family("expressions", expressions, ("2 signs", "2 signs, brackets", "3 signs, brackets", "5 signs"), 1.0),
    Family("modulo", modulo, ("to 50", "2 digits", "3 digits", "4 digits by 13–30"), 0.6),
    Family("gcd", gcd, ("to 20", "to 60", "to 99", "to 400"), 0.8),
    Family("sequences", sequences, ("constant steps", "to 40", "to 60", "to 400"), 0.8),
)  # fmt: skip
