"""Many prompts at once: schedule → run → sample → hand out.

    engine  = Engine(model)
    request = engine.add(ids, SamplingParams(max_tokens=64))
    while not engine.idle:
        for update in engine.step(): ...

No threads and no waiting here: one `step` is one forward of the network for everybody who has something to read, the
next token of everybody who has read everything, and the news for whoever asked.  `loop.py` runs it behind asyncio.

A text is read once: snapshots of its state go into the prefix cache (`prefix_cache.py`) where somebody may come back
to (`marks.py`).

What a row gets does not depend on who shares the step, on how its prompt was cut, or on whether it was read before.
"""

from __future__ import annotations

import contextlib
import itertools
import logging
import secrets
import threading
import time
from collections import Counter, deque
from collections.abc import Callable, Collection, Generator, Iterator
from collections.abc import Sequence as GenericSequence
from dataclasses import dataclass, field
from functools import cached_property
from pathlib import Path
from typing import TYPE_CHECKING, Any, Protocol

import torch
from torch import Tensor

from tiercel.engine import snapshot_policy as marks
from tiercel.engine.async_scheduling import InFlightStep, PendingTokens
from tiercel.engine.prefix_cache import PrefixCache
from tiercel.engine.request import Request, SampleController, Sequence, Update
from tiercel.engine.scheduler import PATIENCE, ScheduledSequence, Scheduler
from tiercel.engine.speculative import FIRST_STEPS, LENGTHS, MOST, Drafter, Speculation, StepCosts
from tiercel.engine.structured_output import Grammar, GrammarCompiler
from tiercel.errors import Busy, RequestError, TiercelError
from tiercel.model.decoder import Decoder
from tiercel.model.runner import Runner, SequenceState, runner_for
from tiercel.model.state import nbytes_together
from tiercel.ops.cpu import native
from tiercel.sampling.params import SamplingParams
from tiercel.tokenizer.stream import Piece

if TYPE_CHECKING:
    from tiercel.tokenizer.tokenizer import Tokenizer

log = logging.getLogger("tiercel.engine")

CACHE_SHARE, LARGEST_CACHE = 1 / 8, 4 << 30  # of the free memory when the engine starts
READY = 3.0  # seconds that a start waits for that; the rest comes while nobody asks
REHEARSAL = 2.0  # and for steps of every kind, which else an answer would wait for


class Model(Protocol):
    """What an engine needs of a `tiercel.Model`."""

    network: Decoder
    tokenizer: Tokenizer | None
    max_length: int


@dataclass
class Stats:
    """Counters since the start, and how things stand (bytes, answers) when asked."""

    running: int = 0
    waiting: int = 0
    kv_bytes: int = 0  # states of running answers
    cache_bytes: int = 0
    cache_disk_bytes: int = 0
    prompt_tokens: int = 0
    hit_tokens: int = 0  # of them, not read again
    generated_tokens: int = 0
    requests: int = 0
    aborted: int = 0
    failed: int = 0
    preemptions: int = 0
    evictions: int = 0
    drafts_proposed: int = 0
    drafts_accepted: int = 0
    steps: int = 0
    not_cached: Counter[str] = field(default_factory=Counter)  # requests that found nothing, by reason


