"""One sequence's output: logits → token → text.

`OutputProcessor` samples a token, detects the end (end token, stop token, stop string, length), and detokenizes into
pieces of text, reasoning apart.
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
    """The output of a prompt's sequence number `index`; complete once `finish_reason` is set.

    Args:
        tokenizer: detokenizes; None: there are tokens only.
        vocab_size: V, the length of a row of logits.
        prompt_ids: token ids of the prompt.
        params: what is asked.
        max_length: tokens of prompt and output together.
        index: number of the sequence among the request's `n`.
        thinking: how reasoning is read, as in `Tokenizer.stream`.
        starts_in_thinking: the prompt opened a block of reasoning.
        grammar: `params.structured`, compiled (structured_output.py).
        shown: control tokens that appear as their text, the markers of tool calls.

    Attributes:
        text, reasoning: the answer and the reasoning before it, so far.
        token_ids: tokens sampled so far.
        logprobs, cumulative_logprob: where asked for, else None.
        max_output_tokens: tokens after which the output ends with "length".
        finish_reason: "stop" (an end token, a stop string, or a complete form), "length", "loop" (repetition
            detection), "abort", "error", or a controller's; None while it grows.
        stop_reason: the caller's stop string or stop token id that ended it, else None.

    Raises:
        ContextOverflow, RequestError: the prompt or a parameter cannot be served.
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
        self.max_output_tokens = _max_output_tokens(len(self.prompt_ids), params, max_length)
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
        self._held = ""  # text that may be the beginning of a stop string
        self._stream = None
        if tokenizer is not None and params.detokenize:
            special = not params.skip_special_tokens
            self._stream = tokenizer.stream(
                thinking=thinking, starts_in_thinking=starts_in_thinking, special=special, shown=shown
            )
        elif self._stops:
            raise RequestError("stop strings need a tokenizer, and this model has none; use stop_token_ids")

    def sample(self, logits_V: Tensor) -> list[Piece]:
        """Sample the next token from its logits (V,).

        Returns:
            The pieces of text that it completes; with the last token all that are left.

        Raises:
            TiercelError: the logits hold NaN or no finite number.
            RequestError: the request excludes every token.
        """
        token = self.sampler.sample(logits_V)
        self.sampler.accept(token)
        self._append(token)
        ended = token in self.eos or self.stop_reason is not None  # a complete form ends with a token of the text
        ends = self.finish_reason == "stop" and ended and self._hides_last_token()
        pieces = [] if self._stream is None or ends else list(self._filter(self._stream.push(token)))
        return pieces if self.finish_reason is None else pieces + self._flush()

    def finish(self, reason: str) -> list[Piece]:
        """End the output for a reason of the caller's; return the pieces that were held back."""
        if self.finish_reason is not None:
            return []
        self.finish_reason = reason
        return self._flush()

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
            num_tokens=None if self.tokenizer is None else self.tokenizer.vocab_size,
            constraints=self.constraints,
        )

    def _append(self, token: int) -> None:
        """Append a token, and set `finish_reason` where it ends the output."""
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
        elif len(self.token_ids) >= self.max_output_tokens:
            self.finish_reason = "length"

    def _hides_last_token(self) -> bool:
        """Whether the last token is not part of the text: an end token, or a stop token where that is not asked for."""
        return self.stop_reason is None or not self.params.include_stop_str_in_output

    def _flush(self) -> list[Piece]:
        """Return the pieces that were held back, unless a stop string was found."""
        if self._stream is None or isinstance(self.stop_reason, str):
            return []
        pieces = list(self._filter(self._stream.finish()))
        if not isinstance(self.stop_reason, str) and self._held:
            held, self._held = self._held, ""
            pieces += self._emit(Piece("text", held))
        return pieces

    def _filter(self, pieces: list[Piece]) -> Iterator[Piece]:
        """Pass on pieces up to a stop string."""
        for piece in pieces:
            if isinstance(self.stop_reason, str):
                return
            yield from (
                self._emit(piece) if piece.kind != "text" or not self._stops else self._find_stop_string(piece.text)
            )

    def _find_stop_string(self, text: str) -> Iterator[Piece]:
        """Pass on text up to the earliest stop string; hold back what may be the beginning of one."""
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
        """Append a piece to the output."""
        if piece.text:
            if piece.kind == "text":
                self.text += piece.text
            else:
                self.reasoning += piece.text
            yield piece


def _max_output_tokens(prompt: int, params: SamplingParams, max_length: int) -> int:
    """Return how many tokens the output may have after a prompt of this many."""
    if prompt == 0:
        raise RequestError("the prompt is empty: it needs at least one token")
    room = max_length - prompt
    if room < 1:
        raise ContextOverflow(
            f"the prompt has {prompt} tokens and the context holds {max_length}, "
            "one of them for the answer; shorten the prompt or raise the context"
        )
    return room if params.max_tokens is None else min(params.max_tokens, room)
