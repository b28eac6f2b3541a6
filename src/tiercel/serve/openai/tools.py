"""`tools`, `tool_choice`, and the form of an answer."""

from __future__ import annotations

from typing import Any

from tiercel.serve.errors import APIError, to_json
from tiercel.serve.openai.schemas import ChatCompletion
from tiercel.serve.types import Tool

MAX_NAME_CHARS = 256
STRUCTURES = ("json", "regex", "grammar", "choice", "json_object")


def check_schema_size(value: Any, limit: int) -> None:
    """Raise APIError 400 where tools and schemas have more than `limit` bytes of JSON."""
    if len(to_json(value)) > limit:
        raise APIError(400, f"schemas and tools may be {limit} bytes together")


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


def structured_of(response_format: dict[str, Any] | None, direct: dict[str, Any] | None) -> dict[str, Any] | None:
    """`response_format` of OpenAI or `structured_outputs` of vLLM → keywords of `Structured`.  Raises APIError 400."""
    if direct:
        structures = {name: direct[name] for name in STRUCTURES if direct.get(name)}
        if len(structures) != 1:
            raise APIError(400, f"structured_outputs takes one of {', '.join(STRUCTURES)}")
        return structures
    kind = (response_format or {"type": "text"}).get("type")
    if kind == "text":
        return None
    if kind == "json_object":
        return {"json_object": True}
    schema = ((response_format or {}).get("json_schema") or {}) if kind == "json_schema" else None
    if not isinstance(schema, dict) or not isinstance(schema.get("schema"), dict):
        raise APIError(400, "response_format must be text, json_object or json_schema with a schema",
                      param="response_format")  # fmt: skip
    return {"json": schema["schema"]}
