r"""GSM8K: 1,319 grade school word problems whose answer is one number.

data     gsm8k/test.jsonl of openai/grade-school-math@3101c7d (MIT), sha256 3730d312…; examples from train.jsonl
plain    "Question: {question}\nAnswer:" after 5 solved questions (the first of train.jsonl); the same text as lm-eval's
         gsm8k; ends at "Question:"
chat     the question, then: "Solve the problem step by step, and put the final number into \boxed{}."
counts   the stated number equals the one after #### as an exact number, thousands commas and units aside: the boxed
         one, else the one after "####" or "answer is", else the last number of the text
also     strict and flexible: lm-eval's two filters with its normalization, to compare with its tables
"""

from __future__ import annotations

import re
from collections.abc import Sequence

from tiercel.errors import FormatError
from tiercel.evals import grade
from tiercel.evals.data import File, field, open_file
from tiercel.evals.task import Item, Messages, Prompt, Task, Verdict

HOME = "https://raw.githubusercontent.com/openai/grade-school-math/3101c7d5072418e28b9008a6636bde82a006892c/"
TEST = File("gsm8k/test.jsonl", "3730d312f6e3440559ace48831e51066acaca737f6eabec99bccb9e4b3c39d14",
            HOME + "grade_school_math/data/test.jsonl")  # fmt: skip
TRAIN = File("gsm8k/train.jsonl", "17f347dc51477c50d4efb83959dbb7c56297aba886e5544ee2aaed3024813465",
             HOME + "grade_school_math/data/train.jsonl")  # fmt: skip
CHAT = "Solve the problem step by step, and put the final number into \\boxed{}."


class GSM8K(Task):
    name, title = "gsm8k", "GSM8K"
    max_tokens = 1024
    shots, most_shots = 5, 64
    stop: Sequence[str] = ("Question:", "</s>", "<|im_end|>")

    def load(self, folder: str | None) -> list[Item]:
        test, train = open_file(TEST, folder), open_file(TRAIN, folder)
        self.sources = [test.about(), train.about()]
        self.examples = [(row["question"], row["answer"]) for row in train.rows[: self.most_shots]]
        items = []
        for number, (where, row) in enumerate(test.numbered(), 1):
            solution = field(row, "answer", str, where)
            _, mark, gold = solution.rpartition("#### ")
            if not mark or grade.number(gold) is None:
                raise FormatError(f"{where}: the answer does not end with #### and a number")
            question = field(row, "question", str, where)
            items.append(Item(f"gsm8k/{number - 1}", question, gold.strip(), more={"target": solution}))
        return items

    def prompt(self, item: Item, shots: int, *, chat: bool) -> Prompt:
        if not chat:
            solved = "".join(f"Question: {q}\nAnswer: {a}\n\n" for q, a in self.examples[:shots])
            return f"{solved}Question: {item.question}\nAnswer:"
        messages: Messages = []
        for question, solution in self.examples[:shots]:
            steps, _, gold = solution.rpartition("#### ")
            steps = re.sub(r"<<[^>]*>>", "", steps)  # marks for a calculator
            messages += [{"role": "user", "content": f"{question}\n\n{CHAT}"},
                         {"role": "assistant", "content": f"{steps}\\boxed{{{gold.strip()}}}"}]  # fmt: skip
        return [*messages, {"role": "user", "content": f"{item.question}\n\n{CHAT}"}]

    def grade(self, item: Item, text: str) -> Verdict:
        answer = grade.stated_number(text)
        scores = {"strict": float(matches(strict(text), item)), "flexible": float(matches(flexible(text), item))}
        return Verdict(answer, grade.same_number(answer, item.gold), scores)


# ── lm-eval's filters and normalization (gsm8k.yaml, version 3) ──


def strict(text: str) -> str:
    found = re.findall(r"#### (\-?[0-9\.\,]+)", text)
    return found[0].strip() if found else "[invalid]"


def flexible(text: str) -> str:
    found = re.findall(r"(-?[$0-9.,]{2,})|(-?[0-9]+)", text)
    return next((part for part in found[-1] if part), "[invalid]").strip() if found else "[invalid]"


def matches(answer: str, item: Item) -> bool:
    return _normal(answer) == _normal(item.more["target"])


def _normal(text: str) -> str:
    for pattern in (",", "\\$", "(?s).*#### ", "\\.$"):
        text = re.sub(pattern, "", text)
    return text.lower()
