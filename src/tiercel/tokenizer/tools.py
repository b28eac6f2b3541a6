"""Tool calls, told apart from the answer's text while it comes.

    form = ToolForm.of(template)                         how this model writes calls; None: its template knows no tools
    stream = tokenizer.stream(..., shown=form.markers)        markers that are control tokens must reach the text
    parser = ToolParser(form)
    for part in parser.push(piece.text): ...             str: answer text · ToolDelta: the beginning or more of a call
    for part in parser.finish(): ...

Four ways of writing `f(a=1)`:

    hermes    <tool_call>{"name": "f", "arguments": {"a": 1}}</tool_call>         Hermes, Qwen, Falcon-H1, Granite
    llama     {"name": "f", "parameters": {"a": 1}}, perhaps after <|python_tag|>, several with ; between
    mistral   [TOOL_CALLS][{"name": "f", "arguments": {"a": 1}}]
              [TOOL_CALLS]f[ARGS]{"a": 1}

A call begins once its name and the first brace of its arguments are there; from then on every character of the
arguments is handed out as it comes, as the model wrote it.  What turns out not to be a call before that is answer
text again, unchanged.  A call that breaks later (cut off, or bad JSON) keeps what came; `calls[i].complete` tells.
With `whole=True` a call is handed out only when it is complete, and a broken one is text.

White space beside calls is dropped; everything else comes out exactly once.  The scanners read each character once:
model output is hostile input (a quadratic one, or `eval`, has been a hole elsewhere).
"""

from __future__ import annotations

import json
import re
import secrets
from collections.abc import Callable, Collection, Iterator
from dataclasses import dataclass, field, replace

DEEPEST = 64
ARGUMENT_KEYS = ("arguments", "parameters")
# a call's keys, and how their values may begin ("": not yet)
FIRST = {
    "name": ("", '"'), "type": ("", '"'), "id": ("", '"'),
    "arguments": ("", "{", '"', "n"), "parameters": ("", "{", '"', "n"),
}  # fmt: skip
LONGEST_NAME = 256
SPACE = " \t\r\n"


@dataclass(frozen=True)
class ToolForm:
    """kind: "hermes", "llama" or "mistral".  markers: texts that begin or end a call, control tokens in some models."""

    kind: str
    markers: tuple[str, ...]

    @classmethod
    def of(cls, *templates: str) -> ToolForm | None:
        """What a chat template (or the several of a model) asks a model to write; None where no tools are known."""
        written = "\n".join(templates)
        if "[TOOL_CALLS]" in written:
            return MISTRAL
        if "<tool_call>" in written:
            return HERMES
        if "<|python_tag|>" in written or ("tools" in written and '"parameters"' in written):
            return LLAMA
        return None


HERMES = ToolForm("hermes", ("<tool_call>", "</tool_call>"))
LLAMA = ToolForm("llama", ("<|python_tag|>",))
MISTRAL = ToolForm("mistral", ("[TOOL_CALLS]", "[ARGS]", "[CALL_ID]"))


@dataclass(frozen=True)
class ToolDelta:
    """More of call number `index`.  The first has id and name; `arguments` is the next piece of a JSON object."""

    index: int
    id: str | None = None
    name: str | None = None
    arguments: str = ""

    def __add__(self, more: ToolDelta) -> ToolDelta:
        """The call so far and its next piece."""
        return replace(self, arguments=self.arguments + more.arguments)


@dataclass
class ToolCall:
    """arguments: JSON text as the model wrote it; it parses as an object where the call is complete."""

    id: str
    name: str
    pieces: list[str] = field(default_factory=list)
    complete: bool = False

    @property
    def arguments(self) -> str:
        return "".join(self.pieces)


class Broken(Exception):
    """The text is not what it began as."""


