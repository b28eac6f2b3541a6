"""Speculative decoding by a draft model: a smaller network of the same vocabulary proposes the next tokens."""

from __future__ import annotations

from collections.abc import Callable
from collections.abc import Sequence as GenericSequence
from typing import Protocol

import torch
from torch import Tensor

from tiercel.engine.core import Model
from tiercel.engine.request import Sequence
from tiercel.engine.speculative import MAX_DRAFT_TOKENS, Drafter, prompt_lookup
from tiercel.errors import RequestError
from tiercel.model.prefill import MAX_PREFILL_TOKENS
from tiercel.model.runner import Runner, SequenceState, runner_for
from tiercel.model.state import Snapshot
from tiercel.sampling.sampler import Sampler, draw, uniform


class NamedModel(Model, Protocol):
    """A model with a name, for errors."""

    name: str


class DraftModel:
    """Makes the drafters of an engine: `Engine(model, drafter=DraftModel(model, draft))`.

    Args:
        model: whose sequences are drafted.
        draft: a smaller model of the same vocabulary; it may be on another device.
        slots: of the engine: sequences that are drafted at once.

    Raises:
        RequestError: the vocabularies differ.
    """

    def __init__(self, model: NamedModel, draft: NamedModel, slots: int = 8) -> None:
        if difference := _difference(model, draft):
            raise RequestError(f"{draft.name} cannot draft for {model.name}: {difference}; use a model of its family")
        self.max_length = draft.max_length
        self.vocab_size = min(each.network.config.vocab_size for each in (model, draft))
        if model.tokenizer is not None:
            self.vocab_size = min(self.vocab_size, model.tokenizer.vocab_size)
        self.runner = runner_for(draft.network, slots, draft.max_length)

    def __call__(self, sequence: Sequence) -> ModelDrafter:
        """Return the drafter of a sequence."""
        return ModelDrafter(self.runner, self.vocab_size, self.max_length, sequence.sampler)


def drafter_for(
    model: NamedModel, draft: NamedModel | None = None, slots: int = 8
) -> Callable[[Sequence], Drafter] | None:
    """Return what makes an engine's drafters: the draft model; by default prompt lookup, or None without kernels.

    On plain torch the bits of a row depend on how many rows share its matrix products, and so may a near tie.

    Raises:
        RequestError: the vocabularies of the two models differ.
    """
    if draft is not None:
        return DraftModel(model, draft, slots)
    return prompt_lookup if model.network.native else None


def _difference(model: NamedModel, draft: NamedModel) -> str:
    """Return in what two vocabularies differ, "" for nothing.

    Of models with tokenizers these count: rows of the embedding beyond them are padding, which is never sampled.
    """
    ours, theirs = model.tokenizer, draft.tokenizer
    if ours is None or theirs is None:
        V, draft_V = model.network.config.vocab_size, draft.network.config.vocab_size
        return "" if draft_V == V else f"its vocabulary has {draft_V} tokens, and {V} are needed"
    if ours.vocab_size != theirs.vocab_size:
        return f"its vocabulary has {theirs.vocab_size} tokens, and {ours.vocab_size} are needed"
    id = next((id for id in range(ours.vocab_size) if ours.piece(id) != theirs.piece(id)), None)
    return "" if id is None else f"its token {id} is {theirs.piece(id)!r}, and {ours.piece(id)!r} is needed"


class ModelDrafter:
    """Drafts for one sequence; its own state follows the sequence, trimmed where the draft was rejected.

    Args:
        runner: of the draft network.
        vocab_size: token ids that may be sampled.
        max_length: tokens that the draft network can hold; there are no drafts beyond.
        sampler: of the sequence.  Draft tokens are then drawn with the numbers that the sequence's tokens will be
            drawn with, which makes them right more often than the likeliest token would be.
    """

    def __init__(self, runner: Runner, vocab_size: int, max_length: int, sampler: Sampler | None = None) -> None:
        self.runner, self.vocab_size, self.max_length = runner, vocab_size, max_length
        self.sampler = sampler if sampler is not None and not sampler.params.greedy else None
        self._state: SequenceState | None = None
        self._snapshot: Snapshot | None = None
        self._tokens: list[int] = []  # that the state holds

    def match_class(self, tokens: GenericSequence[int]) -> int:
        """Return 0 as long as the sequence fits the draft network, then −1."""
        return 0 if len(tokens) + MAX_DRAFT_TOKENS <= self.max_length else -1

    @torch.no_grad()
    def propose(self, tokens: GenericSequence[int], k: int) -> list[int]:
        """Return k next tokens; [] where the prompt has padding tokens, which the draft network may lack."""
        state = self._rewound(tokens)
        if any(token >= self.vocab_size for token in tokens[state.length :]):
            return []
        chunk = state.rollback_tokens
        if chunk and (len(tokens) + k) // chunk > len(tokens) // chunk:
            # a chunk ends inside the draft, which then cannot be trimmed: keep a snapshot of what is certain
            if state.length < len(tokens) - 1:
                self._forward(state, tokens[state.length : len(tokens) - 1])
            self._snapshot = state.snapshot()
        out: list[int] = []
        new = tokens[state.length :]
        for _ in range(k):
            logits_V = self._forward(state, new)
            out.append(self._sample(logits_V, len(out)))
            new = out[-1:]
        return out

    def release(self) -> None:
        """Give up the state; a later draft computes the sequence again."""
        self._state, self._snapshot, self._tokens = None, None, []

    def _sample(self, logits_V: Tensor, offset: int) -> int:
        logits_V = logits_V[: self.vocab_size]
        if self.sampler is None:
            return int(logits_V.argmax())
        params, position = self.sampler.params, len(self.sampler.output_ids) + offset
        scaled_V = (logits_V - logits_V.max()).cpu() / params.temperature
        return draw(scaled_V, uniform(self.sampler.seed, self.sampler.index, position))

    def _forward(self, state: SequenceState, tokens: GenericSequence[int]) -> Tensor:
        for part in torch.split(torch.tensor(list(tokens), device=self.runner.device), MAX_PREFILL_TOKENS):
            (logits_LV,) = self.runner.forward([part], [state])
        self._tokens += tokens
        return logits_LV[-1]

    def _rewound(self, tokens: GenericSequence[int]) -> SequenceState:
        """Return the state, trimmed to what it shares with the sequence, less the last token: its logits are needed."""
        shared, most = 0, min(len(self._tokens), len(tokens) - 1)
        recent = max(most - 4 * MAX_DRAFT_TOKENS, 0)
        if self._tokens[:recent] == list(tokens[:recent]):
            shared = recent
        while shared < most and self._tokens[shared] == tokens[shared]:
            shared += 1
        state = self._state or self.runner.new_state()
        if not state.trim(shared):
            if self._snapshot is not None and self._snapshot.length <= shared:
                state.restore(self._snapshot)
            else:
                self._snapshot = None
                state = self.runner.new_state()
        del self._tokens[state.length :]
        self._state = state
        return state
