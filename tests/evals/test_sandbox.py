"""What a model programmed does no harm: thirty hostile programs, each watched from outside."""

from __future__ import annotations

import socket
import subprocess
import sys
import time
from pathlib import Path

import pytest

from evals.hostile import PROGRAMS, QUICK
from tiercel.errors import UnsupportedError
from tiercel.evals import sandbox

held = sandbox.protections()
confined = pytest.mark.skipif(
    not all(held.get(name) for name in sandbox.REQUIRED_PROTECTIONS), reason="this system has no Landlock or namespaces"
)


@pytest.fixture
def outside(tmp_path):
    """A folder, a process and a port that a program should not reach."""
    (tmp_path / "secret").write_text("kept")
    tmp_path.chmod(0o777)
    victim = subprocess.Popen([sys.executable, "-c", "import time; time.sleep(600)"], env={"SECRET": "kept"})
    server = socket.create_server(("127.0.0.1", 0))
    yield tmp_path, victim, server.getsockname()[1]
    assert victim.poll() is None, "a process outside was ended"
    assert (tmp_path / "secret").read_text() == "kept"
    assert sorted(p.name for p in tmp_path.iterdir()) == ["secret"]
    server.close()
    victim.kill()
    victim.wait()


def programs_left() -> list[str]:
    """Processes that run a program of the sandbox."""
    found = []
    for folder in Path("/proc").iterdir():
        if folder.name.isdigit():
            try:
                words = (folder / "cmdline").read_bytes().split(b"\0")
            except OSError:
                continue
            if b"program.py" in words or any(b"sandbox_keeper" in word for word in words):
                found.append(folder.name)
    return found


def stay(before: set[str]) -> set[str]:
    """Of the new processes those that do not end within half a minute; tests beside this one start some too."""
    left, until = set(programs_left()) - before, time.monotonic() + 30
    while left and time.monotonic() < until:
        time.sleep(0.05)
        left &= set(programs_left())
    return left


def check(name, outside, monkeypatch):
    monkeypatch.setenv("SECRET", "kept")
    folder, victim, port = outside
    program, expected = PROGRAMS[name]
    for key, value in {"{outside}": str(folder), "{victim}": str(victim.pid), "{port}": str(port)}.items():
        program = program.replace(key, value)
    before = set(programs_left())
    outcome = sandbox.run(program, timeout=1.5)
    assert "ESCAPED" not in outcome.output
    assert len(outcome.output) <= sandbox.MAX_OUTPUT_BYTES
    if expected:
        assert expected in outcome.output, outcome
    elif name != "pretends to have passed":
        assert not outcome.ok, outcome
    assert not stay(before), "a process was left behind"
    assert not Path("/tmp/tiercel-was-here").exists()


@confined
@pytest.mark.parametrize("name", QUICK)
def test_hostile_programs_do_no_harm(name, outside, monkeypatch):
    check(name, outside, monkeypatch)


@confined
@pytest.mark.slow
@pytest.mark.parametrize("name", [name for name in PROGRAMS if name not in QUICK])
def test_more_hostile_programs_do_no_harm(name, outside, monkeypatch):
    check(name, outside, monkeypatch)


def test_there_are_thirty_of_them():
    assert len(PROGRAMS) >= 30


@confined
def test_an_honest_program_runs():
    outcome = sandbox.run(
        "import math, re, json, collections, itertools, datetime, tempfile\n"
        "with open('mine', 'w') as f:\n    f.write('é')\n"
        "with tempfile.TemporaryFile() as f:\n    f.write(b'x')\n"
        "print(open('mine').read(), math.sqrt(16))"
    )
    assert (outcome.ok, outcome.why, outcome.output) == (True, "passed", "é 4.0\n")
    assert sandbox.run("raise ValueError('no')").why == "failed"
    assert not sandbox.run("import sys; sys.exit(3)").ok


@confined
def test_nothing_of_its_folder_stays():
    import tempfile

    before = set(Path(tempfile.gettempdir()).glob("tiercel-sandbox*"))
    sandbox.run("import os\nos.mkdir('a'); os.mkdir('a/b'); os.chmod('a', 0)")
    assert set(Path(tempfile.gettempdir()).glob("tiercel-sandbox*")) <= before


def test_a_system_that_cannot_confine_is_refused(monkeypatch):
    monkeypatch.setattr(sandbox, "protections", lambda: {"network": "namespace", "processes": "namespace"})
    with pytest.raises(UnsupportedError, match=r"cannot confine a program \(files would be open\)"):
        sandbox.run("print(1)")


@confined
def test_an_early_exit_is_no_success():
    from tiercel.evals.humaneval import HumanEval
    from tiercel.evals.task import Item

    item = Item("x", "def f(x):\n", "", more={"test": "def check(f):\n    assert f(1) == 2\n", "entry_point": "f"})
    assert HumanEval().grade(item, "    return x + 1\n").correct
    assert HumanEval().grade(item, "Sure:\n```python\ndef f(x):\n    return x + 1\n```").correct
    assert not HumanEval().grade(item, "    raise SystemExit(0)\n").correct
    assert not HumanEval().grade(item, "    import os; os._exit(0)\n").correct
    assert not HumanEval().grade(item, "    return x\n").correct


@confined
@pytest.mark.parametrize("without", ["landlock", "namespaces"])
def test_what_one_kind_of_system_lacks_another_means_replaces(without, tmp_path):
    if without == "landlock" and held.get("mounts") is None:
        pytest.skip("no mount namespaces here")
    program = f"open('mine', 'w').close()\nopen({str(tmp_path / 'new')!r}, 'w')"
    outcome, means = sandbox._run(program, 5.0, sandbox.MEMORY_BYTES, (without,))
    assert means.get("files"), "it still cannot write elsewhere"
    assert means.get("network")
    assert "new" in outcome.output and not list(tmp_path.iterdir())
    daemon = PROGRAMS["a daemon that stays"][0]
    before = set(programs_left())
    sandbox._run(daemon, 5.0, sandbox.MEMORY_BYTES, (without,))
    assert not stay(before)
