"""The output of predictions: the input's columns and some more, in any of the formats, all or nothing."""

from __future__ import annotations

import codecs
import csv
import gzip
import io
import json
import math
import sys
from collections.abc import Mapping, Sequence
from contextlib import ExitStack
from pathlib import Path
from types import TracebackType
from typing import Any, BinaryIO, Literal, Protocol, cast

from netweight.data.check import Unusable, cell_text
from netweight.data.files import File, Format, arrow, atomic, file_of, sweep
from netweight.data.rows import Rows
from netweight.data.stream import Chunk, Stream
from netweight.data.table import DelimitedTable, JsonTable, LinesTable, open_table
from netweight.errors import OptionError

_GROUP = 1 << 15  # rows of a parquet row group

Kind = Literal["text", "number"]


class Writer:
    """Writes chunks with added columns; used in a `with` block.

    `out` is a path (format by suffix, as for reading) or '-' for standard output (jsonl for jsonl, tsv for tsv and
    lines, csv for others). A file appears only when the block ends without an error; what killed processes left
    half-written of it is removed when the block begins. `added` names the added columns and whether each holds text or
    numbers; a name that the input already has is refused. A table that begins with a byte order mark, as Excel's do,
    becomes another with one. A parquet input keeps the types of its columns in a parquet output; columns of other
    inputs become strings there.
    Raises OptionError for such a name, a place where no file can be, and an output that would replace the input.
    """

    def __init__(self, out: str | Path, stream: Stream, added: Mapping[str, Kind]) -> None:
        table = stream.table
        clash = [name for name in added if name in table.columns]
        if clash:
            raise OptionError(
                f"{table.name} already has the column(s) {', '.join(clash)}, which the output would add; rename them."
            )
        self._stream, self._added, self.rows, self.bad = stream, dict(added), 0, 0
        self._path = None if str(out) == "-" else Path(out)
        if self._path is None:
            self._format, self._compressed = _like(stream), False
        else:
            file = file_of(self._path)
            self._format, self._compressed = file.format, file.compressed
            placed(self._path)
            source = getattr(table, "file", None)
            if isinstance(source, File):
                _other(self._path, source.path)
        self._stack = ExitStack()

    def __enter__(self) -> Writer:
        if self._path is not None:
            sweep(self._path)
        with ExitStack() as stack:
            raw = sys.stdout.buffer if self._path is None else stack.enter_context(atomic(self._path))
            if self._compressed:
                raw = cast(BinaryIO, stack.enter_context(gzip.GzipFile("", "wb", fileobj=raw, mtime=0)))
            sink = self._sink = self._opened(raw)
            # Closed inside the other contexts: what fails here must keep the atomic file from appearing.
            stack.push(lambda kind, error, at: sink.close(failed=kind is not None))
            self._stack = stack.pop_all()
        return self

    def __exit__(self, kind: type[BaseException] | None, error: BaseException | None, at: TracebackType | None) -> None:
        self._stack.__exit__(kind, error, at)

    def _opened(self, raw: BinaryIO) -> _Sink:
        if self._format == "parquet":
            return _Parquet(raw, self._stream, self._added)
        table = self._stream.table
        columns = (*table.columns, *self._added)
        if self._format == "jsonl":
            return _Json(raw, columns)
        marked = self._path is not None and isinstance(table, DelimitedTable) and table.marked
        return _Delimited(raw, columns, self._format, marked)

    def write(self, chunk: Chunk, values: Mapping[str, Sequence[Any]]) -> None:
        """Append a chunk; `values` has each added column's values for the usable rows, in order. Bad rows get none."""
        if set(values) != set(self._added):
            raise OptionError(f"the output has the added columns {list(self._added)}; given were {list(values)}.")
        columns = [chunk.spread(values[name]) for name in self._added]
        self._sink.write([(*row, *more) for row, more in zip(chunk.rows, zip(*columns, strict=True), strict=True)])
        self.rows += len(chunk)
        self.bad += len(chunk.unusable)


def rows_file(path: str | Path, *sources: str | None) -> File:
    """Where `write_rows` can write. Raises OptionError for another format, a place where no file can be, and one of the
    tables `sources` itself."""
    file = file_of(Path(path))
    if file.format == "parquet" or file.compressed:
        raise OptionError(f"rows are written as .csv, .tsv or .jsonl, not as {file.path.name}.")
    placed(file.path)
    for source in sources:
        if source is not None and Path(source).exists():
            _other(file.path, Path(source))
    return file


def placed(out: Path) -> None:
    """Raises OptionError where no file can be: better known before the work than after it."""
    if not out.parent.is_dir():
        raise OptionError(f"the folder {out.parent} of the output does not exist; create it first.")
    if out.is_dir():
        raise OptionError(f"the output {out} is a folder; name a file.")


def _other(out: Path, source: Path) -> None:
    """Raises OptionError where both are one file: rows that nobody has elsewhere would be gone."""
    if out.exists() and out.samefile(source):
        raise OptionError(f"{out} is the input itself; write the output to another file.")


