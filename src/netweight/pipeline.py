"""The main call: fine-tune, walk the ladder, compose cascades, certify, save, report."""

from __future__ import annotations

import importlib.util
import json
import math
from collections.abc import Mapping, Sequence
from contextlib import AbstractContextManager, ExitStack
from dataclasses import dataclass, replace
from functools import partial
from pathlib import Path
from typing import Any, Literal

import numpy as np
import torch
from numpy.typing import NDArray

from netweight import artifact, measure
from netweight.artifact import Manifest, Tier
from netweight.baselines import teacher_engine
from netweight.build import CUT, Builder, Clock
from netweight.certify import Answers, Candidate, Certificate, Outcomes, Registration, register
from netweight.certify import certify as test
from netweight.choose import Minimise, Planned, alone, choices, engine_of, judged, own, plan, provable
from netweight.data import Columns, Dataset, Rows
from netweight.engine import Engine, Outputs, load
from netweight.engine.cascade import cascade
from netweight.errors import CertificateError
from netweight.job import MOST, Budget, Job, Options, Source, Tables, TaskKind, Vocabulary, prepare
from netweight.measure import Cost, Measurement, Measurements
from netweight.report import render
from netweight.run import Accounting, InOnePlace, Local, Run, Runs
from netweight.search import Point, Rung, Search, ladder
from netweight.signals import Fingerprint
from netweight.store import DEV, LOOKS, Store, store_of
from netweight.task import Floats, Task
from netweight.techniques import LinearFloor, describe
from netweight.track import Name as Tracker
from netweight.track import Tracked, trackers
from netweight.train import Reporter, Silent
from netweight.trials import Effort, undominated

# A smaller student is made where the larger one's chance to pass alone is at least this.
_MAY_PASS = 0.2
# Where the rung that makes another one needless has so large a chance to pass alone, that other one is not made.
_PASSES = 0.95
# Tiers of a cascade: a third may save time, but a second encoder brings its file, and its time to load.
_TIERS: dict[Effort, int] = {"quick": 2, "standard": 3, "thorough": 3}
# A student that gets less than this part of the time box is not worth training.
_LEAST = 12


@dataclass(frozen=True)
class Result:
    """What a job gave: the artifact's folder, its certificate and measurements, and sentences about the way there."""

    folder: Path
    manifest: Manifest
    certificate: Certificate
    measurements: Measurements
    notes: tuple[str, ...]


def optimize(  # noqa: PLR0913  (the one call that users make; `run` below takes the values)
    train: Source,
    *,
    out: str | Path,
    text: str = "text",
    label: str = "label",
    pair: str | None = None,
    group: str | None = None,
    slices: Sequence[str] = (),
    dev: Source | None = None,
    certify: Source | None = None,
    pool: Source | None = None,
    task: TaskKind = "classify",
    metric: str | None = None,
    model: str = "starter",
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
    track: Sequence[Tracker] = (),
    runs: Runs = Local,
) -> Result:
    """The lightest model that provably still does the job, saved as the artifact `out`.

    Args:
        train: a table (csv, tsv, jsonl, parquet, `hf:NAME`) or Rows; so are `dev`, `certify` and `pool` (unlabelled).
            What is not given is cut from train.
        text, label, pair, group, slices: names of columns; `group` rows never span splits.
        max_length: tokens of a text, or of a pair, that encoders read: their time grows with it. What has no attention
            reads farther where many texts are longer.
        max_drop: points of quality that may be lost, held at `confidence`; "auto": one point, or as many as it takes
            to prove something with these certify rows.
        effort: "quick" walks a ladder of recipes; "standard" and "thorough" also try other options.
        vocabulary: "trimmed": tiers know the tokens that train or pool use and the most common others, and spell the
            rest; "whole": all that the model knows.
        seconds: time box. Called again with the same `out`, a job goes on where it was (`out`.run holds its state).
        runs: makes the run that trains, of the rows and a folder; `netweight.run.named` knows names of some.
        track: "tensorboard", "wandb" (offline) or "mlflow": losses and learning rates also go to `out`.run/NAME.

    Raises DataError, OptionError, ModelError, StoreError, CertificateError, ArtifactError, MissingExtra.
    """
    columns = Columns(text, label, pair, group, slices=tuple(slices))
    options = Options(task, metric, model, max_length, seconds=seconds, seed=seed, effort=effort, vocabulary=vocabulary)
    job = Job(
        Tables(train, columns, dev, certify, pool),
        Budget(max_drop, confidence, minimise),
        options if threads is None else replace(options, threads=threads),
    )
    with Tracked(reporter or Silent(), trackers(track, store_of(Path(out)))) as told:
        return run(job, Path(out), told, runs)


