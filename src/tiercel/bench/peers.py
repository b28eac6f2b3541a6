"""Engines as this process sees them: started once, asked for rounds, ended.

Worker         a child of ours that stays (`worker.py`): Tiercel, transformers, memory
LlamaBench     llama.cpp's own benchmark, started for every round; its weights lie in the page cache
"""

from __future__ import annotations

import contextlib
import importlib.util
import json
import os
import shutil
import subprocess
import sys
import tempfile
import time
from collections.abc import Callable
from pathlib import Path
from types import TracebackType
from typing import TYPE_CHECKING, Any, Protocol

from tiercel import errors
from tiercel.bench.rss import peak_rss
from tiercel.errors import TiercelError, UnsupportedError

if TYPE_CHECKING:
    from tiercel.bench.case import Case
    from tiercel.bench.models import Files

WATCH_EVERY = 0.01  # seconds between two looks at a child's memory


class Engine(Protocol):
    """about: version, load_s, … · round: {"prefill": {length: tok/s}, "decode": tok/s, "peak_rss_bytes": …}"""

    about: dict[str, Any]

    def round(self, order: dict[str, Any]) -> dict[str, Any]: ...

    def __enter__(self) -> Engine: ...

    def __exit__(
        self, kind: type[BaseException] | None, error: BaseException | None, at: TracebackType | None
    ) -> None: ...


class Worker:
    """A child process of `worker.py`; its memory and threads are its own.

    about["process_s"]: from the start of the process to its first token, imports included.
    """

    def __init__(self, order: dict[str, Any]) -> None:
        self.name = order["engine"]
        self.complaints = tempfile.TemporaryFile()  # noqa: SIM115  (closed with the worker)
        began = time.perf_counter()
        self.process = subprocess.Popen(
            [sys.executable, "-m", "tiercel.bench.worker", json.dumps(order)],
            stdin=subprocess.PIPE, stdout=subprocess.PIPE, stderr=self.complaints, text=True,
            env={**os.environ, "OMP_NUM_THREADS": str(order["threads"])},
        )  # fmt: skip
        try:
            self.about = self._reply()
        except BaseException:
            self.close()
            raise
        self.about["process_s"] = round(time.perf_counter() - began, 3)

    def round(self, order: dict[str, Any]) -> dict[str, Any]:
        assert self.process.stdin is not None
        with contextlib.suppress(BrokenPipeError):  # it has ended: what it said last tells why
            print(json.dumps(order), file=self.process.stdin, flush=True)
        return self._reply()

    def _reply(self) -> dict[str, Any]:
        assert self.process.stdout is not None
        line = self.process.stdout.readline()
        if not line:
            self.process.wait()
            self.complaints.seek(0)
            last = self.complaints.read().decode(errors="replace").strip().splitlines()[-1:]
            raise TiercelError(f"{self.name} ended while it was measured: {last[0] if last else 'it said nothing'}")
        found: dict[str, Any] = json.loads(line)
        if "error" in found:
            kind = getattr(errors, found["kind"], TiercelError)
            raise (kind if issubclass(kind, TiercelError) else TiercelError)(f"{self.name}: {found['error']}")
        return found

    def close(self) -> None:
        assert self.process.stdin is not None and self.process.stdout is not None
        for pipe in (self.process.stdin, self.process.stdout):
            pipe.close()
        try:
            self.process.wait(5)
        except subprocess.TimeoutExpired:
            self.process.kill()
            self.process.wait()
        self.complaints.close()

    def __enter__(self) -> Worker:
        return self

    def __exit__(self, kind: type[BaseException] | None, error: BaseException | None, at: TracebackType | None) -> None:
        self.close()


