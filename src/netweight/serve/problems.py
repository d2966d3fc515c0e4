"""What a client is told when it does not get an answer: RFC 9457 problem details with a code and what to do."""

from __future__ import annotations

import json
import math
from collections.abc import Mapping

from starlette.responses import Response

MEDIA = "application/problem+json"


class Problem(Exception):
    """A request that is not answered.

    Args:
        status: of HTTP.
        code: a short name that programs may compare.
        detail: what came, what is allowed, what to do.
        headers: such as Retry-After.
    """

    def __init__(self, status: int, code: str, detail: str, headers: Mapping[str, str] | None = None) -> None:
        super().__init__(detail)
        self.status, self.code, self.detail, self.headers = status, code, detail, dict(headers or {})

    def response(self, request_id: str = "") -> Response:
        """As bytes of a response."""
        said = {"type": "about:blank", "title": self.code.replace("-", " "), "status": self.status, "code": self.code}
        said |= {"detail": self.detail} | ({"request_id": request_id} if request_id else {})
        return Response(json.dumps(said, ensure_ascii=True), self.status, self.headers, MEDIA)


def full(seconds: float) -> Problem:
    """The queue has no room; `seconds` until it should have."""
    return Problem(
        429,
        "queue-full",
        "more requests came than are answered in time; try again after Retry-After seconds, or send fewer.",
        {"Retry-After": str(max(1, math.ceil(seconds)))},
    )


def gone() -> Problem:
    """Nobody is there to read this; the log and the metrics show it."""
    return Problem(499, "client-gone", "the client closed the connection before it was answered.")


def late() -> Problem:
    """The deadline passed while the request waited."""
    return Problem(
        504, "deadline-passed", "the request was not answered before its deadline; try again, or allow more time."
    )


def closing() -> Problem:
    """The server is about to end."""
    return Problem(503, "shutting-down", "this server is shutting down; try again.", {"Retry-After": "1"})
