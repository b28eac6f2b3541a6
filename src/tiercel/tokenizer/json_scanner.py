"""One JSON object, read strictly as its characters come.

Model output is hostile input: every character is looked at a constant number of times, whatever comes.
"""

from __future__ import annotations

import json
import re

MAX_DEPTH = 64  # objects and lists inside one another
MAX_LITERAL_CHARACTERS = 400  # of a number
SPACE = " \t\r\n"

_LITERAL = re.compile(r"true|false|null|-?(0|[1-9]\d*)(\.\d+)?([eE][+-]?\d+)?")
_LITERAL_RUN = re.compile(r"[^,\]} \t\r\n]*")
_SPACE_RUN = re.compile(r"[ \t\r\n]*")
_STRING_RUN = re.compile(r'(?:[^"\\\x00-\x1f]++|\\["\\/bfnrt]|\\u[0-9a-fA-F]{4})*+')
_ESCAPE_BEGUN = re.compile(r"\\(?:u[0-9a-fA-F]{0,3})?")
_ESCAPE = re.compile(r'\\(?:["\\/bfnrt]|u[0-9a-fA-F]{4})')

OBJECT, VALUE, VALUE_OR_END, KEY, KEY_OR_END, COLON, COMMA = range(7)  # what may come next
CLOSES = {"}": ("{", KEY_OR_END), "]": ("[", VALUE_OR_END)}


class Broken(Exception):
    """No JSON object goes on as the text does at this position."""

    def __init__(self, position: int) -> None:
        super().__init__(position)
        self.position = position


class ObjectScanner:
    """Reads one JSON object in pieces of any size.

    key: the object's own key whose value is being read, None between values.
    values: {key: pieces of its text}, growing, without the space before it; the first piece is one character.
    done: the object is closed.
    """

    def __init__(self) -> None:
        self.key: str | None = None
        self.values: dict[str, list[str]] = {}
        self.done = False
        self._stack = ""  # open brackets
        self._expect = OBJECT
        self._in_string = False
        self._escape = ""  # the beginning of an escape that the last piece cut
        self._literal = ""  # the number, true, false or null that is being read
        self._own_key: list[str] | None = None  # pieces of the own key that is being read
        self._last_key = ""

    def feed(self, text: str, position: int = 0) -> int:
        """Read on from `position`; return the position after what was read.

        Stops at the end of the text, and at once when `key` changes, when the first character of its value has come,
        and when the object is closed.  Raises Broken with the position of the character that cannot be; what stands
        before it has been read.
        """
        if self.done:
            raise Broken(position)
        key, begin, end = self.key, position, len(text)
        value = None if key is None else self.values[key]
        try:
            while position < end:
                if self._in_string:
                    position = self._string(text, position)
                elif self._literal:
                    position = self._go_on_literal(text, position)
                elif text[position] in SPACE:
                    position = _SPACE_RUN.match(text, position).end()  # type: ignore[union-attr]
                    if value is not None and not value:
                        begin = position
                    continue
                else:
                    self._token(text[position], position)
                    position += 1
                    if value is not None and not value:
                        return position  # the first character; `finally` adds it
                if self._expect == COMMA and value is not None and len(self._stack) == 1:
                    self.key = None
                if self.key != key or self.done:
                    return position
            return position
        except Broken as error:
            position = error.position
            raise
        finally:
            if value is not None and begin < position:
                value.append(text[begin:position])

    def _token(self, char: str, position: int) -> None:
        """A character outside strings, numbers and space."""
        expect = self._expect
        if char == '"' and expect != OBJECT and expect < COLON:
            if expect in (KEY, KEY_OR_END) and len(self._stack) == 1:
                self._own_key = ['"']
            self._in_string = True
        elif expect == COMMA and char == ",":
            self._expect = KEY if self._stack[-1] == "{" else VALUE
        elif expect == COLON and char == ":":
            self._expect = VALUE
            if len(self._stack) == 1:
                if self._last_key in self.values:
                    raise Broken(position)
                self.key = self._last_key
                self.values[self.key] = []
        elif char in CLOSES and expect in (COMMA, CLOSES[char][1]) and self._stack[-1] == CLOSES[char][0]:
            self._pop()
        elif char == "{" and expect <= VALUE_OR_END and len(self._stack) < MAX_DEPTH:
            self._stack += char
            self._expect = KEY_OR_END
        elif char == "[" and expect in (VALUE, VALUE_OR_END) and len(self._stack) < MAX_DEPTH:
            self._stack += char
            self._expect = VALUE_OR_END
        elif char in "-0123456789tfn" and expect in (VALUE, VALUE_OR_END):
            self._literal = char
        else:
            raise Broken(position)

    def _pop(self) -> None:
        self._stack = self._stack[:-1]
        self._expect, self.done = COMMA, not self._stack

    def _string(self, text: str, position: int) -> int:
        """Read on in a string, to its end or the text's."""
        begin = position
        while self._escape and position < len(text):
            self._escape += text[position]
            if _ESCAPE.fullmatch(self._escape):
                self._escape = ""
            elif not _ESCAPE_BEGUN.fullmatch(self._escape):
                raise Broken(position)
            position += 1
        position = _STRING_RUN.match(text, position).end()  # type: ignore[union-attr]
        closed = position < len(text) and text[position] == '"'
        if closed:
            position += 1
        elif position < len(text):  # an escape that is cut, or what no string holds
            match = _ESCAPE_BEGUN.match(text, position)
            if match is None or match.end() < len(text):
                raise Broken(position if match is None else match.end())
            self._escape, position = match[0], len(text)
        if self._own_key is not None:
            self._own_key.append(text[begin:position])
        if closed:
            self._in_string = False
            was_key = self._expect in (KEY, KEY_OR_END)
            if self._own_key is not None:
                self._last_key, self._own_key = str(json.loads("".join(self._own_key))), None
            self._expect = COLON if was_key else COMMA
        return position

    def _go_on_literal(self, text: str, position: int) -> int:
        """Read on in a number, true, false or null; what ends it is not read."""
        stop = _LITERAL_RUN.match(text, position).end()  # type: ignore[union-attr]
        most = position + MAX_LITERAL_CHARACTERS - len(self._literal)
        if stop > most:
            raise Broken(most)
        self._literal += text[position:stop]
        if stop < len(text):
            if not _LITERAL.fullmatch(self._literal):
                raise Broken(stop)
            self._literal, self._expect = "", COMMA
        return stop
