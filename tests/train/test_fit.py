"""The loop: what it learns, what it refuses, what it counts."""

import itertools
import json
import math
from dataclasses import replace

import numpy as np
import pytest
import torch
import torch.nn.functional as F

import tiny
from tiercel.errors import FormatError, RequestError, TiercelError
from tiercel.train.data import Batches, Documents, make_rows, pack, read_documents, read_jsonl
from tiercel.train.loop import Settings, evaluate, fit
from tiercel.train.loss import chunked_cross_entropy, next_token_loss
from tiercel.train.optim import adamw, rate

QUIET = Settings(steps=1, quiet=True)


def documents(count: int = 40, seed: int = 0) -> Documents:
    random = np.random.default_rng(seed)
    lengths = random.integers(3, 25, count).tolist()
    return Documents.of((tiny.ids(n, i), random.integers(0, 2, n)) for i, n in enumerate(lengths))


def trainable(words: str = "attention+mamba2", **changes):
    return tiny.network(words, native=False, **changes).train().requires_grad_(True)


# ── loss


@pytest.mark.parametrize("chunk", [7, 50, 1000])
def test_the_loss_in_slices_is_the_plain_loss_and_has_its_gradients(chunk):
    x, W = torch.randn(50, 8), torch.randn(30, 8)
    targets = torch.randint(30, (50,))
    grads = []
    for sliced in (True, False):
        a, b = x.clone().requires_grad_(), W.clone().requires_grad_()
        if sliced:
            loss = chunked_cross_entropy(a, targets, lambda x, b=b: x @ b.t(), 30, chunk)
        else:
            loss = F.cross_entropy(a @ b.t(), targets, reduction="sum")
        loss.backward()
        grads.append((loss.detach(), a.grad, b.grad))
    for mine, plain in zip(*grads, strict=True):
        torch.testing.assert_close(mine, plain, rtol=1e-5, atol=1e-5)


@pytest.mark.parametrize("chunk", [7, 50])
def test_under_a_frozen_head_the_loss_and_its_gradient_are_the_same(chunk):
    x, W, targets = torch.randn(50, 8), torch.randn(30, 8), torch.randint(30, (50,))
    found = []
    for frozen in (True, False):
        a = x.clone().requires_grad_()
        loss = chunked_cross_entropy(a, targets, lambda x: x @ W.t(), 30, chunk, frozen=frozen)
        (0.3 * loss).backward()
        found.append((loss.detach(), a.grad))
    for mine, plain in zip(*found, strict=True):
        torch.testing.assert_close(mine, plain, rtol=1e-5, atol=1e-5)


def test_only_learned_tokens_count_and_each_is_predicted_from_its_own_document():
    docs = Documents.of([([5, 6, 7], [0, 1, 1]), ([8, 9], [1, 1])])
    rows = make_rows(docs, [[0, 1], []], 8)
    assert rows.tokens_BL.tolist()[0] == [5, 6, 7, 8, 9, 0, 0, 0]
    assert rows.counted_T.tolist() == [0, 1, 3]  # 7 → 8 crosses into another document
    assert rows.targets_T.tolist() == [6, 7, 9] and rows.count == 3
    assert rows.batch.position_BL.tolist()[0] == [0, 1, 2, 0, 1, 0, 1, 2]


def test_accumulated_micro_batches_are_one_big_batch():
    docs, logs = documents(), []
    for rows, accumulate in ((6, 1), (2, 3)):
        settings = replace(QUIET, accumulate=accumulate, clip=1e9)
        logs.append(fit(trainable(), Batches(docs, rows=rows, length=30, shuffle=False), settings).log[0])
    log_a, log_b = logs
    assert log_a["counted"] == log_b["counted"] and abs(log_a["loss"] - log_b["loss"]) < 1e-5
    assert abs(log_a["grad_norm"] / log_b["grad_norm"] - 1) < 1e-4


# ── optimizer


