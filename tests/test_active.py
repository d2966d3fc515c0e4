"""Choosing rows to label: against brute force and the papers' own formulas; and when to stop."""

from __future__ import annotations

import hashlib
import json
import subprocess
import sys
from itertools import combinations
from pathlib import Path
from types import SimpleNamespace

import numpy as np
import pytest
from hypothesis import given, settings
from hypothesis import strategies as st
from sklearn.metrics import cohen_kappa_score

from conftest import Say, Shop, many_rows, tiny_encoder, tiny_model, tiny_rows, write_table
from netweight import load
from netweight.active import (
    badge,
    choose,
    hashed,
    judged,
    k_center,
    kappa,
    select,
    select_with,
    settled,
    uncertainty,
    watched,
)
from netweight.data import Columns, Dataset, Rows, read
from netweight.errors import ModelError, OptionError
from netweight.run import Local
from netweight.run.local import logits_of
from netweight.task import Score, softmax
from netweight.techniques import Static
from netweight.train import Plan

METHODS = ("entropy", "margin", "coreset", "badge")


def some(n: int, seed: int = 0, labels: int = 3, width: int = 4) -> tuple[np.ndarray, np.ndarray]:
    rng = np.random.default_rng(seed)
    return softmax(2 * rng.normal(size=(n, labels))), rng.normal(size=(n, width))


def test_uncertainty_by_hand() -> None:
    p = np.array([[0.5, 0.5, 0.0], [0.6, 0.2, 0.2], [1.0, 0.0, 0.0]])
    np.testing.assert_allclose(uncertainty(p, "margin"), [1.0, 0.6, 0.0], atol=1e-12)
    wanted = [np.log(2), -0.6 * np.log(0.6) - 0.4 * np.log(0.2), 0.0]
    np.testing.assert_allclose(uncertainty(p, "entropy"), wanted, atol=1e-12)
    # The two disagree about which row is the least certain.
    assert choose(p, p, 1, 0, "entropy").tolist() == [1]
    assert choose(p, p, 1, 0, "margin").tolist() == [0]


@settings(max_examples=30)
@given(st.integers(0, 10_000), st.integers(1, 4))
def test_greedy_centres_cover_within_twice_the_best(seed: int, count: int) -> None:
    _, x = some(9, seed, width=2)
    far = np.linalg.norm(x[:, None] - x[None], axis=2)
    radius = lambda centres: far[:, list(centres)].min(axis=1).max()  # noqa: E731
    best = min(radius(c) for c in combinations(range(9), count))
    chosen = k_center(x, count, seed)
    assert len(set(chosen.tolist())) == count
    assert radius(chosen) <= 2 * best + 1e-9


def test_badge_draws_by_the_distance_of_gradients() -> None:
    """Frequencies of the second row follow the squared distances of embeddings that are made in full."""
    p, x = some(6)
    gradients = np.einsum("nk,nd->nkd", p - np.eye(3)[p.argmax(1)], x).reshape(6, -1)
    first = int(np.square(gradients).sum(axis=1).argmax())
    wanted = np.square(gradients - gradients[first]).sum(axis=1)
    wanted /= wanted.sum()
    draws = np.array([badge(p, x, 2, seed) for seed in range(3000)])
    assert (draws[:, 0] == first).all()
    found = np.bincount(draws[:, 1], minlength=6) / len(draws)
    assert np.abs(found - wanted).max() < 4 * np.sqrt(0.25 / len(draws))


def test_badge_takes_every_row_once_even_where_nothing_differs() -> None:
    p, x = np.tile([[1.0, 0.0]], (5, 1)), np.ones((5, 2))
    assert sorted(badge(p, x, 5, 0).tolist()) == [0, 1, 2, 3, 4]
    p, x = some(7)
    assert sorted(badge(p, x, 7, 0).tolist()) == list(range(7))
    assert sorted(k_center(np.ones((4, 2)), 4, 1).tolist()) == [0, 1, 2, 3]


