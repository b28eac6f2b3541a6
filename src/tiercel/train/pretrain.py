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

    Args:
        config: a pattern file or config.json for fresh weights, or a checkpoint to go on from.
        data: JSONL of examples, see `train.data`.
        settings: of the loop.
        tokenizer: a folder with tokenizer.json, for a fresh network.
        held_out: JSONL for evaluations.
        rows: of a micro-batch.
        length: tokens of a row.
        epochs: passes over the data, in place of settings.steps.
        seed: of fresh weights and of the order of the data.

    Returns:
        "out", "steps", "loss", "eval_loss", "tokens", "seconds", "documents".

    Raises:
        RequestError: packed weights, settings that do not fit, a folder with another run.
        FormatError: data that cannot be read, with file and line.
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
