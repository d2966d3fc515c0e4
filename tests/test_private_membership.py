"""The loss-threshold attack: sure of an overfitted model, blind before a fresh one."""

import numpy as np
import pytest

from conftest import THINGS, tiny_model
from netweight.data import Dataset, Rows
from netweight.data.rows import Sealed
from netweight.errors import DataError
from netweight.loss import Supervised
from netweight.run import Local
from netweight.run.federated.membership import attack, membership, row_losses
from netweight.train import Plan


def random_rows(n, seed):
    """Labels that nothing tells: they can only be learned by heart."""
    drawn = np.random.default_rng(seed)
    texts = tuple(" ".join(drawn.choice(THINGS, 8)) for _ in range(n))
    return Rows(texts, tuple("good" if drawn.random() < 0.5 else "bad" for _ in range(n)))


def test_an_overfitted_model_gives_its_rows_away_and_a_fresh_one_does_not():
    seen, unseen = random_rows(60, 1), random_rows(200, 2)
    none = seen.take(range(0))
    model = tiny_model()
    before = membership(model, seen, unseen)
    assert before.low < 0.5 < before.high
    run = Local(Dataset(seen, none, none, Sealed(none)))
    plan = Plan(epochs=80, batch_size=20, learning_rate=3e-3, warmup=0, weight_decay=0, precision="fp32")
    after = membership(run.fit(model, Supervised(model.task), plan), seen, unseen)
    assert after.auc > 0.75
    assert after.low > 0.6
    assert after.advantage > 0.3
    assert (after.seen, after.unseen) == (60, 200)


def test_the_area_is_that_of_all_pairs():
    drawn = np.random.default_rng(0)
    seen, unseen = drawn.integers(0, 6, 40).astype(float), drawn.integers(1, 8, 30).astype(float)
    pairs = [(s < u) + (s == u) / 2 for s in seen for u in unseen]
    found = attack(seen, unseen)
    assert found.auc == pytest.approx(np.mean(pairs), abs=1e-12)
    assert found.low < found.auc < found.high
    bound = seen.mean()
    assert found.advantage == pytest.approx((seen <= bound).mean() - (unseen <= bound).mean())


def test_the_interval_covers():
    """Of 300 samples of two normal distributions one apart, whose area is 0.7602 (Phi(1 / sqrt 2))."""
    drawn = np.random.default_rng(1)
    hits = 0
    for _ in range(300):
        found = attack(drawn.normal(0, 1, 40), drawn.normal(1, 1, 50))
        hits += found.low <= 0.76025 <= found.high
    assert hits >= 270


def test_a_perfect_attack_has_an_interval_too():
    found = attack(np.zeros(30) + np.arange(30) / 100, np.ones(30) + np.arange(30) / 100)
    assert found.auc == 1
    assert 0.85 < found.low < 1


def test_scores_are_attacked_by_their_squared_error():
    from netweight.task import Score

    task = Score(mean=3.0, scale=2.0)
    model = tiny_model(task)
    losses = row_losses(model, Rows(("great zip", "late shoe"), ("3", "5")))
    assert losses.shape == (2,)
    assert (losses >= 0).all()


def test_few_rows_are_refused():
    rows = random_rows(30, 0)
    with pytest.raises(DataError, match="9 training rows and 30 held-out ones; a membership check needs 10 of each"):
        membership(tiny_model(), rows.take(range(9)), rows)
    with pytest.raises(DataError, match="0 held-out ones"):
        membership(tiny_model(), rows, Rows(("a",) * 20))
