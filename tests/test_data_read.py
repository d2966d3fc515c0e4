"""Reading tables: formats, conversions, the quarantine, and every message about a file that cannot be used."""

from __future__ import annotations

import csv
import gzip
import json
import stat
import subprocess
from collections.abc import Callable
from pathlib import Path
from types import SimpleNamespace
from typing import Any

import pyarrow as pa
import pyarrow.parquet as pq
import pytest
from hypothesis import HealthCheck, given, settings
from hypothesis import strategies as st

from netweight.data import Columns, Loaded, Rows, read, split
from netweight.data import files as data_files
from netweight.data import table as data_table
from netweight.data.check import alike
from netweight.data.read import suggest
from netweight.data.table import open_table
from netweight.errors import ColumnError, DataError, LabelError, MissingExtra, OptionError
from netweight.task import Classify

COLUMNS = Columns("text", "label")
ROWS = [("zip broke, after a week", "bad"), ('says "great"\nand is', "good"), ("拉链坏了", "bad")]


def write(path: Path, rows: list[tuple[Any, ...]], columns: tuple[str, ...] = ("text", "label")) -> Path:
    """A table in the format of the suffix, by other code than ours."""
    opener: Callable[..., Any] = gzip.open if path.suffix == ".gz" else open
    suffix = path.name.removesuffix(".gz").rsplit(".", 1)[1]
    if suffix == "parquet":
        pq.write_table(
            pa.table({name: list(cells) for name, cells in zip(columns, zip(*rows, strict=True), strict=True)}), path
        )
        return path
    with opener(path, "wt", encoding="utf-8", newline="") as out:
        if suffix == "jsonl":
            out.writelines(json.dumps(dict(zip(columns, row, strict=True))) + "\n" for row in rows)
        else:
            csv.writer(out, delimiter="\t" if suffix == "tsv" else ",").writerows([columns, *rows])
    return path


def text_file(tmp_path: Path, content: str | bytes, name: str = "reviews.csv") -> Path:
    path = tmp_path / name
    path.write_bytes(content.encode() if isinstance(content, str) else content)
    return path


def reasons(loaded: Loaded) -> list[tuple[int, str]]:
    return [(row.number, row.reason) for row in loaded.bad]


@pytest.mark.parametrize(
    "name", ["a.csv", "a.tsv", "a.jsonl", "a.parquet", "a.csv.gz", "a.tsv.gz", "a.jsonl.gz", "A.CSV"]
)
def test_every_format_gives_the_same_rows(tmp_path: Path, name: str) -> None:
    loaded = read(write(tmp_path / name, ROWS), COLUMNS)
    assert loaded.rows.text == tuple(text for text, _ in ROWS)
    assert loaded.rows.label == ("bad", "good", "bad")
    assert loaded.rows.number == (1, 2, 3)
    assert (loaded.read, loaded.bad, loaded.note) == (3, (), "")


def test_every_role_of_a_column(tmp_path: Path) -> None:
    rows = [("a", "x", "p", "c1", 2, "s"), ("b", " y ", "q", "", 0.5, None)]
    path = write(tmp_path / "a.jsonl", rows, ("t", "l", "p", "g", "w", "category"))
    loaded = read(path, Columns("t", "l", pair="p", group="g", weight="w", slices=("category", "g")))
    got = loaded.rows
    assert (got.text, got.label, got.pair, got.group, got.weight) == (
        ("a", "b"), ("x", "y"), ("p", "q"), ("c1", ""), (2.0, 0.5),
    )  # fmt: skip
    assert got.slices == {"category": ("s", ""), "g": ("c1", "")}


@pytest.mark.parametrize("suffix", ["jsonl", "parquet"])
@pytest.mark.parametrize(
    ("cells", "expected"),
    [
        ((1, 2), ("1", "2")),
        ((1.0, 2.5), ("1.0", "2.5")),
        ((True, False), ("true", "false")),
        (("01", "1e3"), ("01", "1e3")),
    ],
)
def test_values_that_are_not_text(
    tmp_path: Path, suffix: str, cells: tuple[Any, ...], expected: tuple[str, ...]
) -> None:
    path = write(tmp_path / f"a.{suffix}", [("a", cells[0]), ("b", cells[1])])
    assert read(path, COLUMNS).rows.label == expected


