"""How often a certificate is false: simulated candidates whose true drop is at least the margin, tested as in a job.

    python benchmarks/certificate.py [--share 1.0] [--only TEXT] [--seed 0] [--json FILE]

Each scenario is a distribution of rows whose true drops are known. "selected" ones also simulate what comes before the
test: five hand-over thresholds of a cascade are chosen on dev rows and ordered safest to cheapest, and a certificate is
false where what ships drops by the margin or more. Exact methods: 10,000 simulations a scenario; resampling methods:
1,000. At most 2.5 % may be false (confidence 0.95, first look), with resampling methods 3 %, since they are
approximate; "99 % limits" are Clopper and Pearson's.
"""

from __future__ import annotations

import argparse
import json
import math
import time
from collections.abc import Callable
from dataclasses import asdict, dataclass
from functools import lru_cache
from pathlib import Path
from typing import Any

import numpy as np
from numpy.typing import NDArray

from netweight.certify import exact
from netweight.certify.compare import CLASS_ROWS, Pairs, compare
from netweight.certify.tails import binomial_bounds, bisect, normal_quantile, tango_score
from netweight.task import Classify, Score, Task

LEVEL, POINTS = 0.025, 1.0
# What is asked of resampling methods: as the highest rate that was seen, 4.9 % of 225, may still be.
APPROXIMATE = 0.03
MARGIN = POINTS / 100
Floats = NDArray[np.float64]
Ints = NDArray[np.int64]
# One simulation: whether a certificate was given, and whether a given one was false.
Simulation = Callable[[np.random.Generator], tuple[bool, bool]]


@dataclass(frozen=True)
class Line:
    """One scenario. `passed` is the share that was certified, `false` the share that was certified wrongly."""

    scenario: str
    method: str
    rows: int
    simulations: int
    passed: float
    false: float
    low: float
    high: float
    seconds: float

    @property
    def holds(self) -> bool:
        """Whether the true rate may well be what a first look promises, or less: simulations scatter, so it is the
        lower 99 % limit that must not lie above it."""
        return self.low <= (APPROXIMATE if self.method == "BCa" else LEVEL)


def exact_pass(b: int, c: int, n: int) -> bool:
    """The exact test, by its remembered boundary: simulations meet the same tables again and again."""
    return b <= _most_lost(c, n)


@lru_cache(maxsize=100_000)
def _most_lost(c: int, n: int) -> int:
    """The largest number of lost pairs that passes beside c gained ones; -1 for none. More lost never pass: tested."""
    b = math.floor(
        bisect(lambda b: float(tango_score(b, c, n, MARGIN)) <= -normal_quantile(LEVEL), 0.0, float(n - c), 0.5)
    )
    while b >= 0 and not exact.passes(b, c, n, MARGIN, LEVEL):
        b -= 1
    while b + 1 + c <= n and exact.passes(b + 1, c, n, MARGIN, LEVEL):
        b += 1
    return b


def single(lost: float, gained: float, n: int) -> Simulation:
    """One candidate, accuracy, no selection."""

    def once(rng: np.random.Generator) -> tuple[bool, bool]:
        b, c, _ = rng.multinomial(n, [lost, gained, 1 - lost - gained])
        passed = exact_pass(int(b), int(c), n)
        return passed, passed and lost - gained >= MARGIN - 1e-12

    return once


def cascade(n: int, dev: int, plateau: bool) -> Simulation:
    """Accuracy of cascades. Rows fall into 20 bins of the cheap tier's confidence, most confident first; a cascade
    answers its first bins with the cheap tier and hands the rest to the strong one.

    With `plateau` the drop jumps from nothing to exactly the margin at the sixth bin and stays there, though rows go
    on to change: the most chances to be wrong. Else it grows evenly and passes the margin at the twelfth bin.
    """
    bins = 20
    lost = gained = np.linspace(0.005, 0.08, bins) / bins
    lost = lost + (np.where(np.arange(bins) == 5, MARGIN, 0) if plateau else MARGIN / 12)
    # The strong tier itself loses a little against the reference, in every bin.
    strong_lost, strong_gained = np.full(bins, 0.004 / bins), np.full(bins, 0.004 / bins)
    cells = np.concatenate([lost, gained, strong_lost, strong_gained])
    cells = np.append(cells, 1 - cells.sum())

    def tables(counts: Any) -> tuple[Any, Any]:
        """Lost and gained of the cascades that answer 0, 1, ... 20 bins cheaply."""
        parts = counts[:-1].reshape(4, bins)
        cheap, strong = np.cumsum(parts[:2], axis=1), np.cumsum(parts[2:, ::-1], axis=1)[:, ::-1]
        zero = np.zeros((2, 1), parts.dtype)
        both = np.concatenate([zero, cheap], axis=1) + np.concatenate([strong, zero], axis=1)
        return both[0], both[1]

    b, c = tables(cells)
    true_drop = b - c

    def once(rng: np.random.Generator) -> tuple[bool, bool]:
        b, c = tables(rng.multinomial(dev, cells))
        seen = (b - c) / dev
        # As the search does: the cheapest that look good on dev, and safer ones before them.
        good = np.flatnonzero(seen <= MARGIN)
        chosen = np.unique(np.quantile(good, [0, 0.25, 0.5, 0.75, 1], method="nearest")) if len(good) else [0]
        b, c = tables(rng.multinomial(n, cells))
        shipped = -1
        for k in chosen:
            if not exact_pass(int(b[k]), int(c[k]), n):
                break
            shipped = int(k)
        return shipped >= 0, shipped >= 0 and bool(true_drop[shipped] >= MARGIN - 1e-12)

    return once


