"""Resolve what an evaluation asks: chat or plain text, choices or writing, samples, budget."""

from __future__ import annotations

import hashlib
import json
import re
from dataclasses import asdict, dataclass
from typing import Any

from tiercel.errors import RequestError
from tiercel.evals.answers import Answerer
from tiercel.evals.task import Settings, Task


@dataclass(frozen=True)
class RunPlan:
    """The settings of a run with everything that was left open filled in.

    choices: None where the model writes freely, else "likelihood" or "letters" · shots: solved examples
    """

    chat: bool
    choices: str | None
    samples: int
    temperature: float
    shots: int
    top_p: float
    top_k: int
    min_p: float
    max_tokens: int


def resolve(answerer: Answerer, task: Task, settings: Settings) -> RunPlan:
    """Fill in what the settings leave open.

    Raises:
        RequestError: a combination that cannot be asked; it says what to change.
    """
    choices = _choices(answerer, task, settings)
    chat = _chat(answerer, task, settings, choices)
    writes = task.kind == "generate" or choices == "letters"
    if settings.vote is not None:
        _check_vote(answerer, task, settings, writes)
    samples = settings.vote.k if settings.vote else settings.samples or (task.samples if writes else 1)
    temperature = settings.temperature if settings.temperature is not None else task.temperature
    if samples > 1 and not writes:
        raise RequestError("likelihoods do not vary: several samples make no sense")
    if samples > 1 and temperature == 0:
        raise RequestError(f"{samples} samples at temperature 0 would be the same; give --temperature")
    shots = settings.shots if settings.shots is not None else (task.chat_shots if chat else task.shots)
    if shots > task.most_shots:
        raise RequestError(f"{task.name} has {task.most_shots} solved examples, not {shots}")
    return RunPlan(
        chat=chat,
        choices=choices,
        samples=samples,
        temperature=temperature,
        shots=shots,
        top_p=task.top_p if settings.top_p is None else settings.top_p,
        top_k=settings.top_k or 0,
        min_p=settings.min_p or 0.0,
        max_tokens=task.max_tokens if settings.max_tokens is None else settings.max_tokens,
    )


def _choices(answerer: Answerer, task: Task, settings: Settings) -> str | None:
    if task.kind == "generate":
        return None
    likelihood = getattr(answerer, "likelihoods", True)
    choices = settings.choices or ("likelihood" if likelihood else "letters")
    if choices == "likelihood" and not likelihood:
        raise RequestError(f"{answerer.name} is an address, which gives no likelihoods; ask with --letters")
    if choices == "letters" and task.kind == "continue":
        raise RequestError(f"{task.name} needs likelihoods, which only a model that is loaded here gives")
    return choices


def _chat(answerer: Answerer, task: Task, settings: Settings, choices: str | None) -> bool:
    chat = settings.chat
    if choices == "likelihood":
        if chat:
            raise RequestError(f"likelihoods are taken of plain text; leave --chat out for {task.name}, "
                               "or let the model write with --letters")  # fmt: skip
        return False
    if chat is None:
        chat = True if choices == "letters" else answerer.has_template
    if chat and not answerer.has_template:
        raise RequestError(f"{answerer.name} has no chat template; ask with --plain")
    return chat


def _check_vote(answerer: Answerer, task: Task, settings: Settings, writes: bool) -> None:
    if settings.samples is not None:
        raise RequestError(f"--samples {settings.samples} and a vote: a vote has its own number of answers")
    if not writes:
        raise RequestError("likelihoods do not vary, so there is nothing to vote on")
    if not task.votes:
        raise RequestError(f"answers to {task.name} are hardly ever equal, so there is nothing to vote on; --samples?")
    if not getattr(answerer, "votes", False):
        raise RequestError(f"{answerer.name} is an address, which does not say how sure it was; a vote needs a model "
                           "that is loaded here")  # fmt: skip


def run_settings(settings: Settings, plan: RunPlan) -> dict[str, Any]:
    """Return what decides the outcome of an item: two runs may share their items when this is equal."""
    vote = {} if settings.vote is None else {"vote": asdict(settings.vote)}
    return asdict(plan) | {"system": settings.system, "think": settings.think, "seed": settings.seed} | vote


def describe_task(task: Task, items: int) -> dict[str, Any]:
    """Return a task's entry in the report; items: how many the whole task has."""
    return {"name": task.name, "title": task.title or task.name, "kind": task.kind, "items": items,
            "data": [dict(source) for source in task.sources]}  # fmt: skip


def folder_name(about: dict[str, Any]) -> str:
    """Return a name that is the same for the same question, so that the same command resumes."""
    model = re.sub(r"[^A-Za-z0-9._-]+", "-", about["model"]["name"].rstrip("/").rpartition("/")[2])[:60].strip(".-")
    task = re.sub(r"[^A-Za-z0-9._-]+", "-", about["task"]["name"])[:60].strip(".-")
    digest = hashlib.sha256(json.dumps(about, sort_keys=True).encode()).hexdigest()[:8]
    return f"{model or 'model'}-{task or 'task'}-{digest}"
