"""Words ⇄ ids: equal to the originals, the same after every file format, hostile files refused."""

from __future__ import annotations

import copy
import json
import os
import random
from contextlib import nullcontext
from pathlib import Path
from typing import Any

import pytest
from tokenizers import Regex, decoders, models, pre_tokenizers, processors, trainers
from tokenizers import Tokenizer as HFTokenizer
from transformers import AutoTokenizer, PreTrainedTokenizerFast

from growth import Calls, ratio
from hard_strings import HARD
from small_tokenizers import CONTROL, TAGS, byte_level, sentencepiece
from tiercel.errors import FormatError, RequestError, UnsupportedError
from tiercel.tokenizer.pre_tokenizers import PRE_TOKENIZERS
from tiercel.tokenizer.tokenizer import Tokenizer
from tiercel.tokenizer.vocab_gguf import GGUF_TYPES
from tiercel.weights.gguf import GGUFFile, Typed, write_gguf

GOLDEN = Path(__file__).parent / "golden"
BYTE_LEVEL = ["llama-bpe", "smollm", "gpt-2", "qwen2", "falcon", "default"]
PREFIXES = ["always", "first", "never"]
KINDS = [*BYTE_LEVEL, *PREFIXES]


def table(kind: str) -> dict[str, Any]:
    return copy.deepcopy(sentencepiece(kind) if kind in PREFIXES else byte_level(kind))


def write(folder: Path, tokenizer: dict[str, Any], **files: Any) -> Path:
    folder.mkdir(exist_ok=True)
    (folder / "tokenizer.json").write_text(json.dumps(tokenizer))
    for name, value in files.items():
        (folder / f"{name}.json").write_text(json.dumps(value))
    return folder


def text_of(folder: Path, source: dict[str, Any], **files: Any) -> Tokenizer:
    tokenizer = Tokenizer.from_folder(write(folder, source, **files))
    assert tokenizer is not None
    return tokenizer


# Equal to the originals


@pytest.mark.parametrize("kind", KINDS)
def test_ids_and_text_are_those_of_transformers(kind: str, tmp_path: Path) -> None:
    tokenizer = text_of(tmp_path, table(kind), tokenizer_config={"bos_token": "<s>", "eos_token": "</s>"})
    original = PreTrainedTokenizerFast(tokenizer_file=str(tmp_path / "tokenizer.json"))
    for string in HARD:
        ids = tokenizer.encode(string, special=True, bos=False)
        assert ids == original.encode(string, add_special_tokens=False), string
        plain = tokenizer.encode(string, bos=False)
        if not any(tag in string for tag in TAGS):  # transformers finds unflagged tags in anybody's text
            assert plain == original.encode(string, add_special_tokens=False, split_special_tokens=True), string
        assert tokenizer.decode(ids, special=True) == original.decode(ids, clean_up_tokenization_spaces=False), string


@pytest.mark.parametrize("kind", [k for k in KINDS if k != "qwen2"])
def test_what_is_encoded_comes_back(kind: str, tmp_path: Path) -> None:
    tokenizer = text_of(tmp_path, table(kind))
    for string in HARD:
        if kind == "first" and string.startswith(" "):
            continue  # this kind adds a space only where there is none, and so cannot tell
        assert tokenizer.decode(tokenizer.encode(string, bos=False)) == string


def test_smollm2_gives_the_ids_of_llama_cpp() -> None:
    gguf = pytest.importorskip("gguf")
    found = os.environ.get("TIERCEL_TEST_SMOLLM2")
    if not found:
        pytest.skip("TIERCEL_TEST_SMOLLM2 does not name the SmolLM2-135M-Instruct GGUF file")
    fields = gguf.GGUFReader(found).fields.items()
    tokenizer = Tokenizer.from_gguf({key: field.contents() for key, field in fields if key.startswith("tokenizer.")})
    assert tokenizer is not None
    rows = json.loads((GOLDEN / "smollm2_tokens.json").read_text())["rows"]
    assert len(rows) == len(HARD)
    for row in rows:
        assert tokenizer.encode(row["text"]) == row["plain"], row["text"]
        assert tokenizer.encode(row["text"], special=True) == row["special"], row["text"]
        assert tokenizer.decode(row["plain"]) == row["text"]


