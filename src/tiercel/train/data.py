"""From a file to rows: examples, their tokens, and which of them are learned; packed, shuffled, the same every time.

    {"messages": [{"role": "user", "content": …}, …]}      a conversation, through the model's chat template
    {"messages": […], "tools": […]}                        with schemas of functions: a list, or its JSON as a string
    {"text": …}                                            a document
    {"tokens": […], "mask": […]}                           as it is; mask: which tokens are learned, all without one

A message that is not to be learned has `"weight": 0` (OpenAI's fine-tuning format) or another of `MARKS`.
One example a line.  `Documents` hold all tokens in one array; `Batches` gives rows of them, by seed and epoch.
"""

from __future__ import annotations

import json
from bisect import bisect_left, insort
from collections.abc import Callable, Iterable, Iterator, Sequence
from dataclasses import dataclass, field
from pathlib import Path
from typing import Any

import numpy as np
import torch
from torch import Tensor

from tiercel.errors import FormatError, RequestError
from tiercel.model.varlen import VarlenBatch
from tiercel.tokenizer.tokenizer import Tokenizer
from tiercel.train import parallel

OPEN_ROWS = 256  # rows that still have room while a new epoch is laid out
ROLES = ("system", "user", "assistant", "tool")
SAME_ROLES = {"developer": "system"}
# fields of a message that say whether it is learned: 0 or false, 1 or true (OpenAI, axolotl, ms-swift, and others)
MARKS = ("weight", "train", "trainable", "training", "loss", "loss_mask", "learn", "mask")
INVERSE_MARKS = ("masked", "ignore")


# ── examples ─────────────────────────────────────────────────────────────────────────────────────────────


def read_jsonl(path: str | Path) -> Iterator[dict[str, Any]]:
    """Examples, one a line; FormatError names the file and line of the first that is none."""
    for _, example in numbered(path):
        yield example


def numbered(path: str | Path) -> Iterator[tuple[int, dict[str, Any]]]:
    path = Path(path)
    try:
        with path.open("rb") as file:
            for number, line in enumerate(file, 1):
                if line.strip():
                    yield number, _example(line, f"{path}:{number}")
    except OSError as error:
        raise FormatError(f"{path} cannot be read: {error.strerror}") from error


def _example(line: bytes, where: str) -> dict[str, Any]:
    try:
        example = json.loads(line)
    except (ValueError, RecursionError) as error:
        raise FormatError(f"{where}: not JSON: {error}") from None
    if not isinstance(example, dict) or not {"messages", "text", "tokens"} & set(example):
        raise FormatError(
            f'{where}: an example is {{"messages": […]}} or {{"text": …}}, not {line[:60].decode(errors="replace")!r}'
        )
    if "text" in example and not isinstance(example["text"], str):
        raise FormatError(f"{where}: text must be a string, not {example['text']!r:.40}")
    if "tokens" in example:
        _check_tokens(example, where)
    if "messages" in example:
        example["messages"] = [_message(message, where) for message in _list(example["messages"], where)]
        example["tools"] = _tools(example.get("tools"), where)
    return example


def _check_tokens(example: dict[str, Any], where: str) -> None:
    tokens, mask = example["tokens"], example.get("mask")
    whole = isinstance(tokens, list) and all(type(t) is int and 0 <= t < 1 << 31 for t in tokens)
    if not whole or not (mask is None or (isinstance(mask, list) and len(mask) == len(tokens))):
        raise FormatError(f"{where}: tokens must be whole numbers, and mask as many 0 and 1")


def _list(messages: Any, where: str) -> list[Any]:
    if not isinstance(messages, list) or not messages:
        raise FormatError(f"{where}: messages must be a list of at least one")
    return messages


def _message(message: Any, where: str) -> dict[str, Any]:
    """Return a message with its role by our name, text for content that is null, and its mark as `learn`, if any."""
    role = message.get("role") if isinstance(message, dict) else None
    role = SAME_ROLES.get(role, role) if isinstance(role, str) else None
    if role not in ROLES:
        raise FormatError(f"{where}: a message needs a role of {', '.join(ROLES)}, not {message!r:.60}")
    if "content" not in message and not message.get("tool_calls"):
        raise FormatError(f"{where}: a message needs content, not {message!r:.60}")
    found = {**message, "role": role, "content": _content(message.get("content"), where)}
    learned = [_mark(name, found.pop(name), where) for name in (*MARKS, *INVERSE_MARKS) if name in found]
    for name, value in found.items():
        if isinstance(value, (bool, int, float)):
            raise FormatError(
                f"{where}: the message's field {name!r} ({value}) is not known, and may say what is learned: "
                f"write it as weight, or take it out"
            )
    return found | ({"learn": all(learned)} if learned else {})


