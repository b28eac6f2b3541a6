"""Streams: whole characters only, thoughts apart from the answer, and together exactly what decode gives."""

from __future__ import annotations

import json
from functools import cache
from pathlib import Path
from tempfile import TemporaryDirectory
from typing import Any

import pytest
from hypothesis import given, settings
from hypothesis import strategies as st

from growth import ratio
from hard_strings import HARD
from small_tokenizers import TAGS, byte_level, sentencepiece
from tiercel.errors import RequestError
from tiercel.tokenizer.tokenizer import Tokenizer

OPEN, CLOSE = "<think>", "</think>"


@cache
def make(kind: str) -> Tokenizer:
    """ "llama-bpe": tags are tokens, not flagged; "flagged"; "untagged": tags are letters like others."""
    source = json.loads(json.dumps(sentencepiece(kind) if kind in ("always", "first", "never") else byte_level()))
    if kind == "flagged":
        source["added_tokens"] = [entry | {"special": True} for entry in source["added_tokens"]]
    if kind == "untagged":
        source["added_tokens"] = [entry for entry in source["added_tokens"] if entry["content"] not in TAGS]
    with TemporaryDirectory() as folder:
        Path(folder, "tokenizer.json").write_text(json.dumps(source))
        tokenizer = Tokenizer.from_folder(folder)
    assert tokenizer is not None
    return tokenizer


def spell(tokenizer: Tokenizer, string: str) -> list[int]:
    """One id per byte: every border that tokens could have."""
    return [id for byte in string.encode() for id in [_byte(tokenizer, byte)]]


@cache
def _bytes(kind: str) -> dict[bytes, int]:
    tokenizer = make(kind)
    return {tokenizer.piece(id): id for id in reversed(range(tokenizer.vocab_size)) if len(tokenizer.piece(id)) == 1}


def _byte(tokenizer: Tokenizer, byte: int) -> int:
    return next(
        _bytes(k)[bytes([byte])] for k in ("untagged", "llama-bpe", "flagged", "always") if make(k) is tokenizer
    )


def run(tokenizer: Tokenizer, ids: list[int], **options: Any) -> tuple[str, str]:
    """(thoughts, answer)."""
    stream = tokenizer.stream(**options)
    pieces = [piece for id in ids for piece in stream.push(id)] + stream.finish()
    assert all(piece.text for piece in pieces)
    joined = {kind: "".join(p.text for p in pieces if p.kind == kind) for kind in ("thinking", "text")}
    assert {p.kind for p in pieces} <= set(joined)
    return joined["thinking"], joined["text"]


@pytest.mark.parametrize("kind", ["llama-bpe", "flagged", "untagged", "always", "first", "never"])
def test_a_stream_gives_what_decode_gives(kind: str) -> None:
    tokenizer = make(kind)
    for string in HARD:
        for special in (False, True):
            ids = tokenizer.encode(string, special=special)
            assert run(tokenizer, ids, thinking="off") == ("", tokenizer.decode(ids))


@settings(max_examples=300, deadline=None)
@given(st.lists(st.integers(0, 699), max_size=40))
def test_any_ids_at_all_stream_as_they_decode(ids: list[int]) -> None:
    tokenizer = make("llama-bpe")
    assert run(tokenizer, ids, thinking="off") == ("", tokenizer.decode(ids))


@settings(max_examples=300, deadline=None)
@given(st.text(max_size=20), st.data())
def test_however_a_text_is_split_no_half_character_comes_out(string: str, data: st.DataObject) -> None:
    tokenizer = make("untagged")
    cuts = sorted(data.draw(st.lists(st.integers(0, len(string)), max_size=4)))
    parts = [string[a:b] for a, b in zip([0, *cuts], [*cuts, len(string)], strict=True)]
    ids = [id for n, part in enumerate(parts) for id in (spell(tokenizer, part) if n % 2 else tokenizer.encode(part))]
    stream, seen = tokenizer.stream(thinking="off"), ""
    for id in ids:
        for piece in stream.push(id):
            seen += piece.text
            assert string.startswith(seen)
    assert seen + "".join(piece.text for piece in stream.finish()) == string


def test_an_emoji_appears_when_its_last_byte_is_there() -> None:
    tokenizer = make("untagged")
    stream = tokenizer.stream()
    counts = [len(stream.push(id)) for id in spell(tokenizer, "🙂")]
    assert counts == [0, 0, 0, 1]


def test_an_unfinished_character_ends_as_a_replacement() -> None:
    tokenizer = make("untagged")
    ids = spell(tokenizer, "a🙂")[:-1]
    assert run(tokenizer, ids) == ("", "a\ufffd") == ("", tokenizer.decode(ids))


# thoughts


