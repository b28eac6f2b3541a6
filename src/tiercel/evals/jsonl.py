"""Any JSONL file as a benchmark.

    tiercel eval MODEL --task quiz.jsonl --question q --choices options --answer key

question   the field with the question; "question", "problem", "prompt" or "query" when not named
choices    the field with a list of texts, or {"text": […]}: then it is a choice by likelihood, " {choice}" after
           "Question: {question}\\nAnswer:"; without it the model writes
answer     the field with the right answer.  With choices: a letter, the text of a choice, or a number, an index from 0
           (`--answer-from 1`: from 1).  A digit in quotes that is the text of no choice is an error unless
           --answer-from says what it counts from: that is the mistake of a well-known bad copy of ARC.
kind       of written answers: "number" (exact), "math" (LaTeX), "text" (case and spaces aside), "letter", "bare" (text,
           and the question goes without a word about the form of its answer); when not named it is "number" where
           every answer is one, else "text"
counts     number: the stated number; math: the last \\boxed{…}; text: the box or, without one, the last line;
           letter: the letter it settles on; bare: the whole text after the reasoning
"""

from __future__ import annotations

from collections.abc import Sequence
from pathlib import Path
from typing import Any

from tiercel.errors import FormatError, RequestError
from tiercel.evals import grade
from tiercel.evals.data import open_own
from tiercel.evals.task import LETTERS, Item, Prompt, Task, Verdict, letters_prompt

QUESTIONS, CHOICES = ("question", "problem", "prompt", "query"), ("choices", "options")
ANSWERS = ("answer", "answerKey", "gold", "target", "label")
KINDS = ("number", "math", "text", "letter", "bare")
ASKED = {
    "number": "Solve the problem step by step, and put the final number into \\boxed{}.",
    "math": "Please reason step by step, and put your final answer within \\boxed{}.",
    "text": "Put the final answer, and nothing else, into \\boxed{}.",
    "letter": 'Answer with the letter of the right choice, as in "The answer is B."',
}


