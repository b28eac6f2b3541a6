"""evaluate: ask, grade, keep.

    result = evaluate(model, open_task("gsm8k"), Settings(limit=20), out=Path("runs/a"))

model is a `tiercel.Model` or any `Answerer`.  With `out` every finished item is a line of `out/items.jsonl`, on the
disk before the next one counts; a run that was killed goes on from there, and its report is the one that it would
have given without the interruption, but for the times.
"""

from __future__ import annotations

import functools
import hashlib
import json
import math
import os
import platform
import re
import time
from collections.abc import Callable, Iterator, Sequence
from dataclasses import asdict, dataclass, replace
from pathlib import Path
from typing import TYPE_CHECKING, Any

from tiercel.errors import ContextOverflow, FormatError, RequestError, TiercelError
from tiercel.evals import grade, votes
from tiercel.evals.answers import Answerer, Answers, Ask, Question, Scored
from tiercel.evals.statistics import bootstrap, wilson
from tiercel.evals.task import Item, Prompt, Settings, Task, Verdict, chosen
from tiercel.voting.answers import normal
from tiercel.voting.settings import VoteSettings

if TYPE_CHECKING:
    from tiercel.api import Model

Record = dict[str, Any]
Progress = Callable[[int, int, float], None]  # items done, items in all, running score
FORMAT = 1
TIMES = ("seconds", "latency", "cached_tokens", "beyond_tokens", "folder")  # may differ between two equal runs


@dataclass(frozen=True)
class Result:
    """What a run found.

    score, interval: of the measure that `metric` names, 0 … 1 · metrics: further ones by name
    chance: what guessing would score on these items · majority: what the commonest answer scores on the whole task
    seconds: by the clock, from when the first item was asked, interruptions left out
    cut: outputs that the token budget ended · errors: items that could not be asked (they count as wrong)
    beyond_tokens: written by traces of a vote that were given up when it was decided; not among the generated
    items: one record each, in the order of the task, with every transcript
    """

    model: dict[str, Any]
    task: dict[str, Any]
    settings: dict[str, Any]
    metric: str
    score: float
    interval: dict[str, Any]
    metrics: dict[str, float]
    groups: dict[str, dict[str, float]]
    chance: float | None
    majority: dict[str, Any] | None
    n_items: int
    n_samples: int
    cut: int
    unanswered: int
    errors: int
    prompt_tokens: int
    generated_tokens: int
    cached_tokens: int
    beyond_tokens: int
    seconds: float
    versions: dict[str, str]
    items: list[Record]
    folder: Path | None = None  # where it is kept

    def to_dict(self, *, items: bool = True, times: bool = True) -> dict[str, Any]:
        """Plain data.  times=False: only what two equal runs have in common."""
        found = {**vars(self), "folder": None if self.folder is None else str(self.folder)}
        if not items:
            del found["items"]
        if not times:
            found = {name: value for name, value in found.items() if name not in TIMES}
            if items:
                found["items"] = [{k: v for k, v in r.items() if k not in TIMES} for r in self.items]
        return found


def evaluate(
    model: Model | Answerer,
    task: Task,
    settings: Settings | None = None,
    *,
    out: Path | None = None,
    under: Path | None = None,
    fresh: bool = False,
    progress: Progress | None = None,
) -> Result:
    """Ask every item, grade the answers, and count.

    out: a folder that keeps the transcripts and lets the run be resumed (`fresh`: what is there is thrown away)
    under: a folder of runs, in which this one gets a folder named by model, task and all that decides its outcome
    Raises RequestError (settings, a model without chat template, a folder of another run), FormatError (data).
    """
    from tiercel.evals.local import LocalModel

    settings = settings or Settings()
    answerer: Answerer = model if hasattr(model, "answer") else LocalModel(model)  # type: ignore[assignment]
    everything = task.load(settings.data)
    items = chosen(everything, settings.limit, settings.seed)
    if not items:
        raise FormatError(f"{task.name} has no items")
    plan = resolve(answerer, task, settings)
    prompts = [task.prompt(item, plan["shots"], chat=plan["chat"]) for item in items]
    if settings.system:
        if not plan["chat"]:
            raise RequestError("a system message needs the chat template; leave it out or ask with --chat")
        first = {"role": "system", "content": settings.system}
        prompts = [[first, *prompt] for prompt in prompts if not isinstance(prompt, str)]
    about = {"format": FORMAT, "model": answerer.about(), "task": about_task(task, len(everything)),
             "settings": settings_of(settings, plan)}  # fmt: skip
    if out is None and under is not None:
        out = under / folder_name(about)
    with Log(out, about, fresh) as log:
        records = log.records
        left = [i for i, item in enumerate(items) if item.id not in records]
        running = [records[item.id]["score"] for item in items if item.id in records]
        if progress is not None:
            progress(len(running), len(items), _mean(running))
        last = time.perf_counter()
        for record in _ask(answerer, task, items, prompts, left, plan, settings):
            now = time.perf_counter()
            log.write(record | {"seconds": round(now - last, 4)})
            last = now
            running.append(record["score"])
            if progress is not None:
                progress(len(running), len(items), _mean(running))
        found = [records[item.id] for item in items]
    return replace(summarize(about, task, items, found, everything), folder=out)


