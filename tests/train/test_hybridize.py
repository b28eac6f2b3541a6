"""A Transformer becomes a hybrid: its first weights, its stages, its refusals."""

import json
import signal
import subprocess
import sys
from fractions import Fraction
from pathlib import Path

import pytest
import torch
from typer.testing import CliRunner

import tiercel
import tiny
from tiercel.commands.cli import app
from tiercel.errors import FormatError, RequestError
from tiercel.mixers.take_over import least_squares
from tiercel.train.convert import attention_layers, choose, convert, evenly, matching_loss, watching
from tiercel.train.data import Batches, Documents
from tiercel.train.hybrid_report import Checks, needle
from tiercel.train.hybridize import Conversion, hybridize
from tiercel.train.log import read_log
from tiercel.train.loop import Settings
from tiercel.train.loss import distillation_loss, next_token_loss

WORDS = "attention attention attention/- attention"
CHECKS = Checks(needles=(32, 999_999), contexts=(64, 999_999), speed=False, tasks=())
MIXERS = "gated_delta", "mamba2"


def documents(seed: int = 0, count: int = 40) -> Documents:
    return Documents.of((tiny.ids(20 + i % 9, seed + i), [1] * (20 + i % 9)) for i in range(count))


def some_rows(count: int = 2, of: Documents | None = None) -> list:
    batches = Batches(of or documents(), rows=2, length=32, seed=1)
    return [next(batches) for _ in range(count)]


@pytest.fixture(scope="module")
def folder(tmp_path_factory):
    return tiny.checkpoint(tmp_path_factory.mktemp("transformer"), WORDS, template=tiny.TEMPLATE)


@pytest.fixture(scope="module")
def data(tmp_path_factory):
    path = tmp_path_factory.mktemp("data") / "learn.jsonl"
    lines = [json.dumps({"tokens": tiny.ids(20 + i % 9, i)}) for i in range(60)]
    path.write_text("\n".join(lines))
    return path


def settings(out: Path, **changes) -> Settings:
    return Settings(**({"steps": 4, "lr": 1e-3, "save_every": 2, "quiet": True, "out": out} | changes))


def conversion(keep: str = "1/4", **changes) -> Conversion:
    return Conversion(Fraction(keep), **({"match_steps": 3, "rows": 2, "length": 32, "calibration": 2} | changes))


# ── first weights


@pytest.mark.parametrize("mixer", MIXERS)
@pytest.mark.parametrize("words", ["attention", "attention+mamba1/-"])
def test_what_is_not_replaced_stays(mixer, words):
    """And the place of attention is taken beside the other mixers of its layer."""
    teacher = tiny.network(" ".join([words] * 3), native=False)
    network, places = convert(teacher, [0, 2], mixer, some_rows(), seed=0)
    assert sorted(places) == [0, 2] and attention_layers(network.config) == [1]
    before, after = dict(teacher.named_parameters()), dict(network.named_parameters())
    assert {name for name in before if name not in after} == {
        n for n in before if ".attention." in n and "s.1." not in n
    }
    for name in before.keys() & after.keys():
        assert torch.equal(before[name], after[name]), name


@pytest.mark.parametrize("mixer", MIXERS)
def test_first_weights_are_nearer_than_none(mixer):
    """On other tokens than those that they are computed from, the outputs explain a part of the attention's."""
    teacher = tiny.network("attention attention", native=False)
    network, places = convert(teacher, [0, 1], mixer, some_rows(32, documents(count=400)), seed=0)
    rows = some_rows(8, documents(seed=9000))
    with torch.no_grad():
        loss = sum(float(matching_loss(teacher, places)(network, part)) for part in rows)
    assert loss / sum(part.count for part in rows) < 0.98  # 1: an output of zeros


