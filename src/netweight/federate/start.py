"""What the command line starts: a server that trains over its clients, and a client with its table."""

from __future__ import annotations

import hashlib
import json
from collections.abc import Callable
from dataclasses import asdict, dataclass
from pathlib import Path

import numpy as np

from netweight.data import Dataset, Rows
from netweight.data.rows import Sealed
from netweight.errors import OptionError
from netweight.federate.keys import ClientKeys, ServerKeys
from netweight.federate.link import listening
from netweight.federate.node import Connection
from netweight.model import Model
from netweight.run.federated import Client, Federated
from netweight.run.federated.flower import FlowerChannel
from netweight.techniques.base import Technique
from netweight.train import Plan

Say = Callable[[str], None]
_SELECT = 0.1


@dataclass(frozen=True)
class Place:
    """Where a server listens (HOST:PORT), where its keys lie, and the folder of its results."""

    address: str
    keys: Path
    out: Path


def serve(
    place: Place,
    model: Model,
    technique: Technique,
    run: Callable[[FlowerChannel, Path], Federated],
    plan: Plan,
    say: Say,
) -> Model:
    """Train a model over the clients that connect, and write it to `out`/model, the report to `out`/federation.json.

    What is needed to go on after being killed lies in `out`/work: started again, the server takes up at the last
    finished round. Raises OptionError where `out` holds a finished model, and what the run raises; clients are told.
    """
    if (place.out / "model" / "model.json").exists():
        raise OptionError(f"{place.out} holds a finished model; use another folder, or delete it.")
    keys = ServerKeys.load(place.keys)
    with listening(place.address, keys) as channel:
        say(f"listening on {place.address} for {len(keys.clients)} clients: {', '.join(sorted(keys.clients))}")
        federated = run(channel, place.out / "work")
        try:
            made = technique(model, federated, plan)
        finally:
            channel.dismiss(federated.members.refused)
    made.save(place.out / "model")
    reports = [asdict(report) for report in federated.reports]
    (place.out / "federation.json").write_text(json.dumps(reports, indent=1), encoding="utf-8")
    for line in federated.report.lines():
        say(line)
    return made


def join(address: str, keys: ClientKeys, client: Client, patience: float, say: Say) -> None:
    """Answer the server's tasks from the client's rows until the run ends; see `Connection.serve` for errors."""
    Connection(address, keys, patience, say).serve(client)


def kept_apart(rows: Rows, share: float = _SELECT) -> Dataset:
    """A client's rows: a share of them, by hash of their text, tells how good a model is here; the others train it."""
    drawn = np.array([int(hashlib.sha256(text.encode()).hexdigest()[:8], 16) / 2**32 for text in rows.text])
    train, select = np.flatnonzero(drawn >= share).tolist(), np.flatnonzero(drawn < share).tolist()
    return Dataset(rows.take(train), rows.take(select), rows.take([]), Sealed(rows.take([])))


def held_out(rows: Rows) -> Dataset:
    """The rows of a server: they tell how good a model is, and none is trained on."""
    return Dataset(rows.take([]), rows, rows.take([]), Sealed(rows.take([])))