@pytest.mark.parametrize("name", ["tiny_bpe", "tiny_spm"])
def test_a_tiny_gguf_written_by_us_means_the_same_to_llama_cpp(name: str) -> None:
    golden = json.loads((GOLDEN / "tiny_tokens.json").read_text())[name]
    tokenizer = Tokenizer.from_gguf(golden["metadata"])
    assert tokenizer is not None
    assert len(golden["rows"]) == len(HARD)
    for row in golden["rows"]:
        assert tokenizer.encode(row["text"], bos=False) == row["plain"], row["text"]
        assert tokenizer.encode(row["text"], special=True, bos=False) == row["special"], row["text"]


# What is put around a text, and what ends one


def test_the_post_processor_says_what_stands_around_a_text(tmp_path: Path) -> None:
    """As in transformers 5, where add_bos_token and add_eos_token of a tokenizer.json do nothing."""
    names = {"bos_token": {"content": "<s>"}, "eos_token": "</s>"}
    plain = text_of(tmp_path / "a", table("llama-bpe"), special_tokens_map=names)
    assert plain.encode("a") == plain.encode("a", bos=False)
    assert plain.encode("a", bos=True) == [plain.bos, *plain.encode("a")]
    both = names | {"add_bos_token": True, "add_eos_token": True}
    asked = text_of(tmp_path / "b", table("llama-bpe"), tokenizer_config=both)
    assert asked.encode("a") == plain.encode("a") and asked.encode("a", bos=True) == [0, *plain.encode("a")]
    assert asked.encode("", bos=None) == []
    own = table("llama-bpe")
    tokenizer = HFTokenizer.from_str(json.dumps(own))
    tokenizer.post_processor = processors.TemplateProcessing("<s> $A", special_tokens=[("<s>", 0)])
    built_in = text_of(tmp_path / "c", json.loads(tokenizer.to_str()), tokenizer_config=names)
    assert built_in.encode("a") == [0, *plain.encode("a")]
    switched_off = text_of(
        tmp_path / "d", json.loads(tokenizer.to_str()), tokenizer_config=names | {"add_bos_token": False}
    )
    assert switched_off.encode("a") == [0, *plain.encode("a")]
    flat = {"bos_token": "<s>", "eos_token": "</s>"}
    for files in (
        {"tokenizer_config": flat | {"add_bos_token": False}},
        {"tokenizer_config": flat | {"add_bos_token": True}},
        {"special_tokens_map": flat},
    ):
        for processor in (tokenizer.post_processor, None):
            made = HFTokenizer.from_str(json.dumps(own))
            if processor is not None:
                made.post_processor = processor
            folder = tmp_path / f"e{len(list(tmp_path.iterdir()))}"
            ids = text_of(folder, json.loads(made.to_str()), **files).encode("a")
            assert ids == AutoTokenizer.from_pretrained(folder)("a")["input_ids"]


def test_a_begin_token_that_the_post_processor_alone_names_is_known(tmp_path: Path) -> None:
    made = HFTokenizer.from_str(json.dumps(table("llama-bpe")))
    made.post_processor = processors.TemplateProcessing("<s> $A", special_tokens=[("<s>", 0)])
    first = text_of(tmp_path / "a", json.loads(made.to_str()))
    assert first.bos == 0 and first.encode("a")[0] == 0
    again = Tokenizer.from_gguf(first.to_gguf())
    assert again is not None and again.encode("a") == first.encode("a") and again.bos == 0
    made.post_processor = processors.Sequence([processors.ByteLevel(), made.post_processor])
    assert text_of(tmp_path / "b", json.loads(made.to_str())).bos == 0


