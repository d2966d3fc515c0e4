"""Artifacts over several scenarios: data sets, product domains, languages. The worst cell is what a user will meet."""

from __future__ import annotations

import json
import tomllib
from collections.abc import Sequence
from dataclasses import asdict, dataclass
from pathlib import Path

from netweight.data import Columns, Rows, read
from netweight.engine import Engine, load
from netweight.errors import OptionError

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
    """Quality of one artifact in one scenario."""

    artifact: str
    scenario: str
    rows: int
    quality: float


@dataclass(frozen=True)
class Evaluation:
    """All cells, artifact by artifact; higher quality is better (for MAE it is the negative error)."""

    metric: str
    cells: tuple[Cell, ...]

    @property
    def worst(self) -> Cell:
        """The cell with the lowest quality."""
        return min(self.cells, key=lambda cell: cell.quality)

    def to_json(self) -> str:
        """All of it."""
        return json.dumps(
            {"metric": self.metric, "cells": [asdict(c) for c in self.cells], "worst": asdict(self.worst)}, indent=1
        )

    def rows(self) -> list[list[str]]:
        """A matrix for people: scenarios down, artifacts across, then each artifact's mean and worst."""
        names = list(dict.fromkeys(cell.artifact for cell in self.cells))
        by = {(cell.artifact, cell.scenario): cell for cell in self.cells}
        lines = [[self.metric, "rows", *names]]
        for scenario in dict.fromkeys(cell.scenario for cell in self.cells):
            across = [by[name, scenario] for name in names]
            lines.append([scenario, f"{across[0].rows:,}", *(f"{100 * cell.quality:.2f}" for cell in across)])
        every = [[cell.quality for cell in self.cells if cell.artifact == name] for name in names]
        lines.append(["mean", "", *(f"{100 * sum(q) / len(q):.2f}" for q in every)])
        lines.append(["worst", "", *(f"{100 * min(q):.2f}" for q in every)])
        return lines

    @property
    def sentence(self) -> str:
        """Where it is worst."""
        cell = self.worst
        return (
            f"worst: {cell.artifact} on {cell.scenario}, {self.metric} {100 * cell.quality:.2f} on {cell.rows:,} rows"
        )


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
    """Quality of every artifact in every scenario. Raises OptionError where the artifacts have different metrics."""
    engines = {str(folder): load(folder, threads) for folder in folders}
    metrics = {engine.task.metric for engine in engines.values()}
    if len(metrics) != 1:
        raise OptionError(f"artifacts with one metric can be compared; these have {' and '.join(sorted(metrics))}.")
    cells = []
    for scenario in scenarios:
        for title, rows in _parts(scenario):
            for name, engine in engines.items():
                cells.append(Cell(name, title, len(rows), _quality(engine, rows.text, rows.pair, rows.label or ())))
    order = {name: i for i, name in enumerate(engines)}
    return Evaluation(metrics.pop(), tuple(sorted(cells, key=lambda cell: order[cell.artifact])))


def _parts(scenario: Scenario) -> list[tuple[str, Rows]]:
    """The rows of a scenario, or of each value of its column."""
    slices = (scenario.by,) if scenario.by else ()
    rows = read(scenario.data, Columns(scenario.text, scenario.label, scenario.pair, slices=slices)).rows
    if not scenario.by:
        return [(scenario.name, rows)]
    values = rows.slices[scenario.by]
    return [
        (f"{scenario.name}, {value}", rows.take([i for i, at in enumerate(values) if at == value]))
        for value in sorted(set(values))
    ]


def _quality(engine: Engine, text: Sequence[str], pair: Sequence[str] | None, label: Sequence[str]) -> float:
    out = engine.outputs(text, pair)
    return float(engine.task.quality(engine.task.outcomes(out.logits, engine.task.targets(tuple(label)))))
