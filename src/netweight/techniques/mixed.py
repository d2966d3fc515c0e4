"""Mixed bit-widths: many bits for the layers that need them, few for the rest, within a size.

How much a layer matters is measured by rounding it alone; that the harms of several layers add up is the assumption of
HAWQ (Dong et al., ICCV 2019) and HAWQ-V3 (Yao et al., ICML 2021), whose choice by integer programming this repeats.
"""

from __future__ import annotations

from collections.abc import Sequence
from dataclasses import dataclass, replace
from typing import Literal

import torch
from torch import Tensor
from torch.func import functional_call

from netweight.errors import OptionError, within
from netweight.loss import Batch, matching
from netweight.model import Model, Weights
from netweight.network import Network
from netweight.quantizer import fake, held_bytes
from netweight.run import Run
from netweight.task import Task
from netweight.techniques.base import transformer
from netweight.techniques.quantize import Quantize, linears
from netweight.train import Plan

_UNITS = 2**14  # steps in which sizes are counted: the choice is exact up to a step a layer


@dataclass(frozen=True)
class MixedBits:
    """Give each linear layer one of `choices` bits a weight, so that the outputs change least within a size. BERT's
    pooler, which nothing reads, has none to give.

    The size is `mean_bits` a weight, or `budget` bytes for all linear layers' weights and scales as stored. The change
    is the KL divergence of the outputs (the squared difference for scores) over `rows` rows when one layer alone is
    rounded. `quantize` says all the rest.
    """

    mean_bits: float | None = None
    budget: int | None = None
    choices: tuple[int, ...] = (2, 3, 4, 6, 8)
    rows: int = 64
    quantize: Quantize = Quantize(weight_clip="mse")  # noqa: RUF009 (it is frozen)

    def __post_init__(self) -> None:
        if (self.mean_bits is None) == (self.budget is None):
            raise OptionError("MixedBits needs mean_bits or budget, and not both.")
        if not self.choices or not all(2 <= bits <= 8 for bits in self.choices):
            raise OptionError(f"choices of MixedBits are {self.choices}; use some of 2 to 8.")
        within(self, "MixedBits", {"rows": (self.rows >= 1, "1 or more")})
        if self.quantize.weight_bits != Quantize.weight_bits:
            raise OptionError("weight_bits are what MixedBits chooses; leave them out of its quantize.")
        if self.quantize.rounding != "nearest":
            raise OptionError(
                "rounding 'gptq' needs the bits of each layer, which MixedBits chooses only afterwards; use 'nearest'."
            )

    def __call__(self, model: Model, run: Run, plan: Plan) -> Model:
        # Nothing reads BERT's pooler: it would harm nothing in the fewest bits, and lend the rest to the others.
        found = linears(transformer(model, "MixedBits"))
        layers = {name: layer for name, layer in found.items() if not name.startswith("backbone.pooler.")}
        made = self.quantize(model, run, plan)
        specs = [
            (name, tuple(replace(made.weights.get(name, Weights()), bits=bits) for bits in self.choices))
            for name in layers
        ]
        scales = tuple((name, made.ranges[name].scale) for name in layers if name in made.ranges)
        harm = run.reduce(model, Sensitivity(model.task, tuple(specs), scales), self.rows)
        sizes = [[held_bytes(layers[name].weight.shape, spec) for spec in each] for name, each in specs]
        harms = [[float(harm[f"{name}/{spec.bits}"]) for spec in each] for name, each in specs]
        budget = self.budget
        if self.mean_bits is not None:
            budget = sum(
                held_bytes(layers[name].weight.shape, each[0])
                + round(layers[name].weight.numel() * (self.mean_bits - each[0].bits) / 8)
                for name, each in specs
            )
        chosen = least_harm(sizes, harms, budget or 0)
        return replace(
            made, weights={**made.weights, **{n: each[i] for (n, each), i in zip(specs, chosen, strict=True)}}
        )


@dataclass(frozen=True)
class Sensitivity:
    """The sum over rows of how far the outputs move when one layer alone is rounded, for each layer and spec.

    `scales`: what the weights of a layer are multiplied by, channel by channel of its inputs, before they are rounded.
    """

    task: Task
    specs: tuple[tuple[str, tuple[Weights, ...]], ...]
    scales: tuple[tuple[str, tuple[float, ...]], ...] = ()
    combine: Literal["sum", "max"] = "sum"

    def __call__(self, network: Network, batch: Batch) -> dict[str, Tensor]:
        given = (batch.ids, batch.mask, batch.types)
        # In double, for harms that fp32 would round away.
        wanted, found, scales = network(*given).double(), {}, dict(self.scales)
        for name, each in self.specs:
            weight = network.get_parameter(f"{name}.weight")
            scale = torch.tensor(scales.get(name) or (1.0,), device=weight.device)
            for spec in each:
                moved = {f"{name}.weight": fake(weight * scale, spec) / scale}
                got: Tensor = functional_call(network, moved, given)
                mean = matching(self.task, got.double(), wanted, batch.weight, 1.0)
                found[f"{name}/{spec.bits}"] = (mean * batch.weight.sum()).double()
        return found


def least_harm(sizes: Sequence[Sequence[int]], harms: Sequence[Sequence[float]], budget: int) -> list[int]:
    """One choice for each layer with the least sum of harms whose sizes add up to no more than the budget.

    A knapsack with one item of each class, solved by dynamic programming over the sums that no other beats in both.
    Raises OptionError where even the smallest choices are too large.
    """
    least = sum(min(size) for size in sizes)
    left = budget - least
    if left < 0:
        raise OptionError(
            f"{budget} bytes are less than the {least} of the fewest bits; raise the budget or add choices."
        )
    # Counted is what a choice takes beyond the smallest, so that a budget for just these is enough for them.
    unit = max(1, left // _UNITS)
    front: list[tuple[int, float, tuple[int, ...]]] = [(0, 0.0, ())]
    for size, harm in zip(sizes, harms, strict=True):
        more = [-(-(s - min(size)) // unit) for s in size]
        grown = sorted(
            (at + m, total + h, (*chosen, i))
            for at, total, chosen in front
            for i, (m, h) in enumerate(zip(more, harm, strict=True))
            if at + m <= left // unit
        )
        front = []
        for one in grown:
            if not front or one[1] < front[-1][1]:
                front.append(one)
    return list(front[-1][2])
