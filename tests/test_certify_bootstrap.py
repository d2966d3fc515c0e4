"""Resampling against scipy and repetition; calibration against simulations; scripts; rates of false certificates."""

from __future__ import annotations

import importlib.util
import json
import sys
import time
import tracemalloc
from pathlib import Path
from types import ModuleType

import numpy as np
import pytest
from scipy import stats
from scipy.optimize import minimize_scalar

from netweight.certify import calibrated, fit_temperature
from netweight.certify.bootstrap import Bootstrap, Sample, interval
from netweight.certify.compare import Pairs, absolute, compare, extended, require
from netweight.certify.slices import _drop, columns, script
from netweight.certify.tails import binomial_bounds, normal_quantile
from netweight.data.rows import Rows
from netweight.errors import CertificateError
from netweight.task import Classify, Score, softmax

BENCHMARK = Path(__file__).parents[1] / "benchmarks" / "certificate.py"


def test_bca_bounds_are_near_those_of_scipy() -> None:
    values = np.random.default_rng(0).lognormal(size=200)
    sample = Sample.of(values[:, None], None, seed=1)
    ours = interval(sample, lambda w: w @ sample.rows[:, 0] / w.sum(axis=1), 0.001)
    theirs = stats.bootstrap((values,), np.mean, confidence_level=0.998, n_resamples=20_000, rng=2).confidence_interval
    assert ours.value == pytest.approx(values.mean())
    assert (ours.low, ours.high) == pytest.approx((theirs.low, theirs.high), abs=0.08)


def test_the_p_value_is_the_level_at_which_the_bound_meets_the_limit() -> None:
    values = np.random.default_rng(0).lognormal(size=60)
    sample = Sample.of(values[:, None], None, seed=1)
    found = Bootstrap.of(sample, lambda w: w @ sample.rows[:, 0] / w.sum(axis=1), 0.025)
    for level in (0.01, 0.025, 0.2, 0.7):
        assert found.p_value(found.bound(1 - level)) == pytest.approx(level, rel=1e-6)


def test_bounds_of_the_smallest_levels_are_the_ends() -> None:
    """1 less such a level is 1, whose quantile is infinite."""
    found = Bootstrap(np.arange(100.0), 0.0, 0.0)
    assert (found.bound(0.05 / 2**50), found.bound(1 - 0.05 / 2**50)) == (0.0, 99.0)


def test_draws_are_the_same_everywhere() -> None:
    """The raw stream of PCG64 is fixed, so a certificate is recomputed to the last digit by another numpy."""
    sample = Sample.of(np.arange(5.0)[:, None], None, seed=7)
    drawn = np.concatenate(list(sample.drawn(3)))
    np.testing.assert_array_equal(drawn.sum(axis=1), 5)
    np.testing.assert_array_equal(drawn, [[0, 2, 0, 2, 1], [1, 0, 1, 1, 2], [0, 3, 2, 0, 0]])


def test_equal_rows_are_counted_once_and_drawn_as_often_as_they_occur() -> None:
    contents = np.repeat([[0.0, 1.0], [1.0, 1.0]], [70, 30], axis=0)
    sample = Sample.of(contents, None, seed=0)
    assert sample.rows.shape == (2, 2)
    np.testing.assert_array_equal(sample.weights, [[70, 30]])
    drawn = np.concatenate(list(sample.drawn(4000)))
    assert drawn[:, 1].mean() == pytest.approx(30, abs=0.4)
    assert drawn[:, 1].std() == pytest.approx(np.sqrt(21), abs=0.2)


def test_groups_are_drawn_and_left_out_as_wholes() -> None:
    sample = Sample.of(np.arange(6.0)[:, None], np.array([5, 5, 5, 9, 9, 2]), seed=0)
    drawn = np.concatenate(list(sample.drawn(500)))
    assert sample.units == 3
    assert (drawn[:, 0] == drawn[:, 2]).all()
    assert (drawn[:, 3] == drawn[:, 4]).all()
    np.testing.assert_array_equal(drawn[:, 0] + drawn[:, 3] + drawn[:, 5], 3)
    without = np.concatenate([w for w, _ in sample.left_out()])
    assert sorted(without.sum(axis=1).tolist()) == [3, 4, 5]


