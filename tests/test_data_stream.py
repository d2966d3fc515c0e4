"""Streaming rows to predict and writing them back."""

from __future__ import annotations

import csv
import fcntl
import gzip
import io
import json
import tracemalloc
from pathlib import Path
from types import SimpleNamespace
from typing import Any

import numpy as np
import pyarrow as pa
import pyarrow.parquet as pq
import pytest
from hypothesis import HealthCheck, given, settings
from hypothesis import strategies as st

from netweight.data import Columns, Rows, Writer, rows_file, stream, write_rows
from netweight.data import table as data_table
from netweight.errors import ColumnError, DataError, MissingExtra, OptionError

TEXT = Columns("text")
ADDED = {"prediction": "text", "confidence": "number"}


def table(path: Path, content: str) -> Path:
    path.write_text(content, "utf-8", newline="")
    return path


def predict(source: Path | str, out: Path | str, columns: Columns = TEXT, chunk: int = 2) -> Writer:
    """What the command does, with the length of a text as its prediction."""
    rows = stream(source, columns, chunk)
    with Writer(out, rows, ADDED) as writer:  # type: ignore[arg-type]
        for part in rows:
            sizes = [len(text) for text in part.texts]
            writer.write(part, {"prediction": [str(n) for n in sizes], "confidence": [n / 4 for n in sizes]})
    return writer


def stdin(monkeypatch: pytest.MonkeyPatch, content: bytes) -> None:
    monkeypatch.setattr("sys.stdin", SimpleNamespace(buffer=io.BytesIO(content)))


def test_chunks_keep_order_and_mark_bad_rows(tmp_path: Path) -> None:
    path = table(tmp_path / "a.csv", "id,text,other\n1,a,p\n2, ,q\n3,c,r\n4,d\n5,e,t\n")
    chunks = list(stream(path, Columns("text", pair="other"), 3))
    assert [len(chunk) for chunk in chunks] == [3, 2]
    assert chunks[0].rows == (("1", "a", "p"), ("2", " ", "q"), ("3", "c", "r"))
    assert (chunks[0].texts, chunks[0].pairs) == (("a", "c"), ("p", "r"))
    assert chunks[0].bad.tolist() == [False, True, False]
    assert [(row.number, row.reason) for row in chunks[0].unusable] == [(2, "text is empty")]
    assert chunks[1].rows == (("4", "d", ""), ("5", "e", "t"))
    assert chunks[1].unusable[0].reason == "pair is empty", "cells that lack at the end are blank"
    assert chunks[0].spread([7, 8]) == [7, None, 8]
    with pytest.raises(DataError, match="1 values were given for 2 usable rows"):
        chunks[0].spread([7])


def test_a_stream_can_be_read_twice(tmp_path: Path) -> None:
    rows = stream(table(tmp_path / "a.csv", "text\na\nb\n"), TEXT)
    assert [chunk.texts for chunk in rows] == [chunk.texts for chunk in rows] == [("a", "b")]


def test_csv_keeps_columns_and_bad_rows(tmp_path: Path) -> None:
    path = table(tmp_path / "a.csv", 'id,text\n1,"a, ""b"""\n2,\n3,"c\nd"\n4,e,f\n"torn,g\n6,h\n')
    writer = predict(path, tmp_path / "out.csv")
    with (tmp_path / "out.csv").open(newline="", encoding="utf-8") as lines:
        got = list(csv.reader(lines))
    assert got == [
        ["id", "text", "prediction", "confidence"],
        ["1", 'a, "b"', "6", "1.5"],
        ["2", "", "", ""],
        ["3", "c\nd", "3", "0.75"],
        ["4", "e,f", "", ""],
        ['"torn,g', "", "", ""],
        ["6", "h", "1", "0.25"],
    ]
    assert (writer.rows, writer.bad) == (6, 3)