class LlamaBench:
    """llama-bench, one repetition a round: it warms up itself, every time."""

    def __init__(self, path: Path, threads: int) -> None:
        program = llama_bench()
        assert program is not None, "asked before a case begins"
        self.command = [str(program), "-m", str(path), "-t", str(threads), "-r", "1", "-o", "json"]
        self.about: dict[str, Any] = {}

    def round(self, order: dict[str, Any]) -> dict[str, Any]:
        out: dict[str, Any] = {"prefill": {}, "peak_rss_bytes": 0}
        prompts = ",".join(map(str, order["prompts"]))
        if order["context"] and prompts:  # -d is for all tests of a run
            self._run(out, "-p", prompts, "-n", "0")
            prompts = ""
        self._run(out, "-p", prompts or "0", "-n", str(order["generate"]), "-d", str(order["context"]))
        return out

    def first_token(self, prompt: int) -> float:
        """Seconds of a whole process that loads, reads a prompt and ends."""
        began = time.perf_counter()
        self._run({"prefill": {}, "peak_rss_bytes": 0}, "-p", str(prompt), "-n", "0", "--no-warmup")
        return time.perf_counter() - began

    def _run(self, out: dict[str, Any], *options: str) -> None:
        text, memory = watched([*self.command, *options])
        for test in json.loads(text):
            self.about = {"version": f"build {test['build_number']} ({test['build_commit']})",
                          "file": test["model_type"], "file_bytes": test["model_size"]}  # fmt: skip
            if test["n_prompt"]:
                out["prefill"][str(test["n_prompt"])] = test["avg_ts"]
            if test["n_gen"]:
                out["decode"] = test["avg_ts"]
        out["peak_rss_bytes"] = max(out["peak_rss_bytes"], memory)

    def __enter__(self) -> LlamaBench:
        return self

    def __exit__(self, kind: type[BaseException] | None, error: BaseException | None, at: TracebackType | None) -> None:
        pass  # nothing of it is left between rounds


def watched(command: list[str]) -> tuple[str, int]:
    """What a program prints, and the most memory it held; TiercelError with its last words when it fails."""
    with tempfile.TemporaryFile() as output, tempfile.TemporaryFile() as errors:
        process, most = subprocess.Popen(command, stdout=output, stderr=errors), 0
        try:
            while process.poll() is None:
                most = max(most, peak_rss(process.pid))
                time.sleep(WATCH_EVERY)
        except BaseException:
            process.kill()
            process.wait()
            raise
        if process.returncode:
            errors.seek(0)
            last = errors.read().decode(errors="replace").strip().splitlines()[-1:]
            raise TiercelError(f"{Path(command[0]).name} failed: {last[0] if last else process.returncode}")
        output.seek(0)
        return output.read().decode(), most


def llama_bench() -> Path | None:
    """The program: $TIERCEL_LLAMA_BENCH, the PATH, or inside the llama_cpp package."""
    if given := os.environ.get("TIERCEL_LLAMA_BENCH"):
        return Path(given) if Path(given).is_file() else None
    if found := shutil.which("llama-bench"):
        return Path(found)
    spec = importlib.util.find_spec("llama_cpp")
    for folder in (spec.submodule_search_locations or []) if spec else []:
        for path in (Path(folder) / "bin" / "llama-bench", Path(folder) / "lib" / "llama-bench"):
            if path.is_file():
                return path
    return None


def require(peer: str) -> None:
    """UnsupportedError says what to install when the peer is not here."""
    if peer == "llama.cpp" and llama_bench() is None:
        raise UnsupportedError(
            "llama-bench is not here: install llama.cpp (brew install llama.cpp, or build it) and put llama-bench "
            "on the PATH, or name it in TIERCEL_LLAMA_BENCH"
        )
    if peer == "transformers" and importlib.util.find_spec("transformers") is None:
        raise UnsupportedError(f"transformers is not here: {sys.executable} -m pip install transformers")


def _llama_cpp(files: Files, threads: int, case: Case) -> Engine:
    assert files.gguf is not None
    return LlamaBench(files.gguf, threads)


def _transformers(files: Files, threads: int, case: Case) -> Engine:
    worker = Worker({"engine": "transformers", "threads": threads, "path": str(files.folder), "device": case.device})
    worker.round({**case.round, "generate": min(case.generate, 2)})  # once without counting, as ours
    return worker


PEERS: dict[str, Callable[[Files, int, Case], Engine]] = {"llama.cpp": _llama_cpp, "transformers": _transformers}
