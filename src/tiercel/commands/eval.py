"""The command `eval`: options → Settings, a bar while it runs, a report at the end."""

from __future__ import annotations

from pathlib import Path
from typing import TYPE_CHECKING, Annotated, Any

import typer

from tiercel.commands.options import Json, print_json

if TYPE_CHECKING:
    from tiercel.evals.aggregate import Result

RUNS = Path("tiercel-evals")


def evaluate(
    model: Annotated[str, typer.Argument(help="As for run; with --endpoint the name it has there.")] = "smollm2",
    task: Annotated[
        list[str] | None, typer.Option("--task", "-t", help="A benchmark, or FILE.jsonl; may be repeated.")
    ] = None,
    limit: Annotated[int | None, typer.Option(help="Number of items, drawn with --seed.", min=1)] = None,
    samples: Annotated[int | None, typer.Option(help="Answers to each question.", min=1)] = None,
    vote: Annotated[
        int | None, typer.Option(help="Answer each question so often, and grade what most answers agree on.")
    ] = None,
    vote_method: Annotated[str, typer.Option(help="As for run.")] = "majority",
    vote_set: Annotated[list[str] | None, typer.Option(help="More of the vote, as for run; may be repeated.")] = None,
    max_tokens: Annotated[int | None, typer.Option(help="Token budget of an answer, reasoning included.")] = None,
    temperature: Annotated[float | None, typer.Option(help="0 takes the likeliest token.")] = None,
    top_p: Annotated[float | None, typer.Option(help="Keep the likeliest tokens up to this probability.")] = None,
    top_k: Annotated[int | None, typer.Option(help="Keep this many tokens; 0 keeps all.")] = None,
    min_p: Annotated[float | None, typer.Option(help="Keep tokens this likely beside the likeliest.")] = None,
    seed: Annotated[int, typer.Option(help="Of the samples, and of what --limit draws.")] = 0,
    shots: Annotated[int | None, typer.Option(help="Solved examples before the question.")] = None,
    chat: Annotated[bool | None, typer.Option("--chat/--plain", help="With the chat template, or plain text.")] = None,
    system: Annotated[str | None, typer.Option(help="The system message.")] = None,
    think: Annotated[bool | None, typer.Option("--think/--no-think", help="Ask for reasoning first, or not.")] = None,
    letters: Annotated[
        bool | None,
        typer.Option("--letters/--likelihood", help="Choices: the model writes the letter, or the likeliest counts."),
    ] = None,
    endpoint: Annotated[
        str | None, typer.Option(help="An OpenAI-compatible address, as http://127.0.0.1:11434/v1.")
    ] = None,
    question: Annotated[str | None, typer.Option(help="FILE.jsonl: the field with the question.")] = None,
    choices: Annotated[str | None, typer.Option(help="FILE.jsonl: the field with the choices.")] = None,
    answer: Annotated[str | None, typer.Option(help="FILE.jsonl: the field with the right answer.")] = None,
    kind: Annotated[
        str | None, typer.Option(help="FILE.jsonl: answers are number, math, text, letter or bare.")
    ] = None,
    answer_from: Annotated[int | None, typer.Option(help="FILE.jsonl: numbered answers count from 0 or 1.")] = None,
    data: Annotated[str | None, typer.Option(help="The folder with the benchmark files.")] = None,
    out: Annotated[Path | None, typer.Option(help="Where runs are kept.")] = None,
    fresh: Annotated[bool, typer.Option("--fresh", help="Do not go on with an earlier run; start over.")] = False,
    slots: Annotated[int, typer.Option(help="Answers made at once.", min=1)] = 8,
    dtype: Annotated[str, typer.Option(help="auto, f32, bf16 or f16.")] = "auto",
    quantize: Annotated[str | None, typer.Option(help="Pack while loading: q4_k_m, q8_0, int8, nf4, ….")] = None,
    exact: Annotated[bool, typer.Option("--exact", help="Do not round inputs of packed matrices; slower.")] = False,
    context: Annotated[int | None, typer.Option(help="Length of the context in tokens.")] = None,
    json: Json = False,
) -> None:
    """Measure a model: AIME, GSM8K, MATH-500, MMLU, ARC-Challenge, HumanEval, LAMBADA, or a JSONL of your own.

    A run that was interrupted goes on where it was when the same command is given again.  Every transcript is kept,
    beside a report as JSON, Markdown and one HTML page.
    """
    from tiercel.evals.report import save, summary
    from tiercel.evals.task import Settings
    from tiercel.voting.settings import VoteSettings

    by = None if letters is None else "letters" if letters else "likelihood"
    settings = Settings(
        chat=chat, system=system, think=think, shots=shots, samples=samples, max_tokens=max_tokens,
        temperature=temperature, top_p=top_p, top_k=top_k, min_p=min_p, choices=by, limit=limit, seed=seed,
        slots=slots, data=data, vote=VoteSettings.typed(vote, vote_method, vote_set or []),
    )  # fmt: skip
    fields = {"question": question, "choices": choices, "answer": answer, "kind": kind, "answer_from": answer_from}
    tasks = _open_tasks(task or [], {name: value for name, value in fields.items() if value is not None})
    answerer = _answerer(model, endpoint, dtype=dtype, quantize=quantize, exact=exact, context=context)
    results = []
    for each in tasks:
        result = _run(answerer, each, settings, out or RUNS, fresh)
        save(result)
        results.append(result)
        if not json:
            print(summary(result), flush=True)
    if json:
        found = [result.to_dict(items=False) for result in results]
        print_json(found[0] if len(found) == 1 else found)


