"""Tool calls come out of an answer the same however it was cut into pieces, and nothing else is lost."""

# ruff: noqa: E501  (answers as models write them)

from __future__ import annotations

import json

import pytest
from hypothesis import given, settings
from hypothesis import strategies as st

from growth import ratio
from test_text_stream import make, run, spell
from tiercel.tokenizer.tool_formats import HERMES, LLAMA, MISTRAL, TOOL_FORMATS, ToolDelta, ToolFormat
from tiercel.tokenizer.tool_parser import ToolParser

TEMPLATES = {
    "hermes": "{% if tools %}<tools>{% endif %}... <tool_call>\n{{ call | tojson }}\n</tool_call>",
    "llama": '{{ "<|python_tag|>" + tool.name }} respond with {"name": function name, "parameters": …} {{ tools }}',
    "mistral": "[AVAILABLE_TOOLS]{{ tools }}[/AVAILABLE_TOOLS][TOOL_CALLS]",
    None: "{{ messages }}",
}


def read(form, pieces, **options):
    """(text, [(name, arguments, complete)]), put together from the parts as a client would."""
    parser = ToolParser(form, **options)
    text, calls = "", {}
    for part in [part for piece in pieces for part in parser.push(piece)] + parser.finish():
        if isinstance(part, ToolDelta):
            if part.id is not None:
                assert part.index == len(calls) and part.name
                calls[part.index] = [part.id, part.name, ""]
            calls[part.index][2] += part.arguments
        else:
            text += part
    assert [(c.id, c.name, c.arguments) for c in parser.calls] == [tuple(c) for c in calls.values()]
    return text, [(call.name, call.arguments, call.complete) for call in parser.calls]


# (form, what the model wrote, the text that is left, the calls)
ANSWERS = [
    (HERMES, "no call at all", "no call at all", []),
    (HERMES, '<tool_call>\n{"name": "f", "arguments": {"a": 1}}\n</tool_call>', "", [("f", '{"a": 1}', True)]),
    (HERMES, 'Hi.\n<tool_call>{"arguments": {"é": "</tool_call>"}, "name": "g"}</tool_call>\n', "Hi.\n",
     [("g", '{"é": "</tool_call>"}', True)]),
    (HERMES, '<tool_call>{"name":"f","arguments":{}}</tool_call>\n<tool_call>{"name":"g","arguments":{"x":[1,{"y":-2.5e3}]}}'
     '</tool_call>', "", [("f", "{}", True), ("g", '{"x":[1,{"y":-2.5e3}]}', True)]),
    (HERMES, '<tool_call>{"name": "f", "arguments": "{\\"a\\": \\"b\\"}"}</tool_call>', "", [("f", '{"a": "b"}', True)]),
    (HERMES, '<tool_call>{"name": "f"}</tool_call>', "", [("f", "{}", True)]),
    (HERMES, '<tool_call>{"name": "f", "arguments": null}</tool_call>done', "done", [("f", "{}", True)]),
    (HERMES, '<tool_call>{"name": "f", "arguments": {"a": 1}', "", [("f", '{"a": 1}', True)]),  # a brace forgotten
    (HERMES, '<tool_call>{"name": "f", "arguments": {"a": 1}</tool_call>!', "!", [("f", '{"a": 1}', True)]),
    (HERMES, '<tool_call>{"name": "f", "arguments": {"a": 1}}', "", [("f", '{"a": 1}', True)]),
    (HERMES, '<tool_call>{"name": "f", "arguments": {"a": "cut', "", [("f", '{"a": "cut', False)]),
    (HERMES, '<tool_call>{"name": "f", "argu', '<tool_call>{"name": "f", "argu', []),
    (HERMES, "<tool_call>f(a=1)</tool_call>", "<tool_call>f(a=1)</tool_call>", []),
    (HERMES, "a < b <tool_cal <<tool_call", "a < b <tool_cal <<tool_call", []),
    (HERMES, "<tool_call>", "<tool_call>", []),
    (HERMES, '<tool_call><tool_call>{"name": "f", "arguments": {}}</tool_call>', "<tool_call>", [("f", "{}", True)]),
    (HERMES, '<tool_call>{"name": "f", "arguments": [1]}</tool_call>', '<tool_call>{"name": "f", "arguments": [1]}</tool_call>',
     []),
    (HERMES, '<tool_call>{"name": 1}</tool_call>', '<tool_call>{"name": 1}</tool_call>', []),
    (HERMES, '{"name": "f", "arguments": {}}', '{"name": "f", "arguments": {}}', []),
    (HERMES, '\n\n<tool_call>{"name": "f", "arguments": {}}</tool_call>\n\nThen', "\n\nThen", [("f", "{}", True)]),
    (HERMES, "  \n", "  \n", []),
    (LLAMA, '{"name": "f", "parameters": {"q": "a b"}}', "", [("f", '{"q": "a b"}', True)]),
    (LLAMA, ' {"type": "function", "name": "f", "parameters": {}}; {"name": "g", "parameters": {"a": null}}', "",
     [("f", "{}", True), ("g", '{"a": null}', True)]),
    (LLAMA, '<|python_tag|>{"name": "f", "parameters": {}}', "", [("f", "{}", True)]),
    (LLAMA, "<|python_tag|>print(1)", "<|python_tag|>print(1)", []),
    (LLAMA, '{"answer": 42}', '{"answer": 42}', []),
    (LLAMA, '{"name": "Bob"}', '{"name": "Bob"}', []),
    (LLAMA, '{"name": "unknown", "parameters": {}}', '{"name": "unknown", "parameters": {}}', []),
    (LLAMA, 'Use {"name": "f", "parameters": {}}', 'Use {"name": "f", "parameters": {}}', []),
    (MISTRAL, '[TOOL_CALLS] [{"name": "f", "arguments": {"a": 1}}, {"name": "g", "arguments": {}}]', "",
     [("f", '{"a": 1}', True), ("g", "{}", True)]),
    (MISTRAL, '[TOOL_CALLS]f[ARGS]{"a": {"b": "[TOOL_CALLS]"}}[TOOL_CALLS]g[CALL_ID]abcdefghi[ARGS]{}', "",
     [("f", '{"a": {"b": "[TOOL_CALLS]"}}', True), ("g", "{}", True)]),
    (MISTRAL, 'ok [TOOL_CALLS]f{"a": 1}', "ok ", [("f", '{"a": 1}', True)]),
    (MISTRAL, "[TOOL_CALLS] none", "[TOOL_CALLS] none", []),
    (MISTRAL, "[1, 2]", "[1, 2]", []),
]  # fmt: skip
OPTIONS = {"names": ["f", "g"]}


