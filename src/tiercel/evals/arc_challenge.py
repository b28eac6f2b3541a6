r"""ARC-Challenge: 1,172 science questions with three to five choices.

data     arc_challenge/test.jsonl (AI2 ARC, CC BY-SA 4.0), from LzyFischer/icml_kd@30f6ce5 with four of its fields kept,
         sha256 d2b51ad1…; 1,150 rows equal to a copy in AI2's form, all golds equal to a third copy.
         A widely used other copy (mosaicml/llm-foundry) has wrong golds on 20 rows, padded and cut choices: whatever
         file is read, its labels, golds and choices are checked.
plain    "Question: {question}\nAnswer:" and " {choice}" for each, as lm-eval's arc_challenge; no examples
letters  the question, the lettered choices, and the request for one letter
counts   acc_norm: the choice with the highest log-probability per character; acc, without the division, is reported too
"""

from __future__ import annotations

import json
from typing import Any

from tiercel.errors import FormatError
from tiercel.evals import grade
from tiercel.evals.data import File, field, open_file, rows_of
from tiercel.evals.task import LETTERS, Item, Prompt, Task, Verdict, letters_prompt


def kept_fields(data: bytes) -> bytes:
    """The source's rows without what was added to them (a teacher's answers)."""
    kept = ("id", "question", "choices", "answerKey")
    return "".join(json.dumps({name: row[name] for name in kept}) + "\n" for row in rows_of(data, "ARC")).encode()


TEST = File("arc_challenge/test.jsonl", "d2b51ad1f1cf1ddc8a6a59ef3338c6048c867880bafb94bb711a1b3a247777a8",
            "https://raw.githubusercontent.com/LzyFischer/icml_kd/30f6ce59d478ce4ad1c53dd1f4195d97cb29c530/"
            "data/arc_challenge/test.jsonl", kept_fields)  # fmt: skip
ROWS_BY_CHOICES = {3: 4, 4: 1165, 5: 3}  # how many rows have how many choices


class ARCChallenge(Task):
    name, title, kind = "arc_challenge", "ARC-Challenge", "choose"
    normalized = True
    max_tokens = 512

    def load(self, folder: str | None) -> list[Item]:
        test = open_file(TEST, folder)
        self.sources = [test.about()]
        items = [item_of(row, where) for where, row in test.numbered()]
        check_shape(items, str(test.path))
        return items

    def prompt(self, item: Item, shots: int, *, chat: bool) -> Prompt:
        return letters_prompt(item) if chat else f"Question: {item.question}\nAnswer:"

    def grade(self, item: Item, text: str) -> Verdict:
        found = grade.letter(text, len(item.choices))
        return Verdict(found, found == LETTERS[int(item.gold)])


def item_of(row: dict[str, Any], where: str) -> Item:
    """An item of a row, whose labels, choices and gold agree with each other."""
    if "query" in row or "gold" in row:
        raise FormatError(f"{where}: this is the llm-foundry conversion of ARC, whose golds are wrong on 20 rows "
                          "(labels 1-4 shifted by one); take the AI2 form: question, choices, answerKey")  # fmt: skip
    choices = field(row, "choices", dict, where)
    texts, labels = field(choices, "text", list, where), field(choices, "label", list, where)
    key = field(row, "answerKey", str, where)
    if len(texts) != len(labels) or not 2 <= len(texts) <= 5 or not all(isinstance(t, str) for t in texts):
        raise FormatError(f"{where}: {len(texts)} choices with {len(labels)} labels")
    if labels not in (list(LETTERS[: len(labels)]), [str(i + 1) for i in range(len(labels))]):
        raise FormatError(f"{where}: the labels {labels} are neither A, B, … nor 1, 2, …")
    if key not in labels:
        raise FormatError(f"{where}: the answer {key!r} is none of the labels {labels}")
    if len(set(texts)) != len(texts):
        raise FormatError(f"{where}: a choice stands there twice, as in copies that were padded")
    return Item(field(row, "id", str, where), field(row, "question", str, where), str(labels.index(key)), tuple(texts))


def check_shape(items: list[Item], name: str) -> None:
    counts = {n: sum(len(item.choices) == n for item in items) for n in ROWS_BY_CHOICES}
    if len(items) != sum(ROWS_BY_CHOICES.values()) or counts != ROWS_BY_CHOICES:
        raise FormatError(f"{name}: {len(items)} rows with {counts} choices are not ARC-Challenge's test set "
                          f"({ROWS_BY_CHOICES}); copies exist that pad, cut and shift them")  # fmt: skip
    if len({item.id for item in items}) != len(items):
        raise FormatError(f"{name}: a question stands there twice")
