"""Artifacts over several scenarios: data sets, product domains, languages. The worst cell is what a user will meet."""

from __future__ import annotations

import json
import math
import tomllib
from collections.abc import Sequence
from dataclasses import asdict, dataclass
from pathlib import Path

import numpy as np

from netweight.data import Columns, Loaded, Rows, read
from netweight.engine import Engine, load
from netweight.errors import LabelError, OptionError
from netweight.report.format import quality

_KEYS = {"name", "data", "text", "label", "pair", "by"}


@dataclass(frozen=True)
class Scenario:
    """A named table of labelled rows; with `by`, a scenario for each value of that column (a product domain, say)."""

    name: str
    data: str
    text: str = "text"
    label: str = "label"
    pair: str | None = None
    by: str | None = None


@dataclass(frozen=True)
class Cell:
    """Quality of one artifact in one scenario; NaN for a correlation with scores that are all equal, and where a
    `problem` kept the artifact from being scored. A macro-F1 is the mean over the labels that the scenario's rows have.
    """

    artifact: str
    scenario: str
    rows: int
    quality: float
    problem: str = ""


@dataclass(frozen=True)
class Evaluation:
    """All cells, artifact by artifact; higher quality is better (for MAE it is the negative error)."""

    metric: str
    cells: tuple[Cell, ...]
    notes: tuple[str, ...] = ()

    @property
    def worst(self) -> Cell | None:
        """The cell with the lowest quality; None where no cell has one."""
        return min(_defined(self.cells), key=lambda cell: cell.quality, default=None)

    @property
    def failed(self) -> int:
        """Cells that could not be scored; `notes` say why."""
        return sum(bool(cell.problem) for cell in self.cells)

    def to_json(self) -> str:
        """All of it."""
        worst = None if self.worst is None else asdict(self.worst)
        cells = [asdict(c) | ({"quality": None} if math.isnan(c.quality) else {}) for c in self.cells]
        return json.dumps(
            {"metric": self.metric, "cells": cells, "worst": worst, "notes": list(self.notes)},
            indent=1,
            allow_nan=False,
        )

    def rows(self) -> list[list[str]]:
        """A matrix for people: scenarios down, artifacts across, then each artifact's mean and worst."""
        names = list(dict.fromkeys(cell.artifact for cell in self.cells))
        by = {(cell.artifact, cell.scenario): cell for cell in self.cells}
        short = [Path(name).name for name in names]
        lines = [[self.metric, "rows", *(short if len(set(short)) == len(short) else names)]]
        for scenario in dict.fromkeys(cell.scenario for cell in self.cells):
            across = [by[name, scenario] for name in names]
            lines.append([scenario, f"{across[0].rows:,}", *(quality(self.metric, cell.quality) for cell in across)])
        every = [[cell.quality for cell in _defined(self.cells) if cell.artifact == name] for name in names]
        lines.append(["mean", "", *(quality(self.metric, sum(q) / len(q) if q else math.nan) for q in every)])
        lines.append(["worst", "", *(quality(self.metric, min(q, default=math.nan)) for q in every)])
        return lines

    @property
    def sentence(self) -> str:
        """Where it is worst, and how many cells could not be scored."""
        cell, missing = self.worst, f"{self.failed:,} of {len(self.cells):,} cells could not be scored, see the notes"
        if cell is None:
            why = missing if self.failed else "in each scenario all scores are equal"
            return f"worst: none, {self.metric} is undefined everywhere: {why}"
        shown = quality(self.metric, cell.quality)
        said = f"worst: {cell.artifact} on {cell.scenario}, {self.metric} {shown} on {cell.rows:,} rows"
        return f"{said}; {missing}" if self.failed else said


def _defined(cells: Sequence[Cell]) -> list[Cell]:
    return [cell for cell in cells if not math.isnan(cell.quality)]


