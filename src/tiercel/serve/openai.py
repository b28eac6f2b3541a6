"""OpenAI's API: /v1/chat/completions, completions, embeddings, models.   (Responses: responses.py)

Fields that would change the answer and cannot be served are refused (images, audio, suffix, a model's own voice);
fields about accounts and storage (user, metadata, store, service_tier, …) are taken and do nothing.
Thoughts come as `reasoning_content`.  Sampling defaults: the checkpoint's own where it names some, else OpenAI's.
"""

from __future__ import annotations

import asyncio
import base64
import contextlib
import json
import secrets
import struct
import time
from collections.abc import AsyncGenerator
from dataclasses import dataclass, field
from typing import TYPE_CHECKING, Any, Literal

from pydantic import Field
from starlette.requests import Request
from starlette.responses import Response

from tiercel.serve import generation as talk
from tiercel.serve.embed import embed, normalized
from tiercel.serve.errors import APIError
from tiercel.serve.generation import GenerationRequest, OutputDelta, Think, Usage
from tiercel.serve.models import Lease
from tiercel.serve.ollama import tagged
from tiercel.serve.requests import Body, VoteField, read
from tiercel.serve.score import score
from tiercel.serve.stream import EventSourceResponse, JSONResponse

if TYPE_CHECKING:
    from tiercel.tokenizer.tools import ToolDelta

Effort = Literal["none", "minimal", "low", "medium", "high", "xhigh", "max", "ultra"]


class StreamOptions(Body):
    include_usage: bool | None = None


class Sampled(Body):
    """What both kinds of completion take; the second half are the extensions of vLLM and llama-server."""

    model: str = Field(max_length=512, min_length=1)
    stream: bool | None = None
    stream_options: StreamOptions | None = None
    temperature: float | None = None
    top_p: float | None = None
    n: int | None = None
    stop: str | list[str] | None = None
    seed: int | None = None
    max_tokens: int | None = None
    presence_penalty: float | None = None
    frequency_penalty: float | None = None
    logit_bias: dict[str, float] | None = None
    user: str | None = None

    cache_salt: str | None = Field(default=None, max_length=256)
    top_k: int | None = None
    min_p: float | None = None
    repetition_penalty: float | None = None
    stop_token_ids: list[int] | None = None
    ignore_eos: bool | None = None
    min_tokens: int | None = None
    skip_special_tokens: bool | None = None
    include_stop_str_in_output: bool | None = None
    keep_alive: int | float | str | None = None
    cache_prompt: bool | None = None
    timings_per_token: bool | None = None


PARAMS = ("temperature", "top_p", "n", "seed", "max_tokens", "presence_penalty", "frequency_penalty", "logit_bias",
          "top_k", "min_p", "repetition_penalty", "stop_token_ids", "ignore_eos", "min_tokens", "skip_special_tokens",
          "include_stop_str_in_output")  # fmt: skip


class ChatCompletion(Sampled):
    messages: list[dict[str, Any]]
    max_completion_tokens: int | None = None
    logprobs: bool | None = None
    top_logprobs: int | None = None
    tools: list[dict[str, Any]] | None = None
    tool_choice: str | dict[str, Any] | None = None
    parallel_tool_calls: bool | None = None
    response_format: dict[str, Any] | None = None
    structured_outputs: dict[str, Any] | None = None
    reasoning_effort: Effort | None = None
    reasoning: dict[str, Any] | None = None
    thinking_token_budget: int | None = None
    chat_template_kwargs: dict[str, Any] | None = None
    add_generation_prompt: bool | None = None
    continue_final_message: bool | None = None
    modalities: list[str] | None = None
    audio: Any = None
    prediction: Any = None
    store: bool | None = None
    metadata: Any = None
    service_tier: str | None = None
    verbosity: str | None = None
    vote: VoteField | None = None  # ours
    prompt_cache_key: str | None = None


class Completion(Sampled):
    prompt: str | list[str] | list[int] | list[list[int]]
    best_of: int | None = None
    echo: bool | None = None
    logprobs: int | None = None
    suffix: str | None = None


class EmbeddingsRequest(Body):
    model: str = Field(max_length=512, min_length=1)
    input: str | list[str] | list[int] | list[list[int]]
    dimensions: int | None = Field(default=None, ge=1, le=1 << 20)
    encoding_format: str | None = None
    user: str | None = None


# ── chat


