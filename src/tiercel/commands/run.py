"""The command `run`: options → SamplingParams, a model or a running server's, an answer or a conversation."""

from __future__ import annotations

import dataclasses
import sys
import time
from collections.abc import Callable
from typing import TYPE_CHECKING, Annotated, Any

import typer

from tiercel.commands.options import Json, ModelName, print_json
from tiercel.errors import RequestError

if TYPE_CHECKING:
    from tiercel.commands.chat.backend import ChatBackend, Prompt
    from tiercel.sampling.params import SamplingParams

DEFAULT_MODEL = "reasoner"  # it comes with the package: `local_models.BUNDLED`


def run(
    model: ModelName = DEFAULT_MODEL,
    prompt: Annotated[list[str] | None, typer.Argument(help="What to ask; without one a conversation starts.")] = None,
    temperature: Annotated[float | None, typer.Option(help="0 takes the likeliest token.")] = None,
    top_p: Annotated[float | None, typer.Option(help="Keep the likeliest tokens up to this probability.")] = None,
    top_k: Annotated[int | None, typer.Option(help="Keep this many tokens; 0 keeps all.")] = None,
    min_p: Annotated[float | None, typer.Option(help="Keep tokens this likely beside the likeliest.")] = None,
    seed: Annotated[int | None, typer.Option(help="The same seed gives the same text.")] = None,
    max_tokens: Annotated[int | None, typer.Option(help="Generate at most this many tokens.")] = None,
    stop: Annotated[list[str] | None, typer.Option(help="Stop at this text; may be repeated.")] = None,
    system: Annotated[str | None, typer.Option(help="The system message.")] = None,
    raw: Annotated[bool, typer.Option("--raw", help="No chat template: go on from the prompt.")] = False,
    dtype: Annotated[str, typer.Option(help="auto, f32, bf16 or f16.")] = "auto",
    quantize: Annotated[str | None, typer.Option(help="Pack while loading: q4_k_m, q8_0, int8, nf4, ….")] = None,
    exact: Annotated[bool, typer.Option("--exact", help="Do not round inputs of packed matrices; slower.")] = False,
    context: Annotated[int | None, typer.Option(help="Length of the context in tokens.")] = None,
    device: Annotated[str, typer.Option(help="cpu, or cuda for one GPU.")] = "cpu",
    draft_model: Annotated[
        str | None, typer.Option(help="A smaller model of the same vocabulary that proposes tokens; same answers.")
    ] = None,
    tensor_parallel: Annotated[int, typer.Option(help="Processes that share each layer, on the CPU.", min=1)] = 1,
    think: Annotated[bool | None, typer.Option("--think/--no-think", help="Ask for reasoning first, or not.")] = None,
    hide_thinking: Annotated[bool, typer.Option("--hidethinking", help="Do not show the reasoning.")] = False,
    verbose: Annotated[bool, typer.Option("--verbose", help="Show the timings.")] = False,
    vote: Annotated[int | None, typer.Option(help="Sample this many answers; print the one most agree on.")] = None,
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
    usual: dict[str, Any] = dict(quantize=None, exact=False, device="cpu", draft_model=None, tensor_parallel=1)
    chosen = dict(quantize=quantize or None, exact=exact, device=device, draft_model=draft_model,
                  tensor_parallel=tensor_parallel)  # fmt: skip
    backend = _open(model, dtype, context, **{name: value for name, value in chosen.items() if value != usual[name]})
    load = time.perf_counter() - began
    params = dataclasses.replace(backend.default_params(), **given)
    if text is None:
        _converse(backend, model, params, system=system, verbose=verbose, hide_thinking=hide_thinking, think=think)
        return
    question: Prompt = text if raw else _messages(system, text)
    if votes is not None:
        from tiercel.commands.chat.render import answer_by_vote

        result = answer_by_vote(backend, question, params, votes, raw=raw, think=think, verbose=verbose, quiet=json)
        if json:
            print_json({"model": model} | result)
        return
    _answer(
        backend, model, question, params, load, raw=raw, think=think, hide=hide_thinking, verbose=verbose, json=json
    )


def _model_and_words(model: str, words: list[str]) -> tuple[str, list[str]]:
    """The first word is a model's name, unless it stands alone and reads as a prompt."""
    from tiercel.hub import local_models

    if not words and model != DEFAULT_MODEL and local_models.reads_as_prompt(model):
        return DEFAULT_MODEL, [model]
    return model, words


def _check_params(given: dict[str, Any]) -> None:
    """Refuse what cannot be served before a model is loaded for it."""
    from tiercel.sampling.params import SamplingParams

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


def open_backend(
    name: str, dtype: str, context: int | None, report: Callable[[str, int, int], None], **packing: Any
) -> ChatBackend:
    """The model behind a name, with a memory of its conversation; packing: further arguments of `load`."""
    import tiercel
    from tiercel.commands.chat.backend import ModelBackend
    from tiercel.hub import local_models
    from tiercel.hub.planning import fit

    local_models.resolve(name, pull=True, progress=report)
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
    return ModelBackend(loaded)


def _open(name: str, dtype: str, context: int | None, **packing: Any) -> ChatBackend:
    """A running server's model where it has it and nothing else is asked for, else one loaded here."""
    from tiercel.commands.chat.render import waiting

    if dtype == "auto" and context is None and not packing:
        from tiercel.serve.remote import RemoteBackend

        if (backend := RemoteBackend.find(name)) is not None:
            return backend
    with waiting(f"loading {name}") as report:
        return open_backend(name, dtype, context, report, **packing)


def _converse(backend: ChatBackend, name: str, params: SamplingParams, **settings: Any) -> None:
    from tiercel.commands.chat.repl import Conversation

    Conversation(backend, name, params, **settings).run()


def _answer(
    backend: ChatBackend,
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
    from tiercel.commands.chat.render import speak, timing_block

    pieces = backend.ask(question, params, raw=raw, think=think)
    if not json:
        speak(pieces, hide_thinking=hide)
        print(flush=True)
    for _ in pieces:
        pass
    last = backend.last
    assert last is not None, "an answer that was asked for is known"
    if json:
        times = {"load_s": load, "prompt_s": last.times.prompt, "generation_s": last.times.generation}
        print_json({
            "model": name,
            "text": last.text,
            "thinking": last.reasoning,
            "prompt_tokens": len(last.prompt_ids),
            "cached_tokens": last.cached_tokens,
            "completion_tokens": len(last.token_ids),
            "finish_reason": last.finish_reason,
            "timings": times | {"total_s": load + last.times.total},
        })  # fmt: skip
    elif verbose:
        print("\n" + timing_block(last, load), file=sys.stderr, flush=True)
