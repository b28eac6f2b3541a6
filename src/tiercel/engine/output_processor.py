"""One answer as it grows: logits → token → text.

`OutputProcessor` samples, counts, finds the end (end token, stop token, stop string, length), turns tokens into pieces
with the reasoning apart, and keeps what is known of the answer.
The loop that feeds it is by hand in `generate.py`, and for many at once in `engine/`.
"""

from __future__ import annotations

from collections.abc import Collection, Iterator, Sequence
from typing import TYPE_CHECKING

from torch import Tensor

from tiercel.errors import ContextOverflow, RequestError
from tiercel.sampling.constraints import TokenConstraints
from tiercel.sampling.logprobs import Logprob
from tiercel.sampling.params import SamplingParams
from tiercel.sampling.sampler import Sampler, bad_word_ids
from tiercel.tokenizer.stream import Piece

if TYPE_CHECKING:
    from tiercel.engine.structured_output import Grammar
    from tiercel.tokenizer.tokenizer import Tokenizer


class OutputProcessor:
    """The answer number `index` to a prompt; complete once `finish_reason` is set.

    text, thoughts · token_ids · logprobs (when asked for), cumulative_logprob
    finish_reason: "stop" (an end token, a stop string, a form that is complete), "length", "loop" (it went in
                   circles, and that was asked about), "abort", "error", None while it grows
    stop_reason:   the stop string or stop token id of the caller that ended it, else None

    grammar: `params.structured`, compiled (engine/structured_output.py).
    shown: control tokens that appear as their text, the markers of tool calls.
    Raises ContextOverflow, RequestError: the prompt and the parameters are checked before anything is read.
    """

    def __init__(
        self,
        tokenizer: Tokenizer | None,
        vocab_size: int,
        prompt_ids: Sequence[int],
        params: SamplingParams,
        max_length: int,
        *,
        index: int = 0,
        thinking: str = "off",
        starts_in_thinking: bool = False,
        grammar: Grammar | None = None,
        shown: Collection[str] = (),
    ) -> None:
        self.tokenizer, self.prompt_ids, self.params, self.index = tokenizer, list(prompt_ids), params, index
        self.room = _room(len(self.prompt_ids), params, max_length)
        self.text = self.reasoning = ""
        self.token_ids: list[int] = []
        self.finish_reason: str | None = None
        self.stop_reason: str | int | None = None
        wanted = params.logprobs is not None
        self.logprobs: list[dict[int, Logprob]] | None = [] if wanted else None
        self.cumulative_logprob: float | None = 0.0 if wanted else None
        self.eos = tokenizer.eos if tokenizer is not None else frozenset()
        self.constraints = TokenConstraints.of(
            tokenizer, params, grammar=grammar, thinking=thinking, starts_in_thinking=starts_in_thinking
        )
        self.sampler = self._sampler(vocab_size)
        self._stops = [params.stop] if isinstance(params.stop, str) else list(params.stop or ())
        self._held = ""  # answer text that may be the beginning of a stop string
        self._stream = None
        if tokenizer is not None and params.detokenize:
            special = not params.skip_special_tokens
            self._stream = tokenizer.stream(
                thinking=thinking, starts_in_thinking=starts_in_thinking, special=special, shown=shown
            )
        elif self._stops:
            raise RequestError("stop strings need a tokenizer, and this model has none; use stop_token_ids")

    def take(self, logits_V: Tensor) -> list[Piece]:
        """Choose the next token from its logits (V,); the pieces of text it completes, the last ones at the end."""
        token = self.sampler.sample(logits_V)
        self.sampler.accept(token)
        self._note(token)
        ended = token in self.eos or self.stop_reason is not None  # a complete form ends with a token of the answer
        ends = self.finish_reason == "stop" and ended and self._hidden()
        pieces = [] if self._stream is None or ends else list(self._pass(self._stream.push(token)))
        return pieces if self.finish_reason is None else pieces + self._rest()

    def end(self, reason: str) -> list[Piece]:
        """No more tokens come, for a reason of the caller's; what was held back."""
        if self.finish_reason is not None:
            return []
        self.finish_reason = reason
        return self._rest()

    def _sampler(self, vocab_size: int) -> Sampler:
        words: list[list[int]] = []
        if self.params.bad_words and self.tokenizer is not None:
            words = bad_word_ids(self.params.bad_words, self.tokenizer.encode)
        eos = () if self.params.ignore_eos else self.eos
        return Sampler(
            self.params,
            self.prompt_ids,
            vocab_size,
            eos=eos,
            bad_words=words,
            index=self.index,
            constraints=self.constraints,
        )

    def _note(self, token: int) -> None:
        """Count the token, and see whether it ends the answer."""
        self.token_ids.append(token)
        if self.logprobs is not None:
            entry = self.sampler.last_logprobs or {}
            self.logprobs.append(entry)
            self.cumulative_logprob = (self.cumulative_logprob or 0.0) + entry[token].logprob
        if token in self.eos and not self.params.ignore_eos:
            self.finish_reason = "stop"
        elif token in (self.params.stop_token_ids or ()):
            self.finish_reason, self.stop_reason = "stop", token
        elif self.constraints is not None and self.constraints.finish_reason is not None:
            self.finish_reason = self.constraints.finish_reason
        elif len(self.token_ids) >= self.room:
            self.finish_reason = "length"

    def _hidden(self) -> bool:
        """An end token is not part of the answer; a stop token of the caller's only when asked for."""
        return self.stop_reason is None or not self.params.include_stop_str_in_output

    def _rest(self) -> list[Piece]:
        """What was held back, unless a stop string was found."""
        if self._stream is None or isinstance(self.stop_reason, str):
            return []
        pieces = list(self._pass(self._stream.finish()))
        if not isinstance(self.stop_reason, str) and self._held:
            held, self._held = self._held, ""
            pieces += self._emit(Piece("text", held))
        return pieces

    def _pass(self, pieces: list[Piece]) -> Iterator[Piece]:
        for piece in pieces:
            if isinstance(self.stop_reason, str):
                return
            yield from self._emit(piece) if piece.kind != "text" or not self._stops else self._search(piece.text)

    def _search(self, text: str) -> Iterator[Piece]:
        """Answer text up to the earliest stop string; what may be the beginning of one waits."""
        text = self._held + text
        found = min(((at, stop) for stop in self._stops if (at := text.find(stop)) >= 0), default=None)
        if found is not None:
            at, stop = found
            self.finish_reason, self.stop_reason, self._held = "stop", stop, ""
            keep = at + len(stop) if self.params.include_stop_str_in_output else at
            yield from self._emit(Piece("text", text[:keep]))
            return
        wait = max(n for stop in self._stops for n in range(len(stop)) if text.endswith(stop[:n]))
        self._held = text[len(text) - wait :]
        yield from self._emit(Piece("text", text[: len(text) - wait]))

    def _emit(self, piece: Piece) -> Iterator[Piece]:
        if piece.text:
            if piece.kind == "text":
                self.text += piece.text
            else:
                self.reasoning += piece.text
            yield piece


def _room(prompt: int, params: SamplingParams, max_length: int) -> int:
    """How many tokens the answer may have."""
    if prompt == 0:
        raise RequestError("the prompt is empty: it needs at least one token")
    room = max_length - prompt
    if room < 1:
        raise ContextOverflow(
            f"the prompt has {prompt} tokens and the context holds {max_length}, "
            "one of them for the answer; shorten the prompt or raise the context"
        )
    return room if params.max_tokens is None else min(params.max_tokens, room)
