"""Tests that may be looked at after every row.

A row that comes from where the certified rows came is as likely as any of them to stand at any rank, so its rank is a
p-value: uniform, and independent of all earlier ones (Vovk, Gammerman and Shafer, 2005). Betting against that uniform
law makes a capital that is expected never to grow, so it ever exceeds 1 / a with a probability of at most a (Ville's
inequality): the test may be read at any time, and as often as one likes.
"""

from __future__ import annotations

import math
from collections.abc import Sequence

import numpy as np
from numpy.typing import NDArray

_BETS = np.array([-1.0, 0.0, 1.0])
_JUMP = 0.01
_BLOCK = 200  # rows between fresh starts
_RUINED = 1e-9  # share of what the newest start got, below which a start is given up


class Ranks:
    """p-values of values that fall into bins, whose certified `counts` (k,) are known.

    Every row that was seen joins the certified ones: that their number is finite, and their histogram therefore not
    the truth, raises no alarm.
    """

    def __init__(self, counts: Sequence[int]) -> None:
        self._counts = np.asarray(counts, np.int64).copy()

    def p_value(self, place: int, chance: float) -> float:
        """Of a value in bin `place`: the share of rows above it, and of those level with it the part `chance`, which
        must be drawn uniformly from [0, 1)."""
        self._counts[place] += 1
        above, level = int(self._counts[place + 1 :].sum()), int(self._counts[place])
        return float((above + chance * level) / self._counts.sum())


class Jumper:
    """Capital of one bettor on p-values, and of one on how far they are from the middle.

    Vovk et al. (COPA 2021): capital lies on three bets (low, none, high), a hundredth of it moves between them at each
    step. Starts anew every 200 rows, so that a change after a long calm is not buried under what was lost until then:
    the k-th start gets the share 1 / (k (k + 1)) of the first capital, and what has not started yet is kept.
    """

    def __init__(self) -> None:
        self._rows = 0
        self._started = 0
        self._capital: NDArray[np.float64] = np.zeros((0, 2, 3))  # of each start, on p and on its fold, on each bet

    @property
    def capital(self) -> float:
        """In units of the first capital."""
        return float(self._capital.sum()) + 1 / (self._started + 1)

    def bet(self, p: float) -> float:
        """The capital after the next p-value."""
        starts = self._rows % _BLOCK == 0
        self._started += starts
        share = 1 / (self._started * (self._started + 1))
        if starts:
            self._capital = np.concatenate([self._capital, np.full((1, 2, 3), share / 6)])
        self._rows += 1
        held = self._capital.sum(axis=2, keepdims=True)
        moved = (1 - _JUMP) * self._capital + _JUMP * held / 3
        at = np.array([p, abs(2 * p - 1)])[:, None] - 0.5
        self._capital = moved * (1 + _BETS * at)
        self._capital = self._capital[self._capital.sum(axis=(1, 2)) > _RUINED * share]
        return self.capital


def share_bounds(yes: int, n: int, level: float) -> tuple[float, float]:
    """Bounds of a share after `yes` of n independent rows, right for all n together with probability 1 - `level`.

    Those shares p against which a bettor who mixes all others (Jeffreys' prior) has made less than 1 / level:
    B(yes + 1/2, n - yes + 1/2) / B(1/2, 1/2) / (p^yes (1 - p)^(n - yes)) (Robbins, 1970).
    """
    if n == 0:
        return 0.0, 1.0
    mixed = math.lgamma(yes + 0.5) + math.lgamma(n - yes + 0.5) - math.lgamma(n + 1) - math.log(math.pi)

    def inside(p: float) -> bool:
        likelihood = (yes * math.log(p) if yes else 0.0) + ((n - yes) * math.log1p(-p) if n > yes else 0.0)
        return mixed - likelihood < -math.log(level)

    def end(out: float, middle: float) -> float:
        for _ in range(60):
            half = (out + middle) / 2
            out, middle = (out, half) if inside(half) else (half, middle)
        return out

    at = min(max(yes / n, 1e-12), 1 - 1e-12)
    return (end(0.0, at) if yes else 0.0), (end(1.0, at) if n > yes else 1.0)
