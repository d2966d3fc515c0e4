"""What an artifact says of itself, and whether that still holds."""

from __future__ import annotations

import json
from dataclasses import asdict
from pathlib import Path
from typing import Any

import numpy as np

from netweight import artifact, measure
from netweight.certify import Answers, Certificate, Estimate, Outcomes, matches
from netweight.certify import verify as recompute
from netweight.certify.match import row_keys
from netweight.data import Columns, read
from netweight.data.files import atomic
from netweight.data.write import placed
from netweight.engine import load
from netweight.errors import ArtifactError, CertificateError, OptionError
from netweight.measure import Measurements
from netweight.report import Example, render
from netweight.report.format import Scale, quality
from netweight.task import Classify

_EXAMPLES = 20  # of each kind of flip


def certificate_of(folder: Path) -> tuple[Certificate, Outcomes]:
    """The certificate and the rows behind it. Raises ArtifactError where the artifact has none."""
    manifest = artifact.read_manifest(folder)
    if artifact.CERTIFICATE not in manifest.files:
        raise ArtifactError(f"{folder} has no certificate; artifacts of `netweight optimize` have one.")
    return (
        Certificate.from_json(artifact.read_file(folder, manifest, artifact.CERTIFICATE)),
        Outcomes.from_json(artifact.read_file(folder, manifest, artifact.OUTCOMES)),
    )


def measurements_of(folder: Path) -> Measurements:
    """What was measured when the artifact was made."""
    manifest = artifact.read_manifest(folder)
    return measure.from_dict(json.loads(artifact.read_file(folder, manifest, artifact.MEASUREMENTS)))


def summary(folder: Path) -> dict[str, Any]:
    """The artifact as plain values."""
    manifest = artifact.check(folder)
    certificate, _ = certificate_of(folder)
    measured = measurements_of(folder)
    final = certificate.final
    return {
        "format": manifest.format,
        "version": manifest.digest[:12],
        "task": manifest.task.to_dict(),
        "certificate": {
            "verdict": certificate.verdict,
            "metric": manifest.task.metric,
            "max_drop": certificate.registration.max_drop,
            "confidence": certificate.registration.confidence,
            "level": certificate.registration.level,
            "look": certificate.registration.look,
            "rows": certificate.registration.rows,
            "reference": asdict(certificate.reference),
            "artifact": asdict(final.quality),
            "drop": asdict(final.drop),
            "p_value": final.p_value,
            "power": certificate.power,
            "rows_needed": {"no drop": certificate.rows_needed[0], "observed drop": certificate.rows_needed[1]},
        },
        "tiers": [
            {
                "name": tier.name,
                "engine": tier.engine,
                "bytes": (folder / tier.file).stat().st_size,
                "answered": answered,
                "threshold": tier.threshold,
                "temperature": tier.temperature,
                "before": tier.before,
            }
            for tier, answered in zip(manifest.tiers, measured.shipped.answered, strict=True)
        ],
        "bytes": artifact.size(folder, manifest),
        "measurements": measure.to_dict(measured),
        "provenance": dict(manifest.provenance),
    }


def lines(folder: Path) -> list[tuple[str, str]]:
    """The artifact in a few lines for people: (name, value)."""
    manifest = artifact.check(folder)
    certificate, _ = certificate_of(folder)
    measured, registration, final = measurements_of(folder), certificate.registration, certificate.final
    scale, metric = Scale(manifest.task, certificate.reference.value), manifest.task.metric
    drop, point = final.drop, scale.point
    sure = 100 * registration.confidence
    said = {
        "certified": f"CERTIFIED: {metric} {scale.falls} by less than {registration.max_drop:g} points",
        "not certified": f"NOT CERTIFIED: a drop of {registration.max_drop:g} points in {metric} is not excluded",
        "worse": f"WORSE: {metric} {scale.falls} by more than {registration.max_drop:g} points",
    }[certificate.verdict]
    found = [
        ("verdict", f"{said} ({sure:g} % confidence, {registration.rows:,} rows that no search saw)"),
        ("ships", certificate.shipped.name),
        (
            metric,
            f"{_written(scale, final.quality)}, reference {registration.reference.name} "
            f"{_written(scale, certificate.reference)}; "
            f"drop {drop.value / point:.2f} points, at most {drop.high / point:.2f}",
        ),
    ]
    if certificate.verdict != "certified":
        zero, observed = (f"{n:,}" if n else "no number" for n in certificate.rows_needed)
        found.append(
            ("rows needed", f"{zero} certify rows if the true drop were 0, {observed} if it were the observed one")
        )
    answers = zip(measured.shipped.tiers, measured.shipped.answered, strict=True)
    found += [
        ("tiers", "; ".join(f"{n} answers {100 * a:.0f} %" for n, a in answers)),
        ("size", f"{artifact.size(folder, manifest) / 1e6:.1f} MB, reference {measured.reference.bytes / 1e6:.1f} MB"),
        ("speed", _speed(measured)),
        ("money", _money(measured)),
        ("report", str(folder / artifact.REPORT)),
    ]
    return found


def _written(scale: Scale, found: Estimate) -> str:
    """With its interval."""
    metric = scale.task.metric
    low, high = (found.high, found.low) if metric == "mae" else (found.low, found.high)
    return f"{quality(metric, found.value)} [{quality(metric, low)}, {quality(metric, high)}]"


