"""R37, as SQLite tests: every file operation of every writer fails in turn, once, for good, or with the process."""

from __future__ import annotations

import json
import os
import shutil
import subprocess
import sys
from pathlib import Path

import pytest

pytestmark = pytest.mark.skipif(sys.platform != "linux" or not shutil.which("gcc"), reason="preloads a shim built here")
HERE = Path(__file__).parent
WRITERS = ["export", "quantize", "session", "manifest",
           *(pytest.param(name, marks=pytest.mark.slow) for name in ("adapter", "checkpoint"))]  # fmt: skip


@pytest.fixture(scope="module")
def shim(tmp_path_factory) -> Path:
    path = tmp_path_factory.mktemp("shim") / "faults.so"
    subprocess.run(["gcc", "-shared", "-fPIC", "-O1", "-o", path, HERE / "faults.c", "-ldl"], check=True)
    return path


@pytest.mark.parametrize("writer", WRITERS)
def test_old_file_or_new_one_whatever_fails(writer, shim, tmp_path, cases, figure):
    if writer == "adapter":
        pytest.importorskip("peft")
    root = tmp_path / "faults"
    environment = os.environ | {"LD_PRELOAD": str(shim), "FAULT_ROOT": str(root), "OMP_NUM_THREADS": "1"}
    step = cases(40 if writer == "checkpoint" else 11, 1)
    done = subprocess.run([sys.executable, HERE / "faults.py", writer, root, str(step)], capture_output=True, text=True,
                          env=environment)  # fmt: skip
    found = [json.loads(line) for line in done.stdout.splitlines()]
    assert done.returncode == 0 and len(found) >= 3, done.stderr[-2000:]
    for case in found:
        assert "TRACEBACK" not in case["said"], case
        assert case["killed"] == (case["how"] == "killed"), case
        if "refused" in case["said"]:
            assert str(root) in case["said"] and "\n" not in case["said"], case
        assert case["whole"], case
        assert case["next"] and not case["leftovers"] and "done" in case["again"], case
    refused = sum("refused" in case["said"] for case in found)
    killed, calls = sum(case["killed"] for case in found), max(case["call"] for case in found)
    figure("R37", f"{writer}: {len(found)} faults over {calls} calls, {refused} named in one line, {killed} killed; "
           "each file old or new, and whole")  # fmt: skip
