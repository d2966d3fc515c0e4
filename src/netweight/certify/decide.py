"""The certificate: candidates tested from safest to cheapest until one fails; the last that passed ships."""

from __future__ import annotations

import math
from collections.abc import Mapping, Sequence
from dataclasses import asdict, replace
from typing import Any

import numpy as np

from netweight.certify.calibration import calibration_of
from netweight.certify.certificate import Candidate, Certificate, Outcomes, Registration, Tested, Verdict
from netweight.certify.compare import Pairs, absolute, chance, compare, require, rows_needed
from netweight.certify.match import Answers, row_keys
from netweight.certify.slices import columns, slices_of
from netweight.data.rows import Sealed, groups_of
from netweight.errors import CertificateError
from netweight.task import Task

_DIGITS = 6  # of a confidence; rounded before calibration is computed, so that it can be recomputed


def certify(
    registration: Registration, sealed: Sealed, reference: Answers, answers: Mapping[str, Answers]
) -> tuple[Certificate, Outcomes]:
    """Open the labels against the registration, test, and keep what is needed to test again.

    `answers` are those of each registered candidate by name, on the certify rows in their order. Raises
    CertificateError where rows or answers are not those that were registered, or the rows do not allow the test.
    """
    if sealed.fingerprint != registration.fingerprint:
        raise CertificateError(
            f"registered were certify rows {registration.fingerprint[:12]}, given are {sealed.fingerprint[:12]}; "
            "register the rows that are to be tested."
        )
    names = [candidate.name for candidate in registration.candidates]
    if missing := [name for name in names if name not in answers]:
        raise CertificateError(f"there are no answers of {', '.join(missing)}; run every registered candidate.")
    for name, given in [(registration.reference.name, reference), *((name, answers[name]) for name in names)]:
        if len(given.logits) != len(sealed) or len(given.confidence) != len(sealed):
            raise CertificateError(f"{name} answered {len(given.logits):,} rows, the certify split has {len(sealed):,}")
    labelled = sealed.unseal(registration.digest)
    targets = registration.task.targets(labelled.label or ())
    outcomes = {name: registration.task.outcomes(answers[name].logits, targets) for name in names}
    rows = Outcomes(
        row_keys(labelled),
        registration.task.outcomes(reference.logits, targets),
        outcomes,
        np.zeros(len(labelled)),
        groups_of(labelled),
        columns(labelled),
    )
    require(registration.task, rows.reference, rows.clusters)
    tested = _fixed_sequence(registration, rows)
    shipped = _shipped(tested)
    rows = replace(
        rows,
        candidates={t.candidate.name: outcomes[t.candidate.name] for t in tested},
        confidence=np.asarray(answers[shipped.candidate.name].confidence, np.float64).round(_DIGITS),
    )
    return _conclude(registration, rows, tested), rows


def verify(certificate: Certificate, outcomes: Outcomes) -> None:
    """Recompute every number from the outcomes. Raises CertificateError naming the first that differs."""
    registration = certificate.registration
    if len(outcomes) != registration.rows:
        raise CertificateError(f"the certificate is of {registration.rows:,} rows, its outcomes of {len(outcomes):,}")
    names = {t.candidate.name for t in certificate.tested}
    if names != set(outcomes.candidates):
        has = ", ".join(sorted(outcomes.candidates))
        raise CertificateError(f"the certificate tested {', '.join(sorted(names))}; its outcomes are of {has}.")
    again = _conclude(registration, outcomes, _fixed_sequence(registration, outcomes))
    least = _rounding(registration.task)
    if found := _difference(asdict(certificate), asdict(again), "", least):
        where, stored, now = found
        raise CertificateError(f"{where} is {stored!r} in the certificate, and {now!r} recomputed from its outcomes.")


def _fixed_sequence(registration: Registration, outcomes: Outcomes) -> tuple[Tested, ...]:
    """From safest to cheapest, each at the full level, until one fails (Learn then Test, arXiv 2110.01052, 3.2)."""
    tested: list[Tested] = []
    for candidate in registration.candidates:
        if candidate.name not in outcomes.candidates:
            raise CertificateError(f"{candidate.name} was to be tested next; the outcomes hold no rows of it.")
        pairs = _pairs(registration, outcomes, candidate)
        found = compare(pairs, registration.max_drop, registration.level, registration.seed)
        quality = absolute(pairs.task, pairs.candidate, pairs.groups, registration.level, registration.seed)
        passed = found.p_value <= registration.level
        tested.append(Tested(candidate, quality, found.drop, found.margin, found.p_value, passed, *pairs.lost_gained))
        if not passed:
            break
    return tuple(tested)


def _pairs(registration: Registration, outcomes: Outcomes, candidate: Candidate) -> Pairs:
    return Pairs(registration.task, outcomes.reference, outcomes.candidates[candidate.name], outcomes.clusters)


def _shipped(tested: Sequence[Tested]) -> Tested:
    return next((t for t in reversed(tested) if t.passed), tested[0])


def _conclude(registration: Registration, outcomes: Outcomes, tested: tuple[Tested, ...]) -> Certificate:
    final, task, level = _shipped(tested), registration.task, registration.level
    verdict: Verdict = "certified" if final.passed else "not certified"
    if not final.passed and final.drop.low > final.margin:
        verdict = "worse"
    pairs = _pairs(registration, outcomes, final.candidate)
    return Certificate(
        registration,
        verdict,
        final.candidate,
        absolute(task, outcomes.reference, outcomes.clusters, level, registration.seed),
        tested,
        power=chance(pairs, final, 0.0, level),
        rows_needed=(rows_needed(pairs, final, 0.0, level), rows_needed(pairs, final, final.drop.value, level)),
        slices=slices_of(task, outcomes, final.candidate.name, level),
        calibration=calibration_of(task, outcomes, final.candidate.name),
        notes=_notes(registration, outcomes),
    )


def _notes(registration: Registration, outcomes: Outcomes) -> tuple[str, ...]:
    notes = [
        "It compares this artifact with this reference on rows like the certify rows, drawn independently; what "
        "training again would change is not covered."
    ]
    if outcomes.groups is not None:
        notes.append(f"Rows come in {len(set(outcomes.groups)):,} groups, which were resampled as wholes.")
    if registration.look > 1:
        notes.append(
            f"This is look {registration.look} at these certify rows, tested at level {registration.level:.4g}; each "
            "further look halves it."
        )
    return tuple(notes)


def _rounding(task: Task) -> float:
    """By how much small numbers may differ: bounds are found by halving, and machines round as they please. Errors in a
    small unit are small throughout, and so are their margins."""
    return 1e-6 * min(1.0, task.unit)


def _difference(stored: Any, now: Any, where: str, least: float) -> tuple[str, Any, Any] | None:
    """Where two nested values first differ by more than rounding, a millionth of them or `least`, and how."""
    if isinstance(stored, dict) and isinstance(now, dict):
        steps = [(f"{where}.{key}".lstrip("."), stored[key], now[key]) for key in stored]
    elif isinstance(stored, tuple) and isinstance(now, tuple) and len(stored) == len(now):
        steps = [(f"{where}[{i}]", one, two) for i, (one, two) in enumerate(zip(stored, now, strict=True))]
    elif isinstance(stored, float) and isinstance(now, float):
        near = math.isfinite(stored) and abs(stored - now) <= max(least, 1e-6 * abs(stored))
        return None if near else (where, stored, now)
    else:
        return None if stored == now else (where, stored, now)
    return next((found for name, one, two in steps if (found := _difference(one, two, name, least))), None)
