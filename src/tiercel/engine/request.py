"""One prompt, and its answers on their way.

`Request` is what a caller holds; a `Sequence` is one of its `n` answers, with its state while it runs.
"""

from __future__ import annotations

import time
from collections import deque
from collections.abc import Callable
from collections.abc import Sequence as GenericSequence
from dataclasses import dataclass, field
from typing import TYPE_CHECKING, Any, Protocol

from tiercel.engine.output_processor import OutputProcessor
from tiercel.engine.speculative import Speculation
from tiercel.errors import TiercelError
from tiercel.runtime.timing import Times
from tiercel.sampling.logprobs import Logprob
from tiercel.sampling.params import SamplingParams
from tiercel.tokenizer.stream import Piece

if TYPE_CHECKING:
    from torch import Tensor

    from tiercel.model.runner import SequenceState


class SampleController(Protocol):
    """Decides, token by token, how many answers one prompt gets and when each has said enough (voting/).

    open: more answers may come; nothing is asked any more once it is False.  wanted: how many there may be by now.
    The engine asks between forwards: what these do must be quick.
    """

    open: bool

    @property
    def wanted(self) -> int: ...

    def token(self, choice: Sequence, logits_V: Tensor) -> str | None:
        """A token was chosen from these logits; a finish_reason ends the answer here."""

    def ended(self, choice: Sequence) -> None:
        """It has its finish_reason.  The engine ends the others where `open` is False after this."""

    def close(self) -> None:
        """The request is given up."""


@dataclass(eq=False)
class Request:
    """id · prompt_ids · params · choices: the n answers · times: seconds
    key: texts are remembered for requests of the same key only (tenant, adapter) · adapter: what its rows wear
    turn: index of the first token of the last user turn, a place to come back to
    cached_tokens: how many of the prompt's tokens were not read again · why_not_cached: the reason where none was
    watch: opens further choices while the request runs; each starts from `origin`, the prompt's state and logits"""

    id: str
    number: int  # order of arrival
    prompt_ids: list[int]
    params: SamplingParams
    key: str = ""
    turn: int | None = None
    adapter: str | None = None
    choices: list[Sequence] = field(default_factory=list)
    cached_tokens: int = 0
    why_not_cached: str | None = None
    error: TiercelError | None = None
    times: Times = field(default_factory=Times)
    arrived: float = field(default_factory=time.perf_counter)
    started: float | None = None  # when its prompt's turn came
    looked_up: bool = False  # cached_tokens and why_not_cached are known
    inbox: deque[Update] = field(default_factory=deque)  # for `Engine.run`
    watch: SampleController | None = None
    origin: tuple[SequenceState, Tensor] | None = None
    spawn: Callable[[int], Sequence] | None = None  # the choice number i, not yet running

    @property
    def finished(self) -> bool:
        return not (self.watch is not None and self.watch.open) and not self.running

    @property
    def running(self) -> list[Sequence]:
        return [choice for choice in self.choices if choice.finish_reason is None]

    def started_now(self) -> None:
        if self.started is None:
            self.started = time.perf_counter()
            self.times.queue = self.started - self.arrived

    def prompt_read(self) -> None:
        if not self.times.first_token and self.started is not None:
            now = time.perf_counter()
            self.times.first_token, self.times.prompt = now - self.arrived, now - self.started

    def ended(self) -> None:
        self.times.total = time.perf_counter() - self.arrived
        self.times.generation = max(self.times.total - self.times.queue - self.times.prompt, 0.0)


class Sequence(OutputProcessor):
    """One answer of a request, and where it stands.

    tokens: prompt and answer so far.  The state holds the first `state.length` of them; the rest is to be read.
    asleep: waits for the first choice to read the prompt, then forks from it.
    """

    def __init__(self, request: Request, *arguments: Any, **named: Any) -> None:
        super().__init__(*arguments, **named)
        self.request = request
        self.tokens = list(request.prompt_ids)
        self.state: SequenceState | None = None
        self.asleep = self.index > 0
        self.alone = False  # runs in a step of its own: it was there when a forward failed
        self.overtaken = 0  # prompt tokens of others that were read while this one had some to read
        self.marks: list[int] = []  # lengths that a snapshot must be able to come back to, and none can yet
        self.spacing = 0  # tokens between snapshots in the prompt; 0: none are made
        self.kept = 0  # how long the text was when it was last looked up in the cache or put there
        self.speculation: Speculation | None = None
        self.reported = 0  # tokens that updates have told about

    @property
    def cached_tokens(self) -> int:
        return self.request.cached_tokens

    @property
    def times(self) -> Times:
        return self.request.times

    @property
    def length(self) -> int:
        """How many tokens have been read."""
        return 0 if self.state is None else self.state.length

    @property
    def pending(self) -> int:
        """How many tokens are there to read.  1 while it answers."""
        return len(self.tokens) - self.length

    @property
    def places(self) -> int:
        """How many slots it takes: also for those that will fork from it."""
        return 1 if self.index else 1 + sum(choice.asleep for choice in self.request.choices)

    def kept_by(self, min_pos: int, length: int) -> None:
        """A snapshot can go back to any length from `min_pos` to `length`."""
        self.marks = [mark for mark in self.marks if not min_pos <= mark <= length]


@dataclass(frozen=True)
class Update:
    """What a step gave to one choice; the last one of a choice has its finish_reason.

    pieces: text in the order it came · token_ids, logprobs: of the tokens that came in this step
    error: why the choice ended with finish_reason "error" · last: the request has ended with this
    """

    request: Request
    choice: int
    pieces: list[Piece]
    token_ids: GenericSequence[int]
    logprobs: list[dict[int, Logprob]] | None = None
    finish_reason: str | None = None
    stop_reason: str | int | None = None
    error: TiercelError | None = None
    last: bool = False
