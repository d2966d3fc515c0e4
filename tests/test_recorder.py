"""What a server writes down: numbers of a sample, texts only where asked, alerts from the very same lines."""

from __future__ import annotations

import asyncio
import errno
import fcntl
import json
import logging
import stat
import threading
import time
from collections.abc import Sequence
from dataclasses import replace
from pathlib import Path
from typing import Any

import numpy as np
import pytest

from conftest import Say
from netweight import artifact
from netweight.engine import Outputs
from netweight.errors import OptionError
from netweight.monitor import Alert, Monitor, Record, lines, monitors, replay
from netweight.serve import Options, recorder
from netweight.serve.app import application
from netweight.serve.hosted import Hosted, Models
from netweight.serve.metrics import Metrics
from netweight.serve.recorder import Keeper, Recorder
from netweight.serve.server import checked
from netweight.serve.steady import Said
from netweight.serve.watching import Watching
from netweight.signals import AGREES, NAMES, Histogram
from netweight.task import Score
from test_monitor import fingerprint as plain
from test_monitor import stream
from test_monitor import watching as with_signal
from test_serve import TEXTS, Server, answer
from test_server import until


@pytest.fixture
def models(made: Path) -> Models:
    held = Models(1)
    held.load(made)
    return held


def offered(writer: Recorder, hosted: Hosted, said: Said) -> None:
    """As rows that come and are answered."""
    writer.offer(hosted, TEXTS, None, said, writer.drawn(len(TEXTS)))


