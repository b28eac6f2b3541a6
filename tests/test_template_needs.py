"""Templates get content and arguments in the form that they take; what they take both ways stays as it is."""

from __future__ import annotations

import json
from typing import Any

import pytest

from tiercel.errors import FormatError, RequestError
from tiercel.tokenizer.template import render
from tiercel.tokenizer.template_needs import TemplateNeeds

TURN = "{% for m in messages %}<{{ m.role }}>CONTENT{% endfor %}"
CONTENT = {
    "text": "{{ m.content }}",
    "parts": "{% for p in m.content %}{% if p.type == 'text' %}{{ p.text }}{% endif %}{% endfor %}",
    "parts by key": "{% for p in m['content'] %}{{ p['text'] }}{% endfor %}",
    "either": "{% if m.content is string %}{{ m.content }}{% else %}{{ m.content[0].text }}{% endif %}",
    "trimmed": "{{ m.content | trim }}",
    "parts of users": "{% if m.role == 'user' %}{{ m.content[0]['text'] }}{% else %}{{ m.content }}{% endif %}",
}
CALLS = "{% for m in messages %}{% for c in m.tool_calls or [] %}ARGUMENTS{% endfor %}{% endfor %}"
ARGUMENTS = {  # what the template writes: what it makes of text, and of an object
    "{{ '<' + c.function.arguments + '>' }}": ('<{"q":"x"}>', '<{"q": "x"}>'),
    "{{ c.function.arguments | tojson }}": ('{"q": "x"}', '{"q": "x"}'),
    "{% for k, v in c.function.arguments.items() %}{{ k }}={{ v }}{% endfor %}": ("q=x", "q=x"),
    "{{ c.function.arguments if c.function.arguments is string else c.function.arguments | tojson }}": (
        '{"q":"x"}', '{"q": "x"}'),
    "{{ c.function.arguments }}": ('{"q":"x"}', '{"q": "x"}'),
}  # fmt: skip


def needs(template: str) -> TemplateNeeds:
    return TemplateNeeds(lambda messages: render(template, {"messages": messages}))


def rendered(template: str, messages: list[dict[str, Any]]) -> str:
    return render(template, {"messages": [needs(template).adapt(message) for message in messages]})


@pytest.mark.parametrize("kind", CONTENT)
@pytest.mark.parametrize("as_parts", [False, True])
def test_the_words_are_in_the_prompt_in_every_form(kind: str, as_parts: bool) -> None:
    template = TURN.replace("CONTENT", CONTENT[kind])
    words = [{"type": "text", "text": "some words"}] if as_parts else "some words"
    roles = ("system", "user", "assistant", "user")
    assert rendered(template, [{"role": role, "content": words} for role in roles]) == "".join(
        f"<{role}>some words" for role in roles
    )


def test_content_that_is_nothing_or_not_text_stays() -> None:
    template = TURN.replace("CONTENT", CONTENT["parts"])
    for content in ("", None, [{"type": "image"}]):
        message = {"role": "user", "content": content}
        assert needs(template).adapt(message) == message


@pytest.mark.parametrize("template", ARGUMENTS)
def test_arguments_come_as_the_template_takes_them(template: str) -> None:
    from_text, from_object = ARGUMENTS[template]
    for arguments, expected in (('{"q":"x"}', from_text), ({"q": "x"}, from_object)):
        call = {"id": "1", "type": "function", "function": {"name": "f", "arguments": arguments}}
        messages = [{"role": "assistant", "content": None, "tool_calls": [call]}]
        assert rendered(CALLS.replace("ARGUMENTS", template), messages) == expected


def test_arguments_that_are_no_object_are_refused_where_one_is_needed() -> None:
    call = {"function": {"name": "f", "arguments": "q=x"}}
    message = {"role": "assistant", "tool_calls": [call]}
    with pytest.raises(RequestError, match="JSON object, not 'q=x'"):
        needs(CALLS.replace("ARGUMENTS", "{{ c.function.arguments | tojson }}")).adapt(message)
    text = CALLS.replace("ARGUMENTS", "{{ '' + c.function.arguments }}")
    assert rendered(text, [message]) == "q=x"


def test_a_template_is_asked_once_and_one_that_takes_too_long_never_again() -> None:
    asked = []

    def slow(messages: list[dict[str, Any]]) -> str:
        asked.append(messages)
        raise FormatError("ended")

    found, message = TemplateNeeds(slow), {"role": "user", "content": "a"}
    assert [found.adapt(message) for _ in range(3)] == [message] * 3 and len(asked) == 1
    asked.clear()
    found = TemplateNeeds(lambda messages: asked.append(messages) or json.dumps(messages))
    for _ in range(3):
        found.adapt(message)
    assert len(asked) <= 2
