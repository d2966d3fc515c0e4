"""What every technique is."""

from __future__ import annotations

from dataclasses import fields, is_dataclass, replace
from typing import Any, Protocol

from netweight.errors import ModelError
from netweight.model import Model
from netweight.network import Transformer
from netweight.run import Run
from netweight.train import Plan


class Technique(Protocol):
    """A frozen dataclass of options that returns a new model and leaves the given one as it was."""

    def __call__(self, model: Model, run: Run, plan: Plan) -> Model: ...


Recipe = tuple[Technique, ...]

# Options of a plan that a technique may have of its own: each that has one by this name means its fit.
_OWN = ("epochs", "learning_rate", "batch_size", "token_dropout", "splice")


def planned(plan: Plan, technique: Technique) -> Plan:
    """The plan with the technique's own options in the place of the plan's."""
    return replace(plan, **{name: getattr(technique, name) for name in _OWN if hasattr(technique, name)})


def describe(recipe: Recipe) -> list[dict[str, Any]]:
    """A recipe as plain values: class name and options of each step; a model among them by its digest."""
    return [_plain(step) for step in recipe]


def _plain(option: Any) -> Any:
    """An option as plain values: a model by its digest, a technique described."""
    if isinstance(option, tuple):
        return tuple(map(_plain, option))
    if isinstance(option, Model):
        return option.digest
    if not is_dataclass(option):
        return option
    return {"technique": type(option).__name__, **{f.name: _plain(getattr(option, f.name)) for f in fields(option)}}


def transformer(model: Model, who: str) -> Transformer:
    """The model's network, or a ModelError that says why `who` cannot work on it."""
    if not isinstance(model.network, Transformer):
        raise ModelError(f"{who} works on a transformer; this model's network is {type(model.network).__name__}.")
    return model.network
