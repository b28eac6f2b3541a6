"""Traces → votes: what is counted, and what wins.  No network here; stored traces count the same (pool.py)."""

from __future__ import annotations

from collections.abc import Callable, Sequence
from dataclasses import asdict, dataclass, field
from typing import Any

from tiercel.voting.answers import same_answer
from tiercel.voting.confidence import threshold
from tiercel.voting.settings import VoteSettings

Answer = Callable[[str], str | None]  # the text of a trace → its answer, in a form that compares
Equal = Callable[[str, str], bool]


@dataclass
class Trace:
    """One line of thought.  finish_reason: as of a Reply, or "confidence" (stopped early), "decided" (not needed)
    tokens: said · answer: None where it has none · confidence: by name, empty while it grows
    token_confidence: of each token"""

    index: int
    text: str = ""
    thinking: str = ""
    tokens: int = 0
    finish_reason: str | None = None
    answer: str | None = None
    confidence: dict[str, float] = field(default_factory=dict)
    token_confidence: Sequence[float] = ()

    @property
    def complete(self) -> bool:
        """It came to its end by itself: one that was cut off has no answer, whatever its last line looks like."""
        return self.finish_reason == "stop"


@dataclass
class TableRow:
    """One answer in the table of a vote."""

    answer: str
    votes: int = 0
    weight: float = 0.0
    share: float = 0.0  # of all the weight


@dataclass
class Vote:
    """What came of it.

    answer: None where no trace has one · text, thinking: of the surest trace that gives it, number `chosen`; where
    there is no answer, of the surest of all · table: by weight
    traces: those that were begun, in order · counted: the first so many decided · stopped: by low confidence
    threshold: s, where there was one · consensus: decided before the budget was spent
    fallback: every trace with an answer was below s, and so all of them voted
    prompt_tokens, cached_tokens: of the one prompt · tokens: said by all traces
    """

    settings: VoteSettings
    answer: str | None = None
    text: str = ""
    thinking: str = ""
    chosen: int = 0
    table: list[TableRow] = field(default_factory=list)
    traces: list[Trace] = field(default_factory=list)
    counted: int = 0
    stopped: int = 0
    threshold: float | None = None
    consensus: bool = False
    fallback: bool = False
    prompt_tokens: int = 0
    cached_tokens: int = 0
    tokens: int = 0
    seconds: float = 0.0

    def to_dict(self, traces: bool = True) -> dict[str, Any]:
        """For JSON; the traces without their texts, the answer's text is here."""
        out: dict[str, Any] = {
            "settings": asdict(self.settings), "answer": self.answer, "chosen": self.chosen,
            "table": [asdict(row) for row in self.table],
            "traces": len(self.traces), "counted": self.counted, "stopped": self.stopped,
            "threshold": self.threshold, "consensus": self.consensus, "fallback": self.fallback,
            "prompt_tokens": self.prompt_tokens, "cached_tokens": self.cached_tokens,
            "completion_tokens": self.tokens, "seconds": self.seconds,
        }  # fmt: skip
        if traces:
            out["details"] = [
                {"index": t.index, "answer": t.answer, "finish_reason": t.finish_reason, "tokens": t.tokens,
                 "confidence": t.confidence} for t in self.traces
            ]  # fmt: skip
        return out


def warmup_threshold(traces: Sequence[Trace], settings: VoteSettings) -> float:
    return threshold([trace.confidence["lowest"] for trace in traces[: settings.warmup]], settings.keep or 100)


def voters(traces: Sequence[Trace], settings: VoteSettings, s: float | None = None) -> list[Trace]:
    """Those whose answers count.

    filtered: with at least the (100 − keep)th percentile of the vote's own confidence among all that have an answer.
    deepconf: those never below s; the warm-up too is held to it, as in the released code.
    """
    having = [trace for trace in traces if trace.answer is not None]
    if settings.online and s is not None:
        return [trace for trace in having if trace.confidence["lowest"] >= s]
    if settings.filtered and having:
        name = "lowest" if settings.weight == "one" else str(settings.weight)
        least = threshold([trace.confidence[name] for trace in having], settings.keep or 100)
        return [trace for trace in having if trace.confidence[name] >= least]
    return having


def tally(traces: Sequence[Trace], weight: str, equal: Equal | None = None) -> list[TableRow]:
    """V(a) = Σ weight of the traces that answer a, heaviest first; ties go to what came first."""
    rows: list[TableRow] = []
    for trace in traces:
        if trace.answer is None:
            continue
        row = next((row for row in rows if _same(row.answer, trace.answer, equal)), None)
        if row is None:
            rows.append(row := TableRow(trace.answer))
        row.votes += 1
        row.weight += trace.confidence[weight]
    total = sum(row.weight for row in rows)
    for row in rows:
        row.share = row.weight / total if total else 0.0
    return sorted(rows, key=lambda row: -row.weight)


def _same(a: str, b: str, equal: Equal | None) -> bool:
    return same_answer(a, b) or (equal is not None and equal(a, b))


@dataclass
class Count:
    """The traces in order of their numbers, as far as they have ended; what it says depends on nothing else.

    s: the threshold, once the warm-up has ended · decided: how many traces made the vote, None while it is open
    """

    settings: VoteSettings
    equal: Equal | None = None
    traces: list[Trace] = field(default_factory=list)
    s: float | None = None
    decided: int | None = None
    consensus: bool = False

    def add(self, trace: Trace) -> None:
        """The next trace, ended."""
        settings = self.settings
        assert self.decided is None and trace.index == len(self.traces) and settings.warmup is not None
        self.traces.append(trace)
        if settings.online and len(self.traces) == min(settings.warmup, settings.k):
            self.s = warmup_threshold(self.traces, settings)
        if len(self.traces) >= settings.k:
            self.decided = settings.k
        elif settings.consensus and len(self.traces) >= settings.warmup and self._agreed(settings.consensus):
            self.decided, self.consensus = len(self.traces), True

    def rows(self) -> list[TableRow]:
        return tally(voters(self.traces, self.settings, self.s), str(self.settings.weight), self.equal)

    def _agreed(self, share: float) -> bool:
        """β ≥ τ.  β counts the whole warm-up (the paper's Algorithm 2): of a few that passed the threshold any answer
        would have everything.  Those that passed must lead to the same answer."""
        warm = self.traces[: self.settings.warmup]
        late = voters(self.traces[len(warm) :], self.settings, self.s)
        everybody, passed = tally([*warm, *late], str(self.settings.weight), self.equal), self.rows()
        agree = bool(passed) and _same(everybody[0].answer, passed[0].answer, self.equal)
        return agree and everybody[0].share >= share

    def result(self) -> Vote:
        chosen, settings = voters(self.traces, self.settings, self.s), self.settings
        fallback = not chosen and any(trace.answer is not None for trace in self.traces)
        if fallback:
            chosen = [trace for trace in self.traces if trace.answer is not None]
        rows = tally(chosen, str(settings.weight), self.equal)
        vote = Vote(settings, table=rows, counted=len(self.traces), threshold=self.s, consensus=self.consensus,
                    fallback=fallback, stopped=sum(t.finish_reason == "confidence" for t in self.traces))  # fmt: skip
        said = self.traces
        if rows:
            vote.answer = rows[0].answer
            said = [trace for trace in chosen if trace.answer and _same(rows[0].answer, trace.answer, self.equal)]
        if said:
            surest = max(said, key=lambda trace: (trace.confidence.get("lowest", 0.0), -trace.index))
            vote.text, vote.thinking, vote.chosen = surest.text, surest.thinking, surest.index
        return vote
