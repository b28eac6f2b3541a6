"""Constraints on the tokens of one sequence: a reasoning budget, structured output, repetition detection.

    constraints = TokenConstraints.of(tokenizer, params, grammar=…, thinking="auto", starts_in_thinking=…)   or None
    Sampler(…, constraints=constraints)
    constraints.finish_reason             after every accepted token: "stop" (the form is complete), "loop", or None

Reasoning is not constrained: the grammar begins where it ends.  A block opens as `TextStream` sees it: the prompt
opened it, or the model writes the tag first; so at the start both the tag and the grammar's first tokens may come.
When the budget is spent, or reasoning repeats itself, the closing tag is forced, as its own token where it is one.  A
later block has what the earlier ones left of the budget.
"""

from __future__ import annotations

from collections.abc import Sequence
from typing import Protocol

import numpy as np
import torch
from torch import Tensor

from tiercel.errors import RequestError
from tiercel.sampling.params import Repetition, SamplingParams
from tiercel.tokenizer.control import THINK_TAGS
from tiercel.tokenizer.stream import TextStream
from tiercel.tokenizer.tokenizer import Tokenizer

WHITESPACE = b" \t\r\n"


class Matcher(Protocol):
    """Where an answer is in its grammar (engine/structured_output.py)."""

    @property
    def complete(self) -> bool:
        """Whether the form is complete: only the end can follow."""

    def mask(self, V: int) -> Tensor:
        """Return which tokens may come next, (V,) bool."""

    def allows(self, token: int) -> bool:
        """Whether a token may come next."""

    def accept(self, token: int) -> None:
        """Append a token."""

    def restart(self) -> None:
        """Go back to the start of the grammar."""


class Grammar(Protocol):
    """A compiled grammar."""

    def start(self) -> Matcher:
        """Return a matcher at its start."""


class TokenConstraints:
    """Which tokens may come next in one sequence; `of` builds it from a request's parameters.

    thinking_tokens: tokens inside reasoning so far, without forced ones · finish_reason: why the sequence ends here
    """

    def __init__(
        self,
        tokenizer: Tokenizer | None,
        *,
        grammar: Grammar | None = None,
        budget: int | None = None,
        repetition: Repetition | None = None,
        thinking: str = "off",
        starts_in_thinking: bool = False,
    ) -> None:
        self.tokenizer, self.budget = tokenizer, budget
        self.matcher = grammar.start() if grammar is not None else None
        self.repetition = RepetitionDetector(repetition) if repetition is not None else None
        self.thinking_tokens = 0
        self.finish_reason: str | None = None
        self._stream: TextStream | None = None
        if tokenizer is not None and thinking != "off":
            self._stream = tokenizer.stream(thinking=thinking, starts_in_thinking=starts_in_thinking)
        self._forced: list[int] = []
        self._matching = True  # whether the answer so far has the form
        self._close_if_spent()

    @classmethod
    def of(
        cls,
        tokenizer: Tokenizer | None,
        params: SamplingParams,
        *,
        grammar: Grammar | None = None,
        thinking: str = "off",
        starts_in_thinking: bool = False,
    ) -> TokenConstraints | None:
        """Return the constraints of a request; None where it has none.

        Args:
            tokenizer: spells the tags of reasoning; None: the model has no tokenizer.
            params: `thinking_budget`, `structured` and `repetition_detection` are read.
            grammar: `params.structured`, compiled (engine/structured_output.py).
            thinking: how reasoning is read, as in `Tokenizer.stream`.
            starts_in_thinking: the prompt opened a block.

        Raises:
            RequestError: a tokenizer or a compiled grammar is missing.
        """
        if params.structured is not None and grammar is None and tokenizer is not None:
            raise RequestError("structured answers come from an engine: model.generate, LLM or Engine.add")
        if params.structured is not None and grammar is None:
            raise RequestError("structured answers need a tokenizer, and this model has none")
        if params.thinking_budget is not None and tokenizer is None:
            raise RequestError("thinking_budget needs a tokenizer, and this model has none")
        if grammar is None and params.thinking_budget is None and params.repetition_detection is None:
            return None
        return cls(
            tokenizer,
            grammar=grammar,
            budget=params.thinking_budget,
            repetition=params.repetition_detection,  # type: ignore[arg-type]  # verified: a Repetition
            thinking=thinking,
            starts_in_thinking=starts_in_thinking,
        )

    @property
    def in_thinking(self) -> bool:
        """Whether the next token is inside a block of reasoning."""
        return self._stream is not None and self._stream.in_thinking

    def mask(self, V: int) -> Tensor | int | None:
        """Return which tokens may come next, (V,) bool; the one token that must come; or None for any."""
        if self._forced:
            return self._forced[0]
        if self.matcher is None:
            return None
        if self.in_thinking:
            return self._reasoning_mask(V)
        opening = self._opening(V) if self._stream is not None and self._stream.undecided else None
        if opening is None:
            return self.matcher.mask(V)
        if not self._matching:
            return opening
        return opening | self.matcher.mask(V)

    def accept(self, token: int) -> None:
        """Append a token."""
        forced = bool(self._forced) and self._forced.pop(0) == token
        inside = self.in_thinking
        if self._stream is not None:
            self._stream.push(token)
            self.thinking_tokens += inside and self.in_thinking and not forced
        if self.matcher is not None:
            self._match(token, inside)
        repeats = self.repetition is not None and self.repetition.add(token)
        if repeats and self.in_thinking and not forced:
            self._close()
        elif repeats and not self.in_thinking:
            self.finish_reason = "loop"
        self._close_if_spent()

    def _match(self, token: int, inside: bool) -> None:
        assert self.matcher is not None
        if self.in_thinking or inside:
            if not inside:  # it opens here: what was read as an answer was the tag
                self.matcher.restart()
            self._matching = True
            return
        if self._stream is not None and self._stream.undecided and self._matching:
            self._matching = self.matcher.allows(token)
        if self._matching:
            self.matcher.accept(token)
            if self.matcher.complete and not (self._stream is not None and self._stream.undecided):
                self.finish_reason = "stop"

    def _close_if_spent(self) -> None:
        if self.in_thinking and self.budget is not None and self.thinking_tokens >= self.budget and not self._forced:
            self._close()

    def _close(self) -> None:
        assert self.tokenizer is not None and self._stream is not None
        self._forced = self.tokenizer.end_of_thinking(self._stream.held)
        if self.repetition is not None:
            self.repetition.clear()

    def _opening(self, V: int) -> Tensor:
        """Mask of tokens that begin or continue the tag that opens reasoning."""
        assert self.tokenizer is not None and self._stream is not None
        return _as_mask(opening_tokens(self.tokenizer, self._stream.held), V)

    def _reasoning_mask(self, V: int) -> Tensor:
        """Inside reasoning, mask end tokens and tokens that hold the closing tag and text of the answer."""
        assert self.tokenizer is not None and self._stream is not None
        banned = list(self.tokenizer.eos)
        if self._stream.held:
            after = tokens_from(self.tokenizer, THINK_TAGS[1][len(self._stream.held) :])
            banned += [id for id, piece in after if piece.strip(WHITESPACE)]
        return ~_as_mask(banned, V)


