"""A run says what it found, keeps everything, and a kill loses nothing."""

from __future__ import annotations

import http.server
import json
import random
import subprocess
import sys
import threading
import time
from dataclasses import replace

import pytest

import tiercel
import tiny
from tiercel.errors import FormatError, RequestError, TiercelError
from tiercel.evals import Settings, evaluate, open_task
from tiercel.evals.endpoint import Endpoint
from tiercel.evals.report import markdown, page, save
from tiercel.evals.statistics import bootstrap, wilson
from tiercel.evals.task import Item, Task, Verdict
from tiercel.model.cpu_runner import CPURunner
from tiercel.voting import VoteSettings

QUIZ = [{"question": f"What is {n} plus {n}?", "answer": str(2 * n)} for n in range(8)]
CHOICE = [{"question": f"Pick {n}", "choices": ["one", "two", "three"], "answer": "ABC"[n % 3]} for n in range(9)]


@pytest.fixture(scope="module")
def model(tmp_path_factory):
    folder = tmp_path_factory.mktemp("tiny")
    return tiercel.load(tiny.checkpoint(folder, template=tiny.TEMPLATE))


def quiz(tmp_path, rows=QUIZ, name="quiz"):
    path = tmp_path / f"{name}.jsonl"
    path.write_text("".join(json.dumps(row) + "\n" for row in rows))
    return open_task(str(path))


WRITE = Settings(samples=2, temperature=1.0, max_tokens=6, slots=4)


def test_the_report_has_all_that_an_honest_number_needs(model, tmp_path):
    result = evaluate(model, quiz(tmp_path), WRITE, out=tmp_path / "run")
    assert (result.n_items, result.n_samples) == (8, 16)
    assert result.interval["low"] <= result.score <= result.interval["high"]
    assert result.cut + sum(s["finish_reason"] == "stop" for r in result.items for s in r["samples"]) == 16
    assert result.generated_tokens == sum(s["tokens"] for r in result.items for s in r["samples"]) > 0
    assert len(result.task["data"][0]["sha256"]) == 64
    assert result.settings["seed"] == 0 and result.versions["tiercel"] == tiercel.__version__
    assert "pass@2" in result.metrics
    save(result)
    for text in (markdown(result), page(result)):
        for fact in ("quiz.jsonl", result.task["data"][0]["sha256"], "temperature 1", "16 outputs", "tokens written"):
            assert fact in text
    found = json.loads((tmp_path / "run" / "report.json").read_text())
    assert found["score"] == result.score and "items" not in found
    lines = (tmp_path / "run" / "items.jsonl").read_text().splitlines()
    assert {json.loads(line)["id"] for line in lines} == {r["id"] for r in result.items}


def test_samples_of_one_question_read_its_prompt_once(model, tmp_path):
    result = evaluate(model, quiz(tmp_path), Settings(samples=8, temperature=1.0, max_tokens=4))
    first = result.items[0]
    assert len({sample["text"] for sample in first["samples"]}) > 1, "samples differ"
    assert first["prompt_tokens"] < 200 and result.prompt_tokens == sum(r["prompt_tokens"] for r in result.items)


def test_what_is_asked_beside_an_item_does_not_change_it(model, tmp_path):
    whole = evaluate(model, quiz(tmp_path), WRITE)
    part = evaluate(model, quiz(tmp_path), Settings(**WRITE.to_dict() | {"limit": 5, "slots": 1}))
    larger = evaluate(model, quiz(tmp_path), Settings(**WRITE.to_dict() | {"limit": 7}))
    texts = {r["id"]: [s["text"] for s in r["samples"]] for r in whole.items}
    assert len(part.items) == 5
    assert all(texts[r["id"]] == [s["text"] for s in r["samples"]] for r in part.items)
    assert {r["id"] for r in part.items} <= {r["id"] for r in larger.items}


