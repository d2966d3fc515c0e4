"""Requests wait here while the engine is busy; what waits is answered together.

The engine is never kept idle: a request that finds it free is taken at once, and batches form by themselves while it
works. (Waiting for company would only pay where a batch costs much more than its rows; static tiers have no such cost,
and encoders reach their speed at a few rows.)

Every tier works in a thread of its own. What it is sure of leaves at once; what it hands over waits for the next tier,
in a line of its own, so that a request that is easily answered never waits behind hard ones. How much is taken at a
time, and how much may wait, follow from how fast the tiers were so far: a turn takes some milliseconds, and what would
wait longer than `patience` is refused at once.
"""

from __future__ import annotations

import asyncio
import logging
import threading
import time
from collections import deque
from collections.abc import Callable, Sequence
from contextlib import suppress
from dataclasses import dataclass, field, replace
from functools import reduce

from netweight.serve.problems import closing, full, late
from netweight.serve.standing import Standing
from netweight.serve.steady import Said, Work

log = logging.getLogger("netweight.serve")
# Characters of a token, roughly, and tokens that every text has: what a text weighs is known before it is encoded.
_CHARACTERS, _SPECIALS = 4, 2
_TURN = 0.002  # seconds that a turn should take
_FIRST_GUESS = 1e-5  # seconds of a token, before the first turn
_MEMORY = 0.2  # weight of the newest turn in what is known about a tier's speed

Begin = Callable[[Sequence[str], Sequence[str] | None], Work]
Step = Callable[[Work], Work]


@dataclass(eq=False)
class Asked:
    """A request that waits; `work` is None until its rows are encoded."""

    texts: Sequence[str]
    pairs: Sequence[str] | None
    deadline: float
    weight: int
    future: asyncio.Future[Said] = field(repr=False)
    work: Work | None = None


class _Line:
    """Requests before one tier."""

    def __init__(self) -> None:
        self.waiting: deque[Asked] = deque()
        self.weight = 0
        self.each = _FIRST_GUESS  # seconds of a token
        self.busy = False
        self.running, self.since = 0, 0.0  # weight of the turn that is worked on, and when it began

    def left(self, now: float) -> float:
        """Seconds that this turn should still take."""
        return max(0.0, self.running * self.each - (now - self.since)) if self.busy else 0.0

    def add(self, asked: Asked) -> None:
        self.waiting.append(asked)
        self.weight += asked.weight

    def took(self, weight: int, seconds: float) -> None:
        self.each += _MEMORY * (seconds / max(1, weight) - self.each)

    def taken(self) -> list[Asked]:
        """Requests for one turn, at least one that is still wanted if there is any; late ones are told so."""
        batch: list[Asked] = []
        weight, now = 0, time.monotonic()
        while self.waiting and (not batch or weight * self.each < _TURN):
            asked = self.waiting[0]
            if batch and (asked.pairs is None) != (batch[0].pairs is None):
                break
            self.waiting.popleft()
            self.weight -= asked.weight
            if asked.future.cancelled():
                continue
            if asked.deadline < now:
                _tell([(asked, late())])
                continue
            batch.append(asked)
            weight += asked.weight
        return batch


