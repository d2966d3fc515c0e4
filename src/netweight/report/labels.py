"""Names beside points, placed so that they cover no point and no other name."""

from __future__ import annotations

import math
from collections.abc import Sequence
from dataclasses import dataclass
from itertools import pairwise

from netweight.report.html import Html
from netweight.report.svg import line, text, width_of

SIZE = 11.0
_HIGH = SIZE + 3
# Pixels beyond which a name that need not stand is left out: long leaders hide more than they say.
_NEAR = 24.0
# A bold letter is wider than the average that `width_of` knows.
_BOLD = 1.1
Box = tuple[float, float, float, float]
Corner = tuple[float, float]


@dataclass(frozen=True)
class Name:
    """Words for a point at (x, y) with radius r, in pixels; `must` stand somewhere, even over something."""

    words: str
    x: float
    y: float
    r: float
    must: bool = False


def names(wanted: Sequence[Name], taken: Sequence[Box], lines: Sequence[Corner], field: Box) -> list[Html]:
    """The words, with a leader to the point where they stand apart; in the order given, as long as there is room.

    `taken` boxes (left, top, right, bottom) stay free, the polyline `lines` is crossed only where nothing else is
    free, and no name leaves `field`.
    """
    boxes, shapes = list(taken), []
    strokes = [_stroke(a, b) for a, b in pairwise(lines)]
    for name in wanted:
        wide = width_of(name.words, SIZE) * (_BOLD if name.must else 1)
        spots = [box for box in _spots(name, wide, field) if _inside(box, field)]
        costs = [
            (sum(_overlap(s, b) for b in boxes), sum(_overlap(s, b) for b in strokes) + 8 * _far(s, name))
            for s in spots
        ]
        if not spots:
            continue
        # A name over a point is worse than any distance; over the front it is worse than a short one.
        chosen = min(range(len(spots)), key=lambda k: 20 * costs[k][0] + costs[k][1])
        if not name.must and (costs[chosen][0] > 0 or _far(spots[chosen], name) > _NEAR):
            continue
        box = spots[chosen]
        boxes.append(box)
        if _far(box, name) > 9:
            shapes.append(_leader(box, name))
        shapes.append(_words(box, name))
    return shapes


def _stroke(a: Corner, b: Corner) -> Box:
    return min(a[0], b[0]) - 1, min(a[1], b[1]) - 1, max(a[0], b[0]) + 1, max(a[1], b[1]) + 1


def _spots(name: Name, wide: float, field: Box) -> list[Box]:
    """Boxes around a point, the nearest first."""
    found: list[Box] = []
    for far in (3.0, 12.0, 22.0, 34.0, 48.0, 64.0, 84.0):
        near = name.r + far
        lefts = (name.x - wide / 2, name.x - name.r, name.x + name.r - wide, name.x + far, name.x - far - wide)
        for left in lefts:
            left = min(max(left, field[0]), max(field[0], field[2] - wide))
            found.append((left, name.y - near - _HIGH, left + wide, name.y - near))
            found.append((left, name.y + near, left + wide, name.y + near + _HIGH))
        for shift in (0.0, -6.0, 6.0):
            top = name.y - _HIGH / 2 + shift
            found.append((name.x + near, top, name.x + near + wide, top + _HIGH))
            found.append((name.x - near - wide, top, name.x - near, top + _HIGH))
    return found


def _words(box: Box, name: Name) -> Html:
    """Anchored at the side that is nearest to the point: how wide a font really is, is not known here."""
    before, after = name.x - box[0], box[2] - name.x
    kind = f"name halo{' strong' if name.must else ''}"
    y = box[3] - 3.5
    if after < before / 2:
        return text(box[2], y, name.words, kind, "end")
    return (
        text(box[0], y, name.words, kind)
        if before < after / 2
        else text((box[0] + box[2]) / 2, y, name.words, kind, "middle")
    )


def _leader(box: Box, name: Name) -> Html:
    """From the nearest place of the box to the rim of the point."""
    x, y = min(max(name.x, box[0] + 4), box[2] - 4), min(max(name.y, box[1] + 2), box[3] - 1)
    length = math.hypot(x - name.x, y - name.y)
    share = min(1.0, name.r / length)
    return line(x, y, name.x + share * (x - name.x), name.y + share * (y - name.y), "leader")


def _far(box: Box, name: Name) -> float:
    """Pixels between the box and the rim of the point."""
    x, y = min(max(name.x, box[0]), box[2]), min(max(name.y, box[1]), box[3])
    return max(0.0, math.hypot(x - name.x, y - name.y) - name.r)


def _overlap(a: Box, b: Box) -> float:
    return max(0.0, min(a[2], b[2]) - max(a[0], b[0])) * max(0.0, min(a[3], b[3]) - max(a[1], b[1]))


def _inside(box: Box, field: Box) -> bool:
    return box[0] >= field[0] and box[1] >= field[1] and box[2] <= field[2] + 0.01 and box[3] <= field[3]
