"""OpenAI's /v1/responses, without memory: `previous_response_id`, `conversation` and `background` are refused.

One message item, before it a reasoning item where the model thinks, after it the function calls.  Of a vote
`response.in_progress` tells how it stands whenever an answer has ended; the last response has its table.
"""

from __future__ import annotations

import secrets
import time
from collections.abc import AsyncGenerator
from typing import TYPE_CHECKING, Any

from pydantic import Field
from starlette.requests import Request
from starlette.responses import Response

from tiercel.serve import generation as talk
from tiercel.serve.errors import APIError
from tiercel.serve.generation import OutputDelta, Usage
from tiercel.serve.openai import ChatCompletion, open_chat
from tiercel.serve.requests import Body, VoteField, read
from tiercel.serve.stream import JSONResponse, NamedEvents

if TYPE_CHECKING:
    from tiercel.tokenizer.tools import ToolDelta


class ResponsesRequest(Body):
    model: str = Field(max_length=512, min_length=1)
    input: str | list[dict[str, Any]]
    instructions: str | None = None
    max_output_tokens: int | None = None
    reasoning: dict[str, Any] | None = None
    temperature: float | None = None
    top_p: float | None = None
    text: dict[str, Any] | None = None
    tools: list[dict[str, Any]] | None = None
    tool_choice: str | dict[str, Any] | None = None
    parallel_tool_calls: bool | None = None
    stream: bool | None = None
    store: bool | None = None
    previous_response_id: str | None = None
    conversation: Any = None
    background: bool | None = None
    truncation: str | None = None
    metadata: dict[str, Any] | None = None
    include: list[str] | None = None
    user: str | None = None
    vote: VoteField | None = None  # ours


async def responses(request: Request) -> Response:
    body = await read(request, ResponsesRequest)
    for name in ("previous_response_id", "conversation", "background"):
        if getattr(body, name):
            raise APIError(400, f"{name} is not supported: nothing is stored between requests", param=name)
    if body.truncation not in (None, "disabled"):
        raise APIError(400, "truncation: a conversation is never cut here", param="truncation")
    chat = as_chat(body, request.app.state.settings)
    events = _events(request, body, chat)
    if body.stream:
        return NamedEvents(request, events)

    async def last() -> dict[str, Any]:
        found: dict[str, Any] = {}
        async for event in events:
            found = event.get("response", found)
        return found

    return JSONResponse(request, last)


def as_chat(body: ResponsesRequest, settings: Any) -> ChatCompletion:
    """The same question as a chat completion."""
    messages: list[dict[str, Any]] = [{"role": "system", "content": body.instructions}] if body.instructions else []
    if isinstance(body.input, str):
        messages.append({"role": "user", "content": body.input})
    else:
        for item in body.input:
            _item(messages, item)
    if not messages or len(messages) > settings.messages:
        raise APIError(400, f"input must have 1 to {settings.messages} items", param="input")
    format = (body.text or {}).get("format")
    if format is not None and not isinstance(format, dict):
        raise APIError(400, "text.format must be an object", param="text")
    if format and format.get("type") == "json_schema":
        format = {"type": "json_schema", "json_schema": format}
    talk.check_schema([body.tools, format], settings.schema_bytes)
    effort = (body.reasoning or {}).get("effort")
    if effort is not None and not isinstance(effort, str):
        raise APIError(400, "reasoning.effort must be a string", param="reasoning")
    return ChatCompletion(
        model=body.model, messages=messages, temperature=body.temperature, top_p=body.top_p,
        max_tokens=body.max_output_tokens, tools=[_tool(tool) for tool in body.tools or ()] or None,
        tool_choice=body.tool_choice, response_format=format,
        reasoning={"effort": effort} if effort else None, vote=body.vote,
    )  # fmt: skip


def _tool(tool: dict[str, Any]) -> dict[str, Any]:
    if tool.get("type") != "function":
        raise APIError(400, "tools: only functions can be called", param="tools")
    function = {key: value for key, value in tool.items() if key not in ("type", "strict")}
    return {"type": "function", "function": function}


def _item(messages: list[dict[str, Any]], item: dict[str, Any]) -> None:
    """One input item → a message, or more of the last one."""
    kind = item.get("type", "message")
    if kind == "message":
        messages.append({"role": item.get("role"), "content": item.get("content")})
    elif kind == "function_call":
        if not messages or messages[-1]["role"] != "assistant":
            messages.append({"role": "assistant", "content": ""})
        function = {"name": item.get("name"), "arguments": item.get("arguments", "{}")}
        call = {"id": str(item.get("call_id", "")), "type": "function", "function": function}
        messages[-1].setdefault("tool_calls", []).append(call)
    elif kind == "function_call_output":
        messages.append({"role": "tool", "tool_call_id": item.get("call_id"), "content": item.get("output")})
    elif kind == "reasoning":
        texts = [part.get("text", "") for part in item.get("summary") or () if isinstance(part, dict)]
        messages.append({"role": "assistant", "content": "", "reasoning_content": "".join(map(str, texts))})
    else:
        raise APIError(400, f"input items of type {str(kind)[:40]!r} are not supported", param="input")


