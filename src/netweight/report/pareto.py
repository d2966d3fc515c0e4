"""What each candidate buys: quality against a cost, the front, and who ships."""

from __future__ import annotations

import math
from collections.abc import Callable, Sequence
from dataclasses import dataclass

from netweight.measure import Measurement
from netweight.report.format import Scale, size
from netweight.report.html import Html, cut
from netweight.report.labels import Name, names
from netweight.report.svg import Axis, around, circle, line, picture, polyline, rect, text

_WIDTH, _HEIGHT = 360.0, 324.0
_LEFT, _RIGHT, _TOP, _FOOT = 58.0, 350.0, 14.0, 240.0
_LARGEST, _SMALLEST, _CROWD = 12.0, 3.5, 25
_KEYS, _NAMED = 50.0, 14


@dataclass(frozen=True)
class Point:
    """One candidate: `cost` in the units of the x axis, `quality` in the task's."""

    name: str
    cost: float
    quality: float
    bytes: int
    role: str = "other"


# A point, its place and its radius in pixels.
Placed = tuple[Point, float, float, float]


def points(
    measured: Sequence[Measurement], cost: Callable[[Measurement], float | None], roles: dict[str, str]
) -> list[Point]:
    """Those whose cost is known; `roles` are shipped and reference, by name."""
    found = []
    for m in measured:
        value = cost(m)
        if value is not None and value > 0 and math.isfinite(value) and math.isfinite(m.quality):
            found.append(Point(m.name, value, m.quality, m.bytes, roles.get(m.name, "other")))
    return found


def front(shown: Sequence[Point]) -> list[Point]:
    """The points that none other equals or beats in both, from cheap to dear."""
    best, kept = -math.inf, []
    for point in sorted(shown, key=lambda p: (p.cost, -p.quality, p.name)):
        if point.quality > best:
            best = point.quality
            kept.append(point)
    return kept


def pareto(ident: str, shown: Sequence[Point], scale: Scale, cost_axis: str, tick: Callable[[float], str]) -> Html:
    """Quality (up is better) against cost (logarithmic, left is better); area is size in bytes."""
    factor = 100.0 if scale.task.metric in ("accuracy", "macro-f1") else 1.0
    x = around([p.cost for p in shown], _LEFT, _RIGHT, log=True)
    y = around([p.quality * factor for p in shown], _FOOT, _TOP, room=0.1, above=0.35)
    best = front(shown)
    shapes = _frame(x, y, cost_axis, scale)
    steps = _steps(best, x, y, factor)
    shapes.append(polyline(steps, "front"))
    largest = max(p.bytes for p in shown) or 1
    widest = _LARGEST if len(shown) <= _CROWD else 0.65 * _LARGEST
    placed = [(p, x(p.cost), y(p.quality * factor), _radius(p.bytes / largest, widest)) for p in shown]
    # Roles last and large ones first, so that neither they nor a small one hide beneath.
    for one in sorted(placed, key=lambda one: (one[0].role != "other", -one[3], one[0].name)):
        p = one[0]
        title = f"{p.name}: {scale.quality(p.quality)}, {tick(p.cost)}, {size(p.bytes)}"
        shapes += _mark(one, title, on_front=p in best)
    shapes += _names(placed, best, steps)
    shapes += _legend(largest)
    words = "; ".join(f"{p.name}: {scale.quality(p.quality)} at {tick(p.cost)}" for p in best)
    title = f"Quality against {cost_axis}"
    return picture(ident, _WIDTH, _HEIGHT, title, f"{len(shown)} candidates. The front: {words}.", shapes)


def _radius(share: float, widest: float) -> float:
    return max(_SMALLEST, widest * math.sqrt(max(share, 0)))


def _mark(placed: Placed, title: str, *, on_front: bool) -> list[Html]:
    """Told apart by shape, too: a square is the reference, a ring ships, what is off the front is hollow."""
    point, x, y, r = placed
    if point.role == "reference":
        half = r * math.sqrt(math.pi) / 2
        return [rect(x - half, y - half, 2 * half, 2 * half, "mark reference", title)]
    if point.role == "shipped":
        return [circle(x, y, r + 4, "ring"), circle(x, y, r, "mark shipped", title)]
    return [circle(x, y, r, f"mark {'onfront' if on_front else 'other'}", title)]