@pytest.mark.parametrize("form, answer, text, calls", ANSWERS)
def test_calls_and_text_are_told_apart_letter_by_letter_and_at_once(form, answer, text, calls):
    assert read(form, [answer], **OPTIONS) == (text, calls)
    assert read(form, answer, **OPTIONS) == (text, calls)


@pytest.mark.parametrize("form, answer, text, calls", ANSWERS)
def test_whole_calls_only_are_the_complete_ones_and_a_broken_one_is_text(form, answer, text, calls):
    if all(complete for _, _, complete in calls):
        assert read(form, answer, whole=True, **OPTIONS) == (text, calls)
    else:
        assert read(form, answer, whole=True, **OPTIONS) == (answer, [])


SHARDS = ["<tool_call>", "</tool_call>", "[TOOL_CALLS]", "[ARGS]", "<|python_tag|>", "<tool", "[", "]", "{", "}", '"', ",",
          ":", ";", "\\", '"name"', '"f"', '"arguments"', '"parameters"', " ", "\n", "1", "-", "e", "true", "null", "é",
          '{"name": "f", "arguments": {"a": "x', '{"name": "f", "parameters": {}}', "f[ARGS]{", "text"]  # fmt: skip


@given(st.sampled_from([HERMES, LLAMA, MISTRAL]), st.lists(st.sampled_from(SHARDS), max_size=25), st.data())
@settings(max_examples=600, deadline=None)
def test_any_cut_of_any_output_gives_the_same(form, shards, data):
    answer = "".join(shards)
    cuts = sorted(data.draw(st.lists(st.integers(0, len(answer)), max_size=8)))
    pieces = [answer[a:b] for a, b in zip([0, *cuts], [*cuts, len(answer)], strict=True)]
    for whole in (False, True):
        once = read(form, [answer], whole=whole)
        assert read(form, pieces, whole=whole) == once
        for _, arguments, complete in once[1]:
            assert not complete or isinstance(json.loads(arguments), dict)
    if not once[1]:
        assert once[0] == answer  # nothing was a call: nothing is missing


def test_the_first_letters_of_long_arguments_do_not_wait_for_the_last():
    parser = ToolParser(HERMES)
    parser.push('<tool_call>{"name": "write", "arguments": {"text": "')
    assert parser.push("once upon") == [ToolDelta(0, arguments="once upon")]


@pytest.mark.parametrize("kind", TEMPLATES)
def test_the_template_says_how_calls_are_written(kind):
    form = ToolFormat.of(TEMPLATES[kind])
    assert (form and form.name) == kind


@pytest.mark.parametrize(
    "unit",
    ["<tool_call>", '<tool_call>{"', "<tool_call>{}", "<", " ", '<tool_call>{"name": "f", "arguments": {"a": [[['],
)
def test_hostile_output_costs_its_length(unit):
    for form in TOOL_FORMATS:
        text = unit.replace("<tool_call>", form.markers[0])
        assert ratio(lambda size, form=form, text=text: read(form, [text * (size // len(text))]), 20_000) < 24
        assert ratio(lambda size, form=form, text=text: read(form, text * (size // len(text))), 2_000) < 24
    start = '<tool_call>{"name": "f", "arguments": {"a": "'
    assert ratio(lambda size: read(HERMES, [start + "x" * size + '"}}</tool_call>']), 100_000) < 24
    assert ratio(lambda size: read(HERMES, start + "x" * size + '"}}</tool_call>'), 3_000) < 24


def test_markers_that_are_control_tokens_reach_the_parser_when_shown():
    tokenizer = make("flagged")
    ids = [tokenizer._ids["<tool_call>"], *spell(tokenizer, '{"name": "f", "arguments": {}}')]
    assert run(tokenizer, ids)[1] == '{"name": "f", "arguments": {}}'
    stream = tokenizer.stream(thinking="off", shown=HERMES.markers)
    written = [piece.text for id in ids for piece in stream.push(id)]
    assert read(HERMES, written) == ("", [("f", "{}", True)])
