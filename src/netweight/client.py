"""Ask a server of `netweight serve`, from Python: `Client` and `AsyncClient` around one core.

    with Client("http://127.0.0.1:8000") as client:
        client.predict("reviews", ["zip broke after a week"])     # [Prediction(label="negative", ...)]

Many texts are sent in parts that a server takes. A request that was refused for lack of room, or that met a worker's
end, is sent again, `retries` times: not before the time that the server named, or after 2^i tenths of a second, both
with jitter. Where a server names more than a minute, that is an error at once.
"""

from __future__ import annotations

import asyncio
import json
import random
import time
from collections.abc import Callable, Generator, Iterable, Iterator, Mapping, Sequence
from dataclasses import dataclass, field
from types import TracebackType
from typing import Any, Self, TypeVar

from netweight.errors import EndpointError, MissingExtra, no_list

try:
    import httpx
except ImportError:
    raise MissingExtra("the client", "client") from None

T = TypeVar("T")

_AGAIN = {429, 502, 503}
_LONGEST = 60.0  # seconds between two tries: keys are limited by the minute, so no server of ours wants more for one
_TWO = "pass two texts for each row"
_ROWS, _BYTES = 256, 3 * 2**20  # of a request, at most; a server takes 1,024 rows and 4 MiB


@dataclass(frozen=True)
class Prediction:
    """Of one row: a label with its confidence (and `scores`, where asked), or a value."""

    tier: str
    label: str | None = None
    confidence: float | None = None
    value: float | None = None
    scores: Mapping[str, float] | None = None


@dataclass(frozen=True)
class Word:
    """A word, or a run of `count`: code points `start` to `end` of the first (`side` 0) or second text of a pair.

    `weight` is how far the label's probability, or the value, falls without it; `label` is the one without it.
    """

    text: str
    side: int
    start: int
    end: int
    count: int
    weight: float
    label: str | None = None


@dataclass(frozen=True)
class Explanation:
    """A prediction, and its words in their order."""

    prediction: Prediction
    words: tuple[Word, ...]


@dataclass(frozen=True)
class _Sleep:
    seconds: float


_Step = httpx.Request | _Sleep
_Met = httpx.Response | httpx.TransportError | None


@dataclass(frozen=True)
class _Core:
    """What to send, when to send it again, and what the answers mean. Does no input and output."""

    url: str
    key: str | None = field(default=None, repr=False)
    retries: int = 4

    def predict(
        self, model: str, texts: Sequence[str] | None, pairs: Sequence[tuple[str, str]] | None, scores: bool
    ) -> Generator[_Step, _Met, list[Prediction]]:
        if (texts is None) == (pairs is None):
            raise EndpointError("give texts or pairs, and not both.")
        name = "texts" if pairs is None else "pairs"
        rows: list[Any] = _rows(texts, name, _text) if pairs is None else _rows(pairs, name, _pair, _TWO)
        found: list[Prediction] = []
        for part in _parts(rows):
            body = {name: part, "scores": scores}
            found += yield from self.send("POST", f"/v1/models/{model}/predict", _predictions, body)
        return found

    def explain(self, model: str, text: str | tuple[str, str]) -> Generator[_Step, _Met, Explanation]:
        paired = isinstance(text, Iterable) and not isinstance(text, str)
        body = {"pair": _pair(text, "text")} if paired else {"text": _text(text, "text")}
        return (yield from self.send("POST", f"/v1/models/{model}/explain", _explanation, body))

    def models(self) -> Generator[_Step, _Met, list[dict[str, Any]]]:
        return (yield from self.send("GET", "/v1/models", lambda said: list(said["models"])))

    def send(self, method: str, path: str, read: Callable[[Any], T], body: Any = None) -> Generator[_Step, _Met, T]:
        """What is read in the answer to one request, which is sent again where that may help. Raises EndpointError."""
        headers = {"Authorization": f"Bearer {self.key}"} if self.key else {}
        for attempt in range(self.retries + 1):
            met = yield httpx.Request(method, self.url.rstrip("/") + path, json=body, headers=headers)
            if isinstance(met, httpx.Response) and met.status_code == 200:
                try:
                    return read(met.json())
                except (ValueError, KeyError, TypeError):
                    raise EndpointError(
                        f"{method} {path} was answered with 200 and {met.text[:100]!r}, which no `netweight serve` of "
                        f"this version says; check what answers at {self.url}."
                    ) from None
            last = attempt == self.retries
            named = met.headers.get("Retry-After", "") if isinstance(met, httpx.Response) else ""
            wait, low, high = min(_LONGEST, 0.1 * 2**attempt), 0.5, 1.0
            if named.isdecimal():
                wait, low, high = float(named), 1.0, 1.25  # earlier, it would be refused again
            if isinstance(met, httpx.Response) and (last or wait > _LONGEST or not _passing(met)):
                far = f" (Retry-After: {named}; the client waits {_LONGEST:.0f} s at most)" if wait > _LONGEST else ""
                raise EndpointError(f"{method} {path} was answered with {met.status_code}: {_detail(met)}{far}")
            if isinstance(met, httpx.TransportError) and last:
                raise EndpointError(f"{self.url} does not answer ({met!r}) after {attempt + 1} tries.")
            yield _Sleep(wait * random.uniform(low, high))
        raise AssertionError("unreachable")


