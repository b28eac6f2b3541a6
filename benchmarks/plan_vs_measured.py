"""What `tiercel plan` says against what comes: twelve combinations of model, precision, context and slots.

    python benchmarks/plan_vs_measured.py                all: three minutes on two quiet cores
    python benchmarks/plan_vs_measured.py --memory       memory alone, which may be measured on a busy machine
    python benchmarks/plan_vs_measured.py --list         the combinations and what is predicted
    python benchmarks/plan_vs_measured.py --predict      what was measured beside what is predicted now

Predictions reckon with the speeds that `tiercel plan --measure` keeps of this machine.  Every combination is kept as it
is done: started again, the script goes on; --again measures once more and keeps the faster speeds, as what else runs
on a machine only ever makes it slower.

A process for each: it loads the model, reads one prompt of the context's length (prefill), holds it for every slot,
lets all of them decode, and keeps four snapshots of each; its peak of resident memory is what counts.  Where a prompt
is longer than READ tokens its beginning is random memory, and prefill is timed on a prompt of READ tokens.
Bars: memory within 5 %, speed within 20 %.  Results: benchmarks/results/plan.json and .md.
"""

from __future__ import annotations

import argparse
import json
import os
import subprocess
import sys
import time
from dataclasses import asdict, dataclass
from datetime import date
from pathlib import Path
from typing import Any

HERE = Path(__file__).parent
READ = 2048  # tokens that are really read
STEPS = 24
SPEEDS = ("prefill_tok_s", "decode_tok_s")


@dataclass(frozen=True)
class Case:
    model: str
    quantize: str | None
    context: int
    slots: int


HALF = "falcon-h1:0.5b"
CASES = (
    Case("smollm2", None, 512, 1), Case("smollm2", None, 2048, 4), Case("smollm2", None, 8192, 2),
    Case(HALF, "q4_k_m", 512, 1), Case(HALF, "q4_k_m", 2048, 4), Case(HALF, "q4_k_m", 16_384, 1),
    Case(HALF, "q8_0", 1024, 1), Case(HALF, "q8_0", 4096, 2),
    Case(HALF, None, 1024, 1),
    Case("falcon-h1:1.5b", "q4_k_m", 1024, 1), Case("falcon-h1:1.5b", "q4_k_m", 8192, 2),
    Case("falcon-h1:90m", "q8_0", 2048, 8),
)  # fmt: skip


def predicted(case: Case, speed: bool) -> dict[str, Any]:
    """The plan of a case; random weights have no tokenizer."""
    from tiercel.hub import planning
    from tiercel.plan.forecast import forecast, matrices, prefill_seconds

    what = planning.subject(case.model)
    held = matrices(what.config, what.stored, "auto", case.quantize)
    kinds = sorted({m.kind for m in held if not m.precise and len(m.shape) > 1})
    on = planning.this_machine(kinds if speed else ())
    made = forecast(
        what.config, on, stored=what.stored, quantize=case.quantize, context=case.context, slots=case.slots,
        tokenizer=case.model == "smollm2",
    )  # fmt: skip
    read = min(case.context, READ)
    prefill = read / prefill_seconds(what.config, held, on, read) if speed else None
    return made.to_dict() | {"prefill_tok_s": prefill}


# ── a case, in a process of its own


