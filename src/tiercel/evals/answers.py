"""The protocol between an evaluation and a model, loaded here (local.py) or behind an address (endpoint.py)."""

from __future__ import annotations

from collections.abc import Callable, Iterable, Iterator
from dataclasses import dataclass
from typing import Any, Protocol

from tiercel.errors import TiercelError
from tiercel.evals.task import Prompt
from tiercel.voting.answers import final_answer
from tiercel.voting.settings import VoteSettings
from tiercel.voting.tally import Vote


@dataclass(frozen=True)
class Ask:
    """How every question of a run is asked; the sampling parameters, resolved."""

    chat: bool
    samples: int
    max_tokens: int
    temperature: float
    top_p: float
    top_k: int
    min_p: float
    stop: tuple[str, ...]
    think: bool | None
    slots: int
    vote: VoteSettings | None = None


@dataclass(frozen=True)
class Sample:
    """One answer.  text: after the reasoning · finish_reason: "length" where the budget cut it · tokens: it took"""

    text: str
    thinking: str
    finish_reason: str | None
    tokens: int


@dataclass(frozen=True)
class Answers:
    """All answers to one question; or the error that kept it from being asked (a prompt that does not fit).

    vote: what came of them, where one was asked for; the samples are then the traces that it counted
    """

    key: int
    samples: list[Sample]
    prompt_tokens: int = 0
    cached_tokens: int = 0
    seconds: float = 0.0
    error: TiercelError | None = None
    vote: Vote | None = None


@dataclass(frozen=True)
class Likelihood:
    """logprob: sum over the continuation's tokens · greedy: each of them was the likeliest · tokens: how many"""

    logprob: float
    greedy: bool
    tokens: int


@dataclass(frozen=True)
class Scored:
    key: int
    likelihoods: list[Likelihood]
    prompt_tokens: int = 0
    cached_tokens: int = 0
    seconds: float = 0.0
    error: TiercelError | None = None


@dataclass(frozen=True)
class Question:
    """key: number of the item · seed: of its samples, its own whatever is asked beside it
    answer: how a vote reads a text, None for no answer"""

    key: int
    prompt: Prompt
    seed: int
    answer: Callable[[str], str | None] = final_answer


class Answerer(Protocol):
    name: str
    has_template: bool

    def about(self) -> dict[str, Any]:
        """Return its entry in the report: name, hashes, sizes, precision."""

    def answer(self, questions: Iterable[Question], ask: Ask) -> Iterator[Answers]:
        """Answers in the order they are ready."""

    def score(self, contexts: Iterable[tuple[int, str, list[str]]], ask: Ask) -> Iterator[Scored]:
        """Likelihoods of continuations of a text."""
