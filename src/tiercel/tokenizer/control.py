"""Control tokens: the pieces of a vocabulary that steer a model, and how they are kept out of what people write.

`<|im_end|>` ends a turn when the template wrote it, and is ten characters when a person did.  Which is which is
known only before the template runs.  So, of every control text inside a message, the first character is exchanged
for a private-use character that occurs nowhere else in the conversation; the template renders; the prompt is cut at
the control tokens that are still there, which are the template's own; and in the text between, the characters are
put back.  One character for one character: trims, slices, lengths and letter cases in the template see what they
would have seen.  The first character of a control text's beginning at a message's end (and of its end at a message's
beginning) is exchanged too, so that none can be put together from two messages or a message and the template.

One kind is left alone where the model or the operator wrote: think tags in assistant and system messages, which
templates look for to drop earlier reasoning, and which the model did write as tokens.
"""

from __future__ import annotations

import json
import re
from bisect import bisect_right
from collections.abc import Iterable, Iterator
from dataclasses import dataclass
from typing import Any

from tokenizers import AddedToken, Tokenizer
from tokenizers.models import WordLevel

from tiercel.errors import FormatError, RequestError
from tiercel.tokenizer.template import REASONING

LONGEST = 256
MARKUP = frozenset("<>[]{}|")
THINK_TAGS = ("<think>", "</think>")
TRUSTED_ROLES = ("assistant", "system", "developer")
WORDS = ("content", *REASONING)  # where think tags are those roles' own
PRIVATE_USE = range(0xE000, 0xF8FF)
PRIVATE_PATTERN = re.compile("[\ue000-\uf8ff]|u[ef][0-9a-f]{3}")
WINDOW_CHARS = 1 << 16
DEEPEST = 64
OTHER = "\uffff"  # the finder's word for text between control tokens


@dataclass(frozen=True)
class Added:
    """An added token as tokenizer.json describes it: found in the text before anything else is done to it."""

    id: int
    content: str
    special: bool = False
    lstrip: bool = False
    rstrip: bool = False
    single_word: bool = False

    def steers(self, template: str) -> bool:
        """Whether this is a control token: flagged so, shaped like a tag, or written by the chat template.

        The others (runs of spaces, whole words) are vocabulary, and are found in anybody's text.  One character
        alone is text too, unless flagged.
        """
        if self.special:
            return True
        return len(self.content) > 1 and (not MARKUP.isdisjoint(self.content) or self.content in template)


class Controls:
    """Finds a vocabulary's control tokens in text, leftmost longest, with the tokenizer library's own rules."""

    def __init__(self, tokens: Iterable[Added]) -> None:
        self.tokens = {token.content: token for token in tokens}
        for content in self.tokens:
            if not 0 < len(content) <= LONGEST:
                raise FormatError(f"a control token has 1 to {LONGEST} characters, not {len(content)}")
        self.ids = frozenset(token.id for token in self.tokens.values())
        self._forwards = sorted(self.tokens)
        self._backwards = sorted(content[::-1] for content in self.tokens)
        self._longest = max(map(len, self.tokens), default=0)
        self._windows = not any(t.lstrip or t.rstrip or t.single_word for t in self.tokens.values())
        self._finder = Tokenizer(WordLevel({OTHER: 0}, unk_token=OTHER))
        self._finder.add_special_tokens(
            [
                AddedToken(t.content, lstrip=t.lstrip, rstrip=t.rstrip, single_word=t.single_word, normalized=False)
                for t in self.tokens.values()
            ]
        )

    def cut(self, text: str) -> Iterator[tuple[Added | None, int, int]]:
        """The parts of text in order: (control token or None for plain text, start, stop)."""
        done = 0
        for token, start, stop in self._find(text):
            if done < start:
                yield None, done, start
            yield token, start, stop
            done = stop
        if done < len(text):
            yield None, done, len(text)

    def _find(self, text: str) -> Iterator[tuple[Added, int, int]]:
        """The control tokens of text; a window at a time, as the library holds Python's lock meanwhile."""
        begin = 0
        while begin < len(text):
            end = min(begin + WINDOW_CHARS, len(text)) if self._windows else len(text)
            encoding = self._finder.encode(text[begin : end + self._longest], add_special_tokens=False)
            done = end
            for content, (start, stop) in zip(encoding.tokens, encoding.offsets, strict=True):
                if begin + start < end and (token := self.tokens.get(content)) is not None:
                    yield token, begin + start, begin + stop
                    done = max(end, begin + stop)
            begin = done

    def places(self, text: str) -> list[tuple[int, Added]]:
        """Where control texts begin; a control text that overlaps an earlier one is not named."""
        return [(text.index(token.content, start), token) for token, start, _ in self.cut(text) if token is not None]

    def begun(self, text: str) -> int:
        """How many characters at the end of text are the beginning of a control text."""
        return next((n for n in self._lengths(text) if _starts(self._forwards, text[-n:])), 0)

    def ended(self, text: str) -> int:
        """How many characters at the start of text are the end of a control text."""
        return next((n for n in self._lengths(text) if _starts(self._backwards, text[:n][::-1])), 0)

    def _lengths(self, text: str) -> range:
        return range(min(len(text), self._longest - 1), 0, -1)


