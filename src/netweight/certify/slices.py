"""Quality on parts of the certify rows: where a drop sits. Not adjusted for their number, and never a verdict."""

from __future__ import annotations

import unicodedata
from collections import Counter
from collections.abc import Sequence

import numpy as np

from netweight.certify.bootstrap import Sample, interval
from netweight.certify.certificate import Estimate, Floats, Ints, Outcomes, Slice
from netweight.certify.tails import normal_quantile, tango
from netweight.data.rows import Rows
from netweight.task import Classify, Task

ROWS = 30  # rows, or groups of them, below which no interval is given
# In a task's step. Below it an interval has none: what is drawn again never differs, which does not say that it cannot.
_WIDTH = 1e-9
VALUES = 30  # of a column, by number of rows
# Scripts that begin so in Unicode's names; the first word of a letter's name tells its script.
_HAN = ("CJK", "KANGXI")


def columns(rows: Rows) -> dict[str, tuple[str, ...]]:
    """Script and length of each text, groups where they are few, and the columns of `rows.slices`."""
    found: dict[str, tuple[str, ...]] = {
        "script": tuple(script(text) for text in rows.text),
        "length": _thirds([len(text) for text in rows.text]),
    }
    if rows.group is not None and len(set(rows.group)) <= VALUES:
        found["group"] = rows.group
    return found | dict(rows.slices)


def script(text: str) -> str:
    """The script of most of its letters: Latin, Han, Cyrillic, ...; "none" without letters.

    Hiragana or Katakana make a text Japanese though most of its letters be Han.
    """
    # ｉＰｈｏｎｅ and ｶﾜｲｲ are Latin and kana, whatever their width.
    letters = unicodedata.normalize("NFKC", "".join(filter(str.isalpha, text)))
    names = Counter(unicodedata.name(char, "NONE").split()[0].split("-")[0] for char in letters if char.isalpha())
    if not names:
        return "none"
    if names["HIRAGANA"] + names["KATAKANA"] > 0.1 * names.total():
        return "Japanese"
    name = names.most_common(1)[0][0]
    return "Han" if name in _HAN else name.capitalize()


def _thirds(lengths: Sequence[int]) -> tuple[str, ...]:
    """The third of all lengths in which each lies, as a range of characters."""
    values = np.asarray(lengths)
    edges = np.unique(np.quantile(values, [1 / 3, 2 / 3], method="lower"))
    third = np.searchsorted(edges, values)
    named = {}
    for number in range(len(edges) + 1):
        some = values[third == number]
        if len(some):
            low, high = int(some.min()), int(some.max())
            named[number] = f"{low} characters" if low == high else f"{low}-{high} characters"
    return tuple(named[int(i)] for i in third)


def slices_of(task: Task, outcomes: Outcomes, shipped: str, level: float) -> tuple[Slice, ...]:
    """Reference and shipped candidate on each value of each column, at most 30 values a column, those of most rows.

    Classification is scored by the share of right rows whatever its metric, since a macro-F1 within one label says
    nothing; scores by their metric. `drop` has Tango's interval; with groups, and for scores, the bootstrap's.
    """
    candidate, found = outcomes.candidates[shipped], []
    for name, column in _with_labels(task, outcomes).items():
        counts = Counter(column)
        kept = sorted(counts, key=lambda value: (-counts[value], value))[:VALUES]
        cells = np.asarray(column, object)
        for value in kept:
            at = np.flatnonzero(cells == value)
            groups = None if outcomes.clusters is None else outcomes.clusters[at]
            found.append(_slice(task, (name, value), outcomes.reference[at], candidate[at], groups, level))
    return tuple(found)


def _with_labels(task: Task, outcomes: Outcomes) -> dict[str, tuple[str, ...]]:
    if not isinstance(task, Classify):
        return dict(outcomes.slices)
    return {"label": tuple(task.labels[int(i)] for i in outcomes.reference[:, 1])} | dict(outcomes.slices)


def _slice(
    task: Task, named: tuple[str, str], reference: Floats, candidate: Floats, groups: Ints | None, level: float
) -> Slice:
    n = len(reference)
    if isinstance(task, Classify):
        task = Classify(task.labels)
    was, now = float(task.quality(reference)), float(task.quality(candidate))
    units = n if groups is None else len(np.unique(groups))
    drop = _drop(task, reference, candidate, groups, level) if units >= ROWS else None
    return Slice(*named, n, was, now, drop)


def _drop(task: Task, reference: Floats, candidate: Floats, groups: Ints | None, level: float) -> Estimate | None:
    if isinstance(task, Classify) and groups is None:
        right, still = task.correct(reference), task.correct(candidate)
        b, c, n = int((right & ~still).sum()), int((still & ~right).sum()), len(right)
        return Estimate((b - c) / n, *tango(b, c, n, normal_quantile(level)))
    sample = Sample.of(np.concatenate([reference, candidate[:, :1]], axis=1), groups, seed=0)

    def drop(weights: Floats) -> Floats:
        return np.asarray(task.quality(sample.rows[:, :2], weights) - task.quality(sample.rows[:, [2, 1]], weights))

    found = interval(sample, drop, level, task.step)
    return found if found.high - found.low > _WIDTH * task.step else None
