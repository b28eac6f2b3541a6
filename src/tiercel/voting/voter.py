"""Many traces of one prompt in the engine, and the vote that they make.

    vote = tiercel.voting.vote(model, prompt_ids, VoteSettings(k=16, method="deepconf-low"), params)

The traces share one reading of the prompt; a slot that a trace leaves goes to the next one at once.  Which trace says
what depends on the seed and its number, and so does the vote: traces are counted in the order of their numbers, and
those beyond the one that decided are given up, whether they have ended or not.  Who shares the engine changes only how
many of those were begun.
"""

from __future__ import annotations

import time
from collections.abc import Callable
from typing import TYPE_CHECKING, Any

from tiercel.errors import RequestError
from tiercel.sampling.params import SamplingParams
from tiercel.voting.answers import final_answer
from tiercel.voting.confidence import Running, token_confidence_of
from tiercel.voting.settings import VoteSettings
from tiercel.voting.tally import Answer, Count, Equal, TableRow, Trace, Vote

if TYPE_CHECKING:
    from collections.abc import Sequence as GenericSequence

    from torch import Tensor

    from tiercel.engine.request import Request, Sequence


class Voter:
    """The `engine.request.SampleController` of a vote.  answer, equal: how answers are read and compared."""

    def __init__(self, settings: VoteSettings, answer: Answer = final_answer, equal: Equal | None = None) -> None:
        self.settings, self.answer = settings, answer
        self.open = True
        self.count = Count(settings, equal)
        self._growing: dict[int, Running] = {}
        self._ended: dict[int, Trace] = {}  # of all that were begun
        self._began = time.perf_counter()

    # ── what the engine asks ──

    @property
    def max_sequences(self) -> int:
        """Traces that may have started by now: further ones of deepconf wait for the threshold."""
        warm = self.settings.online and self.count.s is None
        return min(self.settings.warmup or 1, self.settings.k) if warm else self.settings.k

    def on_token(self, sequence: Sequence, logits_V: Tensor) -> str | None:
        """See `SampleController.on_token`: "confidence" where a window falls below the threshold."""
        running = self._growing.get(sequence.index)
        if running is None:
            running = self._growing[sequence.index] = Running(self.settings.window)
        group = running.add(token_confidence_of(logits_V, self.settings.top_k))
        s = self.count.s
        return "confidence" if group is not None and s is not None and group < s else None

    def on_finish(self, sequence: Sequence) -> None:
        """See `SampleController.on_finish`: count the traces in order of their numbers."""
        running = self._growing.pop(sequence.index, None) or Running(self.settings.window)
        trace = Trace(
            sequence.index, sequence.text, sequence.reasoning, len(sequence.token_ids), sequence.finish_reason
        )
        trace.confidence, trace.token_confidence = running.all(), running.tokens
        if trace.complete:
            trace.answer = self.answer(trace.text)
        self._ended[sequence.index] = trace
        while self.count.decided is None and (following := self._ended.get(len(self.count.traces))) is not None:
            self.count.add(following)
        self.open = self.open and self.count.decided is None

    def close(self) -> None:
        """Start no further traces."""
        self.open = False

    # ── queries ──

    @property
    def decided(self) -> bool:
        """Whether the vote has its result."""
        return self.count.decided is not None

    @property
    def done(self) -> int:
        """Traces that have ended."""
        return len(self._ended)

    @property
    def stopped(self) -> int:
        """Traces that were stopped for low confidence."""
        return sum(trace.finish_reason == "confidence" for trace in list(self._ended.values()))

    def progress(self) -> dict[str, Any]:
        """Return the interim result, for JSON."""
        leader = self.leader
        return {"k": self.settings.k, "done": self.done, "stopped": self.stopped,
                "leader": leader.answer if leader else None, "share": leader.share if leader else 0.0}  # fmt: skip

    @property
    def leader(self) -> TableRow | None:
        """The leading answer so far."""
        rows = self.count.rows()
        return rows[0] if rows else None

    def result(self, request: Request) -> Vote:
        """Raises the error that the request ended with, RequestError where it was given up."""
        if request.error is not None:
            raise request.error
        if not self.decided:
            raise RequestError("the vote was ended before it was decided")
        vote = self.count.result()
        for sequence in request.sequences:
            trace = self._ended.get(sequence.index)
            if trace is None:
                trace = Trace(sequence.index, tokens=len(sequence.token_ids), finish_reason=sequence.finish_reason)
            vote.traces.append(trace)
            vote.tokens += trace.tokens
        vote.prompt_tokens, vote.cached_tokens = len(request.prompt_ids), request.cached_tokens
        vote.seconds = time.perf_counter() - self._began
        return vote


def vote(
    model: Any,
    prompt_ids: GenericSequence[int],
    settings: VoteSettings,
    params: SamplingParams | None = None,
    *,
    answer: Answer = final_answer,
    equal: Equal | None = None,
    progress: Callable[[Voter], None] | None = None,
    **more: Any,
) -> Vote:
    """Hold a vote on a `tiercel.Model`; further arguments go to `Engine.prepare` (thinking, starts_in_thinking, key).

    answer: a trace's text → its answer, None for none.  equal: whether two answers are the same; equal texts always
    are.  progress: called after every step in which a trace ended.  Raises RequestError, ContextOverflow, TiercelError.
    """
    params = params or model.default_params()
    check(settings, params)
    voter = Voter(settings, answer, equal)
    engine = model.engine
    request = engine.prepare(prompt_ids, params, controller=voter, **more)
    engine.queue(request)
    done = 0
    for _ in engine.run(request):
        if progress is not None and voter.done != done:
            done = voter.done
            progress(voter)
    return voter.result(request)


def check(settings: VoteSettings, params: SamplingParams) -> None:
    """Refuse what cannot be voted on.  Raises RequestError."""
    if params.n != 1:
        raise RequestError(f"n={params.n} answers and a vote are asked for; a vote has its own number of answers")
    if settings.k > 1 and params.greedy:
        raise RequestError("temperature 0 gives the same trace every time: a vote needs a temperature above 0")
    if params.logprobs is not None:
        raise RequestError("logprobs are of one answer, and a vote has many: leave them out")