def macro_f1(share: Floats, right: Floats, where: Floats, gain: float, n: int, points: float = POINTS) -> Simulation:
    """Macro-F1: of classes of the given shares the reference gets `right`; the candidate loses rows of each in
    proportion to `where`, and gains `gain` for each lost one, so many that its true drop is the margin. Samples
    with under 25 rows in a class are drawn again, since they are refused."""
    classes = len(share)
    task = Classify(tuple(f"class {i}" for i in range(classes)), "macro-f1")
    at, after = np.arange(classes), (np.arange(classes) + 1) % classes
    # true, reference, candidate: stays right, lost, gained, stays wrong
    rows = np.concatenate(
        [np.stack(c, axis=1) for c in ((at, at, at), (at, at, after), (at, after, at), (at, after, after))]
    )
    rows = rows.astype(np.float64)

    def law(scale: float) -> Floats:
        lost = np.minimum(scale * where, 1) * right * share
        gained = np.minimum(gain * lost, (1 - right) * share)
        return np.concatenate([right * share - lost, lost, gained, (1 - right) * share - gained])

    def drop(p: Floats) -> float:
        return float(task.quality(rows[:, [1, 0]], p)[0] - task.quality(rows[:, [2, 0]], p)[0])

    low, high = 0.0, 1.0
    for _ in range(60):
        low, high = ((low + high) / 2, high) if drop(law((low + high) / 2)) < points / 100 else (low, (low + high) / 2)
    p = law(high)

    def once(rng: np.random.Generator) -> tuple[bool, bool]:
        while True:
            found = rows[np.repeat(np.arange(len(rows)), rng.multinomial(n, p))]
            if np.bincount(found[:, 0].astype(int), minlength=classes).min() >= CLASS_ROWS:
                break
        return _tested(task, found[:, [1, 0]], found[:, [2, 0]], None, points, rng)

    return once


def _tested(
    task: Task, reference: Floats, candidate: Floats, groups: Ints | None, points: float, rng: np.random.Generator
) -> tuple[bool, bool]:
    found = compare(Pairs(task, reference, candidate, groups), points, LEVEL, int(rng.integers(2**31)))
    passed = found.p_value <= LEVEL
    return passed, passed


def grouped(groups: int, mean_size: float, together: float, gain: float) -> Simulation:
    """Accuracy of rows in groups. A share `together` of what is lost (and gained) strikes whole groups."""
    lost = MARGIN / (1 - gain)
    task = Classify(("wrong", "right"))

    def once(rng: np.random.Generator) -> tuple[bool, bool]:
        sizes = rng.geometric(1 / mean_size, groups)
        # A group's fate does not depend on its size, so that the true drop of a row is exactly the margin.
        fate = np.repeat(rng.choice(3, groups, p=[lost, gain * lost, 1 - (1 + gain) * lost]), sizes)
        alone = rng.choice(3, sizes.sum(), p=[lost, gain * lost, 1 - (1 + gain) * lost])
        change = np.where(np.repeat(rng.random(groups) < together, sizes), fate, alone)
        reference, candidate = np.where(change == 1, 0, 1), np.where(change == 0, 0, 1)
        true = np.ones(len(change))
        return _tested(
            task,
            np.stack([reference, true], axis=1),
            np.stack([candidate, true], axis=1),
            np.repeat(np.arange(groups), sizes),
            POINTS,
            rng,
        )

    return once


def scores(task: Score, kind: str, n: int) -> Simulation:
    """Scores of which the reference explains most; the candidate adds small noise to all ("noise"), or is without any
    relation on few rows ("rare"). How much, is found on 400,000 rows."""

    def rows(rng: np.random.Generator, count: int, amount: float) -> tuple[Floats, Floats]:
        true = rng.normal(size=count)
        if kind == "stars":  # ratings from 1 to 5, most of them high
            true = np.clip(np.rint(4.3 + 1.1 * true), 1, 5)
        reference = true + 0.5 * rng.normal(size=count)
        noise = rng.normal(size=count)
        wild = rng.random(count)
        candidate = np.where(wild < amount, 2 * noise, reference) if kind == "rare" else reference + amount * noise
        return np.stack([reference, true], axis=1), np.stack([candidate, true], axis=1)

    def shortfall(amount: float) -> float:
        one, two = rows(np.random.default_rng(0), 400_000, amount)
        before = float(task.quality(one))
        return before - float(task.quality(two)) - task.margin(POINTS, before)

    low, high = 0.0, 1.0
    for _ in range(14):
        low, high = ((low + high) / 2, high) if shortfall((low + high) / 2) < 0 else (low, (low + high) / 2)

    def once(rng: np.random.Generator) -> tuple[bool, bool]:
        return _tested(task, *rows(rng, n, high), None, POINTS, rng)

    return once


