"""Tables in, checked and split rows out: csv, tsv, jsonl, parquet and Hub datasets. Numpy only at import."""

from netweight.data.check import BadRow, Columns, normalise, write_quarantine
from netweight.data.read import Loaded, read
from netweight.data.rows import Dataset, Rows, Sealed, concat
from netweight.data.split import split, without_train
from netweight.data.stream import Chunk, Stream, stream
from netweight.data.write import Writer, rows_file, write_rows

__all__ = [
    "BadRow",
    "Chunk",
    "Columns",
    "Dataset",
    "Loaded",
    "Rows",
    "Sealed",
    "Stream",
    "Writer",
    "concat",
    "normalise",
    "read",
    "rows_file",
    "split",
    "stream",
    "without_train",
    "write_quarantine",
    "write_rows",
]
