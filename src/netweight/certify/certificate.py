"""The values of a certificate: what was registered, what was tested, what came out. All of them go through JSON."""

from __future__ import annotations

import hashlib
import json
from collections.abc import Mapping, Sequence
from dataclasses import asdict, dataclass, field
from functools import cached_property
from typing import Any, Literal

import numpy as np
from numpy.typing import NDArray

from netweight.errors import CertificateError
from netweight.task import Task, task_from_dict

Floats = NDArray[np.float64]
Ints = NDArray[np.int64]
Verdict = Literal["certified", "not certified", "worse"]


@dataclass(frozen=True)
class Candidate:
    """Something that may ship: its name and the SHA-256 of everything that determines its predictions."""

    name: str
    digest: str


@dataclass(frozen=True)
class Registration:
    """Everything that is decided before the certify labels are opened.

    `candidates` are in the order of testing, safest to cheapest. `look` counts the registrations on this certify
    split, this one included (1 is the first); `fingerprint` is the split's.
    """

    reference: Candidate
    candidates: tuple[Candidate, ...]
    task: Task
    max_drop: float
    confidence: float
    fingerprint: str
    rows: int
    look: int = 1
    seed: int = 0

    @property
    def level(self) -> float:
        """Chance of a false pass at this look: the k-th look is tested at (1 - confidence) / 2^k."""
        return float((1 - self.confidence) / 2**self.look)

    @property
    def digest(self) -> str:
        """SHA-256 of the registration; the certify labels open against it."""
        return hashlib.sha256(json.dumps(self.to_dict(), sort_keys=True).encode()).hexdigest()

    def to_dict(self) -> dict[str, Any]:
        """For a JSON file."""
        return asdict(self) | {"task": self.task.to_dict()}

    @staticmethod
    def from_dict(stored: Mapping[str, Any]) -> Registration:
        """Inverse of `to_dict`."""
        return Registration(
            **{
                **stored,
                "reference": Candidate(**stored["reference"]),
                "candidates": tuple(Candidate(**c) for c in stored["candidates"]),
                "task": task_from_dict(stored["task"]),
            }
        )


@dataclass(frozen=True)
class Estimate:
    """A value with its confidence bounds; each is missed with at most the level that its owner states."""

    value: float
    low: float
    high: float


@dataclass(frozen=True)
class Tested:
    """One step of the fixed sequence. `drop` is reference minus candidate, in units of the task's quality."""

    candidate: Candidate
    quality: Estimate
    drop: Estimate
    margin: float
    p_value: float
    passed: bool
    lost: int
    gained: int


@dataclass(frozen=True)
class Slice:
    """Quality on one value of one column. Without `drop` there are too few rows to say, or what was drawn again never
    differed: groups in which both are right on the same rows, scores of which each pair is equal."""

    column: str
    value: str
    rows: int
    reference: float
    quality: float
    drop: Estimate | None


@dataclass(frozen=True)
class Calibration:
    """How confidences of the shipped candidate compare with what was right, in bins of equal numbers of rows.

    `confidence`, `right` and `rows` are per bin. `error` is the debiased root mean squared calibration error.
    """

    confidence: tuple[float, ...]
    right: tuple[float, ...]
    rows: tuple[int, ...]
    error: float
    brier: float


@dataclass(frozen=True)
class Certificate:
    """The answer. `shipped` is the last candidate that passed, or the safest one where none did.

    `power` is the chance that the shipped candidate would pass at this many rows if its true drop were 0 and the share
    of rows on which it differs were as observed; `rows_needed` says how many labelled rows give a chance of 0.8, if the
    true drop were 0 and if it were the observed one (None: no number of rows would).
    """

    registration: Registration
    verdict: Verdict
    shipped: Candidate
    reference: Estimate
    tested: tuple[Tested, ...]
    power: float
    rows_needed: tuple[int | None, int | None]
    slices: tuple[Slice, ...] = ()
    calibration: Calibration | None = None
    notes: tuple[str, ...] = ()

    @property
    def final(self) -> Tested:
        """The test of the shipped candidate."""
        return next(t for t in self.tested if t.candidate == self.shipped)

    def to_json(self) -> str:
        """The text of `certificate.json`."""
        return json.dumps(asdict(self) | {"registration": self.registration.to_dict()}, indent=1, ensure_ascii=False)

    @staticmethod
    def from_json(text: str | bytes) -> Certificate:
        """Inverse of `to_json`. Raises CertificateError for a text that is none."""
        try:
            stored = json.loads(text)
            slices = [s | {"drop": Estimate(**s["drop"]) if s["drop"] else None} for s in stored["slices"]]
            bins = stored["calibration"]
            parts = {
                "registration": Registration.from_dict(stored["registration"]),
                "shipped": Candidate(**stored["shipped"]),
                "reference": Estimate(**stored["reference"]),
                "tested": tuple(_tested(t) for t in stored["tested"]),
                "rows_needed": tuple(stored["rows_needed"]),
                "slices": tuple(Slice(**s) for s in slices),
                "calibration": Calibration(**{k: _frozen(v) for k, v in bins.items()}) if bins else None,
                "notes": tuple(stored["notes"]),
            }
            return Certificate(**{**stored, **parts})
        except (AttributeError, KeyError, TypeError, ValueError) as problem:
            raise CertificateError(
                f"the certificate cannot be read ({problem!r}); copy the artifact again."
            ) from problem