@pytest.mark.parametrize("mixer", MIXERS)
def test_q_k_v_become_what_the_mixer_reads_with_them(mixer):
    """Grouped heads repeated, the weights of q's and k's norms inside, biases where the mixer has them."""
    teacher = tiny.network("attention", native=False)
    from dataclasses import replace

    from tiercel.model.decoder import Decoder
    from tiercel.model.initialize import initialize

    spec = replace(teacher.config.layers[0].mixers[0], qk_norm=True, qkv_bias=True)
    config = replace(teacher.config, layers=(replace(teacher.config.layers[0], mixers=(spec,)),))
    teacher = Decoder(config).train()
    initialize(teacher, 0)
    attention = teacher.layers[0].mixers["attention"]
    with torch.no_grad():
        for name in ("q", "k", "v"):
            getattr(attention, name).bias.normal_()
        attention.k_norm.weight.normal_()
    network, _ = convert(teacher, [0], mixer, some_rows(), seed=0)
    new = network.layers[0].mixers[mixer]
    H, K, P = spec.heads, spec.kv_heads, spec.head_dim
    assert H > K
    head = 1 * P  # of the second head: it reads the first key head's rows
    k = attention.k.weight[:P] * attention.k_norm.weight.unsqueeze(1)
    if mixer == "gated_delta":
        found = new.qkv.weight[H * P + head : H * P + head + P]
    else:
        found = new.in_proj.weight[2 * H * P + head : 2 * H * P + head + P]
        bias = new.in_proj.bias[2 * H * P + head : 2 * H * P + head + P]
        assert torch.allclose(bias, attention.k.bias[:P] * attention.k_norm.weight)
    assert torch.allclose(found, k)


def test_the_output_gate_becomes_the_gate():
    from dataclasses import replace

    from tiercel.model.decoder import Decoder
    from tiercel.model.initialize import initialize

    config = tiny.config("attention")
    spec = replace(config.layers[0].mixers[0], output_gate=True)
    teacher = Decoder(replace(config, layers=(replace(config.layers[0], mixers=(spec,)),))).train()
    initialize(teacher, 0)
    network, _ = convert(teacher, [0], "gated_delta", some_rows(), seed=0)
    assert torch.equal(
        network.layers[0].mixers["gated_delta"].z.weight, teacher.layers[0].mixers["attention"].gate.weight
    )


def test_least_squares_are_least_squares():
    g = torch.Generator().manual_seed(0)
    x, w = torch.randn(400, 6, generator=g), torch.randn(3, 6, generator=g)
    assert torch.allclose(least_squares(x.T @ x, x.T @ (x @ w.T)).float(), w, atol=5e-3)
    dead = torch.cat((x, torch.zeros(400, 1)), 1)  # an input that is always zero
    assert least_squares(dead.T @ dead, dead.T @ x).isfinite().all()


# ── which layers


def test_evenly_is_in_the_middle_of_equal_parts():
    assert evenly(list(range(8)), 2) == [2, 6] and evenly([1, 3, 5], 1) == [3] and evenly([4, 5], 0) == []
    for layers in range(1, 40):
        for count in range(1, layers):
            assert len(set(evenly(list(range(layers)), count))) == count


def test_measured_keeps_the_layer_that_matters():
    """Attention whose output is nothing has nothing to lose; one whose output is large has."""
    teacher = tiny.network("attention attention attention", native=False)
    with torch.no_grad():
        teacher.layers[0].mixers["attention"].o.weight.mul_(1e-3)
        teacher.layers[2].mixers["attention"].o.weight.mul_(1e-3)
        teacher.layers[1].mixers["attention"].o.weight.mul_(30)
    kept, rise = choose(teacher, 1, "measured", "gated_delta", some_rows(4), seed=0)
    assert kept == [1] and set(rise) == {0, 1, 2} and abs(rise[0]) < 1e-3 < abs(rise[1])


@pytest.mark.parametrize(("keep", "layers", "count"), [("1/4", 30, 8), ("0.5", 3, 2), ("0", 4, 0), ("1/4", 4, 1)])
def test_a_share_is_a_number_of_layers(keep, layers, count):
    assert conversion(keep).kept(layers, "it") == count


# ── losses


def test_distillation_is_the_divergence_and_is_zero_for_itself():
    teacher, student = tiny.network("attention", native=False), tiny.network("mamba2", seed=1, native=False)
    (rows,) = some_rows(1)

    def logprobs(network):
        return network.head(network.hidden_states(rows.tokens_BL, rows.batch))[rows.counted_T].double().log_softmax(-1)

    p, q = logprobs(teacher), logprobs(student)
    assert abs(float(distillation_loss(teacher, rows, teacher))) < 1e-3
    assert float(distillation_loss(student, rows, teacher)) == pytest.approx(float((p.exp() * (p - q)).sum()), rel=1e-4)


def test_watching_ends():
    teacher = tiny.network("attention", native=False)
    (rows,) = some_rows(1)
    with torch.no_grad():
        plain = float(next_token_loss(teacher, rows))
        with watching(teacher, {0: ("attention", "")}, lambda i, given, out: out * 0):
            assert float(next_token_loss(teacher, rows)) != plain
        assert float(next_token_loss(teacher, rows)) == plain


