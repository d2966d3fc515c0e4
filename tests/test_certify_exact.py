"""Tail probabilities against scipy; the exact test against enumeration of every table."""

from __future__ import annotations

import itertools
import math
import time
import tracemalloc

import numpy as np
import pytest
from hypothesis import given, settings
from hypothesis import strategies as st
from scipy import stats
from scipy.special import betainc, gammaln

from netweight.certify.exact import interval, most_lost, p_value, passes
from netweight.certify.power import binary_power, binary_rows, normal_power, normal_rows
from netweight.certify.tails import (
    _log_factorials,
    beta_cdf,
    binomial_bounds,
    binomial_cdf,
    binomial_pmf,
    normal_quantile,
    normal_tail,
    tango,
    tango_score,
)

counts = st.tuples(st.integers(0, 40), st.integers(0, 40), st.integers(0, 2000)).map(lambda t: (t[0], t[1], sum(t) + 1))


def test_tails_equal_scipy() -> None:
    rng = np.random.default_rng(0)
    a, b, x = rng.gamma(1, 200, 300) + 0.1, rng.gamma(1, 200, 300) + 0.1, rng.random(300)
    np.testing.assert_allclose(beta_cdf(x, a, b), betainc(a, b, x), rtol=1e-9, atol=1e-13)
    n = rng.integers(0, 5000, 300)
    k, p = rng.integers(-1, n + 2), rng.random(300)
    np.testing.assert_allclose(binomial_cdf(k, n, p), stats.binom.cdf(k, n, p), rtol=1e-9, atol=1e-13)
    np.testing.assert_allclose(binomial_pmf(k, n, p), stats.binom.pmf(k, n, p), rtol=1e-8, atol=1e-14)
    for certain, n in itertools.product((0.0, 1.0), (3, 3000)):  # 3,000 have more choices than a float can hold
        k = np.arange(n + 1)
        np.testing.assert_array_equal(binomial_pmf(k, n, certain), stats.binom.pmf(k, n, certain))
    assert normal_tail(normal_quantile(0.0123)) == pytest.approx(0.0123)


def test_intervals_of_a_proportion_equal_scipy() -> None:
    for count, n in ((0, 20), (3, 50), (19, 20), (20, 20), (2900, 3080)):
        exact = stats.binomtest(count, n).proportion_ci(0.95, "exact")
        assert binomial_bounds(count, n, 0.025) == pytest.approx((exact.low, exact.high), abs=1e-9)


def test_tango_equals_the_published_interval() -> None:
    # Fagerland, Lydersen and Laake (2014): airway hyper-responsiveness of 21 children before and after a transplantation.
    assert tango(1, 7, 21, normal_quantile(0.025)) == pytest.approx((-0.517, -0.026), abs=5e-4)


def test_tango_score_is_that_of_constrained_maximum_likelihood() -> None:
    """The variance against a brute-force maximum of the likelihood of P(gained) under a drop of 0.03."""
    b, c, n, drop = 12, 7, 200, 0.03
    q = np.linspace(1e-6, 0.3, 1_000_000)
    likelihood = b * np.log(q + drop) + c * np.log(q) + (n - b - c) * np.log(1 - 2 * q - drop)
    best = q[likelihood.argmax()]
    expected = (b - c - n * drop) / np.sqrt(n * (2 * best + drop - drop**2))
    assert float(tango_score(b, c, n, drop)) == pytest.approx(expected, rel=1e-5)
    assert float(tango_score(b, c, n, -drop)) == -float(tango_score(c, b, n, drop))


def tables(n: int) -> tuple[np.ndarray, np.ndarray]:
    b, c = np.meshgrid(np.arange(n + 1), np.arange(n + 1), indexing="ij")
    return b[b + c <= n], c[b + c <= n]