@pytest.mark.parametrize("method", ["coreset", "badge"])
def test_what_is_labelled_already_is_covered(method: str) -> None:
    """Three clusters, two of which have labels: the third is chosen from first, by every seed."""
    p, x = some(30, labels=2, width=2)
    x = 0.01 * x + np.repeat([[0.0, 0.0], [9.0, 0.0], [0.0, 9.0]], 10, axis=0)
    p[:] = [0.6, 0.4]
    known = np.r_[0:5, 10:15]
    order = np.r_[known, np.setdiff1d(np.arange(30), known)]
    for seed in range(20):
        chosen = choose(p[order], x[order], 1, seed, method, known=len(known))  # type: ignore[arg-type]
        assert order[len(known) + chosen[0]] >= 20
    assert choose(p[order], x[order], 3, 0, "entropy", known=len(known)).max() < 20


def test_labelled_rows_are_not_chosen_again() -> None:
    rows, model = tiny_rows(12), tiny_model()
    labelled = Rows(tuple(text.upper() for text in rows.text[:7]))
    for method in METHODS:
        assert not set(select(model, rows, 5, 0, method, labelled)) & set(range(7))  # type: ignore[arg-type]
    with pytest.raises(OptionError, match="one has pairs of texts and the other has not"):
        select(model, rows, 1, labelled=Rows(("a",), pair=("b",)))


def test_rows_that_are_set_aside_stay_the_same() -> None:
    rows = many_rows(300)
    aside = {rows.keys[i] for i in watched(rows)}
    assert len(aside) == len(rows.distinct()) // 5
    fewer = rows.take([i for i, key in enumerate(rows.keys) if key in aside or i % 2])
    assert {fewer.keys[i] for i in watched(fewer)} <= aside


