"""`tiercel plan`: what is said of memory is what loading takes; what does not fit is told what would."""

from __future__ import annotations

import json

import pytest
from typer.testing import CliRunner

from tiercel.commands.cli import app
from tiercel.errors import DoesNotFit, ModelNotFound, RequestError
from tiercel.families import from_hf
from tiercel.families.shapes import SHAPES
from tiercel.hub import planning
from tiercel.plan import chart, open_bytes, shapes
from tiercel.plan.forecast import forecast, matrices, prefill_seconds, step_seconds, transformer_of
from tiercel.plan.machines import MACHINES, PROBES, Machine, from_probe, machine

PUBLISHED = {  # reference: the makers' model cards and configs
    "lfm2:350m": 354_483_968, "lfm2:700m": 742_489_344, "lfm2:1.2b": 1_170_340_608, "lfm2-2.6b": 2_569_272_320,
    "gemma3-270m": 268_098_176, "gemma3:1b": 999_885_952, "phi-4:14b": 14_659_507_200,
    "lfm2:8b-a1b": 8_339_929_856 + 22 * 32,  # and the biases of 22 routers
    "granite-4-h:350m": 340_332_224, "granite-4-h:1b": 1_461_538_368, "nemotron-3-nano:30b-a3b": 31_577_940_288,
    "falcon-mamba:7b": 7_272_665_088, "qwen3:0.6b": 596_049_920, "qwen3:4b": 4_022_468_096,
    "qwen3:8b": 8_190_735_360, "qwen3:30b-a3b": 30_532_122_624,
    "falcon-h1:90m": 91_131_072, "falcon-h1:0.5b": 521_411_104, "falcon-h1:1.5b": 1_554_863_488,
    "falcon-h1:7b": 7_585_648_736, "falcon-h1:34b": 33_642_516_224,
}  # fmt: skip
LAPTOP = "laptop-ddr5"


def told(*words: str) -> dict:
    result = CliRunner().invoke(app, ["plan", *words, "--json"])
    assert result.exit_code == 0, result.output
    return json.loads(result.stdout)


@pytest.mark.parametrize("name", PUBLISHED)
def test_published_sizes_have_their_published_parameters(name):
    assert planning.plan(name, device=LAPTOP)["parameters"] == PUBLISHED[name]


@pytest.mark.parametrize(
    "hub_id, name",
    [("tiiuae/Falcon-H1R-7B", "falcon-h1r:7b"), ("tiiuae/Falcon-H1R-7B-GGUF", "falcon-h1r:7b"),
     ("tiiuae/Falcon-H1-0.5B-Instruct", "falcon-h1:0.5b"), ("Qwen/Qwen3-30B-A3B", "qwen3:30b-a3b"),
     ("tiiuae/falcon-mamba-7b", "falcon-mamba:7b"), ("state-spaces/mamba-2.8b-hf", "mamba:2.8b")],
)  # fmt: skip
def test_a_hub_id_is_planned_as_its_published_shape(hub_id, name):
    found, same = told(hub_id, "--device", LAPTOP), told(name, "--device", LAPTOP)
    assert found["model"] == hub_id and found["parameters"] == same["parameters"]
    assert found["total_bytes"] == same["total_bytes"]


def test_the_7b_in_numbers_everybody_can_check():
    found = told("falcon-h1:7b", "--device", LAPTOP, "--context", "32768")
    assert found["kv_bytes_per_token"] == 45_056
    assert found["state_bytes_per_sequence"] == 132 * 2**20
    assert found["kv_bytes"] == 45_056 * 32_768
    parts = ("weights", "kv", "state", "snapshots", "working", "process")
    assert found["total_bytes"] == sum(found[f"{part}_bytes"] for part in parts)
    assert found["fits"] and found["prefill_tok_s"] > 0 and found["decode_tok_s"] > 0
    assert [row["context"] for row in found["lengths"]] == [4096, 32_768, 131_072, 262_144]
    for row in found["lengths"][1:]:
        assert row["model"]["cache_bytes"] < 0.5 * row["transformer"]["cache_bytes"]


@pytest.mark.parametrize("name", ["falcon-h1:7b", "mamba:2.8b", "mamba2:2.7b", "bamba:9b", "smollm2:135m",
                                  "qwen3.5:27b", "olmo-hybrid:7b"])  # fmt: skip
