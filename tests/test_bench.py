"""What `tiercel bench` measures and says, on networks too small to be slow; and weights made from a config alone."""

from __future__ import annotations

import importlib
import json
import subprocess
import sys
from pathlib import Path
from typing import Any

import pytest
import torch

from tiercel.bench import models
from tiercel.bench.case import Case
from tiercel.bench.models import random_layout, random_source
from tiercel.bench.peers import Worker, llama_bench
from tiercel.bench.report import show
from tiercel.bench.run import run
from tiercel.bench.traffic import bytes_per_step, weight_bytes
from tiercel.errors import ModelNotFound, RequestError, TiercelError, UnsupportedError
from tiercel.families.shapes import SHAPES
from tiercel.plan import kv_bytes_per_token, parameter_count, state_bytes
from tiercel.weights.load import of_source
from tiercel.weights.random import SCALES, RandomSource

# A Falcon-H1 with every kind of block in it: rows of 256 and more.
TINY = {**SHAPES["falcon-h1:7b"], "vocab_size": 320, "hidden_size": 256, "intermediate_size": 512,
        "num_hidden_layers": 2, "num_attention_heads": 4, "num_key_value_heads": 1, "head_dim": 64,
        "mamba_d_ssm": 256, "mamba_n_heads": 4, "mamba_d_head": 64, "mamba_d_state": 16}  # fmt: skip
PATTERN = {"pattern": "mamba2 mamba1 attention attention+mamba2/moe", "width": 64, "vocab_size": 97}
KEYS = {"prefill_tok_s", "decode_tok_s", "load_s", "first_token_s", "peak_rss_bytes", "weights_bytes",
        "bandwidth_gb_s", "read_share", "bytes_per_token"}  # fmt: skip


@pytest.fixture
def tiny(tmp_path: Path) -> str:
    (tmp_path / "config.json").write_text(json.dumps(TINY))
    return str(tmp_path / "config.json")


@pytest.fixture
def cpu(monkeypatch: pytest.MonkeyPatch) -> Any:
    """benchmarks/cpu.py"""
    monkeypatch.syspath_prepend(str(Path(__file__).parents[1] / "benchmarks"))
    return importlib.import_module("cpu")


@pytest.fixture
def own(tmp_path: Path) -> str:
    (tmp_path / "own.json").write_text(json.dumps(PATTERN))
    return str(tmp_path / "own.json")


# ── shapes


@pytest.mark.parametrize(
    ("name", "published"),
    [
        ("falcon-h1:90m", 91_131_072),
        ("falcon-h1:0.5b", 521_411_104),
        ("falcon-h1:1.5b", 1_554_863_488),
        ("falcon-h1r:7b", 7_585_648_736),
        ("mamba2:2.7b", 2_702_599_680),
        ("mamba:2.8b", 2_768_345_600),
        ("llama:7b", 6_738_415_616),
        ("smollm2:135m", 134_515_008),
        ("jamba:mini", 51_570_323_328),
    ],
)
def test_a_shape_has_the_published_number_of_parameters(name: str, published: int) -> None:
    assert parameter_count(random_layout(name).config) == published


def test_the_multipliers_of_the_7b_are_the_published_ones() -> None:
    shape = SHAPES["falcon-h1:7b"]
    assert shape["key_multiplier"] == pytest.approx(0.0306903985) and shape["lm_head_multiplier"] == pytest.approx(
        0.0130208333
    )
    assert shape["mlp_multipliers"] == pytest.approx([0.2946278255, 0.0325520833])
    assert shape["ssm_multipliers"] == pytest.approx([0.3535533906, 0.25, 0.1767766953, 0.5, 0.3535533906])


def test_a_name_nobody_knows_is_answered_with_the_known_ones() -> None:
    with pytest.raises(ModelNotFound, match=r"no shape 'falcon:8b'; known: .*falcon-h1:7b"):
        random_layout("falcon:8b")


# ── random weights


@pytest.mark.parametrize("kind", [*SCALES, "BF16", "F32"])
def test_random_weights_have_the_spread_of_a_fresh_network_in_every_type(kind: str, tiny: str) -> None:
    layout = random_layout(tiny)
    row = next(row for row in layout.rows if row.ours == "layers.1.feed_forward.gate.weight")
    source = RandomSource(layout, {row.ours: kind})
    values = source.read(row, 0, 512).float() * 16  # fan-in 256
    assert values.isfinite().all() and values.std() == pytest.approx(1, rel=0.03)
    assert abs(values.mean()) < 0.12  # the types without a minimum lean by half a step


