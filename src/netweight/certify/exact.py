"""An exact test that accuracy drops by less than a margin, and the exact interval that belongs to it.

Of n pairs, b are lost (reference right, candidate wrong) and c are gained. Under a drop of d their law has one unknown,
q = P(gained). The p-value is the largest probability, over the q that the data allow, of a table at least as
favourable as the observed one, plus the chance that q is not among them (Berger and Boos, 1994). Tables are ordered by
Tango's score statistic (1998), as in Lloyd and Moldovan (2008). Whatever q is, the test is false in at most the
stated share of cases; benchmarks/certificate.py shows that it costs no power against Tango's own interval.
"""

from __future__ import annotations

import math

import numpy as np
from numpy.typing import NDArray

from netweight.certify.tails import (
    Floats,
    binomial_bounds,
    binomial_cdf,
    binomial_pmf,
    bisect,
    normal_quantile,
    tango,
    tango_score,
)

_GRID = 32
_REFINED = 12
# Binomial mass that the sum leaves out on each side; it is added to the p-value.
_OUTSIDE = 1e-12


def p_value(b: int, c: int, n: int, drop: float, level: float) -> float:
    """p-value of H: the drop is at least `drop`, against less. `level` sets the share spent on bounding q: a 100th."""
    spent = level / 100
    low, high = binomial_bounds(b + c, n, spent / 2)
    if high <= drop:
        return spent
    q_low, q_high = max(0.0, (low - drop) / 2), (high - drop) / 2
    if drop <= 0:  # P(lost) = q + drop must stay positive
        q_low = max(q_low, -drop)
    observed = float(tango_score(b, c, n, drop))
    grid = np.linspace(q_low, q_high, _GRID)
    tail = _tail(grid, n, drop, observed)
    peak, step = int(tail.argmax()), (q_high - q_low) / (_GRID - 1)
    around = np.linspace(max(q_low, grid[peak] - step), min(q_high, grid[peak] + step), _REFINED)
    return min(1.0, max(float(tail.max()), float(_tail(around, n, drop, observed).max())) + spent + 2 * _OUTSIDE)


def _tail(q: Floats, n: int, drop: float, observed: float) -> Floats:
    """P(score <= observed) for each q: a sum over the number of discordant pairs, then over the lost among them."""
    discordant = np.clip(2 * q + drop, 1e-300, 1.0)
    totals = plausible_totals(float(discordant.min()), float(discordant.max()), n)
    most = most_lost(totals, n, drop, observed)
    lost = np.clip((q + drop) / discordant, 0.0, 1.0)
    mass = binomial_pmf(totals, n, discordant[:, None])
    return np.asarray((mass * lost_at_most(most, totals, lost)).sum(axis=1))


def plausible_totals(least: float, most: float, n: int) -> NDArray[np.int64]:
    """Numbers of discordant pairs without those that are less likely than _OUTSIDE on either side, for all shares from
    `least` to `most` (the inequalities of Chernoff and Bernstein)."""
    reach = math.sqrt(-2 * math.log(_OUTSIDE))
    low = max(0, math.floor(n * least - reach * math.sqrt(n * least)))
    high = min(n, math.ceil(n * most + reach * math.sqrt(n * most) + reach * reach / 3))
    return np.arange(low, high + 1)


def lost_at_most(most: NDArray[np.int64], totals: NDArray[np.int64], share: Floats) -> Floats:
    """P(X <= most) for X binomial(total, share), a row for each share.

    From one total to the next, `most` stays or grows by one (Barnard's convexity), so that each probability is the one
    before less P(X = most) share, or plus P(X = most + 1) (1 - share): a running sum instead of incomplete betas.
    """
    grows = np.diff(most)
    steps = binomial_pmf(most[:-1] + grows, totals[:-1], share[:, None])
    steps *= np.where(grows > 0, 1 - share[:, None], -share[:, None])
    first = binomial_cdf(most[0], totals[0], share)[:, None]
    return np.asarray(np.cumsum(np.concatenate([first, steps], axis=1), axis=1))


def most_lost(totals: NDArray[np.int64], n: int, drop: float, observed: float) -> NDArray[np.int64]:
    """The largest number lost among each total of discordant pairs whose score is at most `observed`; -1 for none."""
    low, high = np.full(len(totals), -1), totals + 1
    # Among equal totals the score grows with the number lost (Barnard's convexity), so halving finds the last one.
    while (high - low > 1).any():
        middle = (low + high) // 2
        open_ = high - low > 1
        counts = np.where(open_, middle, 0)
        fits = tango_score(counts, totals - counts, n, drop) <= observed + 1e-9
        low, high = np.where(open_ & fits, middle, low), np.where(open_ & ~fits, middle, high)
    return low


def passes(b: int, c: int, n: int, margin: float, level: float) -> bool:
    """Whether the drop is shown to be less than `margin`; false in at most `level` of the cases in which it is not."""
    return p_value(b, c, n, margin, level) <= level


def interval(b: int, c: int, n: int, margin: float, level: float) -> tuple[float, float]:
    """Lower and upper confidence bound of P(lost) - P(gained), each missing with probability at most `level`.

    The test inverted; the upper bound is at most `margin` exactly where `passes`.
    """
    return -_upper(c, b, n, -margin, level), _upper(b, c, n, margin, level)


def _upper(b: int, c: int, n: int, margin: float, level: float) -> float:
    estimate = (b - c) / n
    low, high = max(estimate, -1 + 1e-9), 1 - 1e-9
    if low >= high:
        return 1.0
    near = tango(b, c, n, normal_quantile(level))[1]

    def allowed(drop: float) -> bool:
        return p_value(b, c, n, drop, level) > level

    if low < margin < high:
        low, high = (margin, high) if allowed(margin) else (low, margin)
    # Tango's bound is close: a bracket around it saves most of the halvings.
    width = max(near - estimate, 1e-6)
    for guess in (near - width / 20, near + width / 10):
        if low < guess < high:
            low, high = (guess, high) if allowed(guess) else (low, guess)
    return min(1.0, bisect(allowed, low, high, 1e-7))
