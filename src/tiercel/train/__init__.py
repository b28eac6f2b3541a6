"""Training: one readable loop for each way, on one shared `fit`.

    pretrain(…)  sft(…)                a file of examples and a network → a checkpoint, a log, a plot
    grpo(…)                            problems whose answers can be checked → the same
    fit(network, batches, settings)    the loop itself, for anything that gives batches

Learning rates are those of the folded network: a checkpoint's fixed multipliers (muP) are multiplied into its weights
when it is loaded and divided out when it is saved, so that Adam's steps act on the product.
A rate of W with a multiplier m outside is a rate of m · W here: the paper's rates are to be scaled by each m.
"""

from __future__ import annotations

import importlib
from typing import TYPE_CHECKING, Any

if TYPE_CHECKING:
    from tiercel.train.grpo import grpo
    from tiercel.train.loop import Settings, fit
    from tiercel.train.pretrain import pretrain
    from tiercel.train.sft import sft

__all__ = ["Settings", "fit", "grpo", "pretrain", "sft"]
_HOME = {"Settings": "loop", "fit": "loop", "grpo": "grpo", "pretrain": "pretrain", "sft": "sft"}


def __getattr__(name: str) -> Any:
    if name not in _HOME:
        raise AttributeError(f"module 'tiercel.train' has no attribute {name!r}")
    found = getattr(importlib.import_module(f"tiercel.train.{_HOME[name]}"), name)
    globals()[name] = found  # the module of that name, once imported, would stand in its place
    return found
