"""The other side of `math_judge.py`.  Run as a file, never imported.

A line is [answer, gold]; the answer to it is "same", "different" or "unreadable".  Memory is limited; time is the
parent's business.
"""

from __future__ import annotations

import contextlib
import json
import logging
import sys

MEMORY_BYTES = 2 << 30


def main() -> None:
    with contextlib.suppress(ImportError, ValueError, OSError):  # Windows: the clock remains
        import resource

        resource.setrlimit(resource.RLIMIT_AS, (MEMORY_BYTES, MEMORY_BYTES))
        resource.setrlimit(resource.RLIMIT_CORE, (0, 0))
    from math_verify import LatexExtractionConfig, parse, verify

    logging.disable(logging.CRITICAL)
    config = [LatexExtractionConfig(boxed_match_priority=0)]

    def read(text: str) -> list[object]:
        return list(parse(f"\\boxed{{{text}}}", config, parsing_timeout=None))

    read("\\frac{1}{2}")  # what is loaded late is loaded now
    print("ready", flush=True)
    for line in sys.stdin:
        try:
            answer, gold = json.loads(line)
            left, right = read(gold), read(answer)
            verdict = "unreadable" if not left or not right else "different"
            if verdict == "different" and verify(left, right, timeout_seconds=None):
                verdict = "same"
        except (Exception, RecursionError):
            verdict = "unreadable"
        print(verdict, flush=True)


if __name__ == "__main__":
    main()
