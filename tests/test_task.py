"""Outcomes and metrics against scikit-learn and scipy."""

from __future__ import annotations

import tracemalloc

import numpy as np
import pytest
from scipy.stats import spearmanr
from sklearn.metrics import accuracy_score, f1_score

from netweight.errors import LabelError, OptionError
from netweight.task import Classify, Score, softmax, task_for, task_from_dict


def test_macro_f1_and_accuracy_equal_scikit_learn() -> None:
    rng = np.random.default_rng(0)
    logits, targets = rng.normal(size=(200, 4)), rng.integers(0, 4, 200)
    for metric, reference in (
        ("accuracy", accuracy_score(targets, logits.argmax(1))),
        ("macro-f1", f1_score(targets, logits.argmax(1), average="macro")),
    ):
        task = Classify(("a", "b", "c", "d"), metric)  # type: ignore[arg-type]
        assert float(task.quality(task.outcomes(logits, targets))) == pytest.approx(reference, abs=1e-12)


def test_macro_f1_of_many_rows_and_labels_counts_them() -> None:
    """A number for each row and label would take 123 MB."""
    task = Classify(tuple(map(str, range(77))), "macro-f1")
    outcomes = np.random.default_rng(0).integers(0, 77, (200_000, 2)).astype(float)
    outcomes[::2, 0] = outcomes[::2, 1]
    tracemalloc.start()
    found = task.quality(outcomes)
    most = tracemalloc.get_traced_memory()[1]
    tracemalloc.stop()
    assert most < 60_000_000
    assert float(found) == pytest.approx(f1_score(outcomes[:, 1], outcomes[:, 0], average="macro"), abs=1e-12)
    few = outcomes[:300]
    assert float(task.quality(few)) == task.quality(few, np.ones((1, 300)))[0], "to the last bit"


def test_weights_count_rows_as_often_as_repeating_them() -> None:
    rng = np.random.default_rng(1)
    counts = rng.integers(0, 4, 60)
    targets, logits = rng.integers(0, 3, 60), rng.normal(size=(60, 3))
    score_targets = rng.integers(0, 9, 60).astype(float)
    for task, out in (
        (Classify(("a", "b", "c"), "macro-f1"), None),
        (Classify(("a", "b", "c")), None),
        (Score(), score_targets),
        (Score(metric="mae"), score_targets),
    ):
        outcomes = task.outcomes(logits, targets if out is None else out)
        repeated = np.repeat(outcomes, counts, axis=0)
        assert float(task.quality(outcomes, counts[None].astype(float))[0]) == pytest.approx(
            float(task.quality(repeated))
        )


def test_spearman_equals_scipy_with_ties() -> None:
    rng = np.random.default_rng(2)
    a, b = rng.integers(0, 8, 300).astype(float), rng.integers(0, 5, 300).astype(float)
    task = Score(mean=3.0, scale=2.0)
    found = float(task.quality(task.outcomes((a[:, None] - 3) / 2, b)))
    assert found == pytest.approx(spearmanr(a, b).statistic, abs=1e-12)


def test_default_metric_follows_imbalance() -> None:
    assert task_for(["a"] * 5 + ["b"] * 5, "classify").metric == "accuracy"
    assert task_for(["a"] * 8 + ["b"] * 2, "classify").metric == "macro-f1"


@pytest.mark.parametrize("task", [Classify(("a", "b"), "macro-f1"), Score(1.0, 2.0, "mae")])
def test_tasks_survive_json(task: Classify | Score) -> None:
    assert task_from_dict(task.to_dict()) == task


def test_margins() -> None:
    assert Classify(("a", "b")).margin(1.0, 0.9) == pytest.approx(0.01)
    assert Score(metric="mae").margin(1.0, -0.5) == pytest.approx(0.005)


def test_errors_say_what_came() -> None:
    with pytest.raises(LabelError, match=r"at least 2 labels; given were \['one'\]\.$"):
        Classify(("one",))
    with pytest.raises(LabelError, match="distinct"):
        Classify(("a", "a"))
    with pytest.raises(OptionError, match="metric 'mae'"):
        Classify(("a", "b"), "mae")  # type: ignore[arg-type]
    with pytest.raises(LabelError, match="'c'"):
        Classify(("a", "b")).targets(["a", "c"])
    with pytest.raises(LabelError, match="row 2 has 'x'"):
        Score().targets(["1", "x"])
    with pytest.raises(LabelError, match="finite; the labels hold"):
        Score().targets(["nan"])
    with pytest.raises(LabelError, match="not all equal"):
        Score(0.0, 0.0)
    for value in ("0.1", "0.2", "0.3", "0.7", "3"):  # the mean of 30 of some is another number
        with pytest.raises(LabelError, match="not all equal"):
            task_for([value] * 30, "score")
    with pytest.raises(OptionError, match="metric 'f1'"):
        Score(metric="f1")  # type: ignore[arg-type]
    with pytest.raises(OptionError, match="unknown task"):
        task_from_dict({"kind": "rank"})
    with pytest.raises(OptionError, match="unknown task 'rank'"):
        task_for(["a", "b"], "rank")  # type: ignore[arg-type]


def test_softmax_survives_large_logits() -> None:
    assert softmax(np.array([[1e4, 0.0]])).tolist() == [[1.0, 0.0]]
