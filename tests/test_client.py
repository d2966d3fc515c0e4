"""The client: one core under both, what is tried again, and what is given up."""

from __future__ import annotations

import asyncio
import json
import re
from collections.abc import Callable
from typing import Any

import httpx
import numpy as np
import pytest

from netweight import client as clients
from netweight.client import AsyncClient, Client, Prediction
from netweight.errors import EndpointError
from netweight.serve.schema import MOST_BYTES


def answering(*replies: Any) -> tuple[Callable[[httpx.Request], httpx.Response], list[httpx.Request]]:
    """A server that gives these replies in turn (an exception is raised), and what it was asked."""
    asked: list[httpx.Request] = []

    def handle(request: httpx.Request) -> httpx.Response:
        reply = replies[min(len(asked), len(replies) - 1)]
        asked.append(request)
        if isinstance(reply, Exception):
            raise reply
        if isinstance(reply, httpx.Response):  # a fresh one: a body is read once
            return httpx.Response(reply.status_code, headers=reply.headers, content=reply.content)
        return httpx.Response(200, json=reply)

    return handle, asked


def labelled(*labels: str) -> dict[str, Any]:
    rows = [{"label": label, "confidence": 0.9, "tier": "static"} for label in labels]
    return {"model": "m", "version": "1", "predictions": rows, "degraded": []}


def both(
    monkeypatch: pytest.MonkeyPatch, replies: tuple[Any, ...], call: Callable[[Any], Any], **given: Any
) -> list[Any]:
    """What the blocking client and the other make of the same replies: [result or error, requests, slept]."""
    slept: list[float] = []

    async def nap(seconds: float) -> None:
        slept.append(seconds)

    monkeypatch.setattr(clients.time, "sleep", slept.append)
    monkeypatch.setattr(clients.asyncio, "sleep", nap)
    monkeypatch.setattr(clients.random, "uniform", lambda low, high: low)
    found: list[Any] = []
    for kind in (Client, AsyncClient):
        slept.clear()
        handle, asked = answering(*replies)
        client = kind("http://shop", "key", **given)
        transport = httpx.MockTransport(handle)
        client._http = (httpx.Client if kind is Client else httpx.AsyncClient)(transport=transport)

        async def later(client: Any = client) -> Any:
            async with client:
                return await call(client)

        result: Any
        try:
            if kind is Client:
                with client:
                    result = call(client)
            else:
                result = asyncio.run(later())
        except EndpointError as problem:
            result = str(problem)
        found.append([result, [(r.method, r.url.path, r.content) for r in asked], list(slept)])
    assert found[0] == found[1], "one core, two clients"
    return found[0]


def test_texts_are_sent_in_parts_and_come_back_in_order(monkeypatch: pytest.MonkeyPatch) -> None:
    replies = (labelled(*["a"] * 256), labelled("b", "c"))
    result, asked, _ = both(monkeypatch, replies, lambda c: c.predict("m", ["x"] * 258))
    assert [p.label for p in result] == ["a"] * 256 + ["b", "c"]
    assert result[0] == Prediction("static", "a", 0.9)
    assert [path for _, path, _ in asked] == ["/v1/models/m/predict"] * 2


@pytest.mark.parametrize("text", ["x" * 30_000, '"' * 15_000, "字" * 10_000])
def test_no_part_is_larger_than_a_server_takes(text: str) -> None:
    """Rows alone were counted, so that 256 long texts were answered with 413."""
    texts, sizes = [f"{i}{text}" for i in range(300)], list[int]()

    def handle(request: httpx.Request) -> httpx.Response:
        sizes.append(len(request.content))
        return httpx.Response(200, json=labelled(*(t.rstrip(text[0]) for t in json.loads(request.content)["texts"])))

    client = Client("http://shop")
    client._http = httpx.Client(transport=httpx.MockTransport(handle))
    assert [p.label for p in client.predict("m", texts)] == list(map(str, range(300)))
    assert max(sizes) < MOST_BYTES
    assert len(sizes) == 3, "and no more of them than need be"


def test_columns_of_other_libraries_are_lists_of_texts(monkeypatch: pytest.MonkeyPatch) -> None:
    for texts in (np.array(["x", "y"]), np.array(["x", "y"], object), iter(["x", "y"]), ("x", "y")):
        handle, asked = answering(labelled("a", "b"))
        client = Client("http://shop")
        client._http = httpx.Client(transport=httpx.MockTransport(handle))
        assert [p.label for p in client.predict("m", texts)] == ["a", "b"]  # type: ignore[arg-type]
        assert asked[0].content == b'{"texts":["x","y"],"scores":false}'
    assert both(monkeypatch, (labelled("a"),), lambda c: c.predict("m", np.array([], str)))[0] == []


def test_models_and_pairs(monkeypatch: pytest.MonkeyPatch) -> None:
    assert both(monkeypatch, ({"models": [{"name": "m"}]},), lambda c: c.models())[0] == [{"name": "m"}]
    result, asked, _ = both(monkeypatch, (labelled("a"),), lambda c: c.predict("m", pairs=[("l", "r")], scores=True))
    assert result[0].label == "a"
    assert asked[0][2] == b'{"pairs":[["l","r"]],"scores":true}'


