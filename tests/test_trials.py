"""Trials depend on what was told and on the seed, whatever was killed in between; the best are made in full."""

from __future__ import annotations

import sqlite3
from collections.abc import Callable, Sequence
from contextlib import closing
from dataclasses import dataclass, replace
from itertools import product
from pathlib import Path
from types import SimpleNamespace
from typing import get_args

import numpy as np
import optuna
import pytest
from hypothesis import given
from hypothesis import strategies as st

from conftest import Killer, Shop, again, journal, store_of, tiny_dataset, tiny_model
from netweight import artifact, pipeline
from netweight.artifact import Manifest, Tier
from netweight.build import Builder, Clock, last_share, part
from netweight.data import Dataset
from netweight.errors import OptionError
from netweight.model import Model
from netweight.reporter import Silent
from netweight.run import Local, Run
from netweight.search import FEW, INT8, Point, Rung, Search, ladder
from netweight.space import ELSE, Kind, Trial, kinds, space, usual
from netweight.store import MODELS, TRIALS, Store
from netweight.task import Score
from netweight.techniques import (
    Distill,
    EarlyExit,
    Factor,
    Finetune,
    LinearFloor,
    MixedBits,
    Prune,
    Quantize,
    QuantizeAware,
    Recipe,
    Shrink,
    Static,
    SwapActivation,
)
from netweight.train import Plan
from netweight.trials import (
    _FLAT,
    _FULL,
    _SHORT,
    Effort,
    Told,
    Trials,
    _beaten,
    _by_gain,
    _flat,
    _most,
    undominated,
)

TEACHER = tiny_model(layers=6)


def trained(rung: Rung) -> Distill | EarlyExit | Factor:
    return next(step for step in rung.recipe if isinstance(step, Distill | EarlyExit | Factor))


def made(rung: Rung) -> Point:
    """A made-up outcome that depends on the recipe alone: more epochs agree more, more layers weigh more."""
    first = rung.recipe[0]
    if isinstance(first, Static):
        size, wrong = first.buckets * first.width // 1000, 0.1 + 1 / first.epochs + first.learning_rate
    else:
        layers, distil = getattr(first, "layers", None) or 6, trained(rung)
        size, wrong = 1000 * layers, 0.3 / layers + 0.1 / distil.epochs + distil.learning_rate
    return Point(rung.name, "static", {}, "", size, 1.0, np.array([[wrong]], np.float32))


def disagreement(point: Point) -> float:
    return float(point.logits[0, 0])


def objectives(point: Point) -> tuple[float, int]:
    return disagreement(point), point.bytes


@dataclass
class Pretended:
    """A job of which nothing but numbers is made."""

    left: float = 100.0
    there: Sequence[tuple[Recipe, Plan]] = ()
    limit: float = 0.0
    held: float | None = None

    def box(self, seconds: float) -> float:
        self.held = seconds if self.held is None else self.held
        return self.held

    def objectives(self, point: Point) -> tuple[float, int]:
        return objectives(point)

    def has(self, rung: Rung) -> bool:
        return (rung.recipe, rung.plan) in self.there


def trials(
    path: Path,
    effort: Effort,
    kept: Sequence[tuple[Trial, Point | None]] = (),
    seed: int = 0,
    maker: Pretended | None = None,
    bytes_count: bool = False,
) -> Trials:
    return Trials(path, TEACHER, effort, seed, maker or Pretended(), bytes_count, kept)


def complete_of(path: Path, kind: Kind) -> list[optuna.trial.FrozenTrial]:
    study = optuna.load_study(storage=f"sqlite:///{path}", study_name=kind)
    return study.get_trials(states=[optuna.trial.TrialState.COMPLETE])


def walk(made_trials: Trials, made: Callable[[Rung], Point] = made) -> list[tuple[Trial, Point]]:
    found = []
    while (rung := made_trials.ask()) is not None:
        assert made_trials.ask() == rung, "asking changes nothing"
        assert made_trials.asked is not None
        found.append((made_trials.asked, made(rung)))
        made_trials.tell(found[-1][1])
    return found


@pytest.mark.parametrize("effort", ["standard", "thorough"])
def test_short_trials_first_then_the_best_in_full(tmp_path: Path, effort: Effort) -> None:
    driven = trials(tmp_path / TRIALS, effort)
    found = [trial for trial, _ in walk(driven)]
    short = [trial for trial in found if trial.short]
    assert found[: len(short)] == short
    for kind in get_args(Kind):
        told = driven.told[kind]
        assert 0 < len(told) <= _most(_SHORT, effort, kind)
        full = [trial for trial in found[len(short) :] if trial.kind == kind]
        assert full == driven.best(kind)
        assert len(full) == min(_most(_FULL, effort, kind), len(told))
        first = full[0].number - 1
        assert not any(one.disagreement < told[first].disagreement and one.size <= told[first].size for one in told), (
            "the first to be made in full is on the front"
        )
        for trial in full:
            assert trial.params == told[trial.number - 1].trial.params


