"""One candidate against its reference on the same rows: how good, how much worse, and whether that is shown."""

from __future__ import annotations

import math
from collections.abc import Sequence
from dataclasses import dataclass

import numpy as np

from netweight.certify import exact, power
from netweight.certify.bootstrap import LEAST, Bootstrap, Sample, interval
from netweight.certify.certificate import Estimate, Floats, Ints, Tested
from netweight.certify.tails import binomial_bounds, normal_quantile
from netweight.errors import CertificateError
from netweight.task import Classify, Task

CLASS_ROWS = 25  # certify rows of each class, those of one group counted once, below which a macro-F1 is not tested
GROUPS = 30  # groups, below which their spread is not known well enough
SCORES = 30  # certify rows with scores, likewise


@dataclass(frozen=True)
class Pairs:
    """Outcomes of reference and candidate, (n, 2) each, on the same rows; groups (n,), or None for independent rows."""

    task: Task
    reference: Floats
    candidate: Floats
    groups: Ints | None = None

    def __len__(self) -> int:
        return len(self.reference)

    @property
    def lost_gained(self) -> tuple[int, int]:
        """Rows on which the candidate does worse, and better, than the reference.

        Classification: wrong where the other is right. Scores: further from the truth.
        """
        if isinstance(self.task, Classify):
            change = self.task.correct(self.reference).astype(int) - self.task.correct(self.candidate)
        else:
            change = np.sign(_error(self.candidate) - _error(self.reference)).astype(int)
        return int((change > 0).sum()), int((change < 0).sum())

    @property
    def exact(self) -> bool:
        """Whether rows are right or wrong, and independent."""
        return self.task.paired_binary and self.groups is None


@dataclass(frozen=True)
class Comparison:
    """One candidate's test. Bounds are missed with probability `level` each."""

    drop: Estimate
    margin: float
    p_value: float


def compare(pairs: Pairs, max_drop: float, level: float, seed: int) -> Comparison:
    """Test that the drop is less than `max_drop` points, at `level`.

    Accuracy of independent rows: the exact test. Everything else: BCa on resampled pairs of rows, or groups.
    """
    if not pairs.exact:
        return _resampled(pairs, max_drop, level, seed)
    b, c = pairs.lost_gained
    n, margin = len(pairs), pairs.task.margin(max_drop, 0.0)
    bounds = exact.interval(b, c, n, margin, level)
    return Comparison(Estimate((b - c) / n, *bounds), margin, exact.p_value(b, c, n, margin, level))


def absolute(task: Task, outcomes: Floats, groups: Ints | None, level: float, seed: int) -> Estimate:
    """Quality with its bounds, each missed with probability `level`: Clopper and Pearson's for accuracy of independent
    rows (at most `level`), else BCa's."""
    if isinstance(task, Classify) and task.paired_binary and groups is None:
        right, n = int(task.correct(outcomes).sum()), len(outcomes)
        return Estimate(right / n, *binomial_bounds(right, n, level))
    sample = Sample.of(outcomes, groups, seed)
    return interval(sample, lambda weights: task.quality(sample.rows, weights), level, task.step)


def require(task: Task, reference: Floats, groups: Ints | None) -> None:
    """Raise CertificateError where rows are too few: 25 in each class for macro-F1 (of 25 groups, where rows have
    them), 30 with scores that are not all equal, 30 groups where rows have them."""
    require_groups(groups)
    if not isinstance(task, Classify):
        require_scores(reference[:, 1], len(reference))
    if not isinstance(task, Classify) or task.metric != "macro-f1":
        return
    labels = reference[:, 1].astype(int)
    # Groups are drawn as wholes: a thousand rows of one user tell nothing of another user.
    units = labels if groups is None else np.unique(np.stack([groups, labels]), axis=1)[1]
    counts = np.bincount(units, minlength=task.outputs)
    few = [(label, int(count)) for label, count in zip(task.labels, counts, strict=True) if count < CLASS_ROWS]
    if few:
        named = ", ".join(f"{label!r} has {count}" for label, count in few[:5])
        named += " (rows of one group count once)" if len(units) < len(labels) else ""
        raise CertificateError(
            f"macro-F1 needs at least {CLASS_ROWS} certify rows in each class; {named}. Merge such classes, give more "
            "labelled rows, or use --metric accuracy."
        )


