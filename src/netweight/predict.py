"""A table in, the same table with predictions out, in constant memory."""

from __future__ import annotations

import time
from collections.abc import Callable, Mapping, Sequence
from dataclasses import dataclass
from pathlib import Path
from typing import Any

from netweight.data import Columns, Stream, Writer, stream
from netweight.data.write import Kind
from netweight.engine import Engine, load
from netweight.engine.cascade import expect
from netweight.errors import OptionError
from netweight.task import Classify

_CHUNK = 4096


@dataclass(frozen=True)
class Predicted:
    """What was done."""

    rows: int
    bad: int
    seconds: float

    @property
    def sentence(self) -> str:
        """For people."""
        bad = f" {self.bad:,} rows could not be used and have no prediction." if self.bad else ""
        return f"{self.rows:,} rows in {self.seconds:.1f} s ({self.rows / max(self.seconds, 1e-9):,.0f} rows/s).{bad}"


def predict(
    folder: str | Path,
    source: str | Path,
    *,
    text: str = "text",
    pair: str | None = None,
    out: str | Path = "-",
    threads: int | None = None,
    progress: Callable[[int], None] = lambda rows: None,
) -> Predicted:
    """Add the columns prediction, confidence (labels only) and tier to the rows of `source`.

    Formats by suffix: csv, tsv, jsonl (also .gz), parquet; '-' reads lines and writes to standard output. A row that
    cannot be used gets no prediction. `progress` is told how many rows are done. Raises DataError, ColumnError,
    OptionError, ArtifactError.
    """
    rows = opened_rows(source, text, pair)
    return answered(load(folder, threads), rows, out, progress)


def opened_rows(source: str | Path, text: str, pair: str | None) -> Stream:
    """The rows to predict, in chunks. Raises DataError, ColumnError, OptionError."""
    if source == "-" and text != "text":
        raise OptionError(f"lines on standard input have no columns, and so none called {text!r}; leave text out.")
    return stream(source, Columns("text" if source == "-" else text, pair=pair), _CHUNK)


def answered(
    engine: Engine, rows: Stream, out: str | Path, progress: Callable[[int], None] = lambda rows: None
) -> Predicted:
    """Write rows with what `engine` says of them. Raises OptionError, and DataError while reading."""
    expect(engine.paired, rows.columns.pair is not None, engine.name)  # before anything is written
    labels = isinstance(engine.task, Classify)
    added: dict[str, Kind] = {"prediction": "text" if labels else "number", "confidence": "number", "tier": "text"}
    if not labels:
        del added["confidence"]
    began = time.monotonic()
    with Writer(out, rows, added) as writer:
        for chunk in rows:
            writer.write(chunk, _columns(engine, chunk.texts, chunk.pairs))
            progress(writer.rows)
    return Predicted(writer.rows, writer.bad, time.monotonic() - began)


def _columns(engine: Engine, texts: Sequence[str], pairs: Sequence[str] | None) -> Mapping[str, Sequence[Any]]:
    said = engine.outputs(texts, pairs)
    names = [tier.name for tier in engine.tiers]
    tiers = [names[i] for i in said.tier.tolist()]
    task = engine.task
    if not isinstance(task, Classify):
        return {"prediction": task.values(said.logits).tolist(), "tier": tiers}
    predicted = [task.labels[i] for i in said.logits.argmax(axis=1).tolist()]
    return {"prediction": predicted, "confidence": said.confidence.round(4).tolist(), "tier": tiers}
