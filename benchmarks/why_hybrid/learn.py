"""Train some networks of one kind on one task, side by side, and examine them.

They differ in the learning rate alone: same data, same first weights.  On a GPU a step of all of them is one CUDA graph
with a stream for each (networks this small leave the GPU idle between kernels); elsewhere they take turns.
"""

from __future__ import annotations

import time
from collections.abc import Callable, Sequence
from dataclasses import dataclass
from pathlib import Path
from typing import Any

import numpy as np
import torch
import torch.nn.functional as F
from tasks import IGNORE, TASKS, VOCABULARY, Task
from torch import Tensor

from tiercel.families.pattern import read_file
from tiercel.model.decoder import Decoder
from tiercel.model.layers import initialize
from tiercel.model.packed import PackedRows
from tiercel.train.optim import adamw, clip, rate

HERE = Path(__file__).parent
NETWORKS = ("parallel", "interleaved", "one_attention", "attention", "mamba2")


def config_of(network: str) -> Any:
    return read_file(HERE / "networks" / f"{network}.toml")


@dataclass(frozen=True)
class Job:
    """One network kind on one task, from one seed, at every rate.  rows: of a step; examined: rows of each test set."""

    network: str
    task: str
    seed: int
    rates: tuple[float, ...]
    steps: int
    rows: int
    examined: int


class Learner:
    """One network in training.  Everything it touches in a step stays where it is, so that a graph can be made of it."""

    def __init__(self, job: Job, lr: float, device: str) -> None:
        self.network = Decoder(config_of(job.network))
        initialize(self.network, job.seed)
        self.network.to(device).requires_grad_(True)
        self.parameters = list(self.network.parameters())
        self.peak = lr
        self.optimizer = adamw(self.network, lr, weight_decay=0.05, betas=(0.9, 0.98))
        if device == "cuda":
            self.lr = torch.zeros((), device=device)
            for group in self.optimizer.param_groups:
                group["lr"], group["capturable"] = self.lr, True
        self.loss = torch.zeros((), device=device)

    def set_rate(self, factor: float) -> None:
        if isinstance(self.optimizer.param_groups[0]["lr"], Tensor):
            self.lr.fill_(self.peak * factor)
        else:
            for group in self.optimizer.param_groups:
                group["lr"] = self.peak * factor

    def step(self, tokens_BL: Tensor, targets_BL: Tensor, batch: PackedRows) -> None:
        self.optimizer.zero_grad(set_to_none=True)
        x_TD = self.network.features(tokens_BL, batch)
        loss = F.cross_entropy(self.network.head(x_TD).float(), targets_BL.flatten(), ignore_index=IGNORE)
        loss.backward()
        clip(self.parameters, 1.0)
        self.optimizer.step()
        self.loss.copy_(loss.detach())


def together(learners: Sequence[Learner], *given: Any) -> None:
    """A step of each, on a stream of its own."""
    main = torch.cuda.current_stream()
    for learner in learners:
        if not hasattr(learner, "stream"):
            learner.stream = torch.cuda.Stream()
        learner.stream.wait_stream(main)
        with torch.cuda.stream(learner.stream):
            learner.step(*given)
        main.wait_stream(learner.stream)


def one_document(rows: int, length: int, device: str) -> PackedRows:
    """Rows that are one document each."""
    return PackedRows(torch.zeros(rows, length, dtype=torch.bool)).to(device)


