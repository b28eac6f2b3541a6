"""Ollama's API: /api/generate, chat, embed, and the models.   (docs/api.md of Ollama; traps in reference/ecosystem.md)

Every streamed line is one JSON object, durations are whole nanoseconds, times RFC 3339.  Deviations, all on purpose:
a prompt longer than the context is refused and never cut (`truncate` and `shift` are taken for embeddings alone);
templates come with a model and not with a request; images and `suffix` are refused.
"""

from __future__ import annotations

import asyncio
import time
from collections.abc import AsyncGenerator
from datetime import UTC, datetime, timedelta
from typing import TYPE_CHECKING, Any, Literal

from pydantic import Field
from starlette.requests import Request
from starlette.responses import Response

import tiercel
from tiercel.errors import RequestError
from tiercel.serve import generation as talk
from tiercel.serve.duration import seconds_of
from tiercel.serve.embed import embed, normalized
from tiercel.serve.errors import APIError
from tiercel.serve.generation import GenerationRequest, OutputDelta, Usage
from tiercel.serve.models import Lease, Loaded, Named
from tiercel.serve.requests import Body, VoteField, read
from tiercel.serve.stream import JSONResponse, NDJSONResponse, Reply

if TYPE_CHECKING:
    from tiercel.tokenizer.tools import ToolDelta

KeepAlive = int | float | str | None
ThinkField = bool | Literal["low", "medium", "high", "max", ""] | None
Name = Field(default="", max_length=512)


class OllamaRequest(Body):
    model: str = Name
    stream: bool | None = None
    format: str | dict[str, Any] | None = None
    keep_alive: KeepAlive = None
    options: dict[str, Any] | None = None
    think: ThinkField = None
    truncate: bool | None = None
    shift: bool | None = None
    logprobs: bool | None = None
    top_logprobs: int | None = None
    vote: VoteField | None = None  # ours


class Generate(OllamaRequest):
    prompt: str | None = None
    suffix: str | None = None
    system: str | None = None
    template: str | None = None
    context: list[int] | None = None
    raw: bool | None = None
    images: list[str] | None = None


class Function(Body):
    name: str = Field(max_length=256)
    arguments: dict[str, Any] | None = None
    index: int | None = None


class ToolCall(Body):
    id: str | None = None
    function: Function


class Message(Body):
    role: str = Field(max_length=64)
    content: str | None = None
    thinking: str | None = None
    images: list[str] | None = None
    tool_calls: list[ToolCall] | None = None
    tool_name: str | None = None
    tool_call_id: str | None = None


class Chat(OllamaRequest):
    messages: list[Message] | None = None
    tools: list[dict[str, Any]] | None = None


class Embed(Body):
    model: str = Name
    input: Any = None
    truncate: bool | None = None
    dimensions: int | None = Field(default=None, ge=0, le=1 << 20)
    keep_alive: KeepAlive = None
    options: dict[str, Any] | None = None


class Embeddings(Body):
    model: str = Name
    prompt: str | None = None
    keep_alive: KeepAlive = None
    options: dict[str, Any] | None = None


# ── generate and chat


async def generate(request: Request) -> Response:
    body = await read(request, Generate)
    if body.images:
        raise APIError(400, f'"{body.model}" does not support images')
    if body.suffix:
        raise APIError(400, f'"{body.model}" does not support insert')
    if body.raw and (body.template or body.system or body.context):
        raise APIError(400, "raw mode does not support template, system, or context")
    if body.template:
        raise APIError(400, "a template comes with a model (tiercel create), not with a request")
    _check(body)
    if not body.prompt:
        return _loading(request, body, {"response": ""})
    return _answering(request, body, ResponseWriter(body), raw=bool(body.raw))


async def chat(request: Request) -> Response:
    body = await read(request, Chat)
    _check(body)
    if len(body.messages or ()) > request.app.state.settings.messages:
        raise APIError(400, f"a conversation may have {request.app.state.settings.messages} messages")
    if any(message.images for message in body.messages or ()):
        raise APIError(400, f'"{body.model}" does not support images')
    for kind in body.tools or ():
        if not isinstance(kind.get("function"), dict) or not isinstance(kind["function"].get("name"), str):
            raise APIError(400, "tools: each needs a function with a name")
    if not body.messages:
        return _loading(request, body, {"message": {"role": "assistant", "content": ""}})
    return _answering(request, body, ChatSay(body))


def _check(body: OllamaRequest) -> None:
    if not body.model.strip():
        raise APIError(400, "model is required")
    if body.top_logprobs is not None and not 0 <= body.top_logprobs <= 20:
        raise APIError(400, "top_logprobs must be between 0 and 20")
    keep_alive(body.keep_alive)


