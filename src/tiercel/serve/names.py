"""How models and times are written for clients."""

from __future__ import annotations

from datetime import UTC, datetime

from tiercel.errors import RequestError
from tiercel.serve.duration import seconds_of
from tiercel.serve.errors import APIError


def tagged(name: str) -> str:
    """A short name with its tag, which Ollama's clients expect: smollm2 → smollm2:latest."""
    return name if ":" in name or "/" in name else f"{name}:latest"


def timestamp(seconds: float) -> str:
    """Seconds since 1970 as RFC 3339, in UTC with microseconds."""
    return datetime.fromtimestamp(seconds, UTC).isoformat(timespec="microseconds").replace("+00:00", "Z")


def keep_alive_seconds(value: int | float | str | None) -> float | None:
    """`keep_alive` of a request in seconds (inf: for ever); None where it is not given.  Raises APIError 400."""
    try:
        return None if value is None or value == "" else seconds_of(value)
    except RequestError as error:
        raise APIError(400, str(error), param="keep_alive") from None
