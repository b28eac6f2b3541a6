"""A mixer is one place: every list of parameters follows from its spec, and no other file names its class."""

from __future__ import annotations

import ast
import dataclasses
import math
from pathlib import Path
from typing import Any

import pytest
import torch
from leaky import LeakyConfig

import tiercel
from families import nasty
from tiercel.errors import FormatError, RequestError
from tiercel.families import from_hf
from tiercel.families.family import Layout, module_rows
from tiercel.families.pattern import PATTERN, pattern, rows
from tiercel.feed_forward import FEED_FORWARDS
from tiercel.mixers import MIXERS
from tiercel.mixers.spec import Cost
from tiercel.model import state_file
from tiercel.model.config import LayerConfig, ModelConfig
from tiercel.model.decoder import Decoder
from tiercel.model.initialize import initialize
from tiercel.model.parameters import parameters
from tiercel.plan import kv_bytes_per_token, open_bytes, parameter_count, state_bytes
from tiercel.plan import pattern as picture
from tiercel.plan.forecast import forecast
from tiercel.plan.machines import machine
from tiercel.quant.recipes import quant_types
from tiercel.weights.export import NetworkSource, export
from tiercel.weights.load import load

SRC = Path(tiercel.__file__).parent
INNER, WIDTH = 48, 32


@pytest.fixture
def registered():
    MIXERS.register(LeakyConfig)
    yield
    del MIXERS["leaky"]


@pytest.fixture
def config(registered) -> ModelConfig:
    """The made-up mixer beside attention, and alone."""
    attention = {"kind": "attention", "heads": 4, "kv_heads": 2, "head_dim": 8, "rope": {"theta": 1e4}}
    leaky = {"kind": "leaky", "inner": INNER}
    mlp = {"kind": "gated_mlp", "width": 40}
    layers = [
        {"mixers": [attention, leaky], "feed_forward": mlp},
        {"mixers": [leaky], "feed_forward": mlp, "repeat": 2},
    ]
    return ModelConfig.from_dict({"vocab_size": 61, "width": WIDTH, "layers": layers})


def network(config: ModelConfig) -> Decoder:
    net = Decoder(config)
    initialize(net, 1)
    return net.eval().requires_grad_(False)


# ── the tables and the modules


@pytest.mark.parametrize("name", list(nasty.NASTY))
def test_the_parameters_of_a_config_are_those_of_its_network(name):
    made = nasty.NASTY[name]
    layout = from_hf({"model_type": made.family} | made.config)
    with torch.device("meta"):
        theirs = {name: tuple(p.shape) for name, p in Decoder(layout.config).named_parameters()}
    ours = {name: param.shape for name, param in parameters(layout.config).items()}
    assert list(ours.items()) == list(theirs.items()), "names, shapes and order"
    assert parameter_count(layout.config) == sum(map(math.prod, theirs.values()))
    assert {row.ours for row in layout.rows} == set(ours)


def test_the_nasty_models_hold_every_mixer_and_feed_forward():
    layers = [layer for made in nasty.NASTY.values()
              for layer in from_hf({"model_type": made.family} | made.config).config.layers]  # fmt: skip
    assert {mixer.kind for layer in layers for mixer in layer.mixers} == set(MIXERS)
    assert {layer.feed_forward.kind for layer in layers if layer.feed_forward} == set(FEED_FORWARDS)


def test_no_file_outside_mixers_and_families_names_a_mixer_class():
    classes = {cls.__name__ for cls in (*MIXERS.values(), *FEED_FORWARDS.values())}
    names = classes | {name.removesuffix("Config") for name in classes}
    found = []
    for file in sorted(SRC.rglob("*.py")):
        place = file.relative_to(SRC).as_posix()
        if place.startswith(("mixers/", "feed_forward/", "families/")):
            continue
        for node in ast.walk(ast.parse(file.read_text())):
            used = getattr(node, "id", None) or getattr(node, "attr", None) or getattr(node, "name", None)
            imported = [alias.name for alias in node.names] if isinstance(node, ast.ImportFrom) else []
            found += [f"{place}: {name}" for name in (used, *imported) if name in names]
    assert not found


