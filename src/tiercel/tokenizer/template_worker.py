"""The other side of `template.py`: renders chat templates in a process that can do nothing else.

Run as a file (`python -I -S template_worker.py <folders of jinja2 and markupsafe>`), never imported by the
package.  A template comes out of a model file and is a program; limits inside one process cannot hold it
(pallets/jinja#2149), so this process gives up, before it reads the first template, what a program could misuse:

    memory     RLIMIT_AS            256 MiB
    time       ITIMER_PROF          1 s of processor time per template; the signal ends the process
    files      RLIMIT_NOFILE 0: nothing can be opened, and nothing is open but the three standard pipes
    network    the same limit: a socket is a file
    processes  RLIMIT_NPROC 0
    secrets    the environment is empty, the memory holds one conversation

Frames on both pipes: 8 bytes length (little endian), then JSON.  A job is {"template", "variables", "seconds",
"characters"}; the answer is {"text"} or {"error", "by"} where `by` is "template" for a `raise_exception`, "syntax",
"size" or "jinja".
"""

from __future__ import annotations

import contextlib
import html.entities  # noqa: F401  (filters import these when they are called, when nothing can be opened)
import json
import pprint  # noqa: F401
import signal
import struct
import sys
import textwrap  # noqa: F401
import time
from collections.abc import Callable
from datetime import datetime
from typing import Any, BinaryIO

sys.path.extend(sys.argv[1:])

import jinja2
import jinja2.debug
from jinja2 import nodes
from jinja2.ext import Extension, loopcontrols
from jinja2.parser import Parser
from jinja2.sandbox import ImmutableSandboxedEnvironment, SecurityError
from jinja2.utils import Namespace

MEMORY = 256 << 20
COMPILED_AT_ONCE = 8
REHEARSAL = r"""{% for x in [1, 'é\n'] %}{{ x|string|upper|urlize|pprint|tojson }}{% endfor %}
{{ strftime_now('%d %b %Y') }}{{ 'a b c'|wordwrap(3)|striptags|forceescape|urlencode|indent|center|title|wordcount }}
{{ '&lt;b>'|striptags }}{{ {'b': 1}|dictsort|list }}{{ {'b': 1}|xmlattr }}{{ 3|filesizeformat }}{{ '%s'|format(1) }}
{{ [1, 2]|random }}{{ [{'a': 1}]|groupby('a')|list }}{{ [1, 2]|batch(1)|list }}{{ [1, 2]|slice(1)|list }}
{{ [1, 1]|unique|sort|map('string')|select|reject|join }}{{ [1]|sum }}{{ 1.5|round }}{{ '1'|int + '1'|float }}"""


class TooLong(Exception):
    """The text grew beyond what a prompt may be."""


class Generation(Extension):
    """`{% generation %}` marks what the model wrote, for training; when rendering it is its own body."""

    tags = {"generation"}  # noqa: RUF012

    def parse(self, parser: Parser) -> nodes.Node:
        line = next(parser.stream).lineno
        body = parser.parse_statements(("name:endgeneration",), drop_needle=True)
        return nodes.Scope(body).set_lineno(line)


def tojson(
    value: Any, ensure_ascii: bool = False, indent: Any = None, separators: Any = None, sort_keys: bool = False
) -> str:
    """transformers' flavour: plain JSON, no HTML escapes."""
    return json.dumps(value, ensure_ascii=ensure_ascii, indent=indent, separators=separators, sort_keys=sort_keys)


def raise_exception(message: Any = "") -> None:
    raise jinja2.TemplateError(str(message))


def strftime_now(format: str) -> str:
    return datetime.now().strftime(format)


