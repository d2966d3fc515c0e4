"""Whether an artifact is as good as its reference: registered, tested on rows that no search saw, recomputable."""

from netweight.certify.calibration import calibrated, fit_temperature
from netweight.certify.certificate import (
    Calibration,
    Candidate,
    Certificate,
    Estimate,
    Outcomes,
    Registration,
    Slice,
    Tested,
    Verdict,
)
from netweight.certify.decide import certify, verify
from netweight.certify.ledger import register
from netweight.certify.match import Answers, matches

__all__ = [
    "Answers",
    "Calibration",
    "Candidate",
    "Certificate",
    "Estimate",
    "Outcomes",
    "Registration",
    "Slice",
    "Tested",
    "Verdict",
    "calibrated",
    "certify",
    "fit_temperature",
    "matches",
    "register",
    "verify",
]
