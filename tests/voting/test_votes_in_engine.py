"""Votes in the engine: one reading of the prompt, slots handed on, the same vote in any company."""

from types import SimpleNamespace

import pytest

import tiny
from tiercel.engine.speculative import prompt_lookup
from tiercel.errors import RequestError
from tiercel.sampling.params import SamplingParams
from tiercel.voting import Voter, VoteSettings, vote
from tiny import ids, run

PARAMS = SamplingParams(temperature=8.0, seed=5, max_tokens=12, stop_token_ids=list(range(0, 40)))


@pytest.fixture(scope="module")
def net():
    network = tiny.network("attention mamba2", max_length=512)
    network.pack()  # there a row gets the same bits in any company
    return network


def engine(net, **changes):
    return tiny.engine(net, 512, **({"cache_bytes": 1 << 26} | changes))


def model(net, **changes):
    return SimpleNamespace(engine=engine(net, **changes))


class Numbers(Voter):
    """There are no words here: a trace answers with the parity of its length."""

    def on_finish(self, sequence):
        sequence.text = str(len(sequence.token_ids) % 2)
        super().on_finish(sequence)


def hold(e, settings, params=PARAMS, prompt=None):
    voter = Numbers(settings)
    request = e.prepare(prompt or ids(50), params, controller=voter)
    e.queue(request)
    return voter, request


def test_many_traces_read_one_prompt_once(net):
    e = engine(net, slots=4, cache_bytes=0)
    voter, request = hold(e, VoteSettings(k=20))
    updates = run(e)
    made = voter.result(request)
    assert len(made.traces) == made.counted == 20 and made.prompt_tokens == 50
    # the first token of a trace comes from the prompt's logits, the last is not read
    assert sum(map(sum, e.runner.calls)) == 50 + sum(trace.tokens - 1 for trace in made.traces)
    assert e.stats.prompt_tokens == 50 and e.stats.generated_tokens == made.tokens
    assert max(map(len, e.runner.calls)) <= 4, "no more at once than there are slots"
    assert [update.last for update in updates].count(True) == 1 and updates[-1].last
    assert len({tuple(sequence.token_ids) for sequence in request.sequences}) > 10, "each trace has its own draws"
    assert e.stats.kv_bytes == 0 and request.prefix_state is None


def test_a_trace_of_a_vote_is_the_answer_of_the_same_number(net):
    """Starting late from the prompt's state is the same as n answers at once."""
    e = engine(net, slots=8)
    _, request = hold(e, VoteSettings(k=8))
    run(e)
    together = engine(net, slots=8)
    plain = together.add(ids(50), SamplingParams(**(vars(PARAMS) | {"n": 8})))
    run(together)
    assert [sequence.token_ids for sequence in request.sequences] == [
        sequence.token_ids for sequence in plain.sequences
    ]


@pytest.mark.parametrize("method", ["majority", "deepconf-low", "deepconf-high", "filtered-low"])
def test_the_same_seed_gives_the_same_vote_alone_and_in_company(net, method):
    settings = VoteSettings(k=24, method=method, window=3, warmup=8)
    alone = engine(net, slots=3)
    voter, request = hold(alone, settings)
    run(alone)
    first = voter.result(request)
    crowd = engine(net, slots=7)
    for seed in range(5):
        crowd.add(ids(30 + seed, seed=seed), SamplingParams(temperature=8.0, seed=seed, max_tokens=40, ignore_eos=True))
    crowd.step()
    voter, request = hold(crowd, settings)
    for seed in range(4):
        crowd.add(ids(9, seed=seed), SamplingParams(temperature=8.0, seed=seed, max_tokens=25, ignore_eos=True))
    run(crowd)
    second = voter.result(request)
    assert (first.answer, first.table, first.counted, first.threshold) == (
        second.answer, second.table, second.counted, second.threshold
    )  # fmt: skip
    assert first.table, "some traces have an answer"
    assert first.traces[: first.counted] == second.traces[: second.counted]


def test_an_unsure_trace_stops_early_and_its_slot_goes_on(net):
    params = SamplingParams(temperature=8.0, seed=1, max_tokens=60, ignore_eos=True, stop_token_ids=[7, 8, 9, 10])
    e = engine(net, slots=2)
    voter, request = hold(e, VoteSettings(k=20, method="deepconf-low", window=4, warmup=6, consensus=0), params)
    news = []
    while not e.idle:
        before = len(request.sequences)
        step = e.step()
        news += step
        if any(update.finish_reason == "confidence" for update in step) and before < 20:
            running = sum(sequence.finish_reason is None for sequence in request.sequences)
            e.step()
            assert len(request.sequences) > before and running <= 2
    made = voter.result(request)
    stopped = [trace for trace in made.traces if trace.finish_reason == "confidence"]
    assert made.stopped == len(stopped) >= 3
    assert all(trace.index >= 6 and trace.answer is None for trace in stopped), "the warm-up runs in full"
    assert all(trace.confidence["lowest"] < made.threshold for trace in stopped)
    full = engine(net, slots=2)
    reference, asked = hold(full, VoteSettings(k=20, window=4), params)
    run(full)
    assert made.tokens < reference.result(asked).tokens
    for trace, whole in zip(request.sequences, asked.sequences, strict=True):
        assert whole.token_ids[: len(trace.token_ids)] == trace.token_ids, "as far as it came it is the same trace"


