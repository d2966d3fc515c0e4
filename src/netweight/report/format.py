"""Numbers as people read them: thousands separators, a unit, and no more digits than they carry."""

from __future__ import annotations

import math
from dataclasses import dataclass

from netweight.certify.certificate import Estimate
from netweight.task import Task

MISSING = "not measured"
_NAMES = {
    "accuracy": "accuracy",
    "macro-f1": "macro-F1",
    "spearman": "Spearman correlation",
    "mae": "mean absolute error",
}


def fixed(value: float, digits: int) -> str:
    """`digits` decimals and a proper minus; never minus zero."""
    if not math.isfinite(value):
        return "undefined"
    text = f"{abs(value):,.{digits}f}"
    return f"\u2212{text}" if value < 0 and float(text.replace(",", "")) > 0 else text


def significant(value: float, digits: int = 3) -> str:
    """About `digits` significant digits, written without an exponent."""
    if not math.isfinite(value) or value == 0:
        return fixed(value, 0)
    rounded = float(f"{value:.{digits - 1}e}")
    return fixed(rounded, min(12, max(0, digits - 1 - math.floor(math.log10(abs(rounded))))))


def plain(value: float, digits: int = 3) -> str:
    """`significant` without zeros at the end: for settings and ticks, which are exact."""
    text = significant(value, digits)
    return text.rstrip("0").rstrip(".") if "." in text else text


def count(value: int | None, missing: str = MISSING) -> str:
    """1234 -> 1,234."""
    return missing if value is None else f"{value:,}"


def percent(share: float, digits: int = 1) -> str:
    """A share of 1 in percent; never rounded to 100 % or 0 % where something is missing or there."""
    near, last = fixed(100 * share, digits), 10**-digits
    if share < 1 and float(near.replace(",", "").replace("\u2212", "-").replace("undefined", "0")) >= 100:
        return f"> {fixed(100 - last, digits)} %"
    return f"< {fixed(last, digits)} %" if 0 < 100 * share < last / 2 else f"{near} %"


def level(share: float) -> str:
    """A chosen share, such as a confidence, in percent."""
    return f"{plain(100 * share, 4)} %"


def probability(value: float) -> str:
    """A p-value."""
    return "< 0.0001" if value < 0.0001 else fixed(value, 4)


def milliseconds(value: float | None) -> str:
    """Milliseconds."""
    return MISSING if value is None else f"{significant(value)} ms"


def seconds(value: float | None) -> str:
    """Seconds."""
    return MISSING if value is None else f"{significant(value)} s"


def size(value: int | None) -> str:
    """Bytes in kB, MB or GB of 1,000."""
    if value is None:
        return MISSING
    for unit, scale in (("GB", 1e9), ("MB", 1e6), ("kB", 1e3)):
        if value >= scale:
            return f"{significant(value / scale)} {unit}"
    return f"{value} bytes"


def rate(value: float | None) -> str:
    """Rows per second."""
    return MISSING if value is None else f"{significant(value)} rows/s"


def dollars(value: float | None) -> str:
    """US dollars."""
    if value is None:
        return MISSING
    whole, point, cents = significant(value).partition(".")
    return f"${whole}{point}{cents.rstrip('0').ljust(2, '0') if point else ''}"


def times(before: float | None, after: float | None, more: str, fewer: str) -> str:
    """How many times `after` is above (`more`) or below (`fewer`) `before`: "12.3 × faster"."""
    if before is None or after is None or before <= 0 or after <= 0:
        return "–"
    if significant(before) == significant(after):
        return "the same"
    return f"{significant(after / before)} × {more}" if after > before else f"{significant(before / after)} × {fewer}"


def quality(metric: str, value: float) -> str:
    """A quality in a table whose head names the metric: of 100, but an error, shown positive, in its own units."""
    if math.isnan(value):
        return "–"
    return significant(-value, 4) if metric == "mae" else f"{100 * value:.2f}"


@dataclass(frozen=True)
class Scale:
    """How the quality of one job is written. `reference` is the reference's quality, in the task's own units.

    A drop is written in points: 0.01 of accuracy, macro-F1 or Spearman's correlation, one percent of the
    reference's mean absolute error.
    """

    task: Task
    reference: float

    @property
    def name(self) -> str:
        """The metric."""
        return _NAMES[self.task.metric]

    @property
    def falls(self) -> str:
        """What the metric does when quality drops."""
        return "rises" if self.task.metric == "mae" else "drops"

    @property
    def point(self) -> float:
        """One point in units of quality."""
        return self.task.margin(1.0, self.reference) or 1.0

    @property
    def explained(self) -> str:
        """What a point is."""
        return {
            "accuracy": "1 point is 1 % of the rows",
            "macro-f1": "1 point is 0.01 of macro-F1",
            "spearman": "1 point is a correlation of 0.01",
            "mae": f"1 point is 1 % of the reference's error, {significant(self.point)}",
        }[self.task.metric]

    @property
    def axis(self) -> str:
        """Title of an axis of quality."""
        units = {
            "accuracy": "% of rows",
            "macro-f1": "of 100",
            "spearman": "−1 to 1",
            "mae": "up is better",
        }
        return f"{self.name} ({units[self.task.metric]})"

    def quality(self, value: float) -> str:
        """A quality with its unit. A mean absolute error is shown positive, as it is known."""
        if self.task.metric == "accuracy":
            return f"{fixed(100 * value, 2)} %"
        if self.task.metric == "macro-f1":
            return f"{fixed(100 * value, 2)} of 100"
        return fixed(value, 4) if self.task.metric == "spearman" else significant(-value, 4)

    def estimate(self, found: Estimate) -> str:
        """A quality with its interval."""
        low, high = (found.high, found.low) if self.task.metric == "mae" else (found.low, found.high)
        return f"{self.quality(found.value)} ({self.quality(low)} to {self.quality(high)})"

    def points(self, drop: float, digits: int = 2) -> str:
        """A drop with its unit: "0.31 points"."""
        text = fixed(drop / self.point, digits)
        return (
            f"{text} point"
            if float(text.replace(",", "").replace("\u2212", "-").replace("undefined", "0")) == 1
            else f"{text} points"
        )

    def allowed(self, margin: float) -> str:
        """The margin: one decimal where that says all."""
        value = margin / self.point
        return self.points(margin, 1 if abs(value - round(value, 1)) < 1e-9 else 2)

    def drop(self, found: Estimate) -> str:
        """A drop with its interval: "0.31 points (−0.10 to 0.72)"."""
        low, high = (fixed(v / self.point, 2) for v in (found.low, found.high))
        return f"{self.points(found.value)} ({low} to {high})"
