"""The rules by which byte-level tokenizers cut text before they merge, by the names that GGUF files have for them.

The rules are those of llama.cpp (llm_tokenizer_bpe), as patterns of the `tokenizers` library, so that a GGUF file is
cut as llama.cpp cuts it.  Where a published tokenizer.json cuts a little otherwise (letters beyond a-z), its patterns
are in `originals`: they are recognized, and written beside the name.
"""

from __future__ import annotations

import hashlib
from collections.abc import Callable
from dataclasses import dataclass
from typing import Any

from tiercel.errors import UnsupportedError
from tiercel.tokenizer.vocab import kinds, steps_of

_CONTRACTIONS = r"(?i:'s|'t|'re|'ve|'m|'ll|'d)"
_SPACES = r"\s*[\r\n]+|\s+(?!\S)|\s+"
_GPT2 = r"'s|'t|'re|'ve|'m|'ll|'d| ?\p{L}+| ?\p{N}+| ?[^\s\p{L}\p{N}]+|\s+(?!\S)|\s+"
_LLAMA3 = rf"{_CONTRACTIONS}|[^\r\n\p{{L}}\p{{N}}]?\p{{L}}+|\p{{N}}{{1,3}}| ?[^\s\p{{L}}\p{{N}}]+[\r\n]*|{_SPACES}"
_QWEN2 = _LLAMA3.replace(r"\p{N}{1,3}", r"\p{N}")
_QWEN35 = _QWEN2.replace(r"]?\p{L}+", r"]?[\p{L}\p{M}]+").replace(r"[^\s\p{L}\p{N}]", r"[^\s\p{L}\p{M}\p{N}]")
_PUNCTUATION = r"[\p{P}\$\+<=>\^~\|]+"
_WORDS = r" ?[^(\s|.,!?…。，、।۔،)]+"
_CJK = "[\u4e00-\u9fa5\u0800-\u4e00\uac00-\ud7ff]+"
_KANJI_KANA = "[\u4e00-\u9fa5\u3040-\u309f\u30a0-\u30ff]+"
_DEEPSEEK3 = (
    r"""[!"#$%&'()*+,\-./:;<=>?@\[\\\]^_`{|}~][A-Za-z]+|[^\r\n\p{L}\p{P}\p{S}]?[\p{L}\p{M}]+"""
    rf"| ?[\p{{P}}\p{{S}}]+[\r\n]*|{_SPACES}"
)
# letters with a case, as the tables of DeepSeek's first tokenizer have them
_CASED = "[[\\p{Lu}\\p{Ll}\\p{Lt}]&&[^\u10d0-\u10ff\ua790-\ua7ff\uab30-\uab6f]]"


def _case(upper: str, lower: str, ending: str, digits: str, others: str = r"\p{L}\p{N}", slash: str = "/") -> str:
    """Words cut where a capital follows a small letter."""
    front = r"[^\r\n\p{L}\p{N}]?"
    words = f"{front}{upper}*{lower}+{ending}|{front}{upper}+{lower}*{ending}"
    return rf"{words}|{digits}| ?[^\s{others}]+[\r\n{slash}]*|{_SPACES}"


