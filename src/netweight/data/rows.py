"""The rows of one split, the sealed certify split, and the dataset that holds them all."""

from __future__ import annotations

import hashlib
import math
import re
from collections.abc import Iterable, Mapping, Sequence
from contextlib import suppress
from dataclasses import dataclass, field, fields, replace
from functools import cached_property
from typing import Any

import numpy as np
from numpy.typing import NDArray

from netweight.data.check import Unusable, cell_label, cell_text, cell_weight, normalise
from netweight.errors import CertificateError, DataError, no_list

# Rows of a pool that teachers label: millions would take hours, in which no student learns, and gigabytes of logits.
MOST_TAUGHT = 200_000
# Logits of a teacher, rows times labels, that are kept at most: a gigabyte. Of 3,000 labels those of 89,000 rows.
MOST_SAID = 2**28

# Between the two texts of a pair: normalised text holds no white space but single blanks, so this cannot occur in it.
_PAIR = "\x1f"


@dataclass(frozen=True)
class Rows:
    """One split as columns of equal length; a column that the data does not have is None.

    `label` stays text: the task turns it into targets. `slices` holds further columns for the slice table. `drawn`
    numbers what was cut from a table as a whole, where rows were: those with one number all came, or none did.
    `number` is the row's number in its source (1 is the first row under the header), for messages; without it
    rows are numbered from 1.

    Any sequence will do for a column, such as one of pandas, whose index does not count. Texts must be strings. Labels,
    and what else is no string, become what they would be in a table: 1 is "1", True is "true", "nan" is no label.
    Raises DataError where that cannot be, or where the lengths differ.
    """

    text: tuple[str, ...]
    label: tuple[str, ...] | None = None
    pair: tuple[str, ...] | None = None
    group: tuple[str, ...] | None = None
    weight: tuple[float, ...] | None = None
    slices: Mapping[str, tuple[str, ...]] = field(default_factory=dict)
    number: tuple[int, ...] = ()
    drawn: tuple[int, ...] | None = None

    def __post_init__(self) -> None:
        for name, column in self.columns():
            if not name.startswith("slice "):
                object.__setattr__(self, name, _tuple(name, column))
        slices = {name: _tuple(f"slice {name}", column) for name, column in self.slices.items()}
        object.__setattr__(self, "slices", slices)
        if not self.number:
            object.__setattr__(self, "number", tuple(range(1, len(self.text) + 1)))
        lengths = {name: len(column) for name, column in self.columns()}
        if len(set(lengths.values())) > 1:
            said = ", ".join(f"{name} {length}" for name, length in lengths.items())
            raise DataError(f"the columns of rows must have one length; these have {said}.")
        for name in ("text", "label", "pair", "group", "weight"):
            if (column := getattr(self, name)) is not None:
                object.__setattr__(self, name, _checked(name, column, self.number))
        for name, column in slices.items():
            slices[name] = _checked(f"slice {name}", column, self.number)

    def __len__(self) -> int:
        return len(self.text)

    def take(self, indices: Iterable[int]) -> Rows:
        """The rows at these 0-based positions, in this order; an integer array will do."""
        at = [int(i) for i in indices]
        taken = {name: tuple([column[i] for i in at]) for name, column in self.columns()}
        rows = _of(taken)
        if "keys" in self.__dict__:
            # Normalising is the slowest part of a split; what is known already is handed on.
            rows.__dict__["keys"] = tuple([self.keys[i] for i in at])
        return rows

    @cached_property
    def keys(self) -> tuple[str, ...]:
        """The normalised text of each row, joined with that of its pair: equal keys mean the same input."""
        texts = [normalise(text) for text in self.text]
        if self.pair is None:
            return tuple(texts)
        return tuple([f"{text}{_PAIR}{normalise(pair)}" for text, pair in zip(texts, self.pair, strict=True)])

    def distinct(self) -> NDArray[np.int64]:
        """Position of the first row of each normalised text, in order."""
        first = dict(zip(reversed(self.keys), range(len(self) - 1, -1, -1), strict=True))
        return np.array(sorted(first.values()), np.int64)

    @cached_property
    def fingerprint(self) -> str:
        """SHA-256 (hex) of all columns in order. Row numbers do not count, nor do slices, which change what a report
        shows, but no model and no verdict: with further columns they are the same rows, and looks at them add up."""
        digest = hashlib.sha256()
        for name, column in self.columns():
            if name == "number" or name.startswith("slice "):
                continue
            cells = [str(cell).encode("utf-8", "surrogatepass") for cell in (name, *column)]
            # Lengths first: otherwise ("ab", "c") and ("a", "bc") would be the same bytes.
            digest.update(np.array([len(cells), *map(len, cells)], "<i8").tobytes())
            digest.update(b"".join(cells))
        return digest.hexdigest()

    def sample(self, count: int) -> NDArray[np.int64]:
        """Positions of so many rows (of all where there are fewer), in order: those whose texts have the smallest
        hashes, so that they are the same ones in whatever order rows come."""
        if len(self) <= count:
            return np.arange(len(self))
        digests = (hashlib.sha256(key.encode("utf-8", "surrogatepass")).digest()[:8] for key in self.keys)
        hashes = np.fromiter((int.from_bytes(digest, "big") for digest in digests), np.uint64, len(self))
        return np.sort(np.argsort(hashes, kind="stable")[:count])

    def unlabelled(self) -> Rows:
        """The same rows without labels."""
        return replace(self, label=None)

    def columns(self) -> list[tuple[str, Sequence[Any]]]:
        """Names and cells of the columns that there are; those of `slices` as "slice NAME"."""
        named = [(f.name, getattr(self, f.name)) for f in fields(self) if f.name != "slices"]
        slices = [(f"slice {name}", column) for name, column in sorted(self.slices.items())]
        return [(name, column) for name, column in named if column is not None] + slices


