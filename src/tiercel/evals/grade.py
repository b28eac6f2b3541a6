"""When two answers are the same.

    final("<think>…</think>so 4")   what stands after the thoughts
    boxed(text)                     the content of the last \\boxed{…}
    last_number(text)               the number that a worked solution ends with
    same_number("1,234", "1234.0")  as numbers, exactly
    same_math(answer, gold)         as mathematics (math-verify, in a process with a clock: math_worker.py)

Of several boxed answers the last one counts: a model may correct itself, and it may not answer twice.
"""

from __future__ import annotations

import re
from fractions import Fraction

LONGEST = 4000  # characters of an answer; a longer one is not an answer
END, BOXES = 20_000, 32  # characters at the end of a text in which its answer is looked for, and boxes
NUMBER = r"[-+−]?\s?(?:\d{1,3}(?:,\d{3})+(?!\d)|\d+)(?:\.\d+)?(?:\s?/\s?\d+)?|[-+−]?\.\d+"
_BOX = re.compile(r"\\(?:boxed|fbox|framebox)\s*")


def final(text: str) -> str:
    """What is said after the thoughts; nothing where the thoughts never end."""
    _, tag, rest = text.rpartition("</think>")
    if tag:
        return rest
    return "" if "<think>" in text else text


def boxed(text: str) -> str | None:
    r"""The content of the last complete \boxed{…}; braces inside count, escaped ones do not."""
    text = text[-END:]
    for match in list(_BOX.finditer(text))[: -BOXES - 1 : -1]:
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


def last_number(text: str) -> str | None:
    """The last number in a text, without what only decorates it."""
    text = text[-END:]
    found = re.findall(rf"(?<![\w.])(?:{NUMBER})", text.replace("\\!", "").replace("{,}", ","))
    return found[-1] if found else None


def stated_number(text: str) -> str | None:
    r"""The number a solution gives as its answer: boxed, after ####, after "answer is", else the last one."""
    text = text[-END:]
    box = boxed(text)
    if box is not None:
        return last_number(plain(box)) if number(box) is None else box
    for pattern in (rf"####\s*\$?\s*({NUMBER})", rf"answer(?:\s+is)?\s*[:=]?\s*\**\s*\$?\s*({NUMBER})"):
        found = re.findall(pattern, text, re.IGNORECASE)
        if found:
            return str(found[-1])
    return last_number(text)


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
    if answer is None or len(answer) > LONGEST:
        return False
    a, b = number(answer), number(gold)
    return a is not None and a == b


def same_integer(answer: str | None, gold: str) -> bool:
    """Equal integers, leading zeros aside."""
    a = None if answer is None else number(answer)
    b = number(gold)
    return a is not None and a == b and a.denominator == 1


def same_text(answer: str | None, gold: str) -> bool:
    """Equal but for case, spaces, and a full stop or quotes around it."""
    return answer is not None and _folded(answer) == _folded(gold)


def _folded(text: str) -> str:
    return " ".join(text.casefold().split()).strip(" .\"'`*")


def letter(text: str, count: int) -> str | None:
    """The letter of a choice that a text settles on: boxed, "answer is C", "C.", or the last one standing alone."""
    text, last = text[-END:], chr(ord("A") + count - 1)
    box = boxed(text)
    if box is not None:
        inside = plain(box).strip("() .")
        return inside.upper() if re.fullmatch(rf"[A-{last}]", inside, re.IGNORECASE) else None
    patterns = (
        rf"answer(?:\s+is)?\s*[:=]?\s*[*\"(]*([A-{last}])\b",
        rf"^\s*[*(]*([A-{last}])[*]*(?:[).:]|\s*$)",
        # "A good question" and "I think" name no choice; "A is right" does
        rf"(?<![\w'])(?![AI]\s+(?!is\b|because\b)[a-z])([A-{last}])(?![\w'])",
    )
    for pattern in patterns:
        found = re.findall(pattern, text, re.MULTILINE)
        if found:
            return str(found[0 if pattern.startswith("^") else -1])
    return None


def same_math(answer: str | None, gold: str) -> bool:
    """Equal as mathematics.  What takes too long or breaks the judge is not equal."""
    if answer is None or len(answer) > LONGEST:
        return False
    if same_text(answer, gold) or same_number(answer, gold):
        return True
    from tiercel.evals.math_judge import judge

    return judge().same(answer, gold)
