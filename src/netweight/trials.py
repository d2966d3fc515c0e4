"""The search beyond the ladder: Optuna proposes recipes, short trials first, and the best are made in full.

Two objectives: disagreement with the reference on dev, and size: of the exported file where bytes are minimised, else
of all weights in fp32, which for an encoder grows as its work does, whatever fewer bits make of the file. (Times are
measured later, interleaved, for the points that are there.) Successive halving (Jamieson and
Talwalkar, 2016) with two rungs: a proposal trains for a third of its epochs, and the best of their kind then in full,
at the latest when the time that is kept for them begins. The first of a kind have the ladder's own options, so that
Optuna learns from them.

What is proposed depends only on what was told before and on the seed. So a search that was killed asks again for what
it had asked, and its SQLite file, which `optuna-dashboard` reads, may be deleted: it is made again from what is told.
"""

from __future__ import annotations

import math
import zlib
from collections.abc import Callable, Collection, Iterable, Iterator, Mapping, Sequence
from contextlib import contextmanager
from dataclasses import dataclass, replace
from itertools import zip_longest
from pathlib import Path
from typing import Any, Literal, get_args

import optuna
from optuna.distributions import BaseDistribution, CategoricalDistribution, FloatDistribution, IntDistribution
from optuna.trial import TrialState, create_trial

from netweight.errors import OptionError
from netweight.model import Model
from netweight.search import DISTILLED, TRAINED, Point, Rung, ladder, layers_of, quantized, student
from netweight.techniques import Distill, EarlyExit, Factor, MixedBits, Prune, QuantizeAware, Recipe, Static, Technique
from netweight.techniques.exits import refusal as no_exits
from netweight.train import Plan

Effort = Literal["quick", "standard", "thorough"]
Kind = Literal["static", "encoder", "exits", "factored"]
Objectives = Callable[[Point], tuple[float, int]]

# Short trials of each kind at most, and how many of each kind are then made in full.
_SHORT: dict[Effort, int] = {"quick": 0, "standard": 6, "thorough": 24}
_FULL: dict[Effort, int] = {"quick": 0, "standard": 1, "thorough": 5}
# Kinds that train all of the teacher's layers cost most and shrink least: they get a third of that, or one.
_SIDE = ("exits", "factored")
_SHORTENED = 3
# Options that not every job searches: what pays in bytes alone, and what not every run can train.
BYTES, INSIDE = "sparsity", "match"
# What comes after distillation starts from its student: a part of its epochs at a part of its learning rate.
_AFTER_EPOCHS, _AFTER_RATE = 1 / 3, 1 / 2
# The first proposals of a kind, before Optuna's model takes over, and short trials in a row that move no front before
# its search is called flat: at most so many, and so much of all its short trials.
_STARTUP, _STARTUP_SHARE = 4, 1 / 3
_FLAT, _FLAT_SHARE = 6, 1 / 2
_FOR_FULL = 0.4  # of the time that is left when the search begins
_SHARE = 0.5  # of the time that is left, for a full trial


@dataclass(frozen=True)
class Trial:
    """A proposal: the `number`-th of its kind, and whether it is to be trained for a third of its epochs only."""

    kind: Kind
    number: int
    short: bool
    params: Mapping[str, Any]

    @property
    def name(self) -> str:
        """Of its rung and its point."""
        return f"{self.kind}-{self.number}{'-short' if self.short else ''}"

    def rung(self, teacher: Model) -> Rung:
        """What the proposal comes to. Raises OptionError where its options are not those of the search's space."""
        known = set(space(self.kind, teacher))
        if not known - {BYTES, INSIDE} <= set(self.params) <= known:
            raise OptionError(f"trial {self.name} was proposed by another version of Netweight; delete the run store.")
        given = dict(self.params)
        part = 1 / _SHORTENED if self.short else 1.0
        given["epochs"], share = given["epochs"] * part, _SHARE * part
        plan = replace(TRAINED, schedule=given.pop("schedule"), optimizer=given.pop("optimizer"))
        if self.kind == "static":
            if not given["filters"]:
                del given["reach"]
            return Rung(self.name, (Static(**given | {"buckets": 2 ** given["buckets"]}),), share, plan)
        plan = replace(plan, batch_size=given.pop("batch_size"))
        return Rung(self.name, _encoder(self.kind, given, teacher), share, plan)


