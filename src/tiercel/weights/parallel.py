"""Loading a model over several processes of this machine:   load_parallel(path, 2)

The other processes run this file (`python -m tiercel.weights.parallel '{"path": …}'`), load the same model, keep their
shard of it, and follow the first one's orders (model/mirrored.py) until its pipe closes.
"""

from __future__ import annotations

import datetime
import gc
import json
import os
import subprocess
import sys
import tempfile
import weakref
from pathlib import Path
from typing import Any

import torch
import torch.distributed as dist

from tiercel.errors import RequestError, TiercelError
from tiercel.families.family import Layout
from tiercel.model.decoder import Decoder
from tiercel.model.mirrored import Group, MirroredDecoder, follow
from tiercel.model.tensor_parallel import shard
from tiercel.runtime.subprocess import terminate
from tiercel.tokenizer.tokenizer import Tokenizer
from tiercel.weights.load import Progress, load

JOIN_SECONDS = 120  # for all processes to meet, once each has its shard
MAX_PROCESSES = 64


def load_parallel(
    path: Path, size: int, *, dtype: str | torch.dtype = "auto", progress: Progress | None = None
) -> tuple[MirroredDecoder, Tokenizer | None, Layout]:
    """The first process's shard of a network, with the others at work; otherwise as `weights.load.load`.

    Raises:
        RequestError: the network cannot be split so, its weights are quantized, or this process is in a group already.
        TiercelError: another process did not start.
    """
    if not 2 <= size <= MAX_PROCESSES:
        raise RequestError(f"tensor_parallel is a number of processes from 1 to {MAX_PROCESSES}, not {size}")
    gc.collect()  # an earlier model that is no longer used
    if dist.is_initialized():
        raise RequestError(
            "this process is in a torch.distributed group already, and can load no tensor-parallel model"
        )
    if path.suffix in (".json", ".toml"):
        raise RequestError("a pattern file has fresh weights, to be trained; tensor_parallel is for inference")
    network, tokenizer, layout = load(path, dtype=dtype, progress=progress)
    network.unpack()
    part = shard(network, 0, size, MirroredDecoder)
    del network
    with tempfile.TemporaryDirectory(prefix="tiercel-group-") as folder:
        order = {
            "path": str(path),
            "size": size,
            "dtype": str(dtype).removeprefix("torch."),
            "store": f"{folder}/store",
        }
        others = [_start(order | {"rank": rank}) for rank in range(1, size)]
        try:
            _await(others, b"loaded\n")
            _join(0, size, order["store"])
            _await(others, b"joined\n")  # they read the store until then
        except BaseException:
            _end(others)
            raise
    part.group = Group([other.stdin for other in others if other.stdin is not None])
    weakref.finalize(part, _end, others)
    return part, tokenizer, layout


def _start(order: dict[str, Any]) -> subprocess.Popen[bytes]:
    command = [sys.executable, "-m", "tiercel.weights.parallel", json.dumps(order)]
    return subprocess.Popen(command, stdin=subprocess.PIPE, stdout=subprocess.PIPE)


def _await(others: list[subprocess.Popen[bytes]], line: bytes) -> None:
    for other in others:
        assert other.stdout is not None
        if other.stdout.readline() != line:
            raise TiercelError("a process of the tensor-parallel group did not start; see its message above")


def _end(others: list[subprocess.Popen[bytes]]) -> None:
    for other in others:
        terminate(other)
    if dist.is_initialized():
        dist.destroy_process_group()


def _join(rank: int, size: int, store: Any) -> None:
    """Meet the other processes, on this machine's loopback interface; each takes its share of the cores."""
    if sys.platform == "linux":
        os.environ.setdefault("GLOO_SOCKET_IFNAME", "lo")
    torch.set_num_threads(max(1, torch.get_num_threads() // size))
    meeting = dist.FileStore(str(store), size)
    dist.init_process_group(
        "gloo", store=meeting, rank=rank, world_size=size, timeout=datetime.timedelta(seconds=JOIN_SECONDS)
    )


def main() -> None:
    """Be one of the other processes."""
    order = json.loads(sys.argv[1])
    network, _, _ = load(order["path"], dtype=order["dtype"])
    network.unpack()
    part: Decoder = shard(network, order["rank"], order["size"])
    del network
    _say(b"loaded\n")
    _join(order["rank"], order["size"], order["store"])
    _say(b"joined\n")
    follow(part, sys.stdin.buffer)


def _say(line: bytes) -> None:
    sys.stdout.buffer.write(line)
    sys.stdout.buffer.flush()


if __name__ == "__main__":
    main()
