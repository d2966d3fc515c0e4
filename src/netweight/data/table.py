"""A table is a name, its columns, and an iterator over its records; one class for each place it can be stored in."""

from __future__ import annotations

import codecs
import csv
import json
import sys
from collections import Counter, deque
from collections.abc import Collection, Iterable, Iterator
from dataclasses import dataclass, replace
from pathlib import Path
from typing import Any, NamedTuple, Protocol, TextIO

from netweight.data.files import File, arrow, existing, opened_text
from netweight.data.hub import load_hub
from netweight.errors import DataError

BROKEN_QUOTES = "quotes are broken"
WRONG_CELLS = "wrong number of cells"
NOT_JSON = "not a JSON object"
_DEEPEST = 100  # lists and objects of a line in one another; what walks through many more runs out of Python's stack
TOO_DEEP = f"JSON nested over {_DEEPEST} deep"
CELL_LIMIT = 100_000
CELL_TOO_LONG = f"cell over {CELL_LIMIT:,} characters"
# Of a line; and how far to look for the end of a quoted cell longer than Python's csv reads (131,072 characters).
_RECORD_LIMIT = 4_000_000
LINE_TOO_LONG = f"line is over {_RECORD_LIMIT:,} characters"
_BATCH = 1024


class Record(NamedTuple):
    """One row: its number from 1, its cells, and, where it cannot be read, why (`cells` then holds what was there)."""

    number: int
    cells: tuple[Any, ...]
    broken: str = ""


class Table(Protocol):
    """What reading and streaming need. `records` may be called again, except for standard input."""

    @property
    def name(self) -> str: ...
    @property
    def columns(self) -> tuple[str, ...]: ...
    @property
    def schema(self) -> Any: ...  # of pyarrow, where the source has one
    def records(self) -> Iterator[Record]: ...
    def only(self, columns: Collection[str]) -> Table:
        """The same rows for who needs no other columns: without them where they are stored apart, else with them."""


def open_table(source: str | Path) -> Table:
    """A file (format by suffix), '-' for lines on standard input, or `hf:NAME[:CONFIG][@SPLIT]` from the Hub.

    Raises DataError for a source that is missing, empty, of another format, or not readable as a whole.
    """
    given: Any = source
    if not isinstance(given, str | Path):
        raise DataError(
            f"a table is read from a path or from hf:NAME, and what came is of type {type(given).__name__}; pass one "
            "of these, or, for training, Rows of its columns, such as Rows(df['text'], df['label'])."
        )
    if source == "-":
        return LinesTable()
    if isinstance(source, str) and source.startswith("hf:"):
        return HubTable(source, load_hub(source))
    file = existing(Path(source))
    if file.format == "parquet":
        return _parquet(file)
    return _jsonl(file) if file.format == "jsonl" else _delimited(file)


@dataclass(frozen=True)
class DelimitedTable:
    """csv or tsv, read by Python's csv: cells may be quoted and hold line breaks. Blank lines are no rows.

    `marked` says whether the file begins with a byte order mark, by which Excel knows UTF-8.
    """

    file: File
    columns: tuple[str, ...]
    marked: bool = False
    schema: Any = None

    @property
    def name(self) -> str:
        return self.file.path.name

    def records(self) -> Iterator[Record]:
        """Broken rows are given as such; reading goes on with the line after their first. Cells that lack at the end
        of a row are empty: Excel leaves the delimiters out where its last columns are blank."""
        width, number = len(self.columns), 0
        with opened_text(self.file, newline="") as text:
            parsed = _parsed(text, _delimiter(self.file))
            next(_filled(parsed))
            for cells, broken in parsed if width == 1 else _filled(parsed):
                number += 1
                if not broken and len(cells) > width:
                    broken = WRONG_CELLS
                missing = () if broken else ("",) * (width - len(cells))
                yield Record(number, (*cells, *missing), broken)

    def only(self, columns: Collection[str]) -> Table:
        return self


@dataclass(frozen=True)
class JsonTable:
    """One JSON object a line; a key that an object lacks reads as None. Blank lines are no rows."""

    file: File
    columns: tuple[str, ...]
    schema: Any = None

    @property
    def name(self) -> str:
        return self.file.path.name

    def records(self) -> Iterator[Record]:
        for number, (line, row, broken) in enumerate(_objects(self.file), 1):
            if broken:
                yield Record(number, (line.rstrip("\r\n"),), broken)
            else:
                yield Record(number, tuple([row.get(column) for column in self.columns]))

    def only(self, columns: Collection[str]) -> Table:
        return self