# llama.cpp's capitals are all letters but a-z, its small letters all but A-Z
_UPPER, _LOWER = r"(?:(?=\p{L})[^a-z])", r"(?:(?=\p{L})[^A-Z])"
_UPPER_MARKS, _LOWER_MARKS = r"(?:(?=[\p{L}\p{M}])[^a-z])", r"(?:(?=[\p{L}\p{M}])[^A-Z])"
_CAPITAL, _SMALL = r"[\p{Lu}\p{Lt}\p{Lm}\p{Lo}\p{M}]", r"[\p{Ll}\p{Lm}\p{Lo}\p{M}]"
_NO_HAN = r"&&[^\p{Han}]]"
_KIMI = r"\p{Han}+|" + _case(
    _CAPITAL[:-1] + _NO_HAN, _SMALL[:-1] + _NO_HAN, f"{_CONTRACTIONS}?", r"\p{N}{1,3}", slash=""
)
_BAILING = r"'(?i:[sdmt]|ll|ve|re)|[^\r\n\p{L}\p{N}]?+\p{L}+|\p{N}| ?[^\s\p{L}\p{N}]++[\r\n]*|\s*[\r\n]|\s+(?!\S)|\s+"
_EXAONE_MOE = (
    rf"{_CONTRACTIONS}|[^\r\n\p{{L}}\p{{N}}]?(?:\p{{L}}\p{{M}}*(?: \p{{L}}\p{{M}}*)*)+|\p{{N}}"
    r"| ?[^\s\p{L}\p{N}]+[\r\n/]?|\s*[\r\n]|\s+(?!\S)|\s+"
)
_AFMOE_SCRIPTS = (
    "[\u4e00-\u9fff\u3400-\u4dbf\uf900-\ufaff\u3040-\u309f\u30a0-\u30ff\uff65-\uff9f\u2f00-\u2fdf"
    "\u0e40-\u0e7f\u0e80-\u0eff\u1780-\u17ff\u1000-\u109f\uaa60-\uaa7f\ua9e0-\ua9ff\uac00-\ud7af\u1100-\u11ff]+"
)
_YOUTU_SCRIPTS = (
    "[\uac00-\ud7a3\u3131-\u318e]+|[\uff01\u2026\u201c\u201d\u2018\u2019\u2014\uff1a\uff1b\uff0c\u3001-\u303f\ufe30-\ufe4f]+"
    "|[\u3105-\u312f]+|[\u4e00-\u9fa5\u3040-\u309f\u30a0-\u30ff]+"
)


@dataclass(frozen=True)
class PreTokenizer:
    """How text is cut before merging: by each pattern in turn.

    ignore_merges: a piece that is a token is that token.  add_bos: unless the file says otherwise.
    nfc: the originals of these files compose characters first (llama.cpp does not).
    originals: patterns of the published tokenizer.json, where they are others.
    """

    patterns: tuple[str, ...]
    ignore_merges: bool = False
    add_bos: bool = False
    nfc: bool = False
    originals: tuple[str, ...] = ()


def _gpt4o(upper: str, lower: str) -> str:
    return _case(upper, lower, f"{_CONTRACTIONS}?", r"\p{N}{1,3}")


