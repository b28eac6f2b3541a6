"""The loop that every way of training shares.

    fit(network, batches, settings)       steps of: micro-batches → sum of losses / counted tokens → clip → AdamW

Every step is a line of out/log.jsonl: {"step", "loss", "lr", "grad_norm", "tokens", "counted", "seconds"}; evaluations
are lines {"step", "eval_loss"} or what `test` says.  Nothing waits for a GPU between two of every `log_every` steps.  A
loss or gradient that is no number stops the run before it has changed a weight, and the first layer it appears in is
named.
"""

from __future__ import annotations

import json
import math
import time
from collections.abc import Callable, Iterable
from contextlib import AbstractContextManager, nullcontext
from dataclasses import asdict, dataclass, field
from pathlib import Path
from typing import Any, Protocol

import torch
from torch import Tensor, nn

from tiercel.errors import FormatError, RequestError, TiercelError
from tiercel.model.decoder import Decoder
from tiercel.train import checkpoint, parallel
from tiercel.train.data import Rows
from tiercel.train.loss import next_token_loss
from tiercel.train.optim import SCHEDULES, adamw, clip, rate

Loss = Callable[[Decoder, Rows], Tensor]  # the sum over a micro-batch's counted tokens


class Stream(Protocol):
    """An endless iterator of micro-batches that knows where it is: `train.data.Batches`."""

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
    """Train the network in place: every parameter that wants a gradient.

    held_out: gives the micro-batches of an evaluation.  test: any other, its numbers go into the log; also before the
    first step.  on_step: called after every step.
    Raises TiercelError when the loss is no number, naming the first layer.
    """
    s, us = settings, parallel.ranks()
    network.train().to(s.device)
    parallel.shard(network)
    parameters = [p for p in network.parameters() if p.requires_grad]
    if not parameters:
        raise RequestError("no parameter wants a gradient: call network.requires_grad_(True) first")
    if s.dtype == "bf16" and s.device == "cuda":
        torch.set_float32_matmul_precision("high")
    optimizer = adamw(network, s.lr, weight_decay=s.weight_decay, betas=s.betas)
    log = Log(s.out if us.first else None)
    begin = _resume(s, network, optimizer, batches, log) if s.resume else 0
    if begin == 0:
        log.clear()
        if test is not None:
            log.write({"step": 0} | test(network))
    if s.compile:
        for block in network.layers:
            block.compile()
    bad = torch.zeros((), device=s.device)
    recent: list[tuple[list[Rows], list[Tensor | float | int]]] = []
    eval_loss: float | None = None
    started = last = time.perf_counter()
    with progress(s, begin) as show:
        for step in range(begin, s.steps):
            lr = s.lr * rate(step, s.steps, s.schedule, warmup=s.warmup, decay=s.decay, floor=s.floor)
            for group in optimizer.param_groups:
                group["lr"] = lr
            micros = [next(batches) for _ in range(s.accumulate)]
            counted = _over_ranks(sum(rows.count for rows in micros), s)
            loss = torch.zeros((), device=s.device)
            for rows in micros:
                with autocast(s):
                    summed = loss_fn(network, rows.to(s.device, recompute=s.recompute)) / max(1, counted)
                (summed * us.count).backward()  # the mean over ranks is taken of gradients: theirs add up then
                loss = loss + summed.detach()
            loss = parallel.total(loss)
            norm = clip(parameters, s.clip)
            bad = torch.maximum(bad, (~(loss.isfinite() & norm.isfinite())).float())
            optimizer.found_inf = bad  # type: ignore[attr-defined]  # fused AdamW leaves all as it is where this is 1
            optimizer.step()
            optimizer.zero_grad(set_to_none=True)
            recent.append(
                (micros, [step + 1, loss, lr, norm, us.count * sum(r.tokens_BL.numel() for r in micros), counted])
            )
            done = step + 1 == s.steps
            save = done or (s.save_every > 0 and (step + 1) % s.save_every == 0)
            evaluate_ = done or (s.eval_every > 0 and (step + 1) % s.eval_every == 0)
            if save or evaluate_ or (step + 1) % s.log_every == 0 or s.device == "cpu":
                lines = [line | micros[0].told for line, (micros, _) in zip(_fetch(recent), recent, strict=True)]
                if bad.item():
                    _refuse(network, recent, lines, s, loss_fn)
                now = time.perf_counter()
                for line in lines:
                    log.write(line | {"seconds": round((now - last) / len(lines), 6)})
                show(log.lines[-1], sum(line["tokens"] for line in lines) / (now - last), len(lines))
                last, recent = now, []
            if evaluate_ and test is not None:
                log.write({"step": step + 1} | test(network))
                last = time.perf_counter()
            if evaluate_ and held_out is not None:
                eval_loss = evaluate(network, held_out(), s, loss_fn)
                log.write({"step": step + 1, "eval_loss": eval_loss})
                last = time.perf_counter()
            if save and s.out is not None:
                log.sync()
                place = checkpoint.Progress(step + 1, batches.position)
                checkpoint.save(s.out / "checkpoints", place, network, optimizer, {"settings": _plain(s)})
                last = time.perf_counter()
            if on_step is not None:
                on_step(step + 1, network)
    log.sync()
    steps = [line for line in log.lines if "loss" in line]
    tail = steps[-s.log_every :]
    return Result(
        step=s.steps,
        loss=sum(line["loss"] for line in tail) / max(1, len(tail)),
        eval_loss=eval_loss,
        tokens=sum(line["tokens"] for line in steps),
        seconds=time.perf_counter() - started,
        log=log.lines,
    )