def test_a_short_trial_has_a_third_of_the_epochs(tmp_path: Path) -> None:
    driven = trials(tmp_path / TRIALS, "standard")
    for trial, _ in walk(driven):
        rung = trial.rung(TEACHER)
        plan = rung.plan.changed()
        assert plan.pop("spliced_tokens") == 1_500_000
        assert plan.items() <= trial.params.items(), "only what was proposed"
        epochs = rung.recipe[0].epochs if isinstance(rung.recipe[0], Static) else trained(rung).epochs
        assert epochs == pytest.approx(trial.params["epochs"] / (3 if trial.short else 1))
        last = Static if trial.kind == "static" else Quantize | QuantizeAware | MixedBits
        assert isinstance(rung.recipe[-1], last)


def test_no_trial_ships_weights_that_overflow_without_vnni() -> None:
    """ONNX Runtime sums 8-bit weights in 16 bits on x86 without VNNI; 7 fit."""
    for kind in ("encoder", "factored", "exits"):
        where, usually = space(kind, TEACHER), usual(kind, TEACHER)[0]
        for bits in where["bits"].choices:  # type: ignore[attr-defined]
            for how in ("post", "aware", "mixed") if kind == "encoder" else ("post",):
                given = usually | {"bits": bits} | ({"quantize": how} if kind == "encoder" else {})
                last = Trial(kind, 1, False, given).rung(TEACHER).recipe[-1]
                most = max(last.choices) if isinstance(last, MixedBits) else getattr(last, "start", last).weight_bits
                assert most <= 7, (kind, bits, how)


def test_a_trial_of_an_earlier_space_is_still_a_point(tmp_path: Path) -> None:
    old = Trial("factored", 1, True, usual("factored", TEACHER)[0] | {"bits": 8})
    driven = trials(tmp_path / TRIALS, "standard", [(old, made(old.rung(TEACHER)))])
    assert [one.trial for one in driven.told["factored"]] == [old]
    seen = walk(driven)
    assert all(trial.params.get("bits") != 8 for trial, _ in seen)


def test_a_trial_of_numbers_that_are_no_longer_proposed_is_still_a_point(tmp_path: Path) -> None:
    old = Trial("encoder", 1, True, usual("encoder", TEACHER)[0] | {"epochs": 0.5})
    driven = trials(tmp_path / TRIALS, "standard", [(old, made(old.rung(TEACHER)))])
    assert [one.trial for one in driven.told["encoder"]] == [old]
    assert all(trial.params.get("epochs") != 0.5 for trial, _ in walk(driven))


@pytest.mark.parametrize("forget", [False, True])
def test_a_search_killed_anywhere_goes_on_as_if_it_never_was(
    tmp_path: Path, forget: bool, monkeypatch: pytest.MonkeyPatch
) -> None:
    monkeypatch.setitem(_SHORT, "standard", 2)
    whole = walk(trials(tmp_path / "whole" / TRIALS, "standard"))
    path = tmp_path / "killed" / TRIALS
    done: list[tuple[Trial, Point]] = []
    while True:
        driven = trials(path, "standard", done)
        rung = driven.ask()
        if rung is None:
            break
        assert driven.asked is not None
        done.append((driven.asked, made(rung)))
        if len(done) % 2:  # every other time it was killed between asking and telling
            driven.tell(done[-1][1])
        if forget:
            path.unlink()
    assert [trial for trial, _ in done] == [trial for trial, _ in whole]


@pytest.mark.parametrize("readable", [False, True])
def test_a_damaged_file_of_trials_is_made_anew(tmp_path: Path, readable: bool) -> None:
    path, wanted = tmp_path / TRIALS, trials(tmp_path / "other", "standard").ask()
    if readable:  # with tables of another version
        with closing(sqlite3.connect(path)) as other:
            other.execute("CREATE TABLE studies (name TEXT)")
    else:
        path.write_bytes(b"no database")
    left = path.with_name(f"{path.name}-wal")
    left.write_bytes(b"of a killed process")
    assert trials(path, "standard").ask() == wanted
    assert not complete_of(path, "static")
    assert not left.exists()


def test_what_was_begun_is_made_whatever_would_be_proposed_now(tmp_path: Path) -> None:
    """Parts of it may be in the store, under its name."""
    others = [trial for trial, _ in walk(trials(tmp_path / "other", "thorough", seed=5)) if trial.kind == "static"]
    begun = replace(others[5], number=1)
    assert begun.short
    driven = trials(tmp_path / TRIALS, "standard", [(begun, None)])
    rung = driven.ask()
    assert rung is not None
    assert driven.asked == begun
    assert replace(rung, share=0.5 / 3) == begun.rung(TEACHER)
    driven.tell(made(rung))
    assert driven.asked is None
    assert [one.trial for one in driven.told["static"]] == [begun]
    (complete,) = complete_of(tmp_path / TRIALS, "static")
    assert complete.params == begun.params, "Optuna learns of what was made"
    # Another budget sees other sizes; the file holds what is told now.
    trials(tmp_path / TRIALS, "standard", [(begun, replace(made(rung), bytes=77))])
    assert [trial.values[1] for trial in complete_of(tmp_path / TRIALS, "static")] == [77.0]


