"""What a parallel run and its processes say to each other, as values."""

from __future__ import annotations

from dataclasses import dataclass
from pathlib import Path
from typing import Literal, Protocol

import torch
from torch import Tensor

from netweight.data import Dataset
from netweight.loss import Loss
from netweight.model import Model
from netweight.network import tensors
from netweight.run.base import Statistic
from netweight.run.local import Local
from netweight.train import Plan

Strategy = Literal["ddp", "fsdp", "tensor", "pipeline"]


@dataclass(frozen=True)
class Setup:
    """How the processes of a parallel run work.

    balance: each gets the share of every batch that its measured speed deserves; results then differ in their last
    bits between two runs. timeout: seconds after which a process that waits for another gives it up. pin: the first
    process runs on the first core alone, and so on. device: "cpu" leaves graphics cards alone.

    tensor: neighbouring processes that divide layers between them; the groups of so many divide rows; None: all divide
    layers. micro_batches: parts that a pipeline cuts a batch into. activation_checkpointing: compute activations inside
    layers again instead of keeping them (not under ddp). offload: fsdp keeps its share in the host's memory.
    """

    balance: bool = True
    timeout: float = 300.0
    pin: bool = False
    device: Literal["auto", "cpu"] = "auto"
    tensor: int | None = None
    micro_batches: int | None = None
    activation_checkpointing: bool = False
    offload: bool = False


class Command(Protocol):
    """One thing to compute on all processes; what it gives are tensors by name."""

    def __call__(self, local: Local) -> dict[str, Tensor]: ...


@dataclass(frozen=True)
class Fit:
    """Gives the tensors of the trained network."""

    model: Model
    loss: Loss
    plan: Plan
    label: str

    def __call__(self, local: Local) -> dict[str, Tensor]:
        return tensors(local.fit(self.model, self.loss, self.plan, self.label).network)


@dataclass(frozen=True)
class Reduce:
    """Gives a statistic."""

    model: Model
    statistic: Statistic
    limit: int | None
    unlabelled: bool

    def __call__(self, local: Local) -> dict[str, Tensor]:
        return local.reduce(self.model, self.statistic, self.limit, self.unlabelled)


@dataclass(frozen=True)
class Outputs:
    """Gives the logits of the training rows."""

    model: Model
    unlabelled: bool
    half: bool

    def __call__(self, local: Local) -> dict[str, Tensor]:
        return {"logits": local.outputs(self.model, self.unlabelled, self.half)}


@dataclass(frozen=True)
class Quality:
    """Gives the metric on the select rows."""

    model: Model

    def __call__(self, local: Local) -> dict[str, Tensor]:
        return {"quality": torch.tensor(local.quality(self.model), dtype=torch.float64)}


@dataclass(frozen=True)
class Forget:
    """Gives nothing."""

    def __call__(self, local: Local) -> dict[str, Tensor]:
        local.forget()
        return {}


# --- to a process ---


@dataclass(frozen=True)
class Open:
    """Rows that later commands name by a number."""

    number: int
    data: Dataset
    folder: Path | None
    strategy: Strategy
    setup: Setup


@dataclass(frozen=True)
class Close:
    """Forget such rows."""

    number: int


@dataclass(frozen=True)
class Do:
    """A command on the rows of that number; in a new group, of which the next message tells, or in the one there is."""

    number: int
    command: Command
    new: bool


@dataclass(frozen=True)
class Give:
    """Say what the last command gave."""


@dataclass(frozen=True)
class Cancel:
    """Instead of a new group: end the command."""


@dataclass(frozen=True)
class Reply:
    """To what a reporter was told: go on, or end."""

    go_on: bool


# --- from a process ---


@dataclass(frozen=True)
class Told:
    """For the reporter of the program."""

    what: Literal["start", "step", "note"]
    values: tuple[str | int | float, ...]


@dataclass(frozen=True)
class Waits:
    """Others are gone; this process waits for a new group, or for the end of the command."""

    why: str


@dataclass(frozen=True)
class Done:
    """The command has ended well."""


@dataclass(frozen=True)
class Result:
    """What the last command gave."""

    held: dict[str, Tensor]


@dataclass(frozen=True)
class Failed:
    """The command has ended with an error: its type, its text, and the last lines of its traceback."""

    kind: str
    text: str
    trace: str


@dataclass(frozen=True)
class Idle:
    """The process has started, or its command was ended as asked."""