def test_a_needle_is_found_by_a_network_that_copies():
    """A network that repeats what followed the last time finds it; one that always says one token does not."""

    class Copies(torch.nn.Module):
        def hidden_states(self, tokens, batch):
            row, out = tokens[0].tolist(), []
            for i, token in enumerate(row):
                before = [j for j in range(i) if row[j - 1 : j + 1] == row[i - 1 : i + 1] and j > 0]
                out.append(row[before[-1] + 1] if before else token)
            return torch.nn.functional.one_hot(torch.tensor(out), 300).float()

        def head(self, x):
            return x

    copies = Copies()
    text = documents()
    assert needle(copies, text, 64, Settings(steps=1)) > 0.9
    copies.head = lambda x: torch.zeros_like(x)
    assert needle(copies, text, 64, Settings(steps=1)) < 0.2


# ── the whole of it


@pytest.fixture(scope="module")
def made(folder, data, tmp_path_factory):
    out = tmp_path_factory.mktemp("hybrid")
    found = hybridize(folder, [data], settings(out), conversion(), checks=CHECKS)
    return out, found


def test_the_result_is_a_model_like_any_other(made, folder):
    out, found = made
    model = tiercel.load(out)
    assert attention_layers(model.config) == found["kept"] and len(found["kept"]) == 1
    assert model.tokenizer is not None and model.tokenizer.has_template
    assert len(model.generate("abc", tiny.GREEDY).token_ids) > 0
    tokens = tiny.ids(70)
    together = model.logits(tokens)
    state = model.network.new_state()
    pieces = [model.network(torch.tensor(tokens[a:b]), state) for a, b in ((0, 40), (40, 41), (41, 70))]
    assert torch.allclose(together, torch.cat(pieces), atol=1e-3)
    assert json.loads((out / "report.json").read_text()) == json.loads(json.dumps(found))


def test_the_report_has_the_same_measures_before_and_after(made):
    _, found = made
    before, after = found["before"], found["after"]
    assert before.keys() == after.keys() >= {"perplexity", "accuracy", "needle", "parameters", "cache_bytes"}
    assert set(before["needle"]) == {"32"} and set(before["cache_bytes"]) == {"64"}
    assert set(found["rise"]) == {"0", "1", "2", "3"}
    assert [found["stages"][name]["steps"] for name in ("match", "distil")] == [3, 4]


def test_a_quarter_of_the_keys_and_values(folder):
    config = tiercel.load(folder).config
    from tiercel.plan.sizes import kv_bytes
    from tiercel.train.convert import converted

    after, _ = converted(config, [0, 1, 3], "gated_delta")
    assert kv_bytes(after, 512) * 4 == kv_bytes(config, 512)


def test_killed_it_goes_on_to_the_bit(made, folder, data, tmp_path):
    """Killed in matching, in distilling, and after each: the weights are those of the run that was left alone."""
    whole, _ = made
    out = tmp_path / "out"
    script = Path(__file__).with_name("killed_hybrid.py")
    done = subprocess.run([sys.executable, script, folder, data, out, "1", "4", "9"], capture_output=True, check=False)
    assert done.returncode == 0, done.stderr.decode()
    assert json.loads(done.stdout) == [-signal.SIGKILL, -signal.SIGKILL, 0]
    assert (out / "model.safetensors").read_bytes() == (whole / "model.safetensors").read_bytes()
    logs = [[line["loss"] for line in read_log(f / "distil/log.jsonl") if "loss" in line] for f in (out, whole)]
    assert logs[0] == logs[1] and len(logs[0]) == 4
    with pytest.raises(RequestError, match="was made with mixer gated_delta, not mamba2: resume with the same"):
        hybridize(folder, [data], settings(out, resume=True), conversion(mixer="mamba2"), checks=CHECKS)
    with pytest.raises(RequestError, match="holds a run already"):
        hybridize(folder, [data], settings(out), conversion(), checks=CHECKS)


