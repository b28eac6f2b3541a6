"""A conversation: prompts that begin alike, cached apart from all others.

    session = model.session()
    for piece in session.generate(ids, params): ...
    print(session.last.cached_tokens)

Each prompt is computed only from where it differs from earlier ones: the next turn, a question asked again, a turn
taken back, reasoning dropped from the history.
"""

from __future__ import annotations

import secrets
from collections.abc import Callable, Iterator
from collections.abc import Sequence as GenericSequence
from pathlib import Path
from typing import TYPE_CHECKING

from tiercel.engine.request import Request, Sequence
from tiercel.errors import FormatError, RequestError
from tiercel.model import state_file
from tiercel.sampling.params import SamplingParams
from tiercel.tokenizer.stream import Piece

if TYPE_CHECKING:
    from tiercel.engine.engine import Engine


MAX_EARLIER_SNAPSHOTS = 4  # in a saved file: of ends of prompts, to ask again and to take turns back


class Session:
    """Prompts with a cache key of their own.

    Args:
        key: shares cached states with requests of the same key; by default the session has its own.
        adapter: LoRA adapter of its requests.

    Attributes:
        last: the sequence of the latest prompt; None before the first.
    """

    def __init__(self, engine: Engine, key: str | None = None, adapter: str | None = None) -> None:
        self.engine, self.adapter = engine, adapter
        self.key = f"session {secrets.token_hex(8)}" if key is None else key
        self.last: Sequence | None = None

    def clear(self) -> None:
        """Drop the cached states."""
        self.engine.forget(self._key)

    @property
    def _key(self) -> str:
        return self.engine.key_of(self.key, self.adapter)

    def save(self, path: str | Path) -> None:
        """Write the conversation so far to a file: `load` continues it, in any process that has the same model.

        Raises:
            RequestError: no state of it is cached (no answer yet, or the cache had no room).
        """
        with self.engine.between_steps():
            tokens = [] if self.last is None else self.last.tokens
            snapshots = self.engine.cache.along(self._key, tokens)
            if not snapshots:
                raise RequestError("there is nothing to save: no answer of this conversation is cached")
            state = self.engine.runner.host_state(self.adapter)
            state.restore(snapshots[-1])
            state_file.save(state, path, tokens[: state.length], snapshots[-1 - MAX_EARLIER_SNAPSHOTS : -1])

    def load(self, path: str | Path) -> list[int]:
        """Put a saved conversation into the cache and return its tokens: prompts that begin with them continue it.

        Raises:
            FormatError: the file is damaged, or of another model, dtype or version.
            RequestError: the cache has no room.
        """
        with self.engine.between_steps():
            state, cache = self.engine.runner.host_state(self.adapter), self.engine.cache
            tokens, earlier = state_file.load(state, path)
            if len(tokens) != state.length:
                raise FormatError(f"{path} is a saved state without its text, not a conversation")
            for snapshot in (state.snapshot(), *earlier):
                cache.put(self._key, tokens[: snapshot.length], snapshot, turn_end=True)
            if cache.find(self._key, tokens, len(tokens)).length != len(tokens):
                raise RequestError(f"{path} does not fit the cache of {cache.budget >> 20} MiB; raise cache_bytes")
            return tokens

    def generate(
        self,
        prompt_ids: GenericSequence[int],
        params: SamplingParams,
        *,
        thinking: str = "off",
        starts_in_thinking: bool = False,
        stopping: Callable[[], bool] = lambda: False,
    ) -> Iterator[Piece]:
        """Yield the pieces of one answer; `last` is its sequence from now on.

        Args:
            prompt_ids: token ids of the whole prompt, history included.
            params: what is asked.
            thinking: how reasoning is read, as in `Tokenizer.stream`.
            starts_in_thinking: the prompt opened a block of reasoning.
            stopping: asked after every step; True aborts the answer.

        Raises:
            RequestError, ContextOverflow: at once; the prompt or a parameter cannot be served.
            TiercelError: while it runs.
        """
        request = self.engine.prepare(
            prompt_ids, params, thinking=thinking, starts_in_thinking=starts_in_thinking, key=self.key,
            adapter=self.adapter,
        )  # fmt: skip
        self.last = request.sequences[0]
        return self._pieces(request, stopping)

    def _pieces(self, request: Request, stopping: Callable[[], bool]) -> Iterator[Piece]:
        self.engine.queue(request)
        updates = self.engine.run(request)
        try:
            for update in updates:
                yield from update.pieces
                if update.error is not None:
                    raise update.error
                if update.finish_reason is None and stopping():
                    self.engine.abort(request.id)
        finally:
            updates.close()
