"""`tools` and `tool_choice`."""

from __future__ import annotations

from typing import Any

from tiercel.serve.errors import APIError
from tiercel.serve.openai.schemas import ChatCompletion
from tiercel.serve.types import Tool

MAX_NAME_CHARS = 256


def tools_of(body: ChatCompletion) -> list[Tool] | None:
    """The tools the template gets; tool_choice "none" leaves them out, a single name keeps that one.

    Raises APIError 400.
    """
    for tool in body.tools or ():
        function = tool.get("function")
        if tool.get("type", "function") != "function" or not isinstance(function, dict):
            raise APIError(400, "tools: only functions can be called", param="tools")
        if not isinstance(function.get("name"), str) or not 0 < len(function["name"]) <= MAX_NAME_CHARS:
            raise APIError(400, "tools: each function needs a name", param="tools")
    choice = body.tool_choice
    if choice in (None, "auto") or not body.tools:
        return body.tools or None
    if choice == "none":
        return None
    name = forced_function(choice)
    kept = [tool for tool in body.tools if name is None or tool["function"]["name"] == name]
    if not kept:
        raise APIError(400, f"tool_choice: no tool of this request is named {name!r}", param="tool_choice")
    return kept


def forced_function(choice: Any) -> str | None:
    """Of a `tool_choice` that forces a call: the name of the function, None for any.  Raises APIError 400."""
    if choice == "required":
        return None
    if isinstance(choice, dict) and choice.get("type") == "function":
        name = (choice.get("function") or choice).get("name") if isinstance(choice.get("function", {}), dict) else None
        if isinstance(name, str) and name:
            return name
    raise APIError(400, "tool_choice must be none, auto, required, or a function's name as "
                  '{"type": "function", "function": {"name": …}}', param="tool_choice")  # fmt: skip
