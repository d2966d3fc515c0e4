"""The page: sections in the order in which a reader asks."""

from __future__ import annotations

from collections.abc import Sequence

from netweight.artifact import Manifest
from netweight.certify.certificate import Certificate, Outcomes
from netweight.measure import Measurements
from netweight.report.candidates import candidates_section
from netweight.report.confusion import confusion_section
from netweight.report.costs import costs_section, tiers_section
from netweight.report.evidence import calibration_section, sequence_section, slices_section
from netweight.report.examples import Example, examples_section
from netweight.report.format import Scale
from netweight.report.html import Html, element, esc, join
from netweight.report.origin import origin_section
from netweight.report.style import CSS
from netweight.report.verdict import headline, verdict_section

_POLICY = "default-src 'none'; style-src 'unsafe-inline'; img-src data:"


def render(
    manifest: Manifest,
    certificate: Certificate,
    measurements: Measurements,
    outcomes: Outcomes,
    *,
    examples: Sequence[Example] = (),
) -> str:
    """One self-contained HTML page; the same values give the same bytes.

    `examples` are shown as they are: their texts leave the data with the page.
    """
    command = str(manifest.provenance.get("command", "netweight optimize ..."))
    scale = Scale(certificate.registration.task, certificate.reference.value)
    parts = [
        verdict_section(certificate, outcomes, scale),
        costs_section(measurements, command),
        candidates_section(measurements, scale, command),
        tiers_section(manifest, measurements, scale, command),
        calibration_section(certificate),
        confusion_section(certificate, outcomes),
        slices_section(certificate, scale),
        sequence_section(certificate, scale),
        examples_section(examples, certificate.registration.task) if examples else Html(),
        origin_section(manifest, certificate, measurements, command),
    ]
    names = f"{certificate.shipped.name} against {certificate.registration.reference.name}"
    return "".join(
        (
            '<!DOCTYPE html>\n<html lang="en">\n<head>\n<meta charset="utf-8">\n',
            f'<meta http-equiv="Content-Security-Policy" content="{_POLICY}">\n',
            '<meta name="viewport" content="width=device-width, initial-scale=1">\n',
            '<meta name="color-scheme" content="light dark">\n<meta name="referrer" content="no-referrer">\n',
            element("title", f"Netweight: {certificate.verdict}, {names}"),
            f"\n<style>{CSS}</style>\n</head>\n<body>\n<header>",
            element("p", f"Netweight report · {names}", kind="eyebrow"),
            headline(certificate),
            _contents(bool(examples)),
            "</header>\n<main>\n",
            join(parts),
            "</main>\n",
            element("footer", "Made by Netweight. This page loads nothing, runs nothing and sends nothing."),
            "\n</body>\n</html>\n",
        )
    )


def _contents(examples: bool) -> Html:
    links = [
        ("verdict", "Verdict"),
        ("costs", "Before and after"),
        ("candidates", "Candidates"),
        ("tiers", "Who answers"),
    ]
    links += [("calibration", "Confidence"), ("slices", "Slices"), ("sequence", "Tests")]
    links += [("examples", "Examples")] if examples else []
    links += [("origin", "Origin")]
    items = join(Html(f'<li><a href="#{ident}">{esc(name)}</a></li>') for ident, name in links)
    return Html(f'<nav aria-label="Contents"><ul>{items}</ul></nav>')
