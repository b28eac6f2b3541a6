"""The progress bar of a training run, on stderr."""

from __future__ import annotations

from typing import Any, Self

from rich.console import Console
from rich.progress import BarColumn, MofNCompleteColumn, Progress, TextColumn, TimeRemainingColumn


class ProgressBar:
    """Show steps, loss (or reward), tokens per second and the time left."""

    def __init__(self, steps: int, done: int, *, hidden: bool) -> None:
        self.bar = Progress(
            TextColumn("{task.description}"),
            BarColumn(),
            MofNCompleteColumn(),
            TextColumn("{task.fields[numbers]}"),
            TimeRemainingColumn(),
            console=Console(stderr=True),
            disable=hidden,
        )
        self.task = self.bar.add_task("training", total=steps, completed=done, numbers="")

    def __enter__(self) -> Self:
        self.bar.start()
        return self

    def __exit__(self, *_: object) -> None:
        self.bar.stop()

    def advance(self, steps: int, line: dict[str, Any], tokens_per_second: float) -> None:
        """Show the last line of the log, `steps` steps further."""
        names = ("reward", "length", "signal") if "reward" in line else ("loss",)
        numbers = [*(f"{name} {line[name]:.4g}" for name in names), f"{tokens_per_second:,.0f} tokens/s"]
        self.bar.update(self.task, advance=steps, numbers=" · ".join(numbers))
