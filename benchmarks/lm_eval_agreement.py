"""Does our lm-eval model class give what transformers gives from the same GGUF, and do our prompts and filters agree?

    python benchmarks/lm_eval_agreement.py --items 200 --gsm8k-items 40 --out agreement.json

Every answer is kept beside --out as it comes (lm-eval's own cache, one file for each model): the same command goes on
where it was interrupted, and agreement.json has the tasks that are finished.

ARC-Challenge and MMLU (5 shots): the choice of each item, SmolLM2-135M through `TiercelLM` and through HFLM
on the GGUF as transformers unpacks it, both in lm-eval's own tasks on our local files.  GSM8K (5 shots): the
prompts of lm-eval and of `tiercel eval`, the verdicts of both filters on the same outputs, and the outputs themselves.
Every item on which they differ is printed: choices with both likelihoods and how far apart the best two were, outputs
with the first token that differs and how much likelier ours was there than theirs, by our own network.

--precision float32 unpacks our weights as transformers does.  As we normally run the file (exact, fast) keys and values
are kept in bfloat16, which moves a log-probability by about 0.01 and so turns choices that are nearly a tie.
"""

from __future__ import annotations

import argparse
import json
import platform
import tempfile
from pathlib import Path
from typing import Any

import tiercel  # before torch: it says how torch's threads wait

# isort: split
import lm_eval
import torch
import transformers
from lm_eval.models.huggingface import HFLM

from tiercel.evals import open_task
from tiercel.evals.gsm8k import GSM8K
from tiercel.evals.lm_eval import TiercelLM
from tiercel.evals.task import Item, Task, draw_items
from tiercel.hub import local_models

LETTERS = ["A", "B", "C", "D"]


def written(folder: Path, name: str, rows: list[dict[str, Any]]) -> str:
    path = folder / f"{name}.jsonl"
    path.write_text("".join(json.dumps(row) + "\n" for row in rows))
    return str(path)


def config(name: str, files: dict[str, str], **more: Any) -> dict[str, Any]:
    return {"task": name, "dataset_path": "json", "dataset_kwargs": {"data_files": files}, "test_split": "test", **more}


def arc_task(items: list[Item], folder: Path) -> list[dict[str, Any]]:
    """tasks/arc/arc_challenge.yaml on local rows."""
    rows = [{"question": i.question, "choices": list(i.choices), "gold": int(i.gold), "id": i.id} for i in items]
    return [config("arc_challenge_local", {"test": written(folder, "arc", rows)}, output_type="multiple_choice",
                   doc_to_text="Question: {{question}}\nAnswer:", doc_to_target="{{gold}}", doc_to_choice="{{choices}}",
                   metric_list=[{"metric": "acc"}, {"metric": "acc_norm"}])]  # fmt: skip


def mmlu_tasks(items: list[Item], task: Task, folder: Path) -> list[dict[str, Any]]:
    """tasks/mmlu/default, a task for each subject, on local rows; 5 shots, the first of dev."""
    tasks = []
    for subject in sorted({item.group for item in items}):
        rows = [[{"question": i.question, "choices": list(i.choices), "answer": int(i.gold), "id": i.id} for i in part]
                for part in ([i for i in items if i.group == subject], task.examples[subject])]  # fmt: skip
        files = {"test": written(folder, f"test_{subject}", rows[0]), "dev": written(folder, f"dev_{subject}", rows[1])}
        listed = "".join(f"{letter}. {{{{choices[{n}]}}}}\n" for n, letter in enumerate(LETTERS))
        tasks.append(config(f"mmlu_{subject}_local", files, fewshot_split="dev", fewshot_config={"sampler": "first_n"},
                            num_fewshot=5, output_type="multiple_choice", doc_to_choice=LETTERS, doc_to_target="answer",
                            doc_to_text="{{question.strip()}}\n" + listed + "Answer:",
                            description="The following are multiple choice questions (with answers) about "
                            f"{subject.replace('_', ' ')}.\n\n", metric_list=[{"metric": "acc"}]))  # fmt: skip
    return tasks


