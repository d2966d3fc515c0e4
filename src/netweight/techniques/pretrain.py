"""Pretraining on a shop's own texts, labelled or not, before the head is trained.

Going on with a language model's own objective on the texts of the domain is "don't stop pretraining" (Gururangan et
al., ACL 2020); from random weights it is the first half of BERT.
"""

from __future__ import annotations

import copy
from dataclasses import dataclass, replace
from typing import Literal, get_args

from netweight.errors import OptionError
from netweight.loss import Loss
from netweight.model import Model
from netweight.network import Transformer
from netweight.objectives import CausalLM, Contrastive, MaskedLM, drops_out
from netweight.run import Run
from netweight.techniques.base import planned, transformer
from netweight.train import Plan

Objective = Literal["masked", "causal", "contrastive"]

_MASKS = ("[MASK]", "<mask>")


@dataclass(frozen=True)
class Pretrain:
    """Train the backbone on the texts of train and pool; labels are not used, and the head stays as it is.

    `objective`: "masked" hides the share `share` (0.15) of the tokens and asks for them (encoders); "causal" asks for
    the next token (GPT-2, Qwen3); "contrastive" draws two views of a text under dropout together and pushes all others
    away, at `temperature` (0.05). A plan's `patience` does not count here: the quality on select is that of a head that
    is not trained.
    """

    objective: Objective = "masked"
    epochs: float = 3.0
    learning_rate: float = 1e-4
    share: float | None = None
    temperature: float | None = None

    def __post_init__(self) -> None:
        if self.objective not in get_args(Objective):
            raise OptionError(f"unknown objective {self.objective!r}; use {', '.join(get_args(Objective))}.")
        if self.share is not None and self.objective != "masked":
            raise OptionError(f"share is for objective 'masked'; with {self.objective!r} no token is hidden.")
        if self.share is not None and not 0 < self.share < 1:
            raise OptionError(f"share is {self.share}; hide more than 0 and less than 1 of the tokens (0.15 is usual).")
        if self.temperature is not None and self.objective != "contrastive":
            raise OptionError(f"temperature is for objective 'contrastive', not for {self.objective!r}.")
        if self.temperature is not None and not self.temperature > 0:
            raise OptionError(f"temperature is {self.temperature}; use a number above 0 (0.05 is usual).")

    def __call__(self, model: Model, run: Run, plan: Plan) -> Model:
        network = copy.deepcopy(transformer(model, "Pretrain"))
        loss = self._loss(model, network)
        network.head.requires_grad_(False)
        plan = replace(planned(plan, self), patience=None)
        new = run.fit(model.with_network(network), loss, plan, f"pretrain ({self.objective})")
        transformer(new, "Pretrain").head.requires_grad_(True)
        return new

    def _loss(self, model: Model, network: Transformer) -> Loss:
        kind = network.config.model_type
        if self.objective == "contrastive":
            if not drops_out(network):
                raise OptionError(
                    f"contrastive pretraining compares views of a text under dropout, and this {kind} has none; "
                    "set a dropout in its configuration, or use another objective."
                )
            return Contrastive(0.05 if self.temperature is None else self.temperature)
        if network.causal != (self.objective == "causal"):
            why = "its tokens see only what is before them" if network.causal else "its tokens see what comes next"
            other = "causal" if network.causal else "masked"
            raise OptionError(f"{self.objective} language modelling does not suit {kind}: {why}; use {other!r}.")
        if self.objective == "causal":
            return CausalLM()
        mask, specials = special_ids(model)
        return MaskedLM(mask, specials, model.encoder.vocabulary, 0.15 if self.share is None else self.share)


def special_ids(model: Model) -> tuple[int, tuple[int, ...]]:
    """The id of the mask token, and those of all tokens that stand for no text. Raises OptionError without a mask."""
    names = model.encoder.tokens()
    mask = next((names.index(name) for name in _MASKS if name in names), None)
    if mask is None:
        raise OptionError(
            f"masked language modelling needs a mask token, and this tokenizer has none of {', '.join(_MASKS)}; "
            "use objective 'contrastive', or a model whose tokenizer has one."
        )
    return mask, tuple(sorted({mask, model.encoder.pad, *model.encoder.specials}))
