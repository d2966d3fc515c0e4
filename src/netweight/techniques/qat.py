"""Quantization-aware training: the network is trained with its rounding in place.

Rounding as in Jacob et al. (CVPR 2018), with gradients straight through it (Bengio et al., 2013); learned scales as in
LSQ (Esser et al., ICLR 2020). What is learned goes through the same lowering as what is calibrated.
"""

from __future__ import annotations

import copy
from dataclasses import dataclass, replace
from typing import Literal, cast

import torch
import torch.nn.functional as F
from torch import Tensor, nn

from netweight.errors import OptionError
from netweight.layers import put
from netweight.loss import SoftTargets
from netweight.model import Model, Range, Weights
from netweight.network import Transformer
from netweight.quantizer import affine, by_token, fake, grid, grouped, learned, limits, rounded, symmetric, ungrouped
from netweight.run import Run
from netweight.techniques.base import Technique, planned, transformer
from netweight.techniques.distill import heal
from netweight.techniques.quantize import OUT, Quantize, linears, tables
from netweight.train import Plan

_LEAST = 0.05  # of its first value: what a learned scale may shrink to


@dataclass(frozen=True)
class QuantizeAware:
    """Start from what `start` makes of the model, and train the rounded network to say what the unrounded one says.

    `ranges` "learned" trains the scales of inputs and weights with the weights; "fixed" holds those of `start` (scales
    of groups, and those with zero points, follow the weights). Token tables stay frozen; where `start` gives them bits,
    the layers behind them are trained on what rounding leaves of them. In bf16, which a plan takes where it is fast,
    products are rounded once more than an engine will: to 8 significant bits, up to a quarter of an int8 step (RMS).
    """

    start: Technique = Quantize(weight_bits=4, weight_clip="mse")  # noqa: RUF009 (it is frozen)
    ranges: Literal["learned", "fixed"] = "learned"
    epochs: float = 3.0
    learning_rate: float = 1e-4
    temperature: float = 2.0
    hard: float = 0.1
    token_dropout: float = 0.1
    splice: float = 0.0

    def __post_init__(self) -> None:
        if self.ranges not in ("learned", "fixed"):
            raise OptionError(f"unknown ranges {self.ranges!r} of QuantizeAware; use learned or fixed.")

    def __call__(self, model: Model, run: Run, plan: Plan) -> Model:
        transformer(model, "QuantizeAware")
        loss = SoftTargets(model.task, (model,), self.temperature, self.hard)
        start = self.start(model, run, plan)
        if not (start.ranges or start.weights):
            raise OptionError(f"{type(self.start).__name__} quantizes nothing; start from Quantize or MixedBits.")
        student = model.with_network(faked(start, self.ranges == "learned"))
        return unfaked(heal(student, loss, run, planned(plan, self), "quantization-aware training"), start)


def faked(model: Model, learn: bool) -> Transformer:
    """A copy of a quantized model's network whose layers round as its engine will, and let gradients through.

    Attention's shares, which an engine rounds to 1 / 255, are not rounded. Raises OptionError where `learn` asks for
    scales that no gradient is known of.
    """
    network = copy.deepcopy(transformer(model, "QuantizeAware"))
    for name, linear in linears(network).items():
        if name in model.ranges or name in model.weights:
            spec = model.weights.get(name, Weights())
            if learn and not _has_steps(spec):
                raise OptionError(
                    "scales are learned of symmetric weights only, with granularity 'channel' or 'tensor'; for "
                    "groups or zero points use ranges='fixed'."
                )
            put(network, name, FakeLinear(linear, model.ranges.get(name), model.ranges.get(name + OUT), spec, learn))
    for name, table in tables(network).items():
        if name in model.weights:
            table.weight.data = fake(table.weight, model.weights[name])
    return network


def unfaked(model: Model, start: Model) -> Model:
    """Plain layers again; what was learned of ranges and scales is noted on the model."""
    network = copy.deepcopy(transformer(model, "QuantizeAware"))
    ranges, weights = dict(start.ranges), dict(start.weights)
    for name, module in list(network.named_modules()):
        if not isinstance(module, FakeLinear):
            continue
        if module.steps is not None:
            weights[name] = replace(module.spec, steps=tuple(module.steps.scale().flatten().tolist()))
        for point, rounding in ((name, module.given), (name + OUT, module.out)):
            if isinstance(rounding, Rounding) and rounding.learn:
                learned_range = rounding.range()
                ranges[point] = replace(ranges[point], low=learned_range.low, high=learned_range.high)
        put(network, name, module.plain())
    whole = tables(transformer(start, "QuantizeAware"))
    for name, table in tables(network).items():
        table.weight.data = whole[name].weight.detach().clone()
    return replace(model, network=network, ranges=ranges, weights=weights)


