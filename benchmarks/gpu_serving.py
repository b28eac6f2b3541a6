"""Throughput and latency of an engine on a GPU under load, with random weights of a published shape.

    PYTHONPATH=src python benchmarks/gpu_serving.py --offline 256x1024:256@128            requests x in:out @ slots
    PYTHONPATH=src python benchmarks/gpu_serving.py --online 2,4,8 --slots 128            requests a second
    … --beside /path/to/another/checkout          the same offline loads with that commit's engine, in its own process

Offline: all requests at once, random prompts, temperature 0.8, top-k 40, no prefix cache.  Online: Poisson arrivals in
the engine's process (no HTTP), lengths log-normal as ShareGPT's (median 120 in, 180 out), everything from --seed.
The limit is what prompts take at the card's matrix rate, and steps at weights, states and keys over its bandwidth.
"""

from __future__ import annotations

import argparse
import importlib
import json
import math
import os
import random
import subprocess
import sys
import time
from pathlib import Path
from types import SimpleNamespace
from typing import Any

import torch

HERE = Path(os.environ.get("GPU_BENCHMARKS", Path(__file__).parent))
LATENCIES = "ttft_p50", "ttft_p99", "itl_p50", "itl_p99"


def benchmark_module() -> Any:
    """`gpu.py` of the checkout that runs, which makes networks; under its older name where it has that."""
    sys.path.insert(0, str(HERE))
    return importlib.import_module("gpu" if (HERE / "gpu.py").exists() else "h100")


def sequences(request: Any) -> Any:
    return getattr(request, "sequences", None) or request.choices


def sampling(count: int) -> Any:
    try:
        from tiercel.sampling.params import SamplingParams
    except ImportError:  # an older commit
        from tiercel.sampling import SamplingParams  # type: ignore[no-redef]
    return SamplingParams(temperature=0.8, top_k=40, max_tokens=count, ignore_eos=True)


def engine_of(net: Any, slots: int, max_length: int, delay: float | None = None) -> Any:
    from tiercel.engine.engine import Engine

    model: Any = SimpleNamespace(network=net, tokenizer=None, text=None, max_length=max_length)
    engine = Engine(model, slots=slots, cache_bytes=0, max_decode_delay=delay)
    engine.warm_up()
    return engine


def parse(load: str) -> tuple[int, int, int, int]:
    """256x1024:256@128 → requests, tokens in, tokens out, slots."""
    count, rest = load.split("x")
    lengths, slots = rest.split("@")
    inputs, outputs = lengths.split(":")
    return int(count), int(inputs), int(outputs), int(slots)


def run(engine: Any, prompts: list[list[int]], outputs: list[int], limit: float) -> tuple[float, int, bool]:
    """Seconds until all have ended or `limit` is over, tokens made, and whether all ended."""
    requests = [engine.add(ids, sampling(n)) for ids, n in zip(prompts, outputs, strict=True)]
    torch.cuda.synchronize()
    begin = time.perf_counter()
    while not all(request.finished for request in requests):
        engine.step()
        if time.perf_counter() - begin > limit:
            break
    torch.cuda.synchronize()
    seconds = time.perf_counter() - begin
    made = sum(len(s.token_ids) for request in requests for s in sequences(request))
    return seconds, made, all(request.finished for request in requests)


def limit_seconds(bench: Any, net: Any, load: tuple[int, int, int, int], rates: dict[str, float]) -> float:
    """What a load takes at the card's own rates."""
    count, inputs, outputs, slots = load
    matrices = sum(m.weight.numel() for m in net.modules() if isinstance(m, bench.Linear) and m is not net.head)
    state = keys = 0
    for layer in net.config.layers:
        for m in layer.mixers:
            if m.kind == "attention":
                keys += 2 * 2 * m.kv_heads * m.head_dim
            else:
                state += 4 * m.heads * m.head_dim * m.state
    prompts = 2 * matrices * count * inputs / (rates["matmul_TFLOPS"] * 1e12)
    step = bench.weight_bytes(net) + slots * (state + keys * (inputs + outputs / 2))
    return prompts + math.ceil(count / slots) * outputs * step / (rates["copy_GBps"] * 1e9)


def offline(bench: Any, net: Any, loads: list[str], limit: float, delay: float | None) -> dict[str, Any]:
    out: dict[str, Any] = {}
    V, g = net.config.vocab_size, random.Random(0)
    for text in loads:
        count, inputs, outputs, slots = parse(text)
        engine = engine_of(net, slots, inputs + outputs + 8, delay)
        warm = [[g.randrange(V) for _ in range(inputs)] for _ in range(slots)]
        run(engine, warm[:slots], [3] * slots, limit)
        run(engine, warm[:1], [3], limit)
        prompts = [[g.randrange(V) for _ in range(inputs)] for _ in range(count)]
        seconds, made, done = run(engine, prompts, [outputs] * count, limit)
        out[text] = dict(seconds=seconds, out_tok_s=made / seconds, tokens=made, done=done)
        print(
            f"{text:24s} {made / seconds:9.1f} out tok/s {seconds:8.2f} s{'' if done else '  not all done'}", flush=True
        )
        del engine
        bench.free()
    return out


