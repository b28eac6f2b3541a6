"""A conversation on a terminal, and how an answer is printed.

    >>> why is the sky blue?         the answer streams; Ctrl+C stops it, not the conversation
    >>> /set parameter top_k 20      lines that begin with / are commands
    >>> \"\"\"many lines                up to the closing quotes

The answer goes to stdout, everything else (thoughts, bars, timings) to stderr, so that `> file` holds the answer.
What talks is a `ChatBackend`: the model with its memory of the conversation, or anything else that answers so.
"""

from __future__ import annotations

import dataclasses
import shlex
import sys
import threading
from collections.abc import Callable, Generator, Iterator, Sequence
from contextlib import contextmanager
from typing import TYPE_CHECKING, Any, Protocol, TextIO

from tiercel.errors import RequestError, TiercelError
from tiercel.sampling.params import SamplingParams

if TYPE_CHECKING:
    from tiercel.voting.settings import VoteSettings

Message = dict[str, str]  # {"role": "system" | "user" | "assistant", "content": …}
Prompt = str | list[Message]  # a text as it is, or messages for the chat template


class Piece(Protocol):
    """A part of an answer as it comes; kind: "text" or "thinking"."""

    @property
    def kind(self) -> str: ...
    @property
    def text(self) -> str: ...


class Times(Protocol):
    """Seconds; total counts from the question to the last piece."""

    prompt: float
    generation: float
    total: float


class Answer(Protocol):
    """What is known of an answer; complete when its last piece has come, or when it was left.

    finish_reason: "stop", "length" or "abort"; cached_tokens: part of the prompt that was not read again
    """

    text: str
    thoughts: str
    prompt_ids: list[int]
    token_ids: list[int]
    cached_tokens: int
    finish_reason: str | None
    times: Times


class ChatBackend(Protocol):
    """A model in a conversation.  `ask` may be left at any piece and asked again; `last` is the latest answer."""

    @property
    def last(self) -> Answer | None: ...
    def default_params(self) -> SamplingParams: ...
    def ask(
        self, prompt: Prompt, params: SamplingParams, *, raw: bool = False, think: bool | None = None
    ) -> Iterator[Piece]: ...
    def vote(
        self,
        prompt: Prompt,
        params: SamplingParams,
        settings: VoteSettings,
        progress: Callable[[dict[str, Any]], None],
        *,
        raw: bool = False,
        think: bool | None = None,
    ) -> dict[str, Any]:
        """Many answers, and what they agree on: `Vote.to_dict` with text and thinking.  progress: how it stands."""


class ModelTalker:
    """The Talker of `tiercel run`: a `tiercel.Model` and one session of it, which keeps the state between turns."""

    def __init__(self, model: Any) -> None:
        self.model, self.session = model, model.session()

    @property
    def last(self) -> Answer | None:
        return self.session.last

    def default_params(self) -> SamplingParams:
        return self.model.default_params()

    def ask(
        self, prompt: Prompt, params: SamplingParams, *, raw: bool = False, think: bool | None = None
    ) -> Iterator[Piece]:
        pieces, _ = self.model.pieces(prompt, params, raw=raw, think=think, session=self.session)
        return pieces

    def vote(
        self,
        prompt: Prompt,
        params: SamplingParams,
        settings: VoteSettings,
        progress: Callable[[dict[str, Any]], None],
        *,
        raw: bool = False,
        think: bool | None = None,
    ) -> dict[str, Any]:
        made = self.model.vote(
            prompt, settings, params, raw=raw, think=think, progress=lambda voter: progress(voter.progress())
        )
        return {"text": made.text, "thinking": made.thinking, **made.to_dict()}


# ── votes