def child(case: Case, tries: int = 2) -> dict[str, Any]:
    """tries: how often the prompt is read; once, and 512 tokens of it, where memory alone counts."""
    import torch

    import tiercel
    from tiercel.bench.models import random_source
    from tiercel.bench.rss import peak_rss
    from tiercel.model.cpu_runner import CPURunner
    from tiercel.weights import load

    torch.set_num_threads(int(os.environ["OMP_NUM_THREADS"]))
    if case.model == "smollm2":
        network = tiercel.load(case.model).network
    else:
        network = load.of_source(random_source(case.model, case.quantize or "bf16"))
    runner = CPURunner(network)
    loaded = peak_rss(os.getpid())
    with torch.inference_mode():
        ids = torch.randint(network.config.vocab_size, (READ,), generator=torch.Generator().manual_seed(0))
        read, speeds = min(case.context, READ if tries > 1 else 512), []
        for _ in range(tries):
            state = runner.new_state()
            began = time.perf_counter()
            for start in range(0, read, 512):
                runner.forward([ids[start : min(start + 512, read)]], [state])
            speeds.append(read / (time.perf_counter() - began))
        states = [_longer(runner, state, case.context) for _ in range(case.slots)]
        del state
        snapshots = [state.snapshot() for state in states for _ in range(4)]
        for _ in range(4):
            runner.forward([ids[:1]] * case.slots, states)
        steps = []
        for _ in range(STEPS):
            began = time.perf_counter()
            runner.forward([ids[:1]] * case.slots, states)
            steps.append(time.perf_counter() - began)
    assert len(snapshots) == 4 * case.slots
    return {"loaded_bytes": loaded, "total_bytes": peak_rss(os.getpid()), "prefill_tok_s": max(speeds),
            "decode_tok_s": case.slots / sorted(steps)[STEPS // 2]}  # fmt: skip


def _longer(runner: Any, state: Any, length: int) -> Any:
    """A state of its own with the recurrent part of `state`, and keys and values of so many tokens (its own repeated).

    The last STEPS + 4 tokens are left for decoding.
    """
    twin = runner.new_state()
    length = max(length - STEPS - 4, 1) // 64 * 64
    twin.reserve(length)
    for i, page in enumerate(twin.pages):
        page.memory.copy_(state.pages[i % len(state.pages)].memory)
    for part, own in zip(twin.parts, state.parts, strict=True):
        if part in twin.recurrent:
            part.load(own.tensors(), length, length - own.pending)
    twin.length = length
    return twin


# ── all of them


def measured(case: Case, args: argparse.Namespace) -> dict[str, Any]:
    order = [sys.executable, __file__, "--child", json.dumps(asdict(case)), *(["--memory"] if args.memory else [])]
    threads = {"OMP_NUM_THREADS": str(args.threads)}
    done = subprocess.run(order, capture_output=True, text=True, env={**os.environ, **threads})
    if done.returncode:
        sys.exit(f"{case}: {done.stderr.strip().splitlines()[-1]}")
    return json.loads(done.stdout)


def compared(case: Case, found: dict[str, Any], speed: bool) -> dict[str, Any]:
    said = predicted(case, speed)
    names = ("total_bytes", *SPEEDS) if speed else ("total_bytes",)
    return {"case": asdict(case), "predicted": {name: said[name] for name in said if name != "device"},
            "measured": found, "ratio": {name: said[name] / found[name] for name in names}}  # fmt: skip


def table(rows: list[dict[str, Any]], about: str) -> str:
    head = "| model | precision | context | slots | memory: plan, measured | off | prefill tok/s | off | decode tok/s "
    out = [f"{head}| off |", "|---|---|---:|---:|---|---:|---|---:|---|---:|"]
    for row in rows:
        case, a, b, ratio = row["case"], row["predicted"], row["measured"], row["ratio"]
        cells = [case["model"], a["precision"], f"{case['context']:,}", str(case["slots"]),
                 f"{a['total_bytes'] / 1e6:,.0f}, {b['total_bytes'] / 1e6:,.0f} MB",
                 f"{ratio['total_bytes'] - 1:+.1%}"]  # fmt: skip
        for name in SPEEDS:
            cells += [f"{a[name]:.1f}, {b[name]:.1f}", f"{ratio[name] - 1:+.0%}"] if name in ratio else ["", ""]
        out.append("| " + " | ".join(cells) + " |")
    return "\n".join([*out, "", about, ""])


def main() -> None:
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("--memory", action="store_true", help="memory alone")
    parser.add_argument("--list", action="store_true", help="predict, measure nothing but the machine")
    parser.add_argument("--predict", action="store_true", help="compare what was measured with what is predicted now")
    parser.add_argument("--again", action="store_true", help="measure once more, and keep the faster speeds")
    parser.add_argument("--fresh", action="store_true", help="measure every combination again")
    parser.add_argument("--only", type=int, nargs="*", help="numbers of combinations, from 0")
    parser.add_argument("--child", help=argparse.SUPPRESS)
    parser.add_argument("--threads", type=int, default=None)
    args = parser.parse_args()
    if args.child:
        print(json.dumps(child(Case(**json.loads(args.child)), 1 if args.memory else 2)))
        return
    from tiercel.bench.run import cores
    from tiercel.commands.doctor import cpu_name

    args.threads = args.threads or cores()
    os.environ["OMP_NUM_THREADS"] = str(args.threads)
    cases = [CASES[i] for i in args.only] if args.only else CASES
    if args.list:
        for case in cases:
            said = predicted(case, not args.memory)
            print(case, {k: said[k] for k in ("total_bytes", "prefill_tok_s", "decode_tok_s")})
        return
    out = HERE / "results" / ("plan-memory" if args.memory else "plan")
    machine = f"{cpu_name()}, {args.threads} thread(s)"
    kept = json.loads(out.with_suffix(".json").read_text()) if out.with_suffix(".json").exists() else {}
    known = {} if args.fresh or kept.get("machine") != machine else {Case(**r["case"]): r for r in kept["rows"]}
    when = kept["date"] if known else date.today().isoformat()
    for case in () if args.predict else cases:
        before = known[case]["measured"] if case in known else None
        if before is not None and not args.again:
            continue
        found = measured(case, args)
        if before is not None:
            found |= {name: max(found[name], before[name]) for name in SPEEDS}
        known[case] = compared(case, found, not args.memory)
        print(case, {k: f"{v - 1:+.1%}" for k, v in known[case]["ratio"].items()}, file=sys.stderr, flush=True)
        keep(out, machine, when, list(known.values()))
    rows = [compared(case, known[case]["measured"], not args.memory) for case in CASES if case in known]
    keep(out, machine, when, rows)
    print(out.with_suffix(".md").read_text())


def keep(out: Path, machine: str, when: str, rows: list[dict[str, Any]]) -> None:
    out.with_suffix(".json").write_text(json.dumps({"machine": machine, "date": when, "rows": rows}, indent=1) + "\n")
    out.with_suffix(".md").write_text(table(rows, f"{machine}, {when}, benchmarks/plan_vs_measured.py"))


if __name__ == "__main__":
    main()
