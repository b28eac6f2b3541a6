"""Every benchmark is the copy it says it is; bad copies and broken rows are named."""

from __future__ import annotations

import json
import shutil

import pytest
from benchmark_data import DATA, data

from tiercel.errors import FormatError, Offline, RequestError
from tiercel.evals import open_task
from tiercel.evals.aime25 import ANSWERS
from tiercel.evals.arc_challenge import check_shape, item_of, kept_fields
from tiercel.evals.data import rows_of
from tiercel.evals.task import Item, draw_items

ROWS = {"aime24": 30, "gsm8k": 1319, "math500": 500, "mmlu": 14042, "arc_challenge": 1172, "humaneval": 164,
        "lambada": 5153}  # fmt: skip
BASELINES = {"arc_challenge": (0.2502, "B", 0.2654), "mmlu": (0.25, "D", 0.2689)}


@data
@pytest.mark.parametrize("name", ROWS)
def test_a_benchmark_is_whole(name):
    task = open_task(name)
    items = task.load(None)
    assert len(items) == len({item.id for item in items}) == ROWS[name]
    assert all(len(source["sha256"]) == 64 for source in task.sources)
    for item in items[:50]:
        for chat in (False, True):
            prompt = task.prompt(item, task.shots, chat=chat)
            assert prompt if isinstance(prompt, str) else prompt[-1]["role"] == "user"
    if name in BASELINES:
        chance, letter, majority = BASELINES[name]
        assert task.chance(items) == pytest.approx(chance, abs=1e-4)
        assert task.majority(items) == (letter, pytest.approx(majority, abs=1e-4))


@data
@pytest.mark.parametrize("name", ["aime24", "gsm8k", "math500"])
def test_the_right_answer_counts_and_a_wrong_one_does_not(name):
    if name == "math500":
        pytest.importorskip("math_verify", reason="pip install tiercel[eval]")
    task = open_task(name)
    for item in task.load(None)[:3]:
        assert task.grade(item, f"Thus \\boxed{{{item.gold}}}.").correct
        assert not task.grade(item, "Thus \\boxed{-77777}.").correct
        assert task.grade(item, "I give up.").answer is None


@data
def test_gsm8k_counts_what_lm_eval_counts():
    task = open_task("gsm8k")
    items = task.load(None)
    assert all(task.grade(item, item.more["target"]).scores == {"strict": 1.0, "flexible": 1.0} for item in items)
    item = next(item for item in items if "," in item.gold)
    said = task.grade(item, f"so it is {item.gold}.")
    assert said.correct and said.scores == {"strict": 0.0, "flexible": 1.0}
    prompt = task.prompt(items[0], 5, chat=False)
    assert prompt.count("Question: ") == 6 and prompt.endswith(f"Question: {items[0].question}\nAnswer:")


@data
def test_another_copy_of_a_file_is_refused(tmp_path):
    shutil.copytree(DATA / "gsm8k", tmp_path / "gsm8k")
    path = tmp_path / "gsm8k" / "test.jsonl"
    path.chmod(0o644)
    path.write_bytes(path.read_bytes().replace(b"#### 18", b"#### 19", 1))
    with pytest.raises(FormatError, match=r"not the copy this benchmark is defined by: .* instead of 3730d3"):
        open_task("gsm8k").load(str(tmp_path))


def bad_arc(rows):
    """What the well-known bad conversion made of ARC: fields renamed, labels shifted, choices padded and cut."""
    for row in rows:
        texts = row["choices"]["text"][:4]
        texts += [texts[-1]] * (4 - len(texts))
        yield {
            "query": f"Question: {row['question']}\nAnswer:",
            "choices": texts,
            "gold": "ABCDE".index(row["answerKey"]),
        }


