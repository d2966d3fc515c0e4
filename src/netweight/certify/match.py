"""Rows by their hashes: which certify row a given row is, without storing anybody's words."""

from __future__ import annotations

import hashlib
from collections import Counter
from dataclasses import dataclass

import numpy as np
from numpy.typing import NDArray

from netweight.certify.certificate import Certificate, Outcomes
from netweight.data.rows import Rows
from netweight.errors import CertificateError
from netweight.task import Classify, Task

# Predicted scores of another machine may differ in their last digits: this share of the label's spread.
_SCORE_TOLERANCE = 1e-3


@dataclass(frozen=True)
class Answers:
    """What one candidate says of rows, in their order: logits (n, outputs) and confidence (n,)."""

    logits: NDArray[np.floating]
    confidence: NDArray[np.floating]


def row_keys(rows: Rows) -> tuple[str, ...]:
    """The first 64 bits of the SHA-256 of each normalised text, in hex."""
    return tuple(hashlib.sha256(key.encode("utf-8", "surrogatepass")).hexdigest()[:16] for key in rows.keys)


def tolerance(task: Task) -> float:
    """How far apart two answers of one candidate to one row may lie: labels not at all, scores by a thousandth of the
    label's spread."""
    return 0.0 if isinstance(task, Classify) else _SCORE_TOLERANCE * task.scale


def matches(
    certificate: Certificate,
    outcomes: Outcomes,
    rows: Rows,
    answers: Answers,
    given: int | None = None,
    where: str = "",
) -> str:
    """Compare labelled `rows`, and what the shipped candidate says of them now, with what the certificate stored.

    Rows may be in any order and may hold more than the certify rows; `given` counts those of the table that they were
    taken from. Returns a sentence. Raises CertificateError with counts where rows are missing, true labels differ, or
    predictions differ (scores: by more than a thousandth of the label's spread); to the last `where` adds a sentence.
    """
    given = len(rows) if given is None else given
    task, name = certificate.registration.task, certificate.shipped.name
    if rows.label is None:
        raise CertificateError("the given rows have no labels; verifying compares labels. Say which column holds them.")
    keys = row_keys(rows)
    found: dict[str, list[int]] = {}
    for i, key in enumerate(keys):
        found.setdefault(key, []).append(i)
    if missing := sum(key not in found for key in outcomes.keys):
        raise CertificateError(
            f"{missing:,} of {len(outcomes):,} certify rows are not among the {given:,} given rows; give the table "
            "that was certified. No table has texts that are empty, NULL or very long, which Rows from Python may have."
        )
    wanted = set(outcomes.keys)  # labels of further rows need not be the task's
    kept = [i for i, key in enumerate(keys) if key in wanted]
    targets = task.targets([rows.label[i] for i in kept]).tolist()
    labels = Counter(zip([keys[i] for i in kept], targets, strict=True))
    stored = Counter(zip(outcomes.keys, outcomes.reference[:, 1].tolist(), strict=True))
    if wrong := (stored - labels).total():
        raise CertificateError(
            f"the labels of {wrong:,} of {len(outcomes):,} certify rows differ from the given ones; give the table "
            "that was certified."
        )
    now, then = task.outcomes(answers.logits, np.zeros(len(rows)))[:, 0], outcomes.candidates[name][:, 0]
    allowed = tolerance(task)
    # Texts that are equal but for capitals, spaces and the like have one key, and need not have one prediction.
    if differ := sum(
        not (np.abs(now[found[key]] - said) <= allowed).any() for key, said in zip(outcomes.keys, then, strict=True)
    ):
        raise CertificateError(
            f"on {differ:,} of {len(outcomes):,} certify rows {name} predicts otherwise than when it was certified; "
            f"check that files, engine and machine are those of the certificate.{where}"
        )
    extra = given - len(outcomes)
    ignored = f"; {extra:,} further rows were ignored" if extra else ""
    return f"all {len(outcomes):,} certify rows match in label and prediction{ignored}."
