"""What backs the verdict: calibration, slices, and the sequence of tests."""

from __future__ import annotations

from collections import Counter
from dataclasses import replace

from netweight.certify.certificate import Certificate, Slice
from netweight.certify.slices import VALUES
from netweight.report.format import Scale, count, fixed, level, percent, probability
from netweight.report.html import Html, code, cut, element, figure, section, source, table
from netweight.report.intervals import intervals
from netweight.report.plots import reliability
from netweight.task import Classify

_SLICES = 200


def calibration_section(certificate: Certificate) -> Html:
    """Whether confidence means what it says."""
    found = certificate.calibration
    if found is None or not found.rows:
        score = certificate.registration.task.kind == "score"
        words = "Not shown: scores carry no confidence." if score else "Not measured."
        return section("calibration", "Whether confidence means what it says", element("p", words))
    bins = [
        (str(i + 1), percent(c), percent(r), f"{fixed(100 * (r - c), 1)} points", count(n))
        for i, (c, r, n) in enumerate(zip(found.confidence, found.right, found.rows, strict=True))
    ]
    return section(
        "calibration",
        "Whether confidence means what it says",
        element(
            "p",
            f"Expected calibration error {percent(found.error, 2)} (root mean square, debiased), Brier score "
            f"{fixed(found.brier, 4)} (0 is perfect), in {len(bins)} bins of about equal numbers of rows.",
        ),
        element(
            "div",
            figure(
                reliability("reliability", found),
                "A point above the dashed line is more often right than it claims; below, "
                "less often. Bars mark the gap.",
            ),
            table(
                "The bins, from the least confident rows to the most.",
                ("bin", "confidence", "right", "right − confidence", "rows"),
                bins,
                numeric={1, 2, 3, 4},
                kind="dense bins",
            ),
            kind="pair",
        ),
        source(f"From {count(sum(found.rows))} certify rows, shipped model; ", code("netweight verify DIR"), "."),
    )


def slices_section(certificate: Certificate, scale: Scale) -> Html:
    """Quality in parts of the data."""
    slices = certificate.slices
    if not slices:
        return section("slices", "Slices", element("p", "No column to slice by was given."))
    # Slices of any classification are scored by the share of right rows: macro-F1 within one label says nothing.
    own = Scale(replace(scale.task, metric="accuracy"), scale.reference) if isinstance(scale.task, Classify) else scale
    points = certificate.registration.max_drop if own.task.metric == scale.task.metric else None
    rows = [
        (
            f"{cut(s.column, 40)} = {cut(s.value, 80)}",
            count(s.rows),
            *_said(s, own),
            _reading(s, None if points is None else own.task.margin(points, s.reference)),
        )
        for s in slices[:_SLICES]
    ]
    more = f" The first {len(rows)} of {count(len(slices))}." if len(rows) < len(slices) else ""
    most = Counter(s.column for s in slices).most_common(1)[0][1]
    more += " A point is 1 % of the reference's error on the slice." if own.task.metric == "mae" else ""
    more += f" Of a column, the {VALUES} values with most rows." if most >= VALUES else ""
    return section(
        "slices",
        "Slices",
        element(
            "p",
            "Outside of the certificate: a look for trouble, not a proof. Of many slices, some look worse by chance.",
        ),
        table(
            f"Quality on parts of the certify rows, as {own.name}.{more}",
            ("slice", "rows", "reference", "shipped", "drop (interval)", "reading"),
            rows,
            numeric={1, 2, 3, 4},
        ),
        source("From certify rows; ", code("netweight verify DIR"), "."),
    )


def _said(found: Slice, own: Scale) -> tuple[str, str, str]:
    """Of reference and shipped, and the drop. Scores that are all equal have no correlation, which counts as 0, and of
    an error of nothing no drop is a share."""
    drop = "too little to say" if found.drop is None else replace(own, reference=found.reference).drop(found.drop)
    drop = "–" if own.task.metric == "mae" and not found.reference else drop
    unranked = own.task.metric == "spearman" and found.reference == found.quality == 0
    return ("–", "–", drop) if unranked else (own.quality(found.reference), own.quality(found.quality), drop)


def _reading(found: Slice, margin: float | None) -> str:
    """In words; `margin` is None where the certificate's is in another metric."""
    if found.drop is None:
        return "–"
    if margin is not None and found.drop.low > margin:
        return "✗ worse, beyond the margin"
    if found.drop.low > 0:
        return "▼ worse"
    if found.drop.high < 0:
        return "▲ better"
    return "✓ within the margin" if margin is not None and found.drop.high < margin else "no clear change"


def sequence_section(certificate: Certificate, scale: Scale) -> Html:
    """The registered order of candidates and how far testing went."""
    tested = {t.candidate: t for t in certificate.tested}
    rows = []
    for i, candidate in enumerate(certificate.registration.candidates):
        t = tested.get(candidate)
        name = f"{i + 1}: {cut(candidate.name, 60)}{' (ships)' if candidate == certificate.shipped else ''}"
        if t is None:
            rows.append((name, "–", "–", "–", "not reached"))
            continue
        numbers = scale.quality(t.quality.value), scale.drop(t.drop), probability(t.p_value)
        rows.append((name, *numbers, "✓ passed" if t.passed else "✗ failed"))
    margin = scale.allowed(certificate.final.margin)
    return section(
        "sequence",
        "The sequence of tests",
        element(
            "p",
            "Candidates and their order, safest to cheapest, were fixed before the labels were opened. Testing stops "
            "at the first failure; the last that passed ships, or the safest where none did.",
        ),
        figure(intervals("sequence-plot", certificate.tested, scale), "All tests that were made.")
        if len(tested) > 1
        else "",
        table(
            f"Hypothesis of each test: {scale.name} {scale.falls} by {margin} or more; tested at a level of "
            f"{level(certificate.registration.level)}.",
            ("candidate", scale.name, "drop (interval)", "p-value", "result"),
            rows,
            numeric={1, 2, 3},
        ),
        source(f"From {count(certificate.registration.rows)} certify rows; ", code("netweight verify DIR"), "."),
    )
