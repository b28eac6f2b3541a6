"""Data for teaching the reasoner a task that it was not trained on, with the reasoning in between: Pig Latin.

    python examples/pig_latin.py .          writes pig-train.jsonl and pig-test.jsonl there

street → eetstray, apple → appleway.  The words are made of syllables; one in ten, by the hash that splits the
reasoner's own problems, is asked in the test alone, and no training example is about it.
"""

from __future__ import annotations

import json
import random
import sys
from pathlib import Path

from tiercel.problems import in_test

ONSETS = "b bl br c ch cl cr d dr f fl fr g gl gr h j k l m n p pl pr r s sh sl sp st str t th tr v w".split()
VOWELS = "a e i o u ea ee oo ai".split()
CODAS = "b ck d ft g k l ll m mp n nd ng nt p r rd s ss st t th x".split()
ASKED = ("Say {w} in Pig Latin.", "What is {w} in Pig Latin?", "Translate {w} into Pig Latin.", "Pig Latin for {w}?")


def word(rng: random.Random) -> str:
    """One or two syllables; one in five begins with a vowel."""
    first = "" if rng.random() < 0.2 else rng.choice(ONSETS)
    second = rng.choice(ONSETS) + rng.choice(VOWELS) + rng.choice(CODAS) if rng.random() < 0.5 else ""
    return first + rng.choice(VOWELS) + rng.choice(CODAS) + second


def pig_latin(word: str) -> tuple[str, str]:
    """The letters as the reasoning spells them, and the answer: consonants before the first vowel go to the end."""
    at = next(i for i, letter in enumerate(word) if letter in "aeiou")
    front, rest, end = word[:at], word[at:], "ay" if at else "way"
    return f"{','.join(front)}|{','.join(rest)}\n{','.join(rest + front + end)}", rest + front + end


def write(folder: Path, *, count: int = 8000, tests: int = 200, seed: int = 0) -> None:
    rng = random.Random(seed)
    with (folder / "pig-train.jsonl").open("w") as file:
        while count:
            if not in_test(f"pig latin {(w := word(rng))}"):
                reasoning, answer = pig_latin(w)
                talk = [{"role": "user", "content": rng.choice(ASKED).format(w=w)},
                        {"role": "assistant", "content": f"<think>{reasoning}</think>{answer}"}]  # fmt: skip
                file.write(json.dumps({"messages": talk}) + "\n")
                count -= 1
    held_out: dict[str, None] = {}
    while len(held_out) < tests:
        if in_test(f"pig latin {(w := word(rng))}"):
            held_out[w] = None
    with (folder / "pig-test.jsonl").open("w") as file:
        for w in held_out:
            asked = rng.choice(ASKED).format(w=w)
            file.write(json.dumps({"question": asked, "answer": pig_latin(w)[1]}) + "\n")


if __name__ == "__main__":
    write(Path(sys.argv[1] if len(sys.argv) > 1 else "."))
