"""Where every number came from, and how to get it again."""

from __future__ import annotations

import json
from collections.abc import Mapping
from typing import Any

from netweight.artifact import Manifest
from netweight.certify.certificate import Certificate
from netweight.measure import Measurements
from netweight.report.format import count
from netweight.report.html import Html, code, definitions, element, esc, join, section, table


def origin_section(manifest: Manifest, certificate: Certificate, measured: Measurements, command: str) -> Html:
    """Where every number came from and how to get it again."""
    machine, registration = measured.machine, certificate.registration
    versions = ", ".join(f"{name} {version}" for name, version in sorted(machine.versions.items()))
    facts: list[tuple[str, object]] = [
        ("Machine", f"{machine.cpu}; {machine.cores} cores, {machine.threads} threads used; {machine.system}"),
        ("Versions", f"Python {machine.python}{', ' if versions else ''}{versions}"),
        ("Commit", code(machine.commit) if machine.commit else "an installed package"),
        ("Measured on", machine.date),
        ("Certify rows", join((f"{count(registration.rows)}, fingerprint ", code(registration.fingerprint)))),
        ("Registration", join((code(registration.digest), f", seed {registration.seed}"))),
        ("Reference", join((f"{registration.reference.name}, ", code(registration.reference.digest)))),
        ("Shipped", join((f"{certificate.shipped.name}, ", code(certificate.shipped.digest)))),
        *((_title(key), _value(value)) for key, value in sorted(manifest.provenance.items()) if key != "notes"),
    ]
    again = [
        ("everything, from the data", command),
        ("the certificate, from single outcomes; with --data also from the rows", "netweight verify DIR [--data FILE]"),
        ("the speeds, on the machine at hand", "netweight bench DIR"),
    ]
    said = (*_said(manifest.provenance.get("notes")), *certificate.notes)
    notes = element("ul", join(element("li", note) for note in said)) if said else Html()
    return section(
        "origin",
        "Where the numbers come from",
        join((element("h3", "Notes"), notes, element("h3", "Facts"))) if notes else "",
        definitions(facts),
        element("h3", "To get them again"),
        table("DIR is the artifact's folder.", ("what", "command"), [(what, code(line)) for what, line in again]),
        element(
            "p",
            "Hashes detect corruption, not forgery: who doubts the outcomes makes them again from the data.",
        ),
    )


def _said(notes: Any) -> tuple[str, ...]:
    """What the job had to say; a manifest is outside input, and one of another version may hold something else."""
    return tuple(str(note) for note in notes) if isinstance(notes, (list, tuple)) else ()


def _title(key: object) -> str:
    words = str(key).replace("_", " ")
    return words[:1].upper() + words[1:]


def _value(value: Any) -> Html:
    if isinstance(value, Mapping) or (isinstance(value, (list, tuple)) and value):
        return element("pre", json.dumps(value, indent=1, ensure_ascii=False, sort_keys=True, default=str))
    return esc("none" if value is None or value in ("", [], ()) else value)
