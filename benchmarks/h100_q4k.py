"""Packed products of Falcon-H1-7B's decode on one GPU: every tile of the kernels tried on every shape, and a whole step.

    PYTHONPATH=src OUT=out python3 benchmarks/h100_q4k.py            two minutes on an H100

Products run in a graph of many copies, each on its own weights, so nothing is in the cache.  GB/s counts the weights.
"""

from __future__ import annotations

import argparse
import contextlib
import json
import os
import sys
import time
import traceback
from collections.abc import Callable, Iterator
from concurrent.futures import ThreadPoolExecutor
from pathlib import Path
from typing import Any

import h100
import torch
import triton
from h100 import MODEL, decode, filled, free, network, packed, weight_bytes
from triton.runtime.jit import JITFunction

from tiercel.model.graphs import StepGraphs
from tiercel.ops.triton import linear, rounded
from tiercel.ops.triton.linear import DeviceQTensor

SHAPES = {  # outputs, inputs, how often in a step
    "in+qkv": (8728, 3072, 44), "o": (3072, 1536, 44), "out_proj": (3072, 3072, 44), "gate+up": (12288, 3072, 44),
    "down": (3072, 12288, 44), "head": (130048, 3072, 1),
}  # fmt: skip
# outputs and groups a program takes at a time, warps, loads under way
TILES = [
    (1, 64, 1, 1), (1, 16, 1, 1), (1, 16, 1, 3), (2, 16, 1, 1), (2, 16, 2, 3), (4, 16, 2, 1), (4, 16, 2, 3),
    (8, 16, 4, 1), (8, 16, 4, 3), (4, 64, 4, 1), (2, 64, 2, 1), (16, 16, 8, 2), (32, 16, 8, 1), (32, 16, 8, 3),
]  # fmt: skip
ROUNDING = [(32, 4, 4, 1), (32, 8, 8, 1), (32, 8, 4, 3), (32, 16, 8, 1), (32, 16, 16, 2), (32, 16, 8, 3)]
FOUND: list[dict[str, Any]] = []
BEGIN = time.monotonic()
ENOUGH = 512 << 20  # bytes of weights that a measured graph goes through


def graph_seconds(runs: list[Callable[[], Any]]) -> float:
    """Of one run, the mean over a graph of all of them."""
    for run in runs[:2]:
        run()
    torch.cuda.synchronize()
    graph = torch.cuda.CUDAGraph()
    with torch.cuda.graph(graph):
        for run in runs:
            run()
    return h100.seconds(graph.replay, 4, 1) / len(runs)


