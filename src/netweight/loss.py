"""Losses: frozen values that turn a network and a batch into one scalar. They hold no state."""

from __future__ import annotations

import math
from collections.abc import Callable, Iterable
from dataclasses import dataclass, field, replace
from typing import Literal, Protocol, get_args

import torch
import torch.nn.functional as F
from torch import Tensor, nn

from netweight.errors import ModelError, OptionError, within
from netweight.model import Model
from netweight.network import Exits
from netweight.task import Classify, Score

Everywhere = Callable[[Tensor], Tensor]


def here(value: Tensor) -> Tensor:
    """The sum over processes where there is one."""
    return value


@dataclass(frozen=True)
class Batch:
    """Rows as the network sees them.

    ids, mask, types: (n, length). targets: (n,) label indices or standardised values, and -1 or NaN for a row
    without a label. weight: (n,). teachers: logits (n, outputs) of each teacher that the loss names. `everywhere` adds
    up a tensor (without gradient) over all processes that hold a part of the batch: see `mean`.
    """

    ids: Tensor
    mask: Tensor
    types: Tensor
    targets: Tensor
    weight: Tensor
    teachers: tuple[Tensor, ...] = ()
    everywhere: Everywhere = here

    def __len__(self) -> int:
        return len(self.ids)

    def to(self, device: torch.device) -> Batch:
        """The same rows on a device."""
        return self._each(lambda tensor: tensor.to(device))

    def part(self, rows: slice | Tensor) -> Batch:
        """Some of the rows, padded as all are."""
        return self._each(lambda tensor: tensor[rows])

    def _each(self, change: Callable[[Tensor], Tensor]) -> Batch:
        ids, mask, types, targets, weight = map(change, (self.ids, self.mask, self.types, self.targets, self.weight))
        return Batch(ids, mask, types, targets, weight, tuple(map(change, self.teachers)), self.everywhere)


def short_row(model: Model) -> Batch:
    """A batch of one row of special tokens: what asks how something computes, and not what."""
    ids = torch.tensor([model.encoder.specials or (0,)], dtype=torch.int32)
    targets = torch.zeros(1, dtype=torch.long if isinstance(model.task, Classify) else torch.float)
    return Batch(ids, torch.ones_like(ids), torch.zeros_like(ids), targets, torch.ones(1))


class Loss(Protocol):
    """What a run needs to know of a loss: whose outputs to fetch, and whether unlabelled rows help."""

    @property
    def teachers(self) -> tuple[Model, ...]: ...

    @property
    def unlabelled(self) -> bool: ...

    def __call__(self, network: nn.Module, batch: Batch) -> Tensor: ...


def for_labels(options: object, task: Classify | Score, *names: str) -> None:
    """Raise OptionError where one of these options is set and the task is of scores, for which it would do nothing."""
    for name in names:
        given = getattr(options, name)
        if isinstance(task, Score) and given != getattr(type(options), name):
            raise OptionError(f"{name}={given!r} is for classification; this model predicts scores: leave it out.")


def over_exits(network: nn.Module, batch: Batch, loss: Callable[[Tensor], Tensor]) -> Tensor:
    """The mean of the losses of all exits' logits (n, outputs), the i-th weighing i (Kaya, Hong and Dumitras, ICML
    2019). Most networks have one."""
    given = (batch.ids, batch.mask, batch.types)
    stages = network.stages(*given) if isinstance(network, Exits) else [network(*given)]
    total = torch.stack([i * loss(logits) for i, logits in enumerate(stages, 1)]).sum()
    return total / sum(range(len(stages) + 1))


