"""Serving: the same answers as the engine, clear refusals, nothing dropped while models are exchanged."""

from __future__ import annotations

import asyncio
import json
import math
import shutil
import threading
import time
from collections.abc import Awaitable, Callable, Sequence
from dataclasses import replace
from functools import partial
from pathlib import Path
from typing import Any

import httpx
import numpy as np
import pytest

from conftest import many_rows
from netweight import artifact
from netweight.artifact import Tier
from netweight.encode import Tokens
from netweight.engine import Engine, Outputs, load
from netweight.errors import CorruptArtifact, OptionError
from netweight.serve import hosted
from netweight.serve import queue as queues
from netweight.serve import server as processes
from netweight.serve.app import application
from netweight.serve.crowd import Crowd
from netweight.serve.hosted import Models
from netweight.serve.metrics import Metrics
from netweight.serve.problems import Problem
from netweight.serve.queue import Queue
from netweight.serve.schema import MOST_BYTES, MOST_ROWS
from netweight.serve.standing import Standing
from netweight.serve.steady import Said, Work, begin, step

TEXTS = list(many_rows(40).text)


class Server:
    """An application without a socket."""

    def __init__(self, folder: Path, name: str = "shop", patience: float = 5.0) -> None:
        self.metrics = Metrics()
        self.models = Models(1, patience, self.metrics.batch)
        self.models.load(folder, name)
        self.app = application(self.models, self.metrics)

    def run(self, work: Callable[[Any], Awaitable[Any]]) -> Any:
        async def inside() -> Any:
            transport = httpx.ASGITransport(self.app)
            async with httpx.AsyncClient(transport=transport, base_url="http://test") as client:
                return await work(client)

        return asyncio.run(inside())

    def post(self, body: Any, model: str = "shop", **given: Any) -> Any:
        content = body if isinstance(body, bytes) else json.dumps(body).encode()
        return self.run(lambda c: c.post(f"/v1/models/{model}/predict", content=content, **given))

    def get(self, path: str) -> Any:
        return self.run(lambda c: c.get(path))


def answer(engine: Engine, texts: Sequence[str]) -> Said:
    """What all tiers say, one after another."""
    work = begin(engine, texts)
    while work.open.any():
        work = step(engine, work)
    return work.said


@pytest.fixture
def server(made: Path) -> Server:
    return Server(made)


# --- answers ---


def test_answers_are_those_of_the_engine(server: Server, made: Path) -> None:
    wanted = load(made, 1).predict(TEXTS)
    said = server.post({"texts": TEXTS}).json()
    assert said["model"] == "shop"
    assert said["version"] == load(made, 1).version
    assert said["degraded"] == []
    for row, one in zip(said["predictions"], wanted):
        assert (row["label"], row["tier"]) == (one.label, one.tier)
        assert row["confidence"] == pytest.approx(one.confidence, abs=1e-5)


def test_many_requests_at_once_get_their_own_answers(server: Server, made: Path) -> None:
    wanted = [p.label for p in load(made, 1).predict(TEXTS)]

    async def all_at_once(client: Any) -> Any:
        asks = [client.post("/v1/models/shop/predict", json={"texts": TEXTS[i : i + 3]}) for i in range(37)]
        return await asyncio.gather(*asks)

    for i, response in enumerate(server.run(all_at_once)):
        assert [row["label"] for row in response.json()["predictions"]] == wanted[i : i + 3]
    text = server.get("/metrics").text
    assert 'netweight_requests_total{model="shop",status="200"} 37.0' in text
    batches = next(line for line in text.splitlines() if line.startswith("netweight_batch_rows_count"))
    assert float(batches.split()[-1]) < 37, "what waits is answered together"


def test_scores_are_probabilities_of_all_labels(server: Server) -> None:
    for row in server.post({"texts": TEXTS[:5], "scores": True}).json()["predictions"]:
        assert sum(row["scores"].values()) == pytest.approx(1, abs=1e-4)
        assert max(row["scores"], key=row["scores"].get) == row["label"]
        assert row["scores"][row["label"]] == pytest.approx(row["confidence"], abs=1e-5)


