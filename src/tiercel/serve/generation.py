"""Generation: a request goes into the engine, deltas come out; no dialect's concern.

generation = await asyncio.to_thread(prepare, lease, messages, params, options)      prompt.py
async with generate(service, lease, generation, usage) as deltas:
    async for delta in deltas: …                         OutputDelta: reasoning, text, tool calls of one choice
"""

from __future__ import annotations

import time
from collections.abc import AsyncIterator
from contextlib import asynccontextmanager
from typing import TYPE_CHECKING

from tiercel.serve.errors import APIError
from tiercel.serve.models import Lease
from tiercel.serve.running import RunningRequest
from tiercel.serve.service import Service
from tiercel.serve.types import GenerationRequest, OutputDelta, Usage
from tiercel.voting import Voter

if TYPE_CHECKING:
    from tiercel.engine.request import Update
    from tiercel.tokenizer.tool_formats import ToolDelta
    from tiercel.tokenizer.tool_parser import ToolParser


@asynccontextmanager
async def generate(
    service: Service, lease: Lease, generation: GenerationRequest, usage: Usage
) -> AsyncIterator[AsyncIterator[OutputDelta]]:
    """Run a request; leaving the block cancels what still runs.

    Args:
        usage: filled in while the deltas come.
    Raises:
        Busy, RequestError, APIError: at once.
    """
    if service.shutdown is not None:
        raise service.shutdown
    lease.reserve(len(generation.prompt_ids))
    form = generation.tool_format
    voter = None if generation.vote is None else Voter(generation.vote)
    stream = lease.loaded.engine.submit(
        generation.prompt_ids, generation.params, thinking=generation.reasoning,
        starts_in_thinking=generation.starts_in_reasoning, turn=generation.turn_start, constraint=generation.grammar,
        shown=form.markers if form is not None else (), controller=voter, key=generation.tenant, adapter=lease.adapter,
    )  # fmt: skip
    running = RunningRequest(stream, service.settings)
    service.running.add(running)
    usage.prompt_tokens = len(generation.prompt_ids)
    updates = _counted(running, usage, service)
    try:
        yield _deltas(updates, generation, usage) if voter is None else _votes(updates, voter, generation, usage)
    finally:
        service.running.discard(running)
        await stream.cancel()
        service.metrics.answered(lease.loaded.name, usage)


async def _deltas(
    updates: AsyncIterator[Update], generation: GenerationRequest, usage: Usage
) -> AsyncIterator[OutputDelta]:
    choices = [ChoiceReader(generation) for _ in range(generation.params.n)]
    async for update in updates:
        yield choices[update.index].delta(update, usage)
        if update.last:
            return
    raise APIError(500, "the answer broke off")


async def _votes(
    updates: AsyncIterator[Update], voter: Voter, generation: GenerationRequest, usage: Usage
) -> AsyncIterator[OutputDelta]:
    """The standings whenever a sample has ended, then the answer with the result."""
    choices: dict[int, ChoiceReader] = {}  # they count the tokens of reasoning
    async for update in updates:
        if update.index not in choices:
            choices[update.index] = ChoiceReader(generation)
        choices[update.index].delta(update, usage)
        if update.last:
            result = voter.result(update.request)
            chosen = update.request.sequences[result.chosen]
            finish = "stop" if chosen.finish_reason == "stop" else "length"
            yield OutputDelta(0, result.thinking, result.text, token_ids=chosen.token_ids, finish_reason=finish,
                              vote=result.to_dict())  # fmt: skip
            return
        if update.finish_reason is not None:
            yield OutputDelta(0, vote=voter.progress())
    raise APIError(500, "the vote broke off")


async def _counted(running: RunningRequest, usage: Usage, service: Service) -> AsyncIterator[Update]:
    """The updates, counted.  Raises the error that one of them carries."""
    first_at, submitted = None, time.perf_counter()
    async for update in running.updates():
        if update.error is not None:
            raise update.error
        if first_at is None:
            first_at = time.perf_counter()
            times = update.request.times
            usage.cached_tokens = update.request.cached_tokens
            usage.queue_seconds = times.queue
            usage.prefill_seconds = times.prompt or first_at - submitted
            service.metrics.first_token(first_at - usage.started)
        usage.completion_tokens += len(update.token_ids)
        usage.decode_seconds = time.perf_counter() - first_at
        yield update


class ChoiceReader:
    """Updates of one choice → deltas; tool calls are read out of the answer's text."""

    def __init__(self, generation: GenerationRequest) -> None:
        self.in_reasoning = generation.starts_in_reasoning
        self.called = False
        self.parser: ToolParser | None = None
        if generation.tool_format is not None:
            from tiercel.tokenizer.tool_parser import ToolParser

            self.parser = ToolParser(generation.tool_format)

    def delta(self, update: Update, usage: Usage) -> OutputDelta:
        """What an update adds; its reasoning tokens are counted in `usage`."""
        delta = OutputDelta(update.index, token_ids=list(update.token_ids))
        for piece in update.pieces:
            if piece.kind == "thinking":
                delta.reasoning += piece.text
            elif self.parser is None:
                delta.text += piece.text
            else:
                self._add(delta, self.parser.push(piece.text))
        if update.pieces:
            self.in_reasoning = update.pieces[-1].kind == "thinking"
        if self.in_reasoning or (delta.reasoning and not delta.text):
            usage.reasoning_tokens += len(update.token_ids)
        if update.logprobs:
            delta.logprobs = list(zip(update.token_ids, update.logprobs, strict=True))
        if update.finish_reason is not None:
            if self.parser is not None:
                self._add(delta, self.parser.finish())
            reason = "length" if update.finish_reason == "loop" else update.finish_reason  # no dialect has loops
            delta.finish_reason = "tool_calls" if self.called and reason == "stop" else reason
            delta.stop_reason = update.stop_reason
        return delta

    def _add(self, delta: OutputDelta, parsed: list[str | ToolDelta]) -> None:
        for item in parsed:
            if isinstance(item, str):
                delta.text += item
            else:
                self.called = True
                delta.tool_calls.append(item)


async def collect(deltas: AsyncIterator[OutputDelta], n: int) -> list[OutputDelta]:
    """All deltas of each of n choices as one."""
    outputs = [OutputDelta(index) for index in range(n)]
    async for delta in deltas:
        output = outputs[delta.index]
        output.reasoning += delta.reasoning
        output.text += delta.text
        output.logprobs += delta.logprobs
        output.finish_reason, output.stop_reason, output.vote = delta.finish_reason, delta.stop_reason, delta.vote
        for call in delta.tool_calls:
            if call.index >= len(output.tool_calls):
                output.tool_calls.append(call)
            else:
                output.tool_calls[call.index] += call
    return outputs