def _encoder(kind: Kind, given: dict[str, Any], teacher: Model) -> Recipe:
    """The recipe of an encoder of a kind with the given options."""
    if kind == "encoder":
        return _student(given, teacher)
    quantize = quantized(given.pop("bits"))
    if kind == "factored":
        return Factor(**given), quantize
    first = given.pop("first")
    after = (first, (first + teacher.depth) // 2)[: given.pop("exits")]
    return EarlyExit(after, **given), quantize


def _student(given: dict[str, Any], teacher: Model) -> Recipe:
    """Cut, distilled, and for some made sparse; quantized at last."""
    shape = {name: given.pop(name) for name in ("layers", "neurons", "activation", "heads")}
    bits, how = given.pop("bits"), given.pop("quantize")
    match, sparsity = given.pop(INSIDE, "logits"), given.pop(BYTES, 0.0)
    after = {
        "epochs": given["epochs"] * _AFTER_EPOCHS,
        "learning_rate": given["learning_rate"] * _AFTER_RATE,
        "temperature": given["temperature"],
    }
    then: Recipe = (Prune(sparsity, **after),) if sparsity else ()
    last: dict[str, Technique] = {
        "post": quantized(bits),
        "aware": QuantizeAware(quantized(bits), **after),
        "mixed": MixedBits(bits - 1, choices=(2, 3, 4, 6, 7)),
    }
    if match == "hidden":
        given["match"] = ("logits", "hidden")
    elif match == "relations":
        heads = _heads(teacher)
        # Must divide the columns of the teacher and those of a student with half of the heads.
        divisor = heads if shape["heads"] == 1.0 else math.gcd(heads, heads // 2)
        given |= {"match": ("logits", "relations"), "relation_heads": divisor}
    return student(teacher, **shape, distil=Distill(**given), then=(*then, last[how]))


def _heads(teacher: Model) -> int:
    """Heads of a layer; 0 in a family whose layers are not known."""
    return min((block.heads for block in layers_of(teacher)), default=0)


def kinds(teacher: Model) -> tuple[Kind, ...]:
    """What can be made of a teacher."""
    return tuple(kind for kind in get_args(Kind) if kind != "exits" or (teacher.depth > 1 and not no_exits(teacher)))


def usual(kind: Kind, teacher: Model) -> list[dict[str, Any]]:
    """Options of the ladder's rungs of a kind, and of the technique where the ladder has none; what is tried first."""
    plan = vars(Plan()) | {"bits": 7, "quantize": "post", BYTES: 0.0}
    if kind == "static":
        rungs = [rung.recipe[0] for rung in ladder(teacher) if isinstance(rung.recipe[0], Static)]
        found = [plan | vars(rung) | {"buckets": rung.buckets.bit_length() - 1} for rung in rungs]
    elif kind == "encoder":
        shape = {"layers": max(1, teacher.depth // 2), "neurons": 0.5, "heads": 1.0, "activation": "relu"}
        found = [plan | vars(DISTILLED) | shape | {"batch_size": TRAINED.batch_size}]
    elif kind == "exits":
        found = [plan | vars(EarlyExit()) | {"first": min(2, max(1, teacher.depth - 2)), "exits": 1}]
    else:
        found = [plan | vars(Factor(budget=0.5))]
    return [{name: options[name] for name in space(kind, teacher)} for options in found]


def _most(table: Mapping[Effort, int], effort: Effort, kind: Kind) -> int:
    return max(table[effort] // 3, min(table[effort], 1)) if kind in _SIDE else table[effort]


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
        objectives: of a point: its disagreement with the reference on dev, in [0, 1], and its size.
        left: seconds of the time box.
        without: options that are left at their defaults: BYTES, INSIDE.
        kept: trials that earlier processes began, in their order, with their points; None where one was not finished.
    """

    def __init__(
        self,
        path: Path,
        teacher: Model,
        effort: Effort,
        seed: int,
        objectives: Objectives,
        left: Callable[[], float],
        without: Collection[str] = (),
        kept: Sequence[tuple[Trial, Point | None]] = (),
    ) -> None:
        self.teacher, self.effort, self.seed = teacher, effort, seed
        self._objectives, self._left, self._without = objectives, left, without
        self._for_full: float | None = None
        # What Optuna had proposed, it proposes again; which of its proposals were made in full, a clock had decided.
        self.asked = next((trial for trial, point in kept if point is None and not trial.short), None)
        # A short one is finished as it was begun, even where another effort or budget would now propose something else.
        self._begun = {trial.name: trial for trial, point in kept if point is None and trial.short}
        self._made = {trial.name for trial, point in kept if point is not None}
        self.points = [point for _, point in kept if point is not None]
        self.told: dict[Kind, list[Told]] = {kind: [] for kind in kinds(teacher)}
        for trial, point in kept:
            if trial.short and point is not None:
                self.told[trial.kind].append(Told(trial, *objectives(point)))
        path.parent.mkdir(parents=True, exist_ok=True)
        with _quiet():
            self._studies = {kind: self._study(path, kind) for kind in self.told}

    def _study(self, path: Path, kind: Kind) -> optuna.Study:
        storage = f"sqlite:///{path}"
        if kind in optuna.get_all_study_names(storage):
            # Another budget may have told it other sizes.
            optuna.delete_study(study_name=kind, storage=storage)
        study = optuna.create_study(storage=storage, study_name=kind, directions=["minimize", "minimize"])
        for one in self.told[kind]:
            self._add(study, one)
        return study

    def _add(self, study: optuna.Study, one: Told) -> None:
        values, params = [one.disagreement, float(one.size)], dict(one.trial.params)
        where = space(one.trial.kind, self.teacher)
        held = {name: where[name] for name in params}
        if _proposed_still(one.trial, self.teacher):
            study.add_trial(create_trial(values=values, params=params, distributions=held))

    def ask(self) -> Rung | None:
        """The next rung: short trials of the kinds in turn, then, or when the time kept for that begins, the best of
        them in full; None at the end."""
        left = self._left()
        if self._for_full is None:
            self._for_full = _FOR_FULL * left
        if self.asked is None:
            short = left > self._for_full or not any(self.told.values())
            self.asked = (self._short() if short else None) or self._full()
        return None if self.asked is None else self.asked.rung(self.teacher)

    def _short(self) -> Trial | None:
        for kind in sorted(self.told, key=lambda kind: len(self.told[kind])):
            told, most = self.told[kind], _most(_SHORT, self.effort, kind)
            if len(told) < most and not _flat(told, most):
                with _quiet():
                    found = Trial(kind, len(told) + 1, True, self._proposed(kind, len(told), most))
                return self._begun.get(found.name, found)
        return None

    def _proposed(self, kind: Kind, told: int, most: int) -> dict[str, Any]:
        study, first = self._studies[kind], usual(kind, self.teacher)
        where = {name: held for name, held in space(kind, self.teacher).items() if name not in self._without}
        # One may wait already, from a process that was killed before it took it.
        if told < len(first) and not study.get_trials(states=[TrialState.WAITING]):
            study.enqueue_trial({name: first[told][name] for name in where})
        study.sampler = optuna.samplers.TPESampler(
            seed=zlib.crc32(f"{self.seed} {kind} {told}".encode()),
            n_startup_trials=max(1, min(_STARTUP, round(_STARTUP_SHARE * most))),
            multivariate=True,
        )
        return study.ask(where).params

    def _full(self) -> Trial | None:
        best = [[(kind, i) for i in self.best(kind)] for kind in self.told]
        for kind, i in (one for each in zip_longest(*best) for one in each if one is not None):
            trial = Trial(kind, i + 1, False, self.told[kind][i].trial.params)
            if trial.name not in self._made:
                return trial
        return None

    def tell(self, point: Point) -> None:
        """What the rung that was asked for gave. Raises ValueError for another one."""
        trial = self.asked
        if trial is None or trial.name != point.name:
            raise ValueError(f"{point.name} was not asked for.")
        self.asked = None
        self._made.add(trial.name)
        if trial.short:
            one = Told(trial, *self._objectives(point))
            self.told[trial.kind].append(one)
            with _quiet():
                study = self._studies[trial.kind]
                *_, proposed = study.get_trials(states=[TrialState.RUNNING])
                if proposed.params == dict(trial.params):
                    study.tell(proposed.number, [one.disagreement, float(one.size)])
                else:  # it was begun before, as something else
                    study.tell(proposed.number, state=TrialState.FAIL)
                    self._add(study, one)

    def best(self, kind: Kind) -> list[int]:
        """Which short trials of a kind deserve to be made in full: by front, then by disagreement."""
        told = self.told[kind]
        left, order = [i for i, one in enumerate(told) if _proposed_still(one.trial, self.teacher)], []
        while left:
            front = [i for i in left if not any(_dominates(told[j], told[i]) for j in left)]
            order += sorted(front, key=lambda i: told[i].disagreement)
            left = [i for i in left if i not in front]
        return order[: _most(_FULL, self.effort, kind)]


def _proposed_still(trial: Trial, teacher: Model) -> bool:
    """Whether its values are among those that this version proposes: a store may be of an earlier one."""
    where = space(trial.kind, teacher)
    return all(_within(where[name], value) for name, value in trial.params.items())


def _within(held: BaseDistribution, value: Any) -> bool:
    if isinstance(held, CategoricalDistribution):
        return value in held.choices
    return held.low <= value <= held.high if isinstance(held, FloatDistribution | IntDistribution) else False


def _dominates(one: Told, other: Told) -> bool:
    a, b = (one.disagreement, one.size), (other.disagreement, other.size)
    return a != b and a[0] <= b[0] and a[1] <= b[1]


def _flat(told: Sequence[Told], most: int) -> bool:
    """Whether none of the last trials was on the front when it was told; there are `most` in all."""
    flat = max(1, min(_FLAT, round(_FLAT_SHARE * most)))
    late = range(max(0, len(told) - flat), len(told))
    return len(told) > flat and all(any(_dominates(one, told[i]) for one in told[:i]) for i in late)


def space(kind: Kind, teacher: Model) -> dict[str, BaseDistribution]:
    """What may be proposed."""
    depth = teacher.depth
    shared: dict[str, BaseDistribution] = {
        "temperature": CategoricalDistribution([1.0, 2.0, 4.0]),
        "schedule": CategoricalDistribution(["cosine", "linear"]),
    }
    if kind == "static":
        return shared | {
            "width": CategoricalDistribution([128, 256, 384]),
            "buckets": IntDistribution(14, 17),
            "filters": CategoricalDistribution([0, 128, 256]),
            "reach": IntDistribution(3, 7, step=2),
            "epochs": IntDistribution(20, 60, step=10),
            "splice": CategoricalDistribution([4.0, 8.0, 12.0]),
            "learning_rate": FloatDistribution(1e-3, 1e-2, log=True),
            "optimizer": CategoricalDistribution(["adamw", "adam"]),
            "token_dropout": FloatDistribution(0.1, 0.3, step=0.1),
            "batch_size": CategoricalDistribution([64, 128, 256]),
        }
    shared |= {
        # 8-bit weights overflow in ONNX Runtime on x86 without VNNI: what ships must compute the same anywhere.
        "bits": CategoricalDistribution([7, 6, 4]),
        "learning_rate": FloatDistribution(1e-4, 8e-4, log=True),
        "batch_size": CategoricalDistribution([32, 64, 128]),
        "optimizer": CategoricalDistribution(["adamw", "adam"]),
    }
    if kind == "factored":
        return shared | {
            "budget": FloatDistribution(0.3, 0.8, step=0.1),
            "aware": CategoricalDistribution([True, False]),
            "epochs": IntDistribution(2, 6),
        }
    shared |= {
        "splice": CategoricalDistribution([4.0, 8.0, 12.0]),
        "token_dropout": FloatDistribution(0.0, 0.2, step=0.1),
    }
    if kind == "exits":
        return shared | {
            # So that the second exit, half way from the first to the end, is another one.
            "first": IntDistribution(1, max(1, depth - 2)),
            "exits": CategoricalDistribution([1, 2] if depth > 2 else [1]),
            "epochs": IntDistribution(3, 6),
        }
    if _heads(teacher):
        shared[INSIDE] = CategoricalDistribution(["logits", "hidden", "relations"])
    return shared | {
        # Rounded after training, in training, or some layers to fewer bits than others, `bits` - 1 on average.
        "quantize": CategoricalDistribution(["post", "aware", "mixed"]),
        BYTES: CategoricalDistribution([0.0, 0.5, 0.7]),
        "layers": IntDistribution(1, max(1, depth - 1)),
        "neurons": FloatDistribution(0.25, 1.0, step=0.25),
        "heads": CategoricalDistribution([1.0, 0.5]),
        "activation": CategoricalDistribution(["relu", "hardswish", None]),
        "epochs": IntDistribution(6, 18),
    }


def undominated(points: Iterable[Point], objectives: Objectives) -> list[Point]:
    """Points that no other one of their engine beats in both objectives: the rest is not worth timing."""
    held = [(point, objectives(point)) for point in points]
    return [
        p
        for p, mine in held
        if not any(
            o.engine == p.engine and other != mine and other[0] <= mine[0] and other[1] <= mine[1] for o, other in held
        )
    ]


@contextmanager
def _quiet() -> Iterator[None]:
    """Without Optuna's own lines on standard error."""
    before = optuna.logging.get_verbosity()
    optuna.logging.set_verbosity(optuna.logging.ERROR)
    try:
        yield
    finally:
        optuna.logging.set_verbosity(before)
