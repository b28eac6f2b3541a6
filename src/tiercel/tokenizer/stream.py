"""Token ids → text as it comes: never half a character, and reasoning apart from the answer.

A token stands for bytes, not for characters: an emoji may arrive in four pieces.  Bytes go through an incremental
UTF-8 decoder, which keeps an unfinished character; every byte is looked at once, so a token costs the same at the
end of a long answer as at its start.

    thinking="auto"   a block opens with <think>: as a token of its own anywhere, as plain text only at the start of
                      the answer (later it is something the model talks about); it closes with </think>
             "off"    no block is looked for: plain tags are text, control tokens are dropped as in `decode`

The pieces joined are `decode` of all ids, without the tags that opened and closed a block.
"""

from __future__ import annotations

import codecs
from collections.abc import Callable, Sequence
from dataclasses import dataclass

from tiercel.errors import RequestError

THINKING = ("auto", "off")


@dataclass(frozen=True)
class Piece:
    kind: str  # "text" or "thinking"
    text: str


class TextStream:
    """Made by `Tokenizer.stream`.

    piece: id → its bytes (None: `decode` is asked instead, for the rare tokenizers whose tokens are words)
    skipped: ids that `decode` drops
    tags: what opens and closes a block, and their ids where they are tokens
    """

    def __init__(
        self,
        piece: Callable[[int], bytes] | None,
        decode: Callable[[Sequence[int]], str],
        *,
        skipped: frozenset[int] = frozenset(),
        drop_space: bool = False,
        tags: tuple[str, str] = ("<think>", "</think>"),
        tag_ids: tuple[int | None, int | None] = (None, None),
        thinking: str = "auto",
        starts_in_thinking: bool = False,
    ) -> None:
        if thinking not in THINKING:
            raise RequestError(f"thinking is {' or '.join(map(repr, THINKING))}, not {thinking!r}")
        self._letters = _Bytes(piece, drop_space) if piece is not None else _Words(decode)
        self._skipped = skipped
        self._opens, self._closes = tag_ids if thinking == "auto" else (None, None)
        self._open, self._close = tags
        self._apart = thinking == "auto"
        self._inside = self._apart and starts_in_thinking
        self._start = self._apart and not starts_in_thinking  # nothing but space has come yet
        self._held = ""  # may be the beginning of a tag
        self._space: list[str] = []  # space before the first word: a block may still open
        self._finished = False

    @property
    def in_thinking(self) -> bool:
        """Whether the next text is reasoning."""
        return self._inside

    @property
    def undecided(self) -> bool:
        """Whether nothing but space, or the beginning of an opening tag, has come: a block may still open."""
        return self._start

    @property
    def held(self) -> str:
        """The end of the text so far, where it may be the beginning of a tag."""
        return self._held

    def push(self, id: int) -> list[Piece]:
        """The text that this token completes; [] while it completes none."""
        if self._finished:
            raise RequestError("this stream is finished; start another one")
        if id == self._opens:
            return self._turn(inside=True)
        if id == self._closes and self._inside:
            return self._turn(inside=False)
        if id in self._skipped:
            return []
        return self._sort(self._letters.push(id))

    def finish(self) -> list[Piece]:
        """What was held back: an unfinished character as U+FFFD, and what looked like a tag."""
        if self._finished:
            return []
        pieces = self._sort(self._letters.finish())
        self._finished = True
        return _joined([*pieces, *self._release()])

    def _turn(self, inside: bool) -> list[Piece]:
        """A tag that is a token: what came before it is complete."""
        pieces = [*self._sort(self._letters.finish()), *self._release()]
        self._inside, self._start = inside, False
        return _joined(pieces)

    def _release(self) -> list[Piece]:
        text = "".join(self._space) + self._held
        self._space, self._held = [], ""
        return self._piece(text)

    def _piece(self, text: str) -> list[Piece]:
        return [Piece("thinking" if self._inside else "text", text)] if text else []

    def _sort(self, text: str) -> list[Piece]:
        """Assign text to reasoning or answer."""
        if not text:
            return []
        if self._start:
            return self._sort_start(text)
        if self._inside:
            return self._sort_inside(text)
        return self._piece(text)

    def _sort_start(self, text: str) -> list[Piece]:
        if not self._held:
            word = text.lstrip()
            self._space.append(text[: len(text) - len(word)])
            text = word
        self._held += text
        if self._open.startswith(self._held) and self._held != self._open:
            return []
        held, self._held, self._start = self._held, "", False
        if held.startswith(self._open):
            before = self._release()
            self._inside = True
            return _joined([*before, *self._sort(held[len(self._open) :])])
        space, self._space = "".join(self._space), []
        return self._piece(space + held)

    def _sort_inside(self, text: str) -> list[Piece]:
        text = self._held + text
        before, tag, after = text.partition(self._close)
        if not tag:
            self._held = _beginning_of(self._close, text)
            return self._piece(text[: len(text) - len(self._held)])
        self._held = ""
        reasoning = self._piece(before)
        self._inside = False
        return [*reasoning, *self._piece(after)]


class _Bytes:
    """Tokens are bytes; UTF-8 puts them together."""

    def __init__(self, piece: Callable[[int], bytes], drop_space: bool) -> None:
        self._piece, self._drop_space = piece, drop_space
        self._utf8 = codecs.getincrementaldecoder("utf-8")(errors="replace")

    def push(self, id: int) -> str:
        return self._first(self._utf8.decode(self._piece(id)))

    def finish(self) -> str:
        text = self._first(self._utf8.decode(b"", final=True))
        self._utf8.reset()
        return text

    def _first(self, text: str) -> str:
        """Sentencepiece writes a space before the first word, which is not the text's own."""
        if text and self._drop_space:
            self._drop_space = False
            return text.removeprefix(" ")
        return text


class _Words:
    """Tokens are words whose spacing depends on their neighbours: decode a short window, twice.

    What is certain is what the window with the new token has beyond the window without it.
    """

    WINDOW = 8

    def __init__(self, decode: Callable[[Sequence[int]], str]) -> None:
        self._decode = decode
        self._ids: list[int] = []
        self._before = ""

    def push(self, id: int) -> str:
        self._ids.append(id)
        text = self._decode(self._ids)
        if text.endswith("\ufffd") or not text.startswith(self._before):
            return ""
        new = text[len(self._before) :]
        self._ids = self._ids[-self.WINDOW :]
        self._before = self._decode(self._ids)
        return new

    def finish(self) -> str:
        new = self._decode(self._ids)[len(self._before) :] if self._ids else ""
        self._before = self._decode(self._ids)
        return new


def _beginning_of(tag: str, text: str) -> str:
    """The longest end of text that a tag may begin with."""
    for length in range(min(len(text), len(tag) - 1), 0, -1):
        if tag.startswith(text[-length:]):
            return text[-length:]
    return ""


def _joined(pieces: list[Piece]) -> list[Piece]:
    """Neighbours of one kind as one."""
    joined: list[Piece] = []
    for piece in pieces:
        if joined and joined[-1].kind == piece.kind:
            joined[-1] = Piece(piece.kind, joined[-1].text + piece.text)
        else:
            joined.append(piece)
    return joined
