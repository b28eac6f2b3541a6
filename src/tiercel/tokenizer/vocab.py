"""What a `Tokenizer` is made from.

The shape of everything here is tokenizer.json's; `vocab_folder.py` reads it from a Hugging Face folder,
`vocab_gguf.py` builds it from GGUF metadata and back.
"""

from __future__ import annotations

from dataclasses import dataclass, field
from typing import Any

from tiercel.tokenizer.control import Added

# Token texts that end a turn or a document wherever they are control tokens (llama.cpp keeps the same list).
ENDS = frozenset(
    """<|im_end|> <|eot_id|> <|eom_id|> <|end|> <|return|> <|call|> <end_of_turn> <|end_of_turn|> <|endofturn|>
    <|endoftext|> <|end_of_text|> </s> <EOT> <end_of_utterance> <｜end▁of▁sentence｜>""".split()
)


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
