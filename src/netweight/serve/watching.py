"""A thread of the server that reads what the recorder writes and raises alerts."""

from __future__ import annotations

import fcntl
import logging
import threading
from collections.abc import Callable
from contextlib import suppress
from pathlib import Path

from netweight.errors import NetweightError, OptionError
from netweight.monitor import Alert, Monitor, lines, replay
from netweight.serve.hosted import Models
from netweight.serve.metrics import Metrics

log = logging.getLogger("netweight.serve")


def writable(path: Path) -> None:
    """Raises OptionError where a log, or the file beside it by whose lock one worker watches it, cannot be written, and
    where files have no locks."""
    for file in (path, _lock(path)):
        try:
            with file.open("a") as opened, suppress(BlockingIOError):  # another server's: there are locks
                fcntl.flock(opened, fcntl.LOCK_EX | fcntl.LOCK_NB)
        except OSError as problem:
            raise OptionError(
                f"{file} cannot be written or locked ({problem.strerror}); the server writes the log, locks a .lock "
                "beside it, and begins a new log where this one is moved away: name a --log in a folder of its own, on "
                "a file system with locks."
            ) from None


def _size(path: Path) -> int:
    try:
        return path.stat().st_size
    except OSError:
        return 0


def _lock(path: Path) -> Path:
    return path.with_name(f"{path.name}.lock")


class Watching:
    """Follows a log that this and other workers write; one worker of a log does, the others do nothing.

    Args:
        budget: false alarms a month, for each version of a model, from now on.
        post: told every alert, such as a Webhook.
    """

    def __init__(
        self, path: Path, models: Models, metrics: Metrics, budget: float, post: Callable[[Alert], object] | None = None
    ) -> None:
        self._path, self._models, self._metrics, self._budget, self._post = path, models, metrics, budget, post
        self._monitors: dict[tuple[str, str], Monitor] = {}
        self._shown: dict[str, dict[str, float]] = {}  # what metrics say of each model
        self._from = _size(path)  # what was written before was looked at before
        self._stop = threading.Event()
        self._thread = threading.Thread(target=self._work, name="monitor", daemon=True)
        self._thread.start()

    def close(self) -> None:
        """No further alerts."""
        self._stop.set()
        self._thread.join(10)

    def monitor(self, name: str, version: str) -> Monitor | None:
        """Of a version that answers, or did."""
        for hosted in self._models:
            key = hosted.name, hosted.engine.version
            if hosted.fingerprint is not None and key not in self._monitors:
                self._monitors[key] = Monitor(hosted.fingerprint, self._budget)
        return self._monitors.get((name, version))

    def _work(self) -> None:
        try:
            with _lock(self._path).open("w") as lock:
                while not self._stop.wait(0.2):
                    try:
                        fcntl.flock(lock, fcntl.LOCK_EX | fcntl.LOCK_NB)  # ends with the process
                        break
                    except BlockingIOError:
                        self._stop.wait(5)
                        self._from = _size(self._path)  # until here, another one looked
                # There is no file for a moment where logrotate moves it away.
                while not self._path.is_file() and not self._stop.wait(0.2):
                    self._from = 0
                if self._stop.is_set():
                    return
                for alert in replay(lines(self._path, self._stop, self._from), self._watched, self._broken):
                    log.warning("%s", alert)
                    self._metrics.alerts.labels(alert.model, alert.signal).inc()
                    if self._post is not None:
                        self._post(alert)
        except (NetweightError, OSError):
            log.exception("rows are no longer watched")

    def _broken(self, problem: Exception) -> None:
        log.warning("a line of %s is no record of an answer, and is passed over: %r", self._path, problem)

    def _watched(self, name: str, version: str) -> Monitor | None:
        monitor = self.monitor(name, version)
        if monitor is not None:
            before, self._shown[name] = self._shown.get(name, {}), monitor.capitals()
            for signal in before.keys() - self._shown[name].keys():  # of the version that this one has replaced
                self._metrics.drift.remove(name, signal)
            for signal, evidence in self._shown[name].items():
                self._metrics.drift.labels(name, signal).set(evidence)
        return monitor
