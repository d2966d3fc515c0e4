"""From a table's records to usable rows: conversion of cells, and the reasons why a row cannot be used."""

from __future__ import annotations

import json
import math
import re
import unicodedata
from collections import Counter
from collections.abc import Callable, Iterable, Sequence
from dataclasses import dataclass
from pathlib import Path
from typing import Any

import numpy as np

from netweight.data.files import atomic
from netweight.data.table import CELL_LIMIT, CELL_TOO_LONG, Record, Table
from netweight.errors import ColumnError, OptionError

_SHOWN = 200  # characters of a cell that the quarantine file keeps
_MISSING = ("NAType", "NaTType")  # pandas' own, which need not be installed
# What other tools write for a value that is missing: pandas, MySQL (the client and INTO OUTFILE), Excel. A label may be
# called none or NA, and a text may say null; these are not taken for missing.
_NO_TEXT = ("NULL", "\\N")
_NO_LABEL = ("nan", "null", "\\n", "<na>", "#n/a")
# Characters that nobody sees: Unicode's category Cf (zero-width, directions, byte order mark, ...), and selectors of a
# character's looks.
_UNSEEN = re.compile(
    r"[\xad\u0600-\u0605\u061c\u06dd\u070f\u0890\u0891\u08e2\u180e\u200b-\u200f\u202a-\u202e\u2060-\u2064\u2066-\u206f"
    r"\ufe00-\ufe0f\ufeff\ufff9-\ufffb\U000110bd\U000110cd\U00013430-\U0001343f\U0001bca0-\U0001bca3"
    r"\U0001d173-\U0001d17a\U000e0001\U000e0020-\U000e007f\U000e0100-\U000e01ef]+"
)


@dataclass(frozen=True, slots=True)
class Columns:
    """Which column of a table plays which part. An empty `text` asks for a suggestion in the error.

    `group` names rows that belong together (a customer, a product): a group never spans splits.
    `slices` are further columns by which the report breaks quality down; one name will do.
    """

    text: str = ""
    label: str | None = None
    pair: str | None = None
    group: str | None = None
    weight: str | None = None
    slices: tuple[str, ...] = ()

    def __post_init__(self) -> None:
        used = [name for name in (self.text, self.label, self.pair, self.weight) if name]
        if len(set(used)) < len(used):
            raise OptionError(f"text, label, pair and weight must be different columns; given were {', '.join(used)}.")
        given: Any = self.slices
        object.__setattr__(self, "slices", tuple(dict.fromkeys((given,) if isinstance(given, str) else given)))


@dataclass(frozen=True, slots=True)
class BadRow:
    """A row that cannot be used: its number in the source, why, and its cells, shortened."""

    number: int
    reason: str
    cells: dict[str, str]


class Unusable(Exception):
    """Why one row cannot be used; never leaves this package."""


class Check:
    """Turns records of one table into tuples of the wanted cells, in the order of `names`.

    Raises ColumnError for a column that the table lacks. With `optional`, columns other than text and pair
    are used where the table has them and labels and weights are not read (a pool, or rows to predict). With `lean`,
    the records are those of `table`, which is without the columns that nobody wants: one of embeddings would be
    decoded to a Python number for each of its values.
    """

    def __init__(self, table: Table, columns: Columns, *, optional: bool = False, lean: bool = False) -> None:
        wanted: list[tuple[str, str | None, Callable[[Any], Any]]] = [
            ("text", columns.text, lambda cell: _required(cell, "text is empty")),
            ("pair", columns.pair, lambda cell: _required(cell, "pair is empty")),
            ("label", None if optional else columns.label, cell_label),
            ("weight", None if optional else columns.weight, cell_weight),
            ("group", columns.group, lambda cell: cell_text(cell).strip()),
        ]
        wanted += [(f"slice {name}", name, lambda cell: cell_text(cell).strip()) for name in columns.slices]
        for role, column, _ in wanted:
            if column is not None and column not in table.columns and (role in ("text", "pair") or not optional):
                raise ColumnError(column, table.columns, table.name)
        self.table = table.only([c for _, c, _ in wanted if c in table.columns]) if lean else table
        there = self.table.columns
        parts = [(role, there.index(c), convert) for role, c, convert in wanted if c in there]
        self.names = tuple(role for role, _, _ in parts)
        self._parts = [(index, convert) for _, index, convert in parts]

    def __call__(self, record: Record) -> tuple[Any, ...]:
        """The wanted cells; Unusable says why not."""
        if record.broken:
            raise Unusable(record.broken)
        return tuple([convert(record.cells[index]) for index, convert in self._parts])

    def bad(self, record: Record, reason: str) -> BadRow:
        """The record for the quarantine file."""
        shown = [_shown(cell) for cell in record.cells]
        whole = len(shown) == len(self.table.columns) and not record.broken
        names: Iterable[str] = self.table.columns if whole else (f"cell {i}" for i in range(1, len(shown) + 1))
        return BadRow(record.number, reason, dict(zip(names, shown, strict=True)))


