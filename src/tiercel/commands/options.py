"""What all commands share: options of the same name, and how an answer is printed."""

from __future__ import annotations

import json as json_module
from collections.abc import Sequence
from typing import Annotated, Any

import typer

Json = Annotated[bool, typer.Option("--json", help="Print one JSON value instead of text.")]
ModelName = Annotated[str, typer.Argument(help="Short name, org/repo of the hub, folder or .gguf file.")]


def print_json(value: Any) -> None:
    print(json_module.dumps(value, ensure_ascii=False), flush=True)


def print_table(rows: Sequence[tuple[str, ...]]) -> None:
    widths = [max(len(row[column]) for row in rows) for column in range(len(rows[0]) - 1)]
    for row in rows:
        cells = [cell.ljust(width) for cell, width in zip(row, widths, strict=False)]
        print("    ".join([*cells, row[-1]]))
