"""How the server of a federated run makes one set of tensors of many: pure functions, deterministic.

Updates are tensors by parameter name, by client; clients are taken in the order of their names, so that a sum does not
depend on who answered first. Sums are made in fp64, one tensor at a time. What comes out has the dtype of what came
in: integers are rounded.
"""

from __future__ import annotations

from collections.abc import Mapping, Sequence
from dataclasses import dataclass
from itertools import count
from typing import Protocol

import torch
from torch import Tensor

from netweight.errors import OptionError

Tensors = Mapping[str, Tensor]
Updates = Mapping[str, Tensors]
Shares = Mapping[str, float]


class Aggregator(Protocol):
    """Makes one set of tensors of those of several clients, each with a weight (its rows)."""

    def __call__(self, updates: Updates, weights: Shares) -> dict[str, Tensor]: ...


@dataclass(frozen=True)
class Mean:
    """sum_k (n_k / n) w_k, as in FedAvg (McMahan et al., AISTATS 2017)."""

    def __call__(self, updates: Updates, weights: Shares) -> dict[str, Tensor]:
        clients = sorted(updates)
        total = sum(weights[c] for c in clients)
        made: dict[str, Tensor] = {}
        for name, like in updates[clients[0]].items():
            held = like.double() * (weights[clients[0]] / total)
            for client in clients[1:]:
                held += updates[client][name].double() * (weights[client] / total)
            made[name] = as_dtype(held, like.dtype)
        return made


@dataclass(frozen=True)
class Median:
    """The median of each coordinate (Yin et al., ICML 2018); of an even number the mean of the two in the middle.
    Weights do not count: a client could claim any."""

    def __call__(self, updates: Updates, weights: Shares) -> dict[str, Tensor]:
        def middle(ordered: Tensor) -> Tensor:
            n = len(ordered)
            return (ordered[(n - 1) // 2] + ordered[n // 2]) / 2

        return {name: as_dtype(middle(values), dtype) for name, values, dtype in _ordered(updates)}


@dataclass(frozen=True)
class TrimmedMean:
    """The mean of each coordinate without the `share` of the values that are lowest and the same share that are
    highest (Yin et al., ICML 2018). Weights do not count.

    Raises OptionError where the share of the clients is less than one: it would be a mean that leaves nobody out.
    """

    share: float = 0.2

    def __post_init__(self) -> None:
        if not 0 <= self.share < 0.5:
            raise OptionError(f"TrimmedMean cuts a share of {self.share} at both ends; use 0 or more, below 0.5.")

    def __call__(self, updates: Updates, weights: Shares) -> dict[str, Tensor]:
        cut = int(self.share * len(updates))
        if self.share and not cut:
            least = next(n for n in count(int(1 / self.share)) if int(self.share * n))
            raise OptionError(
                f"TrimmedMean cuts a share of {self.share} at both ends, which needs {least} updates, and "
                f"{len(updates)} came; raise `minimum` of the rounds (--minimum) or `share`, or use Median."
            )
        return {
            name: as_dtype(values[cut : len(values) - cut].mean(dim=0), dtype)
            for name, values, dtype in _ordered(updates)
        }


@dataclass(frozen=True)
class Krum:
    """The update that is closest to the others (Blanchard et al., NeurIPS 2017), or the weighted mean of the `keep`
    closest ones (multi-Krum).

    The score of a client is the sum of squared distances to the n - `faulty` - 2 clients nearest to it. Raises
    OptionError where there are fewer than 2 * `faulty` + 3 clients: then nothing is promised.
    """

    faulty: int = 1
    keep: int = 1

    def __post_init__(self) -> None:
        if self.faulty < 0 or self.keep < 1:
            raise OptionError(f"Krum has faulty {self.faulty}, keep {self.keep}; use 0 or more, and 1 or more.")

    def __call__(self, updates: Updates, weights: Shares) -> dict[str, Tensor]:
        chosen = self.chosen(updates)
        return Mean()({c: updates[c] for c in chosen}, {c: weights[c] for c in chosen})

    def chosen(self, updates: Updates) -> list[str]:
        """Names of the clients whose updates count."""
        clients = sorted(updates)
        n = len(clients)
        if self.faulty and n < 2 * self.faulty + 3:
            raise OptionError(
                f"Krum against {self.faulty} faulty clients needs {2 * self.faulty + 3} updates, and {n} came; "
                "lower `faulty`, or raise `minimum` of the rounds (--minimum)."
            )
        if n == 1:
            return clients
        apart = torch.zeros(n, n, dtype=torch.float64)
        for name, like in updates[clients[0]].items():
            if like.is_floating_point() and like.numel():
                rows = torch.stack([updates[c][name].double().flatten() for c in clients])
                # Not the Gram matrix: close updates of large norm would cancel.
                apart += torch.cdist(rows, rows, compute_mode="donot_use_mm_for_euclid_dist").square()
        nearest = max(1, n - self.faulty - 2)
        scores = apart.sort(dim=1).values[:, 1 : nearest + 1].sum(dim=1)
        order = torch.argsort(scores, stable=True)[: self.keep].tolist()
        return sorted(clients[i] for i in order)


@dataclass(frozen=True)
class Moments:
    """What a server's Adam remembers: m and v, by parameter name."""

    first: Tensors
    second: Tensors


@dataclass(frozen=True)
class Adam:
    """The server's optimizer of FedAdam (Reddi et al., ICLR 2021, algorithm 2), without bias correction as there.

    With D = mean - old: m = b1 m + (1 - b1) D, v = b2 v + (1 - b2) D^2, new = old + rate * m / (sqrt(v) + tau);
    m starts at 0, v at tau^2.
    """

    rate: float = 0.01
    beta1: float = 0.9
    beta2: float = 0.99
    tau: float = 1e-3

    def __post_init__(self) -> None:
        if not (self.rate > 0 and 0 <= self.beta1 < 1 and 0 <= self.beta2 < 1 and self.tau > 0):
            raise OptionError(
                f"FedAdam has rate {self.rate}, betas {self.beta1} and {self.beta2}, tau {self.tau}; "
                "rate and tau must be above 0, betas at least 0 and below 1."
            )

    def __call__(self, old: Tensors, mean: Tensors, moments: Moments | None) -> tuple[dict[str, Tensor], Moments]:
        """The new tensors and moments, for the names in `old`."""
        first, second, new = {}, {}, {}
        for name, was in old.items():
            change = mean[name] - was
            m = moments.first[name] if moments else torch.zeros_like(was)
            v = moments.second[name] if moments else torch.full_like(was, self.tau**2)
            first[name] = self.beta1 * m + (1 - self.beta1) * change
            second[name] = self.beta2 * v + (1 - self.beta2) * change.square()
            new[name] = was + self.rate * first[name] / (second[name].sqrt() + self.tau)
        return new, Moments(first, second)


def as_dtype(value: Tensor, dtype: torch.dtype) -> Tensor:
    """A value in another dtype; rounded where that is of integers."""
    return value.to(dtype) if dtype.is_floating_point else value.round().to(dtype)


def _ordered(updates: Updates) -> Sequence[tuple[str, Tensor, torch.dtype]]:
    """Name, values (clients, ...) in fp64, ascending in each coordinate, and dtype of every tensor."""
    clients = sorted(updates)
    return [
        (name, torch.stack([updates[c][name].double() for c in clients]).sort(dim=0).values, like.dtype)
        for name, like in updates[clients[0]].items()
    ]
