"""/v1/completions: text without a chat template; with `echo` and `logprobs` a prompt is scored."""

from __future__ import annotations

import asyncio
import codecs
from collections.abc import AsyncGenerator
from dataclasses import dataclass, field
from typing import TYPE_CHECKING, Any

from starlette.requests import Request
from starlette.responses import Response

from tiercel.serve.body import read
from tiercel.serve.errors import APIError
from tiercel.serve.generation import collect, generate
from tiercel.serve.logprobs import MIN_LOGPROB, likeliest, token_entry
from tiercel.serve.models import Lease
from tiercel.serve.openai.chat import MAX_TOP_LOGPROBS, open_prompt
from tiercel.serve.openai.formats import head, timings, usage_fields
from tiercel.serve.openai.schemas import Completion
from tiercel.serve.prompt import PromptOptions
from tiercel.serve.score import ScoredToken, score
from tiercel.serve.service import service_of
from tiercel.serve.stream import EventSourceResponse, JSONResponse
from tiercel.serve.types import GenerationRequest, OutputDelta, Usage

if TYPE_CHECKING:
    from tiercel.tokenizer.tokenizer import Tokenizer

MAX_CHOICES = 64  # prompts times n of a request
TextPrompt = str | list[int]


async def completions(request: Request) -> Response:
    """Continue prompts."""
    body = await read(request, Completion)
    n = body.n or 1
    if body.suffix:
        raise APIError(400, "suffix is not supported", param="suffix")
    if body.best_of is not None and body.best_of != n:
        raise APIError(400, "best_of is not supported beyond n", param="best_of")
    if body.logprobs is not None and not 0 <= body.logprobs <= MAX_TOP_LOGPROBS:
        raise APIError(400, f"logprobs must be between 0 and {MAX_TOP_LOGPROBS}", param="logprobs")
    body.check_size(service_of(request).settings.schema_bytes)
    prompts = prompts_of(body.prompt)
    if len(prompts) * n > MAX_CHOICES:
        raise APIError(400, f"prompts times n may be {MAX_CHOICES} in one request", param="prompt")
    if body.stream and len(prompts) > 1:
        raise APIError(400, "several prompts cannot be streamed", param="stream")
    if body.stream:
        return EventSourceResponse(request, _events(request, body, prompts[0]))
    return JSONResponse(request, lambda: _complete(request, body, prompts))


def prompts_of(prompt: str | list[str] | list[int] | list[list[int]]) -> list[TextPrompt]:
    """The prompts of a request.  Raises APIError 400."""
    if isinstance(prompt, str):
        return [prompt]
    if not prompt:
        raise APIError(400, "prompt must not be empty", param="prompt")
    return [prompt] if isinstance(prompt[0], int) else list(prompt)


@dataclass
class Echo:
    """The prompt in front of its completion; tokens: with their log probabilities, where these are wanted."""

    text: str = ""
    tokens: list[ScoredToken] = field(default_factory=list)


async def _echo(lease: Lease, body: Completion, prompt: TextPrompt, generation: GenerationRequest) -> Echo:
    if not body.echo:
        return Echo()
    tokenizer = lease.loaded.model.tokenizer
    text = prompt if isinstance(prompt, str) else "" if tokenizer is None else tokenizer.decode(prompt)
    if body.logprobs is None:
        return Echo(text)
    return Echo(text, await score(lease, generation.prompt_ids, body.logprobs, generation.tenant))


def _token_writer(lease: Lease, body: Completion) -> TokenWriter:
    return TokenWriter(lease.loaded.model.tokenizer, body.skip_special_tokens is False)


def _options(body: Completion) -> PromptOptions:
    return PromptOptions(structured=body.structured(), scores_only=body.scores_only)


