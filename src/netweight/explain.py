"""What each step towards an artifact bought, in quality, bytes and time; and what was tried and not taken."""

from __future__ import annotations

import json
from collections.abc import Collection, Mapping, Sequence
from dataclasses import asdict, dataclass, field, replace
from math import inf
from pathlib import Path
from statistics import median_low
from typing import Any

from netweight import artifact, measure
from netweight.artifact import Manifest, Tier
from netweight.baselines import teacher_engine
from netweight.build import TEACHER, TRIMMED
from netweight.certify import Certificate
from netweight.choose import Minimise, engine_of
from netweight.data import Columns
from netweight.engine import Engine, load
from netweight.engine.cascade import tier_engine
from netweight.errors import StoreError
from netweight.export import Exported, export
from netweight.measure import COST_BATCH, Cost
from netweight.model import Model
from netweight.report.format import Scale, percent, significant
from netweight.store import Store, rows_of, store_of
from netweight.summary import certificate_of
from netweight.task import Floats, Ints, Task

_TIMED = 400  # rows; steps are far apart, and the teacher among them is slow
_RUNTIMES = {"onnx": "ONNX Runtime", "exits": "ONNX Runtime", "openvino": "OpenVINO"}
_NO_WORSE: dict[Minimise, str] = {"cost": "costs no more", "latency": "takes no longer", "size": "is no larger"}


@dataclass(frozen=True)
class Step:
    """One step: the tier that it belongs to, what was done, and what there was afterwards, measured on dev:
    `milliseconds` of a row in batches, or, where latency was minimised, of a single request (p50): with several tiers,
    mostly of rows that the tier `stops` answers."""

    tier: str
    done: str
    quality: float
    bytes: int
    milliseconds: float
    stops: str = ""


@dataclass(frozen=True)
class Tried:
    """A point that did not ship, and why; of a trial also what it tried. `microseconds`: see `Explanation.timed`; None
    where it was not timed for this artifact."""

    name: str
    quality: float
    bytes: int
    why: str
    params: Mapping[str, Any] = field(default_factory=dict)
    microseconds: float | None = None


@dataclass(frozen=True)
class Left:
    """A candidate of the certificate, or a rung of the ladder, and what became of it."""

    name: str
    why: str


@dataclass(frozen=True)
class Explanation:
    """Steps of each tier from the teacher, then the artifact; candidates of the certificate that did not ship; points
    that are no part of what ships; rungs that were not made. `parts`: microseconds of tokenization, and of each tier
    that ships, timed with what was tried."""

    task: Task
    rows: int
    threads: int
    steps: tuple[Step, ...]
    candidates: tuple[Left, ...]
    tried: tuple[Tried, ...]
    left_out: tuple[Left, ...]
    minimise: Minimise = "cost"
    parts: Mapping[str, float] = field(default_factory=dict)

    @property
    def scale(self) -> Scale:
        """How qualities are written, with the teacher's as the reference."""
        return Scale(self.task, self.steps[0].quality)

    @property
    def timed(self) -> str:
        """What the times of what was tried are."""
        what = "a single request" if self.minimise == "latency" else f"a row in batches of {COST_BATCH} at most"
        return f"microseconds of {what}, without tokenization, as the job timed them on its own machine"

    def to_json(self) -> str:
        """All of it; `point` is one point in units of quality."""
        values = asdict(self) | {"task": self.task.to_dict(), "metric": self.task.metric, "point": self.scale.point}
        return json.dumps(values | {"timed": self.timed}, indent=1)

    @property
    def sentences(self) -> list[str]:
        """In plain words."""
        teacher, *steps = self.steps
        found = [
            f"The teacher reaches {self.task.metric} {self.scale.quality(teacher.quality)} on {self.rows:,} dev rows, "
            f"with {teacher.bytes / 1e6:.1f} MB and {self._time(teacher, 2)} on {self.threads} threads."
        ]
        before = teacher
        for step in steps:
            # Each tier starts from the teacher again.
            before = before if before.tier == step.tier else teacher
            where = f"Tier {step.tier}, {step.done}" if step.tier else step.done
            found.append(f"{where}: {self._change(before, step)}.")
            before = step
        found += [f"Candidate {c.name} {c.why}." for c in self.candidates]
        if self.tried:
            beside = ", ".join(f"{name} {significant(value)}" for name, value in self.parts.items())
            beside = f" Timed beside them: {beside}." if beside else ""
            found.append(f"Times of what was tried are {self.timed} (–: not timed).{beside}")
        per = "request" if self.minimise == "latency" else "row"
        found += [
            f"Tried and not taken: {t.name} ({self.task.metric} {self.scale.quality(t.quality)}, "
            f"{t.bytes / 1e6:.1f} MB, {'–' if t.microseconds is None else significant(t.microseconds)} us a {per}"
            f"{'; ' if t.params else ''}{_listed(t.params)}): {t.why}."
            for t in self.tried
        ]
        return found + [f"Not made: {r.name}: {r.why}." for r in self.left_out]

    def _change(self, before: Step, after: Step) -> str:
        points = (after.quality - before.quality) / self.scale.point
        times = before.milliseconds / after.milliseconds
        size = before.bytes / after.bytes
        return (
            f"{self.task.metric} {self.scale.quality(after.quality)} ({points:+.2f} points), "
            f"{after.bytes / 1e6:.1f} MB ({_times(size, 'smaller', 'larger')}), "
            f"{self._time(after, 3)} ({_times(times, 'faster', 'slower')})"
        )

    def _time(self, step: Step, digits: int) -> str:
        single, value = self.minimise == "latency", f"{step.milliseconds:.{digits}f} ms"
        mostly = f", mostly of rows that {step.stops} answers" if step.stops else ""
        return f"single requests p50 {value}{mostly}" if single else f"{value} a row"