def _loading(request: Request, body: OllamaRequest, empty: dict[str, Any]) -> Response:
    """No prompt: bring the model into memory, or out of it."""
    service = request.app.state.service

    async def load() -> dict[str, Any]:
        kept = keep_alive(body.keep_alive)
        if kept == 0:
            service.models.find(body.model)
            await service.models.unload(body.model)
        else:
            lease = await service.models.lease(body.model)
            lease.release(kept)
        return {"model": body.model, "created_at": now(), **empty, "done": True,
                "done_reason": "unload" if kept == 0 else "load"}  # fmt: skip

    return JSONResponse(request, load)


class ResponseWriter:
    """How /api/generate takes its question and writes its answer."""

    def __init__(self, body: Any) -> None:
        self.body = body

    def prompt(self, lease: Lease) -> Any:
        tokenizer = lease.loaded.model.tokenizer
        if self.body.raw or tokenizer is None or not tokenizer.has_template:
            return self.body.prompt
        system = lease.named.extras.get("system") if self.body.system is None else self.body.system
        first = [{"role": "system", "content": system}] if system else []
        return [*first, *_examples(lease.named), {"role": "user", "content": self.body.prompt}]

    tools: list[dict[str, Any]] | None = None

    def finish(self, ask: GenerationRequest) -> None:
        if self.body.context:
            ask.ids, ask.turn = [*self.body.context, *ask.ids], len(self.body.context)

    def words(self, part: OutputDelta) -> dict[str, Any]:
        found: dict[str, Any] = {"response": part.text}
        return found | ({"thinking": part.thinking} if part.thinking else {})

    def last(self, ask: GenerationRequest, said: list[int]) -> dict[str, Any]:
        return {} if self.body.raw else {"context": [*ask.ids, *said]}


class ChatSay(ResponseWriter):
    def __init__(self, body: Chat) -> None:
        super().__init__(body)
        self.tools = body.tools or None

    def prompt(self, lease: Lease) -> Any:
        messages = [template_message(message) for message in self.body.messages]
        system = lease.named.extras.get("system")
        first = [{"role": "system", "content": system}] if system and messages[0]["role"] != "system" else []
        return [*first, *_examples(lease.named), *messages]

    def finish(self, ask: GenerationRequest) -> None:
        pass

    def words(self, part: OutputDelta) -> dict[str, Any]:
        message: dict[str, Any] = {"role": "assistant", "content": part.text}
        if part.thinking:
            message["thinking"] = part.thinking
        if part.calls:
            message["tool_calls"] = [
                {"id": call.id, "function": {"index": call.index, "name": call.name, "arguments": _object(call)}}
                for call in part.calls
            ]
        return {"message": message}

    def last(self, ask: GenerationRequest, said: list[int]) -> dict[str, Any]:
        return {}


def template_message(message: Message) -> dict[str, Any]:
    found: dict[str, Any] = {"role": message.role.lower(), "content": message.content or ""}
    if message.thinking:
        found["thinking"] = message.thinking
    if message.tool_calls:
        found["tool_calls"] = [
            {"type": "function", "id": call.id or "",
             "function": {"name": call.function.name, "arguments": call.function.arguments or {}}}
            for call in message.tool_calls
        ]  # fmt: skip
    if message.tool_name:
        found["name"] = message.tool_name
    if message.tool_call_id:
        found["tool_call_id"] = message.tool_call_id
    return found


def _examples(named: Named) -> list[dict[str, Any]]:
    return list(named.extras.get("messages") or ())


def _object(call: ToolDelta) -> dict[str, Any]:
    import json

    try:
        found = json.loads(call.arguments or "{}")
    except ValueError:
        return {}
    return found if isinstance(found, dict) else {}


def _answering(request: Request, body: OllamaRequest, say: ResponseWriter, raw: bool = False) -> Reply:
    events = _events(request, body, say, raw)
    if body.stream is not False:
        return NDJSONResponse(request, events)

    async def whole() -> dict[str, Any]:
        """The lines joined: text, thoughts, calls and logprobs of all, the rest from the last."""
        joined = OutputDelta()
        last: dict[str, Any] = {}
        logprobs: list[Any] = []
        async for line in events:
            part = line.pop("_part", None)
            if part is not None:
                joined.text += part.text
                joined.thinking += part.thinking
                joined.calls += part.calls
            logprobs += line.get("logprobs", ())
            last = line
        return last | say.words(joined) | ({"logprobs": logprobs} if logprobs else {})

    return JSONResponse(request, whole)


