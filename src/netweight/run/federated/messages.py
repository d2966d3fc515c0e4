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
from netweight.run.federated.membership import Membership
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
    """A client's own manifest, the number of its training rows, of their labels (0 for scores, 2 for two and more), and
    of those that the server does not know (of scores: that are no numbers). Which ones does not travel: a column that
    was named by mistake may hold texts."""

    manifest: Manifest
    rows: int
    labels: int
    unknown: int = 0


@dataclass(frozen=True)
class RowNoise:
    """Train with DP-SGD: over `rounds` rounds of one fit a client's rows may cost `epsilon` at `delta`; gradients of
    rows are clipped to `clip`. The client works the noise out for itself, and keeps count."""

    epsilon: float
    delta: float
    clip: float
    rounds: int


@dataclass(frozen=True)
class UpdateNoise:
    """Clip the update to `clip` and add Gaussian noise of standard deviation noise * clip / sqrt(cohort); with those of
    `cohort` clients it adds up to noise * clip. Over all rounds it costs `epsilon` at `delta`."""

    noise: float
    clip: float
    cohort: int
    epsilon: float
    delta: float


@dataclass(frozen=True)
class Seat:
    """A client's place in secure aggregation (see `secure`): sealed shares and their digests by sender, as hexadecimal
    text; the number of clients whose vectors are added up; what this client multiplies its update by, and the norm that
    it may have."""

    sealed: Mapping[str, str]
    digests: Mapping[str, str]
    clients: int
    weight: float
    largest: float


@dataclass(frozen=True)
class Advertise:
    """Asks for fresh public keys for one round; so many clients must be left in its end."""

    fit: str
    round: int
    threshold: int


@dataclass(frozen=True)
class Advertised:
    """Public keys as hexadecimal text."""

    seal: str
    mask: str


@dataclass(frozen=True)
class Share:
    """Tells everyone's keys, by client, and asks for sealed shares of two secrets."""

    fit: str
    round: int
    keys: Mapping[str, Advertised]


@dataclass(frozen=True)
class Shared:
    """Sealed shares by receiver, digests of those that each client holds, and that of the seed (`secure.Deal`), as
    hexadecimal text."""

    sealed: Mapping[str, str]
    digests: Mapping[str, str]
    seed: str


@dataclass(frozen=True)
class Unmask:
    """Tells who sent a masked update, and asks for shares that take masks away."""

    fit: str
    round: int
    survivors: tuple[str, ...]


@dataclass(frozen=True)
class Told:
    """Shares by client, as hexadecimal text: of survivors' seeds, and of the keys of those that vanished."""

    seeds: Mapping[str, str]
    keys: Mapping[str, str]


@dataclass(frozen=True)
class AttackTask:
    """Asks how well training rows can be told from held-out ones by a model's loss; `fit` and `taken` as in
    `ScoreTask`."""

    model: Model
    fit: str = ""
    taken: int = -1


@dataclass(frozen=True)
class FitTask:
    """One round of training.

    `fit` names the whole fit (SHA-256), so that what a client keeps between rounds is not mixed with that of another;
    `round` counts from 0. The parameters of `model` that require gradients are trained; a carrier must keep those
    flags. `plan` is this round's part. `personal` parameters stay with the client. `proximal` is FedProx's mu,
    `variate` SCAFFOLD's server variate. `codec` says how the update is to be encoded, `privacy` what noise it needs;
    with a `seat` it is masked. `taken` is the last round in which an answer of this client counted (-1: none yet): what
    it carries from round to round is that of then.
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
    privacy: RowNoise | UpdateNoise | None = None
    seat: Seat | None = None
    taken: int = -1


@dataclass(frozen=True)
class Fitted:
    """What a client has learned in a round.

    `tensors` are as the task's codec encodes them (`Full`: the new values themselves; others: differences to the
    task's model). `variate` is the change of the client's SCAFFOLD variate. `loss` is the mean over the round's steps;
    NaN under privacy, since it tells of rows. `epsilon` is what this fit has cost the client's rows so far, `in_all`
    all fits. With a seat there is one tensor, "masked", of 32-bit words.
    """

    tensors: Tensors
    rows: int
    loss: float
    variate: Tensors | None = None
    epsilon: float = 0.0
    in_all: float = 0.0


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


@dataclass(frozen=True)
class ScoreTask:
    """Asks how good a model is on the client's own select rows; with `fit` the parameters that it kept replace
    those of the model, as they were after the round `taken`, the last in which its answer counted."""

    model: Model
    fit: str = ""
    taken: int = -1


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


Task = Join | FitTask | ReduceTask | ScoreTask | AttackTask | Advertise | Share | Unmask
Answer = Joined | Fitted | Reduced | Scored | Membership | Advertised | Shared | Told


class Channel(Protocol):
    """How tasks reach clients. What arrives was not checked: the server does that."""

    def clients(self) -> tuple[str, ...]:
        """Names of those that are there now, sorted."""
        ...

    def exchange(self, tasks: Mapping[str, Task], seconds: float | None = None) -> dict[str, Answer | Lost]:
        """One answer for each task, by client. Who has not answered after `seconds` (None waits) is `Lost`."""
        ...