def test_full_trials_come_when_the_time_that_is_kept_for_them_begins(tmp_path: Path) -> None:
    maker = Pretended()
    driven = trials(tmp_path / TRIALS, "standard", maker=maker)
    found: list[tuple[Trial, Point]] = []
    while (rung := driven.ask()) is not None:
        assert driven.asked is not None
        found.append((driven.asked, made(rung)))
        took = rung.share * maker.left
        assert took == pytest.approx(60 / 8 if driven.asked.short else 0.5 * maker.left), "short ones have equal time"
        driven.tell(found[-1][1])
        maker.left = round(maker.left - took, 6)
    assert [trial.short for trial, _ in found] == [True] * 8 + [False] * 4
    assert [trial.kind for trial, _ in found[8:]] == list(kinds(TEACHER)), "the best of each kind, not all of the first"
    # One that was killed goes on with what it was at, though it has time again for short ones.
    kept = [*found[:9], (found[9][0], None)]
    assert trials(tmp_path / "again", "standard", kept).asked == found[9][0]


def test_a_search_that_has_begun_comes_to_full_trials(tmp_path: Path) -> None:
    """However little of the whole job was left for it."""
    maker = Pretended(left=210.0, limit=1200.0)
    driven = trials(tmp_path / TRIALS, "standard", maker=maker)
    seen = []
    while (rung := driven.ask()) is not None and maker.left >= driven.least:
        assert driven.asked is not None
        seen.append(driven.asked.short)
        driven.tell(made(rung))
        maker.left -= rung.share * maker.left
    assert driven.least == pytest.approx(210 / 12)
    assert seen == [True] * 8 + [False] * 3
    little = Pretended(left=53.0, limit=1200.0)
    driven = trials(tmp_path / "little" / TRIALS, "standard", maker=little)
    assert driven.ask() is not None
    assert driven.least > little.left, "it does not begin"
    assert little.held is None, "nor do later ones have so little time"


def test_short_trials_of_another_process_have_the_same_time(tmp_path: Path) -> None:
    first, later = Pretended(left=160.0, limit=1200.0), Pretended(left=900.0, limit=1200.0, held=12.0)
    for name, maker in (("first", first), ("later", later)):
        rung = trials(tmp_path / name / TRIALS, "standard", maker=maker).ask()
        assert rung is not None
        assert rung.share * maker.left == pytest.approx(12.0)
    with Store(tmp_path / "made.nw.run", {}) as store:
        for limit, given, box in ((600.0, 5.0, 5.0), (600.0, 50.0, 5.0), (1200.0, 50.0, 50.0), (1200.0, 1.0, 50.0)):
            job = SimpleNamespace(options=SimpleNamespace(seconds=limit))
            builder = Builder(job, None, None, store, Silent(), None, None)  # type: ignore[arg-type]
            assert builder.box(given) == box


def test_trials_that_had_another_time_are_points_and_no_more(tmp_path: Path) -> None:
    short = walk(trials(tmp_path / "other", "standard", maker=Pretended(limit=60.0)))
    kept = [(trial, point) for trial, point in short if trial.short]
    assert {trial.limit for trial, _ in kept} == {60.0}
    path = tmp_path / TRIALS
    driven = trials(path, "standard", kept, maker=Pretended(limit=600.0))
    assert len(driven.points) == len(kept)
    assert not complete_of(path, "encoder"), "Optuna learns from none of them"
    assert not any(driven.best(kind) for kind in kinds(TEACHER))
    found = [trial for trial, _ in walk(driven)]
    of_kind = [trial.number for trial in found if trial.kind == "encoder" and trial.short]
    before = sum(trial.kind == "encoder" for trial, _ in kept)
    assert of_kind == list(range(before + 1, before + 1 + len(of_kind)))
    assert found[0].params == kept[0][0].params, "it begins anew"
    assert {trial.number for trial in found if not trial.short} <= {trial.number for trial in found if trial.short}


def test_what_one_time_box_cut_is_no_beginning_in_another(tmp_path: Path) -> None:
    short, long = (Trial("encoder", 1, True, usual("encoder", TEACHER)[0], limit) for limit in (60.0, 600.0))
    (*cut, distil, _), plan = short.rung(TEACHER).recipe, short.rung(TEACHER).plan
    assert isinstance(distil, Distill)
    assert part(cut, plan) == part(cut, long.rung(TEACHER).plan)
    assert part((*cut, distil), plan) != part((*cut, distil), long.rung(TEACHER).plan)
    assert plan.describe() == long.rung(TEACHER).plan.describe(), "a point of before is still one of this recipe"
    begun = replace(short, short=False)
    for limit, asked in ((60.0, begun), (600.0, None)):
        assert trials(tmp_path / f"{limit}", "standard", [(begun, None)], maker=Pretended(limit=limit)).asked == asked
    # One that was begun with less time is finished, and Optuna learns nothing of it, now or after another kill.
    first = Trial("static", 1, True, usual("static", TEACHER)[0], 60.0)
    path = tmp_path / TRIALS
    driven = trials(path, "standard", [(first, None)], maker=Pretended(limit=600.0))
    rung = driven.ask()
    assert rung is not None
    driven.tell(made(rung))
    assert not complete_of(path, "static")


def test_trials_that_lack_what_this_job_searches_are_no_part_of_its_number(tmp_path: Path) -> None:
    kept = walk(trials(tmp_path / "cost", "standard"))
    driven = trials(tmp_path / TRIALS, "standard", kept, bytes_count=True)
    found = [trial for trial, _ in walk(driven)]
    short = [trial for trial in found if trial.kind == "encoder" and trial.short]
    assert short[0].params == usual("encoder", TEACHER, bytes_count=True)[0]
    assert all({"bits", "sparsity"} <= set(trial.params) for trial in found if trial.kind == "encoder")
    assert 1 < len(short) <= _SHORT["standard"]