def _frame(x: Axis, y: Axis, cost_axis: str, scale: Scale) -> list[Html]:
    shapes: list[Html] = []
    for value, label in y.labels():
        # An error is shown as it is known, positive: the axis then falls upwards.
        label = label.lstrip("\u2212") if scale.task.metric == "mae" else label
        shapes += [line(_LEFT, y(value), _RIGHT, y(value), "grid"), text(_LEFT - 5, y(value) + 4, label, "tick", "end")]
    for value, label in x.labels(5):
        shapes += [
            line(x(value), _TOP, x(value), _FOOT, "grid"),
            text(x(value), _FOOT + 15, label, "tick", "middle"),
        ]
    shapes += [line(_LEFT, _FOOT, _RIGHT, _FOOT, "axis"), line(_LEFT, _TOP, _LEFT, _FOOT, "axis")]
    shapes.append(text((_LEFT + _RIGHT) / 2, _FOOT + 32, f"{cost_axis}, log scale", "label", "middle"))
    shapes.append(text(12, (_TOP + _FOOT) / 2, scale.axis, "label", "middle", -90))
    return shapes


def _steps(best: Sequence[Point], x: Axis, y: Axis, factor: float) -> list[tuple[float, float]]:
    """Corners of the front: at a price between two points, the quality that one gets is the cheaper one's."""
    corners: list[tuple[float, float]] = []
    for point in best:
        px, py = x(point.cost), y(point.quality * factor)
        if corners:
            corners.append((px, corners[-1][1]))
        corners.append((px, py))
    corners.append((_RIGHT, corners[-1][1]))
    return corners


def _names(placed: Sequence[Placed], best: Sequence[Point], steps: Sequence[tuple[float, float]]) -> list[Html]:
    """Shipped and reference in any case, and of the front as many as there is room for."""
    order = {"shipped": 0, "reference": 1}
    wanted = [one for one in placed if one[0].role in order or one[0] in best]
    wanted.sort(key=lambda one: (order.get(one[0].role, 2), -one[0].quality, one[0].name))
    chosen = [
        Name(f"{cut(p.name, 26)} ({p.role})", x, y, r + (6 if p.role == "shipped" else 1), must=True)
        if p.role in order
        else Name(cut(p.name, 32), x, y, r + 1)
        for p, x, y, r in wanted[:_NAMED]
    ]
    taken = [(x - r, y - r, x + r, y + r) for p, x, y, r in placed if p.role != "shipped"]
    taken += [(x - r - 5, y - r - 5, x + r + 5, y + r + 5) for p, x, y, r in placed if p.role == "shipped"]
    return names(chosen, taken, steps, (_LEFT + 2, _TOP - 12, _WIDTH - 2, _FOOT - 2))


def _legend(largest: int) -> list[Html]:
    y = _FOOT + 54
    shapes = [
        circle(_KEYS + 6, y - 4, 8, "ring"),
        circle(_KEYS + 6, y - 4, 4, "mark shipped"),
        text(_KEYS + 18, y, "shipped", "tick"),
        rect(_KEYS + 78, y - 9, 10, 10, "mark reference"),
        text(_KEYS + 94, y, "reference", "tick"),
        circle(_KEYS + 168, y - 4, 5, "mark onfront"),
        polyline([(_KEYS + 158, y - 4), (_KEYS + 178, y - 4)], "front"),
        text(_KEYS + 184, y, "front", "tick"),
        circle(_KEYS + 234, y - 4, 5, "mark other"),
        text(_KEYS + 244, y, "other", "tick"),
    ]
    words = f"area: size; the largest is {size(largest)}"
    shapes += [circle(_KEYS + 6, y + 17, 5, "mark other"), text(_KEYS + 18, y + 21, words, "tick")]
    return shapes