def test_jsonl_keeps_values(tmp_path: Path) -> None:
    path = table(
        tmp_path / "a.jsonl",
        '{"text":"a","n":1,"deep":{"k":[1,NaN]}}\n{"text":"\\ud83d","n":NaN}\n{broken\n{"text":"中","n":Infinity}\n',
    )
    predict(path, tmp_path / "out.jsonl")
    got = [json.loads(line, parse_constant=pytest.fail) for line in (tmp_path / "out.jsonl").open(encoding="utf-8")]
    assert got == [
        {"text": "a", "n": 1, "deep": {"k": [1, None]}, "prediction": "1", "confidence": 0.25},
        {"text": "\ud83d", "n": None, "deep": None, "prediction": None, "confidence": None},
        {"text": "{broken", "n": "", "deep": "", "prediction": None, "confidence": None},
        {"text": "中", "n": "inf", "deep": None, "prediction": "1", "confidence": 0.25},
    ]
    predict(path, tmp_path / "out.parquet")
    stored = pq.read_table(tmp_path / "out.parquet").to_pylist()
    assert stored[0] == {"text": "a", "n": "1", "deep": '{"k": [1, null]}', "prediction": "1", "confidence": 0.25}
    assert stored[1]["text"] == "\\ud83d"


def test_json_that_is_nested_deep_costs_one_row(tmp_path: Path) -> None:
    """Python reads it, and ran out of stack where it was to be written: the output of all other rows was gone."""

    def row(deep: int) -> str:  # the object and its lists
        return '{"text":"a","n":' + "[" * (deep - 1) + "NaN" + "]" * (deep - 1) + "}\n"

    wide = '{"text":"[[{{' + "[" * 100 + '","n":[' + ",".join(["[{}]"] * 100) + "]}\n"
    path = table(tmp_path / "a.jsonl", row(100) + row(101) + row(600) + wide)
    (chunk,) = stream(path, TEXT)
    assert [(row.number, row.reason) for row in chunk.unusable] == [(n, "JSON nested over 100 deep") for n in (2, 3)]
    for out in ("out.jsonl", "out.csv", "out.parquet"):
        writer = predict(path, tmp_path / out)
        assert (writer.rows, writer.bad) == (4, 2)


@pytest.mark.parametrize(
    ("name", "content", "broken"),
    [
        ("a.csv.gz", "id,text\n1,a\n2,…\n3,c\n", 0),
        ("a.csv.gz", "id,text\r\n1,a\r\n2,b~\r\n3,c\r\n", 0),
        ("a.csv.gz", "text\ra\r…\rc\r", 0),
        ("a.csv.gz", 'id,text\n1,a\n2,"b\n…"\n3,c\n', 1),  # too long within quotes that were open
        ("a.csv.gz", 'id,text\n1,a\n2,"^\n…"\n3,c\n', 1),  # and where their end is looked for
        ("a.jsonl.gz", '{"text":"a"}\n{"text":"…"}\n{"text":"c"}\n', 0),
        ("a.jsonl.gz", '{"text":"a"}\n{"text":"b"}~x\n{"text":"c"}', 0),
        ("a.jsonl.gz", '{"text":"a"}\n~{"text":"b"}\n{"text":"c"}\n', 0),
    ],
)
def test_a_line_without_end_is_not_read_whole(
    tmp_path: Path, monkeypatch: pytest.MonkeyPatch, name: str, content: str, broken: int
) -> None:
    for sign, filling in (("…", "x" * 10_000_000), ("~", " " * 10_000_000), ("^", "x" * 140_000)):
        content = content.replace(sign, filling)
    (tmp_path / name).write_bytes(gzip.compress(content.encode()))
    monkeypatch.setattr(data_table, "_RECORD_LIMIT", 150_000)
    tracemalloc.start()
    try:
        (chunk,) = stream(tmp_path / name, TEXT)
        peak = tracemalloc.get_traced_memory()[1]
    finally:
        tracemalloc.stop()
    assert peak < 5_000_000
    assert chunk.texts == ("a", "c")
    reasons = ["quotes are broken"] * broken + ["line is over 4,000,000 characters"]
    assert [row.reason for row in chunk.unusable] == reasons


def test_a_first_line_without_end_names_no_columns(tmp_path: Path) -> None:
    with pytest.raises(DataError, match="name the columns, but its line is over 4,000,000 characters: 'xxx"):
        stream(table(tmp_path / "a.csv", "x" * 4_000_001), TEXT)