class ObjectScanner:
    """Reads one JSON object character by character, strictly; tells of its own keys.

    key: the object's own key whose value is being read, None between values.
    values: {key: the characters of its value}, growing, without space before it.  done: the object is closed.
    """

    LITERAL = re.compile(r"true|false|null|-?(0|[1-9]\d*)(\.\d+)?([eE][+-]?\d+)?")

    def __init__(self) -> None:
        self.key: str | None = None
        self.values: dict[str, list[str]] = {}
        self.done = False
        self._stack = ""
        self._expect = "object"  # object, value, value or ], key or }, key, colon, comma
        self._text: list[str] | None = None  # of the string or literal being read
        self._string = self._escaped = False
        self._unicode = 0  # hexadecimal digits still to come

    def feed(self, char: str) -> None:
        """Raises Broken where no JSON object goes on like this."""
        if self.done:
            raise Broken
        if self._text is not None and not self._string and char in ",]}" + SPACE:
            self._end_literal()
        inside = self.key is not None
        if self._string:
            self._in_string(char)
        elif self._text is not None:
            self._text.append(char)
            if len(self._text) > 400:
                raise Broken
        elif char not in SPACE:
            self._token(char)
        if inside and self.key is not None and (char not in SPACE or self.values[self.key]):
            self.values[self.key].append(char)
        if self._expect == "comma" and len(self._stack) == 1:
            self.key = None

    def _token(self, char: str) -> None:
        expect = self._expect
        if char in "}]" and self._stack and expect != "object":
            if (self._stack[-1] == "{") != (char == "}") or expect not in (
                "comma",
                f"key or {char}",
                f"value or {char}",
            ):
                raise Broken
            self._stack = self._stack[:-1]
            self._expect, self.done = "comma", not self._stack
        elif expect == "comma" and char == ",":
            self._expect = "key" if self._stack[-1] == "{" else "value"
        elif expect == "colon" and char == ":":
            self._expect = "value"
            if len(self._stack) == 1:
                self.key = self._last_key
                if self.key in self.values:
                    raise Broken
                self.values[self.key] = []
        elif expect.startswith("key") and char == '"':
            self._string, self._text = True, [char]
        elif expect == "object" and char == "{":
            self._push("{", "key or }")
        elif expect.startswith("value"):
            self._value(char)
        else:
            raise Broken

    def _value(self, char: str) -> None:
        if char == "{":
            self._push("{", "key or }")
        elif char == "[":
            self._push("[", "value or ]")
        elif char == '"':
            self._string, self._text = True, [char]
        elif char in "-0123456789tfn":
            self._text = [char]
        else:
            raise Broken

    def _push(self, bracket: str, expect: str) -> None:
        if len(self._stack) == DEEPEST:
            raise Broken
        self._stack += bracket
        self._expect = expect

    def _in_string(self, char: str) -> None:
        assert self._text is not None
        if self._unicode:
            if char not in "0123456789abcdefABCDEF":
                raise Broken
            self._unicode -= 1
        elif self._escaped:
            if char not in '"\\/bfnrtu':
                raise Broken
            self._escaped, self._unicode = False, 4 if char == "u" else 0
        elif char == '"':
            self._string = False
        elif char < " ":
            raise Broken
        else:
            self._escaped = char == "\\"
        self._text.append(char)
        if not self._string:
            if self._expect.startswith("key"):
                self._last_key = str(json.loads("".join(self._text)))
                self._expect = "colon"
            else:
                self._expect = "comma"
            self._text = None

    def _end_literal(self) -> None:
        assert self._text is not None
        if not self.LITERAL.fullmatch("".join(self._text)):
            raise Broken
        self._text, self._expect = None, "comma"
        if len(self._stack) == 1:
            self.key = None


