"""Rows to predict, a chunk at a time, in constant memory."""

from __future__ import annotations

from collections.abc import Iterator, Sequence
from dataclasses import dataclass
from itertools import islice
from pathlib import Path
from typing import Any, TypeVar

import numpy as np
from numpy.typing import NDArray

from netweight.data.check import BadRow, Check, Columns, Unusable
from netweight.data.read import ask
from netweight.data.table import Record, Table, open_table
from netweight.errors import DataError, OptionError

T = TypeVar("T")


@dataclass(frozen=True)
class Chunk:
    """Some rows in their order.

    `rows` holds the cells of every row, one for each column of the source; `texts` and `pairs` hold those of the
    usable rows only; `bad` (n,) marks the others and `unusable` says why.
    """

    rows: tuple[tuple[Any, ...], ...]
    texts: tuple[str, ...]
    pairs: tuple[str, ...] | None
    bad: NDArray[np.bool_]
    unusable: tuple[BadRow, ...]

    def __len__(self) -> int:
        return len(self.rows)

    def spread(self, values: Sequence[T]) -> list[T | None]:
        """Values of the usable rows, in their places; None for the others."""
        if len(values) != len(self.texts):
            raise DataError(f"{len(values)} values were given for {len(self.texts)} usable rows; give one for each.")
        rest = iter(values)
        return [None if bad else next(rest) for bad in self.bad.tolist()]


@dataclass(frozen=True)
class Stream:
    """An iterable of chunks; over a file it can be iterated again. `table` is what a Writer copies columns from."""

    table: Table
    columns: Columns
    chunk: int

    def __iter__(self) -> Iterator[Chunk]:
        check = Check(self.table, self.columns, optional=True)
        records = self.table.records()
        while block := list(islice(records, self.chunk)):
            yield self._chunk(check, block)

    def _chunk(self, check: Check, block: list[Record]) -> Chunk:
        bad = np.zeros(len(block), bool)
        good, unusable = [], []
        for i, record in enumerate(block):
            try:
                good.append(check(record))
            except Unusable as why:
                bad[i] = True
                unusable.append(check.bad(record, str(why)))
        width = len(self.table.columns)
        rows = tuple([_aligned(r.cells, width) if len(r.cells) != width else r.cells for r in block])
        pairs = tuple([cells[1] for cells in good]) if self.columns.pair is not None else None
        return Chunk(rows, tuple([cells[0] for cells in good]), pairs, bad, tuple(unusable))


def stream(source: str | Path, columns: Columns, chunk: int = 1024) -> Stream:
    """Chunks of at most `chunk` rows of a table, a Hub dataset, or '-' (lines on standard input, column `text`).

    Only `text` and `pair` of `columns` apply. A row that cannot be used stays in its chunk, marked as bad; a line
    that cannot be read keeps its raw text, or the beginning of what is too long, in the first column. Raises DataError,
    ColumnError, OptionError.
    """
    if columns != Columns(columns.text, pair=columns.pair):
        raise OptionError("rows to predict have a text and perhaps a pair; label, group, weight, slices do not apply.")
    if chunk < 1:
        raise OptionError(f"a chunk has at least 1 row, not {chunk}.")
    table = open_table(source)
    if not columns.text:
        raise DataError(ask(table, columns, label_required=False))
    Check(table, columns, optional=True)  # a wrong column name is an error now, not at the first chunk
    return Stream(table, columns, chunk)


def _aligned(cells: tuple[Any, ...], width: int) -> tuple[Any, ...]:
    """A broken line in `width` cells: missing ones are empty, surplus ones stay in the last, joined by commas."""
    if len(cells) < width:
        return cells + ("",) * (width - len(cells))
    return (*cells[: width - 1], ",".join(map(str, cells[width - 1 :])))
