"""Requests wait here while the engine is busy; what waits is answered together.

The engine is never kept idle: a request that finds it free is taken at once, and batches form by themselves while it
works. (Waiting for company would only pay where a batch costs much more than its rows; static tiers have no such cost,
and encoders reach their speed at a few rows.) How much is taken at a time, and how much may wait, follow from how fast
the engine was so far: a batch takes some milliseconds, so that no request waits for a long one, and what would wait
longer than `patience` is refused at once.
"""

from __future__ import annotations

import asyncio
import threading
import time
from collections import deque
from collections.abc import Callable, Sequence
from dataclasses import dataclass, field

from netweight.serve.problems import closing, full, late
from netweight.serve.steady import Said

# Characters of a token, roughly, and tokens that every text has: what a text weighs is known before it is encoded.
_CHARACTERS, _SPECIALS = 4, 2
_BATCH = 0.02  # seconds that a batch should take
_FIRST_GUESS = 1e-5  # seconds of a token, before the first batch
_MEMORY = 0.2  # weight of the newest batch in what is known about the engine's speed

Answer = Callable[[Sequence[str], Sequence[str] | None], Said]


@dataclass(eq=False)
class Asked:
    """A request that waits."""

    texts: Sequence[str]
    pairs: Sequence[str] | None
    deadline: float
    weight: int
    future: asyncio.Future[Said] = field(repr=False)


class Queue:
    """Gives requests to one engine, in the order in which they came.

    Args:
        answer: the engine; called in one thread of its own.
        patience: seconds that a request may have to wait for the engine.
        observe: told rows and seconds of each batch.
    """

    def __init__(
        self, answer: Answer, patience: float = 0.1, observe: Callable[[int, float], None] = lambda rows, seconds: None
    ) -> None:
        self._answer, self._patience, self._observe = answer, patience, observe
        self._waiting: deque[Asked] = deque()
        self._weight = 0
        self._each = _FIRST_GUESS
        self._changed = threading.Condition()
        self._closed = False
        self._thread = threading.Thread(target=self._work, name="engine", daemon=True)
        self._thread.start()

    @property
    def closed(self) -> bool:
        """Whether it takes nothing more."""
        return self._closed

    def __len__(self) -> int:
        return len(self._waiting)

    def ask(
        self, texts: Sequence[str], pairs: Sequence[str] | None = None, seconds: float = 30.0
    ) -> asyncio.Future[Said]:
        """A future of the answers. Raises Problem where too much waits already, or the queue is closed."""
        characters = sum(map(len, texts)) + sum(map(len, pairs or ()))
        weight = _SPECIALS * len(texts) + characters // _CHARACTERS
        with self._changed:
            if self._closed:
                raise closing()
            wait = self._weight * self._each
            if self._waiting and wait > self._patience:
                raise full(wait)
            loop = asyncio.get_running_loop()
            asked = Asked(texts, pairs, time.monotonic() + seconds, weight, loop.create_future())
            self._waiting.append(asked)
            self._weight += weight
            self._changed.notify()
        return asked.future

    def close(self, seconds: float = 30.0) -> None:
        """Answer what waits, take nothing more."""
        with self._changed:
            self._closed = True
            self._changed.notify()
        self._thread.join(seconds)

    def _work(self) -> None:
        while batch := self._next():
            began = time.monotonic()
            texts = [text for asked in batch for text in asked.texts]
            pairs = [pair for asked in batch for pair in asked.pairs or ()] if batch[0].pairs is not None else None
            said: Said | Exception
            try:
                said = self._answer(texts, pairs)
            except Exception as problem:
                said = problem
            seconds = time.monotonic() - began
            each = seconds / max(1, sum(asked.weight for asked in batch))
            self._each += _MEMORY * (each - self._each)
            self._observe(len(texts), seconds)
            batch[0].future.get_loop().call_soon_threadsafe(_deliver, batch, said)

    def _next(self) -> list[Asked]:
        """What is answered next; empty when the queue is closed and nothing waits."""
        with self._changed:
            while True:
                batch: list[Asked] = []
                weight, now = 0, time.monotonic()
                while self._waiting and (not batch or weight * self._each < _BATCH):
                    asked = self._waiting[0]
                    if batch and (asked.pairs is None) != (batch[0].pairs is None):
                        break
                    self._waiting.popleft()
                    self._weight -= asked.weight
                    if asked.future.cancelled():
                        continue
                    if asked.deadline < now:
                        asked.future.get_loop().call_soon_threadsafe(_deliver, [asked], late())
                        continue
                    batch.append(asked)
                    weight += asked.weight
                if batch or (self._closed and not self._waiting):
                    return batch
                self._changed.wait()


def _deliver(batch: Sequence[Asked], said: Said | Exception) -> None:
    """In the event loop's thread."""
    at = 0
    for asked in batch:
        end = at + len(asked.texts)
        if not asked.future.done():
            if isinstance(said, Exception):
                asked.future.set_exception(said)
            else:
                asked.future.set_result(said.stretch(at, end))
        at = end
