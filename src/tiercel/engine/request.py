"""A request and its sequences.

`Request` is what a caller holds; a `Sequence` is one of its `n` answers, with its state while it runs.
"""

from __future__ import annotations

import enum
import time
from collections import deque
from collections.abc import Callable
from collections.abc import Sequence as GenericSequence
from dataclasses import dataclass, field
from typing import TYPE_CHECKING, Any, Protocol

from tiercel.engine.output_processor import OutputProcessor
from tiercel.errors import TiercelError
from tiercel.runtime.timing import Times
from tiercel.sampling.logprobs import Logprob
from tiercel.sampling.params import SamplingParams
from tiercel.tokenizer.stream import Piece

if TYPE_CHECKING:
    from torch import Tensor

    from tiercel.engine.speculative import Speculation
    from tiercel.model.runner import SequenceState


class SequenceStatus(enum.Enum):
    """Where a sequence is between its arrival and its end."""

    WAITING = enum.auto()  # in the queue for a slot
    WAITING_FOR_PREFIX = enum.auto()  # another sequence of its request reads the prompt; it forks from that state
    RUNNING = enum.auto()  # has a slot and a state
    PREEMPTED = enum.auto()  # back in the queue: its state was given up
    FINISHED = enum.auto()  # has a finish_reason


class SampleController(Protocol):
    """Decide, token by token, how many sequences a request gets and when each ends (voting/).

    The engine calls it between forwards, so its methods must be quick.  open: further sequences may start; nothing is
    called any more once it is False.
    """

    open: bool

    @property
    def max_sequences(self) -> int:
        """How many sequences there may be by now."""

    def on_token(self, sequence: Sequence, logits_V: Tensor) -> str | None:
        """Take note of a token sampled from these logits; a finish_reason ends the sequence here."""

    def on_finish(self, sequence: Sequence) -> None:
        """Take note of a sequence that has finished.  The engine ends the others where `open` is False afterwards."""

    def close(self) -> None:
        """The request was given up."""


@dataclass(eq=False)
class Request:
    """A prompt and its sequences.

    key: the prefix cache serves a request from requests of the same key only (tenant, adapter)
    turn: index of the first token of the last user turn, where a snapshot is taken
    cached_tokens: prompt tokens whose state came from the prefix cache · cache_miss_reason: why there were none
    controller: starts further sequences while the request runs, each from `prefix_state`: the prompt's state, and the
    logits (V,) of its last token
    """

    id: str
    arrival_index: int
    prompt_ids: list[int]
    params: SamplingParams
    key: str = ""
    turn: int | None = None
    adapter: str | None = None
    sequences: list[Sequence] = field(default_factory=list)
    cached_tokens: int = 0
    cache_miss_reason: str | None = None
    error: TiercelError | None = None
    times: Times = field(default_factory=Times)
    arrived: float = field(default_factory=time.perf_counter)
    started: float | None = None
    cache_looked_up: bool = False  # cached_tokens and cache_miss_reason are set
    inbox: deque[Update] = field(default_factory=deque)  # for `Engine.run`
    controller: SampleController | None = None
    prefix_state: tuple[SequenceState, Tensor] | None = None
    new_sequence: Callable[[int], Sequence] | None = None

    @property
    def finished(self) -> bool:
        """Whether every sequence has finished and no further one can start."""
        return not (self.controller is not None and self.controller.open) and not self.unfinished

    @property
    def unfinished(self) -> list[Sequence]:
        """Sequences without a finish_reason."""
        return [sequence for sequence in self.sequences if sequence.finish_reason is None]

    def mark_started(self) -> None:
        """Note the time at which the prompt's turn came."""
        if self.started is None:
            self.started = time.perf_counter()
            self.times.queue = self.started - self.arrived

    def mark_first_token(self) -> None:
        """Note the time at which the prompt was read."""
        if not self.times.first_token and self.started is not None:
            now = time.perf_counter()
            self.times.first_token, self.times.prompt = now - self.arrived, now - self.started

    def mark_finished(self) -> None:
        """Note the time at which the last sequence finished."""
        self.times.total = time.perf_counter() - self.arrived
        self.times.generation = max(self.times.total - self.times.queue - self.times.prompt, 0.0)


