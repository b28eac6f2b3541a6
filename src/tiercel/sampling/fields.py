"""Dataclass fields that check their value: bounds stand beside the field, and an error names field, value and range."""

from __future__ import annotations

import numbers
from collections.abc import Callable, Mapping
from dataclasses import field
from typing import Any, TypeGuard

from tiercel.errors import RequestError

MAX_TOKEN_ID = 2**31 - 1
MAX_STRINGS, MAX_STRING_BYTES = 16, 256  # stop strings and bad words; UTF-8 bytes of each
MAX_TOKEN_IDS = 65_536  # entries of logit_bias, allowed_token_ids, stop_token_ids
MAX_SHOWN_CHARACTERS = 60  # of a value in an error message


def shown(value: object) -> str:
    """Return a value as an error message shows it: short, and safe for any input."""
    try:
        text = repr(value)
    except ValueError:  # Python refuses to write integers of more than 4300 digits
        return "a number of more than 4300 digits"
    return text if len(text) <= MAX_SHOWN_CHARACTERS else text[: MAX_SHOWN_CHARACTERS - 3] + "..."


def is_integer(value: object) -> TypeGuard[int]:
    """Whether a value is a whole number of any type, and not a bool."""
    return isinstance(value, numbers.Integral) and not isinstance(value, bool)


def is_real(value: object) -> TypeGuard[float]:
    """Whether a value is a real number of any type, and not a bool."""
    return isinstance(value, numbers.Real) and not isinstance(value, bool)


def refuse(name: str, value: object, expected: str) -> RequestError:
    """Return the error for a field whose value is not as expected."""
    return RequestError(f"{name} must be {expected}, not {shown(value)}")


def integer(default: int | None, low: int, high: int, *, hint: str = "") -> Any:
    """Declare a whole number in low … high; None is allowed when it is the default.  hint: what else is possible."""

    def check(name: str, value: object) -> int | None:
        if value is None and default is None:
            return None
        if not is_integer(value) or not low <= value <= high:
            raise refuse(name, value, f"a whole number from {low} to {high}{hint}")
        return int(value)

    return field(default=default, metadata={"check": check})


def real(default: float, low: float, high: float, *, above: bool = False) -> Any:
    """Declare a finite number in low … high; above: `low` itself is excluded."""

    def check(name: str, value: object) -> float:
        if not is_real(value) or not low <= value <= high or (above and value == low):
            raise refuse(name, value, f"a number {f'above {low:g}, up' if above else f'from {low:g}'} to {high:g}")
        return float(value)

    return field(default=default, metadata={"check": check})


def switch(default: bool) -> Any:
    """Declare true or false."""

    def check(name: str, value: object) -> bool:
        if not isinstance(value, bool):
            raise refuse(name, value, "true or false")
        return value

    return field(default=default, metadata={"check": check})


def listed(check: Callable[[str, object], Any]) -> Any:
    """Declare a field with a check of its own; its default is None."""
    return field(default=None, metadata={"check": check})


def later(default: Any) -> Any:
    """Declare a field of vLLM's that is not supported yet: only its default passes."""

    def check(name: str, value: object) -> Any:
        if value is not default and not (type(default) is int and isinstance(value, int) and value == default):
            raise RequestError(f"{name} is not supported yet; leave it out (got {shown(value)})")
        return value

    return field(default=default, metadata={"check": check})


def strings(name: str, value: object) -> list[str] | None:
    """Check a string or a list of strings."""
    expected = f"up to {MAX_STRINGS} non-empty strings of at most {MAX_STRING_BYTES} bytes"
    if value is None:
        return None
    found = [value] if isinstance(value, str) else value
    if not isinstance(found, (list, tuple)) or len(found) > MAX_STRINGS:
        raise refuse(name, value, expected)
    for text in found:
        if not isinstance(text, str) or not 0 < len(text.encode(errors="surrogatepass")) <= MAX_STRING_BYTES:
            raise refuse(name, text, expected)
    return list(found)


def token_id(name: str, value: object) -> int:
    """Check a token id."""
    if not is_integer(value) or not 0 <= value <= MAX_TOKEN_ID:
        raise refuse(name, value, f"token ids, whole numbers from 0 to {MAX_TOKEN_ID}")
    return int(value)


def token_ids(name: str, value: object) -> list[int] | None:
    """Check a list of token ids."""
    if value is None:
        return None
    if not isinstance(value, (list, tuple, set, frozenset)) or len(value) > MAX_TOKEN_IDS:
        raise refuse(name, value, f"a list of at most {MAX_TOKEN_IDS} token ids")
    return [token_id(name, item) for item in value]


def some_token_ids(name: str, value: object) -> list[int] | None:
    """Check a list of at least one token id."""
    ids = token_ids(name, value)
    if ids is not None and not ids:
        raise refuse(name, value, "None or a list of at least one token id")
    return ids


def biases(name: str, value: object) -> dict[int, float] | None:
    """Check {token id: −100 … 100}; ids may be strings, as in JSON."""
    if value is None:
        return None
    if not isinstance(value, Mapping) or len(value) > MAX_TOKEN_IDS:
        raise refuse(name, value, f"a table of at most {MAX_TOKEN_IDS} token ids")
    found: dict[int, float] = {}
    for key, bias in value.items():
        decimal = isinstance(key, str) and key.isascii() and key.isdecimal() and len(key) <= 10
        if not is_real(bias) or not -100 <= bias <= 100:
            raise refuse(f"{name}[{shown(key)}]", bias, "a number from -100 to 100")
        found[token_id(name, int(key) if decimal else key)] = float(bias)
    return found
