"""Addition, subtraction, multiplication, division: our own generators, in the phrasings people use."""

from __future__ import annotations

import random

from tiercel.problems.problem import LARGER_SIZE, Family, Problem, numbers
from tiercel.problems.written import add, divide, multiply, subtract

ASK = (
    "What is {q}?", "{q}", "Compute {q}.", "{q} = ?", "{q}=", "Calculate {q}.", "what's {q}", "How much is {q}?",
    "What is {q}", "Work out {q}.", "Please compute {q}", "Can you tell me what {q} is?", "what is {q}?", "Solve {q}",
    "I need the result of {q}.", "Evaluate {q}.", "What does {q} equal?",
)  # fmt: skip


def phrase(rng: random.Random, a: int, sign: str, b: int, words: tuple[str, ...]) -> str:
    """A question for a sign b: one of the general ones most of the time, else one of the operation's own."""
    if rng.random() < 0.3:
        return rng.choice(words).format(a=a, b=b)
    shown = rng.choice({"*": ("*", "*", "*", "x", "×", "times"), "/": ("/", "/", "÷", ":", "divided by"),
                        "+": ("+", "+", "+", "plus"), "-": ("-", "-", "-", "minus")}[sign])  # fmt: skip
    space = "" if len(shown) == 1 and rng.random() < 0.3 else " "
    return rng.choice(ASK).format(q=f"{a}{space}{shown}{space}{b}")


def of_digits(rng: random.Random, n: int) -> int:
    return rng.randrange(10 ** (n - 1) if n > 1 else 0, 10**n)


def pair(rng: random.Random, size: int) -> tuple[int, int]:
    """Two operands, the longer of `size` digits (four or five when larger)."""
    longest = rng.choice((4, 5)) if size == LARGER_SIZE else size
    a = of_digits(rng, longest)
    b = of_digits(rng, longest if rng.random() < 0.6 else rng.randint(1, longest))
    return (a, b) if rng.random() < 0.5 else (b, a)


def _key(a: int, b: int) -> str:
    return "" if max(a, b) < 10 else f"{a} {b}"


def addition(rng: random.Random, size: int) -> Problem:
    a, b = pair(rng, size)
    question = phrase(rng, a, "+", b, ("Add {a} and {b}.", "What is the sum of {a} and {b}?", "{a} and {b} together?",
                                       "Sum of {a} and {b}", "Add {b} to {a}."))  # fmt: skip
    if question.startswith("Add ") and " to " in question:
        a, b = b, a  # in the order they are read
    lines, result = add(a, b)
    return Problem("addition", question, "\n".join(lines), str(result), _key(*sorted((a, b))), size)


def subtraction(rng: random.Random, size: int) -> Problem:
    a, b = pair(rng, size)
    if a < b and rng.random() < 0.6:
        a, b = b, a
    question = phrase(rng, a, "-", b, ("Subtract {b} from {a}.", "What is the difference {a} - {b}?",
                                       "What is {a} less {b}?", "Take {b} away from {a}."))  # fmt: skip
    lines, result = subtract(a, b)
    return Problem("subtraction", question, "\n".join(lines), str(result), _key(a, b), size)


def multiplication(rng: random.Random, size: int) -> Problem:
    a = of_digits(rng, {1: 1, 2: 2, 3: 2, LARGER_SIZE: 3}[size])
    b = of_digits(rng, {1: 1, 2: 1, 3: 2, LARGER_SIZE: 2}[size])
    if rng.random() < 0.5:
        a, b = b, a
    question = phrase(rng, a, "*", b, ("Multiply {a} by {b}.", "What is the product of {a} and {b}?",
                                       "Product of {a} and {b}", "Multiply {a} and {b}.",
                                       "Solve the following multiplication: {a} * {b}."))  # fmt: skip
    lines, result = multiply(a, b)
    return Problem("multiplication", question, "\n".join(lines), str(result), _key(*sorted((a, b))), size)


def division(rng: random.Random, size: int) -> Problem:
    b = rng.randint(2, 12) if size != LARGER_SIZE else rng.randint(13, 30)
    a = of_digits(rng, {1: 2, 2: 2, 3: 3, LARGER_SIZE: 4}[size]) if size > 1 else rng.randint(b, 10 * b)
    if rng.random() < 0.4:
        a -= a % b
    question = phrase(rng, a, "/", b, ("Divide {a} by {b}.", "How many times does {b} go into {a}, and what is left?",
                                       "What is {a} divided by {b}, with remainder?",
                                       "Divide {a} by {b} with remainder."))  # fmt: skip
    if question.startswith("How many"):
        question = f"How often does {b} go into {a}, and what is left?"
    lines, quotient, left = divide(a, b)
    answer = f"{quotient} remainder {left}" if left else str(quotient)
    return Problem("division", question, "\n".join(lines), answer, f"{a} {b}", size)


def same_division(answer: str, problem: Problem) -> bool:
    """`89 remainder 1`, `89 r 1` and `89 R1` are one answer, `89` and `89 remainder 0` another."""
    found, wanted = numbers(answer), numbers(problem.answer)
    return found[:2] == wanted[:2] or (len(wanted) == 1 and found == [*wanted, 0])


FAMILIES = (
    Family("addition", addition, ("1 digit", "2 digits", "3 digits", "4 and 5 digits"), 1.0),
    Family("subtraction", subtraction, ("1 digit", "2 digits", "3 digits", "4 and 5 digits"), 1.2),
    Family("multiplication", multiplication, ("1×1 digits", "2×1 digits", "2×2 digits", "3×2 digits"), 1.8),
    Family("division", division, ("quotient to 10", "2 digits by 2–12", "3 digits by 2–12", "4 digits by 13–30"), 0.8,
           same_division),
)  # fmt: skip
