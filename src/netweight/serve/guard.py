"""What every response carries, and a line in the log for every request."""

from __future__ import annotations

import asyncio
import json
import logging
import re
import secrets
import time
from collections.abc import Callable

from starlette.types import ASGIApp, Message, Receive, Scope, Send

from netweight.serve.crowd import Crowd
from netweight.serve.problems import Problem, full

log = logging.getLogger("netweight.access")

_SHOWN = 256  # characters of a path that go into the log
_ID = re.compile(r"[A-Za-z0-9._-]{1,64}")
_HEADERS = [
    (b"x-content-type-options", b"nosniff"),
    (b"x-frame-options", b"DENY"),
    (b"referrer-policy", b"no-referrer"),
    (b"cache-control", b"no-store"),
    (b"content-security-policy", b"default-src 'none'; connect-src 'self'; script-src 'self'; style-src 'self'"),
]


class Guard:
    """Gives each request an id (the client's X-Request-Id where it has a harmless one), adds safe headers, and logs one
    JSON line without a word of what customers wrote. Predictions that would wait too long are refused here. Only those
    count that wait for this server: not those whose body is still to come, or whose answer is still to be read.
    `refused` is called for each that is turned away."""

    def __init__(self, app: ASGIApp, patience: Callable[[], float], refused: Callable[[], None] = lambda: None) -> None:
        self._app, self._crowd, self._refused = app, Crowd(patience), refused

    async def __call__(self, scope: Scope, receive: Receive, send: Send) -> None:
        if scope["type"] != "http":
            await self._app(scope, receive, send)
            return
        began = time.perf_counter()
        given = next((v.decode("latin-1") for k, v in scope["headers"] if k == b"x-request-id"), "")
        scope["request_id"] = given if _ID.fullmatch(given) else secrets.token_hex(8)
        status = 0
        counted, inside = scope["method"] == "POST", False

        async def sent(message: Message) -> None:
            nonlocal status, inside
            if message["type"] == "http.response.start":
                if inside:  # from here on it waits for its client again
                    inside = False
                    self._crowd.leave()
                status = message["status"]
                said = list(message.get("headers", ()))
                own = {name for name, _ in said}  # a page says itself what it needs
                safe = [header for header in _HEADERS if header[0] not in own]
                message["headers"] = [*said, *safe, (b"x-request-id", scope["request_id"].encode())]
            await send(message)

        async def received() -> Message:
            nonlocal counted, inside
            message = await receive()
            if counted and message["type"] == "http.request" and not message.get("more_body", False):
                counted, inside = False, True
                self._crowd.enter()
            return message

        try:
            if counted and self._crowd.full:
                self._refused()
                await full(self._crowd.wait).response(scope["request_id"])(scope, receive, sent)
            else:
                await self._app(scope, received, sent)
        except asyncio.CancelledError:  # of Ray Serve, whose client has gone
            status = status or 499
            raise
        except Exception:
            log.exception("request %s failed", scope["request_id"])
            if status:
                raise
            problem = Problem(500, "internal-error", "this is a fault of the server; its log says more under this id.")
            await problem.response(scope["request_id"])(scope, receive, sent)
        finally:
            if inside:
                self._crowd.leave()
            if log.isEnabledFor(logging.INFO):
                took = round(1000 * (time.perf_counter() - began), 2)
                line = {"id": scope["request_id"], "method": scope["method"], "path": scope["path"][:_SHOWN]}
                log.info(json.dumps(line | {"status": status or 500, "ms": took}))