def _predictions(said: Any) -> list[Prediction]:
    return [Prediction(**row) for row in said["predictions"]]


def _explanation(said: Any) -> Explanation:
    return Explanation(Prediction(**said["prediction"]), tuple(Word(**word) for word in said["words"]))


def _rows(given: Any, name: str, row: Callable[[Any, str], T], instead: str = "") -> list[T]:
    """Each as JSON has it. Raises EndpointError, which names the one that it cannot have."""
    if why := no_list(given, name, instead):
        raise EndpointError(why)
    return [row(one, f"{name}[{i}]") for i, one in enumerate(given)]


def _pair(given: Any, name: str) -> list[str]:
    texts = _rows(given, name, _text, _TWO)
    if len(texts) != 2:
        raise EndpointError(f"{name} has {len(texts)} texts; {_TWO}.")
    return texts


def _text(given: Any, name: str) -> str:
    if not isinstance(given, str):
        raise EndpointError(f"{name} is of type {type(given).__name__}; pass a string for every row.")
    try:
        given.encode()
    except UnicodeEncodeError as problem:
        raise EndpointError(
            f"{name} is no text that UTF-8 can hold ({problem.reason}); read it again with errors='replace'."
        ) from None
    return given


def _parts(rows: Sequence[Any]) -> Iterator[Sequence[Any]]:
    """Stretches of rows that one request may hold."""
    start = size = 0
    for i, row in enumerate(rows):
        own = len(json.dumps(row, ensure_ascii=False).encode())  # as httpx writes it
        if i > start and (i == start + _ROWS or size + own > _BYTES):
            yield rows[start:i]
            start, size = i, 0
        size += own
    if start < len(rows):
        yield rows[start:]


def _passing(response: httpx.Response) -> bool:
    """Whether the same request may be answered soon. A 500 that is not problem+json was not said by a server of
    `netweight serve` but for one that died: Ray's proxies do that."""
    said = response.headers.get("content-type", "").startswith("application/problem+json")
    return response.status_code in _AGAIN or (response.status_code == 500 and not said)


def _detail(response: httpx.Response) -> str:
    try:
        return str(response.json()["detail"])
    except (ValueError, KeyError, TypeError):
        return response.text[:200]


class Client:
    """Blocking. `timeout` in seconds of each request."""

    def __init__(self, url: str, key: str | None = None, *, timeout: float = 30.0, retries: int = 4) -> None:
        self._core = _Core(url, key, retries)
        self._http = httpx.Client(timeout=timeout)

    def predict(
        self,
        model: str,
        texts: Sequence[str] | None = None,
        pairs: Sequence[tuple[str, str]] | None = None,
        *,
        scores: bool = False,
    ) -> list[Prediction]:
        """One prediction a row, in order. Raises EndpointError."""
        return self._drive(self._core.predict(model, texts, pairs, scores))

    def explain(self, model: str, text: str | tuple[str, str]) -> Explanation:
        """A text's (or pair's) prediction, and how far each word moved it. Raises EndpointError."""
        return self._drive(self._core.explain(model, text))

    def models(self) -> list[dict[str, Any]]:
        """What the server has: names, versions, certificates, measurements."""
        return self._drive(self._core.models())

    def _drive(self, steps: Generator[_Step, _Met, T]) -> T:
        met: _Met = None
        while True:
            try:
                step = steps.send(met)
            except StopIteration as done:
                return done.value  # type: ignore[no-any-return]
            if isinstance(step, _Sleep):
                time.sleep(step.seconds)
                continue
            try:
                met = self._http.send(step)
            except httpx.TransportError as problem:
                met = problem

    def __enter__(self) -> Self:
        return self

    def __exit__(self, kind: type[BaseException] | None, it: BaseException | None, at: TracebackType | None) -> None:
        self._http.close()


class AsyncClient:
    """For asyncio. `timeout` in seconds of each request."""

    def __init__(self, url: str, key: str | None = None, *, timeout: float = 30.0, retries: int = 4) -> None:
        self._core = _Core(url, key, retries)
        self._http = httpx.AsyncClient(timeout=timeout)

    async def predict(
        self,
        model: str,
        texts: Sequence[str] | None = None,
        pairs: Sequence[tuple[str, str]] | None = None,
        *,
        scores: bool = False,
    ) -> list[Prediction]:
        """One prediction a row, in order. Raises EndpointError."""
        return await self._drive(self._core.predict(model, texts, pairs, scores))

    async def explain(self, model: str, text: str | tuple[str, str]) -> Explanation:
        """A text's (or pair's) prediction, and how far each word moved it. Raises EndpointError."""
        return await self._drive(self._core.explain(model, text))

    async def models(self) -> list[dict[str, Any]]:
        """What the server has: names, versions, certificates, measurements."""
        return await self._drive(self._core.models())

    async def _drive(self, steps: Generator[_Step, _Met, T]) -> T:
        met: _Met = None
        while True:
            try:
                step = steps.send(met)
            except StopIteration as done:
                return done.value  # type: ignore[no-any-return]
            if isinstance(step, _Sleep):
                await asyncio.sleep(step.seconds)
                continue
            try:
                met = await self._http.send(step)
            except httpx.TransportError as problem:
                met = problem

    async def __aenter__(self) -> Self:
        return self

    async def __aexit__(
        self, kind: type[BaseException] | None, it: BaseException | None, at: TracebackType | None
    ) -> None:
        await self._http.aclose()
