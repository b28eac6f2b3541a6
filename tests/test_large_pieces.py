"""Large pieces of memory: they are one's own, and what goes leaves no holes beside what stays."""

import subprocess
import sys

import pytest
import torch

from tiercel.runtime.allocator import ALIGNMENT_BYTES
from tiercel.runtime.workspace import MAX_FREE_BYTES, MIN_WORKSPACE_BYTES, trim, workspace

READING = """
import torch
from tiercel.runtime.workspace import trim, workspace

def resident():
    with open("/proc/self/statm") as file:
        return int(file.read().split()[1]) * 4096

def empty(nbytes):
    return torch.empty(nbytes, dtype=torch.uint8)

matrices, before, block = [], resident(), 8 << 20
for size in 8 * (2_700_000, 11_600_000, 5_300_000, 21_200_000, 21_200_000, 31_000_000):  # of a 7B's layers
    for start in range(0, size, block):
        rows = {make}(min(block, size - start)).fill_(1)
        if not start:
            matrices.append(empty(size))
        matrices[-1][start : start + block] = rows
del rows
trim()
print(resident() - before - sum(len(matrix) for matrix in matrices))
"""


@pytest.mark.skipif(sys.platform != "linux", reason="resident memory is read as Linux tells it")
@pytest.mark.parametrize("make", ["workspace", "empty"])
def test_a_model_that_was_read_in_pieces_takes_its_own_bytes(make):
    command = [sys.executable, "-c", READING.format(make=make)]
    beside = int(subprocess.run(command, check=True, capture_output=True, text=True).stdout)
    assert beside < 20e6  # by itself: 170 MB after these eight layers, more with each


LARGE = MIN_WORKSPACE_BYTES


@pytest.mark.parametrize("nbytes", [0, 1, LARGE - 1, LARGE, LARGE + 1, 3 * LARGE + 7, MAX_FREE_BYTES + 1])
def test_pieces_are_aligned_and_can_be_written_to(nbytes):
    pieces = [workspace(nbytes) for _ in range(3)]
    for value, piece in enumerate(pieces):
        piece.fill_(value)
    for value, piece in enumerate(pieces):
        assert piece.dtype == torch.uint8 and piece.shape == (nbytes,) and (piece == value).all()
        assert nbytes == 0 or piece.data_ptr() % ALIGNMENT_BYTES == 0


def test_a_view_keeps_its_piece():
    part = workspace(2 * MIN_WORKSPACE_BYTES).fill_(7)[MIN_WORKSPACE_BYTES:]
    trim()
    others = [workspace(2 * MIN_WORKSPACE_BYTES).fill_(1) for _ in range(4)]
    assert (part == 7).all() and len(others) == 4
