"""The reason for hybrids, measured: python3 benchmarks/why_hybrid/run.py

    --small                 small sizes of the tasks, one seed, two learning rates: stops after ten minutes
    (nothing)               three learning rates, three seeds: about six hours of two cores
    --device cuda --jobs 12 --minutes 4.5 --out DIR
                            the same with four times the rows a step; stops in time and reports what is finished
    --report                only the table and the plots, from what there is

DIR/runs.jsonl              a line for every finished run; the same command goes on from there
DIR/table.md  summary.json  longer.svg  learning.svg  state.svg
DIR/errors.log              what workers had to say

All of seed 0 comes first, then seed 1, …  A worker trains one network kind on one task from one seed at all learning
rates; it is a process of its own, on one core.
"""

from __future__ import annotations

import argparse
import json
import math
import os
import signal
import subprocess
import sys
import threading
import time
from collections import deque
from collections.abc import Iterable
from dataclasses import asdict
from pathlib import Path
from typing import Any

HERE = Path(__file__).resolve().parent
sys.path[:0] = [str(HERE), str(HERE.parents[1] / "src")]

from plan import NETWORKS, Job, jobs_of  # noqa: E402

REPORT_SECONDS = 12


def arguments(given: list[str] | None = None) -> argparse.Namespace:
    p = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    p.add_argument("--out", type=Path, help="results/why_hybrid, with --small results/why_hybrid_small")
    p.add_argument("--small", action="store_true")
    p.add_argument("--device", default="cpu", choices=("cpu", "cuda"))
    p.add_argument("--jobs", type=int, default=2, help="worker processes")
    p.add_argument("--gpus", type=int, default=1, help="workers take them in turn")
    p.add_argument("--minutes", type=float, help="of this whole command; --small: 10")
    p.add_argument("--seeds", type=int)
    p.add_argument("--rates", help="learning rates, with commas")
    p.add_argument("--steps", help="a number for all tasks, or recall=800,parity=300")
    p.add_argument("--rows", type=int, help="of a step")
    p.add_argument("--examined", type=int, help="rows of each test set")
    p.add_argument("--networks", default=",".join(NETWORKS))
    p.add_argument("--tasks", default="")
    p.add_argument("--no-graph", dest="graph", action="store_false", help="on a GPU, plain steps")
    p.add_argument("--report", action="store_true")
    p.add_argument("--worker", action="store_true", help=argparse.SUPPRESS)
    args = p.parse_args(given)
    args.minutes = args.minutes or (10 if args.small else math.inf)
    args.out = args.out or HERE.parent / "results" / ("why_hybrid_small" if args.small else "why_hybrid")
    return args


# ── results ──────────────────────────────────────────────────────────────────────────────────────────────


class Results:
    """runs.jsonl: only ever appended to; what a kill left of a last line is cut off."""

    def __init__(self, path: Path) -> None:
        self.path = path
        self.lock = threading.Lock()
        path.parent.mkdir(parents=True, exist_ok=True)
        text = path.read_bytes() if path.exists() else b""
        whole = text[: text.rfind(b"\n") + 1]
        if whole != text:
            path.write_bytes(whole)
        self.lines: list[dict[str, Any]] = [json.loads(line) for line in whole.splitlines()]

    def add(self, lines: Iterable[dict[str, Any]]) -> None:
        lines = list(lines)
        with self.lock, self.path.open("a") as file:
            file.write("".join(json.dumps(line) + "\n" for line in lines))
            file.flush()
            os.fsync(file.fileno())
            self.lines += lines

    def have(self, job: Job) -> bool:
        done = {key(line) for line in self.lines}
        return all((*of_job(job), lr) in done for lr in job.rates)

    def of(self, jobs: Iterable[Job]) -> list[dict[str, Any]]:
        """Those that the jobs ask for; a run that was made twice counts once."""
        wanted = {(*of_job(job), lr) for job in jobs for lr in job.rates}
        return list({key(line): line for line in self.lines if key(line) in wanted}.values())


FIELDS = "network", "task", "seed", "steps", "rows", "examined", "small"


def of_job(job: Job) -> tuple[Any, ...]:
    return tuple(getattr(job, name) for name in FIELDS)


def key(line: dict[str, Any]) -> tuple[Any, ...]:
    return (*(line[name] for name in FIELDS), line["lr"])


# ── workers ──────────────────────────────────────────────────────────────────────────────────────────────


def work(device: str, graph: bool) -> None:
    """A job a line on stdin, its results a line on stdout."""
    import torch
    from learn import run

    torch.set_num_threads(1)
    for line in sys.stdin:
        job = json.loads(line)
        print(json.dumps(run(Job(**job | {"rates": tuple(job["rates"])}), device, graph)), flush=True)


