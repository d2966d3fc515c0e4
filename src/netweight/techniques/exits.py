"""Early exit inside one encoder: heads after some layers, so that easy rows need not go through all of them.

BranchyNet (Teerapittayanon et al., 2016); DeeBERT (Xin et al., ACL 2020). All exits are trained together on the given
model's outputs, the later ones weighing more, as in Kaya, Hong and Dumitras (ICML 2019).
"""

from __future__ import annotations

import copy
from dataclasses import dataclass
from numbers import Integral
from typing import Any

from torch import nn

from netweight.errors import ModelError
from netweight.loss import SoftTargets
from netweight.model import Model
from netweight.network import Exits, Transformer
from netweight.run import Run
from netweight.task import Classify
from netweight.techniques.base import planned, transformer
from netweight.techniques.distill import heal
from netweight.train import Plan

# Families whose layers take hidden states and a mask, and whose last layer's output nothing follows.
FAMILIES = ("bert", "roberta", "xlm-roberta", "distilbert")


@dataclass(frozen=True)
class EarlyExit:
    """Add exits after the layers `after` and train all of it to match the model, which must classify.

    The exit thresholds are no matter of training: they are fitted on dev when the model becomes a tier. For a single
    exit its number will do.
    """

    after: tuple[int, ...] = (2,)
    epochs: float = 4.0
    learning_rate: float = 1e-4
    temperature: float = 2.0
    hard: float = 0.1
    token_dropout: float = 0.1
    splice: float = 4.0

    def __post_init__(self) -> None:
        given: Any = self.after
        object.__setattr__(self, "after", (given,) if isinstance(given, Integral) else tuple(given))

    def __call__(self, model: Model, run: Run, plan: Plan) -> Model:
        network = transformer(model, "EarlyExit")
        if why := refusal(model):
            raise ModelError(why)
        student = model.with_network(_with_exits(network, self.after))
        loss = SoftTargets(model.task, (model,), self.temperature, self.hard)
        return heal(student, loss, run, planned(plan, self), f"exits after {', '.join(map(str, self.after))}")


def refusal(model: Model) -> str:
    """Why the model cannot have exits, or nothing."""
    network = model.network
    if not isinstance(network, Transformer):
        return f"exits stand in a transformer; this network is {type(network).__name__}."
    if not isinstance(model.task, Classify):
        return "EarlyExit needs a task with labels: a score has no confidence to exit by."
    kind = network.config.model_type
    if kind not in FAMILIES:
        return (
            f"EarlyExit works in {', '.join(FAMILIES)}; the layers of {kind} need more than hidden states and a mask."
        )
    if isinstance(network, Exits):
        return "the model has exits already; use one without, such as the model that they were added to."
    return ""


def _with_exits(network: Transformer, after: tuple[int, ...]) -> Exits:
    """A copy with heads that start as copies of the last one."""
    old = copy.deepcopy(network)
    new = Exits(old.backbone, old.head.out_features, old.pooling, after)
    new.edits, new.zeros_stay = dict(old.edits), old.zeros_stay
    new.head = old.head
    for i in range(len(new.heads)):
        if old.width != old.config.hidden_size:
            new.replace(f"heads.{i}", nn.Linear(old.width, old.head.out_features))
        new.heads[i].load_state_dict(old.head.state_dict())
    return new.eval()
