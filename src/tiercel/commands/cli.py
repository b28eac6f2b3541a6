"""The command table.  A command imports its module when it runs: `--help`, `list` and `show` never meet torch.

    exit codes   0 ok · 1 failed · 2 usage · 3 model not found · 4 does not fit · 130 interrupted

Answers and tables go to stdout, everything else to stderr.  With --json a command prints one JSON value on
stdout, an error included: {"error": …}.  TIERCEL_DEBUG=1 shows the traceback behind an error.
"""

from __future__ import annotations

import os
import sys
import time
from pathlib import Path
from typing import Annotated, Any

import typer
from typer.core import TyperGroup

from tiercel.commands.eval import compare, evaluate
from tiercel.commands.hybridize import hybridize
from tiercel.commands.options import Json, ModelName, print_json, print_table
from tiercel.commands.run import run
from tiercel.commands.serve import ps, serve, stop
from tiercel.commands.train import app as train_app
from tiercel.errors import RequestError, TiercelError


class Commands(TyperGroup):
    """Turns what may go wrong in a command into one line and an exit code."""

    def invoke(self, ctx: Any) -> Any:
        try:
            return super().invoke(ctx)
        except KeyboardInterrupt:
            raise typer.Exit(130) from None
        except BrokenPipeError:  # the reader of our output has left
            os.dup2(os.open(os.devnull, os.O_WRONLY), sys.stdout.fileno())
            raise typer.Exit(1) from None
        except (typer.Exit, typer.Abort):
            raise
        except Exception as error:
            usage = hasattr(error, "format_message")  # of the command line itself; typer prints these well
            if os.environ.get("TIERCEL_DEBUG") == "1" or (usage and not _wants_json()):
                raise
            message, code = (error.format_message(), 2) if usage else _explained(error)  # type: ignore[attr-defined]
            _complain(message)
            raise typer.Exit(code) from None


def _explained(error: Exception) -> tuple[str, int]:
    """What to say of an error, and the exit code."""
    if isinstance(error, TiercelError):
        return str(error), error.exit_code
    if isinstance(error, MemoryError):
        return "memory ran out; close something, or choose a smaller dtype or model", 4
    if isinstance(error, OSError):
        where = f"{error.filename}: " if error.filename else ""
        return f"{where}{error.strerror or error}", 1
    what = " ".join(f"{type(error).__name__}: {error}".split())[:300]
    return f"this is a bug of ours, not yours: {what}; TIERCEL_DEBUG=1 shows where", 1


def _wants_json() -> bool:
    return "--json" in sys.argv[1:]


def _complain(message: str) -> None:
    from tiercel.commands.chat.render import complain

    if _wants_json():
        print_json({"error": message})
    else:
        complain(message)


app = typer.Typer(cls=Commands, no_args_is_help=True, add_completion=False, pretty_exceptions_enable=False,
                  rich_markup_mode=None, help="Hybrid language models, run on your machine.")  # fmt: skip

app.add_typer(train_app, name="train")
app.command()(hybridize)


def _version(wanted: bool) -> None:
    if wanted:
        from tiercel import __version__

        print(f"tiercel {__version__}")
        raise typer.Exit()


@app.callback()
def options(
    version: Annotated[bool, typer.Option("--version", callback=_version, is_eager=True, help="Print the version.")] = (
        False
    ),
) -> None:
    """Hybrid language models, run on your machine."""


# ── run

app.command()(run)


# ── models


@app.command()
def pull(
    name: ModelName,
    verify: Annotated[bool, typer.Option("--verify", help="Compare what is here with its sha256.")] = False,
    json: Json = False,
) -> None:
    """Download a model.

    By short name, or by org/repo or org/repo:quantization of the hub.
    """
    from tiercel.commands.chat.render import waiting
    from tiercel.hub import local_models
    from tiercel.plan import human_bytes

    with waiting(f"pulling {name}") as report:
        model = local_models.pull(name, verify=verify, progress=report)
    if json:
        print_json(_plain(model) | {"fetched": model.fetched})
    else:
        state = "is here now" if model.fetched else "is already here"
        print(f"{model.name} {state}: {model.path} ({human_bytes(model.bytes)})")