def opening_tokens(tokenizer: Tokenizer, held: str) -> list[int]:
    """Return tokens after which the text is `<think>` or a beginning of it.  held: what is there of it."""
    rest = THINK_TAGS[0][len(held) :].encode()
    whole = [id for id, piece in tokens_from(tokenizer, rest.decode()) if not piece.strip(WHITESPACE)]
    parts = [id for id in tokenizer.starting_with(rest[0]) if rest.startswith(tokenizer.piece(id))]
    tag = tokenizer.id_of(THINK_TAGS[0])
    return [*whole, *parts, *([tag] if tag is not None and not held else [])]


def tokens_from(tokenizer: Tokenizer, beginning: str) -> list[tuple[int, bytes]]:
    """Return (token, its bytes behind `beginning`) for all tokens that begin so."""
    begin = beginning.encode()
    found = [(id, tokenizer.piece(id)) for id in tokenizer.starting_with(begin[0])]
    return [(id, piece[len(begin) :]) for id, piece in found if piece.startswith(begin)]


def _as_mask(ids: Sequence[int], V: int) -> Tensor:
    mask_V = torch.zeros(V, dtype=torch.bool)
    mask_V[torch.tensor([id for id in ids if id < V], dtype=torch.long)] = True
    return mask_V


class RepetitionDetector:
    """Detect a pattern of tokens that is repeated: count for every period how many tokens in a row kept it."""

    def __init__(self, rule: Repetition) -> None:
        P = rule.max_pattern_size
        self.periods = np.arange(1, P + 1)
        self.needed = np.maximum(self.periods * (rule.min_count - 1), rule.min_tokens - self.periods)
        self.needed[: rule.min_pattern_size - 1] = np.iinfo(np.int64).max
        self.clear()

    def clear(self) -> None:
        """Start again, without the tokens so far."""
        P = len(self.periods)
        self.recent = np.full(P, -1, dtype=np.int64)  # ring buffer of the last P tokens
        self.matched = np.zeros(P, dtype=np.int64)  # of each period: tokens in a row that equal the one a period before
        self.num_tokens = 0

    def add(self, token: int) -> bool:
        """Append a token; whether the rule's repetition is reached with it."""
        P = len(self.periods)
        at = self.num_tokens % P
        before = np.concatenate((self.recent[:at][::-1], self.recent[at:][::-1]))  # the token 1, 2, … places before
        self.matched = np.where(before == token, self.matched + 1, 0)
        self.recent[at] = token
        self.num_tokens += 1
        return bool((self.matched >= self.needed).any())