def test_schedules_warm_up_hold_and_come_down():
    cosine = [rate(i, 100, "cosine", warmup=10) for i in range(100)]
    wsd = [rate(i, 100, "wsd", warmup=10) for i in range(100)]
    assert cosine[0] == wsd[0] == 0.1 and cosine[9] == wsd[9] == 1.0
    assert all(a >= b for a, b in itertools.pairwise(cosine[9:]))
    assert math.isclose(cosine[-1], 0.1) and math.isclose(wsd[-1], 0.1)
    assert set(wsd[9:80]) == {1.0} and math.isclose(wsd[89], 0.55)
    assert rate(50, 100, "constant", warmup=10) == 1.0


def test_only_matrices_decay():
    net = trainable(tiny.EVERY_KIND)
    names = {id(p): name for name, p in net.named_parameters()}
    decayed, free = adamw(net, 1e-3).param_groups
    free_leaves = {names[id(p)].rpartition(".")[2] for p in free["params"]}
    assert {"A_log", "D", "dt_bias", "conv", "conv_bias"} <= free_leaves
    assert all(names[id(p)].endswith(("weight", "gate", "up", "down")) and p.dim() > 1 for p in decayed["params"])
    assert free["weight_decay"] == 0 and len(names) == len(decayed["params"]) + len(free["params"])


# ── data


def test_a_bad_line_is_named(tmp_path):
    path = tmp_path / "data.jsonl"
    for bad in ("{", "[1]", '{"text": 3}', '{"messages": []}', '{"messages": [{"role": "cat", "content": "x"}]}',
                '{"messages": [{"role": "user"}]}', '{"tokens": [1.5]}'):  # fmt: skip
        path.write_text('{"text": "fine"}\n\n' + bad + "\n")
        with pytest.raises(FormatError, match=r"data\.jsonl:3: ") as error:
            list(read_jsonl(path))
        assert "\n" not in str(error.value)


def test_the_answer_alone_is_learned_or_what_was_asked_for(tmp_path):
    model = tiny.checkpoint(tmp_path / "model", "mamba2/-", template=tiny.TEMPLATE)
    from tiercel.tokenizer.tokenizer import Tokenizer

    tokenizer = Tokenizer.from_folder(model)
    messages = [
        {"role": r, "content": c} for r, c in zip(["user", "assistant"] * 2, ["hi", "ho", "he", "ha"], strict=True)
    ]
    path = tmp_path / "chat.jsonl"
    path.write_text(json.dumps({"messages": messages}) + "\n")

    def learned(*roles: str) -> str:
        found = read_documents(path, tokenizer, learn=roles)
        return tokenizer.decode(found.tokens[found.mask == 1].tolist(), special=True)

    assert learned("assistant") == "ho<|end|>ha<|end|>"
    assert learned("assistant", "user") == "<|user|>hi" + "ho<|end|>" + "<|user|>he" + "ha<|end|>"
    assert learned("all") == "<|user|>hi<|bot|>ho<|end|><|user|>he<|bot|>ha<|end|>"


def conversation(*marks):
    turns = [
        {"role": r, "content": c} for r, c in zip(["user", "assistant"] * 2, ["hi", "ho", "he", "ha"], strict=True)
    ]
    return [turn | mark for turn, mark in zip(turns, marks or [{}] * 4, strict=True)]


@pytest.fixture
def tokens_of(tmp_path):
    from tiercel.tokenizer.tokenizer import Tokenizer

    tokenizer = Tokenizer.from_folder(tiny.checkpoint(tmp_path / "model", "mamba2/-", template=tiny.TEMPLATE))

    def read(example, *roles):
        path = tmp_path / "chat.jsonl"
        path.write_text(json.dumps(example) + "\n")
        found = read_documents(path, tokenizer, learn=roles or ("assistant",))
        return tuple(
            tokenizer.decode(found.tokens[m].tolist(), special=True) for m in (found.mask == 1, found.mask >= 0)
        )

    return read


@pytest.mark.parametrize(
    "mark",
    [{"weight": 0}, {"weight": 0.0}, {"train": False}, {"trainable": False}, {"loss": False}, {"loss_mask": 0},
     {"training": 0}, {"learn": False}, {"mask": 0}, {"masked": True}, {"ignore": 1}],
)  # fmt: skip
def test_a_turn_marked_as_not_to_be_learned_is_read_and_not_learned(tokens_of, mark):
    marked = {"messages": conversation({}, mark, {}, {})}
    assert tokens_of(marked) == ("ha<|end|>", tokens_of({"messages": conversation()})[1])
    assert tokens_of(marked, "all")[0] == "<|user|>hi<|bot|>" + "<|user|>he<|bot|>ha<|end|>"


