"""Feed-forwards: one folder each, one line in `registry.py`."""

from tiercel.feed_forward.registry import FEED_FORWARDS

__all__ = ["FEED_FORWARDS"]