async def chat_completions(request: Request) -> Response:
    body = await read(request, ChatCompletion)
    check_chat(body, request.app.state.settings)
    if body.stream:
        return EventSourceResponse(request, _chat_events(request, body))

    async def make() -> dict[str, Any]:
        return await _chat(request, body)

    return JSONResponse(request, make)


def check_chat(body: ChatCompletion, settings: Any) -> None:
    if not body.messages:
        raise APIError(400, "messages must have at least one message", param="messages")
    if len(body.messages) > settings.messages:
        raise APIError(400, f"a conversation may have {settings.messages} messages", param="messages")
    if body.audio or any(kind != "text" for kind in body.modalities or ()):
        raise APIError(400, "only text can be made", param="modalities")
    if body.top_logprobs is not None and not body.logprobs:
        raise APIError(400, "top_logprobs needs logprobs: true", param="top_logprobs")
    if body.top_logprobs is not None and not 0 <= body.top_logprobs <= 20:
        raise APIError(400, "top_logprobs must be between 0 and 20", param="top_logprobs")
    talk.check_schema([body.tools, body.response_format, body.structured_outputs], settings.schema_bytes)


async def _open(
    request: Request, body: Sampled, prompt: Any, given: dict[str, Any], lease: Lease, **more: Any
) -> GenerationRequest:
    """The Ask of one prompt, made in a thread."""
    merged = talk.base_params(lease, ollama=False) | given
    ask = await asyncio.to_thread(talk.prepare, lease, prompt, merged, **more)
    ask.tenant = talk.tenant(request, body.cache_salt)
    return ask


def params_given(body: Sampled) -> dict[str, Any]:
    given = {name: getattr(body, name) for name in PARAMS if getattr(body, name) is not None}
    if body.stop:
        given["stop"] = body.stop
    return given


def chat_given(body: ChatCompletion) -> dict[str, Any]:
    given = params_given(body)
    if body.max_completion_tokens is not None:
        given["max_tokens"] = body.max_completion_tokens
    if body.logprobs:
        given["logprobs"] = body.top_logprobs or 0
    if body.thinking_token_budget is not None:
        given["thinking_budget"] = body.thinking_token_budget
    return given


def think_of(body: ChatCompletion) -> Think:
    effort = body.reasoning_effort or (body.reasoning or {}).get("effort")
    if effort is not None and effort != "none" and effort not in talk.EFFORTS:
        raise APIError(400, f"reasoning effort must be none or one of {', '.join(talk.EFFORTS)}", param="reasoning")
    return False if effort == "none" else effort


def template_kwargs(body: ChatCompletion) -> dict[str, Any]:
    """Only switches that templates document; a client does not feed the template what it likes."""
    found = body.chat_template_kwargs or {}
    for name, value in found.items():
        if name not in ("enable_thinking", "thinking") or not isinstance(value, bool):
            raise APIError(400, f"chat_template_kwargs takes enable_thinking: true or false, not {name[:40]!r}",
                          param="chat_template_kwargs")  # fmt: skip
    return {"enable_thinking": next(iter(found.values()))} if found else {}


def structured_of(format: dict[str, Any] | None, direct: dict[str, Any] | None) -> dict[str, Any] | None:
    """`response_format` of OpenAI or `structured_outputs` of vLLM → what SamplingParams.structured is made of."""
    if direct:
        kinds = {
            name: direct[name] for name in ("json", "regex", "grammar", "choice", "json_object") if direct.get(name)
        }
        if len(kinds) != 1:
            raise APIError(400, "structured_outputs takes one of json, regex, grammar, choice, json_object")
        return kinds
    kind = (format or {"type": "text"}).get("type")
    if kind == "text":
        return None
    if kind == "json_object":
        return {"json_object": True}
    schema = ((format or {}).get("json_schema") or {}) if kind == "json_schema" else None
    if not isinstance(schema, dict) or not isinstance(schema.get("schema"), dict):
        raise APIError(400, "response_format must be text, json_object or json_schema with a schema",
                      param="response_format")  # fmt: skip
    return {"json": schema["schema"]}


def tools_of(body: Any) -> list[dict[str, Any]] | None:
    """The tools the template gets; tool_choice "none" leaves them out, a single name keeps that one."""
    for tool in body.tools or ():
        function = tool.get("function")
        if tool.get("type", "function") != "function" or not isinstance(function, dict):
            raise APIError(400, "tools: only functions can be called", param="tools")
        if not isinstance(function.get("name"), str) or not 0 < len(function["name"]) <= 256:
            raise APIError(400, "tools: each function needs a name", param="tools")
    choice = body.tool_choice
    if choice in (None, "auto") or not body.tools:
        return body.tools or None
    if choice == "none":
        return None
    name = forced_tool(choice)
    kept = [tool for tool in body.tools if name is None or tool["function"]["name"] == name]
    if not kept:
        raise APIError(400, f"tool_choice: no tool of this request is named {name!r}", param="tool_choice")
    return kept


