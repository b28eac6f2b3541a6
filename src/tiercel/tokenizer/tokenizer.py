"""Tokenizer: text to token ids and back, chat templates included.

    tokenizer = Tokenizer.from_folder(folder)    or Tokenizer.from_gguf(metadata); None: the checkpoint has no tokenizer
    tokenizer.encode("Hello")                    ids; `<|im_end|>` in it stays ten characters
    tokenizer.chat([{"role": "user", …}])        ids of a prompt: control tokens from the template, never from a message
    tokenizer.decode(ids)                        text without control tokens
    tokenizer.stream()                           the same, id by id

Merging and cutting are done by the `tokenizers` library.  Ours is what it leaves open: control tokens
(`control.py`), templates (`template.py`), streams (`stream.py`), and reading and writing the files (`vocab*.py`).
"""

from __future__ import annotations

import json
import operator
from collections.abc import Collection, Iterable, Sequence
from functools import cached_property
from pathlib import Path
from typing import Any

from tokenizers import Tokenizer as HFTokenizer

from tiercel.errors import RequestError
from tiercel.tokenizer import vocab_folder, vocab_gguf
from tiercel.tokenizer.control import THINK_TAGS, Controls, Disguise
from tiercel.tokenizer.library import FILLER, ask, fillers, open_tokenizer, without_prefix
from tiercel.tokenizer.stream import Piece, TextStream
from tiercel.tokenizer.template import check_messages, render, with_mark
from tiercel.tokenizer.template_needs import TemplateNeeds
from tiercel.tokenizer.vocab import ENDS, Recipe, kinds, space_prefix, steps_of

__all__ = ["Piece", "TextStream", "Tokenizer"]

UNLOCKED_CHARS = 4096  # from this length a text is tokenized without Python's lock
CHARS_PER_TOKEN = 8  # more than texts have; where one has still more, a longer beginning is read
CUT_TOKENS = 64  # at the end of a beginning that the rest of the text may change
TAIL = 16  # ids at the end of a prompt in which an open think tag is looked for


