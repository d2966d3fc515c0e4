"""What the points of a search are worth, alone and as cascades, and in which order the certificate should test them.

`choices` makes every single model, every cascade of two and the promising ones of three; `judged` predicts from dev
whether each would pass; `plan` keeps those worth testing, safest to cheapest.
"""

from __future__ import annotations

import itertools
import math
from collections.abc import Mapping, Sequence
from dataclasses import dataclass, field, replace
from statistics import NormalDist
from typing import Any, Literal

import numpy as np
from numpy.typing import NDArray

from netweight.certify import fit_temperature
from netweight.certify.compare import extended
from netweight.certify.power import CHANCE
from netweight.engine.cascade import together
from netweight.engine.exits import between
from netweight.measure import Cost
from netweight.search import Point
from netweight.task import Classify, Floats, Ints, Task

Minimise = Literal["cost", "latency", "size"]

# Shares of dev handed to the stronger tier. The certificate walks down this list until it fails, so steps need to be
# small only where they save much.
SHARES = (0.7, 0.55, 0.45, 0.37, 0.3, 0.25, 0.21, 0.17, 0.14, 0.11, 0.09, 0.07, 0.05, 0.03)
# With a third tier: shares handed on by the first, and by the second of what it got.
FIRST, SECOND = (0.55, 0.37, 0.25, 0.17, 0.11, 0.07), (0.5, 0.3, 0.15)
# What the tiers before said of a row counts half as much as what the tier says that it was handed to, as logarithms of
# probabilities. Of 0, 1/4, 1/2, 3/4 and 1 it was best or nearly so at every share handed over, from `conv` and from the
# linear floor, on BANKING77 and on Amazon's reviews.
_VOTE = 0.5
# Rows that a temperature is fitted on at least.
_FITTED = 50
_SIMULATIONS = 500
_HELD = 10_000_000  # weights of dev rows held at a time: 80 MB, three times that while new ones are drawn
_STEP = 0.95  # a candidate must be at least 5 % cheaper than the one before
_HOPELESS = 0.05  # predicted chance of passing below which nothing is counted on
# The drop that disagreement predicts is trusted to within 1 / _KNOWN of itself (one standard deviation): students of
# one teacher on BANKING77 lost .32 to .46 points per point of disagreement, cascades less, and on some sets nothing.
_KNOWN = 2
# A test that dev says will pass fails now and then all the same, so no step is free.
_SURPRISE = 0.98
# The predicted chance to pass from which on `provable` lets a choice set the margin: as likely as not.
_EVEN = 0.5
# OpenVINO must beat ONNX Runtime by this much: it is one more thing to install.
_WORTH_IT = 0.9


def engine_of(name: str, engine: str, costs: Mapping[str, Cost], minimise: Minimise) -> str:
    """What runs a point: its own engine, or OpenVINO where that is enough faster: in batches, or, where latency is
    minimised, in single requests, of which it may be the slower one."""
    fast, own = costs.get(f"{name} openvino"), costs[f"{name} {engine}"]
    enough = fast is not None and _seconds(fast, minimise) < _WORTH_IT * _seconds(own, minimise)
    return "openvino" if enough else engine


def _seconds(cost: Cost, minimise: Minimise) -> float:
    """Those that count."""
    return cost.single if minimise == "latency" else cost.row


@dataclass(frozen=True)
class Choice:
    """One way to answer: a point alone, or cheap points that hand their least confident rows to stronger ones.

    `temperatures`, `thresholds` and `before` (the weight of what the tiers before said) are per tier, `answered` the
    share of dev that each answers, `cost` in seconds (of a row, or of a single request) or in bytes. `outcomes` (n, 2)
    are the task's of what it says on dev, labels in as few bytes as hold their numbers: there are hundreds of choices.
    """

    points: tuple[Point, ...]
    temperatures: tuple[float, ...]
    thresholds: tuple[float, ...]
    before: tuple[float, ...]
    answered: tuple[float, ...]
    cost: float
    outcomes: NDArray[Any] = field(repr=False)

    @property
    def name(self) -> str:
        """For people: `static`, or `static > half-int8 (12 %)`."""
        return self.named(0)

    def named(self, digits: int) -> str:
        """The name with shares of so many decimals."""
        if len(self.points) == 1:
            return self.points[0].name
        handed = [sum(self.answered[i:]) for i in range(1, len(self.points))]
        shares = ", ".join(f"{100 * share:.{digits}f} %" for share in handed)
        return f"{' > '.join(p.name for p in self.points)} ({shares})"


