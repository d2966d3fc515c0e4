"""What is said after a federated fit."""

from __future__ import annotations

import json
from collections.abc import Sequence
from dataclasses import asdict, dataclass
from pathlib import Path
from typing import Any

from netweight.data.files import atomic
from netweight.errors import StoreError
from netweight.run.federated.membership import Membership
from netweight.run.federated.messages import Lost


@dataclass(frozen=True)
class RoundReport:
    """One round: who took part, who was lost, whose update was refused; bytes of the encoded updates (`up`) and of the
    parameters sent out (`down`), over all clients; mean training loss (None under privacy: it tells of rows);
    `quality` on the server's select rows, where it has any and was asked to look; `epsilon` is the most that this fit
    had cost a client by then, `in_all` that of all its fits."""

    round: int
    took_part: tuple[str, ...]
    lost: tuple[Lost, ...]
    refused: tuple[Lost, ...]
    up: int
    down: int
    loss: float | None
    seconds: float
    quality: float | None = None
    epsilon: float = 0.0
    in_all: float = 0.0

    @staticmethod
    def of(given: dict[str, Any]) -> RoundReport:
        """Inverse of `asdict`."""
        lists = {name: tuple(Lost(**lost) for lost in given[name]) for name in ("lost", "refused")}
        return RoundReport(**{**given, **lists, "took_part": tuple(given["took_part"])})


@dataclass(frozen=True)
class Standing:
    """A client after the fit: its training rows, and the task's metric on its own select rows (None: it has none, or
    did not answer)."""

    client: str
    rows: int
    quality: float | None


@dataclass(frozen=True)
class Attacked:
    """The membership check of a client's rows, on the model from before the fit and from after it."""

    client: str
    before: Membership
    after: Membership


@dataclass(frozen=True)
class FederationReport:
    """A fit over all its rounds.

    `moved` is the relative L2 distance of the trained parameters from where they began. `privacy` states what was done
    to protect rows, `epsilon` is the most that the fit cost a client (None: privacy was off). `attacks` has those
    clients that have rows enough for a membership check. `notes` are sentences on clients that are special.
    """

    label: str
    fit: str
    rounds: tuple[RoundReport, ...]
    standings: tuple[Standing, ...]
    moved: float
    privacy: str
    notes: tuple[str, ...] = ()
    epsilon: float | None = None
    attacks: tuple[Attacked, ...] = ()

    @property
    def worst(self) -> Standing | None:
        """The client that the model serves worst; None where no client could tell."""
        known = [s for s in self.standings if s.quality is not None]
        return min(known, key=lambda s: (s.quality, s.client), default=None)

    @property
    def in_all(self) -> float | None:
        """The most that all fits on a client's rows had cost after this one, earlier jobs included (None: privacy was
        off)."""
        return None if self.epsilon is None else max(r.in_all for r in self.rounds)

    @property
    def up(self) -> int:
        """Bytes from clients to the server, over all rounds."""
        return sum(r.up for r in self.rounds)

    @property
    def down(self) -> int:
        """Bytes from the server to clients, over all rounds."""
        return sum(r.down for r in self.rounds)

    def lines(self) -> list[str]:
        """The report as text: the whole, each client and the worst one, and what went wrong."""
        worst = self.worst
        said = [
            f"{self.label}: {len(self.rounds)} rounds, {self.up / 1e6:.2f} MB up, {self.down / 1e6:.2f} MB down, "
            f"weights moved by {self.moved:.2%}",
            f"privacy: {self.privacy}",
        ]
        for s in self.standings:
            quality = "unknown" if s.quality is None else f"{s.quality:.4f}"
            mark = " (worst)" if worst is not None and s.client == worst.client else ""
            said.append(f"  {s.client}: {s.rows} rows, quality {quality}{mark}")
        for a in self.attacks:
            said.append(
                f"  {a.client}: membership attack AUC {a.before.auc:.3f} before, {a.after.auc:.3f} after (95 % "
                f"interval {a.after.low:.3f} to {a.after.high:.3f}; 0.5 tells nothing), "
                f"advantage {a.after.advantage:.3f}"
            )
        for r in self.rounds:
            said += [f"  round {r.round}: {lost.client} lost: {lost.reason}" for lost in r.lost]
            said += [f"  round {r.round}: {lost.client} refused: {lost.reason}" for lost in r.refused]
        return [*said, *(f"  {note}" for note in self.notes)]

    def numbers(self) -> dict[str, Any]:
        """The report in plain values that name no client."""
        worst = self.worst
        return {
            "fit": self.label,
            "rounds": len(self.rounds),
            "clients": len(self.standings),
            "rows": sum(s.rows for s in self.standings),
            "bytes up": self.up,
            "bytes down": self.down,
            "worst client": worst and worst.quality,
            "membership attack AUC": max((a.after.auc for a in self.attacks), default=None),
            "privacy": self.privacy,
            "epsilon": self.epsilon,
            "epsilon of all fits": self.in_all,
        }

    @staticmethod
    def of(given: dict[str, Any]) -> FederationReport:
        """Inverse of `asdict`."""
        attacks = [(a["client"], Membership(**a["before"]), Membership(**a["after"])) for a in given["attacks"]]
        held = {
            "rounds": tuple(map(RoundReport.of, given["rounds"])),
            "standings": tuple(Standing(**s) for s in given["standings"]),
            "notes": tuple(given["notes"]),
            "attacks": tuple(Attacked(*a) for a in attacks),
        }
        return FederationReport(**{**given, **held})


def write_reports(path: Path, reports: Sequence[FederationReport]) -> None:
    """As JSON, whole or not at all."""
    path.parent.mkdir(parents=True, exist_ok=True)
    with atomic(path) as out:
        out.write(json.dumps([asdict(report) for report in reports], indent=1).encode())


def read_reports(path: Path) -> list[FederationReport]:
    """Inverse of `write_reports`; none where there is no file. Raises StoreError for a damaged one."""
    if not path.exists():
        return []
    try:
        return [FederationReport.of(given) for given in json.loads(path.read_text(encoding="utf-8"))]
    except (ValueError, TypeError, KeyError) as problem:
        raise StoreError(f"the reports of fits in {path} are damaged ({problem}); delete them to go on.") from None


def in_words(reports: Sequence[FederationReport]) -> str:
    """What all fits of a run cost the rows of its clients, in a sentence; empty without fits."""
    if not reports:
        return ""
    fits = f"{len(reports)} fit{'s' if len(reports) > 1 else ''} on clients' rows"
    if any(report.epsilon is None for report in reports):
        return f"privacy of the whole job: OFF in {fits}; nothing bounds what updates and the model tell of a row."
    in_all = max(report.in_all or 0.0 for report in reports)
    own = reports[0].epsilon or 0.0
    if len(reports) > 1 or in_all <= own * (1 + 1e-9):
        return f"privacy of the whole job: {fits} cost a client's rows epsilon {in_all:.2f} at most."
    return (
        f"privacy of the whole job: {fits} cost a client's rows epsilon {own:.2f} at most, and {in_all:.2f} with what "
        "was made of these rows before."
    )