class Tokenizer:
    """A vocabulary, its chat template, and the tokens that mean something to a program.

    eos: ids that end an answer: what the checkpoint's files name as eos, eot and eom, and every control token whose
    text ends a turn or a document in the families we know (`vocab.ENDS`: `<|im_end|>`, `<|endoftext|>`, …), because
    many files name only one of the two.
    bos: the id that begins a text, if there is one.  vocab_size: the largest id + 1; a network may have more rows.
    """

    def __init__(self, recipe: Recipe) -> None:
        self.templates = dict(recipe.templates)
        self.names = dict(recipe.names)
        self._pre = recipe.pre
        self._added = vocab_folder.added_tokens(recipe.tokenizer)
        ids = vocab_folder.known_ids(recipe.tokenizer)
        self.vocab_size = max(ids.values(), default=-1) + 1
        written = "".join(self.templates.values())
        self._controls = Controls(token for token in self._added if token.steers(written))
        self._special = frozenset(token.id for token in self._added if token.special)
        self._fillers = fillers(recipe.tokenizer, self._added)
        self._tokenizer = open_tokenizer(self._plain_json(recipe.tokenizer))
        self._shape(recipe.tokenizer)
        self._front, self._back = self._around()
        self.bos = ids.get(self.names.get("bos_token", ""))
        ends = {token.id for token in self._controls.tokens.values() if token.content in ENDS}
        self.eos = frozenset({id for id in recipe.eos if id < 1 << 31} | ends)
        self._pieces: dict[int, bytes] = {}
        self._templates_needs: dict[str, TemplateNeeds] = {}
        self._by_byte: dict[int, list[int]] = {}

    @classmethod
    def from_folder(cls, path: str | Path) -> Tokenizer | None:
        """From a Hugging Face folder; None without a tokenizer.json.  Raises FormatError."""
        recipe = vocab_folder.from_folder(Path(path))
        return None if recipe is None else cls(recipe)

    @classmethod
    def from_gguf(cls, metadata: dict[str, Any]) -> Tokenizer | None:
        """From a GGUF file's metadata; None when it has no tokenizer.  Raises FormatError, UnsupportedError."""
        recipe = vocab_gguf.from_gguf(metadata)
        return None if recipe is None else cls(recipe)

    @staticmethod
    def why_none(path: str | Path) -> str:
        """One line: why `from_folder` gave None, and what to do."""
        return vocab_folder.why_none(Path(path))

    # text → ids

    def encode(self, text: str, *, special: bool = False, bos: bool | None = None) -> list[int]:
        """Ids of a text.

        special: control tokens in the text are those tokens; otherwise they are spelled out, character by character.
        bos: None puts around the text what the tokenizer puts there, False nothing, True at least the begin token.
        Raises RequestError for text that no tokenizer takes (half of a surrogate pair).
        """
        if bos and self.bos is None:
            raise RequestError("this tokenizer has no token that begins a text; leave bos out")
        _check_text(text)
        ids = self._sections(text) if special else self._section(text, first=True)
        if bos is False:
            return ids
        front = [self.bos] if bos and not self._front and self.bos is not None else self._front
        return [*front, *ids, *self._back]

    def encode_inside(self, text: str) -> list[int]:
        """Ids of text that goes on with other text; no control tokens."""
        return self._section(text, first=False, prefix=False)

    def beginning(self, text: str, max_tokens: int) -> str:
        """The text, or where it is far too long a beginning of it that has more than `max_tokens` tokens.

        What is cut off changes only the last tokens before the cut.
        """
        characters = CHARS_PER_TOKEN * (max_tokens + CUT_TOKENS)
        while characters < len(text):
            if len(self._section(text[:characters], first=True)) > max_tokens + CUT_TOKENS:
                return text[:characters]
            characters *= 4
        return text

    def _sections(self, text: str, disguise: Disguise | None = None, max_tokens: int | None = None) -> list[int]:
        """Control tokens as such, the text between them as text.

        Every stretch of text begins anew for a tokenizer that puts a space before one, as in `tokenizers` (for
        tokens found before normalization, as real control tokens are) and in llama.cpp.  With max_tokens it may end
        where there are more.
        """
        ids: list[int] = []
        for token, start, stop in self._controls.cut(text):
            if max_tokens is not None and len(ids) > max_tokens:
                break
            if token is not None:
                ids.append(token.id)
            else:
                plain = text[start:stop] if disguise is None else disguise.reveal(text[start:stop])
                if max_tokens is not None:
                    plain = self.beginning(plain, max_tokens - len(ids))
                ids += self._section(plain, first=start == 0)
        return ids

    def _section(self, text: str, first: bool, prefix: bool | None = None) -> list[int]:
        """Ids of plain text, no control token among them.

        A word that is spelled like a control token could still come out of the merges as that token; then it is cut.
        """
        if prefix is None:
            prefix = first or self._prefix == "always"
        tokenizer = self._tokenizer if prefix else self._inner
        if len(text) >= UNLOCKED_CHARS:
            (fast,) = ask(tokenizer.encode_batch_fast, [text], add_special_tokens=False)  # other threads run meanwhile
            ids: list[int] = fast.ids
            if self._controls.ids.isdisjoint(ids):
                return ids
        encoding = ask(tokenizer.encode, text, add_special_tokens=False)
        ids = list(encoding.ids)
        if self._controls.ids.isdisjoint(ids):
            return ids
        offsets = [span for id, span in zip(ids, encoding.offsets, strict=True) if id in self._controls.ids]
        place = next((start + 1 for start, stop in offsets if stop - start > 1), None)
        if place is None:
            return ids
        return self._section(text[:place], first, prefix) + self._section(text[place:], first=False, prefix=False)

    # ids → text

    def decode(self, ids: Iterable[int], *, special: bool = False) -> str:
        """Text of ids; control tokens are left out unless `special`.

        Bytes that are not UTF-8 become U+FFFD; ids from vocab_size on (rows that only pad a network) have no text.
        """
        numbers = [_id(id) for id in ids]
        kept = numbers if special else [id for id in numbers if id not in self._special]
        if self._kind == "words":
            return str(ask(self._tokenizer.decode, kept, skip_special_tokens=False))
        text = b"".join(map(self.piece, kept)).decode("utf-8", errors="replace")
        return text.removeprefix(" ") if self._drop_space else text

    def piece(self, id: int) -> bytes:
        """The bytes a token stands for; of an emoji, perhaps one quarter."""
        found = self._pieces.get(id)
        if found is None:
            found = self._pieces[id] = self._piece(id)
        return found

    def _piece(self, id: int) -> bytes:
        token = self._tokenizer.id_to_token(_id(id)) if id < self.vocab_size else None
        if token is None or token.startswith(FILLER):
            return b""
        if id in self._contents:
            return self._contents[id].encode("utf-8", errors="replace")
        if self._kind == "bytes" and all(character in BYTES for character in token):
            return bytes(BYTES[character] for character in token)
        if self._kind == "spaces":
            if self._byte_fallback and len(token) == 6 and token.startswith("<0x"):
                return _hex_byte(token)
            token = token.replace("▁", " ")
        return token.encode("utf-8", errors="replace")

    def stream(
        self,
        *,
        thinking: str = "auto",
        starts_in_thinking: bool = False,
        continues: bool = False,
        special: bool = False,
        shown: Collection[str] = (),
    ) -> TextStream:
        """A decoder to push ids into, one by one; see `stream.py`.

        thinking: "auto" separates reasoning from the answer, "off" does not.  starts_in_thinking: the prompt opened
        the block (`opens_thinking`).  continues: the ids go on with a text, whose first space is then its own.
        special: control tokens appear as their text.  shown: these do (the markers of tool calls).
        """
        visible = {self._ids[marker] for marker in shown if marker in self._ids}
        opening, closing = (self._ids.get(tag) for tag in THINK_TAGS)
        return TextStream(
            None if self._kind == "words" else self.piece,
            lambda ids: self.decode([id for id in ids if special or id not in self._special - visible], special=True),
            skipped=frozenset() if special else self._special - visible,
            drop_space=self._drop_space and not continues,
            tags=THINK_TAGS,
            tag_ids=(opening, closing),
            thinking=thinking,
            starts_in_thinking=starts_in_thinking,
        )

    def opens_thinking(self, ids: Sequence[int]) -> bool:
        """Whether a prompt ends with an open <think>, so that the model begins with reasoning."""
        return self.decode(ids[-TAIL:], special=True).rstrip().endswith(THINK_TAGS[0])

    @property
    def spells(self) -> bool:
        """Whether tokens are pieces of text, put together without regard to their neighbours."""
        return self._kind != "words"

    @cached_property
    def control_ids(self) -> frozenset[int]:
        """Tokens that steer a model and are not text, think tags among them."""
        return self._controls.ids | self._special

    def id_of(self, content: str) -> int | None:
        """The added token of this text, if there is one."""
        return self._ids.get(content)

    def starting_with(self, byte: int) -> list[int]:
        """The tokens, control tokens apart, that begin with this byte."""
        if not self._by_byte:
            for id in range(self.vocab_size):
                if id not in self.control_ids and (piece := self.piece(id)):
                    self._by_byte.setdefault(piece[0], []).append(id)
        return self._by_byte.get(byte, [])

    def end_of_thinking(self, begun: str = "") -> list[int]:
        """The ids that close a block of reasoning: the tag's own token, or its letters after those already `begun`."""
        close = self._ids.get(THINK_TAGS[1])
        if close is not None:
            return [close]
        return self.encode_inside(THINK_TAGS[1][len(begun) :])

    # conversations

    @property
    def has_template(self) -> bool:
        return "default" in self.templates

    def chat(
        self,
        messages: Sequence[dict[str, Any]],
        *,
        tools: Sequence[dict[str, Any]] | None = None,
        add_generation_prompt: bool = True,
        continue_final: bool = False,
        max_tokens: int | None = None,
        **template_kwargs: Any,
    ) -> list[int]:
        """Ids of a conversation, ready for the model to answer.

        tools: JSON schemas, for templates that know them.  continue_final: the last message is unfinished and the
        model goes on with it.  max_tokens: of a prompt with more only a beginning is encoded, with more than that.
        template_kwargs: what this template documents (`enable_thinking`, …).
        Raises RequestError when there is no template or it refuses, FormatError when the template misbehaves.
        """
        rendered, disguise = self._render(messages, tools, add_generation_prompt, continue_final, template_kwargs)
        return self._sections(rendered, disguise, max_tokens)

    def render(
        self,
        messages: Sequence[dict[str, Any]],
        *,
        tools: Sequence[dict[str, Any]] | None = None,
        add_generation_prompt: bool = True,
        continue_final: bool = False,
        **template_kwargs: Any,
    ) -> str:
        """The text of the prompt that `chat` would make: to look at, not to encode (that would trust it all)."""
        rendered, disguise = self._render(messages, tools, add_generation_prompt, continue_final, template_kwargs)
        return disguise.reveal(rendered)

    def _render(
        self,
        messages: Sequence[dict[str, Any]],
        tools: Sequence[dict[str, Any]] | None,
        add_generation_prompt: bool,
        continue_final: bool,
        template_kwargs: dict[str, Any],
    ) -> tuple[str, Disguise]:
        """The template's text, in which control texts of the messages are disguised."""
        template = self._template(bool(tools))
        conversation = list(map(self._needs(template).adapt, check_messages(messages)))
        disguise = Disguise(self._controls, conversation, tools, template_kwargs, template, self.names)
        hidden = [disguise.hide_message(message) for message in conversation]
        if continue_final:
            hidden[-1] = with_mark(hidden[-1], disguise.mark + " ")
        variables = {
            **self.names,
            "documents": None,
            **{key: disguise.hide(value) for key, value in template_kwargs.items()},
            "messages": hidden,
            "tools": disguise.hide(tools) or None,
            "add_generation_prompt": add_generation_prompt and not continue_final,
        }
        rendered = render(template, variables)
        _check_text(rendered)
        return (_until_mark(rendered, disguise.mark) if continue_final else rendered), disguise

    def _needs(self, template: str) -> TemplateNeeds:
        """What this template takes; found out once."""
        if template not in self._templates_needs:

            def tried(messages: list[dict[str, Any]]) -> str:
                fixed = {"documents": None, "tools": None, "add_generation_prompt": False}
                return render(template, {**self.names, **fixed, "messages": messages})

            self._templates_needs[template] = TemplateNeeds(tried)
        return self._templates_needs[template]

    def _template(self, with_tools: bool) -> str:
        name = "tool_use" if with_tools and "tool_use" in self.templates else "default"
        if name not in self.templates:
            raise RequestError(
                "this model has no chat template; give it a plain prompt: generate(...) in Python, "
                "`tiercel run MODEL --raw PROMPT` on the command line"
            )
        return self.templates[name]

    # files

    def save(self, folder: str | Path) -> None:
        """Writes tokenizer.json, tokenizer_config.json and the chat templates, for us and for transformers."""
        vocab_folder.to_folder(Recipe(self._json(), self.names, self.templates, set(self.eos)), Path(folder))

    def to_gguf(self, vocab_size: int | None = None) -> dict[str, Any]:
        """GGUF metadata that llama.cpp reads; `vocab_gguf.GGUF_TYPES` names the value types of two arrays.

        vocab_size: rows of the network's embedding, if there are more than tokens; the rest is padding.
        Raises UnsupportedError, with the reason, for a tokenizer llama.cpp would not reproduce.
        """
        rows = self.vocab_size if vocab_size is None else vocab_size
        if rows < self.vocab_size:
            raise RequestError(f"{self.vocab_size} tokens do not fit {rows} embedding rows")
        numbers = {name: self._tokenizer.token_to_id(text) for name, text in self.names.items()}
        return vocab_gguf.to_gguf(
            self._json(), self._added, rows, self._pre, lambda text: self.encode(text, bos=False)
        ) | vocab_gguf.settings(numbers, self.eos, self._front, self._back, self.templates)

    def _json(self) -> dict[str, Any]:
        """tokenizer.json as it was read: the flags that we set on control tokens are taken back."""
        tokenizer: dict[str, Any] = json.loads(self._tokenizer.to_str())
        for content in self._fillers:
            del tokenizer["model"]["vocab"][content]
        given = {token.content: token for token in self._added}
        for entry in tokenizer["added_tokens"]:
            entry["id"], entry["special"] = given[entry["content"]].id, given[entry["content"]].special
        return tokenizer

    # what the constructor learns

    def _plain_json(self, tokenizer: dict[str, Any]) -> dict[str, Any]:
        """Every control token flagged special: those the library can leave alone.

        Truncation and padding belong to training scripts, dropout too; here nothing is cut or left to chance.
        """
        steering = self._controls.ids
        added = [{**e, "special": e["id"] in steering} for e in tokenizer.get("added_tokens") or []]
        model = tokenizer["model"] | ({"dropout": None} if "dropout" in tokenizer["model"] else {})
        if self._fillers:
            model["vocab"] = model["vocab"] | self._fillers
        return {**tokenizer, "added_tokens": added, "model": model, "truncation": None, "padding": None}

    def _shape(self, tokenizer: dict[str, Any]) -> None:
        """How tokens become bytes, and where the tokenizer adds a space of its own."""
        steps = steps_of(tokenizer.get("decoder"), "decoders")
        names = kinds(tokenizer.get("decoder"))
        self._byte_fallback = "ByteFallback" in names
        spaces = {"ByteFallback", "Metaspace", "Replace"} & set(names)
        self._kind = "bytes" if "ByteLevel" in names else "spaces" if spaces else "words"
        self._prefix = space_prefix(tokenizer)
        strips = any(s.get("type") == "Strip" and s.get("content") == " " and s.get("start") == 1 for s in steps)
        self._drop_space = strips or ("Metaspace" in names and self._prefix != "never")
        self._contents = {token.id: token.content for token in self._added}
        self._ids = {token.content: token.id for token in self._added}

    def _around(self) -> tuple[list[int], list[int]]:
        """The ids that the post-processor puts before and after a text."""
        encoding = ask(self._tokenizer.encode, "a", add_special_tokens=True)
        marks = list(encoding.special_tokens_mask)
        own = marks.index(0) if 0 in marks else len(marks)
        end = len(marks) - marks[::-1].index(0) if 0 in marks else len(marks)
        return list(encoding.ids[:own]), list(encoding.ids[end:])

    @cached_property
    def _inner(self) -> HFTokenizer:
        """The same tokenizer for text that goes on: without the space that begins a text."""
        if self._prefix == "never":
            return self._tokenizer
        return open_tokenizer(without_prefix(json.loads(self._tokenizer.to_str())))


