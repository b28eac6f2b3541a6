"""Train the reasoner, with the loop of `tiercel train`: python training/reasoner/train.py OUT

    --tokens 90e6      each is seen once
    --minutes M        of this whole command: fewer tokens are taken where the machine cannot do them all in that time
    --device cuda --dtype bf16 --compile

OUT/data.npz              the training data, made once
OUT/plan.json             how many steps; checkpoints/, log.jsonl: the same command goes on from there
OUT/tests.jsonl           every few hundred steps: share of held-out problems written without a mistake, by family
OUT/model/                config.json and model.safetensors in bfloat16: what training/reasoner/install.py takes
"""

from __future__ import annotations

import argparse
import json
import math
import os
import sys
import time
from dataclasses import replace
from pathlib import Path

import torch

HERE = Path(__file__).parent
sys.path[:0] = [str(HERE), str(HERE.parents[1] / "src")]

import data  # noqa: E402

from tiercel.families.family import Layout  # noqa: E402
from tiercel.families.pattern import PATTERN, read_file  # noqa: E402
from tiercel.families.pattern import rows as table  # noqa: E402
from tiercel.model.decoder import Decoder  # noqa: E402
from tiercel.model.initialize import initialize  # noqa: E402
from tiercel.train.data import Batches, Documents, Rows, make_rows  # noqa: E402
from tiercel.train.loop import Settings, autocast, fit  # noqa: E402
from tiercel.weights.export import NetworkSource, export  # noqa: E402

LENGTH = 512
EXPORT_SECONDS = 20


def arguments() -> argparse.Namespace:
    cuda = torch.cuda.is_available()
    p = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    p.add_argument("out", type=Path)
    p.add_argument("--tokens", type=float, default=90e6)
    p.add_argument("--minutes", type=float, default=math.inf)
    p.add_argument("--rows", type=int, default=32, help="rows of 512 tokens in a step")
    p.add_argument("--at-once", type=int, default=32 if cuda else 4, help="of these, as many as go forward together")
    p.add_argument("--lr", type=float, default=2e-3)
    p.add_argument("--seed", type=int, default=0)
    p.add_argument("--device", default="cuda" if cuda else "cpu")
    p.add_argument("--dtype", default="bf16" if cuda else "f32", help="f32, or bf16 for products")
    p.add_argument("--compile", action="store_true")
    p.add_argument("--test-every", type=int, default=500, help="steps")
    p.add_argument("--config", type=Path, default=HERE / "config.toml")
    args = p.parse_args()
    args.at_once = min(args.at_once, args.rows)
    if args.rows % args.at_once:
        p.error(f"--rows {args.rows} is no multiple of --at-once {args.at_once}")
    return args


def training_data(args: argparse.Namespace) -> Documents:
    path = args.out / "data.npz"
    if not path.exists():
        began = time.perf_counter()
        made = data.documents(args.seed, int(args.tokens), os.cpu_count() or 1)
        data.save(made, path)
        print(f"{len(made)} conversations, {len(made.tokens)} tokens, {int(made.mask.sum())} of them learned, "
              f"made in {time.perf_counter() - began:.0f} s", flush=True)  # fmt: skip
    return data.load(path)


def plan(args: argparse.Namespace, network: Decoder, batches: Batches, settings: Settings, began: float) -> int:
    """Steps: one pass, or what the time allows, measured on this machine; decided once."""
    path = args.out / "plan.json"
    if path.exists():
        return int(json.loads(path.read_text())["steps"])
    steps, seconds = batches.per_epoch // settings.accumulate, None
    if args.minutes < math.inf:
        # a rate so small that no weight moves: what is compiled stays compiled
        idle = replace(settings, lr=1e-30, warmup=0, out=None, weight_decay=0.0)
        fit(network, batches, replace(idle, steps=5))
        at = time.perf_counter()
        fit(network, batches, replace(idle, steps=20))
        seconds = (time.perf_counter() - at) / 20
        left = args.minutes * 60 - (time.perf_counter() - began) - EXPORT_SECONDS
        steps = max(1, min(steps, int(0.93 * left / seconds)))
        batches.position = (0, 0)
    path.write_text(json.dumps({"steps": steps, "seconds_a_step": seconds}) + "\n")
    return steps


