"""Run a program that a model wrote, confined.

    outcome = run("print(1)", timeout=5)
    outcome.ok, outcome.why, outcome.output

The program is a process far down: we start a keeper (`sandbox_keeper.py`), which takes away what the system lets it
take away and then starts the program.  What holds it, where the system allows:

    network     a network namespace of its own, without any interface; without that, Landlock forbids TCP
    files       Landlock: writes only in its own folder (removed afterwards), reads only of Python and system libraries
    processes   a process namespace of its own: it sees and can signal no other process, and when its first process ends
                all its descendants end, too; RLIMIT_NPROC against fork bombs
    memory      RLIMIT_AS · time RLIMIT_CPU and a clock · file size RLIMIT_FSIZE · open files RLIMIT_NOFILE
    rights      no new privileges, no capabilities, a user of its own when we are root
    secrets     an empty environment, no inherited descriptors
    output      what is beyond `MAX_OUTPUT_BYTES` bytes is thrown away

`protections()` lists which of them hold here; without a limit on files or on processes nothing is run at all.
"""

from __future__ import annotations

import contextlib
import json
import os
import selectors
import shutil
import signal
import subprocess
import sys
import tempfile
import time
from dataclasses import dataclass
from functools import lru_cache
from pathlib import Path

from tiercel.errors import UnsupportedError

KEEPER = Path(__file__).with_name("sandbox_keeper.py")
MAX_OUTPUT_BYTES = 64 << 10
MEMORY_BYTES, FILE_BYTES, MAX_PROCESSES, MAX_OPEN_FILES = 1 << 30, 16 << 20, 16, 64
REQUIRED_PROTECTIONS = ("files", "processes")


@dataclass(frozen=True)
class Outcome:
    """ok: it ended by itself with status 0 · why: "passed", "failed", "timeout", "killed"
    output: the first bytes of what it printed · seconds"""

    ok: bool
    why: str
    output: str
    seconds: float


def run(program: str, *, timeout: float = 5.0, memory: int = MEMORY_BYTES) -> Outcome:
    """Run Python text.  Raises UnsupportedError where this system cannot hold it."""
    missing = [name for name in REQUIRED_PROTECTIONS if not protections().get(name)]
    if missing:
        raise UnsupportedError(f"this system cannot confine a program ({', '.join(missing)} would be open): "
                               "it needs Linux with Landlock or namespaces; run this benchmark there")  # fmt: skip
    return _run(program, timeout, memory)[0]


@lru_cache(maxsize=1)
def protections() -> dict[str, str]:
    """What holds a program here, by name, and by which means; "" where nothing does."""
    if not sys.platform.startswith("linux"):
        return dict.fromkeys(("network", "files", "processes", "rights"), "")
    _, held = _run("pass", 20.0, MEMORY_BYTES)
    return held


def _run(program: str, timeout: float, memory: int, without: tuple[str, ...] = ()) -> tuple[Outcome, dict[str, str]]:
    """without: protections that a test pretends this system lacks."""
    folder = Path(tempfile.mkdtemp(prefix="tiercel-sandbox-"))
    try:
        (folder / "work").mkdir()
        source = folder / "work" / "program.py"
        source.write_text(program, encoding="utf-8", errors="surrogatepass")
        if os.geteuid() == 0:
            folder.chmod(0o755)
        order = {"folder": str(folder / "work"), "timeout": timeout, "memory": memory, "file_size": FILE_BYTES,
                 "processes": MAX_PROCESSES, "files": MAX_OPEN_FILES, "prefixes": _python_folders(),
                 "without": without}  # fmt: skip
        return _keep(order, timeout)
    finally:
        _remove(folder)


def _keep(order: dict[str, object], timeout: float) -> tuple[Outcome, dict[str, str]]:
    """Start the keeper, read its output until the clock ends it, and leave no process behind."""
    report, report_in = os.pipe()
    began = time.perf_counter()
    process = subprocess.Popen(
        [sys.executable, "-I", "-S", str(KEEPER), json.dumps(order), str(report_in)],
        stdin=subprocess.DEVNULL, stdout=subprocess.PIPE, stderr=subprocess.STDOUT, env={}, cwd="/",
        pass_fds=(report_in,), start_new_session=True,
    )  # fmt: skip
    os.close(report_in)
    assert process.stdout is not None
    kept, late = bytearray(), False
    try:
        with selectors.DefaultSelector() as ready:
            ready.register(process.stdout, selectors.EVENT_READ)
            end = began + timeout + 5.0  # the keeper has the same clock; this one is for the keeper
            while True:
                left = end - time.perf_counter()
                if left <= 0:
                    late = True
                    break
                if not ready.select(min(left, 0.05)):
                    if process.poll() is not None:
                        break
                    continue
                data = os.read(process.stdout.fileno(), 1 << 16)
                if not data:
                    break
                kept += data[: MAX_OUTPUT_BYTES - len(kept)]
    finally:
        with contextlib.suppress(ProcessLookupError):
            os.killpg(process.pid, signal.SIGKILL) if process.poll() is None and late else None
        try:
            process.wait(timeout=5)
        except subprocess.TimeoutExpired:
            os.killpg(process.pid, signal.SIGKILL)
            process.wait()
        process.stdout.close()
        with os.fdopen(report, "rb") as pipe:
            lines = pipe.read(1 << 16).decode("utf-8", "replace").splitlines()
    seconds = time.perf_counter() - began
    held: dict[str, str] = {}
    ended: dict[str, object] = {}
    for line in lines:
        with contextlib.suppress(ValueError):
            found = json.loads(line)
            held, ended = (found["held"], ended) if "held" in found else (held, found)
    output = bytes(kept).decode("utf-8", "replace")
    if not held:
        return Outcome(False, "killed", output or "the keeper did not start", seconds), {}
    status = ended.get("status")
    if ended.get("late") or late:
        return Outcome(False, "timeout", output, seconds), held
    why = "passed" if status == 0 else "killed" if not isinstance(status, int) or status < 0 else "failed"
    return Outcome(status == 0, why, output, seconds), held


def _python_folders() -> list[str]:
    """Where Python and its standard library are."""
    import sysconfig

    paths = {sys.base_prefix, sys.prefix, str(Path(os.path.realpath(sys.executable)).parent)}
    paths |= {path for name, path in sysconfig.get_paths().items() if name in ("stdlib", "platstdlib")}
    return sorted(paths)


def _remove(folder: Path) -> None:
    """Also what was made unreadable."""
    for path, names, _ in os.walk(folder):
        for name in names:
            with contextlib.suppress(OSError):
                if not (Path(path) / name).is_symlink():
                    (Path(path) / name).chmod(0o700)
    shutil.rmtree(folder, ignore_errors=True)
