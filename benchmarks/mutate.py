"""Requests that are wrong in one way or another, from a seed: for `fuzz.py` and the tests.

Each begins as a good question. Bodies are mutated as bytes, as JSON text, and as values; some go to odd places,
with odd methods and headers. `broken` are whole messages that no client library would send.
"""

from __future__ import annotations

import gzip
import json
import random
from collections.abc import Callable, Iterator
from dataclasses import dataclass
from typing import Any

JSON = ("Content-Type", "application/json")
WORDS = ("zip", "broke", "after", "a", "week", "fits", "well", "küche", "好", "🙂", "\x00", "\u202e", "\ufffd")
TOKENS = (
    b"NaN",
    b"Infinity",
    b"-Infinity",
    b"nul",
    b"undefined",
    b"1e999",
    b"-0",
    b"9" * 400,
    b"9" * 5000,
    b"0x1",
    b"01",
)
ODD = (None, True, -1, 0, 1.5, 10**30, "", [], {}, [[]], [None], ["a", 1], {"a": 1}, "\x00", [["a"]], [["a", "b", "c"]])
TYPES = (
    "text/plain",
    "application/xml",
    "multipart/form-data; boundary=x",
    "application/json; charset=utf-16",
    "?",
    "a" * 999,
)
METHODS = ("GET", "HEAD", "PUT", "DELETE", "OPTIONS", "PATCH", "TRACE")
PATHS = (
    "/v1/models/{}/predict/",
    "/v1/models/{}/predict?x=%00",
    "/v1//models/{}/predict",
    "/v1/models/%2e%2e/predict",
    "/v1/models/%ff%00/predict",
    "/v1/models/{}%2fpredict",
    "/",
    "/openapi.json/..",
    "/v1/models/" + "a" * 9000,
)


@dataclass(frozen=True)
class Mutant:
    """A request, and in which way it is odd. `chunks` makes it a chunked one."""

    kind: str
    body: bytes
    headers: tuple[tuple[str, str], ...] = (JSON,)
    method: str = "POST"
    path: str = "/v1/models/{}/predict"
    chunks: bool = False

    def raw(self, model: str) -> bytes:
        """The bytes of the whole message."""
        head = [f"{self.method} {self.path.replace('{}', model)} HTTP/1.1", "Host: fuzz"]
        head += [f"{name}: {value}" for name, value in self.headers]
        if not self.chunks:
            head.append(f"Content-Length: {len(self.body)}")
            return "\r\n".join([*head, "", ""]).encode() + self.body
        parts = [self.body[i : i + 7000] for i in range(0, len(self.body), 7000)]
        framed = b"".join(b"%x\r\n%s\r\n" % (len(part), part) for part in parts)
        return "\r\n".join([*head, "Transfer-Encoding: chunked", "", ""]).encode() + framed + b"0\r\n\r\n"


Make = Callable[[random.Random], Mutant]


def good(rng: random.Random) -> dict[str, Any]:
    """A question that is answered."""

    def text() -> str:
        return " ".join(rng.choices(WORDS, k=rng.randint(0, 12)))

    rows = rng.choice((1, 1, 1, 2, 5, 40))
    asked: dict[str, Any] = {"texts": [text() for _ in range(rows)]}
    if rng.random() < 0.3:
        asked["scores"] = rng.random() < 0.5
    if rng.random() < 0.2:
        asked["deadline_ms"] = rng.choice((1000, 30_000, 600_000))
    return asked


def text_of(rng: random.Random) -> bytes:
    """Its JSON."""
    return json.dumps(good(rng), ensure_ascii=rng.random() < 0.5).encode()


def as_it_is(rng: random.Random) -> Mutant:
    """Nothing is wrong."""
    return Mutant("good", text_of(rng), chunks=rng.random() < 0.3)


def bytes_changed(rng: random.Random) -> Mutant:
    """Some bytes turned over, cut out, doubled or put in."""
    body = bytearray(text_of(rng))
    for _ in range(rng.choice((1, 1, 2, 8))):
        at = rng.randrange(len(body)) if body else 0
        match rng.randrange(4):
            case 0:
                body[at : at + 1] = bytes([rng.randrange(256)])
            case 1:
                del body[at : at + rng.randint(1, 9)]
            case 2:
                body[at:at] = body[at : at + rng.randint(1, 30)]
            case _:
                body[at:at] = rng.randbytes(rng.randint(1, 6))
    return Mutant("bytes", bytes(body))


def cut(rng: random.Random) -> Mutant:
    """The end is missing."""
    body = text_of(rng)
    return Mutant("cut", body[: rng.randrange(len(body))], chunks=rng.random() < 0.3)


