"""Resampling pairs of rows, or whole groups of them, where no exact test exists: macro-F1, scores, grouped rows.

Bounds are BCa (Efron 1987): bootstrap quantiles moved for bias and for a spread that changes with the value. A
bootstrap never draws what the sample did not hold: where the candidate happened to lose no row of a rare class, plain
BCa passed a drop of exactly the margin in up to 30 % of simulations instead of 2.5 %. So `compare` extends the sample
first; benchmarks/certificate.py measures what comes out.
"""

from __future__ import annotations

from collections.abc import Callable, Iterator
from dataclasses import dataclass
from functools import cached_property

import numpy as np

from netweight.certify.certificate import Estimate, Floats, Ints
from netweight.certify.tails import normal_quantile, normal_tail

# Weights (b, rows) -> statistic (b,).
Statistic = Callable[[Floats], Floats]

_RESAMPLES, _MOST_RESAMPLES = 2_000, 20_000
LEAST = 0.5 / _MOST_RESAMPLES  # p-value, whatever the sample
_EDGE = 2.0**-53  # how far the last float below 1 is from it; 1 itself has no quantile
_CHUNK = 2_000_000  # weights held at a time: 16 MB, of which a rank correlation makes ten copies
_DIGITS = 12  # of a task's step
_LEFT_OUT = 1_000  # parts that the jackknife leaves out, one at a time


