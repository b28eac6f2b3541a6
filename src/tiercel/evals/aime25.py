r"""AIME 2025: 15 problems of AIME I and 15 of AIME II, in this order.

data     aime25/test.jsonl of Zhuofeng-Li/math-evaluation-harness@ba004e3.  The text circulates in several wordings, so
         the copy is named by its sha256 in every report, and what is checked is the answers: all 30, in order, as
         three independent copies have them.  This copy has two slips of escaping (rows 10 and 19) and figures in
         Asymptote code; they are kept.
         The problems are the Mathematical Association of America's: for evaluation only.
Prompt and grading: aime.py.
"""

from __future__ import annotations

from tiercel.errors import FormatError
from tiercel.evals.aime import AIME
from tiercel.evals.data import File, open_file
from tiercel.evals.task import Item

TEST = File("aime25/test.jsonl", "",
            "https://raw.githubusercontent.com/Zhuofeng-Li/math-evaluation-harness/"
            "ba004e3d9d6b74521cbad30a6c3dce3bd80aa427/data/aime25/test.jsonl")  # fmt: skip
ANSWERS = [70, 588, 16, 117, 279, 504, 821, 77, 62, 81, 259, 510, 204, 60, 735,
           468, 49, 82, 106, 336, 293, 237, 610, 149, 907, 113, 19, 248, 104, 240]  # fmt: skip


class AIME25(AIME):
    name, title = "aime25", "AIME 2025"
    spread_over = "exam"

    def load(self, folder: str | None) -> list[Item]:
        found = open_file(TEST, folder)
        items = self.items_of(found)
        wrong = [i + 1 for i, item in enumerate(items) if int(item.gold) != ANSWERS[i]]
        if wrong:
            raise FormatError(f"{found.path}: the answers of rows {wrong} are not those of AIME 2025 I and II in order")
        return items
