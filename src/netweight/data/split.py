"""From tables to a Dataset: given splits are respected, missing ones are cut from train, and nothing leaks."""

from __future__ import annotations

from collections import Counter
from collections.abc import Mapping, Sequence
from dataclasses import replace
from typing import Literal

import numpy as np
from numpy.typing import NDArray

from netweight.data.check import BadRow, alike, spelling
from netweight.data.cluster import Bools, Ints, clusters, cut, numbered, one_for_each, oversized
from netweight.data.rows import Dataset, Rows, Sealed, groups_of
from netweight.errors import DataError, LabelError, OptionError

# A larger certify split would hardly sharpen the certificate: at 5,000 rows, 1 point and 5 % discordant rows its
# power is about 0.93, and labelled rows are worth more in train. Dev only ranks candidates.
CERTIFY_SHARE, CERTIFY_MOST = 0.20, 5_000
DEV_SHARE, DEV_MOST = 0.15, 4_000
_BINS = 10  # strata of a score


def split(
    train: Rows,
    *,
    dev: Rows | None = None,
    certify: Rows | None = None,
    pool: Rows | None = None,
    kind: Literal["classify", "score"] = "classify",
    seed: int = 0,
    aside: list[BadRow] | None = None,
) -> Dataset:
    """Train, select, calibrate, certify and pool; no normalised text and no group is in two of the first four.

    - A given `dev` or `certify` is kept; otherwise 20 % of train (at most 5,000 rows) become certify and 15 %
      (at most 4,000) dev, stratified by label, for scores by deciles. Each label keeps rows in train.
    - Dev is halved into select and calibrate by hash, stratified too.
    - Rows of dev that share a text or group with certify are removed; so are rows of train and pool that share one
      with dev or certify; never rows of certify. `notes` counts them.
    - Labels that may be one, written in several ways, stay as they are; a note names them.
    - Classification: where one text of train has different labels, only the rows of its majority label stay (ties: the
      label more frequent in train, then the first in the alphabet). The others go to `aside`, with row numbers.

    Membership depends on content and seed, not on the order of rows; certify rows are put in an order that depends on
    content, so that shuffling a file does not make a fresh certify set of it. A certify that was cut says what of it
    was cut as a whole; rows of a given one are taken for drawn one by one, or by its column of groups.
    Raises LabelError (no labels, one label, a label with one row, unknown labels), DataError (too few rows).
    """
    if kind not in ("classify", "score"):
        raise OptionError(f"unknown task {kind!r}; use classify or score.")
    _require({"train": train, "dev": dev, "certify": certify, "pool": pool})
    notes: list[str] = []
    if kind == "classify":
        strata = numbered_labels(train)
        notes += _twins(train)
        minority = _minority(train, strata)
    else:
        strata = _bins(train, dev, certify)
        minority = np.zeros(len(train), bool)

    if dev is not None and certify is not None:
        dev = _pick(dev, ~_shared(dev, "dev", certify, "certify", notes))
    leaks = np.zeros(len(train), bool)
    for name, other in (("certify", certify), ("dev", dev)):
        if other is not None:
            leaks |= _shared(train, "train", other, name, notes, but=leaks)
    train, strata, minority = _pick(train, ~leaks), strata[~leaks], minority[~leaks]

    to_certify, to_dev = _cuts(train, strata, minority, certify is None, dev is None, seed, notes)
    if certify is None:
        certify = _pick(train, to_certify)
        notes.append(f"{_rows(to_certify.sum())} cut from train for certify, stratified, with seed {seed}.")
    if dev is None:
        dev = _pick(train, to_dev)
        notes.append(f"{_rows(to_dev.sum())} cut from train for dev, stratified, with seed {seed}.")
    rest = ~to_certify & ~to_dev
    bad = _set_aside(train, rest & minority, notes)
    if aside is not None:
        aside += bad
    train = _pick(train, rest & ~minority)

    pool = _apart(pool, dev, certify, notes)
    select, calibrate = _halves(dev, kind, seed)
    _enough({"train": train, "select": select, "calibrate": calibrate, "certify": certify})
    if kind == "classify":
        others = {"dev": dev, "certify": certify}
        _known(train.label or (), others, "train does not have", "Add such rows to train, or remove them from")
    ordered = _in_order(certify)
    if to_certify.any():
        ordered = _drawn_together(ordered, notes)
    counts, units = _counts(train.label or (), ordered) if kind == "classify" else ({}, {})
    return _told(Dataset(train, select, calibrate, Sealed(ordered), pool, tuple(notes), counts, units))