def test_rows_are_written_down_without_their_text(
    models: Models, tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    monkeypatch.setattr(recorder, "_SHADOW", 1)
    hosted = models["made"]
    log = tmp_path / "rows.log"
    writer = Recorder(log, rate=1000)
    said = answer(hosted.engine, TEXTS)
    for _ in range(3):
        offered(writer, hosted, said)
    writer.close()
    records = [Record.from_line(line) for line in lines(log)]
    assert len(records) == 3 * len(TEXTS)
    assert hosted.fingerprint is not None
    tokens = hosted.engine.encoder.encode(TEXTS)
    wanted = hosted.fingerprint.signals(hosted.engine.encoder, tokens, said.outputs)
    best = hosted.engine.logits(len(hosted.engine.tiers) - 1, tokens).argmax(axis=1) == said.outputs.logits.argmax(
        axis=1
    )
    for i, record in enumerate(records[: len(TEXTS)]):
        assert (record.model, record.version) == ("made", hosted.engine.version)
        for name in NAMES:
            assert record.values[name] == pytest.approx(wanted[name][i], abs=1e-6)
        if AGREES in hosted.fingerprint.histograms:
            assert record.values[AGREES] == best[i]
    text = log.read_text()
    assert not any(word in text for one in TEXTS for word in one.split() if len(word) > 6)


def test_no_more_rows_are_taken_than_allowed(models: Models, tmp_path: Path) -> None:
    hosted, log = models["made"], tmp_path / "rows.log"
    said = answer(hosted.engine, TEXTS)
    writer = Recorder(log, rate=4)
    for _ in range(50):
        offered(writer, hosted, said)
    writer.close()
    assert 1 <= len(list(lines(log))) <= 10
    writer = Recorder(log, rate=1000)
    offered(writer, replace(hosted, fingerprint=None), said)
    writer.close()
    assert len(list(lines(log))) <= 10, "a model without a fingerprint is not watched"


def test_rows_are_drawn_when_they_come_and_not_when_they_are_answered(
    made: Path, tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    """Of a burst what an early tier is sure of is answered first: it would be all that is watched."""
    server, log, first, last = Server(made, "made"), tmp_path / "rows.log", TEXTS[0], f"{TEXTS[1]} " * 3
    writer = Recorder(log, rate=0.001)
    writer._allowed = 1.0
    server.app = application(server.models, server.metrics, recorder=writer)
    usual = server.models.answer

    async def work(client: Any) -> None:
        came, free = asyncio.Event(), asyncio.Event()

        async def answer(name: str, texts: Sequence[str], *more: Any) -> Any:
            if texts[0] == first:
                came.set()
                await free.wait()
            return await usual(name, texts, *more)

        monkeypatch.setattr(server.models, "answer", answer)
        slow = asyncio.create_task(client.post("/v1/models/made/predict", json={"texts": [first]}))
        await came.wait()
        assert (await client.post("/v1/models/made/predict", json={"texts": [last]})).status_code == 200
        free.set()
        assert (await slow).status_code == 200

    server.run(work)
    writer.close()
    hosted = server.models["made"]
    assert hosted.fingerprint is not None
    encoder = hosted.engine.encoder
    signals = hosted.fingerprint.signals(encoder, encoder.encode([first]), answer(hosted.engine, [first]).outputs)
    assert [Record.from_line(line).values["length"] for line in lines(log)] == pytest.approx(signals["length"].tolist())


def test_texts_worth_labelling_are_kept_once(models: Models, tmp_path: Path) -> None:
    hosted, path = models["made"], tmp_path / "rows.jsonl"
    sure = np.ones(len(TEXTS))
    sure[[3, 5]] = 0.0
    outputs = Outputs(np.zeros((len(TEXTS), 2), np.float32), sure, np.zeros(len(TEXTS), np.int64))
    for _ in range(2):
        keeper = Keeper(path)
        keeper(hosted, TEXTS, None, outputs)
        keeper(hosted, TEXTS, TEXTS, outputs)
    found = [json.loads(line) for line in path.read_text(encoding="utf-8").splitlines()]
    assert [(row["text"], row.get("pair")) for row in found] == [
        *((TEXTS[i], None) for i in (3, 5)),
        *((TEXTS[i], TEXTS[i]) for i in (3, 5)),
    ]
    assert stat.S_IMODE(path.stat().st_mode) == 0o600


def test_where_nearly_all_are_sure_the_others_are_kept(models: Models, tmp_path: Path) -> None:
    """Not all: the least confidence of 95 % of the certified rows is 1 as well."""
    hosted, path = models["made"], tmp_path / "rows.jsonl"
    assert hosted.fingerprint is not None
    held = {**hosted.fingerprint.histograms, "confidence": Histogram.of(np.ones(hosted.fingerprint.rows))}
    sure = np.ones(len(TEXTS))
    sure[3] = 0.9
    outputs = Outputs(np.zeros((len(TEXTS), 2), np.float32), sure, np.zeros(len(TEXTS), np.int64))
    Keeper(path)(replace(hosted, fingerprint=replace(hosted.fingerprint, histograms=held)), TEXTS, None, outputs)
    assert [json.loads(line)["text"] for line in path.read_text(encoding="utf-8").splitlines()] == [TEXTS[3]]


def test_kept_texts_are_for_their_owner_alone(models: Models, tmp_path: Path) -> None:
    """In a file that was there already, and in the one that is begun anew where logrotate has moved it away."""
    path = tmp_path / "rows.jsonl"
    path.touch()
    path.chmod(0o644)
    outputs = Outputs(np.zeros((len(TEXTS), 2), np.float32), np.zeros(len(TEXTS)), np.zeros(len(TEXTS), np.int64))
    keeper = Keeper(path)
    path.rename(tmp_path / "rows.jsonl.1")
    keeper(models["made"], TEXTS, None, outputs)
    assert path.read_bytes()
    assert [stat.S_IMODE(file.stat().st_mode) for file in tmp_path.glob("rows.jsonl*")] == [0o600] * 2


def test_a_file_of_somebody_else_is_refused(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    def refuse(path: Path, mode: int) -> None:
        raise PermissionError(1, "Operation not permitted")

    monkeypatch.setattr(Path, "chmod", refuse)
    with pytest.raises(OptionError, match=r"rows.jsonl is somebody else's, who could read .*; name another file"):
        Keeper(tmp_path / "rows.jsonl")


def test_half_a_line_that_a_kill_left_stops_nothing(models: Models, tmp_path: Path) -> None:
    path = tmp_path / "rows.jsonl"
    path.write_text('{"text": "one"}\n{"text": "a', encoding="utf-8")
    outputs = Outputs(np.zeros((len(TEXTS), 2), np.float32), np.zeros(len(TEXTS)), np.zeros(len(TEXTS), np.int64))
    Keeper(path)(models["made"], TEXTS, None, outputs)
    first, torn, *found = path.read_text(encoding="utf-8").splitlines()
    assert (first, torn) == ('{"text": "one"}', '{"text": "a')
    assert [json.loads(line)["text"] for line in found] == list(dict.fromkeys(TEXTS))


def test_a_log_that_is_moved_away_is_begun_anew(models: Models, tmp_path: Path) -> None:
    hosted, log = models["made"], tmp_path / "rows.log"
    said = answer(hosted.engine, TEXTS)
    writer = Recorder(log, rate=1000)
    offered(writer, hosted, said)
    deadline = time.monotonic() + 10
    while not log.read_text() and time.monotonic() < deadline:
        time.sleep(0.01)
    log.rename(tmp_path / "rows.log.1")
    offered(writer, hosted, said)
    writer.close()
    assert len(log.read_text().splitlines()) == len((tmp_path / "rows.log.1").read_text().splitlines()) == len(TEXTS)


def test_a_log_that_cannot_be_begun_anew_at_once_is_begun_later(
    models: Models, tmp_path: Path, caplog: pytest.LogCaptureFixture
) -> None:
    """A folder stands in for a full disk, or too many open files."""
    hosted, log = models["made"], tmp_path / "rows.log"
    said = answer(hosted.engine, TEXTS)
    writer = Recorder(log, rate=1000)
    log.rename(tmp_path / "rows.log.1")
    log.mkdir()
    offered(writer, hosted, said)
    until(lambda: "rows could not be written down" in caplog.text)
    log.rmdir()
    offered(writer, hosted, said)
    writer.close()
    assert len(log.read_text().splitlines()) == len(TEXTS)


def test_a_log_is_refused_where_nothing_can_be_written_beside_it(
    made: Path, tmp_path: Path, caplog: pytest.LogCaptureFixture
) -> None:
    log, lock = tmp_path / "rows.log", tmp_path / "rows.log.lock"
    log.touch()
    lock.mkdir()
    with pytest.raises(OptionError, match=r"rows.log.lock cannot be written or locked \(Is a directory\); the"):
        checked(Options((str(made),), log=str(log)))
    Watching(log, Models(1), Metrics(), 0.1).close()
    assert "rows are no longer watched" in caplog.text, "where it happens later, the server's log says so"


def test_a_log_is_refused_where_files_have_no_locks(
    made: Path, tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    log = tmp_path / "rows.log"
    options = Options((str(made),), log=str(log))
    with Path(f"{log}.lock").open("w") as held:
        fcntl.flock(held, fcntl.LOCK_EX)  # as a server that watches this log does
        assert checked(options).log == str(log)

    def without(file: object, how: int) -> None:
        raise OSError(errno.ENOSYS, "Function not implemented")

    monkeypatch.setattr(fcntl, "flock", without)
    with pytest.raises(OptionError, match=r"locked \(Function not implemented\); .* on a file system with locks\.$"):
        checked(options)


def test_who_waits_to_watch_outlives_a_log_that_is_moved_away(
    tmp_path: Path, monkeypatch: pytest.MonkeyPatch, caplog: pytest.LogCaptureFixture
) -> None:
    asked, log, died = threading.Event(), tmp_path / "rows.log", list[object]()

    def taken(lock: object, how: int) -> None:
        asked.set()
        raise BlockingIOError

    log.touch()
    monkeypatch.setattr(fcntl, "flock", taken)
    monkeypatch.setattr(threading, "excepthook", died.append)
    watching = Watching(log, Models(1), Metrics(), 0.1)
    log.unlink()
    assert asked.wait(10)
    watching.close()
    assert not died
    assert "rows are no longer watched" not in caplog.text


def test_who_comes_to_watch_waits_for_a_log_that_was_moved_away(
    tmp_path: Path, caplog: pytest.LogCaptureFixture
) -> None:
    log = tmp_path / "rows.log"  # logrotate has moved it away, and no sample has come since
    watching = Watching(log, Models(1), Metrics(), 0.1)
    time.sleep(0.5)
    assert watching._thread.is_alive()
    log.touch()
    watching.close()
    assert "rows are no longer watched" not in caplog.text


def test_what_is_kept_stays_bounded(models: Models, tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr(recorder, "_KEPT", 3)
    outputs = Outputs(np.zeros((len(TEXTS), 2), np.float32), np.zeros(len(TEXTS)), np.zeros(len(TEXTS), np.int64))
    Keeper(tmp_path / "rows.jsonl")(models["made"], TEXTS, None, outputs)
    assert len((tmp_path / "rows.jsonl").read_text(encoding="utf-8").splitlines()) == 3


def test_a_failure_to_write_is_said_and_nothing_else_happens(
    models: Models, tmp_path: Path, monkeypatch: pytest.MonkeyPatch, caplog: pytest.LogCaptureFixture
) -> None:
    hosted, log = models["made"], tmp_path / "rows.log"
    said = answer(hosted.engine, TEXTS)
    writer = Recorder(log, rate=1000)
    monkeypatch.setattr(writer, "_records", lambda sample: 1 / 0)
    with caplog.at_level(logging.ERROR):
        offered(writer, hosted, said)
        writer.close()
    assert "rows could not be written down" in caplog.text
    assert not log.read_text()


def test_drifted_requests_raise_the_alerts_of_a_replay(
    made: Path, tmp_path: Path, caplog: pytest.LogCaptureFixture
) -> None:
    log, posted = tmp_path / "rows.log", []
    server = Server(made, "made")
    log.touch()
    watching = Watching(log, server.models, server.metrics, 0.1, posted.append)
    second = Watching(log, server.models, server.metrics, 0.1, posted.append)  # another worker of the same log
    writer = Recorder(log, rate=1000)
    server.app = application(server.models, server.metrics, recorder=writer)
    longer = [f"{text} " * 4 for text in TEXTS]
    with caplog.at_level(logging.WARNING):
        with log.open("a") as file:
            file.write("half a rec\n")  # ends no watching
        for _ in range(4):
            assert server.post({"texts": longer}, "made").status_code == 200
        writer.close()
        end = time.monotonic() + 60
        while not any(alert.signal == "length" for alert in posted):
            assert time.monotonic() < end
            time.sleep(0.05)
        again = monitors([made], 0.1)
        replayed = list(replay(lines(log), lambda name, version: again.get((name, version)), lambda problem: None))
        while len(posted) < len(replayed):
            assert time.monotonic() < end
            time.sleep(0.05)
    watching.close()
    second.close()
    assert posted == replayed
    assert all(isinstance(alert, Alert) for alert in posted)
    assert "made" in caplog.text
    assert caplog.text.count("is no record of an answer, and is passed over") == 1
    text = server.get("/metrics").text
    assert 'netweight_alerts_total{model="made",signal="length"} 1.0' in text
    drift = next(line for line in text.splitlines() if line.startswith('netweight_drift{model="made",signal="length"}'))
    assert float(drift.split()[-1]) >= 1


def test_evidence_of_a_signal_that_a_new_version_lacks_is_shown_no_longer(tmp_path: Path) -> None:
    """As `agrees`, where a single tier takes the place of two: its alarm stood for ever."""
    (tmp_path / "rows.log").touch()
    metrics = Metrics()
    watching = Watching(tmp_path / "rows.log", Models(1), metrics, 0.1)
    watching.close()
    for version, fingerprint in (("v1", with_signal(AGREES, np.ones(400))), ("v2", plain())):
        watching._monitors["shop", version] = Monitor(fingerprint)

    def shown(version: str) -> dict[str, float]:
        records = [replace(r, version=version, values={**r.values, AGREES: 0.0}) for r in stream(60, {})]
        list(replay((record.to_line() for record in records), watching._watched))
        samples = [s for metric in metrics.registry.collect() for s in metric.samples if s.name == "netweight_drift"]
        return {sample.labels["signal"]: sample.value for sample in samples}

    assert shown("v1")[AGREES] >= 1
    assert set(shown("candidate")) == {*NAMES, AGREES}, "what nobody watches changes nothing"
    assert set(shown("v2")) == set(NAMES)


def test_refusals(say: Say, made: Path, tmp_path: Path) -> None:
    with pytest.raises(OptionError, match="come from a log; name one with --log"):
        Options((str(made),), keep="x")
    with pytest.raises(OptionError, match="0 rows a second of a log; use more than 0 and at most 1,000"):
        Options((str(made),), log="x", rate=0)
    manifest = artifact.read_manifest(made)
    contents = {n: artifact.read_file(made, manifest, n) for n in manifest.files if n != artifact.FINGERPRINT}
    artifact.save(tmp_path / "old.nw", manifest, contents)
    log = tmp_path / "rows.log"
    assert "old.nw has no fingerprint" in say("serve", tmp_path / "old.nw", "--log", log).err
    contents = {n: artifact.read_file(made, manifest, n) for n in manifest.files}
    artifact.save(tmp_path / "stars.nw", replace(manifest, task=Score()), contents)
    assert (
        "scores carry no confidence: leave it out."
        in say("serve", tmp_path / "stars.nw", "--log", log, "--keep", tmp_path / "keep").err
    )
    both = Options((str(made), str(tmp_path / "stars.nw")), log=str(log), keep=str(tmp_path / "keep"))
    assert checked(both).keep == both.keep, "one of them has rows to keep"
    assert "no URL that alerts can be posted to" in say("serve", made, "--log", log, "--webhook", "x").err
