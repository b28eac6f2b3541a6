"""Packed tensors in a Hugging Face folder: what the `quantization_config` of its config.json says.

    "quant_method": "bitsandbytes"    NF4 as transformers reads it, see `weights.bitsandbytes`
    "quant_method": "tiercel"         any packed type, ours alone:

        tensor      U8, the last axis in bytes: rows as `quant` packs them, under the name the values would have
        metadata    of every safetensors file, "tiercel.packed": JSON {"<name>": "Q4_K", …}
        values      as the network multiplies them: a family's multipliers (muP) are folded in, which unpacked
                    tensors of a folder are not

A name is in the table or its tensor is a plain one.
"""

from __future__ import annotations

import json
from collections.abc import Callable, Iterable, Iterator, Mapping
from dataclasses import dataclass, replace
from typing import TYPE_CHECKING, Any

from tiercel.errors import FormatError, UnsupportedError
from tiercel.quant import BLOCKS, PACKED_TYPES, row_bytes
from tiercel.weights import bitsandbytes
from tiercel.weights.safetensors import SafetensorsFolder
from tiercel.weights.stored import OutTensor, Stored, StoredTensor

if TYPE_CHECKING:
    from torch import Tensor

TABLE = "tiercel.packed"
STEP_VALUES = 1 << 22  # on their way to be packed


@dataclass(frozen=True)
class Packed:
    """A folder's tensors with the packed ones recognised; folded: names whose values are the network's own."""

    tensors: Mapping[str, Stored]
    folded: frozenset[str] = frozenset()


def understood(hf_config: Any, folder: SafetensorsFolder) -> tuple[Any, Packed]:
    """The config without its quantization_config, and the tensors it describes.

    Raises UnsupportedError for other methods, FormatError where the tensors are not what it promises.
    """
    asked = hf_config.get("quantization_config") if isinstance(hf_config, dict) else None
    if asked is None:
        return hf_config, Packed(folder.tensors)
    method = asked.get("quant_method") if isinstance(asked, dict) else None
    rest = {key: value for key, value in hf_config.items() if key != "quantization_config"}
    if method == "tiercel":
        return rest, _ours(folder)
    if method == "bitsandbytes" and asked.get("load_in_4bit"):
        return rest, Packed(bitsandbytes.joined(folder.tensors))
    what = "8-bit bitsandbytes" if method == "bitsandbytes" else repr(method)
    raise UnsupportedError(f"config.json: {what:.60} checkpoints are not read here; bitsandbytes' NF4 and GGUF are")


def _ours(folder: SafetensorsFolder) -> Packed:
    try:
        table = json.loads(folder.metadata.get(TABLE, ""))
    except (ValueError, RecursionError) as error:
        raise FormatError(f"the metadata {TABLE!r} is missing or is not JSON ({error})") from error
    if not isinstance(table, dict):
        raise FormatError(f"the metadata {TABLE!r} must be a table of names and types")
    tensors: dict[str, Stored] = dict(folder.tensors)
    for name, type in table.items():
        if name not in folder.tensors or type not in PACKED_TYPES:
            raise FormatError(f"the metadata {TABLE!r} says {name!r:.80} is {type!r:.20}")
        tensors[name] = _unfolded(folder.tensors[name], type)
    return Packed(tensors, frozenset(table))


def _unfolded(tensor: StoredTensor, type: str) -> StoredTensor:
    """The bytes of `tensor` as rows of a packed type."""
    size = tensor.shape[-1] if len(tensor.shape) > 1 and tensor.type == "U8" else 0
    if type == "INT8":
        values = size - 4
    else:
        values = size // BLOCKS[type].bytes * BLOCKS[type].values if size % BLOCKS[type].bytes == 0 else 0
    if values <= 0:
        raise FormatError(f"{tensor.name} of {tensor.type} {list(tensor.shape)} cannot be rows of {type}")
    return replace(tensor, shape=(*tensor.shape[:-1], values), type=type)


# ── out


def tensors(
    name: str, shape: tuple[int, ...], type: str, rows: Callable[[int, int], Tensor], dtype: str, private: bool
) -> Iterator[OutTensor]:
    """What a packed matrix becomes in a folder; rows gives its packed rows."""
    if private:
        yield OutTensor(name, (*shape[:-1], row_bytes(type, shape[-1])), "U8", rows)
    else:
        assert type == "NF4" and len(shape) == 2, f"{name}: {type} {shape}"
        yield from bitsandbytes.tensors(name, (shape[0], shape[1]), rows, dtype, max(1, STEP_VALUES // shape[1]))


def config(unpacked: Iterable[str], dtype: str, private: bool) -> dict[str, Any]:
    """The quantization_config; unpacked: names of matrices that stayed as they were."""
    if private:
        return {"quant_method": "tiercel"}
    skipped = {name.removesuffix(".weight") for name in unpacked if name.endswith(".weight")}
    return bitsandbytes.config(sorted(skipped | {"lm_head"}), dtype)


def metadata(types: Mapping[str, str]) -> dict[str, str]:
    """What goes into every file of a private folder."""
    return {TABLE: json.dumps(dict(types), sort_keys=True)}
