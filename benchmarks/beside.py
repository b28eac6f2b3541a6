"""Another checkout of this repository beside this one, in turn: speed and memory of what people start.

    git worktree add /tmp/old COMMIT && pip install --no-deps --target … (or copy its native extension into src/)
    python benchmarks/beside.py /tmp/old [--rounds 5] [--only smollm2,start] [--json]

Each measurement is one process with `PYTHONPATH` set to the `src` of one checkout; both checkouts take turns, and the
order changes from round to round.  Printed are the medians of both and the median of the rounds' ratios, old time over
new time (above 1: this checkout is faster); for memory, old bytes over new bytes.  Only what both checkouts offer to
their users is called: the command line and the names of `tiercel`.
"""

from __future__ import annotations

import argparse
import json
import os
import statistics
import subprocess
import sys
import tempfile
import time
from collections.abc import Callable
from dataclasses import dataclass
from pathlib import Path

ROOT = Path(__file__).resolve().parent.parent
STREAMS = """
import json, random, resource, sys, time
began = time.perf_counter()
import tiercel
llm = tiercel.LLM(sys.argv[1], seed=0)
load = time.perf_counter() - began
draw = random.Random(0)
prompts = [{"prompt_token_ids": [draw.randrange(1, 20000) for _ in range(256)]} for _ in range(8)]
params = tiercel.SamplingParams(max_tokens=48, ignore_eos=True, temperature=0)
llm.generate(prompts[:1], tiercel.SamplingParams(max_tokens=4, ignore_eos=True, temperature=0))
began = time.perf_counter()
llm.generate(prompts, params)
seconds = time.perf_counter() - began
rss = resource.getrusage(resource.RUSAGE_SELF).ru_maxrss * 1024
print(json.dumps({"streams": seconds, "load": load, "streams memory": rss}))
"""
FIRST = """
import json, sys, time
import tiercel
llm = tiercel.LLM(sys.argv[1])
params = tiercel.SamplingParams(max_tokens=1, ignore_eos=True, temperature=0)
times = []
for i in range(6):
    began = time.perf_counter()
    llm.generate([{"prompt_token_ids": [i, *range(1, 257)]}], params)
    times.append(time.perf_counter() - began)
print(json.dumps({"first token": sorted(times[1:])[2]}))
"""


@dataclass(frozen=True)
class Case:
    """One process that prints or takes what is measured: seconds, or bytes of memory."""

    name: str
    run: Callable[[Path], dict[str, float]]


def python(checkout: Path, *arguments: str) -> str:
    env = {**os.environ, "PYTHONPATH": str(checkout / "src")}
    done = subprocess.run([sys.executable, *arguments], env=env, capture_output=True, text=True)
    if done.returncode:
        raise SystemExit(f"{checkout}: {' '.join(arguments)[:120]} failed: {done.stderr.strip()[-400:]}")
    return done.stdout


def bench(*arguments: str) -> Callable[[Path], dict[str, float]]:
    """Prefill of 512 tokens, decode of 64 and peak memory by `tiercel bench`."""

    def run(checkout: Path) -> dict[str, float]:
        said = json.loads(python(checkout, "-m", "tiercel", "bench", *arguments, "--repeat", "1", "--json"))
        return {
            "prefill": 1 / said["prefill_tok_s"],
            "decode": 1 / said["decode_tok_s"],
            "memory": said["peak_rss_bytes"],
        }

    return run


def program(code: str, *arguments: str) -> Callable[[Path], dict[str, float]]:
    def run(checkout: Path) -> dict[str, float]:
        return dict(json.loads(python(checkout, "-c", code, *arguments).splitlines()[-1]))

    return run


def whole(name: str, *arguments: str) -> Callable[[Path], dict[str, float]]:
    """Seconds of a whole process."""

    def run(checkout: Path) -> dict[str, float]:
        began = time.perf_counter()
        python(checkout, *arguments)
        return {name: time.perf_counter() - began}

    return run


def cases(half: str) -> list[Case]:
    return [
        Case("start", whole("import", "-c", "import tiercel")),
        Case("start", whole("--help", "-m", "tiercel", "--help")),
        Case("smollm2 Q4_1", bench("smollm2")),
        Case("0.5B Q4_K_M", bench(half)),
        Case("smollm2 bf16", bench("smollm2", "--dtype", "bf16")),
        Case("0.5B bf16", bench("falcon-h1:0.5b", "--random", "bf16", "--generate", "16")),
        Case("0.5B Q4_K_M", program(STREAMS, half)),
        Case("smollm2 Q4_1", program(FIRST, "smollm2")),
    ]


def main() -> None:
    parser = argparse.ArgumentParser(description=__doc__.splitlines()[0] if __doc__ else None)
    parser.add_argument("other", type=Path, help="the other checkout")
    parser.add_argument("--rounds", type=int, default=5)
    parser.add_argument("--only", default="", help="cases whose names hold one of these words, comma separated")
    parser.add_argument("--json", action="store_true")
    asked = parser.parse_args()
    only = [name for name in asked.only.split(",") if name]
    seen: dict[tuple[str, str], list[tuple[float, float]]] = {}
    with tempfile.TemporaryDirectory() as folder:
        half = str(Path(folder) / "half.gguf")
        python(ROOT, "-m", "tiercel", "bench", "falcon-h1:0.5b", "--random", "q4_k_m", "--write", half, "--repeat", "1",
               "--prompt", "0", "--generate", "1")  # fmt: skip
        for turn in range(asked.rounds):
            for case in cases(half):
                if only and not any(word in case.name for word in only):
                    continue
                sides = [asked.other, ROOT] if turn % 2 == 0 else [ROOT, asked.other]
                found = {side: case.run(side) for side in sides}
                for name, new in found[ROOT].items():
                    seen.setdefault((case.name, name), []).append((found[asked.other][name], new))
                print(f"round {turn + 1} {case.name}: {', '.join(found[ROOT])}", file=sys.stderr)
    rows = [
        {
            "case": case,
            "what": name,
            "old": statistics.median(old for old, _ in pairs),
            "new": statistics.median(new for _, new in pairs),
            "old over new": statistics.median(old / new for old, new in pairs),
        }
        for (case, name), pairs in seen.items()
    ]
    if asked.json:
        print(json.dumps(rows))
        return
    print(f"{'':14s} {'':16s} {'old':>12s} {'new':>12s}  old / new, {asked.rounds} rounds")
    for row in rows:
        unit = 1e6 if "memory" in str(row["what"]) else 1e-3
        old, new = float(str(row["old"])) / unit, float(str(row["new"])) / unit
        mark = "MB" if unit > 1 else "ms"
        print(f"{row['case']:14s} {row['what']:16s} {old:9.2f} {mark} {new:9.2f} {mark}  {row['old over new']:.3f}")


if __name__ == "__main__":
    main()
