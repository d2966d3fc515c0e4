"""`netweight serve` on the nodes of a Ray cluster.

Ray Serve runs the application of the plain server in replicas, as many as the requests inside them ask for, behind a
proxy that listens on HTTP. A replica whose node dies is started again elsewhere.
"""

from __future__ import annotations

import ipaddress
import signal
import threading
from collections.abc import Awaitable, Callable, Iterator, MutableMapping
from contextlib import contextmanager
from dataclasses import dataclass, replace
from typing import Any

from netweight.connect import connected, cores, quiet
from netweight.errors import EndpointError, MissingExtra, OptionError
from netweight.serve.options import Options
from netweight.serve.server import built, checked

_NAME = "netweight"
_INSIDE = 128  # requests that a proxy hands to one replica; those that would wait too long are refused in there
_WAITING = 1024  # requests that wait in a proxy for any replica, before it says 503
_DRAIN = 30.0  # seconds that requests may take when a replica ends
_PROBE = 2.0  # seconds between questions whether a replica is ready
_QUIET = {"log_level": "WARNING", "enable_access_log": False}  # the application writes a line for each request

_Message = MutableMapping[str, Any]
_Receive = Callable[[], Awaitable[_Message]]
_Send = Callable[[_Message], Awaitable[None]]


@dataclass(frozen=True)
class Scale:
    """How many replicas: enough that each has about `target` requests inside (in its queue or being answered).

    Between `least` and `most` of them (0: as many as the cluster's CPUs hold); more after `up` seconds, fewer after
    `down` seconds in which that was so.
    """

    least: int = 1
    most: int = 0
    target: float = 8.0
    up: float = 5.0
    down: float = 300.0

    def __post_init__(self) -> None:
        if self.least < 1 or (self.most and self.most < self.least):
            raise OptionError(f"{self.least} to {self.most} replicas cannot be; at least 1, and at most as many.")
        if min(self.target, self.up, self.down) <= 0:
            raise OptionError(f"target and seconds of scaling are above 0, not {self.target}, {self.up}, {self.down}.")


def serve(
    options: Options,
    address: str = "auto",
    scale: Scale | None = None,
    started: Callable[[str], None] = lambda url: None,
) -> None:
    """Serve artifacts on a Ray cluster until SIGTERM or SIGINT; requests that run by then are answered.

    Every node must see the folders (and the keys, and the files of TLS) under these paths. `threads` is what an engine
    takes, and the CPUs that a replica reserves; 0 is one. `started` is told the URL. Raises as `deployed` and
    `connected` do.
    """
    end = threading.Event()
    with connected(address), deployed(options, scale or Scale()) as url:
        before = {sign: signal.signal(sign, lambda *_: end.set()) for sign in (signal.SIGTERM, signal.SIGINT)}
        started(url)
        try:
            end.wait()
        finally:
            for sign, handler in before.items():
                signal.signal(sign, handler)


@contextmanager
def deployed(options: Options, scale: Scale) -> Iterator[str]:
    """The application on the connected cluster; gives its URL, and ends with the block.

    Raises ArtifactError, CorruptArtifact, MissingExtra; OptionError, also where the cluster serves something already;
    EndpointError where no replica starts.
    """
    try:
        from ray import serve as ray_serve
    except ImportError:
        raise MissingExtra("serving on a Ray cluster", "ray") from None
    if options.workers != 1:
        raise OptionError("--workers does not apply on a Ray cluster; --min-replicas and --max-replicas do.")
    if options.log is not None or options.candidates:
        raise OptionError("--log and --candidate count on one machine; they do not apply on a Ray cluster.")
    options = replace(checked(options), threads=options.threads or 1)
    largest, everywhere = cores()
    if options.threads > largest > 0:
        raise OptionError(
            f"no node of this cluster has {options.threads} CPUs for --threads; the largest has {largest}."
        )
    if there := ", ".join(ray_serve.status().applications):
        raise OptionError(f"this cluster serves already: {there}. End that first, or use another cluster.")
    try:
        _start(options)
        most = scale.most or max(scale.least, everywhere // options.threads)
        try:
            with quiet("ray.serve"):
                ray_serve.run(_application(options, replace(scale, most=most)), name=_NAME, route_prefix="/")
        except RuntimeError as problem:
            why = [one.message for one in ray_serve.status().applications[_NAME].deployments.values()]
            raise EndpointError(f"no replica starts: {problem} {' '.join(why)}") from None
        except AttributeError as problem:
            if "'label'" not in str(problem):
                raise
            # github.com/ray-project/ray/issues/64710
            raise EndpointError("this Ray Serve does not work with this protobuf; pip install 'protobuf<7'") from None
        yield f"http{'s' if options.tls else ''}://{options.host}:{options.port}"
    finally:
        if ray_serve.status().applications.keys() - {_NAME}:  # of others, who came since
            ray_serve.delete(_NAME)
        else:
            ray_serve.shutdown()


def _start(options: Options) -> None:
    """Proxies that listen. Nobody but this machine reaches a loopback address, so there one of them is enough."""
    from ray import serve as ray_serve
    from ray.serve.config import HTTPOptions

    certificate, key = options.tls or (None, None)
    http = HTTPOptions(
        host=options.host, port=options.port, keep_alive_timeout_s=75, ssl_keyfile=key, ssl_certfile=certificate
    )
    try:
        with quiet("ray.serve"):
            ray_serve.start("HeadOnly" if _loopback(options.host) else "EveryNode", http, logging_config=_QUIET)
    except RuntimeError as problem:
        raise EndpointError(f"Ray Serve does not start on {options.host}:{options.port}: {problem}") from None


def _application(options: Options, scale: Scale) -> Any:
    """What Ray Serve runs."""
    from ray import serve as ray_serve

    def build() -> Any:
        """Called in a replica."""
        app = built(options)
        app.add_middleware(Unnamed)
        return app

    return ray_serve.deployment(
        ray_serve.ingress(build)(Replica),
        name=_NAME,
        ray_actor_options={"num_cpus": options.threads},
        max_ongoing_requests=_INSIDE,
        max_queued_requests=_WAITING,
        autoscaling_config={
            "min_replicas": scale.least,
            "max_replicas": scale.most,
            "target_ongoing_requests": scale.target,
            "upscale_delay_s": scale.up,
            "downscale_delay_s": scale.down,
        },
        health_check_period_s=_PROBE,
        logging_config=_QUIET,
        graceful_shutdown_timeout_s=_DRAIN,
    ).bind()


class Replica:
    """What Ray Serve asks beside requests; it adds `app`."""

    app: Any

    def check_health(self) -> None:
        """As GET /readyz: raises where no model is loaded."""
        if not self.app.state.models.known:
            raise RuntimeError("no model is loaded")


class Unnamed:
    """The application without its X-Request-Id: the proxy adds that header itself, the same one, which the
    application has read from the request."""

    def __init__(self, app: Any) -> None:
        self._app = app

    async def __call__(self, scope: _Message, receive: _Receive, send: _Send) -> None:
        async def sent(message: _Message) -> None:
            if message["type"] == "http.response.start":
                message["headers"] = [pair for pair in message["headers"] if pair[0] != b"x-request-id"]
            await send(message)

        await self._app(scope, receive, sent)


def _loopback(host: str) -> bool:
    try:
        return ipaddress.ip_address(host).is_loopback
    except ValueError:
        return host == "localhost"
