"""The loop that every way of training shares.

    fit(network, batches, settings)       steps of: micro-batches → sum of losses / counted tokens → clip → AdamW

Every step is a line of out/log.jsonl: {"step", "loss", "lr", "grad_norm", "tokens", "counted", "seconds"}; evaluations
are lines {"step", "eval_loss"} or what `test` returns.  Nothing waits for a GPU between two of every `log_every` steps.
A loss or gradient that is not finite stops the run before it has changed a weight, and the first layer it appears in
is named.
"""

from __future__ import annotations

import json
import math
import time
from collections.abc import Callable, Iterable
from contextlib import AbstractContextManager, ExitStack, nullcontext
from dataclasses import asdict, dataclass, field
from pathlib import Path
from typing import Any, Protocol

import torch
from torch import Tensor

from tiercel.errors import FormatError, RequestError, TiercelError
from tiercel.model.decoder import Decoder
from tiercel.runtime.lock import lock_folder
from tiercel.train import checkpoint, parallel
from tiercel.train.data import Rows
from tiercel.train.log import Line, TrainingLog
from tiercel.train.loss import next_token_loss
from tiercel.train.nonfinite import find_nonfinite
from tiercel.train.optim import SCHEDULES, adamw, clip, rate
from tiercel.train.progress import ProgressBar

Loss = Callable[[Decoder, Rows], Tensor]  # the sum over a micro-batch's counted tokens

# may differ between a run and its continuation
FREE_SETTINGS = ("out", "resume", "quiet", "log_every", "save_every", "eval_every", "device", "compile", "recompute")


class Stream(Protocol):
    """An endless iterator of micro-batches with a position: `train.data.Batches`."""

    position: Any

    def __next__(self) -> Rows: ...


@dataclass
class Settings:
    """steps: of the optimizer.  accumulate: micro-batches of a step.  out None: nothing is written.

    dtype: "f32", or "bf16": products in bfloat16, weights and sums in float32.
    decay, floor: see `optim.rate`.  warmup: steps.  save_every, eval_every 0: only at the end.
    """

    steps: int
    lr: float = 1e-3
    schedule: str = "cosine"
    warmup: int = 0
    decay: float = 0.2
    floor: float = 0.1
    weight_decay: float = 0.1
    betas: tuple[float, float] = (0.9, 0.95)
    clip: float = 1.0
    accumulate: int = 1
    device: str = "cpu"
    dtype: str = "f32"
    recompute: bool = False
    compile: bool = False
    save_every: int = 0
    eval_every: int = 0
    log_every: int = 10
    out: Path | None = None
    resume: bool = False
    quiet: bool = False

    def __post_init__(self) -> None:
        for name, least in (("steps", 1), ("accumulate", 1), ("warmup", 0), ("log_every", 1), ("save_every", 0)):
            if getattr(self, name) < least:
                raise RequestError(f"{name} must be at least {least}, not {getattr(self, name)}")
        if self.schedule not in SCHEDULES:
            raise RequestError(f"schedule {self.schedule!r} is not known; choose from {', '.join(SCHEDULES)}")
        if self.dtype not in ("f32", "bf16"):
            raise RequestError(f"dtype {self.dtype!r} is not known for training; choose f32 or bf16")
        if not (math.isfinite(self.lr) and self.lr > 0):
            raise RequestError(f"lr must be positive, not {self.lr}")
        if self.device == "cuda" and not torch.cuda.is_available():
            raise RequestError("there is no CUDA device here; leave --device out")


@dataclass
class Result:
    """loss: mean of the last `log_every` steps.  seconds: of this call, without what it was resumed from."""

    step: int
    loss: float
    eval_loss: float | None
    tokens: int
    seconds: float
    log: list[dict[str, Any]] = field(repr=False)


@dataclass
class StepRecord:
    """One optimizer step whose numbers may still be on the device.

    loss, grad_norm: float32 scalars.  tokens: of all ranks, padding included.  counted: tokens in the loss.
    """

    step: int
    micros: list[Rows]
    loss: Tensor
    lr: float
    grad_norm: Tensor
    tokens: int
    counted: int


def fit(
    network: Decoder,
    batches: Stream,
    settings: Settings,
    loss_fn: Loss = next_token_loss,
    *,
    held_out: Callable[[], Iterable[Rows]] | None = None,
    test: Callable[[Decoder], dict[str, float]] | None = None,
    on_step: Callable[[int, Decoder], None] | None = None,
) -> Result:
    """Train the network in place: every parameter that requires a gradient.

    Args:
        network: float32 weights.
        batches: micro-batches of this rank.
        settings: steps, rates, what is written and where.
        loss_fn: the sum of losses over a micro-batch's counted tokens.
        held_out: gives the micro-batches of an evaluation, anew at every call.
        test: any other evaluation; its numbers go into the log, also before the first step.
        on_step: called after every step.

    Returns:
        Step, losses, tokens, seconds and the log.

    Raises:
        TiercelError: the loss or a gradient is not finite (the first layer is named), or a file cannot be written.
        RequestError: nothing requires a gradient, the folder is in use, or resumed with other settings.
    """
    trainer = Trainer(network, batches, settings, loss_fn, held_out=held_out, test=test, on_step=on_step)
    with ExitStack() as stack:
        if settings.out is not None and parallel.ranks().first:
            stack.enter_context(lock_folder(settings.out, "another training run"))
        return trainer.run()


