"""Which objects of a schema are closed: those whose properties stand alone."""

from __future__ import annotations

import pytest

from tiercel.sampling.json_schema import close_objects

A = {"type": "object", "properties": {"a": {"type": "string"}}}
CLOSED = A | {"additionalProperties": False}


@pytest.mark.parametrize("schema, closed", [
    (A, CLOSED),
    ({"type": "array", "items": A}, {"type": "array", "items": CLOSED}),
    ({"$ref": "#/$defs/x", "$defs": {"x": A}}, {"$ref": "#/$defs/x", "$defs": {"x": CLOSED}}),
    ({"anyOf": [A, {"type": "null"}]}, {"anyOf": [CLOSED, {"type": "null"}]}),
    ({"properties": {"x": A}}, {"properties": {"x": CLOSED}, "additionalProperties": False}),
    (A | {"anyOf": [{"required": ["a"]}]}, CLOSED | {"anyOf": [{"required": ["a"]}]}),
    ({"allOf": [A]}, {"allOf": [CLOSED]}),
])  # fmt: skip
def test_objects_of_their_own_are_closed(schema, closed):
    before = repr(schema)
    assert close_objects(schema) == closed and repr(schema) == before


@pytest.mark.parametrize("schema", [
    {"type": "object"}, True, A | {"additionalProperties": True}, A | {"additionalProperties": {"type": "string"}},
    A | {"patternProperties": {"b": {}}}, {"allOf": [A, {"properties": {"b": {}}}]}, A | {"anyOf": [A]},
    {"allOf": [{"$ref": "#/$defs/x"}, A], "$defs": {"x": A}}, A | {"not": A},
])  # fmt: skip
def test_open_and_combined_ones_stay_as_they_are(schema):
    if isinstance(schema, dict) and "not" in schema:
        assert close_objects(schema)["not"] == A, "what must not be is not closed"
    else:
        assert close_objects(schema) == schema
