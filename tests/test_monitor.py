"""Monitoring: tests that may be looked at after every row, the same alerts live and replayed, no customer text in logs."""

from __future__ import annotations

import http.server
import json
import logging
import math
import random
import threading
import time
import tracemalloc
from collections.abc import Iterator
from dataclasses import replace
from pathlib import Path

import numpy as np
import pytest
from hypothesis import given
from hypothesis import strategies as st
from scipy import stats

from conftest import Say, many_rows, tiny_encoder
from netweight import artifact
from netweight.encode import Tokens
from netweight.engine import Outputs, load
from netweight.errors import ArtifactError, CorruptArtifact, DataError, OptionError
from netweight.monitor import Alert, Monitor, Record, Webhook, lines, monitors, replay
from netweight.monitor import alerts as alerts_module
from netweight.monitor.martingale import _JUMP, Jumper, Ranks, share_bounds
from netweight.monitor.watch import MONTH
from netweight.signals import AGREES, NAMES, Fingerprint, Histogram, projected

VALUES = st.lists(st.floats(-1e6, 1e6), min_size=1, max_size=80).map(np.array)


# --- signals ---


@given(VALUES)
def test_every_value_falls_into_its_bin(values: np.ndarray) -> None:
    made = Histogram.of(values)
    assert sum(made.counts) == len(values)
    for value in values:
        place = made.bin(value)
        assert place == len(made.edges) or value <= made.edges[place]
        assert place == 0 or value > made.edges[place - 1]
    small = (values <= made.quantile(0.05)).mean()
    assert small >= 0.05, "at least the share that was asked for lies there"


@pytest.mark.parametrize(
    ("values", "other"),
    [([1.0] * 400, 0.0), ([0.0] * 4 + [1.0] * 396, 0.0), ([0.0] * 200 + [1.0] * 4 + [2.0] * 196, 1.0)],
)
def test_a_value_of_many_rows_has_a_bin_of_its_own(values: list[float], other: float) -> None:
    """Bins reach up to and including an edge: what lies beneath the only edge was taken for what lies on it."""
    made = Histogram.of(np.array(values))
    assert made.bin(other) < made.bin(values[-1])
    assert made.counts[made.bin(values[-1])] == values.count(values[-1])
    assert made.counts[made.bin(other)] == values.count(other)


def test_projections_are_means_of_signs_that_belong_to_tokens() -> None:
    encoder = tiny_encoder()
    texts = list(many_rows(20).text)
    tokens = encoder.encode([*texts, texts[0] + " " + texts[1]])
    found = projected(tokens)
    assert found.shape == (21, 16)
    one: dict[int, np.ndarray] = {}
    for row in range(3):
        ids = tokens.ids[tokens.offsets[row] : tokens.offsets[row + 1]]
        for i in ids:
            single = replace(tokens, ids=np.array([i], np.int32), types=np.zeros(1, np.uint8), offsets=np.array([0, 1]))
            one[int(i)] = projected(single)[0]
            assert set(np.abs(one[int(i)])) == {1.0}
        assert found[row] == pytest.approx(np.mean([one[int(i)] for i in ids], axis=0))


def test_a_million_tokens_are_projected_a_part_at_a_time() -> None:
    """Their signs, all at once, would take half a kilobyte a token."""
    rng = np.random.default_rng(0)
    offsets = np.concatenate([[0], np.cumsum(rng.integers(0, 200, 10_000))])
    count = int(offsets[-1])
    tokens = Tokens(rng.integers(0, 30_000, count).astype(np.int32), np.zeros(count, np.uint8), offsets)
    tracemalloc.start()
    found = projected(tokens)
    most = tracemalloc.get_traced_memory()[1]
    tracemalloc.stop()
    assert most < 100_000_000
    alone = [projected(tokens.stretch(row, row + 1)) for row in range(0, 10_000, 7)]
    np.testing.assert_array_equal(found[::7], np.concatenate(alone))
    assert projected(tokens.stretch(5, 5)).shape == (0, 16)


def test_a_fingerprint_is_read_as_it_was_written(made: Path) -> None:
    manifest = artifact.read_manifest(made)
    data = artifact.read_file(made, manifest, artifact.FINGERPRINT)
    found = Fingerprint.from_json(data)
    assert found.to_json() == data
    assert set(NAMES) <= set(found.histograms)
    assert (AGREES in found.histograms) == (len(manifest.tiers) > 1)
    stored = json.loads(data)
    for broken in (
        b"{",
        b"[]",
        json.dumps(stored | {"rows": 1}).encode(),
        json.dumps(stored | {"center": []}).encode(),
    ):
        with pytest.raises(CorruptArtifact, match="fingerprint"):
            Fingerprint.from_json(broken)


