"""Compute a long prompt in several forwards."""

from __future__ import annotations

from collections.abc import Callable

import torch
from torch import Tensor

from tiercel.model.decoder import Decoder
from tiercel.model.state import State

MAX_PREFILL_TOKENS = 512  # of one forward: bounds the memory of a long prompt, and lets its progress be seen

Progress = Callable[[int, int], None]  # (prompt tokens computed, prompt tokens)


def prefill(network: Decoder, tokens: Tensor, state: State, progress: Progress | None = None) -> Tensor:
    """Append a prompt (L,) to a state; return the logits (V,) float32 of its last token.

    Args:
        network: the network that made the state.
        tokens: int64 (L,), at least one.
        state: grows by L tokens.
        progress: called after every forward.
    """
    logits_LV = torch.empty(0)
    for start in range(0, len(tokens), MAX_PREFILL_TOKENS):
        logits_LV = network(tokens[start : start + MAX_PREFILL_TOKENS], state, logits_to_keep=1)
        if progress is not None:
            progress(min(start + MAX_PREFILL_TOKENS, len(tokens)), len(tokens))
    return logits_LV[-1]
