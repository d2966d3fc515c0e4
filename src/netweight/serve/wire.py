"""HTTP as it comes in: what takes too long, is too large or is not HTTP ends here, before it is a request.

uvicorn waits for ever for the rest of a request and for clients that do not read, takes heads of any length, and tells
who does not speak HTTP so in plain text.
"""

from __future__ import annotations

import asyncio
import json
import logging
import secrets
from typing import Any

import httptools
from uvicorn.protocols.http.httptools_impl import STATUS_LINE, HttpToolsProtocol, RequestResponseCycle

from netweight.serve.problems import Problem

log = logging.getLogger("netweight.access")


class Wire(HttpToolsProtocol):
    """One connection. Seconds that a client may take for a head, a body, and to read an answer; bytes beside a body."""

    HEAD_SECONDS, BODY_SECONDS, READ_SECONDS = 10.0, 60.0, 30.0
    HEAD_BYTES, LOOK = 2**16, 1.0  # LOOK: seconds between looks; one timer a connection, not several a request

    def connection_made(self, transport: asyncio.Transport) -> None:  # type: ignore[override]
        """A client came; its first request is awaited."""
        super().connection_made(transport)
        self._in_head, self._head = False, 0
        self._due: float | None = self.loop.time() + self.HEAD_SECONDS
        self._stuck: float | None = None
        self._timer = self.loop.call_later(self.LOOK, self._look)

    def connection_lost(self, exc: Exception | None) -> None:
        """It went."""
        self._timer.cancel()
        super().connection_lost(exc)

    def data_received(self, data: bytes) -> None:
        """What is no body is counted after what came with its beginning: the parser would take any number of bytes."""
        self._unset_keepalive_if_required()
        self._head += len(data)
        waiting: list[bytes | memoryview] = [memoryview(data)]  # the last is next; hundreds may come at once
        while waiting:
            part = waiting.pop()
            try:
                self.parser.feed_data(part)
            except httptools.HttpParserUpgrade as found:
                waiting += self._stay(part[found.args[0] :])
            except httptools.HttpParserError:
                self.send_400_response("it cannot be parsed.")
                break
        if self._head > self.HEAD_BYTES and not self.transport.is_closing():
            self._refuse(Problem(431, "head-too-large", f"head and trailers may have {self.HEAD_BYTES:,} bytes."))

    def on_message_begin(self) -> None:
        """The first byte of a request."""
        super().on_message_begin()
        self._in_head, self._head, self._due = True, 0, self.loop.time() + self.HEAD_SECONDS

    def on_headers_complete(self) -> None:
        """Its application starts, and the body is awaited."""
        if not self.parser.should_upgrade():  # else `_stay` reads it again
            self._in_head, self._due = False, self.loop.time() + self.BODY_SECONDS
            super().on_headers_complete()
            self.headers = []  # the application has the others: trailers, which come behind a body, are nobody's

    def on_body(self, body: bytes) -> None:
        """Some of it; bodies have a limit of their own."""
        self._head = 0
        super().on_body(body)

    def on_message_complete(self) -> None:
        """Nothing is awaited."""
        if not self.parser.should_upgrade():
            self._due, self._head = None, 0
            super().on_message_complete()

    def pause_writing(self) -> None:
        """The client does not read."""
        self._stuck = self.loop.time() + self.READ_SECONDS
        super().pause_writing()

    def resume_writing(self) -> None:
        """It does."""
        self._stuck = None
        super().resume_writing()

    def timeout_keep_alive_handler(self) -> None:
        """Closing waits until the last answer is read, which may be never."""
        if self.transport.get_write_buffer_size():
            self.transport.abort()
        super().timeout_keep_alive_handler()

    def send_400_response(self, msg: str) -> None:
        """In the form of all problems."""
        self._refuse(Problem(400, "bad-http", f"this is not HTTP/1.1: {msg}"))

    def _start_asgi_task(self, cycle: RequestResponseCycle, app: Any) -> None:
        """For a moment a connection is closed and nobody was told: what is written then would be an error."""

        async def careful(scope: Any, receive: Any, send: Any) -> None:
            async def sent(message: Any) -> None:
                cycle.disconnected |= self.transport.is_closing()
                await send(message)

            await app(scope, receive, sent)

        super()._start_asgi_task(cycle, careful)

    def _stay(self, rest: bytes | memoryview) -> list[bytes | memoryview]:
        """A client would rather speak another protocol, as Java's does with each first request. Its parser skips the
        body of such a request, so the request is read again as one that does not ask: its head, before the rest."""
        if (method := self.parser.get_method()) == b"CONNECT":
            self.send_400_response("this is no proxy.")
            return []
        kept = [b"%s: %s\r\n" % header for header in self.headers if header[0] not in (b"connection", b"upgrade")]
        self.parser = httptools.HttpRequestParser(self)
        return [rest, b"".join([method, b" ", self.url, b" HTTP/1.1\r\n", *kept, b"\r\n"])]

    def _look(self) -> None:
        now = self.loop.time()
        self._timer = self.loop.call_later(self.LOOK, self._look)
        late = self._due is not None and now > self._due and not self.transport.is_closing()
        if self._stuck is not None and now > self._stuck:
            self.transport.abort()
        elif late and self.flow.read_paused:  # it is the server that does not read
            self._due = now + self.BODY_SECONDS
        elif late and (self._in_head or self._open()):
            self._refuse(Problem(408, "too-slow", "the request did not arrive in time; send it in one go."))
        elif late:  # nothing ever came, or the rest of what was answered already
            self.transport.close()

    def _open(self) -> bool:
        """Whether a request has no whole answer."""
        return self.cycle is not None and not self.cycle.response_complete

    def _refuse(self, problem: Problem) -> None:
        """Say so, where that cannot be taken for the answer of an earlier request, and close."""
        in_body = not self._in_head and self._open() and self.cycle.more_body and not self.cycle.response_started
        if in_body or not self._open():
            response = problem.response(number := secrets.token_hex(8))
            log.info(json.dumps({"id": number, "status": problem.status, "code": problem.code}))
            head = [*response.raw_headers, (b"x-request-id", number.encode()), (b"connection", b"close")]
            lines = [b"%s: %s\r\n" % header for header in head]
            self.transport.write(b"".join([STATUS_LINE[problem.status], *lines, b"\r\n", bytes(response.body)]))
        self.transport.close()