@torch.no_grad()
def evaluate(network: Decoder, batches: Iterable[Rows], settings: Settings, loss_fn: Loss = next_token_loss) -> float:
    """The mean loss of a counted token."""
    total, counted = torch.zeros((), device=settings.device), 0
    for rows in batches:
        with autocast(settings):
            total = total + loss_fn(network, rows.to(settings.device))
        counted += rows.count
    return float(parallel.total(total)) / max(1, _over_ranks(counted, settings))


def _over_ranks(count: int, s: Settings) -> int:
    return count if parallel.ranks().count == 1 else int(parallel.total(torch.tensor(count, device=s.device)))


def autocast(s: Settings) -> AbstractContextManager[Any]:
    return torch.autocast(s.device, torch.bfloat16) if s.dtype == "bf16" else nullcontext()


# ── what went wrong ──────────────────────────────────────────────────────────────────────────────────────


def _fetch(recent: list[tuple[list[Rows], list[Any]]]) -> list[dict[str, Any]]:
    """Numbers of a few steps from the device, in one piece."""
    lines = [line for _, line in recent]
    numbers = torch.stack([t for line in lines for t in (line[1], line[3])]).tolist()
    names = "step", "loss", "lr", "grad_norm", "tokens", "counted"
    return [
        dict(zip(names, (line[0], numbers[2 * i], line[2], numbers[2 * i + 1], *line[4:]), strict=True))
        for i, line in enumerate(lines)
    ]


def _refuse(network: Decoder, recent: list[Any], lines: list[dict[str, Any]], s: Settings, loss_fn: Loss) -> None:
    """The first step that went wrong has changed nothing: do it again and look."""
    wrong = next(i for i, line in enumerate(lines) if not math.isfinite(line["loss"] + line["grad_norm"]))
    line, micros = lines[wrong], recent[wrong][0]
    several = parallel.ranks().count > 1  # one rank alone cannot run a sharded network
    where = "a layer that a run on one rank would name" if several else None
    where = where or next((name for rows in micros if (name := first_bad(network, rows, s, loss_fn))), "the loss")
    what = "loss" if not math.isfinite(line["loss"]) else "gradient"
    raise TiercelError(
        f"step {line['step']}: the {what} is not a number, first in {where}; no weight was changed by it: "
        "go on from the last checkpoint with a smaller --lr, or look at the data"
    )


def first_bad(network: Decoder, rows: Rows, settings: Settings, loss_fn: Loss) -> str | None:
    """The first parameter, then the first module's output, then the first parameter's gradient that is not finite."""
    for name, p in network.named_parameters():
        if not p.detach().isfinite().all():
            return name
    found: list[str] = []

    def look(name: str) -> Callable[[nn.Module, Any, Any], None]:
        def hook(module: nn.Module, given: Any, out: Any) -> None:
            if not found and isinstance(out, Tensor) and not out.isfinite().all():
                found.append(name)

        return hook

    hooks = [module.register_forward_hook(look(name)) for name, module in network.named_modules() if name]
    try:
        with autocast(settings):
            loss = loss_fn(network, rows.to(settings.device))
        if found or not loss.isfinite():
            return found[0] if found else None
        loss.backward()
    finally:
        for hook in hooks:
            hook.remove()
    bad = [name for name, p in network.named_parameters() if p.grad is not None and not p.grad.isfinite().all()]
    network.zero_grad()
    return f"the gradient of {bad[-1]}" if bad else None  # the way back meets the last ones first


