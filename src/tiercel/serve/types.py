"""What goes into the engine and what comes out, for all dialects."""

from __future__ import annotations

import time
from dataclasses import dataclass, field
from typing import TYPE_CHECKING, Any

from tiercel.sampling.params import SamplingParams
from tiercel.voting import VoteSettings

if TYPE_CHECKING:
    from tiercel.engine.structured_output import Grammar
    from tiercel.sampling.logprobs import Logprob
    from tiercel.tokenizer.tool_formats import ToolDelta, ToolFormat

Think = bool | str | None  # reasoning on, off, at an effort, or the model's default
Message = dict[str, Any]  # as chat templates read it
Tool = dict[str, Any]  # {"type": "function", "function": {"name", "description", "parameters"}}
Prompt = str | list[int] | list[Message]  # text as it is, token ids, or a conversation


@dataclass
class GenerationRequest:
    """One prompt for the engine.

    reasoning: "auto" separates reasoning from the answer, "off" does not.  turn_start: index of the first token of the
    last user turn.  grammar: of a structured answer, compiled.  tenant: cached prefixes are shared within one only.
    """

    prompt_ids: list[int]
    params: SamplingParams
    reasoning: str = "off"
    starts_in_reasoning: bool = False
    turn_start: int | None = None
    tool_format: ToolFormat | None = None
    grammar: Grammar | None = None
    vote: VoteSettings | None = None
    tenant: str = ""


@dataclass
class OutputDelta:
    """What one step added to one choice.

    finish_reason: "stop", "length" or "tool_calls" with the last delta of a choice.  logprobs: (token, the likeliest
    there).  vote: the standings, and with the last delta the result.
    """

    index: int = 0
    reasoning: str = ""
    text: str = ""
    tool_calls: list[ToolDelta] = field(default_factory=list)
    token_ids: list[int] = field(default_factory=list)
    logprobs: list[tuple[int, dict[int, Logprob]]] = field(default_factory=list)
    finish_reason: str | None = None
    stop_reason: str | int | None = None
    vote: dict[str, Any] | None = None

    @property
    def empty(self) -> bool:
        """Whether a client would see nothing: half a character, the beginning of a stop string."""
        return not (self.text or self.reasoning or self.tool_calls or self.logprobs or self.finish_reason or self.vote)


@dataclass
class Usage:
    """Tokens and seconds of a response; complete at its end.  completion_tokens: of all choices."""

    prompt_tokens: int = 0
    cached_tokens: int = 0
    completion_tokens: int = 0
    reasoning_tokens: int = 0
    queue_seconds: float = 0.0
    prefill_seconds: float = 0.0
    decode_seconds: float = 0.0
    started: float = field(default_factory=time.perf_counter)

    def add(self, other: Usage) -> None:
        """Add the tokens of another prompt of the same request; times are those of the slowest."""
        for name in ("prompt_tokens", "cached_tokens", "completion_tokens", "reasoning_tokens"):
            setattr(self, name, getattr(self, name) + getattr(other, name))
        self.prefill_seconds = max(self.prefill_seconds, other.prefill_seconds)
        self.decode_seconds = max(self.decode_seconds, other.decode_seconds)
