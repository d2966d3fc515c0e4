"""Aggregators against numpy, closed forms and Flower's own."""

from __future__ import annotations

import importlib.util

import numpy as np
import pytest
import torch
from hypothesis import given, settings
from hypothesis import strategies as st

from netweight.errors import OptionError
from netweight.run.aggregate import Adam, Aggregator, Krum, Mean, Median, TrimmedMean, Updates
from netweight.testing import AggregateContract

ALL: list[Aggregator] = [Mean(), Median(), TrimmedMean(0.2), TrimmedMean(0.0), Krum(0), Krum(0, keep=3), Krum(1)]


def updates(n: int, seed: int = 0) -> dict[str, dict[str, torch.Tensor]]:
    drawn = torch.Generator().manual_seed(seed)
    shapes = {"a": (2, 3), "b": (4,)}
    return {f"c{i:02d}": {k: torch.randn(*s, generator=drawn) for k, s in shapes.items()} for i in range(n)}


def rows(held: Updates) -> dict[str, float]:
    return {c: float(10 + 3 * i) for i, c in enumerate(sorted(held))}


def stacked(held: Updates, name: str) -> np.ndarray:
    return np.stack([held[c][name].double().numpy() for c in sorted(held)])


@pytest.mark.parametrize("aggregate", ALL, ids=repr)
def test_contract(aggregate: Aggregator) -> None:
    AggregateContract(aggregate).check()


def test_the_contract_sees_what_breaks_it() -> None:
    class First:
        def __call__(self, held: Updates, weights: object) -> dict[str, torch.Tensor]:
            return dict(next(iter(held.values())))

    class Float:
        def __call__(self, held: Updates, weights: object) -> dict[str, torch.Tensor]:
            return {n: torch.stack([u[n].float() for u in held.values()]).mean(0) for n in held["client0"]}

    with pytest.raises(AssertionError, match="differs"):
        AggregateContract(First()).does_not_depend_on_the_order()
    with pytest.raises(AssertionError, match="came as torch"):
        AggregateContract(Float()).keeps_shapes_and_dtypes()
    with pytest.raises(AssertionError, match="differs"):
        AggregateContract(First()).leaves_what_it_is_given()


@settings(max_examples=25)
@given(st.integers(1, 9), st.integers(0, 99))
def test_they_equal_numpy(n: int, seed: int) -> None:
    held = updates(n, seed)
    weights = rows(held)
    for name in ("a", "b"):
        values = stacked(held, name)
        wanted: dict[Aggregator, np.ndarray] = {
            Mean(): np.average(values, axis=0, weights=[weights[c] for c in sorted(held)]),
            Median(): np.median(values, axis=0),
        }
        if cut := int(0.2 * n):
            wanted[TrimmedMean(0.2)] = np.sort(values, axis=0)[cut : n - cut].mean(axis=0)
        for aggregate, value in wanted.items():
            np.testing.assert_allclose(aggregate(held, weights)[name].numpy(), value, rtol=1e-6, atol=1e-7)


@settings(max_examples=25)
@given(st.integers(5, 9), st.integers(0, 1), st.integers(0, 99))
def test_krum_equals_a_plain_loop(n: int, faulty: int, seed: int) -> None:
    held = updates(n, seed)
    names = sorted(held)
    flat = {c: np.concatenate([held[c][k].double().numpy().ravel() for k in ("a", "b")]) for c in names}
    scores = {}
    for one in names:
        apart = sorted(((flat[one] - flat[other]) ** 2).sum() for other in names if other != one)
        scores[one] = sum(apart[: n - faulty - 2])
    order = sorted(names, key=lambda c: scores[c])
    assert Krum(faulty).chosen(held) == [order[0]]
    assert Krum(faulty, keep=3).chosen(held) == sorted(order[:3])


@pytest.mark.parametrize("aggregate", [Median(), TrimmedMean(0.3), Krum(2), Krum(2, keep=4)], ids=repr)
def test_robust_ones_stand_two_of_seven_that_lie(aggregate: Aggregator) -> None:
    held = updates(7)
    for liar in ("c01", "c05"):
        held[liar] = {name: value * 1e6 for name, value in held[liar].items()}
    made = aggregate(held, rows(held))
    honest = {c: u for c, u in held.items() if c not in ("c01", "c05")}
    for name, value in made.items():
        seen = stacked(honest, name)
        assert (value.numpy() <= seen.max(0) + 1e-6).all()
        assert (value.numpy() >= seen.min(0) - 1e-6).all()
    assert float(Mean()(held, rows(held))["a"].abs().max()) > 1e4, "the mean does not"


