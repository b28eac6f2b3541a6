"""LoRA with the tools you know: PEFT's get_peft_model and transformers' Trainer, on a network of Tiercel's.

    python examples/trainer.py smollm2 out          pip install peft accelerate transformers

`CausalLM` is the network under its checkpoint's names.  The adapter in `out` loads in PEFT over transformers' model,
and here: tiercel.load("smollm2", adapters={"parrot": "out"}).generate("Hi", adapter="parrot").
"""

from __future__ import annotations

import sys
from pathlib import Path
from typing import Any

from peft import LoraConfig, get_peft_model
from transformers import Trainer, TrainingArguments

import tiercel
from tiercel.train.causal_lm import CausalLM

QUESTIONS = ["Hi", "Who are you?", "What is the weather like?", "Tell me a story.", "What do you eat?"]


def examples(model: tiercel.Model) -> list[dict[str, list[int]]]:
    """Every question answered the same way; only the answer is learned (−100: not)."""
    found = []
    for question in QUESTIONS:
        asked = model.encode([{"role": "user", "content": question}])
        said = model.tokenizer.encode("Polly wants a cracker!")  # type: ignore[union-attr]
        found.append({"input_ids": asked + said, "labels": [-100] * len(asked) + said})
    return found


def collate(rows: list[dict[str, list[int]]]) -> dict[str, Any]:
    """Rows of one length, filled up on the right."""
    import torch

    length = max(len(row["input_ids"]) for row in rows)
    fill = {"input_ids": 0, "labels": -100}
    return {
        key: torch.tensor([row[key] + [value] * (length - len(row[key])) for row in rows])
        for key, value in fill.items()
    }


def main(name: str, out: str, steps: int = 30) -> float:
    model = tiercel.load(name)
    network = get_peft_model(
        CausalLM(model), LoraConfig(r=8, lora_alpha=16, target_modules=["q_proj", "v_proj", "down_proj"])
    )
    network.print_trainable_parameters()
    arguments = TrainingArguments(
        output_dir=str(Path(out) / "trainer"), max_steps=steps, per_device_train_batch_size=2, learning_rate=2e-3,
        logging_steps=1, save_strategy="no", report_to=[], use_cpu=True, remove_unused_columns=False,
    )  # fmt: skip
    trainer = Trainer(network, arguments, train_dataset=examples(model), data_collator=collate)  # type: ignore[arg-type]
    loss = trainer.train().training_loss
    network.save_pretrained(out, save_embedding_layers=False)
    return loss


if __name__ == "__main__":
    print(f"loss {main(*sys.argv[1:3]):.3f}; the adapter is in {sys.argv[2]}")
