"""A labelled table in memory: usable rows, and every other row with its number and the reason."""

from __future__ import annotations

from dataclasses import dataclass
from itertools import islice
from pathlib import Path
from typing import Any

from netweight.data.check import BadRow, Check, Columns, Unusable, cell_text, normalise, reasons, write_quarantine
from netweight.data.rows import Rows
from netweight.data.table import Table, open_table
from netweight.errors import DataError

_SAMPLED = 1000
_LABEL_NAMES = ("label", "class", "category", "intent", "sentiment", "stars", "rating", "score", "target", "y")


@dataclass(frozen=True, slots=True)
class Loaded:
    """What reading one table gave; `read` counts its rows, which is len(rows) + len(bad)."""

    name: str
    rows: Rows
    bad: tuple[BadRow, ...]
    read: int

    @property
    def note(self) -> str:
        """A sentence for the summary; empty where every row could be used."""
        if not self.bad:
            return ""
        first = f"the first is row {self.bad[0].number:,}"
        return f"{len(self.bad):,} of {self.read:,} rows of {self.name} cannot be used ({reasons(self.bad)}); {first}."


def read(
    source: str | Path, columns: Columns, *, quarantine: Path | None = None, label_required: bool = True
) -> Loaded:
    """Read a whole table: csv, tsv, jsonl (also .gz), parquet, or `hf:NAME[:CONFIG][@SPLIT]`.

    Rows that cannot be used go to `quarantine` (JSON lines) and into `bad`. Row numbers count from 1 under the
    header. With `label_required` off, labels and weights are not read, and group and slices only where the table
    has them. Raises DataError (file missing, empty, not UTF-8, damaged, without any usable row), ColumnError.
    """
    table = open_table(source)
    if not columns.text or (label_required and columns.label is None):
        raise DataError(ask(table, columns, label_required))
    check = Check(table, columns, optional=not label_required, lean=True)
    good: list[tuple[Any, ...]] = []
    numbers: list[int] = []
    bad: list[BadRow] = []
    for record in check.table.records():
        try:
            good.append(check(record))
            numbers.append(record.number)
        except Unusable as why:
            bad.append(check.bad(record, str(why)))
    if quarantine is not None:
        write_quarantine(quarantine, bad)
    if not good:
        raise DataError(_nothing(table, bad, quarantine))
    return Loaded(table.name, _rows(check.names, good, numbers), tuple(bad), len(good) + len(bad))


def suggest(table: Table) -> Columns:
    """Guess which column holds the text and which the label, from the first 1,000 rows.

    The text is the column with the most characters among those that seldom repeat; the label is a column of few
    distinct values, preferably one with a usual name. Either may stay empty.
    """
    records = [r for r in islice(table.records(), _SAMPLED) if not r.broken]
    columns = {name: [_plain(r.cells[i]) for r in records] for i, name in enumerate(table.columns)}
    size = {name: sum(map(len, cells)) / max(1, len(cells)) for name, cells in columns.items()}
    kinds = {name: len(set(cells) - {""}) for name, cells in columns.items()}
    wordy = [name for name, cells in columns.items() if any(" " in c or not c.isascii() for c in cells)]
    text = max(wordy or columns, key=lambda name: size[name] * min(1.0, 2 * kinds[name] / max(1, len(records))))
    few = [name for name in columns if name != text and 2 <= kinds[name] <= max(2, len(records) // 2)]
    named = [name for name in few if normalise(name) in _LABEL_NAMES]
    usual = min(named, key=lambda name: _LABEL_NAMES.index(normalise(name)), default=None)
    label = usual or min(few, key=lambda name: (size[name], kinds[name]), default=None)
    return Columns(text if size[text] else "", label)


def _plain(cell: object) -> str:
    try:
        return cell_text(cell).strip()
    except Unusable:
        return ""


def ask(table: Table, columns: Columns, label_required: bool) -> str:
    """The text of the error for columns that were not given, with a guess."""
    guess = suggest(table)
    asked = [("text", columns.text, guess.text)]
    if label_required:
        asked.append(("label", columns.label or "", guess.label or ""))
    missing = [(role, found) for role, given, found in asked if not given]
    likely = " and ".join(f"{role} looks like {found!r}" for role, found in missing if found)
    return (
        f"say which column of {table.name} holds the {' and the '.join(role for role, _ in missing)}. "
        f"Its columns are: {', '.join(table.columns)}.{f' The {likely}.' if likely else ''}"
    )


def _nothing(table: Table, bad: list[BadRow], quarantine: Path | None) -> str:
    if not bad:
        return f"{table.name} has columns ({', '.join(table.columns)}) but no rows."
    where = f" See {quarantine}." if quarantine is not None else f" Row {bad[0].number} has {bad[0].cells}."
    return f"none of the {len(bad):,} rows of {table.name} can be used: {reasons(bad)}.{where}"


def _rows(names: tuple[str, ...], good: list[tuple[Any, ...]], numbers: list[int]) -> Rows:
    columns = dict(zip(names, zip(*good, strict=True), strict=True))
    slices = {name.removeprefix("slice "): columns.pop(name) for name in names if name.startswith("slice ")}
    return Rows(**columns, slices=slices, number=tuple(numbers))
