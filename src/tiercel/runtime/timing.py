"""How long the parts of a request took."""

from __future__ import annotations

from dataclasses import dataclass


@dataclass
class Times:
    """Seconds of one request, from the start of the call.

    queue: before the prompt's first step · prompt, generation: of these phases · total: to the last piece
    first_token: to the first token, queue and prompt included
    """

    queue: float = 0.0
    prompt: float = 0.0
    generation: float = 0.0
    total: float = 0.0
    first_token: float = 0.0