# ── unknown ones


@pytest.mark.parametrize("part, what", [("mixers", "mixer"), ("feed_forward", "feed-forward")])
def test_an_unknown_kind_is_refused_by_name_and_the_known_are_listed(part, what):
    layer = {"mixers": [{"kind": "mamba1", "inner": 8, "state": 4, "dt_rank": 1}]}
    layer[part] = [{"kind": "warp"}] if part == "mixers" else {"kind": "warp"}
    with pytest.raises(FormatError, match=f"unknown {what} 'warp'; known: ") as error:
        ModelConfig.from_dict({"vocab_size": 9, "width": 8, "layers": [layer]})
    assert ("mamba2" if part == "mixers" else "moe") in str(error.value)


def test_a_kind_is_registered_once(registered):
    class Other(LeakyConfig):
        pass

    assert MIXERS.register(LeakyConfig) is LeakyConfig
    with pytest.raises(RequestError, match="'leaky' already: LeakyConfig"):
        MIXERS.register(Other)


# ── a made-up mixer, by one class and one registration


def test_its_config_goes_to_a_file_and_back(config):
    assert ModelConfig.from_dict(config.to_dict()) == config
    assert picture(config) == "(attention ∥ leaky + gated_mlp), 2 × (leaky + gated_mlp)"
    with pytest.raises(
        RequestError, match="'leaky' in 'leaky' is not known; choose from attention, gated_delta, mamba1, mamba2"
    ):
        pattern("leaky", width=8, vocab_size=9)


def test_its_network_has_the_parameters_of_its_spec(config):
    net = network(config)
    assert {name: tuple(p.shape) for name, p in net.named_parameters()} == {
        name: param.shape for name, param in parameters(config).items()
    }
    assert sum(p.numel() for p in net.parameters()) == parameter_count(config)
    assert net(torch.arange(9)).shape == (9, 61)


PIECES = [(37,), (1,) * 37, (5, 1, 16, 1, 14), (8, 8, 8, 13)]


def run(net: Decoder, ids: torch.Tensor, pieces: tuple[int, ...], state: Any = None) -> torch.Tensor:
    state = net.new_state() if state is None else state
    return torch.cat([net(piece, state) for piece in ids.split(list(pieces))])


def close(a: torch.Tensor, b: torch.Tensor) -> None:
    torch.testing.assert_close(a, b, atol=1e-4, rtol=1e-4)


@pytest.mark.parametrize("pieces", PIECES, ids=str)
@pytest.mark.parametrize("native", [False, True])
def test_it_reads_prompts_chunks_and_steps(config, native, pieces):
    net, ids = network(config), torch.randint(0, 61, (37,))
    expected = net(ids)
    if native:
        net.pack()
    close(run(net, ids, pieces), expected)
    other = torch.randint(0, 61, (9,))
    states = [net.new_state(), net.new_state()]
    rows = net([ids, other], states)
    close(rows[0], expected)
    close(net([ids[:1], other[:1]], states)[1], run(net, torch.cat((other, other[:1])), (10,))[-1:])


def test_it_trims_forks_and_snapshots(config):
    net, ids = network(config), torch.randint(0, 61, (40,))
    expected, state = net(ids), net.new_state()
    run(net, ids[:30], (20, 6, 1, 1, 1, 1), state)
    for length in (29, 27, 25):  # chunks of 8: what the last calls added can be taken back
        assert state.trim(length)
        close(run(net, ids[length:30], (30 - length,), state), expected[length:30])
    assert state.min_pos >= 16 and not state.trim(state.min_pos - 1)
    snapshot, fork = state.snapshot(), state.fork()
    close(run(net, ids[30:], (4, 6), state), expected[30:])
    close(run(net, ids[30:], (1,) * 10, fork), expected[30:])
    state.restore(snapshot)
    close(run(net, ids[30:], (10,), state), expected[30:])


def test_it_is_saved_and_loaded(config, tmp_path):
    net, ids = network(config), torch.randint(0, 61, (40,))
    expected, state = net(ids), net.new_state()
    run(net, ids[:29], (29,), state)
    state_file.save(state, tmp_path / "state")
    again = net.new_state()
    state_file.load(again, tmp_path / "state")
    close(run(net, ids[29:], (3, 8), again), expected[29:])