@data
def test_the_bad_copy_of_arc_is_detected(tmp_path):
    """By its hash, by its form, by its padded choices, and by its counts."""
    good = [json.loads(line) for line in (DATA / "arc_challenge" / "test.jsonl").read_text().split("\n") if line]
    folder = tmp_path / "arc_challenge"
    folder.mkdir()
    (folder / "test.jsonl").write_text("".join(json.dumps(row) + "\n" for row in bad_arc(good)))
    with pytest.raises(FormatError, match="not the copy"):
        open_task("arc_challenge").load(str(tmp_path))
    with pytest.raises(FormatError, match="llm-foundry conversion"):
        item_of(next(bad_arc(good)), "row 1")
    with pytest.raises(FormatError, match="a choice stands there twice"):
        open_task(str(folder / "test.jsonl"), question="query", answer="gold").load(None)
    cut = [item_of(row, "") for row in good]
    cut = [Item(i.id, i.question, i.gold if int(i.gold) < 4 else "0", i.choices[:4]) for i in cut]
    with pytest.raises(FormatError, match="are not ARC-Challenge's test set"):
        check_shape(cut, "a copy")


@pytest.mark.parametrize(
    "change, words",
    [
        ({"answerKey": "E"}, "none of the labels"),
        ({"answerKey": "1"}, "none of the labels"),
        ({"choices": {"text": ["a", "b"], "label": ["B", "C"]}}, "neither A, B"),
        ({"choices": {"text": ["a", "b"], "label": ["A"]}}, "2 choices with 1 labels"),
        ({"choices": {"text": ["a", "a"], "label": ["A", "B"]}}, "twice"),
        ({"question": 7}, "field 'question' is int, not str"),
    ],
)
def test_rows_of_arc_that_contradict_themselves(change, words):
    row = {"id": "x", "question": "?", "choices": {"text": ["a", "b"], "label": ["A", "B"]}, "answerKey": "A"}
    assert item_of(row, "row 1").gold == "0"
    numeric = row | {"choices": {"text": ["a", "b"], "label": ["1", "2"]}, "answerKey": "2"}
    assert item_of(numeric, "row 1").gold == "1", "the label 2 is the second choice, not the third"
    with pytest.raises(FormatError, match=words):
        item_of(row | change, "row 1")


def test_the_source_of_arc_is_made_into_our_bytes():
    row = {
        "id": "x",
        "question": "é?",
        "choices": {"text": ["a"], "label": ["A"]},
        "answerKey": "A",
        "response": "because",
    }
    assert kept_fields(json.dumps(row).encode()) == (
        b'{"id": "x", "question": "\\u00e9?", "choices": {"text": ["a"], "label": ["A"]}, "answerKey": "A"}\n'
    )  # fmt: skip


def test_aime_2025_is_known_by_its_answers(tmp_path):
    folder = tmp_path / "aime25"
    folder.mkdir()
    rows = [{"problem": f"p{i}", "answer": str(a)} for i, a in enumerate(ANSWERS)]
    (folder / "test.jsonl").write_text("".join(json.dumps(row) + "\n" for row in rows))
    items = open_task("aime25").load(str(tmp_path))
    assert len(items) == 30 and {item.group for item in items} == {"I", "II"}
    rows[3]["answer"] = "118"
    (folder / "test.jsonl").write_text("".join(json.dumps(row) + "\n" for row in rows))
    with pytest.raises(FormatError, match=r"answers of rows \[4\]"):
        open_task("aime25").load(str(tmp_path))


def test_a_file_that_is_nowhere(tmp_path, monkeypatch):
    with pytest.raises(RequestError, match="is not there; it can be had from https://"):
        open_task("gsm8k").load(str(tmp_path))
    monkeypatch.setenv("TIERCEL_HOME", str(tmp_path))
    monkeypatch.setenv("HF_HUB_OFFLINE", "1")
    monkeypatch.delenv("TIERCEL_DATA", raising=False)
    with pytest.raises(Offline, match="give a folder with --data"):
        open_task("aime25").load(None)


