"""A run that is killed goes on as if nothing had happened."""

import json
import os
import random
import subprocess
import sys
from pathlib import Path

import pytest


def lives(folder: Path, points: list[str]) -> list[dict]:
    script = Path(__file__).with_name("killed.py")
    done = subprocess.run([sys.executable, script, folder, *points], capture_output=True, text=True, check=True)
    return [json.loads(line) for line in done.stdout.splitlines()]


def check(found: list[dict]) -> None:
    for life in found:
        assert life["killed"] and life["resumed"] and life["equal"], life
        assert life["kept"] == 2, life


def test_killed_between_steps_and_inside_a_save_it_resumes_bit_for_bit(tmp_path):
    check(lives(tmp_path, ["step:5", "save:13"]))


@pytest.mark.slow
def test_killed_at_many_points_it_resumes_each_time(tmp_path):
    draw = random.Random(11)
    kills = int(os.environ.get("TIERCEL_KILLS", "20"))
    points = [f"step:{draw.randrange(1, 12)}" if i % 4 else f"save:{draw.randrange(1, 32)}" for i in range(kills)]
    found = lives(tmp_path, points)
    assert len(found) == kills
    check(found)