def test_a_kind_that_cannot_be_made_is_asked_for_no_more(tmp_path: Path) -> None:
    driven = trials(tmp_path / TRIALS, "standard")
    seen = []
    while (rung := driven.ask()) is not None:
        assert driven.asked is not None
        seen.append(driven.asked)
        if driven.asked.kind == "exits" or driven.asked.name == "encoder-2-short":
            driven.without(driven.asked)
        else:
            driven.tell(made(rung))
    assert [trial.name for trial in seen if trial.kind == "exits"] == ["exits-1-short"]
    assert {trial.kind for trial in seen if not trial.short} == {*kinds(TEACHER)} - {"exits"}
    assert [trial.name for trial in seen if trial.kind == "encoder"] == [
        "encoder-1-short",
        "encoder-2-short",
        "encoder-1",
    ]


def test_what_the_ladder_made_is_not_made_again(tmp_path: Path) -> None:
    own = [(rung.recipe, rung.plan) for rung in ladder(TEACHER)]
    first, other = (Trial("static", i + 1, True, params) for i, params in enumerate(usual("static", TEACHER)))
    more = replace(other, number=3, params=other.params | {"filters": 128})
    kept = [(trial, made(trial.rung(TEACHER))) for trial in (first, other, more)]
    full = trials(tmp_path / "one", "thorough", kept).best("static")
    assert sorted(trial.name for trial in full) == ["static-1", "static-2", "static-3"]
    fresh = trials(tmp_path / "other", "thorough", kept, maker=Pretended(there=own)).best("static")
    assert fresh == [replace(more, short=False)]


def test_within_a_front_those_come_first_that_together_beat_most() -> None:
    def told(wrong: float, size: int) -> Told:
        return Told(Trial("encoder", 1, True, {}), wrong, size)

    front = [told(0.02, 40), told(0.021, 39), told(0.05, 10)]
    assert _by_gain(front, (0.1, 50)) == front[::-1]
    ends = [front[0], front[2]]
    assert _by_gain(ends, (0.05, 40)) == ends, "nothing is behind the corner: by disagreement"


@given(st.lists(st.tuples(st.integers(0, 6), st.integers(0, 6)), max_size=6))
def test_what_points_beat_is_an_area(points: list[tuple[int, int]]) -> None:
    told = [Told(Trial("encoder", 1, True, {}), float(wrong), size) for wrong, size in points]
    cells = [(x, y) for x in range(7) for y in range(7) if any(x >= a and y >= b for a, b in points)]
    assert _beaten(told, (7.0, 7.0)) == len(cells)


def test_a_kind_begins_with_the_ladder_and_then_by_itself(tmp_path: Path) -> None:
    driven = trials(tmp_path / TRIALS, "thorough")
    found: dict[str, Trial] = {}
    while len(found) < 8:
        rung = driven.ask()
        assert rung is not None
        assert driven.asked is not None
        found[driven.asked.name] = driven.asked
        driven.tell(made(rung))
    rungs = {rung.name: (rung.recipe, rung.plan) for rung in ladder(TEACHER)}
    for own, name in (("static-1", "static"), ("static-2", "conv"), ("encoder-1", "half-int8")):
        proposed = replace(found[f"{own}-short"], short=False).rung(TEACHER)
        assert (proposed.recipe, proposed.plan) == rungs[name]
    assert [found[f"{kind}-1-short"].params for kind in get_args(Kind)] == [
        usual(kind, TEACHER)[0] for kind in get_args(Kind)
    ]
    rates = {found[f"{kind}-2-short"].params["learning_rate"] for kind in ("encoder", "exits", "factored")}
    assert len(rates) == 3, "kinds are drawn apart"


@pytest.mark.parametrize("depth", [1, 2, 3, 6])
def test_what_comes_first_lies_in_the_space(depth: int) -> None:
    teacher = tiny_model(layers=depth)
    for kind, bytes_count in product(kinds(teacher), (False, True)):
        where = space(kind, teacher, bytes_count)
        for options in usual(kind, teacher, bytes_count):
            assert all(where[name]._contains(where[name].to_internal_repr(options[name])) for name in where)


def test_a_short_search_learns(tmp_path: Path) -> None:
    def turned(rung: Rung) -> Point:
        point = made(rung)
        return replace(point, bytes=10**9 - point.bytes, logits=1 - point.logits)

    both = [walk(trials(tmp_path / name, "standard"), how) for name, how in (("one", made), ("other", turned))]
    last = [[trial for trial, _ in found if trial.short and trial.kind == "static"][-1] for found in both]
    assert last[0].number == last[1].number
    assert last[0].params != last[1].params


def test_optuna_holds_what_was_told(tmp_path: Path) -> None:
    path = tmp_path / TRIALS
    found = walk(trials(path, "standard"))
    for kind in get_args(Kind):
        values = [t.values for t in complete_of(path, kind)]
        wanted = [[disagreement(p), float(p.bytes)] for t, p in found if t.kind == kind and t.short]
        assert np.allclose(values, wanted)
    other = walk(trials(tmp_path / "again", "standard", seed=1))
    drawn = [next(trial.params for trial, _ in one if trial.name == "encoder-2-short") for one in (found, other)]
    assert drawn[0] != drawn[1]


