"""Tiny tokenizers of the two kinds that models have, trained here, as tokenizer.json tables."""

from __future__ import annotations

import json
from functools import cache
from typing import Any

from tokenizers import AddedToken, Regex, Tokenizer, decoders, models, normalizers, pre_tokenizers, trainers

from hard_strings import FIXED
from tiercel.tokenizer.pre_tokenizers import PRE_TOKENIZERS

CONTROL = ["<s>", "</s>", "<unk>", "<|im_start|>", "<|im_end|>"]
CORPUS = [text for text in FIXED if "<" not in text] * 3
TAGS = ["<think>", "</think>", "<tool_call>"]  # added, not flagged special: as Qwen3 does


@cache
def _byte_level(pre: str) -> str:
    rules = PRE_TOKENIZERS[pre]
    tokenizer = Tokenizer(models.BPE(ignore_merges=rules.ignore_merges))
    splits = [pre_tokenizers.Split(Regex(pattern), "isolated") for pattern in rules.patterns]
    tokenizer.pre_tokenizer = pre_tokenizers.Sequence([*splits, pre_tokenizers.ByteLevel(False, use_regex=False)])
    tokenizer.normalizer = normalizers.NFC() if rules.nfc else None
    tokenizer.decoder = decoders.ByteLevel()
    trainer = trainers.BpeTrainer(
        vocab_size=700,
        special_tokens=CONTROL,
        initial_alphabet=pre_tokenizers.ByteLevel.alphabet(),
        show_progress=False,
    )
    tokenizer.train_from_iterator(CORPUS, trainer)
    tokenizer.add_tokens([AddedToken(tag, normalized=False) for tag in TAGS])
    return tokenizer.to_str()


def byte_level(pre: str = "llama-bpe") -> dict[str, Any]:
    table: dict[str, Any] = json.loads(_byte_level(pre))
    return table


@cache
def _sentencepiece(prefix: str) -> str:
    trained = Tokenizer(models.BPE())
    trained.normalizer = normalizers.Sequence([normalizers.Prepend("▁"), normalizers.Replace(" ", "▁")])
    trainer = trainers.BpeTrainer(vocab_size=400, show_progress=False, limit_alphabet=120)
    trained.train_from_iterator(CORPUS, trainer)
    bytes_ = [f"<0x{byte:02X}>" for byte in range(256)]
    learned = sorted(trained.get_vocab().items(), key=lambda item: item[1])
    tokens = [*CONTROL[2::-1], *bytes_, *CONTROL[3:], *(token for token, _ in learned if token not in CONTROL)]
    vocab = {token: id for id, token in enumerate(tokens)}
    model = json.loads(trained.to_str())["model"]
    known = {token for token, _ in learned}
    merges, done = [], set()
    for left, right in model["merges"]:  # sentencepiece merges any two pieces that make a piece
        token = left + right
        if token not in done:
            done.add(token)
            pairs = [(token[:i], token[i:]) for i in range(1, len(token))]
            merges += sorted(
                (p for p in pairs if p[0] in known and p[1] in known), key=lambda p: (vocab[p[0]], vocab[p[1]])
            )
    tokenizer = Tokenizer(models.BPE(vocab, merges, unk_token="<unk>", fuse_unk=True, byte_fallback=True))
    if prefix == "first":
        tokenizer.pre_tokenizer = pre_tokenizers.Metaspace("▁", prepend_scheme="first", split=False)
    else:
        steps = [normalizers.Prepend("▁")] if prefix == "always" else []
        tokenizer.normalizer = normalizers.Sequence([*steps, normalizers.Replace(" ", "▁")])
    strip = [] if prefix == "never" else [decoders.Strip(" ", 1, 0)]
    tokenizer.decoder = decoders.Sequence(
        [decoders.Replace("▁", " "), decoders.ByteFallback(), decoders.Fuse(), *strip]
    )
    tokenizer.add_special_tokens(CONTROL)
    tokenizer.add_tokens([AddedToken(tag, normalized=False) for tag in TAGS])
    return tokenizer.to_str()


def sentencepiece(prefix: str = "always") -> dict[str, Any]:
    """prefix: where a space is put before a text: "always", "first" or "never"."""
    table: dict[str, Any] = json.loads(_sentencepiece(prefix))
    return table