THOUGHT, ANSWER = "\nhm é 🙂 < </thin\n", "\n\nYes <b>!"
STREAMS = [  # name, what the model writes, opened by the template, thoughts, answer
    ("opened by the model", OPEN + THOUGHT + CLOSE + ANSWER, False, THOUGHT, ANSWER),
    ("opened after a blank line", "\n " + OPEN + THOUGHT + CLOSE + ANSWER, False, THOUGHT, "\n " + ANSWER),
    ("opened by the template", THOUGHT + CLOSE + ANSWER, True, THOUGHT, ANSWER),
    ("never closed", OPEN + THOUGHT, False, THOUGHT, ""),
    ("opened by the template, never closed", THOUGHT, True, THOUGHT, ""),
    ("no block", ANSWER, False, "", ANSWER),
    ("nothing", "", False, "", ""),
    ("only space", " \n ", False, "", " \n "),
    ("half a tag at the end", OPEN + "a</thi", False, "a</thi", ""),
    ("half a tag and no more", "<thi", False, "", "<thi"),
    ("almost a tag", "<thinks>no</think>", False, "", "<thinks>no</think>"),
    ("empty thoughts", OPEN + CLOSE + "a", False, "", "a"),
    ("a tool call after the thoughts", OPEN + "x" + CLOSE + '{"name": "f"}', False, "x", '{"name": "f"}'),
    ("talking about tags", "Use <think>x</think> for it", False, "", "Use <think>x</think> for it"),
]


@pytest.mark.parametrize(("name", "words", "opened", "reasoning", "answer"), STREAMS, ids=[s[0] for s in STREAMS])
def test_thoughts_are_apart_from_the_answer(name: str, words: str, opened: bool, reasoning: str, answer: str) -> None:
    text = make("untagged")
    for ids in (text.encode(words), spell(text, words)):
        assert run(text, ids, starts_in_thinking=opened) == (reasoning, answer)
    assert run(text, text.encode(words), thinking="off", starts_in_thinking=opened) == ("", words)
    for kind in ("llama-bpe", "flagged", "never"):  # tags are tokens
        tagged = make(kind)
        found = run(tagged, tagged.encode(words, special=True), starts_in_thinking=opened)
        if name == "almost a tag":
            assert found[1].startswith("<thinks>no")
        elif name == "talking about tags":
            assert found == ("x", "Use  for it"), "a token of its own is the model's doing"
        else:
            assert found == (reasoning, answer), kind


@settings(max_examples=300, deadline=None)
@given(st.text(alphabet="<>/think \né", max_size=12), st.text(alphabet="<>/think \né", max_size=12))
def test_any_thoughts_and_answer_are_told_apart(reasoning: str, answer: str) -> None:
    text = make("untagged")
    reasoning = reasoning.replace(CLOSE, "")
    inside = (reasoning + CLOSE).index(CLOSE)
    whole = OPEN + reasoning + CLOSE + answer
    expected = (reasoning[:inside], (reasoning + CLOSE)[inside + len(CLOSE) :] + answer)
    assert run(text, spell(text, whole)) == run(text, text.encode(whole)) == expected


def test_text_is_not_held_back_without_need() -> None:
    tokenizer = make("untagged")
    stream = tokenizer.stream()
    assert [p.text for id in spell(tokenizer, "Hi <b> ") for p in stream.push(id)] == list("Hi <b> ")
    stream = tokenizer.stream(starts_in_thinking=True)
    shown = "".join(p.text for id in spell(tokenizer, "a < b </th") for p in stream.push(id))
    assert shown == "a < b "
    assert stream.in_thinking
    assert "".join(p.text for id in spell(tokenizer, "ink>c") for p in stream.push(id)) == "c"
    assert not stream.in_thinking


def test_a_stream_that_goes_on_with_a_text_keeps_its_first_space() -> None:
    text = make("always")
    ids = text.encode("upon a time")
    assert run(text, ids) == ("", "upon a time")
    assert run(text, ids, continues=True) == ("", " upon a time")


def test_whether_the_prompt_opened_the_thoughts_is_seen_in_its_ids() -> None:
    for kind in ("untagged", "llama-bpe", "flagged", "always"):
        tokenizer = make(kind)
        assert tokenizer.opens_thinking(tokenizer.encode("assistant\n<think>\n", special=True))
        assert not tokenizer.opens_thinking(tokenizer.encode("assistant\n<think>x", special=True))
        assert not tokenizer.opens_thinking([])


def test_wrong_use_is_said() -> None:
    tokenizer = make("untagged")
    with pytest.raises(RequestError, match="'auto' or 'off'"):
        tokenizer.stream(thinking="maybe")
    stream = tokenizer.stream()
    assert stream.finish() == [] == stream.finish()
    with pytest.raises(RequestError, match="finished"):
        stream.push(1)


@pytest.mark.parametrize("words", ["x", " ", "<", "</think", "é"])
def test_a_token_costs_the_same_late_as_early(words: str) -> None:
    tokenizer = make("untagged")

    ids = spell(tokenizer, words)

    def push(count: int) -> None:
        stream = tokenizer.stream(starts_in_thinking="think" in words)
        for id in ids * count:
            stream.push(id)
        stream.finish()

    assert ratio(push, 2_000) < 24