def _content(content: Any, where: str) -> str:
    """Return a message's text; null is empty, parts of text are joined."""
    if content is None or isinstance(content, str):
        return content or ""
    if isinstance(content, list) and all(isinstance(p, dict) and isinstance(p.get("text"), str) for p in content):
        return "".join(part["text"] for part in content)
    raise FormatError(f"{where}: a message needs content that is a string or parts of text, not {content!r:.60}")


def _mark(name: str, value: Any, where: str) -> bool:
    if not isinstance(value, (bool, int, float)) or value not in (0, 1):
        raise FormatError(f"{where}: the message's {name} must be 0 or 1, not {value!r:.40}")
    return bool(value) != (name in INVERSE_MARKS)


def _tools(tools: Any, where: str) -> list[dict[str, Any]] | None:
    if isinstance(tools, str):
        try:
            tools = json.loads(tools)
        except (ValueError, RecursionError) as error:
            raise FormatError(f"{where}: tools is a string that is not JSON: {error}") from None
    if tools is not None and not (isinstance(tools, list) and all(isinstance(tool, dict) for tool in tools)):
        raise FormatError(f"{where}: tools must be a list of schemas, not {tools!r:.60}")
    return tools or None


def read_documents(
    path: str | Path,
    tokenizer: Tokenizer | None,
    *,
    learn: Sequence[str] = ("assistant",),
    progress: Callable[[int], None] | None = None,
) -> Documents:
    """All examples of a file as tokens.  learn: the roles whose words are learned, or ("all",) for every token.

    RequestError or FormatError, with the line's number, for what the template refuses.
    """

    def made() -> Iterator[tuple[Sequence[int], Sequence[int]]]:
        for number, example in numbered(path):
            try:
                yield tokenize(example, tokenizer, learn)
            except (RequestError, FormatError) as error:
                raise FormatError(f"{path}:{number}: {error}") from None
            if progress is not None:
                progress(1)

    return Documents.of(made(), str(path))


def tokenize(example: dict[str, Any], tokenizer: Tokenizer | None, learn: Sequence[str]) -> tuple[list[int], list[int]]:
    """Tokens of an example, and for each 1 where it is learned."""
    if "tokens" in example:
        return example["tokens"], list(map(int, example.get("mask") or [1] * len(example["tokens"])))
    if tokenizer is None:
        raise RequestError("text needs a tokenizer: name one with --tokenizer, or give the lines as tokens")
    if "text" in example:
        tokens = tokenizer.encode(example["text"], bos=None)
        end = tokenizer.id_of(tokenizer.names.get("eos_token", ""))
        tokens = tokens if end is None or tokens[-1:] == [end] else [*tokens, end]
        return tokens, [1] * len(tokens)
    return _conversation(example["messages"], example.get("tools"), tokenizer, learn)


def _conversation(
    messages: list[dict[str, Any]], tools: list[dict[str, Any]] | None, tokenizer: Tokenizer, learn: Sequence[str]
) -> tuple[list[int], list[int]]:
    """What the template makes of it; a message's words are what it adds after the words that announce it."""
    marks = [message.get("learn") for message in messages]
    messages = [{name: value for name, value in message.items() if name != "learn"} for message in messages]
    tokens = tokenizer.chat(messages, tools=tools, add_generation_prompt=False)
    everything = "all" in learn
    mask = [int(everything)] * len(tokens)
    for i, (message, mark) in enumerate(zip(messages, marks, strict=True)):
        wanted = (everything or message["role"] in learn) and mark is not False
        if wanted == everything:  # as the mask has it already
            continue
        before, prompted = messages[:i], message["role"] == "assistant"
        start = tokenizer.chat(before, tools=tools, add_generation_prompt=prompted) if before else []
        stop = (
            tokens
            if i + 1 == len(messages)
            else tokenizer.chat(messages[: i + 1], tools=tools, add_generation_prompt=False)
        )
        if tokens[: len(start)] != start or tokens[: len(stop)] != stop:
            raise RequestError(
                f"the chat template writes message {i + 1} differently when others follow: give one answer an example"
            )
        mask[len(start) : len(stop)] = [int(wanted)] * (len(stop) - len(start))
    if not any(mask):
        raise RequestError(f"no message of {', '.join(learn)} to learn from")
    return tokens, mask