def test_tokens_that_a_processor_has_names_for_are_special(tmp_path: Path) -> None:
    source = table("llama-bpe")
    start = len(source["model"]["vocab"]) + 10
    flags = dict(single_word=False, lstrip=False, rstrip=False, normalized=False, special=False)
    names = ["<|tag|>", "tagword", "[TAG]"]
    source["added_tokens"] += [{"id": start + i, "content": name, **flags} for i, name in enumerate(names)]
    for form, special in (
        (dict(zip("abc", names, strict=True)), True),
        ({"a": {"content": "<|tag|>"}}, True),
        (names, False),
    ):
        folder = tmp_path / f"x{len(list(tmp_path.iterdir()))}"
        tokenizer = text_of(folder, source, tokenizer_config={"extra_special_tokens": form})
        assert (tokenizer.decode([start]) == "") == special
        type_of = tokenizer.to_gguf()["tokenizer.ggml.token_type"][start]
        assert type_of == (3 if special else 4)


def test_ids_without_a_token_stay_without_one(tmp_path: Path) -> None:
    """Added tokens behind a gap keep their ids, in files too; nothing stands for the ids of the gap."""
    for gap, tail in ((1, ["<|new|>"]), (40, ["<|new|>", "<|newer|>"])):
        source = table("llama-bpe")
        start = max([*source["model"]["vocab"].values(), *(t["id"] for t in source["added_tokens"])]) + 1 + gap
        flags = dict(single_word=False, lstrip=False, rstrip=False, normalized=False, special=True)
        source["added_tokens"] += [{"id": start + i, "content": name, **flags} for i, name in enumerate(tail)]
        first = text_of(tmp_path / f"a{gap}", source)
        first.save(tmp_path / f"b{gap}")
        for tokenizer in (first, Tokenizer.from_folder(tmp_path / f"b{gap}"), Tokenizer.from_gguf(first.to_gguf())):
            assert tokenizer is not None
            assert [tokenizer.id_of(name) for name in tail] == [start + i for i in range(len(tail))]
            assert tokenizer.encode("a <|new|>", special=True)[-1] == start
            assert tokenizer.encode("hello", bos=False) == first.encode("hello", bos=False)
        assert first.decode([start - 1], special=True) == ""
        saved = json.loads((tmp_path / f"b{gap}" / "tokenizer.json").read_text())
        assert saved["model"]["vocab"] == source["model"]["vocab"]


def test_special_ids_outside_the_vocabulary_are_ignored_unless_they_are_needed(
    tmp_path: Path, caplog: pytest.LogCaptureFixture
) -> None:
    metadata = text_of(tmp_path, table("llama-bpe")).to_gguf()
    count = len(metadata["tokenizer.ggml.tokens"])
    for name in ("padding", "unknown", "seperator", "mask", "eom"):
        for value in (count, -1, 1 << 40):
            caplog.clear()
            assert Tokenizer.from_gguf(metadata | {f"tokenizer.ggml.{name}_token_id": value}) is not None
            assert f"{name}_token_id is {value}" in caplog.text
    for name in ("bos", "eos", "eot"):
        with pytest.raises(FormatError, match=f"{name}_token_id is {count}"):
            Tokenizer.from_gguf(metadata | {f"tokenizer.ggml.{name}_token_id": count})


CUTS = {  # as llama.cpp cuts: what a text becomes, for one name of each rule
    "tekken": ("HelloWorld 12 It's", ["Hello", "World", " ", "1", "2", " It", "'s"]),
    "gpt-4o": ("HelloWorld 1234 It's", ["Hello", "World", " ", "123", "4", " It's"]),
    "kimi-k2": ("Hi中文かな 12", ["Hi", "中文", "かな", " ", "12"]),
    "deepseek-llm": ("ab 123\n.", ["ab", " ", "123", "\n", "."]),
    "deepseek-coder": ("ab 12中", ["ab", " ", "1", "2", "中"]),
    "deepseek-v3": ("ab 1234中!x", ["ab", " ", "123", "4", "中", "!x"]),
    "afmoe": ("ab 1234567", ["ab", " ", "1", "234", "567"]),
    "superbpe": ("two words 12345", ["two words ", "12", "345"]),
    "tiny_aya": ("ab 12345", ["ab", " ", "12", "345"]),
    "seed-coder": ("a!\n 12", ["a", "!", "\n", " ", "1", "2"]),
    "bloom": ("ab cd, 12", ["ab", " cd", ",", " 12"]),
    "viking": ("ab 12", ["ab", " ", "1", "2"]),
    "bailingmoe": ("It'S 12", ["It", "'S", " ", "1", "2"]),
    "ufakzeka": ("It's", ["It", "'s"]),
    "qwen35": ("e\u0301a 12", ["e\u0301a", " ", "1", "2"]),
    "minicpm5": ("ab 12345", ["ab", " ", "123", "45"]),
    "chameleon": ("ab 12.", ["ab", " ", "1", "2", "."]),
}


