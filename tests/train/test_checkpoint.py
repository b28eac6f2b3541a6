"""A damaged checkpoint is noticed and the one before it taken; one folder has one writer; a full disk is named."""

import contextlib
import json
import os
import shutil
from pathlib import Path

import pytest
import torch

import tiny
from tiercel.errors import FormatError, RequestError, TiercelError
from tiercel.runtime import lock
from tiercel.train import checkpoint
from tiercel.train.data import Batches, Documents
from tiercel.train.loop import Settings, fit

FILES = ("network.safetensors", "optimizer.safetensors", "state.json")


class Stop(Exception):
    pass


def run(out, stop=0, **changes):
    torch.manual_seed(0)
    network = tiny.network("attention+mamba2", native=False).train().requires_grad_(True)
    documents = Documents.of((tiny.ids(20, i), [1] * 20) for i in range(30))

    def on_step(step, _):
        if step == stop:
            raise Stop

    settings = Settings(steps=6, save_every=2, out=out, resume=True, quiet=True, **changes)
    with contextlib.suppress(Stop):
        fit(network, Batches(documents, rows=2, length=48, seed=3), settings, on_step=on_step)
    return [p.detach().clone() for p in network.parameters()]


@pytest.fixture(scope="module")
def stopped(tmp_path_factory):
    """A run that was stopped after its second checkpoint, and the weights it would have ended with."""
    out = tmp_path_factory.mktemp("run") / "out"
    run(out, stop=5)
    whole = shutil.copytree(out, out.with_name("whole"))
    return out, run(whole)


def flip(path, at, bit=64):
    data = bytearray(path.read_bytes())
    data[at] ^= bit
    path.write_bytes(data)


@pytest.mark.parametrize("at", [0, 9, 0.3, 0.7, -1])
@pytest.mark.parametrize("name", FILES)
def test_a_damaged_file_is_named_and_the_checkpoint_before_it_taken(stopped, tmp_path, capsys, name, at):
    out, right = stopped
    copy = shutil.copytree(out, tmp_path / "out")
    file = sorted((copy / "checkpoints").iterdir())[-1] / name
    flip(file, at if isinstance(at, int) else int(at * file.stat().st_size), 1)
    weights = run(copy)
    assert all(torch.equal(a, b) for a, b in zip(weights, right, strict=True))
    assert f"{name} is damaged; going on from step-00000002" in capsys.readouterr().err
    assert (copy / "checkpoints" / "damaged-step-00000004").is_dir()


@pytest.mark.parametrize("damage", ["missing", "cut", "empty"])
def test_a_file_that_is_missing_or_short_is_damage_too(stopped, tmp_path, capsys, damage):
    out, _ = stopped
    for name in FILES:
        copy = shutil.copytree(out, tmp_path / name)
        file = sorted((copy / "checkpoints").iterdir())[-1] / name
        data = file.read_bytes()
        file.unlink()
        if damage != "missing":
            file.write_bytes(data[: len(data) // 2] if damage == "cut" else b"")
        assert checkpoint.last_whole(copy / "checkpoints").state["step"] == 2
        assert "is damaged" in capsys.readouterr().err


@pytest.mark.parametrize("field", ["sha256", "digest", "step", "position", "random", "settings"])
def test_every_field_of_the_state_is_covered_by_its_checksum(stopped, tmp_path, field):
    out, _ = stopped
    copy = shutil.copytree(sorted((out / "checkpoints").iterdir())[-1], tmp_path / "step-00000004")
    state = json.loads((copy / "state.json").read_text())
    for change in (
        lambda s: s.pop(field),
        lambda s: s.update({field + "x": s.pop(field)}),
        lambda s: s.update({field: 7}),
    ):
        changed = dict(state)
        change(changed)
        (copy / "state.json").write_text(json.dumps(changed))
        with pytest.raises(FormatError, match="is damaged"):
            checkpoint.verify(copy)


def test_where_all_are_damaged_the_run_stops_and_begins_nothing_anew(stopped, tmp_path):
    out, _ = stopped
    copy = shutil.copytree(out, tmp_path / "out")
    for folder in (copy / "checkpoints").iterdir():
        flip(folder / "network.safetensors", -1)
    with pytest.raises(FormatError, match=r"step-00000004/network\.safetensors is damaged"):
        run(copy)
    assert len(list((copy / "checkpoints").glob("step-*"))) == 2


def test_a_checkpoint_without_checksums_is_read_as_before(stopped, tmp_path):
    out, right = stopped
    copy = shutil.copytree(out, tmp_path / "out")
    file = sorted((copy / "checkpoints").iterdir())[-1] / "state.json"
    state = json.loads(file.read_text())
    file.write_text(json.dumps({name: value for name, value in state.items() if name not in ("sha256", "digest")}))
    assert all(torch.equal(a, b) for a, b in zip(run(copy), right, strict=True))


def test_one_folder_is_trained_in_by_one_process(tmp_path):
    busy = pytest.raises(RequestError, match=rf"in use by another training run, process {os.getpid()}")
    with lock.lock_folder(tmp_path, "another training run"), busy:
        run(tmp_path)
    run(tmp_path, stop=1)  # a lock that was left is none


@pytest.mark.parametrize("name", ["log.jsonl", *FILES])
def test_a_full_disk_is_named_and_earlier_checkpoints_stay(stopped, tmp_path, monkeypatch, name):
    out, _ = stopped
    copy = shutil.copytree(out, tmp_path / "out")
    fsync, names = os.fsync, []

    def full(descriptor):
        names.append(str(Path(f"/proc/self/fd/{descriptor}").readlink()))
        if any(name in path for path in names):
            raise OSError(28, "No space left on device")
        fsync(descriptor)

    monkeypatch.setattr(os, "fsync", full)
    with pytest.raises(TiercelError, match=rf"could not write .*{name}: No space left"):
        run(copy)
    assert checkpoint.last_whole(copy / "checkpoints").state["step"] == 4
