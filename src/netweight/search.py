"""Which recipes to try, what they are worth on dev, and in which order the certificate should test them.

`ask` and `tell` drive the ladder; whoever has machines can call them. From the points that were told, `choices` makes
every single model and every cascade of two, and `plan` keeps those worth testing, safest to cheapest.
"""

from __future__ import annotations

import itertools
import math
from collections.abc import Iterable, Mapping, Sequence
from dataclasses import dataclass, field
from statistics import NormalDist
from typing import Any, Literal

import numpy as np
from numpy.typing import NDArray

from netweight.certify import fit_temperature
from netweight.measure import Cost
from netweight.task import Floats, Ints, Task
from netweight.techniques import Distill, LinearFloor, Quantize, Recipe, Static

Minimise = Literal["cost", "latency", "size"]

# Shares of dev handed to the stronger tier. The certificate walks down this list until it fails, so steps need to be
# small only where they save much.
SHARES = (0.7, 0.55, 0.45, 0.37, 0.3, 0.25, 0.21, 0.17, 0.14, 0.11, 0.09, 0.07, 0.05, 0.03)
_RESAMPLES = 200
_MOST = 16  # candidates in a plan
_STEP = 0.95  # a candidate must be at least 5 % cheaper than the one before
_HOPELESS = 0.02  # predicted chance of passing below which testing is a waste


@dataclass(frozen=True)
class Rung:
    """One step of the ladder. `share` of the time that is left may go into it."""

    name: str
    recipe: Recipe
    share: float