@pytest.mark.parametrize(("n", "margin", "level"), [(15, 0.1, 0.025), (25, 0.05, 0.025), (30, 0.1, 0.1)])
def test_the_test_is_false_in_at_most_its_level(n: int, margin: float, level: float) -> None:
    """Every table, every chance of a gain, drops of the margin and more: the size is exact, and not far below."""
    b, c = tables(n)
    rejected = np.array([passes(int(x), int(y), n, margin, level) for x, y in zip(b, c, strict=True)])
    choose = gammaln(n + 1) - gammaln(b + 1) - gammaln(c + 1) - gammaln(n - b - c + 1)
    worst = 0.0
    for drop in (margin, 1.2 * margin, 2 * margin):
        for q in np.linspace(1e-9, (1 - drop) / 2 - 1e-9, 400):
            rest = 1 - 2 * q - drop
            mass = np.exp(choose + b * np.log(q + drop) + c * np.log(q) + (n - b - c) * np.log(rest))
            worst = max(worst, float(mass[rejected].sum()))
    assert 0.7 * level < worst <= level


def test_p_values_equal_a_direct_sum() -> None:
    for b, c, n in ((20, 15, 1000), (3, 3, 50), (5, 0, 200)):
        low, high = binomial_bounds(b + c, n, 0.00025 / 2)
        q = np.linspace(max(0, (low - 0.01) / 2), (high - 0.01) / 2, 800)
        totals = np.arange(n + 1)
        most = most_lost(totals, n, 0.01, float(tango_score(b, c, n, 0.01)))
        both = 2 * q[:, None] + 0.01
        sums = (stats.binom.pmf(totals, n, both) * stats.binom.cdf(most, totals, (q[:, None] + 0.01) / both)).sum(
            axis=1
        )
        assert p_value(b, c, n, 0.01, 0.025) == pytest.approx(sums.max() + 0.00025, rel=1e-5)


@given(counts, st.floats(0.005, 0.1))
@settings(max_examples=20, deadline=None)
def test_fewer_lost_or_more_gained_rows_pass_where_others_do(table: tuple[int, int, int], margin: float) -> None:
    b, c, n = table
    if passes(b, c, n, margin, 0.025):
        assert b == 0 or passes(b - 1, c, n, margin, 0.025)
        assert passes(b, c + 1, n, margin, 0.025)
    assert p_value(b, c, n, margin + 0.02, 0.025) <= p_value(b, c, n, margin, 0.025) + 1e-9


@given(counts)
@settings(max_examples=12, deadline=None)
def test_intervals_swap_and_agree_with_the_test(table: tuple[int, int, int]) -> None:
    b, c, n = table
    low, high = interval(b, c, n, 0.02, 0.025)
    assert low <= (b - c) / n <= high
    assert (high <= 0.02) == passes(b, c, n, 0.02, 0.025)
    mirrored = interval(c, b, n, 0.02, 0.025)
    assert mirrored == pytest.approx((-high, -low), abs=1e-5)


def test_ends_of_the_scale() -> None:
    assert passes(0, 0, 369, 0.01, 0.025)
    assert not passes(0, 0, 368, 0.01, 0.025)
    assert interval(50, 0, 50, 0.01, 0.025)[1] == 1.0
    assert interval(0, 50, 50, 0.01, 0.025)[0] == -1.0
    # So few discordant pairs that a drop of 10 points is out of the question: what bounding q costs remains.
    assert p_value(0, 0, 1000, 0.1, 0.025) == 0.00025


def test_many_rows_that_differ_about_as_often_as_may_be_lost() -> None:
    # The null's edge, where all that differs is lost, is one of certainty.
    table = (1500, 500, 200_000, 0.01, 0.025)
    assert passes(*table)
    assert interval(*table)[1] < 0.006
    assert p_value(1000, 1000, 200_000, 0.01, 0.025) == pytest.approx(0.025 / 100, abs=1e-6)


