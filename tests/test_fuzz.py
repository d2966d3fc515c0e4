"""Requests that are odd, broken or slow meet a clean refusal: never a 5xx, a crash, or a connection that stays."""

from __future__ import annotations

import asyncio
import contextlib
import json
import socket
import sys
import threading
import time
from collections import Counter
from collections.abc import Iterator
from pathlib import Path
from typing import Any

import httpx
import pytest
import schemathesis
import uvicorn
from starlette.responses import PlainTextResponse
from uvicorn.server import ServerState

from netweight.serve import body as bodies
from netweight.serve.app import application
from netweight.serve.hosted import Models
from netweight.serve.keys import add_key
from netweight.serve.metrics import Metrics
from netweight.serve.wire import Wire
from test_serve import TEXTS, Server

sys.path.append(str(Path(__file__).resolve().parents[1] / "benchmarks"))
from fuzz import described  # type: ignore[import-not-found]
from mutate import broken, fault, mutants  # type: ignore[import-not-found]


def test_mutated_requests_are_answered_or_refused(made: Path) -> None:
    async def work(client: httpx.AsyncClient) -> Counter[int]:
        seen: Counter[int] = Counter()
        for one in mutants(300, seed=1):
            content: Any = _chunked(one.body) if one.chunks else one.body
            place, headers = one.path.replace("{}", "shop"), list(one.headers)
            met = await client.request(one.method, place, content=content, headers=headers)
            wrong = fault(met.status_code, met.headers.get("content-type", ""), met.content, one.method)
            assert not wrong, f"{one.kind}: {wrong}: {one.method} {place[:80]} {one.headers} {one.body[:200]!r}"
            assert met.headers["x-request-id"]
            seen[met.status_code] += 1
        return seen

    seen = Server(made).run(work)
    assert {200, 400, 404, 405, 413, 415, 422} <= set(seen), "the mutants reach every refusal"
    assert [one.body for one in mutants(50, 3)] == [one.body for one in mutants(50, 3)]


async def _chunked(body: bytes) -> Any:
    for at in range(0, len(body), 1000):
        yield body[at : at + 1000]


def test_the_description_is_true(made: Path) -> None:
    assert not described(schemathesis.openapi.from_asgi("/openapi.json", Server(made).app), "shop", 25)


def test_the_description_shows_the_gate(made: Path, tmp_path: Path) -> None:
    server, key = Server(made), add_key(tmp_path / "keys.jsonl", "fuzz")
    app = application(server.models, Metrics(), tmp_path / "keys.jsonl")
    allowed = {"Authorization": f"Bearer {key}"}
    schema = schemathesis.openapi.from_asgi("/openapi.json", app, headers=allowed)
    for found in schema.get_all_operations():
        operation = found.ok()
        assert bool(operation.definition.raw.get("security")) == (operation.path not in ("/healthz", "/readyz"))
        case = operation.Case(path_parameters={"name": "shop"}, body={"texts": ["a"]}, media_type="application/json")
        case.call_and_validate(headers=allowed)  # also without its key, and with a wrong one


