"""Train the reasoner: python training/reasoner/train.py OUT [--tokens 90e6] [--minutes M] [--device cuda]

OUT/rows.npy          the packed training rows, made once
OUT/checkpoint.safetensors, log.jsonl       rewritten and added to while it runs; the same command goes on from there
OUT/model/            config.json and model.safetensors in bfloat16: what training/reasoner/install.py takes

Ends when all rows were seen once, or near the end of the time that was given (the learning rate follows whichever
comes first).  Every rate is for one pass: nothing is seen twice.
"""

from __future__ import annotations

import argparse
import json
import math
import os
import random
import sys
import time
from pathlib import Path

import numpy as np
import torch
import torch.nn.functional as F
from safetensors.torch import load_file, save_file

HERE = Path(__file__).parent
sys.path[:0] = [str(HERE), str(HERE.parents[1] / "src")]

import data  # noqa: E402
import packed  # noqa: E402

from tiercel.families.family import Layout  # noqa: E402
from tiercel.families.pattern import PATTERN, read_file  # noqa: E402
from tiercel.families.pattern import rows as table  # noqa: E402
from tiercel.model.decoder import Decoder  # noqa: E402
from tiercel.model.layers import initialize  # noqa: E402
from tiercel.problems import FAMILIES  # noqa: E402
from tiercel.weights.load import NetworkSource, export  # noqa: E402


def arguments() -> argparse.Namespace:
    p = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    p.add_argument("out", type=Path)
    p.add_argument("--tokens", type=float, default=90e6)
    p.add_argument("--minutes", type=float, default=math.inf, help="of this whole command, data included")
    p.add_argument("--rows", type=int, default=32, help="rows of 512 tokens in a step")
    p.add_argument("--rate", type=float, default=2e-3)
    p.add_argument("--seed", type=int, default=0)
    p.add_argument("--device", default="cuda" if torch.cuda.is_available() else "cpu")
    p.add_argument("--no-compile", action="store_true")
    p.add_argument("--config", type=Path, default=HERE / "config.toml")
    return p.parse_args()


def training_rows(args: argparse.Namespace, count: int) -> np.ndarray:
    path = args.out / "rows.npy"
    if not path.exists():
        began = time.perf_counter()
        made = data.rows(args.seed, count, os.cpu_count() or 1)
        np.save(path.with_suffix(".part.npy"), made)
        path.with_suffix(".part.npy").replace(path)
        print(f"{count} rows made in {time.perf_counter() - began:.0f} s", flush=True)
    return np.load(path, mmap_mode="r")[:count]


class Run:
    """The network, its optimizer, and the forward of a batch."""

    def __init__(self, args: argparse.Namespace) -> None:
        self.args, self.device = args, torch.device(args.device)
        network = Decoder(read_file(args.config))
        initialize(network, args.seed)
        self.network = network.to(self.device)
        named = list(network.named_parameters())
        matrices = [p for name, p in named if p.dim() == 2 and "conv" not in name]
        others = [p for name, p in named if not (p.dim() == 2 and "conv" not in name)]
        groups = [{"params": matrices, "weight_decay": 0.05}, {"params": others, "weight_decay": 0.0}]
        self.optimizer = torch.optim.AdamW(groups, lr=args.rate, betas=(0.9, 0.98), fused=self.device.type == "cuda")
        self.step, self.seconds = 0, 0.0
        self.forward = self._losses
        if self.device.type == "cuda":
            torch.set_float32_matmul_precision("high")
            if not args.no_compile:
                self.forward = torch.compile(self._losses, dynamic=False)

    def _losses(self, rows_BL: torch.Tensor) -> tuple[torch.Tensor, torch.Tensor]:
        """Cross-entropy summed over the learned tokens and their number, and whether each token is right (B, L − 1)."""
        ids, learn = rows_BL & data.ID, (rows_BL[:, 1:] & data.LEARN) > 0
        x = packed.hidden(self.network, ids, (rows_BL & data.START) > 0)
        logits = F.linear(x[:, :-1], self.network.embed.weight).float()
        loss = F.cross_entropy(logits.flatten(0, 1), ids[:, 1:].flatten(), reduction="none").view_as(learn)
        return (loss * learn).sum() / learn.sum().clamp(min=1), (logits.argmax(-1) == ids[:, 1:]) | ~learn

    def losses(self, rows: np.ndarray) -> tuple[torch.Tensor, torch.Tensor]:
        batch = torch.from_numpy(rows.astype(np.int64)).to(self.device)
        forward = self.forward if torch.is_grad_enabled() else self._losses  # tests are not worth a compilation
        with torch.autocast(self.device.type, torch.bfloat16, enabled=self.device.type == "cuda"):
            return forward(batch)

    def learn(self, rows: np.ndarray, rate: float) -> torch.Tensor:
        """One step; the loss stays on the device, since reading it would wait for it."""
        for group in self.optimizer.param_groups:
            group["lr"] = rate
        try:
            loss, _ = self.losses(rows)
        except Exception as error:
            if self.forward == self._losses:
                raise
            print(f"not compiled: {str(error)[:300]}", flush=True)
            self.forward = self._losses
            loss, _ = self.losses(rows)
        self.optimizer.zero_grad(set_to_none=True)
        loss.backward()
        torch.nn.utils.clip_grad_norm_(self.network.parameters(), 1.0)
        self.optimizer.step()
        self.step += 1
        return loss.detach()

    # a checkpoint is whole or the one before it

    def save(self, path: Path) -> None:
        tensors = {f"weight.{name}": p.detach() for name, p in self.network.named_parameters()}
        for name, p in self.network.named_parameters():
            tensors |= {f"{k}.{name}": v for k, v in self.optimizer.state[p].items()}
        meta = {"step": str(self.step), "seconds": str(self.seconds)}
        save_file({k: v.contiguous().cpu() for k, v in tensors.items()}, path.with_suffix(".part"), meta)
        path.with_suffix(".part").replace(path)

    def resume(self, path: Path) -> None:
        from safetensors import safe_open

        with safe_open(path, "pt") as file:
            meta = file.metadata()
        tensors = load_file(path, self.args.device)
        with torch.no_grad():
            for name, p in self.network.named_parameters():
                p.copy_(tensors[f"weight.{name}"])
                state = {k: tensors[f"{k}.{name}"] for k in ("exp_avg", "exp_avg_sq", "step")}
                self.optimizer.state[p] = state if self.device.type == "cuda" else state | {"step": state["step"].cpu()}
        self.step, self.seconds = int(meta["step"]), float(meta["seconds"])
        print(f"goes on at step {self.step}", flush=True)

    def export(self, folder: Path) -> None:
        network = Decoder(self.network.config)
        network.load_state_dict(self.network.state_dict())
        layout = Layout(PATTERN, network.config, tuple(table(network.config)))
        export(NetworkSource(network.requires_grad_(False), layout), folder, dtype="bf16")