def online(bench: Any, net: Any, rates: list[float], slots: int, seconds: float, seed: int) -> dict[str, Any]:
    out: dict[str, Any] = {}
    V = net.config.vocab_size
    engine = engine_of(net, slots, 3072)
    run(engine, [[7] * n for n in (64, 128, 256, 512, 1024) for _ in range(4)], [4] * 20, 60.0)
    for rate in rates:
        g = random.Random(seed)
        at, arrivals = 0.0, []
        while at < seconds:
            at += g.expovariate(rate)
            inputs, outputs = (min(2048, max(4, int(g.lognormvariate(math.log(m), 1.0)))) for m in (120, 180))
            arrivals.append((at, [g.randrange(V) for _ in range(inputs)], min(outputs, 1000)))
        begin, waiting, running = time.perf_counter(), arrivals[::-1], []
        first, gaps, made = [], [], 0
        while waiting or running:
            now = time.perf_counter() - begin
            if now > 2 * seconds + 30:
                break
            while waiting and waiting[-1][0] <= now:
                due, ids, n = waiting.pop()
                running.append([engine.add(ids, sampling(n)), due, 0, 0.0])
            if not running:
                time.sleep(max(waiting[-1][0] - now, 0))
                continue
            engine.step()
            now = time.perf_counter() - begin
            for row in running:
                count = sum(len(s.token_ids) for s in sequences(row[0]))
                if count > row[2]:
                    if row[2] == 0:
                        first.append(now - row[1])
                    else:
                        gaps.append((now - row[3]) / (count - row[2]))
                    made += count - row[2]
                    row[2], row[3] = count, now
            running = [row for row in running if not row[0].finished]
        total = time.perf_counter() - begin

        def at_share(values: list[float], share: float) -> float:
            return sorted(values)[min(len(values) - 1, int(share * len(values)))] * 1e3 if values else math.nan

        figures = [at_share(values, share) for values in (first, gaps) for share in (0.5, 0.99)]
        out[str(rate)] = dict(zip(LATENCIES, figures, strict=True)) | dict(
            requests=len(arrivals), out_tok_s=made / total, unfinished=len(running)
        )
        told = ", ".join(f"{name} {value:.1f}" for name, value in zip(LATENCIES, figures, strict=True))
        print(f"{rate:6.1f} requests/s: {made / total:8.1f} out tok/s, ms: {told}", flush=True)
    return out


def plot(result: dict[str, Any], path: Path) -> None:
    import matplotlib

    matplotlib.use("Agg")
    from matplotlib import pyplot

    rates = [float(rate) for rate in result["online"]]
    for name in LATENCIES:
        pyplot.plot(rates, [result["online"][str(rate)][name] for rate in rates], marker="o", label=name)
    pyplot.xlabel("requests / s"), pyplot.ylabel("ms"), pyplot.yscale("log"), pyplot.legend()
    pyplot.savefig(path)


def main() -> None:
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("--model", default="falcon-h1r:7b")
    parser.add_argument("--kind", default="bf16", help="bf16, FP8, Q4_K, …")
    parser.add_argument("--offline", default="", help="loads, by commas")
    parser.add_argument("--online", default="", help="rates, by commas")
    parser.add_argument("--slots", type=int, default=128)
    parser.add_argument("--seconds", type=float, default=20.0, help="of arrivals at each rate")
    parser.add_argument("--limit", type=float, default=150.0, help="seconds of one offline load at most")
    parser.add_argument("--beside", default="", help="another checkout, whose engine runs the offline loads too")
    parser.add_argument("--decode-delay", type=float, default=math.inf, help="seconds that prompts may delay the next "
                        "tokens of other texts, offline; −1: the engine's own, as online")  # fmt: skip
    parser.add_argument("--seed", type=int, default=0)
    parser.add_argument("--json", default="gpu_serving.json")
    parser.add_argument("--plot", default="")
    options = parser.parse_args()
    bench, result = benchmark_module(), {}
    loads = [load for load in options.offline.split(",") if load]
    with torch.no_grad():
        net = bench.network(options.model, options.kind)
        result["device"], result["torch"] = torch.cuda.get_device_name(), torch.__version__
        if loads:
            delay = None if options.decode_delay < 0 else options.decode_delay
            result["offline"] = offline(bench, net, loads, options.limit, delay)
            bench.roofline()
            for load in loads:
                share = limit_seconds(bench, net, parse(load), bench.RESULT) / result["offline"][load]["seconds"]
                result["offline"][load]["share_of_limit"] = share
                print(f"{load:24s} {100 * share:5.1f} % of the limit", flush=True)
        if options.online:
            rates = [float(rate) for rate in options.online.split(",")]
            result["online"] = online(bench, net, rates, options.slots, options.seconds, options.seed)
    if options.beside:
        del net
        bench.free()
        there = Path(options.beside).resolve()
        path = Path(options.json).with_suffix(".beside.json")
        command = [sys.executable, __file__, "--model", options.model, "--kind", options.kind, "--limit",
                   str(options.limit), "--offline", options.offline, "--json", str(path),
                   "--decode-delay", "-1"]  # fmt: skip
        environment = os.environ | {"PYTHONPATH": str(there / "src"), "GPU_BENCHMARKS": str(there / "benchmarks")}
        subprocess.run(command, env=environment, check=False)
        if path.exists():
            result["beside"] = json.loads(path.read_text())["offline"]
            for load in loads:
                times = result["offline"][load]["out_tok_s"] / result["beside"][load]["out_tok_s"]
                print(f"{load:24s} {times:6.2f} times {there.name}", flush=True)
    Path(options.json).write_text(json.dumps(result, indent=1))
    if options.plot and "online" in result:
        plot(result, Path(options.plot))


if __name__ == "__main__":
    main()