def test_parquet_keeps_types(tmp_path: Path) -> None:
    source = pa.table(
        {
            "text": pa.array(["a", None, "ccc"]),
            "n": pa.array([1, 2, None], pa.int16()),
            "day": pa.array([0, 1, 2], pa.date32()),
            "kind": pa.array(["x", "y", "x"]).dictionary_encode(),
            "vector": pa.array([[1.0], [], None], pa.list_(pa.float32())),
        }
    )
    pq.write_table(source, tmp_path / "a.parquet")
    predict(tmp_path / "a.parquet", tmp_path / "out.parquet")
    got = pq.read_table(tmp_path / "out.parquet")
    assert got.select(source.column_names).equals(source)
    assert got["prediction"].to_pylist() == ["1", None, "3"]
    assert got["confidence"].to_pylist() == [0.25, None, 0.75]
    predict(tmp_path / "a.parquet", tmp_path / "out.csv")
    assert (tmp_path / "out.csv").read_text().splitlines()[1] == "a,1,1970-01-01,x,[1.0],1,0.25"


def test_parquet_row_groups(tmp_path: Path) -> None:
    path = table(tmp_path / "a.csv", "text\n" + "abc\n" * 70_000)
    predict(path, tmp_path / "out.parquet", chunk=1000)
    stored = pq.ParquetFile(tmp_path / "out.parquet")
    assert (stored.metadata.num_rows, stored.metadata.num_row_groups) == (70_000, 3)


@pytest.mark.parametrize("out", ["out.csv", "out.tsv", "out.jsonl", "out.parquet", "out.csv.gz"])
def test_header_only_gives_header_only(tmp_path: Path, out: str) -> None:
    writer = predict(table(tmp_path / "a.csv", "id,text\n"), tmp_path / out)
    assert writer.rows == 0
    if out == "out.csv":
        assert (tmp_path / out).read_text() == "id,text,prediction,confidence\n"


@pytest.mark.parametrize("mark", ["", "\ufeff"])
def test_the_mark_by_which_spreadsheets_know_utf8_is_handed_on(tmp_path: Path, mark: str, capfdbinary: Any) -> None:
    path = table(tmp_path / "a.csv", f"{mark}text\n拉链\n")
    for name in ("out.csv", "out.tsv.gz"):
        predict(path, tmp_path / name)
        data = (tmp_path / name).read_bytes()
        data = gzip.decompress(data) if name.endswith(".gz") else data
        assert data.startswith(f"{mark}text".encode())
        assert [part.texts for part in stream(tmp_path / name, TEXT)] == [("拉链",)]
    write_rows(rows_file(tmp_path / "rows.csv"), Rows(("拉链",)), path)
    assert (tmp_path / "rows.csv").read_bytes() == f"{mark}row,text,label\n1,拉链,\n".encode()
    predict(path, tmp_path / "out.jsonl")
    assert (tmp_path / "out.jsonl").read_bytes().startswith(b"{")
    predict(path, "-")
    assert capfdbinary.readouterr().out.startswith(b"text")


def test_compressed_output_is_the_same_each_time(tmp_path: Path) -> None:
    path = table(tmp_path / "a.tsv", "text\na\n")
    predict(path, tmp_path / "one.tsv.gz")
    predict(path, tmp_path / "two.tsv.gz")
    assert (tmp_path / "one.tsv.gz").read_bytes() == (tmp_path / "two.tsv.gz").read_bytes()
    assert gzip.decompress((tmp_path / "one.tsv.gz").read_bytes()) == b"text\tprediction\tconfidence\na\t1\t0.25\n"


def test_lines_on_standard_input(tmp_path: Path, monkeypatch: pytest.MonkeyPatch, capfdbinary: Any) -> None:
    stdin(monkeypatch, '\ufeffzip, broke\r\n\n"quoted" \u2028 same line\n中'.encode())
    predict("-", "-")
    lines = capfdbinary.readouterr().out.decode().split("\n")
    assert lines[:3] == ["text\tprediction\tconfidence", "zip, broke\t10\t2.5", "\t\t"]
    assert lines[3].startswith('"""quoted"" \u2028 same line"\t')
    assert lines[4:] == ["中\t1\t0.25", ""]