class ToolParser:
    """Answer text in, in any pieces; text and parts of calls out.

    names: the tools that were offered.  Only the bare objects of the llama form ask: one with another name is text.
    whole: hand a call out only when it is complete.
    calls: all calls so far.
    """

    def __init__(
        self,
        form: ToolForm,
        *,
        names: Collection[str] | None = None,
        whole: bool = False,
        new_id: Callable[[], str] | None = None,
    ) -> None:
        self.form, self.names, self.whole = form, names, whole
        self.new_id = new_id or (mistral_id if form is MISTRAL else openai_id)
        self.calls: list[ToolCall] = []
        self._open = form.markers[0]
        self._read: Callable[[str], Iterator[str | ToolDelta]] = self._text
        self._space = ""  # at the start of the answer or after a call: dropped if a call follows
        self._edge = True  # nothing but space since the start or the last call
        self._held = ""  # may be the beginning of a marker
        self._raw: list[str] = []  # of what may become a call, to be text again if it does not
        self._array = False  # mistral: inside [ … ]
        self._begun: ToolCall | None = None  # this call has been handed out, up to `_sent` characters
        self._sent = 0

    def push(self, text: str) -> list[str | ToolDelta]:
        """What these characters complete."""
        return _joined(part for char in text for part in self._read(char))

    def finish(self) -> list[str | ToolDelta]:
        """What was held back."""
        return _joined(self._end())

    def _end(self) -> Iterator[str | ToolDelta]:
        if self._read == self._object:
            yield from self._broke("")
        elif self._read == self._name:
            yield from self._give_up("")
        held, self._held = self._held, ""
        if self._read == self._after and held:
            yield from self._plain(held)
        elif self._read == self._before and (held or self._raw):
            yield from self._give_up("")
        elif held:
            yield from self._plain(held)
        if self._space and not self.calls:
            yield self._space
        self._space = ""

    # answer text, in which a marker may come

    def _text(self, char: str) -> Iterator[str | ToolDelta]:
        held = self._held + char
        if self._edge and not self._held and char == "{" and self.form is LLAMA:
            yield from self._start_object(char)
        elif held == self._open:
            self._held, self._raw, self._read = "", [held], self._before
        elif self._open.startswith(held):
            self._held = held
        else:  # the marker may begin anew within what was held
            for at in range(1, len(held) + 1):
                if self._open.startswith(held[at:]):
                    self._held = held[at:]
                    yield from self._plain(held[:at])
                    return

    def _plain(self, text: str) -> Iterator[str]:
        """Text that is part of the answer for certain."""
        if self._edge:
            word = text.lstrip(SPACE)
            self._space += text[: len(text) - len(word)]
            if not word:
                return
            text, self._space, self._edge = self._space + word, "", False
        yield text

    # between a marker and an object

    def _before(self, char: str) -> Iterator[str | ToolDelta]:
        if char in SPACE:
            self._raw.append(char)
        elif char == "{":
            yield from self._start_object(char)
        elif self.form is MISTRAL and char == "[" and not self._array:
            self._array = True
            self._raw.append(char)
        elif self.form is MISTRAL and not self._array and (char.isalnum() or char == "_"):
            self._raw.append(char)
            self._word, self._read = char, self._name
        else:
            yield from self._give_up(char)

    def _name(self, char: str) -> Iterator[str | ToolDelta]:
        """mistral: f[ARGS]{ or f[CALL_ID]123456789[ARGS]{ or f{"""
        if char == "{":
            name = re.fullmatch(r"([\w.-]+)(\[CALL_ID\]\w+)?(\[ARGS\])?\s*", self._word)
            if name:
                yield from self._start_object(char, name[1])
                return
        elif len(self._word) < LONGEST_NAME and (char in "_-.[] \n" or char.isalnum()):
            self._word += char
            self._raw.append(char)
            return
        yield from self._give_up(char)

    # an object: {"name": …, "arguments": {…}}

    def _start_object(self, char: str, name: str | None = None) -> Iterator[str | ToolDelta]:
        """name: it stood before the object, which is then the arguments alone."""
        self._scan, self._begun, self._sent = ObjectScanner(), None, 0
        self._called: str | None = None
        self._key: str | None = None  # under which the arguments stand
        self._bare = name is not None
        self._read = self._object
        if name is not None:
            self._key, self._called = "arguments", name
            for known in f'{{"name":{json.dumps(name)},"arguments":':
                self._scan.feed(known)
        yield from self._object(char)

    def _object(self, char: str) -> Iterator[str | ToolDelta]:
        scan, key = self._scan, self._scan.key
        try:
            scan.feed(char)
            if self._bare and scan.key is None:
                scan.feed("}")
            if scan.key != key or (key is not None and len(scan.values[key]) == 1):
                self._check(key)
        except Broken:
            yield from self._broke(char)
            return
        self._raw.append(char)
        yield from self._more()
        if scan.done:
            yield from self._close()

    def _check(self, before: str | None) -> None:
        """A key has come, its value begins or has ended: may this still be a call?"""
        key, values = self._scan.key, self._scan.values
        if key is not None:
            first = "".join(values[key][:1])
            if key not in FIRST or first not in FIRST[key]:
                raise Broken
            if key in ARGUMENT_KEYS:
                if self._key not in (None, key):
                    raise Broken
                self._key = key
        if before == "name" and key is None and self._called is None:
            name = json.loads("".join(values["name"]))
            untagged = self.form is LLAMA and self._raw[0] != self._open
            if not 0 < len(name) <= LONGEST_NAME or (untagged and self.names is not None and name not in self.names):
                raise Broken
            self._called = name

    def _more(self) -> Iterator[ToolDelta]:
        """What is new of the arguments, once they may be handed out."""
        if self.whole or self._called is None or self._key is None:
            return
        value = self._scan.values[self._key]
        if not value or value[0] != "{" or self._sent == len(value):
            return
        if self._begun is None:
            yield self._begin(self._called)
        assert self._begun is not None
        fragment = "".join(value[self._sent :])
        self._sent = len(value)
        self._begun.pieces.append(fragment)
        yield ToolDelta(len(self.calls) - 1, arguments=fragment)

    def _begin(self, name: str) -> ToolDelta:
        self._begun = ToolCall(self.new_id(), name)
        self.calls.append(self._begun)
        self._space = ""
        return ToolDelta(len(self.calls) - 1, self._begun.id, name)

    def _close(self) -> Iterator[str | ToolDelta]:
        """The object is complete: a call if it has a name and arguments."""
        arguments = self._all_arguments()
        if self._called is None or arguments is None:
            yield from self._give_up("")
            return
        if self._begun is None:
            begin = self._begin(self._called)
            assert self._begun is not None
            self._begun.pieces.append(arguments)
            yield ToolDelta(begin.index, begin.id, begin.name, arguments)
        self._begun.complete = True
        self._begun, self._raw, self._held = None, [], ""
        self._space, self._edge, self._read = "", True, self._after

    def _all_arguments(self) -> str | None:
        """An object as written, an object inside a string (Granite), or none at all: {}.  None: not a call's."""
        if self._key is None:
            return None if self.form is LLAMA else "{}"
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

    def _broke(self, char: str) -> Iterator[str | ToolDelta]:
        """No JSON goes on like this.  Where only the last brace is missing (small models forget it) it is a call."""
        value = self._scan.values.get(self._key or "")
        if self._called is not None and value and value[0] == "{" and self._scan.key is None:
            yield from self._close()
            if char:
                yield from self._read(char)
        else:
            yield from self._give_up(char)

    def _give_up(self, char: str) -> Iterator[str | ToolDelta]:
        """Not a call after all: text again.  Of a call that has begun what came stays, and the rest is text."""
        raw, self._raw, self._array = "".join(self._raw), [], False
        begun, self._begun, self._read, self._held = self._begun, None, self._text, ""
        if begun is None:
            yield from self._plain(raw)
        self._edge = False
        if char:
            yield from self._read(char)

    # after a call

    def _after(self, char: str) -> Iterator[str | ToolDelta]:
        held = self._held + char
        if not self._held and char in SPACE:
            self._space += char
        elif self.form is HERMES and self.form.markers[1].startswith(held):
            self._held = held
            if held == self.form.markers[1]:
                self._held, self._space, self._read = "", "", self._text
        elif self.form is MISTRAL and self._array and char in ",]":
            self._array = char == ","
            self._space, self._raw = "", []
            self._read = self._again if char == "," else self._text
        elif self.form is LLAMA and char == ";":
            self._space, self._read = "", self._text
        else:
            self._held, self._read, self._array = "", self._text, False
            for part in held:
                yield from self._read(part)

    def _again(self, char: str) -> Iterator[str | ToolDelta]:
        """mistral: after the comma between two calls of an array."""
        if char == "{":
            yield from self._start_object(char)
        elif char in SPACE:
            self._space += char
        else:
            self._read, self._array = self._text, False
            yield from self._text(char)


def openai_id() -> str:
    return "call_" + secrets.token_hex(12)


def mistral_id() -> str:
    """Nine letters or digits: its template refuses others."""
    return secrets.token_hex(5)[:9]


def _joined(parts: Iterator[str | ToolDelta]) -> list[str | ToolDelta]:
    """Neighbours that belong together as one."""
    out: list[str | ToolDelta] = []
    for part in parts:
        last = out[-1] if out else None
        if isinstance(part, str) and isinstance(last, str):
            out[-1] = last + part
        elif isinstance(part, ToolDelta) and isinstance(last, ToolDelta) and last.index == part.index and not part.id:
            out[-1] = ToolDelta(last.index, last.id, last.name, last.arguments + part.arguments)
        else:
            out.append(part)
    return out
