"""Self-training: the model labels the pool, and a student learns those labels of which the model is sure.

Pseudo-labels as in Lee (ICML workshop, 2013); clean text for the teacher and noise for the student (dropout, hidden
tokens) as in Noisy Student (Xie et al., CVPR 2020) and FixMatch (Sohn et al., NeurIPS 2020).
"""

from __future__ import annotations

from dataclasses import dataclass, field
from typing import Literal

import torch
from torch import Tensor

from netweight.errors import ModelError, OptionError, within
from netweight.loss import Batch, PseudoLabels
from netweight.model import Model
from netweight.network import Network
from netweight.run import Run
from netweight.task import Classify
from netweight.techniques.base import planned, transformer
from netweight.techniques.finetune import freeze_embeddings
from netweight.train import Plan


@dataclass(frozen=True)
class SelfTrain:
    """Train on the labelled rows, and on those of the pool of which the model is sure, for some rounds.

    `floor` is on the raw probability, softmax(logits), with `temperature` 1; give the temperature that was fitted on
    held-out rows (`netweight.certify.fit_temperature`), and it is on the calibrated one. `balance` caps a class: its
    pseudo-labels together weigh at most `balance` times its share of the labels. `drift` guards against collapse:
    before the cap, the pseudo-labels' distribution may differ from the labels' by that total variation, half the sum
    of absolute differences; above it the first round is refused, and the student of a round is dropped for the model
    that it was made from. `soft` targets are the teacher's whole distribution. `student` is what each round starts
    from, such as a pretrained base (Noisy Student); without it, the model itself goes on.
    """

    floor: float = 0.95
    rounds: int = 1
    epochs: float = 3.0
    learning_rate: float = 5e-5
    temperature: float = 1.0
    balance: float = 1.5
    drift: float = 0.3
    token_dropout: float = 0.1
    soft: bool = False
    freeze_embeddings: bool = True
    student: Model | None = field(default=None, repr=False)

    def __call__(self, model: Model, run: Run, plan: Plan) -> Model:
        task = self._checked(model)
        plan = planned(plan, self)
        counts = self._counted(model, run)
        if problem := self._problem(counts, task.labels):
            raise ModelError(f"self-training cannot start: {problem}")
        for number in range(1, self.rounds + 1):
            weights = capped(counts["pseudo"], counts["labels"], self.balance)
            loss = PseudoLabels(task, (model,), self.floor, weights, self.temperature, self.soft)
            given = self.student or model
            start = given.with_network(given.copy().network)
            freeze_embeddings(transformer(start, "SelfTrain"), self.freeze_embeddings)
            student = run.fit(start, loss, plan, f"self-training, round {number}")
            freeze_embeddings(transformer(student, "SelfTrain"), False)
            counts = self._counted(student, run)
            if problem := self._problem(counts, task.labels):
                plan.reporter.note(f"self-training keeps the model from before round {number}: {problem}")
                break
            model = student
        return model

    def _counted(self, model: Model, run: Run) -> dict[str, Tensor]:
        return run.reduce(model, Sure(model.task.outputs, self.floor, self.temperature), unlabelled=True)

    def _checked(self, model: Model) -> Classify:
        """The model's task, where what is given suits it."""
        transformer(model, "SelfTrain")
        task = model.task
        if not isinstance(task, Classify):
            raise OptionError(f"self-training needs labels; a task of kind {task.kind} has no confidence.")
        checks = {
            "floor": (0 < self.floor < 1, "more than 0, and less than 1"),
            "rounds": (self.rounds >= 1, "1 or more"),
            "temperature": (self.temperature > 0, "more than 0"),
            "balance": (self.balance >= 1, "1 or more"),
            "drift": (0 < self.drift <= 1, "more than 0, and at most 1"),
        }
        within(self, "SelfTrain", checks)
        if self.student is not None and self.student.task != task:
            raise ModelError("the student has another task than the model: other labels, or another metric.")
        return task

    def _problem(self, counts: dict[str, Tensor], names: tuple[str, ...]) -> str:
        """Why there is nothing to learn from, or how far what the model is sure of lies from the labels, where that is
        too far; else nothing."""
        if not counts["unlabelled"]:
            return "the run showed no rows without labels; give the dataset a pool, and train where the run reads it."
        if not counts["pseudo"].sum():
            return f"of {int(counts['unlabelled']):,} rows without labels none reaches floor {self.floor}; lower it."
        pseudo, labels = shares(counts["pseudo"]), shares(counts["labels"])
        drift = float((pseudo - labels).abs().sum() / 2)
        if drift <= self.drift:
            return ""
        most = int((pseudo - labels).argmax())
        return (
            f"pseudo-labels differ from the labels by a total variation of {drift:.2f}, more than drift={self.drift}; "
            f"{names[most]!r} is {pseudo[most]:.0%} of them and {labels[most]:.0%} of the labels. "
            "Label some rows of the pool, or raise drift if the pool is known to differ."
        )


@dataclass(frozen=True)
class Sure:
    """Counts: of labels by class, of pseudo-labels at the floor or above by class, and of rows without a label."""

    outputs: int
    floor: float
    temperature: float
    combine: Literal["sum", "max"] = "sum"

    def __call__(self, network: Network, batch: Batch) -> dict[str, Tensor]:
        logits = network(batch.ids, batch.mask, batch.types).float()
        sure, label = (logits / self.temperature).softmax(dim=1).max(dim=1)
        known = batch.targets >= 0
        kept = ~known & (sure >= self.floor)
        return {
            "labels": torch.bincount(batch.targets[known], minlength=self.outputs).double(),
            "pseudo": torch.bincount(label[kept], minlength=self.outputs).double(),
            "unlabelled": (~known).sum().double(),
        }


def shares(counts: Tensor) -> Tensor:
    """Counts as a distribution."""
    return counts / counts.sum().clamp(min=1.0)


def capped(pseudo: Tensor, labels: Tensor, balance: float) -> tuple[float, ...]:
    """Weight of a pseudo-label of each class, at most 1: together they weigh at most `balance` times the class's share
    of the labels, of all pseudo-labels.

    That is what keeping a random part of them would give on average (Noisy Student, 4.1, balances its data by numbers).
    """
    allowed = balance * shares(labels) * pseudo.sum()
    return tuple((allowed / pseudo.clamp(min=1.0)).clamp(max=1.0).tolist())
