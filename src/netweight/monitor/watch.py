"""Records of answered rows in, alerts out: the same records give the same alerts, live or replayed."""

from __future__ import annotations

import json
import math
import random
from collections import deque
from collections.abc import Mapping
from dataclasses import asdict, dataclass
from statistics import median
from typing import Any

from netweight.errors import OptionError
from netweight.monitor.martingale import Jumper, Ranks
from netweight.signals import AGREES, NAMES, Fingerprint, Histogram

MONTH = 30 * 86_400.0
_RECENT = 500
_WORDS = {
    "length": "tokens of a row",
    "unknown": "share of unknown tokens",
    "distance": "distance from the certified rows",
    "confidence": "confidence",
    "tier": "tier that answers",
    AGREES: "agreement with the strongest tier",
}


@dataclass(frozen=True)
class Record:
    """One answered row: seconds since 1970, model and version, and its signals. No text."""

    at: float
    model: str
    version: str
    values: Mapping[str, float]

    def to_line(self) -> str:
        """One line of a log. Numbers keep all digits: the edges of bins have them too, and many confidences may lie
        between 0.9999995 and 1."""
        head = {"at": round(self.at, 3), "model": self.model, "version": self.version}
        return json.dumps(head | {name: float(v) for name, v in self.values.items()})

    @staticmethod
    def from_line(line: str) -> Record:
        """Raises ValueError, KeyError or TypeError where it is none."""
        found = json.loads(line)
        values = {name: float(found[name]) for name in (*NAMES, AGREES) if name in found}
        at = float(found["at"])
        if not all(map(math.isfinite, (at, *values.values()))):
            raise ValueError("a number is not finite")
        return Record(at, str(found["model"]), str(found["version"]), values)


@dataclass(frozen=True)
class Alert:
    """A signal that no longer comes from where the certified rows came."""

    at: float
    model: str
    version: str
    signal: str
    rows: int
    before: float
    now: float

    def __str__(self) -> str:
        """For people."""
        return (
            f"{self.model} {self.version}: {_WORDS[self.signal]} changed: {self.now:.3g} in the last rows, "
            f"{self.before:.3g} at certification ({self.rows:,} rows looked at)"
        )

    def to_dict(self) -> dict[str, Any]:
        """For a webhook."""
        return asdict(self) | {"text": str(self)}


class Monitor:
    """Watches one version of one model.

    Args:
        fingerprint: of the artifact.
        budget: false alarms that a month may bring in expectation; every month starts anew, and a signal that was
            reported is not reported again in the same month.
        seed: of the coins that order rows in one bin.

    Raises OptionError for a budget outside (0, 1].
    """

    def __init__(self, fingerprint: Fingerprint, budget: float = 0.1, seed: int = 0) -> None:
        if not 0 < budget <= 1:
            raise OptionError(f"{budget:g} false alarms a month; use more than 0 and at most 1.")
        self._fingerprint, self._budget, self._seed = fingerprint, budget, seed
        self._month: int | None = None
        self._signals: dict[str, _Signal] = {}

    def see(self, record: Record) -> list[Alert]:
        """Alerts that this row raises. Rows must come in the order of their log."""
        month = int(record.at // MONTH)
        if self._month is None or month > self._month:
            self._month, held = month, self._fingerprint.histograms
            self._signals = {n: _Signal(h, f"{self._seed} {month} {n}") for n, h in held.items()}
        alerts = []
        for name, value in record.values.items():
            signal = self._signals.get(name)
            if signal is not None and signal.changed(value, len(self._signals) / self._budget):
                before, now = signal.means()
                alerts.append(Alert(record.at, record.model, record.version, name, signal.rows, before, now))
        return alerts

    def capitals(self) -> dict[str, float]:
        """Each signal's evidence of a change, in units of what raises an alarm; 1 or more where it was raised."""
        return {n: s.capital * self._budget / len(self._signals) for n, s in self._signals.items()}


class _Signal:
    def __init__(self, histogram: Histogram, seed: str) -> None:
        self._histogram, self._ranks, self._jumper = histogram, Ranks(histogram.counts), Jumper()
        self._coin = random.Random(seed)
        self._recent: deque[float] = deque(maxlen=_RECENT)
        self._over = False
        self.rows, self.capital = 0, 1.0

    def changed(self, value: float, threshold: float) -> bool:
        """Whether this value is the one that raises the alarm."""
        if self._over:
            return False
        self._recent.append(value)
        self.rows += 1
        self.capital = self._jumper.bet(self._ranks.p_value(self._histogram.bin(value), self._coin.random()))
        self._over = self.capital >= threshold
        return self._over

    def means(self) -> tuple[float, float]:
        """Of the certified rows, as their bins tell it, and of the last ones."""
        edges, counts = self._histogram.edges, self._histogram.counts
        values = [*edges, edges[-1] if edges else median(self._recent)]
        before = sum(v * c for v, c in zip(values, counts, strict=True)) / sum(counts)
        return before, sum(self._recent) / len(self._recent)