def resolve(answerer: Answerer, task: Task, settings: Settings) -> dict[str, Any]:
    """What is asked for, with what was left open filled in; refuses what cannot be."""
    chat = settings.chat
    choices = None
    if task.kind != "generate":
        likelihood = getattr(answerer, "likelihoods", True)
        choices = settings.choices or ("likelihood" if likelihood else "letters")
        if choices == "likelihood" and not likelihood:
            raise RequestError(f"{answerer.name} is an address, which gives no likelihoods; ask with --letters")
        if choices == "letters" and task.kind == "continue":
            raise RequestError(f"{task.name} needs likelihoods, which only a model that is loaded here gives")
        if choices == "likelihood":
            if chat:
                raise RequestError(f"likelihoods are taken of plain text; leave --chat out for {task.name}, "
                                   "or let the model write with --letters")  # fmt: skip
            chat = False
        elif chat is None:
            chat = True
    if chat and not answerer.has_template:
        raise RequestError(f"{answerer.name} has no chat template; ask with --plain")
    chat = answerer.has_template if chat is None else chat
    write = task.kind == "generate" or choices == "letters"
    if settings.vote is not None:
        _check_vote(answerer, task, settings, write)
    samples = settings.vote.k if settings.vote else settings.samples or (task.samples if write else 1)
    temperature = settings.temperature if settings.temperature is not None else task.temperature
    if samples > 1 and temperature == 0:
        if not write:
            raise RequestError("likelihoods do not vary: several samples make no sense")
        raise RequestError(f"{samples} samples at temperature 0 would be the same; give --temperature")
    if samples > 1 and not write:
        raise RequestError("likelihoods do not vary: several samples make no sense")
    shots = settings.shots if settings.shots is not None else (task.chat_shots if chat else task.shots)
    if shots > task.most_shots:
        raise RequestError(f"{task.name} has {task.most_shots} solved examples, not {shots}")
    given = {"top_p": task.top_p, "top_k": 0, "min_p": 0.0, "max_tokens": task.max_tokens}
    sampling = {name: getattr(settings, name) if getattr(settings, name) is not None else value
                for name, value in given.items()}  # fmt: skip
    return {"chat": chat, "choices": choices, "samples": samples, "temperature": temperature, "shots": shots,
            **sampling}  # fmt: skip


def _check_vote(answerer: Answerer, task: Task, settings: Settings, write: bool) -> None:
    if settings.samples is not None:
        raise RequestError(f"--samples {settings.samples} and a vote: a vote has its own number of answers")
    if not write:
        raise RequestError("likelihoods do not vary, so there is nothing to vote on")
    if not task.votes:
        raise RequestError(f"answers to {task.name} are hardly ever equal, so there is nothing to vote on; --samples?")
    if not getattr(answerer, "votes", False):
        raise RequestError(f"{answerer.name} is an address, which does not say how sure it was; a vote needs a model "
                           "that is loaded here")  # fmt: skip


def settings_of(settings: Settings, plan: dict[str, Any]) -> dict[str, Any]:
    """What decides the outcome of an item: two runs may share their items when this is equal."""
    vote = {} if settings.vote is None else {"vote": asdict(settings.vote)}
    return plan | {"system": settings.system, "think": settings.think, "seed": settings.seed} | vote


