"""Chat templates: messages → the text of a prompt, by a program that came inside the model file.

The program is Jinja, run in its immutable sandbox *and* in a process of its own (`template_worker.py`) that has
no files, no network, no environment, 256 MiB of memory and 1 s of processor time; a template that wants more is
ended, and the caller gets an error.  The process starts with the first template (about 0.1 s) and is used again.
"""

from __future__ import annotations

import atexit
import importlib.util
import json
import os
import subprocess
import sys
import threading
from collections import OrderedDict
from pathlib import Path
from typing import Any

from tiercel.errors import FormatError, RequestError, TiercelError
from tiercel.runtime.subprocess import call, terminate

SECONDS = 1.0  # of processor time, counted in the worker
PATIENCE = 1.4  # of wall clock: where processor time cannot be counted, or the machine is busy
SECONDS_PER_BYTE = 1 / (8 << 20)  # more, for a prompt of many megabytes
START = 30.0
MAX_WORKERS = 4  # processes; more while more templates are at work at once
CHARACTERS = 16 << 20  # of the rendered prompt
MOST_ANSWER_BYTES = 12 * CHARACTERS  # JSON spends up to 12 bytes on a character

REASONING = ("reasoning_content", "thinking", "reasoning")  # the names under which clients send earlier reasoning


def render(template: str, variables: dict[str, Any]) -> str:
    """The prompt's text.

    Raises RequestError with the template's own words when it refuses the messages (`raise_exception`) or cannot
    handle them, FormatError when it is no template, or wants more time, memory or text than a prompt may take.
    """
    try:
        body = json.dumps({"template": template, "variables": variables, "characters": CHARACTERS})
    except (TypeError, ValueError, RecursionError) as error:
        raise RequestError(f"messages and tools must be plain JSON values: {error}") from None
    seconds = SECONDS + len(body) * SECONDS_PER_BYTE  # goes in front of the fields that it was measured by
    answer = _workers.ask(template, f'{{"seconds": {seconds}, {body[1:]}'.encode("ascii"))
    text, by, message = answer.get("text"), answer.get("by"), str(answer.get("error"))[:1000]
    if isinstance(text, str):
        return text
    if by == "template":
        raise RequestError(f"the model's chat template refuses these messages: {message}")
    if by == "jinja":
        raise RequestError(f"the model's chat template fails on these messages: {message}")
    if by == "size":
        raise FormatError(f"the model's chat template was ended, its text or memory grew too large ({message})")
    raise FormatError(f"the model's chat template is not valid: {message}")


class _Worker:
    """One child process and the pipes to it; started when needed, again after it was ended or after a fork."""

    def __init__(self) -> None:
        self.lock = threading.Lock()
        self.users = 0  # threads that ask it or wait for it
        self.process: subprocess.Popen[bytes] | None = None
        self.owner = 0

    def ask(self, job: bytes) -> dict[str, Any]:
        with self.lock:
            process = self.start()
            answer = call(process, job, PATIENCE + len(job) * SECONDS_PER_BYTE, MOST_ANSWER_BYTES)
            if answer is None:
                self.stop()
                raise FormatError(
                    f"the model's chat template was ended after {SECONDS:g} s without a text; "
                    "give the prompt as plain text instead"
                )
            return answer

    def start(self) -> subprocess.Popen[bytes]:
        if self.process is not None and self.owner == os.getpid() and self.process.poll() is None:
            return self.process
        if self.owner == os.getpid():
            self.stop()
        try:
            self.process, self.owner = _spawn(), os.getpid()
        except OSError as error:
            raise TiercelError(f"cannot start {sys.executable} to render a chat template: {error.strerror}") from None
        if call(self.process, b"", START, MOST_ANSWER_BYTES) is None:
            self.stop()
            raise TiercelError(f"the process that renders chat templates did not start ({sys.executable})")
        return self.process

    def stop(self) -> None:
        """Ends the child; a child of another process (after a fork) is not ours to end."""
        process, self.process = self.process, None
        if process is None or self.owner != os.getpid():
            return
        terminate(process)


class _Workers:
    """A process for each of the templates used most lately: one that never ends delays its own model only."""

    def __init__(self) -> None:
        self.lock = threading.Lock()
        self.workers: OrderedDict[str, _Worker] = OrderedDict()  # by template, the latest last

    def ask(self, template: str, job: bytes) -> dict[str, Any]:
        with self.lock:
            worker = self.workers.pop(template, None) or self._free()
            self.workers[template] = worker
            worker.users += 1
        try:
            return worker.ask(job)
        finally:
            with self.lock:
                worker.users -= 1

    def _free(self) -> _Worker:
        """A new worker; the process of the template that was used longest ago is given to this one."""
        if len(self.workers) >= MAX_WORKERS:
            for template, worker in self.workers.items():
                if not worker.users:
                    return self.workers.pop(template)
        return _Worker()

    def stop(self) -> None:
        for worker in self.workers.values():
            worker.stop()

    def forked(self) -> None:
        """Locks that another thread held when this process was made are never let go."""
        self.__init__()  # type: ignore[misc]


_workers = _Workers()
atexit.register(_workers.stop)
if hasattr(os, "register_at_fork"):
    os.register_at_fork(after_in_child=_workers.forked)


def _spawn() -> subprocess.Popen[bytes]:
    """`-I -S`: no user site, no PYTHON* variables, no .pth files; only the two packages it needs are on its path."""
    specs = [importlib.util.find_spec(name) for name in ("jinja2", "markupsafe")]
    folders = {str(Path(spec.origin).parents[1]) for spec in specs if spec is not None and spec.origin}
    keep = {name: os.environ[name] for name in ("TZ", "SYSTEMROOT") if name in os.environ}
    worker = str(Path(__file__).with_name("template_worker.py"))
    return subprocess.Popen(
        [sys.executable, "-I", "-S", worker, *sorted(folders)],
        stdin=subprocess.PIPE,
        stdout=subprocess.PIPE,
        stderr=subprocess.DEVNULL,
        cwd=Path(sys.executable).anchor or None,
        env=keep,
    )


def check_messages(messages: Any) -> list[dict[str, Any]]:
    """Copy the messages, with earlier reasoning under the names that templates read.

    Raises RequestError unless messages is a list of tables, each with a role that is one plain word.
    """
    if not isinstance(messages, (list, tuple)) or not messages:
        raise RequestError("messages must be a list of at least one message")
    checked = []
    for number, message in enumerate(messages):
        role = message.get("role") if isinstance(message, dict) else None
        if not isinstance(role, str) or not role.replace("_", "").replace("-", "").isalnum() or len(role) > 64:
            raise RequestError(f"message {number} needs a role such as 'user' or 'assistant', not {role!r}")
        reasoning = next((message[key] for key in REASONING if message.get(key) is not None), None)
        if reasoning is not None:
            message = {"thinking": reasoning, **message, "reasoning_content": reasoning}
        checked.append(dict(message))
    return checked


def with_mark(message: dict[str, Any], mark: str) -> dict[str, Any]:
    """The message with `mark` at the end of its last text.  Raises RequestError when it has no text."""
    content = message.get("content")
    if isinstance(content, str):
        return {**message, "content": content + mark}
    if isinstance(content, list):
        for number in range(len(content) - 1, -1, -1):
            part = content[number]
            if isinstance(part, dict) and isinstance(part.get("text"), str):
                marked = {**part, "text": part["text"] + mark}
                return {**message, "content": [*content[:number], marked, *content[number + 1 :]]}
    raise RequestError("the last message has no text to continue")
