"""A question of any dialect → its answer, in the words of none.

    ask = prepare(lease, messages, params, tools=…, think=…)     in a thread: templates and tokenizing take time
    async with answer(service, lease, ask) as parts:
        async for part in parts: …                               Part: thoughts, text, tool calls of one choice

The dialects (`ollama.py`, `openai.py`, `responses.py`) read requests into an Ask and write Parts as their objects.
"""

from __future__ import annotations

import asyncio
import json
import time
from collections.abc import AsyncIterator, Mapping, Sequence
from contextlib import asynccontextmanager
from dataclasses import dataclass, field
from typing import TYPE_CHECKING, Any

from tiercel import voting
from tiercel.errors import ContextOverflow, RequestError
from tiercel.sampling.params import SamplingParams, Structured
from tiercel.serve.errors import BUSY, APIError, plain
from tiercel.serve.models import Lease
from tiercel.voting import Voter, VoteSettings

if TYPE_CHECKING:
    from tiercel.serve.app import Service
    from tiercel.tokenizer.tools import ToolDelta

# How long each effort may think, in tokens; None: as long as it takes.
EFFORTS: dict[str, int | None] = {"minimal": 256, "low": 1024, "medium": 4096, "high": None, "xhigh": None,
                                  "ultra": None, "max": None}  # fmt: skip
Think = bool | str | None  # on, off, an effort, or the model's own way


@dataclass
class GenerationRequest:
    """One prompt for the engine.  parser: makes the reader of tool calls, one per choice."""

    ids: list[int]
    params: SamplingParams
    thinking: str = "off"
    starts_in_thinking: bool = False
    turn: int | None = None
    tools: Any = None  # a ToolForm
    grammar: Any = None  # of a structured answer, compiled
    vote: VoteSettings | None = None
    tenant: str = ""  # what was read is reused within one only


@dataclass
class OutputDelta:
    """What one step added to one choice.  finish: "stop", "length", "tool_calls" with the last part of a choice."""

    choice: int = 0
    thinking: str = ""
    text: str = ""
    calls: list[ToolDelta] = field(default_factory=list)
    tokens: list[int] = field(default_factory=list)
    logprobs: list[tuple[int, dict[int, Any]]] = field(default_factory=list)  # (token, the likeliest there)
    finish: str | None = None
    stop_reason: str | int | None = None
    vote: dict[str, Any] | None = None  # how it stands, and with the last part how it went

    @property
    def empty(self) -> bool:
        """Nothing that a client would see: half a character, the beginning of a stop string."""
        return not (self.text or self.thinking or self.calls or self.logprobs or self.finish or self.vote)


@dataclass
class Usage:
    """What an answer cost; complete at its end.  Seconds."""

    prompt: int = 0
    cached: int = 0
    said: int = 0  # of all choices
    reasoning: int = 0
    queue_s: float = 0.0
    prompt_s: float = 0.0
    said_s: float = 0.0
    began: float = field(default_factory=time.perf_counter)


# ── asking


def capabilities(model: Any) -> list[str]:
    """As /api/show lists them."""
    found = ["completion", "embedding"]
    if model.tokenizer is not None:
        if tool_form(model.tokenizer) is not None:
            found.append("tools")
        if thinks(model.tokenizer):
            found.append("thinking")
    return found


def thinks(tokenizer: Any) -> bool:
    return can_think("\n".join(tokenizer.templates.values()))


def can_think(template: str) -> bool:
    """Whether a chat template knows thoughts."""
    return "<think>" in template or "enable_thinking" in template


def tool_form(tokenizer: Any) -> Any:
    from tiercel.tokenizer.tools import ToolForm

    written = "\n".join(tokenizer.templates.values())
    return ToolForm.of(written) if "tools" in written else None


def base_params(lease: Lease, ollama: bool) -> dict[str, Any]:
    """Sampling where the request says nothing: the Modelfile's parameters, the checkpoint's own, the dialect's."""
    found: dict[str, Any] = {"max_tokens": None}
    found |= lease.loaded.model.defaults or ({"temperature": 0.8, "top_p": 0.9, "top_k": 40} if ollama else {})
    return found | options_to_params(lease.named.extras.get("parameters") or {})[0]


OPTIONS = {  # Ollama's names → ours
    "temperature": "temperature", "top_p": "top_p", "top_k": "top_k", "min_p": "min_p", "seed": "seed", "stop": "stop",
    "repeat_penalty": "repetition_penalty", "presence_penalty": "presence_penalty",
    "frequency_penalty": "frequency_penalty",
}  # fmt: skip


