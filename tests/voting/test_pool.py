"""Votes among stored traces are those that the engine would have held."""

import random

import pytest

from tiercel.errors import RequestError
from tiercel.voting import Trace, VoteSettings
from tiercel.voting.pool import Stored, curve, vote_among


def stored(answer, confidence):
    return Stored(Trace(0, tokens=len(confidence), finish_reason="stop", answer=answer, token_confidence=confidence))


def test_a_stored_trace_is_cut_where_it_falls_below():
    trace = stored("7", [9.0, 9.0, 5.0, 1.0, 9.0, 9.0])  # groups of two: 9, 7, 3, 5, 9
    cut = trace.as_trace(3, 2, 4.0)
    assert (cut.index, cut.tokens, cut.answer, cut.finish_reason) == (3, 4, None, "confidence")
    assert trace.as_trace(3, 2, 3.0).answer == "7" and trace.as_trace(3, 2, None).tokens == 6
    assert trace.as_trace(3, 7, 99.0).answer == "7", "shorter than the window: nothing stops it"


def test_majority_takes_all_and_deepconf_spends_less():
    good = [stored("7", [9.0 + i % 3] * 10) for i in range(20)]
    bad = [stored("8", [9.0, 1.0 + i % 2] * 15) for i in range(20)]
    settings = [
        VoteSettings(k=16),
        VoteSettings(k=16, method="deepconf-high", window=2, keep=50, consensus=0),
        VoteSettings(k=16, method="deepconf-high", window=2, keep=50, consensus=0.6),
    ]
    majority, stopped, agreed = curve([good + bad], settings, lambda _, answer: answer == "7", rounds=40)
    assert majority.traces == stopped.traces == 16 > agreed.traces
    assert majority.tokens > stopped.tokens > agreed.tokens
    assert stopped.accuracy > majority.accuracy and majority.low <= majority.accuracy <= majority.high


def test_a_pool_that_is_too_small_is_refused():
    with pytest.raises(RequestError, match="of 4 traces is asked for, and 1 are stored"):
        vote_among([stored("7", [1.0])], VoteSettings(k=4), random.Random(0))
