"""One prompt by hand: prefill, step, stop.  Read this first.

    state  = network.new_state()                        what the network will remember of this text
    logits = network(prompt, state, keep=1)             prefill: the whole prompt in one or a few calls
    while not stopped:
        token  = sampler.sample(logits)
        logits = network([token], state, keep=1)        one step: the same call with one token

`Generation` is that loop with text on top: pieces as they come, stop strings, a reason for the end, times.
`Session` keeps the state between prompts, so that a conversation is never read again: what a new prompt shares
with the last one is kept by trimming the state, or by going back to a bookmark set where a prompt ended.
"""

from __future__ import annotations

import time
from collections.abc import Callable, Iterator, Sequence
from dataclasses import dataclass, field
from typing import TYPE_CHECKING

import torch
from torch import Tensor

from tiercel.errors import ContextOverflow, RequestError
from tiercel.model.decoder import Decoder
from tiercel.model.state import Snapshot, State
from tiercel.sampling import Logprob, Sampler, SamplingParams, bad_word_ids
from tiercel.text.stream import Piece

if TYPE_CHECKING:
    from tiercel.text import Text

PREFILL = 512  # prompt tokens per call: bounds the memory of a long prompt, and lets its progress be seen
BOOKMARKS = 4  # how many ends of earlier prompts a session can go back to

Progress = Callable[[int, int], None]  # (prompt tokens read, prompt tokens in all)


def prefill(network: Decoder, tokens: Tensor, state: State, progress: Progress | None = None) -> Tensor:
    """Read a prompt (L,) into the state; the logits of its last token (V,)."""
    logits_LV = torch.empty(0)
    for start in range(0, len(tokens), PREFILL):
        logits_LV = network(tokens[start : start + PREFILL], state, keep=1)
        if progress is not None:
            progress(min(start + PREFILL, len(tokens)), len(tokens))
    return logits_LV[-1]


def generate_reference(network: Decoder, prompt: Sequence[int], count: int) -> list[int]:
    """Greedy tokens without any memory: everything is read again for every token.  What the cache must equal."""
    tokens = list(prompt)
    with torch.no_grad():
        for _ in range(count):
            tokens.append(int(network(torch.tensor(tokens), keep=1)[-1].argmax()))
    return tokens[len(prompt) :]


@dataclass
class Times:
    """Seconds, from the start of the call."""

    prompt: float = 0.0
    generation: float = 0.0
    total: float = 0.0