def answer_by_vote(
    talker: ChatBackend,
    prompt: Prompt,
    params: SamplingParams,
    settings: VoteSettings,
    *,
    raw: bool = False,
    think: bool | None = None,
    verbose: bool = False,
    quiet: bool = False,
) -> dict[str, Any]:
    """Hold a vote and print its answer; a live line on stderr tells how it stands.  quiet: print no answer."""
    live = sys.stderr.isatty()

    def show(told: dict[str, Any]) -> None:
        if live:
            sys.stderr.write("\r\033[K" + vote_line(told).translate(CONTROLS)[:200])
            sys.stderr.flush()

    show({"k": settings.k, "done": 0, "stopped": 0, "leader": None})
    try:
        told = talker.vote(prompt, params, settings, show, raw=raw, think=think)
    finally:
        if live:
            sys.stderr.write("\r\033[K")
            sys.stderr.flush()
    if not quiet:
        _write(sys.stdout, told["text"] + "\n")
        if told["answer"] is None:
            complain("no answer came to its end, and so there was nothing to count; raise --max-tokens")
        if verbose:
            _write(sys.stderr, "\n" + vote_table(told) + "\n")
    return told


def vote_line(told: dict[str, Any]) -> str:
    parts = [f"{told['done']} of {told['k']} answers"]
    if told["stopped"]:
        parts.append(f"{told['stopped']} stopped early")
    if told["leader"] is not None:
        parts.append(f"leading: {told['leader']} ({100 * told['share']:.0f} %)")
    return ", ".join(parts)


def vote_table(told: dict[str, Any]) -> str:
    """The answers by weight, and what the vote cost."""
    rows = [("ANSWER", "VOTES", "WEIGHT", "SHARE")]
    rows += [
        (row["answer"], str(row["votes"]), f"{row['weight']:.2f}", f"{100 * row['share']:.0f} %")
        for row in told["table"]
    ]
    widths = [max(len(row[i]) for row in rows) for i in range(4)]
    lines = ["  ".join(cell.ljust(width) for cell, width in zip(row, widths, strict=True)).rstrip() for row in rows]
    ended = [f"answers begun:        {told['traces']}, {told['counted']} counted, {told['stopped']} stopped early"]
    if told["consensus"]:
        ended.append("ended by:             consensus")
    if told["threshold"] is not None:
        ended.append(f"threshold:            {told['threshold']:.3f}")
    if told["fallback"]:
        ended.append("note:                 every answer was below the threshold, and so all were counted")
    ended.append(f"prompt eval count:    {told['prompt_tokens']} token(s), {told['cached_tokens']} of them cached")
    ended.append(f"eval count:           {told['completion_tokens']} token(s)")
    ended.append(f"total duration:       {duration(told['seconds'])}")
    return "\n".join([*lines, "", *ended])


# ── printing


def speak(pieces: Iterator[Piece], *, hide_thinking: bool = False) -> None:
    """Print an answer as it comes: its text to stdout, its thoughts (dim on a terminal) to stderr."""
    thinking = False
    for piece in pieces:
        if piece.kind == "thinking":
            if not hide_thinking:
                _write(sys.stderr, piece.text if thinking else "Thinking...\n" + piece.text, dim=True)
            thinking = True
            continue
        if thinking and not hide_thinking:
            _write(sys.stderr, "\n...done thinking.\n\n", dim=True)
        thinking = False
        _write(sys.stdout, piece.text)


CONTROLS = {code: None for code in range(32) if chr(code) not in "\n\t"} | {127: None, 0x9B: None}


def _write(out: TextIO, text: str, dim: bool = False) -> None:
    """A model's words never steer the terminal: control characters are left out there, and kept in files."""
    if out.isatty():
        text = text.translate(CONTROLS)
        text = f"\033[2m{text}\033[0m" if dim else text
    out.write(text)
    out.flush()