class PlainNamespace(Namespace):
    """`namespace()` that takes no underscore names: a way into Python's internals, of no use to a template."""

    def __init__(*args: Any, **kwargs: Any) -> None:
        for name in dict(*args[1:], **kwargs):
            PlainNamespace.check(name)
        Namespace.__init__(*args, **kwargs)

    def __setitem__(self, name: str, value: Any) -> None:
        PlainNamespace.check(name)
        super().__setitem__(name, value)

    @staticmethod
    def check(name: Any) -> None:
        if str(name).startswith("_"):
            raise SecurityError(f"a namespace has no attribute {name!r}")


def environment() -> ImmutableSandboxedEnvironment:
    env = ImmutableSandboxedEnvironment(
        trim_blocks=True, lstrip_blocks=True, extensions=[Generation, loopcontrols], cache_size=0
    )
    env.globals.pop("lipsum", None)
    env.filters["tojson"] = tojson
    env.globals.update(
        raise_exception=raise_exception,
        strftime_now=strftime_now,
        namespace=PlainNamespace,
        dict=lambda *args, **kwargs: dict(*args, **kwargs),  # the class itself has more on it than a call
    )
    return env


def give_up_everything() -> None:
    """Whatever the system can take away is taken away; where it cannot (Windows), the parent's clock remains."""
    time.localtime()  # reads the time zone now: later nothing can be opened
    try:
        import resource
    except ImportError:
        return
    limits = {"RLIMIT_AS": MEMORY, "RLIMIT_NOFILE": 0, "RLIMIT_NPROC": 0, "RLIMIT_CORE": 0}
    for name, value in limits.items():
        with contextlib.suppress(AttributeError, ValueError, OSError):  # macOS lacks or refuses some of them
            resource.setrlimit(getattr(resource, name), (value, value))


def start_clock(seconds: float) -> None:
    """0 stops it.  The signal that it sends ends this process, whatever it is doing."""
    with contextlib.suppress(AttributeError):  # Windows
        signal.setitimer(signal.ITIMER_PROF, seconds)


def render(job: dict[str, Any], compile: Callable[[str], jinja2.Template]) -> dict[str, str]:
    try:
        parts: list[str] = []
        left = job["characters"]
        for part in compile(job["template"]).generate(**job["variables"]):
            left -= len(part)
            if left < 0:
                raise TooLong
            parts.append(part)
        return {"text": "".join(parts)}
    except TooLong:
        return {"by": "size", "error": f"more than {job['characters']} characters"}
    except (MemoryError, OverflowError, RecursionError) as error:
        return {"by": "size", "error": type(error).__name__}
    except jinja2.TemplateSyntaxError as error:
        return {"by": "syntax", "error": f"line {error.lineno}: {error.message}"}
    except jinja2.TemplateError as error:
        own = type(error) is jinja2.TemplateError
        return {"by": "template" if own else "jinja", "error": str(error.message or type(error).__name__)}
    except Exception as error:
        return {"by": "jinja", "error": f"{type(error).__name__}: {error}"}


def serve(source: BinaryIO, sink: BinaryIO) -> None:
    env = environment()
    compiled: dict[str, jinja2.Template] = {}

    def compile(template: str) -> jinja2.Template:
        if template not in compiled:
            if len(compiled) >= COMPILED_AT_ONCE:
                compiled.clear()
            compiled[template] = env.from_string(template)
        return compiled[template]

    def send(answer: dict[str, Any]) -> None:
        data = json.dumps(answer).encode("ascii")
        sink.write(struct.pack("<Q", len(data)) + data)
        sink.flush()

    for template in (REHEARSAL, "{{ raise_exception('') }}"):  # whatever Python loads late, it loads now
        render({"template": template, "variables": {}, "characters": 1000}, env.from_string)
    give_up_everything()
    send({"ready": True})
    while header := source.read(8):
        try:
            job = json.loads(source.read(struct.unpack("<Q", header)[0]))
            start_clock(job["seconds"])
            answer = render(job, compile)
            send(answer)
        except MemoryError:
            send({"by": "size", "error": "MemoryError"})
        start_clock(0)


if __name__ == "__main__":
    serve(sys.stdin.buffer, sys.stdout.buffer)