def _times(ratio: float, more: str, less: str) -> str:
    return f"{ratio:.1f}x {more}" if ratio >= 1 else f"{1 / ratio:.1f}x {less}"


def explain(folder: Path, threads: int | None = None) -> Explanation:
    """Build what each step of the shipped tiers gave and measure all of it in one run on the dev rows. Of encoders,
    what they are made of is also shown in the runtime that ships, so that no technique gets the runtime's share.

    Raises StoreError where the run store beside the artifact is gone, is of an earlier version, or holds no longer what
    a tier was made of, and ArtifactError where the artifact has no certificate.
    """
    count = threads or measure.cores()
    engine, manifest, (certificate, _) = load(folder, count), artifact.read_manifest(folder), certificate_of(folder)
    with Store(store_of(folder), None) as store:
        rows = rows_of(folder, None, Columns()).rows
        teacher = Model.load(store.model_folder(TEACHER))
        engines: list[tuple[str, str, Engine, int]] = [("", TEACHER, teacher_engine(teacher, count), teacher.bytes)]
        source, first = teacher, list[tuple[str, Engine, int]]()
        if manifest.provenance.get("trimmed"):
            # All tiers are made of it, and have its tokenizer.
            source = Model.load(store.model_folder(TRIMMED)).reading(teacher.encoder.max_length)
            first = [("Vocab, the tokens that occur and common ones", teacher_engine(source, count), source.bytes)]
        same: dict[str, tuple[Engine, int]] = {}
        for tier in manifest.tiers:
            engines += ((tier.name, *one) for one in first)
            # What the runtime gives would else seem to be the first step's. Engines of tables run no network.
            if runtime := _RUNTIMES.get(tier.engine):
                same[runtime] = same.get(runtime) or _shown(tier, source, manifest.pad, count)
                engines.append((tier.name, f"the same, in {runtime}", *same[runtime]))
            engines += _steps(store, manifest, tier, count)
        if len(manifest.tiers) > 1:
            engines.append(("", "The artifact, all tiers", engine, artifact.size(folder, manifest)))
        some = rows.take(range(min(_TIMED, len(rows))))
        minimise: Minimise = manifest.provenance.get("minimise", "cost")
        # What several tiers begin with is measured once.
        each = {e: f"{i}" for i, e in enumerate(dict.fromkeys(e for _, _, e, _ in engines))}
        timings = measure.speed({key: e for e, key in each.items()}, some, rounds=3)
        targets = engine.task.targets(rows.label or ())
        found: dict[Engine, tuple[float, float, str]] = {}
        for e, key in each.items():
            said, single = e.outputs(rows.text, rows.pair), minimise == "latency"
            quality = float(engine.task.quality(engine.task.outcomes(said.logits, targets)))
            stops = e.tiers[median_low(map(int, said.tier))].name if single and len(e.tiers) > 1 else ""
            found[e] = quality, timings[key].p50 if single else 1000 / timings[key].rows_per_second, stops
        steps = tuple(Step(name, done, found[e][0], size, *found[e][1:]) for name, done, e, size in engines)
        tried, left = _tried(store, manifest, certificate, targets), _left_out(store, manifest)
        took, ships = _took(store, manifest), ("", *(tier.name for tier in manifest.tiers))
    parts = {name or "tokenization": took[name] for name in ships if name in took}
    return Explanation(engine.task, len(rows), count, steps, _candidates(certificate), tried, left, minimise, parts)