@pytest.mark.parametrize("name", CUTS)
def test_texts_are_cut_as_llama_cpp_cuts_them(name: str) -> None:
    text, pieces = CUTS[name]
    rules = [pre_tokenizers.Split(Regex(pattern), "isolated") for pattern in PRE_TOKENIZERS[name].patterns]
    assert [piece for piece, _ in pre_tokenizers.Sequence(rules).pre_tokenize_str(text)] == pieces


@pytest.mark.parametrize("name", [name for name, rules in PRE_TOKENIZERS.items() if rules.originals])
def test_published_patterns_are_recognized_and_kept_beside_the_name(name: str, tmp_path: Path) -> None:
    source = table(name)
    for step, pattern in zip(source["pre_tokenizer"]["pretokenizers"], PRE_TOKENIZERS[name].originals, strict=False):
        step["pattern"] = {"Regex": pattern}
    tokenizer = text_of(tmp_path, source)
    metadata = tokenizer.to_gguf()
    assert PRE_TOKENIZERS[metadata["tokenizer.ggml.pre"]] == PRE_TOKENIZERS[name]
    assert metadata["tokenizer.tiercel.patterns"] == list(PRE_TOKENIZERS[name].originals)
    again = Tokenizer.from_gguf(metadata)
    assert again is not None and again.encode("éÉa HelloWorld") == tokenizer.encode("éÉa HelloWorld")
    wrong = metadata | {"tokenizer.tiercel.patterns": [1]}
    with pytest.raises(FormatError, match="patterns"):
        Tokenizer.from_gguf(wrong)


def test_names_that_are_not_served_say_the_way_out(tmp_path: Path) -> None:
    metadata = text_of(tmp_path, table("llama-bpe")).to_gguf()
    for name in ("gemma4", "whitespace", "of-tomorrow"):
        with pytest.raises(UnsupportedError, match=f"{name}.*tokenizer.json"):
            Tokenizer.from_gguf(metadata | {"tokenizer.ggml.pre": name})
    (tmp_path / "b").mkdir()
    (tmp_path / "b" / "tekken.json").write_text("{}")
    assert "tekken.json" in Tokenizer.why_none(tmp_path / "b")


def test_a_byte_level_tokenizer_without_merges_goes_to_gguf(tmp_path: Path) -> None:
    source = table("llama-bpe")
    source["model"]["merges"] = []
    tokenizer = text_of(tmp_path, source)
    path = tmp_path / "x.gguf"
    fields = {
        key: Typed(GGUF_TYPES[key], value) if key in GGUF_TYPES else value for key, value in tokenizer.to_gguf().items()
    }
    write_gguf(path, fields, [])
    with GGUFFile(path) as file:
        again = Tokenizer.from_gguf(file.metadata)
    assert again is not None and again.encode("hello") == tokenizer.encode("hello")


def test_every_end_that_the_files_name_ends_an_answer(tmp_path: Path) -> None:
    tokenizer = text_of(
        tmp_path, table("llama-bpe"), tokenizer_config={"eos_token": "</s>"}, generation_config={"eos_token_id": [5, 4]}
    )
    assert tokenizer.eos == {1, 4, 5}  # </s>, <|im_end|> (also by its name), 5
    older = text_of(tmp_path / "old", table("gpt-2"), config={"eos_token_id": 1, "bos_token_id": 0})
    assert older.eos == {1, 4} and older.bos == 0


