"""The input of a response → the messages and functions of a chat.

Hosted tools (web_search, custom, …) and the items of their calls are left out and named in the response header
`x-tiercel-ignored`.  Functions inside a namespace are offered by their own name where it is unique, else as
`namespace__name`; their calls come back with both.
"""

from __future__ import annotations

from collections import Counter
from typing import Any

from tiercel.serve.errors import APIError
from tiercel.serve.openai.schemas import ResponsesRequest

Json = dict[str, Any]
STORED_ITEMS = ("item_reference", "compaction")  # what only a server with a storage could read
MAX_KIND_CHARS = 40


class Functions:
    """The functions of a request.  tools: as a chat has them.  ignored: names of the others for the header."""

    def __init__(self, body: ResponsesRequest) -> None:
        self.ignored: list[str] = []
        self.namespaces: dict[str, tuple[str, str]] = {}  # offered name → namespace, name
        found: list[tuple[str, Json]] = []
        for tool in body.tools or ():
            kind = tool.get("type")
            if kind == "function":
                found.append(("", tool))
            elif kind == "namespace":
                inner = tool.get("tools")
                functions = [each for each in inner if isinstance(each, dict)] if isinstance(inner, list) else []
                found += [(str(tool.get("name", "")), each) for each in functions if each.get("type") == "function"]
            elif isinstance(kind, str):
                self.ignored.append(f"tools.{kind}")
            else:
                raise APIError(400, "tools: each needs a type", param="tools")
        count = Counter(str(tool.get("name")) for _, tool in found)
        self.tools = [self._offer(namespace, tool, count) for namespace, tool in found]

    def _offer(self, namespace: str, tool: Json, count: Counter[str]) -> Json:
        function = {key: value for key, value in tool.items() if key not in ("type", "strict")}
        name = tool.get("name")
        if namespace and isinstance(name, str):
            offered = name if count[name] == 1 else f"{namespace}__{name}"
            self.namespaces[offered] = namespace, name
            function["name"] = offered
        return {"type": "function", "function": function}

    def called(self, name: str | None) -> Json:
        """The fields of a call that name its function."""
        namespace, own = self.namespaces.get(name or "", ("", name))
        return {"name": own} | ({"namespace": namespace} if namespace else {})

    def offered(self, namespace: Any, name: Any) -> Any:
        """The name under which a function of a namespace is offered."""
        return next((key for key, value in self.namespaces.items() if value == (namespace, name)), name)


def chat_messages(body: ResponsesRequest, functions: Functions) -> list[Json]:
    """Messages as a chat has them.  Raises APIError 400."""
    messages: list[Json] = [{"role": "system", "content": body.instructions}] if body.instructions else []
    for item in input_items(body.input):
        _add(messages, item, functions)
    return messages


def input_items(given: str | list[Json]) -> list[Json]:
    """The input as items."""
    return [{"role": "user", "content": given}] if isinstance(given, str) else given


def _add(messages: list[Json], item: Json, functions: Functions) -> None:
    """One input item → a message, or more of the last one."""
    kind = item.get("type", "message")
    if kind == "message":
        last = messages[-1] if messages else {}
        message = {"role": item.get("role"), "content": item.get("content")}
        if item.get("role") == "assistant" and last.pop("reasoning_only", False):
            last |= message
        else:
            messages.append(message)
    elif kind == "function_call":
        name = functions.offered(item.get("namespace"), item.get("name"))
        call = {"id": str(item.get("call_id", "")), "type": "function",
                "function": {"name": name, "arguments": item.get("arguments", "{}")}}  # fmt: skip
        _assistant(messages).setdefault("tool_calls", []).append(call)
    elif kind == "function_call_output":
        messages.append({"role": "tool", "tool_call_id": item.get("call_id"), "content": item.get("output")})
    elif kind == "reasoning":
        messages.append({"role": "assistant", "content": "", "reasoning_content": _reasoning(item),
                         "reasoning_only": True})  # fmt: skip
    elif not isinstance(kind, str) or kind in STORED_ITEMS:
        raise APIError(400, f"input items of type {str(kind)[:MAX_KIND_CHARS]!r} are not supported", param="input")
    else:
        functions.ignored.append(f"input.{kind}")


def _assistant(messages: list[Json]) -> Json:
    """The message of the assistant that calls belong to."""
    if not messages or messages[-1]["role"] != "assistant":
        messages.append({"role": "assistant", "content": ""})
    messages[-1].pop("reasoning_only", None)
    return messages[-1]


def _reasoning(item: Json) -> str:
    """The text of a reasoning item: its content, else its summary."""
    for name in ("content", "summary"):
        parts = item.get(name)
        texts = [part.get("text") for part in parts if isinstance(part, dict)] if isinstance(parts, list) else []
        if text := "".join(text for text in texts if isinstance(text, str)):
            return text
    return ""