def options_to_params(options: Mapping[str, Any]) -> tuple[dict[str, Any], list[str]]:
    """Ollama's `options` as fields of SamplingParams, and the names that mean nothing here."""
    found: dict[str, Any] = {}
    idle: list[str] = []
    for name, value in options.items():
        if name in OPTIONS:
            if value is not None:
                found[OPTIONS[name]] = value
        elif name == "num_predict":
            found["max_tokens"] = _whole(name, value, -2)
            found["max_tokens"] = found["max_tokens"] if found["max_tokens"] > 0 else None
        elif name == "num_ctx":
            _whole(name, value, 1)
        else:
            idle.append(name)
    if found.get("stop") in ([], ""):
        del found["stop"]
    return found, idle


def _whole(name: str, value: Any, low: int) -> int:
    if not isinstance(value, int) or isinstance(value, bool) or not low <= value < 1 << 31:
        raise APIError(400, f"option {name} must be a whole number from {low} to {(1 << 31) - 1}")
    return value


def params_of(given: dict[str, Any]) -> SamplingParams:
    """Raises RequestError.  A top_p of 0 means the likeliest token alone."""
    if given.get("top_p") == 0 and not isinstance(given["top_p"], bool):
        given = {**given, "top_p": 1e-9}
    return SamplingParams(**given)


def prepare(
    lease: Lease,
    prompt: Any,
    given: dict[str, Any],
    *,
    tools: Sequence[dict[str, Any]] | None = None,
    forced: bool = False,
    think: Think = None,
    structured: dict[str, Any] | None = None,
    context: int | None = None,
    continue_final: bool = False,
    template: Mapping[str, Any] | None = None,
    vote: VoteSettings | None = None,
) -> GenerationRequest:
    """Raises RequestError, ContextOverflow.  prompt: text as it is, token ids, or messages for the chat template.
    forced: the answer is one call of one of the tools, whatever the model would rather say."""
    model = lease.loaded.model
    given = dict(given)
    kwargs = dict(template or {})
    chat = not isinstance(prompt, str) and bool(prompt) and isinstance(prompt[0], dict)
    if model.tokenizer is None and (chat or isinstance(prompt, str)):
        raise RequestError(f"{lease.named.name} has no tokenizer: give it token ids")
    form = tool_form(model.tokenizer) if tools else None
    if tools and form is None:
        raise RequestError(f'"{lease.named.name}" does not support tools')
    if chat:
        _thinking(model, given, kwargs, think)
        kwargs |= {"tools": list(tools)} if tools else {}
        ids = model.tokenizer.chat(prompt, continue_final=continue_final, **kwargs)
        grid = lease.loaded.engine.engine.grid  # a shorter text can be cut back to any length as it is
        turn = _turn(model.tokenizer, prompt, ids, kwargs) if 0 < grid < len(ids) else None
    else:
        ids = model.tokenizer.encode(prompt) if isinstance(prompt, str) else list(prompt)
        turn = None
        check_ids(model, ids)
    if forced and tools:
        if structured is not None:
            raise RequestError("an answer has one form: a tool call that is asked for, or response_format")
        from tiercel.tokenizer.tools import LLAMA

        structured, form = {"grammar": call_grammar(tools)}, LLAMA  # that form reads bare objects
    if structured is not None:
        given["structured"] = Structured(**structured)
    params = params_of(given)
    if vote is not None:
        if tools:
            raise RequestError("tools and a vote: calls cannot be voted on; leave one of them out")
        voting.check(vote, params)
    room = min(context or model.max_length, model.max_length) - len(ids)
    if room < 1:
        raise ContextOverflow(
            f"the prompt has {len(ids)} tokens and the context holds {room + len(ids)}, one of them for the answer; "
            "shorten the prompt" + (" or raise num_ctx" if context else "")
        )
    if params.max_tokens is None or params.max_tokens > room:
        params.max_tokens = room
        params.min_tokens = min(params.min_tokens, room)
    starts = chat and model.tokenizer.opens_thinking(ids)
    grammar = None
    if params.structured is not None:  # compiled here: it may take two seconds, and a hostile one is refused
        grammars = lease.loaded.engine.engine.grammars
        if grammars is None:
            raise RequestError(f"{lease.named.name} has no tokenizer: its answers cannot be given a form")
        grammar = grammars.compile(params.structured)
    # a form binds the answer from its first token, unless the model's template knows thoughts, which come before it
    apart = chat and (grammar is None or thinks(model.tokenizer))
    return GenerationRequest(ids, params, "auto" if apart else "off", starts, turn, form, grammar, vote)


TIGHT = {"whitespace_flexible": False, "item_separator": ", ", "key_separator": ": ", "coerce_one_of": True,
         "lenient": True}  # fmt: skip