def test_a_label_that_is_written_otherwise_is_named() -> None:
    """A column of whole numbers in which one is missing comes as fractions from other tools."""
    assert alike(("3", "1"), ("1.0", "2.0")) == " '1' and '1.0' look like one label: write it alike everywhere."
    assert alike(("3", "x"), ("1.0", "y")) == ""
    with pytest.raises(LabelError, match=r"do not occur in training: '1'\. '1' and '1\.0' look like one label"):
        Classify(("1.0", "2.0")).targets(("1", "2.0"))
    rows = Rows(tuple(f"text {i}" for i in range(40)), ("1.0", "2.0") * 20)
    dev, certify = (Rows(tuple(f"{name} {i}" for i in range(40)), ("1", "2") * 20) for name in ("dev", "certify"))
    assert alike(("x", "Out\u00a0of  STOCK"), ("out of stock", "y")).startswith(
        r" 'Out\xa0of  STOCK' and 'out of stock' look"
    )
    with pytest.raises(LabelError, match=r"Add such rows to train, or remove them from dev\. '1' and '1\.0' look like"):
        split(rows, dev=dev, certify=certify)


def test_a_slice_that_is_named_twice_is_one() -> None:
    assert Columns("text", "label", slices=("a", "b", "a")).slices == ("a", "b")
    assert Columns("text", "label", slices="shop").slices == ("shop",)  # type: ignore[arg-type]


def test_byte_order_mark_blank_lines_and_old_line_ends(tmp_path: Path) -> None:
    path = text_file(tmp_path, "\ufefftext,label\r\n\r\na,x\r\n  \r\nb,y\r\n\r\n")
    assert read(path, COLUMNS).rows.text == ("a", "b")
    assert read(text_file(tmp_path, "text,label\ra,x\rb,y\r"), COLUMNS).rows.text == ("a", "b")
    assert read(text_file(tmp_path, '\ufeff{"text":"a","label":1}\r\n\r\n', "a.jsonl"), COLUMNS).rows.label == ("1",)


def test_a_line_of_a_single_column_may_be_blank(tmp_path: Path) -> None:
    loaded = read(text_file(tmp_path, "text\na\n\nb\n"), Columns("text"), label_required=False)
    assert (loaded.rows.text, reasons(loaded)) == (("a", "b"), [(2, "text is empty")])


def test_bad_rows_are_quarantined_with_number_and_reason(tmp_path: Path) -> None:
    big = "x" * 1_000_000
    content = f'text,label,w\na,x,1\n   ,x,1\nb,,1\nc,NaN,1\nd\ne,x,1,1\nf,x,heavy\ng,x,-1\n{big},x,1\n"{big}\n{big}",x,1\nh,x,2\n'
    quarantine = tmp_path / "new" / "bad.jsonl"
    loaded = read(text_file(tmp_path, content), Columns("text", "label", weight="w"), quarantine=quarantine)
    assert loaded.rows.text == ("a", "h")
    assert loaded.rows.number == (1, 11)
    assert reasons(loaded) == [
        (2, "text is empty"),
        (3, "label is missing"),
        (4, "label is missing"),
        (5, "label is missing"),
        (6, "wrong number of cells"),
        (7, "weight is not a number of at least 0"),
        (8, "weight is not a number of at least 0"),
        (9, "cell over 100,000 characters"),
        (10, "cell over 100,000 characters"),
    ]
    assert loaded.read == 11
    assert loaded.note.startswith("9 of 11 rows of reviews.csv cannot be used (3 label is missing, ")
    assert loaded.note.endswith("the first is row 2.")
    lines = [json.loads(line) for line in quarantine.read_text("utf-8").splitlines()]
    assert [line["row"] for line in lines] == list(range(2, 11))
    assert lines[1] == {"row": 3, "reason": "label is missing", "columns": {"text": "b", "label": "", "w": "1"}}
    assert lines[4]["columns"] == {"cell 1": "e", "cell 2": "x", "cell 3": "1", "cell 4": "1"}
    assert lines[8]["columns"]["cell 1"].endswith("... (2,000,007 characters)")
    assert quarantine.stat().st_size < 3000
    read(write(tmp_path / "fine.csv", ROWS), COLUMNS, quarantine=quarantine)
    assert not quarantine.exists()


