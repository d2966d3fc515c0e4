"""Rows that must stay together, and cutting a stratified share of them by hash: independent of the order of rows."""

from __future__ import annotations

import hashlib
from dataclasses import dataclass
from typing import cast

import numpy as np
from numpy.typing import NDArray

from netweight.data.rows import Rows

Ints = NDArray[np.int64]
Bools = NDArray[np.bool_]


@dataclass(frozen=True)
class Clusters:
    """`of` (n,) is the cluster of each row; `size`, `rank` and `stratum` (k,) describe the clusters.

    Sorting by `rank`, a seeded hash of the cluster's first text, gives a random order that depends on content alone.
    """

    of: Ints
    size: Ints
    rank: NDArray[np.uint64]
    stratum: Ints


def clusters(rows: Rows, strata: Ints, seed: int) -> Clusters:
    """Rows with the same normalised text or the same group, directly or through other rows, are one cluster.

    `strata` (n,) are small numbers; a cluster counts to the most frequent one of its rows. Linear in
    rows, but for sorting numbers.
    """
    keys = rows.keys
    of = numbered(keys) if rows.group is None else _joined(numbered(keys), rows.group)
    count = int(of.max(initial=-1)) + 1
    first: list[str | None] = [None] * count
    for cluster, key in zip(of.tolist(), keys, strict=True):
        known = first[cluster]
        if known is None or key < known:
            first[cluster] = key
    salt = f"{seed} ".encode()
    digests = b"".join(
        hashlib.blake2b(salt + str(key).encode("utf-8", "surrogatepass"), digest_size=8).digest() for key in first
    )
    rank = np.frombuffer(digests, "<u8")
    return Clusters(of, np.bincount(of, minlength=count), rank, _most_frequent(of, strata))


def cut(parts: Clusters, share: float, allowed: Bools) -> Bools:
    """Mark about `share` of the rows of each stratum, by whole clusters (n,); only `allowed` (k,) ones are taken.

    What a stratum is short of, or over, by rounding is passed on to the next, so that the total comes out right.
    """
    taken = np.zeros(len(parts.size), bool)
    order = np.lexsort((parts.rank, parts.stratum))
    bounds = np.flatnonzero(np.diff(parts.stratum[order])) + 1
    carry = 0.0
    for block in np.split(order, bounds):
        left = share * float(parts.size[block].sum()) + carry
        for cluster, size in zip(block.tolist(), parts.size[block].tolist(), strict=True):
            if left < 0.5:
                break
            if allowed[cluster] and size / 2 <= left:
                taken[cluster] = True
                left -= size
        # Only rounding is passed on: a large group that did not fit must not be made up for by other labels.
        carry = min(1.0, max(-1.0, left))
    return taken[parts.of]


def oversized(parts: Clusters, share: float) -> Bools:
    """Mark the rows (n,) of clusters that `cut` never takes, whatever their rank: half of one is more than the share
    of its stratum and all that may be carried over to it."""
    most = share * np.bincount(parts.stratum, parts.size) + 1
    return (parts.size / 2 > most[parts.stratum])[parts.of]


def one_for_each(parts: Clusters, strata: Ints, counted: Bools) -> Bools:
    """Mark one cluster (k,) for each stratum that has `counted` rows (n,): the one of highest rank among theirs."""
    rows = np.flatnonzero(counted)
    order = rows[np.lexsort((parts.rank[parts.of[rows]], strata[rows]))]
    last = np.append(np.flatnonzero(np.diff(strata[order])), len(order) - 1) if len(order) else np.zeros(0, int)
    marked = np.zeros(len(parts.size), bool)
    marked[parts.of[order[last]]] = True
    return marked


def numbered(values: tuple[str, ...]) -> Ints:
    """A small number for each distinct value (n,), in order of appearance."""
    index: dict[str, int] = {}
    return np.fromiter((index.setdefault(value, len(index)) for value in values), np.int64, len(values))


def _joined(keys: Ints, groups: tuple[str, ...]) -> Ints:
    """Connected parts of the graph between texts and groups (union-find with path halving)."""
    count = int(keys.max(initial=-1)) + 1
    names: dict[str, int] = {}
    parent = list(range(count))

    def root(node: int) -> int:
        while parent[node] != node:
            parent[node] = parent[parent[node]]
            node = parent[node]
        return node

    for key, group in zip(keys.tolist(), groups, strict=True):
        if group:  # an empty cell is no group
            if group not in names:
                names[group] = len(parent)
                parent.append(len(parent))
            parent[root(key)] = root(names[group])
    _, of = np.unique(np.fromiter((root(key) for key in keys.tolist()), np.int64, len(keys)), return_inverse=True)
    return of.astype(np.int64)


def _most_frequent(of: Ints, strata: Ints) -> Ints:
    width = int(strata.max(initial=0)) + 1
    pairs, counts = np.unique(of * width + strata, return_counts=True)
    order = np.lexsort((pairs, -counts, pairs // width))
    _, first = np.unique(pairs[order] // width, return_index=True)
    return cast(Ints, pairs[order][first] % width)
