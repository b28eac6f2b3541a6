"""Many requests at once: schedule → run → process outputs.

    engine  = Engine(model)
    request = engine.add(ids, SamplingParams(max_tokens=64))
    while not engine.idle:
        for update in engine.step(): ...

An engine has no threads and does not wait: one `step` is one forward for all running sequences that have tokens to
compute, and the next token of those that have computed all.  `loop.py` runs it behind asyncio.

A prefix is computed once: snapshots of states go into the prefix cache (prefix_cache.py), at the lengths that
snapshot_policy.py plans.

The output of a sequence does not depend on what shares its steps, on how its prompt was split, or on whether the
prompt came from the cache.
"""

from __future__ import annotations

import contextlib
import itertools
import secrets
import threading
from collections.abc import Callable, Collection, Generator
from collections.abc import Sequence as GenericSequence
from functools import cached_property
from pathlib import Path
from typing import Any

from tiercel.engine import snapshot_policy, warmup
from tiercel.engine.core import EngineCore, Model, Stats, state_of
from tiercel.engine.failures import abort_request, fail_all
from tiercel.engine.outputs import append_tokens, process_outputs
from tiercel.engine.parallel_sampling import spawn_sequences
from tiercel.engine.prefix_cache import PrefixCache, default_budget
from tiercel.engine.request import Request, SampleController, Sequence, Update
from tiercel.engine.scheduler import ScheduledSequence, ScheduledStep, Scheduler
from tiercel.engine.speculative import MAX_DRAFT_TOKENS, Drafter, Speculation, draft_lengths
from tiercel.engine.step_runner import StepRunner
from tiercel.engine.structured_output import Grammar, GrammarCompiler
from tiercel.errors import Busy, RequestError, TiercelError
from tiercel.model.runner import Runner, runner_for
from tiercel.model.state import nbytes_together
from tiercel.ops.cpu import native
from tiercel.sampling.params import SamplingParams

MIN_RETRY_SECONDS, MAX_RETRY_SECONDS = 1.0, 60.0  # that a refused request is asked to wait


