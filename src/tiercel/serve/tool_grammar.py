"""The grammar of a tool call that a request forces."""

from __future__ import annotations

import json
from collections.abc import Sequence

from tiercel.errors import RequestError
from tiercel.sampling.json_schema import close_objects
from tiercel.serve.types import Tool

COMPACT = {"whitespace_flexible": False, "item_separator": ", ", "key_separator": ": ", "coerce_one_of": True,
           "lenient": True}  # fmt: skip


def call_grammar(tools: Sequence[Tool]) -> str:
    """Lark grammar of one call of one of these functions, spaced as models write it.  Raises RequestError."""
    calls = []
    for tool in tools:
        function = tool["function"]
        if not isinstance(function.get("parameters") or {}, dict):
            raise RequestError(f"the parameters of {function['name']} must be a JSON schema")
        begin = f'{{"name": {json.dumps(function["name"])}, "arguments": '
        schema = {"type": "object", **close_objects(function.get("parameters") or {}), "x-guidance": COMPACT}
        calls.append(f'{json.dumps(begin)} %json {json.dumps(schema)} "}}"')
    return "start: " + " | ".join(calls)
