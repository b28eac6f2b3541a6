"""What one answer is held to, token by token: thoughts within their budget, then its form, and no circles.

    constraints = TokenConstraints.of(tokenizer, params, grammar=…, thinking="auto")    None: nothing to constrain
    Sampler(…, steering=steering)
    steering.finish_reason                after every accepted token: "stop" (the form is complete), "loop", or None

Thoughts are free: the grammar begins where they end.  A block opens as `TextStream` sees it: the prompt opened it, or
the model writes the tag first; so at the start both the tag and the grammar's first tokens may come.  When the budget
is spent, or thoughts go in circles, the closing tag is written in the model's place, as its own token where it is
one.  A later block has what the earlier ones left.
"""

from __future__ import annotations

from collections.abc import Sequence
from typing import TYPE_CHECKING

import numpy as np
import torch
from torch import Tensor

from tiercel.errors import RequestError
from tiercel.sampling.params import Repetition, SamplingParams
from tiercel.tokenizer.control import THINK_TAGS
from tiercel.tokenizer.stream import TextStream
from tiercel.tokenizer.tokenizer import Tokenizer

if TYPE_CHECKING:
    from tiercel.engine.structured_output import Grammar

SPACE = b" \t\r\n"


class TokenConstraints:
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
        self.circles = RepetitionDetector(repetition) if repetition is not None else None
        self.thinking_tokens = 0
        self.finish_reason: str | None = None
        self._stream: TextStream | None = None
        if tokenizer is not None and thinking != "off":
            self._stream = tokenizer.stream(thinking=thinking, starts_in_thinking=starts_in_thinking)
        self._forced: list[int] = []
        self._matching = True  # whether what came since the start of the answer has the form
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
        """What these params need, None for nothing.  grammar: `params.structured`, compiled."""
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
        return self._stream is not None and self._stream.in_thinking

    def mask(self, V: int) -> Tensor | int | None:
        """Which tokens may come next, (V,) bool; a token that must come; None: any."""
        if self._forced:
            return self._forced[0]
        if self.matcher is None:
            return None
        if self.in_thinking:
            return self._thoughts_end_clean(V)
        opening = self._opening(V) if self._stream is not None and self._stream.undecided else None
        if opening is None:
            return self.matcher.mask(V)
        if not self._matching:
            return opening
        return opening | self.matcher.mask(V)

    def accept(self, token: int) -> None:
        forced = bool(self._forced) and self._forced.pop(0) == token
        inside = self.in_thinking
        if self._stream is not None:
            self._stream.push(token)
            self.thinking_tokens += inside and self.in_thinking and not forced
        if self.matcher is not None:
            self._match(token, inside)
        circling = self.circles is not None and self.circles.add(token)
        if circling and self.in_thinking and not forced:
            self._close()
        elif circling and not self.in_thinking:
            self.finish_reason = "loop"
        self._close_if_spent()

    def _match(self, token: int, inside: bool) -> None:
        assert self.matcher is not None
        if self.in_thinking or inside:
            if not inside:  # it opens here: what looked like an answer was the tag
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
        if self.circles is not None:
            self.circles.clear()

    def _opening(self, V: int) -> Tensor:
        """Tokens that begin, or go on with, the tag that opens the thoughts."""
        assert self.tokenizer is not None and self._stream is not None
        return _as_mask(opening_tokens(self.tokenizer, self._stream.held), V)

    def _thoughts_end_clean(self, V: int) -> Tensor:
        """Thoughts lead to an answer: they do not end the text, and their tag brings no letters of the answer along."""
        assert self.tokenizer is not None and self._stream is not None
        banned = list(self.tokenizer.eos)
        if self._stream.held:
            after = tokens_from(self.tokenizer, THINK_TAGS[1][len(self._stream.held) :])
            banned += [id for id, piece in after if piece.strip(SPACE)]
        return ~_as_mask(banned, V)


def opening_tokens(tokenizer: Tokenizer, held: str) -> list[int]:
    """Tokens after which the text is `<think>` or a beginning of it; `held` has come already."""
    rest = THINK_TAGS[0][len(held) :].encode()
    whole = [id for id, piece in tokens_from(tokenizer, rest.decode()) if not piece.strip(SPACE)]
    parts = [id for id in tokenizer.starting_with(rest[0]) if rest.startswith(tokenizer.piece(id))]
    tag = tokenizer.id_of(THINK_TAGS[0])
    return [*whole, *parts, *([tag] if tag is not None and not held else [])]


def tokens_from(tokenizer: Tokenizer, beginning: str) -> list[tuple[int, bytes]]:
    """(token, what follows) of all that begin so."""
    begin = beginning.encode()
    found = [(id, tokenizer.piece(id)) for id in tokenizer.starting_with(begin[0])]
    return [(id, piece[len(begin) :]) for id, piece in found if piece.startswith(begin)]


def _as_mask(ids: Sequence[int], V: int) -> Tensor:
    mask_V = torch.zeros(V, dtype=torch.bool)
    mask_V[torch.tensor([id for id in ids if id < V], dtype=torch.long)] = True
    return mask_V


class RepetitionDetector:
    """Whether the last tokens are one run, again and again: for every period how long the text has kept it."""

    def __init__(self, rule: Repetition) -> None:
        P = rule.max_pattern_size
        self.periods = np.arange(1, P + 1)
        self.needed = np.maximum(self.periods * (rule.min_count - 1), rule.min_tokens - self.periods)
        self.needed[: rule.min_pattern_size - 1] = np.iinfo(np.int64).max
        self.clear()

    def clear(self) -> None:
        P = len(self.periods)
        self.last = np.full(P, -1, dtype=np.int64)  # a ring of the last P tokens
        self.kept = np.zeros(P, dtype=np.int64)
        self.count = 0

    def add(self, token: int) -> bool:
        P = len(self.periods)
        at = self.count % P
        before = np.concatenate((self.last[:at][::-1], self.last[at:][::-1]))  # the token 1, 2, … places before
        self.kept = np.where(before == token, self.kept + 1, 0)
        self.last[at] = token
        self.count += 1
        return bool((self.kept >= self.needed).any())