class Trainer:
    """A network, its optimizer, its data and its log; `run` is the loop.  Arguments as of `fit`."""

    def __init__(
        self,
        network: Decoder,
        batches: Stream,
        settings: Settings,
        loss_fn: Loss = next_token_loss,
        *,
        held_out: Callable[[], Iterable[Rows]] | None = None,
        test: Callable[[Decoder], dict[str, float]] | None = None,
        on_step: Callable[[int, Decoder], None] | None = None,
    ) -> None:
        self.network, self.batches, self.settings, self.loss_fn = network, batches, settings, loss_fn
        self.held_out, self.test, self.on_step = held_out, test, on_step
        network.train().to(settings.device)
        parallel.shard(network)
        self.parameters = [p for p in network.parameters() if p.requires_grad]
        if not self.parameters:
            raise RequestError("no parameter requires a gradient: call network.requires_grad_(True) first")
        if settings.dtype == "bf16" and settings.device == "cuda":
            torch.set_float32_matmul_precision("high")
        self.optimizer = adamw(network, settings.lr, weight_decay=settings.weight_decay, betas=settings.betas)
        self.log = TrainingLog(settings.out if parallel.ranks().first else None)
        self.nonfinite = torch.zeros((), device=settings.device)  # 1 from the first step that is not finite
        self.recent: list[StepRecord] = []  # steps whose numbers are not in the log yet
        self.eval_loss: float | None = None
        self.clock = time.perf_counter()  # when the last logged step ended

    def run(self) -> Result:
        """Train to `settings.steps`, from the last whole checkpoint where `settings.resume` is set."""
        s = self.settings
        begin = self.resume() if s.resume else 0
        if begin == 0:
            self.log.clear()
            if self.test is not None:
                self.log.write({"step": 0} | self.test(self.network))
        if s.compile:
            for block in self.network.layers:
                block.compile()
        started = self.clock = time.perf_counter()
        hidden = s.quiet or not parallel.ranks().first
        with ProgressBar(s.steps, begin, hidden=hidden) as bar:
            for step in range(begin + 1, s.steps + 1):
                self.recent.append(self.train_step(step))
                save, evaluate = self._due(step, s.save_every), self._due(step, s.eval_every)
                if save or evaluate or step % s.log_every == 0 or s.device == "cpu":
                    self._log_recent(bar)
                if evaluate:
                    self.evaluate(step)
                if save and s.out is not None:
                    self.save(step)
                if self.on_step is not None:
                    self.on_step(step, self.network)
        self.log.sync()
        return self._result(time.perf_counter() - started)

    def train_step(self, step: int) -> StepRecord:
        """Take one step of the optimizer, number 1 … steps; weights stay as they are where it is not finite."""
        s, ranks = self.settings, parallel.ranks()
        lr = s.lr * rate(step - 1, s.steps, s.schedule, warmup=s.warmup, decay=s.decay, floor=s.floor)
        for group in self.optimizer.param_groups:
            group["lr"] = lr
        micros = [next(self.batches) for _ in range(s.accumulate)]
        counted = _over_ranks(sum(rows.count for rows in micros), s)
        loss = torch.zeros((), device=s.device)
        for rows in micros:
            with autocast(s):
                summed = self.loss_fn(self.network, rows.to(s.device, recompute=s.recompute)) / max(1, counted)
            (summed * ranks.count).backward()  # gradients are averaged over ranks; scaled so, they add up
            loss = loss + summed.detach()
        loss = parallel.total(loss)
        norm = clip(self.parameters, s.clip)
        self.nonfinite = torch.maximum(self.nonfinite, (~(loss.isfinite() & norm.isfinite())).float())
        self.optimizer.found_inf = self.nonfinite  # type: ignore[attr-defined]  # fused AdamW skips a step where this is 1
        self.optimizer.step()
        self.optimizer.zero_grad(set_to_none=True)
        tokens = ranks.count * sum(rows.tokens_BL.numel() for rows in micros)
        return StepRecord(step, micros, loss, lr, norm, tokens, counted)

    def evaluate(self, step: int) -> None:
        """Write the results of `test` and of the held-out data into the log."""
        if self.test is not None:
            self.log.write({"step": step} | self.test(self.network))
        if self.held_out is not None:
            self.eval_loss = evaluate(self.network, self.held_out(), self.settings, self.loss_fn)
            self.log.write({"step": step, "eval_loss": self.eval_loss})
        self.clock = time.perf_counter()

    def save(self, step: int) -> None:
        """Write a checkpoint that a run can resume from."""
        assert self.settings.out is not None
        self.log.sync()
        place = checkpoint.Progress(step, self.batches.position)
        extra = {"settings": _plain(self.settings)}
        checkpoint.save(self.settings.out / "checkpoints", place, self.network, self.optimizer, extra)
        self.clock = time.perf_counter()

    def resume(self) -> int:
        """Go back to the last whole checkpoint, if there is one.

        Returns:
            Steps done; 0 without a checkpoint.

        Raises:
            RequestError: it was made with other settings.
            FormatError: every checkpoint is damaged, or it is beyond `settings.steps` or of another network.
        """
        s = self.settings
        found = None if s.out is None else checkpoint.last_whole(s.out / "checkpoints")
        if found is None:
            return 0
        before, now = found.state.get("settings", {}), _plain(s)
        differ = [name for name in before if name not in FREE_SETTINGS and before[name] != now.get(name)]
        if differ:
            name = differ[0]
            raise RequestError(
                f"{found.path} was made with {name} {before[name]}, not {now.get(name)}: resume with the same"
            )
        step = int(found.state["step"])
        if step > s.steps:
            raise FormatError(f"{found.path} is already beyond --steps {s.steps}")
        checkpoint.load(found, self.network, self.optimizer)
        position = found.state["position"]
        self.batches.position = tuple(position) if isinstance(position, list) else position
        self.log.rewind(step)
        return step

    def _due(self, step: int, every: int) -> bool:
        return step == self.settings.steps or (every > 0 and step % every == 0)

    def _log_recent(self, bar: ProgressBar) -> None:
        """Fetch the numbers of the last steps from the device, and write them."""
        lines = _lines(self.recent)
        if self.nonfinite.item():
            self._refuse(lines)
        now = time.perf_counter()
        for line in lines:
            self.log.write(line | {"seconds": round((now - self.clock) / len(lines), 6)})
        bar.advance(len(lines), self.log.lines[-1], sum(line["tokens"] for line in lines) / (now - self.clock))
        self.clock, self.recent = now, []

    def _refuse(self, lines: list[Line]) -> None:
        """Repeat the first step that was not finite, which has changed nothing, and name where it begins."""
        wrong = next(i for i, line in enumerate(lines) if not math.isfinite(line["loss"] + line["grad_norm"]))
        line, micros = lines[wrong], self.recent[wrong].micros
        where = "the loss"
        if parallel.ranks().count > 1:  # one rank alone cannot run a sharded network
            where = "a layer that a run on one rank would name"
        else:
            for rows in micros:
                if name := find_nonfinite(self.network, rows.to(self.settings.device), self._autocast_loss):
                    where = name
                    break
        what = "loss" if not math.isfinite(line["loss"]) else "gradient"
        raise TiercelError(
            f"step {line['step']}: the {what} is not a number, first in {where}; no weight was changed by it: "
            "go on from the last checkpoint with a smaller --lr, or look at the data"
        )

    def _autocast_loss(self, network: Decoder, rows: Rows) -> Tensor:
        with autocast(self.settings):
            return self.loss_fn(network, rows)

    def _result(self, seconds: float) -> Result:
        steps = [line for line in self.log.lines if "loss" in line]
        tail = steps[-self.settings.log_every :]
        return Result(
            step=self.settings.steps,
            loss=sum(line["loss"] for line in tail) / max(1, len(tail)),
            eval_loss=self.eval_loss,
            tokens=sum(line["tokens"] for line in steps),
            seconds=seconds,
            log=self.log.lines,
        )


