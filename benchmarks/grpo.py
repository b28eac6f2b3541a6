"""GRPO on two CPU cores: accuracy of the reasoner on held-out problems before and after, and what it cost.

    python benchmarks/grpo.py [--family counting] [--sizes 4] [--rounds 40] [--out RUN] [--json FILE]

Trains on problems of the training split alone (no seed or phrasing can bring one of the test set into it), tests
greedily on the disjoint test sets: the trained family at each of --sizes and at all that the reasoner was trained on,
and all other families at these, to see what was lost.  Same problems before and after.
"""

from __future__ import annotations

import argparse
import json
import platform
import time
from pathlib import Path
from typing import Any

import torch
from reasoner import score

import tiercel
from tiercel.problems import FAMILIES, LARGER_SIZE
from tiercel.train.grpo import Rules, grpo
from tiercel.train.log import read_log
from tiercel.train.loop import Settings
from tiercel.train.rewards import problems


def table(name: str | Path, args: argparse.Namespace) -> dict[str, dict[str, float]]:
    model = tiercel.load(name)
    family, sets = FAMILIES[args.family], {}
    for size in map(int, args.sizes.split(",")):
        which: dict[str, Any] = {"larger": True} if size == LARGER_SIZE else {"size": size}
        label = "larger" if size == LARGER_SIZE else f"size {size}"
        sets[f"{args.family}, {label}"] = family.test_set(args.each, seed=args.seed, **which)
    sets[f"{args.family}, trained sizes"] = family.test_set(args.each, seed=args.seed)
    others = [f for f in FAMILIES.values() if f is not family]
    sets |= {f.name: f.test_set(args.others, seed=args.seed) for f in others if args.others}
    return {label: score(model, found, args.most) for label, found in sets.items()}


def main() -> None:
    p = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    p.add_argument("--model", default="reasoner")
    p.add_argument("--family", default="counting")
    p.add_argument("--sizes", default=str(LARGER_SIZE), help="of the problems trained on; 4: the larger ones")
    p.add_argument("--rounds", type=int, default=40)
    p.add_argument("--prompts", type=int, default=16)
    p.add_argument("--answers", type=int, default=8)
    p.add_argument("--tries", type=int, default=2, help="so many times --prompts problems at most in a round")
    p.add_argument("--updates", type=int, default=2)
    p.add_argument("--lr", type=float, default=1e-4)
    p.add_argument("--most", type=int, default=160, help="tokens of an answer")
    p.add_argument("--each", type=int, default=300, help="test problems of the trained family")
    p.add_argument("--others", type=int, default=60, help="test problems of each other family; 0: none")
    p.add_argument("--seed", type=int, default=0)
    p.add_argument("--out", type=Path, default=Path("grpo-run"))
    p.add_argument("--json", type=Path)
    args = p.parse_args()
    before = table(args.model, args)
    sizes = [int(size) for size in args.sizes.split(",")]
    settings = Settings(steps=args.rounds, lr=args.lr, schedule="constant", warmup=2, weight_decay=0.0,
                        save_every=10, out=args.out, resume=True)  # fmt: skip
    rules = Rules(
        prompts=args.prompts,
        answers=args.answers,
        max_tokens=args.most,
        updates=args.updates,
        tries=args.tries,
        seed=args.seed,
    )
    cpu = time.process_time()
    found = grpo(args.model, problems([args.family], sizes, args.seed), settings, rules)
    cpu = time.process_time() - cpu
    after = table(args.out, args)
    steps = [line for line in read_log(args.out / "log.jsonl") if "loss" in line][:: args.updates]
    ends: dict[str, Any] = {
        key: [sum(line[key] for line in part) / len(part) for part in (steps[:5], steps[-5:])]
        for key in ("reward", "length", "signal")
    }
    print(f"{'greedy, held-out problems':<30} {'n':>4} {'before':>8} {'after':>8} {'points':>7}")
    for label, was in before.items():
        now = after[label]
        print(f"{label:<30} {was['n']:>4} {was['right']:>8.1%} {now['right']:>8.1%} "
              f"{100 * (now['right'] - was['right']):>+7.1f}")  # fmt: skip
    for key, (first, last) in ends.items():
        print(f"{key + ' of rollouts':<30}      {first:>8.3g} {last:>8.3g}")
    print(f"{args.rounds} rounds of {args.prompts} × {args.answers} answers, {found['tokens']:,} tokens trained on, "
          f"{found['seconds']:.0f} s ({cpu:.0f} s of CPU), {torch.get_num_threads()} threads, {platform.machine()}, "
          f"tiercel {tiercel.__version__}")  # fmt: skip
    if args.json:
        kept = {"before": before, "after": after, "rollouts": ends, "run": found, "cpu_seconds": cpu}
        args.json.write_text(json.dumps(kept | {"settings": vars(args)}, indent=1, default=str) + "\n")


if __name__ == "__main__":
    main()
