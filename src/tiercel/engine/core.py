"""What the parts of an engine share: its runner, scheduler and cache, and the steps in a sequence's life."""

from __future__ import annotations

import logging
from collections import Counter, deque
from collections.abc import Callable
from dataclasses import dataclass, field
from functools import cached_property
from typing import TYPE_CHECKING, Protocol

from torch import Tensor

from tiercel.engine import snapshot_policy
from tiercel.engine.prefix_cache import PrefixCache
from tiercel.engine.request import Request, Sequence, Update
from tiercel.engine.scheduler import Scheduler
from tiercel.engine.speculative import Drafter, StepCosts
from tiercel.errors import TiercelError
from tiercel.model.runner import Runner, SequenceState
from tiercel.tokenizer.stream import Piece

if TYPE_CHECKING:
    from tiercel.model.decoder import Decoder
    from tiercel.tokenizer.tokenizer import Tokenizer

log = logging.getLogger("tiercel.engine")


class Model(Protocol):
    """What an engine needs of a `tiercel.Model`."""

    network: Decoder
    tokenizer: Tokenizer | None
    max_length: int


@dataclass
class Stats:
    """Counters since the start; running, waiting and bytes as they are when asked."""

    running: int = 0
    waiting: int = 0
    kv_bytes: int = 0  # states of running sequences
    cache_bytes: int = 0
    cache_disk_bytes: int = 0
    prompt_tokens: int = 0
    hit_tokens: int = 0  # of them, from the prefix cache
    generated_tokens: int = 0
    requests: int = 0
    aborted: int = 0
    failed: int = 0
    preemptions: int = 0
    evictions: int = 0
    drafts_proposed: int = 0
    drafts_accepted: int = 0
    steps: int = 0
    not_cached: Counter[str] = field(default_factory=Counter)  # requests without a cached token, by reason


