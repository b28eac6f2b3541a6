"""`tiercel eval` as somebody types it."""

from __future__ import annotations

import json
import shutil

import pytest
from benchmark_data import data
from typer.testing import CliRunner

import tiny
from tiercel.commands.cli import app


@pytest.fixture(scope="module")
def model(tmp_path_factory):
    return str(tiny.checkpoint(tmp_path_factory.mktemp("tiny") / "tiny-model", template=tiny.TEMPLATE))


@pytest.fixture
def quiz(tmp_path, monkeypatch):
    monkeypatch.chdir(tmp_path)
    path = tmp_path / "quiz.jsonl"
    path.write_text("".join(json.dumps({"q": f"{n} + 1?", "key": n + 1}) + "\n" for n in range(4)))
    return str(path)


def typed(*words: str, monkeypatch=None):
    import sys

    if monkeypatch is not None:
        monkeypatch.setattr(sys, "argv", ["tiercel", *words])
    return CliRunner().invoke(app, list(words))


def test_a_run_prints_its_score_and_leaves_three_reports(model, quiz, tmp_path):
    words = ["eval", model, "--task", quiz, "--question", "q", "--answer", "key", "--limit", "3", "--max-tokens", "4"]
    first = typed(*words)
    assert first.exit_code == 0, first.output
    assert "tiny-model on quiz.jsonl: 0.0 % (95 %: 0.0 to 56.1, Wilson)" in first.stdout
    assert "3 of 4 items (drawn with seed 0)" in first.stdout
    (folder,) = (tmp_path / "tiercel-evals").iterdir()
    kept = {path.name for path in folder.iterdir()}
    assert kept == {"run.json", "items.jsonl", "report.json", "report.md", "report.html"}
    before = (folder / "report.html").read_bytes()
    assert typed(*words).stdout == first.stdout, "nothing is asked twice"
    assert (folder / "report.html").read_bytes() == before


def test_a_vote_is_told_beside_single_answers(model, quiz, tmp_path):
    words = ["eval", model, "-t", quiz, "--question", "q", "--answer", "key", "--max-tokens", "6", "--vote", "4",
             "--vote-method", "weighted", "--vote-set", "weight=tail", "--vote-set", "window=3",
             "--temperature", "8"]  # fmt: skip
    found = typed(*words)
    assert found.exit_code == 0, found.output
    for words_ in ("4 answers a question at most", "weight tail, window 3", "pass@1", "majority", "filtered-high"):
        assert words_ in found.stdout
    assert typed(*words).stdout == found.stdout, "nothing is asked twice"
    assert typed(*words[:-2], "--temperature", "9").stdout != found.stdout
    assert len(list((tmp_path / "tiercel-evals").iterdir())) == 2


def test_json_is_one_value(model, quiz, monkeypatch):
    words = ["eval", model, "-t", quiz, "--question", "q", "--answer", "key", "--max-tokens", "2", "--json"]
    found = json.loads(typed(*words, monkeypatch=monkeypatch).stdout)
    assert found["n_items"] == 4 and found["task"]["name"] == "quiz" and found["folder"]
    bad = typed("eval", model, "-t", quiz, "--json", monkeypatch=monkeypatch)
    assert bad.exit_code == 1 and "which field is the question" in json.loads(bad.stdout)["error"]


@pytest.mark.parametrize(
    "words, said, code",
    [
        ([], "which task? --task aime24", 2),
        (["-t", "nothing"], "no task is called 'nothing'", 2),
        (["-t", "gsm8k", "--question", "q"], "is for a JSONL file", 2),
        (["-t", "gsm8k", "--vote-method", "deepconf"], "need --vote K", 2),
        (["-t", "problems", "--vote", "4"], "4 samples at temperature 0 would be the same", 2),
        (["-t", "problems", "--vote", "4", "--samples", "4", "--temperature", "1"], "has its own number of answers", 2),
        pytest.param(["-t", "humaneval", "--vote", "4", "--temperature", "1"], "nothing to vote on", 2, marks=data),
        pytest.param(["-t", "mmlu", "--likelihood", "--vote", "4"], "likelihoods do not vary", 2, marks=data),
        (
            ["-t", "gsm8k", "--endpoint", "http://127.0.0.1:9/v1", "--quantize", "q8_0"],
            "has loaded its model already",
            2,
        ),
    ],
)
def test_mistakes_get_one_line(model, quiz, words, said, code):
    result = typed("eval", model, *words)
    assert result.exit_code == code
    assert said in result.output and len(result.output.strip().splitlines()) == 1


CHROMIUM = shutil.which("chromium") or shutil.which("chromium-browser") or shutil.which("google-chrome")


@pytest.mark.slow
@pytest.mark.skipif(not CHROMIUM, reason="no Chromium here")
def test_the_page_shows_its_pictures_and_fetches_nothing(model, quiz, tmp_path):
    api = pytest.importorskip("playwright.sync_api")
    choice = tmp_path / "choice.jsonl"
    rows = [{"question": f"?{n}", "choices": ["a", "bb", "ccc"], "answer": "ABC"[n % 3]} for n in range(6)]
    choice.write_text("".join(json.dumps(row) + "\n" for row in rows))
    assert typed("eval", model, "-t", str(choice)).exit_code == 0
    (folder,) = (tmp_path / "tiercel-evals").iterdir()
    with api.sync_playwright() as play:
        browser = play.chromium.launch(executable_path=CHROMIUM, args=["--no-sandbox"])
        for size in ({"width": 390, "height": 800}, {"width": 1100, "height": 900}):
            page = browser.new_page(viewport=size)
            foreign, broken = [], []
            page.on("request", lambda r, seen=foreign: seen.append(r.url) if not r.url.startswith("file:") else None)
            page.on("console", lambda m, seen=broken: seen.append(m.text))
            page.goto((folder / "report.html").as_uri())
            assert page.locator("svg").count() == 2 and page.locator("details").count() == 6
            assert page.evaluate("document.documentElement.scrollWidth") <= size["width"]
            assert not foreign and not broken
        browser.close()
