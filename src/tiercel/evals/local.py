"""A loaded model as an `Answerer`.

Questions are queued a few more than there are slots, so that the engine is never idle; the samples of one question
fork from one prefill.  For likelihoods no engine is needed: a context is read once, each continuation goes on from
a fork of its state, and what one context shares with the next (a subject's examples) is read once too.
"""

from __future__ import annotations

import itertools
import time
from collections.abc import Iterable, Iterator, Sequence
from typing import TYPE_CHECKING, Any

from tiercel.errors import ContextOverflow, RequestError, TiercelError
from tiercel.evals.answers import Answers, Ask, Likelihood, Question, Sample, Scored
from tiercel.sampling.params import SamplingParams
from tiercel.voting.voter import Voter

if TYPE_CHECKING:
    from tiercel.api import Model
    from tiercel.engine.request import Request
    from tiercel.model.state import State

MAX_PARALLEL_SAMPLES = 64  # samples of one question that run at once; more come in groups
MIN_SHARED_TOKENS = 32  # tokens: less than this is not worth a state of its own


class LocalModel:
    votes = True  # it has confidences

    def __init__(self, model: Model) -> None:
        self.model, self.name = model, model.name
        self.has_template = model.tokenizer is not None and model.tokenizer.has_template

    def about(self) -> dict[str, Any]:
        from tiercel import plan

        network, config = self.model.network, self.model.config
        return {"name": self.name, "fingerprint": network.fingerprint, "parameters": plan.parameter_count(config),
                "pattern": plan.pattern(config), "dtype": str(network.dtype).removeprefix("torch."),
                "context": self.model.max_length, "device": str(network.embed.weight.device)}  # fmt: skip

    # ── writing ──

    def answer(self, questions: Iterable[Question], ask: Ask) -> Iterator[Answers]:
        from tiercel.engine.draft_model import drafter_for
        from tiercel.engine.engine import Engine

        together = 1 if ask.vote else min(ask.samples, MAX_PARALLEL_SAMPLES)  # a vote opens traces as slots come free
        engine = Engine(self.model, slots=max(ask.slots, together), drafter=drafter_for(self.model))
        waiting = iter(questions)
        open_: dict[int, list[Request]] = {}
        mine: dict[Request, int] = {}
        while True:
            while engine.waiting < max(ask.slots, together):
                question = next(waiting, None)
                if question is None:
                    break
                try:
                    requests = self._requests(engine, question, ask, together)
                except TiercelError as error:
                    yield Answers(question.key, [], error=error)
                    continue
                open_[question.key] = requests
                for request in requests:
                    mine[request] = question.key
                    engine.queue(request)
            if not open_:
                return
            for update in engine.step():
                request = update.request
                if update.finish_reason is None or not request.finished or request not in mine:
                    continue
                key = mine.pop(request)
                if all(each.finished for each in open_[key]):
                    yield _answers(key, open_.pop(key))

    def _requests(self, engine: Any, question: Question, ask: Ask, together: int) -> list[Request]:
        """One request for every `together` samples.  Their seeds differ, and so do choices of one request."""
        tokenizer = self.model.tokenizer
        if tokenizer is None:
            raise RequestError(f"{self.name} has no tokenizer")
        ids = self.prompt_ids(question.prompt, ask)
        starts = ask.chat and tokenizer.opens_thinking(ids)
        thinking = "auto" if ask.chat else "off"
        requests = []
        for group, first in enumerate(range(0, 1 if ask.vote else ask.samples, together)):
            params = SamplingParams(
                n=min(together, ask.samples - first), temperature=ask.temperature, top_p=ask.top_p, top_k=ask.top_k,
                min_p=ask.min_p, max_tokens=ask.max_tokens, stop=list(ask.stop) or None, seed=question.seed + group,
            )  # fmt: skip
            voter = Voter(ask.vote, question.answer) if ask.vote else None
            requests.append(engine.prepare(ids, params, thinking=thinking, starts_in_thinking=starts, controller=voter))
        return requests

    def prompt_ids(self, prompt: Any, ask: Ask) -> list[int]:
        if isinstance(prompt, str):
            return self.model.encode(prompt, raw=True)
        return self.model.encode(prompt, **({} if ask.think is None else {"enable_thinking": ask.think}))

    # ── likelihoods ──

    def score(self, contexts: Iterable[tuple[int, str, list[str]]], ask: Ask) -> Iterator[Scored]:
        scorer = Scorer(self.model)
        for key, context, continuations in contexts:
            began = time.perf_counter()
            try:
                pairs = [encode_pair(self.model, context, continuation) for continuation in continuations]
                found = scorer.score(pairs)
            except TiercelError as error:
                yield Scored(key, [], error=error)
                continue
            yield Scored(key, found, len(pairs[0][0]), scorer.reused, time.perf_counter() - began)


