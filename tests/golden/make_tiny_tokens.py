"""Writes tiny_tokens.json: vocabularies that we wrote as GGUF, and what llama.cpp makes of the hard strings with them.

By hand, in two steps, because the peer has an environment of its own:
    PYTHONPATH=src python tests/golden/make_tiny_tokens.py write FOLDER       needs transformers' tokenizers, gguf
    python tests/golden/make_tiny_tokens.py read FOLDER                       needs llama-cpp-python (0.3.36)
"""

from __future__ import annotations

import json
import sys
import tempfile
from pathlib import Path

sys.path.insert(0, str(Path(__file__).parents[1]))

from hard_strings import HARD


def write(folder: Path) -> None:
    import gguf

    from small_tokenizers import byte_level, sentencepiece
    from tiercel.tokenizer.tokenizer import Tokenizer

    folder.mkdir(exist_ok=True)
    config = {"bos_token": "<s>", "eos_token": "</s>", "unk_token": "<unk>", "add_bos_token": True}
    for name, table in {"tiny_bpe": byte_level("smollm"), "tiny_spm": sentencepiece("always")}.items():
        with tempfile.TemporaryDirectory() as source:
            Path(source, "tokenizer.json").write_text(json.dumps(table))
            Path(source, "tokenizer_config.json").write_text(json.dumps(config))
            tokenizer = Tokenizer.from_folder(source)
        assert tokenizer is not None
        metadata = tokenizer.to_gguf()
        Path(folder, f"{name}.json").write_text(json.dumps(metadata))
        writer = gguf.GGUFWriter(folder / f"{name}.gguf", "llama")
        for key in ("context_length", "embedding_length", "block_count", "feed_forward_length", "attention.head_count"):
            writer.add_uint32(f"llama.{key}", 32)
        writer.add_float32("llama.attention.layer_norm_rms_epsilon", 1e-5)
        for key, value in metadata.items():
            if isinstance(value, list):
                writer.add_array(key, value)
            elif isinstance(value, bool):
                writer.add_bool(key, value)
            elif isinstance(value, int):
                writer.add_uint32(key, value)
            else:
                writer.add_string(key, value)
        writer.write_header_to_file()
        writer.write_kv_data_to_file()
        writer.close()


def read(folder: Path) -> None:
    import llama_cpp

    golden = {}
    for name in ("tiny_bpe", "tiny_spm"):
        model = llama_cpp.Llama(str(folder / f"{name}.gguf"), vocab_only=True, verbose=False)
        rows = [
            {"text": text} | {k: model.tokenize(text.encode(), False, k == "special") for k in ("plain", "special")}
            for text in HARD
        ]
        golden[name] = {"metadata": json.loads((folder / f"{name}.json").read_text()), "rows": rows}
    parts = [
        f'"{name}": {{"metadata": {json.dumps(g["metadata"])}, "rows": [\n'
        + ",\n".join(map(json.dumps, g["rows"]))
        + "\n]}"
        for name, g in golden.items()
    ]
    Path(__file__).with_name("tiny_tokens.json").write_text("{" + ",\n".join(parts) + "}\n")


if __name__ == "__main__":
    {"write": write, "read": read}[sys.argv[1]](Path(sys.argv[2]))
