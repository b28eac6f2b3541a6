"""How long known pieces of work take here:   python -m tiercel.bench.probe '["Q4_K", "Q6_K"]'

What `tiercel plan` reckons with (`plan.machines.from_probe` says what follows), measured in some seconds in a process
of its own, as plan has no torch.  Seconds of the fastest try: a busy machine only ever makes them longer.

    read                      a buffer far larger than the caches
    KIND one | few | many     a product with 1, 8 and 512 rows
    attention, mamba …        tiny networks that are all mixer: reading 512 tokens, and one step

A step of a whole network finds nothing in the caches that it left there a step ago.  So what one row or a few read is
measured in turn on as many matrices, and as many states, as are far larger than the caches together.
"""

from __future__ import annotations

import json
import sys
import time
from collections.abc import Callable
from typing import Any

import torch

from tiercel.families.family import Layout
from tiercel.families.pattern import PATTERN, pattern, rows
from tiercel.model.cpu_runner import CPURunner
from tiercel.model.decoder import Decoder
from tiercel.model.state import State
from tiercel.ops.qtensor import QTensor, row_bytes
from tiercel.plan.machines import FEW_ROWS, LARGE_SHAPE, LAYERS, MANY_ROWS, PROBE_BYTES, PROBES, SMALL_SHAPE, Piece
from tiercel.quant import panel_bytes

MOST = 64  # states


def best(run: Callable[[], Any], tries: int = 5) -> float:
    """Seconds."""
    times = []
    for _ in range(tries):
        began = time.perf_counter()
        run()
        times.append(time.perf_counter() - began)
    return min(times)


def products(kind: str) -> dict[str, float]:
    out = {}
    for name, shape, T in (
        (f"{kind} one", LARGE_SHAPE, 1),
        (f"{kind} few", LARGE_SHAPE, FEW_ROWS),
        (f"{kind} many", SMALL_SHAPE, MANY_ROWS),
    ):
        count = max(PROBE_BYTES // panel_bytes(kind, *shape), 1) if shape is LARGE_SHAPE else 1
        matrices, x = [QTensor(kind, shape) for _ in range(count)], torch.rand(T, shape[1])

        def each(matrices: list[QTensor] = matrices, x: torch.Tensor = x) -> None:
            for matrix in matrices:
                matrix.multiply(x)

        zeros = torch.zeros(shape[0], row_bytes(kind, shape[1]), dtype=torch.uint8)
        for matrix in matrices:
            matrix.put(0, zeros)
            matrix.complete()
        each()
        out[name] = best(each) / count
    return out


def network(piece: Piece) -> Decoder:
    """Random weights; matrices are next to nothing beside the mixers."""
    from tiercel.weights.load import of_source
    from tiercel.weights.random import RandomSource, kinds_of

    sizes: dict[str, Any] = {"width": 64, "ffn_width": 64, "vocab_size": 256, "max_length": 1 << 20, **piece.sizes}
    config = pattern(piece.layers, repeat=LAYERS, **sizes)
    layout = Layout(PATTERN, config, rows(config))
    return of_source(RandomSource(layout, kinds_of(layout, "q8_0"), 0))


def mixer(name: str, piece: Piece) -> dict[str, float]:
    """Seconds of a prefill of 512 tokens and of one step, after a context of this length."""
    runner, tokens = CPURunner(network(piece)), torch.zeros(MANY_ROWS, dtype=torch.long)
    state = runner.new_state()
    for _ in range(0, piece.context, MANY_ROWS):
        runner.forward([tokens], [state])
    snapshot = state.snapshot()

    def again() -> None:
        state.restore(snapshot)
        runner.forward([tokens], [state])

    chunk = best(again, 4)
    states = [
        state,
        *(another(runner, state, piece.context, tokens) for _ in range(min(PROBE_BYTES // state.nbytes, MOST) - 1)),
    ]

    def step() -> None:
        for each in states:
            runner.forward([tokens[:1]], [each])

    for _ in range(4):
        step()
    return {f"{name} chunk": chunk, f"{name} step": best(step, 8) / len(states)}


def another(runner: CPURunner, like: State, context: int, tokens: torch.Tensor) -> State:
    """As long as it and with memory of its own.  Where there is a context all layers are attention."""
    state = runner.new_state()
    if context == 0:
        runner.forward([tokens], [state])
        return state
    state.reserve(like.length)
    for own, page in zip(state.pages, like.pages, strict=True):
        own.memory.copy_(page.memory)
    state.length = like.length
    return state


@torch.inference_mode()
def measure(kinds: list[str]) -> dict[str, float]:
    buffer = torch.ones(PROBE_BYTES // 8, dtype=torch.int64)
    out = {"read": best(buffer.sum)}
    del buffer
    for kind in kinds:
        out |= products(kind)
    for name, piece in PROBES.items():
        out |= mixer(name, piece)
    return out


if __name__ == "__main__":
    print(json.dumps(measure(json.loads(sys.argv[1]))))