def encode_pair(model: Model, context: str, continuation: str) -> tuple[list[int], list[int]]:
    """Token ids of both, as lm-eval cuts them: spaces at the end of the context belong to the continuation, and the
    continuation is what the whole text has more tokens than the context."""
    if model.tokenizer is None:
        raise RequestError(f"{model.name} has no tokenizer")
    bare = context.rstrip()
    continuation = context[len(bare) :] + continuation
    if not bare:
        first = [model.tokenizer.bos] if model.tokenizer.bos is not None else []
        ids = model.tokenizer.encode(continuation, bos=False)
        return (first, ids) if first and first[0] != ids[0] else (ids[:1], ids[1:])
    ids = model.encode(bare, raw=True)
    return ids, model.encode(bare + continuation, raw=True)[len(ids) :]


class Scorer:
    """Log-probabilities of continuations; keeps the state of the beginning that contexts have in common.

    reused: tokens of the last context that were not read again
    """

    def __init__(self, model: Model) -> None:
        self.network, self.limit = model.network, model.max_length
        self._last: list[int] = []
        self._common: list[int] = []
        self._state: State | None = None
        self.reused = 0

    def score(self, pairs: Sequence[tuple[list[int], list[int]]]) -> list[Likelihood]:
        """pairs: (context ids, continuation ids); equal contexts are read once.  Raises ContextOverflow."""
        for context, continuation in pairs:
            if not context or not continuation:
                raise RequestError("a likelihood needs a context and a continuation of at least one token each")
            if len(context) + len(continuation) - 1 > self.limit:
                raise ContextOverflow(f"context and continuation have {len(context) + len(continuation)} tokens and "
                                      f"the model's context holds {self.limit}")  # fmt: skip
        found: list[Likelihood | None] = [None] * len(pairs)
        self.reused = 0
        for context, group in itertools.groupby(sorted(range(len(pairs)), key=lambda i: pairs[i][0]),
                                                key=lambda i: pairs[i][0]):  # fmt: skip
            numbers = list(group)
            for number, likelihood in zip(numbers, self._after(context, [pairs[i][1] for i in numbers]), strict=True):
                found[number] = likelihood
        return [likelihood for likelihood in found if likelihood is not None]

    def _after(self, context: list[int], continuations: list[list[int]]) -> list[Likelihood]:
        """Each continuation's likelihood after one context: one prefill, one forward for all of them together."""
        import torch

        from tiercel.model.prefill import prefill

        state = self._begin(context)
        device = self.network.embed.weight.device
        rest = torch.tensor(context[state.length :], device=device)
        first_V = prefill(self.network, rest, state)
        longer = [ids for ids in continuations if len(ids) > 1]
        states = [state.fork() for _ in longer]
        rows = [torch.tensor(ids[:-1], device=device) for ids in longer]
        read = iter(self.network(rows, states) if rows else [])
        out = []
        for ids in continuations:
            logits = torch.cat([first_V[None], next(read)]) if len(ids) > 1 else first_V[None]
            targets = torch.tensor(ids, device=device)
            logprobs = logits.log_softmax(-1).gather(1, targets[:, None])[:, 0]
            greedy = bool((logits.argmax(-1) == targets).all())
            out.append(Likelihood(float(logprobs.double().sum()), greedy, len(ids)))
        return out

    def _begin(self, context: list[int]) -> State:
        """A state that holds what is known of the context's beginning; at least its last token is left to read."""
        from tiercel.model.prefill import prefill

        if self._state is None or context[: len(self._common)] != self._common or len(self._common) >= len(context):
            self._state, self._common = None, []
            same = sum(1 for _ in itertools.takewhile(lambda pair: pair[0] == pair[1], zip(context, self._last)))  # noqa: B905
            if min(same, len(context) - 1) >= MIN_SHARED_TOKENS:
                import torch

                self._common = context[: min(same, len(context) - 1)]
                self._state = self.network.new_state()
                prefill(self.network, torch.tensor(self._common, device=self.network.embed.weight.device), self._state)
        elif self._common:
            self.reused = len(self._common)
        self._last = context
        return self.network.new_state() if self._state is None else self._state.fork()


def _answers(key: int, requests: list[Request]) -> Answers:
    error = next((request.error for request in requests if request.error is not None), None)
    first = requests[0]
    vote = first.controller.result(first) if isinstance(first.controller, Voter) and error is None else None
    sequences = [sequence for request in requests for sequence in request.sequences]
    samples = [
        Sample(sequence.text, sequence.reasoning, sequence.finish_reason, sequence.num_output_tokens)
        for sequence in (sequences if vote is None else sequences[: vote.counted])
    ]
    seconds = max(request.times.total - request.times.queue for request in requests)
    return Answers(key, samples, len(first.prompt_ids), first.cached_tokens, seconds, error, vote)