def test_unknown_tokens_are_counted() -> None:
    encoder = tiny_encoder()
    assert encoder.unknown is not None
    tokens = encoder.encode(["ok", "☃ ☃"])
    outputs = Outputs(np.zeros((2, 3), np.float32), np.ones(2), np.zeros(2, np.int64))
    found = Fingerprint.of(encoder, tokens, outputs).signals(encoder, tokens, outputs)
    ids = tokens.ids[tokens.offsets[1] : tokens.offsets[2]]
    assert found["unknown"][1] == pytest.approx(float((ids == encoder.unknown).mean()))
    assert found["unknown"][1] > 0
    assert found["length"].tolist() == tokens.lengths.tolist()


# --- tests that may be looked at after every row ---


def test_ranks_are_uniform_whatever_the_bins() -> None:
    rng = np.random.default_rng(0)
    base = rng.integers(0, 4, 300).astype(float)  # few values: mostly ties
    ranks, made = Ranks(Histogram.of(base).counts), Histogram.of(base)
    found = [ranks.p_value(made.bin(float(v)), rng.random()) for v in rng.integers(0, 4, 3000)]
    assert min(found) >= 0
    assert max(found) <= 1
    assert stats.kstest(found, "uniform").pvalue > 1e-3
    assert abs(stats.pearsonr(found[:-1], found[1:])[0]) < 0.06, "and independent"


@given(st.lists(st.floats(0, 1), max_size=30), st.integers(0, 2**31))
def test_capital_is_expected_to_stay_what_it_is(history: list[float], seed: int) -> None:
    def after(p: float) -> float:
        jumper = Jumper()
        for each in history:
            jumper.bet(each)
        return jumper.bet(p)

    jumper = Jumper()
    for each in history:
        jumper.bet(each)
    middle = (np.arange(64) + 0.5) / 64  # linear in pieces, so midpoints integrate exactly
    assert np.mean([after(p) for p in middle]) == pytest.approx(jumper.capital)


def test_one_start_is_the_jumper_of_the_paper() -> None:
    rng = np.random.default_rng(1)
    jumper, total = Jumper(), {-1.0: 1 / 3, 0.0: 1 / 3, 1.0: 1 / 3}
    for p in rng.random(150) ** 1.5:
        jumper.bet(float(p))
        held = sum(total.values())
        total = {e: ((1 - _JUMP) * c + _JUMP * held / 3) * (1 + e * (p - 0.5)) for e, c in total.items()}
    # Half of the first start's share is on p; that is half of 1 / (1 * 2).
    assert jumper._capital[0, 0].sum() / 0.25 == pytest.approx(sum(total.values()))


def test_false_alarms_stay_within_their_level() -> None:
    rng, times, level = np.random.default_rng(2), 200, 0.2
    alarms = 0
    for _ in range(times):
        made = Histogram.of(rng.normal(size=200))
        ranks, jumper = Ranks(made.counts), Jumper()
        alarms += any(jumper.bet(ranks.p_value(made.bin(v), rng.random())) >= 1 / level for v in rng.normal(size=250))
    assert alarms <= stats.binom.ppf(0.999, times, level)


@pytest.mark.parametrize(("shift", "scale"), [(0.7, 1.0), (-0.7, 1.0), (0.0, 2.0)])
def test_a_change_after_a_long_calm_is_seen(shift: float, scale: float) -> None:
    rng = np.random.default_rng(3)
    made = Histogram.of(rng.normal(size=1000))
    ranks, jumper = Ranks(made.counts), Jumper()
    for v in rng.normal(size=1500):
        assert jumper.bet(ranks.p_value(made.bin(v), rng.random())) < 100
    later = rng.normal(shift, scale, 400)
    assert any(jumper.bet(ranks.p_value(made.bin(v), rng.random())) >= 100 for v in later)


def test_a_change_after_millions_of_rows_is_seen() -> None:
    """The share of the 31,623rd start is less than a billionth, which does not make it a ruined one."""
    jumper = Jumper()
    jumper._started, jumper._rows = 31_622, 200 * 31_622
    for _ in range(100):
        jumper.bet(0.01)
    assert jumper.capital > 1e7