def run(job: Job, device: str, graph: bool, note: Callable[[str], None] = lambda _: None) -> list[dict[str, Any]]:
    """→ a result for each learning rate: shares right, by set and size."""
    task = TASKS[job.task]
    if device == "cuda":
        torch.set_float32_matmul_precision("high")
    learners = [Learner(job, lr, device) for lr in job.rates]
    # half of the data is made before the clock of training runs, all of it by this seed alone
    random = np.random.default_rng((job.seed, 1))
    made = [task.make(random, job.rows, task.size) for _ in range(job.steps)]
    data = [torch.from_numpy(np.stack(part).astype(np.int16)).to(device) for part in zip(*made, strict=True)]
    length = data[0].shape[-1]
    batch = one_document(job.rows, length, device)
    tokens_BL, targets_BL = (torch.zeros(job.rows, length, dtype=torch.int64, device=device) for _ in range(2))
    given = tokens_BL, targets_BL, batch
    recorded: Any = None
    curve: list[list[float]] = []
    began = time.perf_counter()
    timed = 0
    for i in range(job.steps):
        tokens_BL.copy_(data[0][i])
        targets_BL.copy_(data[1][i])
        factor = rate(i, job.steps, "cosine", warmup=max(1, job.steps // 10), floor=0.05)
        for learner in learners:
            learner.set_rate(factor)
        if device != "cuda":
            for learner in learners:
                learner.step(*given)
        elif not graph:
            together(learners, *given)
        elif i < 3:  # what libraries allocate at first must not be in the graph
            side = torch.cuda.Stream()
            side.wait_stream(torch.cuda.current_stream())
            with torch.cuda.stream(side):
                together(learners, *given)
            torch.cuda.current_stream().wait_stream(side)
        else:
            if recorded is None:
                torch.cuda.synchronize()
                recorded = torch.cuda.CUDAGraph()
                for learner in learners:
                    learner.optimizer.zero_grad(set_to_none=True)
                with torch.cuda.graph(recorded):
                    together(learners, *given)
                torch.cuda.synchronize()
                note(f"{job.network} {job.task}: recorded")
                began, timed = time.perf_counter(), i
            recorded.replay()
        if (i + 1) % max(1, job.steps // 20) == 0:
            curve.append([round(float(learner.loss), 4) for learner in learners])
    seconds = time.perf_counter() - began
    speed = (job.steps - timed) * job.rows * length * len(learners) / seconds
    results = []
    for j, learner in enumerate(learners):
        result = {
            "network": job.network, "task": job.task, "seed": job.seed, "lr": job.rates[j],
            "steps": job.steps, "rows": job.rows, "length": length, "examined": job.examined,
            "parameters": sum(p.numel() for p in learner.parameters),
            "loss": [point[j] for point in curve],
            "tokens_per_second": round(speed), "seconds": round(seconds / len(learners), 3), "device": device,
            "graph": recorded is not None,
        }  # fmt: skip
        right = {"validation": examine(learner.network, task, task.size, (job.seed, 2), job.examined, device)}
        for size in (task.size, *task.longer):
            right[str(size)] = examine(learner.network, task, size, (3,), job.examined, device)
        results.append(result | {"right": right})
    return results


def examine(
    network: Decoder, task: Task, size: int, seed: tuple[int, ...], rows: int, device: str
) -> dict[str, float]:
    """tokens: share of targets that are the likeliest token.  rows: share of rows in which all are.

    The test set of a size is the same for everybody; that of validation goes with the seed.
    """
    tokens, targets = task.make(np.random.default_rng((*seed, size)), rows, size)
    good = counted = whole = 0.0
    for begin in range(0, rows, 128):
        tokens_BL, targets_BL = (torch.from_numpy(t[begin : begin + 128]).to(device) for t in (tokens, targets))
        batch = one_document(*tokens_BL.shape, device)
        # with gradients on, though none is wanted: the plain operations of training, no kernel to be compiled first
        x_TD = network.features(tokens_BL, batch).detach()
        best_BL = network.head(x_TD).detach()[:, :VOCABULARY].argmax(-1).view(tokens_BL.shape)
        asked = targets_BL != IGNORE
        right = (best_BL == targets_BL) & asked
        good += float(right.sum())
        counted += float(asked.sum())
        whole += float((right.sum(1) == asked.sum(1)).sum())
    return {"tokens": round(good / counted, 5), "rows": round(whole / rows, 5)}
