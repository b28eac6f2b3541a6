"""What a `Tokenizer` is made from, and the rules by which byte-level tokenizers cut text before they merge.

The shape of everything here is tokenizer.json's; `vocab_folder.py` reads it from a Hugging Face folder,
`vocab_gguf.py` builds it from GGUF metadata and back.
"""

from __future__ import annotations

import hashlib
from collections.abc import Callable
from dataclasses import dataclass, field
from typing import Any

from tiercel.errors import UnsupportedError
from tiercel.tokenizer.control import Added

# Token texts that end a turn or a document wherever they are control tokens (llama.cpp keeps the same list).
ENDS = frozenset(
    """<|im_end|> <|eot_id|> <|eom_id|> <|end|> <|return|> <|call|> <end_of_turn> <|end_of_turn|> <|endofturn|>
    <|endoftext|> <|end_of_text|> </s> <EOT> <end_of_utterance> <｜end▁of▁sentence｜>""".split()
)

_GPT2 = r"'s|'t|'re|'ve|'m|'ll|'d| ?\p{L}+| ?\p{N}+| ?[^\s\p{L}\p{N}]+|\s+(?!\S)|\s+"
_LLAMA3 = (
    r"(?i:'s|'t|'re|'ve|'m|'ll|'d)|[^\r\n\p{L}\p{N}]?\p{L}+|\p{N}{1,3}| ?[^\s\p{L}\p{N}]+[\r\n]*|\s*[\r\n]+"
    r"|\s+(?!\S)|\s+"
)
_QWEN2 = _LLAMA3.replace(r"\p{N}{1,3}", r"\p{N}")
_PUNCTUATION = r"[\p{P}\$\+<=>\^~\|]+"


@dataclass(frozen=True)
class PreTokenizer:
    """How text is cut before merging: by each pattern in turn.

    ignore_merges: a piece that is a token is that token.  add_bos: unless the file says otherwise.
    nfc: the originals of these files compose characters first (llama.cpp does not).
    """

    patterns: tuple[str, ...]
    ignore_merges: bool = False
    add_bos: bool = False
    nfc: bool = False


_llama3 = PreTokenizer((_LLAMA3,), ignore_merges=True, add_bos=True)
_gpt2 = PreTokenizer((_GPT2,))
_digits = PreTokenizer((r"\p{N}", _GPT2))
_qwen2 = PreTokenizer((_QWEN2,), nfc=True)

# Of several names for the same rules the first is written.
PRE_TOKENIZERS = {
    "llama-bpe": _llama3,
    "llama3": _llama3,
    "llama-v3": _llama3,
    "falcon3": _llama3,
    "falcon-h1": _llama3,
    "pixtral": _llama3,
    "lfm2": _llama3,
    "smollm": _digits,
    "starcoder": _digits,
    "refact": _digits,
    "command-r": _digits,
    "codeshell": _digits,
    "exaone": _digits,
    "minerva-7b": _digits,
    "gpt-2": _gpt2,
    "phi-2": _gpt2,
    "mpt": _gpt2,
    "olmo": _gpt2,
    "jais": _gpt2,
    "trillion": _gpt2,
    "exaone4": _gpt2,
    "granite-docling": _gpt2,
    "qwen2": _qwen2,
    "deepseek-r1-qwen": _qwen2,
    "megrez": _qwen2,
    "stablelm2": PreTokenizer((_QWEN2,)),
    "hunyuan": PreTokenizer((_QWEN2,)),
    "dbrx": PreTokenizer((_LLAMA3,)),
    "smaug-bpe": PreTokenizer((_LLAMA3,)),
    "chatglm-bpe": PreTokenizer((_LLAMA3,)),
    "falcon": PreTokenizer((_PUNCTUATION.replace("|]", "|`]"), _GPT2, "[0-9][0-9][0-9]")),
    "default": PreTokenizer((_PUNCTUATION, _GPT2, r"\p{N}+", "[0-9][0-9][0-9]")),
}

# A published tokenizer whose file does not show one of the rules above is known by what it makes of one hard text:
# sha256 of the ids, as llama.cpp's converter knows it (conversion/base.py, get_vocab_base_pre).
CHECK_TEXT = (
    "\n \n\n \n\n\n \t \t\t \t\n  \n   \n    \n     \n🚀 (normal) 😶\u200d🌫️ (multiple emojis concatenated) ✅ 🦙🦙 "
    "3 33 333 3333 33333 333333 3333333 33333333 3.3 3..3 3...3 កាន់តែពិសេសអាច😁 ?我想在apple工作1314151天～ "
    "------======= нещо на Български ''''''```````\"\"\"\"......!!!!!!?????? I've been 'told he's there, 'RE you sure? "
    "'M not sure I'll make it, 'D you like some tea? We'Ve a'lL"
)
PUBLISHED = {
    "a6b57017d60e6edb4d88ecc2845188e0eb333a70357e45dcc9b53964a73bbae6": "falcon-h1",
    "60476e1243776c4fb1b993dbd7a5f15ac22f83c80afdf425fa5ae01c8d44ef86": "falcon-h1",
    "3eda48b4c4dc7de733d1a8b3e3b4a85243dbbf704da2ee9d42c6beced8897896": "falcon-h1",
    "48f8e02c0359c0bbdd82f26909171fac1c18a457bb47573ed1fe3bbb2c1cfd4b": "falcon-h1",
    "9d032fcbd5501f4a38150912590928bfb36091efb5df11b8e2124b0390e3fb1e": "falcon3",
    "0ef9807a4087ebef797fc749390439009c3b9eda9ad1a097abbe738f486c01e5": "llama-bpe",
    "b6dc8df998e1cfbdc4eac8243701a65afe638679230920b50d6f17d81c098166": "olmo",
    "a8594e3edff7c29c003940395316294b2c623e09894deebbc65f33f1515df79e": "dbrx",
    "855059429035d75a914d1eda9f10a876752e281a054a7a3d421ef0533e5b6249": "smollm",
    "3ce83efda5659b07b1ad37ca97ca5797ea4285d9b9ab0dc679e4a720c9da7454": "gpt-2",
    "e636dc30a262dcc0d8c323492e32ae2b70728f4df7dfe9737d9f920a282b8aea": "qwen2",
}


