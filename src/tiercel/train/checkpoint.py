"""What a run needs to go on as if it had never stopped: weights, optimizer, random numbers, place in the data.

    out/checkpoints/step-00000500/    network.safetensors · optimizer.safetensors · state.json

A checkpoint is written under another name and renamed when all of it is on the disk: a folder of this name is whole,
whenever the process dies.  The last two are kept.  Everything is float bits in safetensors and JSON; no pickle.
"""

from __future__ import annotations

import json
import shutil
from collections.abc import Mapping
from dataclasses import dataclass
from functools import partial
from pathlib import Path
from typing import Any

import torch
from torch import Tensor, nn

from tiercel.errors import FormatError
from tiercel.runtime.atomic import _sync_folder, atomic_write
from tiercel.train import parallel
from tiercel.weights.safetensors import open_safetensors, write_safetensors_file
from tiercel.weights.stored import OutTensor

KEPT = 2
TYPES = {torch.float32: "F32", torch.bfloat16: "BF16", torch.float16: "F16", torch.float64: "F64"}


@dataclass
class Progress:
    """Where a run is: the number of steps done, and what `Batches.position` says."""

    step: int
    position: Any


def save(
    folder: Path, progress: Progress, network: nn.Module, optimizer: torch.optim.Optimizer, extra: Mapping[str, Any]
) -> Path:
    """folder: `checkpoints` of the run.  extra: settings, kept beside the state to be compared on resuming.

    Of several ranks the first writes whole tensors, which any number of ranks can go on from.
    """
    done = folder / f"step-{progress.step:08}"
    weights: dict[str, Tensor] = {name: p for name, p in network.named_parameters() if p.requires_grad}
    moments = _moments(weights, optimizer)
    if parallel.ranks().count > 1:
        weights, moments = ({name: parallel.whole(t) for name, t in part.items()} for part in (weights, moments))
    if parallel.ranks().first:
        _write_folder(done, weights, moments, progress, network, extra)
    parallel.barrier()
    return done


def _write_folder(
    done: Path,
    weights: Mapping[str, Tensor],
    moments: Mapping[str, Tensor],
    progress: Progress,
    network: nn.Module,
    extra: Mapping[str, Any],
) -> None:
    folder = done.parent
    folder.mkdir(parents=True, exist_ok=True)
    part = folder / f".{done.name}.part"
    for stale in (part, *folder.glob(".*.part")):
        shutil.rmtree(stale, ignore_errors=True)
    part.mkdir()
    _write(part / "network.safetensors", weights)
    _write(part / "optimizer.safetensors", moments)
    state = {
        "step": progress.step,
        "position": progress.position,
        "random": bytes(torch.get_rng_state().tolist()).hex(),
        "cuda_random": [bytes(s.tolist()).hex() for s in torch.cuda.get_rng_state_all()] if _cuda(network) else [],
        **extra,
    }
    with atomic_write(part / "state.json") as file:
        file.write(json.dumps(state, indent=2).encode())
    if done.exists():  # a run that was resumed further back comes by again
        _discard(done)
    part.rename(done)
    _sync_folder(folder)
    for old in complete(folder)[:-KEPT]:
        _discard(old)


def complete(folder: Path) -> list[Path]:
    """All whole checkpoints, oldest first."""
    return sorted(folder.glob("step-*")) if folder.is_dir() else []


def load(path: Path, network: nn.Module, optimizer: torch.optim.Optimizer) -> dict[str, Any]:
    """Everything back in place → state.json.  FormatError when it belongs to another network."""
    weights = {name: p for name, p in network.named_parameters() if p.requires_grad}
    _read(path / "network.safetensors", weights)
    for p in weights.values():
        if p not in optimizer.state:
            moments = (torch.zeros_like(p, memory_format=torch.preserve_format) for _ in range(2))
            optimizer.state[p] = dict(
                zip(("exp_avg", "exp_avg_sq"), moments, strict=True), step=torch.zeros((), device=p.device)
            )
    _read(path / "optimizer.safetensors", _moments(weights, optimizer))
    state: dict[str, Any] = json.loads((path / "state.json").read_text())
    torch.set_rng_state(torch.tensor(list(bytes.fromhex(state["random"])), dtype=torch.uint8))
    if _cuda(network) and len(state["cuda_random"]) == torch.cuda.device_count():
        torch.cuda.set_rng_state_all(
            [torch.tensor(list(bytes.fromhex(s)), dtype=torch.uint8) for s in state["cuda_random"]]
        )
    return state


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

    out = [OutTensor(n, tuple(t.shape), TYPES[t.dtype], partial(rows, t.detach())) for n, t in tensors.items()]
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
