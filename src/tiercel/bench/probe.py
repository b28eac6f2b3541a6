"""What this machine does in a second, part by part:   python -m tiercel.bench.probe '["Q4_K", "Q6_K"]'

The speeds `tiercel plan` reckons with, measured in some seconds in a process of its own (plan has no torch):

    read       bytes of a buffer far larger than the caches
    products   of each packing asked for: one row (bytes of the matrix), eight and 512 (operations)
    attention  tiny networks that are all mixer: what reading a prompt and what one step costs, by layer, key and state

Best of some tries: what a busy machine disturbs least.
"""

from __future__ import annotations

import json
import os
import sys
import time
from collections.abc import Callable
from typing import Any

import torch

from tiercel.families.pattern import PATTERN, pattern, rows
from tiercel.families.family import Layout
from tiercel.model.config import ModelConfig
from tiercel.model.decoder import Decoder
from tiercel.ops.linear import QTensor

BUFFER = 1 << 28  # bytes read for `read`
MATRIX = 96 << 20  # bytes of the matrix one row meets: beyond the caches
CONTEXT = 4096
PREFILL = 512


def best(run: Callable[[], Any], tries: int = 5) -> float:
    """Seconds."""
    times = []
    for _ in range(tries):
        began = time.perf_counter()
        run()
        times.append(time.perf_counter() - began)
    return min(times)


def read() -> float:
    buffer = torch.ones(BUFFER // 8, dtype=torch.int64)
    return buffer.nbytes / best(buffer.sum)


def product(kind: str) -> dict[str, float]:
    """Rates of a matrix of one packing."""
    wide = 4096
    per_row = max(QTensor(kind, (16, wide)).nbytes // 16, 1)
    large = QTensor(kind, (MATRIX // per_row // 16 * 16, wide))
    large.data.zero_()
    small = QTensor(kind, (2048, 2048))
    small.data.zero_()
    one, few, many = (torch.rand(T, m.shape[1]) for T, m in ((1, large), (8, large), (PREFILL, small)))
    return {
        "one": large.nbytes / best(lambda: large.multiply(one)),
        "few": 2 * 8 * large.numel() / best(lambda: large.multiply(few), 3),
        "many": 2 * PREFILL * small.numel() / best(lambda: small.multiply(many)),
    }


def network(layers: str, repeat: int, **sizes: Any) -> Decoder:
    """A packed network whose matrices are next to nothing: width 64."""
    from tiercel.weights.load import of_source
    from tiercel.weights.random import RandomSource, kinds_of

    config: ModelConfig = pattern(layers, width=64, repeat=repeat, vocab_size=256, ffn_width=64, max_length=1 << 20, **sizes)
    layout = Layout(PATTERN, config, rows(config))
    return of_source(RandomSource(layout, kinds_of(layout, "q8_0"), 0))


def mixers() -> dict[str, float]:
    """Seconds and rates of what lies between the products."""
    out: dict[str, float] = {}
    tokens = torch.zeros(PREFILL, dtype=torch.long)

    def times(net: Decoder, context: int) -> tuple[float, float]:
        """Of reading 512 tokens, and of one step, after so many."""
        state = net.new_state()
        for _ in range(0, context, PREFILL):
            net(tokens, state, keep=1)

        def again() -> None:
            began = state.length
            net(tokens, state, keep=1)
            nonlocal chunk
            chunk = state.length - began

        chunk = 0
        chunk_s = best(again, 3)
        for _ in range(4):
            net(tokens[:1], state, keep=1)
        return chunk_s, best(lambda: net(tokens[:1], state, keep=1), 24)

    empty = times(network("attention", 8, heads=1, head_dim=16), 0)
    out["layer_s"] = empty[1] / 8
    heads = {"heads": 8, "kv_heads": 2, "head_dim": 64}
    net = network("attention/-", 4, **heads)
    near, far = times(net, 0), times(net, CONTEXT)
    keys = 4 * 8 * 64 * 4 * PREFILL * CONTEXT  # operations more: 4 layers, q·k and p·v
    out["attend"] = keys / max(far[0] - near[0], 1e-9)
    out["attend_read"] = 4 * 2 * 2 * 64 * 2 * CONTEXT / max(far[1] - near[1], 1e-9)
    net = network("mamba2/-", 4, expand=24, mamba_head_dim=64, state=128)
    small = network("mamba2/-", 4, expand=1, mamba_head_dim=64, state=16)
    many, few = times(net, 0), times(small, 0)
    cells = 4 * (24 * 64 * 128 - 64 * 16)
    out["scan"] = cells * PREFILL / max(many[0] - few[0], 1e-9)
    out["scan_read"] = 4 * cells / max(many[1] - few[1], 1e-9)
    net = network("mamba1/-", 4, expand=24, state=16)
    small = network("mamba1/-", 4, expand=1, state=16)
    many, few = times(net, 0), times(small, 0)
    cells = 4 * (24 * 64 * 16 - 64 * 16)
    out["scan1"] = cells * PREFILL / max(many[0] - few[0], 1e-9)
    out["scan1_read"] = 4 * cells / max(many[1] - few[1], 1e-9)
    return out


@torch.inference_mode()
def measure(kinds: list[str]) -> dict[str, Any]:
    return {"read": read(), "products": {kind: product(kind) for kind in kinds}, **mixers()}


if __name__ == "__main__":
    torch.set_num_threads(int(os.environ.get("OMP_NUM_THREADS", "0")) or torch.get_num_threads())
    print(json.dumps(measure(json.loads(sys.argv[1]))))
