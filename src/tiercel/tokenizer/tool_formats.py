"""Tool calls: how models write them, and the parts in which they are handed on.

    hermes    <tool_call>{"name": "f", "arguments": {"a": 1}}</tool_call>         Hermes, Qwen, Falcon-H1, Granite
    llama     {"name": "f", "parameters": {"a": 1}}, perhaps after <|python_tag|>, several with ; between
    mistral   [TOOL_CALLS][{"name": "f", "arguments": {"a": 1}}]
              [TOOL_CALLS]f[ARGS]{"a": 1}

`TOOL_FORMATS` is the registry: a format is one row, found by what a chat template writes.
"""

from __future__ import annotations

import secrets
from collections.abc import Callable
from dataclasses import dataclass, field, replace


def openai_id() -> str:
    return "call_" + secrets.token_hex(12)


def mistral_id() -> str:
    """Nine letters or digits: its template refuses others."""
    return secrets.token_hex(5)[:9]


@dataclass(frozen=True)
class ToolFormat:
    """How a model writes tool calls.

    markers: texts that begin or end a call, control tokens in some models.
    shown_by: a template that holds all texts of one of these rows asks for this format.
    new_id: makes the id of a call, which the model does not write.
    """

    name: str
    markers: tuple[str, ...]
    shown_by: tuple[tuple[str, ...], ...]
    new_id: Callable[[], str] = openai_id

    @classmethod
    def of(cls, *templates: str) -> ToolFormat | None:
        """What a chat template (or the several of a model) asks a model to write; None where it takes no tools."""
        written = "\n".join(templates)
        shown = (each for each in TOOL_FORMATS if any(all(text in written for text in row) for row in each.shown_by))
        return next(shown, None)


MISTRAL = ToolFormat("mistral", ("[TOOL_CALLS]", "[ARGS]", "[CALL_ID]"), (("[TOOL_CALLS]",),), mistral_id)
HERMES = ToolFormat("hermes", ("<tool_call>", "</tool_call>"), (("<tool_call>",),))
LLAMA = ToolFormat("llama", ("<|python_tag|>",), (("<|python_tag|>",), ("tools", '"parameters"')))
TOOL_FORMATS = (MISTRAL, HERMES, LLAMA)  # the first that a template shows is taken


@dataclass(frozen=True)
class ToolDelta:
    """More of call number `index`.  The first has id and name; `arguments` is the next piece of a JSON object."""

    index: int
    id: str | None = None
    name: str | None = None
    arguments: str = ""

    def __add__(self, more: ToolDelta) -> ToolDelta:
        """The call so far and its next piece."""
        return replace(self, arguments=self.arguments + more.arguments)


@dataclass
class ToolCall:
    """arguments: JSON text as the model wrote it; it parses as an object where the call is complete."""

    id: str
    name: str
    pieces: list[str] = field(default_factory=list)
    complete: bool = False

    @property
    def arguments(self) -> str:
        return "".join(self.pieces)
