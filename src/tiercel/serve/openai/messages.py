"""OpenAI's messages → messages as chat templates read them."""

from __future__ import annotations

from typing import Any

from tiercel.serve.errors import APIError
from tiercel.serve.types import Message

TEXT_PARTS = ("text", "input_text", "output_text", "refusal")
ROLES = {"developer": "system", "function": "tool"}


def template_messages(messages: list[dict[str, Any]]) -> list[Message]:
    """Content as a string, arguments as the client wrote them, developer as system.  Raises APIError 400."""
    return [_template_message(number, message) for number, message in enumerate(messages)]


def _template_message(number: int, message: dict[str, Any]) -> Message:
    role = message.get("role")
    if not isinstance(role, str):
        raise APIError(400, f"messages.{number}.role is required", param="messages")
    out: Message = {"role": ROLES.get(role, role), "content": _text_of(number, message.get("content"))}
    for name in ("reasoning_content", "reasoning"):
        if isinstance(message.get(name), str):
            out["thinking"] = message[name]
    for name in ("name", "tool_call_id"):
        if message.get(name) is not None:
            out[name] = str(message[name])
    if calls := message.get("tool_calls"):
        if not isinstance(calls, list):
            raise APIError(400, f"messages.{number}.tool_calls must be a list", param="messages")
        out["tool_calls"] = [_template_call(number, call) for call in calls]
    return out


def _text_of(number: int, content: Any) -> str:
    if content is None:
        return ""
    if isinstance(content, str):
        return content
    if not isinstance(content, list):
        raise APIError(400, f"messages.{number}.content must be a string or a list of parts", param="messages")
    texts = []
    for part in content:
        kind = part.get("type") if isinstance(part, dict) else None
        if kind not in TEXT_PARTS:
            raise APIError(400, f"messages.{number}.content: only text is read here", param="messages")
        text = part.get("text", part.get("refusal"))
        if not isinstance(text, str):
            raise APIError(400, f"messages.{number}.content: a text part needs text", param="messages")
        texts.append(text)
    return "".join(texts)


def _template_call(number: int, call: Any) -> dict[str, Any]:
    function = call.get("function") if isinstance(call, dict) else None
    if not isinstance(function, dict) or not isinstance(function.get("name"), str):
        raise APIError(400, f"messages.{number}.tool_calls: each needs a function with a name", param="messages")
    arguments = function.get("arguments") or {}
    return {"id": str(call.get("id", "")), "type": "function",
            "function": {"name": function["name"], "arguments": arguments}}  # fmt: skip
