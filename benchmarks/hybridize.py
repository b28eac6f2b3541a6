"""The reasoner as a 3 : 1 hybrid, made on this machine by `tiercel hybridize`: what it keeps of its accuracy.

    python benchmarks/hybridize.py OUT [--each 20] [--steps 70] [--sft-steps 60] [--keep 1/4]

Six of its eight attention mixers become a gated delta rule, beside the Mamba-2 that every layer has.  It learns from
conversations of `tiercel.problems`, none of which is in a test set; killed, the same command goes on.  Accuracy is that
of benchmarks/reasoner.py, greedy, on held-out problems of trained sizes.
"""

from __future__ import annotations

import argparse
import json
import resource
import sys
import time
from fractions import Fraction
from pathlib import Path
from typing import Any

HERE = Path(__file__).resolve().parent
sys.path[:0] = [str(HERE), str(HERE.parent / "training" / "reasoner")]

import data  # noqa: E402
from reasoner import score  # noqa: E402

import tiercel  # noqa: E402
from tiercel.problems import FAMILIES  # noqa: E402
from tiercel.train.hybrid_report import Checks  # noqa: E402
from tiercel.train.hybridize import Conversion, hybridize  # noqa: E402
from tiercel.train.loop import Settings  # noqa: E402

LENGTH, TOKENS = 256, 614_400  # of a row; of the data


def learned(path: Path, seed: int, tokens: int) -> None:
    """Conversations as tokens, the answers learned; the template's work is done here once."""
    if path.exists():
        return
    made = data.documents(seed, tokens)
    spans = zip(made.starts[:-1], made.starts[1:], strict=True)
    lines = [json.dumps({"tokens": made.tokens[a:b].tolist(), "mask": made.mask[a:b].tolist()}) for a, b in spans]
    path.write_text("\n".join(lines) + "\n")


def accuracy(model: Any, each: int) -> dict[str, float]:
    """Share of right answers by family, and their mean."""
    loaded = tiercel.load(model)
    found = {name: score(loaded, family.test_set(each))["right"] for name, family in FAMILIES.items()}
    return found | {"mean": sum(found.values()) / len(found)}


def main() -> None:
    p = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    p.add_argument("out", type=Path)
    p.add_argument("--each", type=int, default=20, help="problems of a family")
    p.add_argument("--rows", type=int, default=8, help=f"rows of {LENGTH} tokens in a step")
    p.add_argument("--match-steps", type=int, default=50)
    p.add_argument("--steps", type=int, default=70)
    p.add_argument("--sft-steps", type=int, default=60, help="on the same conversations; 0: none")
    p.add_argument("--lr", type=float, default=3e-4, help="of these two")
    p.add_argument("--keep", type=Fraction, default=Fraction(1, 4))
    p.add_argument("--mixer", default="gated_delta")
    p.add_argument("--seed", type=int, default=7)
    p.add_argument("--json", type=Path)
    args = p.parse_args()
    args.out.mkdir(parents=True, exist_ok=True)
    file = args.out / "learn.jsonl"
    learned(file, args.seed, TOKENS)
    began = time.perf_counter()
    settings = Settings(steps=args.steps, lr=args.lr, warmup=20, weight_decay=0.0, save_every=25, resume=True,
                        out=args.out / "hybrid", quiet=not sys.stderr.isatty())  # fmt: skip
    conversion = Conversion(args.keep, args.mixer, match_steps=args.match_steps, rows=args.rows, length=LENGTH,
                            calibration=4, sft_steps=max(1, args.sft_steps), sft_lr=args.lr)  # fmt: skip
    checks = Checks(needles=(256, 512), contexts=(512, 2048), tasks=())
    made = hybridize("reasoner", [file], settings, conversion, sft=file if args.sft_steps else None, checks=checks)
    seconds = time.perf_counter() - began
    cpu = resource.getrusage(resource.RUSAGE_SELF)
    before, after = accuracy("reasoner", args.each), accuracy(args.out / "hybrid", args.each)
    print(f"| family ({args.each} problems each) | reasoner | hybrid |\n|---|---:|---:|")
    for name in before:
        print(f"| {name} | {before[name]:.1%} | {after[name]:.1%} |")
    print(f"\nkept {after['mean'] / before['mean']:.1%} of its accuracy, attention in layers {made['kept']}")
    print(f"{seconds:.0f} s by the clock, {cpu.ru_utime + cpu.ru_stime:.0f} s of CPU time in this process")
    if args.json:
        found = {"accuracy": {"before": before, "after": after}, "report": made}
        args.json.write_text(json.dumps(found, indent=1) + "\n")


if __name__ == "__main__":
    main()
