"""Runs one writer with each of its file operations failing in turn: a process of its own for test_r37_faults.py.

    faults.py WRITER FOLDER [STEP]    LD_PRELOAD is the shim of faults.c, FAULT_ROOT the folder
Prints one line of JSON for each failure: which call, how, what came of it.  STEP: every how-many-th call.

Each case is a forked child: what an earlier version wrote lies in the folder, the writer writes the next one over it,
its k-th call fails.  Then the folder must hold the old version or the new one, whole; the error, if there was one, must
be one line with a file's name; and the next write must leave the new version and nothing else.
"""

from __future__ import annotations

import contextlib
import ctypes
import errno
import hashlib
import importlib
import json
import os
import shutil
import signal
import sys
from collections.abc import Callable
from pathlib import Path
from typing import Any

import torch
from safetensors.torch import load_file

sys.path.insert(0, str(Path(__file__).parents[1]))

import tiny
from tiercel.errors import TiercelError

Writer = Callable[[Path, int], None]  # (folder, version)
HOW = {"EIO once": (errno.EIO, 0), "ENOSPC for good": (errno.ENOSPC, 1), "killed": (0, 0)}
SHIM = ctypes.CDLL(None)
WORDS = "attention+mamba2"
IMPORTED = {"adapter": "peft", "checkpoint": "tiercel.train.loop"}


def _source(version: int) -> Any:
    from tiercel.families.family import Layout
    from tiercel.families.pattern import PATTERN, rows
    from tiercel.weights.export import NetworkSource

    net = tiny.network(WORDS, seed=version)
    return NetworkSource(net, Layout(PATTERN, net.config, tuple(rows(net.config))))


def export(folder: Path, version: int) -> None:
    from tiercel.weights.export import export as write

    write(_source(version), folder / "model")


def quantize(folder: Path, version: int) -> None:
    from tiercel.weights.quantize import quantize as write

    write(_source(version), folder / "model", "int8")


def adapter(folder: Path, version: int) -> None:
    from tiercel.train.lora import adapt, save

    source = _source(version)
    torch.manual_seed(version)
    adapted = adapt(tiny.network(WORDS, seed=0), source.layout, rank=2)
    with torch.no_grad():
        for name, p in adapted.named_parameters():
            if ".lora_" in name:
                p.normal_()
    save(adapted, folder / "adapter")


def checkpoint(folder: Path, version: int) -> None:
    from tiercel.train.data import Batches, Documents
    from tiercel.train.loop import Settings, fit

    torch.manual_seed(0)
    net = tiny.network(WORDS, native=False).train().requires_grad_(True)
    documents = Documents.of((tiny.ids(20, i), [1] * 20) for i in range(30))
    settings = Settings(steps=4, lr=1e-3, save_every=2, out=folder / "run", resume=True, quiet=True)

    def on_step(step: int, network: Any) -> None:
        if version == 1 and step == 3:
            raise KeyboardInterrupt

    with contextlib.suppress(KeyboardInterrupt):
        fit(net, Batches(documents, rows=2, length=48, seed=3), settings, on_step=on_step)


def session(folder: Path, version: int) -> None:
    from tiercel.model import state_file

    net = tiny.network(WORDS)
    state = net.new_state()
    tokens = tiny.ids(40, version)
    with torch.no_grad():
        net(torch.tensor(tokens), state)
    state_file.save(state, folder / "talk", tokens)


def manifest(folder: Path, version: int) -> None:
    """The last part of a download and of `create`: a model in the store."""
    from tiercel.hub import local_models, store

    os.environ["TIERCEL_HOME"] = str(folder / "home")
    file = folder.parent.parent / f"blob-{version}.gguf"  # outside FAULT_ROOT
    file.write_bytes(b"GGUF" + bytes([version]) * 5000)
    local = local_models.LocalModel("x", file, file.stat().st_size, "0" * 12, 0.0, "blob")
    store.put("made", local, {"system": f"version {version}"})


WRITERS: dict[str, Writer] = {
    each.__name__: each for each in (export, quantize, adapter, checkpoint, session, manifest)
}


