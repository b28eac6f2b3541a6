"""`tiercel train pretrain | sft | lora | grpo`."""

from __future__ import annotations

import functools
import inspect
from collections.abc import Callable
from dataclasses import dataclass, fields
from pathlib import Path
from typing import TYPE_CHECKING, Annotated, Any, get_type_hints

import typer

from tiercel.commands.options import Json, print_json
from tiercel.errors import RequestError
from tiercel.runtime.exit import hard_exit

if TYPE_CHECKING:
    from tiercel.train.loop import Settings


def _ended(*_: Any, **__: Any) -> None:
    from tiercel.train.parallel import ranks

    if ranks().count > 1:  # gloo's threads must not see Python end
        hard_exit()


app = typer.Typer(
    no_args_is_help=True,
    rich_markup_mode=None,
    help="Train a network: pretrain, sft, lora, grpo.",
    result_callback=_ended,
)

Data = Annotated[Path, typer.Argument(help='JSONL, one example a line: {"messages": […]} or {"text": …}.')]
Out = Annotated[Path, typer.Option(help="Folder for the checkpoint, the log and the plot.")]
Config = Annotated[str, typer.Option(help="Pattern file or config.json (fresh weights), or a checkpoint.")]
Tokenizer = Annotated[Path | None, typer.Option(help="Folder with a tokenizer.json, for a fresh network.")]
HeldOut = Annotated[Path | None, typer.Option("--eval", help="JSONL that is not trained on, to be evaluated.")]


@dataclass(frozen=True)
class Options:
    """Options that the ways of training share; a command may have other defaults, or lack some."""

    steps: Annotated[int | None, typer.Option(help="Steps of the optimizer.")] = None
    epochs: Annotated[float | None, typer.Option(help="Passes over the data, instead of steps.")] = None
    batch: Annotated[int, typer.Option(help="Rows of a micro-batch.")] = 8
    accumulate: Annotated[int, typer.Option(help="Micro-batches of a step.")] = 1
    length: Annotated[int, typer.Option(help="Tokens of a row.")] = 512
    lr: Annotated[float, typer.Option(help="The highest learning rate.")] = 1e-3
    schedule: Annotated[str, typer.Option(help="cosine, wsd or constant.")] = "cosine"
    warmup: Annotated[int, typer.Option(help="Steps until the learning rate is reached.")] = 20
    weight_decay: Annotated[float, typer.Option(help="Of matrices.")] = 0.0
    clip: Annotated[float, typer.Option(help="Largest norm of the gradient.")] = 1.0
    save_every: Annotated[int, typer.Option(help="Steps between checkpoints to resume from; 0: at the end.")] = 500
    eval_every: Annotated[int, typer.Option(help="Steps between evaluations; 0: at the end.")] = 0
    seed: Annotated[int, typer.Option(help="Of fresh weights and of the order of the data.")] = 0
    device: Annotated[str, typer.Option(help="cpu or cuda.")] = "cpu"
    dtype: Annotated[str, typer.Option(help="f32, or bf16 for products (weights stay float32).")] = "f32"
    recompute: Annotated[
        bool, typer.Option("--recompute", help="Keep no activations of blocks: slower, less memory.")
    ] = False
    compile: Annotated[bool, typer.Option("--compile", help="Let torch.compile make kernels of the blocks.")] = False
    resume: Annotated[bool, typer.Option("--resume", help="Go on from the last checkpoint in --out.")] = False
    quiet: Annotated[bool, typer.Option("--quiet", help="No progress bar.")] = False
    json: Json = False

    def settings(self, out: Path, **changes: Any) -> Settings:
        """Return the settings of the loop.

        Raises:
            RequestError: neither or both of --steps and --epochs.
        """
        from tiercel.train.loop import Settings

        steps = changes.pop("steps", None)
        if steps is None and (self.steps is None) == (self.epochs is None):
            raise RequestError("say how long: --steps or --epochs")
        shared = {part.name for part in fields(Settings)} & {part.name for part in fields(self)}
        values = {name: getattr(self, name) for name in shared}
        values |= {"steps": steps or self.steps or 1, "out": out, "quiet": self.quiet or self.json}
        return Settings(**values | changes)


