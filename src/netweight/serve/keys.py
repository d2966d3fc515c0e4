"""API keys: who may ask, and how often.

A file of JSON lines holds a name, the SHA-256 of each key and its limit. Keys are 256 random bits, which no dictionary
holds, so a plain hash keeps them. Rotation: add a second key under the same name, move clients over, remove the first
(by its hash); servers see the file change.
"""

from __future__ import annotations

import fcntl
import hashlib
import hmac
import json
import logging
import math
import os
import re
import secrets
import stat
import tempfile
import time
from collections.abc import Callable, Iterator
from contextlib import contextmanager, suppress
from dataclasses import asdict, dataclass, replace
from pathlib import Path

from starlette.types import ASGIApp, Receive, Scope, Send

from netweight.data.files import replaced
from netweight.errors import OptionError
from netweight.serve.pages import PATHS
from netweight.serve.problems import Problem

log = logging.getLogger("netweight.serve")
_NAME = re.compile(r"[A-Za-z0-9._-]{1,64}")
OPEN = frozenset({"/healthz", "/readyz", *PATHS})  # for probes; the playground says nothing before it has a key
_LOOK = 1.0  # seconds between looks at the file


@dataclass(frozen=True)
class Key:
    """What is kept of a key. `per_minute` requests, or None for any number."""

    name: str
    sha256: str
    per_minute: int | None = None


def read_keys(path: Path) -> tuple[Key, ...]:
    """All keys of a file. Raises OptionError."""
    try:
        lines = path.read_text(encoding="utf-8").splitlines()
        return tuple(Key(**json.loads(line)) for line in lines if line.strip())
    except (OSError, ValueError, TypeError) as problem:
        new = "FILE" if path.exists() else path
        raise OptionError(
            f"{path} is no file of keys ({problem}); make one with `netweight keys {new} --add NAME`."
        ) from None


def add_key(path: Path, name: str, per_minute: int | None = None) -> str:
    """A new key, which is kept nowhere: only its hash goes into the file. Raises OptionError."""
    if not _NAME.fullmatch(name):
        raise OptionError(f"a key cannot be called {name!r}; use letters, digits, dot, dash and underscore.")
    text = f"nw_{secrets.token_urlsafe(32)}"
    with _alone(path):
        kept = read_keys(path) if path.exists() else ()
        _write(path, (*kept, Key(name, _hash(text), per_minute)))
    return text


def remove_key(path: Path, name: str, sha256: str = "") -> None:
    """Take away the key of a name whose hash begins so. Raises OptionError for none, and for more than one."""
    read_keys(path)  # a file that is not there is told by its name
    with _alone(path):
        kept = read_keys(path)
        gone = [key for key in kept if key.name == name and key.sha256.startswith(sha256)]
        if not gone:
            names = ", ".join(sorted({key.name for key in kept})) or "none"
            raise OptionError(f"{path} has no such key of {name!r}; its names are: {names}.")
        if len(gone) > 1:
            which = " or ".join(f"{name}:{key.sha256[:12]}" for key in gone)
            raise OptionError(f"{path} has {len(gone)} keys of {name!r}; say which one: {which}.")
        _write(path, tuple(key for key in kept if key not in gone))


@contextmanager
def _alone(path: Path) -> Iterator[None]:
    """One change at a time: of two, the later one would bring back a key that the other removes. The folder is what is
    locked, since each change puts another file in the place of the last."""
    folder = os.open(path.parent, os.O_RDONLY)
    try:
        with suppress(OSError):  # not every file system has locks
            fcntl.flock(folder, fcntl.LOCK_EX)
        yield
    finally:
        os.close(folder)


def _hash(text: str) -> str:
    return hashlib.sha256(text.encode()).hexdigest()