def token(rng: random.Random) -> Mutant:
    """NaN, infinities and numbers without end where something else should be."""
    return Mutant(
        "token", rng.choice((b'{"texts":[%s]}', b'{"texts":["a"],"deadline_ms":%s}', b"%s")) % rng.choice(TOKENS)
    )


def value(rng: random.Random) -> Mutant:
    """A value of another kind, a field that is missing, or one that is not known."""
    asked = good(rng)
    name = rng.choice(("texts", "pairs", "scores", "deadline_ms", "more", "k" * rng.choice((1, 300, 100_000))))
    asked[name] = rng.choice(ODD)
    if rng.random() < 0.3:
        asked.pop("texts", None)
    return Mutant("value", json.dumps(asked).encode())


def doubled(rng: random.Random) -> Mutant:
    """The same key several times."""
    pairs = [f'"texts":["{rng.choice(WORDS[:6])}"]' for _ in range(rng.choice((2, 3, 2000)))]
    return Mutant("doubled", ("{" + ",".join(pairs) + "}").encode())


def surrogate(rng: random.Random) -> Mutant:
    """Halves of characters: escaped, or as bytes that are not UTF-8."""
    half = rng.choice((rb"\ud800", rb"\udc00\ud800", rb"\ud83d", b"\xed\xa0\x80", b"\xc0\x80", b"\xf8\x88\x80\x80\x80"))
    return Mutant("surrogate", rng.choice((b'{"texts":["a%s"]}', b'{"%s":["a"]}', b'{"texts":["a"],"x":"%s"}')) % half)


def deep(rng: random.Random) -> Mutant:
    """Lists in lists, or objects in objects."""
    n = rng.choice((2, 60, 250, 3000, 200_000))
    left, right = rng.choice(((b"[", b"]"), (b'{"a":', b"}")))
    inner = left * n + b"1" + right * (n if rng.random() < 0.5 else 0)
    return Mutant("deep", rng.choice((b"%s", b'{"texts":%s}', b'{"texts":["a"],"more":%s}')) % inner)


def encoded(rng: random.Random) -> Mutant:
    """UTF-16, UTF-32, a byte order mark, gzip with and without its header."""
    said = text_of(rng).decode()
    match rng.randrange(4):
        case 0:
            return Mutant("encoding", said.encode(rng.choice(("utf-16", "utf-16-be", "utf-32", "utf-8-sig", "utf-7"))))
        case 1:
            return Mutant("gzip", gzip.compress(said.encode()))
        case 2:
            return Mutant(
                "gzip",
                gzip.compress(said.encode()),
                (JSON, ("Content-Encoding", rng.choice(("gzip", "GZIP", "br, gzip")))),
            )
        case _:
            return Mutant(
                "encoding", said.encode(), (JSON, ("Content-Encoding", rng.choice(("identity", "", "x" * 999))))
            )


def large(rng: random.Random) -> Mutant:
    """Too many rows, too long a text, too many bytes; or as many as are allowed."""
    match rng.randrange(8):
        case 0:
            return Mutant("large", b'{"texts":["' + b"a" * 2**22 + b'"]}', chunks=rng.random() < 0.5)
        case 1 | 2:
            return Mutant("large", json.dumps({"texts": ["a "] * rng.choice((1024, 1025, 5000))}).encode())
        case 3 | 4:
            return Mutant("large", json.dumps({"texts": ["ab " * rng.choice((33_333, 40_000))]}).encode())
        case _:
            return Mutant("large", b" " * rng.choice((1000, 100_000)) + text_of(rng))


def elsewhere(rng: random.Random) -> Mutant:
    """Another place or method."""
    if rng.random() < 0.5:
        return Mutant("method", text_of(rng), method=rng.choice(METHODS))
    return Mutant("path", text_of(rng), path=rng.choice(PATHS))


def headed(rng: random.Random) -> Mutant:
    """Other headers."""
    more = (
        ("X-Request-Id", rng.choice(("a" * 65, "{}", "%0d%0aX: y"))),
        ("Authorization", "Bearer " + "x" * rng.choice((0, 30_000))),
    )
    return Mutant("headers", text_of(rng), (("Content-Type", rng.choice(TYPES)), rng.choice(more)))


def nothing(rng: random.Random) -> Mutant:
    """No JSON, or two."""
    bodies = (
        b"",
        b" ",
        b"null",
        b"1",
        b'"texts"',
        b"[]",
        b"texts=a&x=1",
        b"{'texts':['a']}",
        b'{"texts":["a"]}' * 2,
        b"\x00" * 50,
    )
    return Mutant("nothing", rng.choice(bodies))


