"""An open-loop load generator: requests leave when they are due, whether earlier ones were answered or not.

Latency is counted from the time at which a request was due, so that a server which stalls cannot hide it by making the
generator wait ("coordinated omission"). HTTP/1.1 over kept connections, by hand: a client library would cost more than
the server.
"""

from __future__ import annotations

import asyncio
import json
import random
import time
from collections import Counter
from collections.abc import Awaitable, Callable, Sequence
from dataclasses import dataclass, field
from typing import Any


def request(path: str, body: Any) -> bytes:
    """The bytes of a POST."""
    text = json.dumps(body).encode()
    head = (
        f"POST {path} HTTP/1.1\r\nHost: bench\r\nContent-Type: application/json\r\nContent-Length: {len(text)}\r\n\r\n"
    )
    return head.encode() + text


class Connection:
    """One kept connection; one request at a time."""

    def __init__(self, host: str, port: int) -> None:
        self._place = (host, port)
        self._streams: tuple[asyncio.StreamReader, asyncio.StreamWriter] | None = None

    async def send(self, data: bytes) -> tuple[int, bytes]:
        """Status and body; status 0 where the connection broke."""
        try:
            if self._streams is None:
                self._streams = await asyncio.open_connection(*self._place)
            reader, writer = self._streams
            writer.write(data)
            head = (await reader.readuntil(b"\r\n\r\n")).lower()
            length = int(head.partition(b"content-length:")[2].partition(b"\r\n")[0])
            return int(head[9:12]), await reader.readexactly(length)
        except (OSError, asyncio.IncompleteReadError, ValueError):
            self.close()
            return 0, b""

    def close(self) -> None:
        """Forget the connection."""
        if self._streams is not None:
            self._streams[1].close()
        self._streams = None


@dataclass
class Seen:
    """What a load met: seconds of answered requests, statuses, and when each was due with its status and seconds.
    `late` is how long after it was due each request left: the generator's own share."""

    seconds: list[float] = field(default_factory=list)
    late: list[float] = field(default_factory=list)
    statuses: Counter[int] = field(default_factory=Counter)
    log: list[tuple[float, int, float]] = field(default_factory=list)

    def add(self, due: float, status: int, took: float) -> None:
        """One request."""
        self.statuses[status] += 1
        self.log.append((due, status, took))
        if status == 200:
            self.seconds.append(took)

    def percentile(self, p: float, of: Sequence[float] | None = None) -> float:
        """Milliseconds within which p percent were answered, or of other seconds."""
        ordered = sorted(self.seconds if of is None else of)
        return 1000 * ordered[min(len(ordered) - 1, int(len(ordered) * p / 100))] if ordered else float("nan")


async def open_loop(
    place: tuple[str, int], bodies: Sequence[bytes], rate: float, seconds: float, seed: int = 0, most: int = 256
) -> Seen:
    """Poisson arrivals at `rate` a second. At most `most` connections; who finds none free waits, and that counts."""
    rng, seen = random.Random(seed), Seen()
    free: asyncio.LifoQueue[Connection] = asyncio.LifoQueue()
    for _ in range(most):
        free.put_nowait(Connection(*place))

    async def one(due: float, body: bytes) -> None:
        connection = await free.get()
        seen.late.append(time.perf_counter() - due)
        status, _ = await connection.send(body)
        free.put_nowait(connection)
        seen.add(due - began, status, time.perf_counter() - due)

    began = due = time.perf_counter()
    running: set[asyncio.Task[None]] = set()
    i = 0
    while due < began + seconds:
        due += rng.expovariate(rate)
        wait = due - time.perf_counter()
        if wait > 0:
            await asyncio.sleep(wait)
        task = asyncio.ensure_future(one(due, bodies[i % len(bodies)]))
        running.add(task)
        task.add_done_callback(running.discard)
        i += 1
    await asyncio.gather(*running)
    while not free.empty():
        free.get_nowait().close()
    return seen


async def closed_loop(place: tuple[str, int], bodies: Sequence[bytes], clients: int, seconds: float) -> Seen:
    """`clients` that each send the next request when the last was answered."""
    seen = Seen()
    began = time.perf_counter()

    async def client(number: int) -> None:
        connection, i = Connection(*place), number
        while time.perf_counter() < began + seconds:
            sent = time.perf_counter()
            status, _ = await connection.send(bodies[i % len(bodies)])
            seen.add(sent - began, status, time.perf_counter() - sent)
            i += clients
        connection.close()

    await asyncio.gather(*(client(i) for i in range(clients)))
    return seen


async def beside(load: Awaitable[Seen], work: Callable[[], Awaitable[None]]) -> Seen:
    """A load, and something that is done while it lasts."""
    seen, _ = await asyncio.gather(load, work())
    return seen
