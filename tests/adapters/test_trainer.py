"""examples/trainer.py runs: transformers' Trainer over PEFT over our network."""

from __future__ import annotations

import importlib.util
from pathlib import Path

import pytest

import tiercel
import tiny

pytest.importorskip("accelerate")
EXAMPLE = Path(__file__).parents[2] / "examples" / "trainer.py"


@pytest.mark.filterwarnings("ignore")
def test_the_example_trains_two_steps_and_its_adapter_loads(tmp_path):
    spec = importlib.util.spec_from_file_location("trainer_example", EXAMPLE)
    example = importlib.util.module_from_spec(spec)
    spec.loader.exec_module(example)
    # a checkpoint with names of its own: the pattern family calls its matrices as we do
    base = tiny.checkpoint(tmp_path / "model", template=tiny.TEMPLATE)
    names = {"q_proj": "q", "v_proj": "v", "down_proj": "down"}
    kind = example.LoraConfig
    example.LoraConfig = lambda target_modules, **more: kind(target_modules=[names[t] for t in target_modules], **more)
    loss = example.main(str(base), str(tmp_path / "a"), steps=2)
    assert 0 < loss < 20
    model = tiercel.load(base, adapters={"a": tmp_path / "a"})
    assert not model.logits(tiny.ids(9)).equal(model.logits(tiny.ids(9), adapter="a"))
