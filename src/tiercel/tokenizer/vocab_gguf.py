"""Vocabularies in GGUF metadata ⇄ tokenizer.json.

A GGUF file says of a tokenizer only its kind (`tokenizer.ggml.model`), the tokens with types, merges or scores, and
the *name* of the pre-tokenizer, whose rules live in llama.cpp's source (src/llama-vocab.cpp).  Two kinds are read:

    gpt2    byte-level BPE: tokens are written in GPT-2's byte alphabet, `merges` in order of rank, and `pre` names
            one of PRE_TOKENIZERS
    llama   sentencepiece BPE: ▁ for a space, <0xNN> for bytes; of two neighbours the pair whose joined token has the
            highest score is merged first.  As ranked merges: every split of a token into two tokens, tokens by
            falling score

What the format has no key for, and is needed to be exact, is written under `tokenizer.tiercel.`; others skip it.
"""

from __future__ import annotations

import logging
from collections.abc import Callable, Iterable
from typing import Any

from tiercel.errors import FormatError, UnsupportedError
from tiercel.tokenizer.control import Added
from tiercel.tokenizer.pre_tokenizers import PRE_TOKENIZERS, patterns_of, pre_tokenizer, recognize
from tiercel.tokenizer.vocab import ENDS, Recipe, added_json, around, kinds, space_prefix

log = logging.getLogger("tiercel.tokenizer")

MOST_TOKENS = 1 << 21
MOST_SPLIT_WORK = 1 << 29  # characters copied while tokens are split in two

UNKNOWN, CONTROL, USER_DEFINED, UNUSED, BYTE, NORMAL = 2, 3, 4, 5, 6, 1
TYPES = range(7)

# The types that llama.cpp insists on, where a plain list of numbers would be written as another.
GGUF_TYPES = {
    "tokenizer.ggml.token_type": "[i32]",
    "tokenizer.ggml.scores": "[f32]",
    "tokenizer.ggml.merges": "[str]",
}
NEEDED_IDS = ("bos", "eos", "eot")  # special ids without which a file means something else

NAMES = {  # tokenizer_config.json: GGUF
    "bos_token": "bos",
    "eos_token": "eos",
    "unk_token": "unknown",
    "sep_token": "seperator",  # sic
    "pad_token": "padding",
    "mask_token": "mask",
}
PATTERNS, MAX_PATTERNS = "tokenizer.tiercel.patterns", 16
LLAMA_IDS = {"unk_token": 0, "bos_token": 1, "eos_token": 2}  # what llama.cpp takes when this kind of file is silent


def from_gguf(metadata: dict[str, Any]) -> Recipe | None:
    """None when the file carries no tokenizer.  Raises FormatError, UnsupportedError for a kind we cannot match."""
    read = _Reader(metadata)
    kind = read.value("model", str)
    if kind in (None, "no_vocab", "none"):
        return None
    if kind not in ("gpt2", "llama"):
        raise UnsupportedError(f"tokenizer.ggml.model {kind!r} is not supported; known: gpt2, llama")
    tokens, types = read.tokens(), read.types()
    tokenizer, adds_bos = _read_bpe(read, tokens) if kind == "gpt2" else _read_sentencepiece(read, tokens, types)
    added = [Added(id, tokens[id], special=special) for id, special in _added(tokens, types)]
    ids = {name: read.token_id(key) for name, key in NAMES.items()}
    if kind == "llama":
        ids |= {name: id for name, id in LLAMA_IDS.items() if ids[name] is None and id < len(tokens)}
    ends = {ids["eos_token"], read.token_id("eot"), read.token_id("eom")} - {None}
    bos = _end(read, "add_bos_token", adds_bos, ids["bos_token"], tokens)
    eos = _end(read, "add_eos_token", False, ids["eos_token"], tokens)
    tokenizer |= {
        "version": "1.0",
        "added_tokens": [added_json(token) for token in added],
        "post_processor": around(bos, eos) if bos or eos else None,
    }
    return Recipe(
        tokenizer,
        names={name: tokens[id] for name, id in ids.items() if id is not None},
        templates=read.templates(),
        eos={id for id in ends if id is not None},
        pre=read.value("pre", str) if kind == "gpt2" else None,
    )


