"""Options of a federated run by the names that the command line has for them."""

from __future__ import annotations

from collections.abc import Callable, Sequence
from pathlib import Path

from netweight.data import Dataset, Rows
from netweight.errors import OptionError
from netweight.run.aggregate import Aggregator, Krum, Mean, Median, TrimmedMean
from netweight.run.federated import (
    Automatic,
    FedAdam,
    FedAvg,
    Federated,
    FedProx,
    Full,
    Int8,
    RandomK,
    Rounds,
    Scaffold,
    TopK,
    Travel,
)
from netweight.run.federated.codecs import Codec
from netweight.run.federated.flower import FlowerChannel
from netweight.task import Classify, Task, task_for

ALGORITHMS: dict[str, type[FedAvg]] = {"fedavg": FedAvg, "fedprox": FedProx, "fedadam": FedAdam, "scaffold": Scaffold}
AGGREGATORS: dict[str, Aggregator] = {
    "mean": Mean(),
    "median": Median(),
    "trimmed-mean": TrimmedMean(),
    "krum": Krum(),
}
CODECS: dict[str, Codec] = {"full": Full(), "int8": Int8(), "random-k": RandomK(), "top-k": TopK()}


def task_of(labels: Sequence[str] | None, rows: Rows | None) -> Task:
    """Classification over the labels that are named, in their order, or over those of the rows.

    Raises OptionError without either, and where the rows have a label that is not named.
    """
    if labels:
        task = Classify(tuple(labels))
        unknown = sorted(set((rows.label or ()) if rows else ()) - set(labels))
        if unknown:
            raise OptionError(f"dev has labels that --labels does not name: {', '.join(map(repr, unknown[:5]))}.")
        return task
    if rows is None:
        raise OptionError(
            "the server must know the labels before it sees a client: give --labels A,B,C or --dev TABLE."
        )
    return task_for(rows.label or (), "classify")


def run_of(
    rounds: Rounds,
    chosen: tuple[str, str, str],
    personal_head: bool,
    data: Dataset | None,
    privacy: Automatic | None = None,
) -> Callable[[FlowerChannel, Path], Federated]:
    """What makes the run of a channel and a folder; `chosen` names algorithm, aggregate and codec."""
    algorithm, aggregate, codec = chosen

    def made(channel: FlowerChannel, folder: Path) -> Federated:
        how = ALGORITHMS[algorithm](aggregate=AGGREGATORS[aggregate])
        travel = Travel(CODECS[codec], personal_head)
        return Federated(channel, data, folder, rounds=rounds, algorithm=how, travel=travel, privacy=privacy)

    return made
