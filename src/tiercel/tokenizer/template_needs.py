"""What a chat template takes: content as text or as parts, arguments of calls as text or as an object.

Nothing in a template says so; it is found out by rendering small conversations, once a template and role.  A message
is then given to the template in the form that it takes, and left as it is where both are taken or neither is seen.
"""

from __future__ import annotations

import json
from collections.abc import Callable
from typing import Any

from tiercel.errors import FormatError, RequestError, TiercelError

Render = Callable[[list[dict[str, Any]]], str]  # messages → the prompt's text

PROBE = "probe4711"
CALL_ID = "abcdefghi"  # nine letters: Mistral's templates take no other length


class TemplateNeeds:
    """What one template takes.  render: renders messages with it."""

    def __init__(self, render: Render) -> None:
        self._render = render
        self._content: dict[tuple[str, bool], bool] = {}
        self._arguments: tuple[bool, bool] | None = None
        self._ended = False  # it takes too long: it is not tried again

    def adapt(self, message: dict[str, Any]) -> dict[str, Any]:
        """The message in the form that the template takes.

        Raises:
            RequestError: arguments of a call are text that is no JSON object, and the template takes objects.
        """
        content = message.get("content")
        if isinstance(content, str) and content.strip() and self._wants(message["role"], parts=True):
            message = {**message, "content": [{"type": "text", "text": content}]}
        elif isinstance(content, list) and _all_text(content) and self._wants(message["role"], parts=False):
            message = {**message, "content": "".join(part["text"] for part in content)}
        if isinstance(message.get("tool_calls"), list) and message["tool_calls"]:
            message = {**message, "tool_calls": [self._adapt_call(call) for call in message["tool_calls"]]}
        return message

    def _wants(self, role: str, parts: bool) -> bool:
        """Whether content of this role is shown in this form, and is not in the other."""
        return not self._shows(role, not parts) and self._shows(role, parts)

    def _shows(self, role: str, parts: bool) -> bool:
        if (role, parts) not in self._content:
            shown = self._text(_conversation(role, [{"type": "text", "text": PROBE}] if parts else PROBE))
            self._content[role, parts] = PROBE in shown and f"'text': '{PROBE}'" not in shown
        return self._content[role, parts]

    def _adapt_call(self, call: Any) -> Any:
        function = call.get("function") if isinstance(call, dict) else None
        if not isinstance(function, dict) or not isinstance(function.get("arguments"), (str, dict)):
            return call
        arguments = function["arguments"]
        takes_text, takes_object = self._takes_arguments()
        if isinstance(arguments, str) and takes_object and not takes_text:
            try:
                read = json.loads(arguments or "{}")
            except (ValueError, RecursionError):
                read = None
            if not isinstance(read, dict):
                raise RequestError(f"the template needs a call's arguments as a JSON object, not {arguments!r:.80}")
            return {**call, "function": {**function, "arguments": read}}
        if isinstance(arguments, dict) and takes_text and not takes_object:
            return {**call, "function": {**function, "arguments": json.dumps(arguments, ensure_ascii=False)}}
        return call

    def _takes_arguments(self) -> tuple[bool, bool]:
        """Whether arguments may be text, and whether an object."""
        if self._arguments is None:
            written = json.dumps({"key": PROBE})
            as_text, as_object = (self._text(_called(form)) for form in (written, {"key": PROBE}))
            self._arguments = written in as_text, PROBE in as_object and f"'key': '{PROBE}'" not in as_object
        return self._arguments

    def _text(self, messages: list[dict[str, Any]]) -> str:
        """The prompt, or "" where the template refuses the conversation."""
        if self._ended:
            return ""
        try:
            return self._render(messages)
        except FormatError:
            self._ended = True
        except TiercelError:
            pass
        return ""


def _all_text(parts: list[Any]) -> bool:
    return all(
        isinstance(part, dict) and part.get("type") == "text" and isinstance(part.get("text"), str) for part in parts
    )


def _conversation(role: str, content: Any) -> list[dict[str, Any]]:
    """A conversation with one message of this role and content, at a place where templates take it."""
    message, user = {"role": role, "content": content}, {"role": "user", "content": "a"}
    if role in ("system", "developer"):
        return [message, user]
    if role == "tool":
        return [*_called({}), {**message, "tool_call_id": CALL_ID, "name": "f"}]
    return [message] if role == "user" else [user, message]


def _called(arguments: Any) -> list[dict[str, Any]]:
    call = {"id": CALL_ID, "type": "function", "function": {"name": "f", "arguments": arguments}}
    return [{"role": "user", "content": "a"}, {"role": "assistant", "content": "", "tool_calls": [call]}]
