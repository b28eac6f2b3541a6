"""Sorting, counting, comparing, turning around: our own generators."""

from __future__ import annotations

import random

from tiercel.problems.problem import LARGER_SIZE, Family, Problem, numbers
from tiercel.problems.words import THINGS

WORDS = (
    "strawberry banana letter hello window garden summer winter river mountain falcon pepper coffee butter yellow "
    "orange purple silver kitchen mirror bottle pillow school teacher doctor engine station ticket computer keyboard "
    "mouse screen paper pencil ladder hammer rabbit turtle elephant giraffe monkey lion tiger parrot sparrow eagle "
    "cherry apple mango lemon tomato potato carrot onion garlic cinnamon sugar pepper honey bread cheese chicken "
    "soldier captain island desert forest meadow valley ocean harbor bridge castle tower palace temple market street "
    "bicycle balloon umbrella mississippi committee address success happiness parallel necessary beginning different"
).split()


def _letters(rng: random.Random, low: int, high: int) -> str:
    """A word: a real one, two halves of real ones, or letters that few words have in that order."""
    kind = rng.random()
    if kind < 0.7:
        real = kind < 0.3
        for _ in range(20):
            a, b = rng.choice(WORDS), rng.choice(WORDS)
            word = a if real else a[: rng.randint(2, len(a))] + b[rng.randint(0, len(b) - 2) :]
            if low <= len(word) <= high:
                return word
    some = rng.sample("abcdefghijklmnopqrstuvwxyz", rng.randint(3, 8))
    return "".join(rng.choice(some) for _ in range(rng.randint(low, high)))


def _number_list(rng: random.Random, size: int) -> list[int]:
    low, high, top = {1: (3, 4, 30), 2: (4, 5, 99), 3: (5, 6, 99), LARGER_SIZE: (7, 8, 99)}[size]
    return [rng.randint(0, top) for _ in range(rng.randint(low, high))]


def sorting(rng: random.Random, size: int) -> Problem:
    items = _number_list(rng, size)
    down = rng.random() < 0.35
    listed = rng.choice((", ", ", ", " ", ",")).join(map(str, items))
    ask = (("Sort {n} in descending order.", "Sort these numbers from largest to smallest: {n}",
            "Sort these numbers in descending order: {n}", "Put {n} in order, largest first.") if down else
           ("Sort {n}.", "Sort these numbers: {n}", "Sort {n} in ascending order.",
            "Order from smallest to largest: {n}",
            "Sort these numbers in ascending order: {n}", "Put {n} in order.", "sort {n}"))  # fmt: skip
    question = rng.choice(ask).format(n=listed)
    left, lines = list(items), []
    while len(left) > 1:
        best = max(left) if down else min(left)
        left.remove(best)
        lines.append(f"{best}|{','.join(map(str, left))}")
    ordered = sorted(items, reverse=down)
    key = f"{'down' if down else 'up'} {sorted(items)}"
    return Problem("sorting", question, "\n".join(lines), ", ".join(map(str, ordered)), key, size)


def same_list(answer: str, problem: Problem) -> bool:
    return numbers(answer) == numbers(problem.answer)


def counting(rng: random.Random, size: int) -> Problem:
    return rng.choice((_count_letter, _count_letter, _count_item, _count_above))(rng, size)


def _count_letter(rng: random.Random, size: int) -> Problem:
    low, high = {1: (3, 6), 2: (5, 9), 3: (8, 12), LARGER_SIZE: (14, 18)}[size]
    word = _letters(rng, low, high)
    letter = rng.choice(word) if rng.random() < 0.9 else rng.choice("abcdefghijklmnopqrstuvwxyz")
    question = rng.choice((
        "How many {x}'s are in {w}?", "How many times does the letter {x} appear in {w}?", "Count the {x}s in {w}.",
        'How many times does the letter "{x}" appear in the text: "{w}"?', 'How many "{x}" are in "{w}"?',
        "How many letters {x} does {w} have?", "How many {x}'s in {w}?",
    )).format(x=letter, w=word)  # fmt: skip
    count, marks = 0, []
    for character in word:
        count += character == letter
        marks.append(f"{character}{count}")
    return Problem("counting", question, f"{letter}:{','.join(marks)}", str(count), f"letter {letter} {word}", size)


def _count_item(rng: random.Random, size: int) -> Problem:
    many = {1: (3, 5), 2: (5, 8), 3: (8, 10), LARGER_SIZE: (13, 16)}[size]
    kinds = rng.sample(THINGS[:24], rng.randint(2, 3))
    items = [rng.choice(kinds) for _ in range(rng.randint(*many))]
    wanted = rng.choice(kinds)
    question = rng.choice((
        "How often is {w} in this list: {n}?", "Count {w} in the list: {n}.", "How many times is {w} in: {n}?",
    )).format(w=wanted, n=", ".join(items))  # fmt: skip
    count, marks = 0, []
    for item in items:
        count += item == wanted
        marks.append(f"{item} {count}")
    key = "items " + "".join(str(kinds.index(item)) for item in items) + f" {kinds.index(wanted)} {'+'.join(kinds)}"
    return Problem("counting", question, f"{wanted}: {', '.join(marks)}", str(count), key, size)


