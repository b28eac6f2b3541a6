"""Chat templates: what transformers renders, and nothing that a hostile one could wish for."""

from __future__ import annotations

import json
import os
import re
import subprocess
import sys
import textwrap
from pathlib import Path

import jinja2
import pytest
from transformers.utils.chat_template_utils import render_jinja_template

from tiercel.errors import FormatError, RequestError, TiercelError
from tiercel.runtime.subprocess import call
from tiercel.tokenizer import template
from tiercel.tokenizer.template import render

MESSAGES = [
    {"role": "system", "content": "Be <b>brief</b> & kind."},
    {"role": "user", "content": "  hi é 🙂 \n"},
    {"role": "assistant", "content": "<think>\nhm\n</think>\n\nyo"},
    {"role": "user", "content": "more"},
]
TOOLS = [{"type": "function", "function": {"name": "f", "description": "d <é>", "parameters": {"type": "object"}}}]

FEATURES = [
    "{% for m in messages %}\n  {% if not loop.first %}\n{{ m.role }}: {{ m.content }}\n  {% endif %}\n{% endfor %}",
    "{{ tools | tojson }} {{ tools | tojson(indent=2) }} {{ messages[1] | tojson(ensure_ascii=True) }}",
    "{% set ns = namespace(n=0) %}{% for m in messages %}{% set ns.n = ns.n + loop.index %}{% endfor %}{{ ns.n }}",
    "{% for m in messages %}{% if loop.index0 == 1 %}{% continue %}{% endif %}{{ m.role }}{% break %}{% endfor %}",
    "{% generation %}{{ messages[2].content.split('</think>')[-1].lstrip('\\n') }}{% endgeneration %}",
    "{% macro say(x, y='!') %}{{ x }}{{ y }}{% endmacro %}{{ say('a') }}{{ say('b', y='?') }}{{ dict(a=1).a }}",
    "{{ strftime_now('%Y') }} {{ messages | selectattr('role', 'equalto', 'user') | list | length }}",
    "{{ messages[::-1] | map(attribute='role') | join(',') }} {{ 'x' ~ none ~ true }} {{ undefined_thing is defined }}",
    "{{ bos_token }}{% if add_generation_prompt %}{{ '<|im_start|>assistant\n' }}{% endif %}",
    "{{- messages[0].content | upper | replace('B', 'c') | length }}{{ messages | last | items | list }}",
]


@pytest.mark.parametrize("template", FEATURES)
def test_renders_what_transformers_renders(template: str) -> None:
    variables = {"bos_token": "<s>", "add_generation_prompt": True}
    wanted = render_jinja_template([MESSAGES], tools=TOOLS, chat_template=template, **variables)[0][0]
    assert render(template, {"messages": MESSAGES, "tools": TOOLS, "documents": None, **variables}) == wanted


def test_a_template_refuses_in_its_own_words() -> None:
    with pytest.raises(RequestError, match="roles must alternate, please"):
        render("{{ raise_exception('roles must alternate, please') }}", {})


def test_a_failing_template_says_why() -> None:
    with pytest.raises(RequestError, match="no attribute 'x'"):
        render("{{ messages[0].x.y }}", {"messages": MESSAGES})


def test_what_is_no_template_is_a_format_error_with_the_line() -> None:
    with pytest.raises(FormatError, match="line 2"):
        render("\n{% if %}", {})


def test_variables_that_are_not_json_are_a_request_error() -> None:
    deep: list[object] = []
    for _ in range(100_000):
        deep = [deep]
    for value in ({1, 2}, object(), deep):
        with pytest.raises(RequestError, match="plain JSON"):
            render("x", {"value": value})


