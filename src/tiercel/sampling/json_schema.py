"""JSON schemas as answers follow them: an object has its own properties and no others, unless its schema says so."""

from __future__ import annotations

from collections.abc import Iterator
from typing import Any

TABLES = ("properties", "patternProperties", "$defs", "definitions")  # keywords whose values are schemas by name
LISTS = ("anyOf", "oneOf", "prefixItems")
NESTED = ("items", "additionalItems", "additionalProperties")
OPENING = ("additionalProperties", "unevaluatedProperties", "patternProperties", "allOf", "$ref", "if")


def close_objects(schema: Any) -> Any:
    """The schema with `additionalProperties: false` where `properties` stand alone, as llama.cpp and Ollama read it.

    Parts that are combined (`allOf`, or `anyOf` beside `properties`) stay open: each alone would forbid the others'
    properties.
    """
    return _close(schema, set(_combined_refs(schema)))


def _close(schema: Any, open_refs: set[str], where: str = "#") -> Any:
    if not isinstance(schema, dict) or where in open_refs:
        return schema
    out = dict(schema)
    for name in TABLES:
        if isinstance(schema.get(name), dict):
            out[name] = {key: _close(value, open_refs, f"{where}/{name}/{key}") for key, value in schema[name].items()}
    combined = "properties" in schema
    for name in LISTS:
        if isinstance(schema.get(name), list) and not (combined and name != "prefixItems"):
            out[name] = [_close(value, open_refs, f"{where}/{name}/{i}") for i, value in enumerate(schema[name])]
    for name in NESTED:
        if isinstance(schema.get(name), dict):
            out[name] = _close(schema[name], open_refs, f"{where}/{name}")
    parts = schema.get("allOf")
    if isinstance(parts, list) and len(parts) == 1 and not combined:
        out["allOf"] = [_close(parts[0], open_refs, f"{where}/allOf/0")]
    extended = any(_names_properties(part) for name in ("anyOf", "oneOf") for part in _list(schema.get(name)))
    if isinstance(schema.get("properties"), dict) and not extended and not any(name in schema for name in OPENING):
        out["additionalProperties"] = False
    return out


def _names_properties(part: Any) -> bool:
    return isinstance(part, dict) and any(name in part for name in ("properties", "$ref", "allOf", "anyOf", "oneOf"))


def _list(value: Any) -> list[Any]:
    return value if isinstance(value, list) else []


def _combined_refs(schema: Any) -> Iterator[str]:
    """Where the schemas are that some part combines with others."""
    pending = [schema]
    while pending:
        part = pending.pop()
        if isinstance(part, dict):
            parts = _list(part.get("allOf"))
            if "properties" in part:
                parts = [part, *parts, *_list(part.get("anyOf")), *_list(part.get("oneOf"))]
            for each in parts if len(parts) > 1 or "$ref" in part else ():
                if isinstance(each, dict) and isinstance(each.get("$ref"), str):
                    yield each["$ref"]
        pending += part.values() if isinstance(part, dict) else _list(part)