def ladder(depth: int) -> tuple[Rung, ...]:
    """From the trivial floor to the full encoder in int8, in the order in which they are tried: what is cheap to make,
    or decides most, comes first."""
    layers = sorted({max(1, depth // 3), max(1, depth // 2)} - {depth})
    names = {depth // 2: "half", depth // 3: "third"}
    students = [Rung(f"{names.get(n, n)}-int8", (Distill(layers=n), Quantize()), 0.5) for n in layers]
    return (
        Rung("linear", (LinearFloor(),), 0.2),
        Rung("full-int8", (Quantize(),), 0.2),
        Rung("static", (Static(),), 0.3),
        *students,
    )


@dataclass(frozen=True)
class Point:
    """A rung that was trained, exported and run on dev.

    logits (n, outputs) are those of the exported file on dev, select rows first. `file` is the SHA-256 of the file.
    """

    name: str
    engine: str
    options: Mapping[str, Any]
    file: str
    bytes: int
    temperature: float
    logits: NDArray[np.float32] = field(repr=False)


class Search:
    """Walks the ladder; a rung that was told is not asked for again."""

    def __init__(self, rungs: Sequence[Rung], told: Iterable[Point] = ()) -> None:
        self._rungs = tuple(rungs)
        self.points: dict[str, Point] = {point.name: point for point in told}

    def ask(self) -> Rung | None:
        """The next rung to try; None where all were told."""
        return next((rung for rung in self._rungs if rung.name not in self.points), None)

    def tell(self, point: Point) -> None:
        """What a rung gave."""
        self.points[point.name] = point


@dataclass(frozen=True)
class Choice:
    """One way to answer: a point alone, or a cheap point that hands its least confident rows to a strong one.

    `temperatures` and `thresholds` are per tier, `answered` the share of dev that each answers, `cost` in seconds (of a
    row, or of a single request) or in bytes. logits (n, outputs) are what it says on dev.
    """

    points: tuple[Point, ...]
    temperatures: tuple[float, ...]
    thresholds: tuple[float, ...]
    answered: tuple[float, ...]
    cost: float
    logits: NDArray[np.float32] = field(repr=False)

    @property
    def name(self) -> str:
        """For people: `static`, or `static > half-int8 (12 %)`."""
        if len(self.points) == 1:
            return self.points[0].name
        return f"{' > '.join(p.name for p in self.points)} ({100 * self.answered[-1]:.0f} %)"


def choices(
    points: Sequence[Point], costs: Mapping[str, Cost], task: Task, calibrate: slice, targets: Ints, minimise: Minimise
) -> list[Choice]:
    """Every point alone and every cascade of two at each share of `SHARES`.

    Thresholds are quantiles of the cheap point's confidence on the `calibrate` rows, so that they do not depend on
    labels. The strong tier's temperature is fitted on the calibrate rows that reach it; `targets` (n,) are for all dev.
    """
    found = [
        Choice((p,), (p.temperature,), (0.0,), (1.0,), _cost((p,), (1.0,), costs, minimise), p.logits) for p in points
    ]
    if not task.confident:
        return found
    for cheap, strong in itertools.permutations(points, 2):
        if costs[cheap.name].row >= costs[strong.name].row:
            continue
        sure = task.confidence(cheap.logits, cheap.temperature)
        for threshold in dict.fromkeys(np.quantile(sure[calibrate], SHARES).tolist()):
            handed = sure < threshold
            share = float(handed.mean())
            reached = handed.copy()
            reached[: calibrate.start] = False
            temperature = strong.temperature
            if reached.sum() >= 50:
                temperature = fit_temperature(strong.logits[reached], targets[reached], task)
            found.append(
                Choice(
                    (cheap, strong),
                    (cheap.temperature, temperature),
                    (threshold, 0.0),
                    (1 - share, share),
                    _cost((cheap, strong), (1.0, share), costs, minimise),
                    np.where(handed[:, None], strong.logits, cheap.logits),
                )
            )
    return found


def _cost(points: Sequence[Point], reached: Sequence[float], costs: Mapping[str, Cost], minimise: Minimise) -> float:
    """What is minimised; `reached` is the share of rows that gets to each tier."""
    if minimise == "size":
        return float(sum(p.bytes for p in points))
    each = [(costs[p.name].row if minimise == "cost" else costs[p.name].single) for p in points]
    first = costs[""].row if minimise == "cost" else costs[""].single
    return first + sum(c * share for c, share in zip(each, reached, strict=True))


@dataclass(frozen=True)
class Planned:
    """A choice with its drop on dev (in units of quality) and the predicted chance that it passes the certificate."""

    choice: Choice
    quality: float
    drop: float
    chance: float


def judged(
    found: Sequence[Choice],
    reference: Floats,
    targets: Ints | Floats,
    task: Task,
    margin: float,
    rows: int,
    level: float,
) -> list[Planned]:
    """Predicts each choice's chance to pass at `level` with `rows` certify rows.

    The drop on dev and its standard error (paired bootstrap, seeded) are carried over to the size of certify. A drop
    below zero counts as zero: no student is better than its reference by more than luck.
    """
    n = len(targets)
    weights = np.random.default_rng(0).multinomial(n, np.full(n, 1 / n), _RESAMPLES).astype(np.float64)
    base = task.outcomes(reference, targets)
    at, spread = float(task.quality(base)), task.quality(base, weights)
    z = NormalDist().inv_cdf(1 - level)
    result = []
    for choice in found:
        outcomes = task.outcomes(choice.logits, targets)
        quality = float(task.quality(outcomes))
        error = float((spread - task.quality(outcomes, weights)).std())
        # Two models that agree on all of dev may still differ on one row in n.
        error = math.sqrt((error**2 + 1 / n**2) * n / rows)
        drop = at - quality
        chance = NormalDist().cdf((margin - max(drop, 0.0)) / error - z)
        result.append(Planned(choice, quality, drop, chance))
    return result


def plan(candidates: Sequence[Planned]) -> tuple[Planned, ...]:
    """The candidates to test, safest to cheapest: none is both dearer and less likely to pass than another."""
    by_cost = sorted(candidates, key=lambda c: (c.choice.cost, -c.chance))
    front: list[Planned] = []
    for candidate in by_cost:
        if not front or candidate.chance > front[-1].chance:
            front.append(candidate)
    worth = [c for c in front if c.chance >= _HOPELESS] or front[-1:]
    worth.reverse()
    kept = worth[:1]
    for candidate in worth[1:]:
        if candidate.choice.cost < _STEP * kept[-1].choice.cost or candidate is worth[-1]:
            kept.append(candidate)
    return tuple(kept[:_MOST])