def test_many_rows_are_left_out_in_a_thousand_parts() -> None:
    sample = Sample.of(np.arange(2500.0)[:, None], None, seed=0)
    without = np.concatenate([w for w, _ in sample.left_out()])
    assert without.shape == (1000, 2500)
    np.testing.assert_array_equal((1 - without).sum(axis=0), 1)


def test_parts_of_distinct_rows_are_left_out_a_few_at_a_time() -> None:
    """All thousand of them would take 8 kB a row at once."""
    sample = Sample.of(np.arange(20_000.0)[:, None], None, seed=0)
    tracemalloc.start()
    first, times = next(sample.left_out())
    most = tracemalloc.get_traced_memory()[1]
    tracemalloc.stop()
    assert most < 100_000_000
    assert (len(first), times.tolist()) == (100, [1.0] * 100)
    np.testing.assert_array_equal(first.sum(axis=1), 19_980)
    np.testing.assert_array_equal(sum((1 - weights).sum(axis=0) for weights, _ in sample.left_out()), 1)


def random_pairs(task: Classify | Score, n: int, groups: np.ndarray | None = None) -> Pairs:
    rng = np.random.default_rng(0)
    if isinstance(task, Classify):
        k = task.outputs
        true = rng.integers(0, k, n)
        reference = np.where(rng.random(n) < 0.93, true, rng.integers(0, k, n))
        candidate = np.where(rng.random(n) < 0.98, reference, rng.integers(0, k, n))
    else:
        true = rng.normal(size=n)
        reference = true + 0.4 * rng.normal(size=n)
        candidate = reference + 0.1 * rng.normal(size=n)
    return Pairs(
        task,
        np.stack([reference, true], axis=1).astype(float),
        np.stack([candidate, true], axis=1).astype(float),
        groups,
    )


def test_bootstrap_and_exact_intervals_of_accuracy_agree_where_groups_mean_nothing() -> None:
    """Groups that were dealt at random differ by chance alone: clustering must cost nothing but noise."""
    task = Classify(("a", "b", "c"))
    groups = np.random.default_rng(1).permutation(np.repeat(np.arange(1500), 2))
    exact, clustered = (compare(random_pairs(task, 3000, g), 3.0, 0.025, 0) for g in (None, groups))
    assert clustered.drop.value == pytest.approx(exact.drop.value)
    assert clustered.drop.high == pytest.approx(exact.drop.high, abs=0.002)
    assert clustered.drop.low == pytest.approx(exact.drop.low, abs=0.002)


def test_groups_in_which_nothing_differs_have_no_interval() -> None:
    """Resampled, what does not differ never does; that is no proof that it cannot."""
    same = random_pairs(Classify(("a", "b")), 90, np.repeat(np.arange(45), 2))
    assert _drop(same.task, same.reference, same.reference, same.groups, 0.025) is None
    alone = _drop(same.task, same.reference, same.reference, None, 0.025)
    assert alone is not None
    assert alone.low < 0 < alone.high
    assert _drop(same.task, same.reference, same.candidate, same.groups, 0.025) is not None
    lost = np.stack([1 - same.reference[:, 1], same.reference[:, 1]], axis=1)
    assert _drop(same.task, same.reference[:, [1, 1]], lost, same.groups, 0.025) is None, "nor where all differ"


@pytest.mark.parametrize("metric", ["spearman", "mae"])
def test_scores_that_do_not_differ_have_no_interval(metric: str) -> None:
    task = Score(metric=metric)  # type: ignore[arg-type]
    found = random_pairs(task, 60)
    assert _drop(task, found.reference, found.reference, None, 0.025) is None
    assert _drop(task, found.reference, found.candidate, None, 0.025) is not None
    found.reference[:, 1] = found.candidate[:, 1] = 2.0
    defined = _drop(task, found.reference, found.candidate, None, 0.025) is not None
    assert defined == (metric == "mae"), "no correlation with scores that are all equal"