def test_fedadam_equals_its_formula() -> None:
    """Three steps of Reddi et al., algorithm 2, written out in numpy."""
    options = Adam(rate=0.1, beta1=0.9, beta2=0.95, tau=0.01)
    old = {"w": torch.tensor([1.0, -2.0, 0.5])}
    x, m, v = old["w"].double().numpy(), np.zeros(3), np.full(3, 0.01**2)
    moments = None
    for step in range(3):
        mean = {"w": old["w"] + torch.tensor([0.1, 0.0, -0.3]) * (step + 1)}
        change = mean["w"].double().numpy() - old["w"].double().numpy()
        m, v = 0.9 * m + 0.1 * change, 0.95 * v + 0.05 * change**2
        x = x + 0.1 * m / (np.sqrt(v) + 0.01)
        old, moments = options(old, mean, moments)
        np.testing.assert_allclose(old["w"].numpy(), x, rtol=1e-5)


def test_refusals() -> None:
    with pytest.raises(OptionError, match="Krum against 1 faulty clients needs 5 updates, and 4 came"):
        Krum(1)(updates(4), rows(updates(4)))
    with pytest.raises(OptionError, match="Krum has faulty -1, keep 1"):
        Krum(-1)
    with pytest.raises(OptionError, match="TrimmedMean cuts a share of 0.5 at both ends"):
        TrimmedMean(0.5)
    with pytest.raises(OptionError, match="FedAdam has rate 0"):
        Adam(rate=0)


@pytest.mark.parametrize(("share", "least"), [(0.2, 5), (0.25, 4), (0.1, 10), (0.3, 4), (0.49, 3), (1 / 49, 50)])
def test_a_trimmed_mean_that_would_leave_nobody_out_is_refused(share: float, least: int) -> None:
    few, enough = updates(least - 1), updates(least)
    with pytest.raises(
        OptionError, match=rf"at both ends, which needs {least} updates, and {least - 1} came; .*Median"
    ):
        TrimmedMean(share)(few, rows(few))
    enough["c00"] = {name: value + 1e6 for name, value in enough["c00"].items()}
    assert float(TrimmedMean(share)(enough, rows(enough))["a"].abs().max()) < 1e3
    assert TrimmedMean(0.0)(few, rows(few)).keys() == few["c00"].keys()


@pytest.mark.skipif(importlib.util.find_spec("flwr") is None, reason="flwr is not installed")
def test_they_equal_flowers(monkeypatch: pytest.MonkeyPatch) -> None:
    """Flower's FedAdam corrects its rate for bias, which the paper does not: it is compared with the formula above."""
    monkeypatch.setenv("FLWR_TELEMETRY_ENABLED", "0")
    from flwr.app import Array, ArrayRecord, MetricRecord, RecordDict
    from flwr.serverapp.strategy.fedtrimmedavg import trim_mean
    from flwr.serverapp.strategy.multikrum import select_multikrum
    from flwr.serverapp.strategy.strategy_utils import aggregate_arrayrecords

    held = updates(8)
    weights = rows(held)
    records = [
        RecordDict(
            {
                "arrays": ArrayRecord({k: Array(v.numpy()) for k, v in held[c].items()}),
                "metrics": MetricRecord({"rows": weights[c]}),
            }
        )
        for c in sorted(held)
    ]
    mean = aggregate_arrayrecords(records, "rows")
    for name in ("a", "b"):
        np.testing.assert_allclose(Mean()(held, weights)[name].numpy(), mean[name].numpy(), rtol=1e-5, atol=1e-7)
        trimmed = trim_mean(stacked(held, name), 0.2)
        np.testing.assert_allclose(TrimmedMean(0.2)(held, weights)[name].numpy(), trimmed, rtol=1e-6)
    for keep in (1, 3):
        theirs = select_multikrum(records, 2, keep)
        ours = Krum(2, keep).chosen(held)
        assert sorted(sorted(held)[records.index(r)] for r in theirs) == ours