def test_a_long_cell_within_the_limit_is_kept(tmp_path: Path) -> None:
    loaded = read(write(tmp_path / "a.csv", [("x" * 100_000, "a"), ("y" * 100_001, "a")]), COLUMNS)
    assert (len(loaded.rows.text[0]), reasons(loaded)) == (100_000, [(2, "cell over 100,000 characters")])


def test_bad_json_rows(tmp_path: Path) -> None:
    content = (
        '{"text":"a","label":"x"}\n{"text":"b"}\n{"text":NaN,"label":"x"}\n{"text":null,"label":"x"}\n{"text":"c",\n[1]\n'
        '{"text":["d"],"label":"x"}\n{"text":"\\ud83d","label":"x"}\n{"text":"e","label":"y","more":{"k":1}}\n'
        + "["
        * 100_000
    )
    quarantine = tmp_path / "bad.jsonl"
    loaded = read(text_file(tmp_path, content, "a.jsonl"), COLUMNS, quarantine=quarantine)
    assert loaded.rows.text == ("a", "e")
    assert reasons(loaded) == [
        (2, "label is missing"),
        (3, "text is empty"),
        (4, "text is empty"),
        (5, "not a JSON object"),
        (6, "not a JSON object"),
        (7, "cell is not text"),
        (8, "text has half a surrogate pair"),
        (10, "not a JSON object"),
    ]
    assert '"\\ud83d"' in quarantine.read_text("utf-8")
    assert json.loads(quarantine.read_text("utf-8").splitlines()[6])["columns"]["text"] == "\ud83d"


@pytest.mark.parametrize(
    ("lines", "expected"),
    [
        # A quote that is never closed costs its own line and no other.
        (['"zip broke,x', "fine,y", "nice,x"], ["fine", "nice"]),
        (['"zip broke,x', "fine,y", '"nice",x'], ["fine", "nice"]),
        (['"great" product,x', "fine,y"], ["fine"]),
        (["fine,y", '"torn,x'], ["fine"]),
        (['5" pipe,x', 'pipe 5",y'], ['5" pipe', 'pipe 5"']),
        (['"zip broke,x', *[f"row {i},{'y' * 50}" for i in range(6000)]], [f"row {i}" for i in range(6000)]),
    ],
)
def test_broken_quotes_cost_one_row(tmp_path: Path, lines: list[str], expected: list[str]) -> None:
    loaded = read(text_file(tmp_path, "text,label\n" + "\n".join(lines) + "\n"), COLUMNS)
    assert list(loaded.rows.text) == expected
    assert [row.reason for row in loaded.bad] == ["quotes are broken"] * (len(lines) - len(expected))


cells = st.text(st.characters(exclude_categories=["Cs"]), max_size=8)


@settings(suppress_health_check=[HealthCheck.function_scoped_fixture], deadline=None, max_examples=60)
@given(
    st.lists(st.tuples(cells, cells), min_size=1, max_size=6),
    st.sampled_from(["a.csv", "a.tsv", "a.jsonl", "a.parquet"]),
)
def test_every_row_is_used_or_quarantined(tmp_path: Path, rows: list[tuple[str, str]], name: str) -> None:
    path = write(tmp_path / name, rows)
    good = [
        (text, label.strip())
        for text, label in rows
        if text.strip() and text not in ("NULL", "\\N") and label.strip()
        if label.strip().lower() not in ("nan", "null", "\\n", "<na>", "#n/a")
    ]
    try:
        loaded = read(path, COLUMNS)
    except DataError:
        assert not good
        return
    assert list(zip(loaded.rows.text, loaded.rows.label or (), strict=True)) == good
    assert sorted([*loaded.rows.number, *(row.number for row in loaded.bad)]) == list(range(1, loaded.read + 1))


@given(st.text(st.sampled_from('a",\n x'), max_size=60))
@settings(suppress_health_check=[HealthCheck.function_scoped_fixture], deadline=None, max_examples=100)
def test_no_arrangement_of_quotes_loses_lines(tmp_path: Path, body: str) -> None:
    path = text_file(tmp_path, f"text,label\nfirst,x\n{body}\nlast,z\n")
    loaded = read(path, COLUMNS)
    assert loaded.rows.text[0] == "first"
    assert sorted([*loaded.rows.number, *(row.number for row in loaded.bad)]) == list(range(1, loaded.read + 1))


# Messages: what came, what is allowed, what to do.


