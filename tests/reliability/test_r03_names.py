"""R3: no name out of a file or a request leads out of its folder."""

from __future__ import annotations

import contextlib
import json
import os
import random
import sys
from pathlib import Path

import pytest

from tiercel.errors import TiercelError
from tiercel.hub import local_models, store
from tiercel.hub.download import shards_of
from tiercel.weights.safetensors import SafetensorsFolder

PARTS = ["..", ".", "", "/", "\\", "//", "C:", "\\\\host\\share", "~", "%2e%2e", "\0", "\n", " ", "a", "con", "é",
         "\u202e", "x.safetensors", "etc/passwd", "sha256:", "sha256-", "0" * 64, "F" * 64, "..\\..", "....//", "file://",
         "*", "$HOME", "`id`", "a" * 300, "model", ":latest", "-o", ".hidden", "\ud800"]  # fmt: skip
opened: list[str] = []
watching = False


def _hook(event: str, arguments: tuple[object, ...]) -> None:
    if watching and event in ("open", "os.rename", "os.remove", "os.mkdir", "os.link", "os.symlink", "os.rmdir"):
        opened.extend(os.fsdecode(a) for a in arguments[:2] if isinstance(a, (str, bytes)))


@pytest.fixture(scope="module", autouse=True)
def hook():
    sys.addaudithook(_hook)  # there is no way to remove it: `watching` switches it off
    yield


def hostile(random: random.Random) -> str:
    return random.choice(["", "/", "\\", ":"]).join(random.choice(PARTS) for _ in range(random.randrange(1, 5)))


def test_hostile_names_open_nothing_outside_the_root(tmp_path, monkeypatch, cases, figure):
    global watching
    home, outside = tmp_path / "home", tmp_path / "secret.safetensors"
    outside.write_bytes(b"secret")
    (tmp_path / "folder").mkdir()
    monkeypatch.setenv("TIERCEL_HOME", str(home))
    monkeypatch.setenv("HF_HUB_CACHE", str(tmp_path / "hub"))
    monkeypatch.setattr("huggingface_hub.constants.HF_HUB_CACHE", str(tmp_path / "hub"))  # read when it is imported
    count, refused = cases(300, 5000), 0

    def shard(name: str) -> None:
        index = {"weight_map": {"a": name}}
        (tmp_path / "folder" / "model.safetensors.index.json").write_text(json.dumps(index))
        SafetensorsFolder(tmp_path / "folder").close()

    # a short name or a digest: paths of the command line are the user's own
    takers = [
        shard, store.blob_path, store.remove, lambda name: store.copy("absent", name),
        lambda name: local_models.store_folder(name) or _refuse(),
        lambda name: shards_of({"weight_map": {"a": name}}),
    ]  # fmt: skip
    for take in takers:  # modules are imported now
        with contextlib.suppress(TiercelError):
            take("absent")
    for case in range(count):
        name = hostile(random.Random(f"name {case}"))
        for take in takers:
            opened.clear()
            watching = True
            try:
                take(name)
            except (TiercelError, UnicodeEncodeError):
                refused += 1
            finally:
                watching = False
            for path in opened:
                real = Path(os.path.realpath(os.path.join(tmp_path, path)))  # noqa: PTH118
                assert real.is_relative_to(tmp_path) and real != outside, (take, name, path)
    assert outside.read_bytes() == b"secret" and refused > count
    what = f"{count} hostile names × {len(takers)} readers of names"
    figure("R3", f"{what}: 0 opens, writes or deletes outside the root, {refused} refused")


def _refuse() -> None:
    raise TiercelError("no name")
