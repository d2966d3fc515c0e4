"""Unstructured pruning: theta_1 = theta_0 * alpha, a mask that sets single weights to zero.

Magnitude pruning as in Han et al. (NeurIPS 2015), the gradual schedule of Zhu and Gupta (2017), first-order Taylor
importance of Molchanov et al. (ICLR 2017) for single weights, diagonal Fisher importance of Theis et al. (2018), and
N:M patterns of Mishra et al. (2021). Files shrink, because zeros take a bit there; no engine runs faster for them.
"""

from __future__ import annotations

import copy
import math
from dataclasses import dataclass, replace
from typing import Literal, cast, get_args

import numpy as np
import torch
from torch import Tensor, nn
from torch.func import functional_call

from netweight.errors import DataError, OptionError
from netweight.loss import Batch, Loss, Penalty, SoftTargets, checked_penalty, penalized, supervised
from netweight.model import Model
from netweight.network import Network
from netweight.run import Run
from netweight.task import Classify, Score
from netweight.techniques.base import planned, transformer
from netweight.techniques.distill import heal
from netweight.train import Plan

Importance = Literal["l1", "l2", "taylor", "fisher"]
Scope = Literal["global", "layer"]
Schedule = Literal["oneshot", "cubic"]

_STAGES = 4
_ROWS = 300
_LABELLED = "labelled"