def call_grammar(tools: Sequence[dict[str, Any]]) -> str:
    """One call of one of these functions, as an object of its own, spaced as models write it (Lark)."""
    calls = []
    for tool in tools:
        function = tool["function"]
        if not isinstance(function.get("parameters") or {}, dict):
            raise RequestError(f"the parameters of {function['name']} must be a JSON schema")
        begin = f'{{"name": {json.dumps(function["name"])}, "arguments": '
        schema = {"type": "object", **(function.get("parameters") or {}), "x-guidance": TIGHT}
        calls.append(f'{json.dumps(begin)} %json {json.dumps(schema)} "}}"')
    return "start: " + " | ".join(calls)


def tenant(request: Any, salt: str | None = None) -> str:
    """Whose texts these are: by key, where the server has several, and by what the client adds (`cache_salt`)."""
    key = request.scope.get("tiercel.tenant", "")
    return json.dumps([key, salt]) if key or salt else ""


def check_ids(model: Any, ids: Sequence[int]) -> None:
    size = model.config.vocab_size
    if not ids:
        raise RequestError("the prompt is empty: it needs at least one token")
    if min(ids) < 0 or max(ids) >= size:
        raise RequestError(f"token ids are from 0 to {size - 1}")


def _thinking(model: Any, given: dict[str, Any], kwargs: dict[str, Any], think: Think) -> None:
    """Switch thoughts on or off by the name templates use; an effort is also a budget in tokens."""
    if think is None or not thinks(model.tokenizer):
        return
    kwargs.setdefault("enable_thinking", think not in (False, "none"))
    budget = EFFORTS.get(think) if isinstance(think, str) else 0 if think is False else None
    if budget is not None:
        given.setdefault("thinking_budget", budget)


def check_schema(value: Any, limit: int) -> None:
    if len(plain(value)) > limit:
        raise APIError(400, f"schemas and tools may be {limit} bytes together")


def _turn(tokenizer: Any, messages: list[dict[str, Any]], ids: list[int], kwargs: dict[str, Any]) -> int | None:
    """Where the last user turn begins: the ids shared with the prompt without it."""
    if len(messages) < 2:
        return None
    try:
        before = tokenizer.chat(messages[:-1], add_generation_prompt=False, **kwargs)
    except RequestError:  # a template that wants the user to have the last word
        return None
    shared = 0
    for a, b in zip(before, ids, strict=False):
        if a != b:
            break
        shared += 1
    return shared or None


# ── answering


class Running:
    """An answer in the engine, under its limits.  `expire` ends it from outside (the server goes down)."""

    def __init__(self, stream: Any, settings: Any) -> None:
        self.stream, self.settings = stream, settings
        self.deadline = time.monotonic() + settings.total_timeout
        self.reason: APIError | None = None
        self._scope: asyncio.Timeout | None = None

    def expire(self, reason: APIError) -> None:
        self.reason = reason
        if self._scope is not None and not self._scope.expired():
            self._scope.reschedule(asyncio.get_running_loop().time())

    async def updates(self) -> AsyncIterator[Any]:
        first, end_of_queue = True, time.monotonic() + self.settings.queue_timeout
        while True:
            patience = self.settings.first_token_timeout if first else self.settings.token_timeout
            queued = first and self.stream.request.started is None
            if queued:
                patience = min(patience, max(end_of_queue - time.monotonic(), 0.0))
            patience = min(patience, max(self.deadline - time.monotonic(), 0.0))
            if self.reason is not None:
                raise self.reason
            try:
                async with asyncio.timeout(patience) as self._scope:
                    update = await anext(self.stream)
            except StopAsyncIteration:
                return
            except TimeoutError:
                if self.reason is not None:
                    raise self.reason from None
                if queued and self.stream.request.started is not None:
                    continue  # its turn came meanwhile
                if queued and time.monotonic() >= end_of_queue:
                    raise APIError(503, BUSY, code="busy", retry=5) from None
                over = time.monotonic() >= self.deadline
                what = "the answer took too long" if over else "no token came" + (" yet" if first else "")
                raise APIError(504, f"{what}; it was ended after {patience:g} s", code="timeout") from None
            finally:
                self._scope = None
            first = False
            yield update