def test_what_stands_beside_the_answers(server: Server) -> None:
    (model,) = server.get("/v1/models").json()["models"]
    assert model["name"] == "shop"
    assert model["certificate"]["verdict"] == "certified"
    assert model["measurements"]
    assert server.get("/healthz").json() == {"status": "ok"}
    assert server.get("/readyz").json() == {"status": "ready"}
    schema = server.get("/openapi.json").json()
    operation = schema["paths"]["/v1/models/{name}/predict"]["post"]
    assert {"200", "400", "404", "413", "422", "429", "503", "504"} <= set(operation["responses"])
    assert "texts" in operation["requestBody"]["content"]["application/json"]["schema"]["properties"]


def test_headers_and_ids(server: Server, caplog: pytest.LogCaptureFixture) -> None:
    with caplog.at_level("INFO", "netweight.access"):
        mine = server.post({"texts": ["my secret"]}, headers={"X-Request-Id": "order-7"})
        odd = server.post({"texts": ["my secret"]}, headers={"X-Request-Id": "a b\x01"})
    assert mine.headers["x-request-id"] == "order-7"
    assert odd.headers["x-request-id"] not in ("", "a b\x01")
    assert mine.headers["x-content-type-options"] == "nosniff"
    line = json.loads(caplog.messages[0])
    assert line.items() >= {"id": "order-7", "status": 200, "path": "/v1/models/shop/predict"}.items()
    assert "secret" not in caplog.text


def test_a_number_may_be_written_as_a_fraction(server: Server) -> None:
    assert server.post(b'{"texts": ["a"], "deadline_ms": 1e4}').status_code == 200
    for wrong in (b"1.5", b'"1"', b"true", b"1e999"):
        assert server.post(b'{"texts": ["a"], "deadline_ms": %s}' % wrong).status_code == 422


# --- refusals ---


@pytest.mark.parametrize(
    ("body", "status", "code", "text"),
    [
        (b"{", 400, "bad-json", "the body is not JSON"),
        (b'{"texts": ["\\ud800"]}', 400, "bad-json", "hex escape"),
        (b'{"texts": [NaN]}', 422, "invalid-request", "texts"),
        (b"\xff\xfe", 400, "bad-json", "not JSON"),
        (b"[" * 100_000, 400, "bad-json", "recursion"),
        ({}, 422, "invalid-request", "give texts or pairs, and not both"),
        ({"texts": ["a"], "pairs": [["a", "b"]]}, 422, "invalid-request", "give texts or pairs, and not both"),
        ({"pairs": [["a", "b"]]}, 409, "other-rows", "answers single texts; give no second one"),
        ({"texts": []}, 422, "invalid-request", "texts"),
        ({"texts": "a"}, 422, "invalid-request", "texts"),
        ({"texts": ["a"] * (MOST_ROWS + 1)}, 422, "invalid-request", "at most 1024 items"),
        ({"texts": ["a"], "more": 1}, 422, "invalid-request", "more"),
        ({str(n): n for n in range(5000)}, 422, "invalid-request", "5,000 faults; send only texts, pairs, scores, "),
        ({"pairs": [[1, 1]] * 1024, "texts": [1] * 1024}, 422, "invalid-request", "texts.0: "),
        ({"texts": ["a"], "deadline_ms": 0}, 422, "invalid-request", "deadline_ms"),
        (b'{"texts": ["' + b"a" * MOST_BYTES + b'"]}', 413, "too-large", "4,194,304 bytes"),
    ],
)
def test_bad_bodies(server: Server, body: Any, status: int, code: str, text: str) -> None:
    response = server.post(body)
    assert response.headers["content-type"] == "application/problem+json"
    said = response.json()
    assert (response.status_code, said["status"], said["code"]) == (status, status, code)
    assert text in said["detail"]
    assert said["request_id"] == response.headers["x-request-id"]


