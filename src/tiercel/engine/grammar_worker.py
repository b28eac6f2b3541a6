"""The other side of `constraint.py`: tries grammars in a process that may die of them.

Run as a file (`python -I -S grammar_worker.py <folder of llguidance>`), never imported by the package.  A grammar is
a program that somebody sent: some are compiled for minutes, some grow without end, some overflow the compiler's
stack.  Here each is compiled and walked a few tokens first, within a processor time and a memory of its own.

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

MEMORY = 256 << 20  # more than it has with the vocabulary
WALKED = 24


class Vocabulary:
    """What LLTokenizer asks a tokenizer."""

    is_tokenizer_wrapper = True

    def __init__(self, pieces: list[bytes], special: list[int], ends: list[int]) -> None:
        self.tokens, self.special_token_ids = pieces, special
        self.eos_token_id, self.bos_token_id = ends[0], None
        self.bytes = {piece[0]: id for id, piece in enumerate(pieces) if len(piece) == 1}

    def __call__(self, text: str) -> list[int]:
        """Tokens of text that a grammar forces; any do here."""
        return [self.bytes[byte] for byte in text.encode() if byte in self.bytes]


def limit_memory() -> None:
    with contextlib.suppress(ImportError, ValueError, OSError):  # Windows: the clock remains
        import resource

        with open("/proc/self/statm") as file:  # noqa: PTH123  (pathlib is not loaded under -S)
            size = int(file.read().split()[0]) * resource.getpagesize()
        resource.setrlimit(resource.RLIMIT_AS, (size + MEMORY, size + MEMORY))


def start_clock(seconds: float) -> None:
    """0 stops it.  The signal ends this process, whatever it is doing."""
    with contextlib.suppress(AttributeError):
        signal.setitimer(signal.ITIMER_PROF, seconds)


def attempt(tokenizer: LLTokenizer, grammar: str) -> str:
    """Compile, and walk some tokens into what it allows; "" or what is wrong."""
    matcher = LLMatcher(tokenizer, grammar, log_level=0)
    dice = random.Random(0)
    for _ in range(WALKED):
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
