"""Tail probabilities that numpy lacks: incomplete beta and binomial, and Tango's score interval."""

from __future__ import annotations

import math
from collections.abc import Callable
from functools import lru_cache
from statistics import NormalDist
from typing import Any, cast

import numpy as np
from numpy.typing import ArrayLike, NDArray

Floats = NDArray[np.float64]

_NORMAL = NormalDist()
_lgamma: Callable[[Any], Floats] = np.vectorize(math.lgamma, otypes=[np.float64])

# Steps of the continued fraction; it needs about 2 sqrt(max(a, b)) of them, so this covers a million rows.
_STEPS = 4000


def normal_tail(z: float) -> float:
    """P(Z > z)."""
    return _NORMAL.cdf(-z)


def normal_quantile(tail: float) -> float:
    """The z that a standard normal exceeds with probability `tail`."""
    return -_NORMAL.inv_cdf(tail)


def bisect(holds: Callable[[float], bool], low: float, high: float, tolerance: float = 0.0) -> float:
    """The end of the stretch from `low` on which `holds`, never more than `tolerance` below it (0: to the last bit)."""
    while high - low > tolerance:
        middle = (low + high) / 2
        if middle in (low, high):
            break
        if holds(middle):
            low = middle
        else:
            high = middle
    return high


def beta_cdf(x: ArrayLike, a: ArrayLike, b: ArrayLike) -> Floats:
    """The regularised incomplete beta function I_x(a, b) for a, b > 0; arrays broadcast.

    Continued fraction DLMF 8.17.22, evaluated by Lentz's method, on the side of the mean where it converges fast.
    """
    x, a, b = np.broadcast_arrays(*(np.atleast_1d(np.asarray(v, np.float64)) for v in (x, a, b)))
    swap = x > (a + 1) / (a + b + 2)
    x, a, b = np.where(swap, 1 - x, x), np.where(swap, b, a), np.where(swap, a, b)
    inside = (x > 0) & (x < 1)
    safe = np.where(inside, x, 0.5)
    front = np.exp(_lgamma(a + b) - _lgamma(a) - _lgamma(b) + a * np.log(safe) + b * np.log1p(-safe)) / a
    value = np.where(inside, front * _fraction(safe, a, b), x)
    return cast(Floats, np.clip(np.where(swap, 1 - value, value), 0, 1))


def _fraction(x: Floats, a: Floats, b: Floats) -> Floats:
    tiny = 1e-300
    c = np.ones_like(x)
    d = 1 / _away_from_zero(1 - (a + b) * x / (a + 1), tiny)
    h = d.copy()
    for m in range(1, _STEPS):
        even = m * (b - m) * x / ((a + 2 * m - 1) * (a + 2 * m))
        odd = -(a + m) * (a + b + m) * x / ((a + 2 * m) * (a + 2 * m + 1))
        for term in (even, odd):
            d = 1 / _away_from_zero(1 + term * d, tiny)
            c = _away_from_zero(1 + term / c, tiny)
            h *= c * d
        if (np.abs(c * d - 1) < 1e-15).all():
            break
    return h


def _away_from_zero(values: Floats, tiny: float) -> Floats:
    return cast(Floats, np.where(np.abs(values) < tiny, tiny, values))


def binomial_cdf(k: ArrayLike, n: ArrayLike, p: ArrayLike) -> Floats:
    """P(X <= k) for X binomial(n, p); arrays broadcast; 0 for k < 0 and 1 for k >= n."""
    k, n, p = np.broadcast_arrays(*(np.atleast_1d(np.asarray(v, np.float64)) for v in (k, n, p)))
    inner = (k >= 0) & (k < n)
    low = np.where(inner, k, 0)
    high = np.where(inner, n, 1)
    return cast(Floats, np.where(inner, beta_cdf(1 - p, high - low, low + 1), (k >= n).astype(float)))


def binomial_pmf(k: ArrayLike, n: ArrayLike, p: ArrayLike) -> Floats:
    """P(X = k) for X binomial(n, p), 0 <= p <= 1, whole k and n; 0 where k is not in 0..n; arrays broadcast."""
    k, n, p = np.asarray(k, np.int64), np.asarray(n, np.int64), np.asarray(p, np.float64)
    inside = (k >= 0) & (k <= n)
    total, some = np.where(inside, n, 0), np.where(inside, k, 0)
    table = _log_factorials(int(n.max(initial=0)).bit_length())
    choose = table[total] - table[some] - table[total - some]
    # Where p is 0 or 1 its logarithm meets a factor of 0, or the probability is 0.
    logs = choose + some * np.log(np.where(p > 0, p, 1.0)) + (total - some) * np.log1p(-np.where(p < 1, p, 0.0))
    possible = inside & ((p > 0) | (some == 0)) & ((p < 1) | (some == total))
    return cast(Floats, np.exp(np.where(possible, logs, -np.inf)))


@lru_cache(maxsize=4)
def _log_factorials(bits: int) -> Floats:
    """log(k!) for k < 2^bits."""
    return np.fromiter(map(math.lgamma, range(1, 2**bits + 1)), np.float64, 2**bits)


@lru_cache(maxsize=4096)
def binomial_bounds(count: int, n: int, tail: float) -> tuple[float, float]:
    """Exact lower and upper bound of a binomial probability, each missing with `tail` at most (Clopper, Pearson)."""

    def reaches(at_most: int, limit: float) -> Callable[[float], bool]:
        return lambda p: bool(binomial_cdf(at_most, n, p)[0] > limit)

    # The bracket is as narrow as the normal approximation allows, times three.
    lower = 0.0 if count == 0 else bisect(reaches(count - 1, 1 - tail), 0.0, count / n, 1e-12)
    upper = 1.0 if count == n else bisect(reaches(count, tail), count / n, 1.0, 1e-12)
    return lower, upper


def tango_score(b: ArrayLike, c: ArrayLike, n: float, drop: float) -> Floats:
    """Tango's score statistic (1998, section 3) for H: P(b) - P(c) = `drop`, -1 < drop < 1; arrays broadcast.

    `b` and `c` count the pairs of n that were lost and gained; small values speak for a smaller drop. The variance
    takes the maximum likelihood of P(c) under H, the root of a quadratic. Counts may be fractions.
    """
    b, c = np.asarray(b, np.float64), np.asarray(c, np.float64)
    if drop < 0:  # the mirror image: the quadratic below then never subtracts nearly equal numbers
        return -tango_score(c, b, n, -drop)
    spread = np.sqrt(tango_variance(b, c, n, drop))
    numerator = b - c - n * drop
    return cast(Floats, np.divide(numerator, spread, out=np.zeros(np.shape(spread)), where=spread > 0))


def tango_variance(b: Any, c: Any, n: float, drop: float) -> Any:
    """Variance of b - c under H of `tango_score`, for drop >= 0."""
    linear = -b - c + (2 * n - b + c) * drop
    gained = (np.sqrt(linear * linear + 8 * n * c * drop * (1 - drop)) - linear) / (4 * n)
    return n * (2 * gained + drop * (1 - drop))


def tango(b: float, c: float, n: float, z: float) -> tuple[float, float]:
    """Tango's score interval of P(b) - P(c) at +-z: the drops whose score statistic lies within +-z."""

    def upper(b: float, c: float) -> float:
        return 1.0 if b >= n else bisect(lambda drop: float(tango_score(b, c, n, drop)) > -z, (b - c) / n, 1.0)

    return -upper(c, b), upper(b, c)
