"""Splitting: nothing leaks, every row is accounted for, and the same content gives the same splits."""

from __future__ import annotations

import re
from collections import Counter
from collections.abc import Sequence
from dataclasses import replace
from importlib import import_module
from typing import Any

import numpy as np
import pytest
from hypothesis import given, settings
from hypothesis import strategies as st

from netweight.certify.slices import columns
from netweight.data import BadRow, Dataset, Rows, split, without_train
from netweight.data.rows import groups_of
from netweight.errors import DataError, LabelError, OptionError

OPEN = "0" * 64


def rows(*cells: tuple[str, str], start: int = 1, **more: Any) -> Rows:
    text, label = zip(*cells, strict=True)
    return Rows(text, label, number=tuple(range(start, start + len(cells))), **more)


def many(n: int, labels: Sequence[str] = "ab", prefix: str = "row") -> Rows:
    return rows(*((f"{prefix} {i}", labels[i % len(labels)]) for i in range(n)))


def parts(data: Dataset) -> dict[str, Rows]:
    return {
        "train": data.train,
        "select": data.select,
        "calibrate": data.calibrate,
        "certify": data.certify.unseal(OPEN),
    }


def content(data: Dataset) -> dict[str, list[tuple[str, str]]]:
    return {name: sorted(zip(r.text, r.label or (), strict=True)) for name, r in parts(data).items()}


def counted(data: Dataset, pattern: str) -> int:
    """The number of rows that notes of this pattern speak of."""
    found = [re.match(r"([\d,]+) rows? of " + pattern, note) for note in data.notes]
    return sum(int(match[1].replace(",", "")) for match in found if match)


