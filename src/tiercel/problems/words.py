"""Word problems of one, two and three steps: our own templates, in the manner of GSM8K.

Two kinds: stories of one quantity to which things happen one after another, and set pieces (prices, trips, boxes,
ages, areas).  The canonical form is the arithmetic and the kind; who buys what does not make a new problem.
"""

from __future__ import annotations

import random
from typing import Any

from tiercel.problems.problem import LARGER_SIZE, Family, Problem
from tiercel.problems.written import work_out

SHE = (
    "Ann Maria Lena Sofia Emma Olivia Fatima Aisha Mei Nora Zoe Lucy Clara Ida Rosa Priya Jane Kate Layla Sara".split()
)
HE = "Tom Ben Omar Ali Jack Liam Noah Hassan Ravi Leo Max Paul Peter Sam Carl Yusuf Juan Ivan John Khalid".split()
THINGS = (
    "apples oranges pears plums lemons books pens pencils marbles stickers cards coins stamps shells stones cookies "
    "cakes sweets eggs buttons beads balloons flowers roses toys cars dolls balls tickets bottles cups plates keys "
    "notebooks crayons peaches carrots tomatoes potatoes nuts candles photos"
).split()
BOXES = "boxes bags baskets shelves rows jars trays packs crates drawers".split()
ONE = {"boxes": "box", "shelves": "shelf"}
PLACES = "shop school library farm park office station bakery market hotel".split()

Step = tuple[
    str, str, str
]  # left, sign, right: letters of drawn numbers, or r for the last result, q for the one before


# text; what is drawn: n number, m small multiplier, p price; `b<a` below a, `t=k*m` computed; steps
PIECES: tuple[tuple[int, str, str, str], ...] = (
    (1, "{N} has {a} {o}. {M} has {b} {o}. How many {o} do they have together?", "a=n b=n", "a+b"),
    (1, "{N} has {a} {o} and {M} has {b}. How many more {o} does {N} have than {M}?", "a=n b<a", "a-b"),
    (1, "There are {k} {o} in each {c}. How many {o} are in {b} {C}?", "k=m b=n", "b*k"),
    (1, "{N} puts {t} {o} into {k} {C}, the same number in each. How many {o} are in each {c}?", "k=m b=n t=b*k",
     "t/k"),
    (1, "{t} {o} are shared equally by {k} children. How many does each child get?", "k=m b=n t=b*k", "t/k"),
    (1, "One ticket costs {k} dollars. How much do {b} tickets cost?", "k=m b=n", "b*k"),
    (1, "A train has {a} passengers. At the {l}, {b} get off. How many stay on the train?", "a=n b<a", "a-b"),
    (1, "{N} is {a} years old. {M} is {b} years older. How old is {M}?", "a=n b=n", "a+b"),
    (1, "{N} is {a} years old and {M} is {b}. How many years older is {N}?", "a=n b<a", "a-b"),
    (1, "A car drives {b} miles in one hour. How far does it drive in {k} hours?", "k=m b=n", "b*k"),
    (1, "{N} reads {k} pages a day. How many days does {he} need for {t} pages?", "k=m b=n t=b*k", "t/k"),
    (1, "A rectangle is {b} cm long and {k} cm wide. What is its area?", "k=m b=n", "b*k"),
    (1, "A rope of {a} meters is cut. One piece is {b} meters long. How long is the other?", "a=n b<a", "a-b"),
    (1, "{N} earns {k} dollars an hour. How much does {he} earn in {b} hours?", "k=m b=n", "b*k"),
    (1, "A {l} sold {a} {o} on Monday and {b} on Tuesday. How many {o} is that in all?", "a=n b=n", "a+b"),
    (2, "{N} has {k} {C} with {b} {o} each and {a} more {o}. How many {o} does {he} have?", "k=m b=n a=n", "b*k r+a"),
    (2, "{N} buys {b} {o} for {k} dollars each and pays with {t} dollars. How much change does {he} get?",
     "k=m b=n t>b*k", "b*k t-r"),
    (2, "A {l} sold {a} {o} in the morning and {b} in the afternoon. It had {t}. How many {o} are left?",
     "a=n b=n t>a+b", "a+b t-r"),
    (2, "{N} has {a} {o}. {M} has {k} times as many. How many {o} do they have together?", "a=n k=m", "a*k a+r"),
    (2, "{N} has {a} {o}. {M} has {b} more than {N}. How many {o} do they have together?", "a=n b=n", "a+b a+r"),
    (2, "{N} has {a} {o}. {M} has {b} fewer than {N}. How many {o} do they have in total?", "a=n b<a", "a-b a+r"),
    (2, "A rectangle is {a} cm long and {b} cm wide. What is its perimeter?", "a=n b=n", "a+b r*2"),
    (2, "{N} has {a} {o} and {M} has {b}. They share all of them equally among {k} friends. How many does each friend "
     "get?", "k=m a=n b=fill", "a+b r/k"),
    (2, "A class has {a} girls and {b} boys. Each needs {k} {o}. How many {o} are needed?", "a=n b=n k=m", "a+b r*k"),
    (2, "{N} saves {k} dollars a week. {He} has {a} dollars already. How much does {he} have after {b} weeks?",
     "k=m b=n a=n", "b*k r+a"),
    (2, "{N} wants a bike for {t} dollars and has {a}. {He} saves {k} dollars a week. How many weeks does {he} need?",
     "k=m a=n b=n t=a+b*k", "t-a r/k"),
    (2, "A baker made {t} {o}. {He} kept {a} and put the rest into {C} of {k}. How many {C} did {he} fill?",
     "k=m a=n b=n t=a+b*k", "t-a r/k"),
    (3, "{N} buys {a} {o} for {k} dollars each and {b} {O} for {m} dollars each. How much does {he} pay?",
     "a=n k=m b=n m=m", "a*k b*m q+r"),
    (3, "{N} buys {a} {o} for {k} dollars each and a bag for {b} dollars. {He} pays with {t} dollars. What is the "
     "change?", "a=n k=m b=n t>a*k+b", "a*k r+b t-r"),
    (3, "{N} has {a} {o}. {M} has {k} times as many, and {P} has {b} more than {M}. How many does {P} have more than "
     "{N}?", "a=n k=m b=n", "a*k r+b r-a"),
    (3, "{N} works {b} hours for {k} dollars an hour and spends {a}. Then {he} gets {c1} as a gift. How much does {he} "
     "have?", "b=n k=m a<b*k c1=n", "b*k r-a r+c1"),
    (3, "There are {k} {C} with {a} {o} and {m} {C} with {b} {o}. How many {o} are there in all?",
     "k=m a=n m=m b=n", "a*k b*m q+r"),
    (3, "{N} has {a} {o}, {M} has {b} more than {N}, and {P} has {k} times as many as {M}. How many {o} does {P} have "
     "more than {M}?", "a=n b=n k=m", "a+b r*k r-q"),
)  # fmt: skip