KINDS: tuple[Make, ...] = (
    as_it_is,
    bytes_changed,
    bytes_changed,
    cut,
    token,
    value,
    value,
    doubled,
    surrogate,
    deep,
    encoded,
    large,
    elsewhere,
    headed,
    nothing,
)


def mutants(count: int, seed: int = 0) -> Iterator[Mutant]:
    """The same ones for the same seed."""
    rng = random.Random(seed)
    for _ in range(count):
        yield rng.choice(KINDS)(rng)


def broken(model: str) -> Iterator[tuple[str, bytes]]:
    """Messages that are not HTTP, or hardly."""
    place = f"/v1/models/{model}/predict".encode()
    body = b'{"texts":["a"]}'
    start = b"POST " + place + b" HTTP/1.1\r\nHost: fuzz\r\n"
    sized = b"Content-Length: %d\r\n" % len(body)
    yield "garbage", b"\x16\x03\x01\x02\x00\x01\x00\x01\xfc\x03\x03" + b"\x00" * 200
    yield "garbage", b"hello\r\n\r\n"
    yield "method", b"BREW " + place + b" HTTP/1.1\r\n\r\n"
    yield "version", b"POST " + place + b" HTTP/9.9\r\n\r\n"
    yield "http/2", b"PRI * HTTP/2.0\r\n\r\nSM\r\n\r\n"
    yield "target", b"OPTIONS * HTTP/1.1\r\nHost: fuzz\r\n\r\n"
    yield "target", b"GET http://else.where/healthz HTTP/1.1\r\nHost: fuzz\r\n\r\n"
    yield "target", b"GET http://[::1 HTTP/1.1\r\nHost: fuzz\r\n\r\n"
    yield "target", b"CONNECT else.where:443 HTTP/1.1\r\nHost: fuzz\r\n\r\n"
    yield "target", b"GET /\xff\xfe HTTP/1.1\r\nHost: fuzz\r\n\r\n"
    yield "target", b"GET /" + b"a" * 300_000 + b" HTTP/1.1\r\n\r\n"
    yield "header", start + b"X: " + b"a" * 300_000 + b"\r\n\r\n"
    yield "header", start + b"X: y\r\n" * 50_000 + b"\r\n"
    yield "header", start + b"X\x00: y\r\n\r\n"
    yield "header", start + b" folded\r\n" + sized + b"\r\n" + body
    yield "header", start + b"X: \xff\xfe\r\n" + sized + b"\r\n" + body
    yield "length", start + b"Content-Length: -1\r\n\r\n" + body
    yield "length", start + b"Content-Length: " + b"9" * 40 + b"\r\n\r\n" + body
    yield "length", start + sized + b"Content-Length: 3\r\n\r\n" + body
    yield "length", start + sized + b"Transfer-Encoding: chunked\r\n\r\n" + body
    yield "chunks", start + b"Transfer-Encoding: chunked\r\n\r\nzz\r\n" + body
    yield "chunks", start + b"Transfer-Encoding: chunked\r\n\r\n" + b"f" * 20 + b"\r\n" + body
    yield "chunks", start + b"Transfer-Encoding: x, y\r\n\r\n" + body
    yield "upgrade", start + sized + b"Connection: Upgrade, HTTP2-Settings\r\nUpgrade: h2c\r\n\r\n" + body
    yield (
        "upgrade",
        start + sized + b"Connection: Upgrade\r\nUpgrade: websocket\r\nSec-WebSocket-Version: 13\r\n\r\n" + body,
    )
    yield "expect", start + sized + b"Expect: 100-continue\r\n\r\n" + body
    yield "version", b"POST " + place + b" HTTP/1.0\r\n" + sized + b"\r\n" + body
    yield "pipeline", (start + sized + b"\r\n" + body) * 20
    yield "pipeline", start + sized + b"\r\n" + body + b"garbage\r\n\r\n"


def fault(status: int, media: str, body: bytes, method: str = "POST") -> str:
    """What is wrong with an answer; empty where it is a right one, or a clean refusal."""
    if not (status == 200 or 400 <= status < 500):
        return f"status {status}"
    if method == "HEAD":
        return ""
    if status != 200:
        if media != "application/problem+json":
            return f"{status} as {media or 'nothing'}"
        said = json.loads(body)
        return "" if said["status"] == status and said["code"] and said["detail"] else f"{status} says {body[:200]!r}"
    said = json.loads(body, parse_constant=lambda name: "not finite")
    rows = said.get("predictions", ())
    return "" if all(0 <= row["confidence"] <= 1 for row in rows) else f"an answer of {body[:200]!r}"
