"""Steps run from a recording are the steps themselves: same bits, other states, grown states, changed networks."""

import os
import subprocess
import sys
from concurrent.futures import ThreadPoolExecutor

import pytest
import torch

import tiny
from tiercel.families.family import Layout
from tiercel.families.pattern import PATTERN, rows
from tiercel.model.cpu_runner import CPURunner
from tiercel.model.graph_cache import CapturedStep
from tiercel.ops.cpu import native
from tiercel.ops.cpu.capture import CapturedGraph
from tiercel.weights.load import of_source
from tiercel.weights.random import RandomSource, kinds_of

pytestmark = pytest.mark.skipif(not native.available, reason="no native kernels here")
MIXED = "attention+mamba2 mamba2/moe attention mamba1/moe"


class Captured:
    """A network as `CPURunner` runs it, called like the network."""

    def __init__(self, network):
        self.network, self.runner = network, CPURunner(network)

    def __getattr__(self, name):
        return getattr(self.network, name)

    def __call__(self, tokens, states, logits_to_keep=None):
        if isinstance(tokens, list):
            return self.runner.forward(tokens, states, logits_to_keep=logits_to_keep or max(map(len, tokens)))
        return self.runner.forward([tokens], [states], logits_to_keep=logits_to_keep or len(tokens))[0]


def captured(words) -> Captured:
    return Captured(tiny.network(words))


def recordings(network) -> list[CapturedStep]:
    return [step for step in network.runner.graphs.seen.values() if isinstance(step, CapturedStep)]


def live(network, tokens, state, logits_to_keep=None):
    """The forward as Python runs it."""
    return network.network(tokens, state, logits_to_keep=logits_to_keep)


def test_a_recording_is_of_one_thread():
    """Models of a server are captured side by side, each in a thread of its own."""

    def place(shape=(4, 16)):
        return native.empty(*shape).data_ptr()

    def places(graph):
        return {block.ctypes.data for block in graph.memory}

    def recorded(graph):
        with graph.recording():
            return place()

    first, second = CapturedGraph(), CapturedGraph()
    with ThreadPoolExecutor(1) as other, first.recording():
        assert other.submit(place).result() not in places(first), "it computes, and records nothing"
        assert other.submit(recorded, second).result() in places(second)
        assert place() in places(first), "the end of another recording is not the end of this one"


def test_a_text_of_recorded_steps_is_the_text_of_live_ones():
    network = captured(MIXED)
    tokens = torch.randint(0, 300, (90,))
    recorded, alone = network.new_state(), network.new_state()
    expected = [live(network, token, alone) for token in tokens.split(1)]
    got = [network(token, recorded) for token in tokens.split(1)]  # past chunk borders (16) and a cache that grows (64)
    assert len(recordings(network)) == 1
    assert all(torch.equal(a, b) for a, b in zip(got, expected, strict=True))


def test_one_recording_serves_all_texts():
    network = captured(MIXED)
    states, twins = [network.new_state() for _ in range(5)], [network.new_state() for _ in range(5)]
    for i, (state, twin) in enumerate(zip(states, twins, strict=True)):
        prompt = torch.arange(20 + 7 * i)
        network(prompt, state), network(prompt, twin)
    for step in range(40):
        for state, twin in zip(states, twins, strict=True):
            token = torch.tensor([step * 3 % 300])
            assert torch.equal(network(token, state, logits_to_keep=1), live(network, token, twin, logits_to_keep=1))
    assert len(recordings(network)) == 1


def test_a_recording_made_in_inference_mode_serves_outside_of_it():
    network = captured(MIXED)
    state, alone = network.new_state(), network.new_state()
    for i, token in enumerate(torch.arange(12).split(1)):
        with torch.inference_mode(i < 6):
            assert torch.equal(network(token.clone(), state), live(network, token, alone))
    assert len(recordings(network)) == 1


def test_rows_of_a_batch_are_recorded_together_and_may_change_places():
    network = captured(MIXED)
    states = [network.new_state() for _ in range(3)]
    alone = [network.new_state() for _ in range(3)]
    for step in range(30):
        order = [(i + step) % 3 for i in range(3)]
        tokens = [torch.tensor([(7 * step + i) % 300]) for i in order]
        got = network(tokens, [states[i] for i in order])
        for i, token, row in zip(order, tokens, got, strict=True):
            assert torch.equal(row, network(token, alone[i]))
    assert len(recordings(network)) == 2