@torch.no_grad()
def evaluate(network: Decoder, batches: Iterable[Rows], settings: Settings, loss_fn: Loss = next_token_loss) -> float:
    """Return the mean loss of a counted token, in nats."""
    total, counted = torch.zeros((), device=settings.device), 0
    for rows in batches:
        with autocast(settings):
            total = total + loss_fn(network, rows.to(settings.device))
        counted += rows.count
    return float(parallel.total(total)) / max(1, _over_ranks(counted, settings))


def autocast(s: Settings) -> AbstractContextManager[Any]:
    """Return the context in which products are bfloat16, where the settings ask for it."""
    return torch.autocast(s.device, torch.bfloat16) if s.dtype == "bf16" else nullcontext()


def _over_ranks(count: int, s: Settings) -> int:
    return count if parallel.ranks().count == 1 else int(parallel.total(torch.tensor(count, device=s.device)))


def _lines(records: list[StepRecord]) -> list[Line]:
    """Return the log lines of a few steps, with one transfer from the device."""
    numbers = torch.stack([t for record in records for t in (record.loss, record.grad_norm)]).view(-1, 2).tolist()
    return [
        {"step": r.step, "loss": loss, "lr": r.lr, "grad_norm": norm, "tokens": r.tokens, "counted": r.counted}
        | r.micros[0].notes
        for r, (loss, norm) in zip(records, numbers, strict=True)
    ]


def _plain(s: Settings) -> dict[str, Any]:
    plain: dict[str, Any] = json.loads(json.dumps(asdict(s), default=str))
    return plain