def names(chosen: Sequence[Choice]) -> list[str]:
    """A name for each, with as many decimals as tell them apart; where none do, with their numbers."""
    for digits in range(4):
        found = [choice.named(digits) for choice in chosen]
        if len(set(found)) == len(found):
            return found
    return [f"{name}, {i}" for i, name in enumerate(found, 1)]


def alone(point: Point, task: Task, targets: Ints | Floats) -> Choice:
    """A point that answers every row, at no stated cost."""
    outcomes = _outcomes(task, point.logits, targets)
    return Choice((point,), (point.temperature,), (0.0,), (0.0,), (1.0,), 0.0, outcomes)


def _outcomes(task: Task, logits: Floats, targets: Ints | Floats) -> NDArray[Any]:
    found = task.outcomes(logits, targets)
    return found.astype(np.min_scalar_type(task.outputs)) if isinstance(task, Classify) else found


def choices(
    points: Sequence[Point],
    costs: Mapping[str, Cost],
    task: Task,
    calibrate: slice,
    targets: Ints,
    minimise: Minimise,
    tiers: int = 3,
) -> list[Choice]:
    """Every point alone, every cascade of two at each share of `SHARES`, and, where three `tiers` are allowed, those of
    three points of the front; but no cascade that costs as much as its last tier alone.

    Thresholds are quantiles of a tier's confidence on the `calibrate` rows that reach it; labels move them only by the
    temperatures that confidences are taken at. A tier answers together with those before it
    (`engine.cascade.together`). The temperature of every tier but the first is fitted on the calibrate rows that reach
    it; `targets` (n,) are for all dev.
    """
    compose = _Composer(costs, task, calibrate, targets, minimise)
    alone = [compose((p,), ()) for p in points]
    if not task.confident:
        return alone
    found: list[Choice] = []
    seconds = {p.name: _seconds(costs[p.name], minimise) for p in points}
    by_cost = sorted(points, key=lambda p: seconds[p.name])
    for pair in itertools.permutations(points, 2):
        if seconds[pair[0].name] < seconds[pair[1].name]:
            found += compose.distinct(pair, [(share,) for share in SHARES])
    for three in itertools.combinations(_front(by_cost, task, targets), 3) if tiers > 2 else ():
        if seconds[three[0].name] < seconds[three[1].name] < seconds[three[2].name]:
            found += compose.distinct(three, list(itertools.product(FIRST, SECOND)))
    most = {choice.points[0].name: choice.cost for choice in alone}
    return [*alone, *(choice for choice in found if choice.cost < most[choice.points[-1].name])]


def _front(by_cost: Sequence[Point], task: Task, targets: Ints) -> list[Point]:
    """Points that are better on dev than every cheaper one."""
    kept: list[Point] = []
    best = -math.inf
    for point in by_cost:
        quality = float(task.quality(task.outcomes(point.logits, targets)))
        if quality > best:
            kept.append(point)
            best = quality
    return kept


@dataclass(frozen=True)
class _Composer:
    """Makes a choice of points, each handing on a share of what reaches it."""

    costs: Mapping[str, Cost]
    task: Task
    calibrate: slice
    targets: Ints
    minimise: Minimise

    def distinct(self, points: tuple[Point, ...], shares: Sequence[tuple[float, ...]]) -> list[Choice]:
        """The cascades at these shares; ties in confidence may make two of them the same."""
        made = [self(points, each) for each in shares]
        return list({choice.thresholds: choice for choice in reversed(made)}.values())[::-1]

    def __call__(self, points: tuple[Point, ...], shares: tuple[float, ...]) -> Choice:
        n = len(self.targets)
        known = np.zeros(n, bool)
        known[self.calibrate] = True
        reaches, logits = np.ones(n, bool), np.zeros_like(points[0].logits)
        temperatures, thresholds, before, reached = list[float](), list[float](), list[float](), list[float]()
        for i, point in enumerate(points):
            rows = reaches & known
            # In units of this tier's logits.
            before.append(_VOTE * point.temperature / temperatures[-1] if i else 0.0)
            said = together(point.logits, before[-1], logits)
            # One and a half votes, unless these rows tell better.
            temperature = point.temperature * (1 + _VOTE if i else 1)
            if i and rows.sum() >= _FITTED:
                temperature = fit_temperature(said[rows], self.targets[rows], self.task)
            logits = np.where(reaches[:, None], said, logits)
            temperatures.append(temperature)
            reached.append(float(reaches.mean()))
            threshold = 0.0
            if i < len(shares):
                sure = self.task.confidence(said, temperature)
                threshold = _between(sure[rows], shares[i]) if rows.any() else 0.0
                reaches = reaches & (sure < threshold)
            thresholds.append(threshold)
        answered = tuple(a - b for a, b in zip(reached, [*reached[1:], 0.0], strict=True))
        cost = _cost(points, reached, self.costs, self.minimise)
        outcomes = _outcomes(self.task, logits, self.targets)
        return Choice(points, tuple(temperatures), tuple(thresholds), tuple(before), answered, cost, outcomes)