@asynccontextmanager
async def answer(
    service: Service, lease: Lease, ask: GenerationRequest, counts: Usage
) -> AsyncIterator[AsyncIterator[OutputDelta]]:
    """The parts of an answer; leaving the block cancels what still runs.  Raises Busy, RequestError at once."""
    if service.over is not None:
        raise service.over
    lease.take(len(ask.ids))
    shown = ask.tools.markers if ask.tools is not None else ()
    voter = None if ask.vote is None else Voter(ask.vote)
    stream = lease.loaded.engine.submit(
        ask.ids, ask.params, thinking=ask.thinking, starts_in_thinking=ask.starts_in_thinking, turn=ask.turn,
        constraint=ask.grammar, shown=shown, watch=voter, key=ask.tenant, adapter=lease.adapter,
    )  # fmt: skip
    running = Running(stream, service.settings)
    service.running.add(running)
    counts.prompt = len(ask.ids)
    try:
        yield _parts(running, ask, counts, service) if voter is None else _votes(running, voter, ask, counts, service)
    finally:
        service.running.discard(running)
        await stream.cancel()
        service.metrics.answered(lease.loaded.name, counts)


async def _parts(
    running: Running, ask: GenerationRequest, counts: Usage, service: Service
) -> AsyncIterator[OutputDelta]:
    choices = [_Choice(ask) for _ in range(ask.params.n)]
    async for update in _counted(running, counts, service):
        yield choices[update.choice].part(update, counts)
        if update.last:
            return
    raise APIError(500, "the answer broke off")


async def _votes(
    running: Running, voter: Voter, ask: GenerationRequest, counts: Usage, service: Service
) -> AsyncIterator[OutputDelta]:
    """How it stands whenever an answer has ended, then the answer with the vote."""
    choices: dict[int, _Choice] = {}  # they count the tokens of thoughts
    async for update in _counted(running, counts, service):
        if update.choice not in choices:
            choices[update.choice] = _Choice(ask)
        choices[update.choice].part(update, counts)
        if update.last:
            made = voter.result(update.request)
            won = update.request.choices[made.chosen]
            finish = "stop" if won.finish_reason == "stop" else "length"
            yield OutputDelta(0, made.thinking, made.text, tokens=won.token_ids, finish=finish, vote=made.to_dict())
            return
        if update.finish_reason is not None:
            yield OutputDelta(0, vote=voter.progress())
    raise APIError(500, "the vote broke off")


async def _counted(running: Running, counts: Usage, service: Service) -> AsyncIterator[Any]:
    """The updates, counted; raises the error that one brings."""
    first_at, submitted = None, time.perf_counter()
    async for update in running.updates():
        if update.error is not None:
            raise update.error
        if first_at is None:
            first_at = time.perf_counter()
            times = update.request.times
            counts.cached = update.request.cached_tokens
            counts.queue_s = times.queue
            counts.prompt_s = times.prompt or first_at - submitted
            service.metrics.first_token(first_at - counts.began)
        counts.said += len(update.token_ids)
        counts.said_s = time.perf_counter() - first_at
        yield update


class _Choice:
    """Pieces of one choice → parts; tool calls are read out of the answer's text."""

    def __init__(self, ask: GenerationRequest) -> None:
        self.inside = ask.starts_in_thinking
        self.called = False
        self.parser: Any = None
        if ask.tools is not None:
            from tiercel.tokenizer.tools import ToolParser

            self.parser = ToolParser(ask.tools)

    def part(self, update: Any, counts: Usage) -> OutputDelta:
        part = OutputDelta(update.choice, tokens=list(update.token_ids))
        for piece in update.pieces:
            if piece.kind == "thinking":
                part.thinking += piece.text
            elif self.parser is None:
                part.text += piece.text
            else:
                self._read(part, self.parser.push(piece.text))
        if update.pieces:
            self.inside = update.pieces[-1].kind == "thinking"
        if self.inside or (part.thinking and not part.text):
            counts.reasoning += len(update.token_ids)
        if update.logprobs:
            part.logprobs = list(zip(update.token_ids, update.logprobs, strict=True))
        if update.finish_reason is not None:
            if self.parser is not None:
                self._read(part, self.parser.finish())
            reason = "length" if update.finish_reason == "loop" else update.finish_reason  # no dialect knows loops
            part.finish = "tool_calls" if self.called and reason == "stop" else reason
            part.stop_reason = update.stop_reason
        return part

    def _read(self, part: OutputDelta, found: list[Any]) -> None:
        for item in found:
            if isinstance(item, str):
                part.text += item
            else:
                self.called = True
                part.calls.append(item)


async def whole(parts: AsyncIterator[OutputDelta], n: int) -> list[OutputDelta]:
    """All parts of each choice as one."""
    done = [OutputDelta(choice) for choice in range(n)]
    async for part in parts:
        into = done[part.choice]
        into.thinking += part.thinking
        into.text += part.text
        into.logprobs += part.logprobs
        into.finish, into.stop_reason, into.vote = part.finish, part.stop_reason, part.vote
        for call in part.calls:
            if call.index >= len(into.calls):
                into.calls.append(call)
            else:
                into.calls[call.index] += call
    return done
