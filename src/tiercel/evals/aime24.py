"""AIME 2024: 15 problems of AIME I and 15 of AIME II.

data     aime24/test.jsonl of QwenLM/Qwen2.5-Math@a45202b, sha256 af2b8bd2…; its texts and answers equal a second copy.
         The problems are the Mathematical Association of America's: for evaluation only.
Prompt and grading: aime.py.
"""

from __future__ import annotations

from tiercel.evals.aime import AIME
from tiercel.evals.data import File, open_file
from tiercel.evals.task import Item

TEST = File("aime24/test.jsonl", "af2b8bd2aa911b6333ad0df32f3ca05c7ae8ed10f1731f4372c8ae26990bf7ac",
            "https://raw.githubusercontent.com/QwenLM/Qwen2.5-Math/a45202bd16f1ec06f433442dc1152d0074773465/"
            "evaluation/data/aime24/test.jsonl")  # fmt: skip


class AIME24(AIME):
    name, title = "aime24", "AIME 2024"
    spread_over = "exam"

    def load(self, folder: str | None) -> list[Item]:
        items = self.items_of(open_file(TEST, folder))
        # this copy has the problems in no order of the exams
        return [Item(item.id, item.question, item.gold) for item in items]