def packed(content: bytes) -> bytes:
    """The content gzipped, without the time of day: pytest-xdist wants the same names of tests in each process."""
    return gzip.compress(content, mtime=0)


@pytest.mark.parametrize(
    ("name", "content", "says"),
    [
        ("a.xlsx", "x", 'a.xlsx has none of the suffixes .*csv, .tsv, .jsonl .*parquet. In Excel or WPS save it as "CSV UTF-8"'),
        ("a.json", "x", "a.json has none of the suffixes .*parquet. Convert or rename it"),
        ("a.parquet.gz", "x", "none of the suffixes"),
        ("a.csv", "", "a.csv is empty; its first line must name the columns"),
        ("a.csv", "\ufeff\n\n", "a.csv is empty"),
        ("a.csv.gz", packed(b""), "is empty"),
        ("a.jsonl", "\n", "a.jsonl is empty; each line must be a JSON object"),
        ("a.jsonl", "[\n1]\n", r"no line of a.jsonl is a JSON object with columns; it begins '\[\\n'"),
        ("a.csv", "text,label\n", r"has columns \(text, label\) but no rows"),
        ("a.csv", "text,label,text\na,b,c\n", "more than one column named 'text'; rename"),
        ("a.csv", '"text,label\na,x\n', "the first line of a.csv must name the columns, but its quotes are broken: '\"text"),
        ("a.csv", "text,label\n,x\nb,\n", r"none of the 2 rows of a.csv can be used: 1 text is empty, 1 label is missing. Row 1"),
        ("a.parquet", "text", "a.parquet is not a parquet file, or is damaged"),
        ("a.csv", b"text,label\n\x1f\x8b\xff,x\n", "a.csv is not UTF-8 in line 2, at byte 12. Save it again as UTF-8"),
        ("a.csv", packed(b"text"), "not text but gzip data: add .gz"),
        ("a.csv", b"PK\x03\x04\xff", "not text but a zip, or a spreadsheet. In Excel or WPS save"),
        ("a.csv", b"\xd0\xcf\x11\xe0\xa1", "not text but a spreadsheet. In Excel or WPS save"),
        ("a.csv", "text\tlabel\na\tx\n", r"the cells of a.csv stand between tabs, not commas: rename it to .tsv. It begins 'text.tlabel'"),
        ("a.csv", "text,label\n拉链坏了,坏\n".encode("gb18030"), "not UTF-8 in line 2, at byte 11; it looks like gb18030. .*iconv -c -f gb18030 -t utf-8"),
        ("a.csv", "text,label\ncafé crème déjà,x\n".encode("cp1252"), "not UTF-8 in line 2, at byte 14; it looks like cp1252"),
        ("a.csv", "text,label\nмолния сломалась,плохо\n".encode("cp1251"), "at byte 11. Save it again as UTF-8"),
        ("a.csv", "text,label\n拉鍊壞了，店家不理，壞\n".encode("big5"), "at byte 11. Save it again as UTF-8"),
        ("a.csv", "text,label\na,x\n".encode("utf-16"), "not UTF-8 in line 1, at byte 0; it looks like utf-16"),
        ("a.csv", b"text,label\n\x81\x8d,x\n", "not UTF-8 in line 2, at byte 11. Save it again as UTF-8"),
        ("a.csv", "text,label\n拉链坏了,坏\n".encode() + b"\xff,x\n", "at byte 28, though .* damaged there. Repair"),
        ("a.csv", "text,label\n拉链坏了,坏\n".encode()[:-2], "at byte 24, though"),
        ("a.jsonl.gz", packed('{"text":"é"}'.encode("cp1252")), "byte 9 of the decompressed text"),
        ("a.csv.gz", packed(b"text,label\n" + bytes(range(32, 127)) * 900)[:-20], "a.csv.gz is damaged or cut off"),
        ("a.csv.gz", b"text,label\na,x\n", "a.csv.gz is damaged or cut off .*Not a gzipped file"),
    ],
)  # fmt: skip
def test_files_that_cannot_be_used(tmp_path: Path, name: str, content: str | bytes, says: str) -> None:
    with pytest.raises(DataError, match=says):
        read(text_file(tmp_path, content, name), COLUMNS)


class Counted(str):
    """A name that counts how often it is compared."""

    compared = 0
    __hash__ = str.__hash__

    def __eq__(self, other: object) -> bool:
        Counted.compared += 1
        return str.__eq__(self, other)


