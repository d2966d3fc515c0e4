"""What is asked for: tables, budget, options; and the rows that come of it."""

from __future__ import annotations

from collections import Counter
from collections.abc import Sequence
from dataclasses import dataclass, field, replace
from math import inf
from operator import index
from pathlib import Path
from typing import Any, Literal, get_args

from netweight.certify.compare import CLASS_ROWS, GROUPS, require_groups
from netweight.choose import Minimise
from netweight.data import BadRow, Columns, Dataset, Rows, normalise, read, split, without_train
from netweight.data.rows import groups_of
from netweight.data.split import CERTIFY_MOST, CERTIFY_SHARE
from netweight.errors import OptionError
from netweight.model import digests
from netweight.quiet import cores
from netweight.scratch import SCRATCH
from netweight.store import JOURNAL
from netweight.task import Classify, Task, task_for
from netweight.techniques import Finetune, describe
from netweight.trials import Effort

Source = str | Path | Rows
TaskKind = Literal["classify", "score"]
Vocabulary = Literal["trimmed", "whole"]
LEAST = 1.0  # points that "auto" allows at least
MOST = 10.0  # and at most: what needs more is no certificate worth having


def _numbered(options: object, name: str) -> float:
    """A field as Python's own float, which it is from here on: numbers of numpy cannot be written down, and 1, written
    down as it came, would be another question to the certify rows than 1.0."""
    given = getattr(options, name)
    try:
        number = float(given)
    except (TypeError, ValueError, OverflowError):
        raise OptionError(f"{name} is {given!r}; use a number.") from None
    object.__setattr__(options, name, number)
    return number


@dataclass(frozen=True)
class Budget:
    """The one dial, and what to do with it.

    max_drop: points of quality that may be lost (accuracy, macro-F1, Spearman: a point is 0.01; MAE: one percent of the
    reference's error), or "auto": one point, or as many as the certify rows can prove, from what dev shows before any
    certify label is read. confidence: of the certificate. minimise: "cost" (seconds of computing per row in batches),
    "latency" (seconds of a single request, on average) or "size" (bytes).
    """

    max_drop: float | Literal["auto"] = 1.0
    confidence: float = 0.95
    minimise: Minimise = "cost"

    def __post_init__(self) -> None:
        if isinstance(self.max_drop, str):
            if self.max_drop != "auto":
                raise OptionError(f"max_drop is {self.max_drop!r}; use a number of points, or auto.")
        elif not 0 < _numbered(self, "max_drop") <= 50:
            raise OptionError(f"max_drop is {self.max_drop} points; use more than 0 and at most 50.")
        if not 0.5 <= _numbered(self, "confidence") < 1:
            raise OptionError(f"confidence is {self.confidence}; use 0.5 up to, not including, 1 (0.95 is usual).")
        if self.minimise not in ("cost", "latency", "size"):
            raise OptionError(f"minimise is {self.minimise!r}; use cost, latency or size.")

    @property
    def points(self) -> float:
        """The drop that is allowed at least."""
        return LEAST if self.max_drop == "auto" else self.max_drop


@dataclass(frozen=True)
class Tables:
    """Where rows come from: paths, `hf:NAME`, or Rows. Without dev or certify, they are cut from train.

    train: None where all training rows are elsewhere, with the clients of the job's run; dev and certify must then be
    given, and `labels` are those of the rows elsewhere (without them: those of dev).
    """

    train: Source | None
    columns: Columns = field(default_factory=Columns)
    dev: Source | None = None
    certify: Source | None = None
    pool: Source | None = None
    labels: tuple[str, ...] = ()

    def __post_init__(self) -> None:
        if self.train is None and (self.dev is None or self.certify is None):
            raise OptionError(
                "without training rows here, dev and certify cannot be cut from them; give both as tables of their own."
            )
        if self.train is not None and self.labels:
            raise OptionError(
                "labels are those of training rows that are elsewhere, and train is here; leave them out."
            )