def test_a_checkpoint_without_a_tokenizer_says_what_it_has(tmp_path: Path) -> None:
    assert Tokenizer.from_folder(tmp_path) is None and Tokenizer.from_gguf({}) is None
    assert Tokenizer.from_gguf({"tokenizer.ggml.model": "none"}) is None
    assert "no tokenizer.json" in Tokenizer.why_none(tmp_path)
    (tmp_path / "tokenizer.model").write_bytes(b"x")
    assert Tokenizer.from_folder(tmp_path) is None
    assert "tokenizer.model" in Tokenizer.why_none(tmp_path)


def test_tokens_only_the_config_calls_special_are_special(tmp_path: Path) -> None:
    tokenizer = table("gpt-2")
    tokenizer["added_tokens"] = []
    decoder = {"4": {"content": "<|im_end|>", "special": True}}
    text = text_of(tmp_path, tokenizer, tokenizer_config={"bos_token": "<s>", "added_tokens_decoder": decoder})
    assert text.encode("<s><|im_end|>", special=True) == [0, 4]
    assert not {0, 4} & set(text.encode("<s><|im_end|>"))
    with pytest.raises(FormatError, match="is token 4 and"):
        text_of(tmp_path, tokenizer, tokenizer_config={"added_tokens_decoder": {"9": {"content": "<|im_end|>"}}})


def test_bad_ids_and_bad_text_are_said(tmp_path: Path) -> None:
    tokenizer = text_of(tmp_path, table("gpt-2"))
    assert tokenizer.decode([tokenizer.vocab_size, tokenizer.vocab_size + 10**6]) == "", (
        "rows that only pad a network have no text"
    )
    for ids in ([-1], ["a"], [1.5]):
        with pytest.raises(RequestError):
            tokenizer.decode(ids)  # type: ignore[arg-type]
    with pytest.raises(RequestError, match="surrogate"):
        tokenizer.encode("a\ud800")
    with pytest.raises(RequestError, match="begins a text"):
        tokenizer.encode("a", bos=True)


def test_truncation_padding_and_dropout_of_training_are_not_applied(tmp_path: Path) -> None:
    tokenizer = table("gpt-2")
    plain = text_of(tmp_path / "a", tokenizer).encode("some words " * 50)
    tokenizer["truncation"] = {"direction": "Right", "max_length": 4, "strategy": "LongestFirst", "stride": 0}
    tokenizer["padding"] = {"strategy": {"Fixed": 999}, "direction": "Right", "pad_to_multiple_of": None}
    tokenizer["padding"] |= {"pad_id": 0, "pad_type_id": 0, "pad_token": "<s>"}
    tokenizer["model"]["dropout"] = 0.9
    assert text_of(tmp_path / "b", tokenizer).encode("some words " * 50) == plain


def test_a_tokenizer_of_words_works_too(tmp_path: Path) -> None:
    words = HFTokenizer(models.WordPiece({}, unk_token="[UNK]"))
    words.pre_tokenizer = pre_tokenizers.Whitespace()
    words.decoder = decoders.WordPiece()
    words.train_from_iterator(
        HARD, trainers.WordPieceTrainer(vocab_size=400, special_tokens=["[UNK]"], show_progress=False)
    )
    tokenizer = text_of(tmp_path, json.loads(words.to_str()))
    string = "leading spaces inside , text and newline"
    ids = tokenizer.encode(string)
    assert ids == words.encode(string).ids
    assert tokenizer.decode(ids) == words.decode(ids, skip_special_tokens=False)
    stream = tokenizer.stream()
    pieces = [piece for id in ids for piece in stream.push(id)] + stream.finish()
    assert "".join(piece.text for piece in pieces) == tokenizer.decode(ids)
    assert len(pieces) > 3


# Files


