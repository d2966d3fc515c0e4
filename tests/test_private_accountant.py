"""Epsilon against dp-accounting 0.6.0 (its numbers stand here: it does not install beside this project's pins), closed
forms, and itself."""

import math

import numpy as np
import pytest
from hypothesis import given
from hypothesis import strategies as st

from netweight.errors import OptionError
from netweight.run.federated.accountant import ORDERS, Steps, epsilon, noise_for
from netweight.run.federated.accountant import _renyi as renyi

# noise, rate, steps, delta; epsilon of RdpAccountant and of PLDAccountant.
SAMPLED = [
    (1.0, 0.01, 1000, 1e-5, 2.101366525420273, 1.8282436455855091),
    (5.0, 0.2, 300, 1e-5, 3.211583772411381, 2.9554040273125777),
    (0.5, 0.001, 100, 1e-5, 3.5981250152851576, 2.1086455696941737),
    (1.2, 0.25, 40, 1e-5, 9.278198081693198, 8.367741060940379),
    (0.6, 0.016, 310, 1e-5, 8.407364486963164, 7.10693463982556),
    (0.8, 0.1, 200, 1e-5, 17.24570836036361, 15.511427507919082),
    (2.0, 0.5, 50, 1e-6, 11.329169363155582, 10.529540109602133),
]
GAUSSIAN = [
    (2.0, 10, 1e-5, 7.511275900744785),
    (1.0, 1, 1e-5, 4.377178095681137),
    (0.5, 3, 1e-6, 21.839216403906992),
    (20.0, 10, 1e-5, 0.5612849328807852),
]


@pytest.mark.parametrize(("noise", "rate", "count", "delta", "theirs", "tight"), SAMPLED)
def test_epsilon_of_sampled_steps_is_that_of_dp_accounting(noise, rate, count, delta, theirs, tight):
    ours = epsilon([Steps(noise, rate, count)], delta)
    # Its series for orders that are no integers takes absolute values and drops what does not converge, so where the
    # best order is below 4 it says more than the integral that we take.
    assert ours <= theirs + 1e-3
    assert ours >= tight
    if (noise, rate) not in ((0.6, 0.016), (0.8, 0.1), (2.0, 0.5)):
        assert ours == pytest.approx(theirs, abs=1e-3)


@pytest.mark.parametrize(("noise", "count", "delta", "theirs"), GAUSSIAN)
def test_epsilon_of_sums_over_all_is_exact(noise, count, delta, theirs):
    assert epsilon([Steps(noise, 1.0, count)], delta) == pytest.approx(theirs, abs=1e-6)


@pytest.mark.parametrize(("noise", "rate", "count", "delta", "theirs", "tight"), SAMPLED)
def test_the_library_itself_agrees_where_it_is_installed(noise, rate, count, delta, theirs, tight):
    dp = pytest.importorskip("dp_accounting", reason="dp-accounting is not installed; its numbers are above")
    event = dp.SelfComposedDpEvent(dp.PoissonSampledDpEvent(rate, dp.GaussianDpEvent(noise)), count)
    whole = [float(order) for order in ORDERS if order == int(order) and order > 1]
    library = dp.rdp.RdpAccountant(whole).compose(event)
    mine = dict(zip(ORDERS, count * renyi(noise, rate)))
    assert [mine[order] for order in whole] == pytest.approx(list(library._rdp), rel=1e-9)


@pytest.mark.parametrize(("noise", "rate"), [(0.4, 0.02), (1.0, 0.3), (4.0, 0.01)])
def test_divergences_at_whole_orders_are_the_binomial_sum(noise, rate):
    """Mironov, Talwar and Zhang (2019), section 3.3."""
    mine = dict(zip(ORDERS, renyi(noise, rate)))
    for order in (2, 3, 7, 20):
        terms = [
            math.log(math.comb(order, k))
            + k * math.log(rate)
            + (order - k) * math.log1p(-rate)
            + (k * k - k) / (2 * noise**2)
            for k in range(order + 1)
        ]
        assert mine[order] == pytest.approx(np.logaddexp.reduce(terms) / (order - 1), rel=1e-9)


def test_calibrated_noise_keeps_the_budget_and_no_less_would():
    for budget, rate, count in ((8.0, 0.016, 310), (1.0, 0.1, 50), (8.0, 1.0, 10), (0.1, 1.0, 3)):
        noise = noise_for(budget, 1e-5, rate, count)
        assert epsilon([Steps(noise, rate, count)], 1e-5) <= budget
        assert epsilon([Steps(noise * 0.999, rate, count)], 1e-5) > budget


@given(st.floats(0.5, 10), st.floats(1e-3, 0.5), st.integers(1, 500), st.floats(1.05, 3), st.floats(1e-8, 1e-3))
def test_more_noise_costs_less_and_more_steps_cost_more(noise, rate, count, more, delta):
    plain = epsilon([Steps(noise, rate, count)], delta)
    assert epsilon([Steps(noise * more, rate, count)], delta) <= plain
    assert epsilon([Steps(noise, rate, count), Steps(noise, rate, 1)], delta) >= plain
    assert epsilon([Steps(noise, 1.0, count)], delta) >= epsilon([Steps(noise, 1.0, 1)], delta)


def test_nothing_released_costs_nothing():
    assert epsilon([], 1e-5) == 0
    assert epsilon([Steps(1.0, 0.5, 0)], 1e-5) == 0


def test_parts_of_steps_cost_what_they_cost_in_one():
    whole = epsilon([Steps(1.0, 0.02, 300)], 1e-5)
    assert epsilon([Steps(1.0, 0.02, 100), Steps(1.0, 0.02, 200)], 1e-5) == pytest.approx(whole, rel=1e-12)


def test_what_is_out_of_range_is_refused():
    with pytest.raises(OptionError, match="delta is 1.5; use a number between 0 and 1"):
        epsilon([Steps(1.0, 0.5, 1)], 1.5)
    with pytest.raises(OptionError, match="noise must be above 0"):
        Steps(0.0, 0.5, 1)
    with pytest.raises(OptionError, match="epsilon is 0; use a number above 0"):
        noise_for(0, 1e-5, 0.1, 10)
    with pytest.raises(OptionError, match="no noise keeps 10 steps within epsilon 1e-09"):
        noise_for(1e-9, 1e-12, 1.0, 10)
