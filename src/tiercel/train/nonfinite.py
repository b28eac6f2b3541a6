"""Find where a network's numbers stop being finite."""

from __future__ import annotations

from collections.abc import Callable
from typing import Any

from torch import Tensor, nn

from tiercel.model.decoder import Decoder
from tiercel.train.data import Rows


def find_nonfinite(network: Decoder, rows: Rows, loss_fn: Callable[[Decoder, Rows], Tensor]) -> str | None:
    """Repeat a forward and backward, and name what is first not finite.

    Returns:
        The first parameter, else the first module's output, else the first gradient in the order of the backward;
        None where all are finite.
    """
    for name, p in network.named_parameters():
        if not p.detach().isfinite().all():
            return name
    found: list[str] = []

    def watch(name: str) -> Callable[[nn.Module, Any, Any], None]:
        def hook(module: nn.Module, given: Any, out: Any) -> None:
            if not found and isinstance(out, Tensor) and not out.isfinite().all():
                found.append(name)

        return hook

    hooks = [module.register_forward_hook(watch(name)) for name, module in network.named_modules() if name]
    try:
        loss = loss_fn(network, rows)
        if found or not loss.isfinite():
            return found[0] if found else None
        loss.backward()
    finally:
        for hook in hooks:
            hook.remove()
    bad = [name for name, p in network.named_parameters() if p.grad is not None and not p.grad.isfinite().all()]
    network.zero_grad()
    return f"the gradient of {bad[-1]}" if bad else None  # the backward computes the last parameters' first
