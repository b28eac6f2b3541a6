"""The figures of benchmarks/overload.py: a server process under 200 clients, ten times its capacity, 50 signals."""

from __future__ import annotations

import asyncio
import importlib.util
import os
import sys
from pathlib import Path

import pytest

pytestmark = [pytest.mark.slow, pytest.mark.skipif(sys.platform != "linux", reason="reads /proc")]


@pytest.fixture(scope="module")
def overload():
    spec = importlib.util.spec_from_file_location("overload", Path(__file__).parents[2] / "benchmarks" / "overload.py")
    module = importlib.util.module_from_spec(spec)
    sys.modules["overload"] = module
    spec.loader.exec_module(module)
    return module


def test_two_hundred_clients_of_whom_a_third_hang_up_leave_nothing_behind(overload, checkpoints):
    found = asyncio.run(overload.hang_ups(checkpoints["tiny"], rounds=8))
    assert found["wrong"] == [], "who stays gets the answer that it gets alone"
    assert found["hung up"] > 200
    for name in ("running", "waiting", "kv bytes", "in flight", "tasks", "descriptors"):
        assert found[name] == 0, (name, found)
    assert found["threads"] <= 2 and found["cache bytes"] <= 8 << 20
    memory = found["memory MiB"]  # by the fourth round the cache is full, and as much was in use at once as ever is
    assert memory[-1] <= memory[4] * 1.01, memory


def test_under_ten_times_its_capacity_it_refuses_quickly_and_keeps_its_word(overload, checkpoints):
    found = asyncio.run(overload.ten_times(checkpoints["tiny"]))
    assert found["other"] == [] and found["complete"] == found["accepted"] > 20
    assert found["refused"] > 5 * found["accepted"]
    assert found["refusal ms"]["p50"] <= 50
    if os.getloadavg()[0] < 2 * (os.cpu_count() or 1):  # else it is the machine that is overloaded
        assert found["refusal ms"]["p99"] <= 50
    assert found["waiting"] == found["in flight"] == 0


def test_a_signal_in_the_middle_of_sixteen_answers_ends_each_properly(overload, checkpoints):
    rounds = int(os.environ.get("TIERCEL_DRAINS", "6"))
    found = asyncio.run(overload.drains(checkpoints["tiny"], rounds=rounds))
    assert found["proper"] == rounds, found
    assert found["streams cut"] > 0, "some answers were longer than the drain"