@dataclass
class Generation:
    """One answer: iterate over it for its pieces; what is known of it stands in the fields, complete at the end.

    finish_reason: "stop" (an end token or a stop string), "length", None while it runs, "abort" when it was left
    stop_reason:   the stop string or stop token id of the caller that ended it, else None
    cached_tokens: how much of the prompt was remembered and not read again
    """

    network: Decoder
    text_side: Text | None
    prompt_ids: list[int]
    params: SamplingParams
    max_length: int
    state: State
    first_logits: Tensor | None = None  # after the prompt, when it has been read already (a fork)
    choice: int = 0
    thinking: str = "off"
    starts_in_thinking: bool = False
    progress: Progress | None = None
    stopping: Callable[[], bool] = lambda: False  # asked before every token
    prompt_read: Callable[[Tensor], None] = lambda logits_V: None  # told once, with the logits after the prompt

    text: str = ""
    thoughts: str = ""
    token_ids: list[int] = field(default_factory=list)
    logprobs: list[dict[int, Logprob]] | None = None
    cumulative_logprob: float | None = None
    finish_reason: str | None = None
    stop_reason: str | int | None = None
    cached_tokens: int = 0
    times: Times = field(default_factory=Times)

    def __post_init__(self) -> None:
        self.cached_tokens = self.state.length
        room = self.max_length - len(self.prompt_ids)
        if room < 1:
            raise ContextOverflow(
                f"the prompt has {len(self.prompt_ids)} tokens and the context holds {self.max_length}, "
                "one of them for the answer; shorten the prompt or raise the context"
            )
        if not self.prompt_ids:
            raise RequestError("the prompt is empty: it needs at least one token")
        asked = self.params.max_tokens
        self.room = room if asked is None else min(asked, room)
        if self.params.logprobs is not None:
            self.logprobs, self.cumulative_logprob = [], 0.0

    def __iter__(self) -> Iterator[Piece]:
        began = time.perf_counter()
        try:
            yield from self._run(began)
        finally:
            self.times.total = time.perf_counter() - began
            self.times.generation = max(self.times.total - self.times.prompt, 0.0)
            if self.finish_reason is None:
                self.finish_reason = "abort"

    def finish(self) -> Generation:
        """Run to the end."""
        for _ in self:
            pass
        return self

    def _run(self, began: float) -> Iterator[Piece]:
        sampler, out = self._sampler(), _Output(self)
        logits_V = self.first_logits
        if logits_V is None:
            new = torch.tensor(self.prompt_ids[self.state.length :], device=self.network.embed.weight.device)
            logits_V = prefill(self.network, new, self.state, self.progress)
        self.prompt_read(logits_V)
        self.times.prompt = time.perf_counter() - began
        while not self.stopping():
            token = sampler.sample(logits_V)
            sampler.accept(token)
            self._note(token, sampler)
            yield from out.push(token)
            if self.finish_reason is not None:
                break
            logits_V = self.network(torch.tensor([token], device=logits_V.device), self.state, keep=1)[-1]
        yield from out.finish()

    def _sampler(self) -> Sampler:
        words: list[list[int]] = []
        if self.params.bad_words and self.text_side is not None:
            words = bad_word_ids(self.params.bad_words, self.text_side.encode)
        eos = () if self.params.ignore_eos else self._eos
        V = self.network.config.vocab_size
        return Sampler(self.params, self.prompt_ids, V, eos=eos, bad_words=words, choice=self.choice)

    @property
    def _eos(self) -> frozenset[int]:
        return self.text_side.eos if self.text_side is not None else frozenset()

    def _note(self, token: int, sampler: Sampler) -> None:
        """Count the token, and see whether it ends the answer."""
        self.token_ids.append(token)
        if self.logprobs is not None:
            entry = sampler.last_logprobs or {}
            self.logprobs.append(entry)
            self.cumulative_logprob = (self.cumulative_logprob or 0.0) + entry[token].logprob
        if token in self._eos and not self.params.ignore_eos:
            self.finish_reason = "stop"
        elif token in (self.params.stop_token_ids or ()):
            self.finish_reason, self.stop_reason = "stop", token
        elif len(self.token_ids) >= self.room:
            self.finish_reason = "length"


class _Output:
    """Tokens → pieces, with stop strings held back until they are certain, and thoughts apart."""

    def __init__(self, run: Generation) -> None:
        self.run, params = run, run.params
        self.stops = [params.stop] if isinstance(params.stop, str) else list(params.stop or ())
        self.held = ""
        self.stream = None
        if run.text_side is not None and params.detokenize:
            self.stream = run.text_side.stream(
                thinking=run.thinking,
                starts_in_thinking=run.starts_in_thinking,
                special=not params.skip_special_tokens,
            )
        elif self.stops:
            raise RequestError("stop strings need a tokenizer, and this model has none; use stop_token_ids")

    def push(self, token: int) -> Iterator[Piece]:
        ended_by_token = self.run.finish_reason == "stop"
        if self.stream is not None and not (ended_by_token and self._hidden(token)):
            yield from self._pass(self.stream.push(token))

    def _hidden(self, token: int) -> bool:
        """An end token is not part of the answer; a stop token of the caller's only when asked for."""
        return self.run.stop_reason is None or not self.run.params.include_stop_str_in_output

    def finish(self) -> Iterator[Piece]:
        if self.stream is None:
            return
        if not isinstance(self.run.stop_reason, str):
            yield from self._pass(self.stream.finish())
            if not isinstance(self.run.stop_reason, str) and self.held:
                held, self.held = self.held, ""
                yield from self._emit(Piece("text", held))

    def _pass(self, pieces: list[Piece]) -> Iterator[Piece]:
        for piece in pieces:
            if isinstance(self.run.stop_reason, str):
                return
            yield from self._emit(piece) if piece.kind != "text" or not self.stops else self._search(piece.text)

    def _search(self, text: str) -> Iterator[Piece]:
        """Answer text up to the earliest stop string; what may be the beginning of one waits."""
        text = self.held + text
        found = min(((at, stop) for stop in self.stops if (at := text.find(stop)) >= 0), default=None)
        if found is not None:
            at, stop = found
            self.run.finish_reason, self.run.stop_reason, self.held = "stop", stop, ""
            keep = at + len(stop) if self.run.params.include_stop_str_in_output else at
            yield from self._emit(Piece("text", text[:keep]))
            return
        wait = max(n for stop in self.stops for n in range(len(stop)) if text.endswith(stop[:n]))
        self.held = text[len(text) - wait :]
        yield from self._emit(Piece("text", text[: len(text) - wait]))

    def _emit(self, piece: Piece) -> Iterator[Piece]:
        if piece.text:
            if piece.kind == "text":
                self.run.text += piece.text
            else:
                self.run.thoughts += piece.text
            yield piece


