"""Curves of a run, from its log: loss or reward, learning rate, tokens a second.  Needs matplotlib (extra `train`)."""

from __future__ import annotations

from pathlib import Path

from tiercel.errors import RequestError
from tiercel.runtime.atomic import atomic_write
from tiercel.train.log import read_log


def plot(log: str | Path, out: str | Path) -> Path:
    """Draw the curves of a run.

    Args:
        log: its log.jsonl.
        out: a .png or .svg file.

    Raises:
        RequestError: matplotlib is missing, or the log has no steps.
    """
    try:
        import matplotlib
    except ImportError:
        raise RequestError("a plot needs matplotlib: pip install 'tiercel[train]'") from None
    matplotlib.use("agg")
    from matplotlib.figure import Figure

    lines = read_log(Path(log))
    steps = [line for line in lines if "loss" in line]
    evals = [line for line in lines if "eval_loss" in line]
    if not steps:
        raise RequestError(f"{log} holds no steps")
    x = [line["step"] for line in steps]
    figure = Figure(figsize=(8, 8), layout="constrained")
    loss, lr, speed = figure.subplots(3, 1, sharex=True, height_ratios=(3, 1, 1))
    what = "reward" if "reward" in steps[0] else "loss"
    loss.plot(x, [line[what] for line in steps], linewidth=0.8, label="training")
    if evals:
        loss.plot([e["step"] for e in evals], [e["eval_loss"] for e in evals], "o-", markersize=3, label="held out")
        loss.legend()
    if tests := [line for line in lines if "test_reward" in line]:
        name = "held out, greedy"
        loss.plot([t["step"] for t in tests], [t["test_reward"] for t in tests], "o-", markersize=3, label=name)
        loss.legend()
    loss.set_ylabel("mean reward" if what == "reward" else "loss (nats a token)")
    lr.plot(x, [line["lr"] for line in steps], linewidth=0.8)
    lr.set_ylabel("learning rate")
    speed.plot(x, [line["tokens"] / max(line["seconds"], 1e-9) for line in steps], linewidth=0.8)
    speed.set_ylabel("tokens / s")
    speed.set_xlabel("step")
    for axis in (loss, lr, speed):
        axis.grid(alpha=0.3)
    with atomic_write(Path(out)) as file:
        figure.savefig(file, format=Path(out).suffix.removeprefix("."))
    return Path(out)