def _has_steps(spec: Weights) -> bool:
    return spec.symmetric and spec.granularity != "group"


class Step(nn.Module):
    """A scale that can be learned, as a ratio to its first value: Adam's steps, which are of one size for all
    parameters, are then of one size relative to each scale. Shape (rows,) or (1,)."""

    def __init__(self, first: Tensor, learn: bool) -> None:
        super().__init__()
        self.register_buffer("first", first.detach().float().flatten())
        self.ratio = nn.Parameter(torch.ones(first.numel()), requires_grad=learn)

    def scale(self) -> Tensor:
        """The scale as it is now."""
        return cast(Tensor, self.first) * self.ratio.clamp(min=_LEAST)


class Rounding(nn.Module):
    """Rounds a layer's input to unsigned integers, or its output (`signed`) to integers around zero."""

    def __init__(self, given: Range, signed: bool, learn: bool) -> None:
        super().__init__()
        scale, zero = (symmetric(given), 0) if signed else affine(given)
        self.signed, self.bits, self.learn = signed, given.bits, learn
        self.ends = limits(given.bits) if signed else (0, 2**given.bits - 1)
        self.step = Step(torch.tensor([scale]), learn)
        # In the state, so that fits that differ in bits only are not taken for the same.
        self.register_buffer("zero", torch.tensor([float(zero)]))
        self.register_buffer("top", torch.tensor([float(self.ends[1])]))

    def forward(self, x: Tensor) -> Tensor:
        return learned(x.float(), self.step.scale(), cast(Tensor, self.zero), self.ends, x.shape[-1])

    def range(self) -> Range:
        """The range from which a lowered layer gets this scale and zero point."""
        scale, zero = float(self.step.scale().detach()), float(cast(Tensor, self.zero))
        top = self.ends[1]
        return Range(-top * scale if self.signed else -zero * scale, (top - zero) * scale, self.bits)


class FakeLinear(nn.Linear):
    """A linear layer that rounds its inputs, weights and, where it has a range, outputs."""

    def __init__(
        self, linear: nn.Linear, given: Range | None, out: Range | None, spec: Weights, learn: bool = False
    ) -> None:
        # On "meta" nothing is drawn from the random state.
        super().__init__(linear.in_features, linear.out_features, linear.bias is not None, device="meta")
        self.weight, self.bias = linear.weight, linear.bias
        self.spec = spec
        self.given = None if given is None else Rounding(given, False, learn)
        self.out = None if out is None else Rounding(out, True, learn)
        scale = torch.tensor(given.scale) if given is not None and given.scale else None
        self.register_buffer("scale", scale)
        self.steps = Step(grid(self.scaled_weight(), spec)[0], learn) if _has_steps(spec) else None

    def scaled_weight(self) -> Tensor:
        """The weights, times what the inputs are divided by."""
        return self.weight if self.scale is None else self.weight * cast(Tensor, self.scale)

    def rounded_weight(self) -> Tensor:
        """The weights as an engine has them; their scale is the step, or follows from the weights as they are now."""
        weight = self.scaled_weight()
        rows = grouped(weight, self.spec)
        if self.steps is None:
            scale, zero = grid(weight, self.spec)
        else:
            scale = self.steps.scale()[:, None]
            zero = torch.zeros_like(scale)
        held = learned(rows, scale, zero, limits(self.spec.bits), rows.shape[1])
        return ungrouped(held, self.weight.shape) if self.spec.granularity == "group" else held.view_as(self.weight)

    def forward(self, x: Tensor) -> Tensor:
        x = x if self.scale is None else x / cast(Tensor, self.scale)
        x = x if self.given is None else self.given(x)
        if self.spec.dynamic:
            # Nothing is clipped: the largest value is what the scale is made of.
            x = x + (rounded(x, by_token(x), 0.0, *limits(8)) - x).detach()
        y = F.linear(x, self.rounded_weight(), self.bias)
        return y if self.out is None else cast(Tensor, self.out(y))

    def plain(self) -> nn.Linear:
        """The layer without rounding."""
        linear = nn.Linear(self.in_features, self.out_features, self.bias is not None, device="meta")
        linear.weight, linear.bias = self.weight, self.bias
        return linear
