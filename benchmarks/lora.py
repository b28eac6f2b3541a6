"""LoRA on the shape of Falcon-H1 0.5B: tokens a second and memory, beside transformers with PEFT.

    python benchmarks/lora.py                       both, interleaved, two rounds, each in a process of its own
    python benchmarks/lora.py --peer-dtype float32  where the CPU has no bfloat16 (AVX2), and theirs would take minutes

recompute: ours with the activations of blocks made again on the way back.  The same for all: random weights in
bfloat16, rank 16 on q, k, v, o and in_proj, dropout 0.05, one row, AdamW, two threads.  tok/s: the median step after
the first; memory: the largest resident set in the steps.
"""

from __future__ import annotations

import argparse
import json
import math
import os
import statistics
import subprocess
import sys
import tempfile
import time
from collections.abc import Callable
from functools import partial
from pathlib import Path
from typing import Any

WHO = ("tiercel", "recompute", "peft")
TARGETS = ["q_proj", "k_proj", "v_proj", "o_proj", "in_proj"]
LORA = dict(r=16, lora_alpha=32, lora_dropout=0.05, target_modules=TARGETS, task_type="CAUSAL_LM")


def make(folder: Path) -> None:
    """The checkpoint: true sizes and multipliers, random weights."""
    import torch
    from transformers import FalconH1Config, FalconH1ForCausalLM

    torch.manual_seed(0)
    torch.set_default_dtype(torch.bfloat16)
    r2 = math.sqrt(2)
    config = FalconH1Config(
        vocab_size=32784, hidden_size=1024, intermediate_size=2048, num_hidden_layers=36, num_attention_heads=8,
        num_key_value_heads=2, head_dim=64, mamba_d_ssm=1536, mamba_n_heads=24, mamba_d_head=64, mamba_d_state=128,
        mamba_n_groups=1, mamba_rms_norm=False, mamba_norm_before_gate=False, mamba_chunk_size=128, rope_theta=1e11,
        attention_out_multiplier=0.9375, key_multiplier=0.390625, lm_head_multiplier=0.0390625,
        mlp_multipliers=[0.8838834765, 0.5859375], ssm_in_multiplier=1.25, ssm_out_multiplier=0.2357022604,
        ssm_multipliers=[r2 / 4, 0.25, r2 / 4, 0.5, r2 / 4], embedding_multiplier=4 * r2,
        max_position_embeddings=262144, tie_word_embeddings=False,
    )  # fmt: skip
    FalconH1ForCausalLM(config).save_pretrained(folder)


def ours(folder: str, recompute: bool) -> Any:
    import peft

    import tiercel
    from tiercel.train.causal_lm import CausalLM

    model = CausalLM(tiercel.load(folder))
    model.recompute = recompute
    return peft.get_peft_model(model, peft.LoraConfig(**LORA))  # type: ignore[arg-type]


def theirs(folder: str, dtype: str) -> Any:
    import peft
    import torch
    from transformers import AutoModelForCausalLM

    model = AutoModelForCausalLM.from_pretrained(folder, dtype=getattr(torch, dtype))
    return peft.get_peft_model(model, peft.LoraConfig(**LORA))  # type: ignore[arg-type]


def measure(make_model: Callable[[], Any], length: int, steps: int, threads: int) -> dict[str, float]:
    import psutil
    import torch

    torch.set_num_threads(threads)
    model = make_model()
    model.train()
    optimizer = torch.optim.AdamW([p for p in model.parameters() if p.requires_grad], 1e-4)
    x = torch.randint(10, 1000, (1, length), generator=torch.Generator().manual_seed(1))
    seconds, memory, loss = [], 0, 0.0
    for _ in range(steps):
        began = time.perf_counter()
        found = model(input_ids=x, labels=x)["loss"]
        found.backward()
        optimizer.step()
        optimizer.zero_grad()
        seconds.append(time.perf_counter() - began)
        memory, loss = max(memory, psutil.Process().memory_info().rss), float(found)
    return {"tokens_per_s": length / statistics.median(seconds[1:]), "gb": memory / 1e9, "loss": loss}


def child(who: str, folder: Path, args: argparse.Namespace) -> dict[str, float]:
    words = [sys.executable, __file__, "--child", who, "--folder", str(folder), "--length", str(args.length),
             "--steps", str(args.steps), "--threads", str(args.threads), "--peer-dtype", args.peer_dtype]  # fmt: skip
    environment = {**os.environ, "OMP_NUM_THREADS": str(args.threads), "HF_HUB_OFFLINE": "1"}
    done = subprocess.run(words, stdout=subprocess.PIPE, env=environment, check=True, text=True)
    return json.loads(done.stdout.strip().splitlines()[-1])  # type: ignore[no-any-return]


def main() -> None:
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("--length", type=int, default=256)
    parser.add_argument("--steps", type=int, default=8)
    parser.add_argument("--rounds", type=int, default=2)
    parser.add_argument("--threads", type=int, default=2)
    parser.add_argument("--folder", type=Path, default=Path(tempfile.gettempdir()) / "falcon-h1-0.5b-random")
    parser.add_argument("--peer-dtype", default="bfloat16")
    parser.add_argument("--only", choices=WHO)
    parser.add_argument("--child", choices=WHO, help=argparse.SUPPRESS)
    args = parser.parse_args()
    if args.child:
        folder = str(args.folder)
        if args.child == "peft":
            model = partial(theirs, folder, args.peer_dtype)
        else:
            model = partial(ours, folder, args.child == "recompute")
        print(json.dumps(measure(model, args.length, args.steps, args.threads)))
        return
    if not (args.folder / "config.json").exists():
        make(args.folder)
    found: dict[str, list[dict[str, float]]] = {}
    for number in range(args.rounds):
        for who in WHO:
            if args.only in (None, who):
                found.setdefault(who, []).append(child(who, args.folder, args))
                last = found[who][-1]
                print(f"round {number + 1}  {who:9} {last['tokens_per_s']:7.1f} tok/s  {last['gb']:.2f} GB", flush=True)
    if args.only is None:
        middle = {
            who: {key: statistics.median(run[key] for run in runs) for key in runs[0]} for who, runs in found.items()
        }
        for who in WHO[:-1]:
            speed, memory = (middle[who][key] / middle["peft"][key] for key in ("tokens_per_s", "gb"))
            print(f"{who}: {speed:.2f} × the tokens/s in {memory:.2f} × the memory of transformers with PEFT "
                  f"({args.peer_dtype})")  # fmt: skip


if __name__ == "__main__":
    main()