def _end(read: _Reader, key: str, default: bool, id: int | None, tokens: list[str]) -> tuple[str, int] | None:
    """The token to put around a text, where the file (or its kind) wants one."""
    asked = read.value(key, bool)
    if asked and id is None:
        raise FormatError(f"tokenizer.ggml.{key} is set, but the file names no such token")
    return (tokens[id], id) if id is not None and (default if asked is None else asked) else None


def _added(tokens: list[str], types: list[int]) -> Iterable[tuple[int, bool]]:
    """(id, special) of the tokens that are found in the text before anything else."""
    for id, (token, type) in enumerate(zip(tokens, types, strict=True)):
        if type in (CONTROL, UNKNOWN) or token in ENDS:
            yield id, True
        elif type == USER_DEFINED:
            yield id, False


class _Reader:
    """Typed access: a key of the wrong type is an error, never a surprise later."""

    def __init__(self, metadata: dict[str, Any]) -> None:
        self.metadata = metadata

    def value(self, key: str, type_: type) -> Any:
        found = self.metadata.get(f"tokenizer.ggml.{key}")
        if found is None or type(found) is type_:
            return found
        raise FormatError(f"tokenizer.ggml.{key} must be {type_.__name__}, not {str(found)[:40]!r}")

    def array(self, key: str, types: tuple[type, ...], length: int | None = None) -> list[Any] | None:
        values = self.value(key, list)
        if values is None:
            return None
        if len(values) > 2 * MOST_TOKENS or not set(map(type, values)) <= set(types):
            raise FormatError(f"tokenizer.ggml.{key} must be a list of {types[0].__name__}, of at most {MOST_TOKENS}")
        if length is not None and len(values) != length:
            raise FormatError(f"tokenizer.ggml.{key} has {len(values)} entries for {length} tokens")
        return list(values)

    def tokens(self) -> list[str]:
        tokens = self.array("tokens", (str,))
        if not tokens or len(tokens) > MOST_TOKENS:
            raise FormatError(f"tokenizer.ggml.tokens must name 1 to {MOST_TOKENS} tokens")
        tokens = [token or f"[EMPTY_{id}]" for id, token in enumerate(tokens)]
        first: dict[str, int] = {}
        for id, token in enumerate(tokens):
            if first.setdefault(token, id) != id:
                raise FormatError(f"tokenizer.ggml.tokens names {token[:40]!r} twice: tokens {first[token]} and {id}")
        self.count = len(tokens)
        return tokens

    def types(self) -> list[int]:
        types = self.array("token_type", (int,), self.count) or [NORMAL] * self.count
        if not all(type in TYPES for type in types):
            raise FormatError("tokenizer.ggml.token_type holds a number that is no token type (0 … 6)")
        return types

    def token_id(self, name: str) -> int | None:
        key = f"tokenizer.ggml.{name}_token_id"
        id: int | None = self.value(f"{name}_token_id", int)
        if id is None or 0 <= id < self.count:
            return id
        if name in NEEDED_IDS:
            raise FormatError(f"{key} is {id}, but there are {self.count} tokens")
        log.warning("%s is %d, but there are %d tokens: it is ignored", key, id, self.count)
        return None

    def patterns(self) -> tuple[str, ...]:
        """What cuts the text, where a file of ours says it more exactly than by its name."""
        found = self.metadata.get(PATTERNS, [])
        if type(found) is not list or len(found) > MAX_PATTERNS or not all(type(one) is str for one in found):
            raise FormatError(f"{PATTERNS} must be a list of at most {MAX_PATTERNS} texts")
        return tuple(found)

    def templates(self) -> dict[str, str]:
        """The one template, and the named ones beside it."""
        front = "tokenizer.chat_template"
        found = {"default" if k == front else k[len(front) + 1 :]: v for k, v in self.metadata.items() if _is(k, front)}
        for name, template in found.items():
            if not isinstance(template, str):
                raise FormatError(f"chat template {name[:40]!r} must be text")
        return found


