"""The command table.  A command imports its module when it runs: `--help`, `list` and `show` never meet torch.

    exit codes   0 ok · 1 failed · 2 usage · 3 model not found · 4 does not fit · 130 interrupted

Answers and tables go to stdout, everything else to stderr.  With --json a command prints one JSON value on
stdout, an error included: {"error": …}.  TIERCEL_DEBUG=1 shows the traceback behind an error.
"""

from __future__ import annotations

import dataclasses
import json as json_module
import os
import re
import sys
import time
from collections.abc import Callable, Sequence
from pathlib import Path
from typing import TYPE_CHECKING, Annotated, Any

import typer
from typer.core import TyperGroup

from tiercel.errors import RequestError, TiercelError
from tiercel.evals.cli import compare, evaluate
from tiercel.train.cli import app as train_app

if TYPE_CHECKING:
    from tiercel.console import Prompt, Talker
    from tiercel.sampling import SamplingParams

DEFAULT_MODEL = "reasoner"  # it comes with the package: `hub.BUNDLED`


class Commands(TyperGroup):
    """Turns what may go wrong in a command into one line and an exit code."""

    def invoke(self, ctx: Any) -> Any:
        try:
            return super().invoke(ctx)
        except KeyboardInterrupt:
            raise typer.Exit(130) from None
        except BrokenPipeError:  # the reader of our output has left: nobody is there to be told
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
    from tiercel.console import complain

    if _wants_json():
        _print_json({"error": message})
    else:
        complain(message)


def _print_json(value: Any) -> None:
    print(json_module.dumps(value, ensure_ascii=False), flush=True)


app = typer.Typer(cls=Commands, no_args_is_help=True, add_completion=False, pretty_exceptions_enable=False,
                  rich_markup_mode=None, help="Hybrid language models, run on your machine.")  # fmt: skip

app.add_typer(train_app, name="train")

Json = Annotated[bool, typer.Option("--json", help="Print one JSON value instead of text.")]
ModelName = Annotated[str, typer.Argument(help="Short name, org/repo of the hub, folder or .gguf file.")]


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


@app.command()
def run(
    model: ModelName = DEFAULT_MODEL,
    prompt: Annotated[list[str] | None, typer.Argument(help="What to ask; without one a conversation starts.")] = None,
    temperature: Annotated[float | None, typer.Option(help="0 takes the likeliest token.")] = None,
    top_p: Annotated[float | None, typer.Option(help="Keep the likeliest tokens up to this probability.")] = None,
    top_k: Annotated[int | None, typer.Option(help="Keep this many tokens; 0 keeps all.")] = None,
    min_p: Annotated[float | None, typer.Option(help="Keep tokens this likely beside the likeliest.")] = None,
    seed: Annotated[int | None, typer.Option(help="The same seed gives the same text.")] = None,
    max_tokens: Annotated[int | None, typer.Option(help="Stop after so many tokens.")] = None,
    stop: Annotated[list[str] | None, typer.Option(help="Stop at this text; may be repeated.")] = None,
    system: Annotated[str | None, typer.Option(help="The system message.")] = None,
    raw: Annotated[bool, typer.Option("--raw", help="No chat template: go on from the prompt.")] = False,
    dtype: Annotated[str, typer.Option(help="auto, f32, bf16 or f16.")] = "auto",
    quantize: Annotated[str | None, typer.Option(help="Pack while loading: q4_k_m, q8_0, int8, nf4, ….")] = None,
    exact: Annotated[bool, typer.Option("--exact", help="Do not round inputs of packed matrices; slower.")] = False,
    context: Annotated[int | None, typer.Option(help="Length of the context in tokens.")] = None,
    device: Annotated[str, typer.Option(help="cpu, or cuda for one GPU.")] = "cpu",
    think: Annotated[bool | None, typer.Option("--think/--no-think", help="Ask for thoughts first, or not.")] = None,
    hide_thinking: Annotated[bool, typer.Option("--hidethinking", help="Do not show the thoughts.")] = False,
    verbose: Annotated[bool, typer.Option("--verbose", help="Show the timings.")] = False,
    vote: Annotated[int | None, typer.Option(help="Answer so many times, and say what most answers agree on.")] = None,
    vote_method: Annotated[
        str,
        typer.Option(
            help="majority, weighted, filtered-low, filtered-high, deepconf-low, "
            "deepconf-high; deepconf stops unsure answers early."
        ),
    ] = "majority",
    vote_set: Annotated[
        list[str] | None,
        typer.Option(
            help="More of the vote, NAME=VALUE: keep, weight, window, warmup, consensus, top_k; may be repeated."
        ),
    ] = None,
    json: Json = False,
) -> None:
    """Answer a prompt, or hold a conversation.

    The prompt is an argument, a pipe, or both (the piped text comes after).  A model that is missing is pulled.
    Without a model the small reasoner of this package answers: tiercel run "What is 47 * 86?"
    Where `tiercel serve` runs, it is asked, and nothing is loaded twice.
    """
    given: dict[str, Any] = {"temperature": temperature, "top_p": top_p, "top_k": top_k, "min_p": min_p, "seed": seed,
             "max_tokens": max_tokens, "stop": stop or None}  # fmt: skip
    given = {name: value for name, value in given.items() if value is not None}
    _check_params(given)
    from tiercel.voting.settings import VoteSettings

    votes = VoteSettings.typed(vote, vote_method, vote_set or [])
    model, prompt = _model_and_words(model, prompt or [])
    text = _prompt_text(prompt)
    if text is None and (json or raw or not sys.stdout.isatty()):
        raise RequestError("a conversation needs a terminal; give a prompt, or pipe a text in")
    if text is None and votes is not None:
        raise RequestError("a vote is on one prompt; give it, or pipe it in")
    began = time.perf_counter()
    packing: dict[str, Any] = ({"quantize": quantize} if quantize else {}) | ({"exact": True} if exact else {})
    packing |= {} if device == "cpu" else {"device": device}
    talker = _open(model, dtype, context, **packing)
    load = time.perf_counter() - began
    params = dataclasses.replace(talker.default_params(), **given)
    if text is None:
        _converse(talker, model, params, system=system, verbose=verbose, hide_thinking=hide_thinking, think=think)
        return
    question: Prompt = text if raw else _messages(system, text)
    if votes is not None:
        from tiercel.console import answer_by_vote

        told = answer_by_vote(talker, question, params, votes, raw=raw, think=think, verbose=verbose, quiet=json)
        if json:
            _print_json({"model": model} | told)
        return
    _answer(talker, model, question, params, load, raw=raw, think=think, hide=hide_thinking, verbose=verbose, json=json)