def _tested(stored: Mapping[str, Any]) -> Tested:
    parts = {"candidate": Candidate(**stored["candidate"])}
    return Tested(**{**stored, **parts, **{name: Estimate(**stored[name]) for name in ("quality", "drop")}})


def _frozen(value: Any) -> Any:
    return tuple(value) if isinstance(value, list) else value


@dataclass(frozen=True)
class Outcomes:
    """The rows behind a certificate: enough to recompute it, without anybody's words.

    keys (n,) are shortened SHA-256 of the normalised texts; reference (n, 2) and candidates[name] (n, 2), for those
    that were tested, are the task's outcomes; confidence (n,) belongs to the shipped candidate; groups (n,) number the
    groups of rows that belong together (none: every row stands alone); slices hold a value of each row for each column.
    """

    keys: tuple[str, ...]
    reference: Floats
    candidates: Mapping[str, Floats]
    confidence: Floats
    groups: tuple[int, ...] | None = None
    slices: Mapping[str, tuple[str, ...]] = field(default_factory=dict)

    def __len__(self) -> int:
        return len(self.keys)

    @cached_property
    def clusters(self) -> Ints | None:
        """`groups` as an array (n,), or None."""
        return None if self.groups is None else np.asarray(self.groups, np.int64)

    def to_json(self) -> str:
        """The text of `outcomes.json`: what is true once, predictions of each candidate, slice values by number."""
        places = {name: {v: i for i, v in enumerate(sorted(set(column)))} for name, column in self.slices.items()}
        stored = {
            "keys": list(self.keys),
            "true": _plain(self.reference[:, 1]),
            "reference": _plain(self.reference[:, 0]),
            "candidates": {name: _plain(outcomes[:, 0]) for name, outcomes in self.candidates.items()},
            "confidence": _plain(self.confidence),
            "groups": None if self.groups is None else list(self.groups),
            "slices": {
                name: {"values": list(at), "rows": [at[cell] for cell in self.slices[name]]}
                for name, at in places.items()
            },
        }
        return json.dumps(stored, ensure_ascii=False, separators=(",", ":"))

    @staticmethod
    def from_json(text: str | bytes) -> Outcomes:
        """Inverse of `to_json`. Raises CertificateError for a text that is none, or whose columns differ in length."""
        try:
            stored = json.loads(text)
            true = stored["true"]
            outcomes = Outcomes(
                tuple(stored["keys"]),
                _pairs(stored["reference"], true),
                {name: _pairs(column, true) for name, column in stored["candidates"].items()},
                np.array(stored["confidence"], np.float64),
                None if stored["groups"] is None else tuple(stored["groups"]),
                {name: tuple(s["values"][i] for i in s["rows"]) for name, s in stored["slices"].items()},
            )
        except (AttributeError, IndexError, KeyError, TypeError, ValueError) as problem:
            raise CertificateError(f"the outcomes cannot be read: {problem!r}. Copy the artifact again.") from problem
        lengths = {len(outcomes.reference), len(outcomes.confidence), len(outcomes.groups or outcomes.keys)}
        lengths |= {len(column) for column in outcomes.slices.values()}
        if other := lengths - {len(outcomes)}:
            raise CertificateError(
                f"the outcomes hold {len(outcomes):,} keys and columns of {min(other):,} rows; copy the artifact again."
            )
        return outcomes


def _pairs(predicted: Sequence[float], true: Sequence[float]) -> Floats:
    return np.stack([np.array(predicted, np.float64), np.array(true, np.float64)], axis=1)


def _plain(values: Floats) -> list[float]:
    """Whole numbers without their decimal point: labels are numbers of labels."""
    if (values == np.rint(values)).all() and (np.abs(values) < 2**53).all():
        return [int(v) for v in values]
    return [float(v) for v in values]