@dataclass(frozen=True)
class Supervised:
    """Cross entropy for classification (with label smoothing), for scores squared error, or with the metric "mae" the
    absolute one, which is least at the median as MAE is; weighted mean over rows.

    `class_weights`, one for each label, multiply the rows' own weights.
    """

    task: Classify | Score
    smoothing: float = 0.0
    teachers: tuple[Model, ...] = ()
    unlabelled: bool = False
    class_weights: tuple[float, ...] | None = None

    def __post_init__(self) -> None:
        within(self, "a loss", {"smoothing": (0 <= self.smoothing < 1, "0 or more, and less than 1")})
        for_labels(self, self.task, "smoothing", "class_weights")

    def __call__(self, network: nn.Module, batch: Batch) -> Tensor:
        return over_exits(network, batch, lambda logits: self.of(logits, batch))

    def of(self, logits: Tensor, batch: Batch) -> Tensor:
        """The loss of logits (n, outputs) that are known already."""
        if self.class_weights is not None:
            weights = torch.tensor(self.class_weights, device=batch.weight.device)
            batch = replace(batch, weight=batch.weight * weights[batch.targets.clamp(min=0)])
        return supervised(self.task, logits, batch, self.smoothing)


@dataclass(frozen=True)
class SoftTargets:
    """Distillation from a teacher's outputs (Hinton, Vinyals and Dean, 2015), mixed with the labels.

    loss = (1 - hard) * T^2 * KL(teacher / T, student / T) + hard * supervised, the second over labelled rows only.
    For scores the first term is the squared difference of the outputs. Several teachers are one whose logits are the
    mean of theirs, or, with `combine` "confidence", the mean weighted in each row by each one's largest probability.
    """

    task: Classify | Score
    teachers: tuple[Model, ...] = field(repr=False)
    temperature: float = 2.0
    hard: float = 0.0
    unlabelled: bool = True
    combine: Literal["mean", "confidence"] = "mean"

    def __post_init__(self) -> None:
        checks = {
            "temperature": (self.temperature > 0, "more than 0"),
            "hard": (0 <= self.hard <= 1, "a share, 0 to 1"),
        }
        within(self, "a distillation", checks)
        for_labels(self, self.task, "temperature", "combine")

    def __call__(self, network: nn.Module, batch: Batch) -> Tensor:
        said = torch.stack([t.float() for t in batch.teachers])
        target = said.mean(dim=0) if self.combine == "mean" else confident(said)

        def of(logits: Tensor) -> Tensor:
            logits = logits.float()
            loss = matching(self.task, logits, target, batch.weight, self.temperature, batch.everywhere)
            if self.hard:
                loss = (1 - self.hard) * loss + self.hard * supervised(self.task, logits, batch, 0.0)
            return loss

        return over_exits(network, batch, of)


Penalty = Literal["l1", "l2", "group"]


@dataclass(frozen=True)
class Penalized:
    """Another loss plus `strength` times a penalty on the weights of these names, each a matrix (outputs, inputs).

    "l1" is the sum of |w| (Tibshirani, 1996), "l2" the sum of w^2 (ridge, Hoerl and Kennard, 1970), "group" the sum
    over rows of sqrt(inputs) * ||row||_2 (group lasso, Yuan and Lin, 2006). All are sums, as in those papers, so a
    strength weighs more on a larger network. Raises ModelError where the network has not all of the weights.
    """

    loss: Loss
    penalty: Penalty
    strength: float
    names: tuple[str, ...]

    @property
    def teachers(self) -> tuple[Model, ...]:
        return self.loss.teachers

    @property
    def unlabelled(self) -> bool:
        return self.loss.unlabelled

    def __call__(self, network: nn.Module, batch: Batch) -> Tensor:
        held = dict(network.named_parameters())
        lacking = [name for name in self.names if name not in held]
        if lacking:
            raise ModelError(f"a penalty names {lacking[0]}, which the network does not have.")
        added = torch.stack([penalty(held[name], self.penalty) for name in self.names]).sum()
        # Every process adds its share of the penalty.
        return self.loss(network, batch) + self.strength * added / batch.everywhere(torch.ones_like(added.detach()))


def penalized(loss: Loss, kind: Literal["none"] | Penalty, strength: float, layers: Iterable[str]) -> Loss:
    """The loss with a penalty on the weights of these linear layers; "none": the loss itself."""
    return loss if kind == "none" else Penalized(loss, kind, strength, tuple(f"{name}.weight" for name in layers))