@app.command("list")
@app.command("ls", hidden=True)
def list_(json: Json = False) -> None:
    """List local models (also: ls)."""
    from tiercel.hub import local_models
    from tiercel.plan import human_bytes

    models = local_models.list_models()
    if json:
        print_json([_plain(model) for model in models])
        return
    rows = [("NAME", "ID", "SIZE", "MODIFIED")]
    rows += [(model.name, model.id, human_bytes(model.bytes), _ago(model.modified)) for model in models]
    print_table(rows)


def _plain(model: Any) -> dict[str, Any]:
    modified = time.strftime("%Y-%m-%dT%H:%M:%SZ", time.gmtime(model.modified))
    return {"name": model.name, "id": model.id, "bytes": model.bytes, "modified": modified,
            "path": str(model.path), "source": model.source}  # fmt: skip


def _ago(then: float) -> str:
    """`5 minutes ago`, as Ollama writes it."""
    seconds = max(time.time() - then, 0)
    for unit, length in (("year", 31_557_600), ("month", 2_629_800), ("week", 604_800), ("day", 86_400),
                         ("hour", 3600), ("minute", 60)):  # fmt: skip
        if seconds >= length:
            count = int(seconds // length)
            return f"{count} {unit}{'s' if count > 1 else ''} ago"
    return "Less than a minute ago"


@app.command()
def show(model: ModelName, json: Json = False) -> None:
    """Describe a model, from its config or header alone."""
    from tiercel.hub import local_models
    from tiercel.hub.describe import describe, table

    found = describe(local_models.resolve(model))
    if json:
        print_json({"name": model} | found)
    else:
        print(table(model, found))


def _check_floats(dtype: str | None) -> None:
    if dtype not in (None, "f32", "f16", "bf16"):
        raise RequestError(f"--dtype must be f32, f16 or bf16, not {dtype!r}")


def _check_free(out: Path, force: bool) -> None:
    if not force and out.exists() and (out.is_file() or any(out.iterdir())):
        raise RequestError(f"{out} exists; choose another name, or write over it with --force")


@app.command()
def export(
    model: ModelName,
    out: Annotated[Path, typer.Argument(help="A name ending in .gguf, or a folder for safetensors.")],
    dtype: Annotated[str | None, typer.Option(help="f32, f16 or bf16; as stored without it.")] = None,
    force: Annotated[bool, typer.Option("--force", help="Write over what is there.")] = False,
    json: Json = False,
) -> None:
    """Write a model as a GGUF file or as a Hugging Face folder."""
    _check_floats(dtype)
    _check_free(out, force)
    from tiercel.commands.chat.render import waiting
    from tiercel.hub import local_models

    with waiting(f"exporting {model}") as report:
        path = local_models.resolve(model, pull=True, progress=report)
        report(f"exporting {model}", 0, 0)
        from tiercel.weights import export as weights

        written = weights.export(path, out, dtype=dtype)
    if json:
        print_json({"model": model, "out": str(written), "dtype": dtype})
    else:
        print(f"{model} is written to {written}")


@app.command()
def plan(
    model: Annotated[str, typer.Argument(help="A model as for run, a shape (falcon-h1:7b), config.json or pattern.")],
    context: Annotated[int | None, typer.Option(help="Tokens of each sequence; 4096 without it.")] = None,
    slots: Annotated[int, typer.Option(help="Concurrent sequences.", min=1)] = 1,
    quantize: Annotated[str | None, typer.Option(help="As if packed while loading: q4_k_m, q8_0, ….")] = None,
    dtype: Annotated[str, typer.Option(help="auto, f32, bf16 or f16.")] = "auto",
    device: Annotated[str, typer.Option(help="this, or a name of the table: laptop-ddr5, rtx-4090, h100, ….")] = "this",
    measure: Annotated[bool, typer.Option("--measure", help="Measure this machine again.")] = False,
    plot: Annotated[Path | None, typer.Option(help="Write memory against context as this .svg file.")] = None,
    json: Json = False,
) -> None:
    """Predict whether a model fits, and its speed, before anything is loaded."""
    from tiercel.commands.chat.render import waiting
    from tiercel.hub import planning
    from tiercel.runtime.atomic import atomic_write

    if plot is not None and plot.suffix != ".svg":
        raise RequestError(f"--plot writes an .svg file, not {plot}")
    with waiting("measuring this machine", unit="parts"):
        found = planning.plan(
            model, context=context, slots=slots, quantize=quantize, dtype=dtype, device=device, measure=measure
        )
    if plot is not None:
        with atomic_write(plot) as file:
            file.write(planning.plot(found).encode())
    if json:
        print_json(found)
    else:
        print(planning.table(found))


@app.command()
def merge(
    model: ModelName,
    adapter: Annotated[Path, typer.Argument(help="A LoRA adapter's folder, in PEFT's form.")],
    out: Annotated[Path, typer.Argument(help="A name ending in .gguf, or a folder for safetensors.")],
    dtype: Annotated[str | None, typer.Option(help="f32, f16 or bf16; as stored without it.")] = None,
    force: Annotated[bool, typer.Option("--force", help="Write over what is there.")] = False,
    json: Json = False,
) -> None:
    """Write a model with an adapter in its matrices.

    Where the model is packed its unpacked values are merged, and written as bf16 unless --dtype says otherwise.
    """
    _check_floats(dtype)
    _check_free(out, force)
    from tiercel.commands.chat.render import waiting
    from tiercel.hub import local_models

    with waiting(f"merging {model}") as report:
        path = local_models.resolve(model, pull=True, progress=report)
        report(f"merging {model}", 0, 0)
        from tiercel.weights import adapters

        written = adapters.merge(path, adapter, out, dtype=dtype)
    if json:
        print_json({"model": model, "adapter": str(adapter), "out": str(written), "dtype": dtype})
    else:
        print(f"{model} with {adapter} is written to {written}")


@app.command()
def bench(
    model: Annotated[
        str,
        typer.Argument(help="A model as for run; with --random a shape (falcon-h1:7b), config.json or pattern file."),
    ] = "smollm2",
    prompt: Annotated[str, typer.Option(help="Prefill lengths, N[,N…]; 0 for none.")] = "512",
    generate: Annotated[int, typer.Option(help="Number of tokens to decode; 0: skip.")] = 64,
    context: Annotated[int, typer.Option(help="Tokens of context before decoding.")] = 0,
    batch: Annotated[int, typer.Option(help="Rows at once.")] = 1,
    threads: Annotated[int | None, typer.Option(help="Threads; the number of cores without it.")] = None,
    repeat: Annotated[int, typer.Option(help="Rounds; medians are shown.")] = 5,
    dtype: Annotated[str, typer.Option(help="auto, f32, bf16 or f16.")] = "auto",
    random: Annotated[str | None, typer.Option(help="Random weights, packed so: q4_k_m, q8_0, int8, bf16, ….")] = None,
    write: Annotated[Path | None, typer.Option(help="Keep the random weights as this .gguf file.")] = None,
    vs: Annotated[list[str] | None, typer.Option(help="llama.cpp or transformers, in turn; may be repeated.")] = None,
    device: Annotated[str, typer.Option(help="cpu, or cuda for one GPU.")] = "cpu",
    json: Json = False,
) -> None:
    """Measure a model: prefill, decode, load, memory.

    Beside a peer the rounds are taken in turn, and ratios are those of one round.
    """
    from tiercel.bench.case import Case
    from tiercel.bench.report import show
    from tiercel.bench.run import run
    from tiercel.commands.chat.render import waiting

    case = Case(
        model,
        _lengths(prompt),
        generate,
        context,
        batch,
        threads,
        repeat,
        dtype,
        random,
        write,
        tuple(vs or ()),
        device,
    )
    with waiting(f"measuring {model}", unit="rounds") as report:
        found = run(case, report)
    if json:
        print_json(found)
    else:
        show(found)


def _lengths(text: str) -> tuple[int, ...]:
    try:
        return tuple(int(word) for word in text.split(","))
    except ValueError as error:
        raise RequestError(f"--prompt takes lengths such as 512 or 128,512, not {text!r}") from error


@app.command()
def quantize(
    model: ModelName,
    out: Annotated[Path, typer.Argument(help="A name ending in .gguf, or a folder for safetensors.")],
    to: Annotated[str, typer.Option(help="q4_k_m, q5_k_m, q6_k, q8_0, q4_0 …, int8 or nf4.")],
    importance: Annotated[
        Path | None, typer.Option(help="A text to learn from which inputs count, or a saved importance (.safetensors).")
    ] = None,
    save_importance: Annotated[Path | None, typer.Option(help="Where to keep what was learned.")] = None,
    report: Annotated[bool, typer.Option("--report", help="Measure what packing costs, over --text.")] = False,
    text: Annotated[Path | None, typer.Option(help="The text of the report.")] = None,
    force: Annotated[bool, typer.Option("--force", help="Write over what is there.")] = False,
    json: Json = False,
) -> None:
    """Write a packed copy of a model: smaller, and faster where memory is what limits."""
    _check_free(out, force)
    if report and text is None:
        raise RequestError("--report measures over a text; name a file with --text")
    from tiercel.commands.chat.render import waiting
    from tiercel.commands.quantize import report_lines, shrink

    with waiting(f"quantizing {model}") as bar:
        found = shrink(model, out, to, importance=importance, save_importance=save_importance,
                       text=text if report else None, progress=bar)  # fmt: skip
    if json:
        print_json({"model": model} | found)
    else:
        print("\n".join(report_lines(model, found)))


# ── judging

app.command("eval")(evaluate)
app.command("compare")(compare)


# ── the server

app.command()(serve)
app.command()(ps)
app.command()(stop)


@app.command()
def rm(
    models: Annotated[list[str], typer.Argument(help="Names as in list.")],
    json: Json = False,
) -> None:
    """Remove models from this machine."""
    from tiercel.hub import store
    from tiercel.serve.client import Client

    for model in models:
        client = Client.find()
        if client is not None:
            client.unload(model)
        store.remove(model)
        if not json:
            print(f"deleted '{model}'")
    if json:
        print_json({"deleted": models})


@app.command()
def cp(
    source: Annotated[str, typer.Argument(help="A local model.")],
    destination: Annotated[str, typer.Argument(help="Its new, further name.")],
    json: Json = False,
) -> None:
    """Give a model another name; no bytes are copied."""
    from tiercel.hub import store

    store.copy(source, destination)
    if json:
        print_json({"source": source, "destination": destination})
    else:
        print(f"copied '{source}' to '{destination}'")


@app.command()
def create(
    name: Annotated[str, typer.Argument(help="The name of the new model.")],
    file: Annotated[Path, typer.Option("-f", "--file", help="The Modelfile.")] = Path("Modelfile"),
    json: Json = False,
) -> None:
    """Make a model from a Modelfile: FROM a model, with ADAPTER, PARAMETER, SYSTEM, TEMPLATE, MESSAGE, LICENSE."""
    from tiercel.hub import store

    try:
        text = store.decode_modelfile(file.read_bytes())
    except (OSError, RequestError) as error:
        raise RequestError(f"{file} cannot be read: {error}") from None
    store.create(name, store.parse_modelfile(text), file.parent)
    if json:
        print_json({"created": name})
    else:
        print(f"created '{name}'; type: tiercel run {name}")


@app.command()
def doctor(json: Json = False) -> None:
    """Examine this machine, and name what would help."""
    from tiercel.commands.doctor import examine, report

    found = examine()
    if json:
        print_json(found)
    else:
        print(report(found))


def main() -> None:
    try:
        app(prog_name="tiercel")
    except KeyboardInterrupt:
        sys.exit(130)
