"""The events of a response: items open and close in the order in which the answer brings them."""

from __future__ import annotations

import secrets
import time
from typing import TYPE_CHECKING, Any

from tiercel.serve.openai.response_input import Functions
from tiercel.serve.openai.schemas import ResponsesRequest
from tiercel.serve.types import OutputDelta

if TYPE_CHECKING:
    from tiercel.tokenizer.tool_formats import ToolDelta

Event = dict[str, Any]


class ResponseEvents:
    """Deltas → numbered events.  items: those that are complete.  open: the item that grows."""

    def __init__(self, body: ResponsesRequest, functions: Functions) -> None:
        self.functions = functions
        self.number = 0
        self.items: list[dict[str, Any]] = []
        self.open: dict[str, Any] | None = None
        self.body = body
        self.head = {
            "id": f"resp_{secrets.token_hex(16)}", "object": "response", "created_at": int(time.time()),
            "model": body.model, "instructions": body.instructions, "max_output_tokens": body.max_output_tokens,
            "tools": body.tools or [], "tool_choice": body.tool_choice or "auto",
            "parallel_tool_calls": body.parallel_tool_calls is not False,
            "text": body.text or {"format": {"type": "text"}},
            "reasoning": None if body.reasoning is None else body.reasoning.model_dump(exclude_none=True),
            "temperature": body.temperature, "top_p": body.top_p, "truncation": "disabled",
            "metadata": body.metadata or {}, "store": body.store is not False,
            "previous_response_id": body.previous_response_id, "background": False,
            "user": body.user,
        }  # fmt: skip

    def event(self, kind: str, **more: Any) -> Event:
        """The next event."""
        self.number += 1
        return {"type": kind, "sequence_number": self.number - 1, **more}

    def response(self, status: str, **more: Any) -> dict[str, Any]:
        """The response as it stands."""
        return {**self.head, "status": status, "output": list(self.items), "error": None, "incomplete_details": None,
                "completed_at": None, "usage": None, **more}  # fmt: skip

    @property
    def index(self) -> int:
        """The number of the item that is open, or comes next."""
        return len(self.items)

    def write(self, delta: OutputDelta) -> list[Event]:
        """The events of a delta."""
        events: list[Event] = []
        if delta.reasoning:
            events += self._reasoning(delta.reasoning)
        if delta.text:
            events += self.text(delta.text)
        for call in delta.tool_calls:
            events += self._call(call)
        return events

    def _begin(self, item: dict[str, Any]) -> list[Event]:
        events = self.close()
        self.open = item
        return [*events, self.event("response.output_item.added", output_index=self.index, item=dict(item))]

    def _at(self, **more: Any) -> dict[str, Any]:
        assert self.open is not None
        return {"item_id": self.open["id"], "output_index": self.index, **more}

    def _reasoning(self, text: str) -> list[Event]:
        events: list[Event] = []
        if self.open is None or self.open["type"] != "reasoning":
            events += self._begin({"id": f"rs_{secrets.token_hex(12)}", "type": "reasoning", "summary": []})
            assert self.open is not None
            self.open["summary"] = [{"type": "summary_text", "text": ""}]
            events.append(self.event("response.reasoning_summary_part.added",
                                     **self._at(summary_index=0, part=dict(self.open["summary"][0]))))  # fmt: skip
        assert self.open is not None
        self.open["summary"][0]["text"] += text
        return [*events, self.event("response.reasoning_summary_text.delta", **self._at(summary_index=0, delta=text))]

    def text(self, text: str) -> list[Event]:
        """The events of answer text."""
        events: list[Event] = []
        if self.open is None or self.open["type"] != "message":
            events += self._begin({"id": f"msg_{secrets.token_hex(12)}", "type": "message", "status": "in_progress",
                                   "role": "assistant", "content": []})  # fmt: skip
            part = {"type": "output_text", "text": "", "annotations": [], "logprobs": []}
            assert self.open is not None
            self.open["content"] = [part]
            events.append(self.event("response.content_part.added", **self._at(content_index=0, part=dict(part))))
        assert self.open is not None
        self.open["content"][0]["text"] += text
        return [*events, self.event("response.output_text.delta",
                                    **self._at(content_index=0, delta=text, logprobs=[]))]  # fmt: skip

    def _call(self, call: ToolDelta) -> list[Event]:
        events: list[Event] = []
        if call.name is not None:
            events += self._begin({"id": f"fc_{secrets.token_hex(12)}", "type": "function_call",
                                   "status": "in_progress", "call_id": call.id,
                                   **self.functions.called(call.name), "arguments": ""})  # fmt: skip
        if self.open is not None and call.arguments:
            self.open["arguments"] += call.arguments
            events.append(self.event("response.function_call_arguments.delta", **self._at(delta=call.arguments)))
        return events

    def close(self) -> list[Event]:
        """The events that close the open item."""
        item = self.open
        if item is None:
            return []
        events: list[Event] = []
        if item["type"] == "reasoning":
            part = item["summary"][0]
            events += [self.event("response.reasoning_summary_text.done",
                                  **self._at(summary_index=0, text=part["text"])),
                       self.event("response.reasoning_summary_part.done",
                                  **self._at(summary_index=0, part=part))]  # fmt: skip
        elif item["type"] == "message":
            part, item["status"] = item["content"][0], "completed"
            events += [self.event("response.output_text.done",
                                  **self._at(content_index=0, text=part["text"], logprobs=[])),
                       self.event("response.content_part.done", **self._at(content_index=0, part=part))]  # fmt: skip
        else:
            item["status"] = "completed"
            events.append(self.event("response.function_call_arguments.done",
                                     **self._at(name=item["name"], arguments=item["arguments"])))  # fmt: skip
        events.append(self.event("response.output_item.done", output_index=self.index, item=item))
        self.items.append(item)
        self.open = None
        return events
