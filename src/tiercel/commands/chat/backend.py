"""What answers in a conversation: the protocol, and the model loaded in this process.

`serve.remote.RemoteBackend` is the other implementation: it asks a running server over HTTP.
"""

from __future__ import annotations

from collections.abc import Callable, Iterator
from typing import TYPE_CHECKING, Any, Protocol, cast

from tiercel.runtime.timing import Times
from tiercel.sampling.params import SamplingParams
from tiercel.tokenizer.stream import Piece

if TYPE_CHECKING:
    from tiercel.api import Model
    from tiercel.voting.settings import VoteSettings

Message = dict[str, str]  # {"role": "system" | "user" | "assistant", "content": …}
Prompt = str | list[Message]  # a text as it is, or messages for the chat template


class ChatAnswer(Protocol):
    """What is known of an answer; complete when its last piece has come, or when it was left.

    finish_reason: "stop", "length" or "abort"; cached_tokens: part of the prompt that was not read again
    """

    text: str
    reasoning: str
    prompt_ids: list[int]
    token_ids: list[int]
    cached_tokens: int
    finish_reason: str | None
    times: Times


class ChatBackend(Protocol):
    """A model in a conversation.  `ask` may be left at any piece and asked again; `last` is the latest answer."""

    @property
    def last(self) -> ChatAnswer | None: ...
    def default_params(self) -> SamplingParams: ...
    def ask(
        self, prompt: Prompt, params: SamplingParams, *, raw: bool = False, think: bool | None = None
    ) -> Iterator[Piece]: ...
    def vote(
        self,
        prompt: Prompt,
        params: SamplingParams,
        settings: VoteSettings,
        progress: Callable[[dict[str, Any]], None],
        *,
        raw: bool = False,
        think: bool | None = None,
    ) -> dict[str, Any]:
        """Many answers, and what they agree on: `Vote.to_dict` with text and thinking.  progress: how it stands."""


class ModelBackend:
    """A `tiercel.Model` and one session of it, which keeps the state between turns."""

    def __init__(self, model: Model) -> None:
        self.model, self.session = model, model.session()

    @property
    def last(self) -> ChatAnswer | None:
        return cast("ChatAnswer | None", self.session.last)

    def default_params(self) -> SamplingParams:
        return self.model.default_params()

    def ask(
        self, prompt: Prompt, params: SamplingParams, *, raw: bool = False, think: bool | None = None
    ) -> Iterator[Piece]:
        pieces, _ = self.model.pieces(prompt, params, raw=raw, think=think, session=self.session)
        return pieces

    def vote(
        self,
        prompt: Prompt,
        params: SamplingParams,
        settings: VoteSettings,
        progress: Callable[[dict[str, Any]], None],
        *,
        raw: bool = False,
        think: bool | None = None,
    ) -> dict[str, Any]:
        made = self.model.vote(
            prompt, settings, params, raw=raw, think=think, progress=lambda voter: progress(voter.progress())
        )
        return {"text": made.text, "thinking": made.thinking, **made.to_dict()}
