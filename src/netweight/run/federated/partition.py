"""Ways to cut rows into clients, for experiments: every row goes to exactly one, and the seed decides which.

No client is left empty where there are enough rows: it gets one of the largest client's.
"""

from __future__ import annotations

from collections.abc import Mapping, Sequence
from dataclasses import dataclass
from typing import Protocol

import numpy as np
from numpy.typing import NDArray

from netweight.data import Dataset, Rows, concat
from netweight.data.rows import Sealed
from netweight.errors import ColumnError, OptionError

Parts = dict[str, NDArray[np.int64]]


class Partition(Protocol):
    """Positions of rows (ascending) by the name of the client that gets them."""

    def __call__(self, rows: Rows) -> Parts: ...


@dataclass(frozen=True)
class ByColumn:
    """One client for each value of a further column: the shop, the category, the region."""

    column: str

    def __call__(self, rows: Rows) -> Parts:
        if self.column not in rows.slices:
            raise ColumnError(self.column, rows.slices, "the table")
        values = np.array(rows.slices[self.column], dtype=object)
        return {str(value): np.flatnonzero(values == value) for value in sorted(set(values))}


@dataclass(frozen=True)
class Dirichlet:
    """Label skew: the rows of each label are shared out in proportions drawn from Dirichlet(alpha) (Hsu, Qi and Brown,
    2019). The smaller alpha, the fewer clients hold most of a label."""

    clients: int
    alpha: float = 0.3
    seed: int = 0

    def __post_init__(self) -> None:
        _check(self.clients, self.alpha)

    def __call__(self, rows: Rows) -> Parts:
        rng = np.random.default_rng(self.seed)
        parts: list[list[int]] = [[] for _ in range(self.clients)]
        for at in _by_label(rows).values():
            mine = np.cumsum(rng.dirichlet([self.alpha] * self.clients))[:-1]
            for part, some in zip(
                parts, np.split(rng.permutation(at), np.rint(mine * len(at)).astype(int)), strict=True
            ):
                part += some.tolist()
        return _named(parts)


@dataclass(frozen=True)
class Quantity:
    """Clients differ in how many rows they have: shares are drawn from Dirichlet(alpha)."""

    clients: int
    alpha: float = 1.0
    seed: int = 0

    def __post_init__(self) -> None:
        _check(self.clients, self.alpha)

    def __call__(self, rows: Rows) -> Parts:
        rng = np.random.default_rng(self.seed)
        cuts = np.rint(np.cumsum(rng.dirichlet([self.alpha] * self.clients))[:-1] * len(rows)).astype(int)
        return _named([part.tolist() for part in np.split(rng.permutation(len(rows)), cuts)])


@dataclass(frozen=True)
class LabelSkew:
    """Each client has rows of `labels` labels at most (McMahan et al., 2017, used two); every label has an owner, and
    its rows are shared evenly among its owners."""

    clients: int
    labels: int = 2
    seed: int = 0

    def __post_init__(self) -> None:
        _check(self.clients, 1.0)
        if self.labels < 1:
            raise OptionError(f"clients with {self.labels} labels have no rows; use 1 or more.")

    def __call__(self, rows: Rows) -> Parts:
        rng = np.random.default_rng(self.seed)
        held = _by_label(rows)
        names = list(held)
        if self.clients * self.labels < len(names):
            raise OptionError(
                f"{self.clients} clients with {self.labels} labels each leave some of {len(names)} labels without an "
                "owner; raise one of them."
            )
        each = min(self.labels, len(names))
        order = rng.permutation(len(names))
        owners: dict[str, list[int]] = {name: [] for name in names}
        for client in range(self.clients):
            for i in range(each):
                owners[names[order[(client * each + i) % len(names)]]].append(client)
        parts: list[list[int]] = [[] for _ in range(self.clients)]
        for name, at in held.items():
            for client, some in zip(owners[name], np.array_split(rng.permutation(at), len(owners[name])), strict=True):
                parts[client] += some.tolist()
        return _named(parts)


def datasets(data: Dataset, partition: Partition) -> dict[str, Dataset]:
    """A dataset for each client: train, select and calibrate rows are cut as one table, so that a client's select rows
    are like its train rows; pool rows are dealt out in turn. The certify split stays with who calls; clients' own are
    empty."""
    every = concat(data.train, data.dev)
    ends = np.cumsum([len(data.train), len(data.select), len(data.calibrate)])
    nothing = Sealed(every.take([]))
    found = {}
    parts = partition(every)
    for i, (name, at) in enumerate(parts.items()):
        pool = None if data.pool is None else data.pool.take(range(i, len(data.pool), len(parts)))
        train, select, calibrate = (every.take(part) for part in np.split(at, np.searchsorted(at, ends[:2])))
        found[name] = Dataset(train, select, calibrate, nothing, pool)
    return found


def _check(clients: int, alpha: float) -> None:
    if clients < 1 or not alpha > 0:
        raise OptionError(f"{clients} clients and alpha {alpha} make no partition; use 1 or more, and above 0.")


def _by_label(rows: Rows) -> Mapping[str, NDArray[np.int64]]:
    if rows.label is None:
        raise OptionError("rows without labels cannot be cut by label; use ByColumn or Quantity.")
    labels = np.array(rows.label, dtype=object)
    return {str(label): np.flatnonzero(labels == label) for label in sorted(set(labels))}


def _named(parts: Sequence[list[int]]) -> Parts:
    """Sorted positions by name; an empty client gets one row of the largest that can spare it."""
    held = [sorted(part) for part in parts]
    for part in held:
        largest = max(held, key=len)
        if not part and len(largest) > 1:
            part.append(largest.pop())
    width = len(str(len(held) - 1))
    return {f"client-{i:0{width}d}": np.array(part, np.int64) for i, part in enumerate(held)}
