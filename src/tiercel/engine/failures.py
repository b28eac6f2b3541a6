"""Requests that end early: a forward, a sequence or the engine fails, or a caller aborts.  The others go on."""

from __future__ import annotations

from tiercel.engine.core import EngineCore, log
from tiercel.engine.request import Sequence, SequenceStatus, Update
from tiercel.engine.scheduler import ScheduledStep
from tiercel.errors import TiercelError


def retry_isolated(core: EngineCore, step: ScheduledStep, error: Exception) -> None:
    """Retry each sequence of a failed step in a step of its own, from its last snapshot: which one failed is unknown.

    A sequence that fails alone ends with the error.  The states of the others may be half written and are given up.
    """
    if len(step.rows) == 1 and step.rows[0].sequence.isolated:
        fail_sequence(core, step.rows[0].sequence, error)
        return
    what = f"{type(error).__name__}: {error}"
    log.warning("a step of %d rows failed (%s); its rows are tried one by one", len(step.rows), what)
    for row in step.rows:
        row.sequence.isolated = True
    restart(core, step)


def restart(core: EngineCore, step: ScheduledStep) -> None:
    """Let all sequences of a step start again from their last snapshots."""
    for row in step.rows:
        core.start(row.sequence)


def fail_sequence(core: EngineCore, sequence: Sequence, error: Exception) -> None:
    """End a sequence with an error, and those that depend on it; its state is not kept."""
    request = sequence.request
    if not isinstance(error, TiercelError):
        log.exception("request %s failed", request.id, exc_info=error)
        error = TiercelError(f"this answer failed inside ({type(error).__name__}: {error}); others are not affected")
    core.counters.failed += 1
    request.error = error
    core.close(request)
    dependent: list[Sequence] = []
    if request.controller is not None:  # a vote needs all of its sequences
        dependent = [other for other in request.unfinished if other is not sequence]
    elif sequence.index == 0:
        waiting = SequenceStatus.WAITING_FOR_PREFIX
        dependent = [other for other in request.sequences if other.status is waiting]
    for each in (sequence, *dependent):
        each.state = None
        core.emit(each, each.finish("error"), error)
        core.finish(each)


def fail_all(core: EngineCore, error: TiercelError) -> None:
    """End every request with this error, because the engine itself failed."""
    for sequence in [*core.scheduler.running, *core.scheduler.waiting]:
        if sequence.finish_reason is None:  # else it ended with another of its request
            fail_sequence(core, sequence, error)
    for request in list(core.controlled):
        request.error = error
        core.close(request)
        core.updates.append(Update(request, 0, [], [], finish_reason="error", error=error, last=True))


def abort_request(core: EngineCore, request_id: str) -> None:
    """End a request, wherever it is; nothing happens where none has this id."""
    known = [sequence.request for sequence in [*core.scheduler.running, *core.scheduler.waiting]]
    request = next((each for each in [*known, *core.controlled] if each.id == request_id), None)
    if request is None:
        return
    core.counters.aborted += 1
    unfinished = request.unfinished
    core.close(request)
    for sequence in request.sequences:
        core.end(sequence, "abort")
    if not unfinished:  # between two sequences of a vote
        core.updates.append(Update(request, 0, [], [], finish_reason="abort", last=True))