# ── documents ────────────────────────────────────────────────────────────────────────────────────────────


@dataclass
class Documents:
    """All examples one after another: tokens and mask (N,), and where each begins (documents + 1,)."""

    tokens: np.ndarray
    mask: np.ndarray
    starts: np.ndarray
    left_out: int = 0  # examples that were too long for a row

    def __len__(self) -> int:
        return len(self.starts) - 1

    @classmethod
    def of(cls, examples: Iterable[tuple[Any, Any]], where: str = "the data") -> Documents:
        """Collect (tokens, mask) pairs, mask 1 where a token is learned; drop those of fewer than two tokens."""
        tokens, masks, lengths = [], [], []
        for ids, mask in examples:
            if len(ids) > 1:
                tokens.append(np.asarray(ids, np.int32))
                masks.append(np.asarray(mask, np.uint8))
                lengths.append(len(ids))
        if not tokens:
            raise FormatError(f"{where} holds no examples")
        return cls(np.concatenate(tokens), np.concatenate(masks), np.concatenate([[0], np.cumsum(lengths)]))

    @classmethod
    def joined(cls, several: Sequence[Documents]) -> Documents:
        """The documents of several, one after another."""
        tokens, mask = (np.concatenate([getattr(d, name) for d in several]) for name in ("tokens", "mask"))
        starts = [np.zeros(1, np.int64)]
        for documents in several:
            starts.append(documents.starts[1:] + starts[-1][-1])
        return cls(tokens, mask, np.concatenate(starts), sum(d.left_out for d in several))

    def part(self, numbers: Sequence[int]) -> Documents:
        """The documents of these numbers."""
        spans = [(self.starts[i], self.starts[i + 1]) for i in numbers]
        return Documents.of((self.tokens[a:b], self.mask[a:b]) for a, b in spans)

    def fit_rows(self, length: int, *, cut: bool) -> Documents:
        """Documents of at most `length` tokens.  cut: longer ones become several; otherwise they are left out."""
        if not cut:
            fits = np.diff(self.starts) <= length
            if fits.all():
                return self
            if not fits.any():
                raise RequestError(
                    f"no example fits --length {length}; the shortest has {int(np.diff(self.starts).min())} tokens"
                )
            kept = Documents.of(
                (self.tokens[a:b], self.mask[a:b])
                for a, b, fit in zip(self.starts[:-1], self.starts[1:], fits, strict=True)
                if fit
            )
            return Documents(kept.tokens, kept.mask, kept.starts, left_out=int((~fits).sum()))
        starts = [np.arange(a, b, length) for a, b in zip(self.starts[:-1], self.starts[1:], strict=True)]
        return Documents(self.tokens, self.mask, np.concatenate([*starts, self.starts[-1:]]))


# ── rows ─────────────────────────────────────────────────────────────────────────────────────────────────


@dataclass
class Rows:
    """A micro-batch: B rows of L tokens, where their documents begin, and which tokens are predicted.

    counted_T: flat positions whose next token counts;  targets_T: those next tokens, one for each.
    """

    tokens_BL: Tensor
    batch: VarlenBatch
    counted_T: Tensor
    targets_T: Tensor
    count: int
    notes: dict[str, float] = field(default_factory=dict, kw_only=True)  # further numbers for the log

    def to(self, device: torch.device | str, *, recompute: bool = False) -> Rows:
        self.batch.recompute = recompute
        if torch.device(device).type == "cpu":
            return self

        def move(t: Tensor) -> Tensor:
            return t.pin_memory().to(device, non_blocking=True)

        return Rows(move(self.tokens_BL), self.batch.to(device), move(self.counted_T), move(self.targets_T), self.count)


