"""/api/generate and /api/chat.   (docs/api.md of Ollama)

Every streamed line is one JSON object, durations are whole nanoseconds, times RFC 3339.
"""

from __future__ import annotations

import time
from collections.abc import AsyncGenerator
from typing import TYPE_CHECKING, Any

from starlette.requests import Request
from starlette.responses import Response

from tiercel.serve.body import aside, ignore, read
from tiercel.serve.capabilities import can_reason, template_text
from tiercel.serve.defaults import default_params, tenant_of
from tiercel.serve.errors import APIError
from tiercel.serve.generation import generate as run
from tiercel.serve.logprobs import likeliest, token_entry
from tiercel.serve.models import Lease
from tiercel.serve.names import keep_alive_seconds, timestamp
from tiercel.serve.ollama.options import options_to_params
from tiercel.serve.ollama.schemas import Chat, Generate, OllamaRequest
from tiercel.serve.ollama.writers import ChatWriter, GenerateWriter, ResponseWriter, WholeCalls
from tiercel.serve.prompt import PromptOptions, prepare
from tiercel.serve.service import service_of
from tiercel.serve.settings import Settings
from tiercel.serve.stream import JSONResponse, NDJSONResponse
from tiercel.serve.types import GenerationRequest, OutputDelta, Usage

if TYPE_CHECKING:
    from tiercel.tokenizer.tokenizer import Tokenizer

DEFAULT_PARAMS = {"temperature": 0.8, "top_p": 0.9, "top_k": 40}  # Ollama's own
MAX_TOP_LOGPROBS = 20


async def generate(request: Request) -> Response:
    """Answer a prompt; without one, load or unload the model."""
    body = await read(request, Generate)
    if body.images:
        raise APIError(400, f'"{body.model}" does not support images')
    if body.suffix:
        raise APIError(400, f'"{body.model}" does not support insert')
    if body.raw and (body.template or body.system or body.context):
        raise APIError(400, "raw mode does not support template, system, or context")
    if body.template:
        raise APIError(400, "a template comes with a model (tiercel create), not with a request")
    _check(body, service_of(request).settings)
    if not body.prompt:
        return _load(request, body, {"response": ""})
    return _respond(request, body, GenerateWriter(body))


async def chat(request: Request) -> Response:
    """Answer a conversation; without one, load or unload the model."""
    body = await read(request, Chat)
    settings = service_of(request).settings
    _check(body, settings)
    if len(body.messages or ()) > settings.messages:
        raise APIError(400, f"a conversation may have {settings.messages} messages")
    if any(message.images for message in body.messages or ()):
        raise APIError(400, f'"{body.model}" does not support images')
    for tool in body.tools or ():
        if not isinstance(tool.get("function"), dict) or not isinstance(tool["function"].get("name"), str):
            raise APIError(400, "tools: each needs a function with a name")
    if not body.messages:
        return _load(request, body, {"message": {"role": "assistant", "content": ""}})
    return _respond(request, body, ChatWriter(body))


def _check(body: OllamaRequest, settings: Settings) -> None:
    body.check_size(settings.schema_bytes, body.format, getattr(body, "tools", None))
    if not body.model.strip():
        raise APIError(400, "model is required")
    if body.top_logprobs is not None and not 0 <= body.top_logprobs <= MAX_TOP_LOGPROBS:
        raise APIError(400, f"top_logprobs must be between 0 and {MAX_TOP_LOGPROBS}")
    keep_alive_seconds(body.keep_alive)
    structured_of(body)


def _load(request: Request, body: OllamaRequest, empty: dict[str, Any]) -> Response:
    """No prompt: bring the model into memory, or out of it."""
    models = service_of(request).models

    async def load() -> dict[str, Any]:
        keep_alive = keep_alive_seconds(body.keep_alive)
        if keep_alive == 0:
            models.find(body.model)
            await models.unload(body.model)
        else:
            lease = await models.lease(body.model)
            lease.release(keep_alive)
        return {"model": body.model, "created_at": timestamp(time.time()), **empty, "done": True,
                "done_reason": "unload" if keep_alive == 0 else "load"}  # fmt: skip

    return JSONResponse(request, load)


def _respond(request: Request, body: OllamaRequest, writer: ResponseWriter[Any]) -> Response:
    if body.stream is not False:
        return NDJSONResponse(request, _lines(request, body, writer))
    return JSONResponse(request, lambda: _whole(request, body, writer))


async def _lines(
    request: Request, body: OllamaRequest, writer: ResponseWriter[Any]
) -> AsyncGenerator[dict[str, Any], None]:
    async for line, _ in _events(request, body, writer):
        yield line