def test_standard_output_takes_the_format_of_the_input(tmp_path: Path, capfdbinary: Any) -> None:
    predict(table(tmp_path / "a.jsonl", '{"text":"a"}\n'), "-")
    assert json.loads(capfdbinary.readouterr().out) == {"text": "a", "prediction": "1", "confidence": 0.25}
    pq.write_table(pa.table({"text": ["a"]}), tmp_path / "a.parquet")
    predict(tmp_path / "a.parquet", "-")
    assert capfdbinary.readouterr().out == b"text,prediction,confidence\na,1,0.25\n"


def test_standard_input_must_be_utf8(monkeypatch: pytest.MonkeyPatch) -> None:
    stdin(monkeypatch, b"fine\nabc\xff\n")
    with pytest.raises(DataError, match="line 2 of standard input is not UTF-8 at its byte 3; pipe it through iconv"):
        list(stream("-", TEXT))
    with pytest.raises(ColumnError, match="standard input has no column 'review'"):
        stream("-", Columns("review"))


cells = st.text(st.characters(exclude_categories=["Cs"]), max_size=6) | st.sampled_from(
    ["a\rb", "\r", '"', "\n", ",", "\t", "\x00"]
)


@settings(suppress_health_check=[HealthCheck.function_scoped_fixture], deadline=None, max_examples=60)
@given(
    st.lists(st.tuples(cells, cells), min_size=1, max_size=7),
    st.sampled_from(["csv", "tsv", "jsonl", "parquet", "csv.gz"]),
    st.integers(1, 4),
)
def test_what_is_written_reads_back_the_same(
    tmp_path: Path, rows: list[tuple[str, str]], suffix: str, chunk: int
) -> None:
    source = tmp_path / "in.jsonl"
    source.write_text("".join(json.dumps({"text": a, "more": b}) + "\n" for a, b in rows))
    writer = predict(source, tmp_path / f"out.{suffix}", chunk=chunk)
    back = [row for part in stream(tmp_path / f"out.{suffix}", TEXT) for row in part.rows]
    assert [row[:2] for row in back] == rows
    assert [row[2] or None for row in back] == [str(len(a)) if a.strip() else None for a, _ in rows]
    assert (writer.rows, writer.bad) == (len(rows), sum(not a.strip() for a, _ in rows))


@pytest.mark.parametrize("out", ["out.csv", "out.jsonl.gz", "out.parquet"])
def test_nothing_appears_when_predicting_fails(tmp_path: Path, out: str) -> None:
    path = table(tmp_path / "a.csv", "text\na\nb\n")
    table(tmp_path / out, "before")
    rows = stream(path, TEXT)

    def fail() -> None:
        with Writer(tmp_path / out, rows, {"n": "text"}) as writer:
            for part in rows:
                writer.write(part, {"n": ["1", "2"]})
            raise KeyboardInterrupt

    with pytest.raises(KeyboardInterrupt):
        fail()
    assert sorted(p.name for p in tmp_path.iterdir()) == ["a.csv", out]
    assert (tmp_path / out).read_text() == "before"


def test_what_a_killed_process_left_of_the_output_is_removed_by_the_next(tmp_path: Path) -> None:
    path = table(tmp_path / "a.csv", "text\na\n")
    left = table(tmp_path / ".out.csv.1-deadbeef.part", "text,pred")
    others = [tmp_path / name for name in (".other.csv.1-deadbeef.part", ".out.csv.mine.part", "out.csv.part")]
    for other in others:
        table(other, "text")
    going = table(tmp_path / ".out.csv.2-deadbeef.part", "text,pred")
    with going.open("ab") as held:
        fcntl.flock(held, fcntl.LOCK_EX)
        predict(path, tmp_path / "out.csv")
        assert not left.exists()
        assert going.exists(), "another process writes it"
    predict(path, tmp_path / "out.csv")
    assert sorted(tmp_path.iterdir()) == sorted([path, tmp_path / "out.csv", *others])


def test_two_processes_may_write_one_output(tmp_path: Path) -> None:
    rows = stream(table(tmp_path / "a.csv", "text\na\n"), TEXT)
    with Writer(tmp_path / "out.csv", rows, {"n": "text"}) as first:
        predict(tmp_path / "a.csv", tmp_path / "out.csv")
        first.write(next(iter(rows)), {"n": ["last"]})
    assert (tmp_path / "out.csv").read_text() == "text,n\na,last\n"
    assert sorted(p.name for p in tmp_path.iterdir()) == ["a.csv", "out.csv"]


