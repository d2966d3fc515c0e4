"""`--model scratch`: the main job without any pretrained model."""

from __future__ import annotations

from functools import partial
from pathlib import Path

import pytest

from conftest import Shop, again, journal, many_rows
from netweight import build
from netweight.build import PRETRAINED, TEACHER, Builder, Clock
from netweight.data import Dataset
from netweight.data.rows import Sealed
from netweight.job import Job, Options, Tables
from netweight.model import Model
from netweight.run import Local
from netweight.scratch import scratch
from netweight.store import Store
from netweight.task import Classify
from netweight.train import Silent

SMALL = partial(scratch, vocabulary=600, layers=1, hidden=32, heads=2)


@pytest.fixture(autouse=True)
def _small(monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr(build, "scratch", SMALL)


def test_the_teacher_is_pretrained_on_train_and_pool_and_then_tuned(tmp_path: Path) -> None:
    rows = many_rows(80)
    train, dev, certify, pool = (rows.take(range(a, a + 20)) for a in (0, 20, 40, 60))
    pool = pool.unlabelled()
    data = Dataset(train, dev, dev, Sealed(certify), pool)
    task, job = (
        Classify(("bad", "good")),
        Job(Tables(train), options=Options(model="scratch", max_length=32, threads=1)),
    )
    with Store(tmp_path, {"a": 1}) as store:
        teacher = Builder(job, data, task, store, Silent(), Clock(8), Local(data, store.folder / "work")).teacher
        first = Model.load(store.model_folder(PRETRAINED))
        start = SMALL((*train.text, *pool.text), task, max_length=32)
        assert first.encoder.fingerprint == teacher.encoder.fingerprint == start.encoder.fingerprint
        assert store.get(f"model {PRETRAINED}")["digest"] == first.digest != start.digest
        assert store.get(f"model {TEACHER}")["digest"] == teacher.digest != first.digest
        assert first.network.head.weight.abs().sum() == 0  # type: ignore[union-attr,operator]
        again = Builder(job, data, task, store, Silent(), Clock(8), Local(data, store.folder / "work"))
        assert again.teacher.digest == teacher.digest


@pytest.mark.slow
@pytest.mark.usefixtures("quick")
def test_a_whole_job(shop: Shop, tmp_path: Path) -> None:
    made = again(shop, tmp_path / "made.nw", model="scratch", seconds=60.0)
    assert made.manifest.provenance["base"]["name"] == "scratch"
    assert {f"model {PRETRAINED}", f"model {TEACHER}"} < set(journal(tmp_path / "made.nw"))