def test_rows(each: int, larger: bool = False) -> dict[str, np.ndarray]:
    """Held-out problems of every family, one a row."""
    tokenizer = data.Tokenizer.from_file(str(data.FOLDER / "tokenizer.json"))
    found = {}
    for name, family in FAMILIES.items():
        problems = family.test_set(each, larger)
        rows = np.zeros((each, data.LENGTH), np.uint16)
        for i, problem in enumerate(problems):
            read, learned = data.parts(problem.messages())
            front, back = (tokenizer.encode(text, add_special_tokens=False).ids for text in (read, learned))
            ids = (front + [id | data.LEARN for id in back])[: data.LENGTH]
            rows[i, : len(ids)] = ids
            rows[i, 0] |= data.START
        found[name] = rows[: len(problems)]
    return found


@torch.no_grad()
def right(run: Run, tests: dict[str, np.ndarray]) -> dict[str, float]:
    """Share of problems in which every token, thoughts included, is the likeliest: greedy decoding writes the same."""
    shares = {}
    for name, rows in tests.items():
        good = []
        for start in range(0, len(rows), run.args.rows):
            piece = rows[start : start + run.args.rows]
            full = np.concatenate([piece, np.repeat(piece[:1], run.args.rows - len(piece), 0)])  # one shape is compiled
            good.append(run.losses(full)[1].all(1)[: len(piece)])
        shares[name] = torch.cat(good).float().mean().item()
    return shares


def main() -> None:
    began, args = time.perf_counter(), arguments()
    args.out.mkdir(parents=True, exist_ok=True)
    steps = int(args.tokens / (args.rows * data.LENGTH))
    rows = training_rows(args, steps * args.rows)
    run, checkpoint = Run(args), args.out / "checkpoint.safetensors"
    if checkpoint.exists():
        run.resume(checkpoint)
    print(f"{sum(p.numel() for p in run.network.parameters()) / 1e6:.2f} M parameters, {steps} steps of "
          f"{args.rows * data.LENGTH} tokens on {args.device}", flush=True)  # fmt: skip
    limit, before = args.minutes * 60 - 25, run.seconds  # what export and the last test need
    tests = test_rows(2 * args.rows)
    order = random.Random(args.seed)
    order = order.sample(range(steps), steps)  # of batches, so that a run that is cut short saw a fair share
    start = 0.0  # when the first step, which compiles, was done: the learning rate reckons from there
    shown, saved, clock, losses = 0.0, time.perf_counter(), time.perf_counter(), []
    log = (args.out / "log.jsonl").open("a")

    def note(**what: object) -> None:
        text = json.dumps({"step": run.step, "tokens": run.step * args.rows * data.LENGTH, **what})
        log.write(text + "\n")
        log.flush()
        print(text, flush=True)

    first = run.step
    while run.step < steps:
        spent = time.perf_counter() - began
        done = max(run.step / steps, max(spent - start, 0) / (limit - start) if limit < math.inf else 0.0)
        if done >= 1:
            break
        warm = min(1.0, (run.step + 1) / 200)
        rate = args.rate * warm * (0.01 + 0.99 * 0.5 * (1 + math.cos(math.pi * done)))
        at = order[run.step] * args.rows
        losses.append(run.learn(rows[at : at + args.rows], rate))
        if run.step == first + 1:
            losses[-1].item()
            clock = time.perf_counter()
            start = clock - began
        now = time.perf_counter()
        if now - shown > 10 or run.step == steps:
            loss = torch.stack(losses).mean().item()
            if not math.isfinite(loss):
                sys.exit(f"the loss is {loss} at step {run.step}; start again with a smaller --rate")
            speed = (run.step - first - 1) * args.rows * data.LENGTH / max(time.perf_counter() - clock, 1e-9)
            note(loss=round(loss, 5), rate=round(rate, 7), tokens_per_s=round(speed), s=round(now - began))
            shown, losses = now, []
        if now - saved > 60:
            run.seconds = before + now - began
            run.save(checkpoint)
            note(right={name: round(share, 3) for name, share in right(run, tests).items()})
            saved = time.perf_counter()
    run.seconds = before + time.perf_counter() - began
    run.save(checkpoint)
    run.export(args.out / "model")
    shares = right(run, tests)
    note(right={name: round(share, 3) for name, share in shares.items()},
         mean=round(sum(shares.values()) / len(shares), 3), seconds=round(run.seconds))  # fmt: skip


if __name__ == "__main__":
    main()
