"""Separates tool calls from the answer's text while it comes.

    tool_format = ToolFormat.of(template)                how this model writes calls; None: its template has no tools
    stream = tokenizer.stream(..., shown=tool_format.markers)   markers that are control tokens must reach the text
    parser = ToolParser(tool_format)
    for part in parser.push(piece.text): ...             str: answer text · ToolDelta: the beginning or more of a call
    for part in parser.finish(): ...

A call begins once its name and the first brace of its arguments are there; from then on the arguments are given out
as they come, as the model wrote them.  What turns out not to be a call before that is answer text again, unchanged.
A call that breaks later (cut off, or bad JSON) keeps what came; `calls[i].complete` is then False.
With `whole=True` a call is given out only when it is complete, and a broken one is text.

White space beside calls is dropped; everything else comes out exactly once.  Each character is read a constant number
of times: model output is hostile input.
"""

from __future__ import annotations

import json
import re
from collections.abc import Callable, Collection

from tiercel.tokenizer.json_scanner import SPACE, Broken, ObjectScanner
from tiercel.tokenizer.tool_formats import HERMES, LLAMA, MISTRAL, ToolCall, ToolDelta, ToolFormat

ARGUMENT_KEYS = ("arguments", "parameters")
# a call's keys, and how their values may begin ("": not yet)
FIRST = {
    "name": ("", '"'), "type": ("", '"'), "id": ("", '"'),
    "arguments": ("", "{", '"', "n"), "parameters": ("", "{", '"', "n"),
}  # fmt: skip
MAX_NAME_CHARACTERS = 256

_SPACES = re.compile(r"[ \t\r\n]*")
_NAME = re.compile(r"[\w.\-\[\] \n]*")  # of mistral's form, and what may stand between it and the object
_CALLED = re.compile(r"([\w.-]+)(\[CALL_ID\]\w+)?(\[ARGS\])?\s*")


