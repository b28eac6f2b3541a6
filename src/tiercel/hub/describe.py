"""What a model is, read from its config.json or GGUF header alone.

A table of plain values: `describe` for programs, `table` for people.
"""

from __future__ import annotations

import json
import struct
from collections import Counter
from pathlib import Path
from typing import Any

from tiercel.errors import FormatError
from tiercel.hub.download import read_json, shards_of
from tiercel.model.config import ModelConfig
from tiercel.plan import human_bytes, kv_bytes_per_token, parameter_count, pattern, state_bytes

HEADER_LIMIT = 100 << 20  # the safetensors format's own
NF4_STATE = ".quant_state.bitsandbytes__nf4"  # what belongs to an NF4 matrix beside its values (weights.bitsandbytes)
NF4_PARTS = ("absmax", "quant_map", "nested_absmax", "nested_quant_map", NF4_STATE[1:])


def describe(path: Path) -> dict[str, Any]:
    """{field: value} of a model folder, GGUF file or pattern file; raises FormatError."""
    if path.is_dir():
        return _folder(path)
    if path.suffix.lower() in (".json", ".toml"):
        from tiercel.families.pattern import read_file

        return {"path": str(path), "format": "pattern"} | _network("pattern", read_file(path))
    return _gguf(path)


def _folder(path: Path) -> dict[str, Any]:
    from tiercel.families import from_hf

    config = read_json(path / "config.json")
    layout = from_hf({key: value for key, value in config.items() if key != "quantization_config"})
    shards = shards_of(read_json(path / "model.safetensors.index.json"))
    files = [path / name for name in shards] or sorted(path.glob("*.safetensors"))
    settings = read_json(path / "tokenizer_config.json")
    out = {"path": str(path), "format": "safetensors", "bytes": sum(f.stat().st_size for f in files if f.is_file())}
    return out | _network(layout.family.name, layout.config) | {
        "types": dict(sum((_safetensors_types(file) for file in files), Counter())),
        "tokenizer": (path / "tokenizer.json").is_file(),
        "template": (path / "chat_template.jinja").is_file() or "chat_template" in settings,
        "licence": None,
    }  # fmt: skip


def _gguf(path: Path) -> dict[str, Any]:
    from tiercel.families import from_gguf
    from tiercel.weights.gguf import GGUFFile

    with GGUFFile(path) as file:
        layout = from_gguf(file.metadata, file.tensors)
        types = Counter(tensor.type for tensor in file.tensors.values())
        licence = file.metadata.get("general.license")
        out = {"path": str(path), "format": "gguf", "bytes": path.stat().st_size}
        return out | _network(layout.family.name, layout.config) | {
            "types": dict(types.most_common()),
            "tokenizer": "tokenizer.ggml.model" in file.metadata,
            "template": "tokenizer.chat_template" in file.metadata,
            "licence": licence if isinstance(licence, str) else None,
        }  # fmt: skip


def _network(family: str, config: ModelConfig) -> dict[str, Any]:
    return {
        "architecture": family,
        "parameters": parameter_count(config),
        "context": config.max_length,
        "layers": len(config.layers),
        "pattern": pattern(config),
        "width": config.width,
        "vocabulary": config.vocab_size,
        "heads": _heads(config),
        "kv_bytes_per_token": kv_bytes_per_token(config),
        "state_bytes": state_bytes(config),
    }


def _heads(config: ModelConfig) -> list[str]:
    """Each different mixer, in the order of its first layer."""
    return list(dict.fromkeys(mixer.describe() for layer in config.layers for mixer in layer.mixers))


def _safetensors_types(path: Path) -> Counter[str]:
    """How many tensors of each dtype a file's header lists."""
    return Counter(stored_types(path).values())


def stored_types(path: Path) -> dict[str, str]:
    """The type of every tensor a file's header lists; its weights are not looked at."""
    try:
        with path.open("rb") as file:
            (size,) = struct.unpack("<Q", file.read(8))
            if size > min(HEADER_LIMIT, path.stat().st_size):
                raise ValueError("the header is longer than the file")
            header: dict[str, dict[str, Any]] = json.loads(file.read(size))
        packed = json.loads(header.pop("__metadata__", {}).get("tiercel.packed", "{}"))  # weights.packed_folder
        nf4 = tuple(name.removesuffix(NF4_STATE) for name in header if name.endswith(NF4_STATE))
        packed |= dict.fromkeys(nf4, "NF4")
        parts = {f"{name}.{part}" for name in nf4 for part in NF4_PARTS}
        return {name: str(packed.get(name, entry["dtype"]))[:16] for name, entry in header.items() if name not in parts}
    except (OSError, ValueError, KeyError, TypeError, AttributeError, RecursionError, struct.error) as error:
        raise FormatError(f"{path} is not a safetensors file, or not all of it; fetch it again") from error


def table(name: str, found: dict[str, Any]) -> str:
    """The description as lines of two columns, in Ollama's manner."""
    types = ", ".join(f"{count} × {kind}" for kind, count in found.get("types", {}).items())
    yes = {True: "yes", False: "no", None: "not said"}
    rows = [
        ("architecture", found["architecture"]),
        ("parameters", f"{human_count(found['parameters'])} ({found['parameters']:,})"),
        ("context length", f"{found['context']:,}"),
        ("layers", found["pattern"]),
        ("width", found["width"]),
        *[("mixer", words) for words in found["heads"]],
        ("vocabulary", f"{found['vocabulary']:,}"),
        ("KV per token", f"{found['kv_bytes_per_token']:,} bytes (16 bit)"),
        ("state per sequence", f"{found['state_bytes'] / 2**20:,.1f} MiB (32 bit)"),
        ("quantization", types or "none: fresh weights"),
        ("size", human_bytes(found["bytes"]) if "bytes" in found else "-"),
        ("tokenizer", yes[found.get("tokenizer", False)]),
        ("chat template", yes[found.get("template", False)]),
        ("licence", found.get("licence") or "not said"),
        ("path", found["path"]),
    ]
    return "\n".join([f"  {name}", *(f"    {label:<20}{value}" for label, value in rows)])


def human_count(count: int) -> str:
    for unit, scale in (("B", 1e9), ("M", 1e6), ("K", 1e3)):
        if count >= scale:
            return f"{count / scale:.2f}{unit}"
    return str(count)
