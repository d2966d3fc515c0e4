"""Low-rank factoring: W is replaced by the product of two thin matrices, of a truncated singular value decomposition.

The best approximation of a rank in the Frobenius norm is the truncated SVD (Eckart and Young, 1936). What counts is
the error of the outputs, though: the best W' for ||(W - W') X||_F over given inputs X is had from the SVD of W L,
where L L^T = E[x x^T] (Chen et al., DRONE, NeurIPS 2021; with this Cholesky factor Wang et al., SVD-LLM, ICLR 2025; a
diagonal stands for L in Yuan et al., ASVD, 2023).
"""

from __future__ import annotations

import copy
import heapq
from collections.abc import Callable, Mapping
from contextlib import ExitStack
from dataclasses import dataclass
from typing import Literal

import torch
from torch import Tensor, nn

from netweight.errors import OptionError
from netweight.layers import LowRank
from netweight.loss import Batch, SoftTargets
from netweight.model import Model
from netweight.network import Network, Transformer
from netweight.run import Run
from netweight.techniques.base import planned, transformer
from netweight.techniques.distill import heal
from netweight.train import Plan

_ROWS = 300

# Of the mean of E[x x^T]'s diagonal, added to it: inputs that span less than the whole space have no Cholesky factor.
_RIDGE = 1e-6


@dataclass(frozen=True)
class Factor:
    """Replace linear layers of the transformer's layers by `LowRank` ones, and heal what that hurt by distilling the
    given model. A layer that would not have fewer parameters stays as it is.

    Exactly one of the first three is given.

    Args:
        rank: of every layer.
        energy: share of each layer's squared singular values to keep; with `aware` that is the share of the mean
            square of its outputs (without the bias).
        budget: share of these layers' parameters (without biases) to keep. Ranks grow one by one where the next
            one brings most of its layer's energy per parameter.
        aware: weigh errors by the inputs that layers see on `rows` training rows.
        rows: for `aware`; 300 where not given.
        epochs: of healing; 0 for none.

    Raises:
        OptionError: options that contradict each other, or that would change no layer.
    """

    rank: int | None = None
    energy: float | None = None
    budget: float | None = None
    aware: bool = True
    rows: int | None = None
    epochs: float = 2.0
    learning_rate: float = 1e-4
    temperature: float = 2.0

    def __post_init__(self) -> None:
        refused = (
            (
                sum(x is not None for x in (self.rank, self.energy, self.budget)) != 1,
                f"rank is {self.rank}, energy {self.energy} and budget {self.budget}; give exactly one of them.",
            ),
            (self.rank is not None and self.rank < 1, f"rank is {self.rank}; it must be 1 or more."),
            (
                self.energy is not None and not 0 < self.energy < 1,
                f"energy is {self.energy}; it must lie between 0 and 1.",
            ),
            (
                self.budget is not None and not 0 < self.budget < 1,
                f"budget is {self.budget}; it must lie between 0 and 1.",
            ),
            (
                self.rows is not None and not self.aware,
                "rows does not apply where no inputs are read; leave it out, or use aware=True.",
            ),
            (
                self.rows is not None and self.rows < 1,
                f"rows is {self.rows}; an aware factoring must see one row or more.",
            ),
            (self.epochs < 0, f"epochs of healing are {self.epochs}; use 0 for none, or more."),
        )
        for wrong, text in refused:
            if wrong:
                raise OptionError(text)

    def __call__(self, model: Model, run: Run, plan: Plan) -> Model:
        network = copy.deepcopy(transformer(model, "Factor"))
        loss = SoftTargets(model.task, (model,), self.temperature)
        layers = factorable(network)
        moments: Mapping[str, Tensor] = {}
        if self.aware:
            moments = run.reduce(model, SecondMoments(tuple(layers)), self.rows or _ROWS)
        splits = {name: split(layer.weight.detach(), moments.get(name)) for name, layer in layers.items()}
        ranks = self.ranks(splits)
        if not ranks:
            raise OptionError(
                f"no layer would have fewer parameters at {self._asked()}; ask for less, or leave Factor out."
            )
        for name, rank in ranks.items():
            network.replace(name, low_rank(splits[name], rank, layers[name].bias))
        student = model.with_network(network)
        if self.epochs:
            student = heal(student, loss, run, planned(plan, self), "heal factored layers")
        return student

    def _asked(self) -> str:
        given = {"rank": self.rank, "energy": self.energy, "budget": self.budget}
        return next(f"{name} {value}" for name, value in given.items() if value is not None)

    def ranks(self, splits: Mapping[str, Split]) -> dict[str, int]:
        """The rank of each layer that is to be replaced, by name."""
        if self.budget is not None:
            found = spent(splits, self.budget)
        elif self.energy is not None:
            found = {name: s.rank_for(self.energy) for name, s in splits.items()}
        else:
            found = dict.fromkeys(splits, self.rank or 1)
        return {name: rank for name, rank in found.items() if rank <= splits[name].most}