@dataclass(frozen=True)
class Options:
    """How a job is done.

    model: `starter`, a folder, a Hub id, or `scratch`: random weights, pretrained on the texts of train and pool.
    metric: None picks one by the balance of the labels. seconds: the time box of this process; training is shortened
    to fit. threads: for training and for every engine. effort: "quick" walks the ladder, "standard" adds a few trials
    with other options, "thorough" many. vocabulary: tiers know all of the model's tokens ("whole"), or those that train
    or pool use and the most common others, and spell the rest ("trimmed"). finetune: makes the teacher, but for
    `scratch`, which has options of its own.
    """

    task: TaskKind = "classify"
    metric: str | None = None
    model: str = "starter"
    max_length: int = 128
    seconds: float = 1200.0
    threads: int = field(default_factory=cores)
    seed: int = 0
    effort: Effort = "quick"
    vocabulary: Vocabulary = "trimmed"
    finetune: Finetune = field(default_factory=Finetune)

    def __post_init__(self) -> None:
        # A path, or numbers of numpy, would stop the job where it is written down, long after they came.
        model = str(self.model)
        if model and Path(model).is_dir() and (plain := str(Path(model))) not in ("starter", SCRATCH):
            model = plain  # base/ is base
        object.__setattr__(self, "model", model)
        for name in ("max_length", "threads", "seed"):
            try:
                object.__setattr__(self, name, index(getattr(self, name)))
            except TypeError:
                raise OptionError(f"{name} is {getattr(self, name)!r}; use a whole number.") from None
        if self.effort not in get_args(Effort):
            raise OptionError(f"effort is {self.effort!r}; use quick, standard or thorough.")
        if self.vocabulary not in get_args(Vocabulary):
            raise OptionError(f"vocabulary is {self.vocabulary!r}; use trimmed or whole.")
        if self.threads < 1:
            raise OptionError(f"threads is {self.threads}; use 1 or more.")
        if self.seed < 0:
            raise OptionError(f"seed is {self.seed}; use 0 or more.")
        if not 10 <= _numbered(self, "seconds") < inf:
            raise OptionError(f"the time limit is {self.seconds:g} s; use at least 10 s, a finite number.")


@dataclass(frozen=True)
class Job:
    """Everything that is asked for. `run` says in words what of the run decides the outcome (rounds, privacy)."""

    tables: Tables
    budget: Budget = field(default_factory=Budget)
    options: Options = field(default_factory=Options)
    run: str = ""

    def __post_init__(self) -> None:
        if self.tables.labels and self.options.task == "score":
            raise OptionError("labels are for classification; scores have none: leave them out.")
        if self.tables.train is None and self.options.model == SCRATCH:
            raise OptionError("a model from scratch learns the words of train, which is not here; use another model.")

    def identity(self, data: Dataset, task: Task) -> dict[str, Any]:
        """What a run store belongs to. The budget may change: the ladder stays, the certificate looks again."""
        usual = self.options.finetune == Finetune()
        return {
            "data": data.fingerprint,
            "task": task.to_dict(),
            "model": self.options.model,
            **digests(self.options.model),
            "max length": self.options.max_length,
            "seed": self.options.seed,
            "vocabulary": self.options.vocabulary,
            **({} if usual else {"teacher": describe((self.options.finetune,))}),
            **({"run": self.run} if self.run else {}),
        }

    @property
    def command(self) -> str:
        """What asks for this, without names of files: those are the shop's own."""
        budget, options = self.budget, self.options
        asked = budget.max_drop if budget.max_drop == "auto" else f"{budget.max_drop:g}"
        given = [f"--max-drop {asked}", f"--confidence {budget.confidence:g}", f"--minimise {budget.minimise}"]
        given += [f"--task {options.task}"] if options.task != "classify" else []
        given += [f"--metric {options.metric}"] if options.metric is not None else []
        given += [f"--time-limit {options.seconds:g}s"] if options.seconds != Options.seconds else []
        given += [f"--model {options.model}"] if options.model in ("starter", SCRATCH) else []
        given += [f"--max-length {options.max_length}"] if options.max_length != Options.max_length else []
        given += [f"--effort {options.effort}"] if options.effort != "quick" else []
        given += [f"--vocabulary {options.vocabulary}"] if options.vocabulary != "trimmed" else []
        command = "optimize TRAIN" if self.tables.train is not None else "federate optimize"
        return f"netweight {command} {' '.join(given)} --seed {options.seed} --threads {options.threads}"


def _testable(task: Task, data: Dataset) -> tuple[Task, str]:
    """Macro-F1 gives way to accuracy where its test would be refused: better said now than after hours of training."""
    if task.metric == "macro-f1" and (few := _too_few(data)):
        return replace(task, metric="accuracy"), f"though labels are not balanced: {few}"
    return task, "by the balance of the labels"


def _refuse_macro_f1(task: Task, data: Dataset, tables: Tables, train: Rows | None) -> None:
    """Raise OptionError where macro-F1 was asked for, and certify will not do for it."""
    if task.metric != "macro-f1" or not (few := _too_few(data)):
        return
    more = "give more labelled rows"
    if tables.certify is not None:
        more = "give certify more rows of them"
    elif train is not None and len(train) * CERTIFY_SHARE >= CERTIFY_MOST:
        more = f"give a certify table of your own (at most {CERTIFY_MOST:,} rows are cut from train)"
    raise OptionError(f"{few}. Merge such labels, {more}, or use --metric accuracy.")


