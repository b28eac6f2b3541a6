"""Accuracy of the reasoner by family: greedy, on problems no training saw, and on larger ones than it was trained on.

    python benchmarks/reasoner.py [MODEL] [--each 200] [--larger 100] [--json FILE]

The bars: three-digit addition and subtraction 95 %, two-digit multiplication 90 %, mean of the families 70 %.
Answers are made by the engine, many at a time; an answer that does not end within --most tokens is wrong.
"""

from __future__ import annotations

import argparse
import json
import sys
import time
from collections.abc import Iterable
from pathlib import Path
from typing import Any

import tiercel
from tiercel.problems import FAMILIES, Problem

BARS = {"3-digit addition": 0.95, "3-digit subtraction": 0.95, "2×2-digit multiplication": 0.90, "mean": 0.70}


def answers(model: Any, problems: Iterable[Problem], most: int = 512) -> list[tuple[str, int, bool]]:
    """(answer, tokens written, whether it ended) to every problem, greedy; `SLOTS` of them at once."""
    engine = model.engine
    greedy = tiercel.SamplingParams(temperature=0, max_tokens=most)
    requests = []
    for problem in problems:
        ids = model.encode([{"role": "user", "content": problem.question}])
        starts = model.tokenizer.opens_thinking(ids)
        requests.append(engine.prepare(ids, greedy, thinking="auto", starts_in_thinking=starts))
    for request in requests:
        engine.queue(request)
    found = []
    for request in requests:
        for _ in engine.run(request):
            pass
        if request.error is not None:
            raise request.error
        said = request.sequences[0]
        found.append((said.text, len(said.token_ids), said.finish_reason == "stop"))
    return found


def score(model: Any, problems: list[Problem], most: int = 512) -> dict[str, float]:
    """right: share of correct answers; ended: share that ended; tokens: mean length."""
    said = answers(model, problems, most)
    right = [ended and FAMILIES[p.family].correct(a, p) for p, (a, _, ended) in zip(problems, said, strict=True)]
    n = max(len(problems), 1)
    return {"n": len(problems), "right": sum(right) / n, "ended": sum(ended for *_, ended in said) / n,
            "tokens": sum(length for _, length, _ in said) / n}  # fmt: skip


def main() -> None:
    p = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    p.add_argument("model", nargs="?", default="reasoner")
    p.add_argument("--each", type=int, default=200, help="problems of a family, of trained sizes")
    p.add_argument("--larger", type=int, default=100, help="problems of a family beyond them")
    p.add_argument("--seed", type=int, default=0)
    p.add_argument("--most", type=int, default=512, help="tokens of an answer")
    p.add_argument("--json", type=Path)
    args = p.parse_args()
    model, began = tiercel.load(args.model), time.perf_counter()
    found: dict[str, dict[str, Any]] = {}
    print(f"{'family':<26} {'n':>4} {'right':>7} {'tokens':>7}   larger: {'n':>4} {'right':>7}   (what is larger)")
    for name, family in FAMILIES.items():
        trained = score(model, family.test_set(args.each, seed=args.seed), args.most)
        larger = score(model, family.test_set(args.larger, larger=True, seed=args.seed), args.most)
        found[name] = {"trained": trained, "larger": larger}
        print(f"{name:<26} {trained['n']:>4} {trained['right']:>7.1%} {trained['tokens']:>7.0f}           "
              f"{larger['n']:>4} {larger['right']:>7.1%}   ({family.sizes[3]})", flush=True)  # fmt: skip
    mean = {kind: sum(f[kind]["right"] for f in found.values()) / len(found) for kind in ("trained", "larger")}
    print(f"{'mean of families':<26}      {mean['trained']:>7.1%}                        {mean['larger']:>7.1%}")
    bars = {"mean": mean["trained"]}
    for label, name in (("3-digit addition", "addition"), ("3-digit subtraction", "subtraction"),
                        ("2×2-digit multiplication", "multiplication")):  # fmt: skip
        bars[label] = score(model, FAMILIES[name].test_set(args.each, seed=args.seed, size=3), args.most)["right"]
    missed = [label for label, least in BARS.items() if bars[label] < least]
    for label, least in BARS.items():
        print(f"bar: {label:<26} {bars[label]:.1%}, at least {least:.0%} asked{' — MISSED' if label in missed else ''}")
    print(f"{args.model}, tiercel {tiercel.__version__}, greedy, {time.perf_counter() - began:.0f} s")
    if args.json:
        args.json.write_text(json.dumps({"families": found, "mean": mean, "bars": bars}, indent=1) + "\n")
    sys.exit(bool(missed))


if __name__ == "__main__":
    main()