@pytest.mark.parametrize("mark", [{"weight": 1}, {"train": True}, {"masked": False}])
def test_a_turn_marked_as_to_be_learned_is_learned_as_without_the_mark(tokens_of, mark):
    assert tokens_of({"messages": conversation({}, mark, {}, mark)}) == tokens_of({"messages": conversation()})


@pytest.mark.parametrize(
    ("mark", "words"),
    [({"weight": 0.5}, "weight must be 0 or 1"), ({"train": "no"}, "train must be"), ({"skip_loss": True}, "skip_loss"),
     ({"score": 0}, "score")],
)  # fmt: skip
def test_a_mark_that_is_not_understood_is_refused_by_its_name(tokens_of, mark, words):
    with pytest.raises(FormatError, match=rf"chat\.jsonl:1: .*{words}"):
        tokens_of({"messages": conversation({}, mark, {}, {})})


def test_where_every_turn_is_marked_there_is_nothing_to_learn(tokens_of):
    with pytest.raises(FormatError, match="no message of assistant to learn from"):
        tokens_of({"messages": conversation({}, {"weight": 0}, {}, {"weight": 0})})


def test_null_content_parts_and_developer_are_what_they_stand_for(tokens_of):
    plain = [{"role": "system", "content": "be"}, {"role": "user", "content": "hi there"},
             {"role": "assistant", "content": ""}, {"role": "user", "content": "?"},
             {"role": "assistant", "content": "ho"}]  # fmt: skip
    other = [{"role": "developer", "content": "be"},
             {"role": "user", "content": [{"type": "text", "text": "hi "}, {"type": "text", "text": "there"}]},
             {"role": "assistant", "content": None}, *plain[3:]]  # fmt: skip
    assert tokens_of({"messages": other}) == tokens_of({"messages": plain})
    with pytest.raises(FormatError, match="parts of text"):
        tokens_of({"messages": [{"role": "user", "content": [{"type": "image_url", "image_url": "x"}]}]})


def test_tools_beside_messages_go_to_the_template(tmp_path):
    from tiercel.tokenizer.tokenizer import Tokenizer

    template = "{% if tools %}{{ tools | tojson }}{% endif %}" + tiny.TEMPLATE
    tokenizer = Tokenizer.from_folder(tiny.checkpoint(tmp_path / "model", "mamba2/-", template=template))
    tools = [{"type": "function", "function": {"name": "look", "parameters": {}}}]
    path, right = tmp_path / "chat.jsonl", tokenizer.chat(conversation(), tools=tools, add_generation_prompt=False)
    for given in (tools, json.dumps(tools)):
        path.write_text(json.dumps({"messages": conversation(), "tools": given}) + "\n")
        found = read_documents(path, tokenizer)
        assert found.tokens.tolist() == right
        assert tokenizer.decode(found.tokens[found.mask == 1].tolist(), special=True) == "ho<|end|>ha<|end|>"
    for broken in ("{", 3, ["look"]):
        path.write_text(json.dumps({"messages": conversation(), "tools": broken}) + "\n")
        with pytest.raises(FormatError, match="tools"):
            read_documents(path, tokenizer)


def test_packing_keeps_every_document_once_and_fills_rows():
    lengths = np.random.default_rng(0).integers(1, 60, 500)
    rows = pack(lengths, np.arange(500), 64)
    assert sorted(n for row in rows for n in row) == list(range(500))
    assert all(lengths[row].sum() <= 64 for row in rows)
    assert lengths.sum() / (64 * len(rows)) > 0.9


def test_the_same_seed_gives_the_same_rows_and_a_position_goes_on():
    def rows(batches, count):
        return [next(batches).tokens_BL for _ in range(count)]

    whole = rows(Batches(documents(), rows=2, length=30, seed=1), 30)
    again = Batches(documents(), rows=2, length=30, seed=1)
    rows(again, 11)
    later = Batches(documents(), rows=2, length=30, seed=1)
    later.position = again.position
    assert all(torch.equal(a, b) for a, b in zip(whole[11:], rows(later, 19), strict=True))
    assert not torch.equal(whole[0], next(Batches(documents(), rows=2, length=30, seed=2)).tokens_BL)


