"""Rows, the sealed split, the dataset."""

from __future__ import annotations

import pickle
import subprocess
import sys
import unicodedata
from collections.abc import Iterator
from dataclasses import replace
from pathlib import Path
from typing import Any

import numpy as np
import pytest
from hypothesis import given
from hypothesis import strategies as st

import netweight
from netweight.data import Dataset, Rows, Sealed, concat, normalise
from netweight.errors import CertificateError, DataError

SOURCE = Path(netweight.__file__).parent
FULL = Rows(
    ("A b", "c", "d"),
    label=("x", "y", "x"),
    pair=("p", "q", "r"),
    group=("1", "1", ""),
    weight=(1.0, 0.5, 2.0),
    slices={"text": ("s", "t", "u")},
    number=(3, 5, 9),
)


@pytest.mark.parametrize(
    ("one", "other"),
    [
        ("Zip  BROKE\n", "zip broke"),
        ("ｆｕｌｌ　ｗｉｄｔｈ", "full width"),
        ("Straße", "STRASSE"),
        ("\u00a0ﬁne ", "fine"),
        ("cafe\u0301", "CAFÉ"),
        ("很好\u200b", "很好"),
        ("\ufeff好", "好"),
        ("❤\ufe0f", "❤"),
        ("goo\xadd", "good"),
        ("\u200b", ""),
    ],
)
def test_normalise_equates(one: str, other: str) -> None:
    assert normalise(one) == normalise(other)


def test_normalise_keeps_apart() -> None:
    assert len({normalise(text) for text in ("good", "not good", "goods", "good!")}) == 4


def test_normalise_leaves_out_what_nobody_sees() -> None:
    unseen = [chr(i) for i in range(sys.maxunicode + 1) if unicodedata.category(chr(i)) == "Cf"]
    assert [c for c in unseen if normalise(f"a{c}b") != "ab"] == []
    # Nothing else goes, but what NFKC and folding change.
    assert [c for c in "अहिन्दी好ü\u0301👍🏽" if c not in "".join(map(normalise, "अहिन्दी好ü\u0301👍🏽"))] == []


def test_normalise_is_stable_on_every_character() -> None:
    characters = [chr(i) for i in range(sys.maxunicode + 1) if unicodedata.category(chr(i)) not in ("Cs", "Cn", "Co")]
    assert [c for c in characters if normalise(normalise(c)) != normalise(c)] == []


@given(st.text())
def test_normalise_leaves_single_blanks_only(text: str) -> None:
    assert normalise(text).split() == [part for part in normalise(text).split(" ") if part]


def test_take_keeps_every_column_aligned() -> None:
    assert FULL.keys
    taken = FULL.take(np.array([2, 0]))
    assert taken == Rows(
        ("d", "A b"), ("x", "x"), ("r", "p"), ("", "1"), (2.0, 1.0), {"text": ("u", "s")}, number=(9, 3)
    )
    assert taken.keys == ("d\x1fr", "a b\x1fp")
    assert len(FULL.take([])) == 0


def test_keys_of_pairs_cannot_run_together() -> None:
    assert len(set(Rows(("a b", "a"), pair=("c", "b c")).keys)) == 2
    assert len(set(Rows(("a\x1fb", "a"), pair=("c", "b\x1fc")).keys)) == 2


def test_the_first_row_of_each_text_is_distinct() -> None:
    assert Rows(("b", "a", "B ", "c", "a")).distinct().tolist() == [0, 1, 3]
    assert Rows(()).distinct().tolist() == []


def test_lengths_must_agree() -> None:
    with pytest.raises(DataError, match="must have one length; these have text 2, label 1, number 2"):
        Rows(("a", "b"), ("x",))


class Series:
    """Like one of pandas, shuffled: walked through by place, but indexed by label."""

    def __init__(self, **cells: object) -> None:
        self.cells = cells

    def __len__(self) -> int:
        return len(self.cells)

    def __iter__(self) -> Iterator[object]:
        return iter(self.cells.values())

    def __getitem__(self, label: str) -> object:
        return self.cells[label]


def test_any_sequence_is_a_column_and_cells_are_what_a_table_has() -> None:
    made = Rows(
        Series(b="A b", a="c", c="d"),  # type: ignore[arg-type]
        np.array(["x", "y", "x"]),  # type: ignore[arg-type]
        ["p", "q", "r"],  # type: ignore[arg-type]
        [1, 1, None],  # type: ignore[arg-type]
        np.array([1, 0.5, 2]),  # type: ignore[arg-type]
        {"text": np.array(["s", "t", "u"], object)},  # type: ignore[dict-item]
        np.array([3, 5, 9]),  # type: ignore[arg-type]
    )
    assert made == FULL
    assert made.fingerprint == FULL.fingerprint
    assert all(type(cell) is str for column in (made.text, made.label, made.slices["text"]) for cell in column or ())
    assert made.take([2]).text == ("d",)
    labels = Rows(("a",) * 6, [1, 2.5, True, np.int64(3), np.bool_(False), " x "])  # type: ignore[arg-type]
    assert labels.label == ("1", "2.5", "true", "3", "false", "x")
    assert Rows(("a", "b"), ("x ", "none")).label == ("x", "none"), "as in a table"
    with pytest.raises(AttributeError):
        made.text = ()  # type: ignore[misc]


