"""python -m tiercel.problems write --count 1000 --seed 0 OUT.jsonl        training data, one conversation a line
python -m tiercel.problems show [FAMILY …]                              a problem of each family, with its reasoning
"""

from __future__ import annotations

import itertools
import json
import random
from pathlib import Path
from typing import Annotated

import typer

from tiercel.errors import RequestError, TiercelError
from tiercel.problems import FAMILIES, TRAINED_SIZES, conversations
from tiercel.runtime.atomic import atomic_write

app = typer.Typer(add_completion=False, pretty_exceptions_enable=False, help="Problems that check themselves.")


def _known(families: list[str] | None) -> list[str] | None:
    for name in families or ():
        if name not in FAMILIES:
            raise RequestError(f"no family {name!r}; known: {', '.join(FAMILIES)}")
    return families or None


@app.command()
def write(
    out: Annotated[Path, typer.Argument(help="The .jsonl file to write.")],
    count: Annotated[int, typer.Option(help="How many conversations.", min=1)] = 1000,
    seed: Annotated[int, typer.Option(help="The same seed gives the same file.")] = 0,
    family: Annotated[list[str] | None, typer.Option(help="Only this family; may be repeated.")] = None,
) -> None:
    """Write training data: {"messages": [...]} a line.  No problem of a test set is in it."""
    from rich.console import Console
    from rich.progress import track

    console = Console(stderr=True)
    made = itertools.islice(conversations(seed, _known(family), earlier=0), count)
    with atomic_write(out) as file:
        for messages in track(made, "writing", total=count, console=console, disable=not console.is_terminal):
            file.write(json.dumps({"messages": messages}, ensure_ascii=False).encode() + b"\n")
    print(f"{count} conversations are in {out}")


@app.command()
def show(
    families: Annotated[list[str] | None, typer.Argument(help="Families; all without it.")] = None,
    size: Annotated[int, typer.Option(help="1, 2, 3, or 4 for larger than trained.", min=1, max=4)] = TRAINED_SIZES[-1],
    seed: Annotated[int, typer.Option(help="Another seed, another problem.")] = 0,
) -> None:
    """Show a problem of each family, with its reasoning."""
    for name in _known(families) or FAMILIES:
        problem = FAMILIES[name].make(random.Random(f"{name} {seed}"), size)
        print(f"── {name}\n{problem.question}\n{problem.thinking}\n⇒ {problem.answer}\n")


if __name__ == "__main__":
    import sys

    try:
        app(prog_name="python -m tiercel.problems")
    except TiercelError as error:
        print(f"error: {error}", file=sys.stderr)
        sys.exit(error.exit_code)
