"""The form of an answer, under the names that OpenAI, vLLM, llama-server and SGLang have for it."""

from __future__ import annotations

from typing import Any

from tiercel.serve.body import Body, Items
from tiercel.serve.errors import APIError

# field of a request → keyword of sampling.params.Structured
FIELDS = {
    "guided_json": "json", "json_schema": "json", "guided_regex": "regex", "regex": "regex", "guided_choice": "choice",
    "guided_grammar": "grammar", "grammar": "grammar", "ebnf": "grammar", "guided_json_object": "json_object",
}  # fmt: skip
KEYWORDS = ("json", "regex", "grammar", "choice", "json_object")


class StructuredFields(Body):
    """A base of requests whose answer may have a form."""

    response_format: dict[str, Any] | None = None
    structured_outputs: dict[str, Any] | None = None
    guided_json: dict[str, Any] | str | None = None
    guided_regex: str | None = None
    guided_choice: Items[str] | None = None
    guided_grammar: str | None = None
    guided_json_object: bool | None = None
    grammar: str | None = None
    json_schema: dict[str, Any] | str | None = None
    regex: str | None = None
    ebnf: str | None = None
    structural_tag: Any = None

    def structured(self) -> dict[str, Any] | None:
        """Keywords of `Structured`, None for free text.  Raises APIError 400."""
        if self.structural_tag:
            raise APIError(400, "structural_tag is not supported; use response_format", param="structural_tag")
        forms = {name: {keyword: getattr(self, name)} for name, keyword in FIELDS.items() if getattr(self, name)}
        if self.structured_outputs:
            forms["structured_outputs"] = _one_keyword(self.structured_outputs)
        if (form := _response_format(self.response_format)) is not None:
            forms["response_format"] = form
        if len(forms) > 1:
            names = " and ".join(sorted(forms))
            raise APIError(400, f"an answer has one form, and {names} each give one; leave all but one out")
        return next(iter(forms.values()), None)

    def check_size(self, limit: int, *more: Any) -> None:
        """Raise APIError 400 where the form, and `more` with it, has more than `limit` bytes of JSON."""
        forms = [getattr(self, name) for name in (*FIELDS, "response_format", "structured_outputs")]
        check_schema_size([forms, more], limit)


def check_schema_size(value: Any, limit: int) -> None:
    """Raise APIError 400 where tools and schemas have more than `limit` characters, values' commas included."""
    pending, size = [value], 0
    while pending and size <= limit:
        item = pending.pop()
        if isinstance(item, dict):
            pending += [*item.keys(), *item.values()]
        elif isinstance(item, (list, tuple)):
            pending += item
        size += 2 + (len(item) if isinstance(item, str) else 0)
    if size > limit:
        raise APIError(400, f"schemas and tools may be {limit} bytes together")


def _one_keyword(fields: dict[str, Any]) -> dict[str, Any]:
    """vLLM's `structured_outputs`."""
    found = {name: fields[name] for name in KEYWORDS if fields.get(name)}
    if len(found) != 1 or fields.get("structural_tag"):
        raise APIError(400, f"structured_outputs takes one of {', '.join(KEYWORDS)}", param="structured_outputs")
    return found


def _response_format(fields: dict[str, Any] | None) -> dict[str, Any] | None:
    """OpenAI's `response_format`; llama-server and others also put the schema beside the type."""
    kind = (fields or {"type": "text"}).get("type")
    if kind == "text":
        return None
    if fields is not None and kind in ("json_object", "json_schema"):
        named = fields.get("json_schema")
        schema = named.get("schema") if isinstance(named, dict) else None
        schema = fields.get("schema") if schema is None else schema
        if schema is None and kind == "json_object":
            return {"json_object": True}
        if isinstance(schema, dict):
            return {"json": schema}
    raise APIError(400, "response_format must be text, json_object or json_schema with a schema",
                  param="response_format")  # fmt: skip