def _speed(measured: Measurements) -> str:
    new, old = measured.shipped.timing, measured.reference.timing
    if new is None or old is None:
        return "not measured"
    ratio = new.rows_per_second / old.rows_per_second
    return (
        f"{new.rows_per_second:,.0f} rows/s, reference {old.rows_per_second:,.0f} ({ratio:.1f}x); single requests "
        f"p50 {new.p50:.2f} ms, reference {old.p50:.2f} ms"
    )


def _money(measured: Measurements) -> str:
    threads, both = measured.machine.threads, (measured.shipped, measured.reference)
    new, old = (m.dollars_per_million(measured.vcpu_hour, threads) for m in both)
    batch, other = (m.timing.batch if m.timing else 0 for m in both)
    if new is None or old is None:
        return "not measured"
    return (
        f"${new:.4f} for a million rows in batches of {batch}, reference ${old:.4f} in batches of {other} "
        f"(a vCPU hour at ${measured.vcpu_hour})"
    )


def verify(
    folder: Path, data: str | None, *, text: str = "text", label: str = "label", pair: str | None = None
) -> list[str]:
    """Check all hashes, recompute the certificate; with `data`, compare with what the engine says of those rows now.

    Returns sentences. Raises CorruptArtifact, CertificateError, DataError, OptionError.
    """
    columns = _columns_of(data, "--data", text, label, pair)
    manifest = artifact.check(folder)
    certificate, outcomes = certificate_of(folder)
    said = [f"{len(manifest.files)} files have their recorded SHA-256."]
    if certificate.shipped.digest != manifest.digest:
        raise ArtifactError(
            f"the certificate is for {certificate.shipped.digest[:12]}, the folder holds {manifest.digest[:12]}. "
            "Files of two artifacts are mixed; copy the folder again."
        )
    recompute(certificate, outcomes)
    said.append(
        f"The certificate follows from its {len(outcomes):,} rows: {certificate.verdict}, p = "
        f"{certificate.final.p_value:.3g} at level {certificate.registration.level:g}."
    )
    if data is not None:
        loaded, certified = read(data, columns), set(outcomes.keys)
        said += [loaded.note] if loaded.note else []
        made, here = measurements_of(folder).machine.cpu, measure.cpu()
        where = f" It was certified on {made}; this is {here}." if made != here else ""
        # The table may be all of TRAIN, of which a fifth was cut for certify.
        rows = loaded.rows.take([i for i, key in enumerate(row_keys(loaded.rows)) if key in certified])
        out = load(folder).outputs(rows.text, rows.pair)
        answers = Answers(out.logits, out.confidence)
        said.append(matches(certificate, outcomes, rows, answers, len(loaded.rows), where))
    return said


def _columns_of(table: str | None, option: str, text: str, label: str, pair: str | None) -> Columns:
    columns = Columns(text, label, pair)
    if table is None and columns != Columns("text", "label"):
        raise OptionError(f"--text and the like name columns of {option}; without a table, leave them out.")
    return columns


def write_report(
    folder: Path, out: Path, examples: str | None, *, text: str = "text", label: str = "label", pair: str | None = None
) -> Path:
    """Render the report to `out`; with `examples`, texts of that table on which reference and artifact differ.

    Raises OptionError for a place where no file can be or inside the artifact, whose files are hashed, for that table
    itself, and for columns without a table.
    """
    columns = _columns_of(examples, "--examples", text, label, pair)
    placed(out)
    if examples is not None and out.exists() and Path(examples).exists() and out.samefile(examples):
        raise OptionError(f"{out} is the input itself; write the report to another file.")
    if out.resolve().is_relative_to(folder.resolve()):
        raise OptionError(
            f"{out} is inside the artifact, whose files never change; write the report elsewhere (--out)."
        )
    manifest = artifact.check(folder)
    certificate, outcomes = certificate_of(folder)
    shown = _flips(certificate, outcomes, examples, columns) if examples else ()
    page = render(manifest, certificate, measurements_of(folder), outcomes, examples=shown)
    with atomic(out) as file:
        file.write(page.encode())
    return out


def _flips(certificate: Certificate, outcomes: Outcomes, data: str, columns: Columns) -> tuple[Example, ...]:
    """Rows on which one of the two is right and the other is not, found by their keys."""
    task = certificate.registration.task
    if not isinstance(task, Classify):
        raise ArtifactError("examples of flips exist for labels only; scores have none.")
    rows = read(data, columns).rows
    words = dict(zip(row_keys(rows), rows.text, strict=True))
    if words.keys().isdisjoint(outcomes.keys):
        raise CertificateError(
            f"none of the {len(rows):,} rows of {data} is a certify row; give the table that was certified."
        )
    mine = outcomes.candidates[certificate.shipped.name]
    right = np.stack([task.correct(outcomes.reference), task.correct(mine)])
    found: list[Example] = []
    for first, second in ((True, False), (False, True)):
        at = [i for i in np.flatnonzero((right[0] == first) & (right[1] == second)) if outcomes.keys[i] in words]
        found += [
            Example(
                words[outcomes.keys[i]],
                task.labels[int(mine[i, 1])],
                task.labels[int(outcomes.reference[i, 0])],
                task.labels[int(mine[i, 0])],
            )
            for i in at[:_EXAMPLES]
        ]
    return tuple(found)