def make_rows(documents: Documents, rows: Sequence[Sequence[int]], length: int) -> Rows:
    """Rows (B, length) from numbers of documents; what is left of a row is a document of zeros that does not count."""
    tokens = np.zeros(len(rows) * length, np.int64)
    starts, learned = np.zeros(len(tokens), bool), np.zeros(len(tokens), bool)  # learned: as what comes next
    numbers = np.array([number for row in rows for number in row], np.int64)
    lengths = documents.starts[numbers + 1] - documents.starts[numbers]
    before = np.cumsum(lengths) - lengths
    row_of = np.repeat(np.arange(len(rows)), [len(row) for row in rows])
    filled = np.bincount(row_of, lengths, len(rows)).astype(np.int64)
    first = before + row_of * length - (np.cumsum(filled) - filled)[row_of]  # where each document goes
    each = np.arange(int(lengths.sum()))
    source = np.repeat(documents.starts[numbers] - before, lengths) + each
    target = np.repeat(first - before, lengths) + each
    tokens[target] = documents.tokens[source]
    starts[first] = True
    learned[target] = documents.mask[source]
    learned[first] = False  # nothing comes before it
    learned = np.append(learned[1:], False)
    starts[(np.arange(len(rows)) * length + filled)[filled < length]] = True
    counted = np.flatnonzero(learned)
    tokens_BL, starts_BL = (torch.from_numpy(a).view(len(rows), length) for a in (tokens, starts))
    targets_T = torch.from_numpy(tokens[counted + 1])
    return Rows(tokens_BL, VarlenBatch(starts_BL), torch.from_numpy(counted), targets_T, len(counted))


def pack(lengths: np.ndarray, order: np.ndarray, length: int) -> list[list[int]]:
    """Documents into rows, best fit: each into the fullest open row that still has room for it."""
    rows: list[list[int]] = []
    room: list[tuple[int, int]] = []  # (tokens left, row), sorted
    for number in order.tolist():
        need = int(lengths[number])
        at = bisect_left(room, (need, -1))
        if at < len(room):
            left, row = room.pop(at)
        else:
            left, row = length, len(rows)
            rows.append([])
            if len(room) == OPEN_ROWS:
                room.pop(0)
        rows[row].append(number)
        if left - need > 1:
            insort(room, (left - need, row))
    return rows


class Batches:
    """An endless iterator of `Rows`: every epoch all documents, in an order that follows from seed and epoch.

    position: (epoch, batch of it) of the next; may be set, to go on from there.
    """

    def __init__(self, documents: Documents, *, rows: int, length: int, seed: int = 0, shuffle: bool = True) -> None:
        self.documents, self.rows, self.length, self.seed, self.shuffle = documents, rows, length, seed, shuffle
        longest = int(np.diff(documents.starts).max())
        if longest > length:
            raise RequestError(f"an example of {longest} tokens does not fit a row of {length}")
        self.position = (0, 0)
        self._laid_out: tuple[int, list[list[int]]] | None = None

    def layout(self, epoch: int) -> list[list[int]]:
        """Which documents are in which row of an epoch."""
        if self._laid_out is None or self._laid_out[0] != epoch:
            random = np.random.default_rng((self.seed, epoch))
            order = random.permutation(len(self.documents)) if self.shuffle else np.arange(len(self.documents))
            rows = pack(np.diff(self.documents.starts), order, self.length)
            if self.shuffle:  # the rows that are filled late hold the short documents
                rows = [rows[i] for i in random.permutation(len(rows))]
            self._laid_out = epoch, rows
        return self._laid_out[1]

    @property
    def per_epoch(self) -> int:
        """Batches of the first epoch; others may have a few more or less."""
        return -(-len(self.layout(0)) // self.rows)

    def __iter__(self) -> Batches:
        return self

    def __next__(self) -> Rows:
        epoch, at = self.position
        rows = self.layout(epoch)
        chosen = rows[at * self.rows : (at + 1) * self.rows]
        self.position = (epoch, at + 1) if (at + 1) * self.rows < len(rows) else (epoch + 1, 0)
        chosen = chosen + [[]] * (self.rows - len(chosen))  # one shape throughout: what is compiled stays so
        return make_rows(self.documents, parallel.share(chosen), self.length)

    def once(self) -> Iterator[Rows]:
        """One epoch, for evaluation."""
        rows = self.layout(0)
        for at in range(0, len(rows), self.rows):
            chosen = rows[at : at + self.rows]
            ranks = parallel.ranks().count
            chosen = chosen + [[]] * (-len(chosen) % ranks)  # every rank takes part in every forward
            yield make_rows(self.documents, parallel.share(chosen), self.length)