class Workers:
    """Threads that each keep one worker process busy until the jobs, or the time, are over."""

    def __init__(self, args: argparse.Namespace, jobs: Iterable[Job], results: Results) -> None:
        self.args, self.results = args, results
        self.jobs, self.tries = deque(jobs), dict[Job, int]()
        self.total, self.done = len(self.jobs), 0
        self.graph = args.graph and args.device == "cuda"
        self.lock, self.over = threading.Lock(), False
        self.processes: list[subprocess.Popen[str]] = []
        self.began = time.perf_counter()

    def run(self, seconds: float) -> None:
        """Raises nothing: what is not finished after `seconds` is ended and left out."""
        threads = [threading.Thread(target=self._serve, daemon=True) for _ in range(min(self.args.jobs, self.total))]
        for thread in threads:
            thread.start()
        end = self.began + seconds
        try:
            for thread in threads:
                while thread.is_alive() and time.perf_counter() < end:
                    thread.join(min(1.0, max(0.01, end - time.perf_counter())))
        except KeyboardInterrupt:
            print("interrupted: the same command goes on from here", flush=True)
        finally:
            with self.lock:
                self.over = True
                for process in self.processes:
                    process.kill()
            for process in self.processes:
                process.wait()

    def _serve(self) -> None:
        process: subprocess.Popen[str] | None = None
        while True:
            with self.lock:
                if self.over or not self.jobs:
                    break
                job = self.jobs.popleft()
                if process is None:
                    process = self._start()
            lines = self._ask(process, job)
            if lines is not None:
                self.results.add(lines)
                self._tell(job, lines)
                continue
            process = None
            with self.lock:
                if self.over:
                    break
                self.tries[job] = self.tries.get(job, 0) + 1
                if self.graph:
                    self.graph = False
                    print("a worker ended with a graph: on with plain steps (errors.log says why)", flush=True)
                if self.tries[job] < 3:
                    self.jobs.appendleft(job)
                else:
                    print(f"given up: {job.network} on {job.task}, seed {job.seed} (errors.log says why)", flush=True)
        if process is not None and process.stdin is not None:
            process.stdin.close()

    def _start(self) -> subprocess.Popen[str]:
        command = [sys.executable, str(HERE / "run.py"), "--worker", "--device", self.args.device]
        gpu = str(len(self.processes) % self.args.gpus)
        with (self.args.out / "errors.log").open("a") as errors:
            process = subprocess.Popen(
                command + ([] if self.graph else ["--no-graph"]), stdin=subprocess.PIPE, stdout=subprocess.PIPE,
                stderr=errors, text=True, env=os.environ | {"OMP_NUM_THREADS": "1", "CUDA_VISIBLE_DEVICES": gpu},
            )  # fmt: skip
        self.processes.append(process)
        return process

    @staticmethod
    def _ask(process: subprocess.Popen[str], job: Job) -> list[dict[str, Any]] | None:
        """None: the worker is gone."""
        assert process.stdin is not None and process.stdout is not None
        try:
            process.stdin.write(json.dumps(asdict(job)) + "\n")
            process.stdin.flush()
            return json.loads(process.stdout.readline())
        except (OSError, ValueError):
            return None

    def _tell(self, job: Job, lines: list[dict[str, Any]]) -> None:
        with self.lock:
            self.done += 1
            right = " ".join(f"{line['lr']:g}:{line['right']['validation'][job.of.measure]:.3f}" for line in lines)
            speed = lines[0]["tokens_per_second"]
            print(f"{self.done}/{self.total} {time.perf_counter() - self.began:.0f} s: {job.task} {job.network} "
                  f"seed {job.seed}  {right}  {speed:,} tokens/s", flush=True)  # fmt: skip


def main(given: list[str] | None = None) -> None:
    began, args = time.perf_counter(), arguments(given)
    if args.worker:
        work(args.device, args.graph)
        return
    from report import networks_table, write

    signal.signal(signal.SIGTERM, signal.default_int_handler)  # no worker is left behind
    args.out.mkdir(parents=True, exist_ok=True)
    jobs = jobs_of(args)
    results = Results(args.out / "runs.jsonl")
    print(networks_table(), flush=True)
    todo = [] if args.report else [job for job in jobs if not results.have(job)]
    if todo:
        runs = sum(len(job.rates) for job in todo)
        print(f"{runs} runs to do in {len(todo)} jobs, {len(jobs) - len(todo)} jobs done before", flush=True)
        spare = REPORT_SECONDS if args.minutes < math.inf else 0
        Workers(args, todo, results).run(args.minutes * 60 - (time.perf_counter() - began) - spare)
    print(write(args.out, jobs, results.of(jobs)), flush=True)
    print(f"{args.out} after {time.perf_counter() - began:.0f} s", flush=True)


if __name__ == "__main__":
    main()