def test_logarithms_of_factorials_are_made_one_by_one() -> None:
    """A table for ten million rows has 17 million: 134 MB, and ten times that as objects of Python."""
    tracemalloc.start()
    table = _log_factorials.__wrapped__(15)
    most = tracemalloc.get_traced_memory()[1]
    tracemalloc.stop()
    assert most < 2 * table.nbytes
    assert table.tolist() == [math.lgamma(k + 1.0) for k in range(2**15)]


def test_ten_thousand_rows_take_less_than_a_second() -> None:
    start = time.process_time()
    p_value(500, 450, 10_000, 0.01, 0.025)
    assert time.process_time() - start < 1


def test_power_is_the_share_of_simulations_that_pass() -> None:
    rng = np.random.default_rng(0)
    for discordant, drop, n in ((0.03, 0.0, 1500), (0.02, 0.004, 2000)):
        b, c, _ = rng.multinomial(n, [(discordant + drop) / 2, (discordant - drop) / 2, 1 - discordant], 150).T
        found = np.mean([passes(int(x), int(y), n, 0.01, 0.025) for x, y in zip(b, c, strict=True)])
        assert binary_power(discordant, drop, n, 0.01, 0.025) == pytest.approx(found, abs=0.12)


def test_rows_needed_have_the_chance_and_one_less_has_not() -> None:
    rows = binary_rows(0.05, 0.0, 0.01, 0.025)
    assert rows is not None
    assert binary_power(0.05, 0.0, rows, 0.01, 0.025) >= 0.8
    assert binary_power(0.05, 0.0, rows // 2, 0.01, 0.025) < 0.8
    assert binary_rows(0.05, 0.01, 0.01, 0.025) is None
    assert binary_rows(0.05, 0.0099, 0.01, 0.025) is None
    rows = normal_rows(0.004, 0.0, 3000, 0.01, 0.025)
    assert rows is not None
    assert normal_power(0.004 * np.sqrt(3000 / rows), 0.0, 0.01, 0.025) == pytest.approx(0.8, abs=1e-3)
    assert normal_rows(1.0, 0.0, 1, 0.00095, 0.025) == 8_696_820, "between the last power of two and ten million"
    assert normal_rows(1.0, 0.0, 1, 0.00088, 0.025) is None


def test_the_more_a_candidate_gains_the_fewer_rows_are_needed() -> None:
    """Also beyond a gain of the margin."""
    gains = (0.0, 0.005, 0.0099, 0.01, 0.0101, 0.02, 0.05, 0.08)
    rows = [binary_rows(0.08, -gain, 0.01, 0.025) or 0 for gain in gains]
    assert rows == sorted(rows, reverse=True)
    assert rows[2] - rows[4] < 0.03 * rows[3], "nothing happens at the margin itself"
    assert rows[-1] > 16
    wanted = (normal_quantile(0.025) + normal_quantile(0.2)) ** 2 * (0.08 - 0.02**2) / 0.03**2
    assert rows[5] == pytest.approx(wanted, rel=0.1)
    powers = [binary_power(0.08, -0.02, n, 0.01, 0.025) for n in (50, 200, 700, 2000)]
    assert powers == sorted(powers)
    assert powers[0] < 0.5 < powers[-1] <= 1


def test_power_at_its_ends() -> None:
    assert binary_power(0.0, 0.0, 369, 0.01, 0.025) == 1.0
    assert binary_power(0.0, 0.0, 368, 0.01, 0.025) == 0.0
    assert binary_rows(0.0, 0.0, 0.01, 0.025) == 369
    assert binary_power(0.1, 0.02, 5000, 0.01, 0.025) == 0.0
    assert binary_power(0.1, -0.02, 5000, 0.01, 0.025) == pytest.approx(1.0)
    assert binary_power(0.1, 0.0, 5000, 1.0, 0.025) == 1.0
    assert binary_power(0.05, 0.0, 200_000, 0.01, 0.025) == pytest.approx(1.0)
    assert normal_power(0.0, 0.0, 0.01, 0.025) == 1.0
    assert normal_power(0.0, 0.01, 0.01, 0.025) == 0.0
