"""Checks of config fields, shared by every spec."""

from __future__ import annotations

from typing import Any

from tiercel.errors import FormatError

MAX_LAYERS = 1024  # the deepest published language model has 126
MAX_SIZE = 1 << 31  # no field of a real model reaches this; a hostile file does


def check(ok: bool, message: str) -> None:
    if not ok:
        raise FormatError(message)


def check_sizes(config: Any, *names: str) -> None:
    """Every named field is a whole number in 1 … 2³¹."""
    for name in names:
        value = getattr(config, name)
        check(
            type(value) is int and 0 < value < MAX_SIZE,
            f"{type(config).__name__}.{name} must be a whole number from 1 to 2^31, not {value!r}",
        )
