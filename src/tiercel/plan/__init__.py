"""Will it fit, and how fast will it be: arithmetic on configs.  Standard library only, no torch.

    sizes.py      parameters, keys and values, states: what a config says about bytes
    machines.py   what machines can do: a small table with sources
    forecast.py   a network on a machine: memory part by part, speed, whether it fits and what would

A name becomes a forecast in `tiercel.hub.planning`, which reads files.
"""

from tiercel.plan.sizes import (
    check_fits,
    human_bytes,
    kv_bytes_per_token,
    open_bytes,
    parameter_count,
    pattern,
    shapes,
    state_bytes,
)

__all__ = [
    "check_fits",
    "human_bytes",
    "kv_bytes_per_token",
    "open_bytes",
    "parameter_count",
    "pattern",
    "shapes",
    "state_bytes",
]