def _is(key: str, front: str) -> bool:
    return key == front or key.startswith(front + ".")


def _read_bpe(read: _Reader, tokens: list[str]) -> tuple[dict[str, Any], bool]:
    """The parts of a tokenizer.json, and whether this kind begins a text with bos unless the file says otherwise."""
    pre = read.value("pre", str) or "default"
    rules = pre_tokenizer(pre)
    patterns = read.patterns() or rules.patterns
    merges = read.array("merges", (str,))
    if merges is None:
        raise FormatError("tokenizer.ggml.merges is missing")
    pairs = [merge.split(" ") for merge in merges]
    wrong = next((merge for merge, pair in zip(merges, pairs, strict=True) if len(pair) != 2 or "" in pair), None)
    if wrong is not None:
        raise FormatError(f"tokenizer.ggml.merges holds {wrong[:40]!r}, which is not two pieces")
    nfc = read.metadata.get("tokenizer.tiercel.nfc", rules.nfc)
    tokenizer = {
        "normalizer": {"type": "NFC"} if nfc else None,
        "pre_tokenizer": {"type": "Sequence", "pretokenizers": [*map(_split_json, patterns), _byte_level()]},
        "decoder": _byte_level(),
        "model": _bpe_json(tokens, pairs, ignore_merges=rules.ignore_merges),
    }
    return tokenizer, rules.add_bos


def _split_json(pattern: str) -> dict[str, Any]:
    return {"type": "Split", "pattern": {"Regex": pattern}, "behavior": "Isolated", "invert": False}


def _byte_level() -> dict[str, Any]:
    return {"type": "ByteLevel", "add_prefix_space": False, "trim_offsets": True, "use_regex": False}


def _bpe_json(tokens: list[str], pairs: list[list[str]], **options: Any) -> dict[str, Any]:
    plain = {"dropout": None, "unk_token": None, "continuing_subword_prefix": None, "end_of_word_suffix": None}
    vocab = {token: id for id, token in enumerate(tokens)}
    flags = {"fuse_unk": False, "byte_fallback": False, "ignore_merges": False}
    return {"type": "BPE", **plain, **flags, **options, "vocab": vocab, "merges": pairs}


def _read_sentencepiece(read: _Reader, tokens: list[str], types: list[int]) -> tuple[dict[str, Any], bool]:
    scores = read.array("scores", (float, int), len(tokens))
    if scores is None:
        raise FormatError("tokenizer.ggml.scores is missing")
    if any(score != score for score in scores):
        raise FormatError("tokenizer.ggml.scores holds a value that is not a number")
    mergeable = [id for id, type in enumerate(types) if type in (NORMAL, UNUSED, 0)]
    unknown = next((tokens[id] for id, type in enumerate(types) if type == UNKNOWN), None)
    prefix = read.value("add_space_prefix", bool) is not False
    first = prefix and read.metadata.get("tokenizer.tiercel.space_prefix") == "first"
    steps = [{"type": "Prepend", "prepend": "▁"}] if prefix and not first else []
    spaces = {"type": "Replace", "pattern": {"String": " "}, "content": "▁"}
    words = {"type": "Metaspace", "replacement": "▁", "prepend_scheme": "first", "split": False}
    tokenizer = {
        "normalizer": None if first else {"type": "Sequence", "normalizers": [*steps, spaces]},
        "pre_tokenizer": words if first else None,
        "decoder": sentencepiece_decoder(prefix),
        "model": _bpe_json(
            tokens,
            merges_of_scores(tokens, scores, mergeable),
            unk_token=unknown,
            fuse_unk=True,
            byte_fallback=any(type == BYTE for type in types),
        ),
    }
    return tokenizer, True