def concat(first: Rows, second: Rows) -> Rows:
    """The rows of both, in this order. Raises DataError where one has a column that the other lacks."""
    one, two = dict(first.columns()), dict(second.columns())
    if one.keys() != two.keys():
        raise DataError(f"rows with the columns {', '.join(one)} cannot be joined with rows of {', '.join(two)}.")
    joined = {name: (*column, *two[name]) for name, column in one.items()}
    return _of(joined)


def groups_of(rows: Rows) -> tuple[int, ...] | None:
    """Numbers of what is resampled as a whole: what was cut together, else groups; a row without a group stands alone.
    None where all rows do."""
    found = rows.drawn
    if found is None and rows.group is not None:
        numbers: dict[str, int] = {}
        found = tuple(numbers.setdefault(group or f"\x00{i}", len(numbers)) for i, group in enumerate(rows.group))
    return found if found is not None and len(set(found)) < len(rows) else None


def _of(columns: Mapping[str, tuple[Any, ...]]) -> Rows:
    """Rows of columns that are checked already, named as `Rows.columns` names them: a table may have millions of
    cells, and a split takes them apart many times."""
    rows = object.__new__(Rows)
    own = {name: column for name, column in columns.items() if not name.startswith("slice ")}
    slices = {name.removeprefix("slice "): column for name, column in columns.items() if name not in own}
    rows.__dict__.update(own, slices=slices)
    return rows


def _tuple(name: str, column: Any) -> tuple[Any, ...]:
    if isinstance(column, tuple):
        return column
    if why := no_list(column, f"{name} of rows"):
        raise DataError(why)
    return tuple(column.tolist() if hasattr(column, "tolist") else column)


def _checked(name: str, column: tuple[Any, ...], numbers: tuple[int, ...]) -> tuple[Any, ...]:
    """The cells of one column as what they must be. Raises DataError, with the row's number."""
    if name == "weight":
        if set(map(type, column)) <= {float} and all(map(math.isfinite, column)) and min(column, default=0.0) >= 0:
            return column
    elif name != "label" and set(map(type, column)) <= {str}:
        return column
    elif name == "label" and set(map(type, column)) <= {str}:
        with suppress(Unusable):
            known = {cell: cell_label(cell) for cell in set(column)}
            return tuple([known[cell] for cell in column])
    found = []
    for cell, number in zip(column, numbers, strict=True):
        try:
            found.append(_cell(name, cell))
        except Unusable:
            wanted = {"weight": "a number of at least 0", "label": "a label, which is not empty, nan or null"}.get(
                name, "a string (str() makes one)"
            )
            raise DataError(
                f"{name} of row {number} is {repr(cell)[:80]}, of type {type(cell).__name__}; pass {wanted}, or leave "
                "the row out."
            ) from None
    return tuple(found)


