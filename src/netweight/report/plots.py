"""Tiers, calibration and the agreement of prediction and truth, drawn."""

from __future__ import annotations

import math
from collections.abc import Sequence

import numpy as np
from numpy.typing import NDArray

from netweight.certify.certificate import Calibration
from netweight.report.format import count, percent
from netweight.report.html import Html
from netweight.report.svg import Axis, around, circle, line, number, path, picture, polyline, rect, text, width_of

_LEVELS = 6


def tiers_bar(ident: str, names: Sequence[str], shares: Sequence[float]) -> Html:
    """One bar, divided by the share of rows that each tier answered, from cheap to strong."""
    width, top, high = 360.0, 8.0, 30.0
    total = sum(shares) or 1.0
    shapes: list[Html] = []
    x = 0.0
    for position, (name, share) in enumerate(zip(names, shares, strict=True)):
        wide = width * share / total
        shapes.append(rect(x, top, wide, high, f"tier t{position % 4}", f"{name}: {percent(share)}"))
        label = f"{position + 1}: {percent(share)}"
        if width_of(label) + 4 < wide:
            shapes.append(text(x + wide / 2, top + 20, label, f"in t{position % 4}", "middle"))
        x += wide
    words = "; ".join(f"tier {i + 1}, {n}: {percent(s)}" for i, (n, s) in enumerate(zip(names, shares, strict=True)))
    return picture(ident, width, top + high + 4, "Share of rows answered by each tier", words + ".", shapes)


def reliability(ident: str, found: Calibration) -> Html:
    """Share right against mean confidence, bin by bin; on the diagonal, confidence means what it says."""
    size, left, foot = 340.0, 48.0, 288.0
    values = [*found.confidence, *found.right]
    low = max(0.0, math.floor((min(values) - 0.03) * 10) / 10)
    x, y = Axis(100 * low, 100.0, left, 328.0), Axis(100 * low, 100.0, foot, 12.0)
    shapes: list[Html] = []
    for value, label in x.labels():
        shapes += [line(x(value), 12, x(value), foot, "grid"), text(x(value), foot + 15, label, "tick", "middle")]
        shapes += [line(left, y(value), 328, y(value), "grid"), text(left - 5, y(value) + 4, label, "tick", "end")]
    shapes += [line(left, foot, 328, foot, "axis"), line(left, 12, left, foot, "axis")]
    shapes.append(line(x(x.low), y(y.low), x(100), y(100), "diagonal"))
    bins = [(x(100 * c), y(100 * r), c) for c, r in zip(found.confidence, found.right, strict=True)]
    for px, py, c in bins:
        shapes.append(line(px, py, px, y(100 * c), "gap"))
    shapes.append(polyline([(px, py) for px, py, _ in sorted(bins)], "curve"))
    for (px, py, c), right, rows in zip(bins, found.right, found.rows, strict=True):
        shapes.append(circle(px, py, 4, "dot", f"confidence {percent(c)}, right {percent(right)}, {count(rows)} rows"))
    shapes.append(text((left + 328) / 2, foot + 32, "mean confidence of a bin (%)", "label", "middle"))
    shapes.append(text(12, (12 + foot) / 2, "right (% of the bin's rows)", "label", "middle", -90))
    words = (
        f"{len(bins)} bins; expected calibration error {percent(found.error, 2)}. Both axes start at {percent(low, 0)}."
    )
    return picture(ident, size, foot + 40, "Reliability diagram", words, shapes)