def test_a_flat_search_ends() -> None:
    def told(wrong: float) -> Told:
        return Told(Trial("static", 1, True, {}), wrong, 10)

    better = [told(0.5 - i / 100) for i in range(20)]
    assert not _flat(better, 24)
    for most, flat in ((24, _FLAT), (6, 3)):
        assert not _flat([told(0.1), *[told(0.2)] * (flat - 1)], most)
        assert _flat([told(0.1), *[told(0.2)] * flat], most)


def test_what_nothing_beats_is_kept() -> None:
    def point(name: str, wrong: float, size: int, engine: str = "onnx") -> Point:
        return Point(name, engine, {}, "", size, 1.0, np.array([[wrong]], np.float32))

    points = [
        point("a", 0.1, 10),
        point("b", 0.2, 10),
        point("c", 0.2, 5),
        point("d", 0.3, 20, "static"),
        point("e", 0.1, 10),
    ]
    assert [p.name for p in undominated(points, objectives)] == ["a", "c", "d", "e"]


def test_search_walks_the_ladder_then_the_trials(tmp_path: Path) -> None:
    rungs = [Rung("one", (Static(),), 0.5), Rung("two", (Static(),), 0.5)]
    search = Search(rungs, (), trials(tmp_path / TRIALS, "standard"))
    seen = []
    while (rung := search.ask()) is not None:
        seen.append(rung.name)
        search.tell(made(rung))
    assert seen[:2] == ["one", "two"]
    assert len(seen) == 2 + sum(_most(table, "standard", kind) for table in (_SHORT, _FULL) for kind in kinds(TEACHER))


def test_a_search_whose_front_does_not_move_ends_early(tmp_path: Path) -> None:
    driven = trials(tmp_path / TRIALS, "thorough")
    search = Search((), (), driven)
    seen: set[str] = set()
    while (rung := search.ask()) is not None:
        kind = rung.name.partition("-")[0]
        wrong, seen = (0.2 if kind in seen else 0.1), seen | {kind}
        search.tell(Point(rung.name, "static", {}, "", 10, 1.0, np.array([[wrong]], np.float32)))
    for kind in kinds(TEACHER):
        most = _most(_SHORT, "thorough", kind)
        assert 1 < len(driven.told[kind]) < most, "the first of a kind beats all others"


def test_refusals(tmp_path: Path) -> None:
    driven = trials(tmp_path / TRIALS, "standard")
    with pytest.raises(ValueError, match="static-9 was not asked for"):
        driven.tell(made(Rung("static-9", (Static(),), 0.5)))
    with pytest.raises(
        OptionError,
        match=r"trial static-1 was proposed by another version .* OUT\.run beside it, but keep its looks\.jsonl",
    ):
        Trial("static", 1, False, {"width": 1}).rung(TEACHER)
    assert set(space("encoder", tiny_model(layers=1)))


def test_exits_are_proposed_where_a_model_can_have_them() -> None:
    assert kinds(TEACHER) == get_args(Kind)
    assert "exits" not in kinds(tiny_model(layers=1))
    assert "exits" not in kinds(tiny_model(family="gpt2"))
    assert "exits" not in kinds(tiny_model(task=Score()))


@pytest.mark.parametrize(
    ("family", "changed", "steps"),
    [
        (
            "bert",
            {"quantize": "aware", "match": "relations", "heads": 0.5},
            (Shrink, SwapActivation, Distill, QuantizeAware),
        ),
        ("bert", {"quantize": "mixed", "match": "hidden"}, (Shrink, SwapActivation, Distill, MixedBits)),
        ("bert", {"quantize": "aware", "sparsity": 0.5}, (Shrink, SwapActivation, Distill, Prune, QuantizeAware)),
        ("qwen3", {"match": "relations", "heads": 0.5}, (Shrink, SwapActivation, Distill, Quantize)),
    ],
)
def test_steps_of_an_encoder(
    family: str, changed: dict[str, object], steps: tuple[type, ...], dataset: Dataset
) -> None:
    teacher = tiny_model(family=family)
    few = {"epochs": 1, "splice": 0.0, "bits": 4}
    recipe = Trial("encoder", 1, True, usual("encoder", teacher)[0] | few | changed).rung(teacher).recipe
    assert tuple(type(step) for step in recipe) == steps
    model = teacher
    for step in recipe:
        model = step(model, Local(dataset), Plan(batch_size=16, precision="fp32"))
    bits = {spec.bits for name, spec in model.weights.items() if "embed" not in name}
    assert bits == {4} if changed.get("quantize") != "mixed" else len(bits) > 1
    for step in recipe[2:]:
        if isinstance(step, Prune | QuantizeAware):
            assert step.epochs == pytest.approx(1 / 9), "a third of a third"


def test_a_static_student_with_filters_or_without() -> None:
    plain, conv = usual("static", TEACHER)
    assert Trial("static", 1, False, plain | {"reach": 7}).rung(TEACHER).recipe == (Static(splice=12.0),)
    (found,) = Trial("static", 1, False, conv | {"reach": 7, "optimizer": "adam"}).rung(TEACHER).recipe
    assert isinstance(found, Static)
    assert (found.filters, found.reach) == (256, 7)