class Engine:
    """
    slots: answers that run at once · step_tokens: tokens of one forward · max_queue: answers that may wait
    cache_bytes: budget of the prefix cache, 0 for none; an eighth of the free memory, 4 GiB at most, when left out
    spill: a folder for snapshots that do not fit · state_bytes: what running answers may take before some have to wait
    drafter: makes what guesses for an answer (speculative.py); None: nobody guesses
    patience: seconds that running answers may wait for a step that reads prompts too (scheduler.py)
    """

    def __init__(
        self,
        model: Model,
        *,
        slots: int = 8,
        step_tokens: int = 512,
        cache_bytes: int | None = None,
        spill: Path | None = None,
        max_queue: int | None = None,
        state_bytes: int | None = None,
        drafter: Callable[[Sequence], Drafter] | None = None,
        patience: float = PATIENCE,
        runner: Runner | None = None,
    ) -> None:
        if slots < 1 or step_tokens < slots:
            raise RequestError(f"an engine needs slots, and as many step tokens, not {slots} and {step_tokens}")
        self.model, self.max_queue = model, max_queue
        self.runner = runner_for(model.network, slots, model.max_length) if runner is None else runner
        self.state_bytes = self.runner.state_bytes if state_bytes is None else state_bytes
        self.drafter, self.costs = drafter, StepCosts()
        self.scheduler = Scheduler(slots, step_tokens, patience)
        self.cache = PrefixCache(self.runner, _cache_budget() if cache_bytes is None else cache_bytes, spill)
        self._stats = Stats()
        self._arrivals: deque[Sequence] = deque()  # filled by `add` from any thread, emptied by `step`
        self._news: list[Update] = []
        self._watched: list[Request] = []  # whose prompt is read, and which may open further choices
        self._begun: InFlightStep | None = None  # on a GPU, the next forward (ahead.py)
        self._numbers = itertools.count()
        self._lock = threading.RLock()
        self._speed = 100.0  # tokens a second, lately

    # ── what callers ask ──

    def add(self, ids: GenericSequence[int], params: SamplingParams, **more: Any) -> Request:
        """Queue a prompt; the arguments are those of `prepare`.  From any thread, without waiting.

        Raises RequestError, ContextOverflow, and Busy when the queue is full.
        """
        if self.max_queue is not None and params.n > self.scheduler.slots + self.max_queue:
            most = self.scheduler.slots + self.max_queue
            raise RequestError(f"n={params.n} answers are asked for, and {most} at most can run and wait")
        waiting, free = self.waiting, self.scheduler.slots - self.scheduler.taken
        if self.max_queue is not None and waiting + params.n > self.max_queue + free:
            raise Busy(f"{waiting} answers are waiting and the queue holds {self.max_queue}", self._patience())
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
        watch: SampleController | None = None,
        adapter: str | None = None,
    ) -> Request:
        """A request, checked, so that nothing can be wrong with it later.

        key: separates what is remembered (tenants).  adapter: one of `network.adapters`; what it has read is its own,
        and another one's under the same name.  turn: index of the first token of the last user turn.
        constraint: `params.structured`, compiled by `grammars` (that takes up to two seconds; done here if left out).
        shown: control tokens that appear as their text.
        watch: opens further answers as slots come free, and may end each; they share the reading of the prompt.
        """
        params.verify()
        if params.structured is not None and constraint is None and self.grammars is not None:
            constraint = self.grammars.compile(params.structured)
        prompt, V = list(ids), self.runner.config.vocab_size
        if wrong := next((token for token in prompt if not 0 <= token < V), None):
            raise RequestError(f"token id {wrong} is outside the vocabulary of {V}")
        if watch is not None and params.n != 1:
            raise RequestError(f"n={params.n} answers and a vote are asked for; a vote has its own number of answers")
        key, number = self.key_of(key, adapter), next(self._numbers)
        request = Request(id or secrets.token_hex(12), number, prompt, params, key, turn, adapter=adapter, watch=watch)

        def choice(index: int) -> Sequence:
            return Sequence(
                request, self.model.tokenizer, V, prompt, params, self.model.max_length,
                index=index, thinking=thinking, starts_in_thinking=starts_in_thinking, grammar=constraint, shown=shown,
            )  # fmt: skip

        request.choices += [choice(index) for index in range(params.n)]
        if watch is not None:
            request.spawn = choice
        return request

    def key_of(self, key: str, adapter: str | None) -> str:
        """Under which the cache keeps texts of a key; RequestError where there is no such adapter."""
        return key if adapter is None else f"\0adapter {self.runner.adapters[adapter].id}\0{key}"

    def wears(self, adapter: str) -> bool:
        """Whether a request that has not ended wears it."""
        everybody = [*self._arrivals, *self.scheduler.running, *self.scheduler.waiting]
        return any(choice.request.adapter == adapter for choice in everybody)

    @cached_property
    def grammars(self) -> GrammarCompiler | None:
        """Compiles forms of answers; from any thread."""
        return None if self.model.tokenizer is None else GrammarCompiler(self.model.tokenizer)

    @cached_property
    def rollback_tokens(self) -> int:
        """Tokens that a state can always be cut back by; 0: by any number."""
        return self.runner.new_state().rollback_tokens

    def queue(self, request: Request) -> None:
        self._arrivals.append(request.choices[0])

    def warm_up(self) -> None:
        """A few tokens for nobody, in no figure: torch imports seconds' worth of modules at a first step."""
        params = SamplingParams(max_tokens=3, ignore_eos=True, temperature=1.0, top_k=2, top_p=0.9, seed=0)
        request = self.prepare([0], params, key="warm-up")
        request.looked_up = True
        self.queue(request)
        for _ in self.run(request):
            pass
        self.forget("warm-up")
        self._rehearse()
        ready = time.perf_counter() + READY
        while self.look_ahead() and time.perf_counter() < ready:
            pass
        self._stats = Stats()

    def look_ahead(self) -> bool:
        """Have some more memory at hand for the answers to come, if there is not enough; whether that was done.
        For who has nothing else to do: it takes milliseconds."""
        with self._lock, contextlib.suppress(OSError):  # the system has none
            (running, left), pool = self._at_hand, self.runner.allocator
            wanted = running + max(0, min(left, self.cache.budget - self.cache.nbytes))
            pool.keep = wanted + pool.SLAB  # a whole one goes back, or none
            return pool.ahead(wanted)
        return False

    @cached_property
    def _at_hand(self) -> tuple[int, int]:
        """Bytes of all slots' states with some pages each, and of the snapshots that they leave."""
        return self.runner.memory_targets(self.scheduler.slots)

    def _rehearse(self) -> None:
        """Capture the graphs of one sequence with draft tokens, then of one to all slots; and time them."""
        guesses = () if self.drafter is None else LENGTHS
        kinds = [[1 + length] for length in (0, *guesses)]
        kinds += [[1] * texts for texts in range(2, min(self.scheduler.slots, self.runner.max_captured_tokens) + 1)]
        states: list[SequenceState] = []
        until = time.perf_counter() + REHEARSAL
        with self._lock, native.single_threaded(self.runner.native):
            for kind in itertools.takewhile(lambda _: time.perf_counter() < until, kinds):
                states += [self.runner.new_state() for _ in kind[len(states) :]]
                tokens = [torch.zeros(rows, dtype=torch.long, device=self.runner.device) for rows in kind]
                for _ in range(FIRST_STEPS + 1):
                    began = time.perf_counter()
                    self.runner.forward(tokens, states[: len(kind)], logits_to_keep=max(kind))
                    if len(kind) == 1:
                        self.costs.note(kind[0], time.perf_counter() - began)
                    for state in states:
                        state.trim(0)

    def forget(self, key: str) -> None:
        """Drop what is remembered for a key."""
        with self._lock:
            self.cache.forget(key)

    def abort(self, request_id: str) -> None:
        """End a request, wherever it is.  Its slots and states are free when this returns; its last updates come
        with the next step."""
        with self._lock:
            self._arrive()
            everybody = [choice.request for choice in [*self.scheduler.running, *self.scheduler.waiting]]
            request = next((each for each in [*everybody, *self._watched] if each.id == request_id), None)
            if request is None:
                return
            self._stats.aborted += 1
            self._close(request)
            running = request.running
            for choice in request.choices:
                if choice.finish_reason is None:
                    self._report(choice, choice.end("abort"))
                self._leave(choice)
            if not running:  # between two answers of a vote
                self._news.append(Update(request, 0, [], [], finish_reason="abort", last=True))

    def between_steps(self) -> contextlib.AbstractContextManager[Any]:
        """While one is inside, nothing runs: for work on the cache or the network."""
        return self._lock

    @property
    def idle(self) -> bool:
        return not (self._arrivals or self.scheduler.running or self.scheduler.waiting or self._news or self._watched)

    @property
    def waiting(self) -> int:
        """Answers in the queue."""
        return self.scheduler.queued + sum(choice.places for choice in list(self._arrivals))

    @property
    def stats(self) -> Stats:
        stats, running = self._stats, list(self.scheduler.running)
        stats.running, stats.waiting = len(running), self.waiting
        states = [choice.state for choice in running if choice.state is not None]
        states += [request.origin[0] for request in list(self._watched) if request.origin is not None]
        stats.kv_bytes = nbytes_together(states)
        stats.cache_bytes, stats.cache_disk_bytes = self.cache.nbytes, self.cache.disk_bytes
        stats.evictions = self.cache.evictions
        return stats

    def run(self, request: Request) -> Generator[Update, None, None]:
        """Step until this request has ended, and give its updates; for use without `loop.py`, also from several
        threads.  Leaving the iterator ends the request."""
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
                    self._news = [update for update in self._news if update.request is not request]

    # ── one step ──

    def step(self) -> list[Update]:
        """One forward, and what came of it; [] when there was nothing to do."""
        with self._lock, native.single_threaded(self.runner.native):
            self._arrive()
            self._make_room()
            self._open_choices(first=True)
            for choice in self.scheduler.admit():
                self._start(choice)
            self._open_choices()
            handed_out = False
            for row, logits_LV in self._claimed() or self._planned():
                self._hand_out(row, logits_LV)
                handed_out = True
            self._stats.steps += handed_out
            news, self._news = self._news, []
            return news

    def _planned(self) -> Iterator[tuple[ScheduledSequence, Tensor]]:
        """A forward for everybody who has something to read."""
        rows = self.scheduler.plan(marks.stop)
        if rows:
            self._draft(rows)
            rows.sort(key=lambda row: len(row.drafts))  # a kind of step is recorded once: let there be few
            marks.keep(rows, self.cache)
            yield from self._forward(rows)

    def _claimed(self) -> Iterator[tuple[ScheduledSequence, Tensor]] | None:
        """What the last step began; None where nobody is left of it.  Newcomers wait for the step after it."""
        begun, self._begun = self._begun, None
        if begun is None:
            return None
        rows, logits = begun.claim()
        return self._chosen(rows, logits, time.perf_counter()) if rows else None

    def _arrive(self) -> None:
        while self._arrivals:
            choice = self._arrivals.popleft()
            self.scheduler.waiting.append(choice)
            self._stats.requests += 1

    def _make_room(self) -> None:
        """Send the latest back to the queue while the states take more than they may."""
        running = self.scheduler.running
        while self.state_bytes is not None and len(running) > 1 and self.stats.kv_bytes > self.state_bytes:
            self.preempt(running[-1])

    def preempt(self, choice: Sequence) -> None:
        """Back to the queue.  What it has read stays in the cache, if that has room, or is read again: the tokens,
        and what was drawn so far, are its own."""
        marks.remember(choice, self.cache, place=True, ending=True)
        choice.state, choice.marks = None, []
        self.scheduler.back(choice)
        self.scheduler.crowded = True
        self._stats.preemptions += 1

    def _start(self, choice: Sequence) -> None:
        """Give it a state that holds as much of its text as is remembered."""
        request, tokens = choice.request, choice.tokens
        request.started_now()
        choice.state = self.runner.new_state(request.adapter)
        found = self.cache.find(request.key, tokens, len(tokens) - 1)
        if found.snapshot is not None:
            choice.state.restore(found.snapshot)
            kept = choice.state.trim(found.length)
            assert kept, "a snapshot goes back as far as it says"
        choice.kept = choice.length
        if not request.looked_up:
            request.looked_up = True
            self._tell(request, found.shared, choice.length)
        marks.mark(choice, found.shared, self.cache)

    # ── further answers of a request that is watched ──

    def _open_choices(self, *, first: bool = False) -> None:
        """Let watched requests use the slots that nobody waits for.  first: those that have no answer running,
        before the queue: they have had their turn already, and newcomers must not keep them out."""
        scheduler = self.scheduler
        for request in list(self._watched):
            while request.watch is not None and request.watch.open and len(request.choices) < request.watch.wanted:
                alone = not request.running
                if scheduler.taken >= scheduler.slots or (first and not alone):
                    break
                if not alone and (scheduler.waiting or scheduler.crowded):
                    break
                assert request.origin is not None and request.spawn is not None
                state, logits_V = request.origin
                choice = request.spawn(len(request.choices))
                choice.asleep, choice.state = False, state.fork()
                request.choices.append(choice)
                scheduler.running.append(choice)
                self._answer(choice, logits_V[None], [])

    def _close(self, request: Request) -> None:
        """No further answers."""
        if request.watch is not None:
            request.watch.close()
            request.origin = None
        if request in self._watched:
            self._watched.remove(request)

    def _tell(self, request: Request, shared: int, cached: int) -> None:
        """Count what was reused, and say why nothing was."""
        request.cached_tokens = cached
        self._stats.prompt_tokens += len(request.prompt_ids)
        self._stats.hit_tokens += cached
        if cached:
            return
        if self.cache.budget == 0:
            reason, why = "off", "the cache is off"
        elif shared == 0:
            reason, why = "new", "no earlier text begins like this one"
        else:
            reason = "no snapshot"
            why = f"{shared} tokens are shared with an earlier text, and no snapshot of it reaches back that far"
        request.why_not_cached = why
        self._stats.not_cached[reason] += 1
        log.info("request %s: none of %d prompt tokens reused: %s", request.id, len(request.prompt_ids), why)

    # ── the forward ──

    def _forward(self, rows: list[ScheduledSequence]) -> Iterator[tuple[ScheduledSequence, Tensor]]:
        """Each row with the logits of its last tokens: as many as were drafted, and one."""
        device = self.runner.device
        tokens = [torch.tensor(row.tokens, device=device) for row in rows]
        keep = 1 + max(len(row.drafts) for row in rows)
        began = time.perf_counter()
        try:
            logits = self.runner.forward(tokens, [_its(row) for row in rows], logits_to_keep=keep)
        except Exception as error:
            self._forward_failed(rows, error)
            return
        except BaseException:  # Ctrl+C in the middle of a layer
            self._start_again(rows)
            raise
        yield from self._chosen(rows, logits, began)

    def _chosen(
        self, rows: list[ScheduledSequence], logits: GenericSequence[Tensor], began: float
    ) -> Iterator[tuple[ScheduledSequence, Tensor]]:
        """Each row with its logits; what a device chooses itself is chosen, and its next forward begun."""
        if self.runner.supports_async:
            try:
                chosen = PendingTokens(rows, logits)
                if len(chosen) == len(rows) and self._may_begin(rows):
                    self._begin(rows, chosen.tokens_B)
                chosen.settle()
            except BaseException as error:
                self._begun = None
                if not isinstance(error, Exception):
                    self._start_again(rows)
                    raise
                self._forward_failed(rows, error)
                return
        seconds = time.perf_counter() - began
        count = sum(row.count + len(row.drafts) for row in rows)
        self._speed += 0.05 * (count / seconds - self._speed)
        self.scheduler.took(sum(row.count for row in rows if row.count > 1), seconds)
        if all(row.count == 1 for row in rows):
            self.costs.note(count, seconds)
        for row, logits_LV in zip(rows, logits, strict=True):
            yield row, logits_LV[-(1 + len(row.drafts)) :]

    def _may_begin(self, rows: list[ScheduledSequence]) -> bool:
        """Whether the next step is one token for each of these: nobody comes in or forks, and somebody goes on."""
        if self._arrivals or self.scheduler.waiting or len(rows) != len(self.scheduler.running):
            return False
        choices = [row.choice for row in rows]
        forks = any(c.places > 1 or (c.request.watch is not None and not c.token_ids) for c in choices)
        return not forks and any(choice.room - len(choice.token_ids) > 1 for choice in choices)

    def _begin(self, rows: list[ScheduledSequence], tokens_B: Tensor) -> None:
        """The next forward, from tokens that the host has not seen."""
        ahead = [ScheduledSequence(row.choice, 1) for row in rows]
        marks.keep(ahead, self.cache)
        states = [_its(row) for row in ahead]
        self._begun = InFlightStep(ahead, list(states), self.runner.forward(tokens_B.clamp(min=0).split(1), states))

    def _forward_failed(self, rows: list[ScheduledSequence], error: Exception) -> None:
        """Whose fault it was is not known: everybody of this step starts again from what is remembered, alone.
        Who fails alone has ended; the states of the others may be half written and are given up."""
        if len(rows) == 1 and rows[0].choice.alone:
            self._fail(rows[0].choice, error)
            return
        what = f"{type(error).__name__}: {error}"
        log.warning("a step of %d rows failed (%s); its rows are tried one by one", len(rows), what)
        for row in rows:
            row.choice.alone = True
        self._start_again(rows)

    def _start_again(self, rows: list[ScheduledSequence]) -> None:
        for row in rows:
            self._start(row.choice)

    def _draft(self, rows: list[ScheduledSequence]) -> None:
        """Let those who answer guess what comes next."""
        if self.drafter is None:
            return
        for row in rows:
            choice, state = row.choice, _its(row)
            watched = choice.request.watch is not None and choice.request.origin is None
            if choice.pending > 1 or choice.places > 1 or watched:  # nobody forks from guesses
                continue
            if choice.speculation is None:
                choice.speculation = Speculation(self.drafter(choice), self.costs)
            room = min(choice.room - len(choice.token_ids) - 1, (state.rollback_tokens or MOST + 1) - 1)
            row.drafts = choice.speculation.draft(choice.tokens, len(rows), room)

    # ── sampling, and what comes of it ──

    def _hand_out(self, row: ScheduledSequence, logits_LV: Tensor) -> None:
        leader = row.choice
        if leader.finish_reason is not None or leader.length < len(leader.tokens):
            return  # another answer of its vote has decided it, or there is more to read
        leader.alone = False
        leader.request.prompt_read()
        asleep = [choice for choice in leader.request.choices if choice.asleep] if leader.index == 0 else []
        free = self.scheduler.free_beside(leader)
        forked, later = asleep[:free], asleep[free:]
        for choice in forked:
            choice.asleep, choice.state = False, _its(row).fork()
            self.scheduler.running.append(choice)
        request = leader.request
        if request.watch is not None and request.watch.open and not leader.token_ids and request.origin is None:
            request.origin = _its(row).fork(), logits_LV[-1].clone()
            self._watched.append(request)
        for choice in later:  # more answers than slots: these find the prompt in the cache when their turn comes
            choice.asleep = False
            self.scheduler.wait(choice)
        self._answer(leader, logits_LV, row.drafts)
        for choice in forked:
            self._answer(choice, logits_LV[:1], [])

    def _answer(self, choice: Sequence, logits_LV: Tensor, drafts: list[int]) -> None:
        """The tokens that follow from these logits: one, and one more for every draft that it confirms."""
        pieces: list[Piece] = []
        watch = choice.request.watch
        accepted = 0
        try:
            for logits_V, draft in zip(logits_LV, [*drafts, None], strict=True):
                pieces += choice.take(logits_V)
                choice.tokens.append(choice.token_ids[-1])
                if watch is not None and (reason := watch.token(choice, logits_V)) is not None:
                    pieces += choice.end(reason)
                if choice.finish_reason is not None or choice.token_ids[-1] != draft:
                    break
                accepted += 1
            if watch is not None and choice.finish_reason is not None:
                watch.ended(choice)
        except Exception as error:
            self._fail(choice, error)
            return
        if drafts:
            self._settle_drafts(choice, len(drafts), accepted)
        self._report(choice, pieces)
        if choice.finish_reason is not None:
            self._leave(choice)
        if watch is not None and not watch.open:
            self._end_vote(choice.request)

    def _end_vote(self, request: Request) -> None:
        """It is decided: the answers that still grow end here."""
        self._close(request)
        for choice in request.running:
            self._report(choice, choice.end("decided"))
            self._leave(choice)

    def _settle_drafts(self, choice: Sequence, proposed: int, accepted: int) -> None:
        """Take back what was not confirmed; the last token that was chosen has not been read."""
        assert choice.state is not None
        kept = choice.state.trim(min(choice.state.length, len(choice.tokens) - 1))
        assert kept, "what a forward added can be cut off again"
        self._stats.drafts_proposed += proposed
        self._stats.drafts_accepted += accepted
        if choice.speculation is not None:
            choice.speculation.note(proposed, accepted)

    def _report(self, choice: Sequence, pieces: list[Piece], error: TiercelError | None = None) -> None:
        """An update about what is new since the last."""
        new = choice.token_ids[choice.reported :]
        logprobs = None if choice.logprobs is None else choice.logprobs[choice.reported :]
        self._stats.generated_tokens += len(new)
        choice.reported = len(choice.token_ids)
        ends = choice.finish_reason is not None and choice.request.finished
        reasons = choice.finish_reason, choice.stop_reason
        self._news.append(Update(choice.request, choice.index, pieces, new, logprobs, *reasons, error, ends))

    def _fail(self, choice: Sequence, error: Exception) -> None:
        """End this one; its state is not to be trusted."""
        if not isinstance(error, TiercelError):
            log.exception("request %s failed", choice.request.id, exc_info=error)
            error = TiercelError(
                f"this answer failed inside ({type(error).__name__}: {error}); others are not affected"
            )
        self._stats.failed += 1
        choice.request.error = error
        self._close(choice.request)
        sleepers = [other for other in choice.request.choices if other.asleep] if choice.index == 0 else []
        if choice.request.watch is not None:  # a vote that lacks a voice is none
            sleepers = [other for other in choice.request.running if other is not choice]
        for each in (choice, *sleepers):
            each.state = None
            pieces = each.end("error")
            self._report(each, pieces, error)
            self._leave(each)

    def fail_all(self, error: TiercelError) -> list[Update]:
        """End everything with this error: the engine itself has failed.  The updates that say so."""
        with self._lock:
            self._arrive()
            for choice in [*self.scheduler.running, *self.scheduler.waiting]:
                if choice.finish_reason is None:  # else it ended with another of its request
                    self._fail(choice, error)
            for request in list(self._watched):
                request.error = error
                self._close(request)
                self._news.append(Update(request, 0, [], [], finish_reason="error", error=error, last=True))
            news, self._news = self._news, []
            return news

    def _leave(self, choice: Sequence) -> None:
        """It has ended: its state stays in the cache as far as that has room.  Of a vote's many answers none does."""
        if choice.request.watch is None or choice.marks:
            marks.remember(choice, self.cache, place=True, ending=True)
        choice.state, choice.asleep = None, False
        self.scheduler.leave(choice)
        if choice.request.finished:
            choice.request.ended()

    def _patience(self) -> float:
        """Seconds until the queue is likely to be shorter."""
        return min(max(sum(choice.pending for choice in list(self.scheduler.waiting)) / self._speed, 1.0), 60.0)


def _its(row: ScheduledSequence) -> SequenceState:
    assert row.choice.state is not None
    return row.choice.state


def _cache_budget() -> int:
    import psutil

    return min(int(psutil.virtual_memory().available * CACHE_SHARE), LARGEST_CACHE)