def test_what_does_not_fit_a_row_is_cut_or_left_out_and_counted():
    docs = Documents.of([(list(range(10)), [1] * 10), ([1, 2, 3], [1] * 3)])
    assert np.diff(docs.fit_rows(4, cut=True).starts).tolist() == [4, 4, 2, 3]
    kept = docs.fit_rows(4, cut=False)
    assert len(kept) == 1 and kept.left_out == 1
    with pytest.raises(RequestError, match="no example fits"):
        docs.fit_rows(2, cut=False)


# ── the loop


def test_it_learns_to_copy():
    random = np.random.default_rng(0)
    words = random.integers(1, 20, (400, 6))
    docs = Documents.of(([*w, 0, *w], [0] * 7 + [1] * 6) for w in words)
    net = trainable("attention+mamba2 attention+mamba2", vocab_size=24)
    net.embed.weight.data.div_(30)
    settings = replace(QUIET, steps=80, lr=1e-2, warmup=5, weight_decay=0.0)
    batches = Batches(docs, rows=8, length=52)
    before = evaluate(net, Batches(docs, rows=8, length=52).once(), settings)
    result = fit(net, batches, settings)
    assert before > 2.5 and result.loss < 0.3, (before, result.loss)


@pytest.mark.parametrize("where", ["layers.1.mixers.mamba2.in_proj.weight", "layers.0.mixers.attention.q.weight"])
def test_a_number_that_is_none_stops_the_run_and_is_named(where, tmp_path):
    net = trainable("attention mamba2")
    net.get_parameter(where).data[3, 2] = float("nan")
    with pytest.raises(TiercelError, match=where.replace(".", r"\.")):
        fit(net, Batches(documents(), rows=2, length=30), replace(QUIET, out=tmp_path / "run"))
    assert not (tmp_path / "run" / "checkpoints").exists()


def test_a_loss_that_overflows_changes_no_weight():
    net = trainable("mamba2")
    before = {name: p.detach().clone() for name, p in net.named_parameters()}

    def loss(network, rows):
        return next_token_loss(network, rows) * float("inf")

    with pytest.raises(TiercelError, match="step 1: the loss is not a number"):
        fit(net, Batches(documents(), rows=2, length=30), QUIET, loss)
    assert all(torch.equal(p, before[name]) for name, p in net.named_parameters())


def test_from_the_command_line_to_a_model_that_runs(tmp_path):
    from typer.testing import CliRunner

    import tiercel
    from tiercel.commands.cli import app

    model = tiny.checkpoint(tmp_path / "model", "mamba2", template=tiny.TEMPLATE)
    data = tmp_path / "chat.jsonl"
    pairs = [[{"role": "user", "content": f"{i}"}, {"role": "assistant", "content": f"{i}!"}] for i in range(20)]
    data.write_text("".join(json.dumps({"messages": m}) + "\n" for m in pairs))
    out = tmp_path / "run"
    common = [
        "--config",
        str(model),
        "--out",
        str(out),
        "--batch",
        "2",
        "--length",
        "32",
        "--eval",
        str(data),
        "--json",
    ]
    done = CliRunner().invoke(app, ["train", "sft", str(data), "--steps", "3", *common])
    assert done.exit_code == 0, done.output
    found = json.loads(done.stdout)
    assert found["steps"] == 3 and math.isfinite(found["eval_loss"]) and (out / "curves.png").stat().st_size > 1000
    assert len(tiercel.load(out).generate([{"role": "user", "content": "1"}], tiny.GREEDY).token_ids) == 12
    again = CliRunner().invoke(app, ["train", "sft", str(data), "--steps", "3", *common])
    assert again.exit_code == 2 and "--resume" in again.output


def test_packed_weights_are_refused_with_the_way_out(tmp_path):
    from tiercel.train.start import open_network
    from tiercel.weights.quantize import quantize

    model = tiny.checkpoint(tmp_path / "model", "attention/-", width=64)
    quantize(model, tmp_path / "packed", "q8_0")
    with pytest.raises(RequestError, match="tiercel train lora"):
        open_network(tmp_path / "packed")
