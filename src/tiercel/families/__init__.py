"""Which checkpoint is which model.  One file per family; adding one touches nothing else but this table."""

from __future__ import annotations

from collections.abc import Callable, Mapping
from typing import Any

from tiercel.errors import FormatError, UnsupportedError
from tiercel.families.bamba import BAMBA
from tiercel.families.falcon_h1 import FALCON_H1
from tiercel.families.family import Family, Layout
from tiercel.families.gemma3 import GEMMA3
from tiercel.families.granite import GRANITE
from tiercel.families.jamba import JAMBA
from tiercel.families.lfm2 import LFM2, LFM2_MOE, LFM3
from tiercel.families.llama import LLAMA, QWEN2
from tiercel.families.llava import LLAVA
from tiercel.families.mamba import MAMBA, MAMBA2
from tiercel.families.nemotron_h import NEMOTRON_H
from tiercel.families.olmo_hybrid import OLMO_HYBRID
from tiercel.families.pattern import PATTERN
from tiercel.families.phi3 import PHI3
from tiercel.families.qwen3 import QWEN3, QWEN3_MOE
from tiercel.families.qwen3_5 import QWEN3_5, QWEN3_5_MOE, QWEN3_NEXT

FAMILIES: tuple[Family, ...] = (
    FALCON_H1,
    LLAVA,  # its GGUF form is that of llama, which a file's architecture names
    LLAMA,
    QWEN2,
    QWEN3,
    QWEN3_MOE,
    QWEN3_5,
    QWEN3_5_MOE,
    QWEN3_NEXT,
    OLMO_HYBRID,
    MAMBA,
    MAMBA2,
    BAMBA,
    JAMBA,
    LFM2,
    LFM2_MOE,
    LFM3,
    NEMOTRON_H,
    GRANITE,
    GEMMA3,
    PHI3,
    PATTERN,
)
BY_MODEL_TYPE = {model_type: family for family in FAMILIES for model_type in family.model_types}
BY_GGUF = {name: family for family in FAMILIES if family.gguf for name in (family.gguf, *family.more_gguf)}


def from_hf(hf_config: Any) -> Layout:
    """A config.json understood.  FormatError when it is broken, UnsupportedError when it asks for more than we have."""
    if not isinstance(hf_config, dict):
        raise FormatError("config.json must be a table of fields")
    model_type = hf_config.get("model_type")
    if not isinstance(model_type, str) or model_type not in BY_MODEL_TYPE:
        known = ", ".join(sorted(BY_MODEL_TYPE))
        raise UnsupportedError(f"config.json: model_type {model_type!r:.60} is not supported; known: {known}")
    return _understood(lambda: BY_MODEL_TYPE[model_type].layout(hf_config), "config.json")


def from_gguf(metadata: Mapping[str, Any], tensors: Mapping[str, Any]) -> Layout:
    """GGUF metadata understood; `tensors` maps names to stored tensors, whose presence settles what is optional."""
    arch = metadata.get("general.architecture")
    if not isinstance(arch, str) or arch not in BY_GGUF:
        known = ", ".join(sorted(BY_GGUF))
        raise UnsupportedError(f"GGUF architecture {arch!r:.60} is not supported; known: {known}")
    return _understood(lambda: BY_GGUF[arch].gguf_layout(metadata, tensors), "GGUF metadata")


def _understood(read: Callable[[], Layout], where: str) -> Layout:
    """Numbers that overflow one another (a width of 10⁹ times an expansion of 10²⁰⁰) are a broken file too."""
    try:
        return read()
    except (OverflowError, ZeroDivisionError) as error:
        raise FormatError(f"{where}: its sizes do not fit together ({error})") from error
