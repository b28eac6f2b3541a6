"""Control tokens written by a person stay text, whatever the template does with the words around them."""

from __future__ import annotations

import json
import random
from pathlib import Path
from typing import Any

import pytest
from tokenizers import AddedToken
from tokenizers import Tokenizer as HFTokenizer
from transformers import PreTrainedTokenizerFast

from small_tokenizers import CONTROL, TAGS, byte_level, sentencepiece
from tiercel.errors import RequestError
from tiercel.tokenizer.tokenizer import Tokenizer

CHATML = (
    "{% for message in messages %}"
    "{{'<|im_start|>' + message['role'] + '\n' + message['content'] + '<|im_end|>' + '\n'}}{% endfor %}"
    "{% if add_generation_prompt %}{{ '<|im_start|>assistant\n' }}{% endif %}"
)
LLAMA3 = (
    "{{ bos_token }}{% for message in messages %}"
    "{{ '<|start_header_id|>' + message['role'] + '<|end_header_id|>\n\n' }}"
    "{{ message['content'] | trim }}{{ '<|eot_id|>' }}{% endfor %}"
    "{% if add_generation_prompt %}{{ '<|start_header_id|>assistant<|end_header_id|>\n\n' }}{% endif %}"
)
MISTRAL = (
    "{{ bos_token }}{% for message in messages %}{% if message['role'] == 'user' %}"
    "{{ '[INST] ' + message['content'] + ' [/INST]' }}"
    "{% elif message['role'] == 'assistant' %}{{ message['content'] + eos_token }}{% endif %}{% endfor %}"
)
PHI3 = (
    "{% for message in messages %}{{ '<|' + message['role'] + '|>\n' + message['content'] + '<|end|>\n' }}{% endfor %}"
    "{% if add_generation_prompt %}{{ '<|assistant|>\n' }}{% endif %}"
)
# Falcon-H1R: a system turn of its own, tools and results in tags, thoughts dropped before the last question.
FALCON_H1R = """
{%- if messages[0].role == 'system' %}{% set system = messages[0].content %}{% else %}{% set system = 'You are Falcon.
You think within <think> </think> tags.' %}{% endif %}
{{- '<|im_start|>system\n' + system + '\n' }}
{%- if tools %}{{ '# Tools\n<tools>\n' }}
{%- for tool in tools %}{{ tool | tojson }}{{ '\n' }}{% endfor %}{{ '</tools>\n' }}{% endif %}
{{- '<|im_end|>\n' }}
{%- set ns = namespace(last=-1) %}
{%- for m in messages %}
    {%- if m.role == 'user' and not m.content.startswith('<tool_response>') %}{% set ns.last = loop.index0 %}{% endif %}
{%- endfor %}
{%- for m in messages %}
    {%- if m.role == 'tool' %}
        {{- '<|im_start|>user\n<tool_response>\n' + m.content + '\n</tool_response><|im_end|>\n' }}
    {%- elif m.role == 'assistant' %}
        {%- set content = m.content %}
        {%- if '</think>' in content and loop.index0 < ns.last %}
            {%- set content = content.split('</think>')[-1].lstrip('\n') %}
        {%- endif %}
        {{- '<|im_start|>assistant\n' + content }}
        {%- for call in m.tool_calls or [] %}
            {{- '\n<tool_call>\n' + (call.function | tojson) + '\n</tool_call>' }}
        {%- endfor %}
        {{- '<|im_end|>\n' }}
    {%- elif m.role != 'system' %}
        {{- '<|im_start|>' + m.role + '\n' + m.content + '<|im_end|>\n' }}
    {%- endif %}
{%- endfor %}
{%- if add_generation_prompt %}{{ '<|im_start|>assistant\n' }}{% endif %}
"""
STYLES = {"chatml": CHATML, "llama3": LLAMA3, "mistral": MISTRAL, "phi3": PHI3, "falcon-h1r": FALCON_H1R}
MORE = ["<|start_header_id|>", "<|end_header_id|>", "<|eot_id|>", "<|user|>", "<|assistant|>", "<|system|>", "<|end|>"]
MORE += ["[INST]", "[/INST]", "<tool_response>", "</tool_response>", "</tool_call>", "<tools>"]
ALL = [*CONTROL, *TAGS, *MORE]


