"""Training speed of two hybrids of about eight million parameters: tokens a second, forward, backward and AdamW.

    PYTHONPATH=src python3 benchmarks/train.py --device cuda --rows 64 --length 1024 --kinds f32,bf16,bf16+compile
    PYTHONPATH=src python3 benchmarks/train.py --device cpu --rows 4 --length 512 --steps 5

Documents of 20 to 200 random tokens, packed.  The best step counts: the machine may be shared.
"""

import argparse

import numpy as np
import torch

from tiercel.families.pattern import pattern
from tiercel.model.decoder import Decoder
from tiercel.model.initialize import initialize
from tiercel.train.data import Batches, Documents
from tiercel.train.loop import Settings, fit

SHAPES = {"parallel": ("attention+mamba2", 8), "interleaved 3:1": ("mamba2 mamba2 mamba2 attention", 2)}


def main() -> None:
    parser = argparse.ArgumentParser()
    parser.add_argument("--device", default="cpu")
    parser.add_argument("--rows", type=int, default=4)
    parser.add_argument("--length", type=int, default=512)
    parser.add_argument("--steps", type=int, default=15)
    parser.add_argument("--kinds", default="f32")
    a = parser.parse_args()
    random = np.random.default_rng(0)
    documents = Documents.of((random.integers(0, 1000, n), np.ones(n)) for n in random.integers(20, 200, 4000))
    for name, (words, repeat) in SHAPES.items():
        config = pattern(words, repeat=repeat, width=256, vocab_size=1024, state=64, ffn_width=704, head_dim=64)
        for kind in a.kinds.split(","):
            network = Decoder(config)
            initialize(network)
            network.requires_grad_(True)
            count = sum(p.numel() for p in network.parameters())
            settings = Settings(
                steps=a.steps, device=a.device, dtype=kind.split("+")[0], compile="+" in kind, log_every=5, quiet=True
            )
            found = fit(network, Batches(documents, rows=a.rows, length=a.length), settings)
            best = a.rows * a.length / min(line["seconds"] for line in found.log)
            memory = f", {torch.cuda.max_memory_allocated() / 2**30:.1f} GiB" if a.device == "cuda" else ""
            print(f"{name}, {count / 1e6:.1f} M, {kind}: {best:,.0f} tokens/s{memory}", flush=True)


if __name__ == "__main__":
    main()