def test_names_of_columns_are_not_compared_one_with_each_other() -> None:
    """100 KB of commas are a header of 100,000 columns: that cost minutes."""
    data_table._distinct([Counted(i) for i in range(1000)], "a.csv")
    assert Counted.compared < 1000


def test_byte_offset_far_into_a_file(tmp_path: Path) -> None:
    # Multi-byte characters straddle the blocks in which the fault is looked for.
    start = b"text,label\n" + "拉链,x\n".encode() * 300_000
    with pytest.raises(DataError, match=f"in line 300,002, at byte {len(start) + 2:,}, though"):
        read(text_file(tmp_path, start + b"ab\xff,x\n"), COLUMNS)


@pytest.mark.parametrize("name", ["商品 评价(1).csv", "it's.csv.gz"])
def test_the_command_that_converts_a_file_runs(tmp_path: Path, name: str) -> None:
    # A column that was cut after so many bytes leaves half a character behind.
    text = "text,label\n" + "拉链坏了,坏\n" * 400
    data = text.encode("gb18030") + "拉链".encode("gb18030")[:-1] + b",x\n"
    path = text_file(tmp_path, gzip.compress(data) if name.endswith(".gz") else data, name)
    with pytest.raises(DataError, match="it looks like gb18030") as caught:
        read(path, COLUMNS)
    command = str(caught.value).split("look at what comes out: ")[1]
    subprocess.run(["bash", "-c", command], check=False)  # iconv ends with 1 where it left something out
    loaded = read(path.with_name(f"utf8-{name}"), COLUMNS)
    assert loaded.rows.text[:400] == ("拉链坏了",) * 400
    assert loaded.read == 401, "iconv may take the comma for the other half"


def test_what_spreadsheets_and_databases_leave_behind(tmp_path: Path) -> None:
    content = "评论,星级,,\n很好,5\n很差,1,,\n一般,NULL\n可以,\\N\nNULL,5\n\\N,5\n还行,#N/A\nnull,无\n"
    loaded = read(text_file(tmp_path, content), Columns("评论", "星级", slices=("column 3",)))
    assert (loaded.rows.text, loaded.rows.label) == (("很好", "很差", "null"), ("5", "1", "无"))
    assert loaded.rows.slices == {"column 3": ("", "", "")}
    assert sorted(row.reason for row in loaded.bad) == ["label is missing"] * 3 + ["text is empty"] * 2


def test_missing_files_and_folders(tmp_path: Path) -> None:
    write(tmp_path / "reviews.csv", ROWS)
    with pytest.raises(DataError, match=r"there is no file .*review.csv. Did you mean 'reviews.csv'\?"):
        read(tmp_path / "review.csv", COLUMNS)
    with pytest.raises(
        DataError, match=r"there is no file .*\. Check its path; a relative one begins in the current folder\."
    ):
        read(tmp_path / "no" / "such.csv", COLUMNS)
    with pytest.raises(DataError, match="is a folder; name one table in it"):
        read(tmp_path, COLUMNS)
    with pytest.raises(
        DataError, match=r"a table is read from a path or from hf:NAME, and what came is of type dict; "
    ):
        read({"text": ["a"], "label": ["b"]}, COLUMNS)  # type: ignore[arg-type]


@pytest.mark.parametrize("suffix", ["csv", "jsonl", "parquet"])
def test_a_wrong_column_suggests_the_right_one(tmp_path: Path, suffix: str) -> None:
    path = write(tmp_path / f"a.{suffix}", ROWS)
    with pytest.raises(ColumnError, match="has no column 'Texts'; its columns are: text, label. Did you mean 'text'"):
        read(path, Columns("Texts", "label"))
    with pytest.raises(ColumnError, match="has no column 'shop'"):
        read(path, Columns("text", "label", slices=("shop",)))


def test_columns_that_were_not_named_are_suggested(tmp_path: Path) -> None:
    rows = [(i, f"the zip broke after {i} weeks", "5", i % 5) for i in range(40)]
    path = write(tmp_path / "a.csv", rows, ("id", "review", "shop", "stars"))
    with pytest.raises(DataError) as caught:
        read(path, Columns())
    assert str(caught.value) == (
        "say which column of a.csv holds the text and the label. Its columns are: id, review, shop, stars. "
        "The text looks like 'review' and label looks like 'stars'."
    )
    with pytest.raises(DataError, match="holds the label. .* The label looks like 'stars'"):
        read(path, Columns("review"))
    assert suggest(open_table(path)) == Columns("review", "stars")


