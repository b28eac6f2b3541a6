"""How long a model is kept: a number of seconds, or a duration as Go writes it."""

from __future__ import annotations

import math
import re

from tiercel.errors import RequestError

UNITS = {"ns": 1e-9, "us": 1e-6, "µs": 1e-6, "ms": 1e-3, "s": 1.0, "m": 60.0, "h": 3600.0}
PART = re.compile(r"(\d{1,12}(?:\.\d{1,9})?)(ns|us|µs|ms|s|m|h)")


def seconds_of(value: int | float | str) -> float:
    """300, "300", "5m", "1h30m"; negative is for ever.  Raises RequestError."""
    if isinstance(value, str):
        value = value.strip()
        parts = PART.findall(value)
        if re.fullmatch(r"-?\d{1,12}(\.\d{1,9})?", value):
            seconds = float(value)
        elif parts and "".join(a + b for a, b in parts) == value.lstrip("+-"):
            seconds = sum(float(a) * UNITS[b] for a, b in parts) * (-1 if value.startswith("-") else 1)
        else:
            raise RequestError(f'keep_alive must be seconds or a duration such as "5m", not {value[:40]!r}')
    else:
        seconds = float(min(max(value, -1), 1e12))
    if math.isnan(seconds):
        raise RequestError("keep_alive must be a number")
    return math.inf if seconds < 0 else seconds
