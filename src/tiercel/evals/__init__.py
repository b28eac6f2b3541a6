"""Evaluation: benchmarks, graders, votes, comparisons.

    from tiercel.evals import evaluate, open_task, Settings
    result = evaluate(tiercel.load("smollm2"), open_task("gsm8k"), Settings(limit=20))
    result.score, result.interval

task.py        what a benchmark is · registry.py: the table of them (one file each: gsm8k.py, arc_challenge.py, …)
data.py        where their files come from, checked by sha256
local.py       a loaded model as an `Answerer` · endpoint.py: an OpenAI-compatible address as one
run.py         evaluate; plan.py, ask.py, aggregate.py, log.py: its parts
report.py      JSON, Markdown and one HTML page
grade.py       when two answers are the same · math_worker.py: the same with mathematics, in a process of its own
sandbox.py     runs programs that a model wrote
lm_eval.py     our models for lm-eval
"""

from __future__ import annotations

from typing import TYPE_CHECKING, Any

if TYPE_CHECKING:
    from tiercel.evals.aggregate import Result
    from tiercel.evals.registry import open_task
    from tiercel.evals.run import evaluate
    from tiercel.evals.task import Settings, Task

_HOME = {"evaluate": "run", "Result": "aggregate", "Settings": "task", "Task": "task", "open_task": "registry"}
__all__ = ["Result", "Settings", "Task", "evaluate", "open_task"]


def __getattr__(name: str) -> Any:
    if name not in _HOME:
        raise AttributeError(f"module {__name__!r} has no attribute {name!r}")
    from importlib import import_module

    return getattr(import_module(f"tiercel.evals.{_HOME[name]}"), name)