def _check_text(text: str) -> None:
    if not isinstance(text, str):
        raise RequestError(f"a text is str, not {type(text).__name__}")
    try:
        text.encode()
    except UnicodeEncodeError as error:
        raise RequestError(f"the text holds half of a surrogate pair at character {error.start}") from None


def _id(id: int) -> int:
    try:
        number = operator.index(id)
    except TypeError:
        raise RequestError(f"a token id is a whole number, not {id!r}") from None
    if number < 0:
        raise RequestError(f"a token id is not negative: {number}")
    return number


def _hex_byte(token: str) -> bytes:
    """<0x0A> → newline."""
    try:
        return bytes([int(token[3:5], 16)]) if token.endswith(">") else token.encode()
    except ValueError:
        return token.encode()


def _until_mark(rendered: str, mark: str) -> str:
    """Up to where the last message ends, as the template left that end."""
    place = rendered.rfind(mark)
    if place < 0:
        raise RequestError("the chat template leaves out the message that should be continued")
    trims = rendered[place : place + 2] != mark + " "
    return rendered[:place].rstrip() if trims else rendered[:place]


def _byte_alphabet() -> dict[str, int]:
    """GPT-2's: printable Latin-1 stands for itself, the other 68 bytes for U+0100 and on."""
    plain = [*range(33, 127), *range(161, 173), *range(174, 256)]
    others = [byte for byte in range(256) if byte not in plain]
    return {chr(byte): byte for byte in plain} | {chr(256 + place): byte for place, byte in enumerate(others)}


BYTES = _byte_alphabet()