def test_choices_are_judged_by_likelihood(model, tmp_path):
    """By the sums that the network itself gives when each text is read whole."""
    task = quiz(tmp_path, CHOICE, "choice")
    result = evaluate(model, task)
    assert result.metric == "acc" and result.chance == pytest.approx(1 / 3)
    assert result.majority == {"answer": "A", "score": pytest.approx(1 / 3)}
    for record in result.items[:3]:
        for text, found in zip(record["continuations"], record["logprobs"], strict=True):
            context, whole = (model.tokenizer.encode(t) for t in (record["prompt"], record["prompt"] + text))
            logprobs = model.logits(whole).log_softmax(-1)
            wanted = sum(float(logprobs[i - 1, whole[i]]) for i in range(len(context), len(whole)))
            assert found == pytest.approx(wanted, abs=1e-4)


def test_what_contexts_share_is_read_once_and_changes_nothing(model):
    from tiercel.evals.local import Scorer

    shared = tiny.ids(100)
    pairs = [[(shared + tiny.ids(20, seed), tiny.ids(3, 50 + i)) for i in range(3)] for seed in range(1, 5)]
    scorer = Scorer(model)
    reused = []
    for each in pairs:
        found = scorer.score(each)
        assert [f.logprob for f in found] == pytest.approx([f.logprob for f in Scorer(model).score(each)], abs=1e-5)
        reused.append(scorer.reused)
    assert reused == [0, 0, 100, 100]


# ── votes ──

ENDS = "abcdefghijklmnopqrstuvwxyz0123456789"  # at which a plain answer of the tiny model ends, which is mostly soon


class Parity(Task):
    """There are no words in a tiny model: it answers with the parity of the length of what it says."""

    name, title = "parity", "Parity"
    stop = tuple(ENDS[:16])

    def load(self, folder):
        self.sources = []
        return [Item(str(n), f"question {n}", str(n % 2)) for n in range(6)]

    def prompt(self, item, shots, *, chat):
        return f"{item.question} is long enough to be worth reading once"

    def grade(self, item, text):
        said = str(len(text) % 2)
        return Verdict(said, said == item.gold)


def voted(k=12, method="majority", **more):
    return Settings(vote=VoteSettings(k, method, window=2, **more), chat=False, temperature=8.0, max_tokens=24)


def test_a_vote_is_counted_from_the_traces_that_the_report_keeps(model):
    result = evaluate(model, Parity(), voted())
    assert result.metric == "majority" and result.n_samples == 72
    for record in result.items:
        ended = [s for s in record["samples"] if s["finish_reason"] == "stop"]
        counts = [sum(s["answer"] == parity for s in ended) for parity in "01"]
        assert ended and (counts[0] == counts[1] or record["vote"]["answer"] == "01"[counts[1] > counts[0]])
        assert record["score"] == (record["vote"]["answer"] == record["gold"])
        weights = {parity: sum(s["confidence"]["tail"] for s in ended if s["answer"] == parity) for parity in "01"}
        assert record["scores"]["weighted by tail"] == (max(weights, key=weights.get) == record["gold"])
    assert result.score == result.metrics["majority"] == sum(r["score"] for r in result.items) / 6
    singles = [s["correct"] for r in result.items for s in r["samples"]]
    assert result.metrics["pass@1"] == pytest.approx(sum(singles) / len(singles))
    assert result.metrics["pass@12"] == 1
    assert {"weighted by mean", "weighted by lowest", "weighted by bottom", "filtered-low"} <= result.metrics.keys()
    assert result.interval["method"] == "Wilson", "an item is right or wrong"
    assert result.generated_tokens == sum(s["tokens"] for r in result.items for s in r["samples"])


def test_a_vote_reads_each_prompt_once(model, monkeypatch):
    read = []
    forward = CPURunner.forward

    def counted(self, tokens, *rest, **more):
        read.extend(tokens)
        return forward(self, tokens, *rest, **more)

    monkeypatch.setattr(CPURunner, "forward", counted)
    result = evaluate(model, Parity(), voted())
    said = sum(s["tokens"] for r in result.items for s in r["samples"])
    assert result.prompt_tokens <= sum(map(len, read)) <= result.prompt_tokens + said


