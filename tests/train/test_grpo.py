"""GRPO: the numbers of its loss, what it skips, and that rewards rise."""

import json
import math
import shutil
from dataclasses import replace
from pathlib import Path

import pytest
import torch

import tiercel
import tiny
from tiercel.errors import FormatError, RequestError, TiercelError
from tiercel.model.initialize import initialize
from tiercel.problems import FAMILIES
from tiercel.sampling.params import SamplingParams
from tiercel.train import rewards
from tiercel.train.grpo import RolloutEngine, Rollouts, Rules, advantages, grpo, make_loss, surrogate
from tiercel.train.loop import Settings, fit
from tiercel.train.loss import next_token_logprobs, next_token_loss
from tiercel.train.rewards import Task


def trainable(words: str = "attention+mamba2"):
    """Without opinions: all tokens are about as likely."""
    network = tiny.network(words, native=False).train().requires_grad_(True)
    initialize(network, 1)
    return network


def test_an_answer_is_judged_by_its_siblings():
    assert advantages([1, 0, 0, 1]) == [0.5, -0.5, -0.5, 0.5]
    assert advantages([0.3, 0.3]) == [0, 0]


def test_the_loss_is_the_one_worked_out_by_hand():
    ratios = torch.tensor([1.0, 1.5, 1.5, 0.5, 0.5, 1.0])
    advantage = torch.tensor([2.0, 1.0, -1.0, 1.0, -1.0, 1.0])
    mismatch = torch.tensor([1.0, 1.0, 1.0, 1.0, 1.0, 5.0])  # training's p over the engine's
    before = torch.full((6,), -2.0)
    now = (before + ratios.log()).requires_grad_()
    found = surrogate(now, before, before - mismatch.log(), advantage, Rules())
    # 2;  1.5 cut to 1.28;  −1.5 stays;  0.5 stays;  −0.5 cut to −0.8;  weight 5 cut to 2
    assert math.isclose(found.item(), -(2 + 1.28 - 1.5 + 0.5 - 0.8 + 2), rel_tol=1e-6)
    found.backward()
    assert torch.allclose(now.grad, -torch.tensor([2.0, 0, -1.5, 0.5, 0, 2.0]))  # nothing pushes beyond the clip


def test_log_probabilities_of_training_and_of_the_engine_are_of_the_same_tokens():
    network = tiny.network("attention+mamba2 mamba1", native=False).train().requires_grad_(True)
    engine = RolloutEngine(network, None, slots=8, dtype=torch.float32)
    params = SamplingParams(n=6, max_tokens=9, logprobs=0)
    tasks = [Task(tiny.ids(length), lambda answer: float(len(answer) % 2)) for length in (5, 3, 20)]
    samples = [sample for group in engine.generate(tasks, params, [1, 2, 3]) for sample in group]
    assert len(samples) == 18 and len({tuple(s.tokens) for s in samples}) > 9
    judged = Rollouts(network, engine, lambda n: tasks[n], Rules())._rows(samples, {})
    assert judged.count == sum(len(s.tokens) for s in samples)
    assert (next_token_logprobs(network, judged) - judged.rollout_T).abs().max() < 1e-3
    assert torch.allclose(-next_token_logprobs(network, judged).sum(), next_token_loss(network, judged))
    again = [sample for group in engine.generate(tasks, params, [1, 2, 3]) for sample in group]
    assert [s.tokens for s in again] == [s.tokens for s in samples]


def test_the_engine_plays_with_the_weights_of_the_last_update():
    network = trainable()
    engine = RolloutEngine(network, None, slots=4, dtype=torch.float32)
    greedy = SamplingParams(temperature=0, max_tokens=8)
    task = [Task(tiny.ids(7), lambda answer: 0.0)]
    first = engine.generate(task, greedy)[0][0].tokens
    with torch.no_grad():
        for p in network.parameters():
            p.add_(torch.randn_like(p) * 0.3)
    engine.load_weights(network)
    tokens = list(tiny.ids(7))
    for _ in range(8):
        with torch.no_grad():
            tokens.append(int(network(torch.tensor(tokens))[-1].argmax()))
    assert engine.generate(task, greedy)[0][0].tokens == tokens[7:] != first


def few(answer: str) -> float:
    """The share of tokens below 100: words of a model without a tokenizer are its token ids."""
    ids = [int(word) for word in answer.split()]
    return sum(i < 100 for i in ids) / len(ids)


