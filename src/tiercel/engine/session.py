"""A conversation: prompts that grow out of one another, remembered apart from all others.

    session = model.session()
    for piece in session.generate(ids, params): ...
    print(session.last.cached_tokens)

Each new prompt is read only from where it differs from what was read before: the next turn, a question asked again,
a turn taken back, thoughts dropped from the history.
"""

from __future__ import annotations

import secrets
from collections.abc import Callable, Iterator, Sequence
from typing import TYPE_CHECKING

from tiercel.engine.request import Choice, Request
from tiercel.sampling import SamplingParams
from tiercel.text.stream import Piece

if TYPE_CHECKING:
    from tiercel.engine.engine import Engine


class Session:
    """key: whose texts are remembered with its own; by default nobody else's."""

    def __init__(self, engine: Engine, key: str | None = None) -> None:
        self.engine = engine
        self.key = f"session {secrets.token_hex(8)}" if key is None else key
        self.last: Choice | None = None

    def clear(self) -> None:
        """Forget everything."""
        self.engine.forget(self.key)

    def generate(
        self,
        prompt_ids: Sequence[int],
        params: SamplingParams,
        *,
        thinking: str = "off",
        starts_in_thinking: bool = False,
        stopping: Callable[[], bool] = lambda: False,
    ) -> Iterator[Piece]:
        """The pieces of one answer; `last` tells about it from now on.  stopping: asked after every step."""
        request = self.engine.prepare(
            prompt_ids, params, thinking=thinking, starts_in_thinking=starts_in_thinking, key=self.key
        )
        self.last = request.choices[0]
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