@pytest.mark.parametrize("recipe", ["q4_k_m", "q2_k", "q5_0", "nf4", "int8", "bf16"])
def test_the_same_rows_come_however_they_are_cut(recipe: str, tiny: str) -> None:
    one, other = random_source(tiny, recipe), random_source(tiny, recipe, seed=1)
    big = dict(TINY, intermediate_size=4096)  # two tiles and a rest
    layout = models.from_hf(big)
    source = RandomSource(layout, {"layers.0.feed_forward.up.weight": "Q4_K"})
    row = next(row for row in layout.rows if row.ours == "layers.0.feed_forward.up.weight")
    whole = source.raw(row, 0, 4096)
    assert torch.cat([source.raw(row, i, min(i + 333, 4096)) for i in range(0, 4096, 333)]).equal(whole)
    assert source.read(row, 1000, 1100).equal(source.read(row, 0, 4096)[1000:1100])
    for row in one.layout.rows:
        stop = one.params[row.ours].shape[0]
        assert one.raw(row, 0, stop).equal(random_source(tiny, recipe).raw(row, 0, stop)), row.ours
    assert not one.raw(one.layout.rows[0], 0, 9).equal(other.raw(one.layout.rows[0], 0, 9))


@pytest.mark.parametrize("recipe", ["q4_k_m", "q8_0", "bf16", "f32"])
@pytest.mark.parametrize("shape", ["tiny", "own"])
@torch.no_grad()
def test_a_random_network_says_something_ordinary(recipe: str, shape: str, request: pytest.FixtureRequest) -> None:
    source = random_source(request.getfixturevalue(shape), recipe)
    logits = of_source(source)(torch.arange(50))
    assert logits.isfinite().all() and 0.05 < logits.std() < 5


def test_a_recipe_nobody_knows_is_refused(tiny: str) -> None:
    with pytest.raises(RequestError, match=r"no recipe 'q4'; known: .*q4_k_m"):
        random_source(tiny, "q4")


# ── arithmetic


def test_a_step_reads_every_weight_once_and_the_memory_of_each_row(tiny: str) -> None:
    network = of_source(random_source(tiny, "f32"))
    config, embedding, weights = network.config, 320 * 256 * 4, weight_bytes(network)
    assert weights == pytest.approx(4 * parameter_count(config), rel=0.01)  # panels are filled up to 16 rows
    for rows in (1, 3):
        kept = rows * (100 * kv_bytes_per_token(config, bytes=4) + state_bytes(config))
        assert bytes_per_step(network, 100, rows) == weights - embedding + rows * 256 * 4 + kept


def test_a_step_reads_the_experts_it_can_reach(own: str) -> None:
    network = of_source(random_source(own, "f32"))
    experts = 8 * 3 * 64 * 256 * 4
    two, all_of_them = bytes_per_step(network, 0, 1), bytes_per_step(network, 0, 8)
    assert all_of_them - two == experts * 6 // 8 + 7 * state_bytes(network.config)


# ── measuring


@pytest.fixture(scope="module")
def measured(tmp_path_factory: pytest.TempPathFactory) -> dict[str, Any]:
    """What the command prints as JSON of a small measurement."""
    own = tmp_path_factory.mktemp("bench") / "own.json"
    own.write_text(json.dumps(PATTERN))
    words = f"bench {own} --random q8_0 --prompt 8,16 --generate 3 --threads 1 --repeat 2 --json".split()
    done = subprocess.run([sys.executable, "-m", "tiercel", *words], capture_output=True, text=True, timeout=120)
    assert done.returncode == 0 and done.stderr == ""
    return json.loads(done.stdout)


def test_a_measurement_has_the_figures_that_were_promised(measured: dict[str, Any]) -> None:
    assert measured.keys() >= KEYS and all(measured[key] > 0 for key in KEYS)
    assert set(measured["prefill"]) == {"8", "16"} and len(measured["decode"]["runs"]) == 2
    assert measured["prefill_tok_s"] == measured["prefill"]["8"]["median"]
    assert measured["architecture"] == "pattern" and measured["random"] == "q8_0" and "peers" not in measured


