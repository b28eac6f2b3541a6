"""Falcon-H1 against a Llama-shaped model of equal parameters and precision, 1K to 32K of context, on the CPU.

    python benchmarks/long_context.py                      0.5B in Q4_K_M: two to fifteen minutes on two quiet cores
    python benchmarks/long_context.py --model falcon-h1:1.5b --quantize q8_0
    python benchmarks/long_context.py --lengths 512,1024 --keep /tmp/tiny.json     a look
    python benchmarks/long_context.py --write              the page and the plot from what was measured

Both have random weights.  For each length: decode after so many tokens, the speed of the last 512-token call of the
prompt and of the whole prompt, and the bytes of the state.  Up to READ tokens a prompt is really read; longer ones
read 512 tokens after every doubling and take the rest of the pages as they are (what is in them costs nothing), so the
prompt's time is the integral of the calls that were timed.  Every length is kept as it is done: started again, the
script goes on.  Where something else on the machine got in between, which shows as a length that is slower than a
longer one, --again measures it once more: what else runs only ever makes times longer.
"""

from __future__ import annotations

import argparse
import json
import statistics
import time
from datetime import date
from pathlib import Path
from typing import Any

HERE = Path(__file__).parent
PAGE, PLOT = HERE.parent / "docs" / "long-context.md", HERE.parent / "docs" / "assets" / "long-context.svg"
LENGTHS = (1024, 2048, 4096, 8192, 16_384, 32_768)
CHUNK, STEPS, TRIES = 512, 16, 2
OURS, THEIRS = "falcon-h1", "llama"


def network(model: str, who: str, quantize: str) -> Any:
    """A runner of random packed weights of the model, or of the Transformer that `tiercel plan` sets beside it."""
    from tiercel.bench.models import random_layout
    from tiercel.families.family import Layout
    from tiercel.families.pattern import PATTERN, rows
    from tiercel.model.cpu_runner import CPURunner
    from tiercel.plan.forecast import transformer_of
    from tiercel.weights.load import of_source
    from tiercel.weights.random import RandomSource, kinds_of

    config = random_layout(model).config
    config = config if who == OURS else transformer_of(config)
    layout = Layout(PATTERN, config, rows(config))
    return CPURunner(of_source(RandomSource(layout, kinds_of(layout, quantize))))