def test_options_that_a_job_does_not_search(tmp_path: Path) -> None:
    path = tmp_path / TRIALS
    kept: list[tuple[Trial, Point]] = []
    for bytes_count in (True, False, True):  # one after the other, as a store may see them
        driven = trials(path, "thorough", kept, bytes_count=bytes_count)
        for _ in range(4):
            rung = driven.ask()
            assert rung is not None
            assert driven.asked is not None
            kept.append((driven.asked, made(rung)))
            driven.tell(kept[-1][1])
        asked = next(trial for trial, _ in kept[-4:] if trial.kind == "encoder")
        assert ({"bits", "sparsity"} & set(asked.params) != set()) == bytes_count
        assert ("mixed" in space("encoder", TEACHER, bytes_count)["quantize"].choices) == bytes_count  # type: ignore[attr-defined]


def test_options_that_cannot_matter_are_not_searched(monkeypatch: pytest.MonkeyPatch) -> None:
    scores, whole = tiny_model(task=Score()), {kind: set(space(kind, TEACHER)) for kind in get_args(Kind)}
    for kind in kinds(scores):
        assert whole[kind] - set(space(kind, scores)) == {"temperature"}
        assert Trial(kind, 1, True, usual(kind, scores)[0]).rung(scores)
    monkeypatch.setattr("netweight.space.layers_of", lambda teacher: [])
    assert whole["encoder"] - set(space("encoder", TEACHER)) == {"neurons", "heads", "activation", "match"}
    assert Trial("encoder", 1, True, usual("encoder", TEACHER)[0]).rung(TEACHER)
    assert all(set(held) <= whole[kind] for kind, held in ELSE.items())


def test_few_bits_are_rounded_as_the_ladder_rounds_them() -> None:
    for kind in ("encoder", "exits", "factored"):
        (first,) = usual(kind, TEACHER, bytes_count=True)
        last = Trial(kind, 1, True, first).rung(TEACHER).recipe[-1]
        assert last == replace(FEW, table_bits=5), kind
    (half,) = (rung for rung in ladder(TEACHER, bytes_count=True) if rung.name == "half-int4")
    proposed = Trial("encoder", 1, False, usual("encoder", TEACHER, bytes_count=True)[0]).rung(TEACHER)
    assert (proposed.recipe, proposed.plan) == (half.recipe, half.plan)


@pytest.mark.parametrize("depth", [2, 3, 6])
def test_two_exits_are_two(depth: int) -> None:
    teacher = tiny_model(layers=depth)
    where = space("exits", teacher)
    for first in range(where["first"].low, where["first"].high + 1):  # type: ignore[attr-defined]
        for exits in where["exits"].choices:  # type: ignore[attr-defined]
            params = usual("exits", teacher)[0] | {"first": first, "exits": exits}
            after = Trial("exits", 1, False, params).rung(teacher).recipe[0].after  # type: ignore[attr-defined]
            assert len(set(after)) == exits
            assert max(after) < depth


@pytest.mark.parametrize(("first", "exits", "after"), [(2, 2, (2, 4)), (2, 1, (2,)), (4, 2, (4, 5))])
def test_where_exits_are_put(first: int, exits: int, after: tuple[int, ...]) -> None:
    params = {"temperature": 2.0, "schedule": "cosine", "bits": 4, "learning_rate": 1e-4, "batch_size": 32}
    params |= {"optimizer": "adam", "splice": 2.0, "token_dropout": 0.1, "epochs": 3, "first": first, "exits": exits}
    step, quantize = Trial("exits", 1, False, params).rung(TEACHER).recipe
    assert isinstance(step, EarlyExit)
    assert step.after == after
    assert isinstance(quantize, Quantize)
    assert quantize.weight_bits == 4


def test_steps_that_train_nothing_are_shared_whatever_the_plan() -> None:
    cut, trained = Shrink(layers=1, epochs=0), Distill(layers=1)
    large = Plan(batch_size=64)
    assert part((cut,), large) == part((cut,), Plan())
    assert part((cut, trained), large) != part((cut, trained), Plan())