def timing_block(answer: Answer, load: float) -> str:
    """The lines people know from `ollama run --verbose`; tokens that were not read again have a line of their own."""
    read, said, times = len(answer.prompt_ids) - answer.cached_tokens, len(answer.token_ids), answer.times
    lines = [f"total duration:       {duration(times.total + load)}"]
    if load > 0:
        lines.append(f"load duration:        {duration(load)}")
    if answer.cached_tokens:
        lines.append(f"prompt cached count:  {answer.cached_tokens} token(s)")
    lines.append(f"prompt eval count:    {read} token(s)")
    if times.prompt > 0:
        lines.append(f"prompt eval duration: {duration(times.prompt)}")
        lines.append(f"prompt eval rate:     {read / times.prompt:.2f} tokens/s")
    lines.append(f"eval count:           {said} token(s)")
    if times.generation > 0:
        lines.append(f"eval duration:        {duration(times.generation)}")
        lines.append(f"eval rate:            {said / times.generation:.2f} tokens/s")
    return "\n".join(lines)


def duration(seconds: float) -> str:
    """As Go writes it: `1m2.5s`, `1.234567s`, `345.678ms`, `12.5µs`."""
    if seconds >= 1:
        minutes, rest = divmod(seconds, 60)
        hours, minutes = divmod(int(minutes), 60)
        return (f"{hours}h" if hours else "") + (f"{minutes}m" if hours or minutes else "") + f"{_short(rest, 9)}s"
    for unit, scale in (("ms", 1e3), ("µs", 1e6)):
        if seconds * scale >= 1:
            return _short(seconds * scale, 6) + unit
    return f"{seconds * 1e9:.0f}ns" if seconds > 0 else "0s"


def _short(value: float, digits: int) -> str:
    return f"{value:.{digits}f}".rstrip("0").rstrip(".")


@contextmanager
def waiting(what: str, patience: float = 2.0, *, unit: str = "bytes") -> Iterator[Callable[[str, int, int], None]]:
    """A bar on stderr for what takes longer than `patience` seconds, on a terminal; silent otherwise.

    Yields the report to feed: (what, done, total), total 0 while nobody knows.  unit: what they count.
    """
    if not sys.stderr.isatty():
        yield lambda what, done, total: None
        return
    from rich.console import Console
    from rich.progress import BarColumn, DownloadColumn, MofNCompleteColumn, Progress, TextColumn, TimeRemainingColumn

    count = DownloadColumn() if unit == "bytes" else MofNCompleteColumn()
    columns = (TextColumn("{task.description}"), BarColumn(), count, TimeRemainingColumn())
    bar = Progress(*columns, console=Console(stderr=True), transient=True)
    task = bar.add_task(what, total=None)
    timer = threading.Timer(patience, bar.start)
    timer.daemon = True
    timer.start()
    try:
        yield lambda what, done, total: bar.update(task, description=what, completed=done, total=total or None)
    finally:
        timer.cancel()
        timer.join()
        bar.stop()


# ── the conversation

PARAMETERS = {  # what /set parameter knows: our names, and Ollama's for the same things
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
        talker: ChatBackend,
        name: str,
        params: SamplingParams,
        *,
        system: str | None = None,
        verbose: bool = False,
        hide_thinking: bool = False,
        think: bool | None = None,
    ) -> None:
        self.talker, self.name, self.params, self.system = talker, name, params, system
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
            answered = bool(self.talker.last and self.talker.last.text)
        finally:
            if answered and self.talker.last:
                self.messages.append({"role": "assistant", "content": self.talker.last.text})
            else:
                self.messages.pop()
        print("\n")
        if self.verbose and self.talker.last:
            print(timing_block(self.talker.last, 0.0) + "\n", file=sys.stderr, flush=True)

    def _speak(self) -> None:
        system = [{"role": "system", "content": self.system}] if self.system else []
        pieces = self.talker.ask([*system, *self.messages], self.params, think=self.think)
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


def complain(message: str) -> None:
    """One line on stderr, red on a terminal."""
    line = f"Error: {message}"
    print(f"\033[31m{line}\033[0m" if sys.stderr.isatty() else line, file=sys.stderr, flush=True)
