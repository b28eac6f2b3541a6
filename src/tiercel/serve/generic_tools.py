"""Tools for models whose chat template has none: a description in the prompt, and calls in Hermes' form.

    system (or the first user message, where the template names no system role)
        …
        You may call functions. <tools> one JSON object a line </tools>, and how a call is written
    assistant   <tool_call>{"name": "f", "arguments": {"a": 1}}</tool_call>
    user        <tool_response>what the function returned</tool_response>

The words are near those of Hermes 2 Pro's prompt (NousResearch/Hermes-Function-Calling), which many models have seen.
"""

from __future__ import annotations

import json
from collections.abc import Sequence
from typing import Any

from tiercel.serve.types import Message, Tool

INTRODUCTION = (
    "You may call one or more functions to assist with the user's query. The functions are within <tools></tools>:"
)
CALLING = (
    "For each function call return a JSON object with its name and arguments within <tool_call></tool_call>:\n"
    '<tool_call>\n{"name": <function-name>, "arguments": <arguments-object>}\n</tool_call>'
)


def with_tools(messages: Sequence[Message], tools: Sequence[Tool], template: str) -> list[Message]:
    """The conversation as text alone.  template: all chat templates of the model."""
    listed = "\n".join(json.dumps(tool["function"], ensure_ascii=False) for tool in tools)
    about = f"{INTRODUCTION}\n<tools>\n{listed}\n</tools>\n\n{CALLING}"
    found: list[Message] = []
    answered = False  # whether the last message of `found` is a response
    for message in messages:
        role, content = message["role"], message.get("content")
        if calls := message.get("tool_calls"):
            plain = {key: value for key, value in message.items() if key != "tool_calls"}
            found.append({**plain, "content": _joined(content, "\n".join(map(_call, calls)))})
        elif role == "tool":
            response = f"<tool_response>\n{_text(content)}\n</tool_response>"
            if answered:  # several calls of one turn
                found[-1] = {**found[-1], "content": _joined(found[-1]["content"], response)}
            else:
                found.append({"role": "user", "content": response})
        else:
            found.append(message)
        answered = role == "tool"
    return _described(found, about, "system" in template)


def _described(messages: list[Message], about: str, has_system: bool) -> list[Message]:
    first = messages[0]
    if first["role"] == "system":
        return [{**first, "content": _joined(first.get("content"), about)}, *messages[1:]]
    if has_system:
        return [{"role": "system", "content": about}, *messages]
    place = next((index for index, message in enumerate(messages) if message["role"] == "user"), None)
    if place is None:
        return [{"role": "user", "content": about}, *messages]
    asked = messages[place]
    return [*messages[:place], {**asked, "content": _joined(about, asked.get("content"))}, *messages[place + 1 :]]


def _call(call: dict[str, Any]) -> str:
    function = call["function"]
    arguments = function.get("arguments") or {}
    written = arguments if isinstance(arguments, str) else json.dumps(arguments, ensure_ascii=False)
    return f'<tool_call>\n{{"name": {json.dumps(function["name"])}, "arguments": {written}}}\n</tool_call>'


def _text(content: Any) -> str:
    if isinstance(content, list):
        return "".join(str(part.get("text", "")) for part in content if isinstance(part, dict))
    return str(content or "")


def _joined(before: Any, after: Any) -> str:
    return "\n\n".join(text for text in (_text(before), _text(after)) if text)