@pytest.mark.parametrize(
    ("given", "text"),
    [
        ({"text": "ab"}, "text of rows is one string; pass a list of strings."),
        ({"text": {"review": ["a", "b"]}}, r"text of rows is a table; pass one column, for example df\['review'\]."),
        ({"label": "xy"}, "label of rows is one string"),
        ({"slices": {"shop": "xy"}}, "slice shop of rows is one string"),
        (
            {"text": ("a", None)},
            r"text of row 2 is None, of type NoneType; pass a string \(str\(\) makes one\), or leave",
        ),
        ({"text": ("a", 3)}, "text of row 2 is 3, of type int"),
        ({"pair": (b"a", "b"), "number": (7, 8)}, "pair of row 7 is b'a', of type bytes"),
        ({"label": ("x", float("nan"))}, "label of row 2 is nan, of type float"),
        (
            {"label": ("x", "")},
            "label of row 2 is '', of type str; pass a label, which is not empty, nan or null, or leave the row out.",
        ),
        ({"label": ("nan", "x")}, "label of row 1 is 'nan', of type str"),
        ({"label": (" ", 3)}, "label of row 1 is ' ', of type str"),
        ({"label": ("x", ["y"])}, r"label of row 2 is \['y'\], of type list"),
        ({"group": ("x", {})}, r"group of row 2 is {}, of type dict"),
        ({"slices": {"shop": ("x", b"")}}, "slice shop of row 2 is b'', of type bytes"),
        ({"weight": (1, -1)}, "weight of row 2 is -1, of type int; pass a number of at least 0, or leave the row out."),
        ({"weight": (1.0, float("inf"))}, "weight of row 2 is inf"),
        ({"weight": (None, 1.0)}, "weight of row 1 is None"),
    ],
)
def test_cells_that_cannot_be_used_are_named(given: dict[str, Any], text: str) -> None:
    with pytest.raises(DataError, match=text):
        Rows(**{"text": ("a", "b"), **given})


def test_rows_are_numbered_from_one() -> None:
    assert Rows(("a", "b")).number == (1, 2)


@pytest.mark.parametrize(
    "other",
    [
        FULL.take([1, 0, 2]),
        FULL.unlabelled(),
        Rows(FULL.text, FULL.label, FULL.pair, FULL.group, (1.0, 0.5, 2.5), FULL.slices),
        Rows(("A bc", "", "d"), FULL.label, FULL.pair, FULL.group, FULL.weight, FULL.slices),
    ],
)
def test_fingerprint_sees_every_change(other: Rows) -> None:
    assert other.fingerprint != FULL.fingerprint


def test_fingerprint_is_of_content() -> None:
    again = Rows(FULL.text, FULL.label, FULL.pair, FULL.group, FULL.weight, dict(FULL.slices))
    assert again.number != FULL.number
    assert again.fingerprint == FULL.fingerprint
    other = replace(FULL, slices={"other": ("s", "u", "u"), "shop": ("1", "2", "3")})
    assert other.fingerprint == replace(FULL, slices={}).fingerprint == FULL.fingerprint, "they decide nothing"
    assert pickle.loads(pickle.dumps(FULL)) == FULL
    assert Rows(("a\ud800",)).fingerprint


def test_concat() -> None:
    assert concat(FULL.take([0]), FULL.take([1, 2])) == FULL
    with pytest.raises(DataError, match="cannot be joined"):
        concat(FULL, FULL.unlabelled())


def test_sealed_hides_labels_until_a_plan_is_registered() -> None:
    sealed = Sealed(FULL)
    assert sealed.rows.label is None
    assert sealed.rows.text == FULL.text
    assert len(sealed) == 3
    assert sealed.fingerprint == FULL.fingerprint
    assert "x" not in repr(sealed).replace("fingerprint", "").replace(sealed.fingerprint[:12], "")
    with pytest.raises(CertificateError, match="register the plan first"):
        sealed.unseal("please")
    assert sealed.unseal("0123456789abcdef" * 4) == FULL


def test_sealed_needs_labels() -> None:
    with pytest.raises(DataError, match="certify split has no labels"):
        Sealed(Rows(("a",)))


def test_dataset_joins_dev_and_has_a_fingerprint() -> None:
    one, two, three = FULL.take([0]), FULL.take([1]), FULL.take([2])
    data = Dataset(FULL, one, two, Sealed(three))
    assert data.dev == FULL.take([0, 1])
    others = (Dataset(FULL, two, one, Sealed(three)), Dataset(FULL, one, two, Sealed(three), pool=one))
    assert len({data.fingerprint, *(other.fingerprint for other in others)}) == 3


def test_import_is_light() -> None:
    heavy = "torch sklearn pandas scipy pyarrow datasets"
    code = f"import sys, netweight.data; print(*[m for m in {heavy.split()} if m in sys.modules])"
    done = subprocess.run([sys.executable, "-c", code], capture_output=True, text=True, check=True)
    assert done.stdout.strip() == ""
