"""local-completions on a task of its own: loglikelihood and generate_until"""

import json
import os
import pathlib
import tempfile

import lm_eval
from common import MODEL, URL

folder = pathlib.Path(tempfile.mkdtemp())
(folder / "data.jsonl").write_text("".join(json.dumps({"q": f"{i} + 1 =", "a": str(i + 1)}) + "\n" for i in range(3)))
for name, kind in (
    ("score", "output_type: multiple_choice\ndoc_to_choice: ['1', '2']\ndoc_to_target: 0"),
    ("write", "output_type: generate_until\ndoc_to_target: a\ngeneration_kwargs: {until: ['\\n'], max_gen_toks: 8}"),
):
    (folder / f"{name}.yaml").write_text(
        f"task: {name}\ndataset_path: json\ndataset_kwargs: {{data_files: {{test: {folder}/data.jsonl}}}}\n"
        f"test_split: test\ndoc_to_text: q\n{kind}\n"
    )
found = lm_eval.simple_evaluate(
    model="local-completions",
    tasks=["score", "write"],
    task_manager=lm_eval.tasks.TaskManager(include_path=str(folder)),
    model_args={
        "model": MODEL,
        "base_url": URL + "/v1/completions",
        "tokenizer": os.environ["CLIENTS_FOLDER"],
        "tokenized_requests": False,
    },
)
assert set(found["results"]) == {"score", "write"}
