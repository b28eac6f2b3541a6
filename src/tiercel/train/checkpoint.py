"""What a run needs to go on as if it had never stopped: weights, optimizer, random numbers, place in the data.

    out/checkpoints/step-00000500/    network.safetensors · optimizer.safetensors · state.json

A checkpoint is written under another name and renamed when all of it is on the disk: a folder of this name is complete,
whenever the process dies.  state.json has the sha256 of the other two files and of itself, so a damaged checkpoint is
found before anything is loaded, and the one before it is taken.  The last two are kept.  Everything is float bits in
safetensors and JSON; no pickle.
"""

from __future__ import annotations

import hashlib
import json
import shutil
import sys
from collections.abc import Mapping
from dataclasses import dataclass
from functools import partial
from pathlib import Path
from typing import Any

import torch
from torch import Tensor, nn

from tiercel.errors import FormatError, TiercelError
from tiercel.runtime.atomic import atomic_write, sync_folder
from tiercel.train import parallel
from tiercel.weights.safetensors import open_safetensors, write_safetensors_file
from tiercel.weights.stored import OutTensor

MAX_CHECKPOINTS = 2
SAFETENSORS_TYPES = {torch.float32: "F32", torch.bfloat16: "BF16", torch.float16: "F16", torch.float64: "F64"}
STATE, NETWORK, OPTIMIZER = "state.json", "network.safetensors", "optimizer.safetensors"
FIELDS = {"step", "position", "random", "cuda_random"}  # of state.json, at least
CHECKSUMS = {
    "sha256",
    "digest",
}  # of the two files by name, and of state.json without this field; both or, before 0.2, none


@dataclass
class Progress:
    """Where a run is: steps done, and `Batches.position`."""

    step: int
    position: Any


@dataclass(frozen=True)
class Checkpoint:
    """A checkpoint whose checksums are right, and its state.json."""

    path: Path
    state: Mapping[str, Any]


def save(
    folder: Path, progress: Progress, network: nn.Module, optimizer: torch.optim.Optimizer, extra: Mapping[str, Any]
) -> Path:
    """Write a checkpoint.

    Args:
        folder: `checkpoints` of the run.
        progress: what to go on from.
        network: parameters that require gradients are written.
        optimizer: AdamW; its moments are written.
        extra: plain values kept in state.json, such as the settings.

    Returns:
        Its folder.  Of several ranks the first writes whole tensors, which any number of ranks can go on from.

    Raises:
        TiercelError: the system refuses the write; it names the file.
    """
    done = folder / f"step-{progress.step:08}"
    weights: dict[str, Tensor] = {name: p for name, p in network.named_parameters() if p.requires_grad}
    moments = _moments(weights, optimizer)
    if parallel.ranks().count > 1:
        weights, moments = ({name: parallel.whole(t) for name, t in part.items()} for part in (weights, moments))
    if parallel.ranks().first:
        state = {
            "step": progress.step,
            "position": progress.position,
            "random": bytes(torch.get_rng_state().tolist()).hex(),
            "cuda_random": [bytes(s.tolist()).hex() for s in torch.cuda.get_rng_state_all()] if _cuda(network) else [],
            **extra,
        }
        try:
            _write_folder(done, weights, moments, state)
        except OSError as error:
            raise TiercelError(
                f"could not write {error.filename or done}: {error.strerror or error}; earlier checkpoints are kept"
            ) from error
    parallel.barrier()
    return done


def _write_folder(
    done: Path, weights: Mapping[str, Tensor], moments: Mapping[str, Tensor], state: dict[str, Any]
) -> None:
    folder = done.parent
    folder.mkdir(parents=True, exist_ok=True)
    part = folder / f".{done.name}.part"
    for stale in (part, *folder.glob(".*.part")):
        shutil.rmtree(stale, ignore_errors=True)
    part.mkdir()
    _write(part / NETWORK, weights)
    _write(part / OPTIMIZER, moments)
    state["sha256"] = {name: _sha256(part / name) for name in (NETWORK, OPTIMIZER)}
    state["digest"] = _digest(state)
    with atomic_write(part / STATE) as file:
        file.write(json.dumps(state, indent=2).encode())
    if done.exists():  # a run that was resumed further back comes by again
        _discard(done)
    part.rename(done)
    sync_folder(folder)
    for old in complete(folder)[:-MAX_CHECKPOINTS]:
        _discard(old)


def complete(folder: Path) -> list[Path]:
    """Return all complete checkpoints, oldest first."""
    return sorted(folder.glob("step-*")) if folder.is_dir() else []