def forced_tool(choice: Any) -> str | None:
    """Of a `tool_choice` that asks for a call: the name of the function, None for any.  Raises Refusal."""
    if choice == "required":
        return None
    if isinstance(choice, dict) and choice.get("type") == "function":
        name = (choice.get("function") or choice).get("name") if isinstance(choice.get("function", {}), dict) else None
        if isinstance(name, str) and name:
            return name
    raise APIError(400, "tool_choice must be none, auto, required, or a function's name as "
                  '{"type": "function", "function": {"name": …}}', param="tool_choice")  # fmt: skip


def template_messages(messages: list[dict[str, Any]]) -> list[dict[str, Any]]:
    """OpenAI's messages as templates read them: content a string, arguments an object, developer is system."""
    return [_template_message(number, message) for number, message in enumerate(messages)]


def _template_message(number: int, message: dict[str, Any]) -> dict[str, Any]:
    role = message.get("role")
    if not isinstance(role, str):
        raise APIError(400, f"messages.{number}.role is required", param="messages")
    role = {"developer": "system", "function": "tool"}.get(role, role)
    found: dict[str, Any] = {"role": role, "content": _text_of(number, message.get("content"))}
    for name in ("reasoning_content", "reasoning"):
        if isinstance(message.get(name), str):
            found["thinking"] = message[name]
    for name in ("name", "tool_call_id"):
        if message.get(name) is not None:
            found[name] = str(message[name])
    if calls := message.get("tool_calls"):
        if not isinstance(calls, list):
            raise APIError(400, f"messages.{number}.tool_calls must be a list", param="messages")
        found["tool_calls"] = [_template_call(number, call) for call in calls]
    return found


def _text_of(number: int, content: Any) -> str:
    if content is None:
        return ""
    if isinstance(content, str):
        return content
    if isinstance(content, list):
        texts = []
        for part in content:
            kind = part.get("type") if isinstance(part, dict) else None
            if kind not in ("text", "input_text", "output_text", "refusal"):
                raise APIError(400, f"messages.{number}.content: only text is read here", param="messages")
            text = part.get("text", part.get("refusal"))
            if not isinstance(text, str):
                raise APIError(400, f"messages.{number}.content: a text part needs text", param="messages")
            texts.append(text)
        return "".join(texts)
    raise APIError(400, f"messages.{number}.content must be a string or a list of parts", param="messages")


def _template_call(number: int, call: Any) -> dict[str, Any]:
    function = call.get("function") if isinstance(call, dict) else None
    if not isinstance(function, dict) or not isinstance(function.get("name"), str):
        raise APIError(400, f"messages.{number}.tool_calls: each needs a function with a name", param="messages")
    arguments: Any = function.get("arguments", {})
    if isinstance(arguments, str):
        with contextlib.suppress(ValueError, RecursionError):  # else as the model wrote it
            arguments = json.loads(arguments or "{}")
    return {"id": str(call.get("id", "")), "type": "function",
            "function": {"name": function["name"], "arguments": arguments}}  # fmt: skip


async def open_chat(request: Request, body: ChatCompletion, lease: Lease) -> GenerationRequest:
    think, more = think_of(body), template_kwargs(body)
    messages = template_messages(body.messages)
    system = lease.named.extras.get("system")
    if system and messages[0]["role"] != "system":
        messages = [{"role": "system", "content": system}, *messages]
    tools = tools_of(body)
    forced = tools is not None and body.tool_choice not in (None, "auto")
    if body.tool_choice == "required" and not tools:
        raise APIError(400, "tool_choice: a call needs tools", param="tool_choice")
    return await _open(
        request, body, messages, chat_given(body), lease,
        tools=tools, forced=forced, think=more.pop("enable_thinking", think),
        structured=structured_of(body.response_format, body.structured_outputs),
        continue_final=bool(body.continue_final_message),
        vote=body.vote.settings(request.app.state.settings) if body.vote is not None else None,
    )  # fmt: skip