def contents(folder: Path) -> dict[str, str]:
    """What a reader of the result sees: file → digest.  Logs and locks grow with every run, a manifest has its time."""
    found = {}
    for path in sorted(folder.rglob("*")):
        if path.is_file() and path.name not in (".lock", "log.jsonl", "settings.json", "state.json"):
            data = path.read_bytes()
            if path.name == "talk":  # the order of its metadata is random
                data = repr(sorted((name, t.tolist()) for name, t in load_file(path).items())).encode()
            found[str(path.relative_to(folder))] = hashlib.sha256(data).hexdigest()
    return found


def whole(writer: str, folder: Path, before: dict[str, str], after: dict[str, str]) -> bool:
    """Whether each file is the old one or the new one; of a model in the store, the file that its manifest names."""
    left = {path: digest for path, digest in contents(folder).items() if path not in leftovers(folder)}
    if writer == "manifest":
        place = folder / "home" / "models" / "made" / "latest"
        about = json.loads((place / "tiercel.json").read_text())
        return bool(about["sha256"] == hashlib.sha256((place / about["file"]).read_bytes()).hexdigest())
    if writer == "checkpoint":  # `again` shows that training goes on from a whole one
        return True
    return all(left.get(path) in (before.get(path), after.get(path)) for path in {**before, **after})


def leftovers(folder: Path) -> list[str]:
    return [str(p.relative_to(folder)) for p in folder.rglob("*") if p.name.endswith((".part", ".tmp", ".incomplete"))]


def forked(*arguments: Any) -> tuple[int, str]:
    """`once` in a child: (exit status or -signal, what it says)."""
    read, write = os.pipe()
    child = os.fork()
    if child == 0:
        os.close(read)
        said = once(*arguments)
        os.write(write, said.encode()[:4000])
        os._exit(0)
    os.close(write)
    with os.fdopen(read) as pipe:
        said = pipe.read()
    return os.waitstatus_to_exitcode(os.waitpid(child, 0)[1]), said


def once(writer: Writer, folder: Path, version: int, k: int, how: tuple[int, int]) -> str:
    SHIM.fault_arm(k, *how)
    try:
        writer(folder, version)
        said = "done"
    except TiercelError as error:
        said = f"refused: {error}"
    except BaseException as error:
        said = f"TRACEBACK {type(error).__name__}: {error}"
    calls = SHIM.fault_calls()
    SHIM.fault_arm(0, 0, 0)
    return f"{calls} {said}"


def main() -> None:
    torch.set_num_threads(1)
    if sys.argv[1] in IMPORTED:  # once, not in every child
        importlib.import_module(IMPORTED[sys.argv[1]])
    name, root, step = sys.argv[1], Path(sys.argv[2]), int(sys.argv[3]) if len(sys.argv) > 3 else 1
    writer, old, new = WRITERS[name], root / "old", root / "new"
    for folder, versions in ((old, [1]), (new, [1, 2])):
        folder.mkdir(parents=True)
        for version in versions:
            forked(writer, folder, version, 0, (0, 0))
    shutil.copytree(old, probe := root / "probe")
    calls = int(forked(writer, probe, 2, 0, (0, 0))[1].split()[0])
    before, after = contents(old), contents(new)
    assert before != after and contents(probe) == after and calls > 3, (name, calls, before, after, contents(probe))
    for k in range(1, calls + 1, step):
        for how, arguments in HOW.items():
            case = root / f"{k}-{how.replace(' ', '-')}"
            shutil.copytree(old, case)
            status, said = forked(writer, case, 2, k, arguments)
            sound = whole(name, case, before, after)
            again = forked(writer, case, 2, 0, (0, 0))[1]
            print(json.dumps({
                "writer": name, "call": k, "how": how, "killed": status == -signal.SIGKILL, "said": said,
                "whole": sound, "again": again, "next": contents(case) == after,
                "leftovers": leftovers(case),
            }), flush=True)  # fmt: skip
            shutil.rmtree(case)


if __name__ == "__main__":
    main()
