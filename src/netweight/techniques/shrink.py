"""Structured pruning: fewer heads, neurons, layers and hidden units, chosen by importance, healed by distillation.

A unit's importance is the gradient of the loss with respect to a gate of one that the unit's output is multiplied
with: its mean absolute value over rows (Michel, Levy and Neubig, NeurIPS 2019; a first-order Taylor expansion,
Molchanov et al., CVPR 2019), or its mean square, the diagonal of the Fisher information of the gates (Kwon et al.,
NeurIPS 2022). Everything is then cut for good: what is left is a smaller dense network.
"""

from __future__ import annotations

import math
from collections.abc import Callable
from contextlib import ExitStack
from dataclasses import asdict, dataclass, replace
from typing import Any, Literal, cast, get_args

import torch
from torch import Tensor, nn

from netweight.anatomy import blocks, keep_heads, keep_hidden, keep_neurons, norms, stream
from netweight.errors import ModelError, OptionError
from netweight.layers import LowRank
from netweight.loss import Batch, SoftTargets, supervised
from netweight.model import Model
from netweight.network import Exits, Network, Transformer
from netweight.run import Run
from netweight.task import Classify, Score
from netweight.techniques.base import planned, transformer
from netweight.techniques.distill import evenly, heal, with_layers
from netweight.train import Plan

Importance = Literal["fisher", "taylor", "magnitude"]


@dataclass(frozen=True)
class LatencyTable:
    """Seconds of one forward pass of a batch on one machine: `outside` of the blocks, and of one block with so many
    `heads` and `neurons` (`seconds[i][j]` belongs to heads[i] and neurons[j]), as in Kwon et al. (2022).

    Raises OptionError where the sizes do not fit. `netweight.bench.block_latency` measures one.
    """

    heads: tuple[int, ...]
    neurons: tuple[int, ...]
    seconds: tuple[tuple[float, ...], ...]
    outside: float = 0.0

    def __post_init__(self) -> None:
        shape = [len(row) for row in self.seconds]
        if not self.heads or not self.neurons or shape != [len(self.neurons)] * len(self.heads):
            raise OptionError(
                f"a latency table of {len(self.heads)} numbers of heads and {len(self.neurons)} of neurons needs as "
                f"many rows and columns of seconds; it has rows of {shape}."
            )

    def to_dict(self) -> dict[str, Any]:
        """For a JSON file; `from_dict` reads it back."""
        return asdict(self)

    @staticmethod
    def from_dict(stored: dict[str, Any]) -> LatencyTable:
        """Inverse of `to_dict`."""
        rows = tuple(tuple(map(float, row)) for row in stored["seconds"])
        return LatencyTable(tuple(stored["heads"]), tuple(stored["neurons"]), rows, float(stored["outside"]))


