r"""MATH-500: 500 competition problems with answers in LaTeX, levels 1 to 5.

data     math500/test.jsonl, sha256 35dc4108…: bit-identical to openai/prm800k's split (MIT)
chat     the problem, then: "Please reason step by step, and put your final answer within \boxed{}."
plain    "Problem: {problem}\nSolution:"; ends at "Problem:"
counts   the last \boxed{…} after the reasoning, when math-verify finds it equal to the gold answer; without a box
         nothing counts.  The judge has 5 seconds per answer.
"""

from __future__ import annotations

from collections.abc import Sequence

from tiercel.evals import grade
from tiercel.evals.aime import competition_prompt
from tiercel.evals.data import File, field, open_file
from tiercel.evals.task import Item, Prompt, Task, Verdict

TEST = File("math500/test.jsonl", "35dc41080a3680858b27fa7e0533d2d547825316fc5dafe5d316f4ccc5a06132",
            "https://raw.githubusercontent.com/Zhuofeng-Li/math-evaluation-harness/"
            "1b9885d817962a8494728376625ce6605772edbd/data/math500/test.jsonl")  # fmt: skip


class MATH500(Task):
    name, title = "math500", "MATH-500"
    max_tokens = 32_768
    stop: Sequence[str] = ("Problem:",)
    spread_over = "level"

    def load(self, folder: str | None) -> list[Item]:
        found = open_file(TEST, folder)
        self.sources = [found.about()]
        items = []
        for where, row in found.numbered():
            level = field(row, "level", int, where)
            items.append(Item(field(row, "unique_id", str, where), field(row, "problem", str, where),
                              field(row, "answer", str, where), group=f"level {level}"))  # fmt: skip
        return items

    def prompt(self, item: Item, shots: int, *, chat: bool) -> Prompt:
        return competition_prompt(item, chat)

    def grade(self, item: Item, text: str) -> Verdict:
        answer = grade.boxed(text)
        return Verdict(answer, grade.same_math(answer, item.gold))