@dataclass(frozen=True)
class Sample:
    """Rows with equal contents counted once, and the units that are drawn: single rows, or groups of them.

    rows (u, c) are distinct; kind (n,) says which of them each row is; unit (n,) which unit it belongs to.
    """

    rows: Floats
    kind: Ints
    unit: Ints
    seed: int

    @staticmethod
    def of(contents: Floats, groups: Ints | None, seed: int, extra: Floats | None = None, size: int = 1) -> Sample:
        """`contents` (n, c), each row its own unit without `groups` (n,); of `extra` (m, c) each row becomes a
        unit of `size` equal rows."""
        unit = np.arange(len(contents)) if groups is None else np.unique(groups, return_inverse=True)[1].reshape(-1)
        if extra is not None and len(extra):
            unit = np.concatenate([unit, unit.max() + 1 + np.repeat(np.arange(len(extra)), size)])
            contents = np.concatenate([contents, np.repeat(extra, size, axis=0)])
        rows, kind = np.unique(contents, axis=0, return_inverse=True)
        return Sample(rows, kind.reshape(-1), unit.astype(np.int64), seed)

    @cached_property
    def units(self) -> int:
        """How many units there are."""
        return int(self.unit.max()) + 1

    @cached_property
    def weights(self) -> Floats:
        """How often each distinct row occurs (1, u)."""
        return np.bincount(self.kind, minlength=len(self.rows)).astype(np.float64)[None]

    @cached_property
    def _single(self) -> bool:
        return self.units == len(self.unit)

    def drawn(self, count: int) -> Iterator[Floats]:
        """Weights (b, u) of `count` bootstrap samples, in chunks. The draws depend on the seed alone: numpy keeps the
        raw stream of PCG64 the same between versions, which it does not promise for its distributions."""
        stream = np.random.PCG64(self.seed)
        chunk = max(1, _CHUNK // max(len(self.rows), len(self.unit)))
        for start in range(0, count, chunk):
            b = min(chunk, count - start)
            raw = stream.random_raw(b * self.units) >> np.uint64(32)
            picked = ((raw * np.uint64(self.units)) >> np.uint64(32)).astype(np.int64).reshape(b, self.units)
            if self._single:
                yield _counts(self.kind[picked], len(self.rows))
            else:
                yield self._by_kind(_counts(picked, self.units)[:, self.unit])

    def _by_kind(self, weights: Floats) -> Floats:
        """Weights of rows (b, n) added up over equal rows (b, u)."""
        b, u = len(weights), len(self.rows)
        at = self.kind[None] + u * np.arange(b)[:, None]
        return np.asarray(np.bincount(at.reshape(-1), weights.reshape(-1), minlength=b * u).reshape(b, u), np.float64)

    def left_out(self) -> Iterator[tuple[Floats, Floats]]:
        """Weights (b, u) with one part of the sample missing, and how many such parts there are (b,), in chunks.

        A part is a unit, one of several equal rows, or, where there are over 1,000 of either, a random 1,000th.
        """
        u = len(self.rows)
        if self._single and u <= _LEFT_OUT:
            yield self.weights - np.eye(u), self.weights[0]
            return
        parts = min(self.units, _LEFT_OUT)
        order = np.argsort(np.random.PCG64(self.seed + 1).random_raw(self.units), kind="stable")
        part = np.empty(self.units, np.int64)
        part[order] = np.arange(self.units) % parts
        chunk = max(1, _CHUNK // u)
        for start in range(0, parts, chunk):
            b, at = min(chunk, parts - start), part[self.unit] - start
            some = (at >= 0) & (at < b)
            missing = np.bincount(at[some] * u + self.kind[some], minlength=b * u).reshape(b, u)
            yield self.weights - missing, np.ones(b)


def _counts(picked: Ints, width: int) -> Floats:
    b = len(picked)
    at = picked + width * np.arange(b)[:, None]
    return np.bincount(at.reshape(-1), minlength=b * width).reshape(b, width).astype(np.float64)


@dataclass(frozen=True)
class Bootstrap:
    """The sampling distribution of a statistic: sorted values of resamples, and BCa's two constants."""

    values: Floats
    bias: float
    acceleration: float

    @staticmethod
    def of(sample: Sample, statistic: Statistic, level: float, step: float = 1.0) -> Bootstrap:
        """Draw as many resamples as the level asks for: 20 beyond it, at least 2,000 and at most 20,000. Values are
        rounded to 12 digits of `step`."""
        count = min(_MOST_RESAMPLES, max(_RESAMPLES, int(np.ceil(20 / level))))
        values = np.concatenate([statistic(weights) for weights in sample.drawn(count)])
        # Machines add up in different orders; equal values must stay equal to be counted as such.
        values, value = np.sort(_rounded(values, step)), _rounded(statistic(sample.weights), step)[0]
        below = ((values < value).mean() + (values <= value).mean()) / 2
        bias = -normal_quantile(float(np.clip(below, 1 / count, 1 - 1 / count)))
        return Bootstrap(values, bias, _acceleration(sample, statistic))

    @cached_property
    def _positions(self) -> Floats:
        return (np.arange(len(self.values)) + 0.5) / len(self.values)

    def bound(self, share: float) -> float:
        """The value that the true one exceeds with confidence 1 - `share`."""
        z = self.bias + normal_quantile(min(max(1 - share, _EDGE), 1 - _EDGE))
        at = 1 - normal_tail(self.bias + z / max(1e-9, 1 - self.acceleration * z))
        return float(np.interp(at, self._positions, self.values))

    def p_value(self, limit: float) -> float:
        """The level at which the upper bound equals `limit`: p-value of H: the true value is at least `limit`."""
        # Values that equal the limit are not below it.
        share = float(np.interp(np.nextafter(limit, -np.inf), self.values, self._positions))
        y = -normal_quantile(share) - self.bias
        return max(normal_tail(y / max(1e-9, 1 + self.acceleration * y) - self.bias), 0.5 / len(self.values))


def _rounded(values: Floats, step: float) -> Floats:
    return np.asarray((values / step).round(_DIGITS) * step)


def _acceleration(sample: Sample, statistic: Statistic) -> float:
    """A sixth of the skewness of the jackknife's influences (Efron and Tibshirani 1993, equation 14.15)."""
    found = [(statistic(weights), times) for weights, times in sample.left_out()]
    without, times = np.concatenate([f[0] for f in found]), np.concatenate([f[1] for f in found])
    influence = (times @ without) / times.sum() - without
    squares = float(times @ influence**2)
    return float(times @ influence**3) / (6 * squares**1.5) if squares > 0 else 0.0


def interval(sample: Sample, statistic: Statistic, level: float, step: float = 1.0) -> Estimate:
    """The statistic with BCa bounds, each missed with probability about `level`."""
    found = Bootstrap.of(sample, statistic, level, step)
    return Estimate(float(statistic(sample.weights)[0]), found.bound(level), found.bound(1 - level))