def test_people_get_a_table(measured: dict[str, Any], capsys: pytest.CaptureFixture[str]) -> None:
    show(measured)
    lines = capsys.readouterr().out.splitlines()
    assert lines[0].split() == ["tiercel", "tok/s", "min", "–", "max"] and lines[1].startswith("prefill 8 ")
    assert any(line.startswith("decode reads") and "GB/s measured" in line for line in lines)
    speeds = {key: measured[key] for key in ("prefill", "decode")}
    ratio = {"median": 1.0, "min": 0.9, "max": 1.1}
    peer = {**speeds, "version": "7", "peak_rss_bytes": 5e9, "ratios": {"prefill 8": ratio, "prefill 16": ratio,
                                                                         "decode": ratio}}  # fmt: skip
    show({**measured, "peers": {"llama.cpp": peer}})
    assert "1.00 × (0.90 – 1.10)" in capsys.readouterr().out.splitlines()[1]


def test_rows_and_a_context_are_measured_too(own: str) -> None:
    found = run(Case(own, prompts=(0,), generate=2, context=40, batch=2, threads=1, repeat=1))
    assert found["prefill_tok_s"] is None and found["decode_tok_s"] > 0


def test_a_worker_that_fails_says_why(tmp_path: Path) -> None:
    with pytest.raises(TiercelError, match="tiercel: nothing at"):
        Worker({"engine": "tiercel", "threads": 1, "dtype": "auto", "path": str(tmp_path / "no.gguf")})
    with pytest.raises(TiercelError, match=r"nothing ended while it was measured|nothing: 'nothing'"):
        Worker({"engine": "nothing", "threads": 1})


def test_a_worker_that_waits_takes_no_core(own: str) -> None:
    import time

    import psutil

    with Worker({"engine": "tiercel", "threads": 2, "dtype": "auto", "path": own}) as worker:
        worker.round({"prompts": [16], "generate": 2, "context": 0, "batch": 1})
        time.sleep(0.1)
        before = psutil.Process(worker.process.pid).cpu_times()
        time.sleep(0.5)
        after = psutil.Process(worker.process.pid).cpu_times()
        assert after.user + after.system - before.user - before.system < 0.1


@pytest.mark.parametrize(
    ("wrong", "said"),
    [
        ({"batch": 0}, "batch must be a whole number from 1, not 0"),
        ({"prompts": (0,), "generate": 0}, "nothing is left to measure"),
        ({"vs": ("vllm",)}, "no peer 'vllm'; known: llama.cpp, transformers"),
        ({"write": Path("x.gguf")}, "--random"),
        ({"vs": ("llama.cpp",), "batch": 2}, "one row at a time"),
    ],
)
def test_what_cannot_be_measured_is_refused_at_once(wrong: dict[str, Any], said: str) -> None:
    with pytest.raises(RequestError, match=said):
        Case("smollm2", **wrong)


