"""The main call: read the rows, fine-tune, walk the ladder, and hand what it gave to `ship`."""

from __future__ import annotations

import json
import warnings
from collections.abc import Mapping, Sequence
from contextlib import AbstractContextManager, ExitStack
from dataclasses import replace
from pathlib import Path
from typing import Literal

from netweight import artifact
from netweight.baselines import torch_threads
from netweight.build import CUT, Builder, Clock
from netweight.choose import Minimise, alone, own
from netweight.data import Columns, Dataset, Rows, write_quarantine
from netweight.errors import ModelError, OptionError
from netweight.job import Budget, Job, Options, Source, Tables, TaskKind, Vocabulary, prepare
from netweight.reporter import Reporter, Silent
from netweight.run import InOnePlace, Local, Parallel, Run, Runs
from netweight.run.strategies import WHOLE
from netweight.search import LEAST, Point, Rung, Search, ladder
from netweight.ship import Result, finish
from netweight.store import DEV, Store, store_of
from netweight.techniques import LinearFloor
from netweight.track import Name as Tracker
from netweight.track import Tracked, trackers
from netweight.trials import Effort, undominated

# A smaller student is made where the larger one's chance to pass alone is at least this.
_MAY_PASS = 0.2
CLOSED = "closed"  # in the run store: the command whose search is over
# A rung is left out where the cheaper one that it names in `unless` has a larger chance than this to pass alone.
_PASSES = 0.95


def optimize(  # noqa: PLR0913  (the one call that users make; `run` below takes the values)
    train: Source,
    *,
    out: str | Path,
    text: str = "text",
    label: str = "label",
    pair: str | None = None,
    group: str | None = None,
    slices: str | Sequence[str] = (),
    dev: Source | None = None,
    certify: Source | None = None,
    pool: Source | None = None,
    task: TaskKind = "classify",
    metric: str | None = None,
    model: str | Path = "starter",
    max_length: int = 128,
    max_drop: float | Literal["auto"] = 1.0,
    confidence: float = 0.95,
    minimise: Minimise = "cost",
    seconds: float = 1200.0,
    threads: int | None = None,
    seed: int = 0,
    effort: Effort = "quick",
    vocabulary: Vocabulary = "trimmed",
    reporter: Reporter | None = None,
    track: Tracker | Sequence[Tracker] = (),
    runs: Runs = Local,
) -> Result:
    """The lightest model that provably still does the job, saved as the artifact `out`.

    Where no candidate passes, the safest ships, and `certificate.verdict` of the result says so. Without a reporter a
    warning says it too.

    Args:
        train: a table (csv, tsv, jsonl, parquet, `hf:NAME`) or Rows; so are `dev`, `certify` and `pool` (unlabelled).
            Dev and certify are cut from train where they are not given; without a pool there is none.
        out: the artifact's folder; what was there before stays until the new one is complete.
        text, label, pair, group, slices: names of columns; `group` rows never span splits, and `slices`, one or
            several, are what the report breaks quality down by.
        task: "classify", or "score" for labels that are numbers.
        metric: "accuracy" or "macro-f1" (None: by the balance of the labels); of scores "spearman" (None) or "mae".
        model: the teacher's beginning: "starter", a folder, a Hub id, or "scratch".
        max_length: tokens of a text, or of a pair, that encoders read: their time grows with it. What has no attention
            reads farther where many texts are longer.
        max_drop: points of quality that may be lost, held at `confidence`; "auto": one point, or as many as it takes
            to prove something with these certify rows.
        minimise: what is cheap: "cost" (of a row in batches), "latency" (of a single request) or "size" (bytes).
        effort: "quick" walks a ladder of recipes; "standard" and "thorough" also try other options.
        vocabulary: "trimmed": tiers know the tokens that train or pool use and the most common others, and spell the
            rest; "whole": all that the model knows.
        seconds: time box. Called again with the same `out`, a job goes on where it was (`out`.run holds its state).
        threads: for training and for every engine; None: all cores of this process.
        seed: of cuts, training and sampling.
        reporter: is told how the job goes; None: nobody is.
        runs: makes the run that trains, of the rows and a folder; `netweight.run.named` knows names of some.
        track: one or several of "tensorboard", "wandb" (offline) and "mlflow": losses and learning rates also go to
            `out`.run/NAME.

    Raises DataError, OptionError, ModelError, StoreError, CertificateError, ArtifactError, MissingExtra.
    """
    columns = Columns(text, label, pair, group, slices=(slices,) if isinstance(slices, str) else tuple(slices))
    options = Options(
        task, metric, str(model), max_length, seconds=seconds, seed=seed, effort=effort, vocabulary=vocabulary
    )
    job = Job(
        Tables(train, columns, dev, certify, pool),
        Budget(max_drop, confidence, minimise),
        options if threads is None else replace(options, threads=threads),
    )
    with Tracked(reporter or Silent(), trackers(track, store_of(Path(out)))) as told:
        result = run(job, Path(out), told, runs)
    verdict = result.certificate.verdict
    if reporter is None and verdict != "certified":
        warnings.warn(
            f"the verdict on {out} is {verdict!r}: no candidate passed, and {result.certificate.shipped.name}, the "
            f"safest, ships all the same. {out}/report.html has the numbers; more certify rows may help, or a larger "
            "max_drop.",
            stacklevel=2,
        )
    return result


