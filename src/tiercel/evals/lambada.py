"""LAMBADA (OpenAI's variant): 5,153 passages whose last word is to be foretold.

data     lambada/test.jsonl of mosaicml/llm-foundry@8c8dd48, sha256 411bfbe5…
plain    the passage without its last word; the continuation is that word with a space before it, as in lm-eval's
         lambada_openai
counts   acc: each token of the word is the likeliest; perplexity of the words is reported too
"""

from __future__ import annotations

from collections.abc import Sequence

from tiercel.evals.data import File, field, open_file
from tiercel.evals.task import Item, Prompt, Task

TEST = File("lambada/test.jsonl", "411bfbe5b9054346b6a19299c0242670adbefb9162efd958593cbc0290b8c9dc",
            "https://raw.githubusercontent.com/mosaicml/llm-foundry/8c8dd48f72168c5d51e2f7b151595892a8fba43d/"
            "scripts/eval/local_data/language_understanding/lambada_openai.jsonl")  # fmt: skip


class LAMBADA(Task):
    name, title, kind = "lambada", "LAMBADA", "continue"

    def load(self, folder: str | None) -> list[Item]:
        found = open_file(TEST, folder)
        self.sources = [found.about()]
        return [
            Item(f"lambada/{number - 1}", field(row, "context", str, f"{found.path}, row {number}"),
                 field(row, "continuation", str, f"{found.path}, row {number}").strip())
            for number, row in enumerate(found.rows, 1)
        ]  # fmt: skip

    def prompt(self, item: Item, shots: int, *, chat: bool) -> Prompt:
        return item.question

    def continuations(self, item: Item) -> Sequence[str]:
        return [f" {item.gold}"]