@dataclass(frozen=True)
class LinesTable:
    """Lines of plain text on standard input, as the column `text`; a blank line is a row, so that outputs line up."""

    name: str = "standard input"
    columns: tuple[str, ...] = ("text",)
    schema: Any = None

    def records(self) -> Iterator[Record]:
        for number, line in enumerate(sys.stdin.buffer, 1):
            try:
                text = line.decode("utf-8-sig" if number == 1 else "utf-8").rstrip("\r\n")
            except UnicodeDecodeError as error:
                raise DataError(
                    f"line {number} of standard input is not UTF-8 at its byte {error.start}; "
                    "pipe it through iconv -t utf-8 -f ENCODING first."
                ) from None
            yield Record(number, (text,))

    def only(self, columns: Collection[str]) -> Table:
        return self


@dataclass(frozen=True)
class ParquetTable:
    """A parquet file, a batch of rows at a time."""

    file: File
    schema: Any

    @property
    def name(self) -> str:
        return self.file.path.name

    @property
    def columns(self) -> tuple[str, ...]:
        return tuple(self.schema.names)

    def records(self) -> Iterator[Record]:
        pa, parquet = arrow("reading parquet")
        number = 0
        try:
            with parquet.ParquetFile(self.file.path) as stored:
                for batch in stored.iter_batches(_BATCH, columns=list(self.columns)):
                    columns = [self._cells(batch, name) for name in self.columns]
                    for cells in zip(*columns, strict=True):
                        number += 1
                        yield Record(number, cells)
        except (pa.ArrowException, OSError, UnicodeDecodeError) as error:
            raise DataError(f"{self.name} is damaged after row {number:,}: {error}. Write or copy it again.") from None

    def _cells(self, batch: Any, name: str) -> list[Any]:
        try:
            # By name: to pyarrow the column a.b may also be the field b of another.
            cells: list[Any] = batch.column(name).to_pylist()
        except UnicodeDecodeError:  # of a damaged file
            raise
        except (ValueError, OverflowError, KeyError) as error:  # years past 9999, nanoseconds, zones that are not known
            raise DataError(
                f"the column {name!r} of {self.name} has a value that cannot be read as a date ({error}); leave the "
                "column out, or cast it to text."
            ) from None
        return cells

    def only(self, columns: Collection[str]) -> Table:
        pa, _ = arrow("reading parquet")
        return replace(self, schema=pa.schema([field for field in self.schema if field.name in columns]))


@dataclass(frozen=True)
class HubTable:
    """A dataset of the Hugging Face Hub; class numbers are given as the names that the dataset has for them."""

    name: str
    rows: Any

    @property
    def columns(self) -> tuple[str, ...]:
        return tuple(self.rows.column_names)

    @property
    def schema(self) -> Any:
        return None

    def records(self) -> Iterator[Record]:
        features = [self.rows.features[column] for column in self.columns]
        names = [getattr(feature, "names", None) for feature in features]
        number = 0
        for batch in self.rows.iter(_BATCH):
            columns = [_named(batch[c], n) for c, n in zip(self.columns, names, strict=True)]
            for cells in zip(*columns, strict=True):
                number += 1
                yield Record(number, cells)

    def only(self, columns: Collection[str]) -> Table:
        return replace(self, rows=self.rows.select_columns([name for name in self.columns if name in columns]))


def _named(values: list[Any], names: list[str] | None) -> list[Any]:
    """Class names for class numbers; the Hub marks an unlabelled row with -1."""
    return values if names is None else [None if v is None or v < 0 else names[v] for v in values]


def _parquet(file: File) -> ParquetTable:
    pa, parquet = arrow("reading parquet")
    try:
        schema = parquet.read_schema(file.path)
    except (pa.ArrowException, OSError) as error:
        raise DataError(f"{file.path.name} is not a parquet file, or is damaged: {error}.") from None
    _distinct(schema.names, file.path.name)
    return ParquetTable(file, schema)


def _delimited(file: File) -> DelimitedTable:
    name = file.path.name
    with opened_text(file, newline="") as text:
        header, broken = next(_filled(_parsed(text, _delimiter(file))), ([], ""))
        with file.open() as raw:
            marked = raw.read(3) == codecs.BOM_UTF8
    if broken:
        raise DataError(f"the first line of {name} must name the columns, but its {broken}: {header[0][:80]!r}.")
    if not header:
        raise DataError(f"{name} is empty; its first line must name the columns.")
    if file.format == "csv" and len(header) == 1 and "\t" in header[0]:
        raise DataError(
            f"the cells of {name} stand between tabs, not commas: rename it to .tsv. It begins {header[0]!r}."
        )
    # Excel writes empty names behind the others once a cell there has been touched.
    header = [cell or f"column {i}" for i, cell in enumerate(header, 1)]
    _distinct(header, name)
    return DelimitedTable(file, tuple(header), marked)


