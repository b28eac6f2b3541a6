"""Train some networks of one kind on one task, side by side, and examine them.

They differ in the learning rate alone: same data, same first weights.  On a GPU a step of all of them is one CUDA graph
with a stream for each (networks this small leave the GPU idle between kernels); elsewhere they take turns.
"""

from __future__ import annotations

import time
from collections.abc import Sequence
from typing import Any

import numpy as np
import torch
import torch.nn.functional as F
from plan import Job, config_of
from tasks import IGNORE, NOISE, Task
from torch import Tensor

from tiercel.mixers.mamba2.varlen import CHUNK
from tiercel.model.decoder import Decoder
from tiercel.model.initialize import initialize
from tiercel.model.varlen import VarlenBatch
from tiercel.train.optim import adamw, clip, rate


class Learner:
    """One network in training.  All that a step touches stays where it is, so that a graph can be made of it."""

    def __init__(self, job: Job, lr: float, device: str) -> None:
        self.network = Decoder(config_of(job.network))
        initialize(self.network, job.seed)
        with torch.no_grad():  # 0.02 would drown in what eight layers of a width of 64 add to it
            self.network.embed.weight.mul_(self.network.config.width**-0.5 / 0.02)
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

    def loss_of(self, tokens_BL: Tensor, targets_BL: Tensor, batch: VarlenBatch) -> Tensor:
        x_TD = self.network.hidden_states(tokens_BL, batch)
        return F.cross_entropy(self.network.head(x_TD).float(), targets_BL.flatten(), ignore_index=IGNORE)

    def step(self, tokens_BL: Tensor, targets_BL: Tensor, batch: VarlenBatch) -> None:
        self.optimizer.zero_grad(set_to_none=True)
        loss = self.loss_of(tokens_BL, targets_BL, batch)
        loss.backward()
        clip(self.parameters, 1.0)
        self.optimizer.step()
        self.loss.copy_(loss.detach())


class Recorded:
    """A step of all learners as one CUDA graph, a stream for each."""

    def __init__(self, learners: Sequence[Learner], *given: Any) -> None:
        """Begins with one eager step of each, in which libraries allocate what must not be in the graph."""
        self.streams = [torch.cuda.Stream() for _ in learners]
        for stream, learner in zip(self.streams, learners, strict=True):
            stream.wait_stream(torch.cuda.current_stream())
            with torch.cuda.stream(stream):
                learner.step(*given)
                learner.optimizer.zero_grad(set_to_none=True)
            torch.cuda.synchronize()
        self.graph = torch.cuda.CUDAGraph()
        with torch.cuda.graph(self.graph):
            main = torch.cuda.current_stream()
            for stream in self.streams:
                stream.wait_stream(main)
            for stream, learner in zip(self.streams, learners, strict=True):
                with torch.cuda.stream(stream):
                    learner.step(*given)
            for stream in self.streams:
                main.wait_stream(stream)
        torch.cuda.synchronize()

    def __call__(self) -> None:
        self.graph.replay()


def one_document(rows: int, length: int, device: str) -> VarlenBatch:
    """Rows that are one document each."""
    return VarlenBatch(torch.zeros(rows, length, dtype=torch.bool)).to(device)


def padded(tokens: np.ndarray, targets: np.ndarray) -> tuple[np.ndarray, np.ndarray]:
    """To whole chunks of the scan where it takes more than one; nothing comes after, so nothing changes."""
    L = tokens.shape[-1]
    more = -L % CHUNK if L > CHUNK else 0
    wide = [(0, 0)] * (tokens.ndim - 1) + [(0, more)]
    return np.pad(tokens, wide, constant_values=NOISE), np.pad(targets, wide, constant_values=IGNORE)


