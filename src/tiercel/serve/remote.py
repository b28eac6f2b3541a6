"""`tiercel run` with a running server: a chat backend that asks over HTTP, so that no model is loaded twice."""

from __future__ import annotations

import dataclasses
import time
from collections.abc import Callable, Iterator
from dataclasses import dataclass, field
from typing import TYPE_CHECKING, Any

from tiercel.errors import ModelNotFound, RequestError
from tiercel.hub import local_models
from tiercel.runtime.timing import Times
from tiercel.sampling.params import SamplingParams
from tiercel.serve.client import Client
from tiercel.serve.ollama.options import OPTION_OF_PARAM
from tiercel.tokenizer.stream import Piece

if TYPE_CHECKING:
    from tiercel.voting.settings import VoteSettings


@dataclass
class RemoteAnswer:
    """What the server said; of token ids only the number."""

    text: str = ""
    reasoning: str = ""
    prompt_ids: list[int] = field(default_factory=list)
    token_ids: list[int] = field(default_factory=list)
    cached_tokens: int = 0
    finish_reason: str | None = None
    times: Times = field(default_factory=Times)


class RemoteBackend:
    """A `commands.chat` backend for one model of a running server."""

    def __init__(self, client: Client, model: str) -> None:
        self.client, self.model = client, model
        self._last: RemoteAnswer | None = None
        self._base = SamplingParams(max_tokens=None)

    @classmethod
    def find(cls, model: str) -> RemoteBackend | None:
        """A backend, where a server runs that has this model; None for a path, which this process loads."""
        if local_models.is_path(model) or (client := Client.find()) is None:
            return None
        try:
            client.post("/api/show", {"model": model})
        except (ModelNotFound, RequestError):
            return None
        return cls(client, model)

    @property
    def last(self) -> Any:
        """The answer of the last request."""
        return self._last

    def default_params(self) -> SamplingParams:
        """Values that stay at these are not sent: the server applies the model's own."""
        return dataclasses.replace(self._base)

    def ask(
        self, prompt: Any, params: SamplingParams, *, raw: bool = False, think: bool | None = None
    ) -> Iterator[Any]:
        self._last = RemoteAnswer()
        return self._pieces(*self._request(prompt, params, raw, think), self._last)

    def vote(
        self,
        prompt: Any,
        params: SamplingParams,
        settings: VoteSettings,
        progress: Callable[[dict[str, Any]], None],
        *,
        raw: bool = False,
        think: bool | None = None,
    ) -> dict[str, Any]:
        path, body = self._request(prompt, params, raw, think)
        result: dict[str, Any] = {}
        for line in self.client.stream(path, body | {"vote": dataclasses.asdict(settings)}):
            message = line.get("message", line)
            if line["done"]:
                result = {"text": message.get("content", message.get("response", "")),
                        "thinking": message.get("thinking", ""), **line["vote"]}  # fmt: skip
            elif "vote" in line:
                progress(line["vote"])
        return result

    def _request(
        self, prompt: Any, params: SamplingParams, raw: bool, think: bool | None
    ) -> tuple[str, dict[str, Any]]:
        body: dict[str, Any] = {"model": self.model, "options": self._options(params)}
        if think is not None:
            body["think"] = think
        if isinstance(prompt, str):
            return "/api/generate", body | {"prompt": prompt, "raw": raw}
        return "/api/chat", body | {"messages": prompt}

    def _options(self, params: SamplingParams) -> dict[str, Any]:
        changed = {
            part.name: getattr(params, part.name)
            for part in dataclasses.fields(params)
            if getattr(params, part.name) != getattr(self._base, part.name)
        }
        unknown = next((name for name in changed if name not in OPTION_OF_PARAM), None)
        if unknown:
            raise RequestError(f"{unknown} cannot be asked of a server; stop it (or set TIERCEL_HOST) to run here")
        return {OPTION_OF_PARAM[name]: value for name, value in changed.items()}

    def _pieces(self, path: str, body: dict[str, Any], answer: RemoteAnswer) -> Iterator[Piece]:
        began = time.perf_counter()
        try:
            for line in self.client.stream(path, body):
                message = line.get("message", line)
                for kind, text in (("thinking", message.get("thinking", "")),
                                   ("text", message.get("content", message.get("response", "")))):  # fmt: skip
                    if not text:
                        continue
                    if kind == "text":
                        answer.text += text
                    else:
                        answer.reasoning += text
                    yield Piece(kind, text)
                if line["done"]:
                    answer.finish_reason = line["done_reason"]
                    answer.prompt_ids = [0] * line["prompt_eval_count"]
                    answer.token_ids = [0] * line["eval_count"]
                    answer.cached_tokens = line["cached_tokens"]
                    answer.times.prompt = line["prompt_eval_duration"] / 1e9
                    answer.times.generation = line["eval_duration"] / 1e9
        finally:
            answer.times.total = time.perf_counter() - began
            answer.finish_reason = answer.finish_reason or "abort"