def run(job: Job, out: Path, reporter: Reporter, runs: Runs = Local) -> Result:
    """Do the job; `runs` makes the run that trains. Waiting until that is there does not count as time of the job.

    Where training rows are elsewhere and there is a pool here, only the teacher is trained by it: its students need no
    labels, so they are made here, of the pool.
    """
    clock = Clock(job.options.seconds)
    torch.set_num_threads(job.options.threads)
    artifact.writable(out)
    folder = store_of(out)
    data, task, notes = prepare(job, folder)
    for note in notes:
        reporter.note(note)
    with ExitStack() as stack:
        store = stack.enter_context(Store(folder, job.identity(data, task)))
        store.write(DEV, _lines(data.dev))
        made = runs(data, folder / "work")
        if isinstance(made, AbstractContextManager):
            with clock.stopped():
                stack.enter_context(made)
        builder = Builder(job, data, task, store, reporter, clock, made, _here(job, data, folder / "work"))
        search = climb(builder)
        ranked = Ranked(builder, _worth(builder, search.points))
        return _finish(builder, ranked, out, notes)


def _here(job: Job, data: Dataset, folder: Path) -> Run | None:
    """A run over the pool, where training rows are elsewhere."""
    if job.tables.train is not None or data.pool is None:
        return None
    return Local(replace(data, train=data.pool, pool=None), folder)


def _lines(rows: Rows) -> bytes:
    """Texts and labels as JSON lines."""
    names = ("text", "pair", "label") if rows.pair else ("text", "label")
    cells = zip(*(getattr(rows, name) for name in names), strict=True)
    made = [json.dumps(dict(zip(names, row, strict=True)), ensure_ascii=False) for row in cells]
    return "".join(f"{line}\n" for line in made).encode("utf-8", "backslashreplace")


def climb(builder: Builder) -> Search:
    """Walk the ladder, as far as the time box allows. The first three rungs are always made, but where the
    first one is as good as the teacher."""
    builder.reporter.note(f"teacher: {builder.task.metric} {builder.quality(builder.teacher_dev):.4f} on dev")
    most = builder.teacher.encoder.max_length
    if builder.cut > CUT:
        also = f", tiers without attention {builder.reads}" if builder.reads else ""
        said = f"{100 * builder.cut:.0f} % of dev is longer than {most} tokens; encoders read no more"
        builder.reporter.note(f"{said} (see --max-length){also}")
    rungs = _rungs(builder)
    for name in {rung.name for rung in ladder(builder.source)} - {rung.name for rung in rungs}:
        _left_out(builder, name, "it needs labelled rows in one place")
    trials = builder.trials()
    search = Search(rungs, [*builder.told(rungs), *(trials.points if trials else ())], trials)
    while True:
        if trials is not None:
            builder.drop(search.points.values())
        if (rung := search.ask()) is None:
            break
        if builder.beaten(search.points):
            for name in [rung.name for rung in rungs if rung.name not in search.points]:
                _left_out(builder, name, "linear, which costs least, is as good as the teacher")
            break
        if builder.clock.left < builder.job.options.seconds / _LEAST and len(search.points) >= 3:
            _left_out(builder, rung.name, "the time limit was near; what follows it is not tried either")
            break
        if rung.after and _chance(builder, search.points, rung.after) < _MAY_PASS:
            _left_out(builder, rung.name, f"{rung.after}, which is larger, would hardly pass")
            search.skip(rung)
            continue
        if rung.unless in search.points and _chance(builder, search.points, rung.unless) > _PASSES:
            _left_out(builder, rung.name, f"{rung.unless}, which costs less, will hardly fail alone")
            search.skip(rung)
            continue
        if trials is not None and trials.asked is not None:
            builder.keep(trials.asked)
        search.tell(builder.point(rung))
    return search


def _left_out(builder: Builder, name: str, why: str) -> None:
    """Say that a rung is not made, and keep the reason for `netweight explain`."""
    builder.reporter.note(f"{name} is not made: {why}")
    if builder.store.get(f"left out {name}") != why:
        builder.store.put(f"left out {name}", why)


def _rungs(builder: Builder) -> tuple[Rung, ...]:
    """The ladder; without its floor where the run's rows are in no single place, since nobody could fit that there."""
    rungs = ladder(builder.source)
    if isinstance(builder.run, InOnePlace):
        return rungs
    return tuple(rung for rung in rungs if not isinstance(rung.recipe[0], LinearFloor))