@pytest.mark.parametrize("method", ["deepconf-low", "deepconf-high"])
def test_what_a_threshold_stops_is_told_and_single_answers_are_those_of_the_warmup(model, method):
    result = evaluate(model, Parity(), voted(16, method, warmup=6, consensus=0))
    warm = [s["correct"] for r in result.items for s in r["samples"][:6]]
    assert result.metrics.keys() == {"pass@1", method} and result.metrics["pass@1"] == pytest.approx(sum(warm) / 36)
    stopped = sum(s["finish_reason"] == "confidence" for r in result.items for s in r["samples"])
    assert stopped == sum(r["vote"]["stopped"] for r in result.items) > 0
    assert f"{stopped} stopped early" in markdown(result) and "stopped early" in page(result)


def test_a_vote_that_was_interrupted_goes_on_and_ends_the_same(model, tmp_path):
    settings = voted(16, "deepconf-low", warmup=4, consensus=0.6)
    whole = evaluate(model, Parity(), settings, out=tmp_path / "whole")
    assert any(r["vote"]["consensus"] for r in whole.items)
    lines = (tmp_path / "whole" / "items.jsonl").read_bytes().splitlines(keepends=True)
    (tmp_path / "part").mkdir()
    (tmp_path / "part" / "run.json").write_bytes((tmp_path / "whole" / "run.json").read_bytes())
    (tmp_path / "part" / "items.jsonl").write_bytes(b"".join(lines[:2]) + lines[2][:40])
    rest = evaluate(model, Parity(), replace(settings, slots=3), out=tmp_path / "part")
    assert json.dumps(whole.to_dict(times=False)) == json.dumps(rest.to_dict(times=False))
    with pytest.raises(RequestError, match="another settings"):
        evaluate(model, Parity(), voted(16, "deepconf-high", warmup=4), out=tmp_path / "part")


def test_an_address_holds_no_votes():
    with pytest.raises(RequestError, match="does not say how sure it was"):
        evaluate(Endpoint("http://127.0.0.1:9/v1", "m"), Parity(), voted())


ASK = """
import sys, tiercel
from pathlib import Path
from tiercel.evals import Settings, evaluate, open_task
model, quiz, out = sys.argv[1:]
settings = Settings(samples=2, temperature=1.0, max_tokens=6, slots=4)
evaluate(tiercel.load(model), open_task(quiz), settings, out=Path(out))
"""


def interrupted(model, task, folder, random_, most):
    """Start the run in a process of its own and kill it after a random number of bytes; `most` times at most."""
    lines, kills = folder / "items.jsonl", 0
    while kills < most:
        target = (lines.stat().st_size if lines.exists() else 0) + random_.randrange(1, 1500)
        process = subprocess.Popen([sys.executable, "-c", ASK, model.name, str(task.path), str(folder)])
        while process.poll() is None and not (lines.exists() and lines.stat().st_size >= target):
            time.sleep(0.001)
        process.kill()
        if process.wait() == 0:
            break
        kills += 1
    return kills


def same_after_kills(model, tmp_path, seed, most):
    task = quiz(tmp_path)
    whole = evaluate(model, task, WRITE, out=tmp_path / f"whole{seed}")
    kills = interrupted(model, task, tmp_path / f"killed{seed}", random.Random(seed), most)
    resumed = evaluate(model, task, WRITE, out=tmp_path / f"killed{seed}")
    assert json.dumps(whole.to_dict(times=False)) == json.dumps(resumed.to_dict(times=False))
    return kills


def test_a_killed_run_ends_with_the_same_report(model, tmp_path):
    assert same_after_kills(model, tmp_path, 1, most=1) == 1


@pytest.mark.slow
def test_killed_runs_end_with_the_same_report_ten_of_ten(model, tmp_path):
    kills = [same_after_kills(model, tmp_path, seed, most=1) for seed in range(10)]
    assert sum(kills) >= 8, "they were interrupted indeed"