@dataclass(frozen=True)
class Prune:
    """Set the least important weights of the transformer's linear layers to zero, and heal what that hurt.

    Embeddings, norms, biases and the head keep their weights. Healing distils the given model into the pruned one,
    so rows without labels count too. Removed weights, and those that were zero before, stay exactly zero through it and
    through all that trains the model later.

    Args:
        sparsity: share of the weights that are zero at the end. This or `pattern`.
        pattern: (n, m) keeps n of each m consecutive inputs of every output.
        importance: "l1" |w|; "l2" w^2 (it ranks single weights as "l1" does); "taylor" |w * g| with the mean gradient g
            of the supervised loss; "fisher" w^2 times the mean squared gradient of a row (the empirical Fisher).
        scope: "global" compares the weights of all layers with each other, "layer" removes the same share of each.
        schedule: "oneshot", or "cubic": in `stages`, the k-th of n at sparsity s + (s_0 - s) (1 - k / n)^3, each with
            its own importance and its share of the healing (Zhu and Gupta, 2017). s_0 is the share of zeros given.
        stages: of the cubic schedule; 4 where not given.
        rows: that "taylor" and "fisher" read; 300 where not given.
        epochs: of healing over all stages; 0 for none.
        penalty: added to the healing loss (`Penalized`), over the pruned layers. It changes what later stages
            remove, not what one shot does.
        strength: factor of the penalty.

    Raises:
        OptionError: options that contradict each other, or that would remove nothing.
        DataError: an importance that needs labels, and no row has one.
    """

    sparsity: float | None = None
    pattern: tuple[int, int] | None = None
    importance: Importance = "l1"
    scope: Scope = "global"
    schedule: Schedule = "oneshot"
    stages: int | None = None
    rows: int | None = None
    epochs: float = 2.0
    learning_rate: float = 1e-4
    temperature: float = 2.0
    penalty: Literal["none"] | Penalty = "none"
    strength: float = 0.0

    def __post_init__(self) -> None:
        for name, allowed in (("importance", Importance), ("scope", Scope), ("schedule", Schedule)):
            _among(name, getattr(self, name), get_args(allowed))
        checked_penalty(self.penalty, self.strength)
        if (self.sparsity is None) == (self.pattern is None):
            raise OptionError("give sparsity or pattern, one of them.")
        n, m = self.pattern or (1, 2)
        if not 1 <= n < m:
            raise OptionError(f"pattern {n}:{m} is none; keep n of m weights with 1 <= n < m, as in (2, 4).")
        gradients = self.importance in ("taylor", "fisher")
        refused = (
            (not 0 < self.share < 1, f"sparsity is {self.sparsity}; it must lie between 0 and 1."),
            (
                self.pattern is not None and self.scope == "layer",
                "scope 'layer' does not apply to a pattern, which removes one share everywhere; leave scope out.",
            ),
            (self.epochs < 0, f"epochs of healing are {self.epochs}; use 0 for none, or more."),
            (
                self.schedule == "cubic" and self.epochs == 0,
                "a cubic schedule heals between its stages; give epochs, or use schedule='oneshot'.",
            ),
            (
                self.schedule == "oneshot" and self.stages is not None,
                f"one shot has no stages, but stages is {self.stages}; use schedule='cubic'.",
            ),
            (self.stages is not None and self.stages < 2, f"stages is {self.stages}; a cubic schedule has 2 or more."),
            (
                self.rows is not None and not gradients,
                f"rows does not apply to importance {self.importance!r}, which reads none; use 'taylor' or 'fisher'.",
            ),
            (self.rows is not None and self.rows < 1, f"rows is {self.rows}; an importance must see one row or more."),
            (
                self.penalty != "none" and self.epochs == 0,
                "a penalty is part of the healing loss; give epochs, or leave it out.",
            ),
        )
        for wrong, text in refused:
            if wrong:
                raise OptionError(text)

    @property
    def share(self) -> float:
        """Share of the weights to be zero at the end."""
        if self.pattern is not None:
            return 1 - self.pattern[0] / self.pattern[1]
        return cast(float, self.sparsity)

    def __call__(self, model: Model, run: Run, plan: Plan) -> Model:
        layers = transformer(model, "Prune").linears()
        self._check(layers)
        loss: Loss = SoftTargets(model.task, (model,), self.temperature)
        loss = penalized(loss, self.penalty, self.strength, layers)
        goals = self.goals(zeros(layers))
        student = model
        for stage, goal in enumerate(goals):
            scores = self.scores(student, run)
            network = copy.deepcopy(transformer(student, "Prune"))
            cut(network.linears(), self.kept(scores, goal))
            network.zeros_stay = True
            student = model.with_network(network)
            if self.epochs:
                # The first share of an epoch is the same rows under the same seed; stages should not all see those.
                now = replace(planned(plan, self), seed=plan.seed + stage, epochs=self.epochs / len(goals))
                student = heal(student, loss, run, now, f"heal at {goal:.0%} zeros")
        return student

    def _check(self, layers: dict[str, nn.Linear]) -> None:
        if self.pattern is not None:
            n, m = self.pattern
            for name, layer in layers.items():
                if layer.in_features % m:
                    raise OptionError(f"pattern {n}:{m} needs inputs in {m}s, but {name} has {layer.in_features}.")
            if all(bool(((w.weight != 0).unflatten(1, (-1, m)).sum(-1) <= n).all()) for w in layers.values()):
                raise OptionError(f"the weights have the pattern {n}:{m} already; ask for fewer of {m}.")
        elif zeros(layers) >= self.share:
            there = f"{zeros(layers):.1%} of the weights are zero already"
            raise OptionError(f"{there}; sparsity {self.share} would remove none. Ask for more.")

    def goals(self, first: float) -> list[float]:
        """Share of zeros after each stage, from the share given."""
        if self.schedule == "oneshot":
            return [self.share]
        n = self.stages or _STAGES
        return [self.share + (first - self.share) * (1 - k / n) ** 3 for k in range(1, n + 1)]

    def scores(self, model: Model, run: Run) -> dict[str, Tensor]:
        """Importance of each weight (outputs, inputs) by layer name; -1 of those that are zero."""
        weights = {name: layer.weight.detach() for name, layer in transformer(model, "Prune").linears().items()}
        if self.importance == "l1":
            scores = {name: weight.abs() for name, weight in weights.items()}
        elif self.importance == "l2":
            scores = {name: weight.square() for name, weight in weights.items()}
        else:
            squared = self.importance == "fisher"
            sums = run.reduce(model, Gradients(model.task, tuple(weights), squared), self.rows or _ROWS)
            if sums[_LABELLED] <= 0:
                raise DataError(f"importance {self.importance!r} needs labels, and no row has one; use 'l1'.")
            factors = {name: weight.square() if squared else weight for name, weight in weights.items()}
            scores = {name: (factor * sums[name] / sums[_LABELLED]).abs() for name, factor in factors.items()}
        # Where a gradient is zero too, those that are gone already must still go first.
        return {name: score.masked_fill(weights[name] == 0, -1.0) for name, score in scores.items()}

    def kept(self, scores: dict[str, Tensor], goal: float) -> dict[str, Tensor]:
        """Masks (outputs, inputs) of what stays, by layer name."""
        if self.pattern is not None:
            n, m = self.pattern
            # Between the stages as many of each m stay as the goal leaves: 4, 3, then 2 for 2:4.
            n = max(n, math.ceil(m * (1 - goal) - 1e-9))
            return {name: largest_of_each(score, n, m) for name, score in scores.items()}
        if self.scope == "layer":
            return {name: largest(score, goal) for name, score in scores.items()}
        flat = largest(torch.cat([score.flatten() for score in scores.values()]), goal)
        parts = flat.split([score.numel() for score in scores.values()])
        return {name: part.view_as(scores[name]) for name, part in zip(scores, parts, strict=True)}