def about_task(task: Task, items: int) -> dict[str, Any]:
    """items: how many the whole task has."""
    return {"name": task.name, "title": task.title or task.name, "kind": task.kind, "items": items,
            "data": [dict(source) for source in task.sources]}  # fmt: skip


def folder_name(about: dict[str, Any]) -> str:
    """The same for the same question, so that the same command goes on where it was interrupted."""
    model = re.sub(r"[^A-Za-z0-9._-]+", "-", about["model"]["name"].rstrip("/").rpartition("/")[2])[:60].strip(".-")
    task = re.sub(r"[^A-Za-z0-9._-]+", "-", about["task"]["name"])[:60].strip(".-")
    digest = hashlib.sha256(json.dumps(about, sort_keys=True).encode()).hexdigest()[:8]
    return f"{model or 'model'}-{task or 'task'}-{digest}"


# ── asking ──


def _ask(
    answerer: Answerer,
    task: Task,
    items: Sequence[Item],
    prompts: Sequence[Prompt],
    left: Sequence[int],
    plan: dict[str, Any],
    settings: Settings,
) -> Iterator[Record]:
    ask = Ask(plan["chat"], plan["samples"], plan["max_tokens"], plan["temperature"], plan["top_p"], plan["top_k"],
              plan["min_p"], () if plan["chat"] else tuple(task.stop), settings.think, settings.slots,
              settings.vote)  # fmt: skip
    if plan["choices"] == "likelihood" or task.kind == "continue":
        contexts = ((i, str(prompts[i]), list(task.continuations(items[i]))) for i in left)
        for scored in answerer.score(contexts, ask):
            if scored.error is not None and not isinstance(scored.error, ContextOverflow):
                raise scored.error
            yield _scored(task, items[scored.key], str(prompts[scored.key]), scored)
        return

    @functools.lru_cache(4096)  # a vote reads each trace as it ends, before all of them are graded
    def judged(key: int, text: str) -> Verdict:
        return task.grade(items[key], grade.final(text))

    def read(key: int, text: str) -> str | None:
        said = judged(key, text).answer
        return None if said is None else normal(said)

    questions = (Question(i, prompts[i], seed_of(settings.seed, items[i].id), functools.partial(read, i)) for i in left)
    for answers in answerer.answer(questions, ask):
        if answers.error is not None and not isinstance(answers.error, ContextOverflow):
            raise answers.error
        yield _graded(items[answers.key], prompts[answers.key], answers, functools.partial(judged, answers.key))


def seed_of(seed: int, id: str) -> int:
    """Every item draws from its own seed, so that it does not matter what is asked beside it or before."""
    return int.from_bytes(hashlib.sha256(f"{seed} {id}".encode()).digest()[:6], "big")


def _graded(item: Item, prompt: Prompt, answers: Answers, judged: Callable[[str], Verdict]) -> Record:
    samples: list[Record] = []
    for sample in answers.samples:
        verdict = judged(sample.text)
        samples.append({"text": sample.text, "thinking": sample.thinking, "finish_reason": sample.finish_reason,
                        "tokens": sample.tokens, "answer": verdict.answer, "correct": verdict.correct,
                        "scores": dict(verdict.scores)} | ({"note": verdict.note} if verdict.note else {}))  # fmt: skip
    record: Record = _record(item, prompt, answers) | {
        "score": _mean([float(sample["correct"]) for sample in samples]),
        "samples": samples,
        "generated_tokens": sum(sample["tokens"] for sample in samples),
    }
    if answers.vote is not None:
        for kept, trace in zip(samples, answers.vote.traces, strict=False):
            kept["confidence"] = trace.confidence
        record |= votes.record(answers.vote, [sample["correct"] for sample in samples])
    return record