async def _events(
    request: Request, body: OllamaRequest, say: ResponseWriter, raw: bool
) -> AsyncGenerator[dict[str, Any], None]:
    service = request.app.state.service
    streaming = body.stream is not False
    began = time.perf_counter()
    async with service.lease(body.model, keep_alive(body.keep_alive)) as lease:
        given, context, ignored = _params(lease, body)
        request.state.ignored = [*getattr(request.state, "ignored", ()), *ignored][:16]
        if body.think and "thinking" not in talk.capabilities(lease.loaded.model):
            raise APIError(400, f'"{body.model}" does not support thinking')
        ask = await asyncio.to_thread(
            talk.prepare, lease, say.prompt(lease), given, tools=say.tools,
            think=None if body.think == "" else body.think, structured=format_of(body.format), context=context,
            vote=body.vote.settings(request.app.state.settings) if body.vote is not None else None,
        )  # fmt: skip
        ask.tenant = talk.tenant(request)
        say.finish(ask)
        counts, said, calls = Usage(), [], _Calls()
        async with talk.answer(service, lease, ask, counts) as parts:
            async for part in parts:
                said += part.tokens
                part.calls = calls.complete(part)
                if part.empty:
                    continue
                line: dict[str, Any] = {"model": body.model, "created_at": now(), **say.words(part), "done": False}
                if part.logprobs:
                    line["logprobs"] = logprobs(lease.loaded.model.tokenizer, part, body.top_logprobs or 0)
                if part.vote:
                    line["vote"] = part.vote
                if not streaming:
                    line["_part"] = part
                if part.finish is None:
                    yield line
                    continue
                reason = "length" if part.finish == "length" else "stop"
                yield line | {"done": True, "done_reason": reason} | say.last(ask, said) | durations(
                    counts, began, lease.load
                )  # fmt: skip


class _Calls:
    """Pieces of tool calls → whole ones, as this dialect sends them: a call is whole when the next thing comes."""

    def __init__(self) -> None:
        self.open: ToolDelta | None = None

    def complete(self, part: OutputDelta) -> list[ToolDelta]:
        done: list[ToolDelta] = []
        for call in part.calls:
            if self.open is not None and call.index == self.open.index:
                self.open += call
                continue
            done += [self.open] if self.open is not None else []
            self.open = call
        if self.open is not None and part.finish is not None:
            done.append(self.open)
            self.open = None
        return done


def _params(lease: Lease, body: OllamaRequest) -> tuple[dict[str, Any], int | None, list[str]]:
    options = {**(lease.named.extras.get("parameters") or {}), **(body.options or {})}
    given, ignored = talk.options_to_params(options)
    if body.logprobs:
        given["logprobs"] = body.top_logprobs or 0
    return talk.base_params(lease, ollama=True) | given, options.get("num_ctx"), ignored


def format_of(value: Any) -> dict[str, Any] | None:
    """`format`: "json", a schema, or nothing."""
    if value in (None, ""):
        return None
    if value == "json":
        return {"json_object": True}
    if isinstance(value, dict):
        return {"json": value}
    raise APIError(400, f'format must be "json" or a JSON schema, not {value[:40]!r}')


def logprobs(tokenizer: Any, part: OutputDelta, top: int) -> list[dict[str, Any]]:
    found = []
    for token, entries in part.logprobs:
        entry = _token(tokenizer, token, entries[token].logprob)
        if top:
            best = sorted(entries.items(), key=lambda item: item[1].rank)[:top]
            entry["top_logprobs"] = [_token(tokenizer, id, logprob.logprob) for id, logprob in best]
        found.append(entry)
    return found


def _token(tokenizer: Any, id: int, logprob: float) -> dict[str, Any]:
    raw = tokenizer.piece(id) if tokenizer is not None else b""
    return {"token": raw.decode("utf-8", "replace"), "logprob": max(logprob, -9999.0), "bytes": list(raw)}


def durations(counts: Usage, began: float, load: float) -> dict[str, int]:
    """prompt_eval_count is the whole prompt, read or remembered: clients take it for the context's length."""
    return {
        "total_duration": _ns(time.perf_counter() - began), "load_duration": _ns(load),
        "prompt_eval_count": counts.prompt, "prompt_eval_duration": _ns(counts.prompt_s),
        "eval_count": counts.said, "eval_duration": _ns(counts.said_s), "cached_tokens": counts.cached,
    }  # fmt: skip


def _ns(seconds: float) -> int:
    return max(int(seconds * 1e9), 0)


def now() -> str:
    return stamp(time.time())


def stamp(seconds: float) -> str:
    return datetime.fromtimestamp(seconds, UTC).isoformat(timespec="microseconds").replace("+00:00", "Z")