def _chance(builder: Builder, points: Mapping[str, Point], name: str) -> float:
    """That a point alone would pass the certificate against the teacher, as dev says; 1 where it is not there."""
    if name not in points:
        return 1.0
    found = judged([alone(p) for p in points.values()], builder.teacher_dev, *_asked(builder, builder.teacher_dev))
    chosen = next(p for p in found if p.choice.name == name)
    return (own(chosen) if builder.job.budget.max_drop == "auto" else chosen).chance


def _asked(builder: Builder, reference: Floats) -> tuple[Any, Task, float, int, float]:
    """What a certificate would ask: targets, task, margin (units of quality), certify rows, level of the first look."""
    budget, task = builder.job.budget, builder.task
    margin = task.margin(budget.points, builder.quality(reference))
    return builder.dev_targets, task, margin, len(builder.data.certify), (1 - budget.confidence) / 2


def _worth(builder: Builder, points: Mapping[str, Point]) -> dict[str, Point]:
    """The ladder's points, and of the others those that nothing beats."""
    always = {rung.name for rung in _rungs(builder)}
    good = {point.name for point in undominated(points.values(), builder.disagreement)}
    return {name: point for name, point in points.items() if name in always | good}


class Ranked:
    """Points with their costs, the reference, and the plan that follows from them."""

    def __init__(self, builder: Builder, points: Mapping[str, Point]) -> None:
        self.builder = builder
        costs = self._costs(points)
        self.points = self._engines(points, costs)
        self.costs = {name: costs[f"{name} {p.engine}"] for name, p in self.points.items()} | {"": costs[""]}
        self.floor_wins = builder.beaten(self.points)
        self.reference = self.points["linear"].logits if self.floor_wins else builder.teacher_dev
        found = self._judged()
        self.max_drop = self._points(found)
        margin = builder.task.margin(self.max_drop, builder.quality(self.reference))
        self.considered = [replace(p, margin=margin) for p in found]

    def _costs(self, points: Mapping[str, Point]) -> dict[str, Cost]:
        """Seconds of each point under each engine that could run it, interleaved in one run, measured once."""
        store, builder = self.builder.store, self.builder
        key = f"costs of {', '.join(points)}"
        if store.get(key) is None:
            tiers = {}
            for name, point in points.items():
                for engine in _able(point):
                    tiers[f"{name} {engine}"] = builder.run_tier(name, engine, point.options)
            found = measure.tier_costs(tiers, builder.reading, builder.data.dev)
            store.put(key, {name: [c.row, c.single] for name, c in found.items()})
        return {name: Cost(*pair) for name, pair in store.get(key).items()}

    def _engines(self, points: Mapping[str, Point], costs: Mapping[str, Cost]) -> dict[str, Point]:
        chosen = {}
        for name, point in points.items():
            best = engine_of(name, point.engine, costs)
            chosen[name] = point if best == point.engine else self.builder.with_engine(point, best)
        return chosen

    def _judged(self) -> list[Planned]:
        builder, budget = self.builder, self.builder.job.budget
        points = [self.points["linear"]] if self.floor_wins else list(self.points.values())
        known = (self.costs, builder.task, builder.calibrate, builder.dev_targets)
        found = choices(points, *known, budget.minimise, _TIERS[builder.job.options.effort])
        return judged(found, self.reference, *_asked(builder, self.reference))

    def _points(self, found: Sequence[Planned]) -> float:
        """The drop that is allowed: as asked, or, in tenths of a point, what dev says can be proven."""
        builder, budget = self.builder, self.builder.job.budget
        if budget.max_drop != "auto":
            return budget.max_drop
        point = builder.task.margin(1.0, builder.quality(self.reference))
        points = min(MOST, math.ceil(round(10 * provable(found) / point, 6)) / 10)
        builder.reporter.note(f"max drop: {points:g} points, from dev and {len(builder.data.certify):,} certify rows")
        return points


def _able(point: Point) -> tuple[str, ...]:
    """Engines that run a point's file on this machine."""
    if point.engine == "onnx" and importlib.util.find_spec("openvino") is not None:
        return ("onnx", "openvino")
    return (point.engine,)


