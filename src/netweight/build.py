"""From rungs to points: train, export, run on dev. Whatever is finished is in the run store and never done twice."""

from __future__ import annotations

import hashlib
import time
from collections.abc import Callable
from dataclasses import dataclass, replace
from functools import cached_property
from typing import Any

import numpy as np
from numpy.typing import NDArray

from netweight.artifact import Tier
from netweight.certify import fit_temperature
from netweight.data import Dataset
from netweight.encode import Tokens
from netweight.engine.base import TierEngine
from netweight.engine.cascade import tier_engine
from netweight.export import export
from netweight.job import Job
from netweight.model import Model, pretrained
from netweight.run import Local
from netweight.run.local import logits_of
from netweight.scratch import SCRATCH, scratch
from netweight.search import Point, Rung
from netweight.store import Store
from netweight.task import Task
from netweight.techniques import Finetune, Pretrain, Recipe
from netweight.train import Plan, Reporter

TEACHER = "teacher"
PRETRAINED = "pretrained"
_TEACHER_SHARE = 0.45  # of the time box
_PRETRAINED_SHARE = 0.6  # of the teacher's, where there is nothing to start from
# Random weights stand steps ten times as long as pretrained ones; the time box cuts the epochs to what fits.
_FROM_SCRATCH = Pretrain(epochs=40, learning_rate=1e-3), Finetune(learning_rate=5e-4)


class Clock:
    """The time box of one process."""

    def __init__(self, seconds: float) -> None:
        self._end = time.monotonic() + seconds

    @property
    def left(self) -> float:
        """Seconds; negative when it is over."""
        return self._end - time.monotonic()


@dataclass
class Builder:
    """Makes models and points of one job."""

    job: Job
    data: Dataset
    task: Task
    store: Store
    reporter: Reporter
    clock: Clock

    def __post_init__(self) -> None:
        self._run = Local(self.data, self.store.folder / "work")
        self._models: dict[str, Model] = {}

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
                TEACHER, lambda: self.model(PRETRAINED, self._scratch, (first,), part), (then,), seconds - part
            )
        base = lambda: pretrained(options.model, self.task, options.max_length, options.seed)  # noqa: E731
        return self.model(TEACHER, base, (Finetune(),), seconds)

    def _scratch(self) -> Model:
        """A model that knows the words of train and pool, and nothing else."""
        rows = [self.data.train, *([self.data.pool] if self.data.pool is not None else [])]
        texts = [text for part in rows for text in (*part.text, *(part.pair or ()))]
        return scratch(texts, self.task, max_length=self.job.options.max_length, seed=self.job.options.seed)

    @cached_property
    def teacher_dev(self) -> NDArray[np.float32]:
        """The teacher's logits on dev, in fp32."""
        if self.store.get("teacher dev") is None:
            self.store.write_arrays("teacher-dev", {"logits": self.teacher_logits(self.dev_tokens)})
            self.store.put("teacher dev", True)
        return self.store.read_arrays("teacher-dev")["logits"]

    def teacher_logits(self, tokens: Tokens) -> NDArray[np.float32]:
        """What the teacher says of encoded rows (n, outputs)."""
        return logits_of(self.teacher, tokens).numpy()

    @cached_property
    def dev_tokens(self) -> Tokens:
        """Dev, encoded once."""
        return self.teacher.encoder.encode(self.data.dev.text, self.data.dev.pair)

    def model(self, name: str, base: Callable[[], Model], recipe: Recipe, seconds: float) -> Model:
        """The model of a recipe: from the store, or made now and kept there."""
        folder = self.store.model_folder(name)
        if self.store.get(f"model {name}") is not None:
            return Model.load(folder)
        began = time.monotonic()
        plan = Plan(seed=self.job.options.seed, seconds=max(seconds, 1.0), reporter=self.reporter)
        model = base()
        for step in recipe:
            model = step(model, self._run, plan)
        self.store.discard(name)
        model.save(folder)
        # What every later run loads is what was saved, whether this process was killed or not.
        model = Model.load(folder)
        self.store.put(f"model {name}", {"digest": model.digest, "seconds": round(time.monotonic() - began, 1)})
        return model

    def point(self, rung: Rung) -> Point:
        """The rung's point: from the store, or made now."""
        name = rung.name
        known = self.store.get(f"point {name}")
        if known is None:
            model = self.model(name, lambda: self.teacher, rung.recipe, self.clock.left * rung.share)
            exported = export(model)
            self.store.write(f"points/{name}.bin", exported.data)
            engine = self.run_tier(name, exported.kind, exported.options)
            logits = engine.logits(self.dev_tokens, 32)
            temperature = 1.0
            if self.task.confident:
                part = self.calibrate
                temperature = fit_temperature(logits[part], self.dev_targets[part], self.task)
            self.store.write_arrays(f"points/{name}", {"logits": logits})
            known = {
                "engine": exported.kind,
                "options": exported.options,
                "file": hashlib.sha256(exported.data).hexdigest(),
                "bytes": len(exported.data),
                "temperature": temperature,
            }
            self.store.put(f"point {name}", known)
        point = Point(name, **known, logits=self.store.read_arrays(f"points/{name}")["logits"])
        self.reporter.note(
            f"{name}: {self.task.metric} {self.quality(point.logits):.4f} on dev, {point.bytes / 1e6:.1f} MB"
        )
        return point

    def told(self, rungs: tuple[Rung, ...]) -> list[Point]:
        """The points that an earlier process finished."""
        return [self.point(rung) for rung in rungs if self.store.get(f"point {rung.name}") is not None]

    def quality(self, logits: NDArray[np.float32]) -> float:
        """The metric on dev."""
        return float(self.task.quality(self.task.outcomes(logits, self.dev_targets)))

    def run_tier(self, name: str, engine: str, options: Any) -> TierEngine:
        """The engine of an exported point."""
        tier = Tier(name, engine, "", options)
        return tier_engine(
            tier, self.store.read(f"points/{name}.bin"), self.teacher.encoder.pad, self.job.options.threads
        )

    def with_engine(self, point: Point, engine: str) -> Point:
        """The same file under another engine: its own logits on dev."""
        logits = self.run_tier(point.name, engine, point.options).logits(self.dev_tokens, 32)
        return replace(point, engine=engine, logits=logits)
