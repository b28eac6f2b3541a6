"""Bodies of OpenAI's routes.

Fields that would change the answer and cannot be served are refused (images, audio, suffix, a model's own voice);
fields about accounts and storage (user, metadata, store, service_tier, …) are accepted and do nothing.
"""

from __future__ import annotations

from typing import Any, Literal

from pydantic import Field

from tiercel.serve.body import Body, Items, Numbers, VoteField
from tiercel.serve.structured import StructuredFields

MAX_INT32 = (1 << 31) - 1
Effort = Literal["none", "minimal", "low", "medium", "high", "xhigh", "max", "ultra"]


class Reasoning(Body):
    """`reasoning` of Responses, and of OpenRouter."""

    effort: str | None = None
    enabled: bool | None = None
    max_tokens: int | None = None


class StreamOptions(Body):
    include_usage: bool | None = None


class Sampled(StructuredFields):
    """What both kinds of completion take; the second half are the extensions of vLLM and llama-server."""

    model: str = Field(max_length=512, min_length=1)
    stream: bool | None = None
    stream_options: StreamOptions | None = None
    temperature: float | None = None
    top_p: float | None = None
    n: int | None = None
    stop: str | Items[str] | None = None
    seed: int | None = None
    max_tokens: int | None = None
    presence_penalty: float | None = None
    frequency_penalty: float | None = None
    logit_bias: Numbers | None = None
    user: str | None = None

    cache_salt: str | None = Field(default=None, max_length=256)
    top_k: int | None = None
    min_p: float | None = None
    repetition_penalty: float | None = None
    stop_token_ids: Items[int] | None = None
    ignore_eos: bool | None = None
    min_tokens: int | None = None
    skip_special_tokens: bool | None = None
    include_stop_str_in_output: bool | None = None
    keep_alive: int | float | str | None = None
    cache_prompt: bool | None = None
    timings_per_token: bool | None = None

    @property
    def includes_usage(self) -> bool:
        """Whether a stream ends with the usage."""
        return self.stream_options is not None and bool(self.stream_options.include_usage)

    def sampling_fields(self) -> dict[str, Any]:
        """Keywords of SamplingParams that the body names."""
        fields = {name: getattr(self, name) for name in SAMPLING_FIELDS if getattr(self, name) is not None}
        if self.stop:
            fields["stop"] = self.stop
        return limit_length(fields, self.max_tokens)


def limit_length(fields: dict[str, Any], max_tokens: int | None) -> dict[str, Any]:
    """Set max_tokens: -1 is no limit, and what no context holds is cut to its room later."""
    if max_tokens is not None:
        fields["max_tokens"] = None if max_tokens == -1 else min(max_tokens, MAX_INT32)
    return fields


SAMPLING_FIELDS = (
    "temperature", "top_p", "n", "seed", "presence_penalty", "frequency_penalty", "logit_bias", "top_k",
    "min_p", "repetition_penalty", "stop_token_ids", "ignore_eos", "min_tokens", "skip_special_tokens",
    "include_stop_str_in_output",
)  # fmt: skip


class ChatCompletion(Sampled):
    messages: Items[dict[str, Any]]
    max_completion_tokens: int | None = None
    logprobs: bool | None = None
    top_logprobs: int | None = None
    tools: Items[dict[str, Any]] | None = None
    tool_choice: str | dict[str, Any] | None = None
    parallel_tool_calls: bool | None = None
    reasoning_effort: Effort | None = None
    reasoning: Reasoning | None = None
    thinking_token_budget: int | None = None
    chat_template_kwargs: dict[str, Any] | None = None
    add_generation_prompt: bool | None = None
    continue_final_message: bool | None = None
    modalities: Items[str] | None = None
    audio: Any = None
    prediction: Any = None
    store: bool | None = None
    metadata: Any = None
    service_tier: str | None = None
    verbosity: str | None = None
    vote: VoteField | None = None  # an extension of this server
    prompt_cache_key: str | None = None

    def sampling_fields(self) -> dict[str, Any]:
        fields = super().sampling_fields()
        if self.max_completion_tokens is not None:
            limit_length(fields, self.max_completion_tokens)
        if self.logprobs:
            fields["logprobs"] = self.top_logprobs or 0
        budget = self.thinking_token_budget
        if budget is None and self.reasoning is not None:
            budget = self.reasoning.max_tokens
        if budget is not None:
            fields["thinking_budget"] = budget
        return fields


class Completion(Sampled):
    prompt: str | Items[str] | Items[int] | Items[Items[int]]
    best_of: int | None = None
    echo: bool | None = None
    logprobs: int | None = None
    suffix: str | None = None

    @property
    def scores_only(self) -> bool:
        """Whether only the prompt's own tokens are wanted, with their logprobs."""
        return bool(self.echo) and self.max_tokens == 0

    def sampling_fields(self) -> dict[str, Any]:
        fields = {"max_tokens": 16} | super().sampling_fields()
        if self.scores_only:
            fields["max_tokens"] = 1
        return fields | ({} if self.logprobs is None else {"logprobs": self.logprobs})


class EmbeddingsRequest(Body):
    model: str = Field(max_length=512, min_length=1)
    input: str | Items[str] | Items[int] | Items[Items[int]]
    dimensions: int | None = Field(default=None, ge=1, le=1 << 20)
    encoding_format: str | None = None
    user: str | None = None


class ResponsesRequest(StructuredFields):
    model: str = Field(max_length=512, min_length=1)
    input: str | Items[dict[str, Any]]
    instructions: str | None = None
    max_output_tokens: int | None = None
    reasoning: Reasoning | None = None
    temperature: float | None = None
    top_p: float | None = None
    text: dict[str, Any] | None = None
    tools: Items[dict[str, Any]] | None = None
    tool_choice: str | dict[str, Any] | None = None
    parallel_tool_calls: bool | None = None
    stream: bool | None = None
    store: bool | None = None
    previous_response_id: str | None = None
    conversation: Any = None
    background: bool | None = None
    truncation: str | None = None
    metadata: dict[str, Any] | None = None
    include: Items[str] | None = None
    user: str | None = None
    vote: VoteField | None = None  # an extension of this server