class ToolParser:
    """Answer text in, in pieces of any size; text and parts of calls out.

    names: the tools that were offered.  Only the bare objects of the llama format ask: one with another name is text.
    whole: give a call out only when it is complete.
    calls: all calls so far.
    """

    def __init__(
        self,
        tool_format: ToolFormat,
        *,
        names: Collection[str] | None = None,
        whole: bool = False,
        new_id: Callable[[], str] | None = None,
    ) -> None:
        self.format, self.names, self.whole = tool_format, names, whole
        self.new_id = new_id or tool_format.new_id
        self.calls: list[ToolCall] = []
        self._open = tool_format.markers[0]
        self._read: Callable[[str, int], int] = self._text  # reads from a position on, answers the next one
        self._out: list[str | ToolDelta] = []
        self._space: list[str] = []  # at the start of the answer or after a call: dropped if a call follows
        self._edge = True  # nothing but space since the start or the last call
        self._held = ""  # may be the beginning of a marker
        self._raw: list[str] = []  # of what may become a call, to be text again if it does not
        self._array = False  # mistral: inside [ … ]
        self._begun: ToolCall | None = None  # this call has been given out, up to `_sent` pieces
        self._sent = 0

    def push(self, text: str) -> list[str | ToolDelta]:
        """What these characters complete."""
        text, self._held, self._out = self._held + text, "", []
        position, end = 0, len(text)
        while position < end:
            position = self._read(text, position)
        return _joined(self._out)

    def finish(self) -> list[str | ToolDelta]:
        """What was held back."""
        self._out = []
        held, self._held = self._held, ""
        if self._read == self._object:
            self._broke()
        elif self._read in (self._name, self._before):
            self._give_up()
        if held:
            self._plain(held)
        if self._space and not self.calls:
            self._out.append("".join(self._space))
        self._space = []
        return _joined(self._out)

    # answer text, in which a marker may come

    def _text(self, text: str, position: int) -> int:
        if self._edge and self.format is LLAMA:
            position = self._skip_space(text, position)
            if text[position : position + 1] == "{":
                return self._start_object(text, position)
        found = text.find(self._open, position)
        if found >= 0:
            self._plain(text[position:found])
            self._raw, self._read = [self._open], self._before
            return found + len(self._open)
        held = next((at for at in range(max(position, len(text) - len(self._open) + 1), len(text))
                     if self._open.startswith(text[at:])), len(text))  # fmt: skip
        self._plain(text[position:held])
        self._held = text[held:]
        return len(text)

    def _skip_space(self, text: str, position: int) -> int:
        """Keep the space at this position, to be dropped if a call follows."""
        stop = _SPACES.match(text, position).end()  # type: ignore[union-attr]
        if stop > position:
            self._space.append(text[position:stop])
        return stop

    def _plain(self, text: str) -> None:
        """Text that is part of the answer for certain."""
        if self._edge:
            word = self._skip_space(text, 0)
            if word == len(text):
                return
            text = "".join(self._space) + text[word:]
            self._space, self._edge = [], False
        if text:
            self._out.append(text)

    # between a marker and an object

    def _before(self, text: str, position: int) -> int:
        stop = _SPACES.match(text, position).end()  # type: ignore[union-attr]
        self._raw.append(text[position:stop])
        if stop == len(text):
            return stop
        char = text[stop]
        if char == "{":
            return self._start_object(text, stop)
        if self.format is MISTRAL and not self._array and (char == "[" or char == "_" or char.isalnum()):
            self._raw.append(char)
            if char == "[":
                self._array = True
            else:
                self._word, self._read = char, self._name
            return stop + 1
        return self._give_up(stop)

    def _name(self, text: str, position: int) -> int:
        """mistral: f[ARGS]{ or f[CALL_ID]123456789[ARGS]{ or f{"""
        most = position + MAX_NAME_CHARACTERS - len(self._word)
        stop = _NAME.match(text, position, max(most, position)).end()  # type: ignore[union-attr]
        self._word += text[position:stop]
        self._raw.append(text[position:stop])
        if stop == len(text):
            return stop
        name = _CALLED.fullmatch(self._word) if text[stop] == "{" else None
        return self._give_up(stop) if name is None else self._start_object(text, stop, name[1])

    # an object: {"name": …, "arguments": {…}}

    def _start_object(self, text: str, position: int, name: str | None = None) -> int:
        """name: it stood before the object, which is then the arguments alone."""
        self._scan, self._begun, self._sent = ObjectScanner(), None, 0
        self._called: str | None = None
        self._key: str | None = None  # under which the arguments stand
        self._bare = name is not None
        self._read = self._object
        if name is not None:
            self._key, self._called = "arguments", name
            known, at = f'{{"name":{json.dumps(name)},"arguments":', 0
            while at < len(known):
                at = self._scan.feed(known, at)
        return self._object(text, position)

    def _object(self, text: str, position: int) -> int:
        scan, begin = self._scan, position
        try:
            while position < len(text) and not scan.done:
                key = scan.key
                empty = key is not None and not scan.values[key]
                position = scan.feed(text, position)
                if self._bare and scan.key is None:
                    scan.feed("}")
                if scan.key != key or (empty and key is not None and scan.values[key]):
                    self._check(key, position - 1)
        except Broken as error:
            self._raw.append(text[begin : error.position])
            self._more()
            return self._broke(error.position)
        self._raw.append(text[begin:position])
        self._more()
        if scan.done:
            self._close()
        return position

    def _check(self, before: str | None, position: int) -> None:
        """A key has come, its value begins or has ended: may this still be a call?"""
        key, values = self._scan.key, self._scan.values
        if key is not None:
            first = "".join(values[key][:1])
            if key not in FIRST or first not in FIRST[key]:
                raise Broken(position)
            if key in ARGUMENT_KEYS:
                if self._key not in (None, key):
                    raise Broken(position)
                self._key = key
        if before == "name" and key is None and self._called is None:
            name = json.loads("".join(values["name"]))
            untagged = self.format is LLAMA and self._raw[:1] != [self._open]
            if not 0 < len(name) <= MAX_NAME_CHARACTERS or (
                untagged and self.names is not None and name not in self.names
            ):
                raise Broken(position)
            self._called = name

    def _more(self) -> None:
        """Give out what is new of the arguments, once they may be."""
        if self.whole or self._called is None or self._key is None:
            return
        value = self._scan.values[self._key]
        if not value or value[0] != "{" or self._sent == len(value):
            return
        if self._begun is None:
            self._begun = self._begin(self._called)
        fragment = "".join(value[self._sent :])
        self._sent = len(value)
        self._begun.pieces.append(fragment)
        self._out.append(ToolDelta(len(self.calls) - 1, arguments=fragment))

    def _begin(self, name: str) -> ToolCall:
        call = ToolCall(self.new_id(), name)
        self.calls.append(call)
        self._space = []
        self._out.append(ToolDelta(len(self.calls) - 1, call.id, name))
        return call

    def _close(self) -> None:
        """The object is complete: a call if it has a name and arguments."""
        arguments = self._all_arguments()
        if self._called is None or arguments is None:
            self._give_up()
            return
        if self._begun is None:
            self._begun = self._begin(self._called)
            self._begun.pieces.append(arguments)
            self._out.append(ToolDelta(len(self.calls) - 1, arguments=arguments))
        self._begun.complete = True
        self._begun, self._raw = None, []
        self._space, self._edge, self._read = [], True, self._after

    def _all_arguments(self) -> str | None:
        """An object as written, an object inside a string (Granite), or none at all: {}.  None: not a call's."""
        if self._key is None:
            return None if self.format is LLAMA else "{}"
        value = "".join(self._scan.values[self._key]).rstrip(SPACE)
        if value.startswith("{"):
            return value
        try:
            inner = json.loads(value)
            if inner is None:
                return "{}"
            return inner if isinstance(json.loads(inner), dict) else None
        except (ValueError, RecursionError):
            return None

    def _broke(self, position: int = 0) -> int:
        """No JSON goes on like this.  Where only the last brace is missing (small models omit it) it is a call."""
        value = self._scan.values.get(self._key or "")
        if self._called is not None and value and value[0] == "{" and self._scan.key is None:
            self._close()
            return position
        return self._give_up(position)

    def _give_up(self, position: int = 0) -> int:
        """Not a call after all: text again.  Of a call that has begun what came stays, and the rest is text."""
        raw, self._raw, self._array = "".join(self._raw), [], False
        begun, self._begun, self._read = self._begun, None, self._text
        if begun is None:
            self._plain(raw)
        self._edge = False
        return position

    # after a call

    def _after(self, text: str, position: int) -> int:
        position = self._skip_space(text, position)
        if position == len(text):
            return position
        char = text[position]
        if self.format is HERMES:
            close = self.format.markers[1]
            following = text[position : position + len(close)]
            if following == close:
                self._space, self._read = [], self._text
                return position + len(close)
            if close.startswith(following):
                self._held = following
                return len(text)
        elif self.format is MISTRAL and self._array and char in ",]":
            self._array = char == ","
            self._space, self._read = [], self._again if self._array else self._text
            return position + 1
        elif self.format is LLAMA and char == ";":
            self._space, self._read = [], self._text
            return position + 1
        self._read, self._array = self._text, False
        return position

    def _again(self, text: str, position: int) -> int:
        """mistral: after the comma between two calls of an array."""
        position = self._skip_space(text, position)
        if position == len(text):
            return position
        if text[position] == "{":
            return self._start_object(text, position)
        self._read, self._array = self._text, False
        return position


def _joined(parts: list[str | ToolDelta]) -> list[str | ToolDelta]:
    """Neighbours that belong together as one."""
    if len(parts) < 2:
        return parts
    out: list[str | ToolDelta] = []
    texts: list[str] = []
    for part in parts:
        last = out[-1] if out else None
        if isinstance(part, str):
            texts.append(part)
            continue
        if texts:
            out.append("".join(texts))
            texts, last = [], None
        if isinstance(last, ToolDelta) and last.index == part.index and not part.id:
            out[-1] = ToolDelta(last.index, last.id, last.name, last.arguments + part.arguments)
        else:
            out.append(part)
    return [*out, "".join(texts)] if texts else out
