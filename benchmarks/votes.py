"""Accuracy against tokens spent: one answer, majority, each weighting, filters, early stop.

    python benchmarks/votes.py                              the reasoner: half an hour on two cores
    python benchmarks/votes.py --each 1 --larger 1 --pool 20 --k 4,16     a quick look
    python benchmarks/votes.py --traces FILE                the same traces again, without the model

Problems are `tiercel.problems`' held-out ones, of the sizes that the reasoner was trained on (--each of a family, at
temperature 0.6 and at 1.5) and larger (--larger of a family); the families' own checkers say what is right.  Each is
answered --pool times in full, in one vote of the engine, so that its prompt is read once; votes of K are then drawn
from these traces (voting/pool.py), and every method sees the same draws.  Each problem is a line of --traces as soon
as it is done: started again, the script goes on.  Prints the tables, and writes docs/assets/votes.svg and votes.json.
"""

from __future__ import annotations

import argparse
import functools
import json
import tempfile
import time
from dataclasses import asdict
from pathlib import Path
from typing import Any

import tiercel
from tiercel.commands.doctor import cpu_name
from tiercel.problems import FAMILIES, Problem
from tiercel.voting import Trace, VoteSettings
from tiercel.voting.answers import normal
from tiercel.voting.pool import Stored, curve

CAREFUL = {"temperature": 0.6, "top_p": 0.95}  # DeepConf's own
HOT = {"temperature": 1.5, "top_p": 1.0}  # at which the reasoner slips now and then
SETS: dict[str, tuple[bool, dict[str, float]]] = {  # larger than trained? and how traces are drawn
    "trained sizes": (False, CAREFUL),
    "trained sizes, temperature 1.5": (False, HOT),
    "larger sizes": (True, CAREFUL),
}


def problems(each: int, larger: int) -> dict[str, list[Problem]]:
    """By set."""
    return {
        name: [p for f in FAMILIES.values() for p in f.test_set(larger if is_larger else each, larger=is_larger)]
        for name, (is_larger, _) in SETS.items()
    }


def make(args: argparse.Namespace) -> None:
    """Answer what is not in the file of traces yet."""
    args.traces.touch()
    rows = map(json.loads, args.traces.read_text().splitlines())
    done = {(row["set"], row["question"]) for row in rows}
    asked = problems(args.each, args.larger)
    left = [(name, p) for name, part in asked.items() for p in part if (name, p.question) not in done]
    if not left:
        return
    model = tiercel.load(args.model)
    for number, (name, problem) in enumerate(left, 1):
        began = time.perf_counter()
        params = tiercel.SamplingParams(max_tokens=args.max_tokens, seed=args.seed, **SETS[name][1])
        messages = [{"role": "user", "content": problem.question}]
        settings = VoteSettings(k=args.pool, window=args.window)
        vote = model.vote(messages, settings, params, answer=lambda text: normal(text))
        traces = [{"answer": t.answer, "tokens": t.tokens, "finish_reason": t.finish_reason,
                   "confidence": [round(c, 4) for c in t.token_confidence]} for t in vote.traces]  # fmt: skip
        with args.traces.open("a") as file:
            file.write(json.dumps({"question": problem.question, "set": name, "traces": traces}) + "\n")
        right = sum(t.answer is not None and FAMILIES[problem.family].correct(t.answer, problem) for t in vote.traces)
        print(f"{number}/{len(left)}  {name}, {problem.family}: {right} of {args.pool} right, {vote.tokens} tokens, "
              f"{time.perf_counter() - began:.1f} s", flush=True)  # fmt: skip


def read(args: argparse.Namespace, name: str, part: list[Problem]) -> list[list[Stored]]:
    """The traces of each problem of a set."""
    rows = map(json.loads, args.traces.read_text().splitlines())
    lines = {row["question"]: row["traces"] for row in rows if row["set"] == name}
    return [
        [Stored(Trace(0, tokens=t["tokens"], finish_reason=t["finish_reason"], answer=t["answer"],
                      token_confidence=t["confidence"])) for t in lines[problem.question]] for problem in part
    ]  # fmt: skip


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


def counted(args: argparse.Namespace, name: str, part: list[Problem]) -> dict[str, Any]:
    """one: a single answer's share of right ones, tokens and cut ones · curves: by method."""
    pools = read(args, name, part)

    @functools.cache
    def correct(number: int, answer: str | None) -> bool:
        problem = part[number]
        return answer is not None and FAMILIES[problem.family].correct(answer, problem)

    every = [(i, stored.trace) for i, pool in enumerate(pools) for stored in pool]
    one = {"accuracy": sum(correct(i, trace.answer) for i, trace in every) / len(every),
           "tokens": sum(trace.tokens for _, trace in every) / len(every),
           "cut": sum(trace.finish_reason != "stop" for _, trace in every) / len(every),
           "any": sum(any(correct(i, s.trace.answer) for s in pool) for i, pool in enumerate(pools)) / len(pools),
           "problems": len(part)}  # fmt: skip
    curves = {name: curve(pools, settings, correct, rounds=args.rounds)
              for name, settings in wanted([int(k) for k in args.k.split(",")], args.window).items()}  # fmt: skip
    return {"one": one, "curves": curves}


