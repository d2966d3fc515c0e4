"""What a technique may ask of a run: two methods."""

from __future__ import annotations

from collections.abc import Callable, Mapping
from pathlib import Path
from typing import Any, Literal, Protocol, runtime_checkable

import torch
from torch import Tensor

from netweight.data import Dataset
from netweight.loss import Batch, Loss
from netweight.model import Model
from netweight.network import Network
from netweight.train import Plan


class Statistic(Protocol):
    """Something added up over rows: Fisher information, calibration ranges, token counts.

    `combine` says how the parts of two batches (or of two machines) become one.
    """

    @property
    def combine(self) -> Literal["sum", "max"]: ...

    def __call__(self, network: Network, batch: Batch) -> dict[str, Tensor]: ...


class Run(Protocol):
    """Where rows live and computation on them happens."""

    def fit(self, model: Model, loss: Loss, plan: Plan, label: str = "fit") -> Model:
        """A trained copy of `model`; parameters that do not require gradients stay as they are."""
        ...

    def reduce(
        self, model: Model, statistic: Statistic, limit: int | None = None, unlabelled: bool = False
    ) -> dict[str, Tensor]:
        """The statistic over the training rows, or over `limit` of them; with `unlabelled` over the pool as well."""
        ...


@runtime_checkable
class InOnePlace(Protocol):
    """A run whose rows are all in this process, open to techniques that add nothing up."""

    data: Dataset


@runtime_checkable
class Speaking(Protocol):
    """A run that computes once what a model says of its rows, and keeps it for all fits."""

    def outputs(self, model: Model, unlabelled: bool = False, half: bool = False) -> Tensor:
        """Logits (n, outputs) of the training rows, and of the pool; with `half` in bf16 where that pays."""
        ...


@runtime_checkable
class Keeping(Protocol):
    """A run that keeps what fits go on from, also of those that have ended: what they gave is only in memory."""

    def forget(self) -> None:
        """Delete it: what they gave is saved."""
        ...


@runtime_checkable
class Accounting(Protocol):
    """A run that has more to say of where its models come from than the rows that are here."""

    def account(self) -> Mapping[str, Any]:
        """Plain values for whoever gets a model."""
        ...

    def remarks(self) -> tuple[str, ...]:
        """Sentences that its reader must know."""
        ...


# Makes the run of a job, of its rows and the folder in which it keeps what a killed fit goes on from. One that is a
# context manager is left when the job ends.
Runs = Callable[[Dataset, Path], Run]


def merge(statistic: Statistic, parts: list[dict[str, Tensor]]) -> dict[str, Tensor]:
    """Combine the parts in the order given, so that the result does not depend on timing."""
    total: dict[str, Tensor] = {}
    for part in parts:
        for name, value in part.items():
            if name not in total:
                total[name] = value.clone()
            elif statistic.combine == "sum":
                total[name] += value
            else:
                total[name] = torch.maximum(total[name], value)
    return total