def _scored(task: Task, item: Item, prompt: str, scored: Scored) -> Record:
    texts = list(task.continuations(item))
    logprobs = [each.logprob for each in scored.likelihoods]
    record: Record = _record(item, prompt, scored) | {
        "continuations": texts,
        "logprobs": logprobs,
        "generated_tokens": 0,
    }
    if not logprobs:
        return record | {"score": 0.0, "scores": {}}
    if task.kind == "continue":
        right = scored.likelihoods[0].greedy
        return record | {"score": float(right), "scores": {"acc": float(right)}}
    gold = int(item.gold)
    per_byte = [
        value / max(len(text.removeprefix(" ").encode()), 1) for value, text in zip(logprobs, texts, strict=True)
    ]
    per_char = [value / max(len(text.removeprefix(" ")), 1) for value, text in zip(logprobs, texts, strict=True)]
    picks = {"acc": _best(logprobs), "acc_norm": _best(per_char), "acc_bytes": _best(per_byte)}
    scores = {name: float(pick == gold) for name, pick in picks.items()}
    return record | {"score": scores["acc_norm" if task.normalized else "acc"], "scores": scores, "picks": picks}


def _record(item: Item, prompt: Prompt, answers: Answers | Scored) -> Record:
    record = {"id": item.id, "group": item.group, "gold": item.gold, "prompt": prompt,
              "prompt_tokens": answers.prompt_tokens, "cached_tokens": answers.cached_tokens,
              "latency": round(answers.seconds, 4)}  # fmt: skip
    return record | ({"error": str(answers.error)} if answers.error is not None else {})


def _best(values: Sequence[float]) -> int:
    return max(range(len(values)), key=lambda i: values[i])


# ── counting ──


def summarize(
    about: dict[str, Any], task: Task, items: Sequence[Item], records: list[Record], everything: Sequence[Item]
) -> Result:
    """From the records alone: a resumed run and an uninterrupted one have the same.

    everything: all items of the task, whose commonest answer is the majority baseline."""
    settings = about["settings"]
    scores = [record["score"] for record in records]
    samples = [sample for record in records for sample in record.get("samples", ())]
    write = settings["choices"] != "likelihood"
    vote = VoteSettings(**settings["vote"]) if "vote" in settings else None
    metric = "correct" if write else "acc_norm" if task.normalized else "acc"
    metric = metric if vote is None else votes.name_of(vote)
    samples_each = settings["samples"] if vote is None else 1  # what is scored of an item
    if samples_each > 1 and 0 < sum(scores) < len(scores):  # of equal scores a bootstrap says nothing
        low, high = bootstrap(scores)
        interval = {"low": low, "high": high, "level": 0.95, "method": "bootstrap over items"}
    else:
        low, high = wilson(sum(scores), len(scores))
        interval = {"low": low, "high": high, "level": 0.95, "method": "Wilson"}
    metrics = _further(task, records, samples_each)
    by_group: dict[str, list[float]] = {}
    for record in records:
        if record["group"]:
            by_group.setdefault(record["group"], []).append(record["score"])
    groups = {name: {"items": len(part), "score": _mean(part)} for name, part in sorted(by_group.items())}
    majority = task.majority(everything)
    return Result(
        model=about["model"],
        task=about["task"],
        settings=settings,
        metric=metric,
        score=_mean(scores),
        interval=interval,
        metrics=metrics,
        groups=groups,
        chance=task.chance(items),
        majority=None if majority is None else {"answer": majority[0], "score": majority[1]},
        n_items=len(records),
        n_samples=len(samples) if write else len(records),
        cut=sum(sample["finish_reason"] == "length" for sample in samples),
        unanswered=sum(sample["answer"] is None for sample in samples),
        errors=sum("error" in record for record in records),
        prompt_tokens=sum(record["prompt_tokens"] for record in records),
        generated_tokens=sum(record["generated_tokens"] for record in records),
        cached_tokens=sum(record["cached_tokens"] for record in records),
        beyond_tokens=sum(record.get("beyond_tokens", 0) for record in records),
        seconds=round(sum(record["seconds"] for record in records), 3),
        versions=versions(),
        items=records,
    )


def _further(task: Task, records: Sequence[Record], samples: int) -> dict[str, float]:
    """Means of the other judgements, pass@k, perplexity."""
    out: dict[str, float] = {}
    of_samples = [sample["scores"] for record in records for sample in record.get("samples", ())]
    of_items = [record.get("scores", {}) for record in records]
    for judged in (of_samples, of_items):
        for name in dict.fromkeys(name for scores in judged for name in scores):
            out[name] = _mean([scores.get(name, 0.0) for scores in judged])
    if samples > 1:
        out[f"pass@{samples}"] = _mean([float(any(s["correct"] for s in record["samples"])) for record in records])
    if task.kind == "continue":
        known = [record["logprobs"][0] for record in records if record["logprobs"]]
        out["perplexity"] = math.exp(min(-_mean(known), 700.0))
    return out


