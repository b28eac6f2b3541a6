"""`tiercel compare`: one page for all, one dead address loses nothing, an interruption loses nothing."""

from __future__ import annotations

import json

import pytest

from tiercel.errors import RequestError, TiercelError
from tiercel.evals import compare as side
from tiercel.evals.answers import Answers, Sample
from tiercel.evals.registry import open_task
from tiercel.evals.task import Settings


class Scripted:
    """Answers every question with the same words."""

    has_template, likelihoods, asked = True, False, 0

    def __init__(self, name: str, says: str, dies_at: int = 10**9) -> None:
        self.name, self.says, self.dies_at = name, says, dies_at

    def about(self):
        return {"name": self.name}

    def answer(self, questions, ask):
        for question in questions:
            if self.asked >= self.dies_at:
                raise TiercelError(f"{self.name} does not answer any more")
            self.asked += 1
            yield Answers(question.key, [Sample(self.says, "", "stop", 3)], 5, 0, 0.1)

    def score(self, contexts, ask):
        raise NotImplementedError


@pytest.fixture
def ask(tmp_path):
    rows = [{"question": f"What is {n} + {n}?", "answer": str(2 * n)} for n in (1, 2, 3, 4)]
    file = tmp_path / "sums.jsonl"
    file.write_text("".join(json.dumps(row) + "\n" for row in rows))
    speed = lambda each, n: {"prefill_tok_s": 1000.0 / n, "decode_tok_s": 10.0, "memory_bytes": n * 10**6}  # noqa: E731

    def run(answerers, names=None, **more):
        return side.compare(
            names or list(answerers), lambda: [open_task(str(file))], Settings(), (128, 512), tmp_path / "out",
            lambda each: answerers[each.label], **({"speed": speed} | more),
        )  # fmt: skip

    run.out = tmp_path / "out"
    return run


def test_scores_speed_and_memory_of_all_stand_on_one_page(ask):
    found = ask({"four": Scripted("four", "4"), "six": Scripted("six", "the answer is 6")})
    assert [next(iter(m["scores"].values()))["score"] for m in found["models"]] == [0.25, 0.25]
    page, table = (ask.out / f"comparison.{kind}" for kind in ("html", "md"))
    for text in (page.read_text(), table.read_text()):
        assert "four" in text and "25.0" in text and "512 MB" in text
    assert page.read_text().count("<svg") == 4 and "src=" not in page.read_text() and "<script" not in page.read_text()
    assert json.loads((ask.out / "comparison.json").read_text()) == found


def test_an_address_that_dies_midway_loses_nothing(ask):
    dead = "gone@http://127.0.0.1:9/v1"

    def speed(each, n):
        if each.address:
            raise TiercelError("nobody listens")
        return {"prefill_tok_s": 1.0, "decode_tok_s": 1.0, "memory_bytes": 1}

    found = ask({dead: Scripted("gone", "4", dies_at=2), "here": Scripted("here", "4")}, speed=speed)
    gone, here = found["models"]
    assert "does not answer any more" in next(iter(gone["errors"].values())) and not gone["scores"]
    assert here["scores"] and here["speed"] and not here["errors"]
    assert "nobody listens" in (ask.out / "comparison.html").read_text()
    back = Scripted("gone", "4")
    again = ask({dead: back, "here": Scripted("here", "4", dies_at=0)})
    assert back.asked == 2, "the two answers that were there are not asked again"
    assert again["models"][0]["scores"] and again["models"][1]["scores"] == here["scores"]


def test_names_on_the_page_are_text(ask):
    name = "<script>alert(1)"
    ask({name: Scripted(name, "4")})
    assert "<script" not in (ask.out / "comparison.html").read_text()


@pytest.mark.parametrize("names", [["a", "a"], ["a@ftp://x"], ["@http://x/v1"]])
def test_what_cannot_be_compared_is_refused(ask, names):
    with pytest.raises(RequestError):
        ask({}, names)
