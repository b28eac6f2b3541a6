"""How /api/generate and /api/chat read a prompt and write an answer."""

from __future__ import annotations

import json
from typing import TYPE_CHECKING, Any, Generic, TypeVar

from tiercel.serve.models import Lease, ServedModel
from tiercel.serve.ollama.schemas import Chat, Generate, Message, OllamaRequest
from tiercel.serve.types import GenerationRequest, OutputDelta, Prompt, Tool
from tiercel.serve.types import Message as TemplateMessage

if TYPE_CHECKING:
    from tiercel.tokenizer.tool_formats import ToolDelta

B = TypeVar("B", bound=OllamaRequest)


class ResponseWriter(Generic[B]):
    """One of the two routes.  tools: what the model may call.  continues: the answer continues the last message."""

    def __init__(self, body: B) -> None:
        self.body = body
        self.tools: list[Tool] | None = None
        self.continues = False

    def prompt(self, lease: Lease) -> Prompt:
        """What the model reads."""
        raise NotImplementedError

    def finish(self, generation: GenerationRequest) -> None:
        """Add to the prompt what comes as token ids."""

    def message(self, delta: OutputDelta) -> dict[str, Any]:
        """The fields of a line that carry text."""
        raise NotImplementedError

    def last(self, generation: GenerationRequest, token_ids: list[int]) -> dict[str, Any]:
        """Fields of the last line.  token_ids: of the whole answer."""
        return {}


class GenerateWriter(ResponseWriter[Generate]):
    def prompt(self, lease: Lease) -> Prompt:
        tokenizer, prompt = lease.loaded.model.tokenizer, self.body.prompt or ""
        if self.body.raw or tokenizer is None or not tokenizer.has_template:
            return prompt
        system = lease.served.extras.get("system") if self.body.system is None else self.body.system
        first = [{"role": "system", "content": system}] if system else []
        return [*first, *_examples(lease.served), {"role": "user", "content": prompt}]

    def finish(self, generation: GenerationRequest) -> None:
        if self.body.context:
            generation.prompt_ids = [*self.body.context, *generation.prompt_ids]
            generation.turn_start = len(self.body.context)

    def message(self, delta: OutputDelta) -> dict[str, Any]:
        return {"response": delta.text} | ({"thinking": delta.reasoning} if delta.reasoning else {})

    def last(self, generation: GenerationRequest, token_ids: list[int]) -> dict[str, Any]:
        return {} if self.body.raw else {"context": [*generation.prompt_ids, *token_ids]}


class ChatWriter(ResponseWriter[Chat]):
    def __init__(self, body: Chat) -> None:
        super().__init__(body)
        self.tools = body.tools or None
        if body.messages:
            last = body.messages[-1]
            self.continues = last.role.lower() == "assistant" and bool(last.content) and not last.tool_calls

    def prompt(self, lease: Lease) -> Prompt:
        messages = [template_message(message) for message in self.body.messages or ()]
        system = lease.served.extras.get("system")
        first = [{"role": "system", "content": system}] if system and messages[0]["role"] != "system" else []
        return [*first, *_examples(lease.served), *messages]

    def message(self, delta: OutputDelta) -> dict[str, Any]:
        message: dict[str, Any] = {"role": "assistant", "content": delta.text}
        if delta.reasoning:
            message["thinking"] = delta.reasoning
        if delta.tool_calls:
            message["tool_calls"] = [
                {"id": call.id, "function": {"index": call.index, "name": call.name, "arguments": arguments_of(call)}}
                for call in delta.tool_calls
            ]
        return {"message": message}


def template_message(message: Message) -> TemplateMessage:
    """A message as templates read it."""
    out: TemplateMessage = {"role": message.role.lower(), "content": message.content or ""}
    if message.thinking:
        out["thinking"] = message.thinking
    if message.tool_calls:
        out["tool_calls"] = [
            {"type": "function", "id": call.id or "",
             "function": {"name": call.function.name, "arguments": call.function.arguments or {}}}
            for call in message.tool_calls
        ]  # fmt: skip
    if message.tool_name:
        out["name"] = message.tool_name
    if message.tool_call_id:
        out["tool_call_id"] = message.tool_call_id
    return out


def _examples(served: ServedModel) -> list[TemplateMessage]:
    """The MESSAGE lines of a Modelfile."""
    return list(served.extras.get("messages") or ())


def arguments_of(call: ToolDelta) -> dict[str, Any]:
    """The arguments of a whole call as an object; {} where they are none."""
    try:
        arguments = json.loads(call.arguments or "{}")
    except ValueError:
        return {}
    return arguments if isinstance(arguments, dict) else {}


class WholeCalls:
    """Pieces of tool calls → whole ones, as this dialect sends them: a call is whole when the next thing comes."""

    def __init__(self) -> None:
        self.open: ToolDelta | None = None

    def complete(self, delta: OutputDelta) -> list[ToolDelta]:
        """The calls that a delta completes."""
        done: list[ToolDelta] = []
        for call in delta.tool_calls:
            if self.open is not None and call.index == self.open.index:
                self.open += call
                continue
            done += [self.open] if self.open is not None else []
            self.open = call
        if self.open is not None and delta.finish_reason is not None:
            done.append(self.open)
            self.open = None
        return done
