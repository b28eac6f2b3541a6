"""Prefill and decode of a Falcon-H1 shape against transformers: one process, rounds taken in turn, ratios of medians.

    python benchmarks/decode_vs_transformers.py                    the 0.5B shape, bfloat16, random weights: 3 minutes
    python benchmarks/decode_vs_transformers.py --size nano        a smoke test of the script itself: seconds
    python benchmarks/decode_vs_transformers.py --json             the same as JSON

Both run the very same folder, written once by transformers; no download.
"""

from __future__ import annotations

import argparse
import json
import logging
import os
import platform
import statistics
import tempfile
import time
from datetime import date
from pathlib import Path
from typing import Any

import torch
import transformers
from transformers import FalconH1Config, FalconH1ForCausalLM

import tiercel

R2 = 2**0.5
SIZES: dict[str, dict[str, Any]] = {
    "0.5b": dict(
        vocab_size=32784, hidden_size=1024, intermediate_size=2048, num_hidden_layers=36, num_attention_heads=8,
        num_key_value_heads=2, head_dim=64, mamba_d_ssm=1536, mamba_n_heads=24, mamba_d_head=64, mamba_d_state=128,
        mamba_rms_norm=False, attention_out_multiplier=0.9375, key_multiplier=0.390625, lm_head_multiplier=0.0390625,
        mlp_multipliers=[0.8838834765, 0.5859375], ssm_in_multiplier=1.25, ssm_out_multiplier=0.2357022604,
        ssm_multipliers=[R2 / 4, 0.25, R2 / 4, 0.5, R2 / 4], embedding_multiplier=4 * R2,
    ),
    "nano": dict(
        vocab_size=512, hidden_size=64, intermediate_size=96, num_hidden_layers=3, num_attention_heads=3,
        num_key_value_heads=1, head_dim=24, mamba_d_ssm=48, mamba_n_heads=6, mamba_d_head=8, mamba_d_state=16,
    ),
}  # fmt: skip
COMMON = dict(
    mamba_n_groups=1, mamba_norm_before_gate=False, mamba_chunk_size=128, rope_theta=1e11,
    max_position_embeddings=16384, tie_word_embeddings=False,
)  # fmt: skip


def make(size: str, folder: Path) -> None:
    """A random-weight checkpoint of the true shape, as transformers writes it."""
    torch.manual_seed(0)
    torch.set_default_dtype(torch.bfloat16)
    FalconH1ForCausalLM(FalconH1Config(**COMMON, **SIZES[size])).save_pretrained(folder)
    torch.set_default_dtype(torch.float32)


class Ours:
    def __init__(self, folder: Path) -> None:
        self.network = tiercel.load(folder, dtype="bfloat16").network

    def prefill(self, tokens: torch.Tensor) -> None:
        self.state = self.network.new_state()
        self.network(tokens, self.state, keep=1)

    def step(self, token: torch.Tensor) -> None:
        self.network(token, self.state, keep=1)


class Transformers:
    def __init__(self, folder: Path) -> None:
        self.model = FalconH1ForCausalLM.from_pretrained(folder, dtype=torch.bfloat16).eval()

    @torch.inference_mode()
    def prefill(self, tokens: torch.Tensor) -> None:
        self.cache = self.model(tokens[None], use_cache=True, logits_to_keep=1).past_key_values

    @torch.inference_mode()
    def step(self, token: torch.Tensor) -> None:
        self.model(token[None], past_key_values=self.cache, use_cache=True)


def measure(engine: Ours | Transformers, tokens: torch.Tensor, decode: int) -> tuple[float, float]:
    """Tokens per second of prefill and of decode."""
    start = time.perf_counter()
    engine.prefill(tokens)
    middle = time.perf_counter()
    for _ in range(decode):
        engine.step(tokens[:1])
    return len(tokens) / (middle - start), decode / (time.perf_counter() - middle)


def cpu() -> str:
    for line in Path("/proc/cpuinfo").read_text().splitlines() if Path("/proc/cpuinfo").exists() else ():
        if line.startswith("model name"):
            return line.partition(":")[2].strip()
    return platform.processor() or platform.machine()


def main() -> None:
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("--size", choices=SIZES, default="0.5b")
    parser.add_argument("--prefill", type=int, default=512)
    parser.add_argument("--decode", type=int, default=32)
    parser.add_argument("--rounds", type=int, default=5)
    parser.add_argument("--threads", type=int, default=2)
    parser.add_argument("--json", action="store_true")
    args = parser.parse_args()
    torch.set_num_threads(args.threads)
    logging.disable(logging.WARNING)
    transformers.utils.logging.disable_progress_bar()
    with tempfile.TemporaryDirectory() as folder:
        make(args.size, Path(folder))
        engines: dict[str, Ours | Transformers] = {
            "tiercel": Ours(Path(folder)),
            "transformers": Transformers(Path(folder)),
        }
    tokens = torch.randint(10, 500, (args.prefill,))
    for engine in engines.values():  # a first round that is not counted
        measure(engine, tokens, 2)
    rounds = [
        {name: measure(engine, tokens, args.decode) for name, engine in engines.items()} for _ in range(args.rounds)
    ]
    result: dict[str, Any] = {
        "shape": f"Falcon-H1 {args.size}, random weights, bfloat16",
        "machine": f"{cpu()}, {args.threads} threads, {os.cpu_count()} cores",
        "versions": f"tiercel {tiercel.__version__}, "
        f"transformers {transformers.__version__}, torch {torch.__version__}",
        "date": date.today().isoformat(),
        "rounds": args.rounds,
    }
    for i, what in enumerate((f"prefill {args.prefill}", f"decode {args.decode}")):
        ours, theirs = ([r[name][i] for r in rounds] for name in engines)
        ratios = [a / b for a, b in zip(ours, theirs, strict=True)]
        result[what] = {
            "tiercel_tok_s": round(statistics.median(ours), 2),
            "transformers_tok_s": round(statistics.median(theirs), 2),
            "ratio": round(statistics.median(ratios), 2),
            "ratio_min": round(min(ratios), 2),
            "ratio_max": round(max(ratios), 2),
        }
    if args.json:
        print(json.dumps(result, indent=2))
        return
    print(
        f"{result['shape']}\n{result['machine']}\n"
        f"{result['versions']}, {result['date']}, {args.rounds} rounds in turn\n"
    )
    print("| | tiercel tok/s | transformers tok/s | ratio (min – max) |\n|---|---:|---:|---:|")
    for what, row in result.items():
        if isinstance(row, dict):
            print(
                f"| {what} | {row['tiercel_tok_s']:.1f} | {row['transformers_tok_s']:.1f} "
                f"| {row['ratio']:.2f} × ({row['ratio_min']:.2f} – {row['ratio_max']:.2f}) |"
            )


if __name__ == "__main__":
    main()