def _model_and_words(model: str, words: list[str]) -> tuple[str, list[str]]:
    """The first word is a model's name, unless it stands alone and reads as a prompt."""
    from tiercel.weights import hub

    if not words and model != DEFAULT_MODEL and hub.reads_as_prompt(model):
        return DEFAULT_MODEL, [model]
    return model, words


def _check_params(given: dict[str, Any]) -> None:
    """Refuse what cannot be served before a model is loaded for it."""
    from tiercel.sampling import SamplingParams

    SamplingParams(max_tokens=given.get("max_tokens"), **{k: v for k, v in given.items() if k != "max_tokens"})


def _prompt_text(words: list[str]) -> str | None:
    """The prompt of the command line and what is piped in, or None when there is neither and a person types."""
    text = " ".join(words)
    if not sys.stdin.isatty():
        try:
            piped = sys.stdin.buffer.read().decode()
        except UnicodeDecodeError as error:
            raise RequestError(f"the piped text is not UTF-8 (byte {error.start})") from error
        text = "\n\n".join(part for part in (text, piped) if part.strip())
        if not text.strip():
            raise RequestError("the prompt is empty; give one, or pipe a text in")
    return text if text.strip() else None


def _messages(system: str | None, text: str) -> list[dict[str, str]]:
    first = [{"role": "system", "content": system}] if system else []
    return [*first, {"role": "user", "content": text}]


def open_talker(
    name: str, dtype: str, context: int | None, report: Callable[[str, int, int], None], **packing: Any
) -> Talker:
    """The model behind a name, with a memory of its conversation; packing: `load`'s quantize, exact and device."""
    import tiercel
    from tiercel.console import ModelTalker
    from tiercel.planning import fit
    from tiercel.weights import hub

    hub.resolve(name, pull=True, progress=report)
    fitted = fit(name, context=context, dtype=dtype, quantize=packing.get("quantize"))
    if sys.stderr.isatty() or fitted.context < (context or fitted.wanted):
        print(fitted.line, file=sys.stderr, flush=True)
    loaded = tiercel.load(
        name,
        dtype=dtype,
        max_length=fitted.context,
        progress=lambda done, total: report(f"loading {name}", done, total),
        **packing,
    )
    return ModelTalker(loaded)


