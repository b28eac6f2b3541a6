"""OpenAI's /v1/responses; those that are not `store: false` are kept in memory, for `previous_response_id`.

`conversation` and `background` are refused.

One message item, before it a reasoning item where the model reasons, after it the function calls.  Of a vote
`response.in_progress` has the standings whenever a sample has ended; the last response has its table.
"""

from __future__ import annotations

import time
from collections.abc import AsyncGenerator
from typing import Any

from starlette.requests import Request
from starlette.responses import Response

from tiercel.serve.body import aside, ignore, read
from tiercel.serve.defaults import tenant_of
from tiercel.serve.errors import APIError, message_of, status_of, to_json
from tiercel.serve.generation import generate
from tiercel.serve.openai.chat import chat_prompt, open_chat
from tiercel.serve.openai.response_events import Event, ResponseEvents
from tiercel.serve.openai.response_input import Functions, chat_messages, input_items
from tiercel.serve.openai.response_store import StoredResponse, store_of
from tiercel.serve.openai.schemas import ChatCompletion, ResponsesRequest
from tiercel.serve.prompt import count_chat
from tiercel.serve.service import service_of
from tiercel.serve.settings import Settings
from tiercel.serve.stream import JSONResponse, NamedEventSourceResponse
from tiercel.serve.structured import StructuredFields
from tiercel.serve.types import Usage


class ResponseStream(NamedEventSourceResponse):
    """The events of a response."""

    def error_frame(self, error: Exception) -> bytes:
        return self.frame({"type": "error", "code": str(status_of(error)), "message": message_of(error),
                           "param": None, "sequence_number": 1 << 30})  # fmt: skip


async def responses(request: Request) -> Response:
    """Answer a conversation as items."""
    body, functions, chat = await _read(request)
    events = _events(request, body, chat, functions)
    if body.stream:
        return ResponseStream(request, events)

    async def last() -> dict[str, Any]:
        found: dict[str, Any] = {}
        async for event in events:
            found = event.get("response", found)
        return found

    return JSONResponse(request, last)


async def retrieve(request: Request) -> Response:
    """A stored response."""
    stored = store_of(request).find(request, request.path_params["id"])
    return Response(to_json(stored.response), media_type="application/json")


async def delete(request: Request) -> Response:
    """Drop a stored response."""
    id = request.path_params["id"]
    store_of(request).remove(request, id)
    return Response(to_json({"id": id, "object": "response", "deleted": True}), media_type="application/json")


async def input_tokens(request: Request) -> Response:
    """How many tokens the input of a response has."""
    body, _, chat = await _read(request)

    async def counted() -> dict[str, Any]:
        async with service_of(request).lease(body.model) as lease:

            def count() -> int:
                messages, options = chat_prompt(request, chat, lease)
                return count_chat(lease, messages, options)

            number = await aside(request, count)
        return {"object": "response.input_tokens", "input_tokens": number}

    return JSONResponse(request, counted)


async def _read(request: Request) -> tuple[ResponsesRequest, Functions, ChatCompletion]:
    """The body, with the items of the response that it continues before its own."""
    body = await read(request, ResponsesRequest)
    for name in ("conversation", "background"):
        if getattr(body, name):
            raise APIError(400, f"{name} is not supported", param=name)
    if body.truncation not in (None, "disabled"):
        raise APIError(400, "truncation: a conversation is never cut here", param="truncation")
    if body.previous_response_id:
        stored = store_of(request).get(body.previous_response_id, tenant_of(request))
        if stored is None:
            raise APIError(400, "previous_response_id: there is no such response; send the whole conversation as input",
                           param="previous_response_id", code="previous_response_not_found")  # fmt: skip
        body.input = [*stored.items, *input_items(body.input)]
    functions, chat = await aside(request, _as_chat, body, service_of(request).settings)
    ignore(request, functions.ignored)
    return body, functions, chat


def _as_chat(body: ResponsesRequest, settings: Settings) -> tuple[Functions, ChatCompletion]:
    functions = Functions(body)
    return functions, as_chat(body, functions, settings)


def as_chat(body: ResponsesRequest, functions: Functions, settings: Settings) -> ChatCompletion:
    """The same request as a chat completion.  Raises APIError 400."""
    messages = chat_messages(body, functions)
    if not messages or len(messages) > settings.messages:
        raise APIError(400, f"input must have 1 to {settings.messages} items", param="input")
    format = (body.text or {}).get("format")
    if format is not None and not isinstance(format, dict):
        raise APIError(400, "text.format must be an object", param="text")
    if format and format.get("type") == "json_schema":
        format = {"type": "json_schema", "json_schema": format}
    body.check_size(settings.schema_bytes, body.tools, format)
    forms = {name: getattr(body, name) for name in StructuredFields.model_fields}
    forms["response_format"] = format or body.response_format
    return ChatCompletion(
        model=body.model, messages=messages, temperature=body.temperature, top_p=body.top_p,
        max_tokens=body.max_output_tokens, tools=functions.tools or None, tool_choice=_tool_choice(body, functions),
        reasoning=body.reasoning, vote=body.vote, **forms,
    )  # fmt: skip


def _tool_choice(body: ResponsesRequest, functions: Functions) -> str | dict[str, Any] | None:
    choice = body.tool_choice
    if isinstance(choice, dict) and choice.get("type") == "function" and "namespace" in choice:
        return {"type": "function", "name": functions.offered(choice["namespace"], choice.get("name"))}
    return choice


async def _events(
    request: Request, body: ResponsesRequest, chat: ChatCompletion, functions: Functions
) -> AsyncGenerator[Event, None]:
    service = service_of(request)
    async with service.lease(body.model) as lease:
        generation = await open_chat(request, chat, lease)
        usage, writer, finish = Usage(), ResponseEvents(body, functions), "stop"
        vote: dict[str, Any] = {}
        async with generate(service, lease, generation, usage) as deltas:
            for kind in ("response.created", "response.in_progress"):
                yield writer.event(kind, response=writer.response("in_progress"))
            async for delta in deltas:
                if delta.vote:
                    vote = {"vote": delta.vote}
                    if not delta.finish_reason:  # a sample has ended
                        yield writer.event("response.in_progress", response=writer.response("in_progress", **vote))
                for event in writer.write(delta):
                    yield event
                finish = delta.finish_reason or finish
        for event in [*([] if writer.open else writer.text("")), *writer.close()]:
            yield event
        short = finish == "length"
        status = "incomplete" if short else "completed"
        done = writer.response(
            status, completed_at=int(time.time()), usage=_usage(usage),
            incomplete_details={"reason": "max_output_tokens"} if short else None, **vote,
        )  # fmt: skip
        if body.store is not False:
            items = [*input_items(body.input), *done["output"]]
            store_of(request).put(StoredResponse(done, items, tenant_of(request)))
        yield writer.event(f"response.{status}", response=done)


def _usage(usage: Usage) -> dict[str, Any]:
    return {
        "input_tokens": usage.prompt_tokens,
        "input_tokens_details": {"cached_tokens": usage.cached_tokens, "cache_write_tokens": 0},
        "output_tokens": usage.completion_tokens,
        "output_tokens_details": {"reasoning_tokens": usage.reasoning_tokens},
        "total_tokens": usage.prompt_tokens + usage.completion_tokens,
    }  # fmt: skip
