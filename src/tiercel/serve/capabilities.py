"""What a model can do, read from its chat template."""

from __future__ import annotations

from typing import TYPE_CHECKING

if TYPE_CHECKING:
    from tiercel.tokenizer.tokenizer import Tokenizer
    from tiercel.tokenizer.tool_formats import ToolFormat


def capabilities(template: str) -> list[str]:
    """The capabilities of /api/show.  template: all chat templates of the model, or ""."""
    found = ["completion", "embedding"]
    if tool_format(template) is not None:
        found.append("tools")
    return [*found, "thinking"] if can_reason(template) else found


def can_reason(template: str) -> bool:
    """Whether a chat template has a place for reasoning."""
    return "<think>" in template or "enable_thinking" in template


def tool_format(template: str) -> ToolFormat | None:
    """How the model writes tool calls; None where its template has no tools."""
    from tiercel.tokenizer.tool_formats import ToolFormat

    return ToolFormat.of(template) if "tools" in template else None


def template_text(tokenizer: Tokenizer | None) -> str:
    """All chat templates of a tokenizer as one text."""
    return "" if tokenizer is None else "\n".join(tokenizer.templates.values())
