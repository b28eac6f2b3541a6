"""Writes smollm2_tokens.json: what llama.cpp makes of the hard strings with SmolLM2's vocabulary.

By hand:  python tests/golden/make_smollm2_tokens.py SmolLM2-135M-Instruct.Q4_1.gguf
Needs llama-cpp-python (made with 0.3.36).
"""

from __future__ import annotations

import json
import sys
from pathlib import Path

import llama_cpp

sys.path.insert(0, str(Path(__file__).parents[1]))

from hard_strings import HARD


def main(gguf: str) -> None:
    model = llama_cpp.Llama(gguf, vocab_only=True, verbose=False)
    rows = [
        {
            "text": text,
            "plain": model.tokenize(text.encode(), add_bos=False, special=False),
            "special": model.tokenize(text.encode(), add_bos=False, special=True),
        }
        for text in HARD
    ]
    golden = {"made_with": f"llama-cpp-python {llama_cpp.__version__}", "rows": rows}
    out = Path(__file__).with_name("smollm2_tokens.json")
    lines = ",\n".join(json.dumps(row) for row in rows)
    out.write_text(f'{{"made_with": {json.dumps(golden["made_with"])}, "rows": [\n{lines}\n]}}\n')
    print(f"{len(rows)} strings, {sum(len(row['plain']) for row in rows)} tokens → {out}")


if __name__ == "__main__":
    main(sys.argv[1])
