"""Anthropic's messages and tools → messages and tools as chat templates read them.

Hosted tools (web_search, bash, …) and the blocks of their results are left out and named in the response header
`x-tiercel-ignored`.
"""

from __future__ import annotations

from typing import Any

from tiercel.serve.anthropic.schemas import CountTokens
from tiercel.serve.errors import APIError
from tiercel.serve.models import Lease
from tiercel.serve.types import Message, Tool

MAX_NAME_CHARS = 256
MAX_KIND_CHARS = 40


class Conversation:
    """What the model reads.

    ignored: names of what was left out.  continues: the answer continues the last message, which is the assistant's.
    Raises APIError 400.
    """

    def __init__(self, body: CountTokens) -> None:
        self.ignored: list[str] = []
        self.tools = self._tools(body)
        self.forced = body.tool_choice is not None and body.tool_choice.type in ("any", "tool")
        if self.forced and not self.tools:
            raise APIError(400, "tool_choice: a call needs tools", param="tool_choice")
        self.system = self._text("system", body.system or "", "\n")
        self.messages: list[Message] = []
        for number, message in enumerate(body.messages):
            self._add(f"messages.{number}", message)
        if not self.messages:
            raise APIError(400, "messages: at least one message is required", param="messages")
        last = self.messages[-1]
        self.continues = last["role"] == "assistant" and bool(last["content"]) and "tool_calls" not in last

    def prompt(self, lease: Lease) -> list[Message]:
        """The messages with their system message: the request's, else the Modelfile's."""
        system = self.system or lease.served.extras.get("system")
        return [{"role": "system", "content": system}, *self.messages] if system else self.messages

    def _tools(self, body: CountTokens) -> list[Tool]:
        tools: list[Tool] = []
        for tool in body.tools or ():
            kind, name = tool.get("type") or "custom", tool.get("name")
            if kind != "custom":
                self.ignored.append(f"tools.{kind}")
                continue
            if not isinstance(name, str) or not 0 < len(name) <= MAX_NAME_CHARS:
                raise APIError(400, "tools: each needs a name", param="tools")
            if not isinstance(tool.get("input_schema"), dict):
                raise APIError(400, f"tools: {name!r} needs an input_schema", param="tools")
            function = {"name": name, "description": str(tool.get("description") or ""),
                        "parameters": tool["input_schema"]}  # fmt: skip
            tools.append({"type": "function", "function": function})
        choice = body.tool_choice
        if choice is None or choice.type in ("auto", "any"):
            return tools
        kept = [tool for tool in tools if choice.type == "tool" and tool["function"]["name"] == choice.name]
        if choice.type == "tool" and not kept:
            raise APIError(400, f"tool_choice: no tool of this request is named {choice.name!r}", param="tool_choice")
        return kept

    def _add(self, where: str, message: dict[str, Any]) -> None:
        """One message → its tool results, each a message of its own, and the rest."""
        role, content = message.get("role"), message.get("content")
        if role not in ("user", "assistant", "system"):
            raise APIError(400, f"{where}.role must be user or assistant", param="messages")
        blocks = [{"type": "text", "text": content}] if isinstance(content, str) else content
        if not isinstance(blocks, list):
            raise APIError(400, f"{where}.content must be a string or a list of blocks", param="messages")
        out: Message = {"role": role, "content": ""}
        for number, block in enumerate(blocks):
            self._block(f"{where}.content.{number}", block, out)
        if out["content"] or len(out) > 2 or not blocks:
            self.messages.append(out)

    def _block(self, where: str, block: Any, out: Message) -> None:
        kind = block.get("type") if isinstance(block, dict) else None
        if not isinstance(kind, str):
            raise APIError(400, f"{where} must be a block with a type", param="messages")
        if kind == "text":
            out["content"] += _string(where, block, "text")
        elif kind == "thinking":
            out["thinking"] = out.get("thinking", "") + _string(where, block, "thinking")
        elif kind == "tool_use":
            arguments = block.get("input")
            function = {"name": _string(where, block, "name"), "arguments": arguments if arguments else {}}
            call = {"id": _string(where, block, "id"), "type": "function", "function": function}
            out.setdefault("tool_calls", []).append(call)
        elif kind == "tool_result":
            text = self._text(f"{where}.content", block.get("content") or "", "")
            self.messages.append(
                {"role": "tool", "tool_call_id": _string(where, block, "tool_use_id"), "content": text}
            )
        elif kind == "document" and isinstance(source := block.get("source"), dict) and source.get("type") == "text":
            out["content"] += _string(where, source, "data")
        elif kind in ("image", "document"):
            raise APIError(400, f"{where}: only text is read here", param="messages")
        else:  # of hosted tools, redacted thinking
            self.ignored.append(f"messages.{kind[:MAX_KIND_CHARS]}")

    def _text(self, where: str, content: Any, separator: str) -> str:
        """A string, or the text of its blocks."""
        if isinstance(content, str):
            return content
        texts: list[str] = []
        for number, block in enumerate(content if isinstance(content, list) else [content]):
            inner: Message = {"content": ""}
            if isinstance(block, dict) and block.get("type") in ("tool_result", "tool_use"):
                raise APIError(400, f"{where}.{number}: only text is read here", param="messages")
            self._block(f"{where}.{number}", block, inner)
            texts.append(inner["content"])
        return separator.join(texts)


def _string(where: str, block: dict[str, Any], name: str) -> str:
    value = block.get(name)
    if not isinstance(value, str):
        raise APIError(400, f"{where}.{name} must be a string", param="messages")
    return value