def _open(name: str, dtype: str, context: int | None, **packing: Any) -> Talker:
    """A running server's model where it has it and nothing else is asked for, else one loaded here."""
    from tiercel.console import waiting

    if dtype == "auto" and context is None and not packing:
        from tiercel.serve.talker import ServerTalker

        if (talker := ServerTalker.find(name)) is not None:
            return talker
    with waiting(f"loading {name}") as report:
        return open_talker(name, dtype, context, report, **packing)


def _converse(talker: Talker, name: str, params: SamplingParams, **settings: Any) -> None:
    from tiercel.console import Conversation

    Conversation(talker, name, params, **settings).run()


def _answer(
    talker: Talker,
    name: str,
    question: Prompt,
    params: SamplingParams,
    load: float,
    *,
    raw: bool,
    think: bool | None,
    hide: bool,
    verbose: bool,
    json: bool,
) -> None:
    from tiercel.console import speak, timing_block

    pieces = talker.ask(question, params, raw=raw, think=think)
    if not json:
        speak(pieces, hide_thinking=hide)
        print(flush=True)
    for _ in pieces:
        pass
    last = talker.last
    assert last is not None, "an answer that was asked for is known"
    if json:
        times = {"load_s": load, "prompt_s": last.times.prompt, "generation_s": last.times.generation}
        _print_json({
            "model": name,
            "text": last.text,
            "thinking": last.thoughts,
            "prompt_tokens": len(last.prompt_ids),
            "cached_tokens": last.cached_tokens,
            "completion_tokens": len(last.token_ids),
            "finish_reason": last.finish_reason,
            "timings": times | {"total_s": load + last.times.total},
        })  # fmt: skip
    elif verbose:
        print("\n" + timing_block(last, load), file=sys.stderr, flush=True)


# ── models


@app.command()
def pull(
    name: ModelName,
    verify: Annotated[bool, typer.Option("--verify", help="Compare what is here with its sha256.")] = False,
    json: Json = False,
) -> None:
    """Bring a model here.

    By short name, or by org/repo or org/repo:quantization of the hub.
    """
    from tiercel.console import waiting
    from tiercel.plan import human_bytes
    from tiercel.weights import hub

    with waiting(f"pulling {name}") as report:
        model = hub.pull(name, verify=verify, progress=report)
    if json:
        _print_json(_plain(model) | {"fetched": model.fetched})
    else:
        state = "is here now" if model.fetched else "is already here"
        print(f"{model.name} {state}: {model.path} ({human_bytes(model.bytes)})")


@app.command("list")
@app.command("ls", hidden=True)
def list_(json: Json = False) -> None:
    """List the models that are here (also: ls)."""
    from tiercel.plan import human_bytes
    from tiercel.weights import hub

    models = hub.list_models()
    if json:
        _print_json([_plain(model) for model in models])
        return
    rows = [("NAME", "ID", "SIZE", "MODIFIED")]
    rows += [(model.name, model.id, human_bytes(model.bytes), _ago(model.modified)) for model in models]
    _print_table(rows)


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
    """Say what a model is, from its config or header alone."""
    from tiercel.show import describe, table
    from tiercel.weights import hub

    found = describe(hub.resolve(model))
    if json:
        _print_json({"name": model} | found)
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
    from tiercel.console import waiting
    from tiercel.weights import hub

    with waiting(f"exporting {model}") as report:
        path = hub.resolve(model, pull=True, progress=report)
        report(f"exporting {model}", 0, 0)
        from tiercel.weights import load

        written = load.export(path, out, dtype=dtype)
    if json:
        _print_json({"model": model, "out": str(written), "dtype": dtype})
    else:
        print(f"{model} is written to {written}")


