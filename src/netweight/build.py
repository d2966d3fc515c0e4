"""From rungs to points: train, export, run on dev. Whatever is finished is in the run store and never done twice."""

from __future__ import annotations

import hashlib
import time
from collections.abc import Callable, Collection, Iterator, Mapping, Sequence
from contextlib import contextmanager
from dataclasses import asdict, dataclass, replace
from functools import cached_property
from typing import Any

import numpy as np
from numpy.typing import NDArray

from netweight import measure
from netweight.artifact import READS, Tier, read_manifest
from netweight.certify import fit_temperature
from netweight.certify.compare import require_scores
from netweight.choose import Choice, Planned, judged
from netweight.data import Dataset, Rows
from netweight.data.rows import groups_of
from netweight.encode import MOST_TOKENS, TextEncoder, Tokens
from netweight.engine.base import TierEngine
from netweight.engine.cascade import tier_engine
from netweight.engine.exits import ExitsEngine, leaves, thresholds
from netweight.errors import ArtifactError, ModelError, OptionError, StoreError
from netweight.export import export, work
from netweight.job import Job
from netweight.model import Model, known_as, pretrained
from netweight.network import Exits
from netweight.reporter import Reporter
from netweight.run import InOnePlace, Keeping, Run, Speaking
from netweight.run.local import logits_of
from netweight.scratch import SCRATCH, scratch
from netweight.search import Point, Rung
from netweight.space import Trial
from netweight.store import TRIALS, Store
from netweight.task import Score, Task
from netweight.techniques import Finetune, LinearFloor, Pretrain, Quantize, Recipe, Static, Technique, Vocab, describe
from netweight.track import Boxed
from netweight.train import Plan, fit_digest
from netweight.trials import Trials, undominated

TEACHER = "teacher"
TRIMMED = "trimmed"
# Tokens of the teacher's that its students know whether or not these texts use them: of BERT's, its most common words.
# Where bytes count they know fewer; on BANKING77's dev one label in a thousand differs for it. Where more than half of
# all would stay, it saves little, and texts to come will use what went.
_COMMON, _COMMONEST, _FEW = 8000, 6000, 0.5
PRETRAINED = "pretrained"
_BOX = "short trials"  # in the run store: a time limit, and the seconds of each of them under it
_TEACHER_SHARE = 0.45  # of the time box
_PRETRAINED_SHARE = 0.4  # of the teacher's, where there is nothing to start from
# Rows of dev that are looked at for tokens that a model does not know, and the share from which on it is said.
_LOOK = 1000
_UNKNOWN = 0.05
# Where more of dev than this is longer than what encoders read, tiers without attention read so many times as much.
CUT, _FARTHER = 0.05, 4
# Random weights stand steps ten times as long as pretrained ones, and token vectors that have seen only these texts are
# to be trained too; the time box cuts the epochs to what fits.
_FROM_SCRATCH = (
    Pretrain(epochs=40, learning_rate=1e-3),
    Finetune(epochs=10, learning_rate=5e-4, freeze_embeddings=False),
)
# Share of rows that may leave an encoder early with another label than the last layer's.
_EXIT_TOLERANCE = 0.005


def part(recipe: Sequence[Technique], plan: Plan) -> str:
    """Key of the model that the first steps of a recipe give: a digest of the steps and of the plan, and of a trial's
    time limit, since what one time box cut is no beginning in another. While all steps have `epochs=0` nothing reads
    the plan, and it is left out."""
    if all(getattr(step, "epochs", None) == 0 for step in recipe):
        plan = Plan()
    limit = {"limit": plan.limit} if plan.limit else {}
    return f"part-{fit_digest({'recipe': describe(tuple(recipe)), 'plan': plan.describe(), **limit})[:16]}"


def _recipe(rung: Rung) -> str:
    """Key of all that a rung is made by, but for its time."""
    return part(rung.recipe, replace(rung.plan, limit=None))


def last_share(recipe: Recipe) -> float:
    """The share of the time of what is to be made of a recipe that its last step gets: its epochs of all of them."""
    epochs = [getattr(step, "epochs", 0.0) for step in recipe]
    return epochs[-1] / sum(epochs) if sum(epochs) else 1.0


def _telling(rows: Rows) -> int:
    """Effective number of certify rows: n^2 over the sum of squared sizes of groups (Kish, Survey Sampling, 1965). Rows
    that are resampled as a whole, such as copies or those of one author, are taken to tell the same."""
    groups = groups_of(rows)
    return len(rows) if groups is None else round(len(rows) ** 2 / int((np.bincount(groups) ** 2).sum()))


