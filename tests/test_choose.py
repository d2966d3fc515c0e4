"""Ladder, choices and plan, against examples worked out by hand and closed forms."""

from __future__ import annotations

import itertools
import math
import re
import tracemalloc
from collections.abc import Sequence
from dataclasses import replace
from functools import partial
from itertools import pairwise
from pathlib import Path
from statistics import NormalDist
from types import SimpleNamespace
from typing import Any

import numpy as np
import pytest
from hypothesis import given
from hypothesis import strategies as st

from conftest import FAMILIES, tiny_model
from netweight import choose, search
from netweight.anatomy import blocks
from netweight.artifact import Tier
from netweight.build import Builder, _telling
from netweight.certify import fit_temperature
from netweight.certify.compare import Pairs, compare
from netweight.certify.power import binary_power
from netweight.choose import (
    FIRST,
    SECOND,
    SHARES,
    Choice,
    Minimise,
    Planned,
    choices,
    engine_of,
    judged,
    names,
    own,
    plan,
    provable,
)
from netweight.data import Dataset, Rows
from netweight.engine import cascade as engine
from netweight.errors import CertificateError, ModelError, OptionError
from netweight.job import Budget, Job, Options, Tables, prepare
from netweight.layers import Activate
from netweight.measure import Cost
from netweight.pipeline import climb
from netweight.run import Local
from netweight.search import Point, Search, ladder, quantized, student
from netweight.ship import Ranked
from netweight.task import Classify, Score, Task, softmax
from netweight.techniques import Distill, Quantize, QuantizeAware, Shrink
from netweight.train import Plan

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
    teacher = tiny_model(layers=depth)
    rungs = ladder(teacher)
    names = [rung.name for rung in rungs]
    assert len(set(names)) == len(names)
    assert {"linear", "full-int8", "static"} <= set(names[:3]), "the first three rungs are always made"
    assert all(0 < rung.share < 1 for rung in rungs)
    students = [rung.recipe for rung in rungs if isinstance(rung.recipe[0], Shrink)]
    once = [rung for rung in rungs if rung.recipe in students and rung.name != "thin-int8"]
    kept = [rung.recipe[0].layers for rung in once]  # type: ignore[attr-defined]
    assert kept == [depth, *sorted({max(1, depth // 3), max(1, depth // 2)} - {depth}, reverse=True)]
    assert [rung.after for rung in once] == ["", *(rung.name for rung in once)][: len(once)]
    assert all(isinstance(recipe[-1], Quantize) for recipe in students), "nothing but int8 encoders ships"
    assert all(recipe[-2].teachers == (teacher,) for recipe in students)  # type: ignore[attr-defined]


def test_where_bytes_count_encoders_have_few_bits() -> None:
    teacher = tiny_model(layers=6)
    usual = {rung.name: rung for rung in ladder(teacher)}
    rungs = {rung.name: rung for rung in ladder(teacher, bytes_count=True)}
    floor = ["linear", "full-int8", "static", "conv"]
    assert list(rungs) == [*floor, "full-int4", "full-int3", "half-int4", "third-int4"]
    assert all(rungs[name].recipe == usual[name].recipe for name in floor)
    for name, bits in (("full-int4", 4), ("full-int3", 3), ("half-int4", 4), ("third-int4", 4)):
        last = rungs[name].recipe[-1]
        last = last.start if isinstance(last, QuantizeAware) else last
        assert isinstance(last, Quantize)
        assert (last.weight_bits, last.rounding) == (bits, "gptq")
        assert last.table_bits == (7 if name == "full-int4" else 5)
    assert isinstance(rungs["full-int3"].recipe[-1], QuantizeAware), "3 bits are trained"
    for name in ("half", "third"):
        assert rungs[f"{name}-int4"].recipe[:-1] == usual[f"{name}-int8"].recipe[:-1]
    assert [rungs[name].after for name in ("full-int3", "half-int4", "third-int4")] == ["full-int4", "", "half-int4"]


@pytest.mark.parametrize("family", FAMILIES)
def test_a_student_of_any_family(family: str, dataset: Dataset) -> None:
    teacher = tiny_model(family=family)
    made = teacher
    for step in student(teacher, 1, distil=Distill(epochs=1)):
        made = step(made, Local(dataset), Plan(batch_size=16, precision="fp32"))
    assert made.depth == 1
    assert made.ranges
    block = blocks(made.network)[0]  # type: ignore[arg-type]
    assert block.neurons == 32
    assert any(isinstance(m, Activate) for m in made.network.modules())


def test_a_student_with_fewer_heads_and_bits(dataset: Dataset) -> None:
    teacher = tiny_model(layers=2)
    cut, *_, quantize = student(teacher, 2, 1.0, None, heads=0.5, then=(quantized(4),))
    assert isinstance(cut, Shrink)
    assert cut.importance == "fisher", "in a short time box the size of weights costs points"
    assert isinstance(quantize, Quantize)
    made = cut(teacher, Local(dataset), Plan())
    assert [b.heads for b in blocks(made.network)] == [b.heads // 2 for b in blocks(teacher.network)]  # type: ignore[arg-type]
    assert (quantize.weight_bits, quantize.weight_clip) == (4, "mse")


def test_a_student_where_nothing_can_be_cut_has_fewer_layers(monkeypatch: pytest.MonkeyPatch) -> None:
    def refuse(network: object) -> None:
        raise ModelError("no")

    monkeypatch.setattr(search, "blocks", refuse)
    teacher = tiny_model()
    assert [type(step) for step in student(teacher, 1)] == [Distill, Quantize]
    unknown = ladder(teacher)
    assert not {"full-mixed", "slim-int8", "thin-int8"} & {rung.name for rung in unknown}
    assert next(rung for rung in unknown if isinstance(rung.recipe[0], Distill)).after == ""
    monkeypatch.undo()
    assert {"full-mixed", "slim-int8", "thin-int8"} <= {rung.name for rung in ladder(teacher)}
    assert [type(s) for s in student(teacher, 2, 1.0, None)] == [Distill, Quantize], "and where nothing is to be cut"


def test_the_thin_student_is_cut_of_the_slim_one_once_that_has_learned(dataset: Dataset) -> None:
    teacher = tiny_model(layers=2)
    slim, thin = (next(r for r in ladder(teacher) if r.name == name) for name in ("slim-int8", "thin-int8"))
    *learned, last = slim.recipe
    *first, cut, healed, rounded = thin.recipe
    assert (first, healed, rounded, thin.plan) == (learned, learned[-1], last, slim.plan), "they share what is made"
    model, wide = teacher, blocks(teacher.network)[0].neurons  # type: ignore[arg-type]
    for step, share in ((learned[0], 2), (cut, 4)):
        assert isinstance(step, Shrink)
        model = step(model, Local(dataset), Plan())
        assert [b.neurons for b in blocks(model.network)] == [wide // share] * 2  # type: ignore[arg-type]
        assert [b.heads for b in blocks(model.network)] == [2, 2], "heads are not cut twice"  # type: ignore[arg-type]


def test_ask_and_tell_walk_the_ladder_once() -> None:
    rungs = ladder(tiny_model(layers=6))
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


def climbed(
    wrong: dict[str, float],
    cut: float = 0.0,
    reads: int | None = None,
    minimise: choose.Minimise = "cost",
    told: Sequence[Point] = (),
    away: bool = False,
) -> tuple[Search, list[str]]:
    """A walk up the ladder where rungs are wrong on these shares of rows, and what was said on the way; a share of the
    texts is `cut` by encoders, some tiers read `reads` tokens, and some points were `told` by an earlier process; rows
    to train on may be `away`."""
    teacher = tiny_model(layers=6)
    rng = np.random.default_rng(0)
    targets = rng.integers(0, 3, N)
    right = np.eye(3)[targets] * 3.0
    worse = {k: np.where(rng.random((N, 1)) < share, np.roll(right, 1, axis=1), right) for k, share in wrong.items()}
    notes: list[str] = []
    kept: dict[str, str] = {}
    builder = SimpleNamespace(
        store=SimpleNamespace(get=kept.get, put=kept.__setitem__),
        teacher=teacher,
        source=teacher,
        cut=cut,
        reads=reads,
        beaten=lambda points: False,
        job=Job(Tables(None, dev="d", certify="c") if away else Tables(Rows((), ())), Budget(minimise=minimise)),
        data=SimpleNamespace(certify=SimpleNamespace(rows=Rows(("",) * 3000))),
        run=SimpleNamespace(data=None),
        task=TASK,
        clock=SimpleNamespace(left=1e9),
        reporter=SimpleNamespace(note=notes.append),
        teacher_dev=right.astype(np.float32),
        dev_targets=targets,
        quality=lambda said: float(TASK.quality(TASK.outcomes(said, targets))),
        trials=lambda: None,
        told=lambda rungs: list(told),
        point=lambda rung: point(rung.name, worse.get(rung.name, right)),
    )
    builder.judged = partial(Builder.judged, builder)
    return climb(builder), notes  # type: ignore[arg-type]


def test_a_rung_is_judged_by_those_before_it_whatever_was_made_since(monkeypatch: pytest.MonkeyPatch) -> None:
    # As pooled evidence does: with more points a chance becomes another one.
    monkeypatch.setattr("netweight.pipeline._chance", lambda _, points, name: 0.1 if len(points) < 6 else 0.9)
    found, _ = climbed({}, minimise="size")
    assert "full-int4" in found.points
    assert "full-int3" not in found.points
    assert len(found.points) >= 6, "else nothing was made since"
    again, _ = climbed({}, minimise="size", told=list(found.points.values()))
    assert set(again.points) == set(found.points)


@pytest.mark.parametrize(("larger", "smaller"), [("slim-int8", "half-int8"), ("half-int8", "third-int8")])
@pytest.mark.parametrize(("wrong", "made"), [(0.0, True), (0.3, False)])
def test_a_smaller_student_is_made_where_the_larger_one_has_a_chance(
    larger: str, smaller: str, wrong: float, made: bool
) -> None:
    found, notes = climbed({"linear": 0.3, "static": 0.3, "conv": 0.3, larger: wrong})
    assert (smaller in found.points) == made
    said = f"{smaller} is not made: {larger}, which is larger, would hardly pass"
    assert (said in notes) != made


def test_what_would_come_after_a_rung_that_was_not_made_is_not_made() -> None:
    found, notes = climbed(
        {"linear": 0.3, "static": 0.3, "conv": 0.3, "full-int4": 0.3, "half-int4": 0.3}, minimise="size"
    )
    assert {"full-int4", "half-int4"} <= set(found.points)
    assert notes[1:] == [
        f"{name} is not made: {larger}, which is larger, would hardly pass"
        for name, larger in (("full-int3", "full-int4"), ("third-int4", "half-int4"))
    ]


@pytest.mark.parametrize(("cut", "said"), [(0.01, False), (0.25, True)])
def test_texts_that_were_cut_are_told_of(cut: float, said: bool) -> None:
    most = tiny_model().encoder.max_length
    for reads, also in ((None, ""), (99, ", tiers without attention 99")):
        _, notes = climbed({"linear": 0.3}, cut, reads)
        wanted = f"25 % of dev is longer than {most} tokens; encoders read no more (see --max-length){also}"
        assert (wanted in notes) == said
        assert any("is longer" in note for note in notes) == said
    _, notes = climbed({"linear": 0.3}, cut, away=True)
    assert (f"25 % of dev is longer than {most} tokens; encoders read no more" in notes) == said, "no such option there"


def test_nothing_that_costs_more_is_made_where_the_static_student_passes_alone() -> None:
    found, notes = climbed({"linear": 0.3, "static": 0.0})
    assert set(found.points) == {"linear", "full-int8", "static"}
    assert notes[1:] == [
        f"{name} is not made: static, which costs less, will hardly fail alone"
        for name in ("conv", "full-mixed", "slim-int8", "thin-int8", "half-int8", "third-int8")
    ]


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
        assert threshold not in sure[CALIBRATE], "the sums of another batch may move a row that lies on it"
        assert abs(float((sure[CALIBRATE] < threshold).mean()) - wanted) <= 1 / (N - SELECT)
        handed = sure < threshold
        assert cascade.answered == pytest.approx((1 - handed.mean(), handed.mean()))
        said = np.where(handed[:, None], both_of(cheap, strong), cheap.logits)
        assert (cascade.outcomes == TASK.outcomes(said, targets)).all()
        assert cascade.name == f"cheap > strong ({100 * handed.mean():.0f} %)"


def test_which_tier_comes_first_is_said_by_what_is_minimised() -> None:
    cheap, strong, targets = two()
    costs = {"": Cost(1.0, 1.0), "cheap": Cost(2.0, 9.0), "strong": Cost(20.0, 5.0)}
    first: dict[choose.Minimise, str] = {"cost": "cheap", "latency": "strong"}
    for minimise, name in first.items():
        found = choices([cheap, strong], costs, TASK, CALIBRATE, targets, minimise)
        assert {c.points[0].name for c in found if len(c.points) == 2} == {name}, minimise


def both_of(cheap: Point, strong: Point) -> np.ndarray:
    """Half a vote of the cheap one, in units of the strong one's logits."""
    return strong.logits + np.float32(0.5 * strong.temperature / cheap.temperature) * cheap.logits


def test_tiers_answer_together() -> None:
    """log p is log p(strong) + log p(cheap) / 2, but for what makes it sum to one; each by its own temperature."""
    cheap, strong, targets = two()
    cascade = choices([cheap, strong], COSTS, TASK, CALIBRATE, targets, "cost")[2]
    handed = TASK.confidence(cheap.logits, cheap.temperature) < cascade.thresholds[0]
    one, other = (np.log(softmax(p.logits / p.temperature)) for p in (cheap, strong))
    both = softmax(other + one / 2)
    np.testing.assert_allclose(softmax(both_of(cheap, strong) / strong.temperature), both, rtol=1e-4)
    assert (cascade.outcomes[handed, 0] == both[handed].argmax(axis=1)).all()
    assert cascade.before == (0.0, pytest.approx(0.5 * strong.temperature / cheap.temperature))
    likely = lambda said: float(np.log(said[np.arange(N), targets])[handed].mean())  # noqa: E731
    assert likely(both) > max(likely(np.exp(one)), likely(np.exp(other))), "two know more than one"


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
        both = both_of(cheap, strong)[reached]
        wanted = 1.5 * 0.8 if len(reached) < 50 else fit_temperature(both, targets[reached], TASK)
        assert cascade.temperatures == (1.3, pytest.approx(wanted))
    assert few
    assert many


@pytest.mark.parametrize(
    ("minimise", "alone", "base", "each"),
    [("cost", (3.0, 31.0), 3.0, 30.0), ("latency", (30.0, 310.0), 30.0, 300.0), ("size", (100.0, 1000.0), 1100.0, 0.0)],
)
def test_costs_worked_out_by_hand(
    minimise: choose.Minimise, alone: tuple[float, ...], base: float, each: float
) -> None:
    cheap, strong, targets = two()
    found = choices([cheap, strong], COSTS, TASK, CALIBRATE, targets, minimise)
    assert tuple(c.cost for c in found[:2]) == alone
    assert (len(found) == 2) == (minimise == "size"), "no cascade is smaller than its last tier"
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


def test_no_cascade_costs_as_much_as_its_last_tier_alone() -> None:
    cheap, strong, targets = two()
    costs = {"": Cost(1.0, 1.0), "cheap": Cost(20.0, 20.0), "strong": Cost(30.0, 30.0)}
    found = choices([cheap, strong], costs, TASK, CALIBRATE, targets, "cost")
    assert max(c.answered[1] for c in found[2:]) <= 1 / 3, "what the cheap tier saves pays for asking it"
    everything = choices([cheap, strong], COSTS, TASK, CALIBRATE, targets, "cost")
    kept = [c.thresholds for c in everything if c.answered[-1] < 1 / 3 or len(c.points) == 1]
    assert [c.thresholds for c in found] == kept


def three() -> tuple[list[Point], dict[str, Cost], np.ndarray]:
    rng = np.random.default_rng(3)
    targets = rng.integers(0, 3, N)
    truth = np.eye(3)[targets]
    points = [point(f"p{i}", truth * (0.7 + i) + rng.normal(size=(N, 3)), 10 * i, 1 + i / 10) for i in range(3)]
    costs = {"": Cost(1.0, 10.0)} | {f"p{i}": Cost(10.0**i, 20.0) for i in range(3)}
    return points, costs, targets


def test_a_choice_answers_as_the_engine_will() -> None:
    points, costs, targets = three()
    found = choices(points, costs, TASK, CALIBRATE, targets, "cost")
    assert {len(c.points) for c in found} == {1, 2, 3}
    for choice in found:
        tiers = [
            Tier(p.name, "static", "", {}, *numbers)
            for p, *numbers in zip(choice.points, choice.temperatures, choice.thresholds, choice.before)
        ]
        said = engine.cascade(TASK, tiers, N, lambda i, rows, choice=choice: choice.points[i].logits[rows])  # type: ignore[misc]
        assert (choice.outcomes == TASK.outcomes(said.logits, targets)).all()
        assert choice.answered == pytest.approx([(said.tier == i).mean() for i in range(len(tiers))])
        reach = np.cumsum(choice.answered[::-1])[::-1]
        assert choice.cost == pytest.approx(1 + sum(r * costs[p.name].row for r, p in zip(reach, choice.points)))
    longest = [c for c in found if len(c.points) == 3]
    assert all([p.name for p in c.points] == ["p0", "p1", "p2"] for c in longest), "from cheap to strong"
    first = longest[0]
    assert first.answered[0] == pytest.approx(1 - FIRST[0], abs=0.05)
    assert first.answered[2] == pytest.approx(FIRST[0] * SECOND[0], abs=0.05)
    assert first.name == f"p0 > p1 > p2 ({100 * (1 - first.answered[0]):.0f} %, {100 * first.answered[2]:.0f} %)"


def test_no_cascade_holds_a_number_for_each_label() -> None:
    """Hundreds of choices times thousands of rows times 1,500 labels are gigabytes."""
    points, costs, targets = three()
    for choice in choices(points, costs, TASK, CALIBRATE, targets, "cost"):
        own = [value for name, value in vars(choice).items() if name != "points" and isinstance(value, np.ndarray)]
        assert [value.shape for value in own] == [(N, 2)]


def test_three_tiers_only_where_they_are_allowed() -> None:
    points, costs, targets = three()
    found = choices(points, costs, TASK, CALIBRATE, targets, "cost", tiers=2)
    assert {len(c.points) for c in found} == {1, 2}


def test_three_tiers_only_where_each_is_better_than_the_last() -> None:
    points, costs, targets = three()
    worse = point("p1", -points[1].logits)
    found = choices([points[0], worse, points[2]], costs, TASK, CALIBRATE, targets, "cost")
    assert max(len(c.points) for c in found) == 2


# --- judged ---


def alone(logits: np.ndarray, targets: np.ndarray, cost: float = 1.0, task: Task = TASK) -> Choice:
    return replace(choose.alone(point("p", logits), task, targets), cost=cost)


def test_the_reference_itself_passes_where_the_rows_suffice() -> None:
    _, strong, targets = two()
    # On no row of dev do they differ, so on one row in N at most: error sqrt(1 / (N * rows)).
    least = NormalDist().inv_cdf(0.975) * math.hypot(1 / math.sqrt(N * 900), added(900))
    for margin, wanted in ((1.01 * least, 1.0), (0.99 * least, 0.0)):
        (found,) = judged([alone(strong.logits, targets)], strong.logits, targets, TASK, margin, 900, 0.025)
        assert found.drop == 0
        assert found.chance == wanted


def added(rows: int) -> float:
    """The standard error of the two lost and two gained rows that a test at 2.5 or 5 % adds to so many, known from N
    rows of dev, to which they were added."""
    return 2 / (N + 1) * N / rows


def wrong_on(count: int) -> tuple[np.ndarray, np.ndarray, np.ndarray]:
    """A perfect reference, one that is wrong on `count` rows of N, and targets."""
    rng = np.random.default_rng(5)
    targets = rng.integers(0, 3, N)
    reference = np.eye(3)[targets] * 3.0
    worse = reference.copy()
    rows = rng.permutation(N)[:count]
    worse[rows] = np.roll(worse[rows], 1, axis=1)
    return reference, worse, targets


def expected(drop: float, apart: float, rate: float, margin: float, rows: int) -> float:
    """The chance to pass at a level of 5 % by the normal approximation, for one that differs from a perfect reference
    on a share `apart` of N rows and so loses `drop`."""
    dev = math.sqrt(apart * (1 - apart) / N)
    certify = math.sqrt((dev**2 + 1 / N**2) * N / rows)
    own = (rate * apart / choose._KNOWN) ** 2 / ((rate * apart / choose._KNOWN) ** 2 + dev**2)
    likely = own * max(drop, 0) + (1 - own) * rate * apart
    spread = math.hypot(math.sqrt(own) * dev, certify)
    bound = NormalDist().inv_cdf(0.95) * math.hypot(certify, added(rows))
    return NormalDist().cdf((margin - likely - bound) / spread)


@pytest.mark.parametrize("rows", [300, 1500])
@pytest.mark.parametrize("margin", [0.02, 0.06, 0.1])
def test_the_chance_follows_the_normal_approximation(rows: int, margin: float) -> None:
    reference, worse, targets = wrong_on(36)
    (found,) = judged([alone(worse, targets)], reference, targets, TASK, margin, rows, 0.05)
    assert found.drop == pytest.approx(0.06)
    assert found.quality == pytest.approx(0.94)
    assert found.chance == pytest.approx(expected(0.06, 0.06, 1.0, margin, rows), abs=0.04)  # some hundred simulations


def test_choices_are_imagined_on_the_same_rows() -> None:
    reference, worse, targets = wrong_on(36)
    both = [alone(worse, targets), alone(2 * worse, targets)]
    one, two = judged(both, reference, targets, TASK, 0.08, 900, 0.05)
    assert 0.1 < one.chance < 0.9
    assert (one.passes == two.passes).all()


@pytest.mark.parametrize("metric", ["accuracy", "macro-f1"])
def test_of_imagined_rows_a_part_is_held_at_a_time(metric: Any, monkeypatch: pytest.MonkeyPatch) -> None:
    task, rng = Classify(TASK.labels, metric), np.random.default_rng(0)
    targets = rng.integers(0, 3, 2000)
    reference = np.eye(3)[targets] * 3.0
    worse = np.where(rng.random((2000, 1)) < 0.05, np.roll(reference, 1, axis=1), reference)
    both = [alone(logits, targets, task=task) for logits in (reference, worse)]
    assert both[0].outcomes.nbytes == 2 * 2000, "a byte for each label"
    asked = (reference, targets, task, 0.05, 900, 0.05)
    whole = judged(both, *asked)
    monkeypatch.setattr(choose, "_HELD", 60_000)
    tracemalloc.start()
    parts = judged(both, *asked)
    most = tracemalloc.get_traced_memory()[1]
    tracemalloc.stop()
    assert most < 6_000_000, "500 samples of 2,000 rows take 16 MB"
    for one, other in zip(whole, parts):
        np.testing.assert_array_equal(one.bounds, other.bounds)
        assert one.needs == other.needs


def test_no_student_is_taken_for_better_than_its_reference() -> None:
    right, reference, targets = wrong_on(30)
    found = [alone(right, targets), alone(np.roll(right, 1, axis=1), targets)]
    better, worse = judged(found, reference, targets, TASK, 0.03, 600, 0.05)
    assert better.drop == pytest.approx(-30 / N)
    apart = [float((c.choice.outcomes[:, 0] != reference.argmax(1)).mean()) for c in (better, worse)]
    rate = worse.drop / sum(apart)
    assert better.chance == pytest.approx(expected(better.drop, apart[0], rate, 0.03, 600), abs=0.05)
    assert worse.chance == 0


def test_a_cascade_may_be_better_than_its_reference() -> None:
    right, reference, targets = wrong_on(30)
    cheap = point("cheap", right)
    outcomes, base = TASK.outcomes(right, targets), TASK.outcomes(reference, targets)
    cascade = Choice((cheap, cheap), (1.0, 1.0), (0.0, 0.0), (0.0, 0.0), (0.5, 0.5), 1.0, outcomes)
    alike = replace(cascade, outcomes=base)
    bad = alone(np.roll(right, 1, axis=1), targets)
    margin = -0.028  # at which chances are neither 0 nor 1
    found = judged([cascade, alike, alone(right, targets), bad], reference, targets, TASK, margin, 600, 0.05)
    better, _, same, worse = found
    assert better.drop == same.drop == pytest.approx(-30 / N)
    apart = np.array([1 - TASK.agreement(c.choice.outcomes, base) for c in found])
    rate = worse.drop / apart.sum()
    spread, luck = rate * apart[0] / choose._KNOWN, math.sqrt(0.05 * 0.95 / N)
    trust = spread**2 / (spread**2 + luck**2)
    certify = math.sqrt((luck**2 + 1 / N**2) * N / 600)
    likely = -trust * 30 / N  # shrunk towards nothing, not towards what the other cascade or the student loses
    bound = NormalDist().inv_cdf(0.95) * math.hypot(certify, added(600))
    chance = NormalDist().cdf((margin - likely - bound) / math.hypot(math.sqrt(trust) * luck, certify))
    assert better.chance == pytest.approx(chance, abs=0.05)
    assert better.chance > same.chance + 0.1


def test_a_lucky_drop_is_shrunk_towards_what_disagreement_usually_costs() -> None:
    reference, _, targets = wrong_on(0)
    reference = np.where(np.arange(N)[:, None] < 60, np.roll(reference, 1, axis=1), reference)  # wrong on a tenth

    def differing(rows: slice, right: bool) -> np.ndarray:
        logits = reference.copy()
        logits[rows] = np.eye(3)[targets[rows]] * 3 if right else np.roll(logits[rows], 1, axis=1)
        return logits

    lucky = differing(slice(0, 18), right=True)
    lucky[100:118] = np.roll(lucky[100:118], 1, axis=1)  # loses as many rows as it gains
    usual = [alone(differing(slice(100 + i, 136 + i), right=False), targets) for i in range(5)]
    among, _, *_ = judged([alone(lucky, targets), *usual], reference, targets, TASK, 0.03, 900, 0.05)
    (by_itself,) = judged([alone(lucky, targets)], reference, targets, TASK, 0.03, 900, 0.05)
    assert by_itself.drop == among.drop == pytest.approx(0)
    assert by_itself.chance > among.chance + 0.15


def test_scores_are_judged_as_well() -> None:
    rng = np.random.default_rng(0)
    targets = rng.normal(size=N)
    good, bad = targets[:, None] + 0.1 * rng.normal(size=(N, 1)), rng.normal(size=(N, 1))
    both = [alone(logits, targets, task=Score()) for logits in (good, bad)]
    fine, hopeless = judged(both, good, targets, Score(), 0.02, 600, 0.05)
    assert fine.chance > 0.99
    assert hopeless.chance < 0.01


def test_plans_for_errors_do_not_hang_on_the_unit_of_labels() -> None:
    rng = np.random.default_rng(0)
    true = rng.normal(size=N)
    reference = true[:, None] + 0.1 * rng.normal(size=(N, 1))
    near = reference + 0.01 * rng.normal(size=(N, 1))

    def held(scale: float) -> Planned:
        task = Score(scale=scale, metric="mae")
        margin = task.margin(10.0, float(task.quality(task.outcomes(reference, scale * true))))
        (found,) = judged([alone(near, scale * true, task=task)], reference, scale * true, task, margin, 900, 0.05)
        return found

    whole, small = held(1.0), held(2.0**-10)
    assert small.chance == whole.chance > 0.9
    assert small.needs / small.margin == pytest.approx(whole.needs / whole.margin)
    near = reference + 0.05 * rng.normal(size=(N, 1))  # loses, so that it counts how far dev's drop is trusted
    np.testing.assert_allclose(held(2.0**-40).bounds * 2.0**40, held(1.0).bounds, rtol=1e-9)


def test_what_a_choice_needs_is_the_margin_with_the_power_of_its_discordance() -> None:
    reference, worse, targets = wrong_on(36)
    (found,) = judged([alone(worse, targets)], reference, targets, TASK, 0.01, 900, 0.025)
    assert binary_power(0.06, 0.0, 900, found.needs, 0.025) == pytest.approx(0.8, abs=0.03)
    assert found.chance < 0.01
    assert own(found).margin == found.needs
    assert own(replace(found, margin=0.5)).margin == 0.5


def test_the_provable_margin_is_that_of_the_cheapest_promising_choice() -> None:
    likely, even, unlikely = (
        planned(cost, passes) for cost, passes in zip((9, 4, 1), nested(0.9, 0.6, 0.3), strict=True)
    )
    # What `planned` passes has a bound of 0, the rest one of 1: margins between change nothing.
    found = [
        replace(p, margin=0.1, needs=needs) for p, needs in zip((likely, even, unlikely), (0.2, 0.3, 0.4), strict=True)
    ]
    assert provable(found) == 0.3
    assert provable([replace(p, needs=0.01) for p in found]) == 0.1, "at least what was asked"
    assert provable([found[2]]) == 0.1, "and that where nothing is promising"


# --- plan ---


def planned(cost: float, passes: np.ndarray) -> Planned:
    return Planned(alone(np.zeros((1, 3)), np.zeros(1), cost), 0.9, 0.0, 0.5, 0.0, 1.0 - passes)


def named(found: Planned, name: str) -> Planned:
    (only,) = found.choice.points
    return replace(found, choice=replace(found.choice, points=(replace(only, name=name),)))


SIMULATED = st.integers(0, 2**12 - 1).map(lambda bits: np.array([bits >> i & 1 for i in range(12)], bool))
CANDIDATES = st.lists(st.tuples(st.floats(1e-3, 1e3), SIMULATED), min_size=1, max_size=6).map(
    # Names, as in a job, tell apart what costs and passes alike.
    lambda pairs: [named(planned(*pair), str(i)) for i, pair in enumerate(pairs)]
)


def worth(sequence: tuple[Planned, ...]) -> float:
    """What the definition says a plan saves, after its first candidate."""
    value = 0.0
    for one, other in reversed(list(pairwise(sequence))):
        likely = choose._SURPRISE * (one.passes & other.passes).sum() / one.passes.sum()
        value = likely * (math.log(one.choice.cost / other.choice.cost) + value)
    return value


@given(CANDIDATES)
def test_a_plan_is_the_best_of_all(candidates: list[Planned]) -> None:
    found = plan(candidates)
    safest = max(c.chance for c in candidates)
    assert found[0].chance == safest
    assert found[0].choice.cost == min(c.choice.cost for c in candidates if c.chance == safest)
    for one, other in pairwise(found):
        assert other.choice.cost <= choose._STEP * one.choice.cost
        assert choose._HOPELESS <= other.chance <= one.chance
    rest = sorted((c for c in candidates if c.choice.cost < found[0].choice.cost), key=lambda c: -c.choice.cost)
    for length in range(len(rest) + 1):
        for some in itertools.combinations(rest, length):
            steps = (found[0], *some)
            if all(
                b.choice.cost <= choose._STEP * a.choice.cost and choose._HOPELESS <= b.chance <= a.chance
                for a, b in pairwise(steps)
            ):
                assert worth(steps) <= worth(found) + 1e-9


@given(CANDIDATES, st.randoms(use_true_random=False))
def test_plans_do_not_depend_on_the_order_of_candidates(candidates: list[Planned], random: object) -> None:
    shuffled = list(candidates)
    random.shuffle(shuffled)  # type: ignore[attr-defined]
    one, other = (plan(given) for given in (candidates, shuffled))
    assert one[0].choice.cost == other[0].choice.cost
    assert worth(one) == pytest.approx(worth(other))


def nested(*chances: float) -> list[np.ndarray]:
    """Simulations in which whoever passes with a small chance passes with a greater one as well."""
    order = np.random.default_rng(0).permutation(1000) / 1000
    return [order < chance for chance in chances]


def test_steps_that_save_next_to_nothing_are_left_out() -> None:
    chances = [0.9 - 0.001 * i for i in range(9)] + [0.5]
    steps = [planned(100.0 - 0.01 * i, p) for i, p in enumerate(nested(*chances[:9]))]
    assert [c.choice.cost for c in plan([*steps, planned(50.0, nested(0.5)[0])])] == [100.0, 50.0]
    assert plan([]) == ()


def test_what_would_hardly_pass_stands_behind_the_rest() -> None:
    """Where nothing is counted on, it changes nothing before it, and what never passes is not tested at all."""
    chances = (1.0, 0.6, 0.3, 0.02, 0.01, 0.0)
    steps = [planned(10.0**-i, p) for i, p in enumerate(nested(*chances))]
    assert [c.chance for c in plan(steps[:3])] == [1.0, 0.6, 0.3]
    assert [c.chance for c in plan(steps)] == [1.0, 0.6, 0.3, 0.02, 0.01]
    # However much it would save.
    much = planned(1e-300, nested(0.04)[0])
    assert [c.chance for c in plan([*steps[:3], much])] == [1.0, 0.6, 0.3, 0.04]


def test_where_none_can_pass_the_one_that_loses_least_stands_first() -> None:
    """It ships, not certified: not the cheapest, which is just as unlikely to pass and points worse."""

    def bounded(cost: float, usual: float, lucky: int = 0) -> Planned:
        bounds = np.where(np.arange(50) < lucky, 0.0, usual)
        return replace(planned(cost, np.zeros(50, bool)), margin=0.01, bounds=bounds)

    def costs(*candidates: Planned) -> list[float]:
        return [c.choice.cost for c in plan(candidates)]

    cheap, middle, dear = bounded(1.0, 0.3), bounded(5.0, 0.02), bounded(10.0, 0.02)
    assert costs(cheap, dear) == [10.0]
    assert costs(dear, cheap, middle) == [5.0], "of equals the cheapest"
    assert costs(bounded(1.0, 0.3, lucky=2), dear) == [10.0], "a chance of 4 % is none"
    assert costs(bounded(1.0, 0.3, lucky=3), dear) == [1.0]


def test_a_candidate_that_fails_for_reasons_of_its_own_stands_in_nobodys_way() -> None:
    safe, alike = nested(1.0, 0.6)
    stranger = np.roll(alike, 400)  # as likely to pass, but in other simulations
    first, last, between = planned(100.0, safe), planned(10.0, alike), planned(12.0, stranger)
    assert [c.choice.cost for c in plan([first, between, last])] == [100.0, 10.0]
    same = planned(12.0, nested(0.7)[0])
    assert [c.choice.cost for c in plan([first, same, last])] == [100.0, 12.0, 10.0]


def labelled(n: int, rare: int, name: str = "text") -> Rows:
    return Rows(tuple(f"{name} {i}" for i in range(n)), tuple("b" if i < rare else "a" for i in range(n)))


@pytest.mark.parametrize(
    ("tables", "said"),
    [
        (Tables(labelled(200, 10)), "'b' has 2. Merge such labels, give more labelled rows, or use --metric accuracy"),
        # A cut is stratified: it has the share of each label, whatever chance would give.
        (Tables(labelled(200, 80)), "'a' has 24, 'b' has 16. Merge such labels, give more labelled rows"),
        (
            Tables(labelled(25_000, 100)),
            r"'b' has 20. .* give a certify table of your own \(at most 5,000 rows are cut",
        ),
        (Tables(labelled(200, 10), certify=labelled(60, 24, "row")), "'b' has 24. .* give certify more rows of them"),
        # What train says of a given table is nothing.
        (Tables(labelled(2000, 500), certify=labelled(500, 0, "row")), "'b' has 0. .* give certify more rows of them"),
        (Tables(None, dev=labelled(60, 9), certify=labelled(60, 30, "row"), labels=("a", "b", "c")), "'c' has 0. "),
    ],
)
def test_macro_f1_gives_way_where_its_test_would_be_refused(tables: Tables, said: str, tmp_path: Path) -> None:
    with pytest.raises(OptionError, match=f"needs 25 certify rows of each label, and {said}"):
        prepare(Job(tables, options=Options(metric="macro-f1")), tmp_path)
    _, task, notes, _ = prepare(Job(tables), tmp_path)
    assert task.metric == "accuracy"
    balanced = "The metric is accuracy, by the balance of the labels." in notes
    assert balanced or any("though labels are not balanced: the test of macro-F1 needs 25" in note for note in notes)
    assert balanced == ("'b' has 16" in said)


def test_rows_of_one_group_are_no_reason_for_macro_f1(tmp_path: Path) -> None:
    users = tuple("one" if i < 100 else f"{i}" for i in range(200))
    tables = Tables(labelled(200, 10), certify=replace(labelled(200, 100, "row"), group=users))
    few = r"'b' has 1 \(rows of one group count once\)"
    with pytest.raises(OptionError, match=f"{few}. Merge such labels, give certify more rows of them"):
        prepare(Job(tables, options=Options(metric="macro-f1")), tmp_path)
    _, task, notes, _ = prepare(Job(tables), tmp_path)
    assert task.metric == "accuracy"
    assert any(re.search(f"though labels are not balanced: .*{few}", note) for note in notes)


def test_macro_f1_stays_where_certify_has_enough(tmp_path: Path) -> None:
    tables = Tables(labelled(200, 10), certify=labelled(60, 25, "row"))
    for metric in (None, "macro-f1"):
        _, task, *_ = prepare(Job(tables, options=Options(metric=metric)), tmp_path)
        assert task.metric == "macro-f1"


def test_a_drop_that_answers_without_reading_may_lose_is_told_of(tmp_path: Path) -> None:
    def said(rows: Rows, **budget: Any) -> list[str]:
        return [n for n in prepare(Job(Tables(rows), Budget(**budget)), tmp_path)[2] if n.startswith("Always")]

    rare = labelled(1000, 3)
    assert said(rare) == [
        "Always answering 'a' loses at most 0.5 points, and 1 may be lost: the certificate cannot tell it from a model. "
        "Give a lower --max-drop, or --certify with 25 rows of each label and --metric macro-f1."
    ]
    assert "and at least 1 may be lost" in said(rare, max_drop="auto")[0]
    assert said(rare, max_drop=0.4) == said(labelled(1000, 400)) == []


@pytest.mark.parametrize("side", ["text", "pair"])
def test_pairs_of_one_query_that_no_group_joins_are_told_of(side: str, tmp_path: Path) -> None:
    def said(a_query: int, **more: Any) -> list[str]:
        own, query = labelled(800, 400, "row"), tuple(f"Query {i // a_query}" for i in range(800))
        certify = (
            replace(own, pair=query, **more) if side == "pair" else replace(own, text=query, pair=own.text, **more)
        )
        train = labelled(200, 80)
        tables = Tables(replace(train, pair=train.text), certify=certify)
        return [note for note in prepare(Job(tables), tmp_path)[2] if "--group" in note]

    assert said(20) == [
        f"800 of 800 certify rows share their {side} with another one, and pairs are taken for drawn one by one: name "
        f"its column with --group, so that rows of one {side} count together."
    ]
    assert said(20, group=tuple(f"{i // 20}" for i in range(800))) == []
    assert said(1) == []
    assert said(200) == [], "four kinds of pairs are no groups that a test could count"


def test_plans_count_copies_that_were_cut_together_once() -> None:
    rows = Rows(tuple(f"text {i // 4 if i < 40 else i}" for i in range(100)))
    assert _telling(rows) == 100, "drawn one by one, each tells something"
    # Ten texts of four copies and sixty of one: 100^2 / (10 * 16 + 60).
    assert _telling(replace(rows, drawn=tuple(i // 4 if i < 40 else i for i in range(100)))) == 45
    # So are rows of one user in a table that was given; an empty cell is nobody.
    users = Rows(rows.text, group=tuple(f"user {i // 20}" for i in range(100)))
    assert _telling(users) == 5
    assert _telling(replace(users, group=tuple("" if i < 40 else f"{i // 20}" for i in range(100)))) == 8


def test_a_planned_margin_is_one_that_rows_in_groups_can_show() -> None:
    """1,200 rows of 60 users: the bound of a candidate that changes nothing is not that of 1,200 independent rows."""
    reference, _, targets = wrong_on(0)
    rows = Rows(tuple(f"text {i}" for i in range(1200)), group=tuple(f"user {i // 20}" for i in range(1200)))
    (found,) = judged([alone(reference, targets)], reference, targets, TASK, 0.01, _telling(rows), 0.025)
    outcomes = np.zeros((1200, 2))
    tested = compare(Pairs(TASK, outcomes, outcomes, np.arange(1200) // 20), 1.0, 0.025, 0)
    assert tested.drop.high > 0.05
    assert found.needs == pytest.approx(tested.drop.high, rel=0.3)  # a bound of so few groups is one of few values
    assert found.chance == 0.0


def test_scores_of_dev_must_differ_and_those_of_certify_suffice() -> None:
    def builder(dev: tuple[str, ...], certify: int) -> Builder:
        data = SimpleNamespace(dev=Rows(("text",) * len(dev), dev), certify=range(certify))
        return Builder(None, data, Score(), None, None, None, None)  # type: ignore[arg-type]

    builder(("1", "2"), 30)
    with pytest.raises(CertificateError, match="all 2 rows of dev have the score 1, .* give rows of dev whose scores"):
        builder(("1", "1"), 30)
    with pytest.raises(CertificateError, match="at least 30 certify rows .*; there are 29"):
        builder(("1", "2"), 29)


def test_groups_that_are_too_few_are_refused_before_anything_is_trained(tmp_path: Path) -> None:
    rows = Rows(tuple(f"text {i}" for i in range(400)), ("a", "b") * 200, group=tuple(f"{i % 50}" for i in range(400)))
    with pytest.raises(CertificateError, match="the certify rows form 10 groups; at least 30 are needed"):
        prepare(Job(Tables(rows)), tmp_path)


def test_choices_that_hand_over_nearly_the_same_have_names_of_their_own() -> None:
    cheap, strong, targets = two()
    outcomes = TASK.outcomes(strong.logits, targets)

    def handing(share: float) -> Choice:
        return Choice((cheap, strong), (1.0, 1.0), (0.5, 0.0), (0.0, 0.5), (1 - share, share), 1.0, outcomes)

    several = [choose.alone(strong, TASK, targets), handing(0.032), handing(0.028), handing(0.01)]
    assert names(several) == ["strong", "cheap > strong (3.2 %)", "cheap > strong (2.8 %)", "cheap > strong (1.0 %)"]
    assert names(several[:2]) == ["strong", "cheap > strong (3 %)"]
    assert names([handing(0.03), handing(0.03)]) == ["cheap > strong (3.000 %), 1", "cheap > strong (3.000 %), 2"]


def test_weights_that_no_certificate_counts_are_spoken_of(tmp_path: Path) -> None:
    rows = Rows(tuple(f"text {i}" for i in range(400)), ("a", "b") * 200)
    said = "Weights of rows count in training only: the certificate and every quality count each row once."
    for weight, wanted in ((None, False), ((2.0,) * 400, True)):
        _, _, notes, _ = prepare(Job(Tables(replace(rows, weight=weight))), tmp_path)
        assert (said in notes) is wanted


@pytest.mark.parametrize(("seconds", "chosen"), [(0.89, "openvino"), (0.91, "onnx")])
def test_openvino_must_be_a_tenth_faster(seconds: float, chosen: str) -> None:
    costs = {"a onnx": Cost(1.0, 1.0), "a openvino": Cost(seconds, 2.0), "b onnx": Cost(1.0, 1.0)}
    assert engine_of("a", "onnx", costs, "cost") == engine_of("a", "onnx", costs, "size") == chosen
    assert engine_of("b", "onnx", costs, "cost") == "onnx"


@pytest.mark.parametrize(("minimise", "chosen"), [("cost", "openvino"), ("latency", "onnx"), ("size", "openvino")])
def test_an_engine_is_chosen_by_what_is_minimised(minimise: Minimise, chosen: str) -> None:
    """Of one that is faster in batches and slower in single requests, the latter count where latency is minimised."""
    costs = {"a onnx": Cost(0.0020, 0.0030), "a openvino": Cost(0.0017, 0.0045)}
    assert engine_of("a", "onnx", costs, minimise) == chosen
    point = Point("a", "onnx", {}, "", 1, 1.0, np.zeros((1, 2), np.float32))
    job = SimpleNamespace(budget=Budget(minimise=minimise))
    builder = SimpleNamespace(job=job, with_engine=lambda point, engine: replace(point, engine=engine))
    ranked: Any = SimpleNamespace(builder=builder)
    assert Ranked._engines(ranked, {"a": point}, costs)["a"].engine == chosen


@pytest.mark.parametrize("bits", [7, 6, 4, 3])
def test_bits_are_those_asked_for(bits: int) -> None:
    made = quantized(bits)
    assert (made.weight_bits, made.rounding) == (bits, "gptq" if bits <= 4 else "nearest")
    assert quantized(7) == search.INT8


def test_a_single_head_stays(monkeypatch: pytest.MonkeyPatch) -> None:
    teacher = tiny_model(layers=2)
    monkeypatch.setattr(search, "blocks", lambda network: [replace(b, heads=1) for b in blocks(network)])
    cut = next(rung for rung in ladder(teacher) if rung.name == "slim-int8").recipe[0]
    assert isinstance(cut, Shrink)
    assert (cut.heads, cut.neurons) == (1.0, 0.5)