def versions() -> dict[str, str]:
    import torch

    from tiercel import __version__

    return {"tiercel": __version__, "python": platform.python_version(), "torch": torch.__version__,
            "machine": f"{platform.system()} {platform.machine()}"}  # fmt: skip


def _mean(values: Sequence[float]) -> float:
    return sum(values) / len(values) if values else 0.0


# ── what is kept ──


class Log:
    """The folder of a run: `run.json` (what was asked), `items.jsonl` (a line for each finished item).

    records: by id; those of an earlier run with the same model, data and settings included.  Raises RequestError when
    the folder holds another run, and FormatError when a line other than the last is broken.
    """

    def __init__(self, folder: Path | None, about: dict[str, Any], fresh: bool) -> None:
        self.folder, self.records = folder, dict[str, Record]()
        self._file: Any = None
        if folder is None:
            return
        try:
            folder.mkdir(parents=True, exist_ok=True)
            head, lines = folder / "run.json", folder / "items.jsonl"
            if fresh:
                head.unlink(missing_ok=True)
                lines.unlink(missing_ok=True)
            if head.exists():
                self._check(head, about)
            else:
                from tiercel.runtime.atomic import atomic_write

                lines.unlink(missing_ok=True)
                with atomic_write(head) as file:
                    file.write((json.dumps(about, ensure_ascii=False, indent=1) + "\n").encode())
            self._file = lines.open("a+b")
            try:
                self._lock()
                self._read(lines)
            except BaseException:
                self._file.close()
                raise
        except OSError as error:
            raise TiercelError(f"{folder} cannot hold the run: {error.strerror or error}") from None

    def write(self, record: Record) -> None:
        """On the disk when this returns."""
        self.records[record["id"]] = record
        if self._file is None:
            return
        try:
            self._file.write(json.dumps(record, ensure_ascii=False).encode("utf-8", "surrogatepass") + b"\n")
            self._file.flush()
            os.fsync(self._file.fileno())
        except OSError as error:
            raise TiercelError(f"{self._file.name}: {error.strerror or error}; the items before are kept") from None

    def _check(self, head: Path, about: dict[str, Any]) -> None:
        try:
            before = json.loads(head.read_text())
        except ValueError:
            raise FormatError(f"{head} is damaged; start over with --fresh") from None
        now = json.loads(json.dumps(about))
        for part in ("format", "model", "task", "settings"):
            then = before.get(part) if isinstance(before, dict) else None
            if then != now[part]:
                what = part
                if isinstance(then, dict) and isinstance(now[part], dict):
                    names = [name for name in now[part] if then.get(name) != now[part][name]]
                    what = (
                        f"{part} ({names[0]}: {then.get(names[0])!r}, now {now[part][names[0]]!r})" if names else part
                    )
                raise RequestError(f"{head.parent} holds a run with another {what}; "
                                   "name another folder with --out, or start over with --fresh")  # fmt: skip

    def _lock(self) -> None:
        """Two runs that write one file would ruin it."""
        try:
            import fcntl
        except ImportError:  # Windows
            return
        try:
            fcntl.flock(self._file, fcntl.LOCK_EX | fcntl.LOCK_NB)
        except OSError:
            raise RequestError(f"{self.folder} is being written by another run") from None

    def _read(self, path: Path) -> None:
        """Take over what is there; a last line that was not finished is cut off."""
        self._file.seek(0)
        data = self._file.read()
        end = data.rfind(b"\n") + 1
        if end < len(data):
            self._file.truncate(end)
        for number, line in enumerate(data[:end].split(b"\n")[:-1], 1):
            try:
                record = json.loads(line.decode("utf-8", "surrogatepass"))
                self.records[record["id"]] = record
            except (ValueError, TypeError, KeyError):
                raise FormatError(
                    f"{path}, row {number} is damaged; remove the line, or start over with --fresh"
                ) from None

    def __enter__(self) -> Log:
        return self

    def __exit__(self, *_: object) -> None:
        if self._file is not None:
            self._file.close()
