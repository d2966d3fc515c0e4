"""Fine-tuning that starts from a probe: linear probing, then full fine-tuning (Kumar et al., ICLR 2022)."""

from __future__ import annotations

import time
from dataclasses import dataclass, replace
from typing import Literal, get_args

import torch
from torch import Tensor

from netweight.errors import ModelError, OptionError
from netweight.loss import Batch, Loss, Penalty, Supervised, checked_penalty, for_labels, penalized
from netweight.model import Model
from netweight.network import Exits, Network, Transformer
from netweight.objectives import Adversarial, RDrop, drops_out
from netweight.run import Run
from netweight.task import Classify
from netweight.techniques.base import planned, transformer
from netweight.techniques.lora import adapt, merge
from netweight.train import Plan

# Largest mean gap between the logits of a class and of its nearest neighbour that a probe starts from: 99.3 % sure.
_GAP = 5.0
# Least scatter within classes, as a share of the mean square of all features.
_SCATTER = 1e-3

# Rows that the probe is fitted on: enough for a common covariance, and for the means of many classes; and as many at
# most, since all of them go through the encoder in fp32 before the first step.
_PROBE_ROWS, _PROBE_ROWS_PER_CLASS, _PROBE_MOST = 2000, 100, 10_000


Trained = Literal["full", "head", "lora"]
Regularizer = Literal["none", "r-drop", "adversarial"]


@dataclass(frozen=True)
class Finetune:
    """Train a pretrained encoder on the labelled rows.

    `probe` sets the head in closed form from one pass over some rows, so that the encoder's features are not torn
    up by a random head: linear discriminant analysis for labels, ridge regression for scores. Both need only sums
    over rows. `freeze_embeddings` halves the time of a step on CPU: the token table is most of a small
    encoder's parameters, and few of its rows occur in a batch.

    `train`: "full", the "head" alone, or "lora", adapters of `rank` (8) and `alpha` (twice the rank) beside all linear
    layers of the backbone, which are added to them in the end. `class_weights`: rows count by the inverse frequency of
    their label. `regularizer`: "r-drop" at `kl_weight` (1.0) or "adversarial" at `epsilon` (1.0). `penalty`: `strength`
    times "l1", "l2" or "group" (`Penalized`) over all linear layers of the transformer, so that `Prune` or `Shrink`
    finds more to remove afterwards.
    """

    epochs: float = 5.0
    learning_rate: float = 1e-4
    probe: bool = True
    freeze_embeddings: bool = True
    smoothing: float = 0.0
    train: Trained = "full"
    rank: int | None = None
    alpha: float | None = None
    class_weights: bool = False
    regularizer: Regularizer = "none"
    kl_weight: float | None = None
    epsilon: float | None = None
    penalty: Literal["none"] | Penalty = "none"
    strength: float = 0.0

    def __post_init__(self) -> None:
        for name, kinds in (("train", Trained), ("regularizer", Regularizer)):
            if getattr(self, name) not in get_args(kinds):
                raise OptionError(f"unknown {name} {getattr(self, name)!r}; use {', '.join(get_args(kinds))}.")
        checked_penalty(self.penalty, self.strength)
        if self.train != "full" and not self.freeze_embeddings:
            raise OptionError(f"train={self.train!r} keeps the embeddings as they are; leave freeze_embeddings out.")
        belongs = {
            "rank": ("train", "lora"),
            "alpha": ("train", "lora"),
            "kl_weight": ("regularizer", "r-drop"),
            "epsilon": ("regularizer", "adversarial"),
        }
        for name, (option, value) in belongs.items():
            given = getattr(self, name)
            if given is not None and getattr(self, option) != value:
                raise OptionError(f"{name} is for {option}={value!r}; with {getattr(self, option)!r} leave it out.")
            if given is not None and not given > 0:
                raise OptionError(f"{name} is {given}; use a number above 0.")
        if self.penalty != "none" and self.train != "full":
            raise OptionError(f"train={self.train!r} keeps the weights that a penalty would shrink; leave penalty out.")

    def __call__(self, model: Model, run: Run, plan: Plan) -> Model:
        began = time.monotonic()
        new = model.with_network(model.copy().network)
        network = transformer(new, "Finetune")
        if self.train == "lora" and network.pruned:
            raise OptionError("what LoRA learns would fill the zeros of a pruned model; use train='full' or 'head'.")
        loss = penalized(self._loss(new, network, run), self.penalty, self.strength, network.linears())
        if self.probe:
            rows = min(max(_PROBE_ROWS, _PROBE_ROWS_PER_CLASS * model.task.outputs), _PROBE_MOST)
            set_probe(network, run.reduce(new, Moments(model.task), rows), model.task)
        self._freeze(network, plan)
        plan = planned(plan, self)
        if plan.seconds:
            left = max(plan.seconds - (time.monotonic() - began), 1.0)
            plan = replace(plan, seconds=left, limit=plan.limit or plan.seconds)
        new = run.fit(new, loss, plan, "fine-tune")
        trained = transformer(new, "Finetune")
        if self.train == "lora":
            merge(trained)
        if self.train == "full":
            freeze_embeddings(trained, False)
        else:
            trained.requires_grad_(True)
        return new

    def _freeze(self, network: Transformer, plan: Plan) -> None:
        if self.train == "full":
            freeze_embeddings(network, self.freeze_embeddings)
            return
        network.backbone.requires_grad_(False)
        if self.train == "lora":
            rank = 8 if self.rank is None else self.rank
            with torch.random.fork_rng(devices=[]):
                torch.manual_seed(plan.seed)
                adapt(network, rank, 2.0 * rank if self.alpha is None else self.alpha)
            for part in network.children():
                if part is not network.backbone:
                    part.requires_grad_(True)

    def _loss(self, model: Model, network: Transformer, run: Run) -> Loss:
        for_labels(self, model.task, "class_weights")
        weights = None
        if self.class_weights:
            weights = inverse_frequencies(run.reduce(model, LabelCounts(model.task.outputs))["rows"])
        loss = Supervised(model.task, self.smoothing, class_weights=weights)
        if self.regularizer == "adversarial":
            return Adversarial(loss, 1.0 if self.epsilon is None else self.epsilon)
        if self.regularizer == "r-drop":
            if isinstance(network, Exits):
                raise OptionError("r-drop compares one answer of two passes, and exits give several; add them later.")
            if not drops_out(network):
                raise OptionError(
                    f"r-drop compares two passes under dropout, and this {network.config.model_type} has none; set a "
                    "dropout in its configuration, or use regularizer 'adversarial'."
                )
            return RDrop(loss, 1.0 if self.kl_weight is None else self.kl_weight)
        return loss


