"""Our model class inside lm-eval: its likelihoods are the network's, its task machinery runs on it."""

from __future__ import annotations

import json

import pytest

import tiercel
import tiny

pytestmark = pytest.mark.filterwarnings("ignore")


@pytest.fixture(scope="module")
def lm(tmp_path_factory):
    pytest.importorskip("lm_eval", reason="pip install tiercel[eval]")
    from tiercel.evals.lm_eval import TiercelLM

    return TiercelLM(tiercel.load(tiny.checkpoint(tmp_path_factory.mktemp("lm"), template=tiny.TEMPLATE)))


class Asked:
    def __init__(self, *args):
        self.args = args


def test_likelihoods_are_those_of_the_whole_text(lm):
    pairs = [("The sky is", " blue"), ("The sky is", " green"), ("ends with spaces  ", "x"), ("", "alone")]
    found = lm.loglikelihood([Asked(*pair) for pair in pairs], disable_tqdm=True)
    for (context, continuation), (value, greedy) in zip(pairs, found, strict=True):
        front = [lm.prefix_token_id] if not context else []
        bare = context.rstrip()
        whole = front + lm.tok_encode(context + continuation)
        start = len(front) + len(lm.tok_encode(bare)) if context else 1
        logprobs = lm.model.logits(whole).log_softmax(-1)
        steps = range(start, len(whole))
        assert value == pytest.approx(sum(float(logprobs[i - 1, whole[i]]) for i in steps), abs=1e-4)
        assert greedy == all(int(logprobs[i - 1].argmax()) == whole[i] for i in steps)


def test_a_rolling_likelihood_goes_on_over_windows(lm):
    text = "abcdefgh" * 66  # longer than the context of 512
    (value,) = lm.loglikelihood_rolling([Asked(text)], disable_tqdm=True)
    assert value < 0
    (short,) = lm.loglikelihood_rolling([Asked("abc")], disable_tqdm=True)
    ids = [lm.prefix_token_id, *lm.tok_encode("abc")]
    logprobs = lm.model.logits(ids).log_softmax(-1)
    assert short == pytest.approx(sum(float(logprobs[i, ids[i + 1]]) for i in range(3)), abs=1e-4)


def test_writing_stops_where_it_is_asked_to(lm):
    free = lm.generate_until([Asked("Hello", {"until": [], "max_gen_toks": 20})], disable_tqdm=True)[0]
    stop = free[5:7]
    kwargs = {"until": [stop, "\n\n\n"], "max_gen_toks": 20, "do_sample": False}
    cut, again = lm.generate_until([Asked("Hello", kwargs), Asked("Hello", kwargs)], disable_tqdm=True)
    assert cut == again == free.split(stop)[0]


def test_each_answer_is_kept_as_it_comes(lm, monkeypatch):
    """So that lm-eval's use_cache has what was finished when a run is interrupted."""
    kept = []
    monkeypatch.setattr(lm.cache_hook, "add_partial", lambda *answer: kept.append(answer))
    pairs = [("The sky is", " blue"), ("The sky is", " green"), ("The sea", " is")]
    found = lm.loglikelihood([Asked(*pair) for pair in pairs], disable_tqdm=True)
    assert kept == [("loglikelihood", pair, value) for pair, value in zip(pairs, found, strict=True)]
    kept.clear()
    question = "Hello", {"until": [], "max_gen_toks": 3}
    assert kept == [] and lm.generate_until([Asked(*question)], disable_tqdm=True) == [kept[0][2]]
    assert kept[0][:2] == ("generate_until", question)


@pytest.mark.slow
def test_a_whole_task_runs(lm, tmp_path):
    import lm_eval

    rows = [{"q": f"Pick {n}", "choices": ["one", "two"], "gold": n % 2} for n in range(4)]
    path = tmp_path / "t.jsonl"
    path.write_text("".join(json.dumps(row) + "\n" for row in rows))
    config = {"task": "pick", "dataset_path": "json", "dataset_kwargs": {"data_files": {"test": str(path)}},
              "test_split": "test",
              "output_type": "multiple_choice", "doc_to_text": "{{q}}:",
              "doc_to_target": "{{gold}}", "doc_to_choice": "{{choices}}",
              "metric_list": [{"metric": "acc"}]}  # fmt: skip
    found = lm_eval.simple_evaluate(model=lm, tasks=[config], bootstrap_iters=0, log_samples=True)
    ours = tiercel.evals.evaluate(lm.model, _own(tmp_path))
    picks = [max((0, 1), key=lambda i, s=s: s["resps"][i][0][0]) for s in found["samples"]["pick"]]
    assert picks == [record["picks"]["acc"] for record in ours.items]


def _own(tmp_path):
    rows = [{"question": f"Pick {n}", "choices": ["one", "two"], "answer": n % 2} for n in range(4)]
    path = tmp_path / "own.jsonl"
    path.write_text("".join(json.dumps(row) + "\n" for row in rows))
    task = tiercel.evals.open_task(str(path))
    task.prompt = lambda item, shots, *, chat: f"{item.question}:"
    return task
