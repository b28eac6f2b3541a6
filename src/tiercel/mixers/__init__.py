"""Mixers: one folder each, one line in `registry.py`."""

from tiercel.mixers.registry import MIXERS

__all__ = ["MIXERS"]
