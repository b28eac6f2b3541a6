r"""MMLU: 14,042 questions of 57 subjects, four choices each.

data     mmlu/test.jsonl and, for the examples, mmlu/dev.jsonl (hendrycks/test, MIT), from the archive in
         hiyouga/LLaMA-Factory@65ea7a0, sha256 fa06638a… and 7a9cb1f2…; counts are the published 14,042 and 285.
         105 questions of the test file stand there twice (upstream).
plain    "The following are multiple choice questions (with answers) about {subject}.\n\n", 5 solved questions of the
         subject, "{question}\nA. …\nB. …\nC. …\nD. …\nAnswer:", and " A" … " D": the text of lm-eval's mmlu with
         --num_fewshot 5 (lm-eval's own default is none)
letters  the question, the lettered choices, and the request for one letter; no examples
counts   acc: the likeliest letter; over all questions together, subjects apart in the report
"""

from __future__ import annotations

import csv
import io
import json
import zipfile
from collections.abc import Callable, Sequence

from tiercel.errors import FormatError
from tiercel.evals import grade
from tiercel.evals.data import File, Found, field, open_file
from tiercel.evals.task import LETTERS, Item, Prompt, Task, Verdict, letters_prompt

ARCHIVE = ("https://raw.githubusercontent.com/hiyouga/LLaMA-Factory/65ea7a0d7c37e82f0b46f3808ec336604f18a5e9/"
           "evaluation/mmlu/mmlu.zip")  # fmt: skip


def unpacked(split: str) -> Callable[[bytes], bytes]:
    """Makes the rows of one split of the archive's tables."""

    def convert(data: bytes) -> bytes:
        lines = []
        with zipfile.ZipFile(io.BytesIO(data)) as archive:
            for name in sorted(n for n in archive.namelist() if f"{split}/" in n and n.endswith(f"_{split}.csv")):
                subject = name.rpartition("/")[2].removesuffix(f"_{split}.csv")
                table = csv.reader(io.TextIOWrapper(archive.open(name), encoding="utf-8", newline=""))
                for index, (question, *choices, answer) in enumerate(table):
                    row = {"subject": subject, "index": index, "question": question, "choices": choices,
                           "answer": answer}  # fmt: skip
                    lines.append(json.dumps(row) + "\n")
        return "".join(lines).encode()

    return convert


TEST = File("mmlu/test.jsonl", "fa06638a5b18f937d0ddcd7d75d7e632b828a70e62e6d42764dc8772c411b7b9", ARCHIVE,
            unpacked("test"))  # fmt: skip
DEV = File("mmlu/dev.jsonl", "7a9cb1f2cac041aa4ca74e91cf5f9e0c606f05295ae9a1e7834eef45b9014f0e", ARCHIVE,
           unpacked("dev"))  # fmt: skip


class MMLU(Task):
    name, title, kind = "mmlu", "MMLU", "choose"
    shots, most_shots = 5, 5
    max_tokens = 512
    spread_over = "subject"

    def load(self, folder: str | None) -> list[Item]:
        test, dev = open_file(TEST, folder), open_file(DEV, folder)
        self.sources = [test.about(), dev.about()]
        self.examples: dict[str, list[Item]] = {}
        for item in _items(dev):
            self.examples.setdefault(item.group, []).append(item)
        return _items(test)

    def prompt(self, item: Item, shots: int, *, chat: bool) -> Prompt:
        if chat:
            return letters_prompt(item)
        subject = item.group.replace("_", " ")
        head = f"The following are multiple choice questions (with answers) about {subject}.\n\n"
        solved = "".join(f"{_asked(example)} {LETTERS[int(example.gold)]}\n\n"
                         for example in self.examples[item.group][:shots])  # fmt: skip
        return head + solved + _asked(item)

    def continuations(self, item: Item) -> Sequence[str]:
        return [f" {letter}" for letter in LETTERS[: len(item.choices)]]

    def grade(self, item: Item, text: str) -> Verdict:
        found = grade.letter(text, len(item.choices))
        return Verdict(found, found == LETTERS[int(item.gold)])


def _asked(item: Item) -> str:
    listed = "\n".join(f"{LETTERS[i]}. {choice}" for i, choice in enumerate(item.choices))
    return f"{item.question.strip()}\n{listed}\nAnswer:"


def _items(found: Found) -> list[Item]:
    items = []
    for number, row in enumerate(found.rows, 1):
        where = f"{found.path}, row {number}"
        subject, choices = field(row, "subject", str, where), field(row, "choices", list, where)
        key = field(row, "answer", str, where)
        if len(choices) != 4 or key not in ("A", "B", "C", "D"):
            raise FormatError(f"{where}: four choices and an answer from A to D are expected")
        index = field(row, "index", int, where)
        items.append(Item(f"{subject}/{index}", field(row, "question", str, where), str(LETTERS.index(key)),
                          tuple(choices), group=subject))  # fmt: skip
    return items