def run(job: Job, out: Path, reporter: Reporter, runs: Runs = Local) -> Result:
    """Do the job; `runs` makes the run that trains. Waiting until that is there does not count as time of the job.

    Where training rows are elsewhere and there is a pool here, only the teacher is trained by it: its students need no
    labels, so they are made here, of the pool. Where it divides a network's layers, so are its students, of all rows.
    """
    clock = Clock(job.options.seconds)
    artifact.writable(out)
    folder = store_of(out)
    data, task, notes, aside = prepare(job, folder)
    with ExitStack() as stack:
        stack.enter_context(torch_threads(job.options.threads))
        store = stack.enter_context(Store(folder, job.identity(data, task)))
        while aside:
            write_quarantine(*aside.popitem())
        for note in notes:
            reporter.note(note)
        store.write(DEV, _lines(data.dev))
        made = runs(data, folder / "work")
        if isinstance(made, AbstractContextManager):
            with clock.stopped():
                stack.enter_context(made)
        builder = Builder(job, data, task, store, reporter, clock, made, _here(job, data, folder / "work", made))
        search = climb(builder)
        # From here on nothing more is made: a clock that begins anew after a kill must not ask for another rung, and
        # with it for another look at certify.
        if store.get(CLOSED) != job.command:
            store.put(CLOSED, job.command)
        result = finish(builder, _worth(builder, search.points), out, notes)
        store.put(CLOSED, None)
        return result


def _here(job: Job, data: Dataset, folder: Path, made: Run) -> Run | None:
    """A run of this process for students: over the pool, where training rows are elsewhere; over all rows, where `made`
    divides the layers of a transformer, which most students do not have."""
    if isinstance(made, Parallel) and made.strategy not in WHOLE:
        return Local(data, folder)
    pool = data.taught().pool
    if job.tables.train is not None or pool is None:
        return None
    return Local(replace(data, train=pool, pool=None), folder)


def _lines(rows: Rows) -> bytes:
    """Texts and labels as JSON lines."""
    names = ("text", "pair", "label") if rows.pair else ("text", "label")
    cells = zip(*(getattr(rows, name) for name in names), strict=True)
    made = [json.dumps(dict(zip(names, row, strict=True)), ensure_ascii=False) for row in cells]
    return "".join(f"{line}\n" for line in made).encode("utf-8", "backslashreplace")


