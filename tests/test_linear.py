"""The linear floor against scikit-learn's own solvers on a dense matrix of the page's formula."""

from __future__ import annotations

from dataclasses import replace
from typing import Any

import numpy as np
import pytest
from numpy.typing import NDArray
from scipy.special import softmax
from sklearn.linear_model import LogisticRegression, Ridge

from conftest import tiny_model, tiny_rows
from netweight.data import Dataset, Rows
from netweight.data.rows import Sealed
from netweight.features import features
from netweight.model import Model
from netweight.run import Local
from netweight.run.local import logits_of
from netweight.task import Classify, Score
from netweight.techniques import LinearFloor
from netweight.train import Plan


def dense(model: Model, rows: Rows, buckets: int) -> NDArray[np.float64]:
    """idf of every feature that occurs, once for each occurrence, each row of length one as it counts them."""
    tokens = model.encoder.encode(rows.text)
    vocabulary = model.encoder.vocabulary
    columns, starts = features(tokens, vocabulary, buckets)
    held = np.split(columns, starts[1:])
    counts = np.stack([np.bincount(row, minlength=vocabulary + buckets) for row in held])
    idf = np.log((1 + len(rows)) / (1 + (counts > 0).sum(axis=0))) + 1
    return counts * idf / np.sqrt((counts * idf**2).sum(axis=1, keepdims=True))


def weighted(n: int, labels: tuple[str, ...]) -> Rows:
    """Rows whose label their words tell in half of the cases."""
    rows = tiny_rows(n)
    chosen = tuple(labels[i % len(labels)] if i % 4 else labels[i // 4 % len(labels)] for i in range(n))
    return replace(rows, label=chosen, weight=tuple(0.5 + i % 3 for i in range(n)))


def data_of(rows: Rows) -> Dataset:
    return Dataset(rows, rows.take(range(9)), rows.take(range(9)), Sealed(rows))


@pytest.mark.parametrize("buckets", [0, 64])
@pytest.mark.parametrize("labels", [("bad", "good"), ("bad", "good", "so so")])
def test_labels(labels: tuple[str, ...], buckets: int) -> None:
    model, rows = tiny_model(Classify(labels)), weighted(60, labels)
    made = LinearFloor(buckets=buckets, strength=2.0)(model, Local(data_of(rows)), Plan())
    matrix, targets = dense(model, rows, buckets), model.task.targets(rows.label or ())
    known = LogisticRegression(C=2.0, max_iter=500, tol=1e-6).fit(matrix, targets, rows.weight)
    said = softmax(logits_of(made, model.encoder.encode(rows.text)).numpy(), axis=1)
    np.testing.assert_allclose(said, known.predict_proba(matrix), atol=2e-2)
    apart = LogisticRegression(C=2.0, max_iter=500, tol=1e-6).fit(matrix, targets).predict_proba(matrix)
    assert np.abs(apart - said).max() > 0.03, "weights of rows count"


def test_scores() -> None:
    rows = weighted(60, ("1", "2", "5"))
    model = tiny_model(Score(mean=2.5, scale=1.5))
    made = LinearFloor(buckets=0, strength=4.0)(model, Local(data_of(rows)), Plan())
    matrix = dense(model, rows, 0)
    known = Ridge(alpha=2.5).fit(matrix, (np.array(rows.label, float) - 2.5) / 1.5, rows.weight)
    said = logits_of(made, model.encoder.encode(rows.text)).numpy()[:, 0]
    np.testing.assert_allclose(said, known.predict(matrix), atol=1e-3)


def test_where_rows_times_labels_are_many_each_label_keeps_its_share(monkeypatch: pytest.MonkeyPatch) -> None:
    """A solver that holds each answer to each row in fp64 takes all memory where rows and labels are many."""
    labels = ("bad", "good", "so so")
    rows = replace(tiny_rows(60), label=("bad",) * 40 + ("so so",) * 2 + ("good",) * 18)
    model, run, fitted, usual = tiny_model(Classify(labels)), Local(data_of(rows)), list[Any](), LogisticRegression.fit

    def seen(self: Any, matrix: Any, targets: NDArray[np.int64], weight: Any) -> Any:
        fitted.append(targets)
        return usual(self, matrix, targets, weight)

    monkeypatch.setattr(LogisticRegression, "fit", seen)
    whole = LinearFloor(buckets=64)(model, run, Plan()).digest
    monkeypatch.setattr("netweight.techniques.linear._MOST_CELLS", 3 * 60)
    assert LinearFloor(buckets=64)(model, run, Plan()).digest == whole
    monkeypatch.setattr("netweight.techniques.linear._MOST_CELLS", 3 * 30)
    made = [LinearFloor(buckets=64)(model, run, Plan(seed=seed)).digest for seed in (0, 0, 1)]
    assert [np.bincount(targets).tolist() for targets in fitted] == [[40, 18, 2]] * 2 + [[20, 9, 1]] * 3
    assert made[0] == made[1] != made[2]


def test_where_labels_are_many_the_most_frequent_columns_are_fitted(monkeypatch: pytest.MonkeyPatch) -> None:
    """A solver that holds 200 bytes of each weight takes all memory where texts and labels are many."""
    labels = ("bad", "good", "so so")
    model, rows = tiny_model(Classify(labels)), weighted(60, labels)
    run = Local(data_of(rows))
    whole = LinearFloor(buckets=64)(model, run, Plan()).network.state_dict()["table"].numpy()
    monkeypatch.setattr("netweight.techniques.linear._MOST_WEIGHTS", 40)
    table = LinearFloor(buckets=64)(model, run, Plan()).network.state_dict()["table"].numpy()
    tokens = model.encoder.encode(rows.text)
    columns, starts = features(tokens, model.encoder.vocabulary, 64)
    rows_of = np.bincount(
        np.concatenate([np.unique(row) for row in np.split(columns, starts[1:])]), minlength=len(table)
    )
    kept = np.flatnonzero(table.any(axis=1))
    assert np.count_nonzero(whole.any(axis=1)) * len(labels) > 40
    assert 0 < len(kept) * len(labels) <= 40
    assert rows_of[kept].min() >= np.delete(rows_of, kept).max()
