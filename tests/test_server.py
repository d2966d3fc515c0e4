"""Real server processes on loopback: start, exchange, replacement of a killed worker, a graceful end."""

from __future__ import annotations

import os
import shutil
import signal
import socket
import subprocess
import sys
import time
from collections.abc import Callable, Iterator
from pathlib import Path

import httpx
import pytest

from conftest import Say
from netweight import artifact
from netweight.client import Client
from netweight.engine import load
from test_serve import TEXTS, changed


def free_port() -> int:
    with socket.socket() as one:
        one.bind(("127.0.0.1", 0))
        return int(one.getsockname()[1])


def until(true: Callable[[], bool], seconds: float = 60) -> None:
    end = time.monotonic() + seconds
    while not true():
        assert time.monotonic() < end, "it did not happen"
        time.sleep(0.02)


class Process:
    """`netweight serve` of one folder."""

    def __init__(self, folder: Path, log: Path, *more: str) -> None:
        self.url = f"http://127.0.0.1:{free_port()}"
        words = ["serve", str(folder), "--port", self.url.rpartition(":")[2], "--threads", "1", *more]
        command = [sys.executable, "-c", "from netweight.cli import main; main()", *words]
        with log.open("wb") as file:
            self.process = subprocess.Popen(command, stdout=file, stderr=file, start_new_session=True)
        self.log = log
        until(self.ready)

    def ready(self) -> bool:
        assert self.process.poll() is None, self.log.read_text()
        try:
            return httpx.get(f"{self.url}/readyz").status_code == 200
        except httpx.TransportError:
            return False

    def version(self) -> str:
        return str(httpx.post(f"{self.url}/v1/models/made/predict", json={"texts": TEXTS[:2]}).json()["version"])

    def workers(self) -> list[int]:
        children = Path(f"/proc/{self.process.pid}/task/{self.process.pid}/children").read_text().split()
        return [int(c) for c in children if b"spawn_main" in Path(f"/proc/{c}/cmdline").read_bytes()]

    def end(self) -> int:
        self.process.send_signal(signal.SIGTERM)
        return self.process.wait(60)


@pytest.fixture
def started(made: Path, tmp_path: Path) -> Iterator[Callable[..., Process]]:
    running: list[Process] = []

    def start(*more: str) -> Process:
        running.append(Process(made, tmp_path / "serve.log", *more))
        return running[-1]

    yield start
    for one in running:
        if one.process.poll() is None:
            os.killpg(one.process.pid, signal.SIGKILL)
        one.process.wait()


def test_a_server_answers_follows_its_folder_and_ends_in_order(
    started: Callable[..., Process], made: Path, tmp_path: Path
) -> None:
    server = started()
    engine = load(made, 1)
    with Client(server.url) as client:
        said = client.predict("made", TEXTS)
        assert [p.label for p in said] == [p.label for p in engine.predict(TEXTS)]
        assert [m["version"] for m in client.models()] == [engine.version]
    # A damaged folder in its place: the old version stays, and the log says why.
    shutil.copytree(made, tmp_path / "kept.nw")
    (made / artifact.MANIFEST).write_bytes(b"{}")
    until(lambda: "stays at version" in server.log.read_text())
    assert server.version() == engine.version
    with Client(server.url) as client:
        assert [m["version"] for m in client.models()] == [engine.version], "it is not asked of the damaged folder"
    made.rename(tmp_path / "damaged.nw")
    other = changed(tmp_path / "kept.nw", made)
    until(lambda: server.version() == load(other, 1).version)
    assert server.end() in (0, -signal.SIGTERM)  # uvicorn ends by the signal that it was sent, once all is answered


@pytest.mark.slow
def test_a_killed_worker_is_replaced(started: Callable[..., Process]) -> None:
    server = started("--workers", "2")
    until(lambda: len(server.workers()) == 2)
    first, other = server.workers()
    os.kill(first, signal.SIGKILL)
    until(lambda: len(server.workers()) == 2 and first not in server.workers())
    assert other in server.workers()
    with Client(server.url, retries=8) as client:
        assert len(client.predict("made", TEXTS)) == len(TEXTS)
    assert server.end() in (0, -signal.SIGTERM)  # uvicorn ends by the signal that it was sent, once all is answered


def test_refusals_before_anything_listens(made: Path, tmp_path: Path, say: Say) -> None:
    shutil.copytree(made, tmp_path / "two" / "made.nw")
    twice = say("serve", made, tmp_path / "two" / "made.nw")
    assert twice.status == 1
    assert "two folders would serve under one name (made, made); rename one." in twice.err
    half = say("serve", made, "--tls-key", "key.pem")
    assert "--tls-certificate and --tls-key go together." in half.err
    absent = say("serve", made, "--tls-key", "key.pem", "--tls-certificate", "certificate.pem")
    assert "certificate.pem is not there; TLS needs a certificate and its key, both PEM." in absent.err
    assert "is no file of keys" in say("serve", made, "--keys", tmp_path / "keys.jsonl").err
    nothing = say("serve", tmp_path / "nothing")
    assert nothing.status == 1
    assert "no artifact" in nothing.err
