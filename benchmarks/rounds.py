"""Times processes that speak the protocol of `peers/protocol.py`, in rounds that take turns."""

from __future__ import annotations

import contextlib
import json
import statistics
import subprocess
import time
from collections.abc import Mapping
from pathlib import Path
from typing import Any

import numpy as np

ROUNDS = 7
_PILOT = 0.5  # seconds of each batch size in a look of the pilot
_LOOKS = 3
_ROUND = 1.0  # seconds of each process in each round
_SINGLES, _TURN = 1000, 10  # single requests, and how many of them in a turn
_TRIAL = 10  # times fewer of them in a trial
_PAUSE = 0.02  # seconds between turns, in which the other's threads fall asleep


class Served:
    """A process that answers rounds. Raises RuntimeError with its last words where it does not."""

    def __init__(self, words: list[str], environment: Mapping[str, str], log: Path) -> None:
        self._log = log
        with log.open("wb") as errors:
            self._process = subprocess.Popen(
                words, stdin=subprocess.PIPE, stdout=subprocess.PIPE, stderr=errors, text=True, env=dict(environment)
            )
        ready = self._answer()
        self.rows, self.batches = int(ready["rows"]), tuple(ready["batches"])

    def _answer(self) -> dict[str, Any]:
        assert self._process.stdout
        line = self._process.stdout.readline()
        if not line:
            self._process.wait()
            last = self._log.read_text(encoding="utf-8", errors="replace").strip().splitlines()[-3:]
            raise RuntimeError(" | ".join(last)[-600:] or f"exit {self._process.returncode}")
        return dict(json.loads(line))

    def ask(self, start: int, count: int, batch: int) -> Any:
        """Seconds for `count` rows from `start` on; at batch 0 those of each."""
        time.sleep(_PAUSE)
        assert self._process.stdin
        print(json.dumps({"start": start, "count": count, "batch": batch}), file=self._process.stdin, flush=True)
        return self._answer()["seconds"]

    def rate(self, batch: int) -> float:
        """Rows a second, roughly: of the longest of requests that double. Few texts are of many lengths, so that their
        batches pad more than those of a round, and the larger the batch, the more."""
        count, last, start, spent, longest = max(batch, 8), 0, 0, 0.0, list[float]()
        while spent < _PILOT:
            count = min(count, self.rows)
            if count > last:
                longest = []
            longest.append(self.ask(start, count, batch))
            spent, start, last = spent + longest[-1], start + count, count
            count *= 2
        return last * len(longest) / sum(longest)

    def best(self) -> int:
        """The batch size of the highest rate: the median of a few looks, since in one the machine may be busy."""
        looks = [[self.rate(batch) for batch in self.batches] for _ in range(_LOOKS)]
        return int(self.batches[int(np.median(looks, axis=0).argmax())])

    def close(self) -> None:
        """End it."""
        with contextlib.suppress(OSError):
            if self._process.stdin:
                self._process.stdin.close()
        try:
            self._process.wait(timeout=20)
        except subprocess.TimeoutExpired:
            self._process.kill()
            self._process.wait()


def interleaved(served: Mapping[str, Served], *, trial: bool = False) -> dict[str, Any]:
    """Timing of each process, and for each the first one's rate divided by its own: the median over rounds of pairs.

    Each works at its own best batch size; `rows_per_second` is the median over rounds; p50, p95 and p99 are
    milliseconds of single requests.
    """
    batches = {name: s.best() for name, s in served.items()}
    wanted = {name: max(batches[name], int(_ROUND * s.rate(batches[name]))) for name, s in served.items()}
    rates: dict[str, list[float]] = {name: [] for name in served}
    for turn in range(1 if trial else ROUNDS):
        for name, s in served.items():
            # In a turn of the same length for each: what answers all texts in less is asked again.
            size = min(s.rows, wanted[name])
            passes = range(-(-wanted[name] // size))
            took = sum(s.ask((turn * len(passes) + k) * size, size, batches[name]) for k in passes)
            rates[name].append(len(passes) * size / took)
    singles: dict[str, list[float]] = {name: [] for name in served}
    for start in range(0, _SINGLES // _TRIAL if trial else _SINGLES, _TURN):
        for name, s in served.items():
            singles[name] += [1000 * seconds for seconds in s.ask(start, _TURN, 0)]
    first = rates[next(iter(rates))]
    found = {}
    for name in served:
        p50, p95, p99 = (float(q) for q in np.percentile(singles[name], (50, 95, 99)))
        found[name] = {
            "rows_per_second": statistics.median(rates[name]),
            "slowest": min(rates[name]),
            "fastest": max(rates[name]),
            "rounds": len(rates[name]),
            "batch": batches[name],
            "ratio": statistics.median(a / b for a, b in zip(first, rates[name], strict=True)),
            "p50": p50,
            "p95": p95,
            "p99": p99,
        }
    return found