def too_late(task: Task, grouped: bool, level: float) -> str:
    """A sentence where the test is a bootstrap and `level` below every p-value that it can have."""
    if level >= LEAST or (task.paired_binary and not grouped):
        return ""
    return (
        "Macro-F1, scores and rows in groups are tested by a bootstrap, which shows nothing at levels below "
        f"{LEAST:g}, and the level here was {level:.3g}: no candidate could pass. Give a fresh certify table (each "
        "further look at the same rows halves their level), or a lower confidence."
    )


def require_scores(true: Floats, rows: int, where: str = "certify") -> None:
    """Raise CertificateError for fewer than 30 certify rows, or where the true scores (n,) of `where` are all equal."""
    if rows < SCORES:
        raise CertificateError(
            f"scores need at least {SCORES} certify rows to see how much errors differ; there are {rows:,}. Give more "
            "labelled rows."
        )
    if (true == true[0]).all():
        # Every correlation with them counts as 0, and no error can be seen that would be a gross one.
        raise CertificateError(
            f"all {len(true):,} rows of {where} have the score {true[0]:g}, so that a model that reads nothing looks "
            f"as good as any; give rows of {where} whose scores differ."
        )


def require_groups(groups: Sequence[int] | Ints | None) -> None:
    """Raise CertificateError where rows come in fewer than 30 groups."""
    if groups is not None and (count := len(np.unique(groups))) < GROUPS:
        raise CertificateError(
            f"the certify rows form {count} groups; at least {GROUPS} are needed to see how much groups differ. Give "
            "more rows, or rows of more groups; where they are cut from train, rows with one text are a group."
        )


def chance(pairs: Pairs, tested: Tested, drop: float, level: float) -> float:
    """Power at the given true drop with as many rows, and as much spread, as were observed."""
    if pairs.exact:
        return power.binary_power(_discordant(tested, len(pairs)), drop, len(pairs), tested.margin, level)
    return power.normal_power(_spread(tested, level), drop, tested.margin, level)


def rows_needed(pairs: Pairs, tested: Tested, drop: float, level: float) -> int | None:
    """Rows for a chance of 0.8 at the given true drop; with groups, rows in groups of the same sizes."""
    if pairs.exact:
        return power.binary_rows(_discordant(tested, len(pairs)), drop, tested.margin, level)
    return power.normal_rows(_spread(tested, level), drop, len(pairs), tested.margin, level)


def _discordant(tested: Tested, rows: int) -> float:
    return (tested.lost + tested.gained) / rows


def _spread(tested: Tested, level: float) -> float:
    """The standard error that a normal distribution with the interval of the drop would have."""
    return (tested.drop.high - tested.drop.low) / (2 * normal_quantile(level))


def _resampled(pairs: Pairs, max_drop: float, level: float, seed: int) -> Comparison:
    """The margin may depend on the reference (MAE), so each resample has its own: tested is drop - margin < 0."""
    task = pairs.task
    both = np.concatenate([pairs.reference, pairs.candidate[:, :1]], axis=1)
    extra, size = _unseen(pairs, level), 1
    if pairs.groups is not None:
        sizes = np.bincount(pairs.groups)
        size = round(float((sizes**2).sum() / sizes.sum()))  # of the group of a random row
    sample = Sample.of(both, pairs.groups, seed, extra, size)

    def shortfall(weights: Floats) -> Floats:
        reference = task.quality(sample.rows[:, :2], weights)
        candidate = task.quality(sample.rows[:, [2, 1]], weights)
        margins = np.array([task.margin(max_drop, float(q)) for q in reference])
        return np.asarray(reference - candidate - margins)

    at = float(task.quality(pairs.reference))
    margin, drop = task.margin(max_drop, at), at - float(task.quality(pairs.candidate))
    found = Bootstrap.of(sample, shortfall, level, task.step)
    low, high = found.bound(level) + margin, found.bound(1 - level) + margin
    return Comparison(Estimate(drop, min(low, drop), max(high, drop)), margin, found.p_value(0.0))