def write_rows(file: File, rows: Rows, source: str | Path | None = None) -> None:
    """A table of some rows, all or nothing: row (the number in the source), text, pair where there is one, and label,
    empty where there is none. It begins with a byte order mark where the table `source` does."""
    pair = {} if rows.pair is None else {"pair": rows.pair}
    columns = {"row": map(str, rows.number), "text": rows.text, **pair, "label": rows.label or ("",) * len(rows)}
    table = open_table(source) if source is not None and Path(source).exists() else None
    marked = isinstance(table, DelimitedTable) and table.marked
    with atomic(file.path) as raw:
        sink = _Json(raw, [*columns]) if file.format == "jsonl" else _Delimited(raw, [*columns], file.format, marked)
        sink.write(list(zip(*columns.values(), strict=True)))


class _Sink(Protocol):
    def write(self, rows: list[tuple[Any, ...]]) -> None: ...
    def close(self, failed: bool) -> None: ...


class _Delimited:
    def __init__(self, raw: BinaryIO, columns: Sequence[str], form: Format, marked: bool) -> None:
        self._raw, self._delimiter = raw, "\t" if form == "tsv" else ","
        if marked:
            raw.write(codecs.BOM_UTF8)
        self.write([tuple(columns)])

    def write(self, rows: list[tuple[Any, ...]]) -> None:
        text = io.StringIO()
        plain = csv.writer(text, delimiter=self._delimiter, lineterminator="\n")
        # Python before 3.13 leaves a lone carriage return unquoted, and readers take it for the end of the row.
        careful = csv.writer(text, delimiter=self._delimiter, lineterminator="\n", quoting=csv.QUOTE_ALL)
        for row in rows:
            cells = [_flat(cell) or "" for cell in row]
            (careful if any("\r" in cell for cell in cells) else plain).writerow(cells)
        self._raw.write(text.getvalue().encode("utf-8", "backslashreplace"))
        self._raw.flush()

    def close(self, failed: bool) -> None:
        pass


class _Json:
    def __init__(self, raw: BinaryIO, columns: Sequence[str]) -> None:
        self._raw, self._columns = raw, columns

    def write(self, rows: list[tuple[Any, ...]]) -> None:
        for row in rows:
            cells = dict(zip(self._columns, map(_finite, row), strict=True))
            line = json.dumps(cells, ensure_ascii=False, default=_flat, allow_nan=False)
            self._raw.write(line.encode("utf-8", "backslashreplace") + b"\n")
        self._raw.flush()

    def close(self, failed: bool) -> None:
        pass


class _Parquet:
    def __init__(self, raw: BinaryIO, stream: Stream, added: Mapping[str, Kind]) -> None:
        self._pa, parquet = arrow("writing parquet")
        self._typed, self._width = stream.table.schema is not None, len(stream.table.columns)
        text, number = self._pa.string(), self._pa.float64()
        fields = list(stream.table.schema) if self._typed else [(name, text) for name in stream.table.columns]
        fields += [(name, number if kind == "number" else text) for name, kind in added.items()]
        self._schema = self._pa.schema(fields)
        self._writer = parquet.ParquetWriter(raw, self._schema)
        self._waiting: list[tuple[Any, ...]] = []

    def write(self, rows: list[tuple[Any, ...]]) -> None:
        self._waiting += rows
        if len(self._waiting) >= _GROUP:
            self._flush()

    def close(self, failed: bool) -> None:
        try:
            if not failed:
                self._flush()
        finally:
            self._writer.close()

    def _flush(self) -> None:
        if not self._waiting:
            return
        arrays = []
        for i, (field, cells) in enumerate(zip(self._schema, zip(*self._waiting, strict=True), strict=True)):
            plain = i >= self._width or self._typed
            arrays.append(self._pa.array(list(cells) if plain else [_utf8(_flat(c)) for c in cells], field.type))
        self._writer.write_table(self._pa.Table.from_arrays(arrays, schema=self._schema))
        self._waiting = []


def _like(stream: Stream) -> Format:
    """The format for standard output."""
    table = stream.table
    if isinstance(table, LinesTable):
        return "tsv"
    return table.file.format if isinstance(table, DelimitedTable | JsonTable) else "csv"


def _finite(cell: Any) -> Any:
    """JSON has no NaN and no infinity: null, and the text "inf"; in lists and objects too."""
    if isinstance(cell, float) and not math.isfinite(cell):
        return _flat(cell) or None
    if isinstance(cell, dict):
        return {name: _finite(value) for name, value in cell.items()}
    return [_finite(value) for value in cell] if isinstance(cell, list | tuple) else cell


def _flat(cell: object) -> str | None:
    """A cell as text; lists and objects as JSON."""
    if cell is None or isinstance(cell, str):
        return cell
    try:
        return cell_text(cell)
    except Unusable:
        return json.dumps(_finite(cell), ensure_ascii=False, default=str)


def _utf8(text: str | None) -> str | None:
    """Text that parquet takes: half a surrogate pair becomes its escape."""
    return text if text is None or text.isascii() else text.encode("utf-8", "backslashreplace").decode()
