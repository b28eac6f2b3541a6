"""The content blocks of a message, and the events that stream them."""

from __future__ import annotations

import json
import secrets
from typing import TYPE_CHECKING, Any

from tiercel.serve.types import OutputDelta, Usage

if TYPE_CHECKING:
    from tiercel.tokenizer.tool_formats import ToolDelta

Event = dict[str, Any]
STOP_REASONS = {"length": "max_tokens", "tool_calls": "tool_use"}


class MessageWriter:
    """Deltas → events.  content: the blocks so far; the last one is open."""

    def __init__(self, model: str) -> None:
        self.model, self.id = model, f"msg_{secrets.token_hex(12)}"
        self.content: list[dict[str, Any]] = []
        self.is_open = False
        self.arguments = ""  # of the tool call that is open
        self.stop_reason = "end_turn"
        self.stop_sequence: str | None = None

    def message(self, usage: Usage, done: bool = True) -> dict[str, Any]:
        """The message as it stands."""
        return {
            "id": self.id, "type": "message", "role": "assistant", "model": self.model, "content": list(self.content),
            "stop_reason": self.stop_reason if done else None, "stop_sequence": self.stop_sequence if done else None,
            "usage": usage_fields(usage),
        }  # fmt: skip

    def write(self, delta: OutputDelta) -> list[Event]:
        """The events of a delta."""
        events: list[Event] = []
        if delta.reasoning:
            events += self._begin("thinking", {"type": "thinking", "thinking": "", "signature": ""})
            self.content[-1]["thinking"] += delta.reasoning
            events.append(self._delta({"type": "thinking_delta", "thinking": delta.reasoning}))
        if delta.text:
            events += self._begin("text", {"type": "text", "text": ""})
            self.content[-1]["text"] += delta.text
            events.append(self._delta({"type": "text_delta", "text": delta.text}))
        for call in delta.tool_calls:
            events += self._call(call)
        if delta.finish_reason is not None:
            self.stop_reason = STOP_REASONS.get(delta.finish_reason, "end_turn")
            if self.stop_reason == "end_turn" and isinstance(delta.stop_reason, str):
                self.stop_reason, self.stop_sequence = "stop_sequence", delta.stop_reason
        return events

    def finish(self) -> list[Event]:
        """The events that end the content; an answer of nothing is an empty text."""
        return [*([] if self.content else self._begin("text", {"type": "text", "text": ""})), *self.close()]

    def close(self) -> list[Event]:
        """The events that end the open block."""
        if not self.is_open:
            return []
        self.is_open = False
        block = self.content[-1]
        if block["type"] == "tool_use":
            block["input"] = _object(self.arguments)
        return [{"type": "content_block_stop", "index": len(self.content) - 1}]

    def _begin(self, kind: str, block: dict[str, Any]) -> list[Event]:
        """Open a block, unless one of its kind is open."""
        if self.is_open and self.content[-1]["type"] == kind != "tool_use":
            return []
        events = self.close()
        self.content.append(dict(block))
        self.is_open = True
        return [*events, {"type": "content_block_start", "index": len(self.content) - 1, "content_block": block}]

    def _call(self, call: ToolDelta) -> list[Event]:
        events: list[Event] = []
        if call.name is not None:
            self.arguments = ""
            events += self._begin("tool_use", {"type": "tool_use", "id": call.id, "name": call.name, "input": {}})
        if call.arguments:
            self.arguments += call.arguments
            events.append(self._delta({"type": "input_json_delta", "partial_json": call.arguments}))
        return events

    def _delta(self, delta: dict[str, Any]) -> Event:
        return {"type": "content_block_delta", "index": len(self.content) - 1, "delta": delta}


def usage_fields(usage: Usage) -> dict[str, Any]:
    """`usage`: input_tokens are those that were not cached."""
    return {
        "input_tokens": usage.prompt_tokens - usage.cached_tokens, "cache_creation_input_tokens": 0,
        "cache_read_input_tokens": usage.cached_tokens, "output_tokens": usage.completion_tokens,
    }  # fmt: skip


def _object(arguments: str) -> dict[str, Any]:
    try:
        found = json.loads(arguments or "{}")
    except (ValueError, RecursionError):
        return {}
    return found if isinstance(found, dict) else {}
