"""The mixers there are: one line each."""

from __future__ import annotations

from tiercel.mixers.attention.config import AttentionConfig
from tiercel.mixers.gated_delta.config import GatedDeltaConfig
from tiercel.mixers.mamba1.config import Mamba1Config
from tiercel.mixers.mamba2.config import Mamba2Config
from tiercel.mixers.short_conv.config import ShortConvConfig
from tiercel.mixers.spec import MixerSpec, Registry

MIXERS: Registry[MixerSpec] = Registry(
    "mixer",
    (
        AttentionConfig,
        GatedDeltaConfig,
        Mamba1Config,
        Mamba2Config,
        ShortConvConfig,
    ),
)