def test_suggestions_in_other_tables(tmp_path: Path) -> None:
    rows = [(f"拉链坏了{i}", "ab"[i % 2]) for i in range(20)]
    assert suggest(open_table(write(tmp_path / "a.parquet", rows, ("评论", "类")))) == Columns("评论", "类")
    assert suggest(open_table(write(tmp_path / "a.csv", [("", "")], ("a", "b")))) == Columns()
    named = [(f"the zip {i}", "xy"[i % 2], "uv"[i % 2]) for i in range(9)]
    both = write(tmp_path / "b.csv", named, ("text", "rating", "Label"))
    assert suggest(open_table(both)) == Columns("text", "Label")


def test_one_column_cannot_play_two_parts() -> None:
    with pytest.raises(OptionError, match="must be different columns; given were a, a"):
        Columns("a", "a")


def test_a_pool_needs_no_labels(tmp_path: Path) -> None:
    path = write(tmp_path / "a.csv", [("a",), ("b",)], ("text",))
    columns = Columns("text", "label", group="customer", weight="w", slices=("shop",))
    assert read(path, columns, label_required=False).rows.label is None
    labelled = write(tmp_path / "b.csv", [("a", "", "c1"), ("b", "x", "c2")], ("text", "label", "customer"))
    loaded = read(labelled, columns, label_required=False)
    assert (loaded.rows.label, loaded.rows.group, loaded.bad) == (None, ("c1", "c2"), ())


def test_all_rows_bad_points_to_the_quarantine(tmp_path: Path) -> None:
    quarantine = tmp_path / "bad.jsonl"
    with pytest.raises(DataError, match=r"none of the 1 rows .* See .*bad.jsonl"):
        read(text_file(tmp_path, "text,label\na,\n"), COLUMNS, quarantine=quarantine)
    assert quarantine.exists()


