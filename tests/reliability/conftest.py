"""The goals of docs/reliability.md: small here, full with `make reliability` (TIERCEL_FULL=1)."""

from __future__ import annotations

import os
from collections.abc import Callable, Iterator
from pathlib import Path

import pytest

from serve.conftest import Running, checkpoints, start  # noqa: F401

FULL = os.environ.get("TIERCEL_FULL") == "1"


@pytest.fixture(scope="session")
def cases() -> Callable[[int, int], int]:
    """cases(small, full) → how many cases this run tries."""
    return lambda small, full: int(os.environ.get("TIERCEL_CASES", full)) if FULL else small


@pytest.fixture(scope="session")
def figure() -> Iterator[Callable[..., None]]:
    """figure(goal, text): one line of what was measured, into $TIERCEL_FIGURES, for docs/reliability.md."""
    path = os.environ.get("TIERCEL_FIGURES")

    def note(goal: str, text: str) -> None:
        if path:
            with Path(path).open("a") as file:
                file.write(f"{goal}\t{text}\n")

    yield note


@pytest.fixture(scope="session")
def server(start: Callable[..., Running]) -> Running:  # noqa: F811
    return start(slots=2)