def takes_options(*without: str, **defaults: Any) -> Callable[[Callable[..., None]], Callable[..., None]]:
    """Give a command, whose last argument is `options`, the options of `Options`.

    Args:
        without: names of options that the command lacks.
        defaults: options whose default differs, or an (annotation, default) where the help does, too.
    """

    def decorate(command: Callable[..., None]) -> Callable[..., None]:
        hints = get_type_hints(Options, include_extras=True)
        own = inspect.signature(command, eval_str=True)
        parameters = [p for name, p in own.parameters.items() if name != "options"]
        names = [part.name for part in fields(Options) if part.name not in without]
        for part in fields(Options):
            if part.name in names:
                given = defaults.get(part.name, part.default)
                hint, default = given if isinstance(given, tuple) else (hints[part.name], given)
                kind = inspect.Parameter.KEYWORD_ONLY
                parameters.append(inspect.Parameter(part.name, kind, default=default, annotation=hint))

        @functools.wraps(command)
        def run(**given: Any) -> None:
            options = Options(**{name: given.pop(name) for name in names})
            command(**given, options=options)

        run.__signature__ = own.replace(parameters=parameters)  # type: ignore[attr-defined]  # what typer reads
        run.__annotations__ = {p.name: p.annotation for p in parameters} | {"return": None}
        return run

    return decorate


@app.command()
@takes_options(weight_decay=0.1)
def pretrain(
    data: Data,
    config: Config,
    out: Out,
    tokenizer: Tokenizer = None,
    held_out: HeldOut = None,
    *,
    options: Options,
) -> None:
    """Learn every next token of documents."""
    from tiercel.train.pretrain import pretrain

    found = pretrain(config, data, options.settings(out), tokenizer=tokenizer, held_out=held_out, rows=options.batch,
                     length=options.length, epochs=options.epochs, seed=options.seed)  # fmt: skip
    _report(found, options.json)


@app.command()
@takes_options(lr=1e-4)
def sft(
    data: Data,
    config: Config,
    out: Out,
    loss_on: Annotated[str, typer.Option(help="Roles that are learned, with commas; or all.")] = "assistant",
    tokenizer: Tokenizer = None,
    held_out: HeldOut = None,
    *,
    options: Options,
) -> None:
    """Learn the answers of conversations."""
    from tiercel.train.sft import sft

    found = sft(config, data, options.settings(out), loss_on=_roles(loss_on), tokenizer=tokenizer, held_out=held_out,
                rows=options.batch, length=options.length, epochs=options.epochs, seed=options.seed)  # fmt: skip
    _report(found, options.json)


@app.command()
@takes_options("dtype", "compile", batch=1, accumulate=8, lr=2e-4, warmup=10, save_every=100)
def lora(
    model: Annotated[str, typer.Argument(help="A model as for run: it stays as it is.")],
    data: Data,
    out: Out,
    rank: Annotated[int, typer.Option(help="Rank of the adapter.", min=1)] = 16,
    alpha: Annotated[float, typer.Option(help="Its product counts alpha / rank.")] = 32,
    dropout: Annotated[float, typer.Option(help="Of its inputs.", min=0, max=0.99)] = 0.0,
    targets: Annotated[str, typer.Option(help="Projections, with commas; all without it.")] = "",
    quantize: Annotated[str | None, typer.Option(help="QLoRA: pack the model first, q4_k_m, nf4, int8 …")] = None,
    loss_on: Annotated[str, typer.Option(help="Roles that are learned, with commas; or all.")] = "assistant",
    held_out: HeldOut = None,
    *,
    options: Options,
) -> None:
    """Learn the answers of conversations in an adapter (LoRA; with --quantize QLoRA)."""
    from tiercel.train.lora import lora

    wanted = tuple(word.strip() for word in targets.split(",") if word.strip())
    found = lora(model, data, options.settings(out), rank=rank, alpha=alpha, dropout=dropout, targets=wanted,
                 quantize=quantize, loss_on=_roles(loss_on), held_out=held_out, rows=options.batch,
                 length=options.length, epochs=options.epochs, seed=options.seed)  # fmt: skip
    _report(
        found, options.json, f"tiercel merge {model} {out} merged.gguf, or tiercel serve {model} --adapter name={out}"
    )


