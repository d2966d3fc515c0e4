"""Options of a federated run by the names that the command line has for them."""

from __future__ import annotations

from collections.abc import Sequence
from dataclasses import dataclass, replace
from typing import Literal

from netweight.data import Rows
from netweight.data.split import numbered_labels
from netweight.errors import OptionError
from netweight.run.aggregate import Aggregator, Krum, Mean, Median, TrimmedMean
from netweight.run.federated import (
    Automatic,
    FedAdam,
    FedAvg,
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
from netweight.run.federated.options import Algorithm
from netweight.task import Classify, Task, task_for
from netweight.techniques import Finetune
from netweight.techniques.finetune import Trained

ALGORITHMS: dict[str, type[FedAvg]] = {"fedavg": FedAvg, "fedprox": FedProx, "fedadam": FedAdam, "scaffold": Scaffold}
AGGREGATORS: dict[str, Aggregator] = {
    "mean": Mean(),
    "median": Median(),
    "trimmed-mean": TrimmedMean(),
    "krum": Krum(),
}
CODECS: dict[str, Codec] = {"full": Full(), "int8": Int8(), "random-k": RandomK(), "top-k": TopK()}


def task_of(labels: Sequence[str] | None, rows: Rows | None, kind: Literal["classify", "score"] = "classify") -> Task:
    """Classification over the labels that are named, in their order, or over those of the rows; or scores, which are
    standardised by those of the rows.

    Raises OptionError without either, where the rows have a label that is not named, and for labels of scores;
    LabelError where the rows must name the labels, and one of them has one row.
    """
    if kind == "score":
        if rows is None or labels:
            raise OptionError(
                "scores are standardised by the mean and the spread of dev, and have no labels: give --dev TABLE, and "
                "leave --labels out."
            )
        return task_for(rows.label or (), "score")
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
    numbered_labels(rows, "dev")
    return task_for(rows.label or (), "classify")


RATES: dict[Trained, float] = {"full": 1e-4, "lora": 2e-3, "head": 5e-3}
PRIVATE_HEAD = 2e-2


@dataclass(frozen=True)
class Terms:
    """What holds between a server and its clients."""

    rounds: Rounds
    algorithm: Algorithm
    travel: Travel
    privacy: Automatic | None

    def __str__(self) -> str:
        """What of it decides the outcome."""
        return repr(replace(self, rounds=replace(self.rounds, wait=0.0)))


def terms_of(
    rounds: Rounds, chosen: tuple[str, str, str], personal_head: bool = False, privacy: Automatic | None = None
) -> Terms:
    """Terms of their names; `chosen` names algorithm, aggregate and codec."""
    algorithm, aggregate, codec = chosen
    how = ALGORITHMS[algorithm](aggregate=AGGREGATORS[aggregate])
    return Terms(rounds, how, Travel(CODECS[codec], personal_head), privacy)


def tuned(terms: Terms, epochs: float, rate: float | None, train: Trained | None) -> Finetune:
    """How clients fine-tune. Without `train`, the head under privacy, where noise drowns what has more parameters, else
    everything; without a rate that of `RATES`. A probe is an exact sum over rows, which privacy forbids: a head then
    has a longer way to go."""
    private = terms.privacy is not None
    kind: Trained = train or ("head" if private else "full")
    usual = PRIVATE_HEAD if private and kind == "head" else RATES[kind]
    return Finetune(epochs, usual if rate is None else rate, train=kind, probe=not private)
