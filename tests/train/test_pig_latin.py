"""The fine-tune of the README: its data, and its commands for a few steps."""

from __future__ import annotations

import importlib.util
import json
import random
import re
import shlex
from pathlib import Path

from typer.testing import CliRunner

from tiercel.commands.cli import app
from tiercel.problems import in_test

ROOT = Path(__file__).parents[2]
spec = importlib.util.spec_from_file_location("pig_latin", ROOT / "examples" / "pig_latin.py")
pig_latin = importlib.util.module_from_spec(spec)
spec.loader.exec_module(pig_latin)


def asked(question: str) -> str:
    """The word that a question is about."""
    forms = [re.escape(form).replace(r"\{w\}", "([a-z]+)") for form in pig_latin.ASKED]
    return next(found[1] for form in forms if (found := re.fullmatch(form, question)))


def test_consonants_go_to_the_end():
    assert pig_latin.pig_latin("street") == ("s,t,r|e,e,t\ne,e,t,s,t,r,a,y", "eetstray")
    assert pig_latin.pig_latin("apple")[1] == "appleway"


def test_no_word_of_the_test_is_trained_on_and_the_same_seed_writes_the_same(tmp_path):
    folders = [tmp_path / "a", tmp_path / "b"]
    for folder in folders:
        folder.mkdir()
        pig_latin.write(folder, count=2000, tests=50)
    for name in ("pig-train.jsonl", "pig-test.jsonl"):
        assert (folders[0] / name).read_bytes() == (folders[1] / name).read_bytes()
    trained, tested = (
        [json.loads(line) for line in (folders[0] / name).read_text().splitlines()]
        for name in ("pig-train.jsonl", "pig-test.jsonl")
    )
    assert len(trained) == 2000 and len(tested) == 50
    assert not {asked(row["messages"][0]["content"]) for row in trained} & {asked(row["question"]) for row in tested}
    words = [pig_latin.word(random.Random(n)) for n in range(300)]
    assert 10 < sum(in_test(f"pig latin {w}") for w in words) < 60


def test_the_commands_of_the_readme_run(tmp_path, monkeypatch):
    monkeypatch.chdir(tmp_path)
    monkeypatch.delenv("TIERCEL_REASONER")  # the one in the package
    found = re.search(r"<!-- fine-tune -->\n```sh\n(.*?)```", (ROOT / "README.md").read_text(), re.S)
    lines = [shlex.split(line, comments=True) for line in found[1].splitlines()]
    assert lines[0] == ["python", "examples/pig_latin.py", "."] and all(line[0] == "tiercel" for line in lines[1:])
    pig_latin.write(tmp_path, count=40, tests=4)
    for _, *words in lines[1:]:
        if words[:2] == ["train", "lora"]:
            at = words.index("--epochs")
            words[at : at + 2] = ["--steps", "2"]
        if words[0] == "eval":
            words += ["--limit", "2"]
        done = CliRunner().invoke(app, words)
        assert done.exit_code == 0, (words, done.output)