class EngineCore:
    """The data of an engine, and what happens to one sequence.

    updates: what the next call of `step` returns · controlled: requests whose prompt is read and whose controller may
    start further sequences · arrivals: filled from any thread, emptied by `step`
    """

    def __init__(
        self,
        runner: Runner,
        scheduler: Scheduler,
        cache: PrefixCache,
        drafter: Callable[[Sequence], Drafter] | None,
        draft_lengths: tuple[int, ...],
    ) -> None:
        self.runner, self.scheduler, self.cache, self.drafter = runner, scheduler, cache, drafter
        self.draft_lengths = draft_lengths
        self.counters = Stats()
        self.costs = StepCosts()
        self.arrivals: deque[Sequence] = deque()
        self.updates: list[Update] = []
        self.controlled: list[Request] = []

    @cached_property
    def memory_targets(self) -> tuple[int, int]:
        """Bytes to have at hand: of running states, and of the snapshots they leave."""
        return self.runner.memory_targets(self.scheduler.slots)

    def key_of(self, key: str, adapter: str | None) -> str:
        """Return the cache key of a request; RequestError where there is no such adapter."""
        return key if adapter is None else f"\0adapter {self.runner.adapters[adapter].id}\0{key}"

    def adapter_in_use(self, adapter: str) -> bool:
        """Whether an unfinished request uses an adapter."""
        sequences = [*self.arrivals, *self.scheduler.running, *self.scheduler.waiting]
        return any(sequence.request.adapter == adapter for sequence in sequences)

    def start(self, sequence: Sequence) -> None:
        """Give a sequence a state with as many of its tokens as the prefix cache has."""
        request, tokens = sequence.request, sequence.tokens
        request.mark_started()
        state: SequenceState = self.runner.new_state(request.adapter)
        sequence.state, sequence.num_in_flight = state, 0
        hit = self.cache.find(request.key, tokens, len(tokens) - 1)
        if hit.snapshot is not None:
            state.restore(hit.snapshot)
            trimmed = state.trim(hit.length)
            assert trimmed, "a snapshot can be trimmed to every length from its min_pos on"
        sequence.cached_length = state.length
        if not request.cache_looked_up:
            request.cache_looked_up = True
            self._record_cache_hit(request, hit.shared, state.length)
        snapshot_policy.plan_snapshots(sequence, hit.shared, self.cache)

    def preempt(self, sequence: Sequence) -> None:
        """Move a running sequence back to the queue.  Its state goes to the cache, or is computed again."""
        snapshot_policy.take_snapshot(sequence, self.cache, turn_end=True, ending=True)
        sequence.snapshot_positions = []
        self._release(sequence)
        self.scheduler.preempt(sequence)
        self.counters.preemptions += 1

    def fork(self, sequence: Sequence, state: SequenceState) -> None:
        """Let a sequence run on a copy of this state."""
        sequence.state = state.fork()
        self.scheduler.add_running(sequence)

    def emit(self, sequence: Sequence, pieces: list[Piece], error: TiercelError | None = None) -> None:
        """Add an update with what is new in a sequence since its last one."""
        start = sequence.num_emitted_tokens
        token_ids = sequence.token_ids[start:]
        logprobs = None if sequence.logprobs is None else sequence.logprobs[start:]
        self.counters.generated_tokens += len(token_ids)
        sequence.num_emitted_tokens = sequence.num_output_tokens
        last = sequence.finish_reason is not None and sequence.request.finished
        reasons = sequence.finish_reason, sequence.stop_reason
        self.updates.append(
            Update(sequence.request, sequence.index, pieces, token_ids, logprobs, *reasons, error, last)
        )

    def finish(self, sequence: Sequence) -> None:
        """Free what a finished sequence holds; its state goes to the cache, but for the many sequences of a vote."""
        if not sequence.has_controller or sequence.snapshot_positions:
            snapshot_policy.take_snapshot(sequence, self.cache, turn_end=True, ending=True)
        self._release(sequence)
        self.scheduler.remove(sequence)
        if sequence.request.finished:
            sequence.request.mark_finished()

    def end(self, sequence: Sequence, reason: str) -> None:
        """Finish a sequence for this reason, with an update; nothing happens where it has finished."""
        if sequence.finish_reason is None:
            self.emit(sequence, sequence.finish(reason))
        self.finish(sequence)

    def close(self, request: Request) -> None:
        """Start no further sequences of a request."""
        if request.controller is not None:
            request.controller.close()
            request.prefix_state = None
        if request in self.controlled:
            self.controlled.remove(request)

    def keep_prefix_state(self, sequence: Sequence, logits_V: Tensor) -> None:
        """Keep the prompt's state and logits for the sequences that its controller will start."""
        request = sequence.request
        controller = request.controller
        if controller is None or not controller.open or sequence.token_ids or request.prefix_state is not None:
            return
        request.prefix_state = state_of(sequence).fork(), logits_V.clone()
        self.controlled.append(request)

    def _release(self, sequence: Sequence) -> None:
        """Give up the state of a sequence, and its drafter's."""
        sequence.state, sequence.num_in_flight = None, 0
        if sequence.speculation is not None:
            sequence.speculation.drafter.release()

    def _record_cache_hit(self, request: Request, shared: int, cached: int) -> None:
        """Count the prompt tokens that the cache had; log the reason where there were none."""
        request.cached_tokens = cached
        self.counters.prompt_tokens += len(request.prompt_ids)
        self.counters.hit_tokens += cached
        if cached:
            return
        if self.cache.budget == 0:
            reason, why = "off", "the cache is off"
        elif shared == 0:
            reason, why = "new", "no earlier text begins like this one"
        else:
            reason = "no snapshot"
            why = f"{shared} tokens are shared with an earlier text, and no snapshot of it reaches back that far"
        request.cache_miss_reason = why
        self.counters.not_cached[reason] += 1
        log.info("request %s: none of %d prompt tokens reused: %s", request.id, len(request.prompt_ids), why)


def state_of(sequence: Sequence) -> SequenceState:
    """Return the state of a running sequence."""
    assert sequence.state is not None
    return sequence.state
