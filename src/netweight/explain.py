"""What each step towards an artifact bought, in quality, bytes and time; and what was tried and not taken."""

from __future__ import annotations

import json
from dataclasses import asdict, dataclass
from pathlib import Path
from typing import Any

from netweight import artifact, measure
from netweight.artifact import Manifest, Tier
from netweight.baselines import teacher_engine
from netweight.build import TEACHER
from netweight.data import Columns
from netweight.engine import Engine, load
from netweight.engine.cascade import tier_engine
from netweight.errors import StoreError
from netweight.export import Exported, export
from netweight.model import Model
from netweight.store import Store, rows_of, store_of
from netweight.task import Floats, Ints

_TIMED = 400  # rows; steps are far apart, and the teacher among them is slow


@dataclass(frozen=True)
class Step:
    """One step: the tier that it belongs to, what was done, and what there was afterwards, measured on dev."""

    tier: str
    done: str
    quality: float
    bytes: int
    milliseconds: float


@dataclass(frozen=True)
class Tried:
    """A point that did not ship, and why."""

    name: str
    quality: float
    bytes: int
    why: str


@dataclass(frozen=True)
class Explanation:
    """Steps of each tier from the teacher, then the artifact; what else was tried."""

    metric: str
    point: float
    rows: int
    threads: int
    steps: tuple[Step, ...]
    tried: tuple[Tried, ...]

    def to_json(self) -> str:
        """All of it."""
        return json.dumps(asdict(self), indent=1)

    @property
    def sentences(self) -> list[str]:
        """In plain words."""
        teacher, *steps = self.steps
        found = [
            f"The teacher reaches {self.metric} {_share(teacher.quality)} on {self.rows:,} dev rows, with "
            f"{teacher.bytes / 1e6:.1f} MB and {teacher.milliseconds:.2f} ms a row on {self.threads} threads."
        ]
        before = teacher
        for step in steps:
            # Each tier starts from the teacher again.
            before = before if before.tier == step.tier else teacher
            where = f"Tier {step.tier}, {step.done}" if step.tier else step.done
            found.append(f"{where}: {self._change(before, step)}.")
            before = step
        return found + [
            f"Tried and not taken: {t.name} ({self.metric} {_share(t.quality)}, {t.bytes / 1e6:.1f} MB): {t.why}."
            for t in self.tried
        ]

    def _change(self, before: Step, after: Step) -> str:
        points = (after.quality - before.quality) / self.point
        times = before.milliseconds / after.milliseconds
        size = before.bytes / after.bytes
        return (
            f"{self.metric} {_share(after.quality)} ({points:+.2f} points), {after.bytes / 1e6:.1f} MB "
            f"({_times(size, 'smaller', 'larger')}), {after.milliseconds:.3f} ms a row "
            f"({_times(times, 'faster', 'slower')})"
        )


def _share(quality: float) -> str:
    return f"{100 * quality:.2f} %"


def _times(ratio: float, more: str, less: str) -> str:
    return f"{ratio:.1f}x {more}" if ratio >= 1 else f"{1 / ratio:.1f}x {less}"


def explain(folder: Path, threads: int | None = None) -> Explanation:
    """Build what each step of the shipped tiers gave and measure all of it in one run on the dev rows.

    Raises StoreError where the run store beside the artifact is gone, or is of an earlier version.
    """
    count = threads or measure.cores()
    engine, manifest = load(folder, count), artifact.read_manifest(folder)
    rows = rows_of(folder, None, Columns())
    with Store(store_of(folder), None) as store:
        teacher = Model.load(store.model_folder(TEACHER))
        engines: list[tuple[str, str, Engine, int]] = [("", TEACHER, teacher_engine(teacher), teacher.bytes)]
        for tier in manifest.tiers:
            engines += _steps(store, manifest, tier, count)
        if len(manifest.tiers) > 1:
            engines.append(("", "The artifact, all tiers", engine, artifact.size(folder, manifest)))
        some = rows.take(range(min(_TIMED, len(rows))))
        timings = measure.speed({f"{i}": e for i, (_, _, e, _) in enumerate(engines)}, some, rounds=3)
        tokens, targets = teacher.encoder.encode(rows.text, rows.pair), engine.task.targets(rows.label or ())
        steps = []
        for i, (tier_name, done, e, size) in enumerate(engines):
            logits = e.run(tokens).logits
            quality = float(engine.task.quality(engine.task.outcomes(logits, targets)))
            steps.append(Step(tier_name, done, quality, size, 1000 / timings[f"{i}"].rows_per_second))
        tried = _tried(store, manifest, engine, targets)
    return Explanation(engine.task.metric, engine.task.point, len(rows), count, tuple(steps), tried)


def _steps(store: Store, manifest: Manifest, tier: Tier, threads: int) -> list[tuple[str, str, Engine, int]]:
    names = store.get(f"steps {tier.name}")
    recipe = manifest.provenance.get("recipes", {}).get(tier.name)
    if names is None or recipe is None or len(names) != len(recipe):
        raise StoreError(
            f"{store.folder} does not say how tier {tier.name!r} was made; optimize again to have it explained."
        )
    found = []
    for name, step in zip(names, recipe, strict=True):
        model = Model.load(store.model_folder(name))
        made = export(model)
        part = _as_shipped(tier, made)
        runs = tier_engine(part, made.data, manifest.pad, threads)
        engine = Engine(model.task, model.encoder, [(part, runs)], name)
        found.append((tier.name, _words(step), engine, len(made.data)))
    return found


def _as_shipped(tier: Tier, made: Exported) -> Tier:
    """A step's file in the way of the tier that ships: rows leave at its thresholds, and OpenVINO runs what it ran."""
    early = made.kind == tier.engine == "exits"
    same = early or (made.kind == "onnx" and tier.engine == "openvino")
    return Tier(tier.name, tier.engine if same else made.kind, "", tier.options if early else made.options)


def _words(step: dict[str, Any]) -> str:
    """A technique with its options, those that say nothing left out."""
    options = [f"{k} {v:g}" if isinstance(v, float) else f"{k} {v}" for k, v in step.items() if k != "technique" and v]
    return f"{step['technique']} ({', '.join(options)})"


def _tried(store: Store, manifest: Manifest, engine: Engine, targets: Ints | Floats) -> tuple[Tried, ...]:
    """Points of the store that did not ship."""
    shipped = {tier.name for tier in manifest.tiers}
    task = engine.task
    names = [key.removeprefix("point ") for key in store.keys("point ")]
    held = {name: store.read_arrays(f"points/{name}")["logits"] for name in names}
    qualities = {name: float(task.quality(task.outcomes(logits, targets))) for name, logits in held.items()}
    sizes = {name: int(store.get(f"point {name}")["bytes"]) for name in names}
    found = []
    for name in names:
        if name in shipped:
            continue
        beaten = next(
            (o for o in names if o != name and qualities[o] >= qualities[name] and sizes[o] <= sizes[name]), None
        )
        why = (
            f"{beaten} is at least as good and no larger"
            if beaten
            else "what ships with it was dearer, or less likely to pass"
        )
        found.append(Tried(name, qualities[name], sizes[name], why))
    return tuple(found)