def sentencepiece_decoder(strip: bool) -> dict[str, Any]:
    steps: list[dict[str, Any]] = [
        {"type": "Replace", "pattern": {"String": "▁"}, "content": " "},
        {"type": "ByteFallback"},
        {"type": "Fuse"},
    ]
    if strip:
        steps.append({"type": "Strip", "content": " ", "start": 1, "stop": 0})
    return {"type": "Sequence", "decoders": steps}


def splits(token: str, known: dict[str, int]) -> list[list[str]]:
    """Every way in which two known tokens make this one, as sentencepiece's merging would find them."""
    pairs = [[token[:i], token[i:]] for i in range(1, len(token)) if token[:i] in known and token[i:] in known]
    return sorted(pairs, key=lambda pair: (known[pair[0]], known[pair[1]]))


def merges_of_scores(tokens: list[str], scores: list[float], mergeable: list[int]) -> list[list[str]]:
    if sum(len(tokens[id]) ** 2 for id in mergeable) > MOST_SPLIT_WORK:
        raise FormatError("tokenizer.ggml.tokens are too long to find their merges in reasonable time")
    known = {tokens[id]: id for id in mergeable}
    ranked = sorted(mergeable, key=lambda id: -scores[id])
    return [pair for id in ranked for pair in splits(tokens[id], known)]


# The other way


def to_gguf(
    tokenizer: dict[str, Any],
    added: list[Added],
    vocab_size: int,
    pre: str | None,
    encode: Callable[[str], list[int]],
) -> dict[str, Any]:
    """The tokenizer.ggml keys for tokens, types, merges or scores.

    Raises UnsupportedError, with the reason, for a tokenizer that llama.cpp would not reproduce.
    """
    model = tokenizer["model"]
    if model.get("type") != "BPE":
        raise UnsupportedError(f"a {model.get('type')} tokenizer has no place in GGUF; only BPE can be written")
    byte_level = "ByteLevel" in kinds(tokenizer.get("decoder"))
    tokens = [f"[PAD{id}]" for id in range(vocab_size)]
    types = [UNUSED] * vocab_size
    for token, id in model["vocab"].items():
        if token != tokens[id]:
            types[id] = NORMAL if byte_level else _sentencepiece_type(token, model)
        tokens[id] = token
    for entry in added:
        tokens[entry.id] = entry.content
        types[entry.id] = CONTROL if entry.special else USER_DEFINED
        if entry.content == model.get("unk_token") and not byte_level:
            types[entry.id] = UNKNOWN
    common = {"tokenizer.ggml.tokens": tokens, "tokenizer.ggml.token_type": types}
    specific = _write_bpe(tokenizer, pre, encode) if byte_level else _write_sentencepiece(tokenizer, tokens, types)
    return specific | common


def _sentencepiece_type(token: str, model: dict[str, Any]) -> int:
    is_byte = model.get("byte_fallback") and len(token) == 6 and token.startswith("<0x") and token.endswith(">")
    return BYTE if is_byte else UNKNOWN if token == model.get("unk_token") else NORMAL


def _pairs(model: dict[str, Any]) -> list[list[str]]:
    """tokenizer.json writes a merge as "a b" or, newer, as ["a", "b"]."""
    return [merge.split(" ", 1) if isinstance(merge, str) else list(merge) for merge in model["merges"]]