def suite(path: Path) -> tuple[Scenario, ...]:
    """Read a suite: TOML with one `[[scenario]]` each (name, data, and optionally text, label, pair, by); tables
    are found from the file's folder. Raises OptionError."""
    try:
        given = tomllib.loads(path.read_text(encoding="utf-8")).get("scenario")
    except (OSError, UnicodeDecodeError, tomllib.TOMLDecodeError) as problem:
        raise OptionError(f"the suite {path} cannot be read: {problem}") from None
    if not isinstance(given, list) or not given:
        raise OptionError(f"the suite {path} has no [[scenario]]; each needs a name and data.")
    found = []
    for i, entry in enumerate(given, 1):
        if not isinstance(entry, dict):
            raise OptionError(f"scenario {i} of {path} is {entry!r}; write [[scenario]], and name and data below it.")
        unknown = sorted(set(entry) - _KEYS)
        if unknown or not {"name", "data"} <= set(entry) or not all(isinstance(v, str) for v in entry.values()):
            what = f"has unknown {', '.join(unknown)}" if unknown else "needs name and data, as texts"
            raise OptionError(f"scenario {i} of {path} {what}; known are {', '.join(sorted(_KEYS))}.")
        data = entry["data"] if entry["data"].startswith("hf:") else str(path.parent / entry["data"])
        found.append(Scenario(**entry | {"data": data}))
    names = [scenario.name for scenario in found]
    if len(set(names)) < len(names):
        raise OptionError(f"the suite {path} has two scenarios of one name; give each its own.")
    return tuple(found)


def evaluate(folders: Sequence[Path], scenarios: Sequence[Scenario], threads: int | None = None) -> Evaluation:
    """Quality of every artifact in every scenario, without those that an artifact cannot be scored on: those have a
    `problem`. Raises OptionError where the artifacts have different metrics."""
    engines = {str(folder): load(folder, threads) for folder in folders}
    metrics = {engine.task.metric for engine in engines.values()}
    if len(metrics) != 1:
        raise OptionError(f"artifacts with one metric can be compared; these have {' and '.join(sorted(metrics))}.")
    cells, notes = [], []
    # All are read before the first is scored: one that cannot be read ends all, and scores may take an hour.
    for scenario, loaded in [(scenario, _read(scenario)) for scenario in scenarios]:
        notes += [loaded.note] if loaded.note else []
        for title, rows in _parts(scenario, loaded.rows):
            for name, engine in engines.items():
                scored, problem = math.nan, ""
                try:
                    scored = _quality(engine, rows.text, rows.pair, rows.label or ())
                except (LabelError, OptionError) as refused:
                    problem = str(refused)
                    notes.append(f"{name} on {title}: {problem}")
                cells.append(Cell(name, title, len(rows), scored, problem))
    order = {name: i for i, name in enumerate(engines)}
    return Evaluation(metrics.pop(), tuple(sorted(cells, key=lambda cell: order[cell.artifact])), tuple(notes))


def _read(scenario: Scenario) -> Loaded:
    slices = (scenario.by,) if scenario.by else ()
    return read(scenario.data, Columns(scenario.text, scenario.label, scenario.pair, slices=slices))


def _parts(scenario: Scenario, rows: Rows) -> list[tuple[str, Rows]]:
    """The rows of a scenario, or of each value of its column."""
    if not scenario.by:
        return [(scenario.name, rows)]
    parts: dict[str, list[int]] = {}
    for i, value in enumerate(rows.slices[scenario.by]):
        parts.setdefault(value, []).append(i)
    return [(f"{scenario.name}, {value}", rows.take(parts[value])) for value in sorted(parts)]


def _quality(engine: Engine, text: Sequence[str], pair: Sequence[str] | None, label: Sequence[str]) -> float:
    targets = engine.task.targets(tuple(label))
    if engine.task.metric == "spearman" and (targets == targets[0]).all():
        return math.nan  # nothing to be in line with
    outcomes = engine.task.outcomes(engine.outputs(text, pair).logits, targets)
    found = float(engine.task.quality(outcomes))
    if engine.task.metric == "macro-f1":
        # A label that is only predicted has an F1 of 0: one such row would halve the mean of a shop with one label.
        found *= len(np.unique(outcomes)) / len(np.unique(outcomes[:, 1]))
    return found