class Clock:
    """The time box of one process."""

    def __init__(self, seconds: float) -> None:
        self._end = time.monotonic() + seconds

    @property
    def left(self) -> float:
        """Seconds; negative when it is over."""
        return self._end - time.monotonic()

    @contextmanager
    def stopped(self) -> Iterator[None]:
        """Time that does not count: others are waited for."""
        began = time.monotonic()
        yield
        self._end += time.monotonic() - began


@dataclass
class Builder:
    """Makes models and points of one job: the teacher with `run`, what is made of it with `students` (None: the same
    run)."""

    job: Job
    data: Dataset
    task: Task
    store: Store
    reporter: Reporter
    clock: Clock
    run: Run
    students: Run | None = None

    def __post_init__(self) -> None:
        self.rungs: dict[str, Rung] = {}
        if isinstance(self.task, Score):
            # The labels of certify are sealed; how many there are is not.
            require_scores(self.dev_targets, len(self.data.certify), "dev")

    @cached_property
    def dev_targets(self) -> NDArray[Any]:
        """Targets of dev, select rows first."""
        return self.task.targets(self.data.dev.label or ())

    @property
    def calibrate(self) -> slice:
        """Where the calibrate rows stand in dev."""
        return slice(len(self.data.select), len(self.data.select) + len(self.data.calibrate))

    @cached_property
    def teacher(self) -> Model:
        """The fine-tuned reference."""
        options, seconds = self.job.options, self.clock.left * _TEACHER_SHARE
        if options.model == SCRATCH:
            first, then = _FROM_SCRATCH
            part = seconds * _PRETRAINED_SHARE
            return self.model(
                TEACHER,
                lambda: self.model(PRETRAINED, self._scratch, (first,), part, self.run),
                (then,),
                seconds - part,
                self.run,
            )
        return self.model(TEACHER, self._pretrained, (options.finetune,), seconds, self.run)

    def _pretrained(self) -> Model:
        """The given model."""
        options = self.job.options
        return self._told(pretrained(options.model, self.task, options.max_length, options.seed))

    def _told(self, made: Model) -> Model:
        """The same; said before it costs time, if it cannot read these rows."""
        if said := self.foreign(made.encoder):
            self.reporter.note(said)
        return made

    def foreign(self, encoder: TextEncoder) -> str:
        """A sentence where much of dev is unknown to this tokenizer; else nothing. To one of bytes nothing is."""
        texts, name = self.data.dev.text[:_LOOK], self.job.options.model
        share = float(np.mean(encoder.encode(texts).ids == encoder.unknown))
        if share <= _UNKNOWN:
            return ""
        # Words of training rows that are elsewhere cannot be learned.
        learns = self.job.tables.train is not None and name != SCRATCH
        other = ", or train one on these rows with --model scratch" if learns else ""
        return (
            f"{100 * share:.0f} % of the tokens of dev are unknown to {known_as(name)}, such as "
            f"{', '.join(map(repr, encoder.missing(texts)))}; if labels depend on them, name a model that knows "
            f"them{other}."
        )

    def _scratch(self) -> Model:
        """A model that knows the words of train and pool, and nothing else."""
        rows = [self.data.train, *([self.data.pool] if self.data.pool is not None else [])]
        texts = [text for part in rows for text in (*part.text, *(part.pair or ()))]
        options = self.job.options
        return self._told(scratch(texts, self.task, max_length=options.max_length, seed=options.seed))

    @cached_property
    def source(self) -> Model:
        """What students are made of, and whose tokenizer all tiers have: the teacher, or, where these texts use few of
        its tokens, the teacher with those alone. On train and pool both say the same."""
        if self.job.options.vocabulary == "whole" or not isinstance(self.run, InOnePlace):
            return self.teacher
        wanted = _COMMONEST if self.job.budget.minimise == "size" else _COMMON
        if (common := self.store.get("common tokens")) is None:
            self.store.put("common tokens", common := wanted)
        trim = Vocab(common=common)
        try:
            found = self.model(TRIMMED, lambda: self.teacher.reading(self.reads), (trim,), 0.0, self.run)
        except OptionError:  # nothing would go
            return self.teacher
        except ModelError as problem:
            self.reporter.note(f"tiers have the teacher's whole vocabulary: {problem}")
            return self.teacher
        if found.encoder.vocabulary > _FEW * self.teacher.encoder.vocabulary:
            return self.teacher
        if common != wanted:
            # All points that are there were made for these tokens.
            self.reporter.note(
                f"tiers know the {common:,} most common tokens, as this job was begun; to begin anew with {wanted:,}, "
                "write to another folder"
            )
        return found.reading(self.teacher.encoder.max_length)

    @cached_property
    def teacher_dev(self) -> NDArray[np.float32]:
        """The teacher's logits on dev, in fp32."""
        if self.store.get("teacher dev") is None:
            self.store.write_arrays("teacher-dev", {"logits": self.teacher_logits(self.data.dev)})
            self.store.put("teacher dev", True)
        return self.store.read_arrays("teacher-dev")["logits"]

    def beaten(self, points: Mapping[str, Point]) -> bool:
        """Whether the trivial floor is as good as the teacher on dev: then nothing else is worth its time."""
        floor = points.get("linear")
        return floor is not None and self.quality(floor.logits) >= self.quality(self.teacher_dev)

    def encoder_of(self, *points: Point) -> TextEncoder:
        """Reads as far as the one of these points that reads farthest."""
        most = self.encoder.max_length
        return self.encoder.reading(max(int(point.options.get(READS, (most, 0))[0]) for point in points))

    def teacher_logits(self, rows: Rows) -> NDArray[np.float32]:
        """What the teacher says of rows (n, outputs)."""
        return logits_of(self.teacher, self.teacher.encoder.encode(rows.text, rows.pair)).numpy()

    @cached_property
    def dev_tokens(self) -> Tokens:
        """Dev, encoded once, as far as any tier reads."""
        return self.encoder.encode(self.data.dev.text, self.data.dev.pair)

    @cached_property
    def cut(self) -> float:
        """Share of dev that is longer than what the teacher reads."""
        own, dev = self.teacher.encoder, self.data.dev
        return float((own.encode(dev.text, dev.pair).lengths >= own.max_length).mean())

    @property
    def reads(self) -> int | None:
        """Tokens of a text that tiers without attention read, where the teacher stops before the end of many. Pairs
        are cut in the longer text, so what is read of them is no beginning of anything."""
        many = self.cut > CUT and self.data.dev.pair is None
        return min(_FARTHER * self.teacher.encoder.max_length, MOST_TOKENS) if many else None

    @cached_property
    def encoder(self) -> TextEncoder:
        """Reads as far as any tier does."""
        own = self.source.encoder
        return own.reading(self.reads or own.max_length)

    def model(
        self, name: str, base: Callable[[], Model], recipe: Recipe, seconds: float, run: Run, plan: Plan | None = None
    ) -> Model:
        """The model of a recipe: from the store, or made now and kept there, and so is what each step but the last
        gives: recipes that begin alike share it (until `drop`)."""
        folder = self.store.model_folder(name)
        if self.store.get(f"model {name}") is not None:
            try:
                return Model.load(folder)
            except ModelError as problem:  # not to be taken for a recipe that no model can be made by
                raise StoreError(
                    f"what was made is damaged: {problem}; choose another output, or delete {self.store.folder}"
                    f"{self.store.kept}."
                ) from None
        began = time.monotonic()
        plan = plan or Plan()
        *first, last = recipe
        # What is there already takes no time, but of trials, whose boxes are alike whatever was killed.
        there = [i for i in range(1, len(recipe)) if self.store.get(f"model {part(recipe[:i], plan)}") is not None]
        own = seconds * last_share(recipe[0 if plan.limit else max(there, default=0) :])
        model = self.model(part(first, plan), base, tuple(first), seconds - own, run, plan) if first else base()
        if first:  # steps that train nothing take time too
            own = min(own, seconds - (time.monotonic() - began))
        options, held = self.job.options, self.store.get(f"planned {name}") or {}
        # Under another limit steps may be of other batches.
        planned = held["steps"] if held.get("limit") == options.seconds else {}
        told = Boxed(
            self.reporter,
            planned,
            lambda steps: self.store.put(f"planned {name}", {"limit": options.seconds, "steps": steps}),
        )
        plan = replace(plan, seed=options.seed, seconds=max(own, 1.0), limit=options.seconds, reporter=told)
        model = last(model, run, plan)
        self.store.discard(name)
        model.save(folder)
        # What every later run loads is what was saved, whether this process was killed or not.
        model = Model.load(folder)
        took = {"seconds": round(time.monotonic() - began, 1), "share": round(told.share, 4)}
        self.store.put(f"model {name}", {"digest": model.digest, **took})
        if isinstance(run, Keeping):
            run.forget()
        return model

    def point(self, rung: Rung) -> Point:
        """The rung's point: from the store, or made now."""
        name = rung.name
        self.rungs[name] = rung = self._reaching(rung)
        known, recipe = self.store.get(f"point {name}"), _recipe(rung)
        if self.store.get(f"recipe {name}") not in (None, recipe):
            # It was made, or begun, by a version of Netweight or a trial that had another one.
            self.reporter.note(f"{name} is made anew: its recipe is not the one in the run store")
            for stale in ("point", "model", "planned"):
                self.store.put(f"{stale} {name}", None)
            known = None
        if known is None:
            self.store.put(f"recipe {name}", recipe)
            run = self.students or self.run
            if isinstance(run, Speaking) and not all(isinstance(t, LinearFloor | Quantize) for t in rung.recipe):
                # All students learn from it. It takes minutes where rows are many and long, and would eat the first
                # one's share.
                run.outputs(self.source, unlabelled=True, half=True)
            seconds = self.clock.left * rung.share
            model = self.model(name, lambda: self.source, rung.recipe, seconds, run, rung.plan)
            exported = export(model)
            self.store.write(f"points/{name}.bin", exported.data)
            options, share = exported.options, 1.0
            if isinstance(model.network, Exits):
                found, share = self.exits(name, options, model.network)
                options = {"thresholds": found}
            if model.encoder.max_length < self.encoder.max_length:
                options = {**options, READS: [model.encoder.max_length, model.encoder.closing]}
            engine = self.run_tier(name, exported.kind, options)
            logits = engine.logits(self.dev_tokens, 32)
            rows = self.calibrate
            temperature = fit_temperature(logits[rows], self.dev_targets[rows], self.task)
            self.store.write_arrays(f"points/{name}", {"logits": logits})
            known = {
                "engine": exported.kind,
                "options": options,
                "file": hashlib.sha256(exported.data).hexdigest(),
                "bytes": len(exported.data),
                "temperature": temperature,
            }
            steps = [part(rung.recipe[:i], rung.plan) for i in range(1, len(rung.recipe))]
            self.store.put(f"steps {name}", [*steps, name])
            self.store.put(f"work {name}", round(work(model) * share))
            self.store.put(f"point {name}", known)
        point = Point(name, **known, logits=self.store.read_arrays(f"points/{name}")["logits"])
        self.reporter.note(
            f"{name}: {self.task.metric} {self.quality(point.logits):.4f} on dev, {point.bytes / 1e6:.1f} MB"
        )
        return point

    def _reaching(self, rung: Rung) -> Rung:
        """The rung, its steps reading as far as is worth while."""
        far = [replace(s, reads=self.reads) if isinstance(s, LinearFloor | Static) else s for s in rung.recipe]
        return replace(rung, recipe=tuple(far))

    @property
    def left(self) -> float:
        """Seconds of the time box."""
        return self.clock.left

    @property
    def limit(self) -> float:
        """Seconds of the time box when it began."""
        return self.job.options.seconds

    def box(self, seconds: float) -> float:
        """Seconds of a short trial: these, or what an earlier process under this limit gave to its own."""
        held = self.store.get(_BOX)
        if held is None or held["limit"] != self.limit:
            self.store.put(_BOX, held := {"limit": self.limit, "seconds": seconds})
        return float(held["seconds"])

    def has(self, rung: Rung) -> bool:
        """Whether another point was made by this rung's very recipe, and, if a trial, under this time limit."""
        recipe = _recipe(self._reaching(rung))
        held = self.store.held("recipe")
        same = [n for n, known in held.items() if n != rung.name and known == recipe and self.made(n)]
        limits = {(self.store.get(f"trial {n}") or {}).get("limit", 0.0) for n in same}
        return bool(limits & {0.0, self.limit})

    def told(self, rungs: tuple[Rung, ...]) -> list[Point]:
        """The points that an earlier process finished."""
        return [self.point(rung) for rung in rungs if self.made(rung.name)]

    def trials(self) -> Trials | None:
        """What proposes rungs beyond the ladder, told of what is there already; None where effort is quick."""
        if self.job.options.effort == "quick":
            return None
        kept = [Trial(**value) for value in self.store.held("trial").values()]
        begun = [(t, self.point(t.rung(self.source)) if self.made(t.name) else None) for t in kept]
        path, options = self.store.folder / TRIALS, self.job.options
        return Trials(path, self.source, options.effort, options.seed, self, self.job.budget.minimise == "size", begun)

    def keep(self, trial: Trial) -> None:
        """Write down what a trial is before it is made."""
        if self.store.get(f"trial {trial.name}") is None:
            self.store.put(f"trial {trial.name}", asdict(trial))

    def drop(self, points: Collection[Point]) -> None:
        """Remove the models of trials that other points beat, whether bytes are minimised or not: they cannot ship, and
        nothing else asks for them but `explain`, of those that are tiers of the artifact that stands."""

        def kept(size: Callable[[Point], int]) -> set[str]:
            return {p.name for p in undominated(points, lambda point: (self.disagreement(point), size(point)))}

        standing = self.standing
        good = kept(lambda point: point.bytes) | kept(self._work) | set(standing)
        names = [*(point.name for point in points), *standing]
        steps = {name: self.store.get(f"steps {name}") or [] for name in names}
        beaten = [name for name in steps if name not in good and self.store.get(f"trial {name}") is not None]
        needed = {model for name in steps if name not in beaten for model in steps[name]}
        for model in (model for name in beaten for model in steps[name] if model not in needed):
            # Whoever begins alike later makes it again.
            if self.store.get(f"model {model}") is not None:
                self.store.put(f"model {model}", None)
            self.store.discard(model)

    @property
    def standing(self) -> list[str]:
        """Names of the tiers of the artifact that stands beside the run store; none where there is none yet."""
        folder = self.store.folder
        try:
            return [tier.name for tier in read_manifest(folder.with_name(folder.name.removesuffix(".run"))).tiers]
        except ArtifactError:
            return []

    def shares(self, name: str) -> list[float]:
        """Of each step of a point's recipe, the share of its epochs that fit into the time box."""
        made = [self.store.get(f"model {step}") or {} for step in self.store.get(f"steps {name}") or ()]
        return [one.get("share", 1.0) for one in made]

    def made(self, name: str) -> bool:
        """Whether a point is there."""
        return self.store.get(f"point {name}") is not None

    def disagreement(self, point: Point) -> float:
        """Share of dev rows on which a point says something else than the teacher (scores: 1 - agreement)."""
        return 1 - measure.quality(self.task, point.logits, self.teacher_dev, self.dev_targets)[1]

    def size(self, point: Point) -> int:
        """What grows with a point's cost, as far as is known before it is timed: bytes of its file, or, where these are
        not minimised, its work."""
        return point.bytes if self.job.budget.minimise == "size" else self._work(point)

    def _work(self, point: Point) -> int:
        """What a row's time grows with."""
        return int(self.store.get(f"work {point.name}"))

    def objectives(self, point: Point) -> tuple[float, int]:
        """What the search beyond the ladder makes small."""
        return self.disagreement(point), self.size(point)

    def quality(self, logits: NDArray[np.float32]) -> float:
        """The metric on dev."""
        return float(self.task.quality(self.task.outcomes(logits, self.dev_targets)))

    def judged(self, found: Sequence[Choice], reference: NDArray[np.float32]) -> list[Planned]:
        """How choices would fare in a first look at certify, beside a reference of these logits on dev (n, outputs)."""
        budget, task = self.job.budget, self.task
        margin = task.margin(budget.points, self.quality(reference))
        rows, level = _telling(self.data.certify.rows), (1 - budget.confidence) / 2
        return judged(found, reference, self.dev_targets, task, margin, rows, level)

    def run_tier(self, name: str, engine: str, options: Any) -> TierEngine:
        """The engine of an exported point."""
        tier = Tier(name, engine, "", options)
        return tier_engine(
            tier, self.store.read(f"points/{name}.bin"), self.source.encoder.pad, self.job.options.threads
        )

    def exits(self, name: str, options: Any, network: Exits) -> tuple[list[float], float]:
        """Thresholds of an encoder's exits, from the calibrate rows, and the share of its layers that dev runs."""
        engine = ExitsEngine(
            self.store.read(f"points/{name}.bin"), options, self.source.encoder.pad, self.job.options.threads
        )
        stages = engine.stages(self.source.encoder.cut(self.dev_tokens), 32)
        found = thresholds([stage[self.calibrate] for stage in stages], _EXIT_TOLERANCE)
        depth = len(network.layers())
        return found, float(np.array([*network.after, depth])[leaves(stages, found)].mean() / depth)

    def with_engine(self, point: Point, engine: str) -> Point:
        """The same file under another engine: its own logits on dev."""
        logits = self.run_tier(point.name, engine, point.options).logits(self.dev_tokens, 32)
        return replace(point, engine=engine, logits=logits)
