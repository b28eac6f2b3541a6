"""Pretraining: documents → every next token.

pretrain("pattern.json", "texts.jsonl", Settings(steps=1000, out=Path("run")), tokenizer="folder")
"""

from __future__ import annotations

from pathlib import Path
from typing import Any

from tiercel.train import start
from tiercel.train.loop import Settings, fit


def pretrain(
    config: str | Path,
    data: str | Path,
    settings: Settings,
    *,
    tokenizer: str | Path | None = None,
    held_out: str | Path | None = None,
    rows: int = 8,
    length: int = 512,
    epochs: float | None = None,
    seed: int = 0,
) -> dict[str, Any]:
    """Train on every token of a file of examples; long documents are cut into pieces of `length`.

    config: a pattern file or config.json for fresh weights, or a checkpoint to go on from.
    rows, length: of a micro-batch.  epochs: instead of settings.steps.  → what was reached; see `start.report`.
    """
    start.prepare(settings.out, settings.resume)
    network, model_tokenizer, layout = start.open_network(config, tokenizer, seed=seed)
    documents, batches, evaluation = start.read(
        data, held_out, model_tokenizer, ("all",), rows=rows, length=length, cut=True, seed=seed
    )
    settings = start.counted_steps(batches, settings, epochs)
    result = fit(network, batches, settings, held_out=evaluation)
    if settings.out is not None:
        start.finish(network, model_tokenizer, layout, settings.out)
    return start.report(result, settings.out) | {"documents": len(documents)}
