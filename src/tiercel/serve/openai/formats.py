"""Usage, timings, tool calls and log probabilities as OpenAI's clients read them."""

from __future__ import annotations

import secrets
import time
from typing import TYPE_CHECKING, Any

from tiercel.serve.logprobs import likeliest, token_entry
from tiercel.serve.types import OutputDelta, Usage

if TYPE_CHECKING:
    from tiercel.tokenizer.tokenizer import Tokenizer
    from tiercel.tokenizer.tool_formats import ToolDelta


def head(prefix: str, kind: str, model: str) -> dict[str, Any]:
    """The fields that begin every object of a response."""
    return {"id": f"{prefix}-{secrets.token_hex(12)}", "object": kind, "created": int(time.time()), "model": model,
            "system_fingerprint": None}  # fmt: skip


def usage_fields(usage: Usage) -> dict[str, Any]:
    """`usage`, in tokens."""
    return {
        "prompt_tokens": usage.prompt_tokens, "completion_tokens": usage.completion_tokens,
        "total_tokens": usage.prompt_tokens + usage.completion_tokens,
        "prompt_tokens_details": {"cached_tokens": usage.cached_tokens},
        "completion_tokens_details": {"reasoning_tokens": usage.reasoning_tokens},
    }  # fmt: skip


def timings(usage: Usage) -> dict[str, Any]:
    """llama-server's figures, which local clients show: milliseconds, tokens per second."""
    read = usage.prompt_tokens - usage.cached_tokens
    prefill, decode = usage.prefill_seconds, usage.decode_seconds
    return {
        "cache_n": usage.cached_tokens, "prompt_n": read, "prompt_ms": prefill * 1e3,
        "prompt_per_second": read / prefill if prefill else 0.0,
        "predicted_n": usage.completion_tokens, "predicted_ms": decode * 1e3,
        "predicted_per_second": usage.completion_tokens / decode if decode else 0.0,
    }  # fmt: skip


def call_delta(call: ToolDelta) -> dict[str, Any]:
    """A piece of a tool call in a stream."""
    if call.name is None:
        return {"index": call.index, "function": {"arguments": call.arguments}}
    return {"index": call.index, "id": call.id, "type": "function",
            "function": {"name": call.name, "arguments": call.arguments}}  # fmt: skip


def chat_logprobs(tokenizer: Tokenizer | None, delta: OutputDelta, top: int) -> dict[str, Any]:
    """`logprobs` of a chat completion: each token with the `top` likeliest there."""
    content = []
    for token, entries in delta.logprobs:
        best = [token_entry(tokenizer, id, entry.logprob) for id, entry in likeliest(entries, top)]
        content.append(token_entry(tokenizer, token, entries[token].logprob) | {"top_logprobs": best})
    return {"content": content, "refusal": None}