def _unseen(pairs: Pairs, level: float) -> Floats:
    """Rows (m, 3) of reference, truth and candidate that extend the sample: z^2 / 2 lost and as many gained.

    Agresti and Coull (1998) add as many to a single proportion, Bonett and Price (2012) add lost and gained pairs to a
    paired table; Fay and Feuer (1997) add to the stratum of the largest weight. One of each was too few in simulations
    (3 to 5 % false at a level of 2.5 %), and studentized intervals were worse than BCa.

    Classification: in the class in which one lost row weighs most. Scores: a gross error as large as the quartiles of
    the truth are apart, or as the largest that was seen; without it, rare errors of that size passed in 14 %. A rank
    correlation gets z^2 lost ones: with half as many they still passed in 8 % (19 of 225), with these in 5 % (11).
    """
    count = math.ceil(normal_quantile(level) ** 2 / 2)
    lost = _heaviest(pairs) if isinstance(pairs.task, Classify) else _gross(pairs)
    more = 2 if pairs.task.metric == "spearman" else 1
    return np.array([lost] * (more * count) + [lost[::-1]] * count, np.float64)


def extended(task: Task, outcomes: Floats, level: float) -> tuple[float, float]:
    """What `_unseen` rows do to the drop of a candidate that answers these rows as its reference does, outcomes (n, 2):
    how far they move it, and the standard error that they add. For plans; the exact test, which adds no rows, asks
    for nearly as much. Both fall with n."""
    falls = [
        task.quality(np.vstack([outcomes, row[:2]])) - task.quality(np.vstack([outcomes, row[[2, 1]]]))
        for row in _unseen(Pairs(task, outcomes, outcomes), level)
    ]
    return float(sum(falls)), math.sqrt(sum(float(fall) ** 2 for fall in falls))


def _gross(pairs: Pairs) -> list[float]:
    """Reference, truth and candidate of a row on which the candidate of scores is grossly wrong."""
    true = pairs.reference[:, 1]
    low, high = np.quantile(true, [0.25, 0.75], method="nearest")
    if low == high:
        low, high = true.min(), true.max()
    grows = _error(pairs.candidate) - _error(pairs.reference)
    i = int(grows.argmax())
    if grows[i] > high - low:
        return [float(pairs.reference[i, 0]), float(true[i]), float(pairs.candidate[i, 0])]
    return [float(low), float(low), float(high)]


def _heaviest(pairs: Pairs) -> list[float]:
    """Reference, truth and candidate of the lost row that lowers the metric most, if it were added."""
    task, true = pairs.task, pairs.reference[:, 1]
    counts = np.bincount(true.astype(int), minlength=task.outputs)
    first, second = np.argsort(-counts, kind="stable")[:2]
    labels = np.flatnonzero(counts)
    # A wrong answer is the most frequent other label: it changes that label's F1 least.
    wrong = np.where(labels == first, second, first)
    rows, times = np.unique(np.hstack([pairs.reference, pairs.candidate[:, :1]]), axis=0, return_counts=True)
    rows = np.vstack([rows, np.stack([labels, labels, wrong], axis=1)])
    weights = np.hstack([np.tile(times, (len(labels), 1)), np.eye(len(labels))])
    falls = task.quality(rows[:, :2], weights) - task.quality(rows[:, [2, 1]], weights)
    worst = int(np.argmax(falls))
    return [float(labels[worst]), float(labels[worst]), float(wrong[worst])]


def _error(outcomes: Floats) -> Floats:
    return np.abs(outcomes[:, 0] - outcomes[:, 1])