@dataclass
class Recipe:
    """Everything a `Tokenizer` is made from, wherever it was read."""

    tokenizer: dict[str, Any]  # a tokenizer.json
    names: dict[str, str] = field(default_factory=dict)  # "bos_token": "<s>", …
    templates: dict[str, str] = field(default_factory=dict)  # "default", "tool_use", …
    eos: set[int] = field(default_factory=set)
    pre: str | None = None  # the name it had in GGUF


def added_json(token: Added) -> dict[str, Any]:
    """An entry of tokenizer.json's added_tokens."""
    flags = {name: getattr(token, name) for name in ("single_word", "lstrip", "rstrip")}
    return {"id": token.id, "content": token.content, **flags, "normalized": False, "special": token.special}


def around(bos: tuple[str, int] | None, eos: tuple[str, int] | None) -> dict[str, Any]:
    """A post-processor that puts these tokens around a text."""
    ends = [end for end in (bos, eos) if end is not None]

    def piece(end: tuple[str, int] | None, row: int) -> list[dict[str, Any]]:
        return [] if end is None else [{"SpecialToken": {"id": end[0], "type_id": row}}]

    def text(name: str, row: int) -> list[dict[str, Any]]:
        return [*piece(bos, row), {"Sequence": {"id": name, "type_id": row}}, *piece(eos, row)]

    named = {token: {"id": token, "ids": [id], "tokens": [token]} for token, id in ends}
    both = [*text("A", 0), *text("B", 1)]
    return {"type": "TemplateProcessing", "single": text("A", 0), "pair": both, "special_tokens": named}


def recognize(tokenizer: dict[str, Any], encode: Callable[[str], list[int]]) -> str:
    """The GGUF name of this pre-tokenizer."""
    patterns = patterns_of(tokenizer.get("pre_tokenizer"))
    ignore_merges = bool(tokenizer["model"].get("ignore_merges"))
    nfc = bool(kinds(tokenizer.get("normalizer")))
    same = [n for n, p in PRE_TOKENIZERS.items() if p.patterns == patterns and p.ignore_merges == ignore_merges]
    if same:
        return next((name for name in same if PRE_TOKENIZERS[name].nfc == nfc), same[0])
    digest = hashlib.sha256(str(encode(CHECK_TEXT)).encode()).hexdigest()
    if digest in PUBLISHED:
        return PUBLISHED[digest]
    raise UnsupportedError(
        f"llama.cpp has no name for this tokenizer's rules of cutting text ({' then '.join(patterns or ('other',))}"
        f"{', ignore_merges' if ignore_merges else ''}); a GGUF file would be read with wrong ones"
    )


_KEEPS_ALL = (("Isolated", False), ("Removed", True))  # Split's ways of keeping both matches and what is between


def patterns_of(pre: Any) -> tuple[str, ...] | None:
    """A pre-tokenizer as a row of patterns, or None when it is something else."""
    patterns: list[str] = []
    for step in steps_of(pre, "pretokenizers"):
        kind = step.get("type")
        pattern = step.get("pattern", {}).get("Regex") if isinstance(step.get("pattern"), dict) else None
        if kind == "ByteLevel" and not step.get("add_prefix_space"):
            patterns += [_GPT2] if step.get("use_regex", True) else []
        elif kind == "Digits":
            patterns.append(r"\p{N}" if step.get("individual_digits") else r"\p{N}+")
        elif kind == "Split" and pattern and (step.get("behavior"), step.get("invert")) in _KEEPS_ALL:
            patterns.append(pattern)
        else:
            return None
    return tuple(patterns)


def steps_of(part: Any, name: str) -> list[dict[str, Any]]:
    """The steps of a tokenizer.json part that may be one step or a Sequence of them."""
    if not isinstance(part, dict):
        return []
    if part.get("type") != "Sequence":
        return [part]
    inner = part.get(name)
    return [s for step in inner for s in steps_of(step, name)] if isinstance(inner, list) else []


def kinds(part: Any) -> list[str]:
    return [str(s.get("type")) for name in ("normalizers", "decoders") for s in steps_of(part, name)] if part else []


def space_prefix(tokenizer: dict[str, Any]) -> str:
    """Where a sentencepiece-style tokenizer puts a space of its own: "always", "first" or "never"."""
    for step in steps_of(tokenizer.get("pre_tokenizer"), "pretokenizers"):
        if step.get("type") == "Metaspace":
            default = "always" if step.get("add_prefix_space", True) else "never"
            return str(step.get("prepend_scheme", default))
    return "always" if "Prepend" in kinds(tokenizer.get("normalizer")) else "never"