@dataclass(frozen=True)
class Shrink:
    """Keep a share of the heads, of the feed-forward neurons and of the hidden width, and some of the layers.

    `layers` is a number; `spacing` takes the most important ones ("importance") or evenly spaced ones ("even").
    `uniform` gives each layer the same share; otherwise units of all layers are ranked together, and each layer keeps
    at least one head and `multiple` neurons. Neurons and hidden units left are a multiple of `multiple`, where that is
    less than all: kernels work in blocks. `speedup` takes the place of `heads` and `neurons`: of the pairs in `table`,
    the one that loses least importance and is predicted to be so many times faster (with `layers`: together with what
    they bring). Importance comes from `rows` training rows; "magnitude" (the sum of squares of the weights that would
    go) needs none.

    The rest is healed by distillation from the given model, as `Distill` does, with frozen token tables; `epochs=0`
    leaves it as it is. Raises OptionError for options out of range, ModelError for a family that cannot be cut.
    """

    heads: float = 1.0
    neurons: float = 1.0
    layers: int | None = None
    hidden: float = 1.0
    importance: Importance = "fisher"
    spacing: Literal["importance", "even"] = "importance"
    uniform: bool = True
    multiple: int = 32
    speedup: float | None = None
    table: LatencyTable | None = None
    rows: int = 1000
    epochs: float = 6.0
    learning_rate: float = 2e-4
    token_dropout: float = 0.1
    splice: float = 4.0

    def __call__(self, model: Model, run: Run, plan: Plan) -> Model:
        network = transformer(model, "Shrink")
        self._check(len(network.layers()))
        if isinstance(network, Exits) and self.hidden < 1:
            raise ModelError("a model with exits keeps its hidden width, which their heads read; shrink it before.")
        worth = self._worth(model, network, run)
        chosen = self._layers(network, worth)
        new = with_layers(network, chosen)
        self._cut(new, worth.of_layers(chosen), len(network.layers()))
        student = model.with_network(new)
        if not self.epochs:
            return student
        return heal(student, SoftTargets(model.task, (model,), hard=0.1), run, planned(plan, self), "heal")

    def _check(self, depth: int) -> None:
        for name in ("heads", "neurons", "hidden"):
            if not 0 < getattr(self, name) <= 1:
                raise OptionError(f"{name} is {getattr(self, name)}; it is the share to keep, above 0 and at most 1.")
        if self.layers is not None and not 1 <= self.layers <= depth:
            raise OptionError(f"cannot keep {self.layers} layers of {depth}; choose 1 to {depth}.")
        if self.importance not in get_args(Importance):
            raise OptionError(f"unknown importance {self.importance!r}; use {', '.join(get_args(Importance))}.")
        if self.spacing not in ("importance", "even"):
            raise OptionError(f"unknown spacing {self.spacing!r}; use importance or even.")
        if self.multiple < 1 or self.rows < 1 or self.epochs < 0:
            raise OptionError(
                f"multiple is {self.multiple}, rows {self.rows} and epochs {self.epochs}; use at least 1, 1 and 0."
            )
        if (self.speedup is None) != (self.table is None):
            raise OptionError("speedup and table go together: a table says how long what is left would take.")
        chosen = ("heads", "neurons", "hidden", "uniform", "multiple")
        if self.speedup is not None and any(getattr(self, name) != getattr(Shrink, name) for name in chosen):
            raise OptionError(f"speedup takes heads and neurons of its table; leave {', '.join(chosen)} out.")
        if self.speedup is not None and self.speedup <= 1:
            raise OptionError(f"speedup is {self.speedup}; use more than 1.")
        if self.importance == "magnitude" and self.rows != Shrink.rows:
            raise OptionError(f"rows={self.rows} does not apply to importance 'magnitude'; leave it out.")
        if self.spacing == "even" and self.layers is None:
            raise OptionError("spacing says which layers stay; give layers, or leave it out.")
        if not self.uniform and (self.heads, self.neurons) == (1, 1):
            raise OptionError("uniform=False ranks heads and neurons of all layers together; give a share of them.")
        kept = depth if self.layers is None else self.layers
        if (self.heads, self.neurons, self.hidden, kept, self.speedup) == (1, 1, 1, depth, None):
            raise OptionError("nothing to remove: heads, neurons, hidden and layers all keep everything.")

    def _worth(self, model: Model, network: Transformer, run: Run) -> Worth:
        chosen = self.layers is not None and self.spacing == "importance"
        ranks = chosen or self.speedup is not None or (self.heads, self.neurons, self.hidden) != (1, 1, 1)
        if not ranks:
            sizes = blocks(network)
            heads, neurons = ([torch.ones(getattr(b, kind)) for b in sizes] for kind in ("heads", "neurons"))
            return Worth(heads, neurons, torch.ones(len(sizes)), torch.ones(network.width))
        if self.importance == "magnitude":
            return magnitude(network, self.hidden < 1)
        gates = GateGradients(model.task, self.importance)
        sums = run.reduce(model, gates, self.rows)
        if not _told(sums):  # no row has a label
            sums = run.reduce(model, replace(gates, own=True), self.rows)
        if not _told(sums):
            raise ModelError(
                f"no row gave a gradient, so importance {self.importance!r} ranks nothing: what the model says is the "
                'same for all. Use "magnitude", which needs no rows.'
            )
        depth = len(network.layers())
        heads, neurons = ([sums[f"{kind}.{i}"] for i in range(depth)] for kind in ("heads", "neurons"))
        return Worth(heads, neurons, sums["layers"], sums["hidden"])

    def _layers(self, network: Transformer, worth: Worth) -> list[int]:
        depth = len(network.layers())
        if self.layers is None:
            return list(range(depth))
        if self.spacing == "even":
            return evenly(self.layers, depth)
        return top(worth.layers, self.layers).tolist()

    def _cut(self, new: Transformer, worth: Worth, depth: int) -> None:
        """Cut heads, neurons and hidden width of a network of `worth`'s layers; the given one had `depth`."""
        if self.speedup is not None and self.table is not None:
            most = cheapest(worth, self.table, self.speedup, depth)
            heads, neurons = (
                [top(w, n) for w in part] for part, n in zip((worth.heads, worth.neurons), most, strict=True)
            )
        else:
            heads = self._kept("heads", worth.heads, 1)
            neurons = self._kept("neurons", worth.neurons, self.multiple)
        for block, h, n in zip(blocks(new), heads, neurons, strict=True):
            if len(h) < block.heads:
                keep_heads(new, block, h)
            if len(n) < block.neurons:
                keep_neurons(new, block, n)
        if self.hidden < 1:
            keep_hidden(new, self._kept("hidden", [worth.hidden], self.multiple)[0])

    def _kept(self, kind: str, worths: list[Tensor], step: int) -> list[Tensor]:
        """The units that each layer keeps. Raises OptionError where a share below one rounds to all of them."""
        share = getattr(self, kind)
        kept = ranked(worths, share, step, self.uniform)
        if share < 1 and all(len(k) == len(w) for k, w in zip(kept, worths, strict=True)):
            sizes = sorted({len(w) for w in worths})
            raise OptionError(
                f"{kind}={share} of {', '.join(map(str, sizes))}, in steps of {step}, rounds to all of them; keep a "
                "smaller share, a lower multiple, or 1.0."
            )
        return kept


