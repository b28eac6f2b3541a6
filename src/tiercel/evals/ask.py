"""Ask the items of a task and grade what comes back, one record per item."""

from __future__ import annotations

import functools
import hashlib
from collections.abc import Callable, Iterator, Sequence
from typing import Any

from tiercel.errors import ContextOverflow
from tiercel.evals import grade, votes
from tiercel.evals.answers import Answerer, Answers, Ask, Question, Scored
from tiercel.evals.plan import RunPlan
from tiercel.evals.statistics import mean
from tiercel.evals.task import Item, Prompt, Settings, Task, Verdict
from tiercel.voting.answers import normal

Record = dict[str, Any]


def ask_items(
    answerer: Answerer,
    task: Task,
    items: Sequence[Item],
    prompts: Sequence[Prompt],
    left: Sequence[int],
    plan: RunPlan,
    settings: Settings,
) -> Iterator[Record]:
    ask = Ask(plan.chat, plan.samples, plan.max_tokens, plan.temperature, plan.top_p, plan.top_k,
              plan.min_p, () if plan.chat else tuple(task.stop), settings.think, settings.slots,
              settings.vote)  # fmt: skip
    if plan.choices == "likelihood" or task.kind == "continue":
        contexts = ((i, str(prompts[i]), list(task.continuations(items[i]))) for i in left)
        for scored in answerer.score(contexts, ask):
            if scored.error is not None and not isinstance(scored.error, ContextOverflow):
                raise scored.error
            yield _scored(task, items[scored.key], str(prompts[scored.key]), scored)
        return

    @functools.lru_cache(4096)  # a vote reads each trace as it ends, before all of them are graded
    def judged(key: int, text: str) -> Verdict:
        return task.grade(items[key], grade.final(text))

    def read(key: int, text: str) -> str | None:
        answer = judged(key, text).answer
        return None if answer is None else normal(answer)

    questions = (Question(i, prompts[i], seed_of(settings.seed, items[i].id), functools.partial(read, i)) for i in left)
    for answers in answerer.answer(questions, ask):
        if answers.error is not None and not isinstance(answers.error, ContextOverflow):
            raise answers.error
        yield _graded(items[answers.key], prompts[answers.key], answers, functools.partial(judged, answers.key))


def seed_of(seed: int, id: str) -> int:
    """Every item draws from its own seed, so that it does not matter what is asked beside it or before."""
    return int.from_bytes(hashlib.sha256(f"{seed} {id}".encode()).digest()[:6], "big")


def _graded(item: Item, prompt: Prompt, answers: Answers, judged: Callable[[str], Verdict]) -> Record:
    samples: list[Record] = []
    for sample in answers.samples:
        verdict = judged(sample.text)
        samples.append({"text": sample.text, "thinking": sample.thinking, "finish_reason": sample.finish_reason,
                        "tokens": sample.tokens, "answer": verdict.answer, "correct": verdict.correct,
                        "scores": dict(verdict.scores)} | ({"note": verdict.note} if verdict.note else {}))  # fmt: skip
    record: Record = _record(item, prompt, answers) | {
        "score": mean([float(sample["correct"]) for sample in samples]),
        "samples": samples,
        "generated_tokens": sum(sample["tokens"] for sample in samples),
    }
    if answers.vote is not None:
        for kept, trace in zip(samples, answers.vote.traces, strict=False):
            kept["confidence"] = trace.confidence
        record |= votes.record(answers.vote, [sample["correct"] for sample in samples])
    return record


def _scored(task: Task, item: Item, prompt: str, scored: Scored) -> Record:
    texts = list(task.continuations(item))
    logprobs = [each.logprob for each in scored.likelihoods]
    record: Record = _record(item, prompt, scored) | {
        "continuations": texts,
        "logprobs": logprobs,
        "generated_tokens": 0,
    }
    if not logprobs:
        return record | {"score": 0.0, "scores": {}}
    if task.kind == "continue":
        right = scored.likelihoods[0].greedy
        return record | {"score": float(right), "scores": {"acc": float(right)}}
    gold = int(item.gold)
    per_byte = [
        value / max(len(text.removeprefix(" ").encode()), 1) for value, text in zip(logprobs, texts, strict=True)
    ]
    per_char = [value / max(len(text.removeprefix(" ")), 1) for value, text in zip(logprobs, texts, strict=True)]
    picks = {"acc": _best(logprobs), "acc_norm": _best(per_char), "acc_bytes": _best(per_byte)}
    scores = {name: float(pick == gold) for name, pick in picks.items()}
    return record | {"score": scores["acc_norm" if task.normalized else "acc"], "scores": scores, "picks": picks}


def _record(item: Item, prompt: Prompt, answers: Answers | Scored) -> Record:
    record = {"id": item.id, "group": item.group, "gold": item.gold, "prompt": prompt,
              "prompt_tokens": answers.prompt_tokens, "cached_tokens": answers.cached_tokens,
              "latency": round(answers.seconds, 4)}  # fmt: skip
    return record | ({"error": str(answers.error)} if answers.error is not None else {})


def _best(values: Sequence[float]) -> int:
    return max(range(len(values)), key=lambda i: values[i])