def heat_map(ident: str, matrix: NDArray[np.int64]) -> Html:
    """The confusion matrix without words: rows are true labels, columns predicted ones; darker is more rows."""
    labels = len(matrix)
    left, top, span = 26.0, 22.0, 330.0
    cell = span / labels
    strength = np.log1p(matrix) / max(float(np.log1p(matrix.max())), 1e-12)
    levels = np.where(matrix > 0, np.clip(np.ceil(strength * _LEVELS), 1, _LEVELS), 0).astype(int)
    side = number(cell)
    shapes: list[Html] = [rect(left, top, span, span, "field")]
    for right in (True, False):
        for level in range(1, _LEVELS + 1):
            at = [(i, j) for i, j in np.argwhere(levels == level).tolist() if (i == j) == right]
            d = "".join(f"M{number(left + j * cell)} {number(top + i * cell)}h{side}v{side}h-{side}z" for i, j in at)
            if d:
                shapes.append(path(d, f"heat{level} {'hit' if right else 'miss'}"))
    shapes.append(text(left + span / 2, 14, "predicted label, in the order of the task →", "label", "middle"))
    shapes.append(text(14, top + span / 2, "← true label", "label", "middle", -90))
    wrong = int(matrix.sum() - np.trace(matrix))
    words = (
        f"{labels} labels, {count(int(matrix.sum()))} rows, {count(wrong)} off the diagonal. Shades are logarithmic."
    )
    return picture(ident, left + span + 6, top + span + 6, "Confusion matrix as a heat map", words, shapes)


def hexbin(ident: str, predicted: NDArray[np.float64], true: NDArray[np.float64]) -> Html:
    """How many rows have which predicted (y) and true (x) value; on the diagonal the prediction is exact."""
    left, right, top, foot = 52.0, 348.0, 12.0, 308.0
    both = np.concatenate([predicted, true]).tolist()
    x, y = around(both, left, right, room=0.05), around(both, foot, top, room=0.05)
    r = 8.0
    cells: dict[tuple[float, float], int] = {}
    for a, b in zip(true.tolist(), predicted.tolist(), strict=True):
        centre = _hex_centre(x(a), y(b), r)
        cells[centre] = cells.get(centre, 0) + 1
    shapes: list[Html] = []
    for value, label in x.labels():
        shapes += [line(x(value), top, x(value), foot, "grid"), text(x(value), foot + 15, label, "tick", "middle")]
        shapes += [line(left, y(value), right, y(value), "grid"), text(left - 5, y(value) + 4, label, "tick", "end")]
    most = max(cells.values())
    for level in range(1, _LEVELS + 1):
        at = [
            c
            for c, n in sorted(cells.items())
            if max(1, math.ceil(_LEVELS * math.log1p(n) / math.log1p(most))) == level
        ]
        if at:
            shapes.append(path("".join(_hexagon(*c, r) for c in at), f"heat{level} hit"))
    shapes += [line(left, foot, right, foot, "axis"), line(left, top, left, foot, "axis")]
    shapes.append(line(x(x.low), y(y.low), x(x.high), y(y.high), "diagonal"))
    shapes.append(text((left + right) / 2, foot + 32, "true value (units of the label)", "label", "middle"))
    shapes.append(text(12, (top + foot) / 2, "predicted value", "label", "middle", -90))
    words = f"{count(len(true))} rows; the fullest hexagon holds {count(most)}. Shades are logarithmic."
    return picture(ident, 360, foot + 40, "Predicted against true value", words, shapes)


def _hex_centre(px: float, py: float, r: float) -> tuple[float, float]:
    """Centre of the hexagon, of radius `r` with a corner up, that holds a pixel."""
    wide, high = math.sqrt(3) * r, 1.5 * r
    near = []
    for row in (math.floor(py / high), math.floor(py / high) + 1):
        shift = wide / 2 if row % 2 else 0.0
        column = round((px - shift) / wide)
        near.append((column * wide + shift, row * high))
    return min(near, key=lambda c: (c[0] - px) ** 2 + (c[1] - py) ** 2)


def _hexagon(x: float, y: float, r: float) -> str:
    corners = [(x + r * math.sin(k * math.pi / 3), y - r * math.cos(k * math.pi / 3)) for k in range(6)]
    return "M" + "L".join(f"{number(a)} {number(b)}" for a, b in corners) + "Z"
