"""Before the first request, and while there is none: capture steps and prefault memory."""

from __future__ import annotations

import contextlib
import itertools
import time
from typing import cast

import torch

from tiercel.engine.core import EngineCore
from tiercel.engine.speculative import UNCAPTURED_STEPS
from tiercel.model.runner import AsyncRunner, SequenceState

PREFAULT_SECONDS = 3.0  # at start-up; the rest is prefaulted while the engine is idle
CAPTURE_SECONDS = 2.0


def prefault(core: EngineCore) -> bool:
    """Prefault some of the memory that running sequences and their snapshots will need, for some milliseconds.

    Returns:
        Whether there was something to do; False too where the system has no memory left.
    """
    with contextlib.suppress(OSError):
        running, left = core.memory_targets
        wanted = running + max(0, min(left, core.cache.budget - core.cache.nbytes))
        allocator = core.runner.allocator
        allocator.max_free_bytes = wanted + allocator.SEGMENT_BYTES  # whole segments go back
        return allocator.prefault(wanted)
    return False


def capture_graphs(core: EngineCore) -> None:
    """Capture and time the steps of one sequence with draft tokens, then of two to all slots."""
    runner = core.runner
    if runner.supports_async:
        cast(AsyncRunner, runner).capture()
    draft_lengths = () if core.drafter is None else core.draft_lengths
    steps = [[1 + length] for length in (0, *draft_lengths)]
    steps += [[1] * count for count in range(2, min(core.scheduler.slots, runner.max_captured_tokens) + 1)]
    states: list[SequenceState] = []
    until = time.perf_counter() + CAPTURE_SECONDS
    for lengths in itertools.takewhile(lambda _: time.perf_counter() < until, steps):
        states += [runner.new_state() for _ in lengths[len(states) :]]
        tokens = [torch.zeros(length, dtype=torch.long, device=runner.device) for length in lengths]
        for _ in range(UNCAPTURED_STEPS + 1):
            began = time.perf_counter()
            runner.forward(tokens, states[: len(lengths)], logits_to_keep=max(lengths))
            if len(lengths) == 1:
                core.costs.record(lengths[0], time.perf_counter() - began)
            for state in states:
                state.trim(0)


def prefault_at_start(core: EngineCore) -> None:
    """Prefault for PREFAULT_SECONDS at most."""
    until = time.perf_counter() + PREFAULT_SECONDS
    while prefault(core) and time.perf_counter() < until:
        pass
