"""Early exit inside one encoder: heads after some layers, so that easy rows need not go through all of them.

BranchyNet (Teerapittayanon et al., 2016); DeeBERT (Xin et al., ACL 2020). All exits are trained together on the given
model's outputs, the later ones weighing more, as in Kaya, Hong and Dumitras (ICML 2019).
"""

from __future__ import annotations

import copy
from dataclasses import dataclass, field

import torch
from torch import Tensor, nn

from netweight.errors import ModelError
from netweight.loss import Batch, matching, supervised
from netweight.model import Model
from netweight.network import Exits, Transformer
from netweight.run import Run
from netweight.task import Classify, Score
from netweight.techniques.base import transformer
from netweight.techniques.distill import heal, planned
from netweight.train import Plan

# Families whose layers take hidden states and a mask, and whose last layer's output nothing follows.
FAMILIES = ("bert", "roberta", "xlm-roberta", "distilbert")


@dataclass(frozen=True)
class EarlyExit:
    """Add exits after the layers `after` and train all of it to match the model, which must classify.

    The exit thresholds are no matter of training: they are fitted on dev when the model becomes a tier.
    """

    after: tuple[int, ...] = (2,)
    epochs: float = 4.0
    learning_rate: float = 1e-4
    temperature: float = 2.0
    hard: float = 0.1
    token_dropout: float = 0.1
    splice: float = 4.0

    def __call__(self, model: Model, run: Run, plan: Plan) -> Model:
        network = transformer(model, "EarlyExit")
        if not isinstance(model.task, Classify):
            raise ModelError("EarlyExit needs a task with labels: a score has no confidence to exit by.")
        if network.config.model_type not in FAMILIES:
            raise ModelError(
                f"EarlyExit works in {', '.join(FAMILIES)}; the layers of {network.config.model_type} need more than "
                "hidden states and a mask."
            )
        if isinstance(network, Exits):
            raise ModelError("the model has exits already; use one without, such as the model that they were added to.")
        student = model.with_network(_with_exits(network, self.after))
        loss = Staged(model.task, (model,), self.temperature, self.hard)
        return heal(student, loss, run, planned(plan, self), f"exits after {', '.join(map(str, self.after))}")


def fits(model: Model) -> bool:
    """Whether the model can have exits."""
    network = model.network
    if not isinstance(network, Transformer) or isinstance(network, Exits):
        return False
    return isinstance(model.task, Classify) and network.config.model_type in FAMILIES


def _with_exits(network: Transformer, after: tuple[int, ...]) -> Exits:
    """A copy with heads that start as copies of the last one."""
    old = copy.deepcopy(network)
    new = Exits(old.backbone, old.head.out_features, old.pooling, after)
    new.edits, new.zeros_stay = dict(old.edits), old.zeros_stay
    new.head.load_state_dict(old.head.state_dict())
    for head in new.heads:
        head.load_state_dict(old.head.state_dict())
    return new.eval()


@dataclass(frozen=True)
class Staged:
    """Soft targets at every exit: the weighted mean of their losses, the i-th of n weighing i."""

    task: Classify | Score
    teachers: tuple[Model, ...] = field(repr=False)
    temperature: float = 2.0
    hard: float = 0.0
    unlabelled: bool = True

    def __call__(self, network: nn.Module, batch: Batch) -> Tensor:
        stages: list[Tensor] = network.stages(batch.ids, batch.mask, batch.types)  # type: ignore[operator]
        target = torch.stack([t.float() for t in batch.teachers]).mean(dim=0)
        total = torch.zeros(())
        for i, logits in enumerate(stages, 1):
            soft = matching(self.task, logits.float(), target, batch.weight, self.temperature, batch.everywhere)
            both = (1 - self.hard) * soft + self.hard * supervised(self.task, logits, batch, 0.0)
            total = total + i * both
        return total / sum(range(1, len(stages) + 1))
