"""From a search's points to the artifact: rank them, register a sequence, certify, save, measure, report."""

from __future__ import annotations

import importlib.util
import json
import math
from collections.abc import Mapping, Sequence
from dataclasses import dataclass, replace
from functools import partial
from pathlib import Path
from typing import Any

import numpy as np
from numpy.typing import NDArray

from netweight import artifact, measure
from netweight.artifact import Manifest, Tier
from netweight.baselines import teacher_engine
from netweight.build import Builder
from netweight.certify import Answers, Candidate, Certificate, Outcomes, Registration, register
from netweight.certify import certify as test
from netweight.certify.compare import too_late
from netweight.certify.match import tolerance
from netweight.choose import Planned, choices, engine_of, names, plan, provable
from netweight.data import Dataset
from netweight.data.rows import groups_of
from netweight.encode import Tokens
from netweight.engine import Engine, Outputs, load
from netweight.engine.cascade import cascade
from netweight.errors import CertificateError
from netweight.job import MOST
from netweight.measure import Cost, Measurement, Measurements
from netweight.report import render
from netweight.run import Accounting
from netweight.search import Point
from netweight.signals import Fingerprint
from netweight.store import LOOKS
from netweight.task import Floats
from netweight.techniques import describe
from netweight.train import fit_digest
from netweight.trials import Effort

# Tiers of a cascade: a third may save time, but a second encoder brings its file, and its time to load.
_TIERS: dict[Effort, int] = {"quick": 2, "standard": 3, "thorough": 3}


@dataclass(frozen=True)
class Result:
    """What a job gave: the artifact's folder, its certificate and measurements, and sentences about the way there."""

    folder: Path
    manifest: Manifest
    certificate: Certificate
    measurements: Measurements
    notes: tuple[str, ...]


class Ranked:
    """Points with their costs, the reference, and the plan that follows from them."""

    def __init__(self, builder: Builder, points: Mapping[str, Point]) -> None:
        self.builder = builder
        able = [(name, point.file, engine) for name, point in points.items() for engine in _able(point)]
        # One processor has instructions for integers that another lacks: what is fastest there need not be here.
        timed = {"threads": builder.job.options.threads, "cpu": measure.cpu(), "of": able}
        self.measured = f"costs {fit_digest(timed)[:16]}"
        costs = self._costs(points)
        self.points = self._engines(points, costs)
        self.costs = {name: costs[f"{name} {p.engine}"] for name, p in self.points.items()} | {"": costs[""]}
        self.floor_wins = builder.beaten(self.points)
        if self.floor_wins:
            floor = self.points["linear"]
            self.reference, self.against = floor.logits, Candidate("linear", floor.file)
        else:
            self.reference, self.against = builder.teacher_dev, Candidate("teacher", builder.teacher.digest)
        found = self._judged()
        self.max_drop = self._allowed(found)
        margin = builder.task.margin(self.max_drop, builder.quality(self.reference))
        self.considered = [replace(p, margin=margin) for p in found]

    def _costs(self, points: Mapping[str, Point]) -> dict[str, Cost]:
        """Seconds of each point under each engine that can run it here, interleaved in one run, measured once."""
        store, builder, key = self.builder.store, self.builder, self.measured
        if store.get(key) is None:
            tiers = {}
            for name, point in points.items():
                for engine in _able(point):
                    tiers[f"{name} {engine}"] = builder.run_tier(name, engine, point.options)
            found = measure.tier_costs(tiers, builder.encoder, builder.data.dev)
            # A name may mean another point later, which was not timed.
            store.put(f"files {key}", {name: point.file for name, point in points.items()})
            store.put(key, {name: [c.row, c.single] for name, c in found.items()})
        return {name: Cost(*pair) for name, pair in store.get(key).items()}

    def _engines(self, points: Mapping[str, Point], costs: Mapping[str, Cost]) -> dict[str, Point]:
        chosen, minimise = {}, self.builder.job.budget.minimise
        for name, point in points.items():
            best = engine_of(name, point.engine, costs, minimise)
            chosen[name] = point if best == point.engine else self.builder.with_engine(point, best)
        return chosen

    def _judged(self) -> list[Planned]:
        builder, budget = self.builder, self.builder.job.budget
        points = [self.points["linear"]] if self.floor_wins else list(self.points.values())
        known = (self.costs, builder.task, builder.calibrate, builder.dev_targets)
        found = choices(points, *known, budget.minimise, _TIERS[builder.job.options.effort])
        return builder.judged(found, self.reference)

    def _allowed(self, found: Sequence[Planned]) -> float:
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