def test_at_most_so_many_rows_are_set_aside(monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr("netweight.active._WATCHED", 7)
    assert len(watched(many_rows(300))) == 7


def test_of_a_large_pool_the_same_rows_are_looked_at_in_any_order(monkeypatch: pytest.MonkeyPatch) -> None:
    rows, model = many_rows(60), tiny_model()
    whole = select(model, rows, 9, method="margin")
    monkeypatch.setattr("netweight.active._MOST", 20)
    turned = rows.take(range(59, -1, -1))
    n, said = len(rows.distinct()), []
    for pool in (rows, turned):
        with pytest.warns(UserWarning, match=f"chosen among 20 of {n} distinct ones, those whose texts have the sma"):
            chosen = select(model, pool, 9, method="margin")
        said.append({pool.keys[i] for i in chosen})
    assert said[0] == said[1]
    assert said[0] <= {rows.keys[i] for i in rows.distinct()[rows.take(rows.distinct()).sample(20)]}
    assert said[0] != {rows.keys[i] for i in whole}
    with pytest.warns(UserWarning, match="20 of"), pytest.raises(OptionError, match="choose 1 to 20"):
        select(model, rows, 21)


def test_scores_have_no_rounds(tmp_path: Path) -> None:
    engine = SimpleNamespace(task=Score())
    with pytest.raises(OptionError, match="rounds are compared by their labels, and scores have none"):
        judged(tmp_path / "rounds.jsonl", engine, tiny_rows(12))  # type: ignore[arg-type]
    assert not list(tmp_path.iterdir())


def test_hashed_rows_keep_products() -> None:
    encoder, rows = tiny_encoder(), tiny_rows(40)
    wide, narrow = hashed(encoder, rows, 4096), hashed(encoder, rows, 256)
    np.testing.assert_allclose(np.linalg.norm(narrow, axis=1), 1.0)
    assert np.abs(wide @ wide.T - narrow @ narrow.T).max() < 0.35
    # Signs make what collides cancel in the mean: rows that share nothing have products around zero.
    few = hashed(encoder, rows, 16)
    apart = (few @ few.T - wide @ wide.T)[~np.eye(40, dtype=bool)]
    assert abs(float(apart.mean())) < 0.1
    same = hashed(encoder, Rows(("great zip", "great zip", "torn coat")))
    assert same[0] @ same[1] == pytest.approx(1.0)
    # The frame [CLS] and [SEP] is all that two such rows share.
    assert same[0] @ same[2] < 0.6


@pytest.mark.parametrize("method", METHODS)
def test_selecting_with_a_model(method: str) -> None:
    model, rows = tiny_model(), tiny_rows(40)
    doubled = Rows((*rows.text, *rows.text))
    chosen = select(model, doubled, 5, 1, method)  # type: ignore[arg-type]
    assert chosen.tolist() == select(model, doubled, 5, 1, method).tolist()  # type: ignore[arg-type]
    assert len({doubled.keys[i] for i in chosen}) == 5
    assert set(chosen.tolist()) <= set(doubled.distinct().tolist())
    if method in ("entropy", "margin"):
        logits = logits_of(model, model.encoder.encode(rows.text)).numpy()
        gaps = np.abs(softmax(logits)[:, 0] - 0.5)
        assert gaps[chosen].max() <= np.delete(gaps, chosen).max()
        assert gaps[chosen[0]] == pytest.approx(gaps.min(), abs=1e-6)


def test_agreement_is_cohens_kappa() -> None:
    rng = np.random.default_rng(0)
    one, two = rng.integers(0, 4, (2, 200))
    two[:120] = one[:120]
    assert kappa(one, two) == pytest.approx(cohen_kappa_score(one, two))
    assert kappa(["a", "b"], ["a", "b"]) == 1.0
    assert kappa(["a", "a"], ["a", "a"]) == 0.0, "models that know one label only do not show that labelling may stop"
    with pytest.raises(OptionError, match="given were 2 and 3 labels"):
        kappa([1, 2], [1, 2, 3])


def test_labelling_stops_when_predictions_settle() -> None:
    rng = np.random.default_rng(0)
    final = rng.integers(0, 3, 500)
    rounds = []
    for share in (0.5, 0.8, 0.9, 1.0, 1.0, 1.0, 1.0):
        now = final.copy()
        now[int(500 * share) :] = rng.integers(0, 3, 500 - int(500 * share))
        rounds.append(now)
    assert [settled(rounds[: i + 1]) for i in range(7)] == [False] * 6 + [True]
    assert settled(rounds[:4], threshold=0.5, window=1)
    with pytest.raises(OptionError, match="window is 0 and threshold 0.9"):
        settled(rounds, 0.9, 0)
    for threshold in (0.0, 1.1):
        with pytest.raises(OptionError, match=f"threshold {threshold}; use 1 or more, and a kappa within 0 to 1"):
            settled(rounds, threshold)


def test_refusals(dataset: Dataset) -> None:
    model, rows = tiny_model(), tiny_rows(10)
    with pytest.raises(OptionError, match="cannot choose 11 rows of 10 distinct ones"):
        select(model, rows, 11)
    with pytest.raises(OptionError, match="unknown method 'luck'; use one of entropy, margin"):
        select(model, rows, 1, method="luck")  # type: ignore[arg-type]
    with pytest.raises(OptionError, match="method 'badge' needs probabilities, and scores have none"):
        select(tiny_model(Score()), rows, 1)
    assert len(select(tiny_model(Score()), rows, 2, method="coreset")) == 2
    static = Static(width=4, buckets=8, epochs=1)(model, Local(dataset), Plan())
    with pytest.raises(ModelError, match="selection needs pooled features; Static has none"):
        select(static, rows, 1)


def test_selecting_with_an_artifact(shop: Shop, say: Say, tmp_path: Path) -> None:
    rows = many_rows(60, seed=5)
    table, out = write_table(tmp_path / "pool.tsv", rows.unlabelled()), tmp_path / "todo.csv"
    words = ["select", shop.folder, table, "--text", "text", "--count", 8, "--out", out]
    said = say(*words, "--seed", 3)
    assert said.status == 0, said.err
    assert said.err.endswith(f"wrote 8 of 60 rows to {out}\n")
    chosen = select_with(load(shop.folder, 1), read(table, Columns("text"), label_required=False).rows, 8, 3)
    lines = out.read_text(encoding="utf-8").splitlines()
    assert lines[0] == "row,text,label"
    assert [int(line.split(",")[0]) for line in lines[1:]] == [i + 1 for i in chosen]
    assert all(line.endswith(",") for line in lines[1:])
    # Filled in by a person, it is a table to train on; a row that was left out is quarantined.
    done = tmp_path / "done.csv"
    done.write_text("\n".join([lines[0], *(f"{line}good" for line in lines[1:-1]), lines[-1]]), encoding="utf-8")
    loaded = read(done, Columns("text", "label"))
    assert (len(loaded.rows), len(loaded.bad)) == (7, 1)
    sure = select_with(load(shop.folder, 1), rows, 8, method="margin")
    said_of = load(shop.folder, 1).predict(rows.text)
    confidence = np.array([p.confidence for p in said_of])  # type: ignore[union-attr]
    assert confidence[sure].max() <= np.delete(confidence, sure).min() + 1e-9
    # Rounds: this artifact is one, and it is not counted twice.
    file = tmp_path / "rounds.jsonl"
    more = [*words, "--labelled", done, "--rounds", file]
    labelled = set(loaded.rows.keys)
    left = rows.take([i for i, key in enumerate(rows.keys) if key not in labelled])
    aside = [key for key in left.keys if key in left.take(watched(left)).keys]
    assert len(left) < len(rows)
    assert aside
    for _ in range(2):
        told = say(*more).err
        assert "round 1: from the next one on" in told
        assert "1 of 8 rows of done.csv cannot be used (1 label is missing)" in told, "it has no label yet"
        assert f"of {len(left) - len(aside):,} rows to {out}" in told, "others have a label, or stay aside"
    (line,) = map(json.loads, file.read_text().splitlines())
    known = {hashlib.sha256(key.encode()).hexdigest()[:16] for key in labelled}
    assert known.isdisjoint(line["labels"]), "models agree on what they were trained on"
    # Nothing that people typed, and no pool, is written over.
    for taken in (table, done):
        before = taken.read_bytes()
        refused = say(*words[:-1], taken, "--labelled", done)
        assert (refused.status, "is the input itself" in refused.err) == (1, True)
        assert taken.read_bytes() == before
    blank = out.read_text(encoding="utf-8")
    for name, typed, empty in (
        (out.name, blank.replace(",\n", ",good\n", 1), blank),
        ("other.csv", "label,text\n0,a\n,b\n", "label,text\n ,a\n,b\n"),
        ("other.jsonl", '{"label": 0}\n', '{"label": null}\n'),
    ):
        todo = tmp_path / name
        todo.write_text(typed, encoding="utf-8")
        refused = say(*words[:-1], todo)
        assert refused.status == 1
        assert f"{name} holds 1 labels; append its rows to --labelled, or name another file." in refused.err
        assert todo.read_text(encoding="utf-8") == typed
        todo.write_text(empty, encoding="utf-8")
        assert say(*words[:-1], todo).status == 0, "nobody typed anything"
    # The pool's column may have another name than that of the tables that are written here.
    renamed = tmp_path / "renamed.tsv"
    renamed.write_text(table.read_text(encoding="utf-8").replace("text", "message", 1), encoding="utf-8")
    other = say("select", shop.folder, renamed, "--text", "message", *words[5:], "--labelled", done)
    assert other.status == 0, other.err
    few = write_table(tmp_path / "few.tsv", rows.take(range(4)).unlabelled())
    assert (
        "fewer than 5 distinct rows" in say(*words[:2], few, *words[3:6], 1, *words[7:], "--rounds", tmp_path / "r").err
    )
    assert "seed is -1; use 0 or more" in say(*words, "--seed", -1).err
    flipped = dict.fromkeys(line["labels"], "bad")
    file.write_text("".join(json.dumps(one) + "\n" for one in ({"artifact": "old", "labels": flipped}, line)))
    assert "round 2: kappa with the round before 0.000; go on labelling: the mean of the last 3" in say(*more).err
    same = [{"artifact": str(i), "labels": line["labels"]} for i in range(3)]
    file.write_text("".join(json.dumps(one) + "\n" for one in same))
    assert "round 4: kappa with the round before 1.000, 1.000 in the mean of 3: labelling may stop" in say(*more).err
    file.write_text(json.dumps({"artifact": "old", "labels": {"0": "good"}}))
    assert "are of other rows; keep to one pool, or name another file" in say(*more).err
    file.write_text("nothing")
    assert "holds no rounds of labelling" in say(*more).err
    assert say(*words[:-1], tmp_path / "todo.docx").status == 1
    code = f"""
import sys
sys.argv[1:] = {[str(w) for w in words]!r}
from netweight.cli import main
try:
    main()
except SystemExit as end:
    assert not end.code
print("torch" in sys.modules)
"""
    done = subprocess.run([sys.executable, "-c", code], check=True, capture_output=True, text=True)
    assert done.stdout == "False\n"
