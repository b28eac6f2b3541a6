"""Many requests at once, none of them read twice: engine.py first, then prefix_cache.py and scheduler.py."""

from tiercel.engine.engine import Engine
from tiercel.engine.loop import AsyncEngine, Stream
from tiercel.engine.request import Request, Sequence, Update
from tiercel.engine.session import Session

__all__ = ["AsyncEngine", "Engine", "Request", "Sequence", "Session", "Stream", "Update"]