@pytest.mark.parametrize("kind", KINDS)
def test_saved_and_opened_again_it_is_the_same(kind: str, tmp_path: Path) -> None:
    config = {"bos_token": "<s>", "eos_token": "</s>", "add_bos_token": True}
    config["chat_template"] = [
        {"name": "default", "template": "{{ bos_token }}D"},
        {"name": "tool_use", "template": "T"},
    ]  # type: ignore[assignment]
    tokenizer = text_of(tmp_path / "a", table(kind), tokenizer_config=config)
    tokenizer.save(tmp_path / "b")
    again = Tokenizer.from_folder(tmp_path / "b")
    assert again is not None
    assert (again.eos, again.bos, again.vocab_size, again.templates) == (
        tokenizer.eos,
        tokenizer.bos,
        tokenizer.vocab_size,
        tokenizer.templates,
    )
    original = PreTrainedTokenizerFast.from_pretrained(tmp_path / "b")
    for string in HARD:
        assert again.encode(string) == tokenizer.encode(string)
        assert again.encode(string, special=True) == tokenizer.encode(string, special=True) == original.encode(string)
    assert not [path for path in (tmp_path / "b").iterdir() if path.name.startswith(".")]
    assert original.chat_template == {"default": "{{ bos_token }}D", "tool_use": "T"}


@pytest.mark.parametrize("kind", [k for k in KINDS if k != "default"])
def test_through_gguf_and_back_it_is_the_same(kind: str, tmp_path: Path) -> None:
    config = {
        "bos_token": "<s>",
        "eos_token": "</s>",
        "unk_token": "<unk>",
        "add_bos_token": True,
        "chat_template": "x",
    }
    tokenizer = text_of(tmp_path, table(kind), tokenizer_config=config)
    metadata = tokenizer.to_gguf(tokenizer.vocab_size + 5)
    assert len(metadata["tokenizer.ggml.tokens"]) == tokenizer.vocab_size + 5
    assert metadata["tokenizer.ggml.token_type"][3] in (3, 6)
    again = Tokenizer.from_gguf(metadata)
    assert again is not None
    assert (again.eos, again.bos, again.templates) == (tokenizer.eos, tokenizer.bos, tokenizer.templates)
    for string in HARD:
        assert again.encode(string) == tokenizer.encode(string), string
        assert again.encode(string, special=True) == tokenizer.encode(string, special=True), string
        assert again.decode(again.encode(string)) == tokenizer.decode(tokenizer.encode(string))
    assert again.to_gguf() == metadata


@pytest.mark.parametrize(
    "pre", sorted({next(n for n in PRE_TOKENIZERS if PRE_TOKENIZERS[n] == r) for r in PRE_TOKENIZERS.values()})
)
def test_every_pre_tokenizer_is_recognized_by_its_rules(pre: str, tmp_path: Path) -> None:
    tokenizer = text_of(tmp_path, byte_level(pre))
    assert PRE_TOKENIZERS[tokenizer.to_gguf()["tokenizer.ggml.pre"]] == PRE_TOKENIZERS[pre]


def test_the_usual_spellings_of_the_rules_are_recognized(tmp_path: Path) -> None:
    tokenizer = table("gpt-2")
    plain = {"type": "ByteLevel", "add_prefix_space": False, "trim_offsets": True, "use_regex": True}
    tokenizer["pre_tokenizer"] = plain
    assert text_of(tmp_path, tokenizer).to_gguf()["tokenizer.ggml.pre"] == "gpt-2"
    digits = {"type": "Digits", "individual_digits": True}
    tokenizer["pre_tokenizer"] = {"type": "Sequence", "pretokenizers": [digits, plain]}
    assert text_of(tmp_path, tokenizer).to_gguf()["tokenizer.ggml.pre"] == "smollm"


def test_rules_that_llama_cpp_does_not_know_are_refused_not_guessed(tmp_path: Path) -> None:
    def refused(change: dict[str, Any], reason: str, kind: str = "gpt-2") -> None:
        with pytest.raises(UnsupportedError, match=reason):
            text_of(tmp_path, table(kind) | change).to_gguf()

    odd = {"type": "Split", "pattern": {"Regex": "[aeiou]"}, "behavior": "Isolated", "invert": False}
    refused({"pre_tokenizer": {"type": "Sequence", "pretokenizers": [odd]}}, r"no name .*\[aeiou\]")
    refused(
        {"pre_tokenizer": {"type": "ByteLevel", "add_prefix_space": True, "trim_offsets": True, "use_regex": True}},
        "no name",
    )
    refused({"normalizer": {"type": "Lowercase"}}, "Lowercase")
    refused({"normalizer": {"type": "NFKC"}}, "NFKC", "always")
    unordered = table("always")["model"]
    unordered["merges"] = [*unordered["merges"][1::2], *unordered["merges"][::2]]
    refused({"model": unordered}, "scores", "always")


