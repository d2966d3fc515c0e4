"""The few SVG shapes that the plots need. Colours come from the page's style sheet, by class."""

from __future__ import annotations

import math
import unicodedata
from collections.abc import Iterable, Sequence
from dataclasses import dataclass
from typing import Literal

from netweight.report.format import fixed, plain
from netweight.report.html import Html, esc, join

# Of the font size: wide enough for the system fonts that the style sheet names.
_LETTER, _WIDE = 0.56, 1.05
TEXT = 12.0


def number(value: float) -> str:
    """A coordinate with at most two decimals."""
    return f"{value:.2f}".rstrip("0").rstrip(".") if math.isfinite(value) else "0"


def picture(ident: str, width: float, height: float, title: str, description: str, shapes: Iterable[object]) -> Html:
    """An image with a title and a description that screen readers read. Units are pixels of the view box."""
    return Html(
        f'<svg viewBox="0 0 {number(width)} {number(height)}" role="img" aria-labelledby="{ident}-t {ident}-d">'
        f'<title id="{ident}-t">{esc(title)}</title><desc id="{ident}-d">{esc(description)}</desc>{join(shapes)}</svg>'
    )


def line(x1: float, y1: float, x2: float, y2: float, kind: str) -> Html:
    """A straight line."""
    ends = " ".join(f'{k}="{number(v)}"' for k, v in (("x1", x1), ("y1", y1), ("x2", x2), ("y2", y2)))
    return Html(f'<line {ends} class="{kind}"/>')


def rect(x: float, y: float, width: float, height: float, kind: str, title: str = "") -> Html:
    """A rectangle."""
    size = f'x="{number(x)}" y="{number(y)}" width="{number(max(width, 0))}" height="{number(max(height, 0))}"'
    return Html(f'<rect {size} class="{kind}">{_title(title)}</rect>')


def circle(x: float, y: float, r: float, kind: str, title: str = "") -> Html:
    """A circle."""
    return Html(f'<circle cx="{number(x)}" cy="{number(y)}" r="{number(r)}" class="{kind}">{_title(title)}</circle>')


def path(d: str, kind: str) -> Html:
    """A path."""
    return Html(f'<path d="{d}" class="{kind}"/>')


def polyline(points: Sequence[tuple[float, float]], kind: str) -> Html:
    """An open line through points."""
    corners = " ".join(f"{number(x)},{number(y)}" for x, y in points)
    return Html(f'<polyline points="{corners}" class="{kind}"/>')


def text(
    x: float, y: float, words: str, kind: str = "", anchor: Literal["start", "middle", "end"] = "start", turn: float = 0
) -> Html:
    """Words on the baseline y; `turn` in degrees around (x, y)."""
    extra = (f' class="{kind}"' if kind else "") + (f' text-anchor="{anchor}"' if anchor != "start" else "")
    extra += f' transform="rotate({number(turn)} {number(x)} {number(y)})"' if turn else ""
    return Html(f'<text x="{number(x)}" y="{number(y)}"{extra}>{esc(words)}</text>')


def width_of(words: str, size: float = TEXT) -> float:
    """About how many pixels wide the words are at a font size."""
    return size * sum(_WIDE if unicodedata.east_asian_width(c) in "WF" else _LETTER for c in words)


def _title(words: str) -> str:
    return f"<title>{esc(words)}</title>" if words else ""


@dataclass(frozen=True)
class Axis:
    """Maps values from `low` to `high` to pixels from `start` to `end`."""

    low: float
    high: float
    start: float
    end: float
    log: bool = False

    def __call__(self, value: float) -> float:
        """Pixel of a value."""
        low, high = self.low, self.high
        if self.log:
            low, high, value = math.log(low), math.log(high), math.log(value)
        return self.start + (value - low) / (high - low) * (self.end - self.start)

    def ticks(self, most: int = 6) -> list[float]:
        """Round values inside the axis, at most about `most`."""
        if self.log:
            decades = range(math.floor(math.log10(self.low)), math.ceil(math.log10(self.high)) + 1)
            for steps in ((1, 2, 5), (1, 3), (1,)):
                found = [s * 10.0**d for d in decades for s in steps if self.low <= s * 10.0**d <= self.high]
                if len(found) <= most:
                    break
            if len(found) >= 2:
                return found[:: math.ceil(len(found) / most)]
        span = self.high - self.low
        step = 10.0 ** math.floor(math.log10(span / most))
        step *= next(m for m in (1, 2, 5, 10) if span / (step * m) <= most)
        first = math.ceil(self.low / step - 1e-9)
        return [k * step for k in range(first, math.floor(self.high / step + 1e-9) + 1)]

    def labels(self, most: int = 6) -> list[tuple[float, str]]:
        """The ticks with their text; on a linear axis all with the same decimals."""
        found = self.ticks(most)
        step = found[1] - found[0] if len(found) > 1 else 1.0
        digits = 0 if self.log else max(0, -math.floor(math.log10(step) + 1e-9))
        return [(value, plain(value, 2) if self.log else fixed(value, digits)) for value in found]


def around(
    values: Sequence[float],
    start: float,
    end: float,
    *,
    log: bool = False,
    room: float = 0.08,
    above: float | None = None,
) -> Axis:
    """An axis that holds all `values` with a share of `room` to spare on both sides, or of `above` on the high one."""
    low, high = min(values), max(values)
    if log:
        spare = max(math.log(high / low) * room, math.log(1.15))
        return Axis(low / math.exp(spare), high * math.exp(spare), start, end, log=True)
    spare = (high - low) * room or abs(high) * 0.1 or 1.0
    return Axis(low - spare, high + (spare if above is None else spare / room * above), start, end)