def climb(builder: Builder) -> Search:
    """Walk the ladder as far as the time box allows, but make three rungs at least. Stop where the linear floor is as
    good as the teacher."""
    builder.reporter.note(f"teacher: {builder.task.metric} {builder.quality(builder.teacher_dev):.4f} on dev")
    most = builder.teacher.encoder.max_length
    if builder.cut > CUT:
        also = f", tiers without attention {builder.reads}" if builder.reads else ""
        said = f"{100 * builder.cut:.0f} % of dev is longer than {most} tokens; encoders read no more"
        # Where training rows are elsewhere, the command has no such option.
        option = " (see --max-length)" if builder.job.tables.train is not None else ""
        builder.reporter.note(f"{said}{option}{also}")
    rungs = _rungs(builder)
    for name in {rung.name for rung in _ladder(builder)} - {rung.name for rung in rungs}:
        _left_out(builder, name, "it needs labelled rows in one place")
    trials = builder.trials()
    search = Search(rungs, [*builder.told(rungs), *(trials.points if trials else ())], trials)
    failed: ModelError | OptionError | None = None
    while builder.store.get(CLOSED) != builder.job.command:
        if trials is not None:
            builder.drop(search.points.values())
        if (rung := search.ask()) is None:
            break
        if builder.beaten(search.points):
            for name in [rung.name for rung in rungs if rung.name not in search.points]:
                _left_out(builder, name, "linear, which costs least, is as good as the teacher")
            break
        names = [one.name for one in rungs]
        trial = trials.asked if trials is not None and rung.name not in names else None
        least = trials.least if trials is not None and trial is not None else builder.job.options.seconds / LEAST
        if builder.clock.left < least and len(search.points) >= 3:
            _left_out(builder, rung.name, "the time limit was near; what follows it is not tried either")
            break
        # Judged by what stands before it, as in a process that was not killed, whatever is there by now.
        before = names[: names.index(rung.name)] if rung.name in names else []
        earlier = {name: search.points[name] for name in before if name in search.points}
        if rung.unless in earlier and _chance(builder, earlier, rung.unless) > _PASSES:
            _left_out(builder, rung.name, f"{rung.unless}, which costs less, will hardly fail alone")
            search.skip(rung)
            continue
        if search.skipped(rung.after) or (rung.after and _chance(builder, earlier, rung.after) < _MAY_PASS):
            _left_out(builder, rung.name, f"{rung.after}, which is larger, would hardly pass")
            search.skip(rung)
            continue
        if trial is not None:
            builder.keep(trial)
        try:
            search.tell(builder.point(rung))
        except (ModelError, OptionError) as problem:
            # Others may be made of a model that is odd in one way; without any there is no answer.
            failed = problem
            _left_out(builder, rung.name, str(problem))
            if trials is not None and trial is not None:
                trials.without(trial)
            else:
                search.skip(rung, hopeless=False)
    if failed is not None and not search.points:
        raise failed
    return search


def _left_out(builder: Builder, name: str, why: str) -> None:
    """Say that a rung is not made, and keep the reason for `netweight explain`."""
    builder.reporter.note(f"{name} is not made: {why}")
    said = [why, builder.job.command]
    if builder.store.get(f"left out {name}") != said:
        builder.store.put(f"left out {name}", said)


def _ladder(builder: Builder) -> tuple[Rung, ...]:
    return ladder(builder.source, builder.job.budget.minimise == "size")


def _rungs(builder: Builder) -> tuple[Rung, ...]:
    """The ladder; without its floor where the run's rows are in no single place, since nobody could fit that there."""
    rungs = _ladder(builder)
    if isinstance(builder.run, InOnePlace):
        return rungs
    return tuple(rung for rung in rungs if not isinstance(rung.recipe[0], LinearFloor))


def _chance(builder: Builder, points: Mapping[str, Point], name: str) -> float:
    """That a point alone would pass the certificate against the teacher, as dev says; 1 where it is not there."""
    if name not in points:
        return 1.0
    alones = [alone(point, builder.task, builder.dev_targets) for point in points.values()]
    found = builder.judged(alones, builder.teacher_dev)
    chosen = next(p for p in found if p.choice.name == name)
    return (own(chosen) if builder.job.budget.max_drop == "auto" else chosen).chance


def _worth(builder: Builder, points: Mapping[str, Point]) -> dict[str, Point]:
    """The ladder's points, and of the others those that nothing beats."""
    always = {rung.name for rung in _rungs(builder)}
    good = {point.name for point in undominated(points.values(), builder.objectives)}
    return {name: point for name, point in points.items() if name in always | good}