async def _chat(request: Request, body: ChatCompletion) -> dict[str, Any]:
    service = request.app.state.service
    async with service.lease(body.model) as lease:
        ask = await open_chat(request, body, lease)
        counts = Usage()
        async with talk.answer(service, lease, ask, counts) as parts:
            done = await talk.whole(parts, ask.params.n)
        tokenizer = lease.loaded.model.tokenizer
        choices = [_choice(part, tokenizer, body) for part in done]
    return _head("chatcmpl", "chat.completion", body.model) | {
        "choices": choices, "usage": usage(counts), "timings": timings(counts),
    } | ({"vote": done[0].vote} if ask.vote is not None else {})  # fmt: skip


def _choice(part: OutputDelta, tokenizer: Any, body: ChatCompletion) -> dict[str, Any]:
    message: dict[str, Any] = {"role": "assistant", "content": part.text or (None if part.calls else ""),
                               "refusal": None}  # fmt: skip
    if part.thinking:
        message["reasoning_content"] = part.thinking
    if part.calls:
        message["tool_calls"] = [
            {"id": call.id, "type": "function", "function": {"name": call.name, "arguments": call.arguments}}
            for call in part.calls
        ]
    return {"index": part.choice, "message": message, "finish_reason": part.finish,
            "logprobs": chat_logprobs(tokenizer, part, body.top_logprobs or 0) if body.logprobs else None}  # fmt: skip


async def _chat_events(request: Request, body: ChatCompletion) -> AsyncGenerator[Any, None]:
    service = request.app.state.service
    async with service.lease(body.model) as lease:
        ask = await open_chat(request, body, lease)
        counts, head = Usage(), _head("chatcmpl", "chat.completion.chunk", body.model)
        wants_usage = body.stream_options is not None and bool(body.stream_options.include_usage)
        extra = {"usage": None} if wants_usage else {}

        def chunk(choice: int, delta: dict[str, Any], finish: str | None = None, more: Any = None) -> Any:
            entry = {"index": choice, "delta": delta, "finish_reason": finish, "logprobs": more}
            return head | {"choices": [entry]} | extra

        begun: set[int] = set()
        async with talk.answer(service, lease, ask, counts) as parts:
            async for part in parts:
                if part.choice not in begun:
                    begun.add(part.choice)
                    yield chunk(part.choice, {"role": "assistant", "content": ""})
                if part.thinking:
                    yield chunk(part.choice, {"reasoning_content": part.thinking})
                more = (
                    chat_logprobs(lease.loaded.model.tokenizer, part, body.top_logprobs or 0) if part.logprobs else None
                )
                if part.text or more:
                    yield chunk(part.choice, {"content": part.text}, more=more)
                for call in part.calls:
                    yield chunk(part.choice, {"tool_calls": [_call_delta(call)]})
                if part.finish is not None or part.vote:
                    yield chunk(part.choice, {}, part.finish) | ({"vote": part.vote} if part.vote else {})
        if wants_usage:
            yield head | {"choices": [], "usage": usage(counts), "timings": timings(counts)}
        yield "[DONE]"


def _call_delta(call: ToolDelta) -> dict[str, Any]:
    if call.name is None:
        return {"index": call.index, "function": {"arguments": call.arguments}}
    return {"index": call.index, "id": call.id, "type": "function",
            "function": {"name": call.name, "arguments": call.arguments}}  # fmt: skip


def _head(prefix: str, object: str, model: str) -> dict[str, Any]:
    return {"id": f"{prefix}-{secrets.token_hex(12)}", "object": object, "created": int(time.time()), "model": model,
            "system_fingerprint": None}  # fmt: skip


def usage(counts: Usage) -> dict[str, Any]:
    return {
        "prompt_tokens": counts.prompt, "completion_tokens": counts.said, "total_tokens": counts.prompt + counts.said,
        "prompt_tokens_details": {"cached_tokens": counts.cached},
        "completion_tokens_details": {"reasoning_tokens": counts.reasoning},
    }  # fmt: skip


def timings(counts: Usage) -> dict[str, Any]:
    """llama-server's figures, which local users read; milliseconds."""
    read = counts.prompt - counts.cached
    return {
        "cache_n": counts.cached, "prompt_n": read, "prompt_ms": counts.prompt_s * 1e3,
        "prompt_per_second": read / counts.prompt_s if counts.prompt_s else 0.0,
        "predicted_n": counts.said, "predicted_ms": counts.said_s * 1e3,
        "predicted_per_second": counts.said / counts.said_s if counts.said_s else 0.0,
    }  # fmt: skip