def test_every_parameter_has_the_shape_the_network_gives_it(name):
    from tiercel.weights.checkpoint import parameter_shapes

    layout = from_hf(SHAPES[name])
    assert {part: shape for part, shape, _ in shapes(layout.config)} == parameter_shapes(layout)
    assert {part: wide for part, _, wide in shapes(layout.config)} == {r.ours: r.keep_fp32 for r in layout.rows}


@pytest.mark.parametrize("recipe", ["q4_k_m", "q8_0", "int8", "nf4", "bf16", "f32"])
def test_weights_and_states_take_the_bytes_that_were_said(recipe, tmp_path):
    from tiercel.bench.models import random_source
    from tiercel.bench.traffic import weight_bytes
    from tiercel.weights.load import of_source

    network = of_source(random_source("falcon-h1:90m", recipe))
    packing = {"stored": recipe.upper()} if recipe in ("bf16", "f32") else {"quantize": recipe}
    found = forecast(network.config, machine(LAPTOP), context=640, slots=3, **packing)
    twelve_bits = recipe in ("bf16", "nf4")  # how many blocks of bfloat16 keep sixteen depends on the weights
    assert found.weights_bytes == pytest.approx(weight_bytes(network), rel=0.01 if twelve_bits else 0)
    state = network.new_state()
    state.reserve(640)
    assert found.state_bytes == 3 * (state.nbytes - sum(page.nbytes for page in state.pages))
    assert found.kv_bytes == 3 * sum(page.nbytes for page in state.pages)


def test_a_snapshot_takes_what_was_said(tmp_path):
    import torch

    from tiercel.bench.models import random_source
    from tiercel.weights.load import of_source

    file = tmp_path / "small.json"
    file.write_text('{"pattern": "attention+mamba2 mamba1/-", "width": 64, "repeat": 2, "vocab_size": 96}')
    network = of_source(random_source(str(file), "q8_0"))
    with torch.inference_mode():
        state = network.new_state()
        network(torch.zeros(256, dtype=torch.long), state, logits_to_keep=1)
    said = forecast(network.config, machine(LAPTOP), context=256, quantize="q8_0").snapshot_bytes
    assert said == state.snapshot().own_nbytes


def test_what_does_not_fit_is_told_the_nearest_that_does():
    found = told("falcon-h1:34b", "--device", "rtx-4090", "--slots", "2")
    assert not found["fits"]
    words = found["nearest"]["type"].split()
    assert words[:3] == ["tiercel", "plan", "falcon-h1:34b"]
    again = told(*words[2:])
    assert again["fits"] and again["total_bytes"] == found["nearest"]["total_bytes"]
    hopeless = planning.plan("jamba:mini", device="laptop-ddr4")
    assert not hopeless["fits"] and hopeless["nearest"] is None
    assert "choose a smaller one" in planning.table(hopeless)


def test_a_model_too_large_for_this_machine_is_refused_in_one_line(monkeypatch):
    monkeypatch.setattr(planning, "this_machine", lambda *a, **k: Machine("this", 4 << 30, 2 << 30))
    with pytest.raises(DoesNotFit, match=r"falcon-h1:7b needs .* GB of memory .* 2\.1 GB are free") as error:
        planning.fit("falcon-h1:7b")
    assert error.value.exit_code == 4 and "\n" not in str(error.value)
    small = planning.fit("falcon-h1:0.5b", slots=8, quantize="q4_k_m")
    assert 1 <= small.slots <= 8 and small.context <= small.wanted
    assert small.states + small.cache < 2 << 30
    asked = planning.fit("falcon-h1:0.5b", context=2048, quantize="q4_k_m")
    assert asked.context == 2048


def test_a_context_that_has_no_room_is_made_shorter_and_said_so(monkeypatch):
    monkeypatch.setattr(planning, "this_machine", lambda *a, **k: Machine("this", 8 << 30, 7 << 30))
    found = planning.fit("falcon-h1:7b", quantize="q4_k_m")
    assert found.context < 262_144
    assert f"context {found.context:,} of 262,144" in found.line


@pytest.mark.slow
def test_a_gguf_file_is_planned_from_its_header(tmp_path):
    from tiercel.bench.case import Case
    from tiercel.bench.models import write
    from tiercel.bench.traffic import weight_bytes
    from tiercel.weights.load import load

    file = tmp_path / "m.gguf"
    write(Case("falcon-h1:90m", random="q4_k_m", write=file), file, lambda *a: None)
    found = planning.plan(str(file), device=LAPTOP)
    assert found["weights_bytes"] == weight_bytes(load(file)[0])
    assert (
        found["process_bytes"] < planning.plan("falcon-h1:90m", device=LAPTOP)["process_bytes"]
    )  # it has no tokenizer