# Few texts and labels, so that duplicates, contradictions and groups meet often.
texts = st.integers(0, 60).map(lambda i: ("Text %d" if i % 3 else "text  %d") % (i // 2))
tables = st.lists(
    st.tuples(texts, st.sampled_from("abc"), st.sampled_from(["", "", "g1", "g2", "g3", "g4"])), min_size=1
)


@settings(deadline=None, max_examples=150)
@given(
    st.lists(
        st.tuples(texts, st.sampled_from("abc"), st.sampled_from(["", *map(str, range(30))])), min_size=30, max_size=150
    ),
    st.none() | tables,
    st.none() | tables,
    st.none() | tables,
    st.booleans(),
    st.sampled_from(["classify", "score"]),
    st.integers(0, 3),
    st.randoms(use_true_random=False),
)
def test_nothing_leaks_and_every_row_is_accounted_for(
    train: Any, dev: Any, certify: Any, pool: Any, grouped: bool, kind: Any, seed: int, shuffle: Any
) -> None:
    numbers = {"a": "1", "b": "2.5", "c": "-3"}

    def table(cells: Any) -> Rows | None:
        if cells is None:
            return None
        text, label, group = zip(*cells, strict=True)
        return Rows(
            text, tuple(numbers[x] for x in label) if kind == "score" else label, group=group if grouped else None
        )

    given_tables = {name: table(cells) for name, cells in (("dev", dev), ("certify", certify), ("pool", pool))}
    whole = table(train)
    assert whole is not None
    try:
        data = split(whole, kind=kind, seed=seed, **given_tables)  # type: ignore[arg-type]
    except DataError:
        return  # too small or contradictory to be split; each such message has its own test
    every = parts(data)
    keys = [set(r.keys) for r in every.values()]
    groups = [set(r.group or ()) - {""} for r in every.values()]
    for many_sets in (keys, groups):
        assert sum(map(len, many_sets)) == len(set().union(*many_sets))
    if data.pool is not None:
        assert not set(data.pool.keys) & (keys[1] | keys[2] | keys[3])
        assert data.pool.label is None
        assert len(data.pool) + counted(data, "pool whose text") == len(pool)
    if certify is not None:
        assert content(data)["certify"] == sorted(zip(*(given_tables["certify"].text, given_tables["certify"].label)))  # type: ignore[union-attr,arg-type]
    if dev is not None:
        assert len(data.dev) + counted(data, "dev whose text") == len(dev)
    from_train = [data.train] + [r for r, own in ((data.dev, dev), (every["certify"], certify)) if own is None]
    gone = counted(data, "train whose text") + counted(data, "train whose label contradicts")
    assert sum(map(len, from_train)) + gone == len(train)
    used = [number for r in from_train for number in r.number]
    assert len(used) == len(set(used))
    if kind == "classify":
        assert set(data.dev.label or ()) | set(every["certify"].label or ()) <= set(data.train.label or ())
        labels: dict[str, set[str]] = {}
        for key, label in zip(data.train.keys, data.train.label or (), strict=True):
            labels.setdefault(key, set()).add(label)
        assert all(len(found) == 1 for found in labels.values())

    order = list(range(len(train)))
    shuffle.shuffle(order)
    again = split(whole.take(order), kind=kind, seed=seed, **given_tables)  # type: ignore[arg-type]
    assert content(again) == content(data)
    assert again.certify.fingerprint == data.certify.fingerprint
    assert split(whole, kind=kind, seed=seed, **given_tables).fingerprint == data.fingerprint  # type: ignore[arg-type]


def test_shares_are_stratified() -> None:
    data = split(many(10_000, "aaaaaaabbc"))
    sizes = {name: len(r) for name, r in parts(data).items()}
    assert sizes == {"train": 6500, "select": 750, "calibrate": 750, "certify": 2000}
    for name, r in parts(data).items():
        counts = Counter(r.label)
        assert [round(10 * counts[label] / sizes[name], 1) for label in "abc"] == [7, 2, 1]
    assert data.notes == (
        "2,000 rows cut from train for certify, stratified, with seed 0.",
        "1,500 rows cut from train for dev, stratified, with seed 0.",
    )
    assert data.counts == {"a": 1400, "b": 400, "c": 200}
    assert split(many(100, "12"), kind="score").counts == {}
    assert content(split(many(10_000, "aaaaaaabbc"), seed=1)) != content(data)


def test_slices_change_no_split() -> None:
    table = rows(*[("same text", "a")] * 9, *zip(many(200).text, many(200).label or (), strict=True))
    plain, sliced = split(table), split(replace(table, slices={"size": tuple("SML"[i % 3] for i in range(209))}))
    assert set(sliced.certify.rows.slices["size"]) == set("SML")
    assert sliced.certify.fingerprint == plain.certify.fingerprint
    assert sliced.fingerprint == plain.fingerprint


def test_labels_that_are_written_nearly_alike_are_named() -> None:
    several = {"spam": 900, "Spam": 40, "out of stock": 30, "out\u00a0of stock": 12, "1": 20, "1.0": 20, "other": 20}
    labels = [label for label, count in several.items() for _ in range(count)]
    cells = [(f"row {i}", label) for i, label in enumerate(labels)]
    (said,) = (note for note in split(rows(*cells)).notes if note.startswith("Labels"))
    assert said == (
        "Labels that differ only in how they are written count as different ones: '1' (20 rows) and '1.0' (20 rows); "
        r"'Spam' (40 rows) and 'spam' (900 rows); 'out of stock' (30 rows) and 'out\xa0of stock' (12 rows). "
        "Write them alike if they are one."
    )
    assert not any(note.startswith("Labels") for note in split(many(100)).notes)
    numbers = many(420, [f"{i}{end}" for i in range(7) for end in ("", ".0", ".00")])
    (said,) = (note for note in without_train(numbers, many(30, "0", "certify")).notes if note.startswith("Labels"))
    assert said.count(";") == 5
    assert "; 2 more. " in said
    certify = rows(*((f"certify {i}", "SPAM") for i in range(30)))
    with pytest.raises(LabelError, match=r"remove them from certify\. 'SPAM' and 'spam' look like one label"):
        split(rows(*cells[:900], *cells[-20:]), certify=certify)


def test_cuts_stop_where_more_does_not_help() -> None:
    data = split(many(40_000))
    assert (len(data.certify), len(data.dev)) == (5000, 4000)


def test_rare_labels_keep_rows_in_train_and_totals_come_out() -> None:
    labels = [f"label {i}" for i in range(200) for _ in range(2)]
    data = split(rows(*((f"row {i}", label) for i, label in enumerate(labels))))
    assert set(data.train.label or ()) == set(labels)
    assert (len(data.certify), len(data.dev)) == (80, 60)
    assert abs(len(data.select) - len(data.calibrate)) <= 1


def test_scores_are_stratified_by_deciles() -> None:
    values = np.random.default_rng(0).lognormal(size=3000)
    data = split(rows(*((f"row {i}", repr(float(v))) for i, v in enumerate(values))), kind="score")
    for r in parts(data).values():
        mine = np.array(r.label, float)
        shares = np.diff(np.searchsorted(np.sort(mine), np.quantile(values, np.arange(1, 10) / 10))) / len(mine)
        assert np.allclose(shares, 0.1, atol=0.01)


def test_scores_of_one_text_may_differ() -> None:
    table = rows(*((f"row {i // 2}", str(i)) for i in range(100)))
    data = split(table, kind="score")
    assert sum(len(r) for r in parts(data).values()) == 100


def test_groups_and_texts_join_into_one() -> None:
    # row 2i and 2i+1 share a group; row 2i+1 and 2i+2 share a text: everything hangs together in threes of groups.
    text = tuple(f"text {i // 6}-{(i % 6 + 1) // 2}" for i in range(600))
    group = tuple(f"group {i // 2}" for i in range(600))
    table = Rows(text, tuple("ab"[i // 6 % 2] for i in range(600)), group=group)
    data = split(table)
    for r in parts(data).values():
        sixes = Counter((number - 1) // 6 for number in r.number)
        assert set(sixes.values()) == {6}
    assert abs(len(data.certify) - 120) <= 6


def test_what_was_cut_together_is_known() -> None:
    """All copies of a text are cut or none: a certificate that took them for independent would promise too much."""
    cells = [(f"text {i // 3 if i < 300 else i}", "ab"[i % 2 if i >= 300 else (i // 3) % 2]) for i in range(600)]
    data = split(rows(*cells))
    certify = data.certify.rows
    copies = Counter(certify.text)
    assert set(copies.values()) == {1, 3}
    assert certify.drawn is not None
    assert len(set(certify.drawn)) == len(set(zip(certify.text, certify.drawn, strict=True))) == len(copies)
    assert groups_of(certify) == certify.drawn
    assert (sum(data.counts.values()), sum(data.units.values())) == (len(certify), len(copies))
    assert "group" not in columns(certify), "it is no column of the shop's"
    together = sum(n == 3 for n in copies.values())
    assert f"{3 * together} rows of certify share a text or group with another one" in " ".join(data.notes)
    # Copies in a table that was given are copies that were drawn.
    given = split(many(100), certify=rows(*cells))
    assert given.certify.rows.drawn is None
    assert given.units == given.counts
    assert split(many(600)).certify.rows.drawn is None
    # The shop's own groups stay what they are.
    joined = split(rows(*cells, group=tuple(f"{i}" for i in range(600))), seed=3).certify.rows
    assert joined.drawn is not None
    assert joined.group is not None
    assert len(set(joined.group)) == len(joined) > len(set(joined.drawn)) == len(set(joined.text))


def test_one_large_group_goes_to_train() -> None:
    group = ("big",) * 500 + tuple(str(i) for i in range(100))
    data = split(Rows(many(600).text, many(600).label, group=group))
    assert (data.train.group or ()).count("big") == 500
    assert len(data.certify) >= 50


def test_a_text_with_too_many_copies_for_certify_is_told_of() -> None:
    """With a fifth of 300 rows of "a" to be cut, 123 copies are never taken, and 120 may be."""

    def table(copies: int) -> Rows:
        cells = [(f"row {i}", "b") for i in range(300)] + [(f"more {i}", "a") for i in range(300 - copies)]
        return rows(*cells, *[("the same", "a")] * copies)

    for copies, told in ((123, 123), (120, 0)):
        data = split(table(copies))
        assert counted(data, "train share a text or group with so many others of their kind that they are") == told
    data = split(table(123))
    assert data.train.text.count("the same") == 123
    assert any("(first: row 478); the certificate says nothing of them." in note for note in data.notes)
    assert split(table(123), certify=many(40, prefix="given")).notes[0].endswith("stratified, with seed 0.")


def test_given_tables_are_kept_and_train_is_cleaned() -> None:
    train = rows(*((f"Row {i}", "ab"[i % 2]) for i in range(100)))
    certify = rows(("row 1", "a"), ("ROW  2", "b"), ("new 1", "a"), ("new 1", "b"))
    dev = rows(("row 2", "a"), ("row 3", "b"), ("new 2", "a"), ("new 3", "b"), ("new 4", "a"))
    pool = Rows(("row 1", "row 3", "row 4", "fresh"))
    data = split(train, dev=dev, certify=certify, pool=pool)
    assert content(data)["certify"] == sorted(zip(certify.text, certify.label or (), strict=True))
    assert sorted(data.dev.text) == ["new 2", "new 3", "new 4", "row 3"]
    assert len(data.train) == 97
    assert data.pool == Rows(("row 4", "fresh"), number=(3, 4))
    assert data.notes == (
        "1 row of dev whose text occurs in certify was removed from dev (first: row 1).",
        "2 rows of train whose text occurs in certify were removed from train (first: row 2).",
        "1 row of train whose text occurs in dev was removed from train (first: row 4).",
        "1 row of pool whose text occurs in certify was removed from pool (first: row 1).",
        "1 row of pool whose text occurs in dev was removed from pool (first: row 2).",
    )


def test_given_groups_are_kept_apart_too() -> None:
    table = many(100)
    train = Rows(table.text, table.label, group=tuple(str(i // 2) for i in range(100)))
    certify = Rows(("new 1", "new 2"), ("a", "b"), group=("3", ""))
    data = split(train, certify=certify)
    assert "3" not in (*(data.train.group or ()), *(data.dev.group or ()))
    assert data.notes[0].startswith("2 rows of train whose text or group occurs in certify were removed")


def test_of_a_large_pool_teachers_label_the_same_rows_in_any_order(monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr(import_module("netweight.data.rows"), "MOST_TAUGHT", 5)
    pool = many(12, prefix="pool").unlabelled()
    data, turned = split(many(100), pool=pool), split(many(100), pool=pool.take(range(11, -1, -1)))
    some, same = data.taught().pool, turned.taught().pool
    assert some is not None
    assert same is not None
    assert len(some) == len(set(some.text)) == 5
    assert set(some.text) == set(same.text)
    assert some.number == tuple(sorted(some.number)), "in the order of the table"
    assert data.pool == pool, "pretraining sees all"
    (said,) = (note for note in data.notes if note.startswith("Teachers"))
    assert said.startswith("Teachers label 5 of the 12 rows of pool, those whose texts have the smallest hashes")
    few = split(many(100), pool=pool.take(range(5)))
    assert few.taught() is few
    assert not any(note.startswith("Teachers") for note in few.notes)


def test_where_labels_are_many_teachers_label_fewer_rows(monkeypatch: pytest.MonkeyPatch) -> None:
    """What they say of 89,000 rows, where labels are 3,000, is a gigabyte; rows that have labels come first."""
    table, pool = many(100), many(12, prefix="pool").unlabelled()
    n = len(split(table).train)
    for room, train, left in ((n + 12, n, 12), (n + 7, n, 7), (n - 5, n - 5, 0)):
        monkeypatch.setattr(import_module("netweight.data.rows"), "MOST_SAID", 2 * room + 1)
        data = split(table, pool=pool)
        taught = data.taught()
        assert (len(taught.train), len(taught.pool or ())) == (train, left)
        assert set(taught.train.text) <= set(data.train.text)
        said = [note.split(",")[0] for note in data.notes if note.startswith("Teachers")]
        sizes = (("train", train, n), ("pool", left, 12))
        assert said == [f"Teachers label {few} of the {of} rows of {name}" for name, few, of in sizes if few < of]
    scores = split(many(100, "123"), kind="score")
    assert scores.taught() is scores, "a score is one number, however many differ"


def test_a_pool_does_not_hold_rows_that_were_cut() -> None:
    table = many(100)
    data = split(table, pool=table)
    assert data.pool is not None
    assert set(data.pool.text) == set(data.train.text)


def test_pairs_leak_only_as_pairs() -> None:
    pair = tuple(f"other {i}" for i in range(60))
    train = Rows(("same text",) * 60, tuple("ab"[i % 2] for i in range(60)), pair=pair)
    data = split(train)
    assert sum(len(r) for r in parts(data).values()) == 60
    assert len(data.certify) == 12


def test_contradicting_labels_lose_to_the_majority() -> None:
    noise = [
        ("Twice", "a"),
        ("twice", "a"),
        (" twice", "b"),
        ("tie", "a"),
        ("tie", "b"),
        ("lost", "only here"),
        ("lost", "only here"),
    ]
    noise += [("lost", "b")] * 3
    clean = [(f"row {i}", "b") for i in range(60)] + [(f"row a{i}", "a") for i in range(50)]
    certify = rows(("far 1", "a"), ("far 2", "b"))
    dev = rows(("far 3", "a"), ("far 4", "b"), ("twice 2", "a"), ("twice 2", "b"))
    aside: list[BadRow] = []
    data = split(rows(*noise, *clean), dev=dev, certify=certify, aside=aside)
    kept = Counter(cell for cell in zip(data.train.keys, data.train.label or (), strict=True) if "row" not in cell[0])
    assert kept == {("twice", "a"): 2, ("tie", "b"): 1, ("lost", "b"): 3}
    assert Counter(data.dev.text)["twice 2"] == 2
    assert data.notes == (
        "4 rows of train whose label contradicts that of most rows with the same text were set aside (first: row 3).",
    )
    assert [row.number for row in aside] == [3, 4, 6, 7]
    why = "label contradicts that of most rows with the same text"
    assert aside[0] == BadRow(3, why, {"text": " twice", "label": "b"})


def test_contradicting_rows_stay_in_a_cut_certify() -> None:
    # Cleaning what is certified would make the test easier than the traffic.
    clean = [(f"row {i}", "ab"[i % 2]) for i in range(300)]
    noise = [(f"noise {i // 3}", "aab"[i % 3]) for i in range(150)]
    data = split(rows(*clean, *noise))
    sealed = Counter(zip(data.certify.unseal(OPEN).keys, data.certify.unseal(OPEN).label or (), strict=True))
    noisy = {key for key, _ in sealed if key.startswith("noise")}
    assert noisy
    assert all(sealed[key, "b"] == 1 and sealed[key, "a"] == 2 for key in noisy)


def test_weights_and_slices_travel_along() -> None:
    table = many(100)
    full = Rows(
        table.text, table.label, weight=tuple(map(float, range(100))), slices={"n": tuple(map(str, range(100)))}
    )
    for r in parts(split(full)).values():
        assert [f"row {n}" for n in r.slices["n"]] == list(r.text)
        assert [float(n) for n in r.slices["n"]] == list(r.weight or ())


MANY = many(100)
EDGES: list[tuple[type[Exception], str, dict[str, Any]]] = [
    (OptionError, "unknown task 'rank'; use classify or score", {"kind": "rank"}),
    (DataError, "pool has no rows; give a table with rows, or leave it out", {"pool": Rows(())}),
    (LabelError, "train has no labels; say which column", {"train": MANY.unlabelled()}),
    (LabelError, "dev has no labels", {"dev": MANY.unlabelled()}),
    (DataError, "train has no pair column and dev differs; align", {"dev": Rows(("x",), ("a",), pair=("y",))}),
    (
        LabelError,
        "all 100 rows of train have the label 'a'; classification needs at least 2 labels. Is it the right column",
        {"train": many(100, "a")},
    ),
    (
        LabelError,
        "each label needs at least 2 rows in train; only 1 has 'label 7'. Add rows, or merge",
        {"train": rows(*zip(MANY.text, (*(MANY.label or ())[:-1], "label 7"), strict=True))},
    ),
    (
        LabelError,
        "only 1 has '0', '1', '10', '11', '12' and 95 more. .* for numbers the task is score",
        {"train": rows(*((text, str(i)) for i, text in enumerate(MANY.text)))},
    ),
    (
        DataError,
        "60 of 100 rows of train have a text that also occurs with another label, for example row 41",
        {"train": rows(*((f"row {i if i < 40 else 100 + i // 2}", "ab"[i % 2]) for i in range(100)), start=1)},
    ),
    (
        LabelError,
        "2 rows of certify have labels that train does not have: 'x', 'y' .first: row 2.. Add such rows to train",
        {"certify": rows(("new", "a"), ("other", "x"), ("third", "y"))},
    ),
    (
        LabelError,
        "1 row of dev have labels that train does not have: 'x'",
        {"dev": rows(("new", "a"), ("more", "a"), ("other", "x"))},
    ),
    (DataError, "too few rows .* train 3, select 0, calibrate 0, certify 1. Give more rows", {"train": many(4)}),
    (DataError, "too few rows .* train 0,", {"certify": MANY}),
    (LabelError, "a score must be a finite number; row 1 of train has 'a'", {"kind": "score"}),
    (
        LabelError,
        "a score must be a finite number; row 2 of certify has 'inf'",
        {"train": many(100, "12"), "kind": "score", "certify": rows(("new", "1"), ("other", "inf"))},
    ),
    (
        LabelError,
        "all 100 rows of train have the score 1; there is nothing to learn",
        {"train": many(100, "1"), "kind": "score"},
    ),
]


@pytest.mark.parametrize(("error", "says", "options"), EDGES)
def test_messages(error: type[Exception], says: str, options: dict[str, Any]) -> None:
    with pytest.raises(error, match=says):
        split(**{"train": MANY, **options})


# --- without training rows ---


def test_rows_of_a_server_alone_are_kept_apart() -> None:
    def with_more(given: Rows, *cells: tuple[str, str]) -> Rows:
        return rows(*zip(given.text, given.label or (), strict=True), *cells)

    certify = many(30, prefix="certify")
    dev = with_more(many(40, prefix="dev"), ("CERTIFY 3", "b"))
    pool = with_more(many(20, prefix="pool"), ("dev  5", "a"), ("Certify 7", "b")).unlabelled()
    data = without_train(dev, certify, pool)
    assert data.pool is not None
    sizes = [len(part) for part in (data.train, data.select, data.calibrate, data.certify, data.pool)]
    assert sizes == [0, 20, 20, 30, 20]
    assert counted(data, "dev whose text occurs in certify") == 1
    assert counted(data, "pool whose text occurs in") == 2
    assert content(data)["certify"] == sorted(zip(certify.text, certify.label or (), strict=True))
    assert (
        data.notes[0] == "Whether rows of clients share a text with dev or certify was not checked: nobody sees both."
    )


SERVER = {"dev": many(40, prefix="dev"), "certify": many(30, prefix="certify")}


@pytest.mark.parametrize(
    ("problem", "said", "given"),
    [
        (
            LabelError,
            "20 rows of dev have labels that are not among the job's: 'b' .first: row 2.. Name",
            {"labels": "ac"},
        ),
        (
            LabelError,
            "each label needs at least 2 rows in dev; only 1 has '0', '1', '10', '11', '12' and 35 more",
            {"dev": replace(many(40), label=tuple(map(str, range(40))))},
        ),
        (
            LabelError,
            "10 rows of certify have labels that are not among the job's: 'c'",
            {"certify": many(30, "abc", "c")},
        ),
        (
            DataError,
            "dev has no pair column and certify differs; align them",
            {"certify": rows(("x", "a"), pair=("y",))},
        ),
        (DataError, "too few rows .* select 20, calibrate 20, certify 30, pool 0", {"pool": many(9, prefix="dev")}),
        (LabelError, "all 40 rows of dev have the score 1; there", {"kind": "score", "dev": many(40, "1", "dev")}),
    ],
)
def test_rows_of_a_server_that_will_not_do(problem: type[Exception], said: str, given: dict[str, Any]) -> None:
    with pytest.raises(problem, match=said):
        without_train(**{**SERVER, **given})