def test_trim_and_restore_between_recorded_steps():
    network = captured(MIXED)
    state, twin = network.new_state(), network.new_state()
    for token in range(20):
        network(torch.tensor([token]), state), network(torch.tensor([token]), twin)
    mark = state.snapshot()
    after = [network(torch.tensor([t]), state) for t in (1, 2, 3, 4)]
    assert state.trim(22)
    assert torch.equal(network(torch.tensor([3]), state), after[2])
    state.restore(mark)
    assert [torch.equal(network(torch.tensor([t]), state), a) for t, a in zip((1, 2, 3, 4), after, strict=True)] == [
        True
    ] * 4


def test_answers_are_the_callers_own():
    network = captured(MIXED)
    state = network.new_state()
    answers = [network(torch.tensor([5]), state) for _ in range(6)]
    kept = [a.clone() for a in answers]
    network(torch.tensor([9]), state)
    assert all(torch.equal(a, b) for a, b in zip(answers, kept, strict=True))


def test_hooks_and_exchanged_modules_are_seen():
    network = captured(MIXED)
    state, heard = network.new_state(), []
    for _ in range(3):
        network(torch.tensor([5]), state)
    assert len(recordings(network)) == 1
    part = network.layers[1].mixers["mamba2"].out_proj
    handle = part.register_forward_hook(lambda *_: heard.append(1))
    network(torch.tensor([5]), state)
    assert heard
    handle.remove()
    network.layers[1].mixers["mamba2"].out_proj = torch.nn.Identity() if part.in_features == part.out_features else part
    network(torch.tensor([5]), state)


def test_what_torch_computes_is_never_left_out():
    network = captured("attention")
    network.layers[0].feed_forward = torch.nn.ReLU()
    state, twin = network.new_state(), network.new_state()
    got = [network(torch.tensor([t]), state) for t in range(8)]
    assert not recordings(network)
    assert all(torch.equal(live(network, torch.tensor([t]), twin), a) for t, a in enumerate(got))


def test_memory_of_a_recording_is_used_again():
    network = captured("attention+mamba2 " * 12)
    state = network.new_state()
    for _ in range(3):
        network(torch.tensor([5]), state)
    (step,) = recordings(network)
    assert len(step.graph.memory) < len(step.graph.ops) / 4


def test_packed_products_that_read_the_same_input_round_it_once_and_give_the_same_bits():
    config = tiny.config("attention+mamba2", width=64, ffn_width=64, repeat=1)
    layout = Layout(PATTERN, config, tuple(rows(config)))
    network = Captured(of_source(RandomSource(layout, kinds_of(layout, "q8_0"), 0)))
    states, twins = ([network.new_state() for _ in range(3)] for _ in range(2))
    for step in range(40):
        tokens = [torch.tensor([(7 * step + i) % 300]) for i in range(3)]
        for row, token, twin in zip(network(tokens, states), tokens, twins, strict=True):
            assert torch.equal(row, live(network, token, twin))
    names = recordings(network)[0].graph.ops.names()
    matrices = 4 + 2 + 3 + 1  # q k v o · in_proj out_proj · gate up down · head
    inputs = 1 + 2 + 2 + 1  # q, k, v and in_proj share one · o, out_proj · gate and up share one, down · head
    assert names.count("linear") == matrices and names.count("quantize_inputs") == inputs


def test_steps_do_not_wait_for_a_compiler():
    """torch imports its own where a class of ours watches what it computes: a second, and 120 MB, at a first step."""
    script = """
import sys, tiny, torch
from tiercel.model.cpu_runner import CPURunner
runner = CPURunner(tiny.network("attention+mamba2 mamba2 attention mamba1"))
state = runner.new_state()
for token in torch.arange(9).split(1):
    runner.forward([token], [state])
assert runner.graphs.seen and not {"torch._dynamo", "torch._inductor", "sympy"} & set(sys.modules)
"""
    subprocess.run(
        [sys.executable, "-c", script], check=True, env={**os.environ, "PYTHONPATH": os.pathsep.join(sys.path)}
    )
