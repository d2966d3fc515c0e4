"""Cheaper activation functions in the place of a network's own, healed by distillation."""

from __future__ import annotations

from dataclasses import dataclass
from typing import get_args

from torch import nn
from transformers import activations

from netweight.errors import ModelError, OptionError
from netweight.layers import Activate, Activation
from netweight.loss import SoftTargets
from netweight.model import Model
from netweight.network import Transformer
from netweight.run import Run
from netweight.techniques.base import planned, transformer
from netweight.techniques.distill import heal
from netweight.train import Plan

_KINDS = (
    Activate,
    nn.GELU,
    nn.SiLU,
    nn.ReLU,
    activations.GELUActivation,
    activations.NewGELUActivation,
    activations.FastGELUActivation,
    activations.QuickGELUActivation,
    activations.GELUTanh,
    activations.SiLUActivation,
)


@dataclass(frozen=True)
class SwapActivation:
    """Put `kind` in the place of every activation function of the layers, then train the model to say what it said.

    "relu" and "relu6" need one or two comparisons a value where GELU needs an error function, and leave zeros
    (Mirzadeh et al., ICLR 2024); "hardswish" is piecewise quadratic (Howard et al., ICCV 2019). Ranges are
    dropped, since they are those of the old functions: quantize afterwards. `epochs=0` leaves the healing to what
    follows.
    """

    kind: Activation = "relu"
    epochs: float = 3.0
    learning_rate: float = 1e-4
    temperature: float = 2.0
    hard: float = 0.1
    token_dropout: float = 0.1
    splice: float = 0.0

    def __post_init__(self) -> None:
        if self.kind not in get_args(Activation):
            raise OptionError(f"unknown activation {self.kind!r}; use one of {', '.join(get_args(Activation))}.")

    def __call__(self, model: Model, run: Run, plan: Plan) -> Model:
        student = model.with_network(model.copy().network)
        network = transformer(student, "SwapActivation")
        for name in activating(network):
            network.replace(name, Activate(self.kind))
        loss = SoftTargets(model.task, (model,), self.temperature, self.hard)
        if not self.epochs:
            return student
        return heal(student, loss, run, planned(plan, self), f"swap activations for {self.kind}")


def activating(network: Transformer) -> list[str]:
    """Names of the activation functions inside the layers. Raises ModelError where there is none that is known."""
    inside = f"{network.stack}."
    found = [name for name, m in network.named_modules() if name.startswith(inside) and isinstance(m, _KINDS)]
    outer = [name for name in found if not any(name.startswith(f"{other}.") for other in found)]
    if not outer:
        raise ModelError(f"the layers of {network.config.model_type} hold no activation function that is known.")
    return outer