def keep_alive(value: KeepAlive) -> float | None:
    """Seconds, None where nothing is said.  Raises Refusal."""
    try:
        return None if value is None or value == "" else seconds_of(value)
    except RequestError as error:
        raise APIError(400, str(error), param="keep_alive") from None


# ── embeddings


async def embed_(request: Request) -> Response:
    body = await read(request, Embed)
    if not body.model.strip():
        raise APIError(400, "model is required")
    texts = [body.input] if isinstance(body.input, str) else body.input
    if texts is None or texts == [""]:
        texts = []
    if not isinstance(texts, list) or not all(isinstance(text, str) for text in texts):
        raise APIError(400, "invalid input type")
    keep_alive(body.keep_alive)
    began = time.perf_counter()

    async def make() -> dict[str, Any]:
        service = request.app.state.service
        async with service.lease(body.model, keep_alive(body.keep_alive)) as lease:
            vectors, count = await embed(lease, texts, service.settings, truncate=body.truncate is not False)
        return {"model": body.model, "embeddings": [normalized(vector, body.dimensions) for vector in vectors],
                "total_duration": _ns(time.perf_counter() - began), "load_duration": _ns(lease.load),
                "prompt_eval_count": count}  # fmt: skip

    return JSONResponse(request, make)


async def embeddings(request: Request) -> Response:
    body = await read(request, Embeddings)
    if not body.model.strip():
        raise APIError(400, "model is required")
    keep_alive(body.keep_alive)

    async def make() -> dict[str, Any]:
        service = request.app.state.service
        async with service.lease(body.model, keep_alive(body.keep_alive)) as lease:
            vectors, _ = await embed(lease, [body.prompt] if body.prompt else [], service.settings, truncate=True)
        return {"embedding": vectors[0] if vectors else []}

    return JSONResponse(request, make)


# ── what is here


def tagged(name: str) -> str:
    """Ollama's names always carry a tag."""
    return name if ":" in name or "/" in name else f"{name}:latest"


def details(named: Named) -> dict[str, Any]:
    from tiercel.commands.show import describe, human_count

    found = describe(named.local.path)
    kinds = found.get("types") or {"none": 1}
    return {
        "parent_model": str(named.extras.get("from") or ""), "format": found["format"],
        "family": found["architecture"], "families": [found["architecture"]],
        "parameter_size": human_count(found["parameters"]), "quantization_level": max(kinds, key=lambda k: kinds[k]),
        "context_length": found["context"], "embedding_length": found["width"],
    }  # fmt: skip


def _listed(named: Named) -> dict[str, Any] | None:
    from tiercel.errors import FormatError

    try:
        about = details(named)
    except (FormatError, OSError):  # a file that cannot be read is not a model that can be asked
        return None
    name = tagged(named.name)
    return {"name": name, "model": name, "modified_at": stamp(named.local.modified), "size": named.local.bytes,
            "digest": digest(named), "details": about}  # fmt: skip


def digest(named: Named) -> str:
    """The sha256 of a file from the store; elsewhere the hub's commit, or one of the name."""
    import hashlib

    from tiercel.hub import hub
    from tiercel.hub.fetch import read_json

    folder = hub.store_folder(named.name)
    found = read_json(folder / "tiercel.json").get("sha256") if folder else None
    return found if isinstance(found, str) else named.local.id or hashlib.sha256(named.name.encode()).hexdigest()


async def tags(request: Request) -> Response:
    models = request.app.state.service.models

    async def make() -> dict[str, Any]:
        found = await asyncio.to_thread(lambda: [_listed(named) for named in models.all()])
        return {"models": [entry for entry in found if entry]}

    return JSONResponse(request, make)


async def ps(request: Request) -> Response:
    models = request.app.state.service.models

    async def make() -> dict[str, Any]:
        entries = sorted(models.loaded.values(), key=lambda loaded: -loaded.expires)
        return {"models": await asyncio.to_thread(lambda: [_resident(models, loaded) for loaded in entries])}

    return JSONResponse(request, make)


def _resident(models: Any, loaded: Loaded) -> dict[str, Any]:
    named = models.find(loaded.name)
    left = min(loaded.expires - time.monotonic(), 100 * 365 * 86400.0)
    expires = datetime.now(UTC) + timedelta(seconds=left if loaded.users == 0 else max(left, 0))
    name = tagged(loaded.name)
    return {"name": name, "model": name, "size": loaded.size, "digest": digest(named), "details": details(named),
            "expires_at": stamp(expires.timestamp()), "size_vram": 0,
            "context_length": loaded.model.max_length, "adapters": sorted(loaded.adapters.values())}  # fmt: skip


async def version(request: Request) -> Response:
    async def make() -> dict[str, Any]:
        return {"version": tiercel.__version__}

    return JSONResponse(request, make)
