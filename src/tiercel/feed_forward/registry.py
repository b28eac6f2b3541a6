"""The feed-forwards there are: one line each."""

from __future__ import annotations

from tiercel.feed_forward.gated_mlp.config import GatedMLPConfig
from tiercel.feed_forward.moe.config import MoEConfig
from tiercel.mixers.spec import FeedForwardSpec, Registry

FEED_FORWARDS: Registry[FeedForwardSpec] = Registry(
    "feed-forward",
    (
        GatedMLPConfig,
        MoEConfig,
    ),
)
