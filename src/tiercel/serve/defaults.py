"""Sampling parameters of a request, with the defaults of its model."""

from __future__ import annotations

from typing import Any

from starlette.requests import Request

from tiercel.sampling.params import SamplingParams
from tiercel.serve.models import Lease
from tiercel.serve.ollama.options import options_to_params

MIN_TOP_P = 1e-9  # for a top_p of 0: the likeliest token alone


def default_params(lease: Lease, fallback: dict[str, Any]) -> dict[str, Any]:
    """Fields of SamplingParams where the request names none.

    The Modelfile's parameters, the checkpoint's own, or the dialect's `fallback` where the checkpoint has none.
    """
    defaults = {"max_tokens": None} | (lease.loaded.model.defaults or fallback)
    return defaults | options_to_params(lease.served.extras.get("parameters") or {})[0]


def sampling_params(fields: dict[str, Any]) -> SamplingParams:
    """Checked sampling parameters.  Raises RequestError."""
    if fields.get("top_p") == 0 and not isinstance(fields["top_p"], bool):
        fields = {**fields, "top_p": MIN_TOP_P}
    return SamplingParams(**fields)


def tenant_of(request: Request, salt: str | None = None) -> str:
    """Who shares cached prefixes: by API key where the server has several, and by the client's `cache_salt`."""
    import json

    key = request.scope.get("tiercel.tenant", "")
    return json.dumps([key, salt]) if key or salt else ""
