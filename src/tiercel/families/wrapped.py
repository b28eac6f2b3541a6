"""Text models inside vision checkpoints: their config is a table of another, their names have a prefix."""

from __future__ import annotations

from collections.abc import Iterable, Iterator
from dataclasses import replace

from tiercel.families.family import TensorMapping

VISION = ("vision_tower.", "multi_modal_projector.", "model.vision_tower.", "model.multi_modal_projector.")


def wrapped_rows(rows: Iterable[TensorMapping]) -> Iterator[TensorMapping]:
    """The rows of a text model under `language_model.`, as published files have it, and as transformers 5 has it."""
    for row in rows:
        assert isinstance(row.hf, str), row.ours
        inner = f"model.language_model.{row.hf.removeprefix('model.')}" if row.hf.startswith("model.") else row.hf
        yield replace(row, hf=f"language_model.{row.hf}", aliases=(inner,))