class Engine(EngineCore):
    """Schedules requests and runs them.

    Args:
        slots: sequences that run at once.
        max_num_batched_tokens: tokens of one forward; None: as many as the runner advises.
        cache_bytes: budget of the prefix cache, 0 for none; by default an eighth of the free memory, at most 4 GiB.
        spill: a folder for snapshots that exceed it.
        max_queue: sequences that may wait; None: any number.
        state_bytes: bytes of running states, beyond which the latest sequences are preempted; None: what the device
            allows.
        drafter: makes the drafter of a sequence (speculative.py, draft_model.py); None: no speculation.
        num_speculative_tokens: draft tokens of a sequence in one step at most, 1 to 7; None: 7.
        max_decode_delay: seconds that decoding sequences may wait for a step that also computes prompts; None: as
            the runner advises.
        runner: runs the network; None: the one for the network's device.

    Raises:
        RequestError: fewer than one slot, fewer batched tokens than slots, or another number of draft tokens.
    """

    def __init__(
        self,
        model: Model,
        *,
        slots: int = 8,
        max_num_batched_tokens: int | None = None,
        cache_bytes: int | None = None,
        spill: Path | None = None,
        max_queue: int | None = None,
        state_bytes: int | None = None,
        drafter: Callable[[Sequence], Drafter] | None = None,
        num_speculative_tokens: int | None = None,
        max_decode_delay: float | None = None,
        runner: Runner | None = None,
    ) -> None:
        if slots < 1 or (max_num_batched_tokens is not None and max_num_batched_tokens < slots):
            given = f"not {slots} and {max_num_batched_tokens}"
            raise RequestError(f"an engine needs slots, and as many batched tokens in a step, {given}")
        runner = runner or runner_for(model.network, slots, model.max_length)
        tokens = max(slots, runner.max_num_batched_tokens) if max_num_batched_tokens is None else max_num_batched_tokens
        delay = runner.max_decode_delay if max_decode_delay is None else max_decode_delay
        scheduler = Scheduler(slots, tokens, delay)
        cache = PrefixCache(runner, default_budget() if cache_bytes is None else cache_bytes, spill)
        super().__init__(runner, scheduler, cache, drafter, draft_lengths(num_speculative_tokens))
        self.model, self.max_queue = model, max_queue
        self.state_bytes = runner.state_bytes if state_bytes is None else state_bytes
        self.steps = StepRunner(self, self._schedule)
        self._arrival_index = itertools.count()
        self._lock = threading.RLock()

    # ── one step ──

    def step(self) -> list[Update]:
        """Run one forward and return what it added; [] where there is nothing to do."""
        with self._lock, native.single_threaded(self.runner.native):
            self.steps.release_finished()
            self._admit()
            step = self.steps.claim() or self._schedule()
            if step is not None and (logits := self.steps.run(step)) is not None:
                process_outputs(self, step, logits)
                self.steps.release_finished()
            return self._take_updates()

    def _admit(self) -> None:
        """Give free slots to sequences, and take slots back where the states exceed their memory."""
        self._drain_arrivals()
        self._preempt_if_needed()
        self._spawn(idle_only=True)
        for sequence in self.scheduler.admit():
            self.start(sequence)
        self._spawn()

    def _schedule(self) -> ScheduledStep | None:
        """Return the next step; None where no sequence has tokens to compute."""
        rows = self.scheduler.schedule(snapshot_policy.next_boundary)
        if not rows:
            return None
        for row in rows:
            row.draft_tokens = self._draft(row, len(rows))
        rows.sort(key=lambda row: len(row.draft_tokens))  # fewer orders of lengths: each is captured once
        snapshot_policy.take_due(rows, self.cache)
        return ScheduledStep(rows)

    def _draft(self, row: ScheduledSequence, num_rows: int) -> list[int]:
        """Return draft tokens for a decoding sequence; [] where none may follow it, or they would not pay."""
        sequence = row.sequence
        forks = sequence.num_slots > 1 or (sequence.has_controller and sequence.request.prefix_state is None)
        if self.drafter is None or sequence.num_pending_tokens > 1 or forks:
            return []
        if sequence.speculation is None:
            sequence.speculation = Speculation(self.drafter(sequence), self.costs, self.draft_lengths)
        trimmable = (state_of(sequence).rollback_tokens or MAX_DRAFT_TOKENS + 1) - 1
        room = min(sequence.max_output_tokens - sequence.num_output_tokens - 1, trimmable)
        return sequence.speculation.draft(sequence.tokens, num_rows, room)

    def _drain_arrivals(self) -> None:
        while self.arrivals:
            self.scheduler.waiting.append(self.arrivals.popleft())
            self.counters.requests += 1

    def _preempt_if_needed(self) -> None:
        """Preempt the latest sequences while the states exceed `state_bytes`."""
        running = self.scheduler.running
        while self.state_bytes is not None and len(running) > 1 and self.stats.kv_bytes > self.state_bytes:
            self.preempt(running[-1])

    def _spawn(self, *, idle_only: bool = False) -> None:
        for sequence, logits_V in spawn_sequences(self, idle_only=idle_only):
            append_tokens(self, sequence, logits_V[None])

    def _take_updates(self) -> list[Update]:
        updates, self.updates = self.updates, []
        return updates

    # ── requests ──

    def add(self, ids: GenericSequence[int], params: SamplingParams, **more: Any) -> Request:
        """Queue a prompt, from any thread, without waiting; the arguments are those of `prepare`.

        Raises:
            RequestError, ContextOverflow: the prompt or a parameter cannot be served.
            Busy: the queue is full.
        """
        if self.max_queue is not None and params.n > self.scheduler.slots + self.max_queue:
            most = self.scheduler.slots + self.max_queue
            raise RequestError(f"n={params.n} answers are asked for, and {most} at most can run and wait")
        waiting, free = self.waiting, self.scheduler.slots - self.scheduler.used_slots
        if self.max_queue is not None and waiting + params.n > self.max_queue + free:
            raise Busy(f"{waiting} answers are waiting and the queue holds {self.max_queue}", self._retry_seconds())
        request = self.prepare(ids, params, **more)
        self.queue(request)
        return request

    def prepare(
        self,
        ids: GenericSequence[int],
        params: SamplingParams,
        *,
        thinking: str = "off",
        starts_in_thinking: bool = False,
        key: str = "",
        turn: int | None = None,
        id: str | None = None,
        constraint: Grammar | None = None,
        shown: Collection[str] = (),
        controller: SampleController | None = None,
        adapter: str | None = None,
    ) -> Request:
        """Check a request, so that it cannot fail later for what it asks.

        Args:
            ids: token ids of the prompt.
            params: what is asked.
            thinking: how reasoning is read, as in `Tokenizer.stream`.
            starts_in_thinking: the prompt opened a block of reasoning.
            key: the prefix cache serves requests of the same key only (tenants).
            turn: index of the first token of the last user turn.
            id: of the request; random by default.
            constraint: `params.structured`, compiled by `grammars`: up to two seconds, done here by default.
            shown: control tokens that appear as their text.
            controller: starts further sequences in free slots, and may end each; they share the prompt's state.
            adapter: one of the network's LoRA adapters; its states are cached apart, by the adapter's content.

        Raises:
            RequestError, ContextOverflow: the prompt or a parameter cannot be served.
        """
        params.verify()
        if params.structured is not None and constraint is None and self.grammars is not None:
            constraint = self.grammars.compile(params.structured)
        prompt, V = list(ids), self.runner.config.vocab_size
        if wrong := next((token for token in prompt if not 0 <= token < V), None):
            raise RequestError(f"token id {wrong} is outside the vocabulary of {V}")
        if controller is not None and params.n != 1:
            raise RequestError(f"n={params.n} answers and a vote are asked for; a vote has its own number of answers")
        request = Request(
            id or secrets.token_hex(12), next(self._arrival_index), prompt, params, self.key_of(key, adapter), turn,
            adapter=adapter, controller=controller,
        )  # fmt: skip

        def new_sequence(index: int) -> Sequence:
            return Sequence(
                request, self.model.tokenizer, V, prompt, params, self.model.max_length,
                index=index, thinking=thinking, starts_in_thinking=starts_in_thinking, grammar=constraint, shown=shown,
            )  # fmt: skip

        request.sequences += [new_sequence(index) for index in range(params.n)]
        if controller is not None:
            request.new_sequence = new_sequence
        return request

    def queue(self, request: Request) -> None:
        """Queue a request of `prepare`, from any thread."""
        self.arrivals.append(request.sequences[0])

    def run(self, request: Request) -> Generator[Update, None, None]:
        """Step until this request has finished, and yield its updates; for use without loop.py.

        Several threads may run requests of one engine.  Closing the generator aborts the request.
        """
        try:
            while True:
                with self._lock:
                    for update in self.step() if not request.inbox else ():
                        update.request.inbox.append(update)
                while request.inbox:
                    yield request.inbox.popleft()
                if request.finished and not request.inbox:
                    return
        finally:
            if not request.finished:
                self.abort(request.id)
                with self._lock:
                    self.updates = [update for update in self.updates if update.request is not request]

    def abort(self, request_id: str) -> None:
        """End a request, wherever it is.

        Its slots and states are free when this returns; its last updates come with the next step.
        """
        with self._lock:
            self._drain_arrivals()
            abort_request(self, request_id)

    def fail_all(self, error: TiercelError) -> list[Update]:
        """End every request with this error, because the engine itself failed; return the updates."""
        with self._lock:
            self._drain_arrivals()
            fail_all(self, error)
            return self._take_updates()

    @cached_property
    def grammars(self) -> GrammarCompiler | None:
        """Compiles structured output, from any thread; None without a tokenizer."""
        return None if self.model.tokenizer is None else GrammarCompiler(self.model.tokenizer)

    # ── memory ──

    @cached_property
    def rollback_tokens(self) -> int:
        """Tokens that a state can always be trimmed by; 0: any number."""
        return self.runner.new_state().rollback_tokens

    def warm_up(self) -> None:
        """Run a few tokens, capture graphs and prefault memory before the first request; no statistic counts it.

        The first step imports modules of torch for seconds.
        """
        params = SamplingParams(max_tokens=3, ignore_eos=True, temperature=1.0, top_k=2, top_p=0.9, seed=0)
        request = self.prepare([0], params, key="warm-up")
        request.cache_looked_up = True
        self.queue(request)
        for _ in self.run(request):
            pass
        self.forget("warm-up")
        with self._lock, native.single_threaded(self.runner.native):
            warmup.capture_graphs(self)
        warmup.prefault_at_start(self)
        self.counters = Stats()

    def prefault(self) -> bool:
        """Prefault some memory for later requests, for some milliseconds; whether there was something to do."""
        with self._lock:
            return warmup.prefault(self)

    def forget(self, key: str) -> None:
        """Drop the cached states of a key."""
        with self._lock:
            self.cache.forget(key)

    def between_steps(self) -> contextlib.AbstractContextManager[Any]:
        """Return a context in which no step runs: for work on the cache or the network."""
        return self._lock

    # ── how it stands ──

    @property
    def idle(self) -> bool:
        """Whether nothing runs or waits and no update is left to return."""
        waits = self.arrivals or self.scheduler.running or self.scheduler.waiting
        return not (waits or self.updates or self.controlled)

    @property
    def waiting(self) -> int:
        """Sequences in the queue."""
        return self.scheduler.num_waiting + sum(sequence.num_slots for sequence in list(self.arrivals))

    @property
    def stats(self) -> Stats:
        """The counters, with running, waiting and bytes as they are now."""
        stats, running = self.counters, list(self.scheduler.running)
        stats.running, stats.waiting = len(running), self.waiting
        states = [sequence.state for sequence in running if sequence.state is not None]
        states += [request.prefix_state[0] for request in list(self.controlled) if request.prefix_state is not None]
        stats.kv_bytes = nbytes_together(states)
        stats.cache_bytes, stats.cache_disk_bytes = self.cache.nbytes, self.cache.disk_bytes
        stats.evictions = self.cache.evictions
        return stats

    def _retry_seconds(self) -> float:
        """Return the seconds until the queue is likely to be shorter."""
        pending = sum(sequence.num_pending_tokens for sequence in list(self.scheduler.waiting))
        return min(max(pending / self.steps.tokens_per_second, MIN_RETRY_SECONDS), MAX_RETRY_SECONDS)