# ── the log ──────────────────────────────────────────────────────────────────────────────────────────────


class Log:
    """log.jsonl, and its lines."""

    def __init__(self, out: Path | None) -> None:
        self.path = None if out is None else out / "log.jsonl"
        self.lines: list[dict[str, Any]] = []
        self._waiting: list[dict[str, Any]] = []

    def clear(self) -> None:
        if self.path is not None:
            self.path.parent.mkdir(parents=True, exist_ok=True)
            self.path.write_bytes(b"")

    def rewind(self, step: int) -> None:
        """Forget what came after a checkpoint."""
        if self.path is None:
            return
        self.lines = [line for line in read_log(self.path) if line["step"] <= step]
        self.path.parent.mkdir(parents=True, exist_ok=True)
        from tiercel.runtime.atomic import atomic_write

        with atomic_write(self.path) as file:
            file.write("".join(json.dumps(line) + "\n" for line in self.lines).encode())

    def write(self, line: dict[str, Any]) -> None:
        self.lines.append(line)
        self._waiting.append(line)
        if len(self._waiting) >= 10:
            self.sync()

    def sync(self) -> None:
        if self.path is not None and self._waiting:
            with self.path.open("a") as file:
                file.writelines(json.dumps(line) + "\n" for line in self._waiting)
        self._waiting = []


def read_log(path: Path) -> list[dict[str, Any]]:
    """All whole lines: a process that was killed may have left half of one."""
    lines = []
    for text in path.read_text().splitlines() if path.exists() else []:
        try:
            lines.append(json.loads(text))
        except ValueError:
            break
    return lines


def _resume(s: Settings, network: Decoder, optimizer: torch.optim.Optimizer, batches: Stream, log: Log) -> int:
    """Back to the last checkpoint, if there is one → steps done."""
    found = checkpoint.complete(s.out / "checkpoints") if s.out is not None else []
    if not found:
        return 0
    state = checkpoint.load(found[-1], network, optimizer)
    before, now = state["settings"], _plain(s)
    differ = [name for name in before if name not in FREE and before[name] != now.get(name)]
    if differ:
        name = differ[0]
        raise RequestError(
            f"{found[-1]} was made with {name} {before[name]}, not {now.get(name)}: resume with the same"
        )
    if state["step"] > s.steps:
        raise FormatError(f"{found[-1]} is already beyond --steps {s.steps}")
    batches.position = tuple(state["position"]) if isinstance(state["position"], list) else state["position"]
    log.rewind(state["step"])
    return int(state["step"])


FREE = ("out", "resume", "quiet", "log_every", "save_every", "eval_every", "device", "compile", "recompute")


def _plain(s: Settings) -> dict[str, Any]:
    return json.loads(json.dumps(asdict(s), default=str))


# ── the bar ──────────────────────────────────────────────────────────────────────────────────────────────


class progress:
    """A bar on stderr with loss, tokens/s and time left; silent where nobody looks."""

    def __init__(self, s: Settings, begin: int) -> None:
        from rich.console import Console
        from rich.progress import BarColumn, MofNCompleteColumn, Progress, TextColumn, TimeRemainingColumn

        self.bar = Progress(
            TextColumn("{task.description}"),
            BarColumn(),
            MofNCompleteColumn(),
            TextColumn("{task.fields[numbers]}"),
            TimeRemainingColumn(),
            console=Console(stderr=True),
            disable=s.quiet or not parallel.ranks().first,
        )
        self.task = self.bar.add_task("training", total=s.steps, completed=begin, numbers="")

    def __enter__(self) -> Callable[[dict[str, Any], float, int], None]:
        self.bar.start()
        return self.show

    def __exit__(self, *_: object) -> None:
        self.bar.stop()

    def show(self, line: dict[str, Any], rate: float, steps: int) -> None:
        first = {"loss": line["loss"]} if "reward" not in line else {k: line[k] for k in ("reward", "length", "signal")}
        numbers = [*(f"{name} {value:.4g}" for name, value in first.items()), f"{rate:,.0f} tokens/s"]
        self.bar.update(self.task, advance=steps, numbers=" · ".join(numbers))
