"""Llava's text part, as Apriel-1.5-15b-Thinker has it: a llama or mistral under `language_model.`.

The vision tower and its projector are left out.  transformers `modeling_llava.py`; in GGUF the text part is a file of
architecture `llama`, like any other.
"""

from __future__ import annotations

from collections.abc import Iterable, Mapping
from typing import Any

from tiercel.errors import FormatError, UnsupportedError
from tiercel.families import llama
from tiercel.families.family import Family, TensorMapping
from tiercel.families.wrapped import VISION, wrapped_rows
from tiercel.model.config import ModelConfig


def read(hf_config: Mapping[str, Any]) -> tuple[ModelConfig, Iterable[TensorMapping]]:
    text = hf_config.get("text_config")
    if not isinstance(text, dict):
        raise FormatError("config.json: text_config must be a table of fields")
    kind = text.get("model_type", "llama")
    if kind not in ("llama", "mistral"):
        raise UnsupportedError(f"config.json: a text_config of model_type {kind!r:.60} is not supported in llava")
    tied = hf_config.get("tie_word_embeddings", False) or text.get("tie_word_embeddings", False)
    config, rows = llama.read(text | {"model_type": kind, "tie_word_embeddings": tied})
    return config, wrapped_rows(rows)


LLAVA = Family(
    "llava", ("llava",), read, gguf="llama", read_gguf=llama.read_gguf, write_gguf=llama.write_gguf, write=llama.write,
    limits=llama.limits, left_out=VISION,
)  # fmt: skip
