"""/v1/messages and /v1/messages/count_tokens, as Claude Code and Anthropic's SDKs use them."""

from __future__ import annotations

from collections.abc import AsyncGenerator
from typing import Any

from starlette.requests import Request
from starlette.responses import Response

from tiercel.serve.anthropic.events import Event, MessageWriter, usage_fields
from tiercel.serve.anthropic.input import Conversation
from tiercel.serve.anthropic.schemas import CountTokens, Messages
from tiercel.serve.body import aside, ignore, read
from tiercel.serve.defaults import default_params, tenant_of
from tiercel.serve.errors import APIError
from tiercel.serve.generation import generate
from tiercel.serve.models import Lease
from tiercel.serve.prompt import PromptOptions, count_chat, prepare
from tiercel.serve.service import service_of
from tiercel.serve.settings import Settings
from tiercel.serve.stream import JSONResponse, NamedEventSourceResponse
from tiercel.serve.types import GenerationRequest, Usage


class MessageStream(NamedEventSourceResponse):
    """The events of a message."""

    ping = b'event: ping\ndata: {"type":"ping"}\n\n'


async def messages(request: Request) -> Response:
    """Answer a conversation."""
    body = await read(request, Messages)
    conversation = await _conversation(request, body, service_of(request).settings)
    if body.stream:
        return MessageStream(request, _events(request, body, conversation))

    async def whole() -> dict[str, Any]:
        found: dict[str, Any] = {}
        async for event in _events(request, body, conversation):
            found = event.get("message", found)
        return found

    return JSONResponse(request, whole)


async def count_tokens(request: Request) -> Response:
    """How many tokens a conversation has."""
    body = await read(request, CountTokens)
    conversation = await _conversation(request, body, service_of(request).settings)

    async def count() -> dict[str, Any]:
        async with service_of(request).lease(body.model) as lease:
            options = _options(body, conversation)
            number = await aside(request, count_chat, lease, conversation.prompt(lease), options)
        return {"input_tokens": number}

    return JSONResponse(request, count)


async def _conversation(request: Request, body: CountTokens, settings: Settings) -> Conversation:
    if len(body.messages) > settings.messages:
        raise APIError(400, f"a conversation may have {settings.messages} messages", param="messages")
    form = body.output_config.format if body.output_config else None
    body.check_size(settings.schema_bytes, body.tools, body.output_format, form)
    conversation = await aside(request, Conversation, body)
    ignore(request, conversation.ignored)
    return conversation


def _options(body: CountTokens, conversation: Conversation) -> PromptOptions:
    return PromptOptions(
        tools=conversation.tools or None,
        forced=conversation.forced,
        think=body.think,
        structured=body.structured(),
        continue_final=conversation.continues,
    )


async def _open(request: Request, body: Messages, conversation: Conversation, lease: Lease) -> GenerationRequest:
    fields = default_params(lease, {}) | body.sampling_fields()
    options = _options(body, conversation)
    generation = await aside(request, prepare, lease, conversation.prompt(lease), fields, options)
    generation.tenant = tenant_of(request)
    return generation


async def _events(request: Request, body: Messages, conversation: Conversation) -> AsyncGenerator[Event, None]:
    """The events of a stream; the last one, which is not Anthropic's own, also has the whole message."""
    service = service_of(request)
    async with service.lease(body.model) as lease:
        generation = await _open(request, body, conversation, lease)
        usage, writer, started = Usage(), MessageWriter(body.model), False
        async with generate(service, lease, generation, usage) as deltas:
            async for delta in deltas:
                if not started:
                    started = True
                    yield {"type": "message_start", "message": writer.message(usage, done=False)}
                for event in writer.write(delta):
                    yield event
        for event in writer.finish():
            yield event
        stop = {"stop_reason": writer.stop_reason, "stop_sequence": writer.stop_sequence}
        yield {"type": "message_delta", "delta": stop, "usage": usage_fields(usage)}
        yield {"type": "message_stop"} | ({} if body.stream else {"message": writer.message(usage)})
