"""What the search found: plots of quality against cost and latency, and the table behind them."""

from __future__ import annotations

from netweight.measure import Measurement, Measurements
from netweight.report.format import Scale, count, dollars, milliseconds, percent, plain, rate, significant, size
from netweight.report.html import Html, code, cut, element, figure, section, source, table
from netweight.report.pareto import Point, front, pareto, points

_LISTED, _DRAWN = 30, 300


def candidates_section(measured: Measurements, scale: Scale, command: str) -> Html:
    """Pareto plots where speeds are known, and every candidate in a table."""
    found = _known(measured)
    # Of one name, the reference's role says more than that it also ships.
    roles = {measured.shipped.name: "shipped"} | {measured.reference.name: "reference"}

    def price(m: Measurement) -> float | None:
        return m.dollars_per_million(measured.vcpu_hour, measured.machine.threads)

    def latency(m: Measurement) -> float | None:
        return m.timing.p95 if m.timing else None

    by_price, by_latency = points(found, price, roles), points(found, latency, roles)
    best = {p.name for p in front(by_price)}
    words = f"Quality by price, at {dollars(measured.vcpu_hour)} for an hour of one virtual core"
    plots = []
    if by_price:
        picture = pareto("by-price", _fewer(by_price), scale, "US$ per million rows in batches", _tick)
        plots.append(figure(picture, f"{words}. Up and left is better; the line is the front."))
    if by_latency:
        picture = pareto("by-latency", _fewer(by_latency), scale, "latency of one request, p95 (ms)", _tick)
        words = "Quality by the latency that 95 % of single requests stay below"
        plots.append(figure(picture, f"{words}. Up and left is better."))
    return section(
        "candidates",
        "What the search found",
        element("div", *plots, kind="pair") if plots else element("p", "No speeds were measured: nothing to plot."),
        _table(found, best, roles, measured, scale),
        source(
            f"From {count(measured.shipped.rows)} dev rows, which the search saw: for choice, not for proof. By ",
            code(command),
            ".",
        ),
    )


def _fewer(shown: list[Point]) -> list[Point]:
    """As many as a plot can show: those with a role, the front, then the best."""
    best = front(shown)
    return sorted(shown, key=lambda p: (p.role == "other", p not in best, -p.quality, p.name))[:_DRAWN]


def _tick(value: float) -> str:
    return plain(value, 2)


def _table(
    found: list[Measurement], best: set[str], roles: dict[str, str], measured: Measurements, scale: Scale
) -> Html:
    order = sorted(found, key=lambda m: (m.name not in roles, m.name not in best, -m.quality, m.name))
    shown = sorted(order[:_LISTED], key=lambda m: (-m.quality, m.name))
    rows = []
    for m in shown:
        t = m.timing
        role = ", ".join(w for w in (roles.get(m.name, ""), "front" if m.name in best else "") if w)
        rows.append(
            (
                cut(m.name, 60),
                role or "–",
                scale.quality(m.quality),
                _agreement(m, scale),
                rate(t.rows_per_second if t else None),
                milliseconds(t.p50 if t else None),
                milliseconds(t.p95 if t else None),
                milliseconds(t.p99 if t else None),
                size(m.bytes),
                dollars(m.dollars_per_million(measured.vcpu_hour, measured.machine.threads)),
            )
        )
    head = (
        "candidate",
        "role",
        scale.name,
        "agreement",
        "throughput",
        "p50",
        "p95",
        "p99",
        "size",
        "a million rows",
    )
    return table(
        f"{count(len(shown))} of {count(len(found))} candidates; front by price, agreement with the reference.",
        head,
        rows,
        numeric=set(range(2, len(head))),
        kind="dense",
    )


def _agreement(m: Measurement, scale: Scale) -> str:
    return percent(m.agreement) if scale.task.kind == "classify" else significant(m.agreement)


def _known(measured: Measurements) -> list[Measurement]:
    """Every candidate once, reference and shipped first."""
    found: dict[str, Measurement] = {}
    for m in (measured.reference, measured.shipped, *measured.candidates):
        found.setdefault(m.name, m)
    return list(found.values())
