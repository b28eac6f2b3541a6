"""Compiles grammars for structured_output.py in a process that may crash.

Run as a file (`python -I -S grammar_worker.py <folder of llguidance>`), never imported by the package.  A grammar is
a program from a client: some take minutes to compile, some grow without end, some overflow the compiler's stack.
Here each is compiled and followed for a few tokens, within a processor time and a memory of its own.

Frames on both pipes: 8 bytes length (little endian), then bytes.  The first job is the vocabulary (JSON: {"pieces":
[hexadecimal bytes], "special": [ids], "ends": [ids]}), the others {"grammar", "seconds"}; the answer to each is
{"error": text or ""}.
"""

from __future__ import annotations

import contextlib
import json
import random
import signal
import struct
import sys
from typing import Any

sys.path.extend(sys.argv[1:])

from llguidance import LLMatcher, LLTokenizer

MAX_ADDED_BYTES = 256 << 20  # of memory, beside the vocabulary
FOLLOWED_TOKENS = 24


class Vocabulary:
    """The interface that LLTokenizer expects."""

    is_tokenizer_wrapper = True

    def __init__(self, pieces: list[bytes], special: list[int], ends: list[int]) -> None:
        self.tokens, self.special_token_ids = pieces, special
        self.eos_token_id, self.bos_token_id = ends[0], None
        self.bytes = {piece[0]: id for id, piece in enumerate(pieces) if len(piece) == 1}

    def __call__(self, text: str) -> list[int]:
        """Return tokens of text that a grammar forces; any spelling serves here."""
        return [self.bytes[byte] for byte in text.encode() if byte in self.bytes]


def limit_memory() -> None:
    """Limit this process to MAX_ADDED_BYTES more than it has."""
    with contextlib.suppress(ImportError, ValueError, OSError):  # Windows: the clock remains
        import resource

        with open("/proc/self/statm") as file:  # noqa: PTH123  (pathlib is not loaded under -S)
            size = int(file.read().split()[0]) * resource.getpagesize()
        resource.setrlimit(resource.RLIMIT_AS, (size + MAX_ADDED_BYTES, size + MAX_ADDED_BYTES))


def start_clock(seconds: float) -> None:
    """Let a signal end this process after this much processor time; 0: stop the clock."""
    with contextlib.suppress(AttributeError):
        signal.setitimer(signal.ITIMER_PROF, seconds)


def attempt(tokenizer: LLTokenizer, grammar: str) -> str:
    """Compile a grammar and follow it for some random tokens; return the error, "" for none."""
    matcher = LLMatcher(tokenizer, grammar, log_level=0)
    dice = random.Random(0)
    for _ in range(FOLLOWED_TOKENS):
        if matcher.is_error() or matcher.is_stopped():
            break
        mask = int.from_bytes(matcher.compute_bitmask(), "little")
        if not mask:
            break
        place = dice.randrange(mask.bit_length())
        rest = mask >> place
        matcher.consume_token(place + (rest & -rest).bit_length() - 1)
    return matcher.get_error()


def serve() -> None:
    """Answer jobs until the pipe is closed."""
    source, sink = sys.stdin.buffer, sys.stdout.buffer

    def read() -> Any:
        header = source.read(8)
        return json.loads(source.read(struct.unpack("<Q", header)[0])) if len(header) == 8 else None

    def send(error: str) -> None:
        data = json.dumps({"error": error[:2000]}).encode("ascii")
        sink.write(struct.pack("<Q", len(data)) + data)
        sink.flush()

    words = read()
    vocabulary = Vocabulary([bytes.fromhex(piece) for piece in words["pieces"]], words["special"], words["ends"])
    wrapper: Any = vocabulary
    tokenizer = LLTokenizer(wrapper, n_vocab=len(vocabulary.tokens), eos_token=words["ends"])
    limit_memory()
    send("")
    while (job := read()) is not None:
        start_clock(job["seconds"])
        try:
            error = attempt(tokenizer, job["grammar"])
        except MemoryError:
            error = "it takes too much memory"
        start_clock(0)
        send(error)


if __name__ == "__main__":
    serve()