def test_a_fault_of_the_server_is_a_problem_with_an_id(made: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    def fails(*_: object) -> None:
        raise KeyError("what a customer wrote")

    monkeypatch.setattr(Metrics, "said", fails)
    response = Server(made).post({"texts": ["a"]})
    assert fault(response.status_code, response.headers["content-type"], response.content) == "status 500"
    assert response.json()["code"] == "internal-error"
    assert response.json()["request_id"] == response.headers["x-request-id"]
    assert "customer" not in response.text


# --- on a socket ---


class Quick(Wire):
    """With less patience."""

    HEAD_SECONDS, BODY_SECONDS, READ_SECONDS, LOOK = 0.4, 0.5, 0.5, 0.05


class Listening:
    """A server in a thread of this process."""

    def __init__(self, folder: Path, patience: float = 5.0) -> None:
        metrics = Metrics()
        models = Models(1, patience, metrics.batch)
        models.load(folder, "shop")
        app = application(models, metrics)
        config = uvicorn.Config(
            app, port=0, http=Quick, ws="none", log_config=None, access_log=False, timeout_keep_alive=0.3
        )
        self.server = uvicorn.Server(config)
        self.thread = threading.Thread(target=self.server.run, daemon=True)
        self.thread.start()
        while not self.server.started:
            time.sleep(0.01)
        self.place = self.server.servers[0].sockets[0].getsockname()

    def talk(self, *parts: bytes, pause: float = 0.0) -> bytes:
        """What comes back until the server closes."""
        said = b""
        with socket.create_connection(self.place, timeout=20) as one:
            with contextlib.suppress(ConnectionResetError, BrokenPipeError):
                for part in parts:
                    one.sendall(part)
                    time.sleep(pause)
            with contextlib.suppress(ConnectionResetError):
                while part := one.recv(2**16):
                    said += part
        return said

    def ask(self) -> int:
        return httpx.post("http://{}:{}/v1/models/shop/predict".format(*self.place), json={"texts": ["a"]}).status_code

    def quiet(self) -> None:
        """All connections end."""
        end = time.monotonic() + 10
        while self.server.server_state.connections:
            assert time.monotonic() < end, "a connection stays"
            time.sleep(0.02)


@pytest.fixture
def listening(made: Path) -> Iterator[Listening]:
    one = Listening(made, patience=0.0005)
    yield one
    one.server.should_exit = True
    one.thread.join(20)
    assert not one.thread.is_alive(), "nobody keeps it from ending"


START = b"POST /v1/models/shop/predict HTTP/1.1\r\nHost: fuzz\r\nContent-Type: application/json\r\n"
HALF = START + b'Content-Length: 100\r\n\r\n{"texts":'


def problem(said: bytes) -> tuple[int, str]:
    head, _, body = said.partition(b"\r\n\r\n")
    assert b"content-type: application/problem+json" in head.lower(), said
    assert b"connection: close" in head.lower()
    assert b"x-request-id: " in head.lower()
    return int(head[9:12]), str(json.loads(body)["code"])


def test_slow_and_silent_clients_are_let_go(listening: Listening) -> None:
    assert problem(listening.talk(b"POST /v1/mod")) == (408, "too-slow")
    said = listening.talk(START, *[b"X-More: 1\r\n"] * 60, pause=0.05)  # slowloris
    assert said == b"" or problem(said) == (408, "too-slow")
    assert problem(listening.talk(HALF)) == (408, "too-slow")
    assert problem(listening.talk(START + b"Transfer-Encoding: chunked\r\n\r\n5\r\n{")) == (408, "too-slow")
    assert listening.talk() == b"", "who says nothing is told nothing"
    assert listening.ask() == 200
    listening.quiet()


def test_who_goes_on_after_a_refusal_is_cut_off(listening: Listening) -> None:
    said = listening.talk(START + b"Content-Encoding: gzip\r\nContent-Length: 9999\r\n\r\n", *[b"x"] * 40, pause=0.05)
    assert said.count(b"HTTP/1.1") == 1
    assert b" 415 " in said[:20]


def test_half_requests_are_not_counted_as_waiting(listening: Listening) -> None:
    async def work() -> list[int]:
        crowd = [await asyncio.open_connection(*listening.place) for _ in range(40)]
        for _, writer in crowd:
            writer.write(HALF)
            await writer.drain()
        found = [await asyncio.to_thread(listening.ask) for _ in range(8)]
        for _, writer in crowd:
            writer.close()
        return found

    assert asyncio.run(work()) == [200] * 8


def test_a_client_that_never_reads_is_let_go(listening: Listening) -> None:
    body = json.dumps({"texts": TEXTS * 25, "scores": True}).encode()
    asked = START + b"Content-Length: %d\r\n\r\n" % len(body) + body
    with socket.socket() as one:
        one.setsockopt(socket.SOL_SOCKET, socket.SO_RCVBUF, 4096)
        one.connect(listening.place)
        one.settimeout(0.2)
        end = time.monotonic() + 20
        try:
            while time.monotonic() < end:
                try:
                    one.sendall(asked)
                except TimeoutError:
                    # It may have filled the queue: then others are told so, at once.
                    assert listening.ask() in (200, 429)
        except (ConnectionResetError, BrokenPipeError):
            pass
        assert time.monotonic() < end, "it was not let go"
    while (said := listening.ask()) == 429 and time.monotonic() < end:
        time.sleep(0.1)
    assert said == 200


def test_what_is_not_http_is_refused_as_a_problem(listening: Listening) -> None:
    for kind, data in broken("shop"):
        said = listening.talk(data)
        head, _, rest = said.partition(b"\r\n\r\n")
        if not said:  # reset, while it was still sending
            assert len(data) > 200_000 or kind == "pipeline", (kind, data[:80])
            continue
        if head.startswith(b"HTTP/1.1 100"):
            head, _, rest = rest.partition(b"\r\n\r\n")
        assert head[9:12] in (b"200", b"400", b"404", b"405", b"408", b"431"), (kind, data[:80], said[:300])
        assert head[9:12] == b"200" or b"application/problem+json" in head, (kind, data[:80], said[:300])
    assert listening.ask() == 200
    listening.quiet()


def test_a_wish_for_another_protocol_is_passed_over(listening: Listening) -> None:
    body = b'{"texts":["a"]}'
    wish = b"Connection: Upgrade, HTTP2-Settings\r\nUpgrade: h2c\r\nHTTP2-Settings: AAMAAABk\r\n"
    whole = START + wish + b"Content-Length: %d\r\n\r\n" % len(body) + body
    for parts in ([whole], [whole[:-9], whole[-9:]], [whole[:200], whole[200:]]):
        said = listening.talk(*parts, pause=0.05)
        assert said.startswith(b"HTTP/1.1 200"), said
    assert listening.talk(b"CONNECT else.where:443 HTTP/1.1\r\n\r\n").startswith(b"HTTP/1.1 400")


class Kept(asyncio.Transport):
    """What is written is kept, and nothing is read."""

    def __init__(self) -> None:
        super().__init__()
        self.said, self.closed = b"", False

    def write(self, data: Any) -> None:
        self.said += data

    def is_closing(self) -> bool:
        return self.closed

    def close(self) -> None:
        self.closed = True

    def pause_reading(self) -> None: ...
    def resume_reading(self) -> None: ...


def test_many_wishes_at_once_are_answered() -> None:
    """They come in one read, which is parsed as deep as one of them is."""
    wish = b"GET / HTTP/1.1\r\nHost: fuzz\r\nConnection: upgrade\r\nUpgrade: h2c\r\n\r\n"

    async def work() -> bytes:
        config = uvicorn.Config(PlainTextResponse("yes"), ws="none", log_config=None, access_log=False)
        state, transport = ServerState(), Kept()
        wire = Wire(config, state, {}, asyncio.get_running_loop())
        wire.connection_made(transport)
        wire.data_received(wish * 600)
        while state.tasks:  # each starts the next
            await asyncio.gather(*state.tasks)
        wire.connection_lost(None)
        return transport.said

    assert asyncio.run(work()).count(b"HTTP/1.1 200 OK") == 600


def test_trailers_are_nobodys_headers_and_as_long_as_a_head_at_most() -> None:
    """The parser tells of them as of headers, and keeps one that has no end."""
    start = b"POST / HTTP/1.1\r\nHost: fuzz\r\nTransfer-Encoding: chunked\r\n\r\n"
    seen: list[Any] = []

    async def app(scope: Any, receive: Any, send: Any) -> None:
        while (await receive()).get("more_body"):
            pass
        seen.append(scope["headers"])
        await PlainTextResponse("yes")(scope, receive, send)

    async def fed(*parts: bytes) -> tuple[int, bytes]:
        """Bytes that were taken, and what came back."""
        config = uvicorn.Config(app, ws="none", log_config=None, access_log=False)
        state, transport, taken = ServerState(), Kept(), 0
        wire = Wire(config, state, {}, asyncio.get_running_loop())
        wire.connection_made(transport)
        for part in parts:
            if not transport.closed:
                wire.data_received(part)
                taken += len(part)
        if not transport.closed:
            await asyncio.gather(*state.tasks)
        wire.connection_lost(None)
        await asyncio.gather(*state.tasks)
        return taken, transport.said

    at_once = start + b"1\r\nx\r\n0\r\n" + b"a: b\r\n" * 5000 + b"Authorization: Bearer x\r\n\r\n"
    assert asyncio.run(fed(at_once))[1].startswith(b"HTTP/1.1 200 OK")
    assert seen == [[(b"host", b"fuzz"), (b"transfer-encoding", b"chunked")]]
    for part in (b"b" * 10_000, b"b\r\na: " * 1000):
        taken, said = asyncio.run(fed(start + b"1\r\nx\r\n", b"0\r\na: ", *[part] * 1000))
        assert problem(said) == (431, "head-too-large")
        assert taken < 2**16 + 20_000
    whole = [b"3e8\r\n" + b"x" * 1000 + b"\r\n"] * 1000
    assert asyncio.run(fed(start, *whole, b"0\r\n\r\n"))[1].startswith(b"HTTP/1.1 200 OK"), "bodies may be longer"


def test_clients_that_go_in_the_middle_are_no_fault_of_the_server(
    listening: Listening, caplog: pytest.LogCaptureFixture
) -> None:
    for _ in range(3):
        with socket.create_connection(listening.place) as one:
            one.sendall(HALF)
    listening.quiet()
    assert listening.ask() == 200
    assert not [line for line in caplog.records if line.levelname == "ERROR"]


def test_bodies_that_arrive_share_a_limit(listening: Listening, monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr(bodies, "MOST_HELD", 1000)
    with socket.create_connection(listening.place) as first:
        first.sendall(START + b"Content-Length: 900\r\n\r\n" + b" " * 800)
        time.sleep(0.1)
        said = listening.talk(START + b"Content-Length: 900\r\n\r\n" + b" " * 800)
        status, code = int(said[9:12]), json.loads(said.partition(b"\r\n\r\n")[2])["code"]
    assert (status, code) == (429, "queue-full")
    time.sleep(0.2)
    assert listening.ask() == 200