def _token(tokenizer: Any, id: int, logprob: float) -> dict[str, Any]:
    raw = tokenizer.piece(id) if tokenizer is not None else b""
    return {"token": raw.decode("utf-8", "replace"), "logprob": max(logprob, -9999.0), "bytes": list(raw)}


def chat_logprobs(tokenizer: Any, part: OutputDelta, top: int) -> dict[str, Any]:
    content = []
    for token, entries in part.logprobs:
        best = sorted(entries.items(), key=lambda item: item[1].rank)[:top]
        likeliest = [_token(tokenizer, id, entry.logprob) for id, entry in best]
        content.append(_token(tokenizer, token, entries[token].logprob) | {"top_logprobs": likeliest})
    return {"content": content, "refusal": None}


# ── completions


async def completions(request: Request) -> Response:
    body = await read(request, Completion)
    n = body.n or 1
    if body.suffix:
        raise APIError(400, "suffix is not supported", param="suffix")
    if body.best_of is not None and body.best_of != n:
        raise APIError(400, "best_of is not supported beyond n", param="best_of")
    if body.logprobs is not None and not 0 <= body.logprobs <= 20:
        raise APIError(400, "logprobs must be between 0 and 20", param="logprobs")
    prompts = _prompts(body.prompt)
    if len(prompts) * n > 64:
        raise APIError(400, "prompts times n may be 64 in one request", param="prompt")
    if body.stream and len(prompts) > 1:
        raise APIError(400, "several prompts cannot be streamed", param="stream")
    if body.stream:
        return EventSourceResponse(request, _completion_events(request, body, prompts[0]))

    async def make() -> dict[str, Any]:
        return await _completions(request, body, prompts)

    return JSONResponse(request, make)


def _prompts(prompt: Any) -> list[str | list[int]]:
    if isinstance(prompt, str):
        return [prompt]
    if not prompt:
        raise APIError(400, "prompt must not be empty", param="prompt")
    return [prompt] if isinstance(prompt[0], int) else list(prompt)


def _completion_given(body: Completion) -> dict[str, Any]:
    given = {"max_tokens": 16} | params_given(body)
    if body.echo and body.max_tokens == 0:  # the prompt alone, to be scored
        given["max_tokens"] = 1
    return given | ({} if body.logprobs is None else {"logprobs": body.logprobs})


async def _completions(request: Request, body: Completion, prompts: list[str | list[int]]) -> dict[str, Any]:
    service = request.app.state.service
    n, total, choices = body.n or 1, Usage(), []
    async with service.lease(body.model) as lease:
        tokenizer = lease.loaded.model.tokenizer

        async def one(number: int, prompt: str | list[int]) -> tuple[Usage, list[dict[str, Any]]]:
            ask = await _open(request, body, prompt, _completion_given(body), lease)
            counts, echo = Usage(), await _echo(lease, body, prompt, ask)
            if body.echo and body.max_tokens == 0:
                counts.prompt, done = len(ask.ids), [OutputDelta(choice, finish="length") for choice in range(n)]
                service.metrics.answered(lease.loaded.name, counts)
            else:
                async with talk.answer(service, lease, ask, counts) as parts:
                    done = await talk.whole(parts, n)
            return counts, [_completion_choice(number * n, part, tokenizer, body, echo) for part in done]

        try:
            async with asyncio.TaskGroup() as group:
                tasks = [group.create_task(one(number, prompt)) for number, prompt in enumerate(prompts)]
        except* Exception as errors:
            raise errors.exceptions[0] from None
    for counts, found in (task.result() for task in tasks):
        choices += found
        for name in ("prompt", "cached", "said", "reasoning"):
            setattr(total, name, getattr(total, name) + getattr(counts, name))
        total.prompt_s, total.said_s = max(total.prompt_s, counts.prompt_s), max(total.said_s, counts.said_s)
    return _head("cmpl", "text_completion", body.model) | {
        "choices": choices, "usage": usage(total), "timings": timings(total),
    }  # fmt: skip


@dataclass
class Echo:
    """The prompt in front of its answer; tokens: with how likely each was, where that is asked for."""

    text: str = ""
    tokens: list[tuple[int, Any]] = field(default_factory=list)