def test_the_reward_rises_within_seconds():
    network = trainable()
    engine = RolloutEngine(network, None, slots=32)
    rules = Rules(prompts=4, answers=8, max_tokens=6, updates=2, tries=4)
    stream = Rollouts(network, engine, lambda number: Task(tiny.ids(4, number % 3), few), rules)
    settings = Settings(steps=44, lr=1.5e-2, schedule="constant", weight_decay=0.0, quiet=True)
    log = fit(network, stream, settings, make_loss(rules)).log
    first, last = (sum(line["reward"] for line in part) / len(part) for part in (log[:4], log[-4:]))
    assert first < 0.55 and last > 0.85, (first, last)
    assert {"reward", "length", "signal", "skipped"} <= set(log[0])


def test_groups_that_say_nothing_are_skipped_counted_and_replaced():
    network = trainable()
    engine = RolloutEngine(network, None, slots=16)
    dull = Task(tiny.ids(4), lambda answer: 1.0)
    stream = Rollouts(
        network,
        engine,
        lambda number: dull if number % 2 else Task(tiny.ids(4), few),
        Rules(prompts=3, answers=4, max_tokens=4),
    )
    notes = next(stream).notes
    assert notes["skipped"] >= 1 and 0 < notes["signal"] < 0.8
    assert stream.position == (1, notes["skipped"] + round(notes["signal"] * stream.position[1]))
    assert stream.position[1] > 3  # others were drawn
    stream = Rollouts(network, engine, lambda number: dull, Rules(prompts=2, answers=2, max_tokens=4))
    with pytest.raises(TiercelError, match="none had answers of different worth"):
        next(stream)


def test_a_run_goes_on_as_if_it_had_not_stopped_and_leaves_a_model(tmp_path):
    tiny.checkpoint(tmp_path / "model", "attention+mamba2")
    config = shutil.copy(tmp_path / "model" / "config.json", tmp_path / "config.json")  # fresh weights, no tokenizer

    def tasks(number: int) -> Task:
        return Task(tiny.ids(4, number % 3), few)

    rules = Rules(prompts=3, answers=4, max_tokens=5, updates=2)
    settings = Settings(steps=4, lr=1e-3, save_every=2, eval_every=2, out=tmp_path / "run", quiet=True)
    found = grpo(config, tasks, settings, rules, tests=[tasks(0)])
    assert {"before", "after"} <= set(found)
    whole = lines(tmp_path / "run" / "log.jsonl")
    assert [line["step"] for line in whole if "test_reward" in line] == [0, 4, 8]
    shutil.rmtree(tmp_path / "run" / "checkpoints" / "step-00000008")
    grpo(config, tasks, replace(settings, resume=True), rules, tests=[tasks(0)])
    assert lines(tmp_path / "run" / "log.jsonl") == whole
    assert tiercel.load(tmp_path / "run").logits([1, 2]).isfinite().all()


def lines(log: Path) -> list[dict]:
    return [{k: v for k, v in json.loads(line).items() if k != "seconds"} for line in log.read_text().splitlines()]


def test_problems_of_a_test_set_are_never_trained_on_and_numbers_are_problems():
    tasks = rewards.problems(["counting", "addition"], (3, 4), seed=1)
    held = {p.question for name in ("counting", "addition") for p in FAMILIES[name].test_set(200, larger=True)}
    asked = [tasks(n).question for n in range(300)]
    assert not held & set(asked) and asked == [tasks(n).question for n in range(300)]
    with pytest.raises(RequestError, match="no problems named 'divinity'"):
        rewards.problems(["divinity"])


def test_rewards(tmp_path):
    assert rewards.exact(" Paris. ", "paris") == 1 and rewards.exact("London", "Paris") == 0
    pytest.importorskip("math_verify")
    assert rewards.math("The answer is $\\frac{1}{2}$", "0.5") == 1 and rewards.math("$0.4$", "0.5") == 0
    assert rewards.named("test_grpo:few") is not rewards.exact
    with pytest.raises(RequestError, match="module:function"):
        rewards.named("nothing")
    path = tmp_path / "q.jsonl"
    path.write_text('{"question": "1+1", "answer": 2}\n{"question": "1+2", "answer": 3}\n')
    tasks = rewards.questions(path, rewards.exact)
    assert {tasks(0).question, tasks(1).question} == {tasks(2).question, tasks(3).question} == {"1+1", "1+2"}
    assert tasks(0).reward("2") + tasks(0).reward("3") == 1
    path.write_text('{"question": "1+1"}\n')
    with pytest.raises(FormatError, match=r"q\.jsonl:1: a problem is"):
        rewards.questions(path, rewards.exact)


def test_a_task_of_reasoning_gym_grades_itself():
    pytest.importorskip("reasoning_gym")
    task = rewards.gym("chain_sum")(3)
    assert isinstance(task.question, str) and task.reward("no idea") < 1
