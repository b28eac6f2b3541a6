"""Put trained weights into the package: python training/reasoner/install.py OUT/model [src/tiercel/reasoner]

Takes config.json and model.safetensors, checks that they load with the tokenizer and answer, and writes the sha256.
"""

from __future__ import annotations

import hashlib
import json
import shutil
import sys
import tempfile
from pathlib import Path

HERE = Path(__file__).parent
MOST_BYTES = 20 << 20


def install(trained: Path, package: Path) -> str:
    """The answer to one question, by what is now installed.  Nothing is changed when it cannot be loaded."""
    import tiercel

    weights = trained / "model.safetensors"
    if not weights.is_file() or not (trained / "config.json").is_file():
        sys.exit(f"{trained} holds no config.json with a model.safetensors; give train.py's OUT/model")
    if weights.stat().st_size > MOST_BYTES:
        sys.exit(f"{weights} has {weights.stat().st_size} bytes; the package takes at most {MOST_BYTES}")
    with tempfile.TemporaryDirectory() as folder:
        copy = Path(folder) / "reasoner"
        shutil.copytree(package, copy)
        for name in ("config.json", "model.safetensors"):
            shutil.copyfile(trained / name, copy / name)
        answer = tiercel.load(copy).generate("What is 47 * 86?", tiercel.SamplingParams(temperature=0, max_tokens=300))
        for name in ("config.json", "model.safetensors"):
            shutil.copyfile(copy / name, package / name)
    digest = hashlib.sha256(weights.read_bytes()).hexdigest()
    manifest = {"file": "model.safetensors", "sha256": digest, "bytes": weights.stat().st_size, "source": "package"}
    (package / "tiercel.json").write_text(json.dumps(manifest, indent=1) + "\n")
    return f"{answer.thinking}\n⇒ {answer}"


if __name__ == "__main__":
    if len(sys.argv) < 2:
        sys.exit(__doc__)
    package = Path(sys.argv[2]) if len(sys.argv) > 2 else HERE.parents[1] / "src/tiercel/reasoner"
    print(install(Path(sys.argv[1]), package))
    print(f"installed in {package}")
