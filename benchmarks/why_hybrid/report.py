"""The table and the plots, from the finished runs.

A cell's learning rate is the one with the best validation mean over the seeds that every rate has; what is shown is
the test set's mean over these seeds, with the lowest and highest.
"""

from __future__ import annotations

import json
from collections.abc import Iterable, Sequence
from pathlib import Path
from typing import Any

from plan import NETWORKS, Job, config_of
from tasks import Task

from tiercel.plan import kv_bytes_per_token, parameter_count, state_bytes

COLOURS = {
    "parallel": "#c1272d",
    "interleaved": "#e08a1e",
    "one_attention": "#3a8f4f",
    "attention": "#2b5fa3",
    "mamba2": "#777777",
}
Run = dict[str, Any]


def networks_table() -> str:
    counts = {name: parameter_count(config_of(name)) for name in NETWORKS}
    most, least = max(counts.values()), min(counts.values())
    lines = [f"{NETWORKS[name]:<32} {count:>9,} parameters" for name, count in counts.items()]
    return "\n".join([*lines, f"largest over smallest: +{100 * (most / least - 1):.2f} %"])


def memory(network: str, length: int) -> int:
    """Bytes that one sequence keeps in float32 at this length."""
    config = config_of(network)
    return state_bytes(config, 4) + length * kv_bytes_per_token(config, 4)


def tokens_of(task: Task, size: int) -> int:
    """Length of a sequence of this size, with its answer."""
    import numpy as np

    return task.make(np.random.default_rng(0), 1, size)[0].shape[1] + 1


