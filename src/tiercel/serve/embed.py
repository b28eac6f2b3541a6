"""Embeddings: the mean of the last hidden states over the tokens of a text.

These are vectors of a model that was trained to continue texts: fit for finding what is similar, but below a
model that was trained to embed.
"""

from __future__ import annotations

import asyncio
import math
from collections.abc import Sequence
from typing import TYPE_CHECKING, Any

from tiercel.errors import ContextOverflow
from tiercel.serve.errors import APIError
from tiercel.serve.models import Lease
from tiercel.serve.prompt import check_ids
from tiercel.serve.settings import Settings

if TYPE_CHECKING:
    from tiercel.model.decoder import Decoder
    from tiercel.model.state import State

Input = str | list[int]


async def embed(
    lease: Lease, inputs: Sequence[Input], settings: Settings, *, truncate: bool
) -> tuple[list[list[float]], int]:
    """Embed texts.

    Args:
        truncate: cut what is longer than the context; otherwise ContextOverflow is raised.
    Returns:
        A vector of the model's width for each text, and the number of their tokens together.
    Raises:
        APIError 400, RequestError, ContextOverflow.
    """
    if len(inputs) > settings.embed_inputs:
        raise APIError(400, f"up to {settings.embed_inputs} inputs at once, not {len(inputs)}")
    ids = await asyncio.to_thread(lambda: [_ids(lease, text, truncate) for text in inputs])
    lease.reserve(sum(map(len, ids)))
    return [await _run(lease, row) for row in ids], sum(map(len, ids))


def _ids(lease: Lease, text: Input, truncate: bool) -> list[int]:
    model = lease.loaded.model
    if isinstance(text, str):
        text = lease.tokenizer.encode(lease.tokenizer.beginning(text, model.max_length))
    ids = list(text)
    check_ids(model, ids)
    if len(ids) > model.max_length and not truncate:
        raise ContextOverflow("the input length exceeds the context length")
    return ids[: model.max_length]


async def _run(lease: Lease, ids: list[int]) -> list[float]:
    """Chunk by chunk between the engine's steps: running requests wait for one chunk at most."""
    run = Mean(lease.loaded.model.network, ids, lease.adapter)
    while not run.done:
        await lease.loaded.engine.call(run.step)
    return run.mean


class Mean:
    """The mean hidden state of a text, a chunk at a time."""

    def __init__(self, network: Decoder, ids: Sequence[int], adapter: str | None = None) -> None:
        self.network, self.ids, self.read, self.adapter = network, ids, 0, adapter
        self.state: State | None = None
        self.total_D: Any = 0.0
        self.mean: list[float] = []

    @property
    def done(self) -> bool:
        """Whether the whole text was read."""
        return self.read == len(self.ids)

    def step(self) -> None:
        """Read a chunk; on the engine's thread."""
        import torch

        from tiercel.model.prefill import MAX_PREFILL_TOKENS

        self.state = self.state or self.network.new_state(self.adapter)
        chunk = self.ids[self.read : self.read + MAX_PREFILL_TOKENS]
        tokens_L = torch.tensor(chunk, device=self.network.embed.weight.device)
        self.total_D = self.total_D + self.network.hidden_states(tokens_L, self.state).double().sum(0)
        self.read += len(chunk)
        if self.done:
            self.mean = (self.total_D / len(self.ids)).tolist()
            self.state = None  # here, on the thread that owns the states


def normalized(vector: list[float], dimensions: int | None = None) -> list[float]:
    """Cut to the first `dimensions`, and of length one."""
    cut = vector[:dimensions] if dimensions else vector
    length = math.sqrt(sum(x * x for x in cut)) or 1.0
    return [x / length for x in cut]
