"""The engine on a GPU's slots gives the tokens that the plain network gives, reused, forked and sent back or not.

Without a GPU the kernels run in Triton's interpreter.
"""

from types import SimpleNamespace

import pytest
import torch

pytest.importorskip("triton", reason="pip install triton")

import tiny
from by_hand import generate_reference
from ops.triton.conftest import DEVICE
from tiercel.engine.engine import Engine
from tiercel.model import state_file
from tiercel.model.gpu_runner import GPURunner
from tiercel.sampling.params import SamplingParams
from tiny import ids


@pytest.fixture(scope="module")
def net():
    return tiny.network(
        "attention+mamba2", native=False, repeat=1, head_dim=16, kv_heads=1, groups=1, mamba_head_dim=32
    ).to(DEVICE)


def engine(net, slots=2, **more):
    on_device = GPURunner(net, slots, 200)
    return Engine(
        SimpleNamespace(network=net, tokenizer=None, max_length=200),
        slots=slots,
        runner=on_device,
        **({"cache_bytes": 1 << 24, "max_num_batched_tokens": 64} | more),
    )


def greedy(count, **more):
    return SamplingParams(temperature=0, max_tokens=count, ignore_eos=True, **more)


def run(engine):
    while not engine.idle:
        engine.step()


def expected(net, prompt, params):
    return generate_reference(net, prompt, params.max_tokens)


def answer(request, i=0):
    return request.sequences[i].token_ids


def test_texts_together_then_one_that_goes_on(net):
    e = engine(net)
    prompts = [ids(5), ids(20, 1)]
    requests = [e.add(p, greedy(3)) for p in prompts]
    run(e)
    for prompt, request in zip(prompts, requests, strict=True):
        assert answer(request) == expected(net, prompt, greedy(3))
    longer = prompts[1] + answer(requests[1]) + ids(3, 2)
    again = e.add(longer, greedy(3))
    run(e)
    assert again.cached_tokens >= 20 and answer(again) == expected(net, longer, greedy(3))


def test_answers_that_fork_and_slots_that_come_back(net):
    e = engine(net)
    params = SamplingParams(temperature=40.0, seed=5, n=2, max_tokens=3, ignore_eos=True)
    request = e.add(ids(5), params)
    run(e)
    one = e.add(ids(5), greedy(3))
    run(e)
    assert answer(request, 0) != answer(request, 1)
    assert answer(one) == expected(net, ids(5), greedy(3))
    slots = e.runner.slots
    assert len(slots.free) == slots.count and not any(any(group.numbers) for group in slots.groups)


def test_the_next_forward_has_begun_when_a_token_is_handed_out(net):
    e = engine(net)
    first, second = e.add(ids(3), greedy(2)), e.add(ids(5, 1), greedy(5))
    begun = []
    while not e.idle:
        e.step()
        begun.append(e.steps.in_flight is not None)
    assert begun == [True, True, True, True, False]  # two prompts and their first tokens; the last has nothing to begin
    assert answer(first) == expected(net, ids(3), greedy(2))
    assert answer(second) == expected(net, ids(5, 1), greedy(5))


def test_who_comes_leaves_or_is_sent_back_while_a_forward_is_under_way_changes_nothing(net):
    e = engine(net)
    stays, leaves = e.add(ids(3), greedy(6)), e.add(ids(18, 1), greedy(6))
    for _ in range(2):
        e.step()
    assert e.steps.in_flight is not None
    e.abort(leaves.id)
    comes = e.add(ids(5, 2), greedy(3))
    e.step()
    e.step()
    assert e.steps.in_flight is not None
    e.preempt(e.scheduler.running[0])
    run(e)
    assert answer(stays) == expected(net, ids(3), greedy(6))
    assert answer(comes) == expected(net, ids(5, 2), greedy(3))
    assert answer(leaves) == expected(net, ids(18, 1), greedy(6))[: len(answer(leaves))]
    again = e.add(ids(18, 1) + answer(leaves), greedy(2))
    run(e)
    assert again.cached_tokens >= 18 and answer(again) == expected(net, ids(18, 1) + answer(leaves), greedy(2))
    assert len(e.runner.slots.free) == e.runner.slots.count


def test_a_forward_that_fails_ahead_is_made_again(net, monkeypatch):
    e = engine(net)
    request = e.add(ids(3), greedy(3))
    e.step()
    real, fails = GPURunner.launch, [True]

    def call(self, *given, **more):
        if fails and fails.pop():
            raise RuntimeError("out of memory")
        return real(self, *given, **more)

    monkeypatch.setattr(GPURunner, "launch", call)
    run(e)
    assert not fails and answer(request) == expected(net, ids(3), greedy(3))


def test_a_long_prompt_is_read_ahead_beside_texts_that_go_on(net):
    e = engine(net, max_num_batched_tokens=24, cache_bytes=0)
    first = e.add(ids(9), greedy(6))
    e.step()
    second = e.add(ids(60, 1), greedy(3))
    ahead = []
    while not e.idle:
        e.step()
        rows = e.steps.in_flight.rows if e.steps.in_flight is not None else []
        ahead.append(any(row.num_scheduled_tokens > 1 for row in rows))
    assert sum(ahead) >= 2  # pieces of the prompt were started before the tokens beside them were on the host
    assert answer(first) == expected(net, ids(9), greedy(6))
    assert answer(second) == expected(net, ids(60, 1), greedy(3))


def test_tokens_that_the_host_must_sample_share_steps_with_others(net):
    e = engine(net)
    both = [e.add(ids(9), greedy(4)), e.add(ids(21, 1), greedy(4, logprobs=1))]
    run(e)
    for prompt, request in zip((ids(9), ids(21, 1)), both, strict=True):
        assert answer(request) == expected(net, prompt, greedy(4))
    assert len(both[1].sequences[0].logprobs) == 4


@pytest.mark.slow
def test_who_is_sent_back_goes_on_where_it_was(net):
    e = engine(net, slots=1)
    request = e.add(ids(40), greedy(3))
    for _ in range(2):
        e.step()
    e.preempt(e.scheduler.running[0])
    run(e)
    assert answer(request) == expected(net, ids(40), greedy(3))


@pytest.mark.slow
def test_a_conversation_is_saved_and_goes_on_in_another_process(net, tmp_path):
    first, second = (GPURunner(net, 1, 200) for _ in range(2))
    text = torch.tensor(ids(75), device=DEVICE)
    state = first.new_state()
    first.forward([text[:70]], [state])
    host = first.host_state()
    host.restore(state.snapshot())
    state_file.save(host, tmp_path / "state", text[:70].tolist())
    back, host = second.new_state(), second.host_state()
    state_file.load(host, tmp_path / "state")
    back.restore(host.snapshot())
    assert back.length == 70 and back.min_pos == state.min_pos
    for i in range(70, 75):
        a, b = first.forward([text[i : i + 1]], [state])[0], second.forward([text[i : i + 1]], [back])[0]
        torch.testing.assert_close(a, b, atol=1e-5, rtol=1e-5)