@app.command()
def plan(
    model: Annotated[str, typer.Argument(help="A model as for run, a shape (falcon-h1:7b), config.json or pattern.")],
    context: Annotated[int | None, typer.Option(help="Tokens of each text; 4096 without it.")] = None,
    slots: Annotated[int, typer.Option(help="Texts at once.", min=1)] = 1,
    quantize: Annotated[str | None, typer.Option(help="As if packed while loading: q4_k_m, q8_0, ….")] = None,
    dtype: Annotated[str, typer.Option(help="auto, f32, bf16 or f16.")] = "auto",
    device: Annotated[str, typer.Option(help="this, or a name of the table: laptop-ddr5, rtx-4090, h100, ….")] = "this",
    measure: Annotated[bool, typer.Option("--measure", help="Measure this machine again.")] = False,
    plot: Annotated[Path | None, typer.Option(help="Write memory against context as this .svg file.")] = None,
    json: Json = False,
) -> None:
    """Say whether a model will fit, and how fast it will be, before anything is loaded."""
    from tiercel import planning
    from tiercel.console import waiting

    if plot is not None and plot.suffix != ".svg":
        raise RequestError(f"--plot writes an .svg file, not {plot}")
    with waiting("measuring this machine", unit="parts"):
        found = planning.plan(
            model, context=context, slots=slots, quantize=quantize, dtype=dtype, device=device, measure=measure
        )
    if plot is not None:
        plot.write_text(planning.plot(found), encoding="utf-8")
    if json:
        _print_json(found)
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
    from tiercel.console import waiting
    from tiercel.weights import hub

    with waiting(f"merging {model}") as report:
        path = hub.resolve(model, pull=True, progress=report)
        report(f"merging {model}", 0, 0)
        from tiercel.weights import adapters

        written = adapters.merge(path, adapter, out, dtype=dtype)
    if json:
        _print_json({"model": model, "adapter": str(adapter), "out": str(written), "dtype": dtype})
    else:
        print(f"{model} with {adapter} is written to {written}")


