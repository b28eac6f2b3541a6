"""Logits of a step → tokens of its sequences."""

from __future__ import annotations

from collections.abc import Sequence as GenericSequence

from torch import Tensor

from tiercel.engine.core import EngineCore, state_of
from tiercel.engine.failures import fail_sequence
from tiercel.engine.parallel_sampling import end_request, fork_sequences
from tiercel.engine.request import Sequence
from tiercel.engine.scheduler import ScheduledSequence, ScheduledStep
from tiercel.tokenizer.stream import Piece


def process_outputs(core: EngineCore, step: ScheduledStep, logits: GenericSequence[Tensor]) -> None:
    """Sample the tokens that a step's logits give, one sequence after another."""
    for row, logits_LV in zip(step.rows, logits, strict=True):
        _process_row(core, row, logits_LV)
    core.counters.steps += 1


def _process_row(core: EngineCore, row: ScheduledSequence, logits_LV: Tensor) -> None:
    sequence = row.sequence
    if not row.valid or not row.samples:
        return  # it has ended or begun again since the step was started, or the prompt goes on
    sequence.num_in_flight = max(sequence.num_in_flight - 1, 0)
    sequence.isolated = False
    sequence.request.mark_first_token()
    forked = fork_sequences(core, sequence)
    core.keep_prefix_state(sequence, logits_LV[-1])
    append_tokens(core, sequence, logits_LV, row.draft_tokens)
    for other in forked:
        append_tokens(core, other, logits_LV[:1])


def append_tokens(
    core: EngineCore, sequence: Sequence, logits_LV: Tensor, draft_tokens: GenericSequence[int] = ()
) -> None:
    """Append the token sampled from the first row of logits, and one more for each draft token it confirms."""
    pieces: list[Piece] = []
    controller = sequence.request.controller
    num_accepted = 0
    try:
        for logits_V, draft in zip(logits_LV, [*draft_tokens, None], strict=True):
            pieces += sequence.sample(logits_V)
            sequence.tokens.append(sequence.token_ids[-1])
            if controller is not None and (reason := controller.on_token(sequence, logits_V)) is not None:
                pieces += sequence.finish(reason)
            if sequence.finish_reason is not None or sequence.token_ids[-1] != draft:
                break
            num_accepted += 1
        if controller is not None and sequence.finish_reason is not None:
            controller.on_finish(sequence)
    except Exception as error:
        fail_sequence(core, sequence, error)
        return
    if draft_tokens:
        _trim_rejected(core, sequence, len(draft_tokens), num_accepted)
    core.emit(sequence, pieces)
    if sequence.finish_reason is not None:
        core.finish(sequence)
    if controller is not None and not controller.open:
        end_request(core, sequence.request, "decided")


def _trim_rejected(core: EngineCore, sequence: Sequence, num_proposed: int, num_accepted: int) -> None:
    """Take rejected draft tokens out of the state; the last token sampled is not computed yet."""
    state = state_of(sequence)
    trimmed = state.trim(min(state.length, len(sequence.tokens) - 1))
    assert trimmed, "what a forward added can be trimmed"
    core.counters.drafts_proposed += num_proposed
    core.counters.drafts_accepted += num_accepted
    if sequence.speculation is not None:
        sequence.speculation.record(num_proposed, num_accepted)
