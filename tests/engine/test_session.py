"""A conversation says what fresh runs say, and is read once."""

from types import SimpleNamespace

import pytest
import torch

import tiny
from tiercel.engine.engine import Engine
from tiercel.engine.session import Session
from tiercel.generate import generate_reference
from tiercel.sampling import SamplingParams

GREEDY = SamplingParams(temperature=0, max_tokens=12, ignore_eos=True)


@pytest.fixture(scope="module")
def net():
    return tiny.network()


def ids(length, seed=0):
    return torch.randint(0, 256, (length,), generator=torch.Generator().manual_seed(seed)).tolist()


def conversation(net):
    return Session(Engine(SimpleNamespace(network=net, text=None, max_length=512), cache_bytes=1 << 28))


def answer(session, prompt, params=GREEDY):
    for _ in session.generate(prompt, params):
        pass
    return session.last


def test_a_next_turn_reads_only_what_is_new(net):
    session = conversation(net)
    first = answer(session, ids(60))
    second_prompt = ids(60) + first.token_ids + ids(10, seed=1)
    second = answer(session, second_prompt)
    assert second.cached_tokens >= 60 + 11  # all but the last sampled token, which was never read
    assert second.token_ids == generate_reference(net, second_prompt, 12)


def test_asking_again_reads_one_token(net):
    session = conversation(net)
    first = answer(session, ids(60))
    again = answer(session, ids(60))
    assert again.cached_tokens == 59 and again.token_ids == first.token_ids


def test_an_answer_that_changed_in_the_history_goes_back_to_the_end_of_its_prompt(net):
    """What chat templates do to thoughts: the next prompt holds another text where the answer was."""
    session = conversation(net)
    answer(session, ids(60), SamplingParams(temperature=0, max_tokens=40, ignore_eos=True))
    prompt = ids(60) + ids(25, seed=3)
    second = answer(session, prompt)
    assert second.cached_tokens == 60
    assert second.token_ids == generate_reference(net, prompt, 12)


def test_a_conversation_goes_back_several_turns(net):
    session, prompt = conversation(net), ids(20)
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
    session, history = conversation(net), ids(30)
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
    session = conversation(net)
    answer(session, ids(60))
    run = answer(session, ids(50, seed=9))
    assert run.cached_tokens == 0 and run.token_ids == generate_reference(net, ids(50, seed=9), 12)


def test_leaving_an_answer_half_way_loses_nothing(net):
    """Ctrl+C: the iterator is closed, and the conversation goes on from what was read."""
    session = conversation(net)
    asked = []
    for _ in session.generate(ids(60), GREEDY, stopping=lambda: len(asked) > 3 or asked.append(1)):
        pass
    assert session.last.finish_reason == "abort" and len(session.last.token_ids) == 5
    prompt = ids(60) + session.last.token_ids + ids(5, seed=2)
    run = answer(session, prompt)
    assert run.cached_tokens >= 64
    assert run.token_ids == generate_reference(net, prompt, 12)


def test_an_interrupt_inside_the_network_leaves_a_state_that_goes_on(net, monkeypatch):
    session = conversation(net)
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
