"""`tiercel train …`: options in, one of this folder's loops, what was reached out."""

from __future__ import annotations

from pathlib import Path
from typing import TYPE_CHECKING, Annotated, Any

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
Steps = Annotated[int | None, typer.Option(help="Steps of the optimizer.")]
Epochs = Annotated[float | None, typer.Option(help="Passes over the data, instead of steps.")]
Batch = Annotated[int, typer.Option(help="Rows of a micro-batch.")]
Accumulate = Annotated[int, typer.Option(help="Micro-batches of a step.")]
Length = Annotated[int, typer.Option(help="Tokens of a row.")]
Lr = Annotated[float, typer.Option(help="The highest learning rate.")]
Schedule = Annotated[str, typer.Option(help="cosine, wsd or constant.")]
Warmup = Annotated[int, typer.Option(help="Steps until the learning rate is reached.")]
WeightDecay = Annotated[float, typer.Option(help="Of matrices.")]
Clip = Annotated[float, typer.Option(help="Largest norm of the gradient.")]
SaveEvery = Annotated[int, typer.Option(help="Steps between checkpoints to resume from; 0: at the end.")]
EvalEvery = Annotated[int, typer.Option(help="Steps between evaluations; 0: at the end.")]
Seed = Annotated[int, typer.Option(help="Of fresh weights and of the order of the data.")]
Device = Annotated[str, typer.Option(help="cpu or cuda.")]
Dtype = Annotated[str, typer.Option(help="f32, or bf16 for products (weights stay float32).")]
Recompute = Annotated[bool, typer.Option("--recompute", help="Keep no activations of blocks: slower, less memory.")]
Compile = Annotated[bool, typer.Option("--compile", help="Let torch.compile make kernels of the blocks.")]
Resume = Annotated[bool, typer.Option("--resume", help="Go on from the last checkpoint in --out.")]
Quiet = Annotated[bool, typer.Option("--quiet", help="No progress bar.")]


@app.command()
def pretrain(
    data: Data,
    config: Config,
    out: Out,
    tokenizer: Tokenizer = None,
    held_out: HeldOut = None,
    steps: Steps = None,
    epochs: Epochs = None,
    batch: Batch = 8,
    accumulate: Accumulate = 1,
    length: Length = 512,
    lr: Lr = 1e-3,
    schedule: Schedule = "cosine",
    warmup: Warmup = 20,
    weight_decay: WeightDecay = 0.1,
    clip: Clip = 1.0,
    save_every: SaveEvery = 500,
    eval_every: EvalEvery = 0,
    seed: Seed = 0,
    device: Device = "cpu",
    dtype: Dtype = "f32",
    recompute: Recompute = False,
    compile: Compile = False,
    resume: Resume = False,
    quiet: Quiet = False,
    json: Json = False,
) -> None:
    """Learn every next token of documents."""
    from tiercel.train.pretrain import pretrain

    settings = _settings(steps, epochs, lr=lr, schedule=schedule, warmup=warmup, weight_decay=weight_decay, clip=clip,
        accumulate=accumulate, save_every=save_every, eval_every=eval_every, device=device, dtype=dtype,
        recompute=recompute, compile=compile, resume=resume, out=out, quiet=quiet or json)  # fmt: skip
    found = pretrain(config, data, settings, tokenizer=tokenizer, held_out=held_out, rows=batch, length=length,
                     epochs=epochs, seed=seed)  # fmt: skip
    _say(found, json)


@app.command()
def sft(
    data: Data,
    config: Config,
    out: Out,
    loss_on: Annotated[str, typer.Option(help="Roles that are learned, with commas; or all.")] = "assistant",
    tokenizer: Tokenizer = None,
    held_out: HeldOut = None,
    steps: Steps = None,
    epochs: Epochs = None,
    batch: Batch = 8,
    accumulate: Accumulate = 1,
    length: Length = 512,
    lr: Lr = 1e-4,
    schedule: Schedule = "cosine",
    warmup: Warmup = 20,
    weight_decay: WeightDecay = 0.0,
    clip: Clip = 1.0,
    save_every: SaveEvery = 500,
    eval_every: EvalEvery = 0,
    seed: Seed = 0,
    device: Device = "cpu",
    dtype: Dtype = "f32",
    recompute: Recompute = False,
    compile: Compile = False,
    resume: Resume = False,
    quiet: Quiet = False,
    json: Json = False,
) -> None:
    """Learn the answers of conversations."""
    from tiercel.train.sft import sft

    roles = _roles(loss_on)
    settings = _settings(steps, epochs, lr=lr, schedule=schedule, warmup=warmup, weight_decay=weight_decay, clip=clip,
        accumulate=accumulate, save_every=save_every, eval_every=eval_every, device=device, dtype=dtype,
        recompute=recompute, compile=compile, resume=resume, out=out, quiet=quiet or json)  # fmt: skip
    found = sft(config, data, settings, loss_on=roles, tokenizer=tokenizer, held_out=held_out, rows=batch,
                length=length, epochs=epochs, seed=seed)  # fmt: skip
    _say(found, json)


