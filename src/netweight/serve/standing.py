"""Bursts and overload told apart (Nichols and Jacobson, "Controlling queue delay", ACM Queue, 2012).

A burst fills a queue that empties again soon; under overload it never empties, and all that it does is make everybody
wait. So the shortest wait of the last tenth of a second is watched: where even that was long, what is let in from then
on waits for little.
"""

from __future__ import annotations

import math
import time
from collections.abc import Callable

_INTERVAL = 0.1  # seconds
_LONG, _LITTLE = 1 / 20, 1 / 10  # of the patience that bursts are met with


class Standing:
    """How long who comes now may wait."""

    def __init__(self, clock: Callable[[], float] = time.monotonic) -> None:
        self._clock = clock
        self._end, self._least, self._overloaded = 0.0, math.inf, False

    def patience(self, wait: float, patience: float) -> float:
        """Seconds; `wait` is what who comes now would wait, `patience` what bursts may."""
        now = self._clock()
        if now > self._end:
            idle = now > self._end + _INTERVAL
            self._overloaded = not idle and patience * _LONG < self._least < math.inf
            self._end, self._least = now + _INTERVAL, math.inf
        self._least = min(self._least, wait)
        return patience * (_LITTLE if self._overloaded else 1)
