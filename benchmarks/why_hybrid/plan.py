"""Which runs make the table, and in which order.  No torch."""

from __future__ import annotations

import argparse
from dataclasses import dataclass
from functools import cache
from pathlib import Path

from tasks import SMALL, TASKS, Task

from tiercel.families.pattern import read_file
from tiercel.model.config import ModelConfig

HERE = Path(__file__).resolve().parent
NETWORKS = {
    "parallel": "parallel (attention ∥ Mamba-2)",
    "interleaved": "interleaved 3 : 1",
    "one_attention": "Mamba-2, one attention layer",
    "attention": "attention alone",
    "mamba2": "Mamba-2 alone",
}
RATES = 1e-3, 3e-3, 6e-3
STEPS = {"recall": 800, "copy": 600, "istree": 700, "parity": 300}
SMALL_STEPS = {"recall": 300, "copy": 300, "istree": 300, "parity": 150}


@cache
def config_of(network: str) -> ModelConfig:
    return read_file(HERE / "networks" / f"{network}.toml")


@dataclass(frozen=True)
class Job:
    """One network kind on one task, from one seed, at every rate.

    rows: of a step.  examined: rows of each test set.  small: the tasks are those of `tasks.SMALL`.
    """

    network: str
    task: str
    seed: int
    rates: tuple[float, ...]
    steps: int
    rows: int
    examined: int
    small: bool = False

    @property
    def of(self) -> Task:
        return (SMALL if self.small else TASKS)[self.task]


def jobs_of(args: argparse.Namespace) -> list[Job]:
    """Seed by seed; within a seed task by task, longest first, so that a GPU's last minute is not one long run;
    the small version shortest first, so that its ten minutes show something of every task.
    """
    cuda = args.device == "cuda"
    rates = tuple(map(float, args.rates.split(","))) if args.rates else ((1e-3, 4e-3) if args.small else RATES)
    steps = dict(SMALL_STEPS if args.small else STEPS)
    for part in (args.steps or "").split(",") if args.steps else []:
        name, _, number = part.rpartition("=")
        steps |= {name: int(number)} if name else dict.fromkeys(steps, int(number))
    rows = args.rows or (128 if cuda else 32)
    examined = args.examined or (1024 if cuda else 128 if args.small else 512)
    seeds = args.seeds or (1 if args.small else 3)
    tasks = args.tasks.split(",") if args.tasks else list(TASKS)
    return [
        Job(network, task, seed, rates, steps[task], rows, examined, args.small)
        for seed in range(seeds)
        for task in sorted(tasks, key=lambda name: steps[name] if args.small else -steps[name])
        for network in args.networks.split(",")
    ]