class Session:
    """A state that outlives its prompt: each new prompt is read only from where it differs.

    A recurrent state cannot be cut at any place, so the session bookmarks the end of every prompt: a next turn, a
    question asked again, thoughts dropped from the history all go on from the latest bookmark they share.
    """

    def __init__(self, network: Decoder, text: Text | None, max_length: int) -> None:
        self.network, self.text, self.max_length = network, text, max_length
        self.last: Generation | None = None
        self.clear()

    def clear(self) -> None:
        """Forget everything."""
        self.state = self.network.new_state()
        self.tokens: list[int] = []  # what the state has read
        self.bookmarks: list[tuple[Snapshot, Tensor]] = []  # ends of prompts, and the logits there

    def generate(
        self,
        prompt_ids: Sequence[int],
        params: SamplingParams,
        *,
        thinking: str = "off",
        starts_in_thinking: bool = False,
        progress: Progress | None = None,
        stopping: Callable[[], bool] = lambda: False,
    ) -> Iterator[Piece]:
        """The pieces of one answer; `last` is its Generation from now on."""
        prompt = list(prompt_ids)
        logits = self._go_back(prompt)
        run = Generation(
            self.network,
            self.text,
            prompt,
            params,
            self.max_length,
            self.state,
            first_logits=logits,
            thinking=thinking,
            starts_in_thinking=starts_in_thinking,
            progress=progress,
            stopping=stopping,
            prompt_read=self._bookmark,
        )
        self.last = run
        return self._pieces(run)

    def _pieces(self, run: Generation) -> Iterator[Piece]:
        try:
            yield from run
        finally:
            self.tokens = (run.prompt_ids + run.token_ids)[: self.state.length]

    def _go_back(self, prompt: Sequence[int]) -> Tensor | None:
        """Keep of the state what this prompt shares with what was read; the logits after it, if it is all there."""
        shared = 0
        for old, new in zip(self.tokens, prompt, strict=False):
            if old != new:
                break
            shared += 1
        self.bookmarks = [mark for mark in self.bookmarks if mark[0].length <= shared]
        if self.bookmarks and self.bookmarks[-1][0].length == len(prompt):
            self.state.restore(self.bookmarks[-1][0])
            return self.bookmarks[-1][1]
        wanted = min(shared, len(prompt) - 1)  # at least one token has to be read for its logits
        if not self.state.trim(wanted):
            usable = [snapshot for snapshot, _ in self.bookmarks if snapshot.length <= wanted]
            if usable:
                self.state.restore(usable[-1])
            else:
                self.state = self.network.new_state()
        return None

    def _bookmark(self, logits_V: Tensor) -> None:
        """The prompt has been read: keep a way back to its end."""
        if not self.bookmarks or self.bookmarks[-1][0].length < self.state.length:
            self.bookmarks = [*self.bookmarks, (self.state.bookmark(), logits_V)][-BOOKMARKS:]
