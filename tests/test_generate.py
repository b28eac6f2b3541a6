"""One prompt, one conversation: the cached loop says what the cache-free one says, and remembers what it can."""

import pytest
import torch

import tiny
from tiercel.errors import ContextOverflow, RequestError
from tiercel.generate import PREFILL, Generation, Session, generate_reference
from tiercel.sampling import SamplingParams

GREEDY = SamplingParams(temperature=0, max_tokens=12, ignore_eos=True)


@pytest.fixture(scope="module")
def net():
    return tiny.network()


def ids(length, seed=0):
    return torch.randint(0, 256, (length,), generator=torch.Generator().manual_seed(seed)).tolist()


def answer(session, prompt, params=GREEDY):
    for _ in session.generate(prompt, params):
        pass
    return session.last


@pytest.mark.parametrize("words", [tiny.EVERY_KIND, "mamba1/-", "mamba2", "attention", "attention+mamba2"])
@pytest.mark.parametrize("length", [1, 15, 16, 17, 50])
def test_greedy_tokens_equal_those_of_the_loop_without_a_cache(words, length):
    net = tiny.network(words, seed=length)
    run = Generation(net, None, ids(length), GREEDY, 512, net.new_state()).finish()
    assert run.token_ids == generate_reference(net, ids(length), 12)
    assert run.finish_reason == "length" and run.cached_tokens == 0


def test_a_prompt_longer_than_one_prefill_call(net, monkeypatch):
    monkeypatch.setattr("tiercel.generate.PREFILL", 7)
    seen = []
    run = Generation(
        net, None, ids(40), GREEDY, 512, net.new_state(), progress=lambda done, total: seen.append((done, total))
    )
    assert run.finish().token_ids == generate_reference(net, ids(40), 12)
    assert seen == [(7, 40), (14, 40), (21, 40), (28, 40), (35, 40), (40, 40)] and PREFILL == 512


def test_the_same_seed_gives_the_same_tokens_and_another_seed_others(net):
    def tokens(seed):
        params = SamplingParams(temperature=1.0, seed=seed, max_tokens=30, ignore_eos=True)
        return Generation(net, None, ids(9), params, 512, net.new_state()).finish().token_ids

    assert tokens(5) == tokens(5) != tokens(6)


def test_a_prompt_that_does_not_fit_is_refused_with_both_numbers(net):
    with pytest.raises(ContextOverflow, match="20 tokens and the context holds 20"):
        Generation(net, None, ids(20), GREEDY, 20, net.new_state())
    with pytest.raises(RequestError, match="empty"):
        Generation(net, None, [], GREEDY, 20, net.new_state())


def test_the_context_ends_an_answer_that_would_outgrow_it(net):
    run = Generation(net, None, ids(20), SamplingParams(temperature=0, max_tokens=None), 25, net.new_state()).finish()
    assert len(run.token_ids) <= 5 and run.finish_reason == "length"


def test_a_stop_token_ends_the_answer_and_is_named(net):
    free = generate_reference(net, ids(30), 12)
    params = SamplingParams(temperature=0, max_tokens=12, stop_token_ids=[free[4]])
    run = Generation(net, None, ids(30), params, 512, net.new_state()).finish()
    assert run.token_ids == free[: free.index(free[4]) + 1]
    assert (run.finish_reason, run.stop_reason) == ("stop", free[4])


def test_logprobs_are_those_of_the_scoring_pass(net):
    params = SamplingParams(temperature=0, max_tokens=6, logprobs=2)
    run = Generation(net, None, ids(20), params, 512, net.new_state()).finish()
    scored = torch.log_softmax(net(torch.tensor(ids(20) + run.token_ids)), -1)[19:]
    for row, token, entry in zip(scored, run.token_ids, run.logprobs, strict=False):
        assert entry[token].logprob == pytest.approx(row[token].item(), abs=1e-4)
    assert run.cumulative_logprob == pytest.approx(
        sum(e[t].logprob for e, t in zip(run.logprobs, run.token_ids, strict=True))
    )


# ── conversations ──