def _starts(words: list[str], beginning: str) -> bool:
    """Whether one of the sorted words goes on after this beginning."""
    place = bisect_right(words, beginning)
    return place < len(words) and words[place].startswith(beginning)


class Disguise:
    """One conversation's exchange of characters: `hide` before the template, `reveal` after it."""

    def __init__(self, controls: Controls, *conversation: Any) -> None:
        self.controls = controls
        try:
            written = json.dumps(conversation, ensure_ascii=False)
            written.encode()
        except UnicodeEncodeError:
            raise RequestError("messages and tools hold half of a surrogate pair, which is no text") from None
        except (TypeError, ValueError, RecursionError) as error:
            raise RequestError(f"messages and tools must be plain JSON values: {error}") from None
        used: set[str] = set()
        for start in range(0, len(written), WINDOW_CHARS):
            found = PRIVATE_PATTERN.findall(written, start, start + WINDOW_CHARS + 4)
            used |= {text if len(text) == 1 else chr(int(text[1:], 16)) for text in found}
        self._free = (character for character in map(chr, PRIVATE_USE) if character not in used)
        self._stands_for: dict[str, str] = {}
        self._hidden_as: dict[str, str] = {}
        self.mark = self._take("")

    def _take(self, character: str) -> str:
        stand_in = next(self._free, None)
        if stand_in is None:
            raise RequestError("the messages use every private-use character; none is left to mark control text with")
        self._stands_for[stand_in] = character
        return stand_in

    def _stand_in(self, character: str) -> str:
        if character not in self._hidden_as:
            self._hidden_as[character] = self._take(character)
        return self._hidden_as[character]

    def hide(self, value: Any, keep: tuple[str, ...] = (), depth: int = DEEPEST) -> Any:
        """A copy of a message, tool or other JSON value in which no control text is whole, `keep` apart."""
        if depth == 0:
            raise RequestError(f"messages and tools may be {DEEPEST} levels deep")
        if isinstance(value, str):
            return self._hide_text(value, keep)
        if isinstance(value, dict):
            return {self.hide(k, keep, depth - 1): self.hide(v, keep, depth - 1) for k, v in value.items()}
        if isinstance(value, (list, tuple)):
            return [self.hide(v, keep, depth - 1) for v in value]
        return value

    def hide_message(self, message: dict[str, Any]) -> dict[str, Any]:
        """Roles stay as they are: templates compare them."""
        keep = dict.fromkeys(WORDS, THINK_TAGS) if message["role"] in TRUSTED_ROLES else {}
        return {k: v if k == "role" else self.hide(v, keep.get(k, ())) for k, v in message.items()}

    def _hide_text(self, text: str, keep: tuple[str, ...]) -> str:
        while places := [place for place, token in self.controls.places(text) if token.content not in keep]:
            text = self._exchange(text, places)
        if begun := self.controls.begun(text):
            text = self._exchange(text, [len(text) - begun])
        if self.controls.ended(text):
            text = self._exchange(text, [0])
        return text

    def _exchange(self, text: str, places: list[int]) -> str:
        parts, done = [], 0
        for place in places:
            parts += [text[done:place], self._stand_in(text[place])]
            done = place + 1
        return "".join([*parts, text[done:]])

    def reveal(self, text: str) -> str:
        """The text as it was written, also where a template wrote JSON with \\uXXXX escapes."""
        for stand_in, character in self._stands_for.items():
            text = text.replace(stand_in, character).replace(f"\\u{ord(stand_in):04x}", json.dumps(character)[1:-1])
        return text
