"""Connections: to a Ray cluster, with messages between processes in it, and over HTTP."""

from __future__ import annotations

import asyncio
import logging
import os
import re
import urllib.request
import warnings
from collections import defaultdict
from collections.abc import Iterator
from contextlib import contextmanager, nullcontext
from typing import Any

from netweight.errors import EndpointError, MissingExtra, OptionError

_STORE = 256 * 2**20  # bytes for objects of a cluster started here: what travels are names of files, never rows
_ADDRESS = re.compile(r"(ray://)?[^/:\s]+:\d+")


class Still(urllib.request.HTTPRedirectHandler):
    """Follows no redirect: urllib would send a key along to whatever host is named, and make a GET of a POST."""

    def redirect_request(self, *given: Any) -> None:
        return None


@contextmanager
def connected(address: str) -> Iterator[None]:
    """Ray, connected while the block runs. A connection that this process has already is used, and kept.

    Args:
        address: `local` starts a cluster of this machine, on loopback, which ends with the block; `auto` joins the one
            that runs here (or that RAY_ADDRESS names); HOST:PORT and ray://HOST:PORT join another.

    Raises OptionError for any other address, EndpointError where nobody answers, MissingExtra.
    """
    if address not in ("local", "auto") and not _ADDRESS.fullmatch(address):
        raise OptionError(f"a Ray cluster is local, auto, HOST:PORT or ray://HOST:PORT; given was {address!r}.")
    ray = module()
    if ray.is_initialized():
        yield
        return
    os.environ["RAY_USAGE_STATS_ENABLED"] = "0"  # Ray's telemetry is on by default
    here = {"include_dashboard": False, "object_store_memory": _STORE} if address == "local" else {}
    try:
        with _loopback() if address == "local" else nullcontext(), warnings.catch_warnings():
            warnings.simplefilter("ignore", FutureWarning)  # advice for those who use accelerators
            ray.init(address, log_to_driver=False, logging_level=logging.ERROR, **here)
    except (ConnectionError, RuntimeError, ValueError, TimeoutError) as problem:
        # What was half set up would count as a connection.
        ray.shutdown()
        first = str(problem).strip().splitlines()[0] if str(problem).strip() else type(problem).__name__
        raise EndpointError(
            f"no Ray cluster answers at {address} ({first}); start one with `ray start --head`, or use local."
        ) from None
    try:
        yield
    finally:
        ray.shutdown()


@contextmanager
def quiet(*loggers: str) -> Iterator[None]:
    """Only errors of these parts of Ray, which say at length what goes well."""
    logs = [logging.getLogger(name) for name in loggers]
    before = [log.level for log in logs]
    for log in logs:
        log.setLevel(logging.ERROR)
    try:
        yield
    finally:
        for log, level in zip(logs, before, strict=True):
            log.setLevel(level)


def cores() -> tuple[int, int]:
    """CPUs of the connected cluster: of its largest node, and of all."""
    each = [int(node.get("CPU", 0)) for node in machines()]
    return max(each, default=0), sum(each)


def machines() -> list[dict[str, float]]:
    """What each living node of the connected cluster has: CPU, GPU and more."""
    return [node["Resources"] for node in module().nodes() if node["Alive"]]


class Post:
    """The body of an actor: letters wait here for whoever takes them. It needs no torch, so its process is small.

    Letters hold references to what lies in Ray's store, so they are short.
    """

    def __init__(self) -> None:
        self._boxes: defaultdict[int, asyncio.Queue[object]] = defaultdict(asyncio.Queue)

    async def put(self, number: int, letter: object) -> None:
        """For the box of that number."""
        self._boxes[number].put_nowait(letter)

    async def take(self, number: int) -> object:
        """The next one from that box; waits for it."""
        return await self._boxes[number].get()


@contextmanager
def _loopback() -> Iterator[None]:
    """A cluster that starts now listens on loopback only. On Linux Ray has no option for that: it resolves 127.0.0.1
    to an address of the network, unless it takes this system for one that it supports on one machine alone."""
    from ray._private import ray_constants

    before = ray_constants.ENABLE_RAY_CLUSTER
    ray_constants.ENABLE_RAY_CLUSTER = False
    try:
        yield
    finally:
        ray_constants.ENABLE_RAY_CLUSTER = before


def module() -> Any:
    """Ray itself. Raises MissingExtra."""
    try:
        import ray
    except ImportError:
        raise MissingExtra("working on a Ray cluster", "ray") from None
    return ray
