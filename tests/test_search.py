"""Ladder, choices and plan, against examples worked out by hand and closed forms."""

from __future__ import annotations

import math
from dataclasses import replace
from itertools import pairwise
from pathlib import Path
from statistics import NormalDist
from tempfile import TemporaryDirectory

import numpy as np
import pytest
from hypothesis import given
from hypothesis import strategies as st

from netweight import search
from netweight.certify import fit_temperature
from netweight.data import Rows
from netweight.job import Job, Options, Tables, prepare
from netweight.measure import Cost
from netweight.search import SHARES, Choice, Planned, Point, Search, choices, judged, ladder, plan
from netweight.task import Classify, Score
from netweight.techniques import Distill, Quantize

TASK = Classify(("a", "b", "c"))
N, SELECT = 600, 200
CALIBRATE = slice(SELECT, N)
COSTS = {"": Cost(1.0, 10.0), "cheap": Cost(2.0, 20.0), "strong": Cost(30.0, 300.0)}


def point(name: str, logits: np.ndarray, size: int = 100, temperature: float = 1.0) -> Point:
    return Point(name, "static", {}, "0" * 64, size, temperature, logits.astype(np.float32))


def two(seed: int = 0) -> tuple[Point, Point, np.ndarray]:
    rng = np.random.default_rng(seed)
    targets = rng.integers(0, 3, N)
    truth = np.eye(3)[targets]
    cheap = point("cheap", truth * 1.0 + rng.normal(size=(N, 3)), 100, 1.3)
    strong = point("strong", truth * 4.0 + rng.normal(size=(N, 3)), 1000, 0.8)
    return cheap, strong, targets


# --- ladder, ask, tell ---


