"""Candidates beside a model, and models that sleep: what clients see, what is counted, when the verdict comes."""

from __future__ import annotations

import asyncio
import logging
import threading
from dataclasses import replace
from pathlib import Path
from typing import Any

import httpx
import numpy as np
import pytest

from conftest import Say
from netweight import artifact
from netweight.cluster.online import Replica
from netweight.engine import load
from netweight.errors import OptionError
from netweight.monitor.martingale import share_bounds
from netweight.serve import Options, Rollout, hosted
from netweight.serve.hosted import Models
from netweight.serve.problems import Problem, full
from netweight.serve.rollout import Trial, begin, comparable
from netweight.serve.server import built, checked
from netweight.serve.steady import Work
from netweight.task import Classify, Score
from test_serve import TEXTS, Server, changed


@pytest.fixture
def server(made: Path) -> Server:
    return Server(made)


def candidate(server: Server, folder: Path, plan: Rollout, wrong: bool = False) -> Trial:
    begin(server.models, "shop", folder, plan)
    trial = server.models.trials["shop"]
    assert isinstance(trial, Trial)
    if wrong:
        usual = trial.candidate.queue._step

        def other(work: Work) -> Work:
            done = usual(work)
            outputs = replace(done.said.outputs, logits=np.roll(done.said.outputs.logits, 1, axis=1))
            return replace(done, said=replace(done.said, outputs=outputs))

        trial.candidate.queue._step = other
    return trial


def asks(server: Server, count: int) -> list[Any]:
    async def work(client: Any) -> list[Any]:
        found = [await client.post("/v1/models/shop/predict", json={"texts": TEXTS[:5]}) for _ in range(count)]
        await asyncio.sleep(0.2)  # comparisons run beside requests
        return [response.json() for response in found]

    return list(server.run(work))


def test_a_shadow_answers_nobody_and_is_safe_where_it_agrees(
    server: Server, made: Path, tmp_path: Path, caplog: pytest.LogCaptureFixture
) -> None:
    trial = candidate(server, changed(made, tmp_path / "next.nw"), Rollout("shadow", 1.0, 0.2))
    version = load(made, 1).version
    with caplog.at_level(logging.WARNING):
        assert {said["version"] for said in asks(server, 40)} == {version}
    assert trial.rows == 40
    assert trial.different == 0
    assert trial.verdict == "safe"
    assert trial.bounds == share_bounds(0, 40, 0.05)
    assert "shop: the candidate is safe, it may replace the model" in caplog.text
    said = server.get("/v1/models").json()["models"][0]["candidate"]
    assert said == trial.state()
    assert said["against"] == version
    text = server.get("/metrics").text
    assert 'netweight_candidate_verdict{model="shop"} 1.0' in text
    assert 'netweight_candidate_rows{model="shop"} 40.0' in text


def test_a_canary_answers_its_share_until_it_is_harmful(server: Server, made: Path, tmp_path: Path) -> None:
    next_folder = changed(made, tmp_path / "next.nw")
    trial = candidate(server, next_folder, Rollout("canary", 1.0, 0.3), wrong=True)
    old, new = load(made, 1).version, load(next_folder, 1).version
    versions = [said["version"] for said in asks(server, 40)]
    assert trial.verdict == "harmful"
    assert versions == [new] * versions.count(new) + [old] * versions.count(old)
    assert 3 < versions.count(new) < 40
    assert trial.different == trial.rows


def test_requests_are_chosen_by_chance(server: Server, made: Path, tmp_path: Path) -> None:
    next_folder = changed(made, tmp_path / "next.nw")
    candidate(server, next_folder, Rollout("canary", 0.3, 0.01))
    new = load(next_folder, 1).version
    count = sum(said["version"] == new for said in asks(server, 120))
    assert 15 < count < 60