@app.command()
def bench(
    model: Annotated[
        str,
        typer.Argument(help="A model as for run; with --random a shape (falcon-h1:7b), config.json or pattern file."),
    ] = "smollm2",
    prompt: Annotated[str, typer.Option(help="Prefill lengths, N[,N…]; 0 for none.")] = "512",
    generate: Annotated[int, typer.Option(help="Decode so many tokens; 0 for none.")] = 64,
    context: Annotated[int, typer.Option(help="Decode after so many tokens of context.")] = 0,
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
    from tiercel.bench import Case, run
    from tiercel.bench.report import show
    from tiercel.console import waiting

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
        _print_json(found)
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
    from tiercel.console import waiting
    from tiercel.shrink import shrink, told

    with waiting(f"quantizing {model}") as bar:
        found = shrink(model, out, to, importance=importance, save_importance=save_importance,
                       text=text if report else None, progress=bar)  # fmt: skip
    if json:
        _print_json({"model": model} | found)
    else:
        print("\n".join(told(model, found)))


# ── judging

app.command("eval")(evaluate)
app.command("compare")(compare)


# ── the server


@app.command()
def serve(
    models: Annotated[list[str] | None, typer.Argument(help="Models to load now; others load when asked for.")] = None,
    host: Annotated[str | None, typer.Option(help="Address to listen on; 127.0.0.1 without it.")] = None,
    port: Annotated[int | None, typer.Option(help="Port; 11434 without it.", min=0, max=65535)] = None,
    api_key: Annotated[
        str | None, typer.Option(help="Answer only who knows this key (better: TIERCEL_API_KEY).")
    ] = None,
    allow_host: Annotated[list[str] | None, typer.Option(help="A further name in Host; may be repeated.")] = None,
    allow_origin: Annotated[list[str] | None, typer.Option(help="A further page that may call; repeatable.")] = None,
    manage: Annotated[
        bool | None, typer.Option("--manage/--no-manage", help="Let clients pull, create, delete; on loopback yes.")
    ] = None,
    slots: Annotated[int | None, typer.Option(help="Answers made at once.", min=1)] = None,
    queue: Annotated[int | None, typer.Option(help="Requests that may wait; more are sent away.")] = None,
    keep_alive: Annotated[
        str | None, typer.Option(help='How long an unused model stays: "5m", "1h", -1 for ever.')
    ] = None,
    device: Annotated[str | None, typer.Option(help="cpu, or cuda for one GPU.")] = None,
    drain: Annotated[float | None, typer.Option(help="Seconds that answers may go on after a signal.")] = None,
    adapter: Annotated[
        list[str] | None,
        typer.Option(help="NAME=FOLDER: a LoRA adapter, served as MODEL:NAME beside the first model; repeatable."),
    ] = None,
    set_: Annotated[
        list[str] | None, typer.Option("--set", help="Any limit, NAME=VALUE; see serve/settings.py.")
    ] = None,
) -> None:
    """Serve models: OpenAI's and Ollama's APIs, and a page to chat on.

    Every option is also a variable: TIERCEL_PORT=8080, TIERCEL_SLOTS=4.
    """
    from tiercel.serve.settings import from_environment, named

    given: dict[str, Any] = {
        "host": host, "port": port, "api_key": api_key, "manage": manage, "slots": slots, "queue": queue,
        "drain": drain, "device": device, "allow_hosts": tuple(allow_host) if allow_host else None,
        "allow_origins": tuple(allow_origin) if allow_origin else None,
        **named(set_ or []),
    }  # fmt: skip
    if keep_alive is not None:
        from tiercel.serve.duration import seconds_of

        given["keep_alive"] = seconds_of(keep_alive)
    settings = from_environment(**given)
    from tiercel.serve.app import run as run_server

    adapters = {}
    for word in adapter or []:
        name, _, folder = word.partition("=")
        if not re.fullmatch(r"[a-z0-9][a-z0-9._-]{0,63}", name) or not folder:
            raise RequestError(f"--adapter is NAME=FOLDER, the name of small letters, digits and .-_, not {word!r}")
        adapters[name] = Path(folder).expanduser()
    run_server(settings, models or [], adapters)


@app.command()
def ps(json: Json = False) -> None:
    """List the models that the server has in memory."""
    from tiercel.plan import human_bytes
    from tiercel.serve.client import Client

    found = Client.running().get("/api/ps")["models"]
    if json:
        _print_json(found)
        return
    rows = [("NAME", "ID", "SIZE", "PROCESSOR", "CONTEXT", "UNTIL")]
    rows += [
        (model["name"], model["digest"][:12], human_bytes(model["size"]), "100% CPU", str(model["context_length"]),
         _until(model["expires_at"]))
        for model in found
    ]  # fmt: skip
    _print_table(rows)


def _until(stamp: str) -> str:
    """`4 minutes from now`, as Ollama writes it."""
    from datetime import datetime

    left = datetime.fromisoformat(stamp).timestamp() - time.time()
    if left > 10 * 31_557_600:
        return "Forever"
    if left <= 0:
        return "Stopping..."
    for unit, length in (("day", 86_400), ("hour", 3600), ("minute", 60), ("second", 1)):
        if left >= length:
            count = int(left // length)
            return f"{count} {unit}{'s' if count > 1 else ''} from now"
    return "Less than a second from now"


def _print_table(rows: Sequence[tuple[str, ...]]) -> None:
    widths = [max(len(row[column]) for row in rows) for column in range(len(rows[0]) - 1)]
    for row in rows:
        cells = [cell.ljust(width) for cell, width in zip(row, widths, strict=False)]
        print("    ".join([*cells, row[-1]]))


@app.command()
def stop(model: ModelName, json: Json = False) -> None:
    """Unload a model from the server's memory."""
    from tiercel.serve.client import Client

    Client.running().post("/api/generate", {"model": model, "keep_alive": 0})
    if json:
        _print_json({"stopped": model})


@app.command()
def rm(
    models: Annotated[list[str], typer.Argument(help="Names as in list.")],
    json: Json = False,
) -> None:
    """Remove models from this machine."""
    from tiercel.serve.client import Client
    from tiercel.weights import store

    for model in models:
        client = Client.find()
        if client is not None:
            client.unload(model)
        store.remove(model)
        if not json:
            print(f"deleted '{model}'")
    if json:
        _print_json({"deleted": models})


@app.command()
def cp(
    source: Annotated[str, typer.Argument(help="A model that is here.")],
    destination: Annotated[str, typer.Argument(help="Its new, further name.")],
    json: Json = False,
) -> None:
    """Give a model another name; no bytes are copied."""
    from tiercel.weights import store

    store.copy(source, destination)
    if json:
        _print_json({"source": source, "destination": destination})
    else:
        print(f"copied '{source}' to '{destination}'")


@app.command()
def create(
    name: Annotated[str, typer.Argument(help="The name of the new model.")],
    file: Annotated[Path, typer.Option("-f", "--file", help="The Modelfile.")] = Path("Modelfile"),
    json: Json = False,
) -> None:
    """Make a model from a Modelfile: FROM a model, with ADAPTER, PARAMETER, SYSTEM, TEMPLATE, MESSAGE, LICENSE."""
    from tiercel.weights import store

    try:
        text = file.read_text(encoding="utf-8")
    except (OSError, UnicodeDecodeError) as error:
        raise RequestError(f"{file} cannot be read: {error}") from None
    store.create(name, store.parse_modelfile(text), file.parent)
    if json:
        _print_json({"created": name})
    else:
        print(f"created '{name}'; type: tiercel run {name}")


@app.command()
def doctor(json: Json = False) -> None:
    """Look at this machine, and say what would help."""
    from tiercel.doctor import examine, report

    found = examine()
    if json:
        _print_json(found)
    else:
        print(report(found))


def main() -> None:
    try:
        app(prog_name="tiercel")
    except KeyboardInterrupt:
        sys.exit(130)
