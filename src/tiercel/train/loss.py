"""Cross-entropy of the next token, a slice of tokens at a time: the logits (T, V) are never all there.

Losses are sums; the caller divides by the number of counted tokens of the whole step, over all its micro-batches and
ranks, so that every token weighs the same however a step is cut.
"""

from __future__ import annotations

from collections.abc import Callable, Iterator
from typing import Any

import torch
import torch.nn.functional as F
from torch import Tensor, nn
from torch.autograd.function import once_differentiable
from torch.utils.checkpoint import checkpoint

from tiercel.model.decoder import Decoder
from tiercel.ops.cpu import training
from tiercel.train.data import Rows

SLICE_LOGITS = {"cpu": 1 << 22, "cuda": 1 << 26}  # logits that exist at once


def next_token_loss(network: Decoder, rows: Rows) -> Tensor:
    """The sum of −log p over the counted tokens of a micro-batch, float32."""
    x_TD, head = _counted(network, rows)
    return chunked_cross_entropy(x_TD, rows.targets_T, head, network.config.vocab_size, frozen=not learns(network.head))


def next_token_logprobs(network: Decoder, rows: Rows) -> Tensor:
    """log p of each counted token of a micro-batch, (T,) float32."""
    x_TD, head = _counted(network, rows)
    return -torch.cat(list(_slices(x_TD, rows.targets_T, _entropy(head, "none"), network.config.vocab_size)))


def distillation_loss(network: Decoder, rows: Rows, teacher: Decoder) -> Tensor:
    """The sum of KL(teacher ‖ network) over the counted tokens of a micro-batch, float32; the teacher is fixed."""
    with torch.no_grad():
        t_TD, teacher_head = _counted(teacher, rows)
    x_TD, head = _counted(network, rows)

    def divergence(x_TD: Tensor, t_TD: Tensor) -> Tensor:
        with torch.no_grad():
            wanted_TV = teacher_head(t_TD).float().log_softmax(-1)
        return F.kl_div(head(x_TD).float().log_softmax(-1), wanted_TV, reduction="sum", log_target=True)

    total = torch.zeros((), device=x_TD.device)
    for summed in _slices(x_TD, t_TD, divergence, network.config.vocab_size):
        total = total + summed
    return total


def learns(module: nn.Module) -> bool:
    """Return whether any parameter of a module requires a gradient."""
    return any(p.requires_grad for p in module.parameters())


def _counted(network: Decoder, rows: Rows) -> tuple[Tensor, Callable[[Tensor], Tensor]]:
    """Return the hidden states of the counted tokens, (T, D), and the head."""
    x_TD = network.hidden_states(rows.tokens_BL, rows.batch)
    if len(rows.counted_T) < x_TD.shape[0]:
        x_TD = x_TD[rows.counted_T]
    return x_TD, lambda x_TD: network.head(x_TD, network.config.logit_scale)


def chunked_cross_entropy(
    x_TD: Tensor,
    targets_T: Tensor,
    head: Callable[[Tensor], Tensor],
    vocab_size: int,
    chunk: int | None = None,
    *,
    frozen: bool = False,
) -> Tensor:
    """Σ_t −log softmax(head(x_t))[target_t], float32; a slice's logits are recomputed in the backward.

    chunk: tokens of a slice; None chooses by the vocabulary.  frozen: nothing in `head` learns; then the gradient of x
    is all there is, and made at once, so that no logits are made twice.
    """
    if frozen and torch.is_grad_enabled():
        summed: Tensor = FrozenHead.apply(x_TD, targets_T, head, vocab_size, chunk)
        return summed
    total = torch.zeros((), device=x_TD.device)
    for summed in _slices(x_TD, targets_T, _entropy(head, "sum"), vocab_size, chunk):
        total = total + summed
    return total


class FrozenHead(torch.autograd.Function):
    @staticmethod
    def forward(ctx: Any, x_TD: Tensor, targets_T: Tensor, head: Any, vocab_size: int, chunk: int | None) -> Tensor:
        total, dx_TD = torch.zeros((), device=x_TD.device), torch.empty_like(x_TD)
        chunk = chunk or _chunk(x_TD, vocab_size)
        for x, targets, dx in zip(x_TD.split(chunk), targets_T.split(chunk), dx_TD.split(chunk), strict=True):
            with torch.enable_grad():
                x = x.detach().requires_grad_()
                logits = head(x)
            losses_T, dlogits_TV = _losses(logits.detach(), targets)
            total += losses_T.sum()
            dx.copy_(torch.autograd.grad(logits, x, dlogits_TV)[0])
        ctx.save_for_backward(dx_TD)
        return total

    @staticmethod
    @once_differentiable
    def backward(ctx: Any, dtotal: Tensor) -> tuple[Tensor | None, ...]:
        (dx_TD,) = ctx.saved_tensors
        return (dx_TD * dtotal).to(dx_TD.dtype), None, None, None, None


def _losses(logits_TV: Tensor, targets_T: Tensor) -> tuple[Tensor, Tensor]:
    """−log softmax(logits)[target], and its gradient in their dtype and, where kernels make it, in their place."""
    if training.takes(logits_TV):
        return training.cross_entropy_(logits_TV, targets_T), logits_TV
    logp_TV, targets_T1 = logits_TV.float().log_softmax(1), targets_T.unsqueeze(1)
    losses_T = -logp_TV.gather(1, targets_T1).squeeze(1)
    p_TV = logp_TV.exp_()
    p_TV.scatter_add_(1, targets_T1, torch.full_like(targets_T1, -1.0, dtype=p_TV.dtype))
    return losses_T, p_TV.to(logits_TV.dtype)


def _chunk(x_TD: Tensor, vocab_size: int) -> int:
    """Slices of one length, so that none is a few tokens that cost a whole matrix."""
    limit, T = max(64, SLICE_LOGITS.get(x_TD.device.type, SLICE_LOGITS["cpu"]) // vocab_size), len(x_TD)
    return max(1, -(-T // max(1, round(T / limit))))


def _entropy(head: Callable[[Tensor], Tensor], reduction: str) -> Callable[[Tensor, Tensor], Tensor]:
    return lambda x_TD, targets_T: F.cross_entropy(head(x_TD).float(), targets_T, reduction=reduction)


def _slices(
    x_TD: Tensor,
    wanted: Tensor,
    loss: Callable[[Tensor, Tensor], Tensor],
    vocab_size: int,
    chunk: int | None = None,
) -> Iterator[Tensor]:
    """The loss of a slice of tokens after another; wanted: (T, …), what it compares them with."""
    chunk = chunk or _chunk(x_TD, vocab_size)
    for x, w in zip(x_TD.split(chunk), wanted.split(chunk), strict=True):
        if len(x) == len(x_TD) or not torch.is_grad_enabled():  # a single slice may as well be kept
            yield loss(x, w)
        else:
            yield checkpoint(loss, x, w, use_reentrant=False)
