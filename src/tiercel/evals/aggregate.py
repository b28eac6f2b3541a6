"""Aggregate the records of a run into its result."""

from __future__ import annotations

import math
import platform
from collections.abc import Sequence
from dataclasses import dataclass
from pathlib import Path
from typing import Any

from tiercel.evals import votes
from tiercel.evals.ask import Record
from tiercel.evals.statistics import bootstrap, mean, wilson
from tiercel.evals.task import Item, Task
from tiercel.voting.settings import VoteSettings

TIME_FIELDS = ("seconds", "latency", "cached_tokens", "beyond_tokens", "folder")  # may differ between two equal runs


@dataclass(frozen=True)
class Result:
    """What a run found.

    score, interval: of the measure that `metric` names, 0 … 1 · metrics: further ones by name
    chance: score of random choices on these items · majority: score of the commonest answer on the whole task
    seconds: by the clock, from when the first item was asked, interruptions left out
    cut: outputs that the token budget ended · errors: items that could not be asked (they count as wrong)
    beyond_tokens: written by traces of a vote that were given up when it was decided; not among the generated
    items: one record each, in the order of the task, with every transcript
    """

    model: dict[str, Any]
    task: dict[str, Any]
    settings: dict[str, Any]
    metric: str
    score: float
    interval: dict[str, Any]
    metrics: dict[str, float]
    groups: dict[str, dict[str, float]]
    chance: float | None
    majority: dict[str, Any] | None
    n_items: int
    n_samples: int
    cut: int
    unanswered: int
    errors: int
    prompt_tokens: int
    generated_tokens: int
    cached_tokens: int
    beyond_tokens: int
    seconds: float
    versions: dict[str, str]
    items: list[Record]
    folder: Path | None = None  # where it is kept

    def to_dict(self, *, items: bool = True, times: bool = True) -> dict[str, Any]:
        """Plain data.  times=False: only what two equal runs have in common."""
        found = {**vars(self), "folder": None if self.folder is None else str(self.folder)}
        if not items:
            del found["items"]
        if not times:
            found = {name: value for name, value in found.items() if name not in TIME_FIELDS}
            if items:
                found["items"] = [{k: v for k, v in r.items() if k not in TIME_FIELDS} for r in self.items]
        return found


def summarize(
    about: dict[str, Any], task: Task, items: Sequence[Item], records: list[Record], everything: Sequence[Item]
) -> Result:
    """From the records alone: a resumed run and an uninterrupted one have the same.

    everything: all items of the task, whose commonest answer is the majority baseline."""
    settings = about["settings"]
    scores = [record["score"] for record in records]
    samples = [sample for record in records for sample in record.get("samples", ())]
    write = settings["choices"] != "likelihood"
    vote = VoteSettings(**settings["vote"]) if "vote" in settings else None
    metric = "correct" if write else "acc_norm" if task.normalized else "acc"
    metric = metric if vote is None else votes.name_of(vote)
    samples_each = settings["samples"] if vote is None else 1  # what is scored of an item
    if samples_each > 1 and 0 < sum(scores) < len(scores):  # the bootstrap of equal scores is degenerate
        low, high = bootstrap(scores)
        interval = {"low": low, "high": high, "level": 0.95, "method": "bootstrap over items"}
    else:
        low, high = wilson(sum(scores), len(scores))
        interval = {"low": low, "high": high, "level": 0.95, "method": "Wilson"}
    metrics = _further(task, records, samples_each)
    by_group: dict[str, list[float]] = {}
    for record in records:
        if record["group"]:
            by_group.setdefault(record["group"], []).append(record["score"])
    groups = {name: {"items": len(part), "score": mean(part)} for name, part in sorted(by_group.items())}
    majority = task.majority(everything)
    return Result(
        model=about["model"],
        task=about["task"],
        settings=settings,
        metric=metric,
        score=mean(scores),
        interval=interval,
        metrics=metrics,
        groups=groups,
        chance=task.chance(items),
        majority=None if majority is None else {"answer": majority[0], "score": majority[1]},
        n_items=len(records),
        n_samples=len(samples) if write else len(records),
        cut=sum(sample["finish_reason"] == "length" for sample in samples),
        unanswered=sum(sample["answer"] is None for sample in samples),
        errors=sum("error" in record for record in records),
        prompt_tokens=sum(record["prompt_tokens"] for record in records),
        generated_tokens=sum(record["generated_tokens"] for record in records),
        cached_tokens=sum(record["cached_tokens"] for record in records),
        beyond_tokens=sum(record.get("beyond_tokens", 0) for record in records),
        seconds=round(sum(record["seconds"] for record in records), 3),
        versions=versions(),
        items=records,
    )


def _further(task: Task, records: Sequence[Record], samples: int) -> dict[str, float]:
    """Means of the other judgements, pass@k, perplexity."""
    out: dict[str, float] = {}
    of_samples = [sample["scores"] for record in records for sample in record.get("samples", ())]
    of_items = [record.get("scores", {}) for record in records]
    for judged in (of_samples, of_items):
        for name in dict.fromkeys(name for scores in judged for name in scores):
            out[name] = mean([scores.get(name, 0.0) for scores in judged])
    if samples > 1:
        out[f"pass@{samples}"] = mean([float(any(s["correct"] for s in record["samples"])) for record in records])
    if task.kind == "continue":
        known = [record["logprobs"][0] for record in records if record["logprobs"]]
        out["perplexity"] = math.exp(min(-mean(known), 700.0))
    return out


def versions() -> dict[str, str]:
    import torch

    from tiercel import __version__

    return {"tiercel": __version__, "python": platform.python_version(), "torch": torch.__version__,
            "machine": f"{platform.system()} {platform.machine()}"}  # fmt: skip