def gguf_metadata(tmp_path: Path, kind: str) -> dict[str, Any]:
    config = {"bos_token": "<s>", "eos_token": "</s>", "chat_template": "x"}
    return text_of(tmp_path, table(kind), tokenizer_config=config).to_gguf()


@pytest.mark.parametrize("kind", ["llama-bpe", "always"])
def test_gguf_keys_of_wrong_type_or_length_are_format_errors(kind: str, tmp_path: Path) -> None:
    good = gguf_metadata(tmp_path, kind)
    wrong: list[Any] = [
        None,
        True,
        -1,
        1 << 40,
        1.5,
        "x",
        [],
        ["x"],
        [1],
        [[1]],
        {},
        [None] * 700,
        ["a", "a"],
        ["", " ", "b"],
    ]
    tried = 0
    for key in good:
        if key.startswith("tokenizer.tiercel"):
            continue
        for value in wrong:
            tried += 1
            try:
                Tokenizer.from_gguf(good | {key: value})
            except FormatError:
                continue
    assert tried > 100
    for key in ("tokens", "token_type", "merges" if kind == "llama-bpe" else "scores", "bos_token_id"):
        with pytest.raises(FormatError, match=f"tokenizer.ggml.{key}"):
            Tokenizer.from_gguf(good | {f"tokenizer.ggml.{key}": ["x", 1] if key != "bos_token_id" else 10**9})
    twice = list(good["tokenizer.ggml.tokens"])
    twice[9] = twice[7]
    with pytest.raises(FormatError, match=r"names .* twice: tokens 7 and 9"):
        Tokenizer.from_gguf(good | {"tokenizer.ggml.tokens": twice})
    with pytest.raises(UnsupportedError, match=r"made-up.*known: llama-bpe"):
        Tokenizer.from_gguf(
            good | {"tokenizer.ggml.pre": "made-up", "tokenizer.ggml.model": "gpt2", "tokenizer.ggml.merges": []}
        )
    with pytest.raises(UnsupportedError, match="t5"):
        Tokenizer.from_gguf(good | {"tokenizer.ggml.model": "t5"})


# Hostile files


def mutants(source: random.Random, value: Any) -> Any:
    """A JSON value with one place changed."""
    extremes = [
        None,
        True,
        -1,
        0,
        1 << 31,
        1 << 63,
        1e400,
        "",
        "\n",
        "(a+)+$",
        "\ud800",
        "x" * 5000,
        [],
        [[]],
        {},
        {"type": "X"},
    ]
    if isinstance(value, dict) and value and source.random() < 0.9:
        key = source.choice(list(value))
        if source.random() < 0.1:
            return {k: v for k, v in value.items() if k != key}
        return value | {key: mutants(source, value[key])}
    if isinstance(value, list) and value and source.random() < 0.9:
        place = source.randrange(len(value))
        return [*value[:place], mutants(source, value[place]), *value[place + 1 :]]
    return source.choice(extremes)


