"""/v1/chat/completions.

Reasoning comes as `reasoning_content`.  Sampling defaults: the checkpoint's own where it has some, else OpenAI's.
"""

from __future__ import annotations

import re
from collections.abc import AsyncGenerator, Callable
from typing import TYPE_CHECKING, Any

from starlette.requests import Request
from starlette.responses import Response

from tiercel.serve.body import aside, ignore, read
from tiercel.serve.capabilities import template_text
from tiercel.serve.defaults import default_params, tenant_of
from tiercel.serve.errors import APIError
from tiercel.serve.generation import collect, generate
from tiercel.serve.models import Lease
from tiercel.serve.openai.formats import call_delta, chat_logprobs, head, timings, usage_fields
from tiercel.serve.openai.messages import template_messages
from tiercel.serve.openai.schemas import ChatCompletion, Reasoning, Sampled
from tiercel.serve.openai.tools import hosted_tools, tools_of
from tiercel.serve.prompt import REASONING_TOKENS, PromptOptions, prepare
from tiercel.serve.service import service_of
from tiercel.serve.settings import Settings
from tiercel.serve.stream import EventSourceResponse, JSONResponse
from tiercel.serve.types import GenerationRequest, Message, OutputDelta, Prompt, Think, Usage

if TYPE_CHECKING:
    from tiercel.tokenizer.tokenizer import Tokenizer

MAX_TOP_LOGPROBS = 20
MAX_TEMPLATE_VARIABLES = 64
SWITCHES = ("enable_thinking", "thinking")  # what templates call the switch of reasoning
RESERVED_VARIABLES = ("messages", "tools", "documents", "add_generation_prompt", "bos_token", "eos_token", "pad_token",
                      "unk_token", "self", "continue_final")  # fmt: skip


async def chat_completions(request: Request) -> Response:
    """Answer a conversation."""
    body = await read(request, ChatCompletion)
    check_chat(body, service_of(request).settings)
    ignore(request, hosted_tools(body))
    if body.stream:
        return EventSourceResponse(request, _events(request, body))
    return JSONResponse(request, lambda: _complete(request, body))


def check_chat(body: ChatCompletion, settings: Settings) -> None:
    """Raise APIError 400 for what no model can answer."""
    if not body.messages:
        raise APIError(400, "messages must have at least one message", param="messages")
    if len(body.messages) > settings.messages:
        raise APIError(400, f"a conversation may have {settings.messages} messages", param="messages")
    if body.audio or any(kind != "text" for kind in body.modalities or ()):
        raise APIError(400, "only text can be made", param="modalities")
    if body.top_logprobs is not None and not body.logprobs:
        raise APIError(400, "top_logprobs needs logprobs: true", param="top_logprobs")
    if body.top_logprobs is not None and not 0 <= body.top_logprobs <= MAX_TOP_LOGPROBS:
        raise APIError(400, f"top_logprobs must be between 0 and {MAX_TOP_LOGPROBS}", param="top_logprobs")
    body.check_size(settings.schema_bytes, body.tools)


async def open_prompt(
    request: Request, body: Sampled, prompt: Prompt, lease: Lease, options: PromptOptions | None = None
) -> GenerationRequest:
    """The request of one prompt, prepared in a thread."""
    return await _prepared(request, body, lease, lambda: (prompt, options))


async def _prepared(
    request: Request, body: Sampled, lease: Lease, read: Callable[[], tuple[Prompt, PromptOptions | None]]
) -> GenerationRequest:
    def make() -> GenerationRequest:
        prompt, options = read()
        return prepare(lease, prompt, default_params(lease, {}) | body.sampling_fields(), options)

    generation = await aside(request, make)
    generation.tenant = tenant_of(request, body.cache_salt)
    return generation


async def open_chat(request: Request, body: ChatCompletion, lease: Lease) -> GenerationRequest:
    """The request of a conversation.  Raises APIError 400, RequestError."""
    return await _prepared(request, body, lease, lambda: chat_prompt(request, body, lease))


def chat_prompt(request: Request, body: ChatCompletion, lease: Lease) -> tuple[list[Message], PromptOptions]:
    """What the model reads, and what is wanted of its answer.  Raises APIError 400."""
    switch, variables = _template_switches(body, lease, request)
    messages = template_messages(body.messages)
    system = lease.served.extras.get("system")
    if system and messages[0]["role"] != "system":
        messages = [{"role": "system", "content": system}, *messages]
    tools = tools_of(body)
    if body.tool_choice == "required" and not tools:
        raise APIError(400, "tool_choice: a call needs tools", param="tool_choice")
    return messages, PromptOptions(
        tools=tools,
        forced=tools is not None and body.tool_choice not in (None, "auto"),
        think=_think(body) if switch is None else switch,
        structured=body.structured(),
        template=variables,
        continue_final=bool(body.continue_final_message),
        add_generation_prompt=body.add_generation_prompt is not False,
        vote=body.vote.settings(service_of(request).settings) if body.vote is not None else None,
    )


