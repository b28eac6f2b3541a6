"""A Transformer becomes a hybrid: most of its attention is replaced by a recurrent mixer that has learned to stand in.

    choose     which layers keep attention: evenly, or where it is needed most
    convert    the new mixers' weights from q, k, v and o (`train.convert`)
    match      each new mixer learns the outputs of the attention it replaces, on the teacher's inputs
    distil     the whole network learns the teacher's distribution of the next token
    sft        optionally, answers of conversations

Stages as in MOHAWK (Bick et al. 2024, arXiv 2408.10189) and RADLADS (Goldstein et al. 2025, arXiv 2505.03005); weights
as in The Mamba in the Llama (Wang et al. 2024, arXiv 2408.15237).  Each stage is a run of `fit` in a folder of its own,
with its log and checkpoints; a stage that is done is not done again.

    hybridize("smollm2", ["texts.jsonl"], Settings(steps=1000, lr=5e-4, out=Path("hybrid")), Conversion(Fraction(1, 4)))
"""

from __future__ import annotations

import json
import math
import sys
from collections.abc import Mapping, Sequence
from dataclasses import asdict, dataclass, replace
from fractions import Fraction
from functools import partial
from pathlib import Path
from typing import Any

import torch

from tiercel import plan
from tiercel.errors import FormatError, RequestError
from tiercel.families.family import Layout
from tiercel.families.pattern import PATTERN
from tiercel.families.pattern import rows as pattern_rows
from tiercel.hub import local_models
from tiercel.model.decoder import Decoder
from tiercel.runtime.atomic import atomic_write
from tiercel.runtime.lock import lock_folder
from tiercel.tokenizer.tokenizer import Tokenizer
from tiercel.train import parallel, start
from tiercel.train.convert import attention_layers, choose, convert, converted, matching_loss
from tiercel.train.data import Batches, Documents, read_documents
from tiercel.train.hybrid_report import Checks, measure, measure_folder
from tiercel.train.loop import Loss, Settings, fit
from tiercel.train.loss import distillation_loss, next_token_loss

RECORD, SAMPLED, REPORT = "hybridize.json", "sampled.jsonl", "report.json"
ONE_IN = 20  # of the documents, cut to rows, are held out where no file is


@dataclass(frozen=True)
class Conversion:
    """What becomes of a Transformer.

    Args:
        keep: share of the attention layers that stay; 0 for none.
        mixer: the word of the mixer that takes the place of the others.
        choose: "even" or "measured".
        match_steps: steps of matching; 0: none.
        match_lr: their learning rate.
        sft_steps: steps on conversations after distilling.
        sft_lr: their learning rate.
        calibration: micro-batches from which weights are computed and layers chosen.
        rows: of a micro-batch.
        length: tokens of a row.
        seed: of the new parameters, the order of the data and what is sampled.
    """

    keep: Fraction
    mixer: str = "gated_delta"
    choose: str = "measured"
    match_steps: int = 200
    match_lr: float = 2e-3
    sft_steps: int = 200
    sft_lr: float = 1e-4
    calibration: int = 8
    rows: int = 8
    length: int = 512
    seed: int = 0

    def __post_init__(self) -> None:
        if not 0 <= self.keep < 1:
            raise RequestError(f"--keep-attention is a share from 0 to less than 1, not {self.keep}")
        if self.choose not in ("even", "measured"):
            raise RequestError(f"--choose {self.choose!r} is not known; choose from even, measured")
        for name, least in (("match_steps", 0), ("sft_steps", 1), ("calibration", 1), ("rows", 1), ("length", 2)):
            if getattr(self, name) < least:
                raise RequestError(f"{name} must be at least {least}, not {getattr(self, name)}")
        for name in ("match_lr", "sft_lr"):
            if not (math.isfinite(getattr(self, name)) and getattr(self, name) > 0):
                raise RequestError(f"{name} must be positive, not {getattr(self, name)}")

    def kept(self, layers: int, model: str) -> int:
        """Return how many of the layers with attention keep it.

        Raises:
            RequestError: there is none to replace, or the share is none or all of them unasked.
        """
        if not layers:
            raise RequestError(f"{model} has no attention to replace")
        count = round(layers * self.keep)
        if count == layers:
            raise RequestError(f"{self.keep} of {layers} layers with attention is all of them: none would be replaced")
        if count == 0 and self.keep:
            raise RequestError(
                f"{self.keep} of {layers} layers with attention is none: keep 1/{layers} or more, or 0 for none"
            )
        return count