def test_starts_that_are_ruined_are_given_up() -> None:
    jumper = Jumper()
    for p in np.random.default_rng(0).random(12_000):
        jumper.bet(float(p))
    assert jumper._started == 60
    assert len(jumper._capital) < 50


@given(st.integers(0, 300), st.integers(0, 300), st.floats(0.001, 0.3))
def test_bounds_of_a_share_are_those_of_the_mixture(yes: int, no: int, level: float) -> None:
    low, high = share_bounds(yes, yes + no, level)
    n = yes + no
    assert 0 <= low <= (yes / n if n else 0) <= high <= 1
    for p, inside in ((low, True), (high, True), (low * 0.98, False), (1 - (1 - high) * 0.98, False)):
        if n and 0 < p < 1 and p not in (low, high):
            # The mixture of binomials under Jeffreys' prior is a beta-binomial.
            mixed = stats.betabinom.logpmf(yes, n, 0.5, 0.5) - stats.binom.logpmf(yes, n, p)
            assert (mixed < -math.log(level)) == inside


def test_how_many_rows_that_agree_make_a_candidate_safe() -> None:
    assert share_bounds(0, 116, 0.05)[1] <= 0.05 < share_bounds(0, 115, 0.05)[1], "docs/serving.md names the number"


def test_bounds_hold_at_every_row_at_once() -> None:
    rng = random.Random(4)
    times, missed = 200, 0
    for _ in range(times):
        yes = 0
        for n in range(1, 201):
            yes += rng.random() < 0.3
            low, high = share_bounds(yes, n, 0.2) if n % 5 == 0 else (0.0, 1.0)
            if not low <= 0.3 <= high:
                missed += 1
                break
    assert missed <= stats.binom.ppf(0.999, times, 0.2)


# --- the monitor ---


def fingerprint(rows: int = 400) -> Fingerprint:
    rng = np.random.default_rng(5)
    held = {name: Histogram.of(rng.normal(size=rows)) for name in NAMES}
    return Fingerprint(rows, (0.0,) * 16, (1.0,) * 16, held)


def watching(name: str, values: np.ndarray) -> Fingerprint:
    """One of 400 rows, on which a signal had these values."""
    return replace(fingerprint(), histograms={**fingerprint().histograms, name: Histogram.of(values)})


def stream(count: int, shift: dict[str, float], start: float = 0.0, seed: int = 6) -> list[Record]:
    rng = np.random.default_rng(seed)
    return [
        Record(start + i, "shop", "v1", {name: float(rng.normal() + shift.get(name, 0.0)) for name in NAMES})
        for i in range(count)
    ]


def test_the_signal_that_moved_is_named_once_a_month() -> None:
    monitor = Monitor(fingerprint(), 0.05)
    alerts = [a for r in stream(300, {"length": 1.5}) for a in monitor.see(r)]
    assert [a.signal for a in alerts] == ["length"]
    assert "shop v1: tokens of a row changed: " in str(alerts[0])
    assert alerts[0].now > alerts[0].before + 1
    assert monitor.capitals()["length"] >= 1
    assert all(monitor.capitals()[name] < 1 for name in NAMES if name != "length")
    later = [a for r in stream(300, {"length": 1.5}, start=MONTH) for a in monitor.see(r)]
    assert [a.signal for a in later] == ["length"], "it is still so in the next month"
    assert not [a for r in stream(300, {}, start=2 * MONTH) for a in monitor.see(r)]
    with pytest.raises(OptionError, match="0 false alarms a month; use more than 0 and at most 1"):
        Monitor(fingerprint(), 0)


def test_the_end_of_an_agreement_is_seen() -> None:
    monitor = Monitor(watching(AGREES, np.ones(400)))
    calm = [Record(i, "shop", "v1", {AGREES: float(i % 150 > 0)}) for i in range(1, 301)]
    assert not [a for r in calm for a in monitor.see(r)], "one in 150 raises no alarm, though none was certified"
    alerts = [a for i in range(60) for a in monitor.see(Record(301 + i, "shop", "v1", {AGREES: 0.0}))]
    assert [(a.signal, a.before) for a in alerts] == [(AGREES, 1.0)]


def test_a_log_keeps_every_digit() -> None:
    """Rounded to six, all of these are 1, above each that was certified."""
    rng = np.random.default_rng(7)
    monitor = Monitor(watching("confidence", 1 - 10 ** -rng.uniform(7, 9, 400)))
    for sure in 1 - 10 ** -rng.uniform(7, 9, 300):
        record = Record(0.0, "shop", "v1", {"confidence": float(sure)})
        read = Record.from_line(record.to_line())
        assert read == record
        assert not monitor.see(read)