def cell(runs: Sequence[Run], task: Task) -> dict[str, Any] | None:
    """One network on one task: the best rate, and what it gives.  None where nothing is finished."""
    rates = sorted({run["lr"] for run in runs})
    of_rate = [{run["seed"] for run in runs if run["lr"] == lr} for lr in rates]
    seeds = sorted(set.intersection(*of_rate)) if of_rate else []
    if not seeds:
        return None
    by = {(run["lr"], run["seed"]): run for run in runs}

    def shares(lr: float, which: str) -> list[float]:
        return [by[lr, seed]["right"][which][task.measure] for seed in seeds]

    validation = {lr: sum(shares(lr, "validation")) / len(seeds) for lr in rates}
    best = max(rates, key=lambda lr: validation[lr])
    sizes = {str(size): spread(shares(best, str(size))) for size in (task.size, *task.longer)}
    speeds = [run["tokens_per_second"] for run in runs if run["seed"] in seeds]
    losses = [by[best, seed]["loss"] for seed in seeds]
    return {
        "lr": best, "seeds": seeds, "validation_of_rates": validation, "sizes": sizes,
        "training_tokens_per_second": sorted(speeds)[len(speeds) // 2],
        "loss": [sum(step) / len(step) for step in zip(*losses, strict=True)],
    }  # fmt: skip


def spread(shares: Sequence[float]) -> dict[str, float]:
    return {"mean": sum(shares) / len(shares), "least": min(shares), "most": max(shares)}


def summary(jobs: Sequence[Job], runs: Iterable[Run]) -> dict[str, Any]:
    runs = list(runs)
    tasks = {job.task: job for job in jobs}
    wanted = sum(len(job.rates) for job in jobs)
    first = jobs[0]
    result: dict[str, Any] = {
        "small": first.small, "runs": len(runs), "wanted": wanted, "devices": sorted({run["device"] for run in runs}),
        "graphs": any(run["graph"] for run in runs),
        "rates": first.rates, "seeds": len({job.seed for job in jobs}), "rows": first.rows, "examined": first.examined,
        "parameters": {name: parameter_count(config_of(name)) for name in NETWORKS}, "tasks": {},
    }  # fmt: skip
    for name, job in tasks.items():
        task = job.of
        networks = list(dict.fromkeys(j.network for j in jobs if j.task == name))
        cells = {n: cell([r for r in runs if r["task"] == name and r["network"] == n], task) for n in networks}
        lengths = {str(size): tokens_of(task, size) for size in (task.size, *task.longer)}
        for network, found in cells.items():
            if found is not None:
                found["bytes"] = {size: memory(network, length) for size, length in lengths.items()}
        result["tasks"][name] = {
            "what": task.what, "unit": task.unit, "size": task.size, "measure": task.measure, "chance": task.chance,
            "steps": job.steps, "lengths": lengths, "networks": cells,
        }  # fmt: skip
    return result


MEASURES = {
    "tokens": "share of answers that are right",
    "rows": "share of rows written without one mistake",
    "last": "share of rows whose last answer is right",
}


def table(found: dict[str, Any]) -> str:
    """Markdown."""
    rates = ", ".join(f"{lr:g}" for lr in found["rates"])
    device = " and ".join(found["devices"]) or "nothing yet"
    text = [
        f"{found['runs']} of {found['wanted']} runs are finished, on {device}: {found['seeds']} seeds and "
        f"learning rates {rates} were planned, {found['rows']} rows a step, {found['examined']} rows in each test set.",
    ]
    if found["small"]:
        text.append(
            "This is the **small version**: smaller sizes of the tasks, fewer steps, fewer seeds and rates. "
            "It shows that everything runs; it does not carry conclusions."
        )
    for task in found["tasks"].values():
        sizes = list(task["lengths"])
        head = [f"{size} {task['unit']}" + (" (trained)" if i == 0 else "") for i, size in enumerate(sizes)]
        text += [
            "",
            f"### {task['what']}",
            "",
            f"{MEASURES[task['measure']]}; {task['steps']} steps; chance {100 * task['chance']:.0f} %. "
            "Mean over seeds in %, lowest – highest in brackets.",
            "",
            "| network | " + " | ".join(head) + f" | seeds | best rate | state at {sizes[-1]} {task['unit']} "
            "| training tokens/s |",
            "|---|" + "---:|" * (len(head) + 4),
        ]
        for name, cell in task["networks"].items():
            if cell is None:
                text.append(f"| {NETWORKS[name]} | " + " | ".join(["not finished"] + ["–"] * (len(head) + 3)) + " |")
                continue
            shares = [_share(cell["sizes"][size], len(cell["seeds"])) for size in sizes]
            text.append(
                f"| {NETWORKS[name]} | " + " | ".join(shares) + f" | {len(cell['seeds'])} | {cell['lr']:g} "
                f"| {cell['bytes'][sizes[-1]] / 1024:.0f} KiB | {cell['training_tokens_per_second']:,} |"
            )
    return "\n".join(text) + "\n"


def _share(s: dict[str, float], seeds: int) -> str:
    mean = f"{100 * s['mean']:.1f}"
    return mean if seeds == 1 else f"{mean} ({100 * s['least']:.0f} – {100 * s['most']:.0f})"


# ── plots


def plots(out: Path, found: dict[str, Any]) -> None:
    import matplotlib

    matplotlib.use("agg")
    matplotlib.rcParams["svg.hashsalt"] = "why_hybrid"
    from matplotlib.figure import Figure

    tasks = [task for task in found["tasks"].values() if any(task["networks"].values())]
    if not tasks:
        return

    def panels(height: float) -> tuple[Figure, list[Any]]:
        figure = Figure(figsize=(3.4 * len(tasks), height), layout="constrained")
        return figure, list(figure.subplots(1, len(tasks), squeeze=False)[0])

    def finish(figure: Figure, axes: list[Any], name: str) -> None:
        handles: dict[str, Any] = {}
        for axis in axes:
            axis.grid(alpha=0.3)
            for handle, label in zip(*axis.get_legend_handles_labels(), strict=True):
                handles.setdefault(label, handle)
        handles = {label: handles[label] for label in NETWORKS.values() if label in handles}
        figure.legend(handles.values(), handles.keys(), loc="outside lower center", ncols=3, frameon=False)
        figure.savefig(out / name, metadata={"Date": None})

    figure, axes = panels(4.1)
    for axis, task in zip(axes, tasks, strict=True):
        sizes = list(task["lengths"])
        shown = [(name, cell) for name, cell in task["networks"].items() if cell]
        for i, (name, cell) in enumerate(shown):
            # side by side where they coincide
            aside = (int(sizes[-1]) / int(sizes[0])) ** (0.012 * (i - (len(shown) - 1) / 2))
            x = [int(size) * aside for size in sizes]
            mean, least, most = ([100 * cell["sizes"][size][k] for size in sizes] for k in ("mean", "least", "most"))
            around = [
                [m - a for m, a in zip(mean, least, strict=True)],
                [b - m for b, m in zip(most, mean, strict=True)],
            ]
            axis.errorbar(x, mean, around, fmt="o-", markersize=4, linewidth=1.2, capsize=2, color=COLOURS[name],
                          label=NETWORKS[name])  # fmt: skip
        if task["chance"] > 0.02:
            axis.axhline(100 * task["chance"], color="black", linewidth=0.7, linestyle=":")
        axis.set_xscale("log")
        axis.set_xticks([int(size) for size in sizes], sizes)
        axis.minorticks_off()
        axis.set_ylim(-4, 104)
        axis.set_xlabel(f"{task['unit']} (trained on {task['size']})")
        axis.set_title(task["what"], fontsize=10)
    axes[0].set_ylabel("right, %")
    finish(figure, axes, "longer.svg")

    figure, axes = panels(4.1)
    for axis, task in zip(axes, tasks, strict=True):
        for name, cell in task["networks"].items():
            if cell:
                points = len(cell["loss"])
                x = [task["steps"] * (i + 1) / points for i in range(points)]
                axis.plot(x, cell["loss"], linewidth=1.3, color=COLOURS[name], label=NETWORKS[name])
        axis.set_xlabel("step")
        axis.set_title(task["what"], fontsize=10)
        axis.set_ylim(bottom=0)
    axes[0].set_ylabel("training loss, nats a token")
    finish(figure, axes, "learning.svg")

    figure, axes = panels(4.1)
    for axis, task in zip(axes, tasks, strict=True):
        sizes = list(task["lengths"])
        for name, cell in task["networks"].items():
            if cell:
                x = [cell["bytes"][size] / 1024 for size in sizes]
                y = [100 * cell["sizes"][size]["mean"] for size in sizes]
                axis.plot(x, y, "-", linewidth=0.8, color=COLOURS[name])
                for i, size in enumerate(sizes):
                    axis.plot(x[i], y[i], "o", markersize=4 + 2 * i, color=COLOURS[name],
                              label=NETWORKS[name] if size == sizes[0] else None)  # fmt: skip
        axis.set_xscale("log")
        axis.set_xlim(50, 1400)
        axis.set_xticks(ticks := [64, 128, 256, 512, 1024], [str(tick) for tick in ticks])
        axis.minorticks_off()
        axis.set_ylim(-4, 104)
        axis.set_xlabel(f"KiB a sequence (larger: more {task['unit']})")
        axis.set_title(task["what"], fontsize=10)
    axes[0].set_ylabel("right, %")
    finish(figure, axes, "state.svg")


def write(out: Path, jobs: Sequence[Job], runs: Sequence[Run]) -> str:
    """table.md, summary.json and the plots → the table."""
    found = summary(jobs, runs)
    text = table(found)
    (out / "table.md").write_text(text)
    (out / "summary.json").write_text(json.dumps(found, indent=1) + "\n")
    try:
        plots(out, found)
    except ImportError:
        text += "\nThere is no matplotlib here: run again with --report where there is.\n"
    return text