def hybridize(
    model: str | Path,
    data: Sequence[Path],
    settings: Settings,
    conversion: Conversion,
    *,
    held_out: Path | None = None,
    sample: int = 0,
    sft: Path | None = None,
    checks: Checks | None = None,
) -> dict[str, Any]:
    """Make a hybrid of a model, and report what it kept.

    Args:
        model: a model with attention, as for `load`; not packed.
        data: JSONL of examples (see `train.data`), or texts.
        settings: of distilling; `out` is the folder of everything, `resume` goes on with what is there.
        conversion: what is replaced, and how.
        held_out: as data, for the report; without it one in twenty rows of the data.
        sample: number of further rows, written by the model itself.
        sft: JSONL of conversations for a last stage.
        checks: what the report measures.

    Returns:
        "model", "out", "layers", "kept", "rise", "stages" and, "before" and "after", the measures of `hybrid_report`.

    Raises:
        RequestError: nothing or everything would be replaced, data shorter than a row, a folder with another run.
        FormatError: data that cannot be read, with file and line.
    """
    out = settings.out
    if out is None:
        raise RequestError("a hybrid needs a folder to be written to: say which with --out")
    if parallel.ranks().count > 1:
        raise RequestError("hybridize runs in one process: start it without torchrun")
    path, checks = local_models.resolve(model, pull=True), checks or Checks()
    teacher, tokenizer, _ = start.open_network(path)
    teacher.requires_grad_(False).to(settings.device)
    layers = attention_layers(teacher.config)
    count = conversion.kept(len(layers), str(model))
    converted(teacher.config, layers, conversion.mixer)
    about = _plain(
        {"fingerprint": teacher.fingerprint, "sample": sample, "data": list(map(str, data)), **asdict(conversion)}
    )
    with lock_folder(out, "another conversion"):
        record = _record(out, about, resume=settings.resume)
        say = partial(_say, settings.quiet)
        say(f"reading {len(data)} files" + (f", writing {sample} rows" if sample else ""))
        files = [*data, *_sampled(model, out, sample, conversion, settings.device)]
        learned, held = _documents(files, held_out, tokenizer, conversion)
        talks = None if sft is None else read_documents(sft, tokenizer).fit_rows(conversion.length, cut=False)
        batches = partial(Batches, learned, rows=conversion.rows, length=conversion.length, seed=conversion.seed)
        stream = batches()
        calibration = [next(stream).to(settings.device) for _ in range(conversion.calibration)]
        if "kept" not in record:
            say(f"measuring {model}, and which of its layers keep attention")
            before = measure(teacher, held, settings, checks) | measure_folder(path, teacher.config, checks)
            kept, rise = choose(teacher, count, conversion.choose, conversion.mixer, calibration, conversion.seed)
            record |= {"kept": kept, "rise": {str(i): round(r, 5) for i, r in rise.items()}, "before": before}
            _write(out / RECORD, record)
        replaced = [i for i in layers if i not in record["kept"]]
        network, places = convert(teacher, replaced, conversion.mixer, calibration, conversion.seed)
        say(f"attention stays in layers {record['kept']} of {layers}")
        matching = matching_loss(teacher, places)
        stages = _train(network, teacher, settings, conversion, batches, held, matching, talks)
        hybrid = Layout(PATTERN, network.config, tuple(pattern_rows(network.config)))
        after = measure(network, held, settings, checks)
        start.finish(network, tokenizer, hybrid, out)
        after |= measure_folder(out, network.config, checks)
        found = {"model": str(model), "out": str(out), "pattern": plan.pattern(network.config), "layers": layers,
                 "kept": record["kept"], "rise": record["rise"], "stages": stages, "before": record["before"],
                 "after": after}  # fmt: skip
        _write(out / REPORT, found)
    return found


