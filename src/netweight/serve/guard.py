"""What every response carries, and a line in the log for every request."""

from __future__ import annotations

import json
import logging
import re
import secrets
import time

from starlette.types import ASGIApp, Message, Receive, Scope, Send

from netweight.serve.crowd import Crowd
from netweight.serve.problems import full

log = logging.getLogger("netweight.access")

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
    JSON line without a word of what customers wrote. Predictions that would wait too long are refused here."""

    def __init__(self, app: ASGIApp, patience: float) -> None:
        self._app, self._crowd = app, Crowd(patience)

    async def __call__(self, scope: Scope, receive: Receive, send: Send) -> None:
        if scope["type"] != "http":
            await self._app(scope, receive, send)
            return
        began = time.perf_counter()
        given = next((v.decode("latin-1") for k, v in scope["headers"] if k == b"x-request-id"), "")
        scope["request_id"] = given if _ID.fullmatch(given) else secrets.token_hex(8)
        status = 500

        async def sent(message: Message) -> None:
            nonlocal status
            if message["type"] == "http.response.start":
                status = message["status"]
                said = list(message.get("headers", ()))
                own = {name for name, _ in said}  # a page says itself what it needs
                safe = [header for header in _HEADERS if header[0] not in own]
                message["headers"] = [*said, *safe, (b"x-request-id", scope["request_id"].encode())]
            await send(message)

        counted = scope["method"] == "POST"
        try:
            if counted and self._crowd.full:
                await full(self._crowd.wait).response(scope["request_id"])(scope, receive, sent)
                counted = False
                return
            if counted:
                self._crowd.enter()
            await self._app(scope, receive, sent)
        finally:
            if counted:
                self._crowd.leave()
            if log.isEnabledFor(logging.INFO):
                took = round(1000 * (time.perf_counter() - began), 2)
                line = {"id": scope["request_id"], "method": scope["method"], "path": scope["path"]}
                log.info(json.dumps(line | {"status": status, "ms": took}))