def last_whole(folder: Path) -> Checkpoint | None:
    """Return the newest checkpoint that is not damaged; None where there is no checkpoint.

    Damaged ones that are newer are renamed to `damaged-step-…`, with a line on stderr.

    Raises:
        FormatError: there are checkpoints, and all are damaged.
    """
    found, damaged = None, dict[Path, FormatError]()
    for path in reversed(complete(folder)):
        try:
            found = verify(path)
            break
        except FormatError as damage:
            damaged[path] = damage
    if found is None and damaged:
        raise next(iter(damaged.values()))
    parallel.barrier()  # every rank has looked
    if found is not None and parallel.ranks().first:
        for path, error in damaged.items():
            print(f"{error}; going on from {found.path.name}", file=sys.stderr)
            aside = path.with_name(f"damaged-{path.name}")
            shutil.rmtree(aside, ignore_errors=True)
            path.rename(aside)
    return found


def verify(path: Path) -> Checkpoint:
    """Read state.json and compare all checksums.

    Raises:
        FormatError: a file is damaged or missing; it is named.
    """
    try:
        state = json.loads((path / STATE).read_bytes())
        if not isinstance(state, dict) or not set(state) >= FIELDS or len(CHECKSUMS & set(state)) == 1:
            raise ValueError
        if "digest" in state and state["digest"] != _digest(state):
            raise ValueError
    except (OSError, ValueError, RecursionError):
        raise FormatError(f"{path / STATE} is damaged") from None
    for name, digest in state.get("sha256", {}).items():
        try:
            right = _sha256(path / name) == digest
        except OSError:
            right = False
        if not right:
            raise FormatError(f"{path / name} is damaged")
    return Checkpoint(path, state)


def load(checkpoint: Checkpoint, network: nn.Module, optimizer: torch.optim.Optimizer) -> None:
    """Put weights, moments and random numbers back in place.

    Raises:
        FormatError: it belongs to another network.
    """
    path, state = checkpoint.path, checkpoint.state
    weights = {name: p for name, p in network.named_parameters() if p.requires_grad}
    _read(path / NETWORK, weights)
    for p in weights.values():
        if p not in optimizer.state:
            moments = (torch.zeros_like(p, memory_format=torch.preserve_format) for _ in range(2))
            optimizer.state[p] = dict(
                zip(("exp_avg", "exp_avg_sq"), moments, strict=True), step=torch.zeros((), device=p.device)
            )
    _read(path / OPTIMIZER, _moments(weights, optimizer))
    torch.set_rng_state(torch.tensor(list(bytes.fromhex(state["random"])), dtype=torch.uint8))
    if _cuda(network) and len(state["cuda_random"]) == torch.cuda.device_count():
        torch.cuda.set_rng_state_all(
            [torch.tensor(list(bytes.fromhex(s)), dtype=torch.uint8) for s in state["cuda_random"]]
        )


def _sha256(path: Path) -> str:
    with path.open("rb") as file:
        return hashlib.file_digest(file, "sha256").hexdigest()


def _digest(state: Mapping[str, Any]) -> str:
    rest = {name: value for name, value in state.items() if name != "digest"}
    return hashlib.sha256(json.dumps(rest, sort_keys=True).encode()).hexdigest()


def _moments(weights: Mapping[str, Tensor], optimizer: torch.optim.Optimizer) -> dict[str, Tensor]:
    return {
        f"{name}.{moment}": optimizer.state[p][moment]
        for name, p in weights.items()
        if p in optimizer.state
        for moment in ("exp_avg", "exp_avg_sq", "step")
    }


def _write(path: Path, tensors: Mapping[str, Tensor]) -> None:
    def rows(t: Tensor, start: int, stop: int) -> Tensor:
        return t[start:stop].cpu() if t.dim() else t.cpu()

    out = [
        OutTensor(n, tuple(t.shape), SAFETENSORS_TYPES[t.dtype], partial(rows, t.detach())) for n, t in tensors.items()
    ]
    write_safetensors_file(path, out, None)


@torch.no_grad()
def _read(path: Path, tensors: Mapping[str, Tensor]) -> None:
    stored = open_safetensors(path).tensors
    differ = {n for n, t in tensors.items() if n not in stored or stored[n].shape != tuple(t.shape)} | set(
        stored
    ) - set(tensors)
    if differ:
        raise FormatError(f"{path} is of another network: {sorted(differ)[0]} differs")
    for name, t in tensors.items():
        parallel.put(t, stored[name].rows().view(t.shape))


def _discard(folder: Path) -> None:
    """First it stops being a checkpoint, then it goes."""
    gone = folder.with_name(f".{folder.name}.gone.part")
    shutil.rmtree(gone, ignore_errors=True)
    folder.replace(gone)
    shutil.rmtree(gone, ignore_errors=True)


def _cuda(network: nn.Module) -> bool:
    return next(network.parameters()).is_cuda