def _open_tasks(names: list[str], fields: dict[str, Any]) -> list[Any]:
    """The tasks of these names; fields: of the JSONL files among them."""
    from tiercel.errors import RequestError
    from tiercel.evals.registry import TASKS, open_task

    if not names:
        raise RequestError(f"which task? --task {' | '.join(TASKS)} | FILE.jsonl")
    if fields and all(name in TASKS for name in names):
        option = next(iter(fields)).replace("_", "-")
        raise RequestError(f"--{option} is for a JSONL file; {names[0]} has fields of its own")
    return [open_task(name, **(fields if name not in TASKS else {})) for name in names]


def _run(answerer: Any, task: Any, settings: Any, under: Path, fresh: bool) -> Result:
    from tiercel.commands.chat.render import waiting
    from tiercel.evals.run import evaluate as ask

    with waiting(task.name, 0.5, unit="items") as report:

        def progress(done: int, total: int, score: float) -> None:
            report(f"{task.name} {100 * score:.1f} %" if done else task.name, done, total)

        return ask(answerer, task, settings, under=under, fresh=fresh, progress=progress)


def _answerer(
    model: str, endpoint: str | None, *, dtype: str, quantize: str | None, exact: bool, context: int | None
) -> Any:
    """Who answers: the address, or the model, loaded."""
    if endpoint is not None:
        from tiercel.errors import RequestError
        from tiercel.evals.endpoint import Endpoint

        if quantize or exact or dtype != "auto" or context:
            raise RequestError(
                "an endpoint has loaded its model already; leave out --dtype, --quantize, --exact, --context"
            )
        return Endpoint(endpoint, model)
    import tiercel
    from tiercel.commands.chat.render import waiting
    from tiercel.evals.local import LocalModel
    from tiercel.hub import local_models

    with waiting(f"loading {model}") as report:
        local_models.resolve(model, pull=True, progress=report)
        loaded = tiercel.load(model, dtype=dtype, quantize=quantize, exact=exact, max_length=context,
                              progress=lambda done, total: report(f"loading {model}", done, total))  # fmt: skip
    return LocalModel(loaded)


def compare(
    models: Annotated[list[str], typer.Argument(help="Models as for run, or NAME@http://host:port/v1.")],
    task: Annotated[
        list[str] | None, typer.Option("--task", "-t", help="A benchmark, or FILE.jsonl; may be repeated.")
    ] = None,
    limit: Annotated[int | None, typer.Option(help="Number of items of each task.", min=1)] = None,
    max_tokens: Annotated[int | None, typer.Option(help="Token budget of an answer, reasoning included.")] = None,
    letters: Annotated[
        bool | None,
        typer.Option("--letters/--likelihood", help="Choices: the model writes the letter, or the likeliest counts."),
    ] = None,
    lengths: Annotated[str, typer.Option(help="Contexts for speed and memory, N[,N…]; 0 for none.")] = "512,2048",
    seed: Annotated[int, typer.Option(help="Of what --limit draws.")] = 0,
    data: Annotated[str | None, typer.Option(help="The folder with the benchmark files.")] = None,
    out: Annotated[Path, typer.Option(help="Folder of the page and of what is kept.")] = Path("tiercel-compare"),
    json: Json = False,
) -> None:
    """Set models side by side: scores, speed and memory, on one page.

    The same command goes on where it was interrupted.  What failed is said in its place; the rest is kept.
    """
    from tiercel.commands.chat.render import waiting
    from tiercel.errors import RequestError
    from tiercel.evals import compare as side
    from tiercel.evals.registry import open_task
    from tiercel.evals.task import Settings

    try:
        wanted = [int(word) for word in lengths.split(",") if int(word)]
    except ValueError as error:
        raise RequestError(f"--lengths takes lengths such as 512,2048, not {lengths!r}") from error
    if not task and not wanted:
        raise RequestError("nothing is left to compare: give --task or --lengths")
    by = None if letters is None else "letters" if letters else "likelihood"
    settings = Settings(max_tokens=max_tokens, choices=by, limit=limit, seed=seed, data=data)

    def opened(each: side.Entrant) -> Any:
        return _answerer(each.name, each.address, dtype="auto", quantize=None, exact=False, context=None)

    with waiting("comparing", unit="parts") as report:
        found = side.compare(
            models, lambda: [open_task(name) for name in task or ()], settings, wanted, out, opened,
            lambda line: report(line, 0, 0),
        )  # fmt: skip
    if json:
        print_json(found)
    else:
        print(f"{side.markdown(found)}\n{out / 'comparison.html'}")