def _between(sure: Floats, share: float) -> float:
    """A confidence below which this share of the rows lies, halfway from one row to the next: sums of another batch, a
    last bit away, must not decide."""
    found = float(np.quantile(sure, share))
    low, high = sure[sure < found], sure[sure >= found]
    return between(float(high.min()), float(low.max())) if len(low) else found


def _cost(points: Sequence[Point], reached: Sequence[float], costs: Mapping[str, Cost], minimise: Minimise) -> float:
    """What is minimised; `reached` is the share of rows that gets to each tier."""
    if minimise == "size":
        return float(sum(p.bytes for p in points))
    first, *each = (_seconds(costs[name], minimise) for name in ("", *(p.name for p in points)))
    return first + sum(c * share for c, share in zip(each, reached, strict=True))


@dataclass(frozen=True)
class Planned:
    """A choice with its drop on dev, held to a margin (both in units of quality).

    `bounds` (simulations,) are the upper bounds of its drop in imagined certificates; simulation i of every choice
    imagines the same rows, so that choices which fail together are seen to do so. `needs` is the least margin with 80 %
    power if its true drop were 0.
    """

    choice: Choice
    quality: float
    drop: float
    margin: float
    needs: float
    bounds: NDArray[np.float64] = field(repr=False)

    @property
    def passes(self) -> NDArray[np.bool_]:
        """(simulations,): in which imagined certificates it passed."""
        return self.bounds < self.margin

    @property
    def chance(self) -> float:
        """Predicted chance to pass."""
        return float(self.passes.mean())


def judged(
    found: Sequence[Choice],
    reference: Floats,
    targets: Ints | Floats,
    task: Task,
    margin: float,
    rows: int,
    level: float,
) -> list[Planned]:
    """Imagines certificates at `level` with `rows` rows.

    The drop on dev, of few rows, is shrunk towards what its disagreement with the reference, which is known better,
    costs all of its kind together, a rate that is taken to be right within a half of what it is for all choices. A
    drop of a single model below zero counts as zero: no student is better than its reference by more than luck. That of
    a cascade stands, since its tiers answer together; but cascades are not taken to gain by what they are. What dev
    cannot know is imagined by bootstrapping its n rows (paired, seeded): how far the true drop lies from the shrunk
    one, and how far certify's lies from the true one, a variance n / rows times as large as that of dev. The test's
    bound also has what it adds for what no row showed.
    """
    n = len(targets)
    base, outcomes = task.outcomes(reference, targets), [choice.outcomes for choice in found]
    spread, *resampled = _resampled(task, [base, *outcomes])
    at = float(task.quality(base))
    qualities = np.array([float(task.quality(o)) for o in outcomes])
    lost = np.maximum(at - qualities, 0.0)
    apart = np.array([1 - task.agreement(o, base) for o in outcomes])
    cascades = np.array([len(choice.points) > 1 for choice in found])
    drops = np.where(cascades, at - qualities, lost)
    single, several = (_rate(drops[kind], apart[kind]) for kind in (~cascades, cascades))
    usual = np.where(cascades, several, single) * apart
    spreads = _rate(lost, apart) * apart / _KNOWN
    moved, added = (part * n / rows for part in extended(task, base, level))
    z = NormalDist().inv_cdf(1 - level)
    result = []
    for i, choice in enumerate(found):
        luck = spread - resampled[i] - (at - qualities[i])
        trust = spreads[i] ** 2 / max(spreads[i] ** 2 + luck.var(), 1e-24 * task.step**2)  # in dev's own drop
        likely = trust * drops[i] + (1 - trust) * usual[i]
        # Two models that agree on all of dev may still differ on one row in n, scores by as much as labels do.
        error = math.sqrt((luck.var() + (task.unit / n) ** 2) * n / rows)
        imagined = likely + luck * math.sqrt(trust + n / rows)
        beyond = moved + z * math.hypot(error, added)
        needs = beyond + NormalDist().inv_cdf(CHANCE) * error
        quality = float(qualities[i])
        result.append(Planned(choice, quality, at - quality, margin, needs, imagined + beyond))
    return result