async def _whole(request: Request, body: OllamaRequest, writer: ResponseWriter[Any]) -> dict[str, Any]:
    """The lines as one: text, reasoning, calls and logprobs of all, everything else from the last."""
    joined, last, logprobs = OutputDelta(), {}, []
    async for line, delta in _events(request, body, writer):
        joined.text += delta.text
        joined.reasoning += delta.reasoning
        joined.tool_calls += delta.tool_calls
        logprobs += line.get("logprobs", ())
        last = line
    return last | writer.message(joined) | ({"logprobs": logprobs} if logprobs else {})


async def _events(
    request: Request, body: OllamaRequest, writer: ResponseWriter[Any]
) -> AsyncGenerator[tuple[dict[str, Any], OutputDelta], None]:
    """Each line without its text, and the delta that has it."""
    service = service_of(request)
    started = time.perf_counter()
    async with service.lease(body.model, keep_alive_seconds(body.keep_alive)) as lease:
        generation = await _open(request, body, writer, lease)
        usage, calls = Usage(), WholeCalls()
        token_ids: list[int] = []
        async with run(service, lease, generation, usage) as deltas:
            async for delta in deltas:
                token_ids += delta.token_ids
                delta.tool_calls = calls.complete(delta)
                if delta.empty:
                    continue
                line: dict[str, Any] = {"model": body.model, "created_at": timestamp(time.time()),
                                        **writer.message(delta), "done": False}  # fmt: skip
                if delta.logprobs:
                    line["logprobs"] = _logprobs(lease.loaded.model.tokenizer, delta, body.top_logprobs or 0)
                if delta.vote:
                    line["vote"] = delta.vote
                if delta.finish_reason is not None:
                    reason = "length" if delta.finish_reason == "length" else "stop"
                    line |= {"done": True, "done_reason": reason} | writer.last(generation, token_ids)
                    line |= _durations(usage, started, lease.load_seconds)
                yield line, delta


async def _open(request: Request, body: OllamaRequest, writer: ResponseWriter[Any], lease: Lease) -> GenerationRequest:
    """The request for the engine, prepared in a thread.  Raises APIError 400, RequestError."""
    options = {**(lease.served.extras.get("parameters") or {}), **(body.options or {})}
    params, ignored = options_to_params(options)
    ignore(request, ignored)
    if body.logprobs:
        params["logprobs"] = body.top_logprobs or 0
    if body.think and not can_reason(template_text(lease.loaded.model.tokenizer)):
        raise APIError(400, f'"{body.model}" does not support thinking')
    wanted = PromptOptions(
        tools=writer.tools,
        think=None if body.think == "" else body.think,
        structured=structured_of(body),
        continue_final=writer.continues,
        context=options.get("num_ctx"),
        vote=body.vote.settings(service_of(request).settings) if body.vote is not None else None,
    )
    fields = default_params(lease, DEFAULT_PARAMS) | params
    generation = await aside(request, lambda: prepare(lease, writer.prompt(lease), fields, wanted))
    generation.tenant = tenant_of(request)
    writer.finish(generation)
    return generation


def structured_of(body: OllamaRequest) -> dict[str, Any] | None:
    """`format`, which is "json", a schema, or nothing → keywords of `Structured`.  Raises APIError 400."""
    form, value = body.structured(), body.format
    if value in (None, ""):
        return form
    if form is not None:
        raise APIError(400, "an answer has one form: leave out format, or the other field that gives one")
    if value == "json":
        return {"json_object": True}
    if isinstance(value, dict):
        return {"json": value}
    raise APIError(400, f'format must be "json" or a JSON schema, not {value[:40]!r}')


def _logprobs(tokenizer: Tokenizer | None, delta: OutputDelta, top: int) -> list[dict[str, Any]]:
    out = []
    for token, entries in delta.logprobs:
        entry = token_entry(tokenizer, token, entries[token].logprob)
        if top:
            best = likeliest(entries, top)
            entry["top_logprobs"] = [token_entry(tokenizer, id, logprob.logprob) for id, logprob in best]
        out.append(entry)
    return out


def _durations(usage: Usage, started: float, load_seconds: float) -> dict[str, int]:
    """prompt_eval_count is the whole prompt, cached or not: clients take it for the context's length."""
    return {
        "total_duration": nanoseconds(time.perf_counter() - started), "load_duration": nanoseconds(load_seconds),
        "prompt_eval_count": usage.prompt_tokens, "prompt_eval_duration": nanoseconds(usage.prefill_seconds),
        "eval_count": usage.completion_tokens, "eval_duration": nanoseconds(usage.decode_seconds),
        "cached_tokens": usage.cached_tokens,
    }  # fmt: skip


def nanoseconds(seconds: float) -> int:
    """A duration as this dialect writes it."""
    return max(int(seconds * 1e9), 0)