@pytest.mark.parametrize(("took", "left"), [(0.0, 60.0), (25.0, 35.0), (99.0, 1.0)])
def test_steps_of_a_recipe_divide_its_time(
    took: float, left: float, tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    """What a step takes that trains nothing is taken from those that do."""
    given: dict[float, float | None] = {}
    now = [0.0]
    monkeypatch.setattr("netweight.build.time.monotonic", lambda: now[0])

    @dataclass(frozen=True)
    class Timed:
        epochs: float

        def __call__(self, model: Model, run: Run, plan: Plan) -> Model:
            given[self.epochs] = plan.seconds
            assert plan.limit == 80.0, "that of the job"
            now[0] += 0 if self.epochs else took
            return model

    with Store(tmp_path / "made.nw.run", {}) as store:
        job = SimpleNamespace(options=SimpleNamespace(seed=0, seconds=80.0))
        builder = Builder(job, None, None, store, Silent(), None, None)  # type: ignore[arg-type]
        builder.model("one", lambda: TEACHER, (Timed(0), Timed(6), Timed(2)), 80.0, Local(tiny_dataset()))
    assert given == {0: 1.0, 6: left, 2: min(20.0, max(80.0 - took, 1.0))}
    assert last_share((LinearFloor(),)) == last_share((Static(),)) == 1


def test_what_is_there_of_a_recipe_takes_none_of_its_time(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    given: list[tuple[float, float | None]] = []
    monkeypatch.setattr("netweight.build.time.monotonic", lambda: 0.0)

    @dataclass(frozen=True)
    class Timed:
        epochs: float

        def __call__(self, model: Model, run: Run, plan: Plan) -> Model:
            given.append((self.epochs, plan.seconds))
            return model

    with Store(tmp_path / "made.nw.run", {}) as store:
        job = SimpleNamespace(options=SimpleNamespace(seed=0, seconds=80.0))
        builder = Builder(job, None, None, store, Silent(), None, None)  # type: ignore[arg-type]
        builder.model("one", lambda: TEACHER, (Timed(6), Timed(2)), 80.0, Local(tiny_dataset()))
        builder.model("other", lambda: TEACHER, (Timed(6), Timed(0), Timed(6), Timed(1)), 70.0, Local(tiny_dataset()))
        trial = ("trial", lambda: TEACHER, (Timed(6), Timed(2)), 80.0, Local(tiny_dataset()), Plan(limit=80.0))
        builder.model(*trial)
        store.put("model trial", None)  # it was killed before
        builder.model(*trial)
    rungs, boxes = given[:5], given[5:]
    assert rungs == [(6, 60.0), (2, 20.0), (0, 1.0), (6, 60.0), (1, 10.0)]
    assert boxes == [(6, 60.0), (2, 20.0), (2, 20.0)], "boxes of trials are alike"


def test_a_trial_of_another_time_limit_is_no_reason_to_make_none(tmp_path: Path) -> None:
    full = Trial("encoder", 1, False, usual("encoder", TEACHER)[0], 60.0)
    with Store(tmp_path / "made.nw.run", {}) as store:
        job = SimpleNamespace(options=SimpleNamespace(seed=0, seconds=600.0))
        builder = Builder(job, None, None, store, Silent(), None, None)  # type: ignore[arg-type]
        rung = full.rung(TEACHER)
        store.put("recipe encoder-1", part(rung.recipe, replace(rung.plan, limit=None)))
        store.put("point encoder-1", {})
        asked = replace(full, number=2, limit=600.0).rung(TEACHER)
        for limit, there in ((60.0, False), (600.0, True), (0.0, True)):
            store.put("trial encoder-1", {"limit": limit})
            assert builder.has(asked) == there
        assert not builder.has(rung), "it is itself"


@pytest.mark.parametrize(
    ("limit", "again", "share"),
    [
        pytest.param(80.0, (25,), 0.25, id="what is left of what was planned before"),
        # With more time there are rows beside the real ones, in larger batches: other steps, planned anew.
        pytest.param(160.0, (400, 200), 0.5, id="another limit"),
    ],
)
def test_what_a_time_box_left_of_a_fit_is_known_after_a_kill_too(
    limit: float, again: tuple[int, ...], share: float, tmp_path: Path
) -> None:
    @dataclass(frozen=True)
    class Cut:
        steps: tuple[int, ...]
        killed: bool
        epochs: float = 2.0

        def __call__(self, model: Model, run: Run, plan: Plan) -> Model:
            for steps in self.steps:
                plan.reporter.start("fit", steps, 0 if self.killed else 10)
            if self.killed:
                raise KeyboardInterrupt
            return model

    def made(store: Store, seconds: float, cut: Cut) -> Builder:
        job = SimpleNamespace(options=SimpleNamespace(seed=0, seconds=seconds))
        builder = Builder(job, None, None, store, Silent(), None, None)  # type: ignore[arg-type]
        builder.model("one", lambda: TEACHER, (cut,), seconds, Local(tiny_dataset()))
        return builder

    with Store(tmp_path / "made.nw.run", {}) as store:
        store.put("steps one", ["one"])
        with pytest.raises(KeyboardInterrupt):
            made(store, 80.0, Cut((100,), killed=True))
        assert store.get("planned one") == {"limit": 80.0, "steps": {"fit": 100}}
        assert made(store, limit, Cut(again, killed=False)).shares("one") == [share]


def test_fits_are_not_made_again_where_their_model_could_not_be_saved(
    tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    killer, plan = Killer(at=-1), Plan(batch_size=16, precision="fp32", checkpoint_every=0.0)

    def full(*_: object) -> None:
        raise OSError(28, "No space left on device")

    with Store(tmp_path / "made.nw.run", {}) as store:
        work, job = store.folder / "work", SimpleNamespace(options=SimpleNamespace(seed=0, seconds=80.0))
        builder = Builder(job, None, None, store, killer, None, None)  # type: ignore[arg-type]
        given = ("one", tiny_model, (Finetune(epochs=1),), 80.0, Local(tiny_dataset(), work), plan)
        with monkeypatch.context() as patch:
            patch.setattr(Model, "save", full)
            with pytest.raises(OSError, match="No space left"):
                builder.model(*given)
        assert killer.resumed_at == 0
        (work / "fit-of-another-process.safetensors").touch()
        builder.model(*given)
        assert killer.resumed_at == 5, "all of its steps were there"
        assert not list(work.glob("fit-*"))


@pytest.mark.usefixtures("quick")
def test_a_job_with_more_effort_goes_on_from_the_ladder(
    shop: Shop, copied: Path, tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    monkeypatch.setitem(_SHORT, "standard", 1)
    # Of so small a teacher that rung beats all that is tried.
    rungs = lambda *given: tuple(rung for rung in ladder(*given) if rung.name not in ("slim-int8", "thin-int8"))  # noqa: E731
    monkeypatch.setattr(pipeline, "ladder", rungs)
    before = journal(copied)
    result = again(shop, copied, effort="standard")
    after = journal(copied)
    kept = {key: value for key, value in before.items() if not key.startswith("left out ")}
    assert all(after[key] == value for key, value in kept.items()), "nothing was made twice"
    names = {key for key in after if key.startswith("point ")}
    assert {"point static-1-short", "point encoder-1-short"} <= names
    made = len(kinds(Model.load(store_of(copied) / MODELS / "teacher")))
    begun = [key.removeprefix("trial ") for key in after if key.startswith("trial ")]
    full = [name for name in begun if not name.endswith("-short")]
    assert len(begun) - len(full) == made
    ladders = [value for key, value in before.items() if key.startswith("recipe ")]
    assert 0 < len(full) < made * _FULL["standard"]
    assert not any(after[f"recipe {name}"] in ladders for name in full), "nor is what the ladder has made"
    assert result.certificate.verdict == "certified"
    tried = {key.removeprefix("trial ") for key in after if key.startswith("trial ")}
    ranked = [one.name for one in result.measurements.candidates]
    assert tried & set(ranked)
    assert tried - set(ranked)
    # What can ship keeps its steps, each by itself; the models of what others beat are gone.
    steps = next(found for name in ranked if len(found := after[f"steps {name}"]) > 1)
    *_, before, quantized = (Model.load(store_of(copied) / MODELS / name) for name in steps)
    assert quantized.ranges
    assert not before.ranges
    wanted = {"teacher"}
    for key, steps in after.items():
        if key.startswith("steps ") and key.removeprefix("steps ") not in tried - set(ranked):
            wanted |= set(steps)
    assert {path.name for path in (store_of(copied) / MODELS).iterdir()} == wanted
    assert {key for key, value in after.items() if key.startswith("model ") and value} == {f"model {n}" for n in wanted}
    # A finished search is not searched again, and what is derived may be deleted.
    (store_of(copied) / TRIALS).unlink()
    resumed = again(shop, copied, effort="standard")
    assert journal(copied) == after
    assert [one.name for one in resumed.measurements.candidates] == ranked, "what was tried before is not forgotten"
    with pytest.raises(OptionError, match="effort is 'lazy'; use quick, standard or thorough"):
        again(shop, tmp_path / "other.nw", effort="lazy")


@pytest.mark.parametrize("standing", [True, False])
def test_models_of_the_artifact_that_stands_are_kept(
    tmp_path: Path, monkeypatch: pytest.MonkeyPatch, standing: bool
) -> None:
    """`explain` asks for them, and a job that is killed may never ship what beats them."""
    monkeypatch.setattr(Builder, "disagreement", lambda _, point: disagreement(point))
    out, names = tmp_path / "made.nw", ("static-1", "static-2")
    said = [np.array([[wrong]], np.float32) for wrong in (0.5, 0.4)]
    points = [Point(name, "static", {}, "", 9 - i, 1.0, said[i]) for i, name in enumerate(names)]
    if standing:
        tier = Tier(names[0], "static", "tiers/0-static-1.safetensors")
        artifact.save(out, Manifest(TEACHER.task, 32, 0, (tier,)), {tier.file: b"a table", artifact.TOKENIZER: b"{}"})
    with Store(store_of(out), {}) as store:
        for i, name in enumerate(names):
            store.put(f"trial {name}", {})
            store.put(f"work {name}", 9 - i)
            store.put(f"steps {name}", [f"part-{name}", name])
            for model in (f"part-{name}", name):
                store.model_folder(model).mkdir(parents=True)
                store.put(f"model {model}", {})
        builder = Builder(None, None, None, store, Silent(), None, None)  # type: ignore[arg-type]
        builder.drop(points)
        kept = {path.name for path in (store.folder / MODELS).iterdir()}
        assert {name: {name, f"part-{name}"} <= kept for name in names} == {"static-1": standing, "static-2": True}
        assert (store.get("model static-1") is not None) is standing


def test_what_follows_distillation_is_gentler() -> None:
    asked = {"epochs": 6, "learning_rate": 4e-4, "temperature": 4.0, "bits": 6, "sparsity": 0.7}
    given, rounded = usual("encoder", TEACHER)[0] | asked, replace(INT8, weight_bits=6)
    after = QuantizeAware(rounded, epochs=2.0, learning_rate=2e-4, temperature=4.0)
    for how, last in (("aware", after), ("mixed", MixedBits(5, choices=(2, 3, 4, 6, 7))), ("post", rounded)):
        recipe = Trial("encoder", 1, False, given | {"quantize": how}).rung(TEACHER).recipe
        pruned, rounding = recipe[-2:]
        assert isinstance(pruned, Prune)
        assert (pruned.sparsity, pruned.learning_rate, pruned.temperature) == (0.7, 2e-4, 4.0)
        assert rounding == last


def test_time_in_which_others_are_waited_for_does_not_count(monkeypatch: pytest.MonkeyPatch) -> None:
    now = [0.0]
    monkeypatch.setattr("netweight.build.time.monotonic", lambda: now[0])
    clock = Clock(100.0)
    with clock.stopped():
        now[0] = 70.0
    assert clock.left == 100.0
    now[0] = 90.0
    assert clock.left == 80.0
