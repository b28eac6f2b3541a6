"""R25: a server that is killed under load starts again, clears what it left half written, and answers as before."""

from __future__ import annotations

import asyncio
import contextlib
import hashlib
import importlib.util
import random
import signal
import socket
import sys
import threading
import time
from pathlib import Path

import pytest

pytestmark = pytest.mark.skipif(sys.platform != "linux", reason="reads /proc")


@pytest.fixture(scope="module")
def overload():
    spec = importlib.util.spec_from_file_location("overload", Path(__file__).parents[2] / "benchmarks" / "overload.py")
    module = importlib.util.module_from_spec(spec)
    sys.modules["overload"] = module
    spec.loader.exec_module(module)
    return module


def test_killed_under_load_it_starts_clean(overload, checkpoints, cases, figure):
    rounds, folder = cases(1, 100), checkpoints["tiny"]
    blobs, data = folder / "home" / "blobs", b"x" * 400_000
    path, body = overload.question(1, 20, False)
    said = None
    for round in range(rounds + 1):
        dice = random.Random(f"kill {round}")
        with overload.serving(folder, spill=str(folder / "spill"), cache_bytes=100_000) as server:
            assert not list(blobs.glob(".*.part")), "what the last one left is gone at the start"
            answer = asyncio.run(overload.ask(server.port, path, body))
            words = overload.words_of(path, answer)
            said = words if said is None else said
            assert answer.status == 200 and words == said
            for number in range(6):
                load = overload.question(number, 300, True)
                threading.Thread(target=_load, args=(overload, server.port, *load), daemon=True).start()
            with socket.create_connection(("127.0.0.1", server.port)) as raw:
                digest = hashlib.sha256(b"another").hexdigest()
                head = f"POST /api/blobs/sha256:{digest} HTTP/1.1\r\nHost: localhost\r\nContent-Length: 900000\r\n\r\n"
                raw.sendall(head.encode() + data)
                time.sleep(dice.random() * 0.3)
                server.process.send_signal(signal.SIGKILL)
                server.process.wait()
    figure("R25", f"{rounds} kills under load: {rounds} starts with the same answer, 0 half files left")


def _load(overload, port, path, body) -> None:
    with contextlib.suppress(OSError):
        asyncio.run(overload.ask(port, path, body))
