"""Make the reasoner's tokenizer, chat template and settings again: the same files, byte for byte.

    python training/reasoner/tokenizer.py [FOLDER]        src/tiercel/reasoner without it

Byte-level BPE of 1,024 tokens: any text encodes; a digit or a sign is a token of its own, a word with the space before
it may be one.  Learned from the questions and reasoning of 40,000 training problems, without the letters game of
counting and reversing, whose words should come in pieces.
"""

from __future__ import annotations

import itertools
import json
import sys
from pathlib import Path

from tokenizers import AddedToken, Regex, Tokenizer, decoders, models, pre_tokenizers, trainers

from tiercel.problems import FAMILIES, training

VOCAB = 1024
SPECIAL = ("<|endoftext|>", "<|end|>", "<|system|>", "<|user|>", "<|assistant|>", "<think>", "</think>")
# a word with its space, a digit, or one other character
PIECES = r" ?\p{L}+|\p{N}|[^\p{L}\p{N}]"

# Reasoning of earlier turns is left out; an answer begins inside its reasoning, or after an empty one.
TEMPLATE = """\
{%- for message in messages -%}
{%- if message.role == 'system' or message.role == 'user' -%}
{{ '<|' + message.role + '|>' + message.content + '<|end|>' }}
{%- elif message.role == 'assistant' -%}
{%- set content = message.content or '' -%}
{%- if '</think>' in content and not loop.last -%}
{%- set content = content.split('</think>')[-1].lstrip('\\n') -%}
{%- endif -%}
{%- if loop.last and message.reasoning_content and '</think>' not in content -%}
{%- set content = '<think>' + message.reasoning_content + '</think>' + content -%}
{%- endif -%}
{{ '<|assistant|>' + content + '<|end|>' }}
{%- else -%}
{{ raise_exception('the reasoner knows system, user and assistant messages, not ' + message.role) }}
{%- endif -%}
{%- endfor -%}
{%- if add_generation_prompt -%}
{{ '<|assistant|><think>' }}
{%- if enable_thinking is defined and enable_thinking is false -%}
{{ '</think>' }}
{%- endif -%}
{%- endif -%}
"""


def train() -> Tokenizer:
    tokenizer = Tokenizer(models.BPE())
    tokenizer.pre_tokenizer = pre_tokenizers.Sequence(
        [pre_tokenizers.Split(Regex(PIECES), "isolated"), pre_tokenizers.ByteLevel(False, use_regex=False)]
    )
    tokenizer.decoder = decoders.ByteLevel()
    trainer = trainers.BpeTrainer(
        vocab_size=VOCAB,
        special_tokens=[AddedToken(text, special=text[1] == "|", normalized=False) for text in SPECIAL],
        initial_alphabet=pre_tokenizers.ByteLevel.alphabet(),
        show_progress=False,
    )
    words = [name for name in FAMILIES if name not in ("counting", "reversing")]
    problems = itertools.chain(itertools.islice(training(0, words), 30_000), itertools.islice(training(1), 10_000))
    texts = [problem.question + "\n" + problem.thinking + "\n" + problem.answer for problem in problems]
    tokenizer.train_from_iterator(texts, trainer)
    return tokenizer


def write(folder: Path) -> None:
    folder.mkdir(parents=True, exist_ok=True)
    tokenizer = train()
    assert tokenizer.get_vocab_size() == VOCAB, tokenizer.get_vocab_size()
    table = json.loads(tokenizer.to_str())
    for entry in table["added_tokens"]:
        entry["special"] = entry["content"][1] == "|"  # think tags are text that means something
    end = tokenizer.token_to_id("<|end|>")
    files = {
        "tokenizer.json": table,
        "tokenizer_config.json": {
            "tokenizer_class": "PreTrainedTokenizerFast", "clean_up_tokenization_spaces": False,
            "eos_token": "<|end|>", "pad_token": "<|endoftext|>", "model_max_length": 2048,
        },
        "generation_config.json": {"do_sample": False, "temperature": 0.0, "eos_token_id": [end]},
    }  # fmt: skip
    for name, value in files.items():
        (folder / name).write_text(json.dumps(value, ensure_ascii=False, indent=1) + "\n", encoding="utf-8")
    (folder / "chat_template.jinja").write_text(TEMPLATE, encoding="utf-8")


if __name__ == "__main__":
    to = Path(sys.argv[1]) if len(sys.argv) > 1 else Path(__file__).parents[2] / "src/tiercel/reasoner"
    write(to)
    print(f"tokenizer, template and generation settings are in {to}")
