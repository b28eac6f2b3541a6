"""What a trace answers, in a form in which two equal answers are equal texts."""

from __future__ import annotations

import re

NUMBER = re.compile(r"[-+−]?(?:\d{1,3}(?:,\d{3})+|\d+)(?:\.\d+)?(?:/\d+)?|[-+−]?\.\d+")
ANNOUNCED = re.compile(r"(?:answer(?:\s+is)?|=)\s*[:=]?\s*([^\s].*)$", re.IGNORECASE)
LONGEST = 400  # characters of an answer that are compared


def final_answer(text: str) -> str | None:
    r"""The last \boxed{…}; else what the last line says after "answer is", ":" or "="; else the last number of that
    line, or of the text; else the line itself.  None where there is nothing.  Normalised."""
    if (inner := boxed(text)) is not None:
        return normal(inner)
    lines = [line.strip() for line in text.splitlines() if line.strip()]
    if not lines:
        return None
    said = ANNOUNCED.search(lines[-1])
    numbers = NUMBER.findall(said[1] if said else "") or NUMBER.findall(lines[-1])
    if numbers:
        return normal(numbers[0] if said and NUMBER.findall(said[1]) else numbers[-1])
    if said:
        return normal(said[1])
    numbers = NUMBER.findall(text)
    return normal(numbers[-1] if numbers else lines[-1])


def boxed(text: str) -> str | None:
    r"""What stands in the last \boxed{…} that is closed; braces inside it count."""
    at = len(text)
    while (at := text.rfind("\\boxed{", 0, at)) >= 0:
        start = at + len("\\boxed{")
        depth = 1
        for i in range(start, len(text)):
            depth += (text[i] == "{") - (text[i] == "}")
            if depth == 0:
                return text[start:i]
    return None


def normal(answer: str) -> str | None:
    """One text for what is the same: 1,000 is 1000, 025 is 25, 2.50 is 2.5, (B) is b; no dollar signs or full stop."""
    text = answer.strip().strip("$").strip().rstrip(".").strip("*").strip()
    text = re.sub(r"\\(?:text|mathrm|mathbf)\s*\{([^{}]*)\}", r"\1", text)
    text = re.sub(r"\\[dt]frac", r"\\frac", text).replace("\\left", "").replace("\\right", "").replace("−", "-")
    text = re.sub(r"\\[,;:! ]", "", text)
    text = re.sub(r"(?<=\d),(?=\d{3}(?:\D|$))", "", text)
    if re.fullmatch(r"[-+]?(\d+\.?\d*|\.\d+)", text):
        sign = "-" if text[0] == "-" else ""
        whole, _, part = text.lstrip("+-").partition(".")
        whole, part = whole.lstrip("0") or "0", part.rstrip("0")
        number = whole + (f".{part}" if part else "")
        return number if number == "0" else sign + number
    text = re.sub(r"\s+", "", text).lower() if "\\" in text else " ".join(text.lower().split())
    if re.fullmatch(r"\(([a-z])\)", text):
        text = text[1]
    return text[:LONGEST] or None