def finish(builder: Builder, points: Mapping[str, Point], out: Path, notes: tuple[str, ...]) -> Result:
    """Rank, register, open the labels, ship the cheapest that passed, measure it, write it."""
    ranked = Ranked(builder, points)
    planned = plan(ranked.considered)
    packs = [Pack(builder, p, name) for p, name in zip(planned, names([p.choice for p in planned]), strict=True)]
    registration = register(
        ranked.against,
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
    certificate, outcomes, said_by = _certified(builder, ranked, registration, packs)
    shipped = next(pack for pack in packs if pack.candidate == certificate.shipped)
    notes = (*notes, *_remarks(builder, ranked, certificate, outcomes))
    manifest = replace(shipped.manifest, provenance=_provenance(builder, ranked, shipped, notes))
    # A draft in the run store, without certificate and report: measured are the files that will ship, and nothing that
    # is incomplete ever stands at `out`.
    draft = builder.store.folder / "trial"
    artifact.save(draft, manifest, shipped.contents)
    engine, rows = load(draft, builder.job.options.threads), builder.data.certify.rows
    tokens = engine.encoder.encode(rows.text, rows.pair)
    said = engine.run(tokens)
    _held(builder, said, outcomes, certificate.shipped.name)
    measurements = _measured(builder, ranked, shipped, draft)
    contents = dict(shipped.contents)
    strongest = said_by[shipped.candidate.name][-1].argmax(axis=1) if len(engine.tiers) > 1 else None
    contents[artifact.FINGERPRINT] = Fingerprint.of(engine.encoder, tokens, said, strongest).to_json()
    contents[artifact.CERTIFICATE] = certificate.to_json().encode()
    contents[artifact.OUTCOMES] = outcomes.to_json().encode()
    contents[artifact.MEASUREMENTS] = json.dumps(measure.to_dict(measurements)).encode()
    page = render(manifest, certificate, measurements, outcomes)
    contents[artifact.REPORT] = page.encode()
    manifest = artifact.save(out, manifest, contents)
    return Result(out, manifest, certificate, measurements, notes)


class Pack:
    """A planned choice as it would ship: manifest and files."""

    def __init__(self, builder: Builder, planned: Planned, name: str) -> None:
        choice = planned.choice
        self.planned = planned
        self.encoder = encoder = builder.encoder_of(*choice.points)
        self.contents: dict[str, bytes] = {artifact.TOKENIZER: encoder.definition.encode()}
        tiers = []
        for i, point in enumerate(choice.points):
            file = artifact.tier_file(i, point.name, point.engine)
            self.contents[file] = builder.store.read(f"points/{point.name}.bin")
            numbers = choice.temperatures[i], choice.thresholds[i], choice.before[i]
            tiers.append(Tier(point.name, point.engine, file, point.options, *numbers))
        self.manifest = artifact.hashed(
            Manifest(builder.task, encoder.max_length, encoder.pad, tuple(tiers)), self.contents
        )
        self.candidate = Candidate(name, self.manifest.digest)


def _certified(
    builder: Builder, ranked: Ranked, registration: Registration, packs: Sequence[Pack]
) -> tuple[Certificate, Outcomes, dict[str, list[Floats]]]:
    """Also what each tier of each candidate says of all certify rows."""
    sealed = builder.data.certify
    read = {pack.encoder.max_length: pack.encoder for pack in packs}
    tokens = {reads: encoder.encode(sealed.rows.text, sealed.rows.pair) for reads, encoder in read.items()}
    known: dict[tuple[str, str], Floats] = {}

    def logits(point: Point, given: Tokens) -> Floats:
        # Each model runs once over all rows; cascades of it only pick rows. What it sees of them hangs on who reads
        # them in very few texts: some thousand characters without a word.
        given = builder.encoder_of(point).cut(given)
        key = point.name, given.digest
        if key not in known:
            known[key] = builder.run_tier(point.name, point.engine, point.options).logits(given, 32)
        return known[key]

    answers, said_by = {}, {}
    for pack in packs:
        given = tokens[pack.encoder.max_length]
        parts = said_by[pack.candidate.name] = [logits(point, given) for point in pack.planned.choice.points]
        said = cascade(builder.task, pack.manifest.tiers, len(given), partial(_rows_of, parts))
        answers[pack.candidate.name] = Answers(said.logits, said.confidence)
    if ranked.floor_wins:
        reference = answers[packs[0].candidate.name]
    else:
        said_by_teacher = builder.teacher_logits(sealed.rows)
        reference = Answers(said_by_teacher, builder.task.confidence(said_by_teacher))
    return *test(registration, sealed, reference, answers), said_by


def _rows_of(parts: Sequence[Floats], i: int, rows: NDArray[np.int64]) -> Floats:
    return np.asarray(parts[i][rows])


def _held(builder: Builder, said: Outputs, outcomes: Outcomes, shipped: str) -> None:
    """What was written answers the certify rows as the certificate says. Raises CertificateError."""
    rows = builder.data.certify.rows
    expected = outcomes.candidates[shipped][:, 0]
    now = builder.task.outcomes(said.logits, np.zeros(len(rows)))[:, 0]
    differ = int((~(np.abs(now - expected) <= tolerance(builder.task))).sum())  # NaN is far
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
    engines: dict[str, Engine] = {"reference": teacher_engine(builder.teacher, threads), "shipped": engine}
    for name, p in ranked.points.items():
        tier = Tier(name, p.engine, "", p.options, p.temperature)
        runs = builder.run_tier(name, p.engine, p.options)
        engines[name] = Engine(builder.task, builder.encoder_of(p), [(tier, runs)], name)
    if ranked.floor_wins:
        engines["reference"] = engines["linear"]
    timings = measure.speed(engines, rows, rounds=3)
    fresh = measure.fresh(out, rows, threads)

    def row(key: str, name: str, size: int) -> Measurement:
        e, known = engines[key], (ranked.reference, builder.dev_targets)
        return measure.measured(builder.task, name, e, e.outputs(rows.text, rows.pair), *known, size, timings[key])

    size = ranked.points["linear"].bytes if ranked.floor_wins else builder.teacher.bytes
    reference = row("reference", ranked.against.name, size)
    ships = replace(
        row("shipped", shipped.candidate.name, artifact.size(out, shipped.manifest)),
        memory=fresh.memory,
        cold_start=fresh.cold_start,
    )
    points = tuple(row(name, name, p.bytes) for name, p in ranked.points.items())
    return Measurements(measure.machine(threads), reference, ships, points, measure.VCPU_HOUR)


def _remarks(builder: Builder, ranked: Ranked, certificate: Certificate, outcomes: Outcomes) -> tuple[str, ...]:
    """Sentences that the reader of the result must know."""
    said = list(builder.run.remarks()) if isinstance(builder.run, Accounting) else []
    if foreign := builder.foreign(builder.teacher.encoder):
        said.append(foreign)
    if ranked.floor_wins:
        said.append(
            "Nothing beats TF-IDF with a linear model on dev, the fine-tuned encoder included: the linear model is the "
            "reference and what ships."
        )
    else:
        said.append("Whether the reference is as good as an ordinary full fine-tune was not checked in this job.")
    if unread := _unread(builder.data, certificate, outcomes):
        said.append(unread)
    if certificate.verdict != "certified":
        said.append("No candidate passed; what ships is the safest of them, not certified.")
        asked, grouped = certificate.registration, groups_of(builder.data.certify.rows) is not None
        if late := too_late(asked.task, grouped, asked.level):
            said.append(late)
    return tuple(said)


def _unread(data: Dataset, certificate: Certificate, outcomes: Outcomes) -> str:
    """A sentence where one answer to all rows is about as good as the certificate asks for."""
    asked, reference = certificate.registration, certificate.reference
    if asked.task.metric == "accuracy" and data.counts:
        label, share = data.commonest
        lost, right = reference.value - share, f"{100 * share:.2f} % of the certify rows"
        said = f"Always answering {label!r} is right on {right}, the reference on {100 * reference.value:.2f} %"
    elif asked.task.metric == "mae":
        middle = float(np.median(true := outcomes.reference[:, 1]))  # no other constant has a smaller error
        error, least = float(np.abs(true - middle).mean()), -reference.value
        lost = error - least
        said = f"Always answering {middle:g} errs by {error:.4g} on the certify rows, the reference by {least:.4g}"
    elif asked.task.metric == "spearman":
        lost = reference.low
        said = f"One answer to all rows has a correlation of 0, the reference one that may be as low as {lost:.4f}"
    else:
        return ""
    told = f"{said}, and {asked.max_drop:g} points may be lost: this certificate cannot tell it from a model."
    return told if lost <= certificate.final.margin else ""


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
        # Of the epochs that recipes name, what fit into the time box.
        "shares": {p.name: builder.shares(p.name) for p in shipped.planned.choice.points},
        "command": builder.job.command,
        "pairs": data.certify.rows.pair is not None,
        "seed": options.seed,
        "max_drop": ranked.max_drop,
        "minimise": builder.job.budget.minimise,
        "measured": ranked.measured,
        **({"trimmed": True} if builder.source is not builder.teacher else {}),
        "versions": dict(measure.machine(options.threads).versions),
        "notes": list(notes),
        **({"federation": dict(builder.run.account())} if isinstance(builder.run, Accounting) else {}),
    }