@pytest.mark.parametrize(("verb", "body"), [("predict", {"texts": ["a"]}), ("explain", {"text": "a"})])
def test_pages_of_other_sites_may_not_ask(server: Server, verb: str, body: Any) -> None:
    """A browser sends the text of any page without asking first (`mode: "no-cors"`), and says whose page it is."""

    async def work(client: Any) -> dict[str, Any]:
        sites = ("cross-site", "same-site", "same-origin", "none")
        headers = [{"Sec-Fetch-Site": site, "Content-Type": "text/plain"} for site in sites]
        asks = [client.post(f"/v1/models/shop/{verb}", json=body, headers=h) for h in headers]
        return dict(zip(sites, await asyncio.gather(*asks), strict=True))

    said = server.run(work)
    assert {site: one.status_code for site, one in said.items()} == {
        "cross-site": 403, "same-site": 403, "same-origin": 200, "none": 200,
    }  # fmt: skip
    assert said["cross-site"].json()["code"] == said["same-site"].json()["code"] == "other-site"


def test_wrong_places(server: Server) -> None:
    unknown = server.post({"texts": ["a"]}, model="other").json()
    assert unknown["code"] == "unknown-model"
    assert unknown["detail"] == "there is no model 'other' here; there are: shop."
    assert server.get("/nothing").json()["code"] == "not-found"
    assert server.get("/v1/models/shop/predict").json()["code"] == "method-not-allowed"


class Slow:
    """An engine of which one tier waits for leave."""

    def __init__(self, tiers: int = 1, held: int = 0) -> None:
        self.free, self.seen, self.tiers, self.held = threading.Event(), list[list[str]](), tiers, held

    def begin(self, texts: Sequence[str], pairs: Sequence[str] | None = None) -> Work:
        self.seen.append(list(texts))
        n = len(texts)
        tokens = Tokens(np.zeros(n, np.int32), np.zeros(n, np.uint8), np.arange(n + 1))
        # A text of "hard" stays open until the last tier.
        hard = np.array([text == "hard" for text in texts])
        said = Said(Outputs(np.zeros((n, 2), np.float32), np.ones(n), np.zeros(n, np.int64)))
        return Work(tokens, said, hard)

    def step(self, work: Work) -> Work:
        assert work.tier != self.held or self.free.wait(10)
        still = work.open & (work.tier + 1 < self.tiers)
        said = replace(work.said, outputs=replace(work.said.outputs, tier=np.full(len(still), work.tier)))
        return replace(work, said=said, open=still, tier=work.tier + 1)

    def queue(self, patience: float) -> Queue:
        return Queue(self.begin, self.step, self.tiers, lambda: patience)


async def _taken(slow: Slow) -> None:
    while not slow.seen:
        await asyncio.sleep(0.001)


