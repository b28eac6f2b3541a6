"""When two answers are the same.

    final("<think>…</think>so 4")   the text after the reasoning
    boxed(text)                     the content of the last \\boxed{…}
    last_number(text)               the number that a worked solution ends with
    same_number("1,234", "1234.0")  as numbers, exactly
    same_math(answer, gold)         as mathematics (math-verify, in a process with a clock: math_worker.py)

Of several boxed answers the last one counts: a model may correct itself, and it may not answer twice.
"""

from __future__ import annotations

import re

from tiercel.voting.answers import NUMBER, TAIL_CHARS, plain
from tiercel.voting.answers import boxed as boxed
from tiercel.voting.answers import number as number
from tiercel.voting.answers import same_number as same_number

MAX_ANSWER_CHARS = 4000  # a longer answer is not compared


def final(text: str) -> str:
    """Return the text after the reasoning; nothing where the reasoning never ends."""
    _, tag, rest = text.rpartition("</think>")
    if tag:
        return rest
    return "" if "<think>" in text else text


def last_number(text: str) -> str | None:
    """The last number in a text, without what only decorates it."""
    text = text[-TAIL_CHARS:]
    found = re.findall(rf"(?<![\w.])(?:{NUMBER})", text.replace("\\!", "").replace("{,}", ","))
    return found[-1] if found else None


def stated_number(text: str) -> str | None:
    r"""The number a solution gives as its answer: boxed, after ####, after "answer is", else the last one."""
    text = text[-TAIL_CHARS:]
    box = boxed(text)
    if box is not None:
        return last_number(plain(box)) if number(box) is None else box
    for pattern in (rf"####\s*\$?\s*({NUMBER})", rf"answer(?:\s+is)?\s*[:=]?\s*\**\s*\$?\s*({NUMBER})"):
        found = re.findall(pattern, text, re.IGNORECASE)
        if found:
            return str(found[-1])
    return last_number(text)


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
    text, last = text[-TAIL_CHARS:], chr(ord("A") + count - 1)
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
    if answer is None or len(answer) > MAX_ANSWER_CHARS:
        return False
    if same_text(answer, gold) or same_number(answer, gold):
        return True
    from tiercel.evals.math_judge import judge

    return judge().same(answer, gold)
