"""A state is its text and nothing else: however it came to hold n tokens, it goes on as a fresh run of them would.

Random lives (extend, trim, fork, snapshot, restore, save, load) of several states at once, compared after every
extension with the logits of the whole text in one go.
"""

from __future__ import annotations

import dataclasses
from collections.abc import Callable
from pathlib import Path
from typing import Any

import pytest
import torch
from hypothesis import HealthCheck, given, settings
from hypothesis import strategies as st

import tiercel
from families import nasty
from tiercel.errors import FormatError, RequestError
from tiercel.mixers.paged import PagedState
from tiercel.model import state_file

CLOSE = 3e-5
MODELS = ["h1-gate_first", "h1-norm_first", "mamba-biases", "mamba2-groups2", "bamba-biases", "jamba-experts",
          "mistral-window", "qwen2-mixed_window"]  # fmt: skip
RECURRENT = [name for name in MODELS if not name.startswith(("mistral", "qwen2"))]
CHUNK = 128
LONGEST = 420


@pytest.fixture(scope="module")
def network(built: Callable) -> Callable[[str], Any]:
    done: dict[str, Any] = {}

    def load(name: str) -> Any:
        if name not in done:
            done[name] = tiercel.load(built(name).folder, dtype="float32").network
        return done[name]

    return load


def loaded(net: Any, path: Path) -> Any:
    state = net.new_state()
    state_file.load(state, path)
    return state


@dataclasses.dataclass
class Life:
    """One state and the tokens it is said to hold."""

    state: Any
    text: list[int]


class Lives:
    """Several states of one network, and the oracle: a fresh run without any state."""

    def __init__(self, net: Any, folder: Path) -> None:
        self.net, self.path = net, folder / "state"
        self.lives = [Life(net.new_state(), [])]
        self.snapshots: list[tuple[Any, list[int]]] = []

    @torch.no_grad()
    def extend(self, life: Life, count: int, seed: int) -> None:
        count = min(count, LONGEST - len(life.text))
        if count:
            new = nasty.tokens(count, seed=seed)
            life.text = life.text + new.tolist()
            logits = self.net([new], [life.state])[0]
            fresh = self.net(torch.tensor(life.text))[-count:]
            assert float((logits - fresh).abs().max()) < CLOSE

    def trim(self, life: Life, share: float) -> None:
        length = int(share * len(life.text))
        kept = life.state.trim(length)
        assert kept == (life.state.min_pos <= length)
        if kept:
            life.text = life.text[:length]

    def fork(self, life: Life) -> None:
        if len(self.lives) < 4:
            self.lives.append(Life(life.state.fork(), list(life.text)))

    def snapshot(self, life: Life) -> None:
        self.snapshots.append((life.state.snapshot(), list(life.text)))

    def restore(self, life: Life, which: int) -> None:
        if self.snapshots:
            snapshot, text = self.snapshots[which % len(self.snapshots)]
            life.state.restore(snapshot)
            life.text = list(text)

    def save_and_load(self, life: Life) -> None:
        state_file.save(life.state, self.path)
        life.state = loaded(self.net, self.path)

    def check(self) -> None:
        for life in self.lives:
            assert life.state.length == len(life.text)
            assert 0 <= life.state.min_pos <= life.state.length
            assert life.state.nbytes > 0 or not life.text


OPERATIONS = st.lists(
    st.tuples(
        st.sampled_from(["extend", "extend", "extend", "trim", "trim", "fork", "snapshot", "restore", "save"]),
        st.integers(0, 3),
        st.sampled_from([1, 1, 2, 3, 7, 40, 127, 128, 130]),
        st.floats(0.3, 1.0),
    ),
    min_size=4,
    max_size=14,
)


@pytest.mark.parametrize("name", MODELS)
@settings(max_examples=12, deadline=None, derandomize=True, suppress_health_check=list(HealthCheck))
@given(operations=OPERATIONS)
def test_any_life_equals_a_fresh_run(
    name: str, operations: list[Any], network: Callable, tmp_path_factory: pytest.TempPathFactory
) -> None:
    lives = Lives(network(name), tmp_path_factory.mktemp("life"))
    lives.extend(lives.lives[0], 20, seed=9)
    for i, (what, which, count, share) in enumerate(operations):
        life = lives.lives[which % len(lives.lives)]
        if what == "extend":
            lives.extend(life, count, seed=100 + i)
        elif what == "trim":
            lives.trim(life, share)
        elif what == "fork":
            lives.fork(life)
        elif what == "snapshot":
            lives.snapshot(life)
        elif what == "restore":
            lives.restore(life, which)
        else:
            lives.save_and_load(life)
        lives.check()
    for i, life in enumerate(lives.lives):  # none has touched another
        lives.extend(life, 2, seed=200 + i)


@pytest.mark.parametrize("name", MODELS)
@pytest.mark.parametrize("age", [1, 100, 126, 128, 255])
def test_drafted_tokens_can_always_be_taken_back(name: str, age: int, network: Callable, tmp_path: Path) -> None:
    """Verify nine drafted tokens, keep four, go on: also where the nine cross a chunk boundary."""
    lives = Lives(network(name), tmp_path)
    life = lives.lives[0]
    lives.extend(life, age, seed=1)
    for round in range(3):
        lives.extend(life, 9, seed=10 + round)
        assert life.state.trim(len(life.text) - 5)
        life.text = life.text[:-5]
    lives.extend(life, 1, seed=20)