def _cell(name: str, cell: Any) -> str | float:
    """One cell as what a column of this name holds. Raises Unusable."""
    if name == "weight":
        return cell_weight(cell)
    if name == "label":
        return cell_label(cell)
    if isinstance(cell, str):
        return str(cell)
    if name in ("text", "pair"):
        raise Unusable
    return cell_text(cell).strip()


class Sealed:
    """The certify split: its inputs are open, its labels are not.

    Labels come out against the digest of a written-down plan, and only the module `certify` asks for them
    (a test walks the source). This guards against mistakes, not against somebody who means to look.
    """

    __slots__ = ("_labelled", "fingerprint", "rows")

    def __init__(self, labelled: Rows) -> None:
        if labelled.label is None:
            raise DataError("the certify split has no labels; certifying needs a labelled table.")
        self._labelled = labelled
        self.rows = labelled.unlabelled()
        self.fingerprint = labelled.fingerprint

    def __len__(self) -> int:
        return len(self.rows)

    def __repr__(self) -> str:
        return f"Sealed({len(self)} rows, fingerprint {self.fingerprint[:12]})"

    def unseal(self, registration: str) -> Rows:
        """The labelled rows. `registration` is the SHA-256 (hex) of the registered plan; else CertificateError."""
        if not re.fullmatch(r"[0-9a-f]{64}", registration):
            raise CertificateError(
                f"certify labels open against the SHA-256 digest of a registered plan, not {registration[:70]!r}; "
                "register the plan first."
            )
        return self._labelled


def _sampled(rows: Rows, most: int) -> Rows:
    return rows if len(rows) <= most else rows.take(rows.sample(most))


@dataclass(frozen=True)
class Dataset:
    """All splits of one job. `select` serves early stopping and choices, `calibrate` thresholds and temperatures.

    `counts`: certify rows of each label that train has, in alphabetical order; empty for scores, and where nobody cut
    or counted. How many there are is no look: it says nothing of any prediction. `units`: the same, with those of one
    group (`groups_of`) counted once. `notes` says in sentences what splitting removed and why.
    """

    train: Rows
    select: Rows
    calibrate: Rows
    certify: Sealed
    pool: Rows | None = None
    notes: tuple[str, ...] = ()
    counts: Mapping[str, int] = field(default_factory=dict)
    units: Mapping[str, int] = field(default_factory=dict)

    @property
    def dev(self) -> Rows:
        """select and calibrate together."""
        return concat(self.select, self.calibrate)

    @property
    def most_taught(self) -> tuple[int, int]:
        """How many rows of train, and how many of pool, teachers label. Labels that nobody counted (`counts`) bound
        neither."""
        room = MOST_SAID // max(len(self.counts), 1)
        train = min(len(self.train), room)
        return train, min(len(self.pool or ()), MOST_TAUGHT, room - train)

    def taught(self) -> Dataset:
        """The same, with samples of train and pool where they have more rows than teachers label."""
        most, of_pool = self.most_taught
        train, pool = _sampled(self.train, most), self.pool and _sampled(self.pool, of_pool)
        return self if train is self.train and pool is self.pool else replace(self, train=train, pool=pool)

    @property
    def commonest(self) -> tuple[str, float]:
        """The label of most certify rows, and its share of them."""
        label = max(self.counts, key=self.counts.__getitem__)
        return label, self.counts[label] / len(self.certify)

    @property
    def fingerprint(self) -> str:
        """SHA-256 (hex) of the fingerprints of all splits."""
        parts = [r.fingerprint for r in (self.train, self.select, self.calibrate)] + [self.certify.fingerprint]
        parts.append(self.pool.fingerprint if self.pool is not None else "-")
        return hashlib.sha256(" ".join(parts).encode()).hexdigest()
