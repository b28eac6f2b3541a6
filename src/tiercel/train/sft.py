"""Supervised fine-tuning: conversations → the answers' tokens.

sft("smollm2", "chats.jsonl", Settings(steps=200, lr=1e-4, out=Path("run")))
"""

from __future__ import annotations

from collections.abc import Sequence
from pathlib import Path
from typing import Any

from tiercel.train import start
from tiercel.train.loop import Settings, fit


def sft(
    config: str | Path,
    data: str | Path,
    settings: Settings,
    *,
    loss_on: Sequence[str] = ("assistant",),
    tokenizer: str | Path | None = None,
    held_out: str | Path | None = None,
    rows: int = 8,
    length: int = 512,
    epochs: float | None = None,
    seed: int = 0,
) -> dict[str, Any]:
    """Train on the messages of some roles; everything else is context.

    Args:
        loss_on: roles, or ("all",).
        length: tokens of a row.  Longer examples are left out and counted: half an answer teaches to stop early.
        config, data, settings, tokenizer, held_out, rows, epochs, seed: as of `pretrain`.

    Returns:
        As of `pretrain`, and "left_out": examples that did not fit.

    Raises:
        RequestError: settings that do not fit, or no example that fits `length`.
        FormatError: data that cannot be read, with file and line.
    """
    start.prepare(settings.out, settings.resume)
    network, model_tokenizer, layout = start.open_network(config, tokenizer, seed=seed)
    documents, batches, evaluation = start.read(
        data, held_out, model_tokenizer, loss_on, rows=rows, length=length, cut=False, seed=seed
    )
    settings = start.counted_steps(batches, settings, epochs)
    result = fit(network, batches, settings, held_out=evaluation)
    if settings.out is not None:
        start.finish(network, model_tokenizer, layout, settings.out)
    return start.report(result, settings.out) | {"documents": len(documents), "left_out": documents.left_out}
