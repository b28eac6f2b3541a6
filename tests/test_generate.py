"""One prompt by hand: the cached loop says what the cache-free one says."""

import pytest
import torch

import tiny
from by_hand import Generation, generate_reference
from tiercel.errors import ContextOverflow, RequestError
from tiercel.model.prefill import MAX_PREFILL_TOKENS
from tiercel.sampling.params import SamplingParams
from tiny import GREEDY, ids


@pytest.mark.parametrize("words", [tiny.EVERY_KIND, "mamba1/-", "mamba2", "attention", "attention+mamba2"])
@pytest.mark.parametrize("length", [1, 15, 16, 17, 50])
def test_greedy_tokens_equal_those_of_the_loop_without_a_cache(words, length):
    net = tiny.network(words, seed=length)
    run = Generation(net, ids(length), GREEDY, 512).run()
    assert run.token_ids == generate_reference(net, ids(length), 12)
    assert run.finish_reason == "length"


def test_a_prompt_longer_than_one_prefill_call(net, monkeypatch):
    monkeypatch.setattr("tiercel.model.prefill.MAX_PREFILL_TOKENS", 7)
    seen = []
    run = Generation(net, ids(40), GREEDY, 512, progress=lambda done, total: seen.append((done, total)))
    assert run.run().token_ids == generate_reference(net, ids(40), 12)
    assert seen == [(7, 40), (14, 40), (21, 40), (28, 40), (35, 40), (40, 40)] and MAX_PREFILL_TOKENS == 512


def test_the_same_seed_gives_the_same_tokens_and_another_seed_others(net):
    def tokens(seed):
        params = SamplingParams(temperature=1.0, seed=seed, max_tokens=30, ignore_eos=True)
        return Generation(net, ids(9), params, 512).run().token_ids

    assert tokens(5) == tokens(5) != tokens(6)


def test_a_prompt_that_does_not_fit_is_refused_with_both_numbers(net):
    with pytest.raises(ContextOverflow, match="20 tokens and the context holds 20"):
        Generation(net, ids(20), GREEDY, 20)
    with pytest.raises(RequestError, match="empty"):
        Generation(net, [], GREEDY, 20)


def test_the_context_ends_an_answer_that_would_outgrow_it(net):
    run = Generation(net, ids(20), SamplingParams(temperature=0, max_tokens=None), 25).run()
    assert len(run.token_ids) <= 5 and run.finish_reason == "length"


def test_a_stop_token_ends_the_answer_and_is_named(net):
    free = generate_reference(net, ids(30), 12)
    params = SamplingParams(temperature=0, max_tokens=12, stop_token_ids=[free[4]])
    run = Generation(net, ids(30), params, 512).run()
    assert run.token_ids == free[: free.index(free[4]) + 1]
    assert (run.finish_reason, run.stop_reason) == ("stop", free[4])


def test_logprobs_are_those_of_the_scoring_pass(net):
    params = SamplingParams(temperature=0, max_tokens=6, logprobs=2)
    run = Generation(net, ids(20), params, 512).run()
    scored = torch.log_softmax(net(torch.tensor(ids(20) + run.token_ids)), -1)[19:]
    for row, token, entry in zip(scored, run.token_ids, run.logprobs, strict=False):
        assert entry[token].logprob == pytest.approx(row[token].item(), abs=1e-4)
    assert run.cumulative_logprob == pytest.approx(
        sum(e[t].logprob for e, t in zip(run.logprobs, run.token_ids, strict=True))
    )