def test_a_next_turn_reads_only_what_is_new(net):
    session = Session(net, None, 512)
    first = answer(session, ids(60))
    second_prompt = ids(60) + first.token_ids + ids(10, seed=1)
    second = answer(session, second_prompt)
    assert second.cached_tokens >= 60 + 11  # all but the last sampled token, which was never read
    assert second.token_ids == generate_reference(net, second_prompt, 12)


def test_asking_again_reads_nothing(net):
    session = Session(net, None, 512)
    first = answer(session, ids(60))
    again = answer(session, ids(60))
    assert again.cached_tokens == 60 and again.token_ids == first.token_ids


def test_an_answer_that_changed_in_the_history_goes_back_to_the_end_of_its_prompt(net):
    """What chat templates do to thoughts: the next prompt holds another text where the answer was."""
    session = Session(net, None, 512)
    answer(session, ids(60), SamplingParams(temperature=0, max_tokens=40, ignore_eos=True))
    prompt = ids(60) + ids(25, seed=3)
    second = answer(session, prompt)
    assert second.cached_tokens == 60
    assert second.token_ids == generate_reference(net, prompt, 12)


def test_a_conversation_goes_back_several_turns(net):
    session, prompt = Session(net, None, 512), ids(20)
    ends = []
    for turn in range(3):
        run = answer(session, prompt)
        ends.append(list(prompt))
        prompt = prompt + run.token_ids + ids(9, seed=turn + 5)
    other = ends[1] + ids(6, seed=77)
    run = answer(session, other)
    assert run.cached_tokens == len(ends[1])
    assert run.token_ids == generate_reference(net, other, 12)


def test_any_sequence_of_prompts_gives_what_fresh_runs_give(net):
    g = torch.Generator().manual_seed(4)
    session, history = Session(net, None, 512), ids(30)
    for step in range(25):
        cut = int(torch.randint(1, len(history) + 1, (1,), generator=g))
        if step % 3 == 0:
            history = history[:cut]
        history = history[:150] + ids(int(torch.randint(1, 25, (1,), generator=g)), seed=step)
        params = SamplingParams(temperature=0, max_tokens=int(torch.randint(1, 9, (1,), generator=g)), ignore_eos=True)
        run = answer(session, history, params)
        assert run.token_ids == generate_reference(net, history, params.max_tokens), step
        history = history + run.token_ids


def test_an_unrelated_prompt_starts_over(net):
    session = Session(net, None, 512)
    answer(session, ids(60))
    run = answer(session, ids(50, seed=9))
    assert run.cached_tokens == 0 and run.token_ids == generate_reference(net, ids(50, seed=9), 12)


def test_leaving_an_answer_half_way_loses_nothing(net):
    """Ctrl+C: the iterator is closed, and the conversation goes on from what was read."""
    session = Session(net, None, 512)
    asked = []
    for _ in session.generate(ids(60), GREEDY, stopping=lambda: len(asked) > 3 or asked.append(1)):
        pass
    assert session.last.finish_reason == "abort" and len(session.last.token_ids) == 4
    prompt = ids(60) + session.last.token_ids + ids(5, seed=2)
    run = answer(session, prompt)
    assert run.cached_tokens == 63 or run.cached_tokens == 64
    assert run.token_ids == generate_reference(net, prompt, 12)


def test_an_interrupt_inside_the_network_leaves_a_state_that_goes_on(net, monkeypatch):
    session = Session(net, None, 512)
    answer(session, ids(60))
    block = net.layers[2]
    forward, calls = block.forward, []

    def interrupted(*arguments):
        calls.append(1)
        if len(calls) == 3:
            raise KeyboardInterrupt
        return forward(*arguments)

    monkeypatch.setattr(block, "forward", interrupted)
    with pytest.raises(KeyboardInterrupt):
        answer(session, ids(60) + ids(7, seed=1))
    monkeypatch.undo()
    prompt = ids(60) + ids(7, seed=1) + ids(3, seed=8)
    assert answer(session, prompt).token_ids == generate_reference(net, prompt, 12)
