"""How answers, votes, timings and progress are printed.

The answer goes to stdout, everything else (reasoning, bars, timings) to stderr, so that `> file` holds the answer.
"""

from __future__ import annotations

import sys
import threading
from collections.abc import Callable, Iterator
from contextlib import contextmanager
from typing import TYPE_CHECKING, Any, TextIO

from tiercel.sampling.params import SamplingParams

if TYPE_CHECKING:
    from tiercel.commands.chat.backend import ChatAnswer, ChatBackend, Prompt
    from tiercel.tokenizer.stream import Piece
    from tiercel.voting.settings import VoteSettings

# ── votes


def answer_by_vote(
    backend: ChatBackend,
    prompt: Prompt,
    params: SamplingParams,
    settings: VoteSettings,
    *,
    raw: bool = False,
    think: bool | None = None,
    verbose: bool = False,
    quiet: bool = False,
) -> dict[str, Any]:
    """Hold a vote and print its answer; a live line on stderr shows its progress.  quiet: print no answer."""
    live = sys.stderr.isatty()

    def show(result: dict[str, Any]) -> None:
        if live:
            sys.stderr.write("\r\033[K" + vote_line(result).translate(CONTROLS)[:200])
            sys.stderr.flush()

    show({"k": settings.k, "done": 0, "stopped": 0, "leader": None})
    try:
        result = backend.vote(prompt, params, settings, show, raw=raw, think=think)
    finally:
        if live:
            sys.stderr.write("\r\033[K")
            sys.stderr.flush()
    if not quiet:
        _write(sys.stdout, result["text"] + "\n")
        if result["answer"] is None:
            complain("no answer came to its end, and so there was nothing to count; raise --max-tokens")
        if verbose:
            _write(sys.stderr, "\n" + vote_table(result) + "\n")
    return result


def vote_line(result: dict[str, Any]) -> str:
    parts = [f"{result['done']} of {result['k']} answers"]
    if result["stopped"]:
        parts.append(f"{result['stopped']} stopped early")
    if result["leader"] is not None:
        parts.append(f"leading: {result['leader']} ({100 * result['share']:.0f} %)")
    return ", ".join(parts)


def vote_table(result: dict[str, Any]) -> str:
    """The answers by weight, and what the vote cost."""
    rows = [("ANSWER", "VOTES", "WEIGHT", "SHARE")]
    rows += [
        (row["answer"], str(row["votes"]), f"{row['weight']:.2f}", f"{100 * row['share']:.0f} %")
        for row in result["table"]
    ]
    widths = [max(len(row[i]) for row in rows) for i in range(4)]
    lines = ["  ".join(cell.ljust(width) for cell, width in zip(row, widths, strict=True)).rstrip() for row in rows]
    ended = [
        f"answers begun:        {result['traces']}, {result['counted']} counted, {result['stopped']} stopped early"
    ]
    if result["consensus"]:
        ended.append("ended by:             consensus")
    if result["threshold"] is not None:
        ended.append(f"threshold:            {result['threshold']:.3f}")
    if result["fallback"]:
        ended.append("note:                 every answer was below the threshold, and so all were counted")
    ended.append(f"prompt eval count:    {result['prompt_tokens']} token(s), {result['cached_tokens']} of them cached")
    ended.append(f"eval count:           {result['completion_tokens']} token(s)")
    ended.append(f"total duration:       {duration(result['seconds'])}")
    return "\n".join([*lines, "", *ended])


# ── answers


def speak(pieces: Iterator[Piece], *, hide_thinking: bool = False) -> None:
    """Print an answer as it comes: its text to stdout, its reasoning (dim on a terminal) to stderr."""
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
    """A model's output never controls the terminal: control characters are left out there, and kept in files."""
    if out.isatty():
        text = text.translate(CONTROLS)
        text = f"\033[2m{text}\033[0m" if dim else text
    out.write(text)
    out.flush()


def timing_block(answer: ChatAnswer, load: float) -> str:
    """The lines of `ollama run --verbose`; tokens that were not read again have a line of their own."""
    read, written, times = len(answer.prompt_ids) - answer.cached_tokens, len(answer.token_ids), answer.times
    lines = [f"total duration:       {duration(times.total + load)}"]
    if load > 0:
        lines.append(f"load duration:        {duration(load)}")
    if answer.cached_tokens:
        lines.append(f"prompt cached count:  {answer.cached_tokens} token(s)")
    lines.append(f"prompt eval count:    {read} token(s)")
    if times.prompt > 0:
        lines.append(f"prompt eval duration: {duration(times.prompt)}")
        lines.append(f"prompt eval rate:     {read / times.prompt:.2f} tokens/s")
    lines.append(f"eval count:           {written} token(s)")
    if times.generation > 0:
        lines.append(f"eval duration:        {duration(times.generation)}")
        lines.append(f"eval rate:            {written / times.generation:.2f} tokens/s")
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

    Yields the report to feed: (what, done, total), total 0 while it is unknown.  unit: what they count.
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


def complain(message: str) -> None:
    """One line on stderr, red on a terminal."""
    line = f"Error: {message}"
    print(f"\033[31m{line}\033[0m" if sys.stderr.isatty() else line, file=sys.stderr, flush=True)