@dataclass(frozen=True)
class LabelCounts:
    """Rows of each label (labels,)."""

    labels: int
    combine: Literal["sum", "max"] = "sum"

    def __call__(self, network: Network, batch: Batch) -> dict[str, Tensor]:
        return {"rows": torch.bincount(batch.targets[batch.targets >= 0], minlength=self.labels).double()}


def inverse_frequencies(counts: Tensor) -> tuple[float, ...]:
    """A weight for each label, proportional to 1 / count, with mean 1."""
    weights = 1 / counts.clamp(min=1)
    return tuple((weights / weights.mean()).tolist())


@dataclass(frozen=True)
class Moments:
    """Sums over rows of the pooled features x (with a 1 appended) and targets y: x x^T and x y^T."""

    task: object
    combine: Literal["sum", "max"] = "sum"

    def __call__(self, network: Network, batch: Batch) -> dict[str, Tensor]:
        if not isinstance(network, Transformer):
            raise ModelError(f"a probe needs pooled features; {type(network).__name__} has none.")
        x = network.features(batch.ids, batch.mask, batch.types).double()
        x = torch.cat([x, x.new_ones(len(x), 1)], dim=1)
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
        # With a row for each label nothing scatters within one; the spread of all rows takes its place.
        spread = torch.maximum(within.diagonal().mean(), _SCATTER * xx[:-1, :-1].diagonal().mean() / n)
        within = (1 - shrinkage) * within + shrinkage * spread * torch.eye(d, dtype=xx.dtype)
        weight = torch.linalg.solve(within, means)
        bias = -0.5 * (means * weight).sum(dim=0) + (counts / n).clamp(min=1e-9).log()
        # With few rows the covariance is underestimated and every row looks certain; a saturated softmax has no
        # gradient left to fine-tune with. Scaling all logits changes no label.
        seen = counts > 0
        gap = float(_nearest(means[:, seen], weight[:, seen]).mean()) if int(seen.sum()) > 1 else 0.0
        scale = min(1.0, _GAP / max(gap, 1e-9))
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