def _finish(builder: Builder, ranked: Ranked, out: Path, notes: tuple[str, ...]) -> Result:
    """Register, open the labels, ship the cheapest that passed, measure it, write it."""
    planned = plan(ranked.considered)
    packs = [Pack(builder, p) for p in planned]
    reference = Candidate("linear" if ranked.floor_wins else "teacher", _reference_digest(builder, ranked))
    registration = register(
        reference,
        [pack.candidate for pack in packs],
        builder.task,
        builder.data.certify,
        max_drop=ranked.max_drop,
        confidence=builder.job.budget.confidence,
        seed=builder.job.options.seed,
        ledger=builder.store.folder / LOOKS,
    )
    builder.reporter.note(
        f"registered {len(packs)} candidates, safest to cheapest: {'; '.join(p.candidate.name for p in packs)}"
    )
    certificate, outcomes, logits = _certified(builder, ranked, registration, packs)
    shipped = next(pack for pack in packs if pack.candidate == certificate.shipped)
    notes = (*notes, *_remarks(builder, ranked, certificate))
    manifest = replace(shipped.manifest, provenance=_provenance(builder, ranked, shipped, notes))
    # Measured where it will stand when it is complete: a folder that nobody is told of yet.
    trial = builder.store.folder / "trial"
    artifact.save(trial, manifest, shipped.contents)
    engine, rows = load(trial, builder.job.options.threads), builder.data.certify.rows
    tokens = engine.encoder.encode(rows.text, rows.pair)
    said = engine.run(tokens)
    _held(builder, said, outcomes, certificate.shipped.name)
    measurements = _measured(builder, ranked, shipped, trial)
    contents = dict(shipped.contents)
    strongest = logits[engine.tiers[-1].name].argmax(axis=1) if len(engine.tiers) > 1 else None
    contents[artifact.FINGERPRINT] = Fingerprint.of(engine.encoder, tokens, said, strongest).to_json()
    contents[artifact.CERTIFICATE] = certificate.to_json().encode()
    contents[artifact.OUTCOMES] = outcomes.to_json().encode()
    contents[artifact.MEASUREMENTS] = json.dumps(measure.to_dict(measurements)).encode()
    page = render(manifest, certificate, measurements, outcomes, command=builder.job.command)
    contents[artifact.REPORT] = page.encode()
    manifest = artifact.save(out, manifest, contents)
    return Result(out, manifest, certificate, measurements, notes)


class Pack:
    """A planned choice as it would ship: manifest and files."""

    def __init__(self, builder: Builder, planned: Planned) -> None:
        choice = planned.choice
        reads = max(builder.reads_of(point) for point in choice.points)
        encoder = builder.reading.reading(reads)
        self.planned = planned
        self.contents: dict[str, bytes] = {artifact.TOKENIZER: encoder.definition.encode()}
        tiers = []
        for i, point in enumerate(choice.points):
            file = artifact.tier_file(i, point.name, point.engine)
            self.contents[file] = builder.store.read(f"points/{point.name}.bin")
            tiers.append(
                Tier(point.name, point.engine, file, point.options, choice.temperatures[i], choice.thresholds[i])
            )
        self.manifest = artifact.hashed(
            Manifest(builder.task, encoder.max_length, encoder.pad, tuple(tiers)), self.contents
        )
        self.candidate = Candidate(choice.name, self.manifest.digest)


def _certified(
    builder: Builder, ranked: Ranked, registration: Registration, packs: Sequence[Pack]
) -> tuple[Certificate, Outcomes, dict[str, Floats]]:
    """Also the logits of every model on the certify rows."""
    sealed = builder.data.certify
    tokens = builder.reading.encode(sealed.rows.text, sealed.rows.pair)
    # Each model runs once over all rows; cascades of it only pick rows.
    used = {point.name: point for pack in packs for point in pack.planned.choice.points}
    logits = {n: builder.run_tier(n, p.engine, p.options).logits(tokens, 32) for n, p in used.items()}
    answers = {}
    for pack in packs:
        parts = [logits[tier.name] for tier in pack.manifest.tiers]
        said = cascade(builder.task, pack.manifest.tiers, len(tokens), partial(_rows_of, parts))
        answers[pack.candidate.name] = Answers(said.logits, said.confidence)
    if ranked.floor_wins:
        reference = answers[packs[0].candidate.name]
    else:
        said_by_teacher = builder.teacher_logits(sealed.rows)
        reference = Answers(said_by_teacher, builder.task.confidence(said_by_teacher))
    return *test(registration, sealed, reference, answers, slices=sealed.rows.slices), logits


def _rows_of(parts: Sequence[Floats], i: int, rows: NDArray[np.int64]) -> Floats:
    return np.asarray(parts[i][rows])


def _reference_digest(builder: Builder, ranked: Ranked) -> str:
    return ranked.points["linear"].file if ranked.floor_wins else builder.teacher.digest