async def _complete(request: Request, body: Completion, prompts: list[TextPrompt]) -> dict[str, Any]:
    service, n = service_of(request), body.n or 1
    async with service.lease(body.model) as lease:

        async def one(number: int, prompt: TextPrompt) -> tuple[Usage, list[dict[str, Any]]]:
            generation = await open_prompt(request, body, prompt, lease, _options(body))
            usage, echo = Usage(), await _echo(lease, body, prompt, generation)
            if body.scores_only:
                usage.prompt_tokens = len(generation.prompt_ids)
                outputs = [OutputDelta(index, finish_reason="length") for index in range(n)]
                service.metrics.answered(lease.loaded.name, usage)
            else:
                async with generate(service, lease, generation, usage) as deltas:
                    outputs = await collect(deltas, n)
            return usage, [_choice(number * n, output, body, _token_writer(lease, body), echo) for output in outputs]

        try:
            async with asyncio.TaskGroup() as group:
                tasks = [group.create_task(one(number, prompt)) for number, prompt in enumerate(prompts)]
        except* Exception as errors:
            raise errors.exceptions[0] from None
    total, choices = Usage(), []
    for usage, found in (task.result() for task in tasks):
        choices += found
        total.add(usage)
    return head("cmpl", "text_completion", body.model) | {
        "choices": choices, "usage": usage_fields(total), "timings": timings(total),
    }  # fmt: skip


def _choice(
    first: int, output: OutputDelta, body: Completion, tokens: TokenWriter, echo: Echo | None = None
) -> dict[str, Any]:
    echo = echo or Echo()
    text = echo.text + output.text
    logprobs = None
    if body.logprobs is not None:
        logprobs = tokens.logprobs(text, [*echo.tokens, *output.logprobs], body.logprobs)
    return {"text": text, "index": first + output.index, "finish_reason": output.finish_reason,
            "stop_reason": output.stop_reason, "logprobs": logprobs}  # fmt: skip


class TokenWriter:
    """`logprobs` of one choice, whose `text_offset` indexes its text: also where a character is cut over tokens."""

    def __init__(self, tokenizer: Tokenizer | None, special: bool) -> None:
        self.tokenizer, self.special = tokenizer, special
        self.decoder = codecs.getincrementaldecoder("utf-8")("replace")
        self.offset = 0
        self.begun = False

    def logprobs(self, text: str, scored: list[ScoredToken], top: int) -> dict[str, Any]:
        """The entries of these tokens.  text: what the choice gains with them."""
        tokens: list[str] = []
        values: list[float | None] = []
        best: list[dict[str, float] | None] = []
        offsets: list[int] = []
        for token, entries in scored:
            offsets.append(self.offset)
            self._advance(token, text)
            tokens.append(token_entry(self.tokenizer, token, 0.0)["token"])
            if entries is None:  # nothing comes before a first token
                values.append(None)
                best.append(None)
                continue
            values.append(max(entries[token].logprob, MIN_LOGPROB))
            best.append({
                token_entry(self.tokenizer, id, 0.0)["token"]: max(entry.logprob, MIN_LOGPROB)
                for id, entry in likeliest(entries, max(top, 1))
            })  # fmt: skip
        return {"tokens": tokens, "token_logprobs": values, "top_logprobs": best, "text_offset": offsets}

    def _advance(self, token: int, text: str) -> None:
        """Move over a token; control tokens have no text, and some tokenizers drop the space before the first."""
        if self.tokenizer is None or (not self.special and token in self.tokenizer.control_ids):
            return
        written = self.decoder.decode(self.tokenizer.piece(token))
        if not self.begun and written:
            self.begun = True
            self.offset -= written.startswith(" ") and not text.startswith(" ")
        self.offset += len(written)


async def _events(request: Request, body: Completion, prompt: TextPrompt) -> AsyncGenerator[dict[str, Any] | str, None]:
    service = service_of(request)
    async with service.lease(body.model) as lease:
        generation = await open_prompt(request, body, prompt, lease, _options(body))
        usage, begin = Usage(), head("cmpl", "text_completion", body.model)
        extra = {"usage": None} if body.includes_usage else {}
        echo = await _echo(lease, body, prompt, generation)
        tokens = [_token_writer(lease, body) for _ in range(generation.params.n)]
        async with generate(service, lease, generation, usage) as deltas:
            for index in range(generation.params.n if body.echo else 0):
                yield begin | {"choices": [_choice(0, OutputDelta(index), body, tokens[index], echo)]} | extra
            async for delta in deltas:
                if not delta.empty:
                    yield begin | {"choices": [_choice(0, delta, body, tokens[delta.index])]} | extra
        if body.includes_usage:
            yield begin | {"choices": [], "usage": usage_fields(usage), "timings": timings(usage)}
        yield "[DONE]"