def test_parquet_damaged_inside(tmp_path: Path) -> None:
    path = write(tmp_path / "a.parquet", [(f"text {i}", f"label {i}") for i in range(5000)])
    content = bytearray(path.read_bytes())
    content[4 : len(content) // 2] = bytes(len(content) // 2 - 4)
    path.write_bytes(content)
    with pytest.raises(DataError, match=r"a.parquet is damaged after row \d+: "):
        read(path, COLUMNS)


def test_columns_that_nobody_wants_are_not_decoded(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    asked: list[list[str]] = []
    usual = pq.ParquetFile.iter_batches

    def noted(self: Any, *given: Any, columns: list[str], **options: Any) -> Any:
        asked.append(columns)
        return usual(self, *given, columns=columns, **options)

    monkeypatch.setattr(pq.ParquetFile, "iter_batches", noted)
    rows = [([0.5, 0.25], "bad", {"raw": 1}, "zip broke", "A"), ([0.5], "good", {"raw": 2}, " ", "B")]
    path = write(tmp_path / "a.parquet", rows, ("vector", "label", "text", "text.raw", "shop"))
    loaded = read(path, Columns("text.raw", "label", group="shop"))
    assert (loaded.rows.text, loaded.rows.label, loaded.rows.group) == (("zip broke",), ("bad",), ("A",))
    assert [(row.reason, row.cells) for row in loaded.bad] == [
        ("text is empty", {"label": "good", "text.raw": " ", "shop": "B"})
    ]
    assert read(path, Columns("text.raw", "label", group="no"), label_required=False).rows.label is None
    assert asked == [["label", "text.raw", "shop"], ["text.raw"]]
    with pytest.raises(ColumnError, match="its columns are: vector, label, text, text.raw, shop"):
        read(path, Columns("review", "label"))


def test_parquet_needs_an_extra(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    path = write(tmp_path / "a.parquet", ROWS)
    monkeypatch.setitem(__import__("sys").modules, "pyarrow", None)
    with pytest.raises(MissingExtra, match=r"reading parquet needs pyarrow: pip install pyarrow$"):
        read(path, COLUMNS)


def test_atomic_writes_all_or_nothing(tmp_path: Path) -> None:
    path = text_file(tmp_path, "before")

    def fail() -> None:
        with data_files.atomic(path) as out:
            out.write(b"half")
            raise KeyboardInterrupt

    with pytest.raises(KeyboardInterrupt):
        fail()
    assert [p.name for p in tmp_path.iterdir()] == ["reviews.csv"]
    assert path.read_text() == "before"


@pytest.mark.parametrize("mode", [0o600, 0o664])
def test_what_is_written_over_keeps_its_rights(tmp_path: Path, mode: int) -> None:
    path = text_file(tmp_path, "before")
    path.chmod(mode)
    with data_files.atomic(path) as out:
        (half,) = tmp_path.glob(".*.part")
        assert stat.S_IMODE(half.stat().st_mode) == mode, "nobody else reads it while it is written"
        out.write(b"after")
    assert (path.read_text(), stat.S_IMODE(path.stat().st_mode)) == ("after", mode)


@pytest.mark.parametrize("there", [True, False])
def test_a_link_stays_one_and_leads_to_what_is_written(tmp_path: Path, there: bool) -> None:
    (tmp_path / "disk").mkdir()
    target, link = tmp_path / "disk" / "table.csv", tmp_path / "link.csv"
    if there:
        target.write_text("before")
    link.symlink_to(target)
    left = tmp_path / "disk" / ".table.csv.1-00000000.part"
    left.write_text("half of a killed process")
    data_files.sweep(link)
    assert not left.exists()
    with data_files.atomic(link) as out:
        out.write(b"after")
    assert (link.is_symlink(), target.read_text()) == (True, "after")
    assert sorted(path.name for path in tmp_path.rglob("*")) == ["disk", "link.csv", "table.csv"]


# The Hub, through its own library: a folder of files stands in for a dataset.


@pytest.fixture
def hub(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> Path:
    datasets = pytest.importorskip("datasets")
    for name in ("HF_DATASETS_CACHE", "HF_MODULES_CACHE"):
        monkeypatch.setattr(datasets.config, name, tmp_path / "cache")
    monkeypatch.setattr(datasets.config, "HF_HUB_OFFLINE", True)
    folder = tmp_path / "shop"
    folder.mkdir()
    features = datasets.Features(
        {"text": datasets.Value("string"), "label": datasets.ClassLabel(names=["bad", "good"])}
    )
    rows = datasets.Dataset.from_dict({"text": ["zip broke", "lovely", "late"], "label": [0, 1, -1]}, features=features)
    rows.to_parquet(folder / "train.parquet")
    rows.select([1]).to_parquet(folder / "test.parquet")
    return folder


def test_hub_datasets_give_names_of_classes(hub: Path) -> None:
    loaded = read(f"hf:{hub}", COLUMNS)
    assert (loaded.rows.text, loaded.rows.label) == (("zip broke", "lovely"), ("bad", "good"))
    assert reasons(loaded) == [(3, "label is missing")]
    assert read(f"hf:{hub}:default@test", COLUMNS).rows.text == ("lovely",)
    assert [record.cells for record in open_table(f"hf:{hub}").only(["label"]).records()] == [
        ("bad",),
        ("good",),
        (None,),
    ]


def test_hub_errors(hub: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    with pytest.raises(DataError, match="Hub cannot be reached for hf:no/such; go online, or export"):
        read("hf:no/such", COLUMNS)
    with pytest.raises(DataError, match="cannot be loaded from the Hugging Face Hub: .*dev"):
        read(f"hf:{hub}@dev", COLUMNS)
    with pytest.raises(DataError, match=r"write hf:NAME\[:CONFIG\]\[@SPLIT\]"):
        read("hf:", COLUMNS)

    def absent(*_: object, **__: object) -> None:
        raise FileNotFoundError("Dataset 'no/such' doesn't exist on the Hub")

    monkeypatch.setitem(__import__("sys").modules, "datasets", SimpleNamespace(load_dataset=absent))
    with pytest.raises(DataError, match="has no dataset 'no/such' that you may read .*doesn't exist"):
        read("hf:no/such", COLUMNS)
    monkeypatch.setitem(__import__("sys").modules, "datasets", None)
    with pytest.raises(MissingExtra, match=r"reading from the Hugging Face Hub needs an extra; .* '\.\[train\]'"):
        read("hf:no/such", COLUMNS)