def _held(builder: Builder, said: Outputs, outcomes: Outcomes, shipped: str) -> None:
    """What was written answers the certify rows as the certificate says. Raises CertificateError."""
    rows = builder.data.certify.rows
    expected = outcomes.candidates[shipped][:, 0]
    now = builder.task.outcomes(said.logits, np.zeros(len(rows)))[:, 0]
    differ = int((np.abs(now - expected) > 1e-4 * max(1.0, float(np.abs(expected).max()))).sum())
    if differ:
        raise CertificateError(
            f"the saved artifact answers {differ:,} of {len(rows):,} certify rows otherwise than the candidate that "
            "was tested; this is a fault of Netweight or of an engine. Nothing was certified."
        )


def _measured(builder: Builder, ranked: Ranked, shipped: Pack, out: Path) -> Measurements:
    """The reference, what ships, and every single model, timed in one run on dev."""
    threads = builder.job.options.threads
    engine = load(out, threads)
    rows = builder.data.dev
    engines: dict[str, Engine] = {"reference": teacher_engine(builder.teacher), "shipped": engine}
    for name, p in ranked.points.items():
        tier = Tier(name, p.engine, "", p.options, p.temperature)
        runs = builder.run_tier(name, p.engine, p.options)
        engines[name] = Engine(builder.task, builder.reading.reading(builder.reads_of(p)), [(tier, runs)], name)
    if ranked.floor_wins:
        engines["reference"] = engines["linear"]
    timings = measure.speed(engines, rows, rounds=3)
    fresh = measure.fresh(out, rows, threads)

    def row(key: str, name: str, size: int) -> Measurement:
        said = engines[key].outputs(rows.text, rows.pair)
        quality, agreement, distance = measure.quality(builder.task, said.logits, ranked.reference, builder.dev_targets)
        tiers = engines[key].tiers
        answered = tuple(float((said.tier == i).mean()) for i in range(len(tiers)))
        return Measurement(
            name, tuple(t.name for t in tiers), len(rows), quality, agreement, distance, answered, size, timings[key]
        )

    reference = (
        row("reference", "linear", ranked.points["linear"].bytes)
        if ranked.floor_wins
        else row("reference", "teacher", builder.teacher.bytes)
    )
    ships = replace(
        row("shipped", shipped.candidate.name, artifact.size(out, shipped.manifest)),
        memory=fresh.memory,
        cold_start=fresh.cold_start,
    )
    points = tuple(row(name, name, p.bytes) for name, p in ranked.points.items())
    return Measurements(measure.machine(threads), reference, ships, points, measure.VCPU_HOUR)


def _remarks(builder: Builder, ranked: Ranked, certificate: Certificate) -> tuple[str, ...]:
    """Sentences that the reader of the result must know."""
    said = list(builder.run.remarks()) if isinstance(builder.run, Accounting) else []
    if ranked.floor_wins:
        said.append(
            "Nothing beats TF-IDF with a linear model on dev, the fine-tuned encoder included: the linear model is the "
            "reference and what ships."
        )
    else:
        said.append("Whether the reference is as good as an ordinary full fine-tune was not checked in this job.")
    if certificate.verdict != "certified":
        said.append("No candidate passed; what ships is the safest of them, not certified.")
    return tuple(said)


def _provenance(builder: Builder, ranked: Ranked, shipped: Pack, notes: Sequence[str]) -> dict[str, Any]:
    options, data = builder.job.options, builder.data
    return {
        "data": {
            "fingerprint": data.fingerprint,
            "rows": {
                "train": len(data.train),
                "select": len(data.select),
                "calibrate": len(data.calibrate),
                "certify": len(data.certify),
                "pool": len(data.pool) if data.pool is not None else 0,
            },
            "certify": data.certify.fingerprint,
        },
        "base": {
            "name": builder.teacher.base.name,
            "licence": builder.teacher.base.licence,
            "sha256": builder.teacher.base.digest,
        },
        "teacher": builder.teacher.digest,
        "tokens": {"known": builder.source.encoder.vocabulary, "teacher": builder.teacher.encoder.vocabulary},
        "recipes": {p.name: describe(builder.rungs[p.name].recipe) for p in shipped.planned.choice.points},
        "plans": {p.name: builder.rungs[p.name].plan.changed() for p in shipped.planned.choice.points},
        "seed": options.seed,
        "max_drop": ranked.max_drop,
        "minimise": builder.job.budget.minimise,
        "versions": dict(measure.machine(options.threads).versions),
        "notes": list(notes),
        **({"federation": dict(builder.run.account())} if isinstance(builder.run, Accounting) else {}),
    }
