"""Every formula of DeepConf against numbers worked by hand."""

import math

import numpy as np
import pytest
import torch

from tiercel.errors import RequestError
from tiercel.voting.confidence import (
    Running,
    bottom_confidence,
    confidences,
    group_confidence,
    lowest_group_confidence,
    mean_confidence,
    tail_confidence,
    threshold,
    token_confidence,
    token_confidence_of,
)
from tiercel.voting.settings import VoteSettings
from tiercel.voting.tally import Count, Trace, tally, voters

C = [4.0, 8.0, 6.0, 2.0, 10.0]  # token confidences of a trace of five tokens


def test_token_confidence():
    # two likeliest tokens of two positions: −(−1 − 3) / 2 = 2 and −(−0.5 − 4.5) / 2 = 2.5
    assert token_confidence([[-1.0, -3.0], [-0.5, -4.5]]).tolist() == [2.0, 2.5]


def test_token_confidence_from_logits():
    # p = 8/16, 4/16, 2/16, 2/16; k = 2: −(ln ½ + ln ¼) / 2 = 1.5 ln 2; logits may carry any constant
    logits = torch.tensor([8.0, 2.0, 4.0, 2.0]).log() + 7
    assert token_confidence_of(logits, 2) == pytest.approx(1.5 * math.log(2), abs=1e-6)
    assert token_confidence_of(logits, 20) == pytest.approx((1 + 2 + 3 + 3) / 4 * math.log(2), abs=1e-6)


def test_groups_overlap_one_for_each_token():
    assert group_confidence(C, 2).tolist() == [6.0, 7.0, 4.0, 6.0]  # (4+8)/2, (8+6)/2, (6+2)/2, (2+10)/2
    assert group_confidence(C, 5).tolist() == [6.0]
    assert group_confidence(C, 2048).tolist() == [6.0], "shorter than the window: one group, its mean"


def test_lowest_bottom_tail_and_mean():
    assert lowest_group_confidence(C, 2) == 4.0
    assert bottom_confidence(C, 2, 50) == 5.0  # the lower two of 4, 6, 6, 7
    assert bottom_confidence(C, 2) == 4.0, "a tenth of four groups is one at least"
    twenty = [float(i) for i in range(20)]
    assert bottom_confidence(twenty, 1) == 0.5  # 10 % of 20 groups: 0 and 1
    assert tail_confidence(C, 2) == 6.0  # (2 + 10) / 2
    assert tail_confidence(C, 2048) == mean_confidence(C) == 6.0
    assert confidences([], 2)["lowest"] == 0.0


def test_both_readings_of_the_percentile():
    minima = [1.0, 2.0, 3.0, 4.0, 5.0, 6.0, 7.0, 8.0, 9.0, 10.0, 11.0]
    assert threshold(minima, 10) == 10.0, "low: a tenth stays"
    assert threshold(minima, 90) == 2.0, "high: nine tenths stay, Falcon-H1R's"


def test_a_growing_trace_knows_what_the_whole_one_does():
    values = np.random.default_rng(0).uniform(5, 20, 500).astype(np.float32)
    running, groups = Running(64), []
    for value in values:
        if (group := running.add(float(value))) is not None:
            groups.append(group)
    assert groups == group_confidence(values, 64).tolist()
    assert running.lowest == running.all()["lowest"] == lowest_group_confidence(values, 64)


def traces(*rows):
    """(answer, lowest) each."""
    return [
        Trace(i, answer=answer, finish_reason="stop", confidence={"one": 1.0, "lowest": low, "tail": low})
        for i, (answer, low) in enumerate(rows)
    ]


def test_votes_are_weighted():
    found = traces(("7", 1.0), ("7", 1.0), ("8", 5.0), (None, 9.0))
    assert [(row.answer, row.votes, row.weight) for row in tally(found, "one")] == [("7", 2, 2.0), ("8", 1, 1.0)]
    rows = tally(found, "lowest")
    assert (rows[0].answer, rows[0].weight) == ("8", 5.0) and rows[0].share == pytest.approx(5 / 7)
    half = tally(traces(("1/2", 1.0), ("0.5", 1.0)), "one", equal=lambda a, b: {a, b} == {"1/2", "0.5"})
    assert [(row.answer, row.votes) for row in half] == [("1/2", 2)], "a grader of one's own says what is equal"


def test_filtered_votes_keep_the_surest():
    found = traces(*((str(i), float(i)) for i in range(1, 12)))
    assert [trace.answer for trace in voters(found, VoteSettings(k=11, method="filtered-low"))] == ["10", "11"]
    assert len(voters(found, VoteSettings(k=11, method="filtered-high"))) == 10
    assert len(voters(found, VoteSettings(k=11, method="weighted"))) == 11


def count(settings, found):
    counting = Count(settings)
    for trace in found:
        if counting.decided is not None:
            break
        counting.add(trace)
    return counting


def test_the_warm_up_sets_the_threshold_and_is_held_to_it():
    found = traces(("7", 1.0), ("7", 2.0), ("8", 3.0), ("8", 0.5))
    counting = count(VoteSettings(k=4, warmup=3, method="deepconf", keep=50, consensus=0), found)
    assert counting.s == 2.0
    vote = counting.result()
    assert [(row.answer, row.votes) for row in vote.table] == [("8", 1), ("7", 1)]
    assert vote.answer == "8" and not vote.fallback


def test_a_consensus_ends_the_vote_but_not_before_the_warm_up():
    same = traces(*[("7", 1.0)] * 10)
    assert count(VoteSettings(k=10, warmup=4, method="deepconf"), same).decided == 4
    assert count(VoteSettings(k=10, method="majority", warmup=4), same).decided == 10, "self-consistency asks all"
    assert count(VoteSettings(k=10, method="majority", warmup=4, consensus=0.9), same).decided == 4
    split = traces(*[("7", 1.0)] * 2, ("8", 1.0), *[("7", 1.0)] * 17)
    # τ = 0.9: 9 of 10 agree at the tenth trace
    assert count(VoteSettings(k=20, warmup=3, method="deepconf", consensus=0.9), split).decided == 10


def test_one_trace_above_the_threshold_is_no_consensus():
    found = traces(("7", 1.0), ("8", 2.0), ("9", 3.0), ("7", 9.0), ("7", 9.5), ("7", 9.5))
    assert count(VoteSettings(k=6, warmup=4, method="deepconf-low"), found).decided == 6


def test_a_vote_of_the_unsure_alone_says_so():
    found = traces((None, 9.0), ("7", 1.0))
    vote = count(VoteSettings(k=2, warmup=2, method="deepconf-low"), found).result()
    assert vote.answer == "7" and vote.fallback


@pytest.mark.parametrize(
    "given, words",
    [
        ({"k": 0}, "vote.k must be a whole number from 1"),
        ({"k": True}, "vote.k"),
        ({"method": "loudest"}, "vote.method must be one of majority"),
        ({"keep": 0}, "vote.keep is for|vote.keep must"),
        ({"keep": 50}, "all traces count"),
        ({"method": "deepconf", "keep": float("nan")}, "vote.keep must"),
        ({"method": "filtered-low", "consensus": 0.9}, "looks at all traces"),
        ({"consensus": 0.4}, "vote.consensus must"),
        ({"weight": "heavy"}, "vote.weight must"),
        ({"window": 0}, "vote.window must"),
        ({"voices": 3}, "vote has no 'voices'"),
    ],
)
def test_settings_are_refused_by_name(given, words):
    with pytest.raises(RequestError, match=words):
        VoteSettings.of(given)