@pytest.mark.parametrize("name", RECURRENT)
@torch.no_grad()
def test_a_cut_before_the_kept_inputs_is_refused_and_changes_nothing(name: str, network: Callable) -> None:
    net, text = network(name), nasty.tokens(300)
    state, twin = net.new_state(), net.new_state()
    net([text], [state]), net([text], [twin])
    assert state.min_pos > 0
    assert not state.trim(state.min_pos - 1) and not state.trim(301) and not state.trim(-1)
    assert state.length == 300
    more = nasty.tokens(5, seed=1)
    assert torch.equal(net([more], [state])[0], net([more], [twin])[0])


@pytest.mark.parametrize("name", RECURRENT)
@torch.no_grad()
def test_a_snapshot_before_the_first_boundary_keeps_no_state_and_later_ones_do(name: str, network: Callable) -> None:
    net, text = network(name), nasty.tokens(200)
    state = net.new_state()
    net([text[:20]], [state])
    early = state.snapshot()
    net([text[20:]], [state])
    late = state.snapshot()
    assert early.min_pos == 0 and not any("ssm_state" in tensors for tensors, _ in early.layers)
    assert late.min_pos > 0 and all("ssm_state" in tensors for tensors, _ in late.layers)
    more = nasty.tokens(9, seed=1)
    for snapshot in (early, late, early):  # by a state that remembers something else, and the other way round
        fresh = net.new_state()
        fresh.restore(snapshot)
        state.restore(snapshot)
        assert torch.equal(net([more], [state])[0], net([more], [fresh])[0])


@torch.no_grad()
def test_attention_alone_can_be_cut_anywhere(network: Callable) -> None:
    net, text = network("mistral-window"), nasty.tokens(300)
    state = net.new_state()
    net([text], [state])
    assert state.trim(3) and state.length == 3
    assert float((net([text[3:40]], [state])[0] - net(text[:40])[3:]).abs().max()) < CLOSE
    assert state.trim(0) and state.length == 0


@pytest.mark.parametrize("name", ["h1-gate_first", "mamba-biases", "mamba2-groups2"])
@torch.no_grad()
def test_the_recurrent_part_stays_small(name: str, network: Callable) -> None:
    """Constant memory: what 400 tokens need is no more than a few chunks', attention's own cache aside."""
    net = network(name)
    state, sizes = net.new_state(), []
    for i in range(9):
        net([nasty.tokens(120, seed=i)], [state])
        sizes.append(state.own_nbytes - sum(b.nbytes for b in _attention_buffers(state)))
    assert max(sizes[3:]) <= max(sizes[:3]) * 1.5


def _attention_buffers(state: Any) -> list[torch.Tensor]:
    return [
        b for layer in state.layers for part in layer if isinstance(part, PagedState) for b in part.buffers.values()
    ]


# -- saved states ----------------------------------------------------------------------------------


@torch.no_grad()
def test_a_saved_state_goes_on_bit_for_bit(network: Callable, tmp_path: Path) -> None:
    net = network("h1-gate_first")
    state = net.new_state()
    net([nasty.tokens(150)], [state])
    state_file.save(state, tmp_path / "s")
    again = loaded(net, tmp_path / "s")
    assert again.length == 150 and again.min_pos == state.min_pos
    more = nasty.tokens(7, seed=1)
    assert torch.equal(net([more], [again])[0], net([more], [state])[0])


@torch.no_grad()
def test_a_state_of_another_model_is_refused(network: Callable, tmp_path: Path) -> None:
    mine, other = network("h1-gate_first"), network("h1-norm_first")
    state = mine.new_state()
    mine([nasty.tokens(10)], [state])
    state_file.save(state, tmp_path / "s")
    with pytest.raises(FormatError, match="another model"):
        loaded(other, tmp_path / "s")


@torch.no_grad()
def test_a_damaged_state_is_refused(network: Callable, tmp_path: Path) -> None:
    net = network("mamba2-groups2")
    state = net.new_state()
    net([nasty.tokens(140)], [state])
    state_file.save(state, tmp_path / "s")
    whole = (tmp_path / "s").read_bytes()
    generator = torch.Generator().manual_seed(0)
    for _ in range(60):
        at = int(torch.randint(len(whole), (1,), generator=generator))
        (tmp_path / "s").write_bytes(whole[:at] + bytes([whole[at] ^ 0x41]) + whole[at + 1 :])
        with pytest.raises(FormatError):
            loaded(net, tmp_path / "s")
    (tmp_path / "s").write_bytes(whole[:-9])
    with pytest.raises(FormatError):
        loaded(net, tmp_path / "s")
    with pytest.raises(FormatError):
        loaded(net, tmp_path / "nowhere")


# -- requests that cannot be served ----------------------------------------------------------------


@torch.no_grad()
def test_a_refused_forward_leaves_the_state_as_it_was(network: Callable) -> None:
    net = network("h1-gate_first")
    state, other = net.new_state(), net.new_state()
    net([nasty.tokens(12)], [state])
    bad = [([torch.tensor([nasty.VOCAB])], [state]), ([torch.tensor([-1])], [state]),
           ([torch.tensor([], dtype=torch.long)], [state]), ([torch.tensor([1])], [state, other]),
           ([torch.tensor([1]), torch.tensor([2])], [state, state])]  # fmt: skip
    for tokens, states in bad:
        with pytest.raises(RequestError):
            net(tokens, states)
    assert state.length == 12
    assert float((net([nasty.tokens(5, 1)], [state])[0] - _fresh(net, 12, 5)).abs().max()) < CLOSE


def _fresh(net: Any, first: int, second: int) -> torch.Tensor:
    return net(torch.cat([nasty.tokens(first), nasty.tokens(second, 1)]))[-second:]
