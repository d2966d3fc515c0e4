"""int8 and less: ranges of every linear layer's input, from a pass or two over some rows; weights in few bits.

Affine quantization as in Jacob et al. (CVPR 2018): activations per tensor and asymmetric, weights, unless asked
otherwise, per output channel and symmetric. Ranges and specs are kept on the model; `export` lowers them to forms whose
result does not depend on the batch a row happens to be in.
"""

from __future__ import annotations

import copy
from collections.abc import Callable, Mapping
from contextlib import ExitStack
from dataclasses import dataclass, replace
from typing import Literal, get_args

import torch
from torch import Tensor, nn

from netweight.anatomy import blocks
from netweight.errors import ModelError, OptionError, within
from netweight.loss import Batch
from netweight.model import Model, Range, Weights
from netweight.network import Network, Transformer
from netweight.quantizer import GROUPS, entropy_range, grid, mse_range, percentile_range, settled
from netweight.run import Run
from netweight.techniques.base import transformer
from netweight.techniques.factor import SecondMoments
from netweight.train import Plan

_BINS = 2048
_CHOICES = {
    "granularity": ("channel", "tensor", "group"),
    "weight_clip": ("minmax", "mse"),
    "rounding": ("nearest", "gptq"),
}

# Of the mean over channels: what a channel's largest value is taken to be at least.
_QUIET = 0.01

# Ranges of a layer's output bear its name and this.
OUT = "/out"

# What attention multiplies with each other comes straight from these layers. Families that rotate queries and keys
# in between (q_proj, k_proj) are left alone: there, rounding the layer's output would make no product one of integers.
_FACTORS = ("query", "key", "value", "q_lin", "k_lin", "v_lin")


Method = Literal["minmax", "percentile", "mse", "entropy"]