@dataclass(frozen=True)
class SecondMoments:
    """Sum over real tokens of x x^T of each of these layers' inputs x, weighted by rows: (inputs, inputs) by name; over
    rows, where a layer reads one vector of each."""

    names: tuple[str, ...]
    combine: Literal["sum", "max"] = "sum"

    def __call__(self, network: Network, batch: Batch) -> dict[str, Tensor]:
        real = batch.mask > 0
        rows = batch.weight.double()[:, None]
        tokens = rows.expand(real.shape)[real][:, None]
        sums: dict[str, Tensor] = {}

        def hook(name: str) -> Callable[[nn.Module, tuple[Tensor, ...]], None]:
            def add(_: nn.Module, args: tuple[Tensor, ...]) -> None:
                whole = args[0].ndim == 3
                x = (args[0][real] if whole else args[0]).double()
                sums[name] = x.T @ ((tokens if whole else rows) * x)

            return add

        with ExitStack() as hooks:
            for name in self.names:
                hooks.enter_context(network.get_submodule(name).register_forward_pre_hook(hook(name)))
            network(batch.ids, batch.mask, batch.types)
        return sums


@dataclass(frozen=True)
class Split:
    """A matrix as `left` (outputs, k) times `right` (k, inputs); the first r columns and rows are its best
    approximation of rank r. `energies` (k,) is what each of the k adds, in descending order."""

    left: Tensor
    right: Tensor
    energies: Tensor

    @property
    def per_rank(self) -> int:
        """Parameters that one rank takes."""
        return self.left.shape[0] + self.right.shape[1]

    @property
    def whole(self) -> int:
        """Parameters of the matrix itself."""
        return self.left.shape[0] * self.right.shape[1]

    @property
    def most(self) -> int:
        """The largest rank that takes fewer parameters than the matrix; 0 where none does."""
        return (self.whole - 1) // self.per_rank

    def rank_for(self, energy: float) -> int:
        """The smallest rank that keeps this share of the energy."""
        share = self.energies.cumsum(0) / self.energies.sum().clamp(min=1e-300)
        return min(int((share < energy).sum()) + 1, len(share))


def factorable(network: Transformer) -> dict[str, nn.Linear]:
    """The layers' linear ones, but those of a `LowRank`."""
    inside = {name for name, module in network.named_modules() if isinstance(module, LowRank)}
    return {name: m for name, m in network.linears().items() if name.rpartition(".")[0] not in inside}


def split(weight: Tensor, moment: Tensor | None = None) -> Split:
    """The SVD of a matrix (outputs, inputs); with `moment`, a multiple of E[x x^T] (inputs, inputs) of its inputs,
    errors are measured on its outputs. In float64."""
    w = weight.double()
    if moment is None:
        u, s, v = torch.linalg.svd(w, full_matrices=False)
        return Split(u * s.sqrt(), s.sqrt()[:, None] * v, s.square())
    c = moment.double() / moment.diagonal().double().mean().clamp(min=1e-300)
    low = torch.linalg.cholesky(c + _RIDGE * torch.eye(len(c), dtype=c.dtype))
    u, s, v = torch.linalg.svd(w @ low, full_matrices=False)
    right = torch.linalg.solve_triangular(low, s.sqrt()[:, None] * v, upper=False, left=False)
    return Split(u * s.sqrt(), right, s.square())


def spent(splits: Mapping[str, Split], budget: float) -> dict[str, int]:
    """Ranks whose parameters are at most the share `budget` of all, chosen greedily; a layer whose rank exceeds its
    `most` is left whole, and one too thin to be factored does not count. Raises OptionError where rank 1 takes
    more."""
    splits = {name: given for name, given in splits.items() if given.most}
    left = int(budget * sum(s.whole for s in splits.values())) - sum(s.per_rank for s in splits.values())
    if left < 0:
        least = sum(s.per_rank for s in splits.values()) / sum(s.whole for s in splits.values())
        raise OptionError(f"budget {budget} is less than rank 1 takes everywhere; ask for {least:.3f} or more.")
    ranks = dict.fromkeys(splits, 1)
    queue = [_next(splits[name], name, 1) for name in splits]
    heapq.heapify(queue)
    while queue:
        _, name, cost = heapq.heappop(queue)
        if cost > left:
            continue
        left -= cost
        ranks[name] += 1
        if ranks[name] <= splits[name].most:
            heapq.heappush(queue, _next(splits[name], name, ranks[name]))
    return ranks


def _next(given: Split, name: str, rank: int) -> tuple[float, str, int]:
    """What goes beyond this rank costs, as a heap holds it: minus energy per parameter, name, parameters."""
    share = given.energies / given.energies.sum().clamp(min=1e-300)
    if rank < given.most:
        return -float(share[rank]) / given.per_rank, name, given.per_rank
    # Beyond the largest rank that saves anything comes the matrix itself, with all that is left of the energy.
    cost = given.whole - given.most * given.per_rank
    return -float(share[rank:].sum()) / cost, name, cost


def low_rank(given: Split, rank: int, bias: Tensor | None) -> LowRank:
    """The layer of this rank."""
    with torch.random.fork_rng(devices=[]):
        new = LowRank(given.right.shape[1], rank, given.left.shape[0], bias is not None)
    with torch.no_grad():
        new.down.weight.copy_(given.right[:rank])
        new.up.weight.copy_(given.left[:, :rank])
        if bias is not None:
            new.up.bias.copy_(bias)
    return new