def test_it_is_exported_and_loaded(config, tmp_path):
    net, ids = network(config), torch.randint(0, 61, (12,))
    export(NetworkSource(net, Layout(PATTERN, config, rows(config))), tmp_path / "model")
    close(load(tmp_path / "model")[0](ids), net(ids))


def test_it_is_planned_and_unknown_rates_are_refused(config, monkeypatch):
    found = forecast(config, machine("laptop-ddr5"), context=256, quantize="q8_0")
    assert state_bytes(config) == found.state_bytes_per_sequence == 3 * 4 * INNER
    assert open_bytes(config) == 3 * 2 * 8 * 4 * INNER
    assert kv_bytes_per_token(config) == 2 * 2 * 2 * 8
    assert found.decode_tok_s > 0 and found.prefill_tok_s > 0
    monkeypatch.setattr(LeakyConfig, "cost", lambda self, tokens, context: Cost(ops={"wavelet": 1.0}))
    with pytest.raises(RequestError, match="no rate 'wavelet'; known: attend"):
        forecast(config, machine("laptop-ddr5"), context=256)


def test_it_has_a_gguf_table_types_and_lora_targets(config):
    spec = MIXERS["leaky"](inner=INNER)
    table = {row.ours: row for row in module_rows(3, spec, WIDTH, "model.layers.3.leaky")}
    assert table["layers.3.mixers.leaky.A_log"].gguf == "blk.3.leaky_a"
    assert table["layers.3.mixers.leaky.out_proj.bias"].hf == "model.layers.3.leaky.out_proj.bias"
    packed = quant_types(parameters(config), "q8_0")
    assert packed["layers.1.mixers.leaky.in_proj.weight"] == "Q8_0" and not any("A_log" in name for name in packed)
    from tiercel.train.lora import matched

    layout = Layout(PATTERN, config, rows(config))
    assert matched(layout, ()) == ["down", "gate", "in_proj", "k", "o", "out_proj", "q", "up", "v"]


def test_its_shards_are_the_whole(config):
    from tiercel.model.tensor_parallel import shard

    net = network(config)
    parts = [shard(net, rank, 2) for rank in range(2)]
    whole, halves = dict(net.named_parameters()), [dict(part.named_parameters()) for part in parts]
    shapes = {name: param.shape for name, param in parameters(parts[0].config).items()}
    assert all({name: tuple(p.shape) for name, p in half.items()} == shapes for half in halves)
    name = "layers.1.mixers.leaky."
    x, z = whole[f"{name}in_proj.weight"].split(INNER)
    both = [half[f"{name}in_proj.weight"].split(INNER // 2) for half in halves]
    assert torch.equal(torch.cat([b[0] for b in both]), x) and torch.equal(torch.cat([b[1] for b in both]), z)
    assert torch.equal(torch.cat([h[f"{name}A_log"] for h in halves]), whole[f"{name}A_log"])
    assert torch.equal(torch.cat([h[f"{name}out_proj.weight"] for h in halves], 1), whole[f"{name}out_proj.weight"])
    assert torch.equal(halves[0][f"{name}out_proj.bias"], whole[f"{name}out_proj.bias"])
    assert not halves[1][f"{name}out_proj.bias"].any()
    odd = dataclasses.replace(config, layers=(LayerConfig(mixers=(LeakyConfig(inner=9),)),))
    with pytest.raises(RequestError, match="9 leaky channels cannot be split over 2 processes"):
        shard(network(odd), 0, 2)


def test_its_decay_is_not_decayed_in_training(config):
    from tiercel.train.optim import adamw

    net = network(config).requires_grad_(True)
    decayed, free = adamw(net, 1e-3).param_groups
    names = {id(p): name for name, p in net.named_parameters()}
    assert {names[id(p)] for p in free["params"]} >= {f"layers.{i}.mixers.leaky.A_log" for i in range(3)}
    assert all(p.dim() == 2 for p in decayed["params"])