def checked_penalty(kind: str, strength: float) -> None:
    """Raises OptionError for an unknown penalty, and where one of the two is given without the other."""
    if kind not in (allowed := ("none", *get_args(Penalty))):
        raise OptionError(f"unknown penalty {kind!r}; use one of {', '.join(allowed)}.")
    if strength < 0:
        raise OptionError(f"strength of the penalty is {strength}; use a number above 0, or leave it out.")
    if (kind == "none") != (strength == 0):
        raise OptionError(f"penalty {kind!r} with strength {strength}: give both or none.")


def penalty(weight: Tensor, kind: Penalty) -> Tensor:
    """The penalty of one matrix (outputs, inputs), a scalar; see `Penalized`."""
    if kind == "l1":
        return weight.abs().sum()
    if kind == "l2":
        return weight.square().sum()
    lengths: Tensor = torch.linalg.vector_norm(weight, dim=1)
    return lengths.sum() * math.sqrt(weight.shape[1])


@dataclass(frozen=True)
class PseudoLabels:
    """Labels for labelled rows, and the teacher's own labels for unlabelled ones of which it is sure (Lee, 2013).

    A row counts where the largest of softmax(teacher / temperature) is at least `floor`, and then as much as `weights`
    says for its pseudo-label. Its target is that label alone, or with `soft` the whole distribution. The loss is the
    weighted mean of cross entropies over all rows that count.
    """

    task: Classify
    teachers: tuple[Model, ...] = field(repr=False)
    floor: float
    weights: tuple[float, ...]
    temperature: float = 1.0
    soft: bool = False
    unlabelled: bool = True

    def __call__(self, network: nn.Module, batch: Batch) -> Tensor:
        said = (batch.teachers[0].float() / self.temperature).softmax(dim=1)
        sure, label = said.max(dim=1)
        known = batch.targets >= 0
        kept = ~known & (sure >= self.floor)
        target = torch.where(known, batch.targets, label)
        counts = torch.tensor(self.weights, device=label.device)[label]
        weight = batch.weight * torch.where(known, 1.0, kept * counts)

        def of(logits: Tensor) -> Tensor:
            logits = logits.float()
            per_row = F.cross_entropy(logits, target, reduction="none")
            if self.soft:
                per_row = torch.where(known, per_row, F.cross_entropy(logits, said, reduction="none"))
            return mean(per_row, weight, batch.everywhere)

        return over_exits(network, batch, of)


def mean(values: Tensor, weight: Tensor, everywhere: Everywhere = here) -> Tensor:
    """This process's share of a weighted mean: sum(values * weight) / (sum of all weights, everywhere).

    Gradients of the shares add up to the gradient of the mean over the whole batch, however it was divided.
    """
    return (values * weight).sum() / everywhere(weight.sum()).clamp(min=1e-12)


def confident(said: Tensor) -> Tensor:
    """Mean over teachers of logits (teachers, n, outputs), weighted in each row by each one's largest probability."""
    weight = said.softmax(dim=-1).amax(dim=-1, keepdim=True)
    return (said * weight).sum(dim=0) / weight.sum(dim=0)


def matching(
    task: Classify | Score,
    logits: Tensor,
    target: Tensor,
    weight: Tensor,
    temperature: float,
    everywhere: Everywhere = here,
) -> Tensor:
    """Weighted mean over rows of T^2 * KL(softmax(target / T) || softmax(logits / T)), or of squared differences."""
    if isinstance(task, Score):
        per_row = (logits - target).square().sum(dim=1)
    else:
        wanted = F.log_softmax(target / temperature, dim=1)
        got = F.log_softmax(logits / temperature, dim=1)
        per_row = (wanted.exp() * (wanted - got)).sum(dim=1) * temperature**2
    return mean(per_row, weight, everywhere)


def supervised(task: Classify | Score, logits: Tensor, batch: Batch, smoothing: float) -> Tensor:
    """Weighted mean over the labelled rows of a batch; zero where none is labelled."""
    logits = logits.float()
    if isinstance(task, Score):
        known = batch.targets.isfinite()
        apart = logits[:, 0] - batch.targets.nan_to_num()
        per_row = apart.abs() if task.metric == "mae" else apart.square()
    else:
        known = batch.targets >= 0
        per_row = F.cross_entropy(logits, batch.targets.clamp(min=0), reduction="none", label_smoothing=smoothing)
    return mean(per_row, batch.weight * known, batch.everywhere)