def test_text_of_its_own_no_attention_at_all_and_conversations(folder, tmp_path):
    """mamba2, evenly, 0 on purpose; rows that the model wrote; a last stage of answers; texts that are no JSONL."""
    talks, text = tmp_path / "talks.jsonl", tmp_path / "text.txt"
    talks.write_text(
        json.dumps({"messages": [{"role": "user", "content": "a"}, {"role": "assistant", "content": "bc"}]})
    )
    text.write_text("To be, or not to be, that is the question. " * 9)
    out = tmp_path / "out"
    asked = conversion("0", mixer="mamba2", choose="even", sft_steps=2, match_steps=0)
    found = hybridize(folder, [text], settings(out), asked, sample=3, sft=talks, held_out=text, checks=CHECKS)
    assert found["kept"] == [] and found["rise"] == {} and list(found["stages"]) == ["distil", "sft"]
    written = [json.loads(line)["tokens"] for line in (out / "sampled.jsonl").read_text().splitlines()]
    assert len(written) == 3 and all(0 < len(row) <= 32 for row in written)
    assert not attention_layers(tiercel.load(out).config)


# ── one line


@pytest.mark.parametrize(
    ("keep", "layers", "words"),
    [
        ("1/16", 4, "1/16 of 4 layers with attention is none: keep 1/4 or more, or 0 for none"),
        ("9/10", 4, "9/10 of 4 layers with attention is all of them"),
        ("1/4", 0, "it has no attention to replace"),
    ],
)
def test_shares_that_cannot_be(keep, layers, words):
    with pytest.raises(RequestError, match=words):
        conversion(keep).kept(layers, "it")


@pytest.mark.parametrize(
    ("changes", "words"),
    [
        ({"keep": "-1/4"}, "--keep-attention is a share from 0 to less than 1, not -1/4"),
        ({"keep": "1"}, "--keep-attention is a share from 0 to less than 1, not 1"),
        ({"choose": "best"}, "--choose 'best' is not known; choose from even, measured"),
        ({"length": 1}, "length must be at least 2, not 1"),
        ({"match_lr": 0.0}, "match_lr must be positive, not 0.0"),
    ],
)
def test_settings_that_cannot_be(changes, words):
    with pytest.raises(RequestError, match=words):
        conversion(**changes)


def test_other_refusals(folder, data, tmp_path):
    def run(where=folder, files=(data,), **changes):
        hybridize(where, list(files), settings(tmp_path / "o"), conversion(**changes), checks=CHECKS)

    with pytest.raises(RequestError, match="--mixer 'lstm' is not known; choose from gated_delta, mamba2"):
        run(mixer="lstm")
    with pytest.raises(RequestError, match=r"the data has [0-9]+ tokens, less than a row of 4096"):
        run(length=4096)
    with pytest.raises(RequestError, match="say what to learn from: --data FILE, or --sample N"):
        run(files=())
    with pytest.raises(FormatError, match=r"missing\.jsonl cannot be read"):
        run(files=[tmp_path / "missing.jsonl"])
    with pytest.raises(FormatError, match=r"absent\.jsonl cannot be read"):  # before anything is measured or trained
        hybridize(folder, [data], settings(tmp_path / "p"), conversion(), sft=tmp_path / "absent.jsonl", checks=CHECKS)
    assert not (tmp_path / "p" / "hybridize.json").exists()
    none = tiny.checkpoint(tmp_path / "none", "mamba2 mamba1")
    with pytest.raises(RequestError, match="has no attention to replace"):
        run(none)
    both = tiny.checkpoint(tmp_path / "both", "attention+mamba2 attention")
    with pytest.raises(RequestError, match="layer 0 has a mamba2 beside its attention: choose --mixer gated_delta"):
        run(both, mixer="mamba2", keep="0")


def test_the_command_prints_the_report_or_one_line(folder, data, tmp_path):
    line = ["hybridize", str(folder), "--data", str(data), "--tasks", ""]
    for name in ("match-steps", "steps", "calibration"):
        line += [f"--{name}", "1"]
    line += ["--batch", "2", "--length", "32", "--needles", "32", "--contexts", "64"]

    def run(keep, out, *more):
        return CliRunner().invoke(app, [*line, "--keep-attention", keep, "--out", str(tmp_path / out), *more])

    done = run("1/4", "a", "--json")
    assert done.exit_code == 0, done.stderr
    found = json.loads(done.stdout)
    assert found["after"]["tokens_per_second"]["64"] > 0 and found["after"]["needle"].keys() == {"32"}
    done = run("a lot", "b")
    assert done.exit_code == 2 and done.stdout == "" and len(done.stderr.strip().splitlines()) == 1
    assert "--keep-attention takes a share such as 1/4 or 0.25, not 'a lot'" in done.stderr
