"""A network on the CPU: paged states, and small steps captured and replayed (graph_cache.py)."""

from __future__ import annotations

from collections.abc import Sequence

import torch
from torch import Tensor

from tiercel.model.config import ModelConfig
from tiercel.model.decoder import Decoder
from tiercel.model.graph_cache import MAX_CAPTURED_TOKENS, GraphCache
from tiercel.model.lora import Adapters
from tiercel.model.pages import PAGE
from tiercel.model.state import State
from tiercel.runtime.allocator import CachingAllocator

PREFAULT_PAGES = 8  # KV pages of each running sequence that memory is at hand for
SNAPSHOTS_PER_SEQUENCE = 2  # of the end of its prompt and of its own


class CPURunner:
    """Runs `network`; a `Runner`."""

    supports_async = False
    max_num_batched_tokens, max_decode_delay = 512, 0.2
    state_bytes: int | None = None

    def __init__(self, network: Decoder) -> None:
        self.network, self.graphs, self._allocator = network, GraphCache(), CachingAllocator()

    @property
    def config(self) -> ModelConfig:
        return self.network.config

    @property
    def device(self) -> torch.device:
        return self.network.device

    @property
    def adapters(self) -> Adapters:
        return self.network.adapters

    @property
    def allocator(self) -> CachingAllocator:
        return self._allocator

    @property
    def native(self) -> bool:
        return self.network.native

    @property
    def max_captured_tokens(self) -> int:
        return MAX_CAPTURED_TOKENS if self.native else 0

    def memory_targets(self, slots: int) -> tuple[int, int]:
        """See `Runner.memory_targets`."""
        state = self.new_state()
        state.reserve(PREFAULT_PAGES * PAGE)
        return slots * state.nbytes, SNAPSHOTS_PER_SEQUENCE * slots * state.own_nbytes

    def new_state(self, adapter: str | None = None) -> State:
        """See `Runner.new_state`."""
        return self.network.new_state(adapter, self._allocator)

    def host_state(self, adapter: str | None = None) -> State:
        """See `Runner.host_state`."""
        return self.network.host_state(adapter, self._allocator)

    def forward(self, tokens: Sequence[Tensor], states: Sequence[State], *, logits_to_keep: int = 1) -> list[Tensor]:
        """See `Runner.forward`."""
        with torch.no_grad(), self.network.growing(tokens, states) as tokens_T:
            return self.graphs.run(self.network, tokens_T, [len(row) for row in tokens], states, logits_to_keep)