class JSONL(Task):
    stop: Sequence[str] = ("Question:",)

    def __init__(
        self,
        path: Path,
        *,
        question: str | None = None,
        choices: str | None = None,
        answer: str | None = None,
        kind: str | None = None,
        answer_from: int | None = None,
    ) -> None:
        if kind is not None and kind not in KINDS:
            raise RequestError(f"answers are of kind {', '.join(KINDS)}, not {kind!r}")
        if answer_from not in (None, 0, 1):
            raise RequestError(f"choices are counted from 0 or from 1, not from {answer_from}")
        self.path, self.name, self.title = path, path.stem, path.name
        self.fields = {"question": question, "choices": choices, "answer": answer}
        self.how, self.answer_from = kind, answer_from

    def load(self, folder: str | None) -> list[Item]:
        found = open_own(self.path)
        self.sources = [found.about()]
        if not found.rows:
            raise FormatError(f"{self.path} has no rows")
        question = self._field("question", QUESTIONS, found.rows[0])
        answer = self._field("answer", ANSWERS, found.rows[0])
        choices = self._field("choices", CHOICES, found.rows[0])
        assert question is not None and answer is not None
        items = []
        for number, row in enumerate(found.rows, 1):
            where = f"{self.path}, row {number}"
            for name in (question, answer):
                if name not in row:
                    raise FormatError(f"{where}: field {name!r} is missing; it has {', '.join(map(repr, row))[:200]}")
            asked, gold, id = row[question], row[answer], str(row.get("id", f"{self.name}/{number - 1}"))
            if not isinstance(asked, str) or not asked.strip():
                raise FormatError(f"{where}: field {question!r} is not a text")
            if choices is None:
                if isinstance(gold, bool) or not isinstance(gold, (str, int, float)) or str(gold).strip() == "":
                    raise FormatError(f"{where}: field {answer!r} is neither a text nor a number")
                items.append(Item(id, asked, str(gold)))
            else:
                texts = _texts(row.get(choices), f"{where}: field {choices!r}")
                items.append(Item(id, asked, str(self._index(gold, row.get(choices), texts, where)), texts))
        if len({item.id for item in items}) < len(items):
            items = [Item(f"{self.name}/{i}", it.question, it.gold, it.choices) for i, it in enumerate(items)]
        self.kind = "generate" if choices is None else "choose"
        if choices is None:
            numbers = all(grade.number(item.gold) is not None for item in items)
            self.how = self.how or ("number" if numbers else "text")
        return items

    def _field(self, what: str, usual: Sequence[str], row: dict[str, Any]) -> str | None:
        named = self.fields[what]
        if named is not None:
            return named
        name = next((name for name in usual if name in row), None)
        if name is None and what != "choices":
            raise FormatError(f"{self.path}, row 1: which field is the {what}? Name it with --{what}; "
                              f"there are {', '.join(row)[:200]}")  # fmt: skip
        return name

    def _index(self, gold: Any, raw: Any, texts: tuple[str, ...], where: str) -> int:
        """Which choice a gold answer names."""
        labels = raw.get("label") if isinstance(raw, dict) else None
        if labels is not None:
            if not isinstance(labels, list) or len(labels) != len(texts) or gold not in labels:
                raise FormatError(f"{where}: the answer {gold!r} is none of the labels {labels!r:.80}")
            return int(labels.index(gold))
        if isinstance(gold, str):
            word = gold.strip()
            if word in texts:
                return texts.index(word)
            if len(word) == 1 and word.upper() in LETTERS[: len(texts)]:
                return LETTERS.index(word.upper())
            if word.isdecimal():
                if self.answer_from is None:
                    raise FormatError(f"{where}: does the answer {word!r} count from 0 or from 1? Say --answer-from")
                gold = int(word)
        if isinstance(gold, int) and not isinstance(gold, bool):
            index = gold - (self.answer_from or 0)
            if 0 <= index < len(texts):
                return index
        raise FormatError(f"{where}: the answer {gold!r:.60} names none of the {len(texts)} choices")

    def prompt(self, item: Item, shots: int, *, chat: bool) -> Prompt:
        if chat:
            if item.choices:
                return letters_prompt(item)
            form = "" if self.how == "bare" else f"\n\n{ASKED[self.how or 'text']}"
            return [{"role": "user", "content": item.question + form}]
        return f"Question: {item.question}\nAnswer:"

    def grade(self, item: Item, text: str) -> Verdict:
        if item.choices:
            found = grade.letter(text, len(item.choices))
            return Verdict(found, found == LETTERS[int(item.gold)])
        if self.how == "number":
            found = grade.stated_number(text)
            return Verdict(found, grade.same_number(found, item.gold))
        if self.how == "math":
            found = grade.boxed(text)
            return Verdict(found, grade.same_math(found, item.gold))
        if self.how == "letter":
            found = grade.letter(text, len(LETTERS))
            return Verdict(found, found == item.gold.strip().upper())
        if self.how == "bare":
            return Verdict(text.strip() or None, grade.same_text(text, item.gold))
        lines = [line for line in text.split("\n") if line.strip()]
        found = grade.boxed(text) or (lines[-1].strip() if lines else None)
        return Verdict(found, grade.same_text(found, item.gold))


def _texts(raw: Any, where: str) -> tuple[str, ...]:
    texts = raw.get("text") if isinstance(raw, dict) else raw
    if not isinstance(texts, list) or not 2 <= len(texts) <= len(LETTERS):
        raise FormatError(f"{where}: a list of 2 to {len(LETTERS)} choices is expected")
    if len({str(text).strip() for text in texts}) < len(texts):
        raise FormatError(f"{where}: a choice stands there twice, as in copies that were padded")
    return tuple(str(text) for text in texts)