def _train(
    network: Decoder,
    teacher: Decoder,
    settings: Settings,
    conversion: Conversion,
    batches: Any,
    held: Documents,
    matching: Loss,
    talks: Documents | None,
) -> dict[str, dict[str, Any]]:
    """Run the stages; name → what `start.report` has of each."""
    assert settings.out is not None
    c, found = conversion, dict[str, dict[str, Any]]()
    distilling: Loss = lambda student, rows: distillation_loss(student, rows, teacher)  # noqa: E731
    evaluation = start.evaluation(held, c.rows, c.length)
    plans: list[tuple[str, int, float, Loss, Any]] = [
        ("match", c.match_steps, c.match_lr, matching, batches),
        ("distil", settings.steps, settings.lr, distilling, batches),
    ]
    if talks is not None:
        talk = partial(Batches, talks, rows=c.rows, length=c.length, seed=c.seed)
        plans.append(("sft", c.sft_steps, c.sft_lr, next_token_loss, talk))
    copied = {name for name, _ in teacher.named_parameters()}
    for name, steps, lr, loss, make in plans:
        if steps == 0:
            continue
        for parameter, p in network.named_parameters():
            p.requires_grad_(name != "match" or parameter not in copied)
        stage = replace(
            settings, steps=steps, lr=lr, warmup=min(settings.warmup, max(1, steps // 10)), out=settings.out / name
        )
        _say(settings.quiet, f"{name}: {steps} steps")
        result = fit(network, make(), stage, loss, held_out=None if name == "sft" else evaluation)
        found[name] = start.report(result, stage.out)
    return found


def _say(quiet: bool, line: str) -> None:
    if not quiet:
        print(line, file=sys.stderr, flush=True)


# ── data


def _documents(
    files: Sequence[Path], held_out: Path | None, tokenizer: Tokenizer | None, conversion: Conversion
) -> tuple[Documents, Documents]:
    """What is learned, and what is held out, in pieces of a row at most."""
    if not files:
        raise RequestError("say what to learn from: --data FILE, or --sample N for text of the model's own")
    length = conversion.length
    learned = Documents.joined([_read(file, tokenizer) for file in files])
    if len(learned.tokens) < length:
        raise RequestError(
            f"the data has {len(learned.tokens)} tokens, less than a row of {length}: give more, or lower --length"
        )
    learned = learned.fit_rows(length, cut=True)
    if held_out is not None:
        return learned, _read(held_out, tokenizer).fit_rows(length, cut=True)
    pieces = [i for i, n in enumerate(learned.starts[1:] - learned.starts[:-1]) if n > 1]
    if len(pieces) < 2:
        raise RequestError(
            f"the data is one row of {length} tokens, and none is left for the report: give more, or --eval"
        )
    held = pieces[ONE_IN - 1 :: ONE_IN] or pieces[-1:]
    return learned.part([i for i in pieces if i not in set(held)]), learned.part(held)


def _read(file: Path, tokenizer: Tokenizer | None) -> Documents:
    """A JSONL of examples, every token of them; any other file is one text."""
    if file.suffix in (".jsonl", ".json"):
        return read_documents(file, tokenizer, learn=("all",))
    if tokenizer is None:
        raise RequestError(f"{file} is text, and the model has no tokenizer: give JSONL of tokens")
    try:
        tokens = tokenizer.encode(file.read_text(encoding="utf-8"))
    except (OSError, UnicodeDecodeError) as error:
        raise FormatError(f"{file} cannot be read: {getattr(error, 'strerror', None) or error}") from error
    return Documents.of([(tokens, [1] * len(tokens))], str(file))


def _sampled(model: str | Path, out: Path, count: int, conversion: Conversion, device: str) -> list[Path]:
    """A file of rows that the model wrote from nothing, at temperature 1."""
    path = out / SAMPLED
    if count and not path.exists():
        import tiercel

        teacher = tiercel.load(model, device=device)
        tokenizer = teacher.tokenizer
        first = None if tokenizer is None else tokenizer.bos
        if first is None and tokenizer is not None:
            first = tokenizer.id_of(tokenizer.names.get("eos_token", ""))
        draw, c = torch.Generator().manual_seed(conversion.seed), conversion
        anything = torch.randint(teacher.config.vocab_size, (count,), generator=draw).tolist()
        firsts = anything if first is None else [first] * count
        requests = []
        for i, token in enumerate(firsts):
            params = tiercel.SamplingParams(temperature=1.0, max_tokens=c.length - 1, seed=c.seed + i)
            requests.append(teacher.engine.prepare([token], params))
        for request in requests:
            teacher.engine.queue(request)
        with atomic_write(path) as file:
            for token, request in zip(firsts, requests, strict=True):
                for _ in teacher.engine.run(request):
                    pass
                if request.error is not None:
                    raise request.error
                file.write(json.dumps({"tokens": [token, *request.sequences[0].token_ids]}).encode() + b"\n")
    return [path] if count else []


# ── what is kept of a run


def _record(out: Path, about: Mapping[str, Any], *, resume: bool) -> dict[str, Any]:
    """What an earlier run of these settings has found.

    Raises:
        RequestError: the folder has a run that is not to be resumed, or of other settings.
    """
    path = out / RECORD
    if not path.exists():
        return dict(about)
    if not resume:
        raise RequestError(f"{out} holds a run already: go on with --resume, or choose another --out")
    try:
        record: dict[str, Any] = json.loads(path.read_text())
    except ValueError as error:
        raise FormatError(f"{path} is damaged: {error}") from None
    for name, new in about.items():
        if record.get(name) != new:
            old = record.get(name)
            raise RequestError(f"{path} was made with {name} {old}, not {new}: resume with the same")
    return record


def _write(path: Path, value: Any) -> None:
    with atomic_write(path) as file:
        file.write(json.dumps(value, indent=1).encode() + b"\n")


def _plain(value: Any) -> dict[str, Any]:
    plain: dict[str, Any] = json.loads(json.dumps(value, default=str))
    return plain