def test_a_longer_context_is_slower_and_eight_rows_are_faster_together():
    config = from_hf(SHAPES["falcon-h1:0.5b"]).config
    for on in MACHINES.values():
        held = matrices(config, "BF16", quantize="q4_k_m")
        steps = [step_seconds(config, held, on, n) for n in (16, 4096, 16_384)]
        assert steps == sorted(steps)
        assert step_seconds(config, held, on, 512, 8) < 8 * step_seconds(config, held, on, 512)
        assert prefill_seconds(config, held, on, 4096) > 2 * prefill_seconds(config, held, on, 2048) * 0.999


def test_a_machine_that_takes_twice_as_long_for_every_piece_is_planned_half_as_fast():
    pieces = [f"{piece} {what}" for piece in PROBES for what in ("chunk", "step")]
    seconds = {piece: 1e-3 * (1 + ("big" in piece or "far" in piece or "wide" in piece)) for piece in pieces}
    seconds |= {"read": 5e-3, "Q4_K one": 7e-4, "Q4_K few": 1e-3, "Q4_K many": 4e-3, "Q6_K one": 1e-3}
    seconds |= {"Q6_K few": 2e-3, "Q6_K many": 5e-3}
    config = from_hf(SHAPES["falcon-h1:0.5b"]).config

    def planned(seconds):
        on = from_probe("this", 1 << 34, 1 << 34, seconds)
        return forecast(config, on, quantize="q4_k_m", context=2048, slots=3)

    whole = planned(seconds)
    half = planned({piece: 2 * value for piece, value in seconds.items()})
    assert half.prefill_tok_s == pytest.approx(whole.prefill_tok_s / 2, rel=1e-3)
    assert half.decode_tok_s == pytest.approx(whole.decode_tok_s / 2, rel=1e-3)
    for piece, speed in (("layer wide chunk", "prefill_tok_s"), ("mamba2 big step", "decode_tok_s"),
                         ("attention far step", "decode_tok_s"), ("attention far chunk", "prefill_tok_s")):  # fmt: skip
        assert getattr(planned(seconds | {piece: 4e-3}), speed) < getattr(whole, speed), f"{piece} counts"


def test_the_transformer_beside_it_has_as_many_parameters_and_no_state():
    for name in ("falcon-h1:0.5b", "falcon-h1:7b", "falcon-h1:34b"):
        config = from_hf(SHAPES[name]).config
        other = transformer_of(config)
        a, b = (forecast(c, machine(LAPTOP), context=1024) for c in (config, other))
        assert abs(a.parameters / b.parameters - 1) < 0.02
        assert b.state_bytes == 0 and open_bytes(other) == 0


@pytest.mark.parametrize(
    ("words", "error"),
    [
        ({"name": "nobody:7b"}, ModelNotFound),
        ({"name": "falcon-h1:7b", "device": "abacus"}, RequestError),
        ({"name": "falcon-h1:7b", "context": 1 << 30, "device": LAPTOP}, RequestError),
        ({"name": "falcon-h1:7b", "quantize": "q9", "device": LAPTOP}, RequestError),
        ({"name": "falcon-h1:7b", "dtype": "f8", "device": LAPTOP}, RequestError),
        ({"name": "falcon-h1:7b", "dtype": "bf16", "quantize": "q8_0", "device": LAPTOP}, RequestError),
    ],
)
def test_what_cannot_be_planned_is_refused(words, error):
    with pytest.raises(error):
        planning.plan(**words)


def test_the_plan_is_a_page_for_people_and_a_picture(tmp_path):
    file = tmp_path / "memory.svg"
    result = CliRunner().invoke(app, ["plan", "bamba:9b", "--device", "laptop-ddr4", "--plot", str(file)])
    assert result.exit_code == 0
    assert "does not fit" in result.output and "nearest that fits" in result.output and "┊" in result.output
    assert file.read_text().startswith("<svg") and "Transformer" in file.read_text()


def test_names_in_pictures_are_text():
    assert "<b>" not in chart.bars("a <b>", {"g<b>": {"n<b>": 1.0, "none": None}}, label=str)
    assert "<b>" not in chart.lines("a <b>", {"n<b>": [(1, 1), (2, 3)]}, x="x", y="y")
