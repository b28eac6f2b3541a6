"""Several sequences of one request: `n` that fork from the prompt's state, and those a controller starts (votes)."""

from __future__ import annotations

from collections.abc import Iterator

from torch import Tensor

from tiercel.engine.core import EngineCore, state_of
from tiercel.engine.request import Request, Sequence, SequenceStatus


def fork_sequences(core: EngineCore, parent: Sequence) -> list[Sequence]:
    """Fork the sequences that waited for this one's prompt, and return them.

    Those beyond the free slots go to the queue: the prefix cache has the prompt when their turn comes.
    """
    if len(parent.request.sequences) == 1 or parent.index:
        return []
    waiting = [other for other in parent.request.sequences if other.status is SequenceStatus.WAITING_FOR_PREFIX]
    if not waiting:
        return []
    free = core.scheduler.free_slots_beside(parent)
    for sequence in waiting[:free]:
        core.fork(sequence, state_of(parent))
    for sequence in waiting[free:]:
        core.scheduler.enqueue(sequence)
    return waiting[:free]


def spawn_sequences(core: EngineCore, *, idle_only: bool = False) -> Iterator[tuple[Sequence, Tensor]]:
    """Start further sequences of controlled requests in slots that the queue does not need.

    idle_only: only of requests without a running sequence, before the queue is admitted: their turn has come already,
    and new requests must not keep them out.

    Yields:
        A sequence and the logits (V,) of its first token, to be sampled before the next one is started.
    """
    scheduler = core.scheduler
    for request in list(core.controlled):
        while (controller := request.controller) is not None and controller.open:
            idle = not request.unfinished
            if len(request.sequences) >= controller.max_sequences or scheduler.used_slots >= scheduler.slots:
                break
            if not idle and (idle_only or scheduler.waiting or scheduler.admission_paused):
                break
            assert request.prefix_state is not None and request.new_sequence is not None
            state, logits_V = request.prefix_state
            sequence = request.new_sequence(len(request.sequences))
            request.sequences.append(sequence)
            core.fork(sequence, state)
            yield sequence, logits_V


def end_request(core: EngineCore, request: Request, reason: str) -> None:
    """End the sequences of a request that still run, for this reason, and start no further ones."""
    core.close(request)
    for sequence in request.unfinished:
        core.end(sequence, reason)