def without_train(
    dev: Rows,
    certify: Rows,
    pool: Rows | None = None,
    kind: Literal["classify", "score"] = "classify",
    labels: Sequence[str] = (),
    seed: int = 0,
) -> Dataset:
    """The Dataset of a job whose training rows are elsewhere, with clients; its own `train` is empty.

    `labels` are those of the rows elsewhere; without them, those of dev. Rows are removed as in `split`, and the same
    is raised.
    """
    _require({"dev": dev, "certify": certify, "pool": pool})
    if kind == "classify":
        if not labels:
            numbered_labels(dev, "dev")
        others = {"dev": dev, "certify": certify}
        _known(labels or dev.label or (), others, "are not among the job's", "Name them, or remove such rows from")
    else:
        _bins(dev, None, certify, called="dev")
    notes = ["Whether rows of clients share a text with dev or certify was not checked: nobody sees both."]
    notes += _twins(dev) if kind == "classify" else []
    dev = _pick(dev, ~_shared(dev, "dev", certify, "certify", notes))
    pool = _apart(pool, dev, certify, notes)
    select, calibrate = _halves(dev, kind, seed)
    parts = {"select": select, "calibrate": calibrate, "certify": certify}
    _enough(parts if pool is None else {**parts, "pool": pool})
    counts, units = _counts(labels or dev.label or (), certify) if kind == "classify" else ({}, {})
    sealed = Sealed(_in_order(certify))
    return _told(Dataset(dev.take([]), select, calibrate, sealed, pool, tuple(notes), counts, units))


def _require(parts: Mapping[str, Rows | None]) -> None:
    """The first is there, and the others have the same columns."""
    first, *_ = parts
    paired = parts[first].pair is not None  # type: ignore[union-attr]
    for name, rows in parts.items():
        if rows is None:
            continue
        if not len(rows):
            raise DataError(f"{name} has no rows; give a table with rows, or leave it out.")
        if rows.label is None and name != "pool":
            raise LabelError(f"{name} has no labels; say which column holds them.")
        if (rows.pair is not None) != paired:
            raise DataError(f"{first} has {'a' if paired else 'no'} pair column and {name} differs; align them.")


def numbered_labels(rows: Rows, called: str = "train") -> Ints:
    """Numbers (n,) of the labels of a table that says which there are, in alphabetical order. Raises LabelError for one
    label, and for a label with one row."""
    names, numbers, counts = np.unique(np.array(rows.label, object), return_inverse=True, return_counts=True)
    if len(names) < 2:
        raise LabelError(
            f"all {_rows(len(rows))} of {called} have the label {names[0]!r}; classification needs at least 2 labels. "
            "Is it the right column?"
        )
    if single := names[counts < 2].tolist():
        more = f" and {len(single) - 5:,} more" if len(single) > 5 else ""
        raise LabelError(
            f"each label needs at least 2 rows in {called}; only 1 has {', '.join(map(repr, single[:5]))}{more}. "
            "Add rows, or merge or remove such labels; for numbers the task is score."
        )
    return numbers.astype(np.int64)


def _twins(rows: Rows) -> list[str]:
    """A sentence where labels of these rows may be one that is written in several ways."""
    counts = Counter(rows.label)
    forms: dict[float | str, list[str]] = {}
    for label in sorted(counts):
        forms.setdefault(spelling(label), []).append(f"{label!r} ({_rows(counts[label])})")
    found = [_some(labels, " and ") for labels in forms.values() if len(labels) > 1]
    said = f"Labels that differ only in how they are written count as different ones: {_some(found, '; ')}."
    return [f"{said} Write them alike if they are one."] if found else []


def _some(named: Sequence[str], between: str) -> str:
    """The first five, and how many more there are."""
    more = [f"{len(named) - 5:,} more"] if len(named) > 5 else []
    return between.join([*named[:5], *more])


def _scores(rows: Rows, name: str) -> NDArray[np.float64]:
    """Labels as numbers (n,)."""
    values = np.empty(len(rows))
    for i, label in enumerate(rows.label or ()):
        try:
            values[i] = float(label)
        except ValueError:
            values[i] = np.nan
        if not np.isfinite(values[i]):
            raise LabelError(f"a score must be a finite number; row {rows.number[i]:,} of {name} has {label[:40]!r}.")
    return values