def test_a_consensus_ends_those_that_still_run(net):
    class Agreed(Voter):
        def on_finish(self, sequence):
            sequence.text = "42"
            super().on_finish(sequence)

    e = engine(net, slots=4)
    voter = Agreed(VoteSettings(k=100, method="deepconf", warmup=5, window=3))
    request = e.prepare(ids(40), PARAMS, controller=voter)
    e.queue(request)
    updates = run(e)
    made = voter.result(request)
    assert made.consensus and made.counted == 5 and made.answer == "42"
    assert len(request.sequences) < 12 and request.finished and not e.scheduler.running
    assert {update.finish_reason for update in updates if update.finish_reason} <= {"stop", "length", "decided"}
    assert [update.last for update in updates].count(True) == 1


def test_others_come_in_between_the_traces(net):
    """A vote takes the slots that nobody waits for, and no newcomer waits for its end."""
    e = engine(net, slots=2)
    _, vote_request = hold(e, VoteSettings(k=60))
    for _ in range(10):
        e.step()
    other = e.add(ids(5), SamplingParams(temperature=0, max_tokens=3, ignore_eos=True))
    while not other.finished:
        e.step()
    assert len(vote_request.sequences) < 30 and not vote_request.finished
    run(e)
    assert len(vote_request.sequences) == 60


def test_guesses_change_no_vote(net):
    """A text that repeats itself is guessed ahead; what is confirmed is watched token by token all the same."""
    params = SamplingParams(temperature=0.5, seed=2, max_tokens=40, stop_token_ids=list(range(40)))
    settings = VoteSettings(k=12, method="deepconf-high", window=4, warmup=6, consensus=0)
    plain, guessing = engine(net, slots=3), engine(net, slots=3, drafter=prompt_lookup)
    prompt = ids(8) * 6
    (first, a), (second, b) = hold(plain, settings, params, prompt), hold(guessing, settings, params, prompt)
    run(plain), run(guessing)
    assert guessing.stats.drafts_accepted > 0
    assert first.result(a).traces == second.result(b).traces and len(a.sequences) == 12


def test_a_vote_that_is_given_up_leaves_nothing(net):
    e = engine(net, slots=2)
    voter, request = hold(e, VoteSettings(k=50))
    for _ in range(9):
        e.step()
    e.abort(request.id)
    assert [update.last for update in e.step()].count(True) == 1
    assert e.idle and request.finished and e.stats.kv_bytes == 0 and not e.scheduler.used_slots
    with pytest.raises(RequestError, match="ended before it was decided"):
        voter.result(request)


def test_a_broken_trace_ends_the_vote_with_its_error(net):
    class Broken(Numbers):
        def on_token(self, sequence, logits_V):
            if sequence.index == 5:
                raise ValueError("no such thing")
            return super().on_token(sequence, logits_V)

    e = engine(net, slots=3)
    voter = Broken(VoteSettings(k=9))
    request = e.prepare(ids(20), PARAMS, controller=voter)
    e.queue(request)
    updates = run(e)
    assert updates[-1].last and request.finished and not e.scheduler.running
    with pytest.raises(Exception, match="no such thing"):
        voter.result(request)


def test_memory_that_is_short_changes_no_vote(net):
    plain, short = engine(net, slots=4), engine(net, slots=4, state_bytes=1)
    first, a = hold(plain, VoteSettings(k=10))
    second, b = hold(short, VoteSettings(k=10))
    run(plain), run(short)
    assert [sequence.token_ids for sequence in a.sequences] == [sequence.token_ids for sequence in b.sequences]
    assert first.result(a).table == second.result(b).table


@pytest.mark.parametrize(
    "params, words",
    [
        (SamplingParams(temperature=0), "temperature 0 gives the same trace"),
        (SamplingParams(n=2), "a vote has its own number"),
        (SamplingParams(logprobs=3), "logprobs are of one answer"),
    ],
)
def test_what_cannot_be_voted_on_is_refused(net, params, words):
    with pytest.raises(RequestError, match=words):
        vote(model(net), ids(5), VoteSettings(k=4), params)


def test_vote_by_function(net):
    seen = []
    made = vote(model(net), ids(30), VoteSettings(k=5), PARAMS, progress=lambda voter: seen.append(voter.done))
    assert made.answer is None and len(made.traces) == 5, "without words there is no answer, and no error"
    assert seen and seen[-1] == 5 and made.to_dict()["traces"] == 5