@pytest.mark.parametrize("scale", [2.0**-24, 2.0**-40])
def test_errors_in_a_small_unit_are_resampled_as_in_any(scale: float) -> None:
    whole = random_pairs(Score(metric="mae"), 300)
    small = Pairs(Score(scale=scale, metric="mae"), scale * whole.reference, scale * whole.candidate)
    found = []
    for pairs, unit in ((whole, 1.0), (small, scale)):
        tested = compare(pairs, 5.0, 0.025, 0)
        own = absolute(pairs.task, pairs.reference, None, 0.025, 0)
        part = _drop(pairs.task, pairs.reference, pairs.candidate, None, 0.025)
        assert part is not None
        bounds = [at / unit for e in (tested.drop, own, part) for at in (e.value, e.low, e.high)]
        found.append([tested.p_value, *bounds])
    assert found[1] == pytest.approx(found[0], rel=1e-6)


def test_groups_that_matter_widen_the_interval() -> None:
    rng = np.random.default_rng(0)
    lost = np.repeat(rng.random(200) < 0.03, 10)
    true = np.ones(2000)
    rows = np.stack([true, true], axis=1), np.stack([1.0 - lost, true], axis=1)
    task = Classify(("wrong", "right"))
    alone, together = (compare(Pairs(task, *rows, g), 5.0, 0.025, 0) for g in (None, np.repeat(np.arange(200), 10)))
    assert together.drop.high - together.drop.low > 2 * (alone.drop.high - alone.drop.low)


def test_a_rare_class_without_any_lost_row_is_not_taken_for_proof() -> None:
    """One of 30 rows of the rare class is worth over a point of macro-F1; none lost of 30 shows little."""
    task = Classify(("common", "rare"), "macro-f1")
    true = np.repeat([0.0, 1.0], [970, 30])
    rows = np.stack([true, true], axis=1)
    found = compare(Pairs(task, rows, rows), 1.0, 0.025, 0)
    assert found.drop.value == 0
    assert found.p_value > 0.025
    assert found.drop.low < -0.01 < 0.01 < found.drop.high


@pytest.mark.parametrize("metric", ["macro-f1", "spearman", "mae"])
def test_five_thousand_rows_take_less_than_five_seconds(metric: str) -> None:
    names = tuple(map(str, range(77)))
    task = Classify(names, "macro-f1") if metric == "macro-f1" else Score(metric=metric)  # type: ignore[arg-type]
    start = time.process_time()
    found = compare(random_pairs(task, 5000), 5.0, 0.025, 0)
    assert time.process_time() - start < 5
    assert found.drop.low < found.drop.value < found.drop.high < found.margin


def test_classes_and_groups_must_be_large_enough() -> None:
    task = Classify(("a", "b"), "macro-f1")
    true = np.repeat([0.0, 1.0], [50, 24])
    rows = np.stack([true, true], axis=1)
    with pytest.raises(
        CertificateError, match="'b' has 24. Merge such classes, give more labelled rows, or use --metric"
    ):
        require(task, rows, None)
    require(task, np.vstack([rows, rows[-1:]]), None)
    # A hundred rows of one user are one that tells; of 25 users, whatever else these say, as many.
    users = np.stack([np.repeat([0.0, 1.0], [50, 100])] * 2, axis=1)
    with pytest.raises(CertificateError, match=r"'b' has 1 \(rows of one group count once\)\. Merge such classes"):
        require(task, users, np.concatenate([np.arange(50), np.full(100, 50)]))
    require(task, users, np.concatenate([np.arange(50), np.arange(100) % 25]))
    with pytest.raises(CertificateError, match="form 29 groups; at least 30"):
        require(Classify(("a", "b")), rows, np.arange(74) % 29)
    scores = np.stack([np.arange(30.0), np.full(30, 3.0)], axis=1)
    with pytest.raises(CertificateError, match=r"scores need at least 30 certify rows .*; there are 29\. Give more"):
        require(Score(), scores[:29], None)
    for metric in ("spearman", "mae"):
        with pytest.raises(
            CertificateError, match="all 30 rows of certify have the score 3, so that .* whose scores differ"
        ):
            require(Score(metric=metric), scores, None)  # type: ignore[arg-type]
    scores[0, 1] = 4
    require(Score(), scores, None)


