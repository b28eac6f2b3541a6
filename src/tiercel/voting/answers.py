"""What a trace answers, in a form in which two equal answers are equal texts.

boxed(text)               the content of the last \\boxed{…}
number(text)              the exact number that a text is, money, thousands marks and units aside
final_answer(text)        the answer of a trace, normalised
same_answer(a, b)         whether two normalised answers are one: equal texts, or equal numbers
"""

from __future__ import annotations

import re
from decimal import Decimal, localcontext
from fractions import Fraction

MAX_NUMBER_CHARS = 4000  # a longer answer is no number
MAX_ANSWER_CHARS = 400  # of an answer that is compared
TAIL_CHARS, MAX_BOXES = 20_000, 32  # at the end of a text, where its answer is looked for
NUMBER = r"[-+−]?\s?(?:\d{1,3}(?:,\d{3})+(?!\d)|\d+)(?:\.\d+)?(?:\s?/\s?\d+)?|[-+−]?\.\d+"
NUMBERS = re.compile(NUMBER)
_BOX = re.compile(r"\\(?:boxed|fbox|framebox)\s*")
ANNOUNCED = re.compile(r"(?:answer(?:\s+is)?|=)\s*[:=]?\s*([^\s].*)$", re.IGNORECASE)
# behind a number: a unit in LaTeX text, a percent or degree sign, or a word of two letters or more
UNIT = re.compile(
    r"\s*(?:\\(?:text|mathrm|textbf|mathbf|mbox)\s*\{[^{}]*\}|\\?%|\^?\\circ|°|(?<=[\d}]) +[a-zA-Z]{2,}[a-zA-Z .²³/]*)$"
)
LETTER_BEHIND = re.compile(r"\d\s*[a-zA-Z]+$")  # 2x is no number


def final_answer(text: str) -> str | None:
    r"""Return the answer of a trace, normalised; None where there is none.

    It is the last \boxed{…}; else what the last line has after "answer is", ":" or "="; else the last number of that
    line, or of the text; else the line itself.
    """
    if (inner := boxed(text)) is not None:
        return normal(inner)
    lines = [line.strip() for line in text.splitlines() if line.strip()]
    if not lines:
        return None
    announced = ANNOUNCED.search(lines[-1])
    numbers = NUMBERS.findall(announced[1] if announced else "") or NUMBERS.findall(lines[-1])
    if numbers:
        return normal(numbers[0] if announced and NUMBERS.findall(announced[1]) else numbers[-1])
    if announced:
        return normal(announced[1])
    numbers = NUMBERS.findall(text)
    return normal(numbers[-1] if numbers else lines[-1])


def normal(answer: str) -> str | None:
    """Return one text for all spellings of an answer.

    1,000 and 1{,}000 and \\$1000 are 1000, 025 is 25, 2.50 is 2.5, 1/2 and \\frac12 are \\frac{1}{2}, (0, 1) is (0,1),
    (B) is b; no dollar signs or full stop.
    """
    text = answer[:MAX_NUMBER_CHARS].strip().strip("$").strip().rstrip(".").strip("*").strip().replace("−", "-")
    bare = UNIT.sub("", text)
    value = None if LETTER_BEHIND.search(bare) else number(bare)
    if value is not None:
        return _spelled(value, decimal="." in bare)
    text = re.sub(r"\\(?:text|mathrm|mathbf)\s*\{([^{}]*)\}", r"\1", text)
    text = re.sub(r"\\[dt]frac", r"\\frac", text).replace("\\left", "").replace("\\right", "")
    text = re.sub(r"\\frac(\d)(\d)(?!\d)", r"\\frac{\1}{\2}", text)
    text = re.sub(r"\\[,;:! ]", "", text)
    text = re.sub(r"(?<=\d)(?:,|\{,\})(?=\d{3}(?:\D|$))", "", text)
    text = re.sub(r"\s+", "", text).lower() if "\\" in text else " ".join(text.lower().split())
    if re.fullmatch(r"\(([a-z])\)", text):
        text = text[1]
    if re.fullmatch(r"[(\[{].*[)\]}]", text):
        text = re.sub(r"\s*([,;()\[\]{}])\s*", r"\1", text)
    return text[:MAX_ANSWER_CHARS] or None


