"""The table of benchmarks."""

from __future__ import annotations

from importlib import import_module
from pathlib import Path
from typing import Any

from tiercel.errors import RequestError
from tiercel.evals.task import Task

# name → (module of this folder, class); a module is imported when its task is opened
TASKS = {
    "aime24": ("aime24", "AIME24"),
    "aime25": ("aime25", "AIME25"),
    "gsm8k": ("gsm8k", "GSM8K"),
    "math500": ("math500", "MATH500"),
    "mmlu": ("mmlu", "MMLU"),
    "arc_challenge": ("arc_challenge", "ARCChallenge"),
    "humaneval": ("humaneval", "HumanEval"),
    "lambada": ("lambada", "LAMBADA"),
    "problems": ("problems", "Problems"),
}


def open_task(name: str, **fields: Any) -> Task:
    """A benchmark by name, or any JSONL file by path (fields: question, choices, answer, kind; see jsonl.py)."""
    if name in TASKS:
        if fields:
            raise RequestError(f"{name} has its own fields; they can be named for a JSONL file only")
        module, kind = TASKS[name]
        found: Task = getattr(import_module(f"tiercel.evals.{module}"), kind)()
        return found
    if name.endswith((".jsonl", ".json")) or Path(name).is_file():
        custom: Task = import_module("tiercel.evals.jsonl").JSONL(Path(name), **fields)
        return custom
    raise RequestError(f"no task is called {name!r}; there are {', '.join(TASKS)}, and any FILE.jsonl")
