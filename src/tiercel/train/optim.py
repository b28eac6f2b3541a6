"""AdamW, and the learning rate over time.

cosine     warm-up, then half a cosine down to `floor` times the rate
wsd        warm-up, stable, then linear down to `floor` times the rate over the last `decay` of the steps
constant   warm-up, then stable
"""

from __future__ import annotations

import math
from collections.abc import Sequence

import torch
from torch import Tensor, nn

from tiercel.model.decoder import Decoder
from tiercel.model.parameters import parameters
from tiercel.train.parallel import whole

SCHEDULES = ("cosine", "wsd", "constant")


def rate(step: int, steps: int, schedule: str, *, warmup: int, decay: float = 0.2, floor: float = 0.1) -> float:
    """The factor on the learning rate for step 0 … steps − 1."""
    if step < warmup:
        return (step + 1) / warmup
    if schedule == "constant":
        return 1.0
    begin = warmup if schedule == "cosine" else max(warmup, steps - round(decay * steps))
    along = min(1.0, max(0, step + 1 - begin) / max(1, steps - begin))
    down = (1 + math.cos(math.pi * along)) / 2 if schedule == "cosine" else 1 - along
    return floor + (1 - floor) * down


def adamw(
    network: nn.Module, lr: float, *, weight_decay: float = 0.1, betas: tuple[float, float] = (0.9, 0.95)
) -> torch.optim.AdamW:
    """Decay for matrices alone: norms, biases, convolutions, A_log, D and dt_bias stay as large as they like."""
    decayed: list[Tensor] = []
    free: list[Tensor] = []
    undecayed = _undecayed(network)
    for name, p in network.named_parameters():
        if p.requires_grad:
            (decayed if p.dim() >= 2 and name not in undecayed else free).append(p)
    groups = [{"params": decayed, "weight_decay": weight_decay}, {"params": free, "weight_decay": 0.0}]
    return torch.optim.AdamW([g for g in groups if g["params"]], lr=lr, betas=betas, eps=1e-8, fused=True)


def _undecayed(network: nn.Module) -> set[str]:
    """Names of the parameters of decoders in it whose `Param.decay` is off."""
    return {
        f"{path}.{name}" if path else name
        for path, module in network.named_modules() if isinstance(module, Decoder)
        for name, param in parameters(module.config).items() if not param.decay
    }  # fmt: skip


def clip(parameters: Sequence[Tensor], limit: float) -> Tensor:
    """Scales all gradients so that their norm is at most `limit`; the norm before, not yet known to the host."""
    grads = [p.grad for p in parameters if p.grad is not None]
    norm = whole(torch.nn.utils.get_total_norm(grads))  # of all ranks' pieces
    torch.nn.utils.clip_grads_with_norm_(parameters, limit, norm)
    return norm
