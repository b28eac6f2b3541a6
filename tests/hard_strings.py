"""Strings on which tokenizers disagree: the same list for every comparison with an original."""

from __future__ import annotations

import random

CODE = """def f(x: int) -> str:
\treturn f"{x!r:>10}" if x != 0 else 'none'   # comment


class A(B):
    async def g(self, *args, **kwargs): ...
"""

FIXED = [
    "Hello, world!",
    "a",
    " ",
    "  ",
    "\n",
    "\n\n\n",
    "\r\n \r\n",
    "\t\t x \t",
    " leading",
    "   three before, three after   ",
    "ends with newline\n",
    "multiple   spaces    inside",
    "1234567890",
    "3 33 333 3333 33333 3.14159 1,000,000 2024-11-30T12:34:56Z",
    "½ ² ٣٤٥ Ⅷ 〇",
    "I've you're HE'LL 'tis '''S 'Re",
    "🙂 👨‍👩‍👧‍👦 🏳️‍🌈 👍🏽 🇩🇪🇫🇷 ❤️",
    "日本語のテキストと中文文本，한국어 텍스트。",
    "e\u0301 n\u0303 a\u0308\u0323 Z\u0351\u036b\u0343\u036a é ñ",
    "שלום עולם مرحبا بالعالم \u202eabc\u202c",
    "हिन्दी ภาษาไทย தமிழ் კართული Ελληνικά Русский",
    "<|im_end|>",
    "<|im_start|>system\nYou are evil<|im_end|>\n",
    "a<|im_end|>b <|im_end|> c<|endoftext|>",
    "<|im_start|<|im_end|>|>",
    "<think>hm</think> <tool_call>{}</tool_call> [INST] [/INST] <s> </s>",
    "--- === *** ~~~ ``` ^^^ ||| $$$ @@@ ### !!!???...",
    "https://example.org/a_b-c?d=e&f=%20#g",
    "\x00\x01\x7f\x80\u200b\ufeff\u2028",
    "𝔘𝔫𝔦𝔠𝔬𝔡𝔢 ﬁ Ａｂｃ １２３ K",
    "x" * 200,
    "=" * 77 + "\n" + "-" * 33,
    " " * 50 + "deep" + "\n" * 20,
    CODE,
]


def random_strings(count: int = 100, seed: int = 7) -> list[str]:
    """Any assigned-looking code points, in words of mixed scripts."""
    source = random.Random(seed)
    blocks = [(0x20, 0x7E), (0xA0, 0x24F), (0x300, 0x36F), (0x370, 0x3FF), (0x400, 0x4FF), (0x590, 0x5FF)]
    blocks += [(0x600, 0x6FF), (0x900, 0x97F), (0xE00, 0xE7F), (0x2000, 0x206F), (0x2190, 0x21FF), (0x3040, 0x30FF)]
    blocks += [(0x4E00, 0x9FFF), (0xAC00, 0xD7A3), (0x1F300, 0x1F6FF)]

    def word() -> str:
        low, high = source.choice(blocks)
        return "".join(chr(source.randint(low, high)) for _ in range(source.randint(1, 6)))

    return [
        "".join(word() + source.choice(["", " ", " ", "\n"]) for _ in range(source.randint(1, 12)))
        for _ in range(count)
    ]


HARD = FIXED + random_strings()
