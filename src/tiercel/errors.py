"""What a user can meet, drawn as a tree.

    TiercelError
    ├── FormatError            a file is broken, hostile, or not what it claims to be
    │   └── UnsupportedError   a sound file that asks for mathematics we do not have
    ├── RequestError           an argument or a prompt that cannot be served as asked
    │   └── ContextOverflow    the prompt does not fit the context (both numbers are named)
    ├── ModelNotFound          no such model here; says what to type next
    ├── DoesNotFit             refused before memory was taken
    ├── Busy                   the queue is full; says when to come back
    └── Offline                the network was needed and was not there

Each message is one line: what was tried, what was found, what to do next.  Internal promises
are `assert`s and never reach a user.  `exit_code` is what the command line returns.
"""

from __future__ import annotations

MAX_MESSAGE_CHARS = 1000


class TiercelError(Exception):
    """Base of every error that is meant for the person at the keyboard."""

    exit_code = 1

    def __str__(self) -> str:
        """The message; of one with a very long value, its beginning and its end."""
        text = super().__str__()
        return text if len(text) <= MAX_MESSAGE_CHARS else f"{text[: MAX_MESSAGE_CHARS - 202]} … {text[-199:]}"


class FormatError(TiercelError):
    """A file is broken, hostile, or not what it claims to be."""


class UnsupportedError(FormatError):
    """A sound file that asks for mathematics we do not have; names the field and its value."""


class RequestError(TiercelError, ValueError):
    """An argument or a prompt that cannot be served as asked."""

    exit_code = 2


class ContextOverflow(RequestError):
    """The prompt does not fit the context; nothing is ever cut silently."""

    exit_code = 1


class ModelNotFound(TiercelError):
    """No such model here."""

    exit_code = 3


class DoesNotFit(TiercelError):
    """Refused before memory was taken."""

    exit_code = 4


class Busy(TiercelError):
    """The queue is full, or the server is leaving; come back in `retry_after` seconds."""

    def __init__(self, message: str, retry_after: float) -> None:
        super().__init__(message)
        self.retry_after = retry_after


class Offline(TiercelError):
    """The network was needed and was not there."""