def test_a_line_that_was_not_finished_is_asked_again(model, tmp_path):
    task, out = quiz(tmp_path), tmp_path / "run"
    whole = evaluate(model, task, WRITE, out=out)
    lines = out / "items.jsonl"
    data = lines.read_bytes()
    for cut in (40, len(data) - 1):
        lines.write_bytes(data[:cut])
        assert evaluate(model, task, WRITE, out=out).to_dict(times=False) == whole.to_dict(times=False)


def test_a_folder_of_another_run_is_refused(model, tmp_path):
    task, out = quiz(tmp_path), tmp_path / "run"
    evaluate(model, task, WRITE, out=out)
    with pytest.raises(RequestError, match=r"another settings \(temperature: 1.0, now 0.5\).*--fresh"):
        evaluate(model, task, Settings(samples=2, temperature=0.5, max_tokens=6), out=out)
    with pytest.raises(RequestError, match="another task"):
        evaluate(model, quiz(tmp_path, QUIZ[:4], "other"), WRITE, out=out)
    assert evaluate(model, task, Settings(max_tokens=4), out=out, fresh=True).n_samples == 8
    (out / "items.jsonl").write_text('{"id": 1\n{"id": "x"}\n')
    with pytest.raises(FormatError, match="row 1 is damaged"):
        evaluate(model, task, Settings(max_tokens=4), out=out)


def test_a_prompt_that_does_not_fit_is_counted_and_named(model, tmp_path):
    rows = [*QUIZ[:2], {"question": "x" * 2000, "answer": "1"}]
    result = evaluate(model, quiz(tmp_path, rows), Settings(max_tokens=4))
    assert result.errors == 1 and "context holds 512" in result.items[2]["error"] and result.items[2]["score"] == 0
    rows = [*CHOICE[:2], {**CHOICE[0], "question": "x" * 2000}]
    assert evaluate(model, quiz(tmp_path, rows, "long")).errors == 1


def test_a_model_without_a_chat_template(tmp_path):
    bare = tiercel.load(tiny.checkpoint(tmp_path / "bare"))
    with pytest.raises(RequestError, match="has no chat template; ask with --plain"):
        evaluate(bare, quiz(tmp_path), Settings(chat=True))
    result = evaluate(bare, quiz(tmp_path), Settings(max_tokens=3, limit=2))
    assert result.settings["chat"] is False and "plain text" in markdown(result)


@pytest.mark.parametrize(
    "settings, words",
    [
        ({"samples": 4}, "4 samples at temperature 0 would be the same"),
        ({"shots": 3}, "quiz has 0 solved examples, not 3"),
        ({"samples": 0}, "samples must be a whole number from 1"),
        ({"choices": "guess"}, "choices must be likelihood or letters"),
        ({"system": "Be brief", "chat": False}, "a system message needs the chat template"),
    ],
)
def test_settings_that_make_no_sense(model, tmp_path, settings, words):
    with pytest.raises(RequestError, match=words):
        evaluate(model, quiz(tmp_path), Settings(**settings))


# ── an address ──


class Fake(http.server.BaseHTTPRequestHandler):
    """Answers the sum it is asked for; `die_after` answers it hangs up."""

    asked = 0
    die_after = 10**9
    seen: list = []  # noqa: RUF012

    def do_POST(self):
        body = json.loads(self.rfile.read(int(self.headers["Content-Length"])))
        type(self).asked += 1
        type(self).seen.append((self.path, body, self.headers.get("Authorization")))
        if type(self).asked > type(self).die_after:
            self.connection.close()
            return
        words = body["messages"][-1]["content"] if "messages" in body else body["prompt"]
        n = int(words.split("What is ")[1].split()[0]) if "What is " in words else 0
        message = {"content": f"It is \\boxed{{{2 * n}}}.", "reasoning_content": "hm"}
        found = {"choices": [{"message": message, "text": f" {2 * n}", "finish_reason": "stop"}],
                 "usage": {"prompt_tokens": 7, "completion_tokens": 5}}  # fmt: skip
        data = json.dumps(found).encode()
        self.send_response(200)
        self.send_header("Content-Length", str(len(data)))
        self.end_headers()
        self.wfile.write(data)

    def log_message(self, *_):
        pass


