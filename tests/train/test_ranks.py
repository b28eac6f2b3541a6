"""Two ranks are one: the same losses, norms and weights, and checkpoints that either goes on from."""

import json
import os
import shutil
import socket
import subprocess
import sys
from pathlib import Path

import pytest
import torch
from two_ranks import run

import tiny

pytestmark = pytest.mark.skipif(not torch.distributed.is_available(), reason="this torch has no torch.distributed")


def on_two(*command: str | Path) -> None:
    with socket.socket() as s:
        s.bind(("127.0.0.1", 0))
        port = s.getsockname()[1]
    there = {"MASTER_ADDR": "127.0.0.1", "MASTER_PORT": str(port), "WORLD_SIZE": "2", "OMP_NUM_THREADS": "1"}
    ranks = [
        subprocess.Popen(
            [sys.executable, *command],
            env=os.environ | there | {"RANK": str(rank)},
            stderr=subprocess.PIPE,
            text=True,
        )
        for rank in range(2)
    ]
    try:
        for rank in ranks:
            _, said = rank.communicate(timeout=240)
            assert rank.returncode == 0, said[-3000:]
    finally:
        for rank in ranks:
            rank.kill()


def ended(folder: Path) -> tuple[list[dict], dict[str, torch.Tensor]]:
    return json.loads((folder / "told.json").read_text()), torch.load(folder / "weights.pt")


def test_two_ranks_train_as_one_does_and_either_goes_on_from_the_others_checkpoint(tmp_path):
    one, two, from_one = (tmp_path / name for name in ("one", "two", "from_one"))
    two.mkdir()
    run(one)
    first = ended(one)
    shutil.copytree(one, from_one)
    shutil.rmtree(from_one / "checkpoints" / "step-00000005")
    on_two(Path(__file__).with_name("two_ranks.py"), two, from_one)
    same(first, ended(two))
    same(first, ended(from_one))
    shutil.rmtree(two / "checkpoints" / "step-00000005")
    run(two)
    same(first, ended(two))


def same(a: tuple[list[dict], dict[str, torch.Tensor]], b: tuple[list[dict], dict[str, torch.Tensor]]) -> None:
    (log_a, weights_a), (log_b, weights_b) = a, b
    assert len(log_a) == len(log_b) == 6  # five steps and an evaluation
    for x, y in zip(log_a, log_b, strict=True):
        x, y = ({key: value for key, value in line.items() if key != "seconds"} for line in (x, y))
        assert x == pytest.approx(y, rel=2e-5)
    assert weights_a.keys() == weights_b.keys()
    for name, w in weights_a.items():
        torch.testing.assert_close(w, weights_b[name], rtol=1e-4, atol=2e-5, msg=lambda m, n=name: f"{n}: {m}")


def test_the_command_on_two_ranks_trains_and_both_end_well(tmp_path):
    data = tmp_path / "data.jsonl"
    data.write_text("\n".join(json.dumps({"text": f"one two three {i}"}) for i in range(20)))
    model = tiny.checkpoint(tmp_path / "model", "mamba2")
    options = "--steps 2 --batch 2 --length 64 --quiet --config".split()
    on_two("-m", "tiercel", "train", "sft", data, *options, model, "--out", tmp_path / "out")
    assert (tmp_path / "out" / "model.safetensors").exists()
    assert len((tmp_path / "out" / "log.jsonl").read_text().splitlines()) == 2


def test_leaving_waits_for_no_thread_and_loses_nothing(tmp_path):
    script = """
import atexit, threading
from pathlib import Path
from tiercel.runtime.exit import hard_exit
threading.Thread(target=threading.Event().wait).start()
atexit.register(Path("done").touch)
print("said", end="")
hard_exit(3)
"""
    ended = subprocess.run([sys.executable, "-c", script], cwd=tmp_path, capture_output=True, timeout=60, text=True)
    assert (ended.returncode, ended.stdout) == (3, "said")
    assert (tmp_path / "done").exists()