def make(folder: Path, template: str | None, base: dict[str, Any] | None = None, flagged: bool = True) -> Tokenizer:
    source = HFTokenizer.from_str(json.dumps(base or byte_level("llama-bpe")))
    add = source.add_special_tokens if flagged else source.add_tokens
    add([AddedToken(token, normalized=False) for token in MORE])
    folder.mkdir(exist_ok=True)
    (folder / "tokenizer.json").write_text(source.to_str())
    config = {"bos_token": "<s>", "eos_token": "</s>", "tokenizer_class": "PreTrainedTokenizerFast"}
    (folder / "tokenizer_config.json").write_text(
        json.dumps(config | ({"chat_template": template} if template else {}))
    )
    tokenizer = Tokenizer.from_folder(folder)
    assert tokenizer is not None
    return tokenizer


def steering(tokenizer: Tokenizer, ids: list[int]) -> list[int]:
    names = {tokenizer.decode([id], special=True) for id in ids}
    assert names
    return [id for id in ids if tokenizer.decode([id], special=True) in ALL]


@pytest.mark.parametrize("style", STYLES)
def test_ordinary_conversations_get_the_ids_of_transformers(style: str, tmp_path: Path) -> None:
    tokenizer = make(tmp_path, STYLES[style])
    original = PreTrainedTokenizerFast.from_pretrained(tmp_path)
    conversation = [{"role": "user", "content": "  hi é 🙂\n\n"}]
    for more in (
        [],
        [{"role": "assistant", "content": "<think>\nhm\n</think>\n\nYes."}, {"role": "user", "content": "> why\n"}],
        [{"role": "assistant", "content": "a"}, {"role": "user", "content": "1 < 2 and [x] |y| <"}],
    ):
        messages = conversation + more
        wanted = original.apply_chat_template(messages, add_generation_prompt=True, return_dict=False)
        assert tokenizer.chat(messages) == wanted
        assert tokenizer.render(messages) == original.apply_chat_template(
            messages, add_generation_prompt=True, tokenize=False
        )


@pytest.mark.parametrize("flagged", [True, False], ids=["flagged", "unflagged"])
@pytest.mark.parametrize("style", STYLES)
def test_control_text_in_content_gives_no_control_ids(style: str, flagged: bool, tmp_path: Path) -> None:
    tokenizer = make(tmp_path, STYLES[style], flagged=flagged)
    original = PreTrainedTokenizerFast.from_pretrained(tmp_path)
    scaffold = steering(tokenizer, tokenizer.chat([{"role": "user", "content": "x"}]))
    assert scaffold or style == "none"
    for token in ALL:
        for content in (token, f"a {token}", f"{token} b", f"  x{token}{token}y\n"):
            messages = [{"role": "user", "content": content}]
            ids = tokenizer.chat(messages)
            assert steering(tokenizer, ids) == scaffold, content
            rendered = original.apply_chat_template(messages, add_generation_prompt=True, tokenize=False)
            assert tokenizer.render(messages) == rendered, "the template saw other words"
            assert tokenizer.decode(ids, special=True) == rendered


def test_names_tools_calls_and_results_are_content_too(tmp_path: Path) -> None:
    tokenizer = make(tmp_path, FALCON_H1R)

    def ids(word: str) -> list[int]:
        tools = [{"type": "function", "function": {"name": word, "description": word, "parameters": {word: [word]}}}]
        call = {"type": "function", "function": {"name": word, "arguments": {word: word}}}
        messages = [
            {"role": "user", "content": word, "name": word},
            {"role": "assistant", "content": "ok", "tool_calls": [call]},
            {"role": "tool", "content": word, "name": word},
        ]
        return tokenizer.chat(messages, tools=tools)

    plain = steering(tokenizer, ids("x"))
    assert len(plain) > 8
    for token in ALL:
        assert steering(tokenizer, ids(f"a{token}b")) == plain


def test_control_text_put_together_from_two_places_stays_text(tmp_path: Path) -> None:
    template = "{% for m in messages %}{{ m.name }}{{ m.content }}{{ '|>' }}{% endfor %}{{ '<|im_start|>' }}"
    tokenizer = make(tmp_path, template)
    start = tokenizer.encode("<|im_start|>", special=True)
    for token in ("</s>", "<|im_end|>", "[/INST]", "</think>"):
        for cut in range(1, len(token)):
            messages = [{"role": "user", "name": token[:cut], "content": token[cut:]}]
            assert steering(tokenizer, tokenizer.chat(messages)) == start, (token, cut)
            ids = tokenizer.chat([{"role": "user", "name": "x", "content": token[:cut]}] * 2)
            assert steering(tokenizer, ids) == start, (token, cut)
    for cut in range(1, 3):
        ids = tokenizer.chat([{"role": "user", "name": "x", "content": "<|im_end|>"[:-cut]}])
        assert steering(tokenizer, ids) == start


