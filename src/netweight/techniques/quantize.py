"""Static int8: ranges of every linear layer's input, from one pass over some rows.

Affine quantization as in Jacob et al. (CVPR 2018): activations per tensor and asymmetric, weights per output
channel and symmetric. The ranges are kept on the model; `export` lowers them to QuantizeLinear and
DequantizeLinear, whose result does not depend on the batch a row happens to be in.
"""

from __future__ import annotations

from collections.abc import Callable
from dataclasses import dataclass, replace
from typing import Literal

import torch
from torch import Tensor, nn

from netweight.errors import OptionError
from netweight.loss import Batch
from netweight.model import Model, Range
from netweight.network import Network
from netweight.run import Run
from netweight.techniques.base import transformer
from netweight.train import Plan

_BINS = 2048

# Ranges of a layer's output bear its name and this.
OUT = "/out"

# What attention multiplies with each other comes straight from these layers. Families that rotate queries and keys
# in between (q_proj, k_proj) are left alone: there, rounding the layer's output would make no product one of integers.
_FACTORS = ("query", "key", "value", "q_lin", "k_lin", "v_lin")


@dataclass(frozen=True)
class Quantize:
    """Calibrate every linear layer of a transformer on `rows` training rows.

    `method`: "minmax" takes the extremes, "percentile" cuts `1 - percentile` of the values off at each end.
    """

    method: Literal["minmax", "percentile"] = "percentile"
    percentile: float = 0.99999
    rows: int = 300

    def __call__(self, model: Model, run: Run, plan: Plan) -> Model:
        network = transformer(model, "Quantize")
        if self.method not in ("minmax", "percentile"):
            raise OptionError(f"unknown calibration {self.method!r}; use minmax or percentile.")
        extremes = run.reduce(model, Extremes(), self.rows)
        ranges = {name: (-float(extremes[f"{name}/low"]), float(extremes[f"{name}/high"])) for name in points(network)}
        if self.method == "percentile":
            counts = run.reduce(model, Histogram(tuple(ranges.items())), self.rows)
            ranges = {name: trimmed(counts[name], *ends, self.percentile) for name, ends in ranges.items()}
        return replace(
            model, ranges={name: Range(min(low, 0.0), max(high, 0.0)) for name, (low, high) in ranges.items()}
        )


def linears(network: nn.Module) -> dict[str, nn.Linear]:
    """Every linear layer of the backbone by name; the head stays in fp32 (it decides, and costs next to nothing)."""
    return {n: m for n, m in network.named_modules() if isinstance(m, nn.Linear) and n.startswith("backbone.")}


@dataclass(frozen=True)
class Extremes:
    """Largest value, and largest negated value, at each point over unmasked tokens."""

    combine: Literal["sum", "max"] = "max"

    def __call__(self, network: Network, batch: Batch) -> dict[str, Tensor]:
        found: dict[str, Tensor] = {}
        for name, x in values_at(network, batch).items():
            found[f"{name}/low"], found[f"{name}/high"] = -x.min(), x.max()
        return found


@dataclass(frozen=True)
class Histogram:
    """Counts of the values at each point in equal bins between known extremes."""

    ranges: tuple[tuple[str, tuple[float, float]], ...]
    combine: Literal["sum", "max"] = "sum"

    def __call__(self, network: Network, batch: Batch) -> dict[str, Tensor]:
        seen = values_at(network, batch)
        return {
            name: torch.histc(seen[name], _BINS, low, high).double() for name, (low, high) in self.ranges if high > low
        }


def points(network: nn.Module) -> list[str]:
    """Where ranges are taken: the input of every linear layer, and the output of those that attention multiplies."""
    names = list(linears(network))
    return names + [name + OUT for name in names if name.removesuffix(".up").rpartition(".")[2] in _FACTORS]


def values_at(network: Network, batch: Batch) -> dict[str, Tensor]:
    """The values at every point at the batch's real tokens, flat."""
    seen: dict[str, Tensor] = {}
    wanted = set(points(network))
    real = batch.mask > 0

    def hook(name: str) -> Callable[[nn.Module, tuple[Tensor, ...], Tensor], None]:
        def keep(_: nn.Module, args: tuple[Tensor, ...], out: Tensor) -> None:
            for point, x in ((name, args[0]), (name + OUT, out)):
                if point in wanted:
                    seen[point] = (x[real] if x.shape[:2] == real.shape else x).detach().float().flatten()

        return keep

    handles = [m.register_forward_hook(hook(n)) for n, m in linears(network).items()]
    try:
        network(batch.ids, batch.mask, batch.types)
    finally:
        for handle in handles:
            handle.remove()
    return seen


def trimmed(counts: Tensor, low: float, high: float, keep: float) -> tuple[float, float]:
    """The range that holds the share `keep` of a histogram at each end."""
    below = counts.cumsum(0) / counts.sum()
    width = (high - low) / len(counts)
    first = int((below > 1 - keep).nonzero()[0])
    last = int((below >= keep).nonzero()[0])
    return low + first * width, low + (last + 1) * width
