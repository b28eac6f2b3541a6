"""Layers with an attention window release the pages before it; what is kept gives the numbers of a run without a state.

Twice: on the CPU (kernels and plain torch), and in slots of a device, in Triton's interpreter where there is no GPU.
"""

from __future__ import annotations

from pathlib import Path
from typing import Any

import pytest
import torch
from hypothesis import HealthCheck, given, settings
from hypothesis import strategies as st

import tiny
from tiercel.model import state_file
from tiercel.model.config import ModelConfig
from tiercel.model.decoder import Decoder
from tiercel.model.pages import PAGE
from tiercel.plan.sizes import kv_bytes

WINDOW = 70


def config(words: str) -> ModelConfig:
    """Attention with and without a window, beside Mamba-2 or not: "w f w+m"."""
    attention = {"kind": "attention", "heads": 2, "kv_heads": 1, "head_dim": 8, "rope": {"theta": 1e4}}
    parts = {
        "w": attention | {"window": WINDOW},
        "f": attention,
        "m": {"kind": "mamba2", "heads": 4, "head_dim": 8, "state": 8, "chunk": 16},
    }
    layers = [{"mixers": [parts[part] for part in word.split("+")]} for word in words.split()]
    return ModelConfig.from_dict({"vocab_size": 300, "width": 16, "layers": layers, "max_length": 4096})


def network(words: str, *, native: bool = True) -> Decoder:
    from tiercel.model.initialize import initialize

    net = Decoder(config(words))
    initialize(net, 3)
    net.embed.weight.data.mul_(30)
    net.eval().requires_grad_(False)
    if native:
        net.pack()
    return net


def text(length: int, seed: int = 0) -> torch.Tensor:
    return torch.tensor(tiny.ids(length, seed))


def pages(state: Any) -> list[int]:
    return [len(group.alive()) for group in state.groups]