def _bins(train: Rows, dev: Rows | None, certify: Rows | None, called: str = "train") -> Ints:
    """Deciles of the scores of the first (n,); those of the other tables are only looked at for being numbers."""
    values = _scores(train, called)
    if values.min() == values.max():
        raise LabelError(
            f"all {_rows(len(train))} of {called} have the score {values[0]:g}; there is nothing to learn."
        )
    for name, rows in (("dev", dev), ("certify", certify)):
        if rows is not None:
            _scores(rows, name)
    return _deciles(values)


def _deciles(values: NDArray[np.float64]) -> Ints:
    """The tenth of the distribution in which each value lies (n,)."""
    return np.searchsorted(np.quantile(values, np.arange(1, _BINS) / _BINS), values).astype(np.int64)


def _minority(train: Rows, labels: Ints) -> Bools:
    """Rows (n,) whose text has another label in most of its rows. DataError where over half of the rows contradict."""
    width = int(labels.max()) + 1
    pairs, inverse, counts = np.unique(numbered(train.keys) * width + labels, return_inverse=True, return_counts=True)
    text, label = pairs // width, pairs % width
    order = np.lexsort((label, -np.bincount(labels)[label], -counts, text))
    winner = np.zeros(len(pairs), bool)
    winner[order[np.unique(text[order], return_index=True)[1]]] = True
    several = np.bincount(text)[text] > 1
    contradicting = int(several[inverse].sum())
    if 2 * contradicting > len(train):
        raise DataError(
            f"{contradicting:,} of {_rows(len(train))} of train have a text that also occurs with another label, for "
            f"example row {train.number[int(several[inverse].argmax())]:,}. Is the label column the right one?"
        )
    return ~winner[inverse]


def _shared(rows: Rows, name: str, other: Rows, other_name: str, notes: list[str], but: Bools | None = None) -> Bools:
    """Rows (n,) whose text or group occurs in `other`, without those already known (`but`); adds a note."""
    texts, keys = set(other.keys), rows.keys
    shared = np.fromiter((key in texts for key in keys), bool, len(keys))
    what = "text"
    if rows.group is not None and other.group is not None:
        groups = set(other.group) - {""}
        shared |= np.fromiter((group in groups for group in rows.group), bool, len(rows))
        what = "text or group"
    if but is not None:
        shared &= ~but
    if shared.any():
        were = "was" if shared.sum() == 1 else "were"
        first = rows.number[int(shared.argmax())]
        notes.append(
            f"{_rows(shared.sum())} of {name} whose {what} occurs in {other_name} {were} removed from {name} "
            f"(first: row {first:,})."
        )
    return shared


def _drawn_together(certify: Rows, notes: list[str]) -> Rows:
    """Rows that were cut from a table, and what of them was cut as a whole: rows with one text, or one group, all came
    or none of them did, so that a certificate must not take them for independent."""
    of = clusters(certify, np.zeros(len(certify), np.int64), 0).of
    size = np.bincount(of)
    if (together := int((size[of] > 1).sum())) == 0:
        return certify
    notes.append(
        f"{_rows(together)} of certify share a text or group with another one and were cut together; the certificate "
        f"counts them as {int((size > 1).sum()):,} groups."
    )
    return replace(certify, drawn=tuple(of.tolist()))


def _apart(pool: Rows | None, dev: Rows, certify: Rows, notes: list[str]) -> Rows | None:
    """The pool without labels, and without rows of dev and certify."""
    if pool is None:
        return None
    leaks = _shared(pool, "pool", certify, "certify", notes)
    return _pick(pool.unlabelled(), ~(leaks | _shared(pool, "pool", dev, "dev", notes, but=leaks)))


def _told(data: Dataset) -> Dataset:
    """With a note where teachers do not label all rows."""
    rows = (len(data.train), len(data.pool or ()))
    notes = (
        f"Teachers label {most:,} of the {there:,} rows of {name}, those whose texts have the smallest hashes: "
        "with all of them no time, or no memory, would be left for students."
        for name, there, most in zip(("train", "pool"), rows, data.most_taught, strict=True)
        if most < there
    )
    return replace(data, notes=(*data.notes, *notes))