def cell_text(cell: object) -> str:
    """A cell as text: None, NaN and pandas' own are "", True is "true", 1 is "1", 1.0 is "1.0", dates are ISO 8601.

    Raises Unusable for lists, objects and bytes, for a cell that is too long, and for half a surrogate pair,
    which no tokenizer takes.
    """
    if isinstance(cell, np.generic):
        cell = cell.item()
    if not isinstance(cell, str):
        if cell is None or (isinstance(cell, float) and math.isnan(cell)) or type(cell).__name__ in _MISSING:
            return ""
        if isinstance(cell, bool):
            return "true" if cell else "false"
        if isinstance(cell, list | dict | tuple | bytes):
            raise Unusable("cell is not text")
        return cell.isoformat() if hasattr(cell, "isoformat") else str(cell)
    if len(cell) > CELL_LIMIT:
        raise Unusable(CELL_TOO_LONG)
    if not cell.isascii():
        try:
            cell.encode()
        except UnicodeEncodeError:
            raise Unusable("text has half a surrogate pair") from None
    return cell


def _required(cell: object, reason: str) -> str:
    text = cell_text(cell)
    if not text or text.isspace() or text in _NO_TEXT:
        raise Unusable(reason)
    return text


def cell_label(cell: object) -> str:
    """A cell as a label. Raises Unusable where there is none."""
    label = cell_text(cell).strip()
    if not label or label.lower() in _NO_LABEL:
        raise Unusable("label is missing")
    return label


def alike(labels: Iterable[str], known: Iterable[str]) -> str:
    """A sentence where one of the labels is a known one that is written otherwise, as 1 and 1.0: tools write whole
    numbers as fractions where one of the column is missing."""
    spelled = {spelling(label): label for label in sorted(known)}
    twin = next(((label, spelled[form]) for label in labels if (form := spelling(label)) in spelled), None)
    return f" {twin[0]!r} and {twin[1]!r} look like one label: write it alike everywhere." if twin else ""


def spelling(label: str) -> float | str:
    """What labels share that may be one: as numbers their value, else the form in which texts are compared."""
    try:
        return float(label)
    except ValueError:
        return normalise(label)


def normalise(text: str) -> str:
    """The form in which texts are compared: without characters that nobody sees, NFKC, case folded, white space
    collapsed and stripped."""
    if not text.isascii():
        text = _UNSEEN.sub("", text)
        # Folding can leave composable characters behind, so the form is taken again (Unicode 3.13, D146).
        text = unicodedata.normalize("NFKC", unicodedata.normalize("NFKC", text).casefold())
    return " ".join(text.casefold().split())


def cell_weight(cell: object) -> float:
    """A cell as a weight. Raises Unusable for anything but a number of at least 0."""
    try:
        weight = float(cell_text(cell))
    except ValueError:
        weight = math.nan
    if not (math.isfinite(weight) and weight >= 0):
        raise Unusable("weight is not a number of at least 0")
    return weight


def _shown(cell: object) -> str:
    text = "" if cell is None else cell if isinstance(cell, str) else str(cell)
    return text if len(text) <= _SHOWN else f"{text[:_SHOWN]}... ({len(text):,} characters)"


def write_quarantine(path: Path, bad: Sequence[BadRow]) -> None:
    """Rows that were set aside, one JSON object a line, all or nothing. Without any, an older file is removed."""
    if not bad:
        path.unlink(missing_ok=True)
        return
    path.parent.mkdir(parents=True, exist_ok=True)
    with atomic(path) as out:
        for row in bad:
            line = json.dumps({"row": row.number, "reason": row.reason, "columns": row.cells}, ensure_ascii=False)
            # backslashreplace writes half a surrogate pair as the JSON escape of itself.
            out.write(line.encode("utf-8", "backslashreplace") + b"\n")


def reasons(bad: Sequence[BadRow]) -> str:
    """ "12 text is empty, 3 label is missing", the most frequent first."""
    return ", ".join(f"{count:,} {reason}" for reason, count in Counter(row.reason for row in bad).most_common())