def _write(path: Path, keys: tuple[Key, ...]) -> None:
    """Atomic. A new file is readable by its owner alone; one in the place of another keeps its owner and its rights,
    since a server that could no longer read it would let removed keys in. Raises OptionError where it cannot."""
    handle, new = tempfile.mkstemp(dir=path.parent, prefix=f".{path.name}-")
    with os.fdopen(handle, "w", encoding="utf-8") as file:
        if path.exists():
            held = path.stat()
            try:
                os.fchown(handle, held.st_uid, held.st_gid)
            except OSError as problem:
                os.unlink(new)
                raise OptionError(
                    f"{path} is of user {held.st_uid} and group {held.st_gid}, to whom a new one cannot be given "
                    f"({problem.strerror}), so nothing was changed; run this as that user, or with sudo."
                ) from None
            os.fchmod(handle, stat.S_IMODE(held.st_mode))
        file.writelines(f"{json.dumps(asdict(key))}\n" for key in keys)
    replaced(Path(new), path)


@dataclass(frozen=True)
class Bucket:
    """Requests that a key may still make, as of a time: a token bucket of one minute's requests."""

    left: float
    at: float

    def taken(self, now: float, per_minute: int) -> Bucket:
        """After one more request; below zero it must be refused."""
        left = min(per_minute, self.left + (now - self.at) * per_minute / 60)
        return replace(self, left=left - 1, at=now)


class Gate:
    """Lets through who shows a known key, as often as its limit allows (in each worker process). `refused` is told the
    status of each that is turned away."""

    def __init__(
        self,
        app: ASGIApp,
        path: Path,
        clock: Callable[[], float] = time.monotonic,
        refused: Callable[[int], None] = lambda status: None,
    ) -> None:
        self._app, self._path, self._clock, self._refused = app, path, clock, refused
        self._keys = read_keys(path)
        self._mark: int | None = None  # the first look reads it again: it may have changed since the line above
        self._seen, self._told = clock(), ""
        self._buckets: dict[str, Bucket] = {}

    async def __call__(self, scope: Scope, receive: Receive, send: Send) -> None:
        if scope["type"] == "http" and scope["path"] not in OPEN:
            try:
                self._admit(dict(scope["headers"]).get(b"authorization", b"").decode("latin-1"))
            except Problem as problem:
                self._refused(problem.status)
                await problem.response(scope.get("request_id", ""))(scope, receive, send)
                return
        await self._app(scope, receive, send)

    def _admit(self, header: str) -> None:
        self._look()
        kind, _, text = header.partition(" ")
        shown = _hash(text.strip())
        # Every key is compared, and each in constant time, so that time says nothing about how near a guess was.
        known = [key for key in self._keys if hmac.compare_digest(key.sha256, shown)]
        if kind.lower() != "bearer" or not known:
            raise Problem(
                401,
                "no-key",
                "this server wants a key that it knows: Authorization: Bearer KEY.",
                {"WWW-Authenticate": "Bearer"},
            )
        (key, *_) = known
        if key.per_minute is None:
            return
        now = self._clock()
        bucket = self._buckets.get(key.sha256, Bucket(key.per_minute, now)).taken(now, key.per_minute)
        if bucket.left < 0:
            wait = -bucket.left * 60 / key.per_minute
            raise Problem(
                429,
                "rate-limited",
                f"key {key.name!r} may make {key.per_minute} requests a minute; try again after Retry-After seconds.",
                {"Retry-After": str(max(1, math.ceil(wait)))},
            )
        self._buckets[key.sha256] = bucket

    def _look(self) -> None:
        """Read the file again where it has changed. One that cannot be read changes nothing, and is told of once: half
        a file, as editors leave for a moment, must not lock everybody out."""
        now = self._clock()
        if now - self._seen < _LOOK:
            return
        self._seen = now
        try:
            mark = self._path.stat().st_mtime_ns
            if mark != self._mark:
                self._keys, self._mark = read_keys(self._path), mark
        except (OSError, OptionError) as problem:
            if str(problem) != self._told:
                log.error("keys stay as they were, and ones that were removed since are still let in: %s", problem)
            self._told = str(problem)
        else:
            self._told = ""