def test_template_filters_do_not_uncover_what_is_hidden(tmp_path: Path) -> None:
    template = (
        "{% set c = messages[0].content %}{{ c | upper | lower }}|{{ c[2:] }}|{{ c[:-3] }}|{{ c | tojson }}|"
        "{{ c | length }}|{{ c.split(' ') | join(' ') }}|"
        "{{ c | tojson(ensure_ascii=True) }}|{{ c | replace('é', '') }}|{{ c | reverse | reverse }}|"
        "{{ c | truncate(20, true, '') }}|{{ c | escape }}|{{ c | string | list | join }}|{{ c | trim }}"
    )
    tokenizer = make(tmp_path, template)
    original = PreTrainedTokenizerFast.from_pretrained(tmp_path)
    messages = [{"role": "user", "content": " é 🙂 a<|im_end|> <a|im_end|> b</s> [INST] \\ue000 \ue000\uf000 c  "}]
    assert steering(tokenizer, tokenizer.chat(messages)) == []
    wanted = original.apply_chat_template(messages, tokenize=False)
    rendered = tokenizer.render(messages)
    assert rendered.replace("&lt;", "<") == wanted.replace("&lt;", "<")


def test_thoughts_in_the_model_s_own_words_are_dropped_or_kept_as_its_tokens(tmp_path: Path) -> None:
    tokenizer = make(tmp_path, FALCON_H1R)
    open_, close = (tokenizer.encode(tag, special=True)[0] for tag in TAGS[:2])
    thought = {"role": "assistant", "content": "<think>\nsecret\n</think>\n\nYes <|im_end|>"}
    question = {"role": "user", "content": "q </think>"}
    dropped = tokenizer.chat([question, thought, question])
    assert dropped.count(close) == 1, "only the system turn's own"
    assert "secret" not in tokenizer.decode(dropped)
    kept = tokenizer.chat([question, thought])
    assert kept.count(open_) == kept.count(close) == 2
    assert kept.count(tokenizer.encode("<|im_end|>", special=True)[0]) == 3, (
        "system, user, assistant; not the one in the answer"
    )


@pytest.mark.parametrize("special", [True, False])
def test_encode_spells_control_text_out_unless_told(special: bool, tmp_path: Path) -> None:
    tokenizer = make(tmp_path, CHATML)
    for token in ALL:
        ids = tokenizer.encode(f"a{token}b", special=special)
        assert len(steering(tokenizer, ids)) == special
        assert tokenizer.decode(ids, special=True) == f"a{token}b"


@pytest.mark.parametrize("prefix", ["always", "first", "never"])
def test_sentencepiece_style_is_as_safe(prefix: str, tmp_path: Path) -> None:
    tokenizer = make(tmp_path, MISTRAL, sentencepiece(prefix))
    scaffold = steering(tokenizer, tokenizer.chat([{"role": "user", "content": "x"}]))
    for token in ALL:
        messages = [{"role": "user", "content": f"a {token} b"}]
        assert steering(tokenizer, tokenizer.chat(messages)) == scaffold
        assert tokenizer.decode(tokenizer.encode(f"a {token}")) == f"a {token}"


def test_a_control_token_that_merges_could_spell_is_cut(tmp_path: Path) -> None:
    """ignore_merges and sentencepiece find a whole word in the vocabulary, flagged or not."""
    source = byte_level("llama-bpe")
    word = next(t for t in source["model"]["vocab"] if t.isascii() and t.isalpha() and len(t) > 3)
    source["added_tokens"].append(source["added_tokens"][0] | {"content": word, "id": source["model"]["vocab"][word]})
    tokenizer = make(tmp_path, CHATML, source)
    control = tokenizer.encode(word, special=True)
    assert len(control) == 1
    for string in (word, f"a {word} {word}b", word * 3):
        ids = tokenizer.encode(string)
        assert control[0] not in ids
        assert tokenizer.decode(ids) == string


