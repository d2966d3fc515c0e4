"""What a server and its clients say to each other, and the channel between them.

A server sends tasks and gets answers; tensors travel by parameter name. Whoever carries them (this process, Flower)
sees nothing but these values.
"""

from __future__ import annotations

from collections.abc import Mapping
from dataclasses import dataclass, field
from typing import Protocol

from torch import Tensor

from netweight.loss import Loss
from netweight.model import Model
from netweight.run.base import Statistic
from netweight.run.federated.codecs import Codec, Full
from netweight.train import Plan

Tensors = Mapping[str, Tensor]


@dataclass(frozen=True)
class Manifest:
    """What a server and its clients must agree on before any row is trained on.

    `columns` are those of the rows that a model sees; `task` is the kind and metric, `labels` the label map in its
    order (empty for scores); `tokenizer` the SHA-256 of its definition; `base` that of the base model's weights;
    `version` the release of Netweight that runs.
    """

    columns: tuple[str, ...]
    task: str
    labels: tuple[str, ...]
    tokenizer: str
    max_length: int
    base: str
    version: str


@dataclass(frozen=True)
class Join:
    """Asks a client what it has; `manifest` is the server's."""

    manifest: Manifest


@dataclass(frozen=True)
class Joined:
    """A client's own manifest, the number of its training rows, and of their labels (0 for scores)."""

    manifest: Manifest
    rows: int
    labels: int


@dataclass(frozen=True)
class FitTask:
    """One round of training.

    `fit` names the whole fit (SHA-256), so that what a client keeps between rounds is not mixed with that of another;
    `round` counts from 0. The parameters of `model` that require gradients are trained; a carrier must keep those
    flags. `plan` is this round's part. `personal` parameters stay with the client. `proximal` is FedProx's mu,
    `variate` SCAFFOLD's server variate. `codec` says how the update is to be encoded.
    """

    fit: str
    round: int
    model: Model
    loss: Loss
    plan: Plan
    label: str = "fit"
    codec: Codec = field(default_factory=Full)
    personal: tuple[str, ...] = ()
    proximal: float = 0.0
    variate: Tensors | None = None


@dataclass(frozen=True)
class Fitted:
    """What a client has learned in a round.

    `tensors` are as the task's codec encodes them (`Full`: the new values themselves; others: differences to the
    task's model). `variate` is the change of the client's SCAFFOLD variate. `loss` is the mean over the round's steps.
    """

    tensors: Tensors
    rows: int
    steps: int
    seconds: float
    loss: float
    variate: Tensors | None = None


@dataclass(frozen=True)
class ReduceTask:
    """Asks for a statistic over the client's training rows, or over `limit` of them; `unlabelled` adds its pool."""

    model: Model
    statistic: Statistic
    limit: int | None = None
    unlabelled: bool = False


@dataclass(frozen=True)
class Reduced:
    """A client's part of a statistic."""

    tensors: Tensors
    rows: int


@dataclass(frozen=True)
class ScoreTask:
    """Asks how good a model is on the client's own select rows; with `fit` the parameters that it kept replace
    those of the model."""

    model: Model
    fit: str = ""


@dataclass(frozen=True)
class Scored:
    """The task's metric on `rows` select rows; None where there are none."""

    quality: float | None
    rows: int


@dataclass(frozen=True)
class Lost:
    """No answer came from a client, and why: it left, was too slow, or refused."""

    client: str
    reason: str


Task = Join | FitTask | ReduceTask | ScoreTask
Answer = Joined | Fitted | Reduced | Scored


class Channel(Protocol):
    """How tasks reach clients. What arrives was not checked: the server does that."""

    def clients(self) -> tuple[str, ...]:
        """Names of those that are there now, sorted."""
        ...

    def exchange(self, tasks: Mapping[str, Task], seconds: float | None = None) -> dict[str, Answer | Lost]:
        """One answer for each task, by client. Who has not answered after `seconds` (None waits) is `Lost`."""
        ...
