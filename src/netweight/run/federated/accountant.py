"""How much privacy noise buys: (epsilon, delta) of Gaussian noise, step after step.

One unit (a row, or a client) more or less changes the distribution of everything that is released by at most a factor
of exp(epsilon), except with probability delta (Dwork and Roth, 2014). `noise` is the standard deviation of what is
added to a sum, divided by the norm to which each unit's part of that sum is clipped.
"""

from __future__ import annotations

import math
from collections.abc import Callable, Iterable
from dataclasses import dataclass

import numpy as np
from numpy.typing import NDArray

from netweight.errors import OptionError

# Orders at which Renyi divergences are taken: those of the library dp-accounting, so that both give the same numbers.
ORDERS = (*(1 + x / 10 for x in range(1, 100)), *range(11, 64), 128, 256, 512, 1024)
_LEAST, _MOST = 0.1, 1e6  # noise that is looked for
_CLOSE = 1e-4  # relative; what is returned is on the safe side


@dataclass(frozen=True)
class Steps:
    """`count` releases, each of a sum over units drawn independently with probability `rate`, with this noise."""

    noise: float
    rate: float
    count: int

    def __post_init__(self) -> None:
        if not (self.noise > 0 and 0 < self.rate <= 1 and self.count >= 0):
            raise OptionError(
                f"steps with noise {self.noise}, rate {self.rate}, count {self.count}: noise must be above 0, the rate "
                "above 0 and at most 1, the count 0 or more."
            )


def epsilon(steps: Iterable[Steps], delta: float) -> float:
    """What all of these steps cost together at this delta.

    Where every unit is in every sum the steps are one Gaussian mechanism, whose epsilon is exact (Balle and Wang, ICML
    2018, theorem 8). Otherwise it is an upper bound from Renyi differential privacy (Mironov, Talwar and Zhang, 2019,
    section 3), converted as in Canonne, Kamath and Steinke (NeurIPS 2020, proposition 12). Raises OptionError for a
    delta outside of (0, 1).
    """
    if not 0 < delta < 1:
        raise OptionError(f"delta is {delta}; use a number between 0 and 1, well below 1 / the number of rows.")
    taken = [s for s in steps if s.count]
    if not taken:
        return 0.0
    if all(s.rate == 1 for s in taken):
        return _exact(math.sqrt(sum(s.count / s.noise**2 for s in taken)), delta)
    divergence = sum((s.count * _renyi(s.noise, s.rate) for s in taken), np.zeros(len(ORDERS)))
    return _converted(divergence, delta)


def noise_for(budget: float, delta: float, rate: float, count: int) -> float:
    """The least noise with which `count` steps at this rate cost no more than epsilon = `budget`, by bisection.

    Raises OptionError for a budget that is not above 0, or that no noise up to a million keeps.
    """
    if not budget > 0:
        raise OptionError(f"epsilon is {budget}; use a number above 0 (8 is weak, 1 is strong), or turn privacy off.")

    def fits(noise: float) -> bool:
        return epsilon([Steps(noise, rate, count)], delta) <= budget

    if not fits(_MOST):
        raise OptionError(f"no noise keeps {count} steps within epsilon {budget} at delta {delta}; take fewer steps.")
    return _least(fits, _LEAST, _MOST)


def _least(fits: Callable[[float], bool], low: float, high: float) -> float:
    """The least number for which a monotone condition holds, to within _CLOSE; it does hold for what is returned."""
    while high > low * (1 + _CLOSE):
        middle = math.sqrt(low * high)
        low, high = (low, middle) if fits(middle) else (middle, high)
    return high


def _renyi(noise: float, rate: float) -> NDArray[np.float64]:
    """Renyi divergence at each of ORDERS of one step.

    It is log E[(1 - q + q exp((2 z - 1) / (2 s^2)))^a] / (a - 1) with z ~ N(0, s^2). The expectation is summed on an
    even grid, which for such smooth functions is exact to the last digits (Trefethen and Weideman, 2014); the paper's
    series give the same numbers.
    """
    # Next to no noise hides nothing, and needs a very fine grid: as if each unit were in every sum, which is more.
    if rate == 1 or noise < _LEAST:
        return np.array(ORDERS) / (2 * noise**2)
    width = min(noise, noise**2) / 8
    tail = 12 * noise
    # With little noise large orders are never the best, and their grids are long.
    most = 64.0 if noise < 0.5 else ORDERS[-1]
    z = np.arange(-tail, most + tail, width)
    return np.array([_moment(noise, rate, a, z, width) / (a - 1) if a <= most else math.inf for a in ORDERS])


def _moment(noise: float, rate: float, order: float, z: NDArray[np.float64], width: float) -> float:
    # The mass lies between 0 and `order`, and within a few deviations of both.
    here = z[: int((order + 24 * noise) / width) + 1]
    ratio = np.logaddexp(math.log1p(-rate), math.log(rate) + (2 * here - 1) / (2 * noise**2))
    log = order * ratio - np.square(here / noise) / 2
    top = float(log.max())
    return top + math.log(float(np.exp(log - top).sum()) * width / (noise * math.sqrt(2 * math.pi)))


def _converted(divergence: NDArray[np.float64], delta: float) -> float:
    """The least epsilon over all orders."""
    found = math.inf
    for order, at in zip(ORDERS, divergence.tolist(), strict=True):
        if at == math.inf:
            continue
        if delta**2 + math.expm1(-at) > 0:
            # By Bretagnolle and Huber (1979) the total variation is then below delta.
            return 0.0
        found = min(found, at + math.log1p(-1 / order) - math.log(delta * order) / (order - 1))
    return max(0.0, found)


def _exact(mu: float, delta: float) -> float:
    """Epsilon of one Gaussian mechanism whose sensitivity is mu times its noise."""

    def normal(x: float) -> float:
        return math.erfc(-x / math.sqrt(2)) / 2

    def fits(eps: float) -> bool:
        lower = normal(-mu / 2 - eps / mu)
        # exp would overflow where the product is next to nothing.
        second = math.exp(eps + math.log(lower)) if lower > 0 else 0.0
        return normal(mu / 2 - eps / mu) - second <= delta

    if fits(0.0):
        return 0.0
    high = 1.0
    while not fits(high):
        high *= 2
    low = 0.0
    for _ in range(60):
        middle = (low + high) / 2
        low, high = (low, middle) if fits(middle) else (middle, high)
    return high