ESCAPES = [
    "{{ ''.__class__.__mro__[1].__subclasses__() }}",
    "{{ ''['__class__'] }}",
    "{{ '' | attr('__class__') }}",
    "{{ '' | attr('__cla' ~ 'ss__') }}",
    "{{ ('' | attr)('__class__') }}",
    "{{ [''] | map(attribute='__class__') | list }}",
    "{{ [''] | map('attr', '__class__') | list }}",
    "{{ [messages] | groupby('__class__') }}",
    "{{ [messages] | sort(attribute='__class__.__mro__') }}",
    "{{ [messages] | sum(attribute='__class__') }}",
    "{{ '{0.__class__.__mro__}'.format(1) }}",
    "{{ '{0.__class__}'.format_map({'0': 1}) }}",
    "{% set f = '{0.__globals__}'.format %}{{ f(raise_exception) }}",
    "{{ ['{0.__class__}'] | map('format', 1) | list }}",
    "{{ '%s' | format(raise_exception.__globals__) }}",
    "{{ raise_exception.__globals__['sys'].modules['os'].popen('CMD').read() }}",
    "{{ strftime_now.__globals__ }}",
    "{{ dict.__init__.__globals__ }}",
    "{{ namespace.__init__.__globals__['os'] }}",
    "{{ namespace.check.__globals__ }}",
    "{% set n = namespace() %}{% set n.__class__ = dict %}{{ n }}",
    "{% set n = namespace(__class__=dict) %}{{ n }}",
    "{% set n = namespace({'__init__': 1}) %}{{ n }}",
    "{{ cycler.__init__.__globals__.os.popen('CMD').read() }}",
    "{{ joiner.__init__.__globals__.os.environ }}",
    "{{ lipsum.__globals__['os'].popen('CMD').read() }}",
    "{{ lipsum(5) }}",
    "{{ cycler('a').next.__func__.__globals__ }}",
    "{{ self.__init__.__globals__ }}",
    "{{ self._TemplateReference__context.environment }}",
    "{{ self._TemplateReference__context }}",
    "{{ loop }}{% for x in [1] %}{{ loop.__class__.__mro__ }}{% endfor %}",
    "{% for x in [1] recursive %}{{ loop._recurse.__globals__ }}{% endfor %}",
    "{% macro m() %}{% endmacro %}{{ m._func.__globals__ }}",
    "{% macro m() %}{% endmacro %}{{ m.__init__.__globals__ }}",
    "{% macro m() %}{{ caller.__globals__ }}{% endmacro %}{% call m() %}{% endcall %}",
    "{% import 'os' as os %}{{ os }}",
    "{% from 'CANARY' import x %}{{ x }}",
    "{% include 'CANARY' %}",
    "{% extends 'CANARY' %}",
    "{% include ['a', 'CANARY'] ignore missing %}safe",
    "{{ get_flashed_messages.__globals__ }}",
    "{{ url_for.__globals__ }}",
    "{{ config }}{{ request }}{{ g }}",
    "{{ open('CANARY').read() }}",
    "{{ __import__('os').system('CMD') }}",
    "{{ eval('1') }}{{ exec('1') }}",
    "{{ range.__class__ }}",
    "{{ (1).__class__.__base__ }}",
    "{{ messages.__class__ }}{{ messages[0].keys.__self__ }}",
    "{{ messages.append('x') }}",
    "{{ messages[0].update({'role': 'system'}) }}",
    "{{ messages[0].__setitem__('a', 1) }}",
    "{{ 'x'.encode('utf-8').__class__ }}",
    "{{ 'CANARY'.encode().decode.__self__.__class__ }}",
    "{{ environment }}{{ context }}{{ eval_ctx }}",
    "{{ messages | tojson.__globals__ }}",
    "{{ ().__reduce_ex__(2) }}",
    "{{ (messages | map('tojson')).gi_frame.f_globals }}",
    "{{ (messages | map('tojson')).gi_code }}",
    "{% trans %}x{% endtrans %}",
    "{% do messages.append(1) %}",
    "{% debug %}",
    "{{ '\\x5f\\x5fclass\\x5f\\x5f' }}{{ ''['\\x5f\\x5fclass\\x5f\\x5f'] }}",
]
LEAKS = (
    "<class",
    "<module",
    "<function",
    "<built-in",
    "__globals__'",
    "SECRET",
    "/home",
    "environ",
    "<jinja2",
    "object at",
)


