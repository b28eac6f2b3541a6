"""The record of a vote on an item, and the results of every other way of counting the same traces.

pass@1 is the mean of single answers, so only of traces that nothing ended early: all of them, or the warm-up where a
threshold or a consensus ends the rest.  Only where all ran in full are the other ways counted too.
"""

from __future__ import annotations

from collections.abc import Sequence
from typing import Any

from tiercel.voting.confidence import WEIGHTS
from tiercel.voting.settings import VoteSettings
from tiercel.voting.tally import Count, Trace, Vote

FILTERED = ("filtered-low", "filtered-high")


def name_of(settings: VoteSettings) -> str:
    return f"weighted by {settings.weight}" if settings.method == "weighted" else settings.method


def in_full(settings: VoteSettings) -> bool:
    return not settings.online and not settings.consensus


def ways(settings: VoteSettings) -> list[VoteSettings]:
    """Every way to count traces that ran in full."""
    same: dict[str, Any] = {"k": settings.k, "window": settings.window, "top_k": settings.top_k}
    weighted = [VoteSettings(method="weighted", weight=weight, **same) for weight in WEIGHTS if weight != "one"]
    return [VoteSettings(**same), *weighted, *(VoteSettings(method=method, **same) for method in FILTERED)]


def held(settings: VoteSettings, traces: Sequence[Trace]) -> Vote:
    count = Count(settings)
    for trace in traces:
        count.add(trace)
    return count.result()


def record(vote: Vote, correct: Sequence[bool]) -> dict[str, Any]:
    """score: of the answer that won · scores: of single answers, and of every way · beyond_tokens: of traces that were
    given up when it was decided.  correct: of each trace that was counted.

    An answer is as right as the surest trace that gives it.
    """

    def right(found: Vote) -> float:
        return float(found.answer is not None and correct[found.chosen])

    settings, traces = vote.settings, vote.traces[: vote.counted]
    single = correct if in_full(settings) else correct[: settings.warmup]
    scores = {"pass@1": sum(single) / len(single)}
    if in_full(settings):
        scores[f"pass@{settings.k}"] = float(any(correct))
        scores |= {name_of(way): right(held(way, traces)) for way in ways(settings)}
    scores[name_of(settings)] = right(vote)
    return {
        "score": right(vote), "scores": scores,
        "vote": {"answer": vote.answer, "chosen": vote.chosen, "counted": vote.counted, "stopped": vote.stopped,
                 "threshold": vote.threshold, "consensus": vote.consensus, "fallback": vote.fallback},
        "beyond_tokens": vote.tokens - sum(trace.tokens for trace in traces),
    }  # fmt: skip