_llama3 = PreTokenizer((_LLAMA3,), ignore_merges=True, add_bos=True)
_gpt2 = PreTokenizer((_GPT2,))
_digits = PreTokenizer((r"\p{N}", _GPT2))
_qwen2 = PreTokenizer((_QWEN2,), nfc=True)
_words = PreTokenizer((_WORDS,))
_deepseek3 = PreTokenizer((r"\p{N}{1,3}", _KANJI_KANA, _DEEPSEEK3))
_gpt_4o = PreTokenizer((_gpt4o(_UPPER, _LOWER),), originals=(_gpt4o(_CAPITAL, _SMALL),))
_aya = PreTokenizer((r"\d{1,3}(?=(?:\d{3})*\b)", _gpt4o(_CAPITAL, _SMALL)))
_bailing = PreTokenizer((_BAILING,))

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
    "midm-2.0": _llama3,
    "jina-v5-nano": _llama3,
    "glm4": PreTokenizer((_LLAMA3,)),
    "kormo": _qwen2,
    "f2llmv2": _qwen2,
    "solar-open": PreTokenizer((_QWEN2,)),
    "grok-2": PreTokenizer((_QWEN2,)),
    "qwen35": PreTokenizer((_QWEN35,), nfc=True),
    "ufakzeka": PreTokenizer((_QWEN2.removeprefix(f"{_CONTRACTIONS}|"),)),
    "mellum2": _digits,
    "mellum": _gpt2,
    "gigachat": _gpt2,
    "a.x-4.0": _gpt2,
    "modern-bert": _gpt2,
    "jina-es": _gpt2,
    "jina-de": _gpt2,
    "jina-v2-es": _gpt2,
    "jina-v2-de": _gpt2,
    "tekken": PreTokenizer(
        (_case(_UPPER, _LOWER, "", r"\p{N}"),),
        ignore_merges=True,
        add_bos=True,
        originals=(_case(_CAPITAL, _SMALL, "", r"\p{N}"),),
    ),
    "gpt-4o": _gpt_4o,
    "llama4": _gpt_4o,
    "kanana2": _gpt_4o,
    "talkie": _gpt_4o,
    "minimax-m2": _gpt_4o,
    "granite-embed-multi-97m": PreTokenizer((_gpt4o(_UPPER_MARKS, _LOWER_MARKS),), ignore_merges=True),
    "tiny_aya": _aya,
    "cohere2moe": _aya,
    "kimi-k2": PreTokenizer((_KIMI,)),
    "youtu": PreTokenizer((_YOUTU_SCRIPTS, _case(_CAPITAL, _SMALL, f"{_CONTRACTIONS}?", r"\p{N}")), ignore_merges=True),
    "deepseek-llm": PreTokenizer(
        (
            "[\r\n]",
            rf"\s?{_CASED}+",
            "\\s?[!-/:-~\uff01-\uff0f\uff1a-\uff5e\u2018-\u201f\u3000-\u3002]+",
            r"\s+$",
            _CJK,
            r"\p{N}+",
        )
    ),
    "deepseek-coder": PreTokenizer(("[\r\n]", r"\s?\p{L}+", r"\s?\p{P}+", _CJK, r"\p{N}")),
    "deepseek-v3": _deepseek3,
    "hunyuan-dense": _deepseek3,
    "joyai-llm": _deepseek3,
    "hy_v4": _deepseek3,
    "spark2_5": PreTokenizer(
        (r"\p{N}{1,3}", _KANJI_KANA, _DEEPSEEK3.replace(r"]+[\r\n]*|\s*[\r\n]+", r"]+|[\r\n]"), r"\p{N}")
    ),
    "afmoe": PreTokenizer((r"\p{N}{1,3}(?=(?:\p{N}{3})*(?!\p{N}))", _AFMOE_SCRIPTS, _DEEPSEEK3)),
    "minicpm5": PreTokenizer((r"\p{N}{1,3}", _LLAMA3.replace(r"\p{N}{1,3}", r"\p{N}+")), ignore_merges=True),
    "superbpe": PreTokenizer((r"\p{N}+", r"(?=(\d{3})+(?!\d))")),
    "seed-coder": PreTokenizer(
        (_QWEN2.replace(r"[^\s\p{L}\p{N}]+[\r\n]*", r"[^\s\p{L}\p{N}\r\n]+").replace(r"|\p{N}|", r"|\p{N}{1}|"),)
    ),
    "bailingmoe": _bailing,
    "bailingmoe2": _bailing,
    "llada-moe": _bailing,
    "exaone-moe": PreTokenizer((_EXAONE_MOE,)),
    "laguna": PreTokenizer((r"[^\n]+|[\n]+", _QWEN2)),
    "bloom": _words,
    "gpt3-finnish": _words,
    "poro-chat": _words,
    "viking": PreTokenizer((_WORDS, r"\p{N}")),
    "chameleon": PreTokenizer(
        (
            r"<sentinel:[0-9]+>",
            r"(IMGIMG)((A|B|C|D|E|F|G|H|I){1,4})Z",
            "([\t\n]|    |  )",
            r"\p{N}",
            r"[\p{P}!-/:-@\[-`{-~]",
            _GPT2,
        ),
        add_bos=True,
    ),
}
UNSERVED = {  # names that llama.cpp has and we do not, and why
    "gemma4": "its text is not byte-level",
    "granite-embed-multi-311m": "its text is not byte-level",
    "sarvam-moe": "its text is not byte-level",
    "whitespace": "it is made for embeddings",
    "jina-v1-en": "it is made for embeddings",
    "jina-v2-code": "it is made for embeddings",
    "roberta-bpe": "it is made for embeddings",
    "jais-2": "its rules are not here yet",
}


def pre_tokenizer(name: str) -> PreTokenizer:
    """The rules of a GGUF name.  Raises UnsupportedError with the way out."""
    if name not in PRE_TOKENIZERS:
        why = UNSERVED.get(name, "its rules are not here")
        raise UnsupportedError(
            f"tokenizer.ggml.pre {name!r} is not supported: {why}; use the model's Hugging Face folder with "
            f"tokenizer.json instead of this file; known: {', '.join(PRE_TOKENIZERS)}"
        )
    return PRE_TOKENIZERS[name]


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


def recognize(tokenizer: dict[str, Any], encode: Callable[[str], list[int]]) -> str:
    """The GGUF name of this pre-tokenizer."""
    patterns = patterns_of(tokenizer.get("pre_tokenizer"))
    ignore_merges = bool(tokenizer["model"].get("ignore_merges"))
    nfc = bool(kinds(tokenizer.get("normalizer")))
    same = [
        name
        for name, rules in PRE_TOKENIZERS.items()
        if patterns in (rules.patterns, rules.originals) and rules.ignore_merges == ignore_merges
    ]
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
