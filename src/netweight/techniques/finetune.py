"""Fine-tuning that starts from a probe: linear probing, then full fine-tuning (Kumar et al., ICLR 2022)."""

from __future__ import annotations

from dataclasses import dataclass, replace
from typing import Literal

import torch
from torch import Tensor

from netweight.errors import ModelError
from netweight.loss import Batch, Supervised
from netweight.model import Model
from netweight.network import Network, Transformer
from netweight.run import Run
from netweight.task import Classify
from netweight.techniques.base import transformer
from netweight.train import Plan

# Largest mean gap between the logits of a class and of its nearest neighbour that a probe starts from: 99.3 % sure.
_GAP = 5.0

# Rows that the probe is fitted on: enough for a common covariance, and for the means of many classes.
_PROBE_ROWS, _PROBE_ROWS_PER_CLASS = 2000, 100


@dataclass(frozen=True)
class Finetune:
    """Train a pretrained encoder on the labelled rows.

    `probe` sets the head in closed form from one pass over some rows, so that the encoder's features are not torn
    up by a random head: linear discriminant analysis for labels, ridge regression for scores. Both need only sums
    over rows. `freeze_embeddings` halves the time of a step on CPU: the token table is most of a small
    encoder's parameters, and few of its rows occur in a batch.
    """

    epochs: float = 5.0
    learning_rate: float = 1e-4
    probe: bool = True
    freeze_embeddings: bool = True
    smoothing: float = 0.0

    def __call__(self, model: Model, run: Run, plan: Plan) -> Model:
        new = model.copy()
        network = transformer(new, "Finetune")
        if self.probe:
            rows = max(_PROBE_ROWS, _PROBE_ROWS_PER_CLASS * model.task.outputs)
            set_probe(network, run.reduce(new, Moments(model.task), rows), model.task)
        freeze_embeddings(network, self.freeze_embeddings)
        plan = replace(plan, epochs=self.epochs, learning_rate=self.learning_rate)
        new = run.fit(new, Supervised(model.task, self.smoothing), plan, "fine-tune")
        freeze_embeddings(transformer(new, "Finetune"), False)
        return new


@dataclass(frozen=True)
class Moments:
    """Sums over rows of the pooled features x (with a 1 appended) and targets y: x x^T, x y^T and y."""

    task: object
    combine: Literal["sum", "max"] = "sum"

    def __call__(self, network: Network, batch: Batch) -> dict[str, Tensor]:
        if not isinstance(network, Transformer):
            raise ModelError(f"a probe needs pooled features; {type(network).__name__} has none.")
        x = network.features(batch.ids, batch.mask, batch.types).double()
        x = torch.cat([x, torch.ones(len(x), 1, dtype=x.dtype)], dim=1)
        if isinstance(self.task, Classify):
            y = torch.nn.functional.one_hot(batch.targets, self.task.outputs).double()
        else:
            y = batch.targets.double().unsqueeze(1)
        w = batch.weight.double().unsqueeze(1)
        return {"xx": x.T @ (w * x), "xy": x.T @ (w * y)}


def set_probe(network: Transformer, sums: dict[str, Tensor], task: object, shrinkage: float = 0.1) -> None:
    """Set the head from `Moments`: LDA with a shrunk common covariance, or ridge regression."""
    xx, xy = sums["xx"], sums["xy"]
    n, d = xx[-1, -1], len(xx) - 1
    if isinstance(task, Classify):
        counts = xy[-1]
        means = xy[:-1] / counts.clamp(min=1e-9)
        within = (xx[:-1, :-1] - (means * counts) @ means.T) / n
        within = (1 - shrinkage) * within + shrinkage * within.diagonal().mean() * torch.eye(d, dtype=xx.dtype)
        weight = torch.linalg.solve(within, means)
        bias = -0.5 * (means * weight).sum(dim=0) + (counts / n).clamp(min=1e-9).log()
        # With few rows the covariance is underestimated and every row looks certain; a saturated softmax has no
        # gradient left to fine-tune with. Scaling all logits changes no label.
        scale = min(1.0, _GAP / max(float(_nearest(means, weight).mean()), 1e-9))
        weight, bias = weight * scale, bias * scale
    else:
        ridge = shrinkage * xx[:-1, :-1].diagonal().mean() * torch.eye(d + 1, dtype=xx.dtype)
        ridge[-1, -1] = 0
        both = torch.linalg.solve(xx + ridge, xy)
        weight, bias = both[:-1], both[-1]
    with torch.no_grad():
        network.head.weight.copy_(weight.T)
        network.head.bias.copy_(bias)


def _nearest(means: Tensor, weight: Tensor) -> Tensor:
    """Half the squared Mahalanobis distance of each class mean to the nearest other (k,): the gap of their logits."""
    products = means.T @ weight
    norms = products.diagonal()
    gaps = (norms[:, None] + norms[None, :] - products - products.T) / 2
    return gaps.fill_diagonal_(torch.inf).min(dim=1).values


def freeze_embeddings(network: Transformer, frozen: bool) -> None:
    """Exclude the token, position and type tables from training, or include them again."""
    for module in network.backbone.modules():
        if isinstance(module, torch.nn.Embedding):
            module.weight.requires_grad_(not frozen)