def _steps(store: Store, manifest: Manifest, tier: Tier, threads: int) -> list[tuple[str, str, Engine, int]]:
    names, point = store.get(f"steps {tier.name}") or (), store.get(f"point {tier.name}") or {}
    recipe = manifest.provenance.get("recipes", {}).get(tier.name) or ()
    # A later run of the job may have made it anew, or have begun to.
    same = len(names) == len(recipe) > 0 and point.get("file") == manifest.files[tier.file]
    if not same or not all((store.model_folder(name) / "model.json").is_file() for name in names):
        raise StoreError(
            f"{store.folder} does not hold what tier {tier.name!r} was made of; optimize again to have it explained."
        )
    found, shares = [], manifest.provenance.get("shares", {}).get(tier.name) or [1.0] * len(names)
    plan = manifest.provenance.get("plans", {}).get(tier.name, {})
    for name, step, share in zip(names, recipe, shares, strict=True):
        model = Model.load(store.model_folder(name))
        found.append((tier.name, _words(step, share, plan), *_shown(tier, model, manifest.pad, threads)))
    return found


def _shown(tier: Tier, model: Model, pad: int, threads: int) -> tuple[Engine, int]:
    """What a tier would be that shipped this model, and the bytes of its file."""
    made = export(model)
    part = _as_shipped(tier, made)
    runs = tier_engine(part, made.data, pad, threads)
    return Engine(model.task, model.encoder, [(part, runs)], tier.name), len(made.data)


def _as_shipped(tier: Tier, made: Exported) -> Tier:
    """A step's file in the way of the tier that ships: rows leave at its thresholds, and OpenVINO runs what it ran."""
    early = made.kind == tier.engine == "exits"
    same = early or (made.kind == "onnx" and tier.engine == "openvino")
    return Tier(tier.name, tier.engine if same else made.kind, "", tier.options if early else made.options)


def _words(step: Mapping[str, Any], share: float, plan: Mapping[str, Any]) -> str:
    """A technique with its options (but for its teachers, known by a hash), what it leaves to the plan where it trains,
    and what the time box left of its epochs."""
    said = [_listed({k: v for k, v in step.items() if k not in ("technique", "teachers")})]
    # The schedule of `Prune` is another one than the plan's.
    left = {k: v for k, v in plan.items() if step.get("epochs") and (k == "schedule" or k not in step)}
    said += [f"plan: {_listed(left)}"] if left else []
    said += [f"{percent(share)} of its epochs fit into the time limit"] if share < 1 else []
    return f"{step['technique']} ({'; '.join(said)})"


def _listed(options: Mapping[str, Any]) -> str:
    """Options as words; those that are None say nothing."""
    given = {k: f"{v:g}" if isinstance(v, float) else v for k, v in options.items() if v is not None}
    return ", ".join(f"{k} {_words(v, 1.0, {}) if isinstance(v, dict) else v}" for k, v in given.items())


def _tried(store: Store, manifest: Manifest, certificate: Certificate, targets: Ints | Floats) -> tuple[Tried, ...]:
    """Points of the store that did not ship."""
    shipped, task = {tier.name for tier in manifest.tiers}, manifest.task
    made, trials, took = store.held("point"), store.held("trial"), _took(store, manifest)
    held = {name: store.read_arrays(f"points/{name}")["logits"] for name in made}
    quality = {name: float(task.quality(task.outcomes(logits, targets))) for name, logits in held.items()}
    params = {name: trials.get(name, {}).get("params", {}) for name in made}
    size = {name: point["bytes"] for name, point in made.items()}
    points = [Tried(name, quality[name], size[name], "", params[name], took.get(name)) for name in made]
    minimise = manifest.provenance.get("minimise", "cost")
    costs = {name: float(size[name]) if minimise == "size" else took[name] for name in made if name in took}
    # A job that walked the ladder alone looked at no trial.
    searched = trials if "--effort" in manifest.provenance.get("command", "") else {}
    # A job that the clock ended goes on with its search when it is called again.
    later = {name for name in made if _later(store, manifest.provenance["measured"], name)}
    return tuple(
        replace(p, why=_why(p, points, costs, later, searched, minimise, certificate))
        for p in points
        if p.name not in shipped
    )