def _write_bpe(tokenizer: dict[str, Any], pre: str | None, encode: Callable[[str], list[int]]) -> dict[str, Any]:
    if any(" " in piece for pair in _pairs(tokenizer["model"]) for piece in pair):
        raise UnsupportedError("a merge of pieces with spaces in them cannot be written to GGUF")
    normalizers = kinds(tokenizer.get("normalizer"))
    if set(normalizers) - {"NFC"}:
        raise UnsupportedError(f"llama.cpp does not normalize text, but this tokenizer does ({normalizers[0]})")
    name, patterns = pre or recognize(tokenizer, encode), patterns_of(tokenizer.get("pre_tokenizer"))
    exact = patterns and patterns != PRE_TOKENIZERS[name].patterns and patterns == PRE_TOKENIZERS[name].originals
    return {
        **({PATTERNS: list(patterns or ())} if exact else {}),
        "tokenizer.ggml.model": "gpt2",
        "tokenizer.ggml.pre": name,
        "tokenizer.ggml.merges": [" ".join(pair) for pair in _pairs(tokenizer["model"])],
        "tokenizer.tiercel.nfc": bool(normalizers),
    }


def _write_sentencepiece(tokenizer: dict[str, Any], tokens: list[str], types: list[int]) -> dict[str, Any]:
    strange = set(kinds(tokenizer.get("normalizer"))) - {"Prepend", "Replace"}
    if strange or not tokenizer["model"].get("byte_fallback"):
        reason = f"{sorted(strange)[0]} normalizer" if strange else "no byte fallback"
        raise UnsupportedError(f"this tokenizer is neither byte-level nor sentencepiece BPE ({reason})")
    prefix = space_prefix(tokenizer)
    return {
        "tokenizer.ggml.model": "llama",
        "tokenizer.ggml.pre": "default",
        "tokenizer.ggml.scores": _scores(tokenizer["model"], tokens, types),
        "tokenizer.ggml.add_space_prefix": prefix != "never",
        "tokenizer.tiercel.space_prefix": prefix,
    }


def _scores(model: dict[str, Any], tokens: list[str], types: list[int]) -> list[float]:
    """A token's score is minus the place of its first merge, single characters come last.

    Scores order tokens, merges order pairs: the two agree only when the merges of a token stand together and are
    all there are.
    """
    mergeable = [id for id, type in enumerate(types) if type in (NORMAL, UNUSED)]
    known = {tokens[id]: id for id in mergeable}
    made: dict[str, int] = {}
    previous = None
    for left, right in _pairs(model):
        token = left + right
        if token in made and token != previous:
            raise UnsupportedError(f"the merges that make {token!r} do not stand together; scores cannot say that")
        made.setdefault(token, len(made))
        previous = token
    pairs = {tuple(pair) for pair in _pairs(model)}
    for token in made:
        missing = [pair for pair in splits(token, known) if tuple(pair) not in pairs]
        if missing:
            raise UnsupportedError(f"{missing[0]} would be merged by scores, but are not merged by this tokenizer")
    unmade = [token for token in known if token not in made and len(token) > 1 and splits(token, known)]
    if unmade:
        raise UnsupportedError(f"{unmade[0]!r} would be merged by scores, but is not by this tokenizer")
    last = -float(len(made) + 1)
    return [
        -float(made[token]) - 1 if token in made else (0.0 if types[id] == CONTROL else last)
        for id, token in enumerate(tokens)
    ]


def settings(
    names: dict[str, int | None], eos: frozenset[int], front: list[int], back: list[int], templates: dict[str, str]
) -> dict[str, Any]:
    """The keys beside the vocabulary: special ids, what is put around a text, chat templates."""
    ids = {key: names.get(name) for name, key in NAMES.items()}
    if ids["eos"] is None and eos:
        ids["eos"] = min(eos)
    if front not in ([], [ids["bos"]]) or back not in ([], [ids["eos"]]):
        raise UnsupportedError(f"GGUF has no key for the tokens this tokenizer puts around a text: {front} … {back}")
    found: dict[str, Any] = {f"tokenizer.ggml.{key}_token_id": id for key, id in ids.items() if id is not None}
    found |= {"tokenizer.ggml.add_bos_token": bool(front), "tokenizer.ggml.add_eos_token": bool(back)}
    for name, template in templates.items():
        found["tokenizer.chat_template" + ("" if name == "default" else f".{name}")] = template
    named = [name for name in templates if name != "default"]
    return found | ({"tokenizer.chat_templates": named} if named else {})