def test_two_thousand_mutated_files_meet_format_errors_only(tmp_path: Path, capfd: pytest.CaptureFixture[str]) -> None:
    source = random.Random(3)
    small = table("llama-bpe")
    vocab = {token: id for token, id in small["model"]["vocab"].items() if len(token) == 1 or token in CONTROL}
    vocab = {token: place for place, token in enumerate(vocab)}
    small["model"] |= {"vocab": vocab, "merges": [["a", "b"]]}
    small["added_tokens"] = [
        entry | {"id": vocab[entry["content"]]} for entry in small["added_tokens"] if entry["content"] in vocab
    ]
    del small["model"]["vocab"]["b"], small["model"]["merges"][:]
    config = {"bos_token": "<s>", "eos_token": {"content": "</s>"}, "add_bos_token": True, "chat_template": "{{ 1 }}"}
    config["added_tokens_decoder"] = {"0": {"content": "<s>", "special": True}}
    files = {"tokenizer": small, "tokenizer_config": config, "generation_config": {"eos_token_id": [1, 2]}}
    write(tmp_path, small, **{k: v for k, v in files.items() if k != "tokenizer"})
    assert Tokenizer.from_folder(tmp_path) is not None
    refused = 0
    for number in range(2000):
        name = source.choice(["tokenizer", "tokenizer", "tokenizer_config", "generation_config"])
        data = json.dumps(mutants(source, files[name])).encode()
        if number % 10 == 0:
            data = data[: source.randrange(len(data))]
        (tmp_path / f"{name}.json").write_bytes(data)
        with Calls() if number % 8 == 0 else nullcontext() as calls:
            try:
                tokenizer = Tokenizer.from_folder(tmp_path)
                assert tokenizer is not None
                tokenizer.decode(tokenizer.encode("a <s> b\n", special=True))
            except FormatError:
                refused += 1
        assert calls is None or calls.count < 50_000, number
        (tmp_path / f"{name}.json").write_text(json.dumps(files[name]))
    assert refused > 300


def test_a_file_that_is_no_table_or_too_deep_is_a_format_error(tmp_path: Path) -> None:
    for data in (b"", b"[]", b"\xff", b"[" * 200_000, b'{"model": {"vocab": {"a": ' + b"9" * 5000 + b"}}}", b"NaN"):
        (tmp_path / "tokenizer.json").write_bytes(data)
        with pytest.raises(FormatError):
            Tokenizer.from_folder(tmp_path)


def test_a_pattern_that_backtracks_for_ever_is_an_error_soon(tmp_path: Path, capfd: pytest.CaptureFixture[str]) -> None:
    tokenizer = table("gpt-2")
    tokenizer["pre_tokenizer"]["pretokenizers"][0]["pattern"] = {"Regex": "(a+)+$"}
    backtracking = text_of(tmp_path, tokenizer)

    def refused(length: int) -> None:
        with pytest.raises(FormatError):
            backtracking.encode("a" * length + "b")

    assert ratio(refused, 5000) < 24


# Speed


SHAPES = {
    "one letter": lambda n: "a" * n,
    "carets": lambda n: "^" * n,
    "spaces": lambda n: " " * n,
    "newlines": lambda n: "\n" * n,
    "digits": lambda n: "0123456789" * (n // 10),
    "base64": lambda n: "".join(random.Random(1).choices("ABCDEFGHabcdefgh0123456789+/", k=n)),
    "no spaces": lambda n: "日本語中文" * (n // 15),
    "emoji": lambda n: "👨‍👩‍👧" * (n // 18),
    "marks": lambda n: "e" + "\u0301" * (n // 2),
    "control text": lambda n: "<|im_end|>" * (n // 10),
    "half control text": lambda n: "<|im_" * (n // 5),
}


@pytest.mark.parametrize("shape", SHAPES)
@pytest.mark.parametrize("kind", ["llama-bpe", "always"])
def test_the_time_to_encode_grows_with_the_text_not_faster(kind: str, shape: str, tmp_path: Path) -> None:
    text = text_of(tmp_path, table(kind))

    def encode(count: int) -> None:
        assert len(text.encode(SHAPES[shape](count), special=True)) >= count // 600

    assert ratio(encode, 1 << 14) < 24


@pytest.mark.parametrize("kind", KINDS)
def test_a_beginning_of_a_text_has_the_tokens_of_the_whole(kind: str, tmp_path: Path) -> None:
    text = text_of(tmp_path, table(kind))
    assert text.beginning("short", 100) == "short"
    for words in ("the inner herd in the tin " * 4000, "1234567890" * 10_000, " " * 100_000, "🦅é" * 30_000):
        begun = text.beginning(words, 100)
        assert words.startswith(begun) and text.encode(words)[:100] == text.encode(begun)[:100]
        assert begun == words or len(text.encode(begun)) > 100