class Sequence(OutputProcessor):
    """One answer of a request while it runs.

    tokens: prompt and output · state: holds the first `num_computed_tokens` of them; None without a slot
    num_in_flight: tokens sampled on a device that are not on the host yet
    isolated: runs in a step of its own, because a forward failed that it was part of
    aging_credit: prompt tokens of other sequences that were computed while this one's prompt waited
    snapshot_positions: lengths that a snapshot should be able to restore, and none can yet
    snapshot_interval: tokens between further snapshots inside the prompt; 0: there are none
    cached_length: length at which the prefix cache last gave or took a snapshot
    num_emitted_tokens: output tokens that updates have carried
    """

    def __init__(self, request: Request, *arguments: Any, **named: Any) -> None:
        super().__init__(*arguments, **named)
        self.request = request
        self.tokens = list(request.prompt_ids)
        self.state: SequenceState | None = None
        self._status = SequenceStatus.WAITING_FOR_PREFIX if self.index else SequenceStatus.WAITING
        self.num_in_flight = 0
        self.isolated = False
        self.aging_credit = 0
        self.snapshot_positions: list[int] = []
        self.snapshot_interval = 0
        self.cached_length = 0
        self.speculation: Speculation | None = None
        self.num_emitted_tokens = 0

    @property
    def status(self) -> SequenceStatus:
        """Where the sequence is; FINISHED from the moment it has a finish_reason."""
        return self._status if self.finish_reason is None else SequenceStatus.FINISHED

    @status.setter
    def status(self, status: SequenceStatus) -> None:
        self._status = status

    @property
    def cached_tokens(self) -> int:
        """See `Request.cached_tokens`."""
        return self.request.cached_tokens

    @property
    def times(self) -> Times:
        """See `Request.times`."""
        return self.request.times

    @property
    def num_computed_tokens(self) -> int:
        """Tokens that the state holds."""
        return 0 if self.state is None else self.state.length

    @property
    def num_pending_tokens(self) -> int:
        """Tokens to compute before the next can be sampled: 1 while the sequence decodes."""
        return len(self.tokens) + self.num_in_flight - self.num_computed_tokens

    @property
    def ends_in_flight(self) -> bool:
        """Whether the last token it may have is sampled and not on the host yet."""
        return bool(self.num_in_flight) and self.num_output_tokens + self.num_in_flight >= self.max_output_tokens

    @property
    def num_output_tokens(self) -> int:
        """Tokens sampled so far."""
        return len(self.token_ids)

    @property
    def num_slots(self) -> int:
        """Slots it takes, those of the sequences that will fork from it included."""
        siblings = self.request.sequences
        if self.index or len(siblings) == 1:
            return 1
        return 1 + sum(sequence.status is SequenceStatus.WAITING_FOR_PREFIX for sequence in siblings)

    @property
    def has_controller(self) -> bool:
        """Whether a controller may start further sequences beside this one."""
        return self.request.controller is not None

    def add_snapshot(self, min_pos: int, length: int) -> None:
        """Note that a snapshot can restore any length from `min_pos` to `length`."""
        self.snapshot_positions = [at for at in self.snapshot_positions if not min_pos <= at <= length]


@dataclass(frozen=True)
class Update:
    """What a step added to one sequence; the last update of a sequence has its finish_reason.

    index: of the sequence in its request · pieces: text in order · token_ids, logprobs: of the tokens of this step
    error: why the sequence ended with finish_reason "error" · last: the request has finished with this
    """

    request: Request
    index: int
    pieces: list[Piece]
    token_ids: GenericSequence[int]
    logprobs: list[dict[int, Logprob]] | None = None
    finish_reason: str | None = None
    stop_reason: str | int | None = None
    error: TiercelError | None = None
    last: bool = False