PROBLEM = {"content-type": "application/problem+json"}


def test_what_may_help_is_tried_again(monkeypatch: pytest.MonkeyPatch) -> None:
    full = httpx.Response(429, headers={"Retry-After": "3"}, json={"detail": "full"})
    fallen = httpx.Response(500, text="Internal Server Error")  # of a proxy, for a server that died
    replies = (full, httpx.ConnectError("refused"), httpx.Response(503), fallen, labelled("a"))
    result, asked, slept = both(monkeypatch, replies, lambda c: c.predict("m", ["x"]))
    assert result[0].label == "a"
    assert len(asked) == 5
    assert slept == [3.0, 0.1, 0.2, 0.4], "at the earliest: never before the time that was named"


@pytest.mark.parametrize(
    ("reply", "tries", "text"),
    [
        (httpx.Response(404, json={"detail": "no model"}), 1, "answered with 404: no model"),
        (httpx.Response(500, content=b'{"detail":"oops"}', headers=PROBLEM), 1, "answered with 500: oops"),
        (httpx.Response(500, text="oops"), 3, "answered with 500: oops"),
        (httpx.Response(429, json={"detail": "full"}), 3, "answered with 429: full"),
        (
            httpx.Response(429, headers={"Retry-After": "61"}, json={"detail": "full"}),
            1,
            "answered with 429: full (Retry-After: 61; the client waits 60 s at most)",
        ),
        (httpx.Response(429, headers={"Retry-After": "60"}, json={"detail": "full"}), 3, "answered with 429: full"),
        (httpx.ConnectError("refused"), 3, r"http://shop does not answer (ConnectError('refused')) after 3 tries."),
    ],
)
def test_what_does_not_help_is_given_up(monkeypatch: pytest.MonkeyPatch, reply: Any, tries: int, text: str) -> None:
    said, asked, _ = both(monkeypatch, (reply,), lambda c: c.predict("m", ["x"]), retries=2)
    assert len(asked) == tries
    assert text in said


@pytest.mark.parametrize(
    "reply", [httpx.Response(200, text="<html>"), [], {"status": "ok"}, {"predictions": [{"score": 1}]}]
)
def test_an_answer_of_something_else_is_an_error(monkeypatch: pytest.MonkeyPatch, reply: Any) -> None:
    calls: list[Callable[[Any], Any]] = [
        lambda c: c.predict("m", ["x"]),
        lambda c: c.explain("m", "x"),
        lambda c: c.models(),
    ]
    for call in calls:
        said, asked, _ = both(monkeypatch, (reply,), call)
        assert re.search(
            r"was answered with 200 and '.*', which no `netweight serve` of this version says; check what answers at http://shop",
            said,
        )
        assert len(asked) == 1


def test_texts_or_pairs(monkeypatch: pytest.MonkeyPatch) -> None:
    said, asked, _ = both(monkeypatch, (labelled("a"),), lambda c: c.predict("m"))
    assert said == "give texts or pairs, and not both."
    assert not asked
    for given, text in (
        ({"texts": "zip broke"}, "texts is one string; pass a list of strings."),
        ({"texts": {"review": ["zip broke"]}}, "texts is a table; pass one column, for example df['review']."),
        ({"pairs": "zip"}, "pairs is one string; pass two texts for each row."),
        ({"pairs": 3}, "pairs is of type int; pass two texts for each row."),
    ):
        said, asked, _ = both(monkeypatch, (labelled("a"),), lambda c, given=given: c.predict("m", **given))
        assert said == text
        assert not asked
    assert "key" not in repr(clients._Core("http://shop", "key"))


def test_a_row_that_is_no_text_is_named(monkeypatch: pytest.MonkeyPatch) -> None:
    """httpx raised errors of its own there, and of the codec's."""
    surrogates = "is no text that UTF-8 can hold (surrogates not allowed); read it again with errors='replace'."
    for call, text in (
        (lambda c: c.predict("m", ["x", float("nan")]), "texts[1] is of type float; pass a string for every row."),
        (lambda c: c.predict("m", ["x", "\ud800"]), f"texts[1] {surrogates}"),
        (lambda c: c.predict("m", pairs=[("l", "r"), ("l", None)]), "pairs[1][1] is of type NoneType; pass a string f"),
        (lambda c: c.predict("m", pairs=[("l", "r"), ("l", "\udfff")]), f"pairs[1][1] {surrogates}"),
        (lambda c: c.predict("m", pairs=[("l", "r"), "lr"]), "pairs[1] is one string; pass two texts for each row."),
        (lambda c: c.predict("m", pairs=[("l", "r", "s")]), "pairs[0] has 3 texts; pass two texts for each row."),
        (lambda c: c.explain("m", "\ud800"), f"text {surrogates}"),
        (lambda c: c.explain("m", float("nan")), "text is of type float; pass a string for every row."),
    ):
        said, asked, _ = both(monkeypatch, (labelled("a"),), call)
        assert text in said
        assert not asked
    pairs = np.array([["l", "r"]])
    assert both(monkeypatch, (labelled("a"),), lambda c: c.predict("m", pairs=pairs))[0][0].label == "a"