def test_a_log_replays_to_the_same_alerts(tmp_path: Path) -> None:
    records = stream(200, {"confidence": -1.5})
    log = tmp_path / "rows.log"
    live = Monitor(fingerprint())
    wanted = []
    with log.open("w") as file:
        for record in records:
            line = record.to_line()
            file.write(f"{line}\n\n")
            wanted += live.see(Record.from_line(line))
    assert [a.signal for a in wanted] == ["confidence"]
    again = {("shop", "v1"): Monitor(fingerprint())}
    assert list(replay(lines(log), lambda name, version: again.get((name, version)))) == wanted
    assert not list(replay(lines(log), lambda name, version: None))
    for bad in ("{", "[]", '{"at": 1}', records[0].to_line().replace("0.0,", "NaN,", 1)):
        log.write_text(f"{records[0].to_line()}\n{bad}\n")
        with pytest.raises(DataError, match=r"line 2 of the log is no record of an answer \(.*\); remove that line\.$"):
            list(replay(lines(log), lambda name, version: None))
        broken: list[Exception] = []
        assert not list(replay(lines(log), lambda name, version: None, broken.append))
        assert len(broken) == 1
    with pytest.raises(DataError, match="there is no log"):
        list(lines(tmp_path / "none"))


def test_a_log_is_followed_while_it_grows(tmp_path: Path) -> None:
    log, stop, seen = tmp_path / "rows.log", threading.Event(), []
    log.write_text("old\n")
    arrived = threading.Semaphore(0)

    def read() -> None:
        for line in lines(log, stop, at=4):
            seen.append(line)
            arrived.release()

    reader = threading.Thread(target=read)
    reader.start()
    with log.open("a") as file:
        file.write("one\ntw")
        file.flush()
        assert arrived.acquire(timeout=10)
        file.write("o\n")
    assert arrived.acquire(timeout=10)
    log.write_text("new\n")  # cut short
    assert arrived.acquire(timeout=10)
    stop.set()
    reader.join(10)
    assert seen == ["one\n", "two\n", "new\n"]


def test_a_log_that_is_moved_away_is_not_read_again(tmp_path: Path) -> None:
    log, stop, seen = tmp_path / "rows.log", threading.Event(), []
    log.write_text("one\n")
    arrived = threading.Semaphore(0)

    def read() -> None:
        for line in lines(log, stop):
            seen.append(line)
            arrived.release()

    reader = threading.Thread(target=read)
    reader.start()
    assert arrived.acquire(timeout=10)
    log.rename(tmp_path / "rows.log.1")
    time.sleep(1.2)  # for a while there is none
    log.write_text("")
    time.sleep(1.2)
    with log.open("a") as file:
        file.write("two\n")
    assert arrived.acquire(timeout=10)
    stop.set()
    reader.join(10)
    assert seen == ["one\n", "two\n"]


def test_a_log_that_cannot_be_opened_at_once_is_opened_later(tmp_path: Path) -> None:
    log = tmp_path / "rows.log"
    log.write_text("one\n")

    def moved() -> None:
        log.rename(tmp_path / "rows.log.1")
        log.mkdir()

    def begun() -> None:
        log.rmdir()
        log.write_text("two\n")

    steps = [moved, begun]

    class Between(threading.Event):
        """What happens between two looks."""

        def wait(self, timeout: float | None = None) -> bool:
            if not steps:
                return True
            steps.pop(0)()
            return False

    assert list(lines(log, Between())) == ["one\n", "two\n"]


def test_a_log_is_read_to_its_end(tmp_path: Path) -> None:
    log = tmp_path / "rows.log"
    log.write_text("whole\nhalf")
    assert list(lines(log)) == ["whole\n", "half"]


# --- alerts ---

GIBBERISH = 0  # in place of a status: what answers speaks no HTTP


