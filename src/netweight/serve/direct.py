"""Predictions, answered before the framework's routing and dependency injection, which cost more than a static tier."""

from __future__ import annotations

import re
from collections.abc import Awaitable, Callable

from starlette.requests import Request
from starlette.responses import Response
from starlette.types import ASGIApp, Receive, Scope, Send

from netweight.serve.problems import Problem

_PATH = re.compile(r"/v1/models/([^/]+)/predict")

Predict = Callable[[str, Request], Awaitable[Response]]


class Direct:
    """Middleware: gives POSTs to `/v1/models/{name}/predict` to `predict`, and everything else to `app`."""

    def __init__(self, app: ASGIApp, predict: Predict) -> None:
        self._app, self._predict = app, predict

    async def __call__(self, scope: Scope, receive: Receive, send: Send) -> None:
        found = _PATH.fullmatch(scope["path"]) if scope["type"] == "http" and scope["method"] == "POST" else None
        if found is None:
            await self._app(scope, receive, send)
            return
        try:
            response = await self._predict(found[1], Request(scope, receive))
        except Problem as problem:
            response = problem.response(scope.get("request_id", ""))
        await response(scope, receive, send)
