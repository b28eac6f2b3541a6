"""Where the ops of a forward over states run."""

from __future__ import annotations

from typing import Literal

Backend = Literal["cpu", "triton"]  # native kernels in float32; Triton kernels over slots of a device
