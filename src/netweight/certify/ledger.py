"""Registrations, written down before certify labels open, and counted: each further look costs half of the level."""

from __future__ import annotations

import fcntl
import json
import os
from collections.abc import Iterator, Sequence
from contextlib import contextmanager
from dataclasses import replace
from pathlib import Path

from netweight.certify.certificate import Candidate, Registration
from netweight.data.files import append
from netweight.data.rows import Sealed
from netweight.errors import CertificateError, OptionError, StoreError
from netweight.task import Task


def register(
    reference: Candidate,
    candidates: Sequence[Candidate],
    task: Task,
    sealed: Sealed,
    *,
    max_drop: float,
    confidence: float = 0.95,
    seed: int = 0,
    ledger: Path | None = None,
) -> Registration:
    """Write down what will be tested, `candidates` from safest to cheapest, and at which look.

    `max_drop` is in points of the task's metric. `ledger` is a file of the run store to which registrations are
    appended, one JSON object a line; its directory exists. The k-th different registration on the same certify rows
    is look k; the very same registration again, as after a crash, keeps its look. Without a ledger the look is 1.
    Raises OptionError (max_drop outside (0, 50], confidence outside [0.5, 1)), CertificateError (no candidates, or
    two of one name), StoreError (a damaged ledger).
    """
    if not 0 < max_drop <= 50:
        raise OptionError(f"max_drop is {max_drop:g}; it is in points, more than 0 and at most 50.")
    if not 0.5 <= confidence < 1:
        raise OptionError(f"confidence is {confidence:g}; use at least 0.5 and less than 1, usually 0.95.")
    names = [candidate.name for candidate in candidates]
    if not names:
        raise CertificateError(
            "there is no candidate to certify: the search found none; give it more time or techniques."
        )
    if twice := sorted({name for name in names if names.count(name) > 1}):
        raise CertificateError(f"{names.count(twice[0])} candidates are named {twice[0]!r}; give them different names.")
    plan = Registration(
        reference, tuple(candidates), task, max_drop, confidence, sealed.fingerprint, len(sealed), look=1, seed=seed
    )
    return plan if ledger is None else _recorded(plan, ledger)


def decided(registration: Registration) -> str:
    """SHA-256 of everything that was decided; not of the look, which follows from the ledger, nor of how a number is
    written: 1 and 1.0 are one."""
    drop, confidence = float(registration.max_drop), float(registration.confidence)
    return replace(registration, look=0, max_drop=drop, confidence=confidence).digest


def _recorded(plan: Registration, ledger: Path) -> Registration:
    with locked(ledger) as file:
        earlier = [entry for entry in _entries(file, ledger) if entry.fingerprint == plan.fingerprint]
        known = next((entry.look for entry in earlier if decided(entry) == decided(plan)), None)
        # Not how many questions there were: a ledger of before may hold one of them as two looks.
        registration = replace(plan, look=known or 1 + max((entry.look for entry in earlier), default=0))
        if known is None:
            line = json.dumps(registration.to_dict(), sort_keys=True, ensure_ascii=False) + "\n"
            append(file, line.encode())
    return registration


@contextmanager
def locked(ledger: Path) -> Iterator[int]:
    """The ledger, open, for this process alone: two jobs on one store must not both take look 1."""
    fresh = not ledger.exists()
    file = os.open(ledger, os.O_RDWR | os.O_CREAT, 0o644)
    try:
        fcntl.flock(file, fcntl.LOCK_EX)
        if fresh:  # the name must survive a power cut as well as the line
            folder = os.open(ledger.parent, os.O_RDONLY)
            os.fsync(folder)
            os.close(folder)
        yield file
    finally:
        os.close(file)


def _entries(file: int, ledger: Path) -> list[Registration]:
    """What the ledger holds. A last line without its end was torn by a kill before any label opened: it is cut off."""
    data = os.pread(file, os.fstat(file).st_size, 0)
    whole = data.rfind(b"\n") + 1
    if whole < len(data):
        os.ftruncate(file, whole)
    entries = []
    for number, line in enumerate(data[:whole].splitlines(), 1):
        try:
            entries.append(Registration.from_dict(json.loads(line)))
        except (KeyError, TypeError, ValueError, AttributeError) as problem:
            raise StoreError(
                f"line {number} of {ledger} cannot be read ({problem!r}), so looks at certify rows cannot be counted; "
                "restore the file from a copy, or take fresh certify rows."
            ) from problem
    return entries