@dataclass(frozen=True)
class Worth:
    """Importance of every head (heads,) and neuron (neurons,) of each layer, of layers (depth,), and of hidden units
    (hidden,)."""

    heads: list[Tensor]
    neurons: list[Tensor]
    layers: Tensor
    hidden: Tensor

    def of_layers(self, chosen: list[int]) -> Worth:
        """What is left when only these layers are."""
        return Worth(
            [self.heads[i] for i in chosen], [self.neurons[i] for i in chosen], self.layers[chosen], self.hidden
        )


@dataclass(frozen=True)
class GateGradients:
    """Sums over labelled rows of |g| ("taylor") or g^2 ("fisher"), weighted, where g is the gradient of a row's
    supervised loss with respect to a gate of one.

    With `own` a row's target is what the model says itself, its likeliest label or a score one away from its own, for
    rows without labels: sensitivity is all that is left to go by.

    Gates stand on heads before they are mixed, on neurons before they are read, and on hidden units behind every norm
    of the residual stream, one gate for all places. A layer's gate is on all its heads and neurons: its gradient is
    the sum of theirs.
    """

    task: Classify | Score
    kind: Importance
    own: bool = False
    combine: Literal["sum", "max"] = "sum"

    def __call__(self, network: Network, batch: Batch) -> dict[str, Tensor]:
        if not isinstance(network, Transformer):
            raise ModelError(f"gates stand in a transformer; this network is {type(network).__name__}.")
        rows, width, ones = len(batch), network.width, batch.weight.new_ones
        gates: dict[str, Tensor] = {"hidden": ones(rows, width, requires_grad=True)}
        with ExitStack() as hooks, torch.enable_grad():
            for norm in norms(network).values():
                if cast(Tensor, norm.weight).shape == (width,):
                    hooks.enter_context(norm.register_forward_hook(_behind(gates["hidden"])))
            for i, block in enumerate(blocks(network)):
                for kind, units, name in (("heads", block.heads, block.out), ("neurons", block.neurons, block.down)):
                    gate = gates[f"{kind}.{i}"] = ones(rows, units, requires_grad=True)
                    hooks.enter_context(network.get_submodule(name).register_forward_pre_hook(_before(gate)))
            logits = network(batch.ids, batch.mask, batch.types)
            targets = self._said(logits.detach()) if self.own else batch.targets
            known = targets.isfinite() if targets.is_floating_point() else targets >= 0
            # A mean over rows of weight one, times their number: every row has its own gates, so its own gradient.
            alone = replace(batch, targets=targets, weight=ones(rows))
            loss = supervised(self.task, logits, alone, 0.0) * known.sum()
            slopes = dict(zip(gates, torch.autograd.grad(loss, list(gates.values())), strict=True))
        whole = [
            slopes[f"heads.{i}"].sum(dim=1) + slopes[f"neurons.{i}"].sum(dim=1) for i in range(len(network.layers()))
        ]
        slopes["layers"] = torch.stack(whole, dim=1)
        weight = batch.weight.double()[:, None]
        size = torch.square if self.kind == "fisher" else torch.abs
        return {name: (weight * size(slope.double())).sum(dim=0) for name, slope in slopes.items()}

    def _said(self, logits: Tensor) -> Tensor:
        return logits.argmax(dim=1) if isinstance(self.task, Classify) else logits[:, 0].float() - 1


def _told(sums: dict[str, Tensor]) -> bool:
    return any(bool(value.any()) for value in sums.values())


def _behind(gate: Tensor) -> Callable[[nn.Module, tuple[Any, ...], Tensor], Tensor]:
    return lambda _, args, out: out * gate[:, None]


def _before(gate: Tensor) -> Callable[[nn.Module, tuple[Any, ...]], tuple[Tensor]]:
    return lambda _, args: ((args[0].unflatten(-1, (gate.shape[1], -1)) * gate[:, None, :, None]).flatten(-2),)


