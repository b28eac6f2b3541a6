"""A server process with a tiny random model whose context is long and whose answers end soon."""

from __future__ import annotations

import contextlib
import http.client
import json
import os
import re
import socket
import subprocess
import sys
import time
from collections.abc import Iterator
from dataclasses import dataclass
from pathlib import Path

CONTEXT = 200_000  # tokens: programs that write code send a hundred kilobytes before the first question
TEMPLATE = (
    "{% if tools %}{% for t in tools %}{{ t | tojson }}\n{% endfor %}<tool_call>\n{% endif %}"
    "{% for m in messages %}<|im_start|>{{ m.role }}\n{{ m.content }}"
    "{% for c in m.tool_calls or [] %}<tool_call>{{ c.function | tojson }}</tool_call>{% endfor %}<|im_end|>\n"
    "{% endfor %}"
    "{% if add_generation_prompt %}<|im_start|>assistant\n{% endif %}"
)
REQUESTS = re.compile(r'^tiercel_requests_total\{route="([^"]*)",status="(\d+)"\} ([\d.]+)', re.MULTILINE)


@dataclass
class Served:
    url: str
    model: str
    folder: str

    def statuses(self) -> dict[tuple[str, str], int]:
        """How many requests each route answered with each status, but for those of this class itself."""
        host = self.url.removeprefix("http://")
        connection = http.client.HTTPConnection(host, timeout=60)
        connection.request("GET", "/metrics")
        text = connection.getresponse().read().decode()
        connection.close()
        found = {(path, status): int(float(count)) for path, status, count in REQUESTS.findall(text)}
        return {key: count for key, count in found.items() if key[0] not in ("/metrics", "/health")}


def model_folder(folder: Path) -> Path:
    """A Mamba-2 of random weights; sixteen of its 256 bytes end an answer, so that it has about as many tokens."""
    import torch
    from tokenizers import Tokenizer, decoders, models, pre_tokenizers
    from transformers import AutoConfig, AutoModelForCausalLM

    letters = sorted(pre_tokenizers.ByteLevel.alphabet())
    ends = [letters.index(letter) for letter in letters[-16:]]
    torch.manual_seed(0)
    config = AutoConfig.for_model(
        "mamba2", hidden_size=64, num_hidden_layers=2, vocab_size=320, num_heads=8, head_dim=16, state_size=16,
        n_groups=1, chunk_size=64, expand=2, bos_token_id=256, eos_token_id=258, pad_token_id=None,
    )  # fmt: skip
    AutoModelForCausalLM.from_config(config, dtype=torch.float32).save_pretrained(folder)
    tokenizer = Tokenizer(models.BPE(vocab={letter: i for i, letter in enumerate(letters)}, merges=[]))
    tokenizer.pre_tokenizer = pre_tokenizers.ByteLevel(add_prefix_space=False)
    tokenizer.decoder = decoders.ByteLevel()
    tokenizer.add_special_tokens(["<s>", "<|im_start|>", "<|im_end|>"])
    tokenizer.save(str(folder / "tokenizer.json"))
    (folder / "tokenizer_config.json").write_text('{"eos_token": "<|im_end|>"}')
    (folder / "generation_config.json").write_text(json.dumps({"eos_token_id": [258, *ends]}))
    (folder / "chat_template.jinja").write_text(TEMPLATE)
    return folder


@contextlib.contextmanager
def served(folder: Path) -> Iterator[Served]:
    """`tiercel serve` on a free port, at its defaults but for the length of the context."""
    (folder / "tiny").mkdir()
    model = model_folder(folder / "tiny")
    with socket.socket() as found:
        found.bind(("127.0.0.1", 0))
        port = found.getsockname()[1]
    command = [sys.executable, "-m", "tiercel", "serve", str(model), "--port", str(port), "--set", f"context={CONTEXT}"]
    environment = os.environ | {"TIERCEL_HOME": str(folder / "home"), "HF_HUB_CACHE": str(folder / "hub")}
    with (folder / "log").open("w") as log:
        process = subprocess.Popen(command, env=environment, stdout=log, stderr=log)
        try:
            running = Served(f"http://127.0.0.1:{port}", "tiny", str(model))
            for _ in range(600):
                with contextlib.suppress(OSError):
                    running.statuses()
                    break
                assert process.poll() is None, (folder / "log").read_text()
                time.sleep(0.1)
            yield running
        finally:
            process.terminate()
            process.wait(30)