def _think(body: ChatCompletion) -> Think:
    reasoning = body.reasoning or Reasoning()
    effort = body.reasoning_effort or reasoning.effort
    if effort is not None and effort != "none" and effort not in REASONING_TOKENS:
        efforts = ", ".join(REASONING_TOKENS)
        raise APIError(400, f"reasoning effort must be none or one of {efforts}", param="reasoning")
    return effort != "none" and (effort or reasoning.enabled)


def _template_switches(body: ChatCompletion, lease: Lease, request: Request) -> tuple[bool | None, dict[str, Any]]:
    """`chat_template_kwargs`: whether to reason, and the other variables that the template names.

    Those that it does not name are ignored, and named in the header.  Raises APIError 400.
    """
    wanted = body.chat_template_kwargs or {}
    template = template_text(lease.loaded.model.tokenizer)
    switches = {name: wanted[name] for name in SWITCHES if wanted.get(name) is not None}
    problem = ""
    if len(wanted) > MAX_TEMPLATE_VARIABLES:
        problem = f"{MAX_TEMPLATE_VARIABLES} names at most"
    elif any(not isinstance(value, bool) for value in switches.values()):
        problem = f"{' and '.join(switches)} must be true or false"
    elif len(set(switches.values())) > 1:
        problem = f"{' and '.join(switches)} contradict each other; leave one of them out"
    variables: dict[str, Any] = {}
    for name, value in wanted.items() if not problem else ():
        written = str(value)
        if name in RESERVED_VARIABLES or "{{" in written or "{%" in written:
            problem = f"{name[:40]!r} cannot be set to {written[:40]!r}"
        elif re.search(rf"\b{re.escape(name)}\b", template):
            variables[name] = value
        elif name not in SWITCHES:
            ignore(request, [f"chat_template_kwargs.{name}"])
    if problem:
        raise APIError(400, f"chat_template_kwargs: {problem}", param="chat_template_kwargs")
    return next(iter(switches.values()), None), variables


async def _complete(request: Request, body: ChatCompletion) -> dict[str, Any]:
    service = service_of(request)
    async with service.lease(body.model) as lease:
        generation = await open_chat(request, body, lease)
        usage = Usage()
        async with generate(service, lease, generation, usage) as deltas:
            outputs = await collect(deltas, generation.params.n)
        choices = [_choice(output, lease.loaded.model.tokenizer, body) for output in outputs]
    response = head("chatcmpl", "chat.completion", body.model) | {
        "choices": choices, "usage": usage_fields(usage), "timings": timings(usage),
    }  # fmt: skip
    return response | ({"vote": outputs[0].vote} if generation.vote is not None else {})


def _choice(output: OutputDelta, tokenizer: Tokenizer | None, body: ChatCompletion) -> dict[str, Any]:
    message: dict[str, Any] = {"role": "assistant", "content": output.text or (None if output.tool_calls else ""),
                               "refusal": None}  # fmt: skip
    if output.reasoning:
        message["reasoning_content"] = output.reasoning
    if output.tool_calls:
        message["tool_calls"] = [
            {"id": call.id, "type": "function", "function": {"name": call.name, "arguments": call.arguments}}
            for call in output.tool_calls
        ]
    logprobs = chat_logprobs(tokenizer, output, body.top_logprobs or 0) if body.logprobs else None
    return {"index": output.index, "message": message, "finish_reason": output.finish_reason, "logprobs": logprobs}


async def _events(request: Request, body: ChatCompletion) -> AsyncGenerator[dict[str, Any] | str, None]:
    service = service_of(request)
    async with service.lease(body.model) as lease:
        generation = await open_chat(request, body, lease)
        usage, begin = Usage(), head("chatcmpl", "chat.completion.chunk", body.model)
        extra = {"usage": None} if body.includes_usage else {}

        def chunk(index: int, delta: dict[str, Any], finish: str | None = None, logprobs: Any = None) -> dict[str, Any]:
            choice = {"index": index, "delta": delta, "finish_reason": finish, "logprobs": logprobs}
            return begin | {"choices": [choice]} | extra

        started: set[int] = set()
        async with generate(service, lease, generation, usage) as deltas:
            async for delta in deltas:
                if delta.index not in started:
                    started.add(delta.index)
                    yield chunk(delta.index, {"role": "assistant", "content": ""})
                if delta.reasoning:
                    yield chunk(delta.index, {"reasoning_content": delta.reasoning})
                logprobs = None
                if delta.logprobs:
                    logprobs = chat_logprobs(lease.loaded.model.tokenizer, delta, body.top_logprobs or 0)
                if delta.text or logprobs:
                    yield chunk(delta.index, {"content": delta.text}, logprobs=logprobs)
                for call in delta.tool_calls:
                    yield chunk(delta.index, {"tool_calls": [call_delta(call)]})
                if delta.finish_reason is not None or delta.vote:
                    vote = {"vote": delta.vote} if delta.vote else {}
                    yield chunk(delta.index, {}, delta.finish_reason) | vote
        if body.includes_usage:
            yield begin | {"choices": [], "usage": usage_fields(usage), "timings": timings(usage)}
        yield "[DONE]"