def _jsonl(file: File) -> JsonTable:
    # A key may turn up in any line, so they are all read once before the first row is handed out.
    columns: dict[str, None] = {}
    first = None
    for line, row, _ in _objects(file):
        first = first or line
        columns.update(dict.fromkeys(row))
    if first is None:
        raise DataError(f"{file.path.name} is empty; each line must be a JSON object.")
    if not columns:
        raise DataError(f"no line of {file.path.name} is a JSON object with columns; it begins {first[:60]!r}.")
    return JsonTable(file, tuple(columns))


def _objects(file: File) -> Iterator[tuple[str, dict[str, Any], str]]:
    """Each line that is not blank, its object and "", or an empty one and why it cannot be read."""
    with opened_text(file, newline="\n") as text:
        for line in _lines(text):
            if len(line) > _RECORD_LIMIT:
                yield line, {}, LINE_TOO_LONG
                continue
            if not line.strip():
                continue
            try:
                row = json.loads(line)
            except (ValueError, RecursionError):
                row = None
            if not isinstance(row, dict):
                yield line, {}, NOT_JSON
            elif line.count("{") + line.count("[") > _DEEPEST and _too_deep(row):  # few lines have so many
                yield line, {}, TOO_DEEP
            else:
                yield line, row, ""


def _too_deep(row: dict[str, Any]) -> bool:
    level: list[Any] = [row]
    for _ in range(_DEEPEST):
        inner = (cell.values() if isinstance(cell, dict) else cell for cell in level)
        level = [cell for cells in inner for cell in cells if isinstance(cell, dict | list)]
    return bool(level)


def _distinct(names: Iterable[str], table: str) -> None:
    twice = sorted(name for name, count in Counter(names).items() if count > 1)
    if twice:
        raise DataError(f"{table} has more than one column named {', '.join(map(repr, twice))}; rename them.")


def _delimiter(file: File) -> str:
    return "\t" if file.format == "tsv" else ","


def _filled(parsed: Iterator[tuple[list[str], str]]) -> Iterator[tuple[list[str], str]]:
    """Without blank lines."""
    return ((cells, broken) for cells, broken in parsed if broken or (cells and cells != [""]))


def _lines(text: TextIO) -> Iterator[str]:
    """Of a line over `_RECORD_LIMIT` only the beginning, still over it: what a small .gz holds may have gigabytes."""
    while line := text.readline(_RECORD_LIMIT + 1):
        yield line
        while len(line) > _RECORD_LIMIT and not line.endswith("\n"):
            line = text.readline(_RECORD_LIMIT + 1)


class _Lines:
    """The lines of a text, of which some can be given back. Raises csv.Error after it took one that is too long."""

    def __init__(self, text: TextIO) -> None:
        self._text, self._back = _lines(text), deque[str]()
        self.taken: list[str] = []

    def __iter__(self) -> Iterator[str]:
        return self

    def __next__(self) -> str:
        line = self._back.popleft() if self._back else next(self._text)
        self.taken.append(line)
        if len(line) > _RECORD_LIMIT:
            raise csv.Error(LINE_TOO_LONG)
        return line

    def keep(self, count: int) -> str:
        """The first `count` lines taken; the others are given back."""
        self._back.extendleft(reversed(self.taken[count:]))
        kept = "".join(self.taken[:count])
        self.taken = []
        return kept

    def close_quote(self) -> bool:
        """Take lines until quotes are balanced; False where that does not happen within `_RECORD_LIMIT`."""
        quotes, size = sum(line.count('"') for line in self.taken), sum(map(len, self.taken))
        while quotes % 2 and size < _RECORD_LIMIT:
            try:
                line = next(self)
            except (StopIteration, csv.Error):
                return False
            quotes, size = quotes + line.count('"'), size + len(line)
        return quotes % 2 == 0


def _parsed(text: TextIO, delimiter: str) -> Iterator[tuple[list[str], str]]:
    """The cells of each record and "", or its raw text and why it cannot be read.

    A quote that is never closed would swallow all rows up to the next quote, so only its first line is given up.
    """
    lines = _Lines(text)
    while True:
        try:
            for cells in csv.reader(lines, delimiter=delimiter, strict=True):
                yield cells, ""
                lines.taken.clear()
            return
        except csv.Error as error:
            if "field limit" in str(error) and lines.close_quote():
                yield [lines.keep(len(lines.taken)).rstrip("\r\n")], CELL_TOO_LONG
            else:
                line = lines.keep(1)
                yield [line.rstrip("\r\n")], LINE_TOO_LONG if len(line) > _RECORD_LIMIT else BROKEN_QUOTES
