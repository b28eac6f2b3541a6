"""Accuracy against tokens spent: one answer, majority, each weighting, filters, early stop.

    python benchmarks/votes.py                                  the reasoner where it is here, else SmolLM2; minutes
    python benchmarks/votes.py --problems 4 --pool 20 --k 4,16  a quick look
    python benchmarks/votes.py --traces votes.jsonl             the same traces again, without the model

Each problem is answered --pool times in full, in one vote of the engine, so that its prompt is read once.  Votes of K
are then drawn from these traces (voting/pool.py): every method sees the same draws.  The problems are additions,
subtractions and multiplications of small whole numbers from a seed; an answer counts when the number is right.
Prints a table, and writes docs/votes.svg and docs/votes.json (--out).
"""

from __future__ import annotations

import argparse
import json
import os
import platform
import random
import time
from dataclasses import asdict
from pathlib import Path

import tiercel
from tiercel.errors import ModelNotFound
from tiercel.voting import Trace, VoteSettings
from tiercel.voting.answers import normal
from tiercel.voting.pool import Point, Stored, curve

SHOWN = [  # for a model that was not taught to think: how to go about it
    ("What is 34 + 25?", "30 + 20 = 50, 4 + 5 = 9, 50 + 9 = 59. The answer is 59."),
    ("What is 6 times 7?", "6 times 7 = 42. The answer is 42."),
]


def problems(count: int, seed: int) -> list[tuple[str, str]]:
    """(question, answer)"""
    rng, made = random.Random(seed), []
    for i in range(count):
        kind, a, b = i % 3, rng.randint(3, 19), rng.randint(3, 12)
        if kind == 0:
            made.append((f"What is {a} + {b}?", str(a + b)))
        elif kind == 1:
            made.append((f"What is {a + b} - {b}?", str(a)))
        else:
            b = rng.randint(2, 9)
            made.append((f"What is {a % 12 + 2} times {b}?", str((a % 12 + 2) * b)))
    return made


def load(name: str | None) -> tiercel.Model:
    if name is not None:
        return tiercel.load(name)
    try:
        return tiercel.load("reasoner")
    except ModelNotFound:
        return tiercel.load("smollm2")


def make(args: argparse.Namespace) -> dict:
    """The traces of all problems, as they are stored."""
    model = load(args.model)
    defaults = {"temperature": 0.6, "top_p": 0.95}  # DeepConf's own
    began, done = time.perf_counter(), []
    for question, answer in problems(args.problems, args.seed):
        params = tiercel.SamplingParams(max_tokens=args.max_tokens, seed=args.seed, **defaults)
        shown = [] if "reasoner" in model.name else SHOWN
        messages = [turn for q, a in shown for turn in ({"role": "user", "content": q},
                                                        {"role": "assistant", "content": a})]  # fmt: skip
        messages.append({"role": "user", "content": question})
        vote = model.vote(messages, VoteSettings(k=args.pool, window=args.window), params)
        traces = [
            {"answer": t.answer, "tokens": t.tokens, "finish_reason": t.finish_reason,
             "confidence": [round(c, 4) for c in t.token_confidence]} for t in vote.traces
        ]  # fmt: skip
        done.append({"question": question, "gold": answer, "prompt_tokens": vote.prompt_tokens, "traces": traces})
        right = sum(trace["answer"] == normal(answer) for trace in traces)
        print(f"{len(done)}/{args.problems}  {question}  {right} of {args.pool} right", flush=True)
    head = {"model": model.name, "tiercel": tiercel.__version__, "machine": platform.processor() or platform.machine(),
            "cores": os.cpu_count(), "date": time.strftime("%Y-%m-%d"), "seconds": time.perf_counter() - began,
            "max_tokens": args.max_tokens, "seed": args.seed, "sampling": defaults}  # fmt: skip
    return {"head": head, "problems": done}


def wanted(ks: list[int], window: int) -> dict[str, list[VoteSettings]]:
    """The lines of the plot, by name."""
    lines: dict[str, list[VoteSettings]] = {"majority": [VoteSettings(k=k, window=window) for k in ks]}
    for weight in ("mean", "lowest", "bottom", "tail"):
        lines[f"weighted by {weight}"] = [VoteSettings(k, "weighted", weight=weight, window=window) for k in ks]
    for name in ("filtered-low", "filtered-high"):
        lines[name] = [VoteSettings(k, name, window=window) for k in ks]
    for name in ("deepconf-low", "deepconf-high"):
        lines[f"{name}, stop"] = [VoteSettings(k, name, window=window, consensus=0) for k in ks]
        lines[f"{name}, stop and consensus"] = [VoteSettings(k, name, window=window) for k in ks]
    return lines


