"""What is predicted and how it is scored. Numpy only: training and serving share this file.

A task turns raw model outputs into predictions, and predictions into per-row *outcomes*: small numeric
records from which the metric of any weighted subset follows. The certificate resamples and compares
outcomes without knowing which task they came from.
"""

from __future__ import annotations

import math
from collections.abc import Sequence
from dataclasses import dataclass
from typing import Any, ClassVar, Literal, cast

import numpy as np
from numpy.typing import NDArray

from netweight.data.check import alike
from netweight.errors import LabelError, OptionError

Floats = NDArray[np.floating[Any]]
Ints = NDArray[np.integer[Any]]

ClassifyMetric = Literal["accuracy", "macro-f1"]
ScoreMetric = Literal["spearman", "mae"]


@dataclass(frozen=True, slots=True)
class Prediction:
    """One classified row: the label, its calibrated probability, and the tier that answered."""

    label: str
    confidence: float
    tier: str = ""


@dataclass(frozen=True, slots=True)
class ScorePrediction:
    """One scored row: the predicted value and the tier that answered."""

    value: float
    tier: str = ""


@dataclass(frozen=True, slots=True)
class Classify:
    """Single-label classification of a text or a text pair.

    `labels` fixes the order of the model's outputs. An outcome is the pair (predicted, true) of label indices.
    """

    labels: tuple[str, ...]
    metric: ClassifyMetric = "accuracy"
    kind: ClassVar[str] = "classify"
    metrics: ClassVar[tuple[str, ...]] = ("accuracy", "macro-f1")
    point: ClassVar[float] = 0.01
    unit: ClassVar[float] = 1.0
    step: ClassVar[float] = 1.0
    confident: ClassVar[bool] = True  # predictions carry a confidence, so that a cascade can hand over

    def __post_init__(self) -> None:
        if len(self.labels) < 2:
            raise LabelError(f"classification needs at least 2 labels; given were {list(self.labels)}.")
        if len(set(self.labels)) != len(self.labels):
            raise LabelError("the labels of a task must be distinct.")
        if self.metric not in self.metrics:
            raise OptionError(f"metric {self.metric!r} is not for classification; use {' or '.join(self.metrics)}.")

    @property
    def outputs(self) -> int:
        """Width of the model's output."""
        return len(self.labels)

    @property
    def paired_binary(self) -> bool:
        """Whether an outcome is right or wrong and the metric its mean (exact paired tests apply)."""
        return self.metric == "accuracy"

    def targets(self, labels: Sequence[str]) -> NDArray[np.int64]:
        """Label indices (n,). Raises LabelError for a label that training never saw."""
        index = {label: i for i, label in enumerate(self.labels)}
        unknown = sorted({label for label in labels if label not in index})
        if unknown:
            said = ", ".join(map(repr, unknown[:5]))
            raise LabelError(f"{len(unknown)} label(s) do not occur in training: {said}.{alike(unknown, index)}")
        return np.fromiter((index[label] for label in labels), np.int64, len(labels))

    def confidence(self, logits: Floats, temperature: float = 1.0) -> NDArray[np.float64]:
        """Probability of the predicted label (n,), after temperature scaling (Guo et al., 2017)."""
        return cast(NDArray[np.float64], softmax(logits / temperature).max(axis=1))

    def outcomes(self, logits: Floats, targets: Ints | Floats) -> NDArray[np.float64]:
        """(n, 2): predicted and true label index of each row."""
        return np.stack([logits.argmax(axis=1), targets], axis=1).astype(np.float64)

    def agreement(self, outcomes: Floats, reference: Floats) -> float:
        """Share of rows on which the outcomes of two models have the same label."""
        return float((outcomes[:, 0] == reference[:, 0]).mean())

    def correct(self, outcomes: Floats) -> NDArray[np.bool_]:
        """(n,): whether each row is right."""
        return cast(NDArray[np.bool_], outcomes[:, 0] == outcomes[:, 1])

    def quality(self, outcomes: Floats, weights: Floats | None = None) -> NDArray[np.float64]:
        """The metric in [0, 1] under each row of `weights` (b, n), or a 0-d array without weights.

        Macro-F1 averages over the labels that occur, as truth or as prediction, in all of `outcomes`.
        """
        if self.metric == "macro-f1":
            value = self._macro_f1(outcomes, None if weights is None else np.atleast_2d(weights))
        else:
            w = np.ones((1, len(outcomes))) if weights is None else np.atleast_2d(weights)
            value = np.asarray(w @ self.correct(outcomes).astype(np.float64) / w.sum(axis=1), np.float64)
        return np.asarray(value[0]) if weights is None else value

    def _macro_f1(self, outcomes: Floats, w: Floats | None) -> NDArray[np.float64]:
        """Weights count rows, and sums of whole numbers are exact in any order."""
        every, k, right = np.arange(len(outcomes)), self.outputs, self.correct(outcomes)
        predicted, true = outcomes[:, 0].astype(int), outcomes[:, 1].astype(int)
        counts = np.bincount(np.concatenate([predicted, true]), minlength=k)
        if w is None:
            sums: list[NDArray[Any]] = [np.bincount(true, right, k)[None], counts[None]]
        else:
            marks = np.zeros((len(outcomes), k))
            marks[every, true] = right
            sums = [w @ marks]
            marks[every, true] = 1
            marks[every, predicted] += 1
            sums.append(w @ marks)
        both, either = (np.array(each[:, counts > 0], np.float64, order="C") for each in sums)
        f1 = np.divide(2 * both, either, out=np.zeros_like(both), where=either > 0)
        return cast(NDArray[np.float64], f1.mean(axis=1))

    def margin(self, points: float, reference: float) -> float:
        """The allowed drop of `points` in units of `quality`."""
        return points * self.point

    def predictions(self, logits: Floats, confidence: Floats, tiers: Sequence[str]) -> list[Prediction]:
        """One Prediction a row."""
        names = self.labels
        return [
            Prediction(names[i], c, t)
            for i, c, t in zip(logits.argmax(axis=1).tolist(), confidence.tolist(), tiers, strict=True)
        ]

    def to_dict(self) -> dict[str, Any]:
        """For a JSON file; `task_from_dict` reads it back."""
        return {"kind": self.kind, "labels": list(self.labels), "metric": self.metric}


