"""Partitioners: every row goes to exactly one client, and the seed decides which."""

from __future__ import annotations

import numpy as np
import pytest
from hypothesis import given, settings
from hypothesis import strategies as st

from conftest import tiny_rows
from netweight.data import Dataset, Rows
from netweight.data.rows import Sealed
from netweight.errors import ColumnError, OptionError
from netweight.run.federated.partition import ByColumn, Dirichlet, LabelSkew, Partition, Quantity, datasets


def labelled(n: int, labels: int, seed: int) -> Rows:
    drawn = np.random.default_rng(seed).integers(0, labels, n)
    return Rows(tuple(map(str, range(n))), tuple(f"label{i}" for i in drawn))


@settings(max_examples=60)
@given(
    n=st.integers(0, 200),
    labels=st.integers(1, 7),
    clients=st.integers(1, 12),
    alpha=st.floats(0.01, 100),
    seed=st.integers(0, 50),
)
def test_every_row_once_and_no_client_empty(n: int, labels: int, clients: int, alpha: float, seed: int) -> None:
    rows = labelled(n, labels, seed)
    kinds: list[Partition] = [Dirichlet(clients, alpha, seed), Quantity(clients, alpha, seed)]
    k = -(-labels // clients)
    for partition in [*kinds, LabelSkew(clients, k, seed)]:
        parts = partition(rows)
        assert len(parts) == clients
        assert sorted(np.concatenate(list(parts.values())).tolist()) == list(range(n))
        assert all((np.diff(at) > 0).all() for at in parts.values())
        assert min(map(len, parts.values())) >= (1 if n >= clients else 0)
        again = partition(rows)
        assert all(np.array_equal(parts[name], again[name]) for name in parts)
    skewed = LabelSkew(clients, k, seed)(rows)
    assert all(len({rows.label[i] for i in at}) <= k for at in skewed.values() if rows.label)


def test_alpha_says_how_skewed_clients_are() -> None:
    rows = labelled(4000, 4, 0)

    def largest(alpha: float) -> float:
        parts = Dirichlet(8, alpha)(rows).values()
        shares = [np.unique([rows.label[i] for i in at], return_counts=True)[1].max() / len(at) for at in parts]  # type: ignore[index]
        return float(np.mean(shares))

    assert largest(0.05) > 0.7 > largest(1.0) > largest(1000.0)
    assert largest(1000.0) < 0.35
    sizes = [len(at) for at in Quantity(8, 0.2)(rows).values()]
    assert max(sizes) > 4 * np.median(sizes)
    assert Dirichlet(8, 0.3, seed=1)(rows)["client-0"].tolist() != Dirichlet(8, 0.3, seed=2)(rows)["client-0"].tolist()


def test_by_column_and_whole_datasets() -> None:
    every = tiny_rows(100)
    city = tuple(("Graz", "Bonn", "Lyon")[i % 3] for i in range(100))
    rows = Rows(every.text, every.label, slices={"city": city})
    data = Dataset(
        rows.take(range(60)),
        rows.take(range(60, 80)),
        rows.take(range(80, 90)),
        Sealed(rows.take(range(90, 100))),
        rows.take(range(7)),
    )
    found = datasets(data, ByColumn("city"))
    assert list(found) == ["Bonn", "Graz", "Lyon"]
    for name, mine in found.items():
        assert set(mine.train.slices["city"]) == set(mine.select.slices["city"]) == {name}
        assert len(mine.certify) == 0
    for split in ("train", "select", "calibrate"):
        texts = sorted(t for mine in found.values() for t in getattr(mine, split).text)
        assert texts == sorted(getattr(data, split).text)
    assert [len(mine.pool or ()) for mine in found.values()] == [3, 2, 2]
    assert sorted(t for mine in found.values() for t in mine.pool.text) == sorted(rows.text[:7])  # type: ignore[union-attr]
    with pytest.raises(ColumnError, match="has no column 'town'"):
        ByColumn("town")(rows)


def test_refusals() -> None:
    with pytest.raises(OptionError, match="0 clients and alpha 0.3 make no partition"):
        Dirichlet(0)
    with pytest.raises(OptionError, match="2 clients with 2 labels each leave some of 7 labels without an owner"):
        LabelSkew(2, 2)(labelled(100, 7, 0))
    with pytest.raises(OptionError, match="clients with 0 labels have no rows"):
        LabelSkew(2, 0)
    with pytest.raises(OptionError, match="rows without labels cannot be cut by label"):
        Dirichlet(2)(Rows(("a", "b")))