def gsm8k_task(items: list[Item], task: GSM8K, folder: Path, tokens: int) -> list[dict[str, Any]]:
    """tasks/gsm8k/gsm8k.yaml on local rows; the shots are the first of train."""
    shots = [{"question": q, "answer": a, "id": ""} for q, a in task.examples[:5]]
    rows = [{"question": i.question, "answer": i.more["target"], "id": i.id} for i in items]
    files = {"test": written(folder, "gsm8k", rows), "train": written(folder, "gsm8k_train", shots)}
    take = {"function": "take_first"}
    return [config("gsm8k_local", files, fewshot_split="train", fewshot_config={"sampler": "first_n"}, num_fewshot=5,
                   output_type="generate_until", doc_to_text="Question: {{question}}\nAnswer:",
                   doc_to_target="{{answer}}",
                   metric_list=[{"metric": "exact_match", "ignore_case": True, "ignore_punctuation": False,
                                 "regexes_to_ignore": [",", "\\$", "(?s).*#### ", "\\.$"]}],
                   generation_kwargs={"until": ["Question:", "</s>", "<|im_end|>"], "do_sample": False,
                                      "temperature": 0.0, "max_gen_toks": tokens},
                   filter_list=[
                       {"name": "strict-match", "filter": [
                           {"function": "regex", "regex_pattern": "#### (\\-?[0-9\\.\\,]+)"}, take]},
                       {"name": "flexible-extract", "filter": [
                           {"function": "regex", "group_select": -1,
                            "regex_pattern": "(-?[$0-9.,]{2,})|(-?[0-9]+)"}, take]},
                   ])]  # fmt: skip


def run(model: Any, tasks: list[dict[str, Any]], kept: Path | None) -> dict[str, list[dict[str, Any]]]:
    """id → the samples lm-eval logs of it (one for each filter).  kept: where its answers are, and will be"""
    found = lm_eval.simple_evaluate(model=model, tasks=tasks, log_samples=True, bootstrap_iters=0, verbosity="ERROR",
                                    use_cache=None if kept is None else str(kept))  # fmt: skip
    by_id: dict[str, list[dict[str, Any]]] = {}
    for samples in found["samples"].values():
        for sample in samples:
            by_id.setdefault(sample["doc"]["id"], []).append(sample)
    return by_id


def choice_of(sample: dict[str, Any], lengths: bool) -> tuple[int, list[float], float]:
    """The choice, all likelihoods, and by how much the best one leads (per character where lengths count)."""
    values = [float(response[0][0] if isinstance(response[0], (list, tuple)) else response[0])
              for response in sample["resps"]]  # fmt: skip
    texts = [sample["arguments"][n][1] for n in range(len(values))]
    ranked = [v / len(t.removeprefix(" ")) for v, t in zip(values, texts, strict=True)] if lengths else values
    second, best = sorted(ranked)[-2:]
    return ranked.index(best), values, best - second


def compare_choices(name: str, task: Task, items: list[Item], ours: Any, theirs: Any, lengths: bool) -> dict[str, Any]:
    same, prompts, worst, apart = 0, 0, 0.0, []
    for item in items:
        (a,), (b,) = ours[item.id], theirs[item.id]
        (pick_a, values_a, lead_a), (pick_b, values_b, lead_b) = choice_of(a, lengths), choice_of(b, lengths)
        prompts += a["arguments"][0][0] == task.prompt(item, task.shots, chat=False)
        worst = max(worst, *(abs(x - y) for x, y in zip(values_a, values_b, strict=True)))
        same += pick_a == pick_b
        if pick_a != pick_b:
            apart.append({"id": item.id, "ours": values_a, "theirs": values_b, "leads": [lead_a, lead_b]})
    return {"task": name, "items": len(items), "same_choice": same, "same_prompt": prompts,
            "largest_difference_of_a_logprob": worst, "apart": apart}  # fmt: skip


def compare_gsm8k(task: GSM8K, items: list[Item], ours: Any, theirs: Any, model: tiercel.Model) -> dict[str, Any]:
    counts = dict.fromkeys(("same_prompt", "same_output", "same_strict", "same_flexible", "judged"), 0)
    apart = []
    for item in items:
        prompt = ours[item.id][0]["arguments"][0][0]
        a, b = (run[item.id][0]["resps"][0][0] for run in (ours, theirs))
        counts["same_prompt"] += prompt == task.prompt(item, 5, chat=False)
        counts["same_output"] += a == b
        if a != b:
            apart.append({"id": item.id} | parting(model, prompt, a, b))
        for sample in (*ours[item.id], *theirs[item.id]):
            kind = sample["filter"].split("-")[0]
            verdict = task.grade(item, sample["resps"][0][0]).scores[kind]
            counts[f"same_{kind}"] += bool(verdict == sample["exact_match"])
            counts["judged"] += kind == "strict"
    return {"task": "gsm8k", "items": len(items), **counts, "apart": apart}


