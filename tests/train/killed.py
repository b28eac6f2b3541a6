"""Trains, is killed, goes on: run by test_resume.py as a process of its own, which forks one child for each life.

    killed.py FOLDER POINT…        step:7 after that step · save:12 before the 12th sync or rename of saves ·
                                   time:0.3 whenever the clock says so
Prints one line of JSON for each point: whether log and weights are, bit by bit, those of a run that was left alone.
"""

import json
import os
import random
import signal
import sys
import time
from pathlib import Path

import torch

sys.path.insert(0, str(Path(__file__).parents[1]))
import tiny
from tiercel.train.data import Batches, Documents
from tiercel.train.loop import Settings, fit

STEPS = 12


def life(out: Path, point: str | None) -> None:
    """One run to the end, or to the point where it dies."""
    torch.manual_seed(5)
    network = tiny.network("attention+mamba2", seed=2, native=False).requires_grad_(True)
    settings = Settings(steps=STEPS, lr=1e-2, warmup=3, save_every=3, accumulate=2, out=out, resume=True, quiet=True)
    kind, _, when = (point or "").partition(":")
    if kind == "save":
        _die_at_call(int(when))

    def on_step(step: int, network: object) -> None:
        if kind == "step" and step == int(when):
            os.kill(os.getpid(), signal.SIGKILL)

    fit(network, Batches(_documents(), rows=2, length=48, seed=3), settings, on_step=on_step)


def _documents() -> Documents:
    numbers = random.Random(1)
    lengths = [numbers.randrange(3, 30) for _ in range(60)]
    return Documents.of((tiny.ids(n, i), [1] * n) for i, n in enumerate(lengths))


def _die_at_call(last: int) -> None:
    calls = 0

    def counted(real):
        def call(*given, **named):
            nonlocal calls
            calls += 1
            if calls == last:
                os.kill(os.getpid(), signal.SIGKILL)
            return real(*given, **named)

        return call

    os.fsync, Path.rename = counted(os.fsync), counted(Path.rename)


def forked(out: Path, point: str | None) -> int:
    """The signal that ended a life; 0 for a natural end."""
    child = os.fork()
    if child == 0:
        try:
            life(out, point)
        finally:
            os._exit(0)
    if point and point.startswith("time:"):
        time.sleep(float(point[5:]))
        os.kill(child, signal.SIGKILL)
    return os.waitstatus_to_exitcode(os.waitpid(child, 0)[1])


def left(out: Path) -> tuple:
    """What a run leaves: its curve, and the bytes of its last checkpoint."""
    lines = [json.loads(line) for line in (out / "log.jsonl").read_text().splitlines()]
    curve = [(line["step"], line["loss"], line["grad_norm"], line["lr"]) for line in lines]
    last = out / "checkpoints" / f"step-{STEPS:08}"
    return curve, (last / "network.safetensors").read_bytes(), (last / "optimizer.safetensors").read_bytes()


def main() -> None:
    torch.set_num_threads(1)
    folder = Path(sys.argv[1])
    forked(folder / "alone", None)
    alone = left(folder / "alone")
    for i, point in enumerate(sys.argv[2:]):
        out = folder / str(i)
        signal_ = forked(out, point)
        ended = forked(out, None)
        kept = len(list((out / "checkpoints").iterdir()))
        found = {"point": point, "killed": signal_ == -signal.SIGKILL, "resumed": ended == 0, "kept": kept}
        print(json.dumps(found | {"equal": left(out) == alone}), flush=True)


if __name__ == "__main__":
    main()