def magnitude(network: Transformer, hidden: bool) -> Worth:
    """Sum of squares of the weights that would go with a unit; of hidden units only where they are asked for."""
    heads, neurons = [], []
    for block in blocks(network):
        of = [
            (block.qkv, block.qkv_groups, block.heads, block.out),
            (block.up, block.up_groups, block.neurons, block.down),
        ]
        found = []
        for gives, groups, units, takes in of:
            total = _weight(network, takes).square().unflatten(1, (units, -1)).sum(dim=(0, 2))
            for name in gives:
                total = total + _weight(network, name).square().unflatten(0, (groups, units, -1)).sum(dim=(0, 2, 3))
            found.append(total)
        heads.append(found[0])
        neurons.append(found[1])
    layers = torch.stack([h.sum() + n.sum() for h, n in zip(heads, neurons, strict=True)])
    return Worth(heads, neurons, layers, _hidden_magnitude(network) if hidden else torch.ones(network.width))


def _hidden_magnitude(network: Transformer) -> Tensor:
    where = stream(network)
    columns = [_weight(network, name).square().sum(dim=0) for name in (*where.tables, *where.reads)]
    rows = [_weight(network, name).square().sum(dim=1) for name in where.writes]
    return torch.stack([*columns, *rows]).sum(dim=0)


def _weight(network: Transformer, name: str) -> Tensor:
    module = network.get_submodule(name)
    if isinstance(module, LowRank):
        return (module.up.weight @ module.down.weight).detach().double()
    return cast(Tensor, module.weight).detach().double()


def top(worth: Tensor, count: int) -> Tensor:
    """The numbers of the `count` most important units, ascending; of equal ones the first."""
    return worth.argsort(descending=True, stable=True)[:count].sort().values


def ranked(worths: list[Tensor], share: float, step: int, uniform: bool) -> list[Tensor]:
    """The numbers of the units that each layer keeps.

    Units go in blocks of `step`, most important first; at least one block stays in each layer. Layers of no more than
    `step` units are ranked one by one. Where layers are ranked together, blocks are by the mean of their units.
    """
    steps = [step if step < len(w) else 1 for w in worths]
    if share >= 1:
        return [torch.arange(len(w)) for w in worths]
    if uniform:
        counts = [max(s, round(share * len(w) / s) * s) for w, s in zip(worths, steps, strict=True)]
        return [top(w, n) for w, n in zip(worths, counts, strict=True)]
    pieces = [w.sort(descending=True, stable=True).values.split(s) for w, s in zip(worths, steps, strict=True)]
    value = torch.cat([torch.stack([piece.mean() for piece in of]) for of in pieces])
    size = torch.tensor([len(piece) for of in pieces for piece in of])
    layer = torch.tensor([i for i, of in enumerate(pieces) for _ in of])
    first = torch.tensor([j == 0 for of in pieces for j in range(len(of))])
    order = value.masked_fill(first, math.inf).argsort(descending=True, stable=True)
    # As many as bring the units to the share, to the nearest half of a block.
    fits = int((size[order].cumsum(0) - size[order] / 2 <= round(share * int(size.sum()))).sum())
    kept = layer[order[: max(len(worths), fits)]]
    return [top(w, int((kept == i).sum()) * s) for i, (w, s) in enumerate(zip(worths, steps, strict=True))]


def cheapest(worth: Worth, table: LatencyTable, speedup: float, depth: int) -> tuple[int, int]:
    """Heads and neurons for each layer: of the pairs in the table that are predicted `speedup` times faster than
    `depth` whole layers, the one that loses least importance; of equal ones the faster. Raises OptionError for none.
    """
    sizes = {(len(h), len(n)) for h, n in zip(worth.heads, worth.neurons, strict=True)}
    heads, neurons = sizes.pop()
    if sizes or heads not in table.heads or neurons not in table.neurons:
        raise OptionError(
            f"a speedup is against layers of one size that the table has; it has heads {table.heads} and neurons "
            f"{table.neurons}, the model {heads} and {neurons}{' and others' if sizes else ''}."
        )
    whole = table.seconds[table.heads.index(heads)][table.neurons.index(neurons)]
    before, kept = table.outside + depth * whole, len(worth.heads)
    found, best = [], 0.0
    for h, row in zip(table.heads, table.seconds, strict=True):
        for n, seconds in zip(table.neurons, row, strict=True):
            if h > heads or n > neurons:
                continue
            after = table.outside + kept * seconds
            best = max(best, before / after)
            if before / after >= speedup:
                found.append((_lost(worth.heads, h) + _lost(worth.neurons, n), after, h, n))
    if not found:
        raise OptionError(f"nothing in the table is {speedup} times faster; the fastest pair is {best:.2f} times.")
    return min(found)[2:]


def _lost(worths: list[Tensor], kept: int) -> float:
    """Importance of all but the `kept` best units of each layer."""
    return sum(float(w.sort(stable=True).values[: len(w) - kept].sum()) for w in worths)