class Tests:
    """Share of held-out problems in which every token, reasoning included, is the likeliest: greedy writes the same."""

    def __init__(self, args: argparse.Namespace, settings: Settings) -> None:
        self.args, self.settings, self.path = args, settings, args.out / "tests.jsonl"
        self.rows: dict[str, Rows] = {}
        for name, documents in data.tests(2 * args.rows):
            longest = max(documents.starts[1:] - documents.starts[:-1])
            self.rows[name] = make_rows(documents, [[i] for i in range(len(documents))], int(longest))

    @torch.no_grad()
    def __call__(self, step: int, network: Decoder) -> None:
        if step % self.args.test_every and step != self.settings.steps:
            return
        shares = {}
        for name, made in self.rows.items():
            rows = made.to(self.settings.device)
            with autocast(self.settings):
                x_TD = network.hidden_states(rows.tokens_BL, rows.batch)[rows.counted_T]
                wrong = network.head(x_TD).argmax(-1) != rows.targets_T
            row = rows.counted_T // rows.tokens_BL.shape[1]
            bad = torch.zeros(len(rows.tokens_BL), device=row.device).index_add_(0, row, wrong.float())
            shares[name] = round((bad == 0).float().mean().item(), 3)
        text = json.dumps({"step": step, "mean": round(sum(shares.values()) / len(shares), 3), "right": shares})
        print(text, flush=True)
        with self.path.open("a") as file:
            file.write(text + "\n")


def main() -> None:
    began, args = time.perf_counter(), arguments()
    args.out.mkdir(parents=True, exist_ok=True)
    documents = training_data(args)
    network = Decoder(read_file(args.config))
    initialize(network, args.seed)
    batches = Batches(documents, rows=args.at_once, length=LENGTH, seed=args.seed)
    settings = Settings(
        steps=1, lr=args.lr, schedule="cosine", warmup=200, floor=0.01, weight_decay=0.05, betas=(0.9, 0.98),
        device=args.device, dtype=args.dtype, compile=args.compile, save_every=500, out=args.out, resume=True,
        quiet=not sys.stderr.isatty(), accumulate=args.rows // args.at_once,
    )  # fmt: skip
    steps = plan(args, network, batches, settings, began)
    settings = replace(settings, steps=steps, warmup=min(200, max(1, steps // 10)))
    print(f"{sum(p.numel() for p in network.parameters()) / 1e6:.2f} M parameters, {steps} of "
          f"{batches.per_epoch // settings.accumulate} steps of {args.rows * LENGTH} tokens, "
          f"{time.perf_counter() - began:.0f} s so far", flush=True)  # fmt: skip
    tests = Tests(args, settings)

    def on_step(step: int, network: Decoder) -> None:
        if step % 100 == 0:
            print(f"step {step} after {time.perf_counter() - began:.0f} s", flush=True)
        tests(step, network)

    result = fit(network, batches, settings, on_step=on_step)
    network.eval().to("cpu").requires_grad_(False)
    export(NetworkSource(network, Layout(PATTERN, network.config, tuple(table(network.config)))), args.out / "model",
           dtype="bf16")  # fmt: skip
    speed = result.tokens / max(result.seconds, 1e-9)
    print(f"loss {result.loss:.4f} after {result.step} steps, {result.tokens / 1e6:.1f} M tokens in "
          f"{result.seconds:.0f} s ({speed:,.0f} tokens/s); {args.out / 'model'}", flush=True)  # fmt: skip


if __name__ == "__main__":
    main()