def _cuts(
    train: Rows, strata: Ints, minority: Bools, want_certify: bool, want_dev: bool, seed: int, notes: list[str]
) -> tuple[Bools, Bools]:
    """Rows of train (n,) for certify and for dev; none where they are not wanted. A note tells of rows that certify
    cannot have."""
    nothing = np.zeros(len(train), bool)
    if not len(train):
        return nothing, nothing
    parts = clusters(train, strata, seed)
    # Labels that have contradicted rows only cannot be learnt: their rows stay, and are set aside with the minority.
    lost = minority & ~np.isin(strata, strata[~minority])
    allowed = ~one_for_each(parts, strata, ~minority)
    allowed[parts.of[lost]] = False
    share = min(CERTIFY_SHARE, CERTIFY_MOST / len(train))
    certify = cut(parts, share, allowed) if want_certify else nothing
    if want_certify and (large := oversized(parts, share)).any():
        notes.append(
            f"{_rows(large.sum())} of train share a text or group with so many others of their kind that they are "
            f"never cut for certify (first: row {train.number[int(large.argmax())]:,}); the certificate says nothing "
            "of them."
        )
    allowed[parts.of[certify]] = False
    return certify, cut(parts, min(DEV_SHARE, DEV_MOST / len(train)), allowed) if want_dev else nothing


def _halves(dev: Rows, kind: str, seed: int) -> tuple[Rows, Rows]:
    """select and calibrate."""
    if not len(dev):
        return dev, dev
    strata = numbered(tuple(sorted(set(dev.label or ()))) + (dev.label or ()))[-len(dev) :]
    parts = clusters(dev, strata if kind == "classify" else _deciles(_scores(dev, "dev")), seed + 1)
    select = cut(parts, 0.5, np.ones(len(parts.size), bool))
    return _pick(dev, select), _pick(dev, ~select)


def _set_aside(train: Rows, minority: Bools, notes: list[str]) -> list[BadRow]:
    bad = []
    for i in np.flatnonzero(minority).tolist():
        cells = {"text": train.text[i], "label": (train.label or ())[i]} | (
            {"pair": train.pair[i]} if train.pair else {}
        )
        bad.append(BadRow(train.number[i], "label contradicts that of most rows with the same text", cells))
    if bad:
        were = "was" if len(bad) == 1 else "were"
        notes.append(
            f"{_rows(len(bad))} of train whose label contradicts that of most rows with the same text {were} set aside "
            f"(first: row {bad[0].number:,})."
        )
    return bad


def _known(labels: Sequence[str], others: Mapping[str, Rows], problem: str, advice: str) -> None:
    known = set(labels)
    for name, rows in others.items():
        unknown = [(label, n) for label, n in zip(rows.label or (), rows.number, strict=True) if label not in known]
        if unknown:
            named = ", ".join(repr(label) for label in list(dict(unknown))[:5])
            raise LabelError(
                f"{_rows(len(unknown))} of {name} have labels that {problem}: {named} (first: row "
                f"{unknown[0][1]:,}). {advice} {name}.{alike(dict(unknown), known)}"
            )


def _counts(labels: Sequence[str], certify: Rows) -> tuple[dict[str, int], dict[str, int]]:
    """How many certify rows each label has, and how many if those of one group count once."""
    cells = certify.label or ()
    rows = Counter(cells)
    units = Counter(label for label, _ in set(zip(cells, groups_of(certify) or range(len(certify)), strict=True)))
    known = sorted(set(labels))
    return {label: rows[label] for label in known}, {label: units[label] for label in known}


def _enough(parts: dict[str, Rows]) -> None:
    if any(not len(rows) for rows in parts.values()):
        sizes = ", ".join(f"{name} {len(rows):,}" for name, rows in parts.items())
        raise DataError(
            f"too few rows with different texts (or too few groups) to fill every split: {sizes}. "
            "Give more rows, or give dev and certify as tables of their own."
        )


def _in_order(rows: Rows) -> Rows:
    columns = [rows.keys] + [column for name, column in rows.columns() if name != "number"]
    return rows.take(sorted(range(len(rows)), key=lambda i: [column[i] for column in columns]))


def _pick(rows: Rows, mask: Bools) -> Rows:
    return rows if mask.all() else rows.take(np.flatnonzero(mask).tolist())


def _rows(count: int) -> str:
    return f"{count:,} row" + ("" if count == 1 else "s")