def test_a_value_that_parquet_cannot_take_leaves_nothing(tmp_path: Path) -> None:
    rows = stream(table(tmp_path / "a.csv", "text\na\n"), TEXT)

    def fail() -> None:
        with Writer(tmp_path / "out.parquet", rows, {"n": "number"}) as writer:
            writer.write(next(iter(rows)), {"n": ["not a number"]})

    with pytest.raises(pa.ArrowInvalid):
        fail()
    assert [p.name for p in tmp_path.iterdir()] == ["a.csv"]


def test_writer_errors(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    path = table(tmp_path / "a.csv", "text,prediction\na,b\n")
    rows = stream(path, TEXT)
    with pytest.raises(OptionError, match="a.csv already has the column.s. prediction, which the output would add"):
        Writer(tmp_path / "out.csv", rows, {"prediction": "text"})
    with pytest.raises(OptionError, match="the folder .*new of the output does not exist; create it first"):
        Writer(tmp_path / "new" / "out.csv", rows, {"n": "text"})
    with pytest.raises(OptionError, match="a.csv is the input itself; write the output to another file"):
        Writer(path, rows, {"n": "text"})
    with pytest.raises(DataError, match="none of the suffixes"):
        Writer(tmp_path / "out.xlsx", rows, {"n": "text"})
    with (
        Writer(tmp_path / "out.csv", rows, {"n": "text"}) as writer,
        pytest.raises(OptionError, match="given were .'m'."),
    ):
        writer.write(next(iter(rows)), {"m": ["1"]})
    monkeypatch.setitem(__import__("sys").modules, "pyarrow", None)
    with (
        pytest.raises(MissingExtra, match="writing parquet needs pyarrow: pip install pyarrow"),
        Writer(tmp_path / "o.parquet", rows, {}),
    ):
        pass


def test_stream_errors(tmp_path: Path) -> None:
    path = table(tmp_path / "a.csv", "review,id\nthe zip broke,1\n")
    with pytest.raises(OptionError, match="label, group, weight, slices do not apply"):
        stream(path, Columns("review", "id"))
    with pytest.raises(OptionError, match="at least 1 row, not 0"):
        stream(path, Columns("review"), 0)
    with pytest.raises(DataError, match="say which column of a.csv holds the text. .* The text looks like 'review'"):
        stream(path, Columns())
    with pytest.raises(ColumnError, match="no column 'reviews'"):
        stream(path, Columns("reviews"))


def test_numpy_values_are_written_as_numbers(tmp_path: Path) -> None:
    rows = stream(table(tmp_path / "a.csv", "text\na\n"), TEXT)
    with Writer(tmp_path / "out.csv", rows, {"n": "number"}) as writer:
        writer.write(next(iter(rows)), {"n": np.array([0.5], np.float32)})
    assert (tmp_path / "out.csv").read_text() == "text,n\na,0.5\n"


@pytest.mark.parametrize(("suffix", "out"), [("csv", "jsonl"), ("jsonl", "csv"), ("csv.gz", "tsv"), ("parquet", "csv")])
def test_memory_does_not_grow_with_rows(tmp_path: Path, suffix: str, out: str) -> None:
    def peak(rows: int) -> int:
        texts = [f"the zip of parcel {i} broke" for i in range(rows)]
        source = tmp_path / f"in{rows}.{suffix}"
        if suffix == "parquet":
            pq.write_table(pa.table({"text": texts}), source, row_group_size=rows)
        elif suffix == "jsonl":
            source.write_text("".join(json.dumps({"text": text}) + "\n" for text in texts))
        else:
            with gzip.open(source, "wt") if suffix.endswith("gz") else source.open("w") as lines:
                lines.write("text\n" + "\n".join(texts))
        del texts
        tracemalloc.start()
        predict(source, tmp_path / f"out.{out}", chunk=256)
        most = tracemalloc.get_traced_memory()[1]
        tracemalloc.stop()
        return most

    peak(100)  # what is imported or built on first use is not the rows' memory
    assert peak(16_000) < 1_000_000  # holding all rows takes 2.5 MB and more
