"""Log probabilities of tokens as JSON; both dialects write them alike."""

from __future__ import annotations

from typing import TYPE_CHECKING, Any

if TYPE_CHECKING:
    from tiercel.sampling.logprobs import Logprob
    from tiercel.tokenizer.tokenizer import Tokenizer

MIN_LOGPROB = -9999.0  # OpenAI's value for a token that cannot come; JSON has no infinity


def token_entry(tokenizer: Tokenizer | None, id: int, logprob: float) -> dict[str, Any]:
    """A token's text, bytes and natural log probability."""
    raw = tokenizer.piece(id) if tokenizer is not None else b""
    return {"token": raw.decode("utf-8", "replace"), "logprob": max(logprob, MIN_LOGPROB), "bytes": list(raw)}


def likeliest(entries: dict[int, Logprob], count: int) -> list[tuple[int, Logprob]]:
    """The `count` likeliest tokens, by rank."""
    return sorted(entries.items(), key=lambda item: item[1].rank)[:count]
