"""The kernels for GPUs, run by Triton's interpreter where there is none."""

from collections.abc import Iterator

import pytest
import torch

DEVICE = "cuda" if torch.cuda.is_available() else "cpu"


@pytest.fixture(autouse=True)
def outputs_full_of_nan() -> Iterator[None]:
    """Memory that must be written before it is read."""
    torch.utils.deterministic.fill_uninitialized_memory = True
    torch.use_deterministic_algorithms(True)
    yield
    torch.use_deterministic_algorithms(False)