@pytest.mark.parametrize("depth", [1, 2, 3, 4, 6, 12, 22])
def test_the_ladder_of_any_depth(depth: int) -> None:
    rungs = ladder(depth)
    names = [rung.name for rung in rungs]
    assert len(set(names)) == len(names)
    assert {"linear", "full-int8", "static"} <= set(names[:3]), "the first three rungs are always made"
    assert all(0 < rung.share < 1 for rung in rungs)
    students = [rung.recipe for rung in rungs if isinstance(rung.recipe[0], Distill)]
    kept = [recipe[0].layers for recipe in students]  # type: ignore[attr-defined]
    assert kept == sorted({max(1, depth // 3), max(1, depth // 2)} - {depth})
    assert all(isinstance(recipe[-1], Quantize) for recipe in students), "nothing but int8 encoders ships"


def test_ask_and_tell_walk_the_ladder_once() -> None:
    rungs = ladder(6)
    driven = Search(rungs)
    seen = []
    while (rung := driven.ask()) is not None:
        assert driven.ask() is rung, "asking changes nothing"
        seen.append(rung.name)
        driven.tell(point(rung.name, np.zeros((1, 3))))
    assert seen == [rung.name for rung in rungs]
    later = Search(rungs, [point(rungs[0].name, np.zeros((1, 3))), point(rungs[2].name, np.zeros((1, 3)))])
    asked = later.ask()
    assert asked is not None
    assert asked.name == rungs[1].name


# --- choices ---


def test_thresholds_are_quantiles_of_confidence_on_calibrate() -> None:
    cheap, strong, targets = two()
    found = choices([cheap, strong], COSTS, TASK, CALIBRATE, targets, "cost")
    cascades = [c for c in found if len(c.points) == 2]
    assert [c.name for c in found[:2]] == ["cheap", "strong"]
    assert len(cascades) == len(SHARES)
    assert all(c.points == (cheap, strong) for c in cascades), "only the cheaper one may come first"
    sure = TASK.confidence(cheap.logits, cheap.temperature)
    for wanted, cascade in zip(SHARES, cascades):
        threshold, last = cascade.thresholds
        assert last == 0.0
        assert abs(float((sure[CALIBRATE] < threshold).mean()) - wanted) <= 1 / (N - SELECT)
        handed = sure < threshold
        assert cascade.answered == pytest.approx((1 - handed.mean(), handed.mean()))
        assert (cascade.logits[handed] == strong.logits[handed]).all()
        assert (cascade.logits[~handed] == cheap.logits[~handed]).all()
        assert cascade.name == f"cheap > strong ({100 * handed.mean():.0f} %)"


def test_thresholds_do_not_look_at_labels_nor_at_select() -> None:
    cheap, strong, targets = two()
    usual = choices([cheap, strong], COSTS, TASK, CALIBRATE, targets, "cost")
    other = choices([cheap, strong], COSTS, TASK, CALIBRATE, (targets + 1) % 3, "cost")
    assert [c.thresholds for c in usual] == [c.thresholds for c in other]
    logits = cheap.logits.copy()
    logits[:SELECT] *= 9
    moved = choices([point("cheap", logits, 100, 1.3), strong], COSTS, TASK, CALIBRATE, targets, "cost")
    assert [c.thresholds for c in usual] == [c.thresholds for c in moved]


def test_the_strong_temperature_is_fitted_on_the_rows_that_reach_it() -> None:
    cheap, strong, targets = two()
    sure = TASK.confidence(cheap.logits, cheap.temperature)
    few = many = 0
    for cascade in choices([cheap, strong], COSTS, TASK, CALIBRATE, targets, "cost")[2:]:
        reached = np.flatnonzero(sure < cascade.thresholds[0])
        reached = reached[reached >= SELECT]
        few, many = few + (len(reached) < 50), many + (len(reached) >= 50)
        wanted = 0.8 if len(reached) < 50 else fit_temperature(strong.logits[reached], targets[reached], TASK)
        assert cascade.temperatures == (1.3, pytest.approx(wanted))
    assert few
    assert many


@pytest.mark.parametrize(
    ("minimise", "alone", "base", "each"),
    [("cost", (3.0, 31.0), 3.0, 30.0), ("latency", (30.0, 310.0), 30.0, 300.0), ("size", (100.0, 1000.0), 1100.0, 0.0)],
)
def test_costs_worked_out_by_hand(
    minimise: search.Minimise, alone: tuple[float, ...], base: float, each: float
) -> None:
    cheap, strong, targets = two()
    found = choices([cheap, strong], COSTS, TASK, CALIBRATE, targets, minimise)
    assert tuple(c.cost for c in found[:2]) == alone
    for cascade in found[2:]:
        # Tokenization and the cheap tier are paid for every row, the strong tier for those that reach it.
        assert cascade.cost == pytest.approx(base + each * cascade.answered[1])


def test_scores_have_no_cascades_and_ties_one_threshold() -> None:
    cheap, strong, _ = two()
    scores = [point(p.name, p.logits[:, :1], p.bytes) for p in (cheap, strong)]
    assert len(choices(scores, COSTS, Score(), CALIBRATE, np.zeros(N), "cost")) == 2
    flat = point("cheap", np.tile([3.0, 0.0, 0.0], (N, 1)))
    assert len(choices([flat, strong], COSTS, TASK, CALIBRATE, np.zeros(N, int), "cost")) == 3
    even = {"": Cost(1.0, 1.0), "cheap": Cost(2.0, 2.0), "strong": Cost(2.0, 2.0)}
    assert len(choices([cheap, strong], even, TASK, CALIBRATE, np.zeros(N, int), "cost")) == 2


# --- judged ---


def alone(logits: np.ndarray, cost: float = 1.0) -> Choice:
    return Choice((point("p", logits),), (1.0,), (0.0,), (1.0,), cost, logits)


def test_the_chance_of_the_reference_itself() -> None:
    _, strong, targets = two()
    (found,) = judged([alone(strong.logits)], strong.logits, targets, TASK, 0.01, 900, 0.025)
    assert found.drop == 0
    assert found.chance == pytest.approx(NormalDist().cdf(0.01 * math.sqrt(N * 900) - NormalDist().inv_cdf(0.975)))


@pytest.mark.parametrize("rows", [300, 1500])
@pytest.mark.parametrize("margin", [0.02, 0.06, 0.1])
def test_the_chance_follows_the_normal_approximation(rows: int, margin: float) -> None:
    rng = np.random.default_rng(5)
    targets = rng.integers(0, 3, N)
    reference = np.eye(3)[targets] * 3.0
    worse = reference.copy()
    wrong = rng.permutation(N)[:36]
    worse[wrong] = np.roll(worse[wrong], 1, axis=1)
    (found,) = judged([alone(worse)], reference, targets, TASK, margin, rows, 0.05)
    assert found.drop == pytest.approx(0.06)
    assert found.quality == pytest.approx(0.94)
    error = math.sqrt((0.06 * 0.94 / N + 1 / N**2) * N / rows)
    wanted = NormalDist().cdf((margin - 0.06) / error - NormalDist().inv_cdf(0.95))
    assert found.chance == pytest.approx(wanted, abs=0.04)  # the error is bootstrapped with some hundred resamples


def test_no_student_is_taken_for_better_than_its_reference() -> None:
    _, _, targets = two()
    right, reference = np.eye(3)[targets], np.eye(3)[targets]
    reference = reference.copy()
    reference[:30] = np.roll(reference[:30], 1, axis=1)
    better, worse = judged([alone(right), alone(np.roll(right, 1, axis=1))], reference, targets, TASK, 0.01, 600, 0.05)
    assert better.drop == pytest.approx(-30 / N)
    error = math.sqrt((30 / N * (1 - 30 / N) / N + 1 / N**2) * N / 600)
    assert better.chance == pytest.approx(NormalDist().cdf(0.01 / error - NormalDist().inv_cdf(0.95)), abs=0.04)
    assert worse.chance < 1e-6


def test_scores_are_judged_as_well() -> None:
    rng = np.random.default_rng(0)
    targets = rng.normal(size=N)
    good, bad = targets[:, None] + 0.1 * rng.normal(size=(N, 1)), rng.normal(size=(N, 1))
    fine, hopeless = judged([alone(good), alone(bad)], good, targets, Score(), 0.02, 600, 0.05)
    assert fine.chance > 0.99
    assert hopeless.chance < 0.01


# --- plan ---


def planned(cost: float, chance: float) -> Planned:
    return Planned(alone(np.zeros((1, 3)), cost), 0.9, 0.0, chance)


CANDIDATES = st.lists(
    st.tuples(st.floats(1e-6, 1e3), st.floats(0, 1)).map(lambda pair: planned(*pair)), min_size=1, max_size=40
)


@given(CANDIDATES)
def test_plans_go_from_safest_to_cheapest_along_the_front(candidates: list[Planned]) -> None:
    found = plan(candidates)
    assert 1 <= len(found) <= search._MOST
    for one, other in pairwise(found):
        assert one.choice.cost > other.choice.cost
        assert one.chance > other.chance
    for kept in found:
        assert any(kept is c for c in candidates)
        for other in candidates:
            cheaper, likelier = other.choice.cost < kept.choice.cost, other.chance > kept.chance
            assert not (cheaper and likelier)
            assert not (cheaper and other.chance == kept.chance)
            assert not (likelier and other.choice.cost == kept.choice.cost)
    assert found[0].chance == max(c.chance for c in candidates), "the safest candidate is the first"
    hopeful = [c for c in candidates if c.chance >= search._HOPELESS]
    if hopeful:
        assert all(c.chance >= search._HOPELESS for c in found)
        if len(found) < search._MOST:
            assert found[-1].choice.cost == min(c.choice.cost for c in hopeful), "the cheapest hope is tested"
    else:
        assert len(found) == 1


@given(CANDIDATES, st.randoms(use_true_random=False))
def test_plans_do_not_depend_on_the_order_of_candidates(candidates: list[Planned], random: object) -> None:
    shuffled = list(candidates)
    random.shuffle(shuffled)  # type: ignore[attr-defined]
    values = [[(c.choice.cost, c.chance) for c in plan(given)] for given in (candidates, shuffled)]
    assert values[0] == values[1]


def test_steps_that_save_next_to_nothing_are_left_out() -> None:
    steps = [planned(100.0 - 0.01 * i, 0.9 - 0.01 * i) for i in range(9)] + [planned(50.0, 0.5)]
    assert [c.choice.cost for c in plan(steps)] == [100.0, 50.0]
    assert plan([]) == ()


def test_macro_f1_gives_way_where_its_test_would_be_refused() -> None:
    rare = Rows(tuple(f"text {i}" for i in range(200)), tuple("b" if i < 10 else "a" for i in range(200)))
    job = Job(Tables(rare))
    with TemporaryDirectory() as folder:
        _, task, notes = prepare(job, Path(folder))
        _, asked, _ = prepare(Job(Tables(rare), options=Options(metric="macro-f1")), Path(folder))
    assert (task.metric, asked.metric) == ("accuracy", "macro-f1")
    assert any("needs 25 certify rows of each label, and the rarest can expect 2" in note for note in notes)


def test_weights_that_no_certificate_counts_are_spoken_of(tmp_path: Path) -> None:
    rows = Rows(tuple(f"text {i}" for i in range(400)), ("a", "b") * 200)
    said = "Weights of rows count in training only: the certificate and every quality count each row once."
    for weight, wanted in ((None, False), ((2.0,) * 400, True)):
        _, _, notes = prepare(Job(Tables(replace(rows, weight=weight))), tmp_path)
        assert (said in notes) is wanted