async def _echo(lease: Lease, body: Completion, prompt: str | list[int], ask: GenerationRequest) -> Echo:
    if not body.echo:
        return Echo()
    tokenizer = lease.loaded.model.tokenizer
    words = prompt if isinstance(prompt, str) else "" if tokenizer is None else tokenizer.decode(prompt)
    return Echo(words, [] if body.logprobs is None else await score(lease, ask.ids, body.logprobs, ask.tenant))


def _completion_choice(first: int, part: OutputDelta, tokenizer: Any, body: Completion, echo: Echo) -> dict[str, Any]:
    logprobs = None
    if body.logprobs is not None:
        logprobs = _completion_logprobs(tokenizer, [*echo.tokens, *part.logprobs], body.logprobs)
    return {"text": echo.text + part.text, "index": first + part.choice, "finish_reason": part.finish,
            "stop_reason": part.stop_reason, "logprobs": logprobs}  # fmt: skip


def _completion_logprobs(tokenizer: Any, found: list[tuple[int, Any]], top: int) -> dict[str, Any]:
    tokens: list[str] = []
    values: list[float | None] = []
    best: list[dict[str, float] | None] = []
    offsets, offset = [], 0
    for token, entries in found:
        word = _token(tokenizer, token, 0.0)["token"]
        tokens.append(word)
        offsets.append(offset)
        offset += len(word)
        if entries is None:  # nothing comes before a first token
            values.append(None)
            best.append(None)
            continue
        values.append(max(entries[token].logprob, -9999.0))
        likeliest = sorted(entries.items(), key=lambda item: item[1].rank)[: max(top, 1)]
        best.append({_token(tokenizer, id, 0.0)["token"]: max(entry.logprob, -9999.0) for id, entry in likeliest})
    return {"tokens": tokens, "token_logprobs": values, "top_logprobs": best, "text_offset": offsets}


async def _completion_events(request: Request, body: Completion, prompt: str | list[int]) -> AsyncGenerator[Any, None]:
    service = request.app.state.service
    async with service.lease(body.model) as lease:
        tokenizer = lease.loaded.model.tokenizer
        ask = await _open(request, body, prompt, _completion_given(body), lease)
        counts, head = Usage(), _head("cmpl", "text_completion", body.model)
        wants_usage = body.stream_options is not None and bool(body.stream_options.include_usage)
        extra = {"usage": None} if wants_usage else {}
        echo = await _echo(lease, body, prompt, ask)
        async with talk.answer(service, lease, ask, counts) as parts:
            for choice in range(ask.params.n if body.echo else 0):
                yield head | {"choices": [_completion_choice(0, OutputDelta(choice), tokenizer, body, echo)]} | extra
            async for part in parts:
                if part.empty:
                    continue
                yield head | {"choices": [_completion_choice(0, part, tokenizer, body, Echo())]} | extra
        if wants_usage:
            yield head | {"choices": [], "usage": usage(counts), "timings": timings(counts)}
        yield "[DONE]"


# ── embeddings and models


async def embeddings(request: Request) -> Response:
    body = await read(request, EmbeddingsRequest)
    if body.encoding_format not in (None, "float", "base64"):
        raise APIError(400, "encoding_format must be float or base64", param="encoding_format")
    inputs = _prompts(body.input)

    async def make() -> dict[str, Any]:
        service = request.app.state.service
        async with service.lease(body.model) as lease:
            vectors, count = await embed(lease, inputs, service.settings, truncate=False)
        data = []
        for index, vector in enumerate(vectors):
            value: Any = normalized(vector, body.dimensions)
            if body.encoding_format == "base64":
                value = base64.b64encode(struct.pack(f"<{len(value)}f", *value)).decode()
            data.append({"object": "embedding", "index": index, "embedding": value})
        return {"object": "list", "data": data, "model": body.model,
                "usage": {"prompt_tokens": count, "total_tokens": count}}  # fmt: skip

    return JSONResponse(request, make)


def _model(named: Any, id: str | None = None) -> dict[str, Any]:
    return {"id": id or tagged(named.name), "object": "model", "created": int(named.local.modified),
            "owned_by": "library"}  # fmt: skip


async def models(request: Request) -> Response:
    async def make() -> dict[str, Any]:
        found = await asyncio.to_thread(request.app.state.service.models.all)
        return {"object": "list", "data": [_model(named) for named in found]}

    return JSONResponse(request, make)


async def model(request: Request) -> Response:
    name = request.path_params["model"]

    async def make() -> dict[str, Any]:
        return _model(await asyncio.to_thread(request.app.state.service.models.find, name), name)

    return JSONResponse(request, make)