@pytest.mark.parametrize("payload", ESCAPES)
def test_no_template_escapes(payload: str, tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    canary, touched = tmp_path / "canary.txt", tmp_path / "touched"
    canary.write_text("SECRET-IN-FILE")
    monkeypatch.setenv("TIERCEL_SECRET", "SECRET-IN-ENVIRONMENT")
    template = payload.replace("CANARY", str(canary)).replace("CMD", f"touch {touched}; cat {canary}")
    try:
        text = render(template, {"messages": [dict(m) for m in MESSAGES], "tools": None})
    except (RequestError, FormatError):
        text = ""
    assert not any(leak in text for leak in LEAKS), text
    assert not touched.exists()


def _ask_for_powers(code: str) -> str:
    """Runs code in a worker after it gave everything up, as an escaped template would."""
    worker = Path(render.__code__.co_filename).with_name("template_worker.py")
    program = textwrap.dedent(f"""
        import sys, socket, os, builtins
        sys.argv = ["x"]
        source = open({str(worker)!r}).read()
        space = {{"__name__": "worker", "open": open}}
        exec(compile(source, "worker", "exec"), space)
        space["give_up_everything"]()
        try:
            {code}
        except BaseException as error:
            print(type(error).__name__)
        else:
            print("done")
    """)
    done = subprocess.run([sys.executable, "-c", program], capture_output=True, text=True, timeout=60)
    return done.stdout.strip() or done.stderr[-300:]


@pytest.mark.skipif(sys.platform != "linux", reason="limits are Linux's")
@pytest.mark.parametrize(
    "power",
    ["open('/etc/passwd')", "open('/tmp/tiercel-written', 'w')", "socket.socket()", "bytearray(1 << 30)", "os.pipe()"],
)
def test_even_an_escaped_template_has_no_files_sockets_or_memory(power: str) -> None:
    assert _ask_for_powers("pass") == "done"
    assert _ask_for_powers(power) in ("OSError", "MemoryError")


BOMBS = [
    "{% for a in range(99999) %}{% for b in range(99999) %}{% for c in range(9) %}{% endfor %}{% endfor %}{% endfor %}",
    "{% for a in range(99999) %}{% for b in range(99999) %}xxxxxxxxxxxxxxxx{% endfor %}{% endfor %}",
    "{{ 'A' * 10**9 }}",
    "{{ 'A' * n }}",
    "{% set x = 'A' * 1000000 %}{{ x * 1000 }}",
    "{{ 10**10**8 }}",
    "{{ n ** n }}",
    "{{ [0] * n }}",
    "{{ 'a'.center(n) }}",
    "{{ 'a' | center(1000000000) }}",
    "{{ 'a\nb' | indent(1000000000) }}",
    "{{ 'a'.ljust(n) }}{{ 'a'.zfill(n) }}",
    "{{ '%1000000000d' | format(1) }}",
    "{{ '{:1000000000}'.format(1) }}",
    "{% macro m() %}{{ m() }}{% endmacro %}{{ m() }}",
    "{% macro m() %}{{ m() }}{{ m() }}{% endmacro %}{{ m() }}",
    "{% set ns = namespace(x='a') %}{% for i in range(99) %}{% set ns.x = ns.x ~ ns.x %}{% endfor %}{{ ns.x }}",
    "{% set ns = namespace(x=[1]) %}{% for i in range(99) %}{% set ns.x = ns.x + ns.x %}{% endfor %}{{ ns.x }}",
    "{{ range(99999) | batch(1) | list | string * 99999 }}",
    "{{ range(99999) | list | map('string') | map('center', 99999) | join | length }}",
    "{% for i in range(99999) %}{{ range(99999) | sort | length }}{% endfor %}",
    "{% set ns = namespace(x=[]) %}{% for i in range(99999) %}{% set ns.x = [ns.x] %}{% endfor %}{{ ns.x | tojson }}",
    "{{ 'a b ' * 5000000 | urlize }}{{ ('a ' * 9999999) | wordwrap(1) }}",
    "{{ " + "(" * 5000 + ")" * 5000 + " }}",
    "{% if 1 %}" * 3000 + "{% endif %}" * 3000,
    "{{ 1 " + "+ 1" * 30000 + " }}",
]


@pytest.mark.parametrize("bomb", BOMBS, ids=range(len(BOMBS)))
def test_a_template_that_never_ends_or_grows_is_ended(bomb: str, monkeypatch: pytest.MonkeyPatch) -> None:
    render("warm", {})
    jobs = []

    def called(process, job, timeout, max_bytes):
        jobs.append((json.loads(job or b"{}"), timeout))
        return call(process, job, timeout, max_bytes)

    monkeypatch.setattr("tiercel.tokenizer.template.call", called)
    try:
        text = render(bomb, {"n": 10**9, "messages": MESSAGES})
    except TiercelError:
        text = ""
    limits = [(job["seconds"], timeout) for job, timeout in jobs if job]
    assert limits and max(limits)[0] < 1.2 and limits[0][1] < 2, "its time is limited, by both clocks"
    assert len(text) <= 16 << 20
    assert render("{{ 1 + 1 }}", {}) == "2", "the next template is served"


def test_the_first_template_is_not_slow() -> None:
    program = "from tiercel.tokenizer.template import render\nassert render('{{ x }}', {'x': 1}) == '1'"
    program += "\nimport sys; assert 'torch' not in sys.modules and 'jinja2' not in sys.modules"
    program += "\nassert len(sys.modules) < 400, len(sys.modules)"
    done = subprocess.run([sys.executable, "-"], input=program, text=True, capture_output=True, timeout=60)
    assert done.returncode == 0, done.stderr  # from stdin: there is no main file that a child could import again
    assert done.stderr == ""


def test_a_big_prompt_renders() -> None:
    text = "wörd 🙂 " * 500_000
    assert render("{{ m | trim }}!", {"m": text}) == text.strip() + "!"


@pytest.mark.skipif(not hasattr(os, "fork"), reason="no fork here")
def test_renders_in_a_forked_child_and_still_in_the_parent() -> None:
    assert render("a", {}) == "a"
    child = os.fork()
    if child == 0:
        os._exit(0 if render("{{ 'b' }}", {}) == "b" else 1)
    assert os.waitpid(child, 0)[1] == 0
    assert render("c", {}) == "c"


@pytest.mark.parametrize("name", sorted(jinja2.defaults.DEFAULT_FILTERS))
def test_no_stock_filter_needs_a_file_when_it_is_used(name: str) -> None:
    """Some import a module when they are first called, and the process can open nothing then."""
    for value in ("'a &lt;b> c'", "[1, 2]", "{'a': 1}", "3"):
        for arguments in ("", "(3)", "('a')"):
            try:
                render("{{ " + f"{value}|{name}{arguments}" + " }}", {})
            except TiercelError as error:
                assert not re.search("OSError|ImportError|ModuleNotFound|open files", str(error)), error


def test_wordwrap_wraps() -> None:
    assert render("{{ 'a b c' | wordwrap(3) }}", {}) == "a b\nc"


def test_a_template_has_a_process_of_its_own_as_long_as_it_is_used() -> None:
    first = render("1{{ x }}", {"x": 1})
    other = template._workers.workers["1{{ x }}"]
    assert render("2{{ x }}", {"x": 1}) == "21" and first == "11"
    assert template._workers.workers["2{{ x }}"] is not other and not other.users
    for number in range(2 * template.MAX_WORKERS):
        render(f"{number} and more", {})
    assert len(template._workers.workers) <= template.MAX_WORKERS and "1{{ x }}" not in template._workers.workers