@app.command()
@takes_options(
    "steps", "epochs", "batch", "length", "device", "compile",
    lr=1e-5, schedule="constant",
    warmup=(Annotated[int, typer.Option(help="Rounds until the learning rate is reached.")], 2),
    save_every=(Annotated[int, typer.Option(help="Rounds between checkpoints; 0: at the end.")], 10),
    eval_every=(Annotated[int, typer.Option(help="Rounds between evaluations; 0: at the end.")], 10),
    seed=(Annotated[int, typer.Option(help="Of the problems and the answers.")], 0),
)  # fmt: skip
def grpo(
    config: Config,
    out: Out,
    problems: Annotated[str | None, typer.Option(help="Families of tiercel.problems, with commas.")] = None,
    sizes: Annotated[str, typer.Option(help="Sizes of these: 1 to 3, and 4 for larger ones.")] = "1,2,3",
    data: Annotated[Path | None, typer.Option(help='JSONL of {"question": …, "answer": …}.')] = None,
    reward: Annotated[str, typer.Option(help="Of --data: exact, math, or module:function(answer, wanted).")] = "exact",
    gym: Annotated[str | None, typer.Option(help="A task of the package reasoning-gym, which grades it.")] = None,
    held_out: Annotated[Path | None, typer.Option("--eval", help="JSONL as --data, answered greedily.")] = None,
    tests: Annotated[int, typer.Option(help="Held-out problems of each of --problems, answered greedily.")] = 100,
    tokenizer: Tokenizer = None,
    rounds: Annotated[int, typer.Option(help="Rounds of answers.")] = 50,
    prompts: Annotated[int, typer.Option(help="Problems of a round whose answers differ in worth.")] = 16,
    answers: Annotated[int, typer.Option(help="Answers to each.")] = 8,
    most: Annotated[int, typer.Option(help="Tokens of an answer.")] = 256,
    updates: Annotated[int, typer.Option(help="Steps of the optimizer in a round.")] = 1,
    tries: Annotated[int, typer.Option(help="Problems drawn in a round, at most this many times --prompts.")] = 3,
    slots: Annotated[int, typer.Option(help="Answers written at once.")] = 32,
    *,
    options: Options,
) -> None:
    """Learn from rewards: many answers to a problem, the better ones made likelier."""
    from tiercel.train import rewards
    from tiercel.train.grpo import Rules, grpo

    if sum(source is not None for source in (problems, data, gym)) != 1:
        raise RequestError("say what to learn from: one of --problems, --data and --gym")
    held: list[rewards.Task] = []
    if problems is not None:
        names, of = [name.strip() for name in problems.split(",")], _whole_numbers("--sizes", sizes)
        tasks = rewards.problems(names, of, options.seed)
        held = rewards.held_out(names, of, tests)
    elif data is not None:
        tasks = rewards.questions(data, rewards.named(reward), options.seed)
    else:
        assert gym is not None
        tasks = rewards.gym(gym, options.seed)
    if held_out is not None:
        held = rewards.all_of(held_out, rewards.named(reward))
    settings = options.settings(out, steps=rounds, log_every=1)
    rules = Rules(prompts=prompts, answers=answers, max_tokens=most, updates=updates, tries=tries, seed=options.seed)
    found = grpo(config, tasks, settings, rules, tests=held, tokenizer=tokenizer, slots=slots)
    if "before" in found and not options.json:
        print(f"held-out problems: {found['before']:.1%} before, {found['after']:.1%} after")
    _report(found, options.json)


def _whole_numbers(option: str, text: str) -> list[int]:
    try:
        return [int(part) for part in text.split(",")]
    except ValueError:
        raise RequestError(f"{option}: whole numbers with commas between them, not {text!r}") from None


def _roles(loss_on: str) -> tuple[str, ...]:
    from tiercel.train.data import ROLES

    roles = tuple(role.strip() for role in loss_on.split(","))
    if unknown := [role for role in roles if role not in (*ROLES, "all")]:
        raise RequestError(f"--loss-on: no role {unknown[0]!r}; choose from {', '.join(ROLES)}, all")
    return roles


def _report(found: dict[str, Any], json: bool, then: str | None = None) -> None:
    from tiercel.train.parallel import ranks

    if not ranks().first:
        return
    if json:
        print_json(found)
        return
    held = "" if found["eval_loss"] is None else f", held out {found['eval_loss']:.4f}"
    speed = f"{found['tokens']:,} tokens in {found['seconds']:.0f} s"
    print(f"loss {found['loss']:.4f}{held} after {found['steps']} steps, {speed}")
    if found.get("left_out"):
        print(f"{found['left_out']} examples are longer than --length and were left out")
    print(f"written to {found['out']}: try  {then or 'tiercel run ' + str(found['out'])}")
