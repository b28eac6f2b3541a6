"""A conversation on a terminal.

>>> why is the sky blue?         the answer streams; Ctrl+C stops it, not the conversation
>>> /set parameter top_k 20      lines that begin with / are commands
>>> \"\"\"many lines                up to the closing quotes
"""

from __future__ import annotations

import dataclasses
import shlex
import sys
from collections.abc import Generator, Sequence
from typing import TYPE_CHECKING, Any

from tiercel.commands.chat.render import complain, speak, timing_block
from tiercel.errors import RequestError, TiercelError
from tiercel.sampling.params import SamplingParams

if TYPE_CHECKING:
    from tiercel.commands.chat.backend import ChatBackend, Message

PARAMETERS = {  # what /set parameter takes: our names, and Ollama's for the same things
    "temperature": "temperature", "top_p": "top_p", "top_k": "top_k", "min_p": "min_p", "seed": "seed",
    "stop": "stop", "max_tokens": "max_tokens", "num_predict": "max_tokens", "min_tokens": "min_tokens",
    "repetition_penalty": "repetition_penalty", "repeat_penalty": "repetition_penalty",
    "presence_penalty": "presence_penalty", "frequency_penalty": "frequency_penalty",
}  # fmt: skip

HELP = '''Available Commands:
  /set parameter NAME VALUE    Set a parameter (temperature, top_p, top_k, seed, stop, max_tokens, ...)
  /set system TEXT             Set the system message
  /set verbose | quiet         Show the timings after each answer, or not
  /set think | nothink         Ask the model to think first, or not to
  /show                        Show the model, the parameters and the system message
  /regenerate                  Answer the last message again
  /clear                       Forget the conversation
  /bye                         Leave
  /?, /help                    This help

Use """ to begin a message of several lines.  Ctrl+C stops an answer, Ctrl+D leaves.
'''


def with_parameter(params: SamplingParams, name: str, words: Sequence[str]) -> SamplingParams:
    """A copy with one parameter set from text; RequestError says what is wrong with it."""
    if name not in PARAMETERS:
        raise RequestError(f"unknown parameter {name!r}; known: {', '.join(PARAMETERS)}")
    if not words:
        raise RequestError(f"{name} needs a value, as in: /set parameter {name} {getattr(params, PARAMETERS[name])}")
    value: Any = list(words) if name == "stop" else _number(words[0])
    return dataclasses.replace(params, **{PARAMETERS[name]: value})


def _number(text: str) -> int | float | str:
    for kind in (int, float):
        try:
            return kind(text)
        except ValueError:
            continue
    return text


class Conversation:
    """Reads lines, answers them, keeps the messages; `run` returns when the user leaves.

    A message whose answer failed or never began is taken back, so that the next one starts from firm ground.
    """

    def __init__(
        self,
        backend: ChatBackend,
        name: str,
        params: SamplingParams,
        *,
        system: str | None = None,
        verbose: bool = False,
        hide_thinking: bool = False,
        think: bool | None = None,
    ) -> None:
        self.backend, self.name, self.params, self.system = backend, name, params, system
        self.verbose, self.hide_thinking, self.think = verbose, hide_thinking, think
        self.messages: list[Message] = []  # without the system message

    def run(self) -> None:
        from prompt_toolkit import PromptSession

        self.prompt: PromptSession[str] = PromptSession()
        while True:
            try:
                line = self._read()
            except KeyboardInterrupt:
                print("\nUse Ctrl + d or /bye to exit.")
                continue
            except EOFError:
                return
            if line.strip() in ("/bye", "/exit"):
                return
            try:
                self._obey(line)
            except TiercelError as error:
                complain(str(error))

    def _read(self) -> str:
        """One message: a line, or lines between triple quotes."""
        from prompt_toolkit.formatted_text import FormattedText

        hint = FormattedText([("ansibrightblack", "Send a message (/? for help)")])
        line = self.prompt.prompt(">>> ", placeholder=hint)
        if not line.startswith('"""'):
            return line
        text = line[3:]
        while not text.rstrip().endswith('"""'):
            text += "\n" + self.prompt.prompt("... ")
        return text.rstrip()[:-3]

    def _obey(self, line: str) -> None:
        command, _, rest = line.strip().partition(" ")
        if command.startswith("/"):
            commands = {"/set": self._set, "/show": self._show, "/clear": self._clear, "/?": self._help,
                        "/help": self._help, "/regenerate": self._regenerate}  # fmt: skip
            if command not in commands:
                raise RequestError(f"unknown command {command!r}; type /? for help")
            commands[command](rest.strip())
        elif line.strip():
            self._answer(line)

    # ── answers

    def _answer(self, text: str) -> None:
        self.messages.append({"role": "user", "content": text})
        answered = False
        try:
            self._speak()
            answered = True
        except KeyboardInterrupt:
            answered = bool(self.backend.last and self.backend.last.text)
        finally:
            if answered and self.backend.last:
                self.messages.append({"role": "assistant", "content": self.backend.last.text})
            else:
                self.messages.pop()
        print("\n")
        if self.verbose and self.backend.last:
            print(timing_block(self.backend.last, 0.0) + "\n", file=sys.stderr, flush=True)

    def _speak(self) -> None:
        system = [{"role": "system", "content": self.system}] if self.system else []
        pieces = self.backend.ask([*system, *self.messages], self.params, think=self.think)
        try:
            speak(pieces, hide_thinking=self.hide_thinking)
        finally:
            if isinstance(pieces, Generator):
                pieces.close()  # now, not when memory is next cleaned: `last` must be complete

    def _regenerate(self, rest: str) -> None:
        if len(self.messages) < 2:
            raise RequestError("nothing has been answered yet")
        self.messages.pop()
        self._answer(self.messages.pop()["content"])

    # ── settings

    def _set(self, rest: str) -> None:
        what, _, value = rest.partition(" ")
        switches = {"verbose": ("verbose", True), "quiet": ("verbose", False),
                    "think": ("think", True), "nothink": ("think", False)}  # fmt: skip
        if what in switches:
            name, on = switches[what]
            setattr(self, name, on)
            print(f"Set '{what}' mode.")
        elif what == "parameter":
            name, *words = _words(value) or [""]
            self.params = with_parameter(self.params, name, words)
            print(f"Set parameter '{name}' to '{' '.join(words)}'")
        elif what == "system":
            self.system = value.strip().strip('"') or None
            print("Set system message." if self.system else "Cleared system message.")
        else:
            raise RequestError(f"unknown setting {what!r}; type /? for help")

    def _show(self, rest: str) -> None:
        given = {name: getattr(self.params, name) for name in dict.fromkeys(PARAMETERS.values())}
        print(f"model {self.name}")
        print("\n".join(f"{name} {value}" for name, value in given.items() if value is not None))
        print(f"system {self.system or '(none)'}\n")

    def _clear(self, rest: str) -> None:
        self.messages.clear()
        print("Cleared session context")

    def _help(self, rest: str) -> None:
        print(HELP)


def _words(text: str) -> list[str]:
    try:
        return shlex.split(text)
    except ValueError as error:
        raise RequestError(f"{text!r} cannot be read: {error}") from error
