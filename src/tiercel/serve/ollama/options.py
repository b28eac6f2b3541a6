"""Ollama's `options` as sampling parameters, and sampling parameters as `options`."""

from __future__ import annotations

from collections.abc import Mapping
from typing import Any

from tiercel.errors import RequestError

PARAM_OF_OPTION = {
    "temperature": "temperature", "top_p": "top_p", "top_k": "top_k", "min_p": "min_p", "seed": "seed", "stop": "stop",
    "repeat_penalty": "repetition_penalty", "presence_penalty": "presence_penalty",
    "frequency_penalty": "frequency_penalty", "num_predict": "max_tokens",
    "thinking_budget": "thinking_budget",  # an extension of this server
}  # fmt: skip
OPTION_OF_PARAM = {param: option for option, param in PARAM_OF_OPTION.items()}
MAX_INT32 = (1 << 31) - 1


def options_to_params(options: Mapping[str, Any]) -> tuple[dict[str, Any], list[str]]:
    """Fields of SamplingParams, and the names of options that have no meaning here.  Raises RequestError."""
    params: dict[str, Any] = {}
    ignored: list[str] = []
    for name, value in options.items():
        if name == "num_predict":
            length = _whole(name, min(value, MAX_INT32) if isinstance(value, int) else value, -2)
            params["max_tokens"] = length if length > 0 else None
        elif name == "num_ctx":
            _whole(name, value, 1)
        elif name not in PARAM_OF_OPTION:
            ignored.append(name)
        elif value is not None:
            params[PARAM_OF_OPTION[name]] = value
    if params.get("stop") in ([], ""):
        del params["stop"]
    return params, ignored


def _whole(name: str, value: Any, low: int) -> int:
    if not isinstance(value, int) or isinstance(value, bool) or not low <= value <= MAX_INT32:
        raise RequestError(f"option {name} must be a whole number from {low} to {MAX_INT32}")
    return value