def _count_above(rng: random.Random, size: int) -> Problem:
    many = {1: (3, 4), 2: (4, 6), 3: (6, 8), LARGER_SIZE: (10, 12)}[size]
    items = [rng.randint(0, 99) for _ in range(rng.randint(*many))]
    limit, below = rng.randint(5, 95), rng.random() < 0.4
    word = rng.choice(("below", "less than", "smaller than") if below else ("above", "greater than", "larger than"))
    question = rng.choice((
        "How many of {n} are {w} {x}?", "How many numbers are {w} {x}: {n}?", "Count the numbers {w} {x} in {n}.",
    )).format(n=", ".join(map(str, items)), w=word, x=limit)  # fmt: skip
    count, marks = 0, []
    for item in items:
        sign = "<" if item < limit else ">" if item > limit else "="
        count += sign == ("<" if below else ">")
        marks.append(f"{item}{sign}{limit} {count}")
    thinking = f"{'<' if below else '>'}{limit}: {', '.join(marks)}"
    return Problem("counting", question, thinking, str(count), f"above {below} {limit} {items}", size)


def comparison(rng: random.Random, size: int) -> Problem:
    """The larger of two, or the largest of several: a running best."""
    longest = {1: 2, 2: 3, 3: 4, LARGER_SIZE: 6}[size]
    many = 2 if rng.random() < 0.4 else rng.randint(3, 4) + (size == LARGER_SIZE)
    first = rng.randrange(10 ** (longest - 1), 10**longest)
    items = [first]
    while len(items) < many:
        near = rng.random() < 0.5
        n = (
            abs(first + rng.choice((-1, 1)) * rng.randint(1, 10 ** (longest - 1)))
            if near
            else rng.randrange(10**longest)
        )
        if n not in items:
            items.append(n)
    rng.shuffle(items)
    smallest = rng.random() < 0.4
    if many == 2:
        ask = (("Which is smaller, {n}?", "Which number is less: {n}?", "What is the smaller of {n}?") if smallest else
               ("Which is larger, {n}?", "Which is bigger: {n}?", "Which number is greater, {n}?",
                "What is the larger of {n}?"))  # fmt: skip
        listed = rng.choice(("{} or {}", "{} or {}", "{}, {}", "{} and {}")).format(*items)
    else:
        ask = (
            ("What is the smallest of {n}?", "Find the minimum of {n}.", "Which is the smallest: {n}?")
            if smallest
            else ("What is the largest of {n}?", "Find the maximum of {n}.", "Which is the largest: {n}?")
        )
        listed = ", ".join(map(str, items))
    best = items[0]
    lines: list[str] = []
    for item in items[1:]:
        sign = ">" if best > item else "<"
        best = min(best, item) if smallest else max(best, item)
        lines.append(f"{lines[-1].split('|')[1] if lines else items[0]}{sign}{item}|{best}")
    key = f"{'min' if smallest else 'max'} {sorted(items)}"
    return Problem("comparison", rng.choice(ask).format(n=listed), "\n".join(lines), str(best), key, size)


def reversing(rng: random.Random, size: int) -> Problem:
    low, high = {1: (3, 5), 2: (5, 7), 3: (7, 9), LARGER_SIZE: (11, 13)}[size]
    word = _letters(rng, low, high) if rng.random() < 0.8 else str(rng.randrange(10 ** (low - 1), 10**high))
    question = rng.choice((
        "Reverse {w}.", "Write {w} backwards.", "What is {w} spelled backwards?", 'Reverse the word "{w}".',
        "Spell {w} backwards.", "reverse {w}",
    )).format(w=word)  # fmt: skip
    lines = [",".join(word), ",".join(reversed(word))]
    return Problem("reversing", question, "\n".join(lines), word[::-1], word, size)


FAMILIES = (
    Family("sorting", sorting, ("3–4 numbers to 30", "4–5 to 99", "5–6 to 99", "7–8 to 99"), 0.8, same_list),
    Family("counting", counting, ("3–6 things", "4–9 things", "6–12 things", "10–18 things"), 1.0),
    Family("comparison", comparison, ("2 digits", "3 digits", "4 digits", "6 digits"), 0.5),
    Family("reversing", reversing, ("3–5 letters", "5–7 letters", "7–9 letters", "11–13 letters"), 0.5),
)  # fmt: skip