def _later(store: Store, measured: str, name: str) -> bool:
    """Whether a point was made, or made anew, after those of this artifact were timed."""
    order, file = store.keys(""), store.get(f"point {name}").get("file")
    timed = (store.get(f"files {measured}") or {}).get(name, file)
    return bool(file != timed) or measured in order[: order.index(f"point {name}")]


def _took(store: Store, manifest: Manifest) -> dict[str, float]:
    """Microseconds (`Explanation.timed`) of each point that was timed for this artifact, and so on its machine, on the
    engine that was chosen for it; the key "" is tokenization."""
    measured, minimise = manifest.provenance.get("measured"), manifest.provenance.get("minimise", "cost")
    if measured is None:
        raise StoreError(f"{store.folder} does not say what was timed; optimize again to have it explained.")
    costs = {name: Cost(*pair) for name, pair in (store.get(measured) or {}).items()}
    found = {name: cost for name, cost in costs.items() if not name}
    for name, point in store.held("point").items():
        engine = point["engine"]
        if f"{name} {engine}" in costs and not _later(store, measured, name):
            found[name] = costs[f"{name} {engine_of(name, engine, costs, minimise)}"]
    return {name: 1e6 * (cost.single if minimise == "latency" else cost.row) for name, cost in found.items()}


def _why(
    point: Tried,
    points: Sequence[Tried],
    costs: Mapping[str, float],
    later: Collection[str],
    trials: Collection[str],
    minimise: Minimise,
    certificate: Certificate,
) -> str:
    """Why a point did not ship: what became of the candidates with it, or why there was none."""
    tested = {t.candidate.name: t.passed for t in certificate.tested}
    mine = [c.name for c in certificate.registration.candidates if point.name in c.name.split(" (")[0].split(" > ")]
    for result, said in (
        (False, "failed the certificate"),
        (None, "was not tested"),
        (True, "passed, at a higher cost"),
    ):
        if name := next((name for name in mine if tested.get(name) is result), None):
            return said if name == point.name else f"{name} {said}"
    if certificate.registration.reference.name == "linear":
        return "the linear model is the reference, and nothing else was considered"
    if point.name in later and point.name not in costs:
        return "it was made after the points of this artifact were timed"
    if point.name in trials and point.name not in costs:
        return "a trial that another one beats in agreement with the teacher and in size is not timed"
    if point.name not in costs:
        return "it was made for another run of this job, which asked for something else, and not considered here"
    beaten = next(
        (
            o.name
            for o in points
            if o.name != point.name and o.quality >= point.quality and costs.get(o.name, inf) <= costs[point.name]
        ),
        None,
    )
    if beaten:
        return f"{beaten} is at least as good and {_NO_WORSE[minimise]}"
    return "the candidates that were registered promised more: they cost less, or are likelier to pass"


def _candidates(certificate: Certificate) -> tuple[Left, ...]:
    """Those of the certificate that did not ship, in its order, and the one that ships where it failed."""
    tested = {t.candidate: t for t in certificate.tested}
    registration, last = certificate.registration, certificate.tested[-1]
    point = registration.task.margin(1.0, certificate.reference.value)
    found = []
    for candidate in registration.candidates:
        test = tested.get(candidate)
        if test is None:
            found.append(Left(candidate.name, f"was not tested, since {last.candidate.name} failed before it"))
        elif not test.passed:
            found.append(
                Left(
                    candidate.name,
                    f"failed: on {registration.rows:,} certify rows it loses {test.drop.value / point:.2f} points, and "
                    f"{test.drop.high / point:.2f} at most with {100 * (1 - registration.level):.4g} % confidence; "
                    f"{test.margin / point:.2f} may be lost",
                )
            )
        elif candidate != certificate.shipped:
            found.append(Left(candidate.name, f"passed, and so did {certificate.shipped.name}, which costs less"))
    return tuple(found)


def _left_out(store: Store, manifest: Manifest) -> tuple[Left, ...]:
    """Rungs that this job did not make, nor another run of it."""
    made, command = store.held("point"), manifest.provenance.get("command")
    held = {n: said for n, said in store.held("left out").items() if n not in made}
    return tuple(Left(n, said[0]) for n, said in held.items() if said == [said[0], command])