def test_random_content_never_steers(tmp_path: Path) -> None:
    tokenizer = make(tmp_path, LLAMA3)
    scaffold = steering(tokenizer, tokenizer.chat([{"role": "user", "content": "x"}]))
    source = random.Random(5)
    parts = [token[a:b] for token in ALL for a, b in ((0, None), (0, 3), (3, None), (1, -1))] + [
        " ",
        "\n",
        "x",
        "\ue000",
        "é",
    ]
    for _ in range(150):
        content = "".join(source.choices(parts, k=source.randint(1, 8)))
        ids = tokenizer.chat([{"role": "user", "content": content}])
        assert steering(tokenizer, ids) == scaffold, content
        assert content.strip() in tokenizer.decode(ids, special=True)


def test_roles_are_words(tmp_path: Path) -> None:
    tokenizer = make(tmp_path, PHI3)
    for role in ("user|>", "<|im_end|>", "", None, 5, "user\n", "a" * 100):
        with pytest.raises(RequestError, match="role"):
            tokenizer.chat([{"role": role, "content": "x"}])


def test_conversations_that_cannot_be_rendered_say_why(tmp_path: Path) -> None:
    tokenizer = make(tmp_path, CHATML)
    for messages in ([], {}, "hi", ["hi"], [{"content": "x"}], None):
        with pytest.raises(RequestError):
            tokenizer.chat(messages)  # type: ignore[arg-type]
    deep: Any = "x"
    for _ in range(80):
        deep = [deep]
    for content in (deep, {"a", "b"}, object()):
        with pytest.raises(RequestError):
            tokenizer.chat([{"role": "user", "content": content}])
    with pytest.raises(RequestError, match="surrogate"):
        tokenizer.chat([{"role": "user", "content": "\ud800"}])
    every = "".join(map(chr, range(0xE000, 0xF8FF)))
    with pytest.raises(RequestError, match="private-use"):
        tokenizer.chat([{"role": "user", "content": every}])


def test_without_a_template_the_error_says_what_to_do(tmp_path: Path) -> None:
    tokenizer = make(tmp_path, None)
    assert not tokenizer.has_template
    with pytest.raises(RequestError, match=r"no chat template.*--raw"):
        tokenizer.chat([{"role": "user", "content": "x"}])


def test_the_template_for_tools_is_used_with_tools(tmp_path: Path) -> None:
    tokenizer = make(tmp_path, None)
    (tmp_path / "chat_template.jinja").write_text("plain")
    (tmp_path / "additional_chat_templates").mkdir()
    (tmp_path / "additional_chat_templates" / "tool_use.jinja").write_text("{{ tools | length }} tools{{ x }}")
    tokenizer = Tokenizer.from_folder(tmp_path)  # type: ignore[assignment]
    messages = [{"role": "user", "content": "x"}]
    assert tokenizer.has_template
    assert tokenizer.render(messages) == "plain"
    assert tokenizer.render(messages, tools=[{"name": "f"}], x="!") == "1 tools!"


@pytest.mark.parametrize("style", ["chatml", "llama3", "mistral"])
@pytest.mark.parametrize("ending", ["Once upon", "Once upon ", "Once </s> <|im_end|> a <"])
def test_an_unfinished_answer_is_continued(style: str, ending: str, tmp_path: Path) -> None:
    tokenizer = make(tmp_path, STYLES[style])
    original = PreTrainedTokenizerFast.from_pretrained(tmp_path)
    messages = [{"role": "user", "content": "tell"}, {"role": "assistant", "content": ending}]
    wanted = original.apply_chat_template(messages, tokenize=False, continue_final_message=True)
    assert tokenizer.render(messages, continue_final=True) == wanted
    assert tokenizer.decode(tokenizer.chat(messages, continue_final=True), special=True) == wanted
    parts = [messages[0], {"role": "assistant", "content": [{"type": "text", "text": ending}]}]
    listed = "{{ messages[-1].content[0].text }}{{ '<|im_end|>' }}"
    assert make(tmp_path, listed).render(parts, continue_final=True) == ending
    with pytest.raises(RequestError, match="no text to continue"):
        tokenizer.chat([{"role": "assistant", "content": None}], continue_final=True)
    with pytest.raises(RequestError, match="leaves out"):
        make(tmp_path, "nothing").chat(messages, continue_final=True)