def word_problem(rng: random.Random, size: int) -> Problem:
    steps = min(size, 3) if size != LARGER_SIZE else rng.randint(2, 3)
    low, high = {1: (2, 30), 2: (2, 60), 3: (2, 60), LARGER_SIZE: (100, 500)}[size]
    chosen = rng.choice([i for i, piece in enumerate(PIECES) if piece[0] == steps] + [-1] * 6)
    if chosen < 0:
        names, (text, worked, key) = _cast(rng), _story(rng, steps, low, high)
        question, kind = text.format(**names), "story"
    else:
        _, text, drawn, plan = PIECES[chosen]
        values = _draw(rng, drawn, low, high)
        question = text.format(**_cast(rng), **values)
        worked = _follow(plan.split(), values)
        key, kind = " ".join(f"{n}{v}" for n, v in sorted(values.items())), f"piece {chosen}"
    lines, result = _worked_out(worked)
    return Problem("word_problems", question, "\n".join(lines), str(result), f"{kind} {key}", size)


def _cast(rng: random.Random) -> dict[str, str]:
    """Names and objects for a text."""
    female = rng.random() < 0.5
    names = rng.sample(SHE if female else HE, 1) + rng.sample(HE if female else SHE, 2)
    o, O = rng.sample(THINGS, 2)
    C = rng.choice(BOXES)
    return {"N": names[0], "M": names[1], "P": names[2], "he": "she" if female else "he",
            "He": "She" if female else "He",
            "his": "her" if female else "his", "o": o, "O": O, "C": C, "c": ONE.get(C, C.rstrip("s")),
            "l": rng.choice(PLACES)}  # fmt: skip


