"""benchmarks/why_hybrid: its tasks have the answers they claim, its networks are alike in size, its runner resumes."""

from __future__ import annotations

import argparse
import json
import subprocess
import sys
from itertools import pairwise
from pathlib import Path
from typing import Any

import numpy as np
import pytest

from tiercel.families.pattern import read_file
from tiercel.plan import parameter_count

HERE = Path(__file__).parents[2] / "benchmarks" / "why_hybrid"


@pytest.fixture
def benchmark(monkeypatch: pytest.MonkeyPatch) -> Any:
    """Its modules, which are scripts beside one another."""
    monkeypatch.syspath_prepend(str(HERE))
    names = "tasks", "plan", "learn", "report", "run"
    for name in names:
        monkeypatch.delitem(sys.modules, name, raising=False)
    import importlib

    yield argparse.Namespace(**{name: importlib.import_module(name) for name in names})
    for name in names:
        sys.modules.pop(name, None)


def test_recalled_values_are_those_told(benchmark: Any) -> None:
    tokens, targets = benchmark.tasks.recall(np.random.default_rng(0), 50, 8)
    for row, asked in zip(tokens.tolist(), targets.tolist(), strict=True):
        told = dict(zip(row[:16:2], row[1:16:2], strict=True))
        assert len(told) == 8
        answers = {key: value for key, value in zip(row, asked, strict=True) if value >= 0}
        assert answers == told


def test_copied_letters_are_those_scattered_in_noise(benchmark: Any) -> None:
    t = benchmark.tasks
    tokens, targets = t.copy(np.random.default_rng(0), 50, 30)
    for row, asked in zip(tokens.tolist(), targets.tolist(), strict=True):
        assert row[30] == t.SEPARATOR and len(row) == 42
        letters = [token for token in row[:30] if token != t.NOISE]
        assert [a for a in asked if a >= 0] == letters and len(letters) == 12


def test_parity_is_that_of_the_bits_so_far(benchmark: Any) -> None:
    tokens, targets = benchmark.tasks.parity(np.random.default_rng(0), 20, 40)
    for row, asked in zip(tokens.tolist(), targets.tolist(), strict=True):
        assert asked == [sum(row[: i + 1]) % 2 for i in range(40)]


def test_a_graph_is_called_a_tree_when_it_is_one(benchmark: Any) -> None:
    """The verdict by union-find, which knows nothing of walks; every step of the walk along an edge."""
    t = benchmark.tasks
    tokens, targets = t.istree(np.random.default_rng(0), 300, 9)
    trees = 0
    for row, asked in zip(tokens.tolist(), targets.tolist(), strict=True):
        edges = list(zip(row[:16:2], row[1:16:2], strict=True))
        assert row[16] == t.SEPARATOR
        root = list(range(9))

        def find(node: int, root: list[int] = root) -> int:
            while root[node] != node:
                node = root[node]
            return node

        tree = True
        for a, b in edges:
            tree &= find(a) != find(b)
            root[find(a)] = find(b)
        *steps, verdict = [a for a in asked if a >= 0]
        assert verdict == (t.TREE if tree else t.NO_TREE)
        assert steps[0] == 0 and all({(a, b), (b, a)} & set(edges) for a, b in pairwise(steps))
        assert not tree or (steps[-1] == 0 and len(steps) == 2 * 9 - 1 and set(steps) == set(range(9)))
        trees += tree
    assert 100 < trees < 200


def test_networks_have_the_same_number_of_parameters(benchmark: Any) -> None:
    counts = [parameter_count(read_file(path)) for path in (HERE / "networks").glob("*.toml")]
    assert len(counts) == 5 and max(counts) <= 1.02 * min(counts)


def test_padding_changes_no_answer(benchmark: Any) -> None:
    tokens, targets = benchmark.learn.padded(*benchmark.tasks.recall(np.random.default_rng(0), 3, 20))
    assert tokens.shape == targets.shape == (3, 128)
    assert (targets[:, 79:] == benchmark.tasks.IGNORE).all()


ARGUMENTS = [
    *("--small", "--seeds", "2", "--rates", "1e-3,2e-3", "--steps", "2", "--rows", "2", "--examined", "4"),
    *("--jobs", "1", "--tasks", "parity", "--networks", "attention"),
]  # fmt: skip


def test_a_run_that_was_killed_goes_on(benchmark: Any, tmp_path: Path) -> None:
    """One of two seeds is done and half a line is left behind: the other is done, the first is not done again."""
    line = {
        "network": "attention", "task": "parity", "seed": 0, "steps": 2, "rows": 2, "examined": 4, "small": True,
        "loss": [0.7, 0.6], "tokens_per_second": 1, "device": "cpu", "graph": False,
        "right": {name: {"tokens": 0.5, "rows": 0.25, "last": 0.5} for name in ("validation", "8", "16", "32")},
    }  # fmt: skip
    before = "".join(json.dumps(line | {"lr": lr}) + "\n" for lr in (1e-3, 2e-3))
    (tmp_path / "runs.jsonl").write_text(before + '{"network": "att')
    out = subprocess.run(
        [sys.executable, str(HERE / "run.py"), *ARGUMENTS, "--out", str(tmp_path)], capture_output=True, text=True
    )
    assert out.returncode == 0, out.stderr
    assert "2 runs to do in 1 jobs, 1 jobs done before" in out.stdout and "4 of 4 runs are finished" in out.stdout
    text = (tmp_path / "runs.jsonl").read_text()
    assert text.startswith(before)
    assert [(run["seed"], run["lr"]) for run in map(json.loads, text.splitlines())] == [
        (seed, lr) for seed in (0, 1) for lr in (1e-3, 2e-3)
    ]
    assert {path.name for path in tmp_path.iterdir()} >= {"table.md", "summary.json", "longer.svg", "state.svg"}


def test_the_best_rate_is_chosen_on_validation_alone(benchmark: Any) -> None:
    task = benchmark.tasks.SMALL["parity"]
    runs = [
        {
            "lr": lr, "seed": seed, "loss": [0.1], "tokens_per_second": 1,
            "right": {n: {"last": v if n == "validation" else t} for n in ("validation", "8", "16", "32")},
        }
        for lr, seed, v, t in ((1e-3, 0, 0.6, 0.9), (1e-3, 1, 0.6, 0.9), (2e-3, 0, 0.9, 0.5), (2e-3, 1, 0.7, 0.7))
    ]  # fmt: skip
    found = benchmark.report.cell(runs, task)
    assert found["lr"] == 2e-3 and found["sizes"]["8"] == {"mean": 0.6, "least": 0.5, "most": 0.7}