@dataclass(frozen=True)
class Gradients:
    """Sum over labelled rows of the gradient of each row's supervised loss, or of its square, for these layers'
    weights; as "labelled" the sum of the rows' own weights."""

    task: Classify | Score
    names: tuple[str, ...]
    squared: bool
    combine: Literal["sum", "max"] = "sum"

    def __call__(self, network: Network, batch: Batch) -> dict[str, Tensor]:
        known = batch.targets.isfinite() if isinstance(self.task, Score) else batch.targets >= 0
        rows = known.nonzero()[:, 0]
        # Other tensors over the same memory: the given network is neither written to nor told to keep gradients.
        held = {f"{name}.weight": network.get_parameter(f"{name}.weight").detach() for name in self.names}
        total = {name: torch.zeros_like(weight) for name, weight in held.items()}
        # Squares of rows cannot be had from the gradient of their sum. Runs reduce without gradients.
        with torch.enable_grad():
            for weight in held.values():
                weight.requires_grad_()
            for some in rows.split(1 if self.squared else len(rows)) if len(rows) else ():
                part = batch.part(some)
                logits = functional_call(network, held, (part.ids, part.mask, part.types))
                mean = supervised(self.task, logits, part, 0.0)
                found = torch.autograd.grad(mean, list(held.values()), allow_unused=True, materialize_grads=True)
                for name, gradient in zip(held, found, strict=True):
                    total[name] += part.weight.sum() * (gradient.square() if self.squared else gradient)
        sums = {name: total[f"{name}.weight"] for name in self.names}
        return sums | {_LABELLED: (batch.weight * known).sum().double()}


def largest(scores: Tensor, share: float) -> Tensor:
    """A mask of all but the smallest `share` of the scores, to the nearest whole number."""
    count = round(share * scores.numel())
    mask = np.ones(scores.numel(), bool)
    if count:
        mask[np.argpartition(scores.flatten().numpy(), count - 1)[:count]] = False
    return torch.from_numpy(mask).view_as(scores)


def largest_of_each(scores: Tensor, n: int, m: int) -> Tensor:
    """A mask (outputs, inputs) of the n largest of each m consecutive scores in a row."""
    groups = scores.unflatten(1, (-1, m))
    order = groups.argsort(dim=-1, descending=True, stable=True)
    return torch.zeros_like(groups, dtype=torch.bool).scatter(-1, order[..., :n], True).flatten(1)


def zeros(layers: dict[str, nn.Linear]) -> float:
    """Share of these layers' weights that are zero."""
    there = sum(int((layer.weight == 0).sum()) for layer in layers.values())
    return there / max(1, sum(layer.weight.numel() for layer in layers.values()))


def cut(layers: dict[str, nn.Linear], kept: dict[str, Tensor]) -> None:
    """Set the weights that are not kept to zero, in place."""
    with torch.no_grad():
        for name, layer in layers.items():
            layer.weight.masked_fill_(~kept[name], 0.0)


def _among(name: str, value: str, allowed: tuple[str, ...]) -> None:
    if value not in allowed:
        raise OptionError(f"unknown {name} {value!r}; use one of {', '.join(allowed)}.")
