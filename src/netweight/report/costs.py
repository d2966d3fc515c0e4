"""Before and after: speed, size and money of the reference and of what ships, and which tier answers."""

from __future__ import annotations

import math
from typing import Any

from netweight.artifact import Manifest
from netweight.measure import Measurement, Measurements
from netweight.report.format import (
    MISSING,
    Scale,
    count,
    dollars,
    milliseconds,
    percent,
    plain,
    rate,
    seconds,
    significant,
    size,
    times,
)
from netweight.report.html import Html, code, cut, element, figure, join, section, source, table
from netweight.report.plots import tiers_bar


def costs_section(measured: Measurements, command: str) -> Html:
    """Before and after."""
    before, after = measured.reference, measured.shipped
    cores, hour = measured.machine.threads, measured.vcpu_hour
    money = (before.dollars_per_million(hour, cores), after.dollars_per_million(hour, cores))
    old, new = before.timing, after.timing

    def pair(name: str) -> tuple[float | None, float | None]:
        return (getattr(old, name) if old else None, getattr(new, name) if new else None)

    rows: list[tuple[str, str, str, str]] = []

    def add(title: str, values: tuple[Any, Any], write: Any, more: str, fewer: str) -> None:
        rows.append((title, write(values[0]), write(values[1]), times(*values, more, fewer)))

    add("Throughput in batches", pair("rows_per_second"), rate, "faster", "slower")
    for name in ("p50", "p95", "p99"):
        add(f"Latency of one request, {name}", pair(name), milliseconds, "slower", "faster")
    add("Size to travel", (before.bytes, after.bytes), size, "larger", "smaller")
    add("Peak memory of a process", (before.memory, after.memory), size, "more", "less")
    add("Cold start to the first answer", (before.cold_start, after.cold_start), seconds, "slower", "faster")
    add("Price of a million rows in batches", money, dollars, "dearer", "cheaper")
    return section(
        "costs",
        "Before and after",
        _cards(before, after, money),
        table(
            f"On {measured.machine.cpu}, {cores} of {measured.machine.cores} cores; tokenization included. The price "
            f"is that of the cores, in batches, at {dollars(hour)} for an hour of one virtual core.",
            ("", f"reference: {cut(before.name, 60)}", f"shipped: {cut(after.name, 60)}", "shipped is"),
            rows,
            numeric={1, 2, 3},
        ),
        _spread(measured),
        source(
            "Shipped: ", code("netweight bench DIR"), " on the artifact's folder DIR. Reference: ", code(command), "."
        ),
    )


def _cards(before: Measurement, after: Measurement, money: tuple[float | None, float | None]) -> Html:
    old, new = before.timing, after.timing
    cards = [
        (times(before.bytes, after.bytes, "larger", "smaller"), f"size: {size(before.bytes)} → {size(after.bytes)}")
    ]
    if old and new:
        speeds, waits = (old.rows_per_second, new.rows_per_second), (old.p95, new.p95)
        cards[:0] = [
            (times(*speeds, "faster", "slower"), f"throughput: {significant(speeds[0])} → {rate(speeds[1])}"),
            (times(*waits, "slower", "faster"), f"latency p95: {significant(waits[0])} → {milliseconds(waits[1])}"),
        ]
        prices = f"a million rows in batches: {dollars(money[0])} → {dollars(money[1])}"
        cards.append((times(*money, "dearer", "cheaper"), prices))
    items = (element("li", element("b", big), element("span", small)) for big, small in cards)
    return element("ul", join(items), kind="cards")


def _spread(measured: Measurements) -> Html:
    words = [
        f"{kind}: {rate(m.timing.slowest)} to {rate(m.timing.fastest)}, {count(m.timing.batch)} rows in a batch"
        for kind, m in (("reference", measured.reference), ("shipped", measured.shipped))
        if m.timing
    ]
    return element("p", f"Spread of the throughput over rounds: {'; '.join(words)}.", kind="from") if words else Html()


def _threshold(value: float) -> str:
    """With as many digits as tell it from 1."""
    return plain(value, 3 if value <= 0.99 or value >= 1 else 3 + math.ceil(-math.log10(1 - value)) - 2)


def tiers_section(manifest: Manifest, measured: Measurements, scale: Scale, command: str) -> Html:
    """Who answers. A single tier answers everything, in one sentence."""
    shipped = measured.shipped
    if len(manifest.tiers) < 2:
        only = manifest.tiers[0].name if manifest.tiers else shipped.name
        return section(
            "tiers", "Who answers", element("p", f"One model, {only}, answers every row; nothing is handed over.")
        )
    alone = {m.tiers[0]: m for m in measured.candidates if len(m.tiers) == 1}
    answered: list[float | None] = (
        list(shipped.answered) if len(shipped.answered) == len(manifest.tiers) else [None] * len(manifest.tiers)
    )
    last = len(manifest.tiers) - 1
    rows = [
        (
            f"{i + 1}: {cut(tier.name, 60)}",
            tier.engine,
            MISSING if share is None else percent(share),
            "answers the rest" if i == last else f"below {_threshold(tier.threshold)}",
            plain(tier.temperature),
            plain(tier.before),
            scale.quality(alone[tier.name].quality) if tier.name in alone else MISSING,
        )
        for i, (tier, share) in enumerate(zip(manifest.tiers, answered, strict=True))
    ]
    names, shares = [t.name for t in manifest.tiers], [s for s in answered if s is not None]
    plot = (
        figure(tiers_bar("tiers-plot", names, shares), "Share of rows that each tier answers, cheap to strong.")
        if shares
        else ""
    )
    return section(
        "tiers",
        "Who answers",
        plot,
        table(
            "A tier answers where its confidence is high enough and hands the row over where it is not. To its own "
            "logits it adds those that a row was handed over with, times their weight.",
            (
                "tier",
                "engine",
                "answers",
                "hands over at a confidence",
                "temperature",
                "weight of tiers before",
                f"{scale.name} alone, all dev rows",
            ),
            rows,
            numeric={2, 4, 5, 6},
        ),
        source(
            f"Shares from {count(shipped.rows)} dev rows, by ",
            code(command),
            "; thresholds, temperatures and weights from ",
            code("manifest.json"),
            ".",
        ),
    )
