"""Asks llama.cpp's own converter what it writes of nano models, into converter.json.  Run by hand, once per version.

    LLAMA_SRC=…/vendor/llama.cpp python make_converter.py NAME …      names of nano.CONFIGS; others' entries stay

The peer is llama-cpp-python 0.3.36 (llama.cpp 0c1e570).  Kept: names, shapes and types of all tensors, and the metadata
of the architecture.  The vocabulary is left out: nano models have none.
"""

from __future__ import annotations

import json
import os
import runpy
import sys
import tempfile
from pathlib import Path

LLAMA = Path(os.environ["LLAMA_SRC"])
HERE = Path(__file__).parent
sys.path[:0] = [str(LLAMA), str(LLAMA / "gguf-py"), str(HERE)]
import conversion.base  # noqa: E402
import gguf  # noqa: E402
import nano  # noqa: E402

for name in ("set_vocab", "_set_vocab_gpt2", "_set_vocab_sentencepiece"):
    setattr(conversion.base.TextModel, name, lambda self: None)
WORDS = {str(i): i for i in range(nano.VOCAB)}
VOCAB_JSON = {"version": "1.0", "added_tokens": [], "model": {"type": "WordLevel", "vocab": WORDS, "unk_token": "0"}}


def convert(name: str, folder: Path) -> dict[str, object]:
    """Names, shapes and types of the tensors and the metadata in the converter's file."""
    source, out = nano.build(name, folder / name), folder / f"{name}.gguf"
    (source / "tokenizer.json").write_text(json.dumps(VOCAB_JSON))
    (source / "tokenizer_config.json").write_text(json.dumps({"tokenizer_class": "GPT2Tokenizer"}))
    sys.argv = ["convert_hf_to_gguf.py", str(source), "--outfile", str(out), "--outtype", "f32"]
    if name.startswith(("qwen35", "qwen3next")):
        sys.argv.append("--no-mtp")  # else it asks for the tensors of a prediction head
    runpy.run_path(str(LLAMA / "convert_hf_to_gguf.py"), run_name="__main__")
    reader = gguf.GGUFReader(out)
    arch = reader.get_field("general.architecture").contents()
    return {
        "metadata": {key: f.contents() for key, f in reader.fields.items() if key.startswith(f"{arch}.")},
        "tensors": {t.name: [list(map(int, t.shape)), t.tensor_type.name] for t in reader.tensors},
    }


def main() -> None:
    path = HERE / "converter.json"
    known = json.loads(path.read_text())
    names = sys.argv[1:]
    with tempfile.TemporaryDirectory() as folder:
        for name in names:
            known[name] = convert(name, Path(folder))
    lines = (f"{json.dumps(name)}: {json.dumps(found)}" for name, found in known.items())
    path.write_text("{\n" + ",\n".join(lines) + "\n}\n")


if __name__ == "__main__":
    main()