def matrices(kind: str, N: int, K: int) -> list[DeviceQTensor]:
    first = packed(kind, (N, K), K**-0.5)
    count = max(2, min(44, -(-ENOUGH // first.nbytes)))
    return [first] + [DeviceQTensor(kind, (N, K), *(t.clone() for t in first.parts)) for _ in range(count - 1)]


def record(shape: str, rows: int, kind: str, what: str, seconds: float, nbytes: int) -> None:
    FOUND.append(dict(shape=shape, rows=rows, kind=kind, what=what, us=seconds * 1e6, GBps=nbytes / seconds / 1e9))


@contextlib.contextmanager
def attempt(what: str) -> Iterator[None]:
    try:
        yield
    except Exception as error:  # one tile that does not compile must not cost the others
        print(f"    {what}: {type(error).__name__} {str(error)[:150]}", flush=True)


def left(budget: float) -> bool:
    return time.monotonic() - BEGIN < budget


def together(runs: list[Callable[[], Any]]) -> None:
    """Compile side by side, launching nothing."""
    launch = JITFunction.run

    def compile_only(self: Any, *args: Any, grid: Any, warmup: bool, **more: Any) -> Any:
        return launch(self, *args, grid=grid, warmup=True, **more)

    with contextlib.suppress(Exception), ThreadPoolExecutor(14) as pool:
        with triton.AsyncCompileMode(pool, ignore_errors=True):
            JITFunction.run = compile_only  # type: ignore[method-assign]
            try:
                for run in runs:
                    with contextlib.suppress(Exception):
                        run()
            finally:
                JITFunction.run = launch  # type: ignore[method-assign]


def one_row(kind: str, shapes: list[str], tiles: list[tuple[int, int, int, int]], rows: int, budget: float) -> None:
    for shape in shapes:
        if not left(budget):
            print(f"    {kind} {shape}: no time left")
            continue
        N, K, _ = SHAPES[shape]
        ms = matrices(kind, N, K)
        x = torch.randn(rows, K, device="cuda", dtype=torch.bfloat16)
        r = rounded.rounded(x)
        pair = shape == "gate+up"

        def run(m: DeviceQTensor, t: tuple[int, int, int, int], **more: Any) -> torch.Tensor:
            if pair:
                more |= {"up": ms[-1].words if m is not ms[-1] else ms[0].words, "activation": "silu"}
            return rounded.product(r, kind, (N, K), m.words, x.dtype, tiles=t, **more)

        options: list[tuple[str, tuple[int, int, int, int], dict[str, Any]]] = [(str(t), t, {}) for t in tiles]
        if pair:
            options += [(f"{t} rounding", t, {"round": True}) for t in ROUNDING]
            others = [DeviceQTensor(kind, (N, K), *(t.clone() for t in m.parts)) for m in ms]
        together([lambda o=o: run(ms[0], o[1], **o[2]) for o in options])
        for name, t, more in options:
            with attempt(f"{kind} {shape} {name}"):
                if pair:
                    runs = [
                        lambda m=m, u=u: rounded.product(
                            r, kind, (N, K), m.words, x.dtype, tiles=t, up=u.words, activation="silu", **more
                        )
                        for m, u in zip(ms, others, strict=True)
                    ]  # fmt: skip
                else:
                    runs = [lambda m=m: run(m, t, **more) for m in ms]
                record(shape, rows, kind, name, graph_seconds(runs), ms[0].nbytes * (2 if pair else 1))
        del ms
        if pair:
            del others
        free()


def some_rows(budget: float) -> None:
    for shape in ("in+qkv", "gate+up", "down"):
        N, K, _ = SHAPES[shape]
        ms = matrices("Q4_K", N, K)
        for rows in (8, 32):
            x = torch.randn(rows, K, device="cuda", dtype=torch.bfloat16)
            if left(budget):
                with attempt(f"present {shape} {rows}"):
                    record(shape, rows, "Q4_K", "tiles unpacked (present)", graph_seconds(
                        [lambda m=m: m.multiply(x) for m in ms]), ms[0].nbytes)  # fmt: skip
            options = linear.SOME_TRIED
            together([lambda t=t: linear.some(x, ms[0], None, 1.0, tiles=t) for t in options])
            for t in options:
                if left(budget):
                    with attempt(f"some {shape} {rows} {t}"):
                        runs = [lambda m=m: linear.some(x, m, None, 1.0, tiles=t) for m in ms]
                        record(shape, rows, "Q4_K", f"some {t}", graph_seconds(runs), ms[0].nbytes)
        del ms
        free()


def step(kind: str, profile: bool) -> None:
    net = network(MODEL, kind)
    time_, _ = decode(net, 1, 512, 40)
    print(
        f"    a step, {kind}: {time_ * 1e3:.3f} ms, {1 / time_:.1f} tok/s, {weight_bytes(net) / 1e9:.3f} GB", flush=True
    )
    FOUND.append(
        dict(shape="step", rows=1, kind=kind, what="step", us=time_ * 1e6, GBps=weight_bytes(net) / time_ / 1e9)
    )
    if profile:
        slots, numbers = filled(net, 1, 512, 50)
        graph = StepGraphs(net, slots, (1,)).of(1)
        graph.slot_B.copy_(torch.tensor(numbers, dtype=torch.int32))
        graph.run()
        with torch.profiler.profile(activities=[torch.profiler.ProfilerActivity.CUDA]) as prof:
            for _ in range(5):
                graph.run()
            torch.cuda.synchronize()
        for e in sorted(prof.key_averages(), key=lambda e: -e.self_device_time_total)[:18]:
            print(f"      {e.self_device_time_total / 5e3:8.3f} ms {e.count // 5:5d} × {e.key[:80]}")
    del net
    free()


def early(kind: str = "Q4_K") -> None:
    """The same chain of products with and without programmatic dependent launch."""
    N, K = 12288, 3072
    wide, narrow = matrices(kind, N, K), matrices(kind, K, N)
    r = rounded.rounded(torch.randn(1, K, device="cuda", dtype=torch.bfloat16))
    for pdl in (False, True):
        with attempt(f"pdl {pdl}"):

            def run(a: DeviceQTensor, b: DeviceQTensor, pdl: bool = pdl) -> None:
                h = rounded.product(r, kind, (N, K), a.words, torch.bfloat16, tiles=(32, 16, 8, 1), round=True, pdl=pdl)
                rounded.product(rounded.rounded(h), kind, (K, N), b.words, torch.bfloat16, tiles=(1, 64, 1, 1), pdl=pdl)

            runs = [lambda a=a, b=b: run(a, b) for a, b in zip(wide, narrow, strict=True)]
            record("wide, narrow", 1, kind, f"pdl {pdl}", graph_seconds(runs), wide[0].nbytes + narrow[0].nbytes)


def main() -> None:
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("--budget", type=float, default=105, help="seconds after which nothing begins")
    budget = parser.parse_args().budget
    print(torch.cuda.get_device_name(), torch.__version__, triton.__version__)
    parts: list[tuple[str, Callable[[], None]]] = [
        ("roofline", h100.roofline),
        ("step Q4_K", lambda: step("Q4_K", True)),
        ("one row Q4_K", lambda: one_row("Q4_K", list(SHAPES), TILES, 1, budget * 0.55)),
        ("8 and 32 rows", lambda: some_rows(budget * 0.72)),
        ("one row Q6_K", lambda: one_row("Q6_K", ["down", "in+qkv"], TILES[:9], 1, budget * 0.8)),
        ("one row Q8_0", lambda: one_row("Q8_0", ["down"], TILES[:9], 1, budget * 0.85)),
        ("step Q6_K", lambda: step("Q6_K", False)),
        ("step Q8_0", lambda: step("Q8_0", False)),
        ("step INT8", lambda: step("INT8", False)),
        ("step bf16", lambda: step("bf16", True)),
        ("early launch", early),  # last: an error on the device would end what follows
    ]
    for name, part in parts:
        if not left(budget):
            print(f"── {name}: no time left")
            continue
        print(f"── {name}  ({time.monotonic() - BEGIN:.0f} s)", flush=True)
        try:
            with torch.no_grad():
                part()
        except Exception:
            traceback.print_exc(file=sys.stdout)
        free()
    folder = Path(os.environ.get("OUT", "."))
    (folder / "h100_q4k.json").write_text(json.dumps(h100.RESULT | {"found": FOUND}, indent=1))
    print("\nbest of each (GB/s of weights), all below in the JSON file")
    keys = dict.fromkeys((f["shape"], f["rows"], f["kind"]) for f in FOUND)
    for key in keys:
        mine = sorted((f for f in FOUND if (f["shape"], f["rows"], f["kind"]) == key), key=lambda f: f["us"])
        print(f"{key[0]:14s} {key[1]:3d} {key[2]:5s} " + "   ".join(
            f"{f['what']} {f['us']:.1f}us {f['GBps']:.0f}" for f in mine[:6]))  # fmt: skip
    print("\nall of one row Q4_K, us")
    tiles = list(dict.fromkeys(f["what"] for f in FOUND if f["kind"] == "Q4_K" and f["rows"] == 1))
    for what in tiles:
        row = {f["shape"]: f["us"] for f in FOUND if f["kind"] == "Q4_K" and f["rows"] == 1 and f["what"] == what}
        print(f"{what:28s} " + "  ".join(f"{s} {us:.1f}" for s, us in row.items()))


if __name__ == "__main__":
    main()
