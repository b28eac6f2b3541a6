"""What the tests share: one thread, fixed seeds, the tiny models (built once), the one real model."""

from __future__ import annotations

import os
import random
from collections.abc import Callable, Iterator
from dataclasses import dataclass
from pathlib import Path
from typing import Any

import pytest

os.environ["OMP_NUM_THREADS"] = "1"  # read when torch is loaded, by the processes that tests start too
import torch

if not torch.cuda.is_available():
    os.environ["TRITON_INTERPRET"] = "1"  # kernels for GPUs run on the CPU; read when Triton is imported
os.environ["TIERCEL_REASONER"] = str(Path(__file__).parent / "nowhere")  # tests say which models are here


@pytest.fixture(autouse=True)
def repeatable() -> Iterator[None]:
    """One thread (tiny networks gain nothing from two), and the same random numbers whichever tests ran before."""
    torch.set_num_threads(1)
    torch.manual_seed(0)
    random.seed(0)
    yield


@dataclass
class Built:
    """A tiny random model as transformers saved it, and transformers' own copy in memory."""

    name: str
    folder: Path
    judge: Any

    def logits(self, tokens: torch.Tensor) -> torch.Tensor:
        """(L, V) float32, the judge's whole forward."""
        from families import nasty

        return nasty.whole(self.judge, tokens)


@pytest.fixture(scope="session")
def built(tmp_path_factory: pytest.TempPathFactory) -> Callable[[str], Built]:
    """name in families.nasty.NASTY → Built, made once per session."""
    pytest.importorskip("transformers", reason="the judge of every family; pip install tiercel[dev]")
    from families import nasty

    nasty.quiet()
    folder = tmp_path_factory.mktemp("nasty")
    done: dict[str, Built] = {}

    def build(name: str) -> Built:
        if name not in done:
            done[name] = Built(name, folder / name, nasty.make(name, folder / name))
        return done[name]

    return build


@pytest.fixture(scope="module")
def net() -> Any:
    """The tiny network of every kind of layer."""
    import tiny

    return tiny.network()


@pytest.fixture(scope="session")
def smollm2() -> Path:
    """SmolLM2-135M-Instruct as GGUF: $TIERCEL_TEST_SMOLLM2, or where `tiercel pull smollm2` put it."""
    given = os.environ.get("TIERCEL_TEST_SMOLLM2")
    if given:
        if not Path(given).is_file():
            pytest.fail(f"TIERCEL_TEST_SMOLLM2 names no file: {given}")
        return Path(given)
    from tiercel.hub import local_models

    found = local_models.find("smollm2")
    if found is None:
        pytest.skip("SmolLM2 is not here; `tiercel pull smollm2` or set TIERCEL_TEST_SMOLLM2 to its GGUF")
    return found.path
