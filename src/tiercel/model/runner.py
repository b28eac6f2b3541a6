"""What an engine needs of a network on its device: `CPURunner` or `GPURunner`, chosen by `runner_for`.

A `Decoder` computes.  A runner owns what running takes on its device: captured steps, the memory of states, slots.

    runner = runner_for(network, slots=8, max_length=4096)
    state  = runner.new_state()
    logits = runner.forward([prompt], [state])[0]
"""

from __future__ import annotations

from collections.abc import Sequence
from typing import TYPE_CHECKING, Any, Protocol

if TYPE_CHECKING:
    import torch
    from torch import Tensor

    from tiercel.model.config import ModelConfig
    from tiercel.model.decoder import Decoder
    from tiercel.model.lora import Adapters
    from tiercel.model.pages import Page
    from tiercel.model.state import Snapshot, State
    from tiercel.runtime.allocator import CachingAllocator
    from tiercel.sampling.sampler import Draw


class SequenceState(Protocol):
    """The state of one sequence on a device (`State`, `SlotHandle`); its memory is free when nothing refers to it.

    length: tokens read · oldest: the least length `trim` can reach · grid: tokens that `trim` can always take back
    (0: any number) · own_nbytes: without `pages`, which other states may share · nbytes: with them
    """

    @property
    def length(self) -> int: ...
    @property
    def min_pos(self) -> int: ...
    @property
    def rollback_tokens(self) -> int: ...
    @property
    def own_nbytes(self) -> int: ...
    @property
    def nbytes(self) -> int: ...
    @property
    def pages(self) -> Sequence[Page]: ...

    def min_pos_after(self, added: int) -> int:
        """Return what `min_pos` will be after a forward of `added` tokens."""

    def trim(self, length: int) -> bool:
        """Cut the state back to its first `length` tokens; False, and no change, where that is not possible."""

    def snapshot(self, *, ending: bool = False) -> Snapshot:
        """Copy the state.  ending: the state is not used afterwards, so that its buffers may be moved."""

    def restore(self, snapshot: Snapshot) -> None:
        """Set the state to a snapshot of the same network."""

    def fork(self) -> SequenceState:
        """Return a second state that continues from here on its own."""


class Runner(Protocol):
    """A network on one device.

    native: the CPU kernels run it, on threads of their own
    supports_async: the next step can be launched before this one's tokens are on the host
    max_captured_tokens: a step of at most this many tokens is captured at its second run (0: nothing is)
    max_num_batched_tokens: tokens of one step, where nothing else is asked for
    max_decode_delay: seconds that decoding sequences may wait for prompts, likewise
    state_bytes: bytes that states of running sequences may take; None: no limit by the device
    """

    @property
    def config(self) -> ModelConfig: ...
    @property
    def device(self) -> torch.device: ...
    @property
    def adapters(self) -> Adapters: ...
    @property
    def allocator(self) -> CachingAllocator: ...
    @property
    def native(self) -> bool: ...
    @property
    def supports_async(self) -> bool: ...
    @property
    def max_captured_tokens(self) -> int: ...
    @property
    def max_num_batched_tokens(self) -> int: ...
    @property
    def max_decode_delay(self) -> float: ...
    @property
    def state_bytes(self) -> int | None: ...

    def memory_targets(self, slots: int) -> tuple[int, int]:
        """Return the bytes to have at hand for `slots` running states, and for the snapshots they leave."""

    def new_state(self, adapter: str | None = None) -> SequenceState:
        """Return an empty state; RequestError for an adapter that is not there or not served on this device."""

    def host_state(self, adapter: str | None = None) -> State:
        """Return an empty state in the host's memory, for files (`state_file`); snapshots fit either."""

    def forward(self, tokens: Sequence[Tensor], states: Sequence[Any], *, logits_to_keep: int = 1) -> list[Tensor]:
        """Append tokens to states and return logits.

        Args:
            tokens: int64 (L,) on the device, one tensor for each state; lengths may differ.
            states: of this runner; each grows by its L tokens.
            logits_to_keep: how many of each sequence's last tokens get logits.

        Returns:
            Float32 (min(L, logits_to_keep), V) for each sequence.
        """


class LaunchedStep(Protocol):
    """A forward that was started on a device, and the tokens sampled there.

    logits: (L, V) float32 of each state, as `Runner.forward` returns them
    """

    logits: list[Tensor]

    def wait(self) -> list[int]:
        """Wait for the tokens of all states; −1: no logit was finite."""


class AsyncRunner(Runner, Protocol):
    """A runner whose device samples."""

    def capture(self) -> None:
        """Capture what it can, before the first request."""

    def launch(
        self, tokens: Sequence[Sequence[int] | None], states: Sequence[Any], draws: Sequence[Draw | None],
        num_tokens: int,
    ) -> LaunchedStep:  # fmt: skip
        """Start a forward and sample a token of each state; nothing waits for the device.

        Args:
            tokens: of each state, on the host; None: the one that was sampled last for it.
            states: each grows by its tokens.
            draws: how each state's next token is sampled; None: it is not used.
            num_tokens: tokens of the vocabulary that may be sampled.
        """


def runner_for(network: Decoder, slots: int, max_length: int) -> Runner:
    """Return the runner for the device that holds the network, with room for `slots` sequences of `max_length`."""
    if network.embed.weight.device.type == "cuda":
        from tiercel.model.gpu_runner import GPURunner

        return GPURunner(network, slots, max_length)
    from tiercel.model.cpu_runner import CPURunner

    return CPURunner(network)