def _too_few(data: Dataset) -> str:
    """Labels with too few certify rows for macro-F1; empty where there are none."""
    few = [f"{label!r} has {count}" for label, count in data.units.items() if count < CLASS_ROWS]
    more = f" and {len(few) - 5:,} labels more have too few" if len(few) > 5 else ""
    more += " (rows of one group count once)" if data.units != data.counts else ""
    said = f"the test of macro-F1 needs {CLASS_ROWS} certify rows of each label, and {', '.join(few[:5])}{more}"
    return said if few else ""


def _unread(task: Task, data: Dataset, budget: Budget) -> tuple[str, ...]:
    """A sentence where who reads no text may pass: accuracy hardly counts rare labels. Of scores only the result can
    say it, which knows the reference."""
    if task.metric != "accuracy":
        return ()
    label, share = data.commonest
    if share < 1 - task.margin(budget.points, 1.0):
        return ()
    least = "at least " if budget.max_drop == "auto" else ""
    return (
        f"Always answering {label!r} loses at most {100 * (1 - share):.2g} points, and {least}{budget.points:g} may be "
        "lost: the certificate cannot tell it from a model. Give a lower --max-drop, or --certify with "
        f"{CLASS_ROWS} rows of each label and --metric macro-f1.",
    )


def _one_sided(rows: Rows) -> tuple[str, ...]:
    """A sentence where pairs come many to one text, as titles to a query, and no group says so. Fewer such texts than a
    test takes groups are kinds of rows rather than what was drawn."""
    if rows.pair is None or rows.group is not None:
        return ()
    if rows.drawn is not None:  # rows that are equal in both are one group already
        rows = rows.take(rows.distinct())
    for name, column in (("text", rows.text), ("pair", rows.pair or ())):
        counts = Counter(map(normalise, column))
        shared = sum(count for count in counts.values() if count > 1)
        if 2 * shared > len(rows) and len(counts) >= GROUPS:
            return (
                f"{shared:,} of {len(rows):,} certify rows share their {name} with another one, and pairs are taken "
                f"for drawn one by one: name its column with --group, so that rows of one {name} count together.",
            )
    return ()


def prepare(job: Job, folder: Path) -> tuple[Dataset, Task, tuple[str, ...], dict[Path, Sequence[BadRow]]]:
    """Read and split the tables. Returns sentences about what was set aside as well, and bad rows by their file in
    `folder`, for who has opened the run store there: until then it may be that of another job. Only where it has no
    journal are they written at once too, so that one can look at them where none was good."""
    tables, notes, fresh = job.tables, [], not (folder / JOURNAL).exists()
    aside: dict[Path, Sequence[BadRow]] = {}

    def rows(name: str, source: Source | None, labelled: bool = True) -> Rows | None:
        if source is None or isinstance(source, Rows):
            return source
        path = folder / f"quarantine-{name}.jsonl"
        loaded = read(source, tables.columns, quarantine=path if fresh else None, label_required=labelled)
        aside[path] = loaded.bad
        if loaded.note:
            notes.append(f"{loaded.note} See {folder.name}/{path.name}.")
        return loaded.rows

    options = job.options
    train, dev, certify = (rows(name, getattr(tables, name)) for name in ("train", "dev", "certify"))
    pool = rows("pool", tables.pool, labelled=False)
    if train is None:
        assert dev is not None  # `Tables` sees to it
        assert certify is not None
        data = without_train(dev, certify, pool, options.task, tables.labels, options.seed)
    else:
        aside[folder / "quarantine-contradictions.jsonl"] = contradictions = list[BadRow]()
        data = split(
            train,
            dev=dev,
            certify=certify,
            pool=pool,
            kind=options.task,
            seed=options.seed,
            aside=contradictions,
        )
    known = data.dev if train is None else data.train
    task = task_for(known.label or (), options.task, options.metric)
    if options.metric is None:
        task, why = _testable(task, data)
        notes.append(f"The metric is {task.metric}, {why}.")
    else:
        _refuse_macro_f1(task, data, tables, train)
    notes += (*_unread(task, data, job.budget), *_one_sided(data.certify.rows))
    require_groups(groups_of(data.certify.rows))
    if tables.labels and isinstance(task, Classify):
        task = replace(task, labels=tables.labels)
    if data.train.weight is not None or data.certify.rows.weight is not None:
        notes.append("Weights of rows count in training only: the certificate and every quality count each row once.")
    return data, task, (*notes, *data.notes), aside
