"""How likely a candidate passes, and how many labelled rows it takes: for plans, not for verdicts."""

from __future__ import annotations

import math
from collections.abc import Callable

import numpy as np

from netweight.certify.exact import lost_at_most, most_lost, passes, plausible_totals
from netweight.certify.tails import binomial_pmf, normal_quantile, normal_tail

CHANCE = 0.8
_MOST_ROWS = 10_000_000
# Up to here the sum over tables is quick and worth it; beyond, the normal approximation is as good.
_SUMMED = 100_000


def binary_power(discordant: float, drop: float, n: int, margin: float, level: float) -> float:
    """Chance that a candidate passes with n independent rows, if it differs (right against wrong) on a share
    `discordant` of them and its true drop is `drop`.

    Sums the tables that Tango's score test accepts; the exact test accepts nearly the same, but for the table in which
    nothing differs, of which it is asked itself.
    """
    if drop >= margin:
        return 0.0
    if margin >= 1:
        return 1.0
    discordant = min(1.0, max(discordant, abs(drop)))
    if discordant == 0:
        return float(passes(0, 0, n, margin, level))
    if n > _SUMMED:
        return normal_power(math.sqrt((discordant - drop * drop) / n), drop, margin, level)
    totals = plausible_totals(discordant, discordant, n)
    most = most_lost(totals, n, margin, -normal_quantile(level))
    share = np.array([(discordant + drop) / (2 * discordant)])
    return float(np.clip((binomial_pmf(totals, n, discordant) * lost_at_most(most, totals, share)[0]).sum(), 0, 1))


def binary_rows(discordant: float, drop: float, margin: float, level: float) -> int | None:
    """The least number of independent rows with a chance of 0.8 to pass; None beyond ten million."""
    return _least_rows(lambda n: binary_power(discordant, drop, n, margin, level), drop < margin)


def normal_power(error: float, drop: float, margin: float, level: float) -> float:
    """The same from a standard error, by the normal approximation."""
    if error <= 0:
        return 1.0 if drop < margin else 0.0
    return normal_tail(normal_quantile(level) - (margin - drop) / error)


def normal_rows(error: float, drop: float, n: int, margin: float, level: float) -> int | None:
    """The same from the standard error that n rows had; it falls with the root of the number of rows."""
    return _least_rows(lambda m: normal_power(error * math.sqrt(n / m), drop, margin, level), drop < margin)


def _least_rows(power: Callable[[int], float], possible: bool) -> int | None:
    if not possible:
        return None
    low, high = 1, 16
    while power(high) < CHANCE:
        if high == _MOST_ROWS:
            return None
        low, high = high, min(2 * high, _MOST_ROWS)
    while high - low > 1:
        middle = (low + high) // 2
        low, high = (low, middle) if power(middle) >= CHANCE else (middle, high)
    return high
