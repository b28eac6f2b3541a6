"""Files appear whole or not at all, and what a killed writer left goes away."""

import json
import subprocess
import sys

import pytest

import tiny
from tiercel.errors import TiercelError
from tiercel.runtime import atomic

KILLED = """
import os, signal, sys
from pathlib import Path
from tiercel.runtime.atomic import atomic_write
with atomic_write(Path(sys.argv[1])) as file:
    file.write(b"half")
    file.flush()
    {end}
"""


def writer(path, end):
    return [sys.executable, "-c", KILLED.format(end=end), str(path)]


@pytest.fixture(autouse=True)
def fresh(monkeypatch):
    monkeypatch.setattr(atomic, "_swept", set())


def parts(folder):
    return [p for p in folder.iterdir() if p.name.endswith(".part")]


@pytest.mark.parametrize("next_name", ["a.json", "b.gguf"])
def test_what_a_killed_writer_left_is_gone_after_the_next_write(tmp_path, next_name):
    subprocess.run(writer(tmp_path / "a.json", "os.kill(os.getpid(), signal.SIGKILL)"))
    assert len(parts(tmp_path)) == 1 and not (tmp_path / "a.json").exists()
    with atomic.atomic_write(tmp_path / next_name) as file:
        file.write(b"whole")
    assert not parts(tmp_path) and (tmp_path / next_name).read_bytes() == b"whole"


def test_the_file_of_a_writer_at_work_stays(tmp_path):
    process = subprocess.Popen(writer(tmp_path / "a.json", "print(flush=True); input()"), stdin=subprocess.PIPE,
                               stdout=subprocess.PIPE)  # fmt: skip
    process.stdout.readline()
    atomic.remove_leftovers(tmp_path)
    assert len(parts(tmp_path)) == 1
    process.communicate(b"\n")
    assert process.returncode == 0 and (tmp_path / "a.json").read_bytes() == b"half" and not parts(tmp_path)


def test_files_of_others_are_left_alone(tmp_path):
    for name in ("x.part", ".model.gguf.part", ".a.json.0123456.part", "a.json.01234567.part"):
        (tmp_path / name).write_bytes(b"")
    atomic.remove_leftovers(tmp_path)
    assert len(parts(tmp_path)) == 4


def test_a_failed_write_leaves_the_old_file_and_nothing_else(tmp_path):
    (tmp_path / "a.json").write_bytes(b"old")
    with (
        pytest.raises(TiercelError, match=r"could not write .*a\.json: full"),
        atomic.atomic_write(tmp_path / "a.json"),
    ):
        raise OSError(28, "full")
    assert (tmp_path / "a.json").read_bytes() == b"old" and not parts(tmp_path)


WRITERS = {  # command → the file that cannot be written
    "train sft {data} --config {model} --out {out} --steps 12 --length 128": "log.jsonl",
    "eval {model} --task {quiz} --max-tokens 4 --plain --out {out}": "items.jsonl",
    "export {model} {out}": "model.safetensors",
    "plan falcon-h1:0.5b --device h100 --plot {out}.svg": "out.svg",
    "problems write --count 50 {out}.jsonl": "out.jsonl",
}


@pytest.mark.parametrize("command", WRITERS)
def test_a_file_that_cannot_be_written_is_named_in_one_line(tmp_path, command):
    """RLIMIT_FSIZE stands for a full disk."""
    model = tiny.checkpoint(tmp_path / "model", "mamba2", template=tiny.TEMPLATE)
    data, quiz = tmp_path / "data.jsonl", tmp_path / "quiz.jsonl"
    data.write_text("".join(json.dumps({"tokens": tiny.ids(60, i)}) + "\n" for i in range(60)))
    quiz.write_text("".join(json.dumps({"question": f"{i} + 1?", "answer": str(i + 1)}) + "\n" for i in range(20)))
    words = command.format(data=data, quiz=quiz, model=model, out=tmp_path / "out").split()
    module = ["tiercel.problems"] if words.pop(0) == "problems" else ["tiercel", command.split()[0]]
    code = ("import resource, runpy, signal, sys; signal.signal(signal.SIGXFSZ, signal.SIG_IGN); "
            "resource.setrlimit(resource.RLIMIT_FSIZE, (1500, 1500)); sys.argv = sys.argv[1:]; "
            "runpy.run_module(sys.argv[0], run_name='__main__')")  # fmt: skip
    done = subprocess.run([sys.executable, "-c", code, *module, *words], capture_output=True, text=True)
    last = done.stderr.strip().splitlines()[-1]
    assert done.returncode == 1 and WRITERS[command] in last and "Traceback" not in done.stderr, done.stderr