@app.command()
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
    steps: Steps = None,
    epochs: Epochs = None,
    batch: Batch = 1,
    accumulate: Accumulate = 8,
    length: Length = 512,
    lr: Lr = 2e-4,
    schedule: Schedule = "cosine",
    warmup: Warmup = 10,
    weight_decay: WeightDecay = 0.0,
    clip: Clip = 1.0,
    save_every: SaveEvery = 100,
    eval_every: EvalEvery = 0,
    seed: Seed = 0,
    device: Device = "cpu",
    recompute: Recompute = False,
    resume: Resume = False,
    quiet: Quiet = False,
    json: Json = False,
) -> None:
    """Learn the answers of conversations in an adapter (LoRA; with --quantize QLoRA)."""
    from tiercel.train.lora import lora

    roles = _roles(loss_on)
    wanted = tuple(word.strip() for word in targets.split(",") if word.strip())
    settings = _settings(steps, epochs, lr=lr, schedule=schedule, warmup=warmup, weight_decay=weight_decay, clip=clip,
        accumulate=accumulate, save_every=save_every, eval_every=eval_every, device=device, recompute=recompute,
        resume=resume, out=out, quiet=quiet or json)  # fmt: skip
    found = lora(model, data, settings, rank=rank, alpha=alpha, dropout=dropout, targets=wanted, quantize=quantize,
                 loss_on=roles, held_out=held_out, rows=batch, length=length, epochs=epochs, seed=seed)  # fmt: skip
    _say(found, json, f"tiercel merge {model} {out} merged.gguf, or tiercel serve {model} --adapter name={out}")


@app.command()
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
    tries: Annotated[int, typer.Option(help="Problems drawn in a round, at most so many times --prompts.")] = 3,
    slots: Annotated[int, typer.Option(help="Answers written at once.")] = 32,
    accumulate: Accumulate = 1,
    lr: Lr = 1e-5,
    schedule: Schedule = "constant",
    warmup: Annotated[int, typer.Option(help="Rounds until the learning rate is reached.")] = 2,
    weight_decay: WeightDecay = 0.0,
    clip: Clip = 1.0,
    save_every: Annotated[int, typer.Option(help="Rounds between checkpoints; 0: at the end.")] = 10,
    eval_every: Annotated[int, typer.Option(help="Rounds between evaluations; 0: at the end.")] = 10,
    seed: Annotated[int, typer.Option(help="Of the problems and the answers.")] = 0,
    dtype: Dtype = "f32",
    recompute: Recompute = False,
    resume: Resume = False,
    quiet: Quiet = False,
    json: Json = False,
) -> None:
    """Learn from rewards: many answers to a problem, the better ones made likelier."""
    from tiercel.train import rewards
    from tiercel.train.grpo import Rules, grpo
    from tiercel.train.loop import Settings

    if sum(source is not None for source in (problems, data, gym)) != 1:
        raise RequestError("say what to learn from: one of --problems, --data and --gym")
    held: list[rewards.Task] = []
    if problems is not None:
        names, of = [name.strip() for name in problems.split(",")], _whole_numbers("--sizes", sizes)
        tasks = rewards.problems(names, of, seed)
        held = rewards.held_out(names, of, tests)
    elif data is not None:
        tasks = rewards.questions(data, rewards.named(reward), seed)
    else:
        assert gym is not None
        tasks = rewards.gym(gym, seed)
    if held_out is not None:
        held = rewards.all_of(held_out, rewards.named(reward))
    settings = Settings(steps=rounds, lr=lr, schedule=schedule, warmup=warmup, weight_decay=weight_decay, clip=clip,
        accumulate=accumulate, save_every=save_every, eval_every=eval_every, log_every=1, dtype=dtype,
        recompute=recompute, resume=resume, out=out, quiet=quiet or json)  # fmt: skip
    rules = Rules(prompts=prompts, answers=answers, max_tokens=most, updates=updates, tries=tries, seed=seed)
    found = grpo(config, tasks, settings, rules, tests=held, tokenizer=tokenizer, slots=slots)
    if "before" in found and not json:
        print(f"held-out problems: {found['before']:.1%} before, {found['after']:.1%} after")
    _say(found, json)


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


def _settings(steps: int | None, epochs: float | None, **rest: Any) -> Settings:
    from tiercel.train.loop import Settings

    if (steps is None) == (epochs is None):
        raise RequestError("say how long: --steps or --epochs")
    return Settings(steps=1 if steps is None else steps, **rest)


def _say(found: dict[str, Any], json: bool, then: str | None = None) -> None:
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