def _resampled(task: Task, outcomes: Sequence[NDArray[Any]]) -> NDArray[np.float64]:
    """The quality of each of `outcomes` (n, 2) in 500 bootstrap samples of their rows, the same for all: (m, 500)."""
    n, rng = len(outcomes[0]), np.random.default_rng(0)
    some, parts = max(1, _HELD // n), []
    for start in range(0, _SIMULATIONS, some):
        count = min(some, _SIMULATIONS - start)
        weights = rng.multinomial(n, np.full(n, 1 / n), count).astype(np.float64)
        parts.append(np.stack([task.quality(each, weights) for each in outcomes]))
    return np.concatenate(parts, axis=1)


def _rate(drops: NDArray[np.float64], apart: NDArray[np.float64]) -> float:
    """What a share of disagreement costs these choices together; nothing where they gain."""
    return max(float(drops.sum() / max(apart.sum(), 1e-12)), 0.0)


def own(planned: Planned) -> Planned:
    """The choice, held to the larger of its margin and the one that it `needs`."""
    return replace(planned, margin=max(planned.margin, planned.needs))


def provable(found: Sequence[Planned]) -> float:
    """The margin for max_drop "auto": the one that the cheapest choice needs, of those that at their own margin (`own`)
    are as likely as not to pass. Where there is none, the margin that `found` was judged at."""
    promising = [p for p in map(own, found) if p.chance >= _EVEN]
    return min(promising, key=lambda p: p.choice.cost).margin if promising else max(p.margin for p in found)


def plan(candidates: Sequence[Planned]) -> tuple[Planned, ...]:
    """The candidates to test, safest to cheapest.

    The safest comes first: the likeliest to pass, or, where none is likely to and the first ships uncertified, the one
    with the least median bound. What follows maximises the logarithm of what the last one that passes is expected to
    save, since testing stops at the first failure. The chance to pass after the candidate before has passed comes from
    the imagined certificates; what came earlier is taken to add nothing to it (a Markov chain, solved from its end by
    dynamic programming). Behind them, by the same rule, stand those that would hardly pass: they are tested only where
    all others have passed, so dev was too careful, and a failure there takes nothing away.
    """
    ordered = sorted(candidates, key=lambda c: (c.choice.cost, -c.chance, c.choice.name))
    if not ordered:
        return ()
    costs = np.array([c.choice.cost for c in ordered])
    passes = np.array([c.passes for c in ordered], np.float64)
    chances = passes.mean(axis=1)
    hopeful = chances.max() >= _HOPELESS
    kept = [int(chances.argmax() if hopeful else np.argmin([np.median(c.bounds) for c in ordered]))]
    for least in (_HOPELESS, np.finfo(np.float64).tiny):
        following = _following(costs, passes, least)
        while (after := int(following[kept[-1]])) >= 0:
            kept.append(after)
    return tuple(ordered[i] for i in kept)


def _following(costs: NDArray[np.float64], passes: NDArray[np.float64], least: float) -> NDArray[np.int64]:
    """Of each candidate (n,), ordered by cost, the one to test after it among those whose chance is `least` or more;
    -1 where none follows. `passes` (n, simulations)."""
    together = passes @ passes.T / passes.shape[1]
    chances = together.diagonal()
    values, following = np.zeros(len(costs)), np.full(len(costs), -1)
    for i in range(1, len(costs)):
        allowed = (costs <= _STEP * costs[i]) & (chances <= chances[i]) & (chances >= least)
        if allowed.any():
            likely = _SURPRISE * together[i, allowed] / chances[i]
            gains = likely * (np.log(costs[i] / costs[allowed]) + values[allowed])
            values[i], following[i] = gains.max(), np.flatnonzero(allowed)[gains.argmax()]
    return following
