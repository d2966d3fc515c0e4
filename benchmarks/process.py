"""`netweight serve` as a process of its own: started, waited for, looked at, ended."""

from __future__ import annotations

import os
import signal
import subprocess
import sys
import tempfile
import time
import urllib.request
from collections.abc import Iterator
from contextlib import contextmanager
from dataclasses import dataclass
from pathlib import Path

HOST = "127.0.0.1"


@dataclass(frozen=True)
class Running:
    """A server. `ready` are the seconds from its start until it was."""

    process: subprocess.Popen[bytes]
    port: int
    ready: float
    log: Path

    @property
    def place(self) -> tuple[str, int]:
        """Where it listens."""
        return HOST, self.port

    def workers(self) -> list[int]:
        """Ids of the processes that answer: the children, or itself."""
        pid = self.process.pid
        children = Path(f"/proc/{pid}/task/{pid}/children").read_text(encoding="ascii").split()
        found = [int(c) for c in children if b"spawn_main" in _read(Path(f"/proc/{c}/cmdline"))]
        return found or [pid]

    def resident(self) -> float:
        """Megabytes that all workers hold in memory."""
        pages = [int(_read(Path(f"/proc/{pid}/statm")).split()[1]) for pid in self.workers()]
        return round(sum(pages) * 4096 / 1e6, 1)

    def busy(self) -> float:
        """Seconds of processor that all workers have taken."""
        ticks = [
            sum(map(int, _read(Path(f"/proc/{pid}/stat")).rpartition(b")")[2].split()[11:13])) for pid in self.workers()
        ]
        return sum(ticks) / os.sysconf("SC_CLK_TCK")

    def files(self) -> int:
        """Open file descriptors of all workers."""
        return sum(len(list(Path(f"/proc/{pid}/fd").iterdir())) for pid in self.workers())

    def errors(self) -> list[str]:
        """Lines of its log that are not about single requests, from the first traceback on."""
        lines = self.log.read_text(encoding="utf-8", errors="replace").splitlines()
        lines = [line for line in lines if not line.startswith("{")]
        first = next((i for i, line in enumerate(lines) if "Traceback (most recent call last)" in line), len(lines))
        return lines[first:]


def _read(path: Path) -> bytes:
    try:
        return path.read_bytes()
    except (FileNotFoundError, ProcessLookupError):
        return b"0 0"


@contextmanager
def server(folder: Path, port: int, *words: str, cores: str = "") -> Iterator[Running]:
    """A server of one artifact, on these cores (as of taskset), with one engine thread."""
    more = ["serve", str(folder), "--port", str(port), "--threads", "1", *words]
    command = [sys.executable, "-c", "from netweight.cli import main; main()", *more]
    began = time.perf_counter()
    with tempfile.NamedTemporaryFile() as log:
        process = subprocess.Popen((["taskset", "-c", cores] if cores else []) + command, stdout=log, stderr=log)
        try:
            while not answers(port):
                if process.poll() is not None:
                    sys.exit(Path(log.name).read_text(encoding="utf-8"))
                time.sleep(0.005)
            yield Running(process, port, time.perf_counter() - began, Path(log.name))
        finally:
            process.send_signal(signal.SIGTERM)
            process.wait()


def answers(port: int) -> bool:
    """Whether a model answers there."""
    try:
        with urllib.request.urlopen(f"http://{HOST}:{port}/readyz", timeout=1):
            return True
    except OSError:
        return False