class _Writer:
    """Items open and close in the order in which the answer brings them; every event is numbered."""

    def __init__(self, body: ResponsesRequest) -> None:
        self.number = 0
        self.items: list[dict[str, Any]] = []
        self.open: dict[str, Any] | None = None
        self.body = body
        self.head = {
            "id": f"resp_{secrets.token_hex(16)}", "object": "response", "created_at": int(time.time()),
            "model": body.model, "instructions": body.instructions, "max_output_tokens": body.max_output_tokens,
            "tools": body.tools or [], "tool_choice": body.tool_choice or "auto",
            "parallel_tool_calls": body.parallel_tool_calls is not False,
            "text": body.text or {"format": {"type": "text"}}, "reasoning": body.reasoning,
            "temperature": body.temperature, "top_p": body.top_p, "truncation": "disabled",
            "metadata": body.metadata or {}, "store": False, "previous_response_id": None, "background": False,
            "user": body.user,
        }  # fmt: skip

    def event(self, kind: str, **more: Any) -> dict[str, Any]:
        self.number += 1
        return {"type": kind, "sequence_number": self.number - 1, **more}

    def response(self, status: str, **more: Any) -> dict[str, Any]:
        return {**self.head, "status": status, "output": list(self.items), "error": None, "incomplete_details": None,
                "completed_at": None, "usage": None, **more}  # fmt: skip

    @property
    def place(self) -> int:
        return len(self.items)

    def write(self, part: OutputDelta) -> list[dict[str, Any]]:
        events: list[dict[str, Any]] = []
        if part.thinking:
            events += self._reasoning(part.thinking)
        if part.text:
            events += self.text(part.text)
        for call in part.calls:
            events += self._call(call)
        return events

    def _begin(self, item: dict[str, Any]) -> list[dict[str, Any]]:
        events = self.close()
        self.open = item
        return [*events, self.event("response.output_item.added", output_index=self.place, item=dict(item))]

    def _at(self, **more: Any) -> dict[str, Any]:
        assert self.open is not None
        return {"item_id": self.open["id"], "output_index": self.place, **more}

    def _reasoning(self, text: str) -> list[dict[str, Any]]:
        events: list[dict[str, Any]] = []
        if self.open is None or self.open["type"] != "reasoning":
            events += self._begin({"id": f"rs_{secrets.token_hex(12)}", "type": "reasoning", "summary": []})
            assert self.open is not None
            self.open["summary"] = [{"type": "summary_text", "text": ""}]
            events.append(self.event("response.reasoning_summary_part.added",
                                     **self._at(summary_index=0, part=dict(self.open["summary"][0]))))  # fmt: skip
        assert self.open is not None
        self.open["summary"][0]["text"] += text
        return [*events, self.event("response.reasoning_summary_text.delta", **self._at(summary_index=0, delta=text))]

    def text(self, text: str) -> list[dict[str, Any]]:
        events: list[dict[str, Any]] = []
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

    def _call(self, call: ToolDelta) -> list[dict[str, Any]]:
        events: list[dict[str, Any]] = []
        if call.name is not None:
            events += self._begin({"id": f"fc_{secrets.token_hex(12)}", "type": "function_call",
                                   "status": "in_progress", "call_id": call.id, "name": call.name,
                                   "arguments": ""})  # fmt: skip
        if self.open is not None and call.arguments:
            self.open["arguments"] += call.arguments
            events.append(self.event("response.function_call_arguments.delta", **self._at(delta=call.arguments)))
        return events

    def close(self) -> list[dict[str, Any]]:
        """The end of the item that is open."""
        item = self.open
        if item is None:
            return []
        events: list[dict[str, Any]] = []
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
        events.append(self.event("response.output_item.done", output_index=self.place, item=item))
        self.items.append(item)
        self.open = None
        return events


async def _events(
    request: Request, body: ResponsesRequest, chat: ChatCompletion
) -> AsyncGenerator[dict[str, Any], None]:
    service = request.app.state.service
    async with service.lease(body.model) as lease:
        ask = await open_chat(request, chat, lease)
        counts, writer, finish = Usage(), _Writer(body), "stop"
        held: dict[str, Any] = {}
        async with talk.answer(service, lease, ask, counts) as parts:
            for kind in ("response.created", "response.in_progress"):
                yield writer.event(kind, response=writer.response("in_progress"))
            async for part in parts:
                if part.vote:
                    held = {"vote": part.vote}
                    if not part.finish:  # an answer has ended, and this is how it stands
                        yield writer.event("response.in_progress", response=writer.response("in_progress", **held))
                for event in writer.write(part):
                    yield event
                finish = part.finish or finish
        for event in [*([] if writer.open else writer.text("")), *writer.close()]:
            yield event
        short = finish == "length"
        status = "incomplete" if short else "completed"
        done = writer.response(
            status, completed_at=int(time.time()), usage=_usage(counts),
            incomplete_details={"reason": "max_output_tokens"} if short else None, **held,
        )  # fmt: skip
        yield writer.event(f"response.{status}", response=done)


def _usage(counts: Usage) -> dict[str, Any]:
    return {
        "input_tokens": counts.prompt,
        "input_tokens_details": {"cached_tokens": counts.cached, "cache_write_tokens": 0},
        "output_tokens": counts.said, "output_tokens_details": {"reasoning_tokens": counts.reasoning},
        "total_tokens": counts.prompt + counts.said,
    }  # fmt: skip
