"""R40: what is installed is what is in the repository; every known failure of others has its test here."""

from __future__ import annotations

import os
import re
import shutil
import subprocess
import sys
import zipfile

import pytest

from reliability.campaign import GOALS, PEERS, ROOT


def test_every_goal_and_every_failure_of_a_peer_names_tests_that_are_there():
    assert [goal.name for goal in GOALS] == [f"R{number}" for number in range(1, 41)]
    for names in [*(goal.tests for goal in GOALS), *PEERS.values()]:
        for name in names:
            path, _, function = name.partition("::")
            assert (ROOT / path).exists(), name
            if function:
                assert re.search(rf"^(async )?def {function}\(", (ROOT / path).read_text(), re.M), name


def test_the_page_has_a_row_for_every_goal():
    page = (ROOT / "docs" / "reliability.md").read_text()
    for goal in GOALS:
        assert f"| {goal.name} | {goal.promise}" in page, f"{goal.name}: python tests/reliability/campaign.py --table"


def test_the_locked_versions_are_those_of_the_constraints():
    """requirements.lock: the runtime's closure, each with a hash."""
    lines = (ROOT / "requirements.lock").read_text().splitlines()
    locked = dict(
        re.fullmatch(r"(\S+)==(\S+) --hash=sha256:[0-9a-f]{64}", line).groups() for line in lines if line[0] != "#"
    )
    pinned = dict(re.findall(r"^([\w.-]+)==(\S+)", (ROOT / "constraints.txt").read_text(), re.M))
    assert len(locked) > 30
    for name in locked.keys() & pinned.keys():
        assert locked[name].partition("+")[0] == pinned[name], name


def test_no_file_of_the_package_runs_when_python_starts():
    assert not list((ROOT / "src").rglob("*.pth"))


@pytest.mark.slow
def test_two_wheels_of_one_commit_are_equal_and_hold_what_git_has(tmp_path, figure):
    pytest.importorskip("build", reason="pip install build")
    digests = []
    for name in ("a", "b"):
        source = tmp_path / name
        shutil.copytree(ROOT, source, ignore=shutil.ignore_patterns(".git", "build", "*.so", "__pycache__", ".venv"))
        command = [sys.executable, "-m", "build", "--wheel", "--outdir", tmp_path / f"out-{name}", source]
        subprocess.run(command, check=True, capture_output=True, env=os.environ | {"SOURCE_DATE_EPOCH": "1700000000"})
        (wheel,) = (tmp_path / f"out-{name}").glob("*.whl")
        digests.append(wheel.read_bytes())
    assert digests[0] == digests[1]
    known = {line.removeprefix("src/") for line in _git("ls-files", "src/tiercel").split()}
    with zipfile.ZipFile(wheel) as archive:
        others = [name for name in archive.namelist() if ".dist-info/" not in name and not name.endswith(".so")]
    assert set(others) <= known
    figure("R40", "two wheels of one commit are equal byte for byte; 0 files that are not in git, 0 .pth")


def _git(*words: str) -> str:
    return subprocess.run(["git", *words], cwd=ROOT, capture_output=True, text=True, check=True).stdout
