"""Bodies of Ollama's routes.

Deviations, all on purpose: a prompt longer than the context is refused and never cut (`truncate` and `shift` are
accepted for embeddings alone); templates come with a model and not with a request; images and `suffix` are refused.
"""

from __future__ import annotations

from typing import Any, Literal

from pydantic import Field

from tiercel.serve.body import Body, Items, Texts, VoteField
from tiercel.serve.errors import APIError
from tiercel.serve.structured import StructuredFields

KeepAlive = int | float | str | None
ThinkField = bool | Literal["low", "medium", "high", "max", ""] | None
Name = Field(default="", max_length=512)


class OllamaRequest(StructuredFields):
    model: str = Name
    stream: bool | None = None
    format: str | dict[str, Any] | None = None
    keep_alive: KeepAlive = None
    options: dict[str, Any] | None = None
    think: ThinkField = None
    truncate: bool | None = None
    shift: bool | None = None
    logprobs: bool | None = None
    top_logprobs: int | None = None
    vote: VoteField | None = None  # an extension of this server


class Generate(OllamaRequest):
    prompt: str | None = None
    suffix: str | None = None
    system: str | None = None
    template: str | None = None
    context: Items[int] | None = None
    raw: bool | None = None
    images: Items[str] | None = None


class Function(Body):
    name: str = Field(max_length=256)
    arguments: dict[str, Any] | None = None
    index: int | None = None


class ToolCall(Body):
    id: str | None = None
    function: Function


class Message(Body):
    role: str = Field(max_length=64)
    content: str | None = None
    thinking: str | None = None
    images: Items[str] | None = None
    tool_calls: Items[ToolCall] | None = None
    tool_name: str | None = None
    tool_call_id: str | None = None


class Chat(OllamaRequest):
    messages: Items[Message] | None = None
    tools: Items[dict[str, Any]] | None = None


class Embed(Body):
    model: str = Name
    input: Any = None
    truncate: bool | None = None
    dimensions: int | None = Field(default=None, ge=0, le=1 << 20)
    keep_alive: KeepAlive = None
    options: dict[str, Any] | None = None


class Embeddings(Body):
    model: str = Name
    prompt: str | None = None
    keep_alive: KeepAlive = None
    options: dict[str, Any] | None = None


class ModelBody(Body):
    model: str = Name
    name: str = Name  # its older name

    def wanted(self) -> str:
        """The name of the model.  Raises APIError 400."""
        name = (self.model or self.name).strip()
        if not name:
            raise APIError(400, "model is required")
        return name


class Show(ModelBody):
    verbose: bool | None = None
    system: str | None = None
    template: str | None = None
    options: dict[str, Any] | None = None


class Pull(ModelBody):
    insecure: bool | None = None
    stream: bool | None = None


class Create(ModelBody):
    from_: str | None = Field(default=None, alias="from", max_length=512)
    files: Texts | None = None
    adapters: Texts | None = None
    template: str | None = None
    license: str | Items[str] | None = None
    system: str | None = None
    parameters: dict[str, Any] | None = None
    messages: Items[dict[str, Any]] | None = None
    quantize: str | None = None
    stream: bool | None = None


class Copy(Body):
    source: str = Field(max_length=512)
    destination: str = Field(max_length=512)
