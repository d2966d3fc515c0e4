"""How many requests may be inside at a time.

The engine's queue knows what waits for the engine, but a server that is overloaded is mostly busy with HTTP itself, and
what waits for that waits in sockets. So requests are counted at the door, before anything is parsed. By Little's law,
who comes when n are inside waits for n times the time between two answers: that time is watched while the server is
busy, and who would wait longer than `patience` is refused.
"""

from __future__ import annotations

import time
from collections.abc import Callable

_LEAST = 16  # that may always be inside: bursts of a few clients
_MEMORY = 0.02  # weight of the newest answer in what is known about the time between two


class Crowd:
    """Requests inside one process."""

    def __init__(self, patience: Callable[[], float], clock: Callable[[], float] = time.monotonic) -> None:
        self._patience, self._clock = patience, clock
        self.inside = 0
        self._between: float | None = None
        self._last = 0.0

    @property
    def wait(self) -> float:
        """Seconds that who comes now would wait."""
        return self.inside * (self._between or 0.0)

    @property
    def full(self) -> bool:
        """Whether that is too long."""
        return self.inside >= _LEAST and self.wait > self._patience()

    def enter(self) -> None:
        """One more."""
        if not self.inside:
            self._last = self._clock()
        self.inside += 1

    def leave(self) -> None:
        """One was answered. Only times at which others waited say how fast the server is."""
        now = self._clock()
        if self.inside > 1:
            took = now - self._last
            self._between = took if self._between is None else self._between + _MEMORY * (took - self._between)
        self._last = now
        self.inside -= 1
