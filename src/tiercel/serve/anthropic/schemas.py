"""Bodies of Anthropic's routes.

Fields about accounts, caching and hosted tools are accepted and do nothing; images are refused.
"""

from __future__ import annotations

from typing import Any, Literal

from pydantic import Field

from tiercel.serve.body import Body, Items
from tiercel.serve.errors import APIError
from tiercel.serve.structured import StructuredFields
from tiercel.serve.types import Think


class Thinking(Body):
    type: Literal["enabled", "disabled", "adaptive"]
    budget_tokens: int | None = None


class OutputConfig(Body):
    effort: Literal["low", "medium", "high", "max"] | None = None
    format: dict[str, Any] | None = None


class ToolChoice(Body):
    type: Literal["auto", "any", "tool", "none"]
    name: str | None = None
    disable_parallel_tool_use: bool | None = None


class CountTokens(StructuredFields):
    model: str = Field(max_length=512, min_length=1)
    messages: Items[dict[str, Any]]
    system: str | Items[dict[str, Any]] | None = None
    tools: Items[dict[str, Any]] | None = None
    tool_choice: ToolChoice | None = None
    thinking: Thinking | None = None
    output_config: OutputConfig | None = None
    output_format: dict[str, Any] | None = None
    cache_control: Any = None
    context_management: Any = None
    mcp_servers: Any = None

    @property
    def think(self) -> Think:
        """Off unless it is enabled, as in Anthropic's API."""
        if self.thinking is None or self.thinking.type == "disabled":
            return False
        return (self.output_config and self.output_config.effort) or True

    def structured(self) -> dict[str, Any] | None:
        form = super().structured()
        wanted = self.output_format or (self.output_config and self.output_config.format)
        if not wanted:
            return form
        schema = wanted.get("schema")
        if wanted.get("type") != "json_schema" or not isinstance(schema, dict) or form is not None:
            raise APIError(400, "output_format must be json_schema with a schema, and the only form that is given")
        return {"json": schema}


class Messages(CountTokens):
    max_tokens: int
    stream: bool | None = None
    temperature: float | None = None
    top_p: float | None = None
    top_k: int | None = None
    stop_sequences: Items[str] | None = None
    metadata: Any = None
    service_tier: str | None = None
    container: Any = None
    inference_geo: Any = None

    def sampling_fields(self) -> dict[str, Any]:
        """Keywords of SamplingParams that the body names."""
        fields = {name: getattr(self, name) for name in ("temperature", "top_p", "top_k", "max_tokens")}
        if self.stop_sequences:
            fields["stop"] = self.stop_sequences
        if self.thinking is not None and self.thinking.type == "enabled":
            fields["thinking_budget"] = self.thinking.budget_tokens
        return {name: value for name, value in fields.items() if value is not None}