def test_a_queue_refuses_what_would_wait_too_long(monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr(queues, "_FIRST_GUESS", 1.0)  # each token takes a second

    async def work() -> None:
        slow = Slow()
        queue = slow.queue(patience=7)
        first = queue.ask(["a"])
        await _taken(slow)
        rest = [queue.ask(["b"]), queue.ask(["c"]), queue.ask(["d"])]
        with pytest.raises(Problem) as refused:
            queue.ask(["e"])
        assert (refused.value.status, refused.value.code) == (429, "queue-full")
        assert refused.value.headers["Retry-After"] == "8"
        assert len(queue) == 3
        slow.free.set()
        await asyncio.gather(first, *rest)
        queue.close()
        with pytest.raises(Problem, match="shutting down"):
            queue.ask(["f"])

    asyncio.run(work())


def test_a_turn_that_is_worked_on_is_waited_for(monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr(queues, "_FIRST_GUESS", 1.0)  # each token takes a second

    async def work() -> None:
        slow = Slow()
        queue = slow.queue(patience=5)
        first = queue.ask(["a" * 32])  # ten tokens
        await _taken(slow)
        assert len(queue) == 0, "nothing waits"
        with pytest.raises(Problem) as refused:
            queue.ask(["b"])
        assert (refused.value.code, refused.value.headers["Retry-After"]) == ("queue-full", "10")
        slow.free.set()
        await first
        await queue.ask(["c"])
        queue.close()

    asyncio.run(work())


def test_a_burst_may_wait_and_overload_may_not() -> None:
    now = [0.0]
    standing = Standing(lambda: now[0])

    def asked(wait: float, after: float = 0.01) -> float:
        now[0] += after
        return standing.patience(wait, 0.1)

    assert [asked(0.05) for _ in range(5)] == [0.1] * 5, "a burst"
    asked(0.001)
    assert [asked(0.05) for _ in range(8)] == [0.1] * 8, "it was nearly empty meanwhile"
    assert asked(0.05) == pytest.approx(0.1)
    assert [asked(0.05) for _ in range(20)][-1] == pytest.approx(0.01), "it never is"
    assert [asked(0.006) for _ in range(30)][-1] == pytest.approx(0.01), "what is let in keeps it busy"
    assert [asked(0.004) for _ in range(30)][-1] == pytest.approx(0.1), "it is over"
    [asked(0.05) for _ in range(30)]
    assert asked(0.05, after=1.0) == pytest.approx(0.1), "nobody came for a while"


def test_a_crowd_is_as_large_as_it_is_answered_in_time() -> None:
    now = [0.0]
    crowd = Crowd(lambda: 0.1, lambda: now[0])
    for _ in range(50):
        crowd.enter()
    assert not crowd.full, "nothing is known yet"
    for _ in range(20):
        now[0] += 0.004  # 250 a second: 25 are answered in a tenth of a second
        crowd.leave()
    assert crowd.inside == 30
    assert crowd.wait == pytest.approx(0.12)
    assert crowd.full
    for _ in range(6):
        now[0] += 0.004
        crowd.leave()
    assert not crowd.full
    while crowd.inside:
        crowd.leave()
    now[0] += 1000.0
    crowd.enter()
    crowd.leave()
    crowd.enter()
    crowd.enter()
    now[0] += 0.004
    crowd.leave()
    assert crowd.wait == pytest.approx(0.004, rel=0.5), "a time in which nobody came says nothing"


def test_a_server_refuses_at_the_door(server: Server, monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr(Crowd, "full", True)
    response = server.post({"texts": ["a"]})
    assert (response.status_code, response.json()["code"]) == (429, "queue-full")
    assert response.headers["x-request-id"]
    assert server.get("/healthz").status_code == 200
    assert 'netweight_requests_total{model="",status="429"} 1.0' in server.get("/metrics").text


def test_how_long_answers_take_is_not_how_soon_others_are_refused(server: Server) -> None:
    assert server.post({}).status_code == 422
    assert server.post({"texts": ["a"]}, model="other").status_code == 404
    text = server.get("/metrics").text
    assert 'netweight_requests_total{model="shop",status="422"} 1.0' in text
    assert "netweight_request_seconds_count" not in text
    assert server.post({"texts": ["a"]}).status_code == 200
    assert 'netweight_request_seconds_count{model="shop"} 1.0' in server.get("/metrics").text


def test_who_is_cancelled_has_gone(
    server: Server, monkeypatch: pytest.MonkeyPatch, caplog: pytest.LogCaptureFixture
) -> None:
    """As Ray Serve does with the request of a client that goes away; it was counted as a fault of ours."""

    async def work(client: Any) -> None:
        asked = asyncio.Event()

        async def never(*_: object) -> None:
            asked.set()
            await asyncio.Event().wait()

        monkeypatch.setattr(server.models, "answer", never)
        request = asyncio.create_task(client.post("/v1/models/shop/predict", json={"texts": ["a"]}))
        await asked.wait()
        request.cancel()
        await asyncio.wait([request])
        assert request.cancelled()

    with caplog.at_level("INFO", "netweight.access"):
        server.run(work)
    assert 'netweight_requests_total{model="shop",status="499"} 1.0' in server.get("/metrics").text
    assert json.loads(caplog.messages[0])["status"] == 499


def test_late_and_cancelled_requests_leave_the_queue() -> None:
    async def work() -> None:
        slow = Slow()
        queue = slow.queue(patience=100)
        first = queue.ask(["a"])
        await _taken(slow)
        late, gone, stays = queue.ask(["late"], seconds=0.0), queue.ask(["gone"]), queue.ask(["stays"])
        gone.cancel()
        await asyncio.sleep(0.01)
        slow.free.set()
        await first
        with pytest.raises(Problem, match="before its deadline"):
            await late
        await stays
        queue.close()
        assert slow.seen == [["a"], ["stays"]]

    asyncio.run(work())


@pytest.mark.parametrize("milliseconds", [30, 200])
def test_a_deadline_holds_while_the_engine_works(server: Server, milliseconds: int) -> None:
    usual, free = server.models["shop"].queue._step, threading.Event()

    def held(work: Work) -> Work:
        assert free.wait(10)
        return usual(work)

    server.models["shop"].queue._step = held

    async def work(client: Any) -> None:
        began = time.monotonic()
        said = await client.post("/v1/models/shop/predict", json={"texts": ["a"], "deadline_ms": milliseconds})
        assert milliseconds / 1000 <= time.monotonic() - began < 5
        assert (said.status_code, said.json()["code"]) == (504, "deadline-passed")
        free.set()
        assert (await client.post("/v1/models/shop/predict", json={"texts": ["a"]})).status_code == 200

    server.run(work)


def test_an_answer_that_nobody_waits_for_ends_no_queue() -> None:
    """As where a deadline has passed, and the event loop ended before the turn did."""
    slow = Slow()
    queue = slow.queue(patience=100)

    async def leaves() -> None:
        queue.ask(["a"])
        await _taken(slow)

    async def stays() -> Said:
        return await asyncio.wait_for(queue.ask(["b"]), 10)

    asyncio.run(leaves())
    slow.free.set()
    assert asyncio.run(stays()).outputs.tier.tolist() == [0]
    queue.close()


def test_texts_and_pairs_are_not_mixed_and_closing_answers_what_waits() -> None:
    async def work() -> None:
        slow = Slow()
        queue = slow.queue(patience=100)
        asked = [queue.ask(["a"])]
        await _taken(slow)
        asked += [queue.ask(["b"]), queue.ask(["c"], ["d"]), queue.ask(["e"])]
        slow.free.set()
        queue.close()
        await asyncio.gather(*asked)
        assert slow.seen == [["a"], ["b"], ["c"], ["e"]]

    asyncio.run(work())


def test_an_engine_that_fails_is_a_problem(server: Server, monkeypatch: pytest.MonkeyPatch) -> None:
    def broken(*_: object) -> None:
        raise RuntimeError("out of memory, somewhere in /secret/place")

    monkeypatch.setattr(Engine, "logits", broken)
    response = server.post({"texts": ["a"]})
    assert (response.status_code, response.json()["code"]) == (500, "engine-failed")
    assert "secret" not in response.text


# --- tiers that fail ---


def cascade_of_two(folder: Path) -> Engine:
    """The artifact's first tier twice: all rows reach the second."""
    engine = load(folder, 1)
    first = replace(engine.tiers[0], name="one", threshold=2.0)
    second = replace(engine.tiers[0], name="two", threshold=0.0)
    tiers = [(first, engine._engines[0]), (second, engine._engines[0])]
    return Engine(engine.task, engine.encoder, tiers, "two")


def test_a_tier_answers_with_those_before_it_here_as_in_the_engine(made: Path) -> None:
    engine = cascade_of_two(made)
    alone = engine.logits(1, engine.encoder.encode(TEXTS))
    engine.tiers = engine.tiers[0], replace(engine.tiers[1], before=0.5)
    said, wanted = answer(engine, TEXTS).outputs, engine.outputs(TEXTS)
    assert (said.logits == wanted.logits).all()
    assert (said.confidence == wanted.confidence).all()
    np.testing.assert_array_equal(said.logits, alone + np.float32(0.5) * alone)


@pytest.mark.parametrize(("broken", "answers"), [(0, "two"), (1, "one")])
def test_other_tiers_answer_for_one_that_fails(made: Path, broken: int, answers: str) -> None:
    engine = cascade_of_two(made)
    whole = answer(engine, TEXTS)
    assert whole.failed == ()
    usual = engine.logits

    def sometimes(tier: int, *given: Any) -> Any:
        if tier == broken:
            raise RuntimeError("gone")
        return usual(tier, *given)

    engine.logits = sometimes  # type: ignore[method-assign]
    said = answer(engine, TEXTS)
    assert said.failed == (("one", "two")[broken],)
    assert {engine.tiers[i].name for i in said.outputs.tier} == {answers}
    assert (said.outputs.logits == whole.outputs.logits).all()


def test_rows_that_no_tier_answered_are_an_error(made: Path) -> None:
    engine = cascade_of_two(made)
    asked: list[int] = []

    def broken(tier: int, *_: object) -> None:
        asked.append(tier)
        raise ValueError("gone")

    engine.logits = broken  # type: ignore[method-assign,assignment]

    async def work() -> None:
        queue = Queue(partial(begin, engine), partial(step, engine), 2, lambda: 30)
        with pytest.raises(ValueError, match="gone"):
            await queue.ask(TEXTS)
        queue.close()

    asyncio.run(work())
    assert asked == [0, 1], "every tier was tried"


@pytest.mark.parametrize("broken", [True, False])
def test_a_failed_tier_is_told_to_those_whom_it_failed(
    made: Path, monkeypatch: pytest.MonkeyPatch, broken: bool
) -> None:
    """The second tier takes two requests together, of which one has no answer of the first: both were refused."""
    monkeypatch.setattr(queues, "_TURN", math.inf)
    engine, free, seen = cascade_of_two(made), threading.Event(), list[int]()
    usual = engine.logits

    def sometimes(tier: int, *given: Any) -> Any:
        seen.append(tier)
        if seen == [0, 1, 0] or (tier == 1 and free.wait(10) and broken):
            raise RuntimeError("gone")
        return usual(tier, *given)

    async def work() -> list[Any]:
        queue = Queue(partial(begin, engine), partial(step, engine), 2, lambda: 30)
        asked = [queue.ask(TEXTS[:1])]
        while 1 not in seen:
            await asyncio.sleep(0.001)
        for i in (1, 2):  # they wait behind the one that holds the second tier
            asked.append(queue.ask(TEXTS[i : i + 1]))
            while len(queue._lines[1].waiting) < i:
                await asyncio.sleep(0.001)
        free.set()
        found = await asyncio.gather(*asked, return_exceptions=True)
        queue.close()
        return found

    engine.logits = sometimes  # type: ignore[method-assign]
    first, without, other = asyncio.run(asyncio.wait_for(work(), 30))
    assert seen == [0, 1, 0, 0, 1]
    tier, failed = (0, ("two",)) if broken else (1, ())
    assert (first.failed, other.failed) == (failed, failed)
    assert [said.outputs.tier.tolist() for said in (first, other)] == [[tier]] * 2
    if broken:
        assert isinstance(without, RuntimeError)
    else:
        assert (without.failed, without.outputs.tier.tolist()) == (("one",), [1])


def test_what_goes_wrong_before_a_tier_is_asked_is_in_the_log(caplog: pytest.LogCaptureFixture) -> None:
    """The answer says that the log says why."""

    def broken(*_: object) -> Work:
        raise RuntimeError("no token")

    async def work() -> None:
        queue = Queue(broken, Slow().step)
        with pytest.raises(RuntimeError, match="no token"):
            await queue.ask(["a"])
        queue.close()

    asyncio.run(work())
    assert "a turn of tier 0 failed, of 1 requests" in caplog.text
    assert "RuntimeError: no token" in caplog.text


# --- every tier in its own thread ---


def test_easy_requests_do_not_wait_behind_hard_ones() -> None:
    async def work() -> None:
        slow = Slow(tiers=2, held=1)
        queue = slow.queue(patience=100)
        hard = [queue.ask(["hard", "easy"]) for _ in range(3)]
        easy = await asyncio.wait_for(queue.ask(["easy"]), 10)
        assert not any(one.done() for one in hard), "they wait for the second tier"
        slow.free.set()
        said = await asyncio.gather(*hard)
        queue.close()
        assert [one.outputs.tier.tolist() for one in (*said, easy)] == [[1, 1]] * 3 + [[0]]

    asyncio.run(work())


def test_closing_waits_for_every_tier() -> None:
    async def work() -> None:
        slow = Slow(tiers=3, held=0)
        queue = slow.queue(patience=100)
        asked = [queue.ask([text]) for text in ("hard", "easy", "hard")]
        closing = asyncio.get_running_loop().run_in_executor(None, queue.close)
        await asyncio.sleep(0.05)
        assert not closing.done()
        slow.free.set()
        said = await asyncio.gather(*asked)
        await closing
        assert [one.outputs.tier.tolist() for one in said] == [[2], [0], [2]]
        assert not any(thread.is_alive() for thread in queue._threads)

    asyncio.run(work())


def test_threads_give_what_the_cascade_gives(made: Path) -> None:
    engine = cascade_of_two(made)
    first = engine.tiers[0]
    sure = sorted(answer(load(made, 1), TEXTS).outputs.confidence.tolist())
    engine.tiers = (replace(first, threshold=sure[len(sure) // 2]), engine.tiers[1])
    wanted = engine.run(engine.encoder.encode(TEXTS))
    assert set(wanted.tier.tolist()) == {0, 1}

    async def work() -> list[Said]:
        queue = Queue(partial(begin, engine), partial(step, engine), 2, lambda: 30)
        said = await asyncio.gather(*(queue.ask(TEXTS[i : i + 3]) for i in range(0, len(TEXTS) - 3, 3)))
        queue.close()
        return said

    for i, said in enumerate(asyncio.run(work())):
        part = slice(3 * i, 3 * i + 3)
        assert said.outputs.tier.tolist() == wanted.tier[part].tolist()
        assert np.allclose(said.outputs.logits, wanted.logits[part])
        assert np.allclose(said.outputs.confidence, wanted.confidence[part])


# --- exchange ---


def test_requests_may_wait_while_a_model_is_loaded(made: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    models, seen = Models(1, patience=0.5), list[float]()
    usual = hosted.load
    monkeypatch.setattr(hosted, "load", lambda *given: (seen.append(models.patience()), usual(*given))[1])
    models.load(made, "shop")
    assert seen == [10.0]
    assert models.patience() == 10.0, "what gathered meanwhile is still being answered"
    now = hosted.time.monotonic()
    monkeypatch.setattr(hosted.time, "monotonic", lambda: now + 1.1)
    assert models.patience() == 0.5
    models.close()


def changed(folder: Path, to: Path) -> Path:
    """The same artifact with another temperature: another version."""
    manifest = artifact.read_manifest(folder)
    tiers = tuple(replace(tier, temperature=2 * tier.temperature) for tier in manifest.tiers)
    contents = {name: artifact.read_file(folder, manifest, name) for name in manifest.files}
    artifact.save(to, replace(manifest, tiers=tiers), contents)
    return to


def test_a_model_is_exchanged_under_load_without_a_dropped_request(server: Server, made: Path, tmp_path: Path) -> None:
    other = changed(made, tmp_path / "other.nw")
    versions = {load(made, 1).version, load(other, 1).version}
    assert len(versions) == 2

    async def work(client: Any) -> list[Any]:
        found: list[Any] = []

        async def load_of_requests() -> None:
            for _ in range(60):
                found.append(await client.post("/v1/models/shop/predict", json={"texts": TEXTS[:4]}))

        exchange = [server.models.exchange("shop", place) for place in (other, made, other)]
        await asyncio.gather(load_of_requests(), load_of_requests(), *exchange)
        return found

    found = server.run(work)
    assert {response.status_code for response in found} == {200}
    assert {response.json()["version"] for response in found} <= versions


def test_a_damaged_folder_is_refused_and_the_old_version_stays(server: Server, made: Path, tmp_path: Path) -> None:
    broken = tmp_path / "broken.nw"
    shutil.copytree(made, broken)
    tier = next((broken / "tiers").iterdir())
    data = bytearray(tier.read_bytes())
    data[len(data) // 2] ^= 1
    tier.write_bytes(bytes(data))
    before = server.models["shop"].engine.version
    with pytest.raises(CorruptArtifact, match=tier.name):
        server.models.load(broken, "shop")
    assert server.models["shop"].engine.version == before
    assert server.post({"texts": ["a"]}).status_code == 200
    with pytest.raises(OptionError, match="cannot be called"):
        server.models.load(made, "a/b")


Until = Callable[[Callable[[], bool]], Awaitable[None]]


def while_following(server: Server, work: Callable[[Until], Awaitable[None]]) -> None:
    """Work on folders that are followed meanwhile; it is given a way to wait."""

    async def both() -> None:
        following = asyncio.create_task(processes.follow(server.models))

        async def until(true: Callable[[], bool]) -> None:
            while not true():
                assert not following.done(), following
                await asyncio.sleep(0.01)

        await work(until)
        following.cancel()

    asyncio.run(asyncio.wait_for(both(), 60))


def test_whole_files_that_do_not_load_are_refused_and_later_ones_are_followed(
    server: Server, made: Path, tmp_path: Path, monkeypatch: pytest.MonkeyPatch, caplog: pytest.LogCaptureFixture
) -> None:
    """All hashes are right; what is raised is ONNX Runtime's own."""
    monkeypatch.setattr(processes, "_LOOK", 0.01)
    good, first = changed(made, tmp_path / "good.nw"), server.models["shop"].engine.version
    manifest = artifact.read_manifest(made)
    contents = {name: artifact.read_file(made, manifest, name) for name in manifest.files}
    tiers = (Tier("encoder", "onnx", manifest.tiers[0].file),)
    contents[manifest.tiers[0].file] = b"no network"

    async def work(until: Until) -> None:
        artifact.save(made, replace(manifest, tiers=tiers), contents)
        await until(lambda: f"shop stays at version {first}" in caplog.text)
        newer = load(changed(good, made), 1).version
        await until(lambda: server.models["shop"].engine.version == newer)

    while_following(server, work)


def test_a_folder_that_is_replaced_while_it_is_read_is_read_again(made: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    """As one is that is replaced while other models are loaded: nothing follows folders then."""
    monkeypatch.setattr(processes, "_LOOK", 0.01)
    usual = hosted.load

    def meanwhile(folder: Path, threads: int) -> Engine:
        engine = usual(folder, threads)
        monkeypatch.setattr(hosted, "load", usual)
        changed(folder, folder)
        return engine

    monkeypatch.setattr(hosted, "load", meanwhile)
    server, newer = Server(made), load(made, 1).version
    assert server.models["shop"].engine.version != newer

    async def work(until: Until) -> None:
        await until(lambda: server.models["shop"].engine.version == newer)

    while_following(server, work)
    assert not server.models["shop"].replaced


def test_a_folder_that_is_copied_in_place_is_taken_when_it_is_whole(
    server: Server, made: Path, tmp_path: Path, monkeypatch: pytest.MonkeyPatch, caplog: pytest.LogCaptureFixture
) -> None:
    """Its manifest came before a tier: what was refused then, and told of once, is looked at again."""
    monkeypatch.setattr(processes, "_LOOK", 0.01)
    other, tier = changed(made, tmp_path / "other.nw"), made / artifact.read_manifest(made).tiers[0].file
    newer = load(other, 1).version

    async def work(until: Until) -> None:
        tier.rename(tmp_path / "tier")
        (other / "manifest.json").rename(made / "manifest.json")
        await until(lambda: "shop stays at version" in caplog.text)
        await asyncio.sleep(0.2)  # some more looks
        assert caplog.text.count("stays at version") == 1
        whole = (tmp_path / "tier").read_bytes()
        tier.write_bytes(whole[: len(whole) // 3])
        await until(lambda: caplog.text.count("stays at version") == 2)
        tier.write_bytes(whole[: len(whole) // 2])
        await asyncio.sleep(0.2)
        assert caplog.text.count("stays at version") == 2, "half a file has another hash each time"
        (tmp_path / "tier").rename(tier)
        await until(lambda: server.models["shop"].engine.version == newer)

    while_following(server, work)
