r"""HumanEval: 164 Python functions to complete from their docstrings.

data     humaneval/HumanEval.jsonl of openai/human-eval@6d43fb9 (MIT; unpacked), sha256 1d49078b…
plain    the prompt itself; ends where the function does: at "\nclass", "\ndef", "\n#", "\nif", "\nprint" (the stops of
         the paper)
chat     "Complete this function. Answer with the whole function in one Python code block." and the prompt
counts   when prompt, completion and the tests of the row run through to their end in the sandbox (sandbox.py) within 5
         seconds.  Of a chat answer the last code block that defines the function is taken, with the prompt's
         imports before it; a block that goes on from the prompt's signature is put behind the prompt.
         Programs have the standard library only.
"""

from __future__ import annotations

import gzip
import re
import secrets
from collections.abc import Sequence

from tiercel.evals.data import File, field, open_file
from tiercel.evals.task import Item, Prompt, Task, Verdict

TEST = File("humaneval/HumanEval.jsonl", "1d49078ba3e2b196b9344535bef34a43021f038fad9561d6ee7c53450609a6a2",
            "https://raw.githubusercontent.com/openai/human-eval/6d43fb980f9fee3c892a914eda09951f772ad10d/"
            "data/HumanEval.jsonl.gz", gzip.decompress)  # fmt: skip
TEST_SECONDS = 5.0
CHAT = "Complete this function. Answer with the whole function in one Python code block."


class HumanEval(Task):
    name, title = "humaneval", "HumanEval"
    max_tokens = 1024
    stop: Sequence[str] = ("\nclass", "\ndef", "\n#", "\nif", "\nprint")
    votes = False  # hardly two programs are the same text

    def load(self, folder: str | None) -> list[Item]:
        found = open_file(TEST, folder)
        self.sources = [found.about()]
        items = []
        for where, row in found.numbered():
            texts = {name: field(row, name, str, where) for name in ("prompt", "test", "entry_point", "task_id")}
            items.append(Item(texts["task_id"], texts["prompt"], field(row, "canonical_solution", str, where),
                              more={"test": texts["test"], "entry_point": texts["entry_point"]}))  # fmt: skip
        return items

    def prompt(self, item: Item, shots: int, *, chat: bool) -> Prompt:
        if not chat:
            return item.question
        return [{"role": "user", "content": f"{CHAT}\n\n```python\n{item.question.rstrip()}\n```"}]

    def grade(self, item: Item, text: str) -> Verdict:
        from tiercel.evals import sandbox

        program = whole(text, item.question, item.more["entry_point"])
        if program is None:
            return Verdict(None, False, note="no code")
        done = secrets.token_hex(8)  # an early exit is no success
        tests = f"{item.more['test']}\ncheck({item.more['entry_point']})\nprint({done!r})\n"
        outcome = sandbox.run(f"{program}\n\n{tests}", timeout=TEST_SECONDS)
        right = outcome.ok and outcome.output.rstrip().endswith(done)
        last = outcome.output.strip().rpartition("\n")[2][:200]
        why = "ended before the tests did" if outcome.ok else outcome.why
        note = "" if right else f"{why}: {last}" if last else why
        return Verdict(program, right, note=note.replace(done, ""))

    def majority(self, items: Sequence[Item]) -> tuple[str, float] | None:
        return None


def whole(text: str, prompt: str, entry_point: str) -> str | None:
    """The program of an answer: a completion, or what a chat answer has in its code blocks."""
    blocks: list[str] = re.findall(r"```(?:python|py)?[ \t]*\n(.*?)(?:```|\Z)", text, re.DOTALL | re.IGNORECASE)
    if not blocks:
        if re.search(rf"^def {re.escape(entry_point)}\b", text, re.MULTILINE):
            blocks = [text]
        else:
            return prompt + text if text.strip() else None
    defining = [block for block in blocks if re.search(rf"^def {re.escape(entry_point)}\b", block, re.MULTILINE)]
    if defining:
        before = prompt[: prompt.rfind(f"def {entry_point}")]  # imports, and functions the prompt gives
        return f"{before}\n{defining[-1]}"
    return prompt + blocks[-1]
