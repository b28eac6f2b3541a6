"""Seconds that the tool-call parser takes for 200 KB of hostile text:   python benchmarks/tool_parser.py

Each text is read in one piece and character by character, in every format, on one core; the slowest is named last.
A parser that reads a character twice as often for a text twice as long would need minutes here.
"""

from __future__ import annotations

import time

from tiercel.tokenizer.tool_formats import TOOL_FORMATS, ToolFormat
from tiercel.tokenizer.tool_parser import ToolParser

BYTES = 200_000
CALL = '{"name": "f", "arguments": {"a": '
UNITS = {  # name: (what stands once before, what is repeated)
    "markers": ("", "{open}"),
    "beginnings of markers": ("", "{half}"),
    "objects without end": ("", '{open}{"'),
    "empty objects": ("", "{open}{}"),
    "one call after another": ("", "{open}" + CALL + "1}}"),
    "letters": ("", "x"),
    "spaces": ("", " "),
    "less-than signs": ("", "<"),
    "a long string": ("{open}" + CALL + '"', "x"),
    "escapes": ("{open}" + CALL + '"', "\\n\\u0041"),
    "a long list": ("{open}" + CALL, "[1,"),
    "numbers": ("{open}" + CALL + "[", "1,"),
    "nested objects": ("{open}" + CALL + "[", '{"k":[]},'),
    "spaces inside": ("{open}" + CALL, "\n"),
    "names": ("{open}", "f "),
}


def seconds(tool_format: ToolFormat, pieces: list[str] | str) -> float:
    parser = ToolParser(tool_format)
    began = time.process_time()
    for piece in pieces:
        parser.push(piece)
    parser.finish()
    return time.process_time() - began


def main() -> None:
    slowest = (0.0, "")
    print(f"{'seconds for 200 KB':24} {'format':8} {'one piece':>10} {'by characters':>14}")
    for name, (front, unit) in UNITS.items():
        for tool_format in TOOL_FORMATS:
            marker = tool_format.markers[0]
            front_, unit_ = (s.replace("{open}", marker).replace("{half}", marker[:-1]) for s in (front, unit))
            text = (front_ + unit_ * (BYTES // len(unit_)))[:BYTES]
            whole, single = seconds(tool_format, [text]), seconds(tool_format, text)
            print(f"{name:24} {tool_format.name:8} {whole:10.3f} {single:14.3f}")
            slowest = max(slowest, (whole, f"{name}, {tool_format.name}, one piece"))
            slowest = max(slowest, (single, f"{name}, {tool_format.name}, by characters"))
    print(f"slowest: {slowest[0]:.3f} s ({slowest[1]})")


if __name__ == "__main__":
    main()
