"""The search beyond the ladder: Optuna proposes recipes, short trials first, and the best are made in full.

Two objectives: disagreement with the reference on dev, and size: bytes of the exported file where these are minimised,
else what a row's work grows with. (Times are measured later, interleaved, for the points that are there.) Successive
halving (Jamieson and Talwalkar, 2016) with two rungs: a proposal trains for a third of its epochs, in time boxes that
are alike, and the best of their kind then in full, at the latest when the time that is kept for them begins: by front,
as Schmucker et al. do ("Multi-objective asynchronous successive halving", 2021), and within one those first that
together beat most. The first of a kind have the ladder's own options, so that Optuna learns from them.

What is proposed depends only on what was told before and on the seed. So a search that was killed asks again for what
it had asked, in boxes of the same time; its SQLite file, which `optuna-dashboard` reads, is made anew by every process
from what was told.
"""

from __future__ import annotations

import math
import zlib
from collections.abc import Callable, Iterable, Iterator, Mapping, Sequence
from contextlib import contextmanager
from dataclasses import dataclass, replace
from itertools import zip_longest
from pathlib import Path
from typing import Any, Literal, Protocol

import optuna
from optuna.distributions import BaseDistribution, CategoricalDistribution, FloatDistribution, IntDistribution
from optuna.trial import TrialState, create_trial

from netweight.model import Model
from netweight.search import LEAST, Point, Rung
from netweight.space import Kind, Trial, kinds, space, usual

Effort = Literal["quick", "standard", "thorough"]
Objectives = Callable[[Point], tuple[float, int]]

# Short trials of each kind at most, and how many of each kind are then made in full.
_SHORT: dict[Effort, int] = {"standard": 6, "thorough": 24}
_FULL: dict[Effort, int] = {"standard": 1, "thorough": 5}
# Kinds that train all of the teacher's layers cost most and shrink least: they get a third of that, or one.
_SIDE = ("exits", "factored")
# The first proposals of a kind, before Optuna's model takes over, and short trials in a row that move no front before
# its search is called flat: at most so many, and so much of all its short trials.
_STARTUP, _STARTUP_SHARE = 4, 1 / 3
_FLAT, _FLAT_SHARE = 6, 1 / 2
_FOR_FULL = 0.4  # of the time that is left when the search begins
_EACH = 2  # short trials of each kind that the rest is enough for, whatever they take


