"""Problems that check themselves: additions, countdowns, word problems, … made by rules (`tiercel.problems`).

data     none: `FAMILIES[…].test_set(n)`, the same for the same seed; the hash of a question decides whether it may be
         trained on, so that these never were.  100 of each family, and 25 beyond the sizes of training
         ("addition, larger").
chat     the question alone
plain    the question and a line's end
counts   what the family's own checker accepts, after the reasoning
"""

from __future__ import annotations

import hashlib
from collections.abc import Sequence

from tiercel.evals.task import Item, Prompt, Task, Verdict
from tiercel.problems import FAMILIES

ITEMS_PER_FAMILY, LARGER_ITEMS = 100, 25


class Problems(Task):
    name, title = "problems", "Problems that check themselves"
    max_tokens = 1024
    spread_over = "family"
    from_model = True

    def load(self, folder: str | None) -> list[Item]:
        items = []
        for name, family in FAMILIES.items():
            for larger, count in ((False, ITEMS_PER_FAMILY), (True, LARGER_ITEMS)):
                group = f"{name}, larger" if larger else name
                for number, problem in enumerate(family.test_set(count, larger=larger)):
                    items.append(Item(f"{group}/{number}", problem.question, problem.answer, group=group,
                                      more={"problem": problem}))  # fmt: skip
        together = hashlib.sha256("\0".join(f"{item.question}\0{item.gold}" for item in items).encode()).hexdigest()
        self.sources = [{"file": "tiercel.problems", "sha256": together, "rows": len(items)}]
        return items

    def prompt(self, item: Item, shots: int, *, chat: bool) -> Prompt:
        return [{"role": "user", "content": item.question}] if chat else f"{item.question}\n"

    def grade(self, item: Item, text: str) -> Verdict:
        problem = item.more["problem"]
        answer = text.strip()
        return Verdict(answer or None, bool(answer) and bool(FAMILIES[problem.family].correct(answer, problem)))

    def majority(self, items: Sequence[Item]) -> tuple[str, float] | None:
        return None