@dataclass(frozen=True)
class Quantize:
    """Round every linear layer of a transformer, and its token tables, to few bits; calibrated on `rows` rows.

    `method` finds the range of a layer's input: "minmax" takes the extremes, "percentile" cuts `1 - percentile` of the
    values off at each end, "mse" takes the range with the least squared error, "entropy" the one with the least KL
    divergence (Migacz, GTC 2017). `activations` "dynamic" calibrates nothing: each token's inputs are rounded by their
    own largest value; "mixed" does so where single tokens stand out, at what the activation function of a feed-forward
    network gives, and calibrates the rest; "none" rounds weights only.

    `smooth` moves outliers of channels from the inputs of attention and of feed-forward networks into their weights
    (SmoothQuant, Xiao et al., ICML 2023, with alpha = `smooth`; 0 moves none), which is exact but for rounding.

    `weight_bits` of each weight, 2 to 8; what shares a scale is an output channel, the tensor, or a `group` of inputs
    (with activations "none", since no integer kernel has groups). `weight_clip` "mse" looks for the scale with the
    least squared error. `rounding` "gptq" rounds weights so that each layer's outputs on those rows change little,
    instead of each to what is nearest (`netweight.quantizer.settled`); for symmetric weights without groups.
    """

    method: Method = "percentile"
    percentile: float = 0.99999
    rows: int = 300
    weight_bits: int = 8
    granularity: Literal["channel", "tensor", "group"] = "channel"
    group: int | None = None
    symmetric: bool = True
    weight_clip: Literal["minmax", "mse"] = "minmax"
    rounding: Literal["nearest", "gptq"] = "nearest"
    activations: Literal["static", "mixed", "dynamic", "none"] = "static"
    activation_bits: int = 8
    table_bits: int = 8
    smooth: float = 0.5

    def __post_init__(self) -> None:
        for name, allowed in _CHOICES.items():
            if getattr(self, name) not in allowed:
                raise OptionError(f"unknown {name} {getattr(self, name)!r} of Quantize; use {' or '.join(allowed)}.")
        if self.method not in get_args(Method):
            raise OptionError(f"unknown calibration {self.method!r}; use {', '.join(get_args(Method))}.")
        if self.activations not in ("static", "mixed", "dynamic", "none"):
            raise OptionError(f"unknown activations {self.activations!r}; use static, mixed, dynamic or none.")
        for name in ("weight_bits", "activation_bits", "table_bits"):
            if not 2 <= getattr(self, name) <= 8:
                raise OptionError(f"{name} of Quantize is {getattr(self, name)}; use 2 to 8.")
        checks = {
            "smooth": (0 <= self.smooth < 1, "0 to less than 1"),
            "percentile": (0.5 < self.percentile <= 1, "a share of values, more than 0.5 and at most 1"),
            "rows": (self.rows >= 1, "1 or more"),
        }
        within(self, "Quantize", checks)
        if (self.granularity == "group") != (self.group is not None):
            raise OptionError(
                f"granularity {self.granularity!r} does not go with group {self.group}; give granularity='group' and a "
                "group size together, or neither."
            )
        if self.group is not None and self.group not in GROUPS:
            raise OptionError(f"a group of {self.group} inputs has no kernel; use {', '.join(map(str, GROUPS))}.")
        if self.rounding == "gptq" and (self.granularity == "group" or not self.symmetric):
            raise OptionError("rounding 'gptq' is for symmetric weights, per channel or tensor; use 'nearest'.")
        self._check_activations()

    def _check_activations(self) -> None:
        if self.activations != "none" and self.granularity == "group":
            raise OptionError("no integer kernel has groups; use granularity 'channel', or activations 'none'.")
        if self.activations in ("mixed", "dynamic") and not self.symmetric:
            raise OptionError(
                f"with {self.activations} activations weights have no zero points; leave symmetric as it is."
            )
        if self.calibrated:
            if self.method != "percentile" and self.percentile != Quantize.percentile:
                raise OptionError(f"percentile does not apply to calibration {self.method!r}; leave it out.")
            return
        rows = () if self.rounding == "gptq" else ("rows",)
        for name in ("method", "percentile", "activation_bits", "smooth", *rows):
            if getattr(self, name) != getattr(Quantize, name):
                raise OptionError(f"{name} does not apply to activations {self.activations!r}; leave it out.")

    def __call__(self, model: Model, run: Run, plan: Plan) -> Model:
        network = transformer(model, "Quantize")
        weights = self.specs(network)
        ranges = self._ranges(model, run, weights) if self.calibrated else {}
        made = replace(model, ranges=ranges, weights=weights)
        return made if self.rounding == "nearest" else self._settled(made, run)

    def _settled(self, model: Model, run: Run) -> Model:
        """The model with every layer's weights on their grid, which their specs hold from now on."""
        network = copy.deepcopy(model.network)
        layers, weights = linears(network), dict(model.weights)
        moments = run.reduce(replace(model, ranges={}, weights={}), SecondMoments(tuple(layers)), self.rows)
        for name, layer in layers.items():
            spec, given = weights.get(name, Weights()), model.ranges.get(name)
            divided = torch.tensor(given.scale) if given is not None and given.scale else torch.ones(layer.in_features)
            weight = layer.weight.detach() * divided
            scale, _ = grid(weight, spec)
            seen = moments[name].cpu() / torch.outer(divided, divided)
            layer.weight.data = settled(weight, scale, spec.bits, seen) / divided
            weights[name] = replace(spec, steps=tuple(scale.flatten().tolist()))
        return replace(model, network=network, weights=weights)

    @property
    def calibrated(self) -> bool:
        """Whether any layer's range is taken from rows."""
        return self.activations in ("static", "mixed")

    def specs(self, network: Transformer) -> dict[str, Weights]:
        """What is noted of each layer's weights; nothing for what a range alone implies."""
        spec = Weights(self.weight_bits, self.granularity, self.group or 0, self.symmetric, self.weight_clip)
        layers, by_token = linears(network), self._by_token(network)
        found = {} if self.calibrated and spec == Weights() else dict.fromkeys(layers, spec)
        found |= dict.fromkeys((name for name in layers if name in by_token), replace(spec, dynamic=True))
        if self.table_bits < 8:
            table = Weights(self.table_bits, clip=self.weight_clip)
            found |= dict.fromkeys(tables(network), table)
        return found

    def _by_token(self, network: Transformer) -> set[str]:
        """Layers whose inputs are rounded token by token."""
        if self.activations == "dynamic":
            return set(linears(network))
        if self.activations != "mixed":
            return set()
        # A factored layer is two, of which the first reads the inputs.
        return {part for block in blocks(network) for part in (block.down, f"{block.down}.down")}

    def _ranges(self, model: Model, run: Run, weights: Mapping[str, Weights]) -> dict[str, Range]:
        names = points(model.network)
        found = run.reduce(model, Extremes(), self.rows)
        largest = {name: torch.maximum(found[f"{name}/low"], found[f"{name}/high"]) for name in names}
        scales = self._scales(model, largest)
        extremes = {key: (x / scales.get(key.rpartition("/")[0], 1.0)).max() for key, x in found.items()}
        ends = {name: (-float(extremes[f"{name}/low"]), float(extremes[f"{name}/high"])) for name in names}
        if self.method == "entropy":
            ends = {name: (-max(-low, high), max(-low, high)) for name, (low, high) in ends.items()}
        held = {name: tuple(scale.tolist()) for name, scale in scales.items()}
        if self.method != "minmax":
            counts = run.reduce(model, Histogram(tuple(ends.items()), tuple(held.items())), self.rows)
            # A constant input has no histogram: its extremes stay.
            clipped = ends | {name: self._clipped(found, name, *ends[name]) for name, found in counts.items()}
            if self.method == "entropy":
                # The threshold is one of |x|; values of one sign need no room for the other.
                clipped = {
                    name: (max(low, -float(extremes[f"{name}/low"])), min(high, float(extremes[f"{name}/high"])))
                    for name, (low, high) in clipped.items()
                }
            ends = clipped
        bits = self.activation_bits
        return {
            name: Range(min(low, 0.0), max(high, 0.0), bits, held.get(name, ()))
            for name, (low, high) in ends.items()
            if not weights.get(name, Weights()).dynamic
        }

    def _scales(self, model: Model, largest: Mapping[str, Tensor]) -> dict[str, Tensor]:
        """What the channels of inputs are divided by: max|x|^smooth / max|w|^(1 - smooth), with a geometric mean of 1;
        `largest` is max|x|. Layers that read the same share theirs.

        Inputs of `down` and `out` have none: what an activation function gives has its outliers in single tokens.
        """
        try:
            found = blocks(transformer(model, "Quantize")) if self.smooth else []
        except ModelError as why:
            if self.smooth != Quantize.smooth:
                raise OptionError(f"smooth={self.smooth} is for layers that are known; leave it out. {why}") from None
            return {}
        layers = linears(model.network)
        scales: dict[str, Tensor] = {}
        for names in (names for block in found for names in (block.qkv, block.up)):
            read = [name if name in layers else f"{name}.down" for name in names]
            x = largest[read[0]]
            w = torch.stack([layers[name].weight.detach().abs().amax(dim=0) for name in read]).amax(dim=0)
            # Who is silent in these rows need not be so in others.
            x, w = (v.clamp(min=_QUIET * float(v.mean()) or 1.0) for v in (x, w))
            scale = x**self.smooth / w ** (1 - self.smooth)
            scales |= dict.fromkeys(read, scale / scale.log().mean().exp())
        return scales

    def _clipped(self, counts: Tensor, name: str, low: float, high: float) -> tuple[float, float]:
        if self.method == "percentile":
            return percentile_range(counts, low, high, self.percentile)
        if self.method == "mse":
            return mse_range(counts, low, high, self.activation_bits, around_zero=name.endswith(OUT))
        return entropy_range(counts, low, high, self.activation_bits)