def scenarios() -> list[tuple[str, str, int, int, Callable[[], Simulation]]]:
    """Name, method, rows, simulations, and how to make one."""
    three, zipf = np.array([0.85, 0.09, 0.06]), 1 / np.arange(1, 11)
    good, even = np.array([0.95, 0.7, 0.6]), np.full(10, 0.9)
    rare3, rare10 = np.eye(3)[2], np.eye(10)[9]
    found: list[tuple[str, str, int, int, Callable[[], Simulation]]] = []
    for n in (500, 2_000, 5_000):
        found.append(("accuracy, only losses", "exact", n, 10_000, lambda n=n: single(MARGIN, 0, n)))
        found.append(("accuracy, losses and gains", "exact", n, 10_000, lambda n=n: single(0.03, 0.02, n)))
        found.append(("accuracy, selected on a plateau", "exact", n, 10_000, lambda n=n: cascade(n, 1_000, True)))
        found.append(("accuracy, selected on a slope", "exact", n, 10_000, lambda n=n: cascade(n, 1_000, False)))
    for n in (800, 3_000):
        found += [
            ("macro-F1, losses in the rarest of 3", "BCa", n, 1_000, lambda n=n: macro_f1(three, good, rare3, 0, n)),
            ("macro-F1, also gains", "BCa", n, 1_000, lambda n=n: macro_f1(three, good, rare3, 0.5, n)),
            ("macro-F1, all of 3 classes", "BCa", n, 1_000, lambda n=n: macro_f1(three, good, np.ones(3), 0.5, n)),
        ]
    found += [
        ("macro-F1, rarest of 10", "BCa", 2_000, 1_000, lambda: macro_f1(zipf / zipf.sum(), even, rare10, 0.5, 2_000)),
        ("accuracy, 300 groups of 4", "BCa", 1_200, 1_000, lambda: grouped(300, 4, 0.5, 0.3)),
        ("accuracy, 60 groups of 20", "BCa", 1_200, 1_000, lambda: grouped(60, 20, 0.2, 0.3)),
        ("Spearman, noise", "BCa", 1_000, 300, lambda: scores(Score(), "noise", 1_000)),
        ("Spearman, rare gross errors", "BCa", 1_000, 300, lambda: scores(Score(), "rare", 1_000)),
        ("Spearman, stars", "BCa", 1_000, 300, lambda: scores(Score(), "stars", 1_000)),
        ("MAE, noise", "BCa", 1_000, 1_000, lambda: scores(Score(metric="mae"), "noise", 1_000)),
        ("MAE, rare gross errors", "BCa", 1_000, 1_000, lambda: scores(Score(metric="mae"), "rare", 1_000)),
    ]
    return found


def run(share: float = 1.0, only: str = "", seed: int = 0) -> list[Line]:
    """All scenarios whose "name method rows" contains `only`, with `share` of their simulations."""
    lines = []
    for name, method, rows, count, make in scenarios():
        if only not in f"{name} {method} {rows}":
            continue
        start, rng, count = time.perf_counter(), np.random.default_rng(seed), max(1, round(count * share))
        simulate = make()
        results = np.array([simulate(rng) for _ in range(count)])
        passed, false = results.sum(axis=0)
        low, high = binomial_bounds(int(false), count, 0.01)
        lines.append(
            Line(name, method, rows, count, passed / count, false / count, low, high, time.perf_counter() - start)
        )
        print(_said(lines[-1]), flush=True)
    return lines


def _said(line: Line) -> str:
    return (
        f"{line.scenario:36} {line.method:6} {line.rows:6,} {line.simulations:7,} {100 * line.passed:9.2f} "
        f"{100 * line.false:7.2f} {100 * line.low:8.2f} {100 * line.high:6.2f} {line.seconds:7.1f}"
    )


def main() -> None:
    """Print the table."""
    parser = argparse.ArgumentParser(description=__doc__.splitlines()[0] if __doc__ else None)
    parser.add_argument("--share", type=float, default=1.0, help="share of the simulations to run")
    parser.add_argument("--only", default="", help="scenarios whose name, method and rows contain this")
    parser.add_argument("--seed", type=int, default=0, help="of the simulations")
    parser.add_argument("--json", type=Path, help="also write the table there")
    options = parser.parse_args()
    print(f"{'scenario':36} method   rows    sims certified   false 99% limits        seconds    (%)")
    lines = run(options.share, options.only, options.seed)
    if options.json:
        options.json.write_text(json.dumps([asdict(line) for line in lines], indent=1) + "\n", encoding="utf-8")
    if broken := [line.scenario for line in lines if not line.holds]:
        raise SystemExit(f"more false certificates than promised: {', '.join(broken)}")


if __name__ == "__main__":
    main()
