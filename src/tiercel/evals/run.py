"""Evaluate a model on a task: ask, grade, keep every transcript, resume.

    result = evaluate(model, open_task("gsm8k"), Settings(limit=20), out=Path("runs/a"))

model is a `tiercel.Model` or any `Answerer`.  With `out` every finished item is a line of `out/items.jsonl`, on the
disk before the next one counts; a run that was killed resumes from there, and its report is the one that it would have
given without the interruption, but for the times.

    plan.py        what is asked          ask.py     one record per item
    aggregate.py   records → result       log.py     what is kept on the disk
"""

from __future__ import annotations

import time
from collections.abc import Callable
from dataclasses import replace
from pathlib import Path
from typing import TYPE_CHECKING

from tiercel.errors import FormatError, RequestError
from tiercel.evals.aggregate import Result, summarize
from tiercel.evals.answers import Answerer
from tiercel.evals.ask import ask_items
from tiercel.evals.log import RunLog
from tiercel.evals.plan import describe_task, folder_name, resolve, run_settings
from tiercel.evals.statistics import mean
from tiercel.evals.task import Settings, Task, draw_items

if TYPE_CHECKING:
    from tiercel.api import Model

Progress = Callable[[int, int, float], None]  # items done, items in all, running score
FORMAT = 1  # of run.json


def evaluate(
    model: Model | Answerer,
    task: Task,
    settings: Settings | None = None,
    *,
    out: Path | None = None,
    under: Path | None = None,
    fresh: bool = False,
    progress: Progress | None = None,
) -> Result:
    """Ask every item, grade the answers, and count.

    out: a folder that keeps the transcripts and lets the run be resumed (`fresh`: what is there is thrown away)
    under: a folder of runs, in which this one gets a folder named by model, task and all that decides its outcome
    Raises RequestError (settings, a model without chat template, a folder of another run), FormatError (data).
    """
    from tiercel.evals.local import LocalModel

    settings = settings or Settings()
    answerer: Answerer = model if hasattr(model, "answer") else LocalModel(model)  # type: ignore[assignment]
    everything = task.load(settings.data)
    items = draw_items(everything, settings.limit, settings.seed)
    if not items:
        raise FormatError(f"{task.name} has no items")
    plan = resolve(answerer, task, settings)
    prompts = [task.prompt(item, plan.shots, chat=plan.chat) for item in items]
    if settings.system:
        if not plan.chat:
            raise RequestError("a system message needs the chat template; leave it out or ask with --chat")
        first = {"role": "system", "content": settings.system}
        prompts = [[first, *prompt] for prompt in prompts if not isinstance(prompt, str)]
    about = {"format": FORMAT, "model": answerer.about(), "task": describe_task(task, len(everything)),
             "settings": run_settings(settings, plan)}  # fmt: skip
    if out is None and under is not None:
        out = under / folder_name(about)
    with RunLog(out, about, fresh) as log:
        records = log.records
        left = [i for i, item in enumerate(items) if item.id not in records]
        running = [records[item.id]["score"] for item in items if item.id in records]
        if progress is not None:
            progress(len(running), len(items), mean(running))
        last = time.perf_counter()
        for record in ask_items(answerer, task, items, prompts, left, plan, settings):
            now = time.perf_counter()
            log.write(record | {"seconds": round(now - last, 4)})
            last = now
            running.append(record["score"])
            if progress is not None:
                progress(len(running), len(items), mean(running))
        found = [records[item.id] for item in items]
    return replace(summarize(about, task, items, found, everything), folder=out)