class Queue:
    """Gives requests to one engine, in the order in which they came to each tier.

    Args:
        begin, step: of the engine; called in threads of the queue's own, one for each tier.
        tiers: how many there are.
        patience: gives the seconds that a request may have to wait for the engine: in bursts, see `standing`.
        observe: told rows that were begun, and seconds, of each turn.
    """

    def __init__(
        self,
        begin: Begin,
        step: Step,
        tiers: int = 1,
        patience: Callable[[], float] = lambda: 0.1,
        observe: Callable[[int, float], None] = lambda rows, seconds: None,
    ) -> None:
        self._begin, self._step, self._patience, self._observe = begin, step, patience, observe
        self._lines = [_Line() for _ in range(tiers)]
        # Of late: tokens that were begun, and seconds that tiers behind the first have taken.
        self._begun, self._later = 1.0, 0.0
        self._standing = Standing()
        self._changed = threading.Condition()
        self._closed = False
        self._threads = [
            threading.Thread(target=self._work, args=(i,), name=f"tier {i}", daemon=True) for i in range(tiers)
        ]
        for thread in self._threads:
            thread.start()

    @property
    def closed(self) -> bool:
        """Whether it takes nothing more."""
        return self._closed

    def __len__(self) -> int:
        return sum(len(line.waiting) for line in self._lines)

    def ask(
        self, texts: Sequence[str], pairs: Sequence[str] | None = None, seconds: float = 30.0
    ) -> asyncio.Future[Said]:
        """A future of the answers. Raises Problem where too much waits already, or the queue is closed."""
        characters = sum(map(len, texts)) + sum(map(len, pairs or ()))
        weight = _SPECIALS * len(texts) + characters // _CHARACTERS
        with self._changed:
            if self._closed:
                raise closing()
            now, handed = time.monotonic(), self._later / self._begun  # seconds of later tiers for each token
            wait = sum(line.weight * line.each for line in self._lines) + self._lines[0].weight * handed
            patience = self._standing.patience(wait, self._patience())
            wait += sum(line.left(now) for line in self._lines)  # not for `standing`: what runs is no queue
            if wait > patience:
                raise full(wait)
            loop = asyncio.get_running_loop()
            asked = Asked(texts, pairs, now + seconds, weight, loop.create_future())
            self._lines[0].add(asked)
            self._changed.notify_all()
        return asked.future

    def close(self, seconds: float = 30.0) -> None:
        """Answer what waits, take nothing more."""
        with self._changed:
            self._closed = True
            self._changed.notify_all()
        end = time.monotonic() + seconds
        for thread in self._threads:
            thread.join(max(0.0, end - time.monotonic()))

    def _work(self, i: int) -> None:
        while (batch := self._next(i)) is not None:
            if not batch:
                continue
            began = time.monotonic()
            weight = sum(asked.weight for asked in batch)
            try:
                done = self._step(self._together(batch))
                told = self._parted(batch, done)
            except Exception as problem:
                log.exception("a turn of tier %d failed, of %d requests", i, len(batch))
                told = [(asked, problem) for asked in batch]
            seconds = time.monotonic() - began
            with self._changed:
                self._lines[i].took(weight, seconds)
                self._lines[i].busy = False
                self._changed.notify_all()
                if i:
                    self._later += seconds
                else:
                    self._begun, self._later = ((1 - _MEMORY) * x for x in (self._begun, self._later))
                    self._begun += weight
            self._observe(0 if i else sum(len(asked.texts) for asked in batch), seconds)
            if told:
                _tell(told)

    def _together(self, batch: Sequence[Asked]) -> Work:
        """The rows of all requests, for one tier."""
        if batch[0].work is not None:
            return reduce(Work.joined, (asked.work for asked in batch if asked.work is not None))
        texts = [text for asked in batch for text in asked.texts]
        pairs = [pair for asked in batch for pair in asked.pairs or ()] if batch[0].pairs is not None else None
        return self._begin(texts, pairs)

    def _parted(self, batch: Sequence[Asked], done: Work) -> list[tuple[Asked, Said | Exception]]:
        """Requests that are answered; the others wait for the next tier. Each is told which tiers failed it, not those
        that failed others of its batch."""
        told: list[tuple[Asked, Said | Exception]] = []
        at, failed = 0, done.said.failed[-1:] if done.raised is not None else ()
        for asked in batch:
            part = done.stretch(at, at + len(asked.texts))
            at += len(asked.texts)
            earlier = asked.work.said.failed if asked.work is not None else ()
            part = replace(part, said=replace(part.said, failed=(*earlier, *failed)))
            if not part.open.any():
                silent = (part.said.outputs.tier < 0).any()
                told.append((asked, done.raised if done.raised is not None and silent else part.said))
                continue
            asked.work, asked.weight = part, int(part.tokens.lengths[part.open].sum())
            with self._changed:
                self._lines[part.tier].add(asked)
        return told

    def _next(self, i: int) -> list[Asked] | None:
        """Requests for tier i; None when the queue is closed and nothing can come any more."""
        line = self._lines[i]
        with self._changed:
            while not line.waiting:
                if self._closed and not any(before.waiting or before.busy for before in self._lines[:i]):
                    return None
                self._changed.wait()
            batch = line.taken()
            line.busy = bool(batch)
            line.running, line.since = sum(asked.weight for asked in batch), time.monotonic()
            if not batch:
                self._changed.notify_all()
            return batch


def _tell(told: Sequence[tuple[Asked, Said | Exception]]) -> None:
    with suppress(RuntimeError):  # the loop is closed, so nobody waits for it any more
        told[0][0].future.get_loop().call_soon_threadsafe(_deliver, told)


def _deliver(told: Sequence[tuple[Asked, Said | Exception]]) -> None:
    """In the event loop's thread."""
    for asked, said in told:
        if not asked.future.done():
            if isinstance(said, Exception):
                asked.future.set_exception(said)
            else:
                asked.future.set_result(said)