def run(job: Job, device: str, graph: bool = False) -> list[dict[str, Any]]:
    """→ a result for each learning rate: shares right, by set and size.

    graph: on a GPU.  RuntimeError where the graph does not do what plain steps do.
    """
    task = job.of
    if device == "cuda":
        torch.set_float32_matmul_precision("high")
    learners = [Learner(job, lr, device) for lr in job.rates]
    random = np.random.default_rng((job.seed, 1))
    made = [padded(*task.make(random, job.rows, task.size)) for _ in range(job.steps)]
    data = [torch.from_numpy(np.stack(part).astype(np.int16)).to(device) for part in zip(*made, strict=True)]
    length = data[0].shape[-1]
    batch = one_document(job.rows, length, device)
    tokens_BL, targets_BL = (torch.zeros(job.rows, length, dtype=torch.int64, device=device) for _ in range(2))
    given = tokens_BL, targets_BL, batch
    recorded: Recorded | None = None
    curve: list[list[float]] = []
    began, timed = time.perf_counter(), 0
    for i in range(job.steps):
        tokens_BL.copy_(data[0][i])
        targets_BL.copy_(data[1][i])
        factor = rate(i, job.steps, "cosine", warmup=max(1, job.steps // 10), floor=0.05)
        for learner in learners:
            learner.set_rate(factor)
        if not graph:
            for learner in learners:
                learner.step(*given)
        elif recorded is None:
            recorded = Recorded(learners, *given)
            began, timed = time.perf_counter(), i + 1
        elif i == timed:
            _check(recorded, learners, *given)
        else:
            recorded()
        if (i + 1) % max(1, job.steps // 20) == 0:
            curve.append([round(float(learner.loss), 4) for learner in learners])
    seconds = time.perf_counter() - began
    speed = (job.steps - timed) * job.rows * length * len(learners) / seconds
    results = []
    for j, learner in enumerate(learners):
        result = {
            "network": job.network, "task": job.task, "seed": job.seed, "lr": job.rates[j],
            "steps": job.steps, "rows": job.rows, "length": length, "examined": job.examined, "small": job.small,
            "parameters": sum(p.numel() for p in learner.parameters), "loss": [point[j] for point in curve],
            "tokens_per_second": round(speed), "device": device, "graph": graph,
        }  # fmt: skip
        right = {"validation": examine(learner.network, task, task.size, (job.seed, 2), job.examined, device)}
        for size in (task.size, *task.longer):
            right[str(size)] = examine(learner.network, task, size, (3,), job.examined, device)
        results.append(result | {"right": right})
    return results


def _check(recorded: Recorded, learners: Sequence[Learner], *given: Any) -> None:
    """The first step of a graph: does it compute the losses that plain operations do?"""
    plain = [learner.loss_of(*given).item() for learner in learners]
    recorded()
    for expected, learner in zip(plain, learners, strict=True):
        if not abs(learner.loss.item() - expected) <= 0.01 * abs(expected):
            raise RuntimeError(f"the graph's loss is {learner.loss.item()}, that of plain operations {expected}")


def examine(network: Decoder, task: Task, size: int, seed: tuple[int, ...], rows: int, device: str) -> dict[str, float]:
    """Shares that are right where the likeliest token is said: of all tokens, of whole rows, of rows' last tokens.

    The test set of a size is the same for everybody; that of validation goes with the seed.
    """
    tokens, targets = padded(*task.make(np.random.default_rng((*seed, size)), rows, size))
    # of a dozen processes on one GPU: 2^17 tokens at once took 20 GiB each
    at_once = max(1, (1 << 14 if device == "cuda" else 1 << 13) // tokens.shape[1])
    good = counted = whole = last = 0.0
    for begin in range(0, rows, at_once):
        tokens_BL, targets_BL = (torch.from_numpy(t[begin : begin + at_once]).to(device) for t in (tokens, targets))
        # with gradients on, though none is wanted: the plain operations of training, no kernel to be compiled first
        x_TD = network.hidden_states(tokens_BL, one_document(*tokens_BL.shape, device)).detach()
        best_BL = network.head(x_TD).detach().argmax(-1).view(tokens_BL.shape)
        asked_BL = targets_BL != IGNORE
        right_BL = (best_BL == targets_BL) & asked_BL
        ends_B = (asked_BL * torch.arange(asked_BL.shape[1], device=device)).argmax(1, keepdim=True)
        good += float(right_BL.sum())
        counted += float(asked_BL.sum())
        whole += float((right_BL.sum(1) == asked_BL.sum(1)).sum())
        last += float(right_BL.gather(1, ends_B).sum())
    return {"tokens": round(good / counted, 5), "rows": round(whole / rows, 5), "last": round(last / rows, 5)}