@dataclass(frozen=True, slots=True)
class Score:
    """Regression of a number from a text or a text pair.

    Models predict `(value - mean) / scale`, so that learning rates carry over; an outcome is the pair
    (predicted, true) in the units of the label.
    """

    mean: float = 0.0
    scale: float = 1.0
    metric: ScoreMetric = "spearman"
    kind: ClassVar[str] = "score"
    metrics: ClassVar[tuple[str, ...]] = ("spearman", "mae")
    point: ClassVar[float] = 0.01
    outputs: ClassVar[int] = 1
    paired_binary: ClassVar[bool] = False
    confident: ClassVar[bool] = False

    def __post_init__(self) -> None:
        if not (math.isfinite(self.mean) and math.isfinite(self.scale) and self.scale > 0):
            raise LabelError("the values to predict must be finite and not all equal.")
        if self.metric not in self.metrics:
            raise OptionError(f"metric {self.metric!r} is not for scores; use {' or '.join(self.metrics)}.")

    @property
    def unit(self) -> float:
        """By how much quality may differ on one row: errors by the labels' spread; correlations have no unit."""
        return self.scale if self.metric == "mae" else 1.0

    @property
    def step(self) -> float:
        """What small differences of quality are measured in: 1, or, where the unit is below a thousandth, a power of
        two near it, by which numbers are divided without rounding."""
        return 1.0 if self.unit > 1e-3 else 2.0 ** math.floor(math.log2(self.unit))

    def targets(self, labels: Sequence[str]) -> NDArray[np.float64]:
        """Label values (n,), in their own units. Raises LabelError for a label that is not a finite number."""
        values = np.empty(len(labels))
        for i, label in enumerate(labels):
            try:
                values[i] = float(label)
            except ValueError:
                raise LabelError(f"a score must be a number; row {i + 1} has {label[:40]!r}.") from None
        if not np.isfinite(values).all():
            raise LabelError("a score must be finite; the labels hold NaN or infinity.")
        return values

    def values(self, logits: Floats) -> NDArray[np.float64]:
        """Predicted values (n,) in the units of the label."""
        return np.asarray(logits[:, 0], np.float64) * self.scale + self.mean

    def confidence(self, logits: Floats, temperature: float = 1.0) -> NDArray[np.float64]:
        """Scores carry no probability: 1 for each row, so that a cascade never hands one over."""
        return np.ones(len(logits))

    def outcomes(self, logits: Floats, targets: Ints | Floats) -> NDArray[np.float64]:
        """(n, 2): predicted and true value of each row."""
        return np.stack([self.values(logits), np.asarray(targets, np.float64)], axis=1)

    def agreement(self, outcomes: Floats, reference: Floats) -> float:
        """Spearman correlation of the predictions in two models' outcomes."""
        both = np.stack([outcomes[:, 0], reference[:, 0]], axis=1)
        return float(_weighted_spearman(both, np.ones((1, len(both))))[0])

    def quality(self, outcomes: Floats, weights: Floats | None = None) -> NDArray[np.float64]:
        """Spearman's rho, or minus the mean absolute error (higher is better), under each row of `weights`."""
        w = np.ones((1, len(outcomes))) if weights is None else np.atleast_2d(weights)
        if self.metric == "mae":
            value: NDArray[np.float64] = -(w @ np.abs(outcomes[:, 0] - outcomes[:, 1])) / w.sum(axis=1)
        else:
            value = _weighted_spearman(outcomes, w)
        return np.asarray(value[0]) if weights is None else value

    def margin(self, points: float, reference: float) -> float:
        """Spearman: a point is 0.01. MAE: a point is one percent of the reference's error."""
        return points * self.point * (abs(reference) if self.metric == "mae" else 1.0)

    def predictions(self, logits: Floats, confidence: Floats, tiers: Sequence[str]) -> list[ScorePrediction]:
        """One ScorePrediction a row."""
        return [ScorePrediction(v, t) for v, t in zip(self.values(logits).tolist(), tiers, strict=True)]

    def to_dict(self) -> dict[str, Any]:
        """For a JSON file; `task_from_dict` reads it back."""
        return {"kind": self.kind, "mean": self.mean, "scale": self.scale, "metric": self.metric}


