"""More than one device: `torchrun --nproc-per-node 2 -m tiercel train sft …`.

FSDP2, torch's `fully_shard`: every block's weights, gradients and moments are cut into as many pieces as there are
ranks, and put together when the block runs.  The rows of a micro-batch are shared out, so that the same settings are
the same training on any number of ranks, but for the order in which sums are made.

    ranks()            rank and count from torchrun's variables, (0 of 1) without them
    shard(network)     before the optimizer is made
    total(tensor)      the sum over all ranks
    whole(tensor)      a sharded tensor put together; every rank must ask
    gathered(network)  a plain network on the CPU, to be exported
"""

from __future__ import annotations

import atexit
import os
from dataclasses import dataclass
from functools import cache
from typing import Any

import torch
from torch import Tensor

from tiercel.errors import RequestError, UnsupportedError
from tiercel.model.decoder import Decoder


@dataclass(frozen=True)
class Ranks:
    rank: int = 0
    count: int = 1

    @property
    def first(self) -> bool:
        """Whether this one writes files and prints."""
        return self.rank == 0


@cache
def ranks() -> Ranks:
    """Joins the group that torchrun has opened: NCCL where there are GPUs, else gloo."""
    import torch.distributed as dist

    if not dist.is_available():
        return Ranks()
    if not dist.is_initialized():
        if int(os.environ.get("WORLD_SIZE", "1")) < 2:
            return Ranks()
        if torch.cuda.is_available():
            torch.cuda.set_device(int(os.environ.get("LOCAL_RANK", "0")))
            dist.init_process_group("nccl")
        else:
            dist.init_process_group("gloo")
        atexit.register(dist.destroy_process_group)
    return Ranks(dist.get_rank(), dist.get_world_size())


def shard(network: Decoder) -> None:
    """Cut every block's parameters, and what is left over, among the ranks; nothing for one rank."""
    if ranks().count == 1:
        return
    from torch.distributed.device_mesh import init_device_mesh
    from torch.distributed.fsdp import fully_shard, register_fsdp_forward_method

    if any(p.requires_grad is False for p in network.parameters()):
        raise UnsupportedError("frozen weights beside trained ones are not trained on several ranks yet")
    device = next(network.parameters()).device.type
    mesh = init_device_mesh(device, (ranks().count,))
    for block in network.layers:
        fully_shard(block, mesh=mesh)
    # embedding, last norm and head stay put together from the forward to the end of the backward: the loss uses them
    fully_shard(network, mesh=mesh, reshard_after_forward=False)
    register_fsdp_forward_method(network, "hidden_states")


def total(t: Tensor) -> Tensor:
    """Σ over the ranks, in place."""
    if ranks().count > 1:
        torch.distributed.all_reduce(t)
    return t


def share(rows: list[Any]) -> list[Any]:
    """The rows of a micro-batch that are this rank's."""
    us = ranks()
    if len(rows) % us.count:
        raise RequestError(f"--batch {len(rows)} cannot be shared among {us.count} ranks: choose a multiple")
    return rows[us.rank :: us.count]


def whole(t: Tensor) -> Tensor:
    from torch.distributed.tensor import DTensor

    return t.full_tensor() if isinstance(t, DTensor) else t


@torch.no_grad()
def put(t: Tensor, numbers: Tensor) -> None:
    """Into a tensor that may be sharded: each rank takes its piece."""
    from torch.distributed.tensor import DTensor, distribute_tensor

    if isinstance(t, DTensor):
        numbers = numbers.to(t.device, t.dtype)
        t.copy_(distribute_tensor(numbers, t.device_mesh, t.placements, src_data_rank=None))
    else:
        t.copy_(numbers)


def barrier() -> None:
    if ranks().count > 1:
        torch.distributed.barrier()


@torch.no_grad()
def gathered(network: Decoder) -> Decoder:
    """The network itself on one rank; a plain copy of it on the CPU where it is sharded."""
    if ranks().count == 1:
        return network
    plain = Decoder(network.config).requires_grad_(False)
    own = dict(plain.named_parameters())
    for name, p in network.named_parameters():
        own[name].copy_(whole(p))
    return plain