def grown(net: Any, state: Any, length: int) -> None:
    """Let a state be so many tokens long: recurrent parts as they are, new pages as they come from the pool."""
    old = state.length
    if length <= old:
        return
    assert old % CHUNK == 0 and length % CHUNK == 0, "boundaries are multiples of a chunk"
    state.reserve(length - old)
    first = state.pages[0].memory
    for page in state.pages[old // 64 :]:
        page.memory.copy_(first)
    for part in state.recurrent:
        part.committed_pos = part.committed_pos + length - old
    state.length = length


def measure(net: Any, length: int) -> dict[str, float]:
    """Seconds of the call that ends at this length, seconds of a step there, and bytes of the state."""
    import torch

    ids = torch.randint(net.config.vocab_size, (CHUNK,), generator=torch.Generator().manual_seed(0))
    with torch.inference_mode():
        state = net.new_state()
        net.forward([ids], [state])
        grown(net, state, length - CHUNK)
        calls, before = [], state.snapshot() if length > CHUNK else None
        for _ in range(TRIES):
            if before is not None:
                state.restore(before)
            else:
                state = net.new_state()
            began = time.perf_counter()
            net.forward([ids], [state])
            calls.append(time.perf_counter() - began)
        size, steps = state.nbytes, []
        for i in range(STEPS + 4):
            began = time.perf_counter()
            net.forward([ids[:1]], [state])
            steps += [time.perf_counter() - began] if i >= 4 else []
    return {"call_s": min(calls), "step_s": statistics.median(steps), "cache_bytes": size}


def prompt_seconds(rows: dict[str, dict[str, float]], length: int) -> float:
    """Of the whole prompt: calls get longer in a line between the lengths that were timed."""
    known = sorted((int(n), row["call_s"]) for n, row in rows.items())
    total, at = 0.0, CHUNK
    while at <= length:
        after = next(((n, s) for n, s in known if n >= at), known[-1])
        before = next(((n, s) for n, s in reversed(known) if n <= at), known[0])
        share = 0.0 if after[0] == before[0] else (at - before[0]) / (after[0] - before[0])
        total += before[1] + share * (after[1] - before[1])
        at += CHUNK
    return total


def page(kept: dict[str, Any]) -> str:
    from tiercel.bench.models import random_layout
    from tiercel.plan.forecast import forecast, transformer_of
    from tiercel.plan.machines import machine

    config = random_layout(kept["model"]).config
    other = transformer_of(config)
    rows, lengths = kept["rows"], sorted(int(n) for n in kept["rows"][OURS] if n in kept["rows"][THEIRS])
    a, b = (forecast(c, machine("laptop-ddr5"), quantize=kept["quantize"], context=1) for c in (config, other))
    out = [
        "# Long contexts, measured", "",
        f"{kept['model']} ({a.parameters:,} parameters) against a Llama-shaped network as deep and as wide "
        f"({b.parameters:,}; four query heads share a key head), both {kept['quantize'].upper()}, random weights; "
        f"{kept['machine']}, {kept['threads']} thread(s), {kept['date']}, `benchmarks/long_context.py`.", "",
        "| context | prefill tok/s | | | decode tok/s | | | cache MB | | |",
        "|---:|---:|---:|---:|---:|---:|---:|---:|---:|---:|",
        "| | Falcon-H1 | Llama | | Falcon-H1 | Llama | | Falcon-H1 | Llama | |",
    ]  # fmt: skip
    for n in lengths:
        mine, theirs = rows[OURS][str(n)], rows[THEIRS][str(n)]
        p, q = (n / prompt_seconds(rows[who], n) for who in (OURS, THEIRS))
        c, d = mine["cache_bytes"] / 1e6, theirs["cache_bytes"] / 1e6
        s, t = 1 / mine["step_s"], 1 / theirs["step_s"]
        out.append(f"| {n:,} | {p:,.1f} | {q:,.1f} | {p / q - 1:+.0%} | {s:,.1f} | {t:,.1f} | {s / t - 1:+.0%} "
                   f"| {c:,.0f} | {d:,.0f} | {c / d - 1:+.0%} |")  # fmt: skip
    n = lengths[-1]
    mine, theirs = rows[OURS][str(n)], rows[THEIRS][str(n)]
    faster = prompt_seconds(rows[THEIRS], n) / prompt_seconds(rows[OURS], n) - 1
    memory = [f.weights_bytes + row["cache_bytes"] for f, row in ((a, mine), (b, theirs))]
    seven = random_layout("falcon-h1:7b").config
    ha, hb = (forecast(c, machine("h100"), context=32_768) for c in (seven, transformer_of(seven)))
    out += [
        "", "![prefill, decode and cache against context](assets/long-context.svg)", "",
        "## Beside the popular description of Falcon-H1R", "",
        f"| claim | measured at {n:,} | what the arithmetic says of the 7B in bf16 at 32K |", "|---|---:|---|",
        f"| 33 % faster prefill | {faster:+.0%} | the products are the same for equal parameters; the scan costs some, "
        "and half as many query heads save half of attention, whose share grows with the length |",
        f"| 33 % faster generation | {theirs['step_s'] / mine['step_s'] - 1:+.0%} | one sequence reads "
        f"{(ha.weights_bytes + ha.cache_bytes) / 1e9:.1f} GB a step, the Transformer "
        f"{(hb.weights_bytes + hb.cache_bytes) / 1e9:.1f}: "
        f"{(hb.weights_bytes + hb.cache_bytes) / (ha.weights_bytes + ha.cache_bytes) - 1:+.0%} at most; many sequences "
        "share the weights, and the gain nears that of the cache |",
        f"| 32 % less memory | {memory[0] / memory[1] - 1:+.0%} (weights and cache of one sequence) | "
        f"{(ha.weights_bytes + ha.cache_bytes) / (hb.weights_bytes + hb.cache_bytes) - 1:+.0%} for one sequence |",
        f"| 60 % smaller cache at 32K | {mine['cache_bytes'] / theirs['cache_bytes'] - 1:+.0%} | "
        f"{ha.cache_bytes / hb.cache_bytes - 1:+.0%}: {ha.kv_bytes_per_token:,} bytes per token and "
        f"{ha.state_bytes / 2**20:.0f} MiB of state against {hb.kv_bytes_per_token:,} |", "",
        "The description names neither machine, length, batch nor opponent, so none of its figures can be checked as "
        "such; TII's own (vLLM, H100, against Qwen3-8B) are slower at batch 2, equal at 8 to 16, 1.3 to 2.5 times as "
        "fast at 32 to 128. The comparison depends on the opponent: with as many key heads as query heads its cache "
        "would be four times as large.", "",
    ]  # fmt: skip
    return "\n".join(out)


def plot(kept: dict[str, Any], out: Path) -> None:
    import matplotlib

    matplotlib.use("svg")
    import matplotlib.pyplot as plt

    rows = kept["rows"]
    lengths = sorted(int(n) for n in rows[OURS] if n in rows[THEIRS])
    values = {
        "prefill, tok/s": lambda who, n: n / prompt_seconds(rows[who], n),
        "decode, tok/s": lambda who, n: 1 / rows[who][str(n)]["step_s"],
        "cache, MB": lambda who, n: rows[who][str(n)]["cache_bytes"] / 1e6,
    }
    figure, axes = plt.subplots(1, 3, figsize=(11, 3.4))
    for ax, (title, value) in zip(axes, values.items(), strict=True):
        for who, name in ((OURS, kept["model"]), (THEIRS, "Llama-shaped")):
            ax.plot(lengths, [value(who, n) for n in lengths], marker="o", label=name)
        ax.set_xscale("log", base=2)
        ax.set_xticks(lengths, [f"{n // 1024}K" if n >= 1024 else str(n) for n in lengths])
        ax.set_ylim(bottom=0)
        ax.set_title(title)
    axes[0].legend()
    figure.tight_layout()
    figure.savefig(out)


def main() -> None:
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("--model", default="falcon-h1:0.5b", help="a shape that bench --random knows")
    parser.add_argument("--quantize", default="q4_k_m")
    parser.add_argument("--lengths", default=",".join(map(str, LENGTHS)))
    parser.add_argument("--threads", type=int)
    parser.add_argument("--keep", type=Path, default=HERE / "results" / "long_context.json")
    parser.add_argument("--again", action="store_true", help="measure --lengths again, and keep what is faster")
    parser.add_argument("--write", action="store_true", help="measure nothing: docs/long-context.md and its plot")
    args = parser.parse_args()
    from tiercel.bench.run import cores
    from tiercel.commands.doctor import cpu_name

    about = {"model": args.model, "quantize": args.quantize, "machine": cpu_name(), "threads": args.threads or cores()}
    kept = json.loads(args.keep.read_text()) if args.keep.exists() else {}
    if args.write and not kept:
        parser.error(f"{args.keep} is not there: measure first")
    if not args.write:
        if any(kept.get(key) != value for key, value in about.items()):
            kept = about | {"date": date.today().isoformat(), "rows": {OURS: {}, THEIRS: {}}}
        import torch

        torch.set_num_threads(kept["threads"])
        from tiercel.ops.cpu import native

        if native.available:
            native.extension.set_threads(kept["threads"])
        wanted = [int(n) for n in args.lengths.split(",")]
        for who in (OURS, THEIRS):
            net = None
            for n in sorted({CHUNK, *wanted}):
                before = kept["rows"][who].get(str(n))
                if before is not None and not (args.again and n in wanted):
                    continue
                net = net or network(args.model, who, args.quantize)
                now = measure(net, n)
                kept["rows"][who][str(n)] = {name: min(now[name], (before or now)[name]) for name in now}
                args.keep.parent.mkdir(exist_ok=True)
                args.keep.write_text(json.dumps(kept, indent=1) + "\n")
                print(who, n, kept["rows"][who][str(n)], flush=True)
    tiny = args.keep != HERE / "results" / "long_context.json"
    target, picture = (args.keep.with_suffix(".md"), args.keep.with_suffix(".svg")) if tiny else (PAGE, PLOT)
    target.write_text(page(kept))
    plot(kept, picture)
    print(target.read_text())


if __name__ == "__main__":
    main()