def plot(curves: dict[str, list[Point]], one: float, title: str, out: Path) -> None:
    import matplotlib

    matplotlib.use("svg")
    import matplotlib.pyplot as plt

    figure, axes = plt.subplots(figsize=(8, 5))
    for name, points in curves.items():
        style = "-o" if name == "majority" else "--s" if name.startswith("deepconf") else ":^"
        axes.plot([p.tokens for p in points], [100 * p.accuracy for p in points], style, label=name, markersize=4)
    axes.axhline(100 * one, color="grey", linewidth=0.8)
    axes.annotate("one answer", (0.01, 100 * one), xycoords=("axes fraction", "data"), va="bottom", color="grey")
    axes.set(xlabel="tokens per problem", ylabel="right answers, %", xscale="log", title=title)
    axes.legend(fontsize=7)
    figure.tight_layout()
    figure.savefig(out)


def main() -> None:
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("--model")
    parser.add_argument("--problems", type=int, default=12)
    parser.add_argument("--pool", type=int, default=80, help="traces of each problem")
    parser.add_argument("--k", default="16,64")
    parser.add_argument(
        "--window", type=int, default=16, help="tokens of a group; DeepConf's 2048 is for long thoughts"
    )
    parser.add_argument("--max-tokens", type=int, default=64)
    parser.add_argument("--rounds", type=int, default=100)
    parser.add_argument("--seed", type=int, default=0)
    parser.add_argument("--traces", type=Path, help="where the traces are, or will be")
    parser.add_argument("--out", type=Path, default=Path(__file__).parent.parent / "docs" / "votes")
    args = parser.parse_args()

    if args.traces is not None and args.traces.exists():
        made = json.loads(args.traces.read_text())
    else:
        made = make(args)
        if args.traces is not None:
            args.traces.write_text(json.dumps(made))
    golds = [normal(problem["gold"]) for problem in made["problems"]]
    pools = [
        [Stored(Trace(0, tokens=t["tokens"], finish_reason=t["finish_reason"], answer=t["answer"],
                      token_confidence=t["confidence"])) for t in problem["traces"]] for problem in made["problems"]
    ]  # fmt: skip
    head, ks = made["head"], [int(k) for k in args.k.split(",")]
    every = [(golds[i], stored.trace) for i, pool in enumerate(pools) for stored in pool]
    one = sum(trace.answer == gold for gold, trace in every) / len(every)
    cut = sum(trace.finish_reason != "stop" for _, trace in every) / len(every)
    print(f"{head['model']}, {len(pools)} problems, {len(pools[0])} traces each, window {args.window}; "
          f"{head['machine']}, {head['cores']} cores, {head['date']}, {head['seconds']:.0f} s")  # fmt: skip
    print(f"one answer: {100 * one:.1f} % right; {100 * cut:.1f} % were cut at {head['max_tokens']} tokens\n")
    print(f"{'method':34} {'K':>3} {'right':>7} {'95 %':>15} {'tokens':>8} {'answers':>8}")
    curves = {}
    for name, settings in wanted(ks, args.window).items():
        curves[name] = curve(pools, settings, lambda i, answer: answer == golds[i], rounds=args.rounds)
        for point in curves[name]:
            between = f"{100 * point.low:.1f} – {100 * point.high:.1f}"
            print(f"{name:34} {point.settings.k:3} {100 * point.accuracy:6.1f}% {between:>15} {point.tokens:8.0f} "
                  f"{point.traces:8.1f}")  # fmt: skip
    title = f"{head['model']}: votes of {args.k.replace(',', ', ')} answers, {len(pools)} arithmetic problems"
    plot(curves, one, title, args.out.with_suffix(".svg"))
    points = {name: [asdict(point) for point in points] for name, points in curves.items()}
    args.out.with_suffix(".json").write_text(json.dumps({"head": head, "one": one, "curves": points}, indent=1) + "\n")


if __name__ == "__main__":
    main()