def _draw(rng: random.Random, drawn: str, low: int, high: int) -> dict[str, int]:
    values: dict[str, int] = {}
    for word in drawn.split():
        if "=" in word:
            name, how = word.split("=")
            if how == "n":
                values[name] = rng.randint(low, high)
            elif how == "m":
                values[name] = rng.randint(2, 9)
            elif how == "fill":  # so that the sum with a is a multiple of k
                k = values["k"]
                values[name] = rng.randint(1, high // k + 1) * k + (-values["a"]) % k
            else:
                values[name] = _compute(how, values)
        elif "<" in word:
            name, above = word.split("<")
            values[name] = rng.randint(1, max(1, _compute(above, values) - 1))
        else:
            name, below = word.split(">")
            values[name] = _compute(below, values) + rng.randint(1, high)
    return values


def _compute(text: str, values: dict[str, int]) -> int:
    """`a+b*k`, products first."""
    total = 0
    for term in text.split("+"):
        product = 1
        for name in term.split("*"):
            product *= values[name]
        total += product
    return total


def _follow(plan: list[str], values: dict[str, int]) -> list[tuple[int, str, int]]:
    """The steps with their numbers."""
    results: list[int] = []
    worked = []
    for step in plan:
        sign = next(s for s in "+-*/" if s in step)
        pair = []
        for name in step.split(sign):
            if name.isdigit():
                pair.append(int(name))
            else:
                pair.append(results[-1] if name == "r" else results[-2] if name == "q" else values[name])
        worked.append((pair[0], sign, pair[1]))
        results.append(work_out(pair[0], sign, pair[1])[1])
    return worked


EVENTS: dict[str, tuple[str, ...]] = {
    "+": ("{He} buys {x} more.", "{He} finds {x} more.", "{M} adds {x} more.", "Then {he} gets {x} more.",
          "{He} wins {x}."),
    "-": ("{He} gives {x} to {M}.", "{He} loses {x}.", "Then {he} sells {x}.", "{He} gives away {x}.",
          "{x} of them break."),
    "*": ("Then {he} gets so many that {he} has {x} times as many.", "The number grows to {x} times as many."),
    "/": ("{He} shares them equally among {x} friends, and {he} is one of them.",
          "{He} splits them into {x} equal parts and keeps one."),
}  # fmt: skip
OPENINGS = ("{N} has {x} {o}.", "{N} starts with {x} {o}.", "At first {N} has {x} {o}.", "{N} collects {x} {o}.")
ENDINGS = ("How many {o} does {N} have now?", "How many {o} does {he} have in the end?", "How many {o} are there now?",
           "How many {o} does {N} have left?")  # fmt: skip


def _story(rng: random.Random, steps: int, low: int, high: int) -> tuple[str, list[tuple[int, str, int]], str]:
    now = rng.randint(low, high)
    text, worked, key = [rng.choice(OPENINGS).replace("{x}", str(now))], [], str(now)
    for _ in range(steps):
        signs = ["+", "+", "-", "-"] + (["*"] if now <= 60 else [])
        parts = [d for d in range(2, 10) if now % d == 0 and now > d]
        sign = rng.choice(signs + (["/"] if parts else []))
        if now < 3 and sign == "-":
            sign = "+"
        x = {"+": rng.randint(1, high), "-": rng.randint(1, max(1, min(high, now - 1))), "*": rng.randint(2, 6),
             "/": rng.choice(parts or [1])}[sign]  # fmt: skip
        event = rng.choice(EVENTS[sign]).replace("{x}", str(x))
        text.append(event)
        worked.append((now, sign, x))
        now = work_out(now, sign, x)[1]
        key += f"{sign}{x}"
    text.append(rng.choice(ENDINGS))
    return " ".join(text), worked, key


def _worked_out(worked: list[tuple[int, str, int]]) -> tuple[list[str], int]:
    """Every step as written arithmetic, under a line that says which."""
    lines: list[str] = []
    result: Any = None
    for a, sign, b in worked:
        more, result = work_out(a, sign, b)
        lines += more if more[0].startswith(f"{a}{sign}{b}") else [f"{a}{sign}{b}:", *more]
    return lines, result


FAMILIES = (
    Family("word_problems", word_problem, ("1 step, to 30", "2 steps, to 60", "3 steps, to 60", "2–3 steps, to 500"),
           2.6),
)  # fmt: skip