@pytest.fixture
def hook() -> Iterator[tuple[str, list[bytes], list[int]]]:
    taken: list[bytes] = []
    answers = [200]

    class Handler(http.server.BaseHTTPRequestHandler):
        def do_POST(self) -> None:
            taken.append(self.rfile.read(int(self.headers["Content-Length"])))
            status = answers.pop(0) if len(answers) > 1 else answers[0]
            if status == GIBBERISH:
                self.wfile.write(b"SSH-2.0-OpenSSH_9.2\r\n")
                return
            self.send_response(status)
            self.send_header("Location", "/elsewhere")
            self.end_headers()

        def do_GET(self) -> None:
            self.send_response(200)
            self.end_headers()

        def log_message(self, *args: object) -> None:
            pass

    server = http.server.ThreadingHTTPServer(("127.0.0.1", 0), Handler)
    threading.Thread(target=server.serve_forever, daemon=True).start()
    yield f"http://127.0.0.1:{server.server_port}/secret-path", taken, answers
    server.shutdown()
    server.server_close()


def test_alerts_are_posted_and_tried_again(
    hook: tuple[str, list[bytes], list[int]], monkeypatch: pytest.MonkeyPatch, caplog: pytest.LogCaptureFixture
) -> None:
    monkeypatch.setattr(alerts_module, "_WAITS", (0.0, 0.0))
    url, taken, answers = hook
    monitor = Monitor(fingerprint())
    (alert,) = [a for r in stream(200, {"tier": 1.5}) for a in monitor.see(r)]
    answers[:] = [503, 200]
    with caplog.at_level(logging.WARNING):
        assert Webhook(url)(alert)
    assert len(taken) == 2
    said = json.loads(taken[1])
    assert (said["signal"], said["model"], said["text"]) == ("tier", "shop", str(alert))
    answers[:] = [500]
    with caplog.at_level(logging.WARNING):
        assert not Webhook(url)(alert)
    assert len(taken) == 5
    assert "the webhook at 127.0.0.1 did not take an alert: HTTPError" in caplog.text
    assert "secret-path" not in caplog.text
    for wrong in ("ftp://host/x", "host", "file:///etc/passwd"):
        with pytest.raises(OptionError, match="no URL that alerts can be posted to"):
            Webhook(wrong)
    for secret in ("http://user:hunter2@host/x", "https://hunter2@host"):
        with pytest.raises(OptionError, match="holds a user or password, which are not sent; leave them out") as caught:
            Webhook(secret)
        assert "hunter2" not in str(caught.value)


@pytest.mark.parametrize("status", [GIBBERISH, 301, 302, 303, 307])
def test_an_alert_is_not_taken_where_no_http_is_spoken_or_another_place_is_named(
    status: int, hook: tuple[str, list[bytes], list[int]], monkeypatch: pytest.MonkeyPatch
) -> None:
    monkeypatch.setattr(alerts_module, "_WAITS", (0.0, 0.0))
    url, taken, answers = hook
    answers[:] = [status]
    assert not Webhook(url)(Alert(0.0, "shop", "v1", "tier", 9, 0.5, 1.5))
    assert len(taken) == 3


def test_the_command_replays(say: Say, made: Path, tmp_path: Path, hook: tuple[str, list[bytes], list[int]]) -> None:
    engine = load(made, 1)
    known = monitors([made], 0.1)
    assert list(known) == [(artifact.name_of(made), engine.version)]
    found = Fingerprint.from_json(artifact.read_file(made, artifact.read_manifest(made), artifact.FINGERPRINT))
    texts = [f"{text} " * 3 for text in many_rows(120).text]
    tokens = engine.encoder.encode(texts)
    signals = found.signals(engine.encoder, tokens, engine.run(tokens))
    log = tmp_path / "rows.log"
    rows = [{name: float(values[i]) for name, values in signals.items()} for i in range(len(texts))]
    log.write_text(
        "".join(Record(i, artifact.name_of(made), engine.version, r).to_line() + "\n" for i, r in enumerate(rows))
    )
    said = say("monitor", log, made, "--webhook", hook[0]).out
    assert "tokens of a row changed" in said
    assert len(hook[1]) == len(said.splitlines())
    assert [
        json.loads(line)["text"] for line in say("monitor", log, made, "--json").out.splitlines()
    ] == said.splitlines()


def test_an_older_artifact_has_no_fingerprint(made: Path, tmp_path: Path) -> None:
    manifest = artifact.read_manifest(made)
    contents = {n: artifact.read_file(made, manifest, n) for n in manifest.files if n != artifact.FINGERPRINT}
    artifact.save(tmp_path / "old.nw", manifest, contents)
    with pytest.raises(ArtifactError, match=r"old.nw has no fingerprint to compare with; run `optimize` again"):
        monitors([tmp_path / "old.nw"], 0.1)