def _most(table: Mapping[Effort, int], effort: Effort, kind: Kind) -> int:
    return max(1, table[effort] // 3) if kind in _SIDE else table[effort]


class Maker(Protocol):
    """Who makes what is proposed."""

    @property
    def left(self) -> float:
        """Seconds of the time box."""
        ...

    @property
    def limit(self) -> float:
        """Seconds of the time box when it began."""
        ...

    def box(self, seconds: float) -> float:
        """Seconds of a short trial: these, or what an earlier process under this limit gave to its own."""
        ...

    def objectives(self, point: Point) -> tuple[float, int]:
        """Its disagreement with the reference on dev, in [0, 1], and its size."""
        ...

    def has(self, rung: Rung) -> bool:
        """Whether another point was made by this rung's very recipe."""
        ...


@dataclass(frozen=True)
class Told:
    """A finished short trial and what it gave."""

    trial: Trial
    disagreement: float
    size: int


class Trials:
    """Proposes rungs of one job. `points` are those that earlier processes finished.

    Args:
        path: the SQLite file.
        teacher: what students are made of and trained on.
        effort: how many trials.
        bytes_count: whether bytes are minimised: then what pays in bytes alone is proposed too.
        kept: trials that earlier processes began, in their order, with their points; None where one was not finished.
    """

    def __init__(
        self,
        path: Path,
        teacher: Model,
        effort: Effort,
        seed: int,
        maker: Maker,
        bytes_count: bool = False,
        kept: Sequence[tuple[Trial, Point | None]] = (),
    ) -> None:
        self.teacher, self.effort, self.seed = teacher, effort, seed
        self._maker, self._bytes_count = maker, bytes_count
        self._began: float | None = None  # seconds that were left then
        self._each = 0.0
        # What Optuna had proposed, it proposes again; which of its proposals were made in full, a clock had decided.
        full = (trial for trial, point in kept if point is None and not trial.short)
        self.asked = next(filter(self._alike, full), None)
        self._over = set[Kind]()
        # A short one is finished as it was begun, even where another effort or budget would now propose something else.
        self._begun = {trial.name: trial for trial, point in kept if point is None and trial.short}
        self._made = {trial.name for trial, point in kept if point is not None}
        self.points = [point for _, point in kept if point is not None]
        self.told: dict[Kind, list[Told]] = {kind: [] for kind in kinds(teacher)}
        for trial, point in kept:
            if trial.short and point is not None:
                self.told[trial.kind].append(Told(trial, *maker.objectives(point)))
        path.parent.mkdir(parents=True, exist_ok=True)
        # Nothing is taken from it: another budget may have told it other sizes, and a crash may have damaged it.
        for old in (path, *path.parent.glob(f"{path.name}-*")):
            old.unlink(missing_ok=True)
        with _quiet():
            self._studies = {kind: self._study(path, kind) for kind in self.told}

    def _study(self, path: Path, kind: Kind) -> optuna.Study:
        study = optuna.create_study(storage=f"sqlite:///{path}", study_name=kind, directions=["minimize", "minimize"])
        for one in self.told[kind]:
            self._add(study, one)
        return study

    def _add(self, study: optuna.Study, one: Told) -> None:
        values, params = [one.disagreement, float(one.size)], dict(one.trial.params)
        # What this job does not search another one may have; of what it does, Optuna takes no other choices.
        where = space(one.trial.kind, self.teacher) | space(one.trial.kind, self.teacher, self._bytes_count)
        if self._alike(one.trial) and _among(params, where):
            held = {name: where[name] for name in params}
            study.add_trial(create_trial(values=values, params=params, distributions=held))

    def _alike(self, trial: Trial) -> bool:
        """Whether a short trial had as much time as those of now (an earlier version did not say)."""
        return trial.limit in (0.0, self._maker.limit)

    def _here(self, kind: Kind) -> list[Told]:
        """Short trials that count as this job's: as long as its own, and of all that it searches."""
        where = set(space(kind, self.teacher, self._bytes_count))
        return [one for one in self.told[kind] if self._alike(one.trial) and where <= set(one.trial.params)]

    @property
    def least(self) -> float:
        """Seconds with which another one is begun. With little left of the whole job the search does not begin; once it
        has, it ends with the time that it found, since what is made in full comes last."""
        began = self._maker.left if self._began is None else self._began
        return began / LEAST if began >= self._maker.limit / LEAST else math.inf

    def ask(self) -> Rung | None:
        """The next rung: short trials of the kinds in turn, then, or when the time kept for that begins, the best of
        them in full; None at the end."""
        left = self._maker.left
        if self._began is None:
            self._began = left
            each = (1 - _FOR_FULL) * max(left, 1.0) / (_EACH * len(self.told))
            self._each = self._maker.box(each) if self.least < math.inf else each
        if self.asked is None:
            short = left > _FOR_FULL * self._began or not any(map(self._here, self.told))
            self.asked = (self._short() if short else None) or self._full()
        if self.asked is None:
            return None
        rung = self.asked.rung(self.teacher)
        # Short trials are compared with each other, so an early one gets no more time than a late one will.
        share = min(rung.share, self._each / max(left, self._each, 1.0))
        return replace(rung, share=share) if self.asked.short else rung

    def _short(self) -> Trial | None:
        for kind in sorted(self.told, key=lambda kind: len(self._here(kind))):
            here, number, most = self._here(kind), len(self.told[kind]) + 1, _most(_SHORT, self.effort, kind)
            if kind not in self._over and len(here) < most and not _flat(here, most):
                with _quiet():
                    params = self._proposed(kind, number, len(here), most)
                found = Trial(kind, number, True, params, self._maker.limit)
                return self._begun.get(found.name, found)
        return None

    def _proposed(self, kind: Kind, number: int, here: int, most: int) -> dict[str, Any]:
        study, first = self._studies[kind], usual(kind, self.teacher, self._bytes_count)
        where = space(kind, self.teacher, self._bytes_count)
        # One may wait already, from a process that was killed before it took it.
        if here < len(first) and not study.get_trials(states=[TrialState.WAITING]):
            study.enqueue_trial(first[here])
        study.sampler = optuna.samplers.TPESampler(
            seed=zlib.crc32(f"{self.seed} {kind} {number - 1}".encode()),
            n_startup_trials=max(1, min(_STARTUP, round(_STARTUP_SHARE * most))),
            multivariate=True,
        )
        return study.ask(where).params

    def _full(self) -> Trial | None:
        in_turn = zip_longest(*map(self.best, self.told))
        return next((t for each in in_turn for t in each if t is not None and t.name not in self._made), None)

    def without(self, trial: Trial) -> None:
        """It cannot be made: nor, perhaps, can others of its kind, so this process proposes no more of these."""
        self.asked = None
        self._made.add(trial.name)
        self._over.add(trial.kind)

    def tell(self, point: Point) -> None:
        """What the rung that was asked for gave. Raises ValueError for another one."""
        trial = self.asked
        if trial is None or trial.name != point.name:
            raise ValueError(f"{point.name} was not asked for.")
        self.asked = None
        self._made.add(trial.name)
        if trial.short:
            one = Told(trial, *self._maker.objectives(point))
            self.told[trial.kind].append(one)
            with _quiet():
                study = self._studies[trial.kind]
                *_, proposed = study.get_trials(states=[TrialState.RUNNING])
                if proposed.params == dict(trial.params) and self._alike(trial):
                    study.tell(proposed.number, [one.disagreement, float(one.size)])
                else:  # it was begun before, as something else
                    study.tell(proposed.number, state=TrialState.FAIL)
                    self._add(study, one)

    def best(self, kind: Kind) -> list[Trial]:
        """What of a kind deserves to be made in full, as it then is: by front, then by what it adds to it."""
        # A store may be of an earlier version, whose values this one does not propose.
        where = space(kind, self.teacher)
        told = [one for one in self._here(kind) if _among(one.trial.params, where)]
        left, order = told, list[Told]()
        while left:
            front = [one for one in left if not any(_dominates(other, one) for other in left)]
            order += _by_gain(front, _behind(told))
            left = [one for one in left if one not in front]
        full = [replace(one.trial, short=False) for one in order]
        fresh = [trial for trial in full if not self._maker.has(trial.rung(self.teacher))]
        return fresh[: _most(_FULL, self.effort, kind)]


def _among(params: Mapping[str, Any], where: Mapping[str, BaseDistribution]) -> bool:
    return all(name in where and _within(where[name], value) for name, value in params.items())


def _within(held: BaseDistribution, value: Any) -> bool:
    if isinstance(held, CategoricalDistribution):
        return value in held.choices
    return held.low <= value <= held.high if isinstance(held, FloatDistribution | IntDistribution) else False


def _dominates(one: Told, other: Told) -> bool:
    return _beats((one.disagreement, one.size), (other.disagreement, other.size))


def _beats(a: tuple[float, float], b: tuple[float, float]) -> bool:
    """Whether `a` is no larger than `b` in both objectives, and smaller in one (Pareto dominance)."""
    return a != b and a[0] <= b[0] and a[1] <= b[1]


def _behind(told: Iterable[Told]) -> tuple[float, float]:
    """A corner that all of them beat in both objectives: a tenth of their range behind the worst."""
    both = list(zip(*((one.disagreement, float(one.size)) for one in told), strict=True))
    wrong, size = (1.1 * max(values) - 0.1 * min(values) for values in both)
    return wrong, size


def _by_gain(front: Sequence[Told], corner: tuple[float, float]) -> list[Told]:
    """The points of a front, each time the one that adds most to what the chosen ones beat; then by disagreement."""
    order: list[Told] = []
    while rest := [one for one in front if one not in order]:
        order.append(max(rest, key=lambda one: (_beaten([*order, one], corner), -one.disagreement)))
    return order


def _beaten(chosen: Iterable[Told], corner: tuple[float, float]) -> float:
    """The area between some points and a corner behind them (their hypervolume)."""
    area, reach = 0.0, corner[1]
    for one in sorted(chosen, key=lambda one: one.disagreement):
        area += (corner[0] - one.disagreement) * max(0.0, reach - one.size)
        reach = min(reach, float(one.size))
    return area


def _flat(told: Sequence[Told], most: int) -> bool:
    """Whether none of the last trials was on the front when it was told; there are `most` in all."""
    flat = max(1, min(_FLAT, round(_FLAT_SHARE * most)))
    late = range(max(0, len(told) - flat), len(told))
    return len(told) > flat and all(any(_dominates(one, told[i]) for one in told[:i]) for i in late)


def undominated(points: Iterable[Point], objectives: Objectives) -> list[Point]:
    """Points that no other one of their engine beats in both objectives: the rest is not worth timing."""
    held = [(point, objectives(point)) for point in points]
    return [p for p, mine in held if not any(o.engine == p.engine and _beats(other, mine) for o, other in held)]


@contextmanager
def _quiet() -> Iterator[None]:
    """Without Optuna's own lines on standard error."""
    before = optuna.logging.get_verbosity()
    optuna.logging.set_verbosity(optuna.logging.ERROR)
    try:
        yield
    finally:
        optuna.logging.set_verbosity(before)
