"""What something costs, in measures that do not depend on how fast or how busy the machine is."""

from __future__ import annotations

import sys
import time
from collections.abc import Callable
from types import FrameType
from typing import Any


def ratio(work: Callable[[int], Any], small: int, factor: int = 8) -> float:
    """Processor time of `work(factor * small)` over that of `work(small)`: about `factor` where the cost is linear.

    The least of three of each, in turn, after one that is not counted.
    """
    work(small)
    pairs = [(_processor_time(work, small), _processor_time(work, factor * small)) for _ in range(3)]
    return min(large for _, large in pairs) / max(min(few for few, _ in pairs), 1e-6)


def _processor_time(work: Callable[[int], Any], size: int) -> float:
    begin = time.process_time()
    work(size)
    return time.process_time() - begin


class Calls:
    """Counts the calls of Python and C functions in a block: with Calls() as calls: …; calls.count."""

    count = 0

    def __enter__(self) -> Calls:
        self._before = sys.getprofile()
        sys.setprofile(self._seen)
        return self

    def _seen(self, frame: FrameType, event: str, arg: Any) -> None:
        self.count += event in ("call", "c_call")

    def __exit__(self, *_: object) -> None:
        sys.setprofile(self._before)