@pytest.mark.parametrize("mode", ["shadow", "canary"])
def test_a_candidate_that_fails_costs_no_answer(
    server: Server, made: Path, tmp_path: Path, mode: Any, caplog: pytest.LogCaptureFixture
) -> None:
    trial = candidate(server, changed(made, tmp_path / "next.nw"), Rollout(mode, 1.0, 0.3))

    def broken(work: Work) -> Work:
        raise RuntimeError("no")

    trial.candidate.queue._step = broken
    assert {said["version"] for said in asks(server, 30)} == {load(made, 1).version}
    assert trial.verdict == "harmful"
    assert trial.failed == trial.different == trial.rows > 3
    assert "the candidate of shop failed: RuntimeError" in caplog.text


@pytest.mark.parametrize("mode", ["shadow", "canary"])
def test_a_busy_candidate_did_not_fail(server: Server, made: Path, tmp_path: Path, mode: Any) -> None:
    trial = candidate(server, changed(made, tmp_path / "next.nw"), Rollout(mode, 1.0, 0.3))

    def busy(work: Work) -> Work:
        raise full(1.0)

    trial.candidate.queue._step = busy
    assert {said["version"] for said in asks(server, 5)} == {load(made, 1).version}
    assert (trial.rows, trial.failed, trial.verdict) == (0, 0, "undecided")


def test_a_broken_model_says_nothing_about_its_candidate(server: Server, made: Path, tmp_path: Path) -> None:
    next_folder = changed(made, tmp_path / "next.nw")
    trial = candidate(server, next_folder, Rollout("canary", 1.0, 0.3))

    def broken(work: Work) -> Work:
        raise RuntimeError("no")

    server.models["shop"].queue._step = broken
    assert {said["version"] for said in asks(server, 5)} == {load(next_folder, 1).version}
    assert trial.rows == 0


def test_another_version_starts_the_count_anew(server: Server, made: Path, tmp_path: Path) -> None:
    trial = candidate(server, changed(made, tmp_path / "next.nw"), Rollout("shadow", 1.0, 0.3))
    asks(server, 5)
    assert trial.rows == 5
    server.models.load(changed(made, tmp_path / "newer.nw"), "shop")
    asks(server, 3)
    assert trial.rows == 3
    one = server.models["shop"]
    engine = load(made, 1)
    engine.task, engine.version = Score(), "scores"
    assert not trial.chosen(replace(one, engine=engine))
    assert trial.verdict == "harmful"


def test_a_comparison_with_the_version_before_does_not_count(server: Server, made: Path, tmp_path: Path) -> None:
    trial = candidate(server, changed(made, tmp_path / "next.nw"), Rollout("shadow", 1.0, 0.3))
    usual, free = trial.candidate.queue._step, threading.Event()

    def held(work: Work) -> Work:
        assert free.wait(10)
        return usual(work)

    trial.candidate.queue._step = held

    async def work(client: Any) -> None:
        await client.post("/v1/models/shop/predict", json={"texts": TEXTS[:5]})
        server.models.load(changed(made, tmp_path / "newer.nw"), "shop")
        await client.post("/v1/models/shop/predict", json={"texts": TEXTS[:5]})
        assert len(trial._running) == 2
        free.set()
        await asyncio.gather(*trial._running)

    server.run(work)
    assert trial.rows == 1


def test_what_is_safe_may_prove_harmful_and_stays_so(server: Server, made: Path, tmp_path: Path) -> None:
    trial = candidate(server, changed(made, tmp_path / "next.nw"), Rollout("shadow", 1.0, 0.05))
    shop = server.models["shop"]

    def seen(count: int, different: bool) -> str:
        for _ in range(count):
            trial._seen(shop.engine.version, different)
        return trial.verdict

    assert trial.chosen(shop)
    assert seen(116, different=False) == "safe"
    assert seen(20, different=True) == "harmful"
    assert not trial.chosen(shop)
    assert seen(1000, different=False) == "harmful"
    assert trial.bounds[1] < 0.05


