"""What AIME 2024 and 2025 share: 30 problems, answers 0 … 999.

chat     the problem, then: "Please reason step by step, and put your final answer within \\boxed{}."
plain    "Problem: {problem}\\nSolution:"; ends at "Problem:"
counts   the last \\boxed{…} after the reasoning, as an integer ("025" is 25); without a box nothing counts
usual    16 samples at temperature 0.6, top-p 0.95, 65,536 tokens (the settings of Falcon-H1R's report); one problem is
         3.3 points, so a single sample is noise
"""

from __future__ import annotations

from collections.abc import Sequence

from tiercel.errors import FormatError
from tiercel.evals import grade
from tiercel.evals.data import Found, field
from tiercel.evals.task import Item, Prompt, Task, Verdict

STEPS = "Please reason step by step, and put your final answer within \\boxed{}."


def competition_prompt(item: Item, chat: bool) -> Prompt:
    if chat:
        return [{"role": "user", "content": f"{item.question}\n\n{STEPS}"}]
    return f"Problem: {item.question}\nSolution:"


class AIME(Task):
    samples, temperature, top_p, max_tokens = 16, 0.6, 0.95, 65_536
    stop: Sequence[str] = ("Problem:",)

    def items_of(self, found: Found) -> list[Item]:
        self.sources = [found.about()]
        if len(found.rows) != 30:
            raise FormatError(f"{found.path}: {len(found.rows)} rows; an AIME has 30 problems")
        items = []
        for number, (where, row) in enumerate(found.numbered(), 1):
            gold = field(row, "answer", str, where)
            if not gold.isdecimal() or int(gold) > 999:
                raise FormatError(f"{where}: {gold[:40]!r} is no answer from 0 to 999")
            exam = "I" if number <= 15 else "II"
            items.append(Item(f"{self.name}/{number}", field(row, "problem", str, where), gold, group=exam))
        return items

    def prompt(self, item: Item, shots: int, *, chat: bool) -> Prompt:
        return competition_prompt(item, chat)

    def grade(self, item: Item, text: str) -> Verdict:
        answer = grade.boxed(text)
        return Verdict(answer, grade.same_integer(answer, item.gold))

    def majority(self, items: Sequence[Item]) -> tuple[str, float] | None:
        return None  # thirty different answers