def table(name: str, found: dict[str, Any], pool: int) -> str:
    """Markdown; saved: against the majority of as many."""
    one, curves = found["one"], found["curves"]
    out = [
        f"{name}: {one['problems']} problems; a single answer is right in {one['accuracy']:.1%}, takes "
        f"{one['tokens']:.0f} tokens, {one['cut']:.1%} were cut; some of {pool} is right in {one['any']:.1%}",
        "", "| method | K | right | 95 % | tokens | saved | answers begun |", "|---|---:|---:|---:|---:|---:|---:|",
    ]  # fmt: skip
    for method, points in curves.items():
        for point, plain in zip(points, curves["majority"], strict=True):
            saved = f"{1 - point.tokens / plain.tokens:.0%}" if point.tokens != plain.tokens else ""
            out.append(f"| {method} | {point.settings.k} | {point.accuracy:.1%} | {point.low:.1%} – {point.high:.1%} "
                       f"| {point.tokens:,.0f} | {saved} | {point.traces:.1f} |")  # fmt: skip
    return "\n".join([*out, ""])


STYLES = {  # a colour for each kind, lighter where it spends more for the same
    "majority": ("black", "-", "o"),
    "weighted by mean": ("#9ecae1", ":", "^"), "weighted by lowest": ("#2171b5", ":", "^"),
    "weighted by bottom": ("#4292c6", ":", "v"), "weighted by tail": ("#084594", ":", "v"),
    "filtered-low": ("#74c476", ":", "D"), "filtered-high": ("#006d2c", ":", "D"),
    "deepconf-low, stop": ("#fdae6b", "--", "s"), "deepconf-low, stop and consensus": ("#e6550d", "--", "s"),
    "deepconf-high, stop": ("#bcbddc", "--", "s"), "deepconf-high, stop and consensus": ("#54278f", "--", "s"),
}  # fmt: skip
SPAN = 12  # points of the axis at least, so that what is within the noise does not look like more


def plot(sets: dict[str, Any], title: str, out: Path) -> None:
    import matplotlib

    matplotlib.use("svg")
    import matplotlib.pyplot as plt

    figure, panels = plt.subplots(1, len(sets), figsize=(13, 4.4))
    for axes, (name, found) in zip(panels, sets.items(), strict=True):
        one = found["one"]
        shares = [100 * one["accuracy"]]
        for method, points in found["curves"].items():
            colour, line, marker = STYLES[method]
            x, y = [p.tokens for p in points], [100 * p.accuracy for p in points]
            shares += y
            axes.plot(x, y, color=colour, linestyle=line, marker=marker, label=method, markersize=4)
        axes.plot(one["tokens"], shares[0], "*", color="crimson", markersize=11, label="one answer")
        middle, half = (min(shares) + max(shares)) / 2, max(max(shares) - min(shares), SPAN) / 2 + 1
        axes.set_ylim(max(middle - half, 0), min(middle + half, 100.5))
        axes.set(xlabel="tokens per problem", xscale="log")
        axes.set_title(name.replace(", ", ",\n") + f" ({one['problems']} problems)", fontsize=10)
        ticks = [50, 100, 200, 500, 1000, 2000, 5000]
        axes.set_xticks(ticks, [f"{tick:,}" for tick in ticks], fontsize=8)
        axes.minorticks_off()
    panels[0].set_ylabel("right, %")
    figure.suptitle(title, fontsize=11)
    figure.tight_layout(rect=(0, 0, 0.8, 1))
    figure.legend(*panels[0].get_legend_handles_labels(), loc="center left", bbox_to_anchor=(0.8, 0.5), fontsize=8)
    figure.savefig(out)


def main() -> None:
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("--model", default="reasoner")
    parser.add_argument("--each", type=int, default=2, help="problems of a family, of trained sizes")
    parser.add_argument("--larger", type=int, default=4, help="problems of a family beyond them")
    parser.add_argument("--pool", type=int, default=80, help="traces of each problem")
    parser.add_argument("--k", default="4,16,64")
    parser.add_argument(
        "--window", type=int, default=16, help="tokens of a group; DeepConf's 2048 is for long reasoning"
    )
    parser.add_argument("--max-tokens", type=int, default=512)
    parser.add_argument("--rounds", type=int, default=30)
    parser.add_argument("--seed", type=int, default=0)
    parser.add_argument("--traces", type=Path, default=Path(tempfile.gettempdir()) / "tiercel-votes.jsonl")
    parser.add_argument("--out", type=Path, default=Path(__file__).parent.parent / "docs" / "assets" / "votes")
    args = parser.parse_args()
    make(args)
    sets = {name: counted(args, name, part) for name, part in problems(args.each, args.larger).items() if part}
    title = f"{args.model}: votes of {args.k.replace(',', ', ')} answers"
    head = {"model": args.model, "tiercel": tiercel.__version__, "machine": cpu_name(),
            "date": time.strftime("%Y-%m-%d"), "pool": args.pool, "window": args.window,
            "max_tokens": args.max_tokens, "seed": args.seed, "rounds": args.rounds}  # fmt: skip
    print(", ".join(f"{name} {value}" for name, value in head.items()), end="\n\n")
    for name, found in sets.items():
        print(table(name, found, args.pool))
    plot(sets, title, args.out.with_suffix(".svg"))
    plain = {
        name: {"one": found["one"], "curves": {m: [asdict(p) for p in points] for m, points in found["curves"].items()}}
        for name, found in sets.items()
    }
    args.out.with_suffix(".json").write_text(json.dumps({"head": head, "sets": plain}, indent=1) + "\n")


if __name__ == "__main__":
    main()
