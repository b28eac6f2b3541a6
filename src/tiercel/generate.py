"""One prompt by hand: prefill, step, stop.  Read this first.

    state  = network.new_state()                        what the network will remember of this text
    logits = network(prompt, state, logits_to_keep=1)             prefill: the whole prompt in one or a few calls
    while not stopped:
        token  = sampler.sample(logits)
        logits = network([token], state, logits_to_keep=1)        one step: the same call with one token

`Generation` is that loop; what it says comes from `reply.py`.  `engine/` is the same for many prompts at once, and
remembers them.
"""

from __future__ import annotations

import time
from collections.abc import Callable, Iterator, Sequence
from typing import TYPE_CHECKING

import torch
from torch import Tensor

from tiercel.engine.output_processor import OutputProcessor
from tiercel.model.decoder import Decoder
from tiercel.model.state import State
from tiercel.runtime.timing import Times
from tiercel.sampling.params import SamplingParams
from tiercel.tokenizer.stream import Piece

if TYPE_CHECKING:
    from tiercel.tokenizer.tokenizer import Tokenizer

PREFILL = 512  # prompt tokens per call: bounds the memory of a long prompt, and lets its progress be seen

Progress = Callable[[int, int], None]  # (prompt tokens read, prompt tokens in all)


def prefill(network: Decoder, tokens: Tensor, state: State, progress: Progress | None = None) -> Tensor:
    """Read a prompt (L,) into the state; the logits of its last token (V,)."""
    logits_LV = torch.empty(0)
    for start in range(0, len(tokens), PREFILL):
        logits_LV = network(tokens[start : start + PREFILL], state, logits_to_keep=1)
        if progress is not None:
            progress(min(start + PREFILL, len(tokens)), len(tokens))
    return logits_LV[-1]


def generate_reference(network: Decoder, prompt: Sequence[int], count: int) -> list[int]:
    """Greedy tokens without any memory: everything is read again for every token.  What the cache must equal."""
    tokens, device = list(prompt), network.embed.weight.device
    with torch.no_grad():
        for _ in range(count):
            tokens.append(int(network(torch.tensor(tokens, device=device), logits_to_keep=1)[-1].argmax()))
    return tokens[len(prompt) :]


class Generation(OutputProcessor):
    """One answer: iterate over it for its pieces.

    state: what has been read already; the prompt is read from there on.
    first_logits: those after the prompt, when it has been read already (a fork).
    """

    def __init__(
        self,
        network: Decoder,
        tokenizer: Tokenizer | None,
        prompt_ids: Sequence[int],
        params: SamplingParams,
        max_length: int,
        state: State,
        *,
        first_logits: Tensor | None = None,
        choice: int = 0,
        thinking: str = "off",
        starts_in_thinking: bool = False,
        progress: Progress | None = None,
    ) -> None:
        super().__init__(
            tokenizer,
            network.config.vocab_size,
            prompt_ids,
            params,
            max_length,
            index=choice,
            thinking=thinking,
            starts_in_thinking=starts_in_thinking,
        )
        self.network, self.state, self.first_logits, self.progress = network, state, first_logits, progress
        self.cached_tokens, self.times = state.length, Times()

    def __iter__(self) -> Iterator[Piece]:
        began = time.perf_counter()
        try:
            yield from self._run(began)
        finally:
            self.times.total = time.perf_counter() - began
            self.times.generation = max(self.times.total - self.times.prompt, 0.0)
            if self.finish_reason is None:
                self.finish_reason = "abort"

    def finish(self) -> Generation:
        """Run to the end."""
        for _ in self:
            pass
        return self

    def _run(self, began: float) -> Iterator[Piece]:
        logits_V = self.first_logits
        if logits_V is None:
            new = torch.tensor(self.prompt_ids[self.state.length :], device=self.network.embed.weight.device)
            logits_V = prefill(self.network, new, self.state, self.progress)
        self.times.prompt = self.times.first_token = time.perf_counter() - began
        while True:
            yield from self.take(logits_V)
            if self.finish_reason is not None:
                return
            token = torch.tensor(self.token_ids[-1:], device=logits_V.device)
            logits_V = self.network(token, self.state, logits_to_keep=1)[-1]
