"""Tiercel: hybrid language models, run, served, shrunk, taught and judged.

    model = tiercel.load("smollm2")
    print(model.generate("Why is the sky blue?"))

Names are fetched when they are first used: `import tiercel` alone does not import torch.
"""

from __future__ import annotations

import os
from importlib import import_module
from typing import TYPE_CHECKING, Any

from tiercel.version import __version__ as __version__

# OpenMP threads spin 300,000 turns before they sleep.  Where another program wants the cores, each wait costs a time
# slice: two decoders on two cores, 0.5 tokens/s in place of 20 (docs/history.md).  Three thousand turns cost nothing
# measurable on a quiet machine.  Read when torch is loaded, hence here; a value that is set is kept.
os.environ.setdefault("GOMP_SPINCOUNT", "3000")

_HOME = {
    "load": "api",
    "Model": "api",
    "LLM": "llm",
    "SamplingParams": "sampling.params",
    "pattern": "families.pattern",
    "TiercelError": "errors",
    "FormatError": "errors",
    "UnsupportedError": "errors",
    "RequestError": "errors",
    "ContextOverflow": "errors",
    "ModelNotFound": "errors",
    "DoesNotFit": "errors",
    "Busy": "errors",
    "Offline": "errors",
}

__all__ = [
    "LLM",
    "Busy",
    "ContextOverflow",
    "DoesNotFit",
    "FormatError",
    "Model",
    "ModelNotFound",
    "Offline",
    "RequestError",
    "SamplingParams",
    "TiercelError",
    "UnsupportedError",
    "load",
    "pattern",
]

if TYPE_CHECKING:
    from tiercel.api import Model, load
    from tiercel.errors import (
        Busy,
        ContextOverflow,
        DoesNotFit,
        FormatError,
        ModelNotFound,
        Offline,
        RequestError,
        TiercelError,
        UnsupportedError,
    )
    from tiercel.families.pattern import pattern
    from tiercel.llm import LLM
    from tiercel.sampling.params import SamplingParams


def __getattr__(name: str) -> Any:
    if name not in _HOME:
        raise AttributeError(f"module 'tiercel' has no attribute {name!r}")
    return getattr(import_module(f"tiercel.{_HOME[name]}"), name)


def __dir__() -> list[str]:
    return sorted([*__all__, "__version__"])