@pytest.mark.parametrize("native", [True, False])
@torch.no_grad()
def test_pages_before_the_window_are_released_and_others_stay(native: bool) -> None:
    net, ids = network("w f w", native=native), text(700)
    state = net.new_state()
    for start in range(0, 640, 64):
        net(ids[start : start + 64], state)
    assert pages(state) == [-(-WINDOW // PAGE) + 1, 10]
    got = [net(token, state) for token in ids[640:].split(1)]
    torch.testing.assert_close(torch.cat(got), net(ids)[640:], atol=1e-4, rtol=1e-4)
    assert pages(state) == [-(-WINDOW // PAGE), 11]


@pytest.mark.parametrize("native", [True, False])
@torch.no_grad()
def test_a_trim_back_to_what_is_kept_is_exact_and_beyond_it_refused(native: bool) -> None:
    net, ids = network("w f", native=native), text(420)
    state = net.new_state()
    for token in ids[:400].split(50):
        net(token, state)
    least = state.min_pos
    assert 0 < least == (350 - WINDOW + 1) // PAGE * PAGE + WINDOW - 1
    assert not state.trim(least - 1) and state.length == 400
    assert state.trim(least)
    torch.testing.assert_close(net(ids[least:], state), net(ids)[least:], atol=1e-4, rtol=1e-4)


@torch.no_grad()
def test_all_of_the_last_forward_can_be_taken_back() -> None:
    net, ids = network("w"), text(600)
    state = net.new_state()
    net(ids[:500], state)
    for n in (1, 30, WINDOW, 90):
        before = state.length
        expected = state.min_pos_after(n)
        net(ids[:n], state)
        assert state.min_pos == expected <= before
        assert state.trim(before)


OPERATIONS = st.lists(
    st.tuples(
        st.sampled_from("extend extend extend trim fork snapshot restore save".split()),
        st.integers(0, 3),
        st.sampled_from([1, 2, 40, PAGE, WINDOW, 130]),
        st.floats(0, 1),
    ),
    min_size=5,
    max_size=16,
)


@pytest.mark.parametrize(("words", "native"), [("w", True), ("w f", False), ("w+m f", True)])
@settings(max_examples=20, deadline=None, derandomize=True, suppress_health_check=list(HealthCheck))
@given(operations=OPERATIONS)
@torch.no_grad()
def test_any_life_equals_a_run_without_a_state(
    words: str, native: bool, operations: list[Any], tmp_path_factory: pytest.TempPathFactory
) -> None:
    net, path = network(words, native=native), tmp_path_factory.getbasetemp() / "windowed"
    lives: list[tuple[Any, list[int]]] = [(net.new_state(), [])]
    snapshots: list[tuple[Any, list[int]]] = []
    for i, (what, which, count, share) in enumerate(operations):
        which %= len(lives)
        state, tokens = lives[which]
        if what == "extend" and len(tokens) < 500:
            new = text(count, seed=i)
            tokens += new.tolist()
            got = net(new, state)
            torch.testing.assert_close(got, net(torch.tensor(tokens))[-count:], atol=1e-4, rtol=1e-4)
        elif what == "trim":
            length = state.min_pos + int(share * (state.length - state.min_pos))
            assert state.trim(length)
            del tokens[length:]
        elif what == "fork" and len(lives) < 4:
            lives.append((state.fork(), list(tokens)))
        elif what == "snapshot":
            snapshots.append((state.snapshot(), list(tokens)))
            assert snapshots[-1][0].min_pos == state.min_pos
        elif what == "restore" and snapshots:
            snapshot, then = snapshots[count % len(snapshots)]
            state.restore(snapshot)
            tokens[:] = then
        elif what == "save":
            earlier = [one for one, then in snapshots if then == tokens[: len(then)] and len(then) < len(tokens)]
            state_file.save(state, path, tokens, earlier)
            state = net.new_state()
            loaded, kept = state_file.load(state, path)
            assert loaded == tokens and {one.length for one in kept} <= {one.length for one in earlier}
            lives[which] = state, tokens
            snapshots += [(one, tokens[: one.length]) for one in kept]
        assert state.length == len(tokens)
    for state, tokens in lives:
        new = text(3, seed=99)
        expected = net(torch.tensor([*tokens, *new.tolist()]))[-3:]
        torch.testing.assert_close(net(new, state), expected, atol=1e-4, rtol=1e-4)


def test_the_plan_counts_what_is_held(tmp_path: Path) -> None:
    net = network("w f")
    state, ids = net.new_state(), text(512)
    with torch.no_grad():
        for _ in range(4):
            net(ids, state, logits_to_keep=1)
    held = sum(page.nbytes for page in state.pages)
    assert held <= kv_bytes(net.config, 2048, 4) <= held + sum(group.size * 4 for group in state.groups)


@torch.no_grad()
def test_slots_of_a_device_release_pages_too() -> None:
    pytest.importorskip("triton", reason="pip install triton")
    from ops.triton.conftest import DEVICE
    from tiercel.model.gpu_runner import GPURunner

    net, ids = network("w f", native=False).to(DEVICE), text(173).to(DEVICE)
    runner = GPURunner(net, 2, 400)
    expected = net(ids)
    state = runner.new_state()
    for start in (0, 85):
        runner.forward([ids[start : start + 85]], [state])
    windowed, full = runner.slots.groups
    got = [runner.forward([ids[i : i + 1]], [state])[0] for i in range(170, 173)]
    torch.testing.assert_close(torch.cat(got), expected[170:173], atol=1e-4, rtol=1e-4)
    assert len(windowed.held(state.slot)) == -(-WINDOW // PAGE) and len(full.held(state.slot)) == 3
    assert state.min_pos == PAGE + WINDOW - 1 and not state.trim(state.min_pos - 1) and state.trim(171)
    snapshot, twin = state.snapshot(), state.fork()
    assert snapshot.min_pos == state.min_pos and [run.first for run in snapshot.runs] == [1, 0]
    host, other = runner.host_state(), runner.new_state()
    host.restore(snapshot)
    other.restore(host.snapshot())
    for each in (state, twin, other):
        got = runner.forward([ids[171:173]], [each], logits_to_keep=2)[0]
        torch.testing.assert_close(got, expected[171:173], atol=1e-4, rtol=1e-4)
    del state, twin, other, each
    assert len(windowed.free) == windowed.count and len(full.free) == full.count