def test_a_missing_peer_is_one_line_that_says_what_to_install(own: str, monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setenv("TIERCEL_LLAMA_BENCH", "/nowhere/llama-bench")
    with pytest.raises(UnsupportedError, match=r"llama-bench is not here: install llama\.cpp"):
        run(Case(own, random="q8_0", vs=("llama.cpp",)))


def test_wrong_lengths_are_wrong_usage() -> None:
    command = [sys.executable, "-m", "tiercel", "bench", "smollm2", "--prompt", "many"]
    done = subprocess.run(command, capture_output=True, text=True, timeout=60)
    assert done.returncode == 2 and "512 or 128,512" in done.stderr


def test_what_a_peer_cannot_run_is_said_before_anything_starts(tiny: str, own: str, tmp_path: Path) -> None:
    with pytest.raises(UnsupportedError, match="GGUF files have no int8"):
        run(Case(tiny, random="int8", write=tmp_path / "x.gguf"))
    with pytest.raises(UnsupportedError, match="transformers has no class for it"):
        run(Case(own, random="bf16", vs=("transformers",)))


# ── files


def test_the_written_file_holds_the_random_weights_as_they_are(tiny: str, tmp_path: Path) -> None:
    gguf = pytest.importorskip("gguf")
    from tiercel.weights.checkpoint import open_checkpoint

    out = tmp_path / "tiny.gguf"
    models.write(Case(tiny, random="q4_k_m"), out, lambda *_: None)
    source, checkpoint = random_source(tiny, "q4_k_m"), open_checkpoint(out)
    theirs = {tensor.name: tensor for tensor in gguf.GGUFReader(out).tensors}
    assert len(theirs) == len(source.layout.rows)
    for row in source.layout.rows:
        stop, kind = source.params[row.ours].shape[0], checkpoint.stored(row)
        assert checkpoint.read(row, 0, stop).float().equal(source.read(row, 0, stop).float()), row.ours
        assert kind == ("F32" if row.keep_fp32 else source.stored(row))
        assert theirs[row.gguf].tensor_type.name == kind
    assert gguf.dequantize(theirs["blk.0.ffn_down.weight"].data, theirs["blk.0.ffn_down.weight"].tensor_type) == (
        pytest.approx(source.read(next(r for r in source.layout.rows if r.gguf == "blk.0.ffn_down.weight"), 0, 256))
    )


def test_transformers_reads_the_same_random_weights(tiny: str, tmp_path: Path) -> None:
    transformers = pytest.importorskip("transformers")
    models.write(Case(tiny, random="bf16"), tmp_path / "hf", lambda *_: None)
    theirs = transformers.AutoModelForCausalLM.from_pretrained(tmp_path / "hf", dtype=torch.float32).eval()
    tokens = torch.arange(40)
    with torch.no_grad():
        ours = of_source(random_source(tiny, "bf16"), "float32")(tokens)
        assert float((theirs(tokens[None]).logits[0] - ours).abs().max()) < 0.1  # bf16 meets other numbers: unfolded


@pytest.mark.skipif(llama_bench() is None, reason="llama-bench is not here; set TIERCEL_LLAMA_BENCH to it")
def test_llama_cpp_runs_the_very_same_weights(tiny: str, tmp_path: Path) -> None:
    case = Case(tiny, (16,), 4, threads=1, repeat=1, random="q4_k_m", write=tmp_path / "t.gguf", vs=("llama.cpp",))
    found = run(case)["peers"]["llama.cpp"]
    assert found["version"].startswith("build") and found["ratios"].keys() == {"prefill 16", "decode"}
    assert found["peak_rss_bytes"] > 1 << 20 and case.write is not None and case.write.exists()


def test_the_table_of_the_readme_says_what_is_reached(cpu: Any) -> None:
    def ran(value: float) -> dict[str, Any]:
        return {"median": value, "min": value, "max": value}

    ratios = {"prefill 512": ran(2.0), "decode": ran(1.7)}
    speeds = {"prefill": {"512": ran(400.0)}, "decode": ran(90.0)}
    result = {**speeds, "machine": "here", "threads": 2, "version": "0", "date": "today", "repeat": 5,
              "peers": {"llama.cpp": {**speeds, "version": "build 1", "ratios": ratios}}}  # fmt: skip
    lines = cpu.table({"0.5b-prefill": result, "0.5b-decode": result}, ["0.5b-prefill", "0.5b-decode"]).splitlines()
    assert lines[2].endswith("| ≥ 1.80 × | ≥ 3.00 × | floor |") and lines[3].endswith("| ≥ 1.60 × | goal |")
    assert lines[-1].startswith("here, 2 thread(s) · tiercel 0, llama.cpp build 1 · today")
    assert {row.case for row in cpu.ROWS.values()} == set(cpu.CASES)


def test_the_cases_of_the_table_run(cpu: Any, tiny: str, tmp_path: Path) -> None:
    class Small(cpu.Bench):
        def packed(self, shape: str, recipe: str = "q8_0") -> Path:
            path = self.models / "tiny.gguf"
            if not path.exists():
                models.write(Case(tiny, random=recipe), path, lambda *_: None)
            return path

    bench = Small(tmp_path, 1, 1, {"0.5b-decode", "8-rows", "16k"})
    assert cpu.ROWS["8-rows"].cells(bench.rows())[0].startswith("0.5B Q4_K_M decode of 8 rows")
    if llama_bench() is not None:
        assert len(cpu.ROWS["7b-first-token"].cells(bench.first_token())) == 6
        assert len(cpu.ROWS["0.5b-decode"].cells(bench.half())) == 6
