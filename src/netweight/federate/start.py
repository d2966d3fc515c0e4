"""What the command line starts: a server that trains over its clients, and a client with its table."""

from __future__ import annotations

import fcntl
import hashlib
import os
from collections.abc import Callable, Iterator
from contextlib import contextmanager
from dataclasses import dataclass, replace
from pathlib import Path
from types import TracebackType
from typing import Any, Self

import numpy as np
from torch import Tensor

from netweight.data import Dataset, Rows
from netweight.data.rows import Sealed
from netweight.errors import ClientError, OptionError
from netweight.federate.keys import ClientKeys, ServerKeys
from netweight.federate.link import listening
from netweight.federate.node import Connection
from netweight.federate.options import Terms
from netweight.model import Model
from netweight.run.base import Statistic
from netweight.run.federated import Client, Federated
from netweight.run.federated.flower import FlowerChannel
from netweight.run.federated.report import FederationReport, read_reports, write_reports
from netweight.run.federated.state import once
from netweight.techniques.base import Technique
from netweight.train import Plan, fit_digest

Say = Callable[[str], None]
REPORTS = "federation.json"
_SELECT = 0.1


@dataclass(frozen=True)
class Place:
    """Where a server listens (HOST:PORT), where its keys lie, and the folder of its results."""

    address: str
    keys: Path
    out: Path


_REFUSED = "the server refused this client: "
# Why stays with the server: it may name other clients.
_FAILED = "the server has ended the run without a result; its own output says why."


class Deployment(Federated):
    """A run over the clients that connect, who are told when it ends.

    Reports of its fits are kept beside its folder, in federation.json, and read again by a server that was killed.
    Statistics and the state of a finished fit stay as well until its model is saved; under privacy the state also then,
    since what costs rows something is not asked for twice. `say` is told, once, who was refused and why.
    """

    def __init__(self, channel: FlowerChannel, data: Dataset | None, folder: Path, terms: Terms, say: Say) -> None:
        super().__init__(
            channel,
            data,
            folder,
            rounds=terms.rounds,
            algorithm=terms.algorithm,
            travel=terms.travel,
            privacy=terms.privacy,
        )
        self.terms, self._flower = terms, channel
        self.say, self._said = say, set[str]()
        self._work, self._kept = folder, folder.parent / REPORTS
        self.reports = read_reports(self._kept)

    def __enter__(self) -> Self:
        try:
            if not self.reports:
                self.members.gather()
        except ClientError:
            self._dismiss(_FAILED)
            raise
        return self

    def __exit__(self, kind: type[BaseException] | None, error: BaseException | None, at: TracebackType | None) -> None:
        self._dismiss("" if error is None else _FAILED)

    def refuses(self, client: str, reason: str, final: bool) -> None:
        """Both sides hear of it; who differs need not wait for the end of the run."""
        line = f"{client} was refused: {reason}"
        if line not in self._said:
            self._said.add(line)
            self.say(line)
        if final:
            self._flower.dismiss({client: _REFUSED + reason}, None)

    def finished(self, report: FederationReport) -> None:
        """Its report is on disk when this returns; of a fit that was made again there is one."""
        self.reports = [*(one for one in self.reports if one.fit != report.fit), report]
        write_reports(self._kept, self.reports)

    def reduce(
        self, model: Model, statistic: Statistic, limit: int | None = None, unlabelled: bool = False
    ) -> dict[str, Tensor]:
        """Asked for once: a fit that begins with a probe would be another one where other clients are back."""
        now = replace(model).digest  # which a model remembers, and techniques may go on to change this one
        named = {"model": now, "statistic": repr(statistic), "limit": limit, "unlabelled": unlabelled}
        path = self._work / f"statistic-{fit_digest({**named, 'terms': str(self.terms)})[:16]}.safetensors"
        return once(path, lambda: super(Deployment, self).reduce(model, statistic, limit, unlabelled))

    def settled(self, state: Path) -> None:
        """It stays: the model is only in memory."""

    def forget(self) -> None:
        """Delete statistics and the state of all fits, also of one that was broken off, where they may be repeated:
        what they gave is saved."""
        if self.privacy is None:
            for kind in ("rounds", "statistic"):
                for state in self._work.glob(f"{kind}-*.safetensors"):
                    super().settled(state)

    def account(self) -> dict[str, Any]:
        """The terms as well."""
        return {"terms": str(self.terms), **super().account()}

    def _dismiss(self, others: str) -> None:
        refused = {name: _REFUSED + why for name, why in self.members.refused.items()}
        self._flower.dismiss(refused, others)


@contextmanager
def opened(place: Place, say: Say) -> Iterator[FlowerChannel]:
    """The channel of a server that listens while the block runs."""
    keys = ServerKeys.load(place.keys)
    with listening(place.address, keys, said=say) as channel:
        say(f"listening on {place.address} for {len(keys.clients)} clients: {', '.join(sorted(keys.clients))}")
        yield channel


def serve(
    place: Place, model: Model, technique: Technique, data: Dataset | None, terms: Terms, plan: Plan, say: Say
) -> Model:
    """Train a model over the clients that connect, and write it to `out`/model, the report to `out`/federation.json.

    `data` holds rows of the server's own, on which quality is measured. What is needed to go on after being killed lies
    in `out`/work: started again, the server takes up at the last finished round. Raises OptionError where `out` holds a
    finished model, and what the run raises; clients are told.
    """
    if (place.out / "model" / "model.json").exists():
        raise OptionError(f"{place.out} holds a finished model; use another folder, or delete it.")
    with opened(place, say) as channel, Deployment(channel, data, place.out / "work", terms, say) as federated:
        made = technique(model, federated, plan)
        # Before clients hear that all is done, and before the rounds go.
        made.save(place.out / "model")
        federated.forget()
    for line in federated.report.lines():
        say(line)
    return made


def join(address: str, keys: ClientKeys, client: Client, patience: float, say: Say) -> None:
    """Answer the server's tasks from the client's rows until the run ends; see `Connection.serve` for errors."""
    Connection(address, keys, patience, say).serve(client)


@contextmanager
def owned(folder: Path) -> Iterator[None]:
    """A client's folder, for this process alone while the block runs: two would enter what rows cost over each other.

    Raises OptionError where another process has it.
    """
    folder.mkdir(parents=True, exist_ok=True)
    held = os.open(folder, os.O_RDONLY)
    try:
        fcntl.flock(held, fcntl.LOCK_EX | fcntl.LOCK_NB)  # ends with the process
        yield
    except BlockingIOError:
        raise OptionError(f"{folder} is used by a client that runs; give each client a folder of its own.") from None
    finally:
        os.close(held)


def kept_apart(rows: Rows, share: float = _SELECT) -> Dataset:
    """A client's rows: a share of them, by hash of their text, tells how good a model is here; the others train it."""
    drawn = np.array([int(hashlib.sha256(text.encode()).hexdigest()[:8], 16) / 2**32 for text in rows.text])
    train, select = np.flatnonzero(drawn >= share).tolist(), np.flatnonzero(drawn < share).tolist()
    return Dataset(rows.take(train), rows.take(select), rows.take([]), Sealed(rows.take([])))


def held_out(rows: Rows) -> Dataset:
    """The rows of a server: they tell how good a model is, and none is trained on."""
    return Dataset(rows.take([]), rows, rows.take([]), Sealed(rows.take([])))