@pytest.fixture
def address():
    kind = type("Once", (Fake,), {"asked": 0, "seen": []})
    server = http.server.ThreadingHTTPServer(("127.0.0.1", 0), kind)
    server.handle_error = lambda *_: None
    threading.Thread(target=server.serve_forever, daemon=True).start()
    yield f"http://127.0.0.1:{server.server_address[1]}/v1", kind
    server.shutdown()
    server.server_close()


def test_an_endpoint_is_asked_like_a_model(address, tmp_path, monkeypatch):
    url, kind = address
    monkeypatch.setenv("TIERCEL_ENDPOINT_KEY", "k")
    result = evaluate(Endpoint(url, "some-model"), quiz(tmp_path), Settings(samples=2, temperature=0.7))
    assert result.score == 1.0 and result.generated_tokens == 16 * 5
    assert result.items[0]["samples"][0]["thinking"] == "hm"
    path, body, key = kind.seen[0]
    assert path == "/v1/chat/completions" and body["model"] == "some-model" and key == "Bearer k"
    assert len({body["seed"] for _, body, _ in kind.seen}) == 16
    plain = evaluate(Endpoint(url, "some-model"), quiz(tmp_path), Settings(chat=False))
    assert plain.score == 1.0 and kind.seen[-1][0] == "/v1/completions"


def test_an_endpoint_that_dies_midway_loses_nothing(address, tmp_path):
    url, kind = address
    kind.die_after = 5
    with pytest.raises(TiercelError, match=r"does not answer .* What was finished is kept") as error:
        evaluate(Endpoint(url, "m", pause=0.01), quiz(tmp_path), Settings(slots=1), out=tmp_path / "run")
    assert "\n" not in str(error.value)
    assert len((tmp_path / "run" / "items.jsonl").read_text().splitlines()) == 5
    kind.die_after = 10**9
    before = kind.asked
    result = evaluate(Endpoint(url, "m", pause=0.01), quiz(tmp_path), Settings(slots=1), out=tmp_path / "run")
    assert result.score == 1.0 and 3 <= kind.asked - before <= 4  # one may have been on its way


def test_an_endpoint_chooses_by_letter(address, tmp_path):
    url, kind = address
    task = quiz(tmp_path, CHOICE, "choice")
    with pytest.raises(RequestError, match="gives no likelihoods; ask with --letters"):
        evaluate(Endpoint(url, "m"), task, Settings(choices="likelihood"))
    result = evaluate(Endpoint(url, "m"), task)
    assert result.settings["choices"] == "letters" and "A. one" in kind.seen[0][1]["messages"][0]["content"]
    with pytest.raises(RequestError, match="an endpoint is an address like"):
        Endpoint("localhost:80", "m")


def test_an_endpoint_that_is_not_there_or_speaks_nonsense(tmp_path):
    with pytest.raises(TiercelError, match="does not answer"):
        evaluate(Endpoint("http://127.0.0.1:9/v1", "m", pause=0.01), quiz(tmp_path))


# ── how sure ──


def test_intervals():
    assert wilson(0, 10) == pytest.approx((0.0, 0.2775), abs=1e-4)
    assert wilson(8, 10) == pytest.approx((0.4902, 0.9433), abs=1e-4)
    low, high = bootstrap([0.0, 1.0] * 50)
    assert low == pytest.approx(0.40, abs=0.02) and high == pytest.approx(0.60, abs=0.02)
    assert bootstrap([0.5] * 10) == (0.5, 0.5)


def test_the_page_escapes_what_models_say(model, tmp_path):
    result = evaluate(model, quiz(tmp_path, [{"question": "<script>alert(1)</script>", "answer": "<b>x</b>"}]),
                      Settings(max_tokens=3))  # fmt: skip
    assert "<script" not in page(result) and "<b>" not in page(result) and "http:" not in page(result)