Task = Classify | Score


def task_from_dict(stored: dict[str, Any]) -> Task:
    """Inverse of `to_dict`. Raises OptionError for a kind that this version does not know."""
    if stored.get("kind") == Classify.kind:
        return Classify(tuple(stored["labels"]), stored["metric"])
    if stored.get("kind") == Score.kind:
        return Score(stored["mean"], stored["scale"], stored["metric"])
    raise OptionError(f"unknown task {stored.get('kind')!r}; this version knows classify and score.")


def task_for(labels: Sequence[str], kind: Literal["classify", "score"], metric: str | None = None) -> Task:
    """The task of these training labels. Without `metric`: accuracy, or macro-F1 where the most frequent label has more
    than 3 / labels of the rows, or more than 70 % (the lower of the two); Spearman for scores."""
    if kind == "score":
        values = Score().targets(labels)
        # The mean of equal values need not be that value, to the last bit.
        scale = 0.0 if (values == values[:1]).all() else float(values.std())
        return Score(float(values.mean()), scale, cast(ScoreMetric, metric or "spearman"))
    if kind != "classify":
        raise OptionError(f"unknown task {kind!r}; use classify or score.")
    names, counts = np.unique(np.asarray(labels, dtype=object), return_counts=True)
    if metric is None:
        metric = "macro-f1" if counts.max() > balanced_limit(len(names)) * counts.sum() else "accuracy"
    return Classify(tuple(names.tolist()), cast(ClassifyMetric, metric))


def balanced_limit(classes: int) -> float:
    """Share of the most frequent label above which accuracy says little: three equal shares, at most 0.7."""
    return min(0.7, 3 / classes)


def softmax(logits: Floats) -> NDArray[np.float64]:
    """Row-wise, in float64, safe for large logits."""
    z = np.asarray(logits, np.float64)
    z = np.exp(z - z.max(axis=-1, keepdims=True))
    return cast(NDArray[np.float64], z / z.sum(axis=-1, keepdims=True))


def _weighted_ranks(values: Floats, w: Floats) -> NDArray[np.float64]:
    """Mid-ranks of `values` (n,) when row i counts w[:, i] times: (b, n)."""
    _, group = np.unique(values, return_inverse=True)
    mass = np.zeros((w.shape[0], int(group.max()) + 1))
    for row, weights in zip(mass, w, strict=True):
        row += np.bincount(group, weights, minlength=len(row))
    below = np.cumsum(mass, axis=1) - mass
    return (below + (mass + 1) / 2)[:, group]


def _weighted_spearman(outcomes: Floats, w: Floats) -> NDArray[np.float64]:
    a, b = _weighted_ranks(outcomes[:, 0], w), _weighted_ranks(outcomes[:, 1], w)
    total = w.sum(axis=1, keepdims=True)
    a = a - (w * a).sum(axis=1, keepdims=True) / total
    b = b - (w * b).sum(axis=1, keepdims=True) / total
    covariance = (w * a * b).sum(axis=1)
    spread = np.sqrt((w * a * a).sum(axis=1) * (w * b * b).sum(axis=1))
    return np.asarray(np.divide(covariance, spread, out=np.zeros_like(covariance), where=spread > 0))
