"""`tools` and `tool_choice`."""

from __future__ import annotations

from typing import Any

from tiercel.serve.errors import APIError
from tiercel.serve.openai.schemas import ChatCompletion
from tiercel.serve.types import Tool

MAX_NAME_CHARS = 256


def tools_of(body: ChatCompletion) -> list[Tool] | None:
    """The functions the template gets; tool_choice "none" leaves them out, a single name keeps that one.

    Hosted tools (web_search, custom, …) are left out: `hosted_tools` names them.  Raises APIError 400.
    """
    offered = [tool for tool in body.tools or () if tool.get("type", "function") == "function"]
    for tool in offered:
        function = tool.get("function")
        if not isinstance(function, dict):
            raise APIError(400, "tools: each function needs its description as `function`", param="tools")
        if not isinstance(function.get("name"), str) or not 0 < len(function["name"]) <= MAX_NAME_CHARS:
            raise APIError(400, "tools: each function needs a name", param="tools")
    choice = body.tool_choice
    if choice in (None, "auto") or not body.tools:
        return offered or None
    if choice == "none":
        return None
    name = forced_function(choice)
    kept = [tool for tool in offered if name is None or tool["function"]["name"] == name]
    if not kept:
        wanted = "can be called" if name is None else f"is named {name!r}"
        raise APIError(400, f"tool_choice: no tool of this request {wanted}", param="tool_choice")
    return kept


def hosted_tools(body: ChatCompletion) -> list[str]:
    """The tools that are no functions, as the header names them.  Raises APIError 400."""
    kinds = [tool.get("type", "function") for tool in body.tools or ()]
    if not all(isinstance(kind, str) for kind in kinds):
        raise APIError(400, "tools: each needs a type", param="tools")
    return [f"tools.{kind}" for kind in dict.fromkeys(kinds) if kind != "function"]


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
