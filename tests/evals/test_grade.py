"""A page of hard answers, and what a fair grader makes of each."""

from __future__ import annotations

import pytest

from growth import ratio
from tiercel.evals import grade
from tiercel.evals.task import Item
from tiercel.runtime.subprocess import kill_after

# what the model wrote, the right answer, whether it counts
NUMBERS = [
    ("The answer is 1,234.", "1234", True),
    ("So she has $1,234.50 in all. \\boxed{1{,}234.5}", "1234.50", True),
    ("#### 18", "18", True),
    ("#### $18.00", "18", True),
    ("5 + 3 = 8 apples, minus 2, is 6 apples.\n#### 6 apples", "6", True),
    ("She pays 3 times 4 = 12. The answer is: **12** dollars, which leaves 8.", "12", True),
    ("\\boxed{72\\text{ km}}", "72", True),
    ("\\boxed{\\$20}", "20", True),
    ("\\boxed{\\text{Answer: }42}", "42", True),
    ("\\boxed{12} no wait, \\boxed{13}", "13", True),
    ("\\boxed{12} no wait, \\boxed{13}", "12", False),
    ("The answer is -5.", "-5", True),
    ("The answer is −5.", "-5", True),
    ("The answer is 5.", "-5", False),
    ("It takes 1/2 of it: \\boxed{\\frac{1}{2}}", "0.5", True),
    ("\\boxed{\\dfrac{-3}{4}}", "-3/4", True),
    ("\\boxed{.75}", "0.75", True),
    ("between 10 and 12", "12", True),  # the last number, for want of anything better
    ("I do not know.", "0", False),
    ("", "0", False),
    ("\\boxed{}", "0", False),
    ("\\boxed{12 or 13}", "12", False),
    ("The answer is 1,23.", "123", False),
    ("\\boxed{1234567890123456789012345678901}", "1234567890123456789012345678901", True),
    ("\\boxed{1234567890123456789012345678902}", "1234567890123456789012345678901", False),
]
INTEGERS = [
    ("025", "25", True), ("25", "025", True), ("25.0", "025", True), ("25.5", "25", False), ("\\text{25}", "25", True),
    ("25^\\circ", "25", True), ("2 5", "25", False), (None, "25", False), ("x=25", "25", False),
]  # fmt: skip
MATHS = [
    ("\\frac12", "\\frac{1}{2}", True),
    ("\\dfrac{1}{2}", "0.5", True),
    ("\\left( 3, \\frac{\\pi}{2} \\right)", "(3,\\pi/2)", True),
    ("(\\frac{\\pi}{2}, 3)", "(3, \\frac{\\pi}{2})", False),
    ("2\\sqrt{3}", "\\sqrt{12}", True),
    ("x^2+2x+1", "(x+1)^2", True),
    ("x^2+2x", "(x+1)^2", False),
    ("[1,2)", "[1,2)", True),
    ("(1,2)", "[1,2)", False),
    ("(-\\infty, 2] \\cup [5, \\infty)", "(-\\infty,2]\\cup[5,\\infty)", True),
    ("\\{1, 2, 3\\}", "\\{3, 2, 1\\}", True),
    ("10\\%", "10\\%", True),
    ("12\\text{ cm}", "12", True),
    ("11,111,111,100", "11111111100", True),
    ("\\begin{pmatrix} 1 & 2 \\\\ 3 & 4 \\end{pmatrix}", "\\begin{pmatrix}1&2\\\\3&4\\end{pmatrix}", True),
    ("\\begin{pmatrix} 1 & 2 \\\\ 4 & 3 \\end{pmatrix}", "\\begin{pmatrix}1&2\\\\3&4\\end{pmatrix}", False),
    ("\\text{Evelyn}", "\\text{Evelyn}", True),
    ("6 - 5i", "-5i+6", True),
    ("", "1", False),
    (None, "1", False),
]  # fmt: skip
LETTERS = [
    ("The answer is C.", "C"), ("C", "C"), ("**B.** because", "B"), ("(D)", "D"), ("\\boxed{A}", "A"),
    ("\\boxed{\\text{(b)}}", "B"), ("A is tempting, but the answer is B", "B"), ("I think it is none", None),
    ("Answer: D) Paris", "D"), ("", None), ("\\boxed{E}", None), ("A good question. The correct one is B", "B"),
]  # fmt: skip


@pytest.mark.parametrize("text, gold, counts", NUMBERS)
def test_numbers(text, gold, counts):
    assert grade.same_number(grade.stated_number(text), gold) is counts


@pytest.mark.parametrize("answer, gold, counts", INTEGERS)
def test_integers(answer, gold, counts):
    assert grade.same_integer(answer, gold) is counts


@pytest.mark.parametrize("text, letter", LETTERS)
def test_letters(text, letter):
    assert grade.letter(text, 4) == letter


def test_mathematics():
    pytest.importorskip("math_verify", reason="pip install tiercel[eval]")
    wrong = [(a, g) for a, g, counts in MATHS if grade.same_math(a, g) is not counts]
    assert not wrong


def test_an_answer_only_inside_the_thinking_does_not_count():
    from tiercel.evals.aime24 import AIME24

    item = Item("x", "?", "204")
    for text, counts in [
        ("<think>so \\boxed{204}</think>I am not sure.", False),
        ("<think>so \\boxed{204}", False),
        ("so \\boxed{204}</think>no idea", False),
        ("<think>maybe 7</think>It is \\boxed{204}.", True),
    ]:
        assert AIME24().grade(item, grade.final(text)).correct is counts


def test_the_last_complete_box_counts_and_braces_nest():
    assert grade.boxed("\\boxed{\\frac{1}{2}} and \\boxed{\\left\\{x\\right\\}}") == "\\left\\{x\\right\\}"
    assert grade.boxed("\\boxed{12} then \\boxed{13") == "12"
    assert grade.boxed("\\fbox{7}") == grade.boxed("\\boxed 7") == "7"
    assert grade.boxed("no box") is None


HOSTILE = ["9^{9^{9^{9}}}"]
MORE_HOSTILE = [
    "\\sqrt{" * 300 + "}" * 300,
    "\\boxed{" * 500,
    "(" * 3000,
    "10^{10^{10}}!",
    "\\frac{" * 800,
    "x" * 4000,
    "\\int" * 1000,
]


@pytest.mark.parametrize("answers", [HOSTILE, pytest.param(MORE_HOSTILE, marks=pytest.mark.slow)])
def test_hostile_latex_is_given_up_in_time(answers, monkeypatch):
    """The process that hangs is ended; the next answer is judged again."""
    pytest.importorskip("math_verify", reason="pip install tiercel[eval]")
    from tiercel.evals.math_judge import Judge

    judge = Judge(seconds=1.0)
    limits = []
    monkeypatch.setattr(
        "tiercel.evals.math_judge.kill_after",
        lambda process, seconds: limits.append(seconds) or kill_after(process, seconds),
    )
    for answer in answers:
        assert judge.same(answer, "3") is False
    assert limits.count(1.0) == len(answers), "every question has its limit"
    judge.seconds = 60.0
    assert judge.same("\\frac{2}{4}", "\\frac{1}{2}")
    judge.close()


def test_long_texts_are_read_in_no_time():
    def graded(text):
        grade.stated_number(text)
        grade.letter(text, 4)
        grade.final(text)

    for unit in ("1,", "\\boxed{", "{", "answer is ", "1 ", "-"):
        assert ratio(lambda size, unit=unit: graded(unit * (size // len(unit))), 25_000) < 24, unit
