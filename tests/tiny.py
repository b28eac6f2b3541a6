"""A tiny network of every kind of layer, and a tiny checkpoint with a tokenizer, for tests that need words."""

from pathlib import Path
from types import SimpleNamespace

import torch
from tokenizers import Tokenizer, decoders, models, pre_tokenizers

from tiercel.engine import Engine
from tiercel.families.family import Layout
from tiercel.families.pattern import PATTERN, pattern, rows
from tiercel.model.config import ModelConfig
from tiercel.model.decoder import Decoder
from tiercel.model.initialize import initialize
from tiercel.sampling.params import SamplingParams
from tiercel.weights.export import NetworkSource, export

GREEDY = SamplingParams(temperature=0, max_tokens=12, ignore_eos=True)
EVERY_KIND = "attention+mamba2 mamba1 mamba2/moe attention/-"


def config(words: str = EVERY_KIND, **changes) -> ModelConfig:
    sizes = dict(width=32, vocab_size=300, state=8, mamba_head_dim=8, head_dim=8, kv_heads=2, groups=2, chunk=16)
    return pattern(words, **(sizes | dict(experts=4, ffn_width=48, max_length=512) | changes))


def network(words: str = EVERY_KIND, seed: int = 0, *, native: bool = True, **changes) -> Decoder:
    """native: laid out for the kernels, where there are any, as `load` does it; otherwise plain parameters."""
    with torch.no_grad():
        net = Decoder(config(words, **changes))
        initialize(net, seed)
        net.embed.weight.mul_(30)  # logits with opinions, so that greedy choices are not ties
    net.eval().requires_grad_(False)
    if native:
        net.pack()
    return net


def ids(length: int, seed: int = 0) -> list[int]:
    """A random text of ordinary tokens."""
    return torch.randint(0, 256, (length,), generator=torch.Generator().manual_seed(seed)).tolist()


def checkpoint(folder: Path, words: str = EVERY_KIND, template: str | None = None, **changes) -> Path:
    """A folder as a user would have it: config.json, model.safetensors, tokenizer.json."""
    net = network(words, **changes)
    export(NetworkSource(net, Layout(PATTERN, net.config, tuple(rows(net.config)))), folder)
    letters = sorted(pre_tokenizers.ByteLevel.alphabet())
    tokenizer = Tokenizer(models.BPE(vocab={c: i for i, c in enumerate(letters)}, merges=[]))
    tokenizer.pre_tokenizer = pre_tokenizers.ByteLevel(add_prefix_space=False)
    tokenizer.decoder = decoders.ByteLevel()
    tokenizer.add_special_tokens(["<|end|>", "<|user|>", "<|bot|>"])
    tokenizer.save(str(folder / "tokenizer.json"))
    config_json = '{"eos_token": "<|end|>"}'
    (folder / "tokenizer_config.json").write_text(config_json)
    if template is not None:
        (folder / "chat_template.jinja").write_text(template)
    return folder


TEMPLATE = (
    "{% for m in messages %}{{ '<|user|>' if m.role == 'user' else '<|bot|>' }}{{ m.content }}"
    "{% if m.role != 'user' %}<|end|>{% endif %}{% endfor %}{% if add_generation_prompt %}<|bot|>{% endif %}"
)


class Counting:
    """A runner, with a note of every forward: how many tokens each sequence had."""

    def __init__(self, runner):
        self.runner, self.calls = runner, []

    def __getattr__(self, name):
        return getattr(self.runner, name)

    def forward(self, tokens, states, **more):
        self.calls.append([len(row) for row in tokens])
        return self.runner.forward(tokens, states, **more)


def engine(network, max_length, **options):
    """An engine without words, on a network that counts."""
    made = Engine(SimpleNamespace(network=network, tokenizer=None, max_length=max_length), **options)
    made.runner = made.cache.runner = Counting(made.runner)
    return made


def run(engine, limit=5000):
    """Steps until idle; the updates of all."""
    updates = []
    for _ in range(limit):
        if engine.idle:
            return updates
        updates += engine.step()
    raise AssertionError("the engine does not come to rest")