def _spelled(value: Fraction, *, decimal: bool) -> str:
    """Return a number as an integer, as a decimal that ends, or as a LaTeX fraction in lowest terms."""
    top, bottom = abs(value.numerator), value.denominator
    sign = "-" if value < 0 else ""
    if bottom == 1:
        return f"{sign}{top}"
    if decimal and (10 ** bottom.bit_length()) % bottom == 0:
        digits = len(str(10 ** bottom.bit_length() // bottom)) + len(str(top)) + bottom.bit_length()
        with localcontext() as context:
            context.prec = digits
            return f"{sign}{(Decimal(top) / Decimal(bottom)).normalize():f}"
    return f"{sign}\\frac{{{top}}}{{{bottom}}}"


def same_answer(a: str, b: str) -> bool:
    """Return whether two normalised answers are one: equal texts, or equal numbers such as 0.5 and \\frac{1}{2}."""
    return a == b or same_number(a, b)


def boxed(text: str) -> str | None:
    r"""The content of the last complete \boxed{…}; braces inside count, escaped ones do not."""
    text = text[-TAIL_CHARS:]
    for match in list(_BOX.finditer(text))[: -MAX_BOXES - 1 : -1]:
        start = match.end()
        if start >= len(text):
            continue
        if text[start] != "{":
            word = re.match(r"[^\s$.,;{}\\]+", text[start:])  # \boxed 7
            if word:
                return word[0]
            continue
        depth, at = 0, start
        while at < len(text):
            character = text[at]
            if character == "\\":
                at += 2
                continue
            depth += (character == "{") - (character == "}")
            if depth == 0:
                return text[start + 1 : at].strip()
            at += 1
    return None


def plain(text: str) -> str:
    r"""LaTeX around a number taken off: $, \text{…}, \%, units in \mathrm{…}, thin spaces."""
    text = text.strip().replace("{,}", ",").replace("\\!", "").replace("−", "-")
    text = re.sub(r"\\(?:text|mathrm|textbf|mathbf|mbox|operatorname)\s*\{([^{}]*)\}", r" \1 ", text)
    text = re.sub(r"\\(?:left|right|displaystyle|,|;|:|\s|quad)", "", text)
    return text.replace("\\$", "").replace("$", "").replace("\\%", "%").replace("^\\circ", "").strip().rstrip(" .")


def number(text: str) -> Fraction | None:
    r"""A text that is one number, perhaps with a unit behind it or money before it; None for anything else."""
    text = plain(text)
    if len(text) > 200:
        return None
    fraction = re.fullmatch(r"([-+]?)\s*\\[dtc]?frac\s*(?:\{(-?\d+)\}|(\d))\s*(?:\{(-?\d+)\}|(\d))", text)
    if fraction:
        sign, *parts = fraction.groups()
        top, bottom = (int(part) for part in parts if part is not None)
        return None if bottom == 0 else Fraction(-top if sign == "-" else top, bottom)
    match = re.fullmatch(rf"({NUMBER})\s*(%|°|[a-zA-Z][a-zA-Z .²³/]*)?", text)
    if match is None:
        return None
    digits = re.sub(r"[\s,+]", "", match[1])
    try:
        return Fraction(digits)
    except (ValueError, ZeroDivisionError):
        return None


def same_number(answer: str | None, gold: str) -> bool:
    """Equal as exact numbers: "1,234" and "1234.00", "025" and "25", "1/2" and "0.5"."""
    if answer is None or len(answer) > MAX_NUMBER_CHARS:
        return False
    a, b = number(answer), number(gold)
    return a is not None and a == b
