"""`tiercel hybridize`."""

from __future__ import annotations

from fractions import Fraction
from pathlib import Path
from typing import Annotated, Any

import typer

from tiercel.commands.options import ModelName, print_json, print_table
from tiercel.commands.train import Options, takes_options
from tiercel.errors import RequestError


@takes_options(
    "epochs", "compile", lr=(Annotated[float, typer.Option(help="The highest learning rate of distilling.")], 3e-4),
    steps=(Annotated[int, typer.Option(help="Steps of distilling.")], 1000),
    seed=(Annotated[int, typer.Option(help="Of new parameters, sampled text and the order of the data.")], 0),
    save_every=(Annotated[int, typer.Option(help="Steps between checkpoints to resume from; 0: at the end.")], 100),
)  # fmt: skip
def hybridize(
    model: ModelName,
    out: Annotated[Path, typer.Option(help="Folder for the hybrid, its logs, checkpoints and report.")],
    keep_attention: Annotated[str, typer.Option(help="Share of attention layers that stay, such as 1/4; 0: none.")],
    mixer: Annotated[
        str, typer.Option(help="gated_delta or mamba2: what takes the place of the others.")
    ] = "gated_delta",
    data: Annotated[
        list[Path] | None, typer.Option(help="JSONL of examples as for train, or a text; may be repeated.")
    ] = None,
    sample: Annotated[
        int, typer.Option(help="Number of further rows to learn from, written by the model itself.", min=0)
    ] = 0,
    choose: Annotated[str, typer.Option(help="Which layers keep attention: even, or measured by need.")] = "measured",
    held_out: Annotated[Path | None, typer.Option("--eval", help="For the report; else one in twenty rows.")] = None,
    match_steps: Annotated[int, typer.Option(help="Steps in which new mixers learn what attention gives.")] = 200,
    match_lr: Annotated[float, typer.Option(help="Their highest learning rate.")] = 2e-3,
    sft: Annotated[Path | None, typer.Option(help="JSONL of conversations, for a last stage.")] = None,
    sft_steps: Annotated[int, typer.Option(help="Steps of it.")] = 200,
    sft_lr: Annotated[float, typer.Option(help="Its highest learning rate.")] = 1e-4,
    calibration: Annotated[int, typer.Option(help="Micro-batches for first weights and the choice.")] = 8,
    tasks: Annotated[str, typer.Option(help="Tasks of eval for the report, with commas; empty: none.")] = (
        "lambada,arc_challenge"
    ),
    limit: Annotated[int, typer.Option(help="Items of each task.", min=1)] = 200,
    needles: Annotated[str, typer.Option(help="Lengths at which a needle is looked for.")] = "256,512,1024,2048",
    contexts: Annotated[str, typer.Option(help="Tokens at which bytes and speed are measured.")] = "1024,8192",
    *,
    options: Options,
) -> None:
    """Make a hybrid of a Transformer: most attention becomes a recurrent mixer that learned to stand in for it."""
    from tiercel.train.hybrid_report import Checks
    from tiercel.train.hybridize import Conversion, hybridize

    conversion = Conversion(
        _share(keep_attention), mixer, choose, match_steps, match_lr, sft_steps, sft_lr, calibration,
        rows=options.batch, length=options.length, seed=options.seed,
    )  # fmt: skip
    checks = Checks(_numbers("--needles", needles), _numbers("--contexts", contexts),
                    tasks=tuple(word.strip() for word in tasks.split(",") if word.strip()), limit=limit)  # fmt: skip
    found = hybridize(model, data or [], options.settings(out), conversion, held_out=held_out, sample=sample, sft=sft,
                      checks=checks)  # fmt: skip
    if options.json:
        print_json(found)
    else:
        print_table(_lines(found))
        print(f"written to {out}: try  tiercel run {out}")


def _lines(found: dict[str, Any]) -> list[tuple[str, ...]]:
    """The report as a table."""
    layers = ("layers with attention", str(found["layers"]), str(found["kept"]))
    rows: list[tuple[str, ...]] = [("", "before", "after"), layers]
    for name, before in found["before"].items():
        after = found["after"][name]
        if isinstance(before, dict):
            rows += [(f"{name} at {key}", f"{value:,}", f"{after[key]:,}") for key, value in before.items()]
        elif isinstance(before, str):
            rows.append((name, before, ""))
        else:
            rows.append((name, f"{before:,}", str(after) if isinstance(after, str) else f"{after:,}"))
    return rows


def _share(text: str) -> Fraction:
    try:
        return Fraction(text)
    except (ValueError, ZeroDivisionError):
        raise RequestError(f"--keep-attention takes a share such as 1/4 or 0.25, not {text!r}") from None


def _numbers(option: str, text: str) -> tuple[int, ...]:
    try:
        return tuple(int(part) for part in text.split(",") if part.strip())
    except ValueError:
        raise RequestError(f"{option}: whole numbers with commas between them, not {text!r}") from None