@pytest.mark.parametrize(
    ("metric", "rows", "rarest", "within"),
    [("accuracy", 900, 300, 0.1), ("macro-f1", 500, 30, 0.2), ("spearman", 500, 0, 0.35), ("mae", 500, 0, 0.35)],
)
def test_plans_know_what_the_test_adds_where_nothing_differs(
    metric: str, rows: int, rarest: int, within: float
) -> None:
    """The upper bound of a candidate that answers as its reference does, which without it would be 0."""
    if metric in Score.metrics:
        task: Classify | Score = Score(metric=metric)  # type: ignore[arg-type]
        reference = random_pairs(task, rows).reference
    else:
        task = Classify(("a", "b", "c"), metric)  # type: ignore[arg-type]
        true = np.repeat([0.0, 1.0, 2.0], [(rows - rarest) // 2, rows - rarest - (rows - rarest) // 2, rarest])
        reference = np.stack([true, true], axis=1)
    moved, added = extended(task, reference, 0.025)
    found = compare(Pairs(task, reference, reference), 1.0, 0.025, 0)
    assert moved + normal_quantile(0.025) * added == pytest.approx(found.drop.high, rel=within)


def test_temperature_is_that_of_largest_likelihood() -> None:
    rng = np.random.default_rng(0)
    logits = 3 * rng.normal(size=(2000, 4))
    targets = (softmax(logits / 2.5).cumsum(axis=1) < rng.random((2000, 1))).sum(axis=1)
    found = fit_temperature(logits, targets, Classify(tuple("abcd")))
    assert found == pytest.approx(2.5, rel=0.1)
    best = minimize_scalar(
        lambda t: -np.log(softmax(logits / t)[np.arange(2000), targets]).mean(), bounds=(0.1, 9), method="bounded"
    )
    assert found == pytest.approx(best.x, rel=1e-3)


def test_temperature_at_its_ends() -> None:
    task = Classify(("a", "b"))
    assert fit_temperature(np.eye(2) / 10, np.array([0, 1]), task) == pytest.approx(0.05, rel=1e-3)
    assert fit_temperature(np.eye(2), np.array([1, 0]), task) == pytest.approx(20, rel=1e-3)
    assert fit_temperature(np.empty((0, 2)), np.empty(0), task) == 1.0
    assert fit_temperature(np.ones((3, 1)), np.arange(3.0), Score()) == 1.0


def test_temperature_of_rows_that_are_all_right_makes_none_certain() -> None:
    task, logits = Classify(("a", "b")), np.tile([10.0, 0.0], (400, 1))
    found = fit_temperature(logits, np.zeros(400), task)
    assert task.confidence(logits[:1], found)[0] == pytest.approx(1 - 0.05 / 400.1, rel=1e-6)


@pytest.mark.parametrize("gap", [1.0, 10.0, 100.0])
def test_temperature_of_any_scale_has_one_valley(gap: float) -> None:
    """One row in 400 is wrong: the likelihood is largest where the confidence is 399 / 400."""
    targets = np.zeros(400)
    targets[7] = 1
    found = fit_temperature(np.tile([gap, 0.0], (400, 1)), targets, Classify(("a", "b")))
    assert found == pytest.approx(gap / np.log(399), rel=0.02)


def test_calibration_error_of_a_calibrated_model_is_about_zero() -> None:
    """Without the correction it would be about 0.03 in every one of these samples."""
    rng = np.random.default_rng(0)
    errors, raw = [], []
    for _ in range(200):
        confidence = rng.uniform(0.3, 1, 400)
        found = calibrated(confidence, (rng.random(400) < confidence).astype(float))
        raw.append(np.mean((np.array(found.confidence) - found.right) ** 2))
        errors.append(found.error)
    assert np.mean(raw) > 0.004
    assert np.median(errors) < 0.03
    assert np.mean(np.array(errors) == 0) > 0.3


def test_calibration_sees_overconfidence_and_counts_all_rows() -> None:
    rng = np.random.default_rng(0)
    confidence = rng.uniform(0.5, 1, 5000)
    found = calibrated(confidence, (rng.random(5000) < confidence - 0.1).astype(float))
    assert found.error == pytest.approx(0.1, abs=0.015)
    assert sum(found.rows) == 5000
    assert np.ptp(found.rows) <= 1
    few = calibrated(np.array([0.9, 0.8]), np.array([1.0, 0.0]))
    assert few.rows == (2,)
    assert few.brier == pytest.approx((0.01 + 0.64) / 2)


@pytest.mark.parametrize(
    ("text", "expected"),
    [
        ("Nice dress", "Latin"),
        ("质量很好，推荐 OK", "Han"),
        ("とても良いです", "Japanese"),
        ("отличное платье", "Cyrillic"),
        ("좋아요", "Hangul"),
        ("ｉＰｈｏｎｅ", "Latin"),
        ("ｶﾜｲｲ ﾊﾞｯｸﾞ", "Japanese"),
        ("好™ ①", "Han"),
        ("12345 !!", "none"),
        ("", "none"),
    ],
)
def test_scripts(text: str, expected: str) -> None:
    assert script(text) == expected


def test_slice_columns() -> None:
    slices = {"shop": ("x", "y", "x", "y"), "more": ("1", "2", "3", "4")}
    found = columns(Rows(("a", "bb", "ccc", "dddd"), group=("g", "g", "h", ""), slices=slices))
    assert list(found) == ["script", "length", "group", "shop", "more"]
    assert found["length"] == ("1-2 characters", "1-2 characters", "3 characters", "4 characters")
    many = Rows(tuple(map(str, range(40))), group=tuple(map(str, range(40))))
    assert "group" not in columns(many)


def benchmark() -> ModuleType:
    spec = importlib.util.spec_from_file_location("certificate_benchmark", BENCHMARK)
    assert spec is not None
    assert spec.loader is not None
    module = importlib.util.module_from_spec(spec)
    sys.modules[spec.name] = module
    spec.loader.exec_module(module)
    return module


def test_the_benchmark_remembers_the_boundary_of_the_test() -> None:
    module = benchmark()
    for b in range(16):
        for c in range(8):
            assert module.exact_pass(b, c, 900) == module.exact.passes(b, c, 900, 0.01, 0.025)


def test_the_benchmark_sees_a_level_that_is_twice_what_was_promised() -> None:
    module = benchmark()

    def line(method: str, simulations: int, false: float) -> bool:
        limits = binomial_bounds(round(false * simulations), simulations, 0.01)
        return bool(module.Line("", method, 900, simulations, false, false, *limits, 0.0).holds)

    assert line("exact", 10_000, 0.0261)
    assert not line("exact", 10_000, 0.05)
    assert line("exact", 500, 0.03), "so few scatter"
    assert line("BCa", 225, 11 / 225)
    assert not line("BCa", 1_000, 0.05)
    stored = json.loads((BENCHMARK.parent / "results" / "certificate.json").read_text())
    assert all(module.Line(**line).holds for line in stored)


@pytest.mark.slow
@pytest.mark.parametrize(
    "only", ["plateau exact", "losses exact", "rarest of 3 BCa", "also gains BCa", "groups", "MAE, noise"]
)
def test_false_certificates_are_rare(only: str) -> None:
    lines = benchmark().run(share=0.2 if "exact" not in only else 0.05, only=only)
    assert lines
    assert all(line.holds for line in lines), lines
