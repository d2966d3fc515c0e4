"""Drops with their intervals, drawn against the margin."""

from __future__ import annotations

from collections.abc import Sequence

from netweight.certify.certificate import Tested
from netweight.report.format import Scale
from netweight.report.html import Html, cut
from netweight.report.svg import Axis, line, picture, rect, text

_WIDTH, _SIDE, _ROW, _ALONE = 360.0, 14.0, 46.0, 30.0
_APART = 76.0  # pixels that the two words above need


def intervals(ident: str, tested: Sequence[Tested], scale: Scale) -> Html:
    """One line for each test; the region beyond the margin is hatched by a tint and named."""
    point = scale.point
    margin = tested[0].margin / point
    shown = [v / point for t in tested for v in (t.drop.low, t.drop.high)] + [0.0, margin]
    span = max(shown) - min(shown) or 1.0
    axis = Axis(min(shown) - 0.08 * span, max(shown) + 0.16 * span, _SIDE, _WIDTH - _SIDE)
    # One test alone is named by the caption; a name here would only cover the lines.
    named = len(tested) > 1
    row = _ROW if named else _ALONE
    top, foot = 22.0, 22.0 + row * len(tested)
    shapes: list[Html] = [
        rect(axis(margin), top, axis.end - axis(margin), foot - top, "beyond"),
        line(axis(margin), top - 4, axis(margin), foot, "margin"),
        line(axis(0), top - 4, axis(0), foot, "zero"),
        line(axis.start, foot, axis.end, foot, "axis"),
        *_names(axis, margin, top - 8),
    ]
    for value, label in axis.labels():
        shapes += [line(axis(value), foot, axis(value), foot + 4, "axis")]
        shapes += [text(axis(value), foot + 16, label, "tick", "middle")]
    shapes.append(
        text((axis.start + axis.end) / 2, foot + 33, f"drop in quality: {scale.name} (points)", "label", "middle")
    )
    for position, test in enumerate(tested):
        shapes += _one(axis, test, scale, top + row * (position + 1) - (12 if named else 15), named=named)
    words = "; ".join(f"{t.candidate.name}: {scale.drop(t.drop)}, {'passed' if t.passed else 'failed'}" for t in tested)
    return picture(
        ident,
        _WIDTH,
        foot + 40,
        "Observed drop and its interval against the margin",
        f"{words}; margin {scale.allowed(tested[0].margin)}.",
        shapes,
    )


def _names(axis: Axis, margin: float, y: float) -> list[Html]:
    """The words above the two upright lines; where they are close, the 0 below says enough."""
    zero, allowed = axis(0), axis(margin)
    found = [
        text(allowed, y, "margin", "tick strong", "middle" if axis.start + 12 < allowed < axis.end - 12 else "end")
    ]
    if allowed - zero >= _APART and zero >= _APART / 2:
        found.append(text(zero, y, "no change", "tick", "middle"))
    elif zero >= _APART:
        found.append(text(zero + 4, y, "no change", "tick", "end"))
    elif allowed - zero >= _APART + 12:
        found.append(text(zero - 4, y, "no change", "tick"))
    return found


def _one(axis: Axis, test: Tested, scale: Scale, y: float, *, named: bool) -> list[Html]:
    kind = "pass" if test.passed else "fail"
    low, value, high = (axis(v / scale.point) for v in (test.drop.low, test.drop.value, test.drop.high))
    sign = "✓" if test.passed else "✗"
    name = [text(axis.start, y - 11, cut(f"{sign} {test.candidate.name}", 48), "tick strong halo")] if named else []
    return [
        *name,
        line(low, y, high, y, f"interval {kind}"),
        line(low, y - 5, low, y + 5, f"interval {kind}"),
        line(high, y - 5, high, y + 5, f"interval {kind}"),
        rect(value - 4, y - 4, 8, 8, f"dot {kind}"),
    ]
