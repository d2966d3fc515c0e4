"""Losses: frozen values that turn a network and a batch into one scalar. They hold no state."""

from __future__ import annotations

from dataclasses import dataclass, field, replace
from typing import Protocol

import torch
import torch.nn.functional as F
from torch import Tensor, nn

from netweight.model import Model
from netweight.task import Classify, Score


@dataclass(frozen=True)
class Batch:
    """Rows as the network sees them.

    ids, mask, types: (n, length). targets: (n,) label indices or standardised values, and -1 or NaN for a row
    without a label. weight: (n,). teachers: logits (n, outputs) of each teacher that the loss names.
    """

    ids: Tensor
    mask: Tensor
    types: Tensor
    targets: Tensor
    weight: Tensor
    teachers: tuple[Tensor, ...] = ()

    def __len__(self) -> int:
        return len(self.ids)


class Loss(Protocol):
    """What a run needs to know of a loss: whose outputs to fetch, and whether unlabelled rows help."""

    @property
    def teachers(self) -> tuple[Model, ...]: ...

    @property
    def unlabelled(self) -> bool: ...

    def __call__(self, network: nn.Module, batch: Batch) -> Tensor: ...


@dataclass(frozen=True)
class Supervised:
    """Cross entropy for classification (with label smoothing), squared error for scores; weighted mean over rows.

    `class_weights`, one for each label, multiply the rows' own weights.
    """

    task: Classify | Score
    smoothing: float = 0.0
    teachers: tuple[Model, ...] = ()
    unlabelled: bool = False
    class_weights: tuple[float, ...] | None = None

    def __call__(self, network: nn.Module, batch: Batch) -> Tensor:
        return self.of(network(batch.ids, batch.mask, batch.types), batch)

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
    For scores the first term is the squared difference of the outputs.
    """

    task: Classify | Score
    teachers: tuple[Model, ...] = field(repr=False)
    temperature: float = 2.0
    hard: float = 0.0
    unlabelled: bool = True

    def __call__(self, network: nn.Module, batch: Batch) -> Tensor:
        logits = network(batch.ids, batch.mask, batch.types).float()
        target = torch.stack([t.float() for t in batch.teachers]).mean(dim=0)
        loss = matching(self.task, logits, target, batch.weight, self.temperature)
        if self.hard:
            loss = (1 - self.hard) * loss + self.hard * supervised(self.task, logits, batch, 0.0)
        return loss


def matching(task: Classify | Score, logits: Tensor, target: Tensor, weight: Tensor, temperature: float) -> Tensor:
    """Weighted mean over rows of T^2 * KL(softmax(target / T) || softmax(logits / T)), or of squared differences."""
    if isinstance(task, Score):
        per_row = (logits - target).square().sum(dim=1)
    else:
        wanted = F.log_softmax(target / temperature, dim=1)
        got = F.log_softmax(logits / temperature, dim=1)
        per_row = (wanted.exp() * (wanted - got)).sum(dim=1) * temperature**2
    return (per_row * weight).sum() / weight.sum().clamp(min=1e-12)


def supervised(task: Classify | Score, logits: Tensor, batch: Batch, smoothing: float) -> Tensor:
    """Weighted mean over the labelled rows of a batch; zero where none is labelled."""
    logits = logits.float()
    if isinstance(task, Score):
        known = batch.targets.isfinite()
        per_row = (logits[:, 0] - batch.targets.nan_to_num()).square()
    else:
        known = batch.targets >= 0
        per_row = F.cross_entropy(logits, batch.targets.clamp(min=0), reduction="none", label_smoothing=smoothing)
    weight = batch.weight * known
    return (per_row * weight).sum() / weight.sum().clamp(min=1e-12)