def parting(model: tiercel.Model, prompt: str, ours: str, theirs: str) -> dict[str, Any]:
    """Where two outputs part: after how many tokens, the two tokens, and the log-probability of ours less theirs."""
    a, b = (model.encode(prompt + text, raw=True) for text in (ours, theirs))
    at = next((i for i, (x, y) in enumerate(zip(a, b, strict=False)) if x != y), None)
    if at is None:
        return {"one_ends_after": min(len(ours), len(theirs))}
    row = model.logits(a[:at])[-1].log_softmax(-1)
    together, lead = at - len(model.encode(prompt, raw=True)), float(row[a[at]] - row[b[at]])
    tokens = [model.tokenizer.decode([ids[at]]) for ids in (a, b)]
    return {"tokens_in_common": together, "lead_of_ours": lead, "tokens": tokens}


def main() -> None:
    parser = argparse.ArgumentParser(description=__doc__.split("\n")[0])
    parser.add_argument("--model", default="smollm2")
    parser.add_argument("--precision", default="float32", choices=("float32", "exact", "fast"))
    parser.add_argument("--items", type=int, default=200)
    parser.add_argument("--gsm8k-items", type=int, default=None)
    parser.add_argument("--gsm8k-tokens", type=int, default=256)
    parser.add_argument("--data", default=None)
    parser.add_argument("--out", type=Path, default=None)
    args = parser.parse_args()
    about = {"model": args.model, "precision": args.precision}
    if args.out is not None and args.out.exists():
        before = json.loads(args.out.read_text())
        if any(before[name] != value for name, value in about.items()):
            parser.error(f"{args.out} is of {before['model']} in {before['precision']}; give another --out")
    file = local_models.resolve(args.model, pull=True)
    loading = {"dtype": "float32"} if args.precision == "float32" else {"exact": args.precision == "exact"}
    ours = TiercelLM(tiercel.load(args.model, **loading))
    named = {"pretrained_model_name_or_path": str(file.parent), "gguf_file": file.name}
    tokenizer = transformers.AutoTokenizer.from_pretrained(**named)
    theirs = HFLM(pretrained=transformers.AutoModelForCausalLM.from_pretrained(**named, dtype=torch.float32),
                  tokenizer=tokenizer, batch_size=1, device="cpu")  # fmt: skip
    versions = {"tiercel": tiercel.__version__, "lm_eval": lm_eval.__version__, "torch": torch.__version__,
                "transformers": transformers.__version__, "machine": platform.machine()}  # fmt: skip
    report: dict[str, Any] = about | {"versions": versions, "tasks": []}
    if args.out is not None:
        args.out.write_text(json.dumps(report, indent=1) + "\n")
    with tempfile.TemporaryDirectory() as name:
        folder = Path(name)
        for task_name, count in (("arc_challenge", args.items), ("mmlu", args.items),
                                 ("gsm8k", args.gsm8k_items or args.items)):  # fmt: skip
            task: Any = open_task(task_name)
            items = draw_items(task.load(args.data), count, 0)
            tasks = (arc_task(items, folder) if task_name == "arc_challenge" else mmlu_tasks(items, task, folder)
                     if task_name == "mmlu" else gsm8k_task(items, task, folder, args.gsm8k_tokens))  # fmt: skip
            a, b = (run(model, tasks, None if args.out is None else args.out.with_suffix(f".{who}"))
                    for who, model in (("ours", ours), ("theirs", theirs)))  # fmt: skip
            found = (compare_gsm8k(task, items, a, b, ours.model) if task_name == "gsm8k" else
                     compare_choices(task_name, task, items, a, b, task.normalized))  # fmt: skip
            report["tasks"].append(found)
            print(json.dumps(found, indent=1), flush=True)
            if args.out:
                args.out.write_text(json.dumps(report, indent=1) + "\n")


if __name__ == "__main__":
    main()