@pytest.mark.parametrize("mode", ["shadow", "canary"])
def test_explanations_are_nobodys_texts_to_a_candidate(server: Server, made: Path, tmp_path: Path, mode: Any) -> None:
    trial = candidate(server, changed(made, tmp_path / "next.nw"), Rollout(mode, 1.0, 0.3))

    async def work(client: Any) -> set[str]:
        found = [await client.post("/v1/models/shop/explain", json={"text": TEXTS[0]}) for _ in range(5)]
        await asyncio.gather(*trial._running)
        return {response.json()["version"] for response in found}

    assert server.run(work) == {load(made, 1).version}
    assert trial.rows == 0


def test_comparisons_are_bounded(server: Server, made: Path, tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr("netweight.serve.rollout._AT_ONCE", 0)
    trial = candidate(server, changed(made, tmp_path / "next.nw"), Rollout("shadow", 1.0, 0.3))
    assert len(asks(server, 5)) == 5
    assert trial.rows == 0


def test_a_worker_starts_without_a_candidate_that_took_the_place_of_its_model(
    made: Path, tmp_path: Path, caplog: pytest.LogCaptureFixture
) -> None:
    """As the one does that takes the place of a worker that died."""
    following = changed(made, tmp_path / "next.nw")
    version = load(following, 1).version
    options = checked(Options((str(made),), threads=1, candidates=(("made", str(following)),)))
    made.rename(tmp_path / "old.nw")
    following.rename(made)
    app = built(options)

    async def work() -> Any:
        transport = httpx.ASGITransport(app)
        async with httpx.AsyncClient(transport=transport, base_url="http://test") as client:
            return await client.post("/v1/models/made/predict", json={"texts": TEXTS[:2]})

    assert asyncio.run(work()).json()["version"] == version
    assert not app.state.models.trials
    assert "the candidate of made is not asked: " in caplog.text
    app.state.models.close()


def test_refusals(made: Path, tmp_path: Path, say: Say) -> None:
    with pytest.raises(OptionError, match="the mode of a rollout is 'blue'; use shadow or canary"):
        Rollout("blue")  # type: ignore[arg-type]
    with pytest.raises(OptionError, match="the share of requests is 0; use more than 0 and at most 1"):
        Rollout(share=0)
    with pytest.raises(OptionError, match="the share of rows that may differ is 2"):
        Rollout(allowed=2)
    manifest = artifact.read_manifest(made)
    with pytest.raises(OptionError, match="a task of scores has none"):
        comparable("shop", manifest, replace(manifest, task=Score()))
    with pytest.raises(OptionError, match="other labels than the model; replace the folder instead"):
        comparable("shop", manifest, replace(manifest, task=Classify(("x", "y"))))
    assert manifest.paired is False
    with pytest.raises(OptionError, match="answers pairs of texts, the other single ones"):
        comparable("shop", manifest, replace(manifest, provenance={"pairs": True}))
    comparable("shop", manifest, replace(manifest, provenance={}))
    said = say("serve", made, "--candidate", f"other={made}")
    assert "the candidate is for 'other', which is not served here; there are: made." in said.err
    assert "no artifact" in say("serve", made, "--candidate", f"made={tmp_path}").err
    assert "memory '2' is no size; write 24GB" in say("serve", made, "--memory", "2").err


# --- models that sleep ---


def test_the_least_recently_asked_sleeps_and_wakes(made: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr(hosted, "resident", lambda: 0)  # then what counts is the bytes of the files
    size = artifact.size(made, artifact.read_manifest(made))
    models = Models(1, memory=2 * size)
    for name in ("a", "b"):
        models.load(made, name)
    wanted = [p.label for p in load(made, 1).predict(TEXTS[:3])]

    async def labels(name: str) -> list[str]:
        one, said = await models.answer(name, TEXTS[:3])
        return [one.engine.task.labels[i] for i in said.outputs.logits.argmax(axis=1)]  # type: ignore[union-attr]

    def awake() -> set[str]:
        return {one.name for one in models}

    asyncio.run(labels("a"))
    models.load(made, "c")
    assert awake() == {"a", "c"}, "b was asked least recently"
    assert {m["name"]: m["asleep"] for m in models.known} == {"a": False, "b": True, "c": False}
    assert asyncio.run(labels("b")) == wanted
    assert awake() == {"c", "b"}

    async def all_at_once() -> list[list[str]]:
        return await asyncio.gather(*(labels(name) for name in "abcabc"))

    assert asyncio.run(all_at_once()) == [wanted] * 6
    assert len(awake()) == 2
    with pytest.raises(Problem, match="there is no model 'd' here; there are: a, b, c"):
        asyncio.run(labels("d"))
    models.close()


def test_room_is_made_before_a_model_wakes(made: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    size = artifact.size(made, artifact.read_manifest(made))
    grows = [0, 2 * size, 2 * size]  # before a, after a; b and c take the bytes of their files
    monkeypatch.setattr(hosted, "resident", lambda: grows.pop(0) if len(grows) > 1 else grows[0])
    models, usual, awake = Models(1, memory=3 * size), hosted.load, list[set[str]]()
    monkeypatch.setattr(hosted, "load", lambda *given: (awake.append({one.name for one in models}), usual(*given))[1])
    for name in "abc":
        models.load(made, name)
    assert awake == [set(), {"a"}, {"b"}], "the bytes of c's files would have been too many"
    assert models["a"].memory == 2 * size, "as when it was loaded first, though nothing grew now"
    assert awake[3:] == [{"c"}]
    models._memory = size
    assert models["b"].name == "b"
    assert awake[4:] == [set()]
    models.close()


def test_a_server_is_ready_while_its_models_sleep(server: Server) -> None:
    replica = Replica()
    replica.app, server.app.state.models = server.app, server.models
    server.models._hosted.clear()  # as for a moment, where one has gone and the next is read
    assert server.get("/readyz").status_code == 200
    replica.check_health()
    server.models._known.clear()
    assert server.get("/readyz").json()["code"] == "not-ready"
    with pytest.raises(RuntimeError, match="no model is loaded"):
        replica.check_health()


def test_one_model_is_always_awake(made: Path) -> None:
    models = Models(1, memory=1)
    models.load(made, "a")
    assert [one.name for one in models] == ["a"]
    models.load(made, "b")
    assert [one.name for one in models] == ["b"]
    assert models["a"].name == "a"
    assert models["a"].memory >= artifact.size(made, artifact.read_manifest(made))


def test_a_model_that_cannot_be_woken_is_a_problem_of_the_moment(
    made: Path, tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    folder = changed(made, tmp_path / "gone.nw")
    models = Models(1, memory=1)
    models.load(folder, "gone")
    models.load(made, "a")
    (folder / artifact.MANIFEST).rename(tmp_path / "manifest.json")
    with pytest.raises(Problem, match="model 'gone' cannot be loaded now") as caught:
        asyncio.run(models.answer("gone", TEXTS[:1]))
    assert (caught.value.status, caught.value.headers["Retry-After"]) == (503, "5")
    (tmp_path / "manifest.json").rename(folder / artifact.MANIFEST)
    with monkeypatch.context() as patch:
        patch.setattr(hosted, "load", lambda *_: 1 / 0)  # an engine's own error
        with pytest.raises(Problem, match="model 'gone' cannot be loaded now"):
            asyncio.run(models.answer("gone", TEXTS[:1]))
    assert asyncio.run(models.answer("gone", TEXTS[:1]))[0].name == "gone"


def test_nothing_is_dropped_while_models_take_turns(made: Path) -> None:
    models = Models(1, patience=30, memory=1)
    for name in "ab":
        models.load(made, name)

    async def many(name: str) -> int:
        return len([await models.answer(name, TEXTS[:2]) for _ in range(8)])

    async def turns() -> list[int]:
        return await asyncio.gather(*(many(name) for name in "abab"))

    assert asyncio.run(turns()) == [8] * 4
    assert len(list(models)) == 1
