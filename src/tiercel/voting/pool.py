"""Votes among stored traces: the result of K of them, and its cost.

Traces of a problem are made once, in full; every vote is then a draw of K of them without replacement.  A trace that
would have been stopped early is cut where its group confidence falls below the threshold of that draw's warm-up.
Tokens are those of a machine that runs one trace after the other: several slots begin a few more before a consensus.
"""

from __future__ import annotations

import random
from collections.abc import Callable, Iterable, Sequence
from dataclasses import dataclass, replace

import numpy as np

from tiercel.errors import RequestError
from tiercel.voting.confidence import Floats, confidences, group_confidence
from tiercel.voting.settings import VoteSettings
from tiercel.voting.tally import Count, Equal, Trace, Vote


class Stored:
    """A trace in full; its groups of each window are worked out once."""

    def __init__(self, trace: Trace) -> None:
        self.trace = trace
        self._known: dict[int, tuple[dict[str, float], Floats]] = {}

    def as_trace(self, index: int, window: int, s: float | None) -> Trace:
        """The trace number `index` of a vote; s: stopped where it falls below."""
        if window not in self._known:
            tokens = self.trace.token_confidence
            groups = group_confidence(tokens, window) if len(tokens) >= window else np.empty(0)
            self._known[window] = confidences(tokens, window), groups
        confidence, groups = self._known[window]
        whole = replace(self.trace, index=index, confidence=confidence)
        below = np.flatnonzero(groups < (-np.inf if s is None else s))
        if len(below) == 0:
            return whole
        cut = window + int(below[0])
        if cut >= whole.tokens:  # it ended with that token
            return whole
        cut_short = confidences(self.trace.token_confidence[:cut], window)
        return replace(whole, tokens=cut, finish_reason="confidence", answer=None, confidence=cut_short)


def vote_among(pool: Sequence[Stored], settings: VoteSettings, rng: random.Random, equal: Equal | None = None) -> Vote:
    """One vote of `settings.k` traces drawn from the pool.  Raises RequestError where it has fewer."""
    if len(pool) < settings.k:
        raise RequestError(f"a vote of {settings.k} traces is asked for, and {len(pool)} are stored")
    count, traces = Count(settings, equal), []
    for index, stored in enumerate(rng.sample(pool, settings.k)):
        traces.append(stored.as_trace(index, settings.window, count.s))
        count.add(traces[-1])
        if count.decided is not None:
            break
    vote = count.result()
    vote.traces, vote.tokens = traces, sum(trace.tokens for trace in traces)
    return vote


@dataclass(frozen=True)
class Point:
    """Of many votes on each problem: the share that was right, with an interval of 95 % over the problems, and the
    tokens and traces of a vote, on average."""

    settings: VoteSettings
    accuracy: float
    low: float
    high: float
    tokens: float
    traces: float


def curve(
    pools: Sequence[Sequence[Stored]],
    settings: Iterable[VoteSettings],
    correct: Callable[[int, str | None], bool],
    *,
    rounds: int = 50,
    seed: int = 0,
    equal: Equal | None = None,
) -> list[Point]:
    """A point for each of the settings.  correct(problem, answer): whether that is the answer of problem number …"""
    points = []
    for each in settings:
        right, tokens, traces = np.zeros((len(pools), rounds)), 0, 0
        for i, pool in enumerate(pools):
            rng = random.Random(f"{seed} {i}")  # the same draws for every method
            for j in range(rounds):
                vote = vote_among(pool, each, rng, equal)
                right[i, j] = correct(i, vote.answer)
                tokens, traces = tokens + vote.tokens, traces + len(vote.traces)
        low, high = _interval(right.mean(axis=1), seed)
        votes = len(pools) * rounds
        points.append(Point(each, float(right.mean()), low, high, tokens / votes, traces / votes))
    return points


def _interval(of_problems: Floats, seed: int) -> tuple[float, float]:
    """Bootstrap over problems: the draws of one problem are not independent."""
    draws = np.random.default_rng(seed).choice(of_problems, (2000, len(of_problems))).mean(axis=1)
    low, high = np.percentile(draws, (2.5, 97.5))
    return float(low), float(high)