@pytest.mark.parametrize(
    "line, words",
    [
        (b"{not json", "row 2: not JSON"),
        (b'"text"', "row 2: an object with fields is expected, not str"),
        (b"\xff\xfe", "row 2: not UTF-8"),
        (b"[" * 100_000, "row 2: not JSON"),
        (b'{"question": "?"}', "row 2: field 'answer' is missing"),
        (b'{"question": "", "answer": 1}', "row 2: field 'question' is not a text"),
        (b'{"question": "?", "answer": [1]}', "row 2: field 'answer' is neither a text nor a number"),
    ],
)
def test_broken_rows_are_named(tmp_path, line, words):
    path = tmp_path / "quiz.jsonl"
    path.write_bytes(b'{"question": "1?", "answer": 1}\n' + line + b"\n")
    with pytest.raises(FormatError) as error:
        open_task(str(path)).load(None)
    assert words in str(error.value) and "\n" not in str(error.value) and len(str(error.value)) < 400


def own(tmp_path, *rows, **fields):
    path = tmp_path / "own.jsonl"
    path.write_text("".join(json.dumps(row) + "\n" for row in rows))
    task = open_task(str(path), **fields)
    return task, task.load(None)


def test_a_file_of_ones_own(tmp_path):
    task, (item,) = own(tmp_path, {"q": "1+1?", "solution": "2"}, question="q", answer="solution")
    assert task.how == "number" and task.grade(item, "It is 2.0").correct
    task, (item,) = own(tmp_path, {"question": "Capital?", "answer": "Paris"})
    assert task.how == "text" and task.grade(item, "Hm.\nparis.").correct and not task.grade(item, "Rome").correct
    task, (item,) = own(tmp_path, {"question": "?", "answer": "B"}, kind="letter")
    assert task.grade(item, "The answer is B.").correct
    task, (item,) = own(tmp_path, {"question": "Say it.", "answer": "So be it"}, kind="bare")
    assert task.prompt(item, 0, chat=True) == [{"role": "user", "content": "Say it."}]
    assert task.grade(item, "so be it").correct and not task.grade(item, "Well,\nso be it").correct
    task, items = own(tmp_path, *({"question": "?", "options": ["x", "y", "z"], "answer": a} for a in ("B", "z", 0)))
    assert task.kind == "choose" and [item.gold for item in items] == ["1", "2", "0"]
    _, (item,) = own(tmp_path, {"question": "?", "choices": ["x", "y"], "answer": "2"}, answer_from=1)
    assert item.gold == "1"
    with pytest.raises(FormatError, match="from 0 or from 1"):
        own(tmp_path, {"question": "?", "choices": ["x", "y"], "answer": "1"})
    with pytest.raises(FormatError, match="names none of the 2 choices"):
        own(tmp_path, {"question": "?", "choices": ["x", "y"], "answer": "C"})
    with pytest.raises(FormatError, match="which field is the question"):
        own(tmp_path, {"q": "?", "a": "C"})


def test_a_row_may_hold_any_separator():
    rows = list(rows_of('{"a": "x\u2028y\u0085z"}\n\n{"a": "1"}\n'.encode(), "f"))
    assert [row["a"] for row in rows] == ["x\u2028y\u0085z", "1"]


def test_a_part_is_the_same_each_time_and_grows():
    items = [Item(str(i), "?", "0") for i in range(100)]
    five, nine = draw_items(items, 5, 0), draw_items(items, 9, 0)
    assert five == draw_items(items, 5, 0) and {i.id for i in five} < {i.id for i in nine}
    assert five != draw_items(items, 5, 1) and draw_items(items, 1000, 0) == items
    assert five == sorted(five, key=lambda item: int(item.id))


def test_unknown_tasks_are_answered_with_the_known_ones():
    with pytest.raises(RequestError, match="no task is called 'gsm9k'; there are aime24, aime25, gsm8k"):
        open_task("gsm9k")
    with pytest.raises(RequestError, match="has its own fields"):
        open_task("gsm8k", question="q")


def test_problems_check_themselves():
    task = open_task("problems")
    items = task.load(None)
    assert {item.group for item in items} >= {"addition", "addition, larger"}
    assert len({item.id for item in items}) == len(items) >= 800
    assert [(i.id, i.question) for i in open_task("problems").load(None)] == [(i.id, i.question) for i in items]
    for item in items[:: len(items) // 60]:
        assert task.grade(item, item.gold).correct, item
        assert not task.grade(item, "").correct and not task.grade(item, "banana").correct