def linears(network: nn.Module) -> dict[str, nn.Linear]:
    """Every linear layer of the backbone by name; the head stays in fp32 (it decides, and costs next to nothing)."""
    return {n: m for n, m in network.named_modules() if isinstance(m, nn.Linear) and n.startswith("backbone.")}


def tables(network: nn.Module) -> dict[str, nn.Embedding]:
    """Every table of vectors by name: of tokens, positions and types."""
    return {n: m for n, m in network.named_modules() if isinstance(m, nn.Embedding)}


@dataclass(frozen=True)
class Extremes:
    """Largest value, and largest negated value, of each channel at each point over unmasked tokens."""

    combine: Literal["sum", "max"] = "max"

    def __call__(self, network: Network, batch: Batch) -> dict[str, Tensor]:
        found: dict[str, Tensor] = {}
        for name, x in values_at(network, batch).items():
            found[f"{name}/low"], found[f"{name}/high"] = -x.amin(dim=0), x.amax(dim=0)
        return found


@dataclass(frozen=True)
class Histogram:
    """Counts of the values at each point, channels divided by their `scales`, in equal bins between known extremes."""

    ranges: tuple[tuple[str, tuple[float, float]], ...]
    scales: tuple[tuple[str, tuple[float, ...]], ...] = ()
    combine: Literal["sum", "max"] = "sum"

    def __call__(self, network: Network, batch: Batch) -> dict[str, Tensor]:
        seen = values_at(network, batch)
        seen |= {name: seen[name] / torch.tensor(scale, device=batch.ids.device) for name, scale in self.scales}
        return {
            name: torch.histc(seen[name], _BINS, low, high).double() for name, (low, high) in self.ranges if high > low
        }


def points(network: nn.Module) -> list[str]:
    """Where ranges are taken: the input of every linear layer, and the output of those that attention multiplies."""
    names = list(linears(network))
    return names + [name + OUT for name in names if name.removesuffix(".up").rpartition(".")[2] in _FACTORS]


def values_at(network: Network, batch: Batch) -> dict[str, Tensor]:
    """The values (tokens, channels) at every point at the batch's real tokens."""
    seen: dict[str, Tensor] = {}
    wanted = set(points(network))
    real = batch.mask > 0

    def hook(name: str) -> Callable[[nn.Module, tuple[Tensor, ...], Tensor], None]:
        def keep(_: nn.Module, args: tuple[Tensor, ...], out: Tensor) -> None:
            for point, x in ((name, args[0]), (name + OUT, out)):
                if point in wanted:
                    seen[point] = (x[real] if x.shape[:2] == real.shape else x).detach().float()

        return keep

    with ExitStack() as hooks:
        for name, linear in linears(network).items():
            hooks.enter_context(linear.register_forward_hook(hook(name)))
        network(batch.ids, batch.mask, batch.types)
    return seen
