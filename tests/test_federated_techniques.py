"""Techniques know nothing of federated runs, and work under them: several here, all of them under `slow`."""

from __future__ import annotations

from dataclasses import replace
from pathlib import Path
from typing import Any

import pytest
import torch
from torch import Tensor

from conftest import KIND, journal, many_rows, net, quick_measuring, tiny_base, tiny_model, tiny_rows
from netweight.data import Dataset, Rows
from netweight.data.rows import Sealed
from netweight.engine import load
from netweight.errors import ModelError
from netweight.federate.kinds import STATISTICS
from netweight.job import Budget, Job, Options, Tables
from netweight.loss import Loss, short_row
from netweight.model import Model
from netweight.pipeline import optimize, run
from netweight.reporter import Silent
from netweight.run import Local
from netweight.run.base import Statistic
from netweight.run.federated import Client, Federated, Int8, Rounds, Travel
from netweight.run.federated.partition import Dirichlet, Quantity, datasets
from netweight.task import Score
from netweight.techniques import (
    Distill,
    Finetune,
    LinearFloor,
    Prune,
    QuantizeAware,
    Shrink,
    Technique,
)
from netweight.techniques.finetune import Moments
from netweight.techniques.prune import Gradients
from netweight.testing import TechniqueContract
from netweight.train import Plan
from quick import LORA, TECHNIQUES, VARIANTS, WAYS, some, suited

PLAN = Plan(batch_size=16, precision="fp32")
FEW = [LORA, *some(Distill, Prune, QuantizeAware)]
# A floor is fitted where its rows are.
ALL = [technique for technique in (*TECHNIQUES, *VARIANTS) if not isinstance(technique, LinearFloor)]
FURTHER = [way for way, technique in WAYS.items() if technique not in (*TECHNIQUES, *VARIANTS)]


def federated(data: Dataset, travel: Travel | None = None) -> Federated:
    clients = [Client(name, mine) for name, mine in datasets(data, Quantity(3, 2.0)).items()]
    return Federated(clients, data, rounds=Rounds(2), travel=travel, privacy=None)


def pooled(data: Dataset) -> Dataset:
    return replace(data, pool=tiny_rows(160).take(range(120, 160)).unlabelled())


@pytest.mark.parametrize("technique", FEW, ids=lambda t: type(t).__name__)
def test_contract(technique: Technique, model: Model, dataset: Dataset, tmp_path: Path) -> None:
    contract = TechniqueContract(technique, model, lambda: federated(dataset), PLAN, dataset.train.text)
    made = contract.returns_a_new_model()
    contract.survives_saving(made, tmp_path)
    contract.survives_export(made)


class Forms(Local):
    """Trains nothing; whatever is asked of rows has the form that a server expects of its clients."""

    def __init__(self, data: Dataset) -> None:
        super().__init__(data)
        self.seen: set[type] = set()

    def fit(self, model: Model, loss: Loss, plan: Plan, label: str = "fit") -> Model:
        return model.copy()

    def reduce(
        self, model: Model, statistic: Statistic, limit: int | None = None, unlabelled: bool = False
    ) -> dict[str, Tensor]:
        found = super().reduce(model, statistic, limit, unlabelled)
        with torch.no_grad():
            form = statistic(model.network, short_row(model))
        assert {n: (v.shape, v.dtype) for n, v in found.items()} == {n: (v.shape, v.dtype) for n, v in form.items()}
        self.seen.add(type(statistic))
        return found


def test_a_short_row_tells_the_form_of_every_statistic(dataset: Dataset) -> None:
    run, scored = Forms(replace(dataset, pool=tiny_rows(40).unlabelled())), Score(3.0, 2.0)
    for technique in (*ALL, Finetune(class_weights=True), Prune(0.5, importance="fisher", rows=20)):
        technique(tiny_model(more=KIND[:5]), run, PLAN)
    assert run.seen == set(STATISTICS)
    numbers = Rows(dataset.train.text, tuple(str(i % 7) for i in range(len(dataset.train))))
    run = Forms(replace(dataset, train=numbers))
    for technique in (Finetune(), Prune(0.5, importance="taylor", rows=20)):
        technique(tiny_model(task=scored), run, PLAN)
    assert run.seen == {Moments, Gradients}


@pytest.mark.slow
@pytest.mark.parametrize("technique", ALL, ids=lambda t: type(t).__name__)
def test_whole_contract(technique: Technique, dataset: Dataset, tmp_path: Path) -> None:
    """With words that no row has, and a pool."""
    model, data = tiny_model(more=KIND[:5]), pooled(dataset)
    TechniqueContract(technique, model, lambda: federated(data), PLAN, dataset.train.text).check(tmp_path)


@pytest.mark.slow
@pytest.mark.parametrize("way", FURTHER)
def test_whole_contract_of_every_other_way_to_train(way: str, dataset: Dataset, tmp_path: Path) -> None:
    """Losses that look inside of a network, adapters and heads."""
    technique, data = WAYS[way], pooled(dataset)
    TechniqueContract(technique, suited(technique), lambda: federated(data), PLAN, dataset.train.text).check(tmp_path)


@pytest.mark.slow
def test_projections_to_a_wider_teacher_travel(model: Model, dataset: Dataset, tmp_path: Path) -> None:
    """The student has them while it trains, and not afterwards."""
    student = Shrink(hidden=0.5, multiple=8, rows=16, epochs=0)(model, Local(dataset), PLAN)
    technique = Distill(layers=None, teachers=(model,), match=("logits", "hidden"), epochs=1, splice=0.0)
    TechniqueContract(technique, student, lambda: federated(dataset), PLAN, dataset.train.text).check(tmp_path)
    with_them, without = federated(dataset), federated(dataset)
    technique(student, with_them, PLAN)
    replace(technique, match="logits")(student, without, PLAN)
    numbers = student.depth * net(model).width * (net(student).width + 1)
    more = with_them.report.rounds[0].down - without.report.rounds[0].down
    assert more == 3 * 4 * numbers, "to each of three clients, four bytes a number"


def test_adapters_and_heads_are_all_that_travels(model: Model, dataset: Dataset) -> None:
    full, lora = federated(dataset), federated(dataset, Travel(Int8()))
    Finetune(epochs=2, freeze_embeddings=False)(model, full, PLAN)
    LORA(model, lora, PLAN)
    assert lora.report.label == "fine-tune"
    assert lora.report.rounds[0].up < full.report.rounds[0].up / 20


def test_what_needs_rows_in_one_place_is_refused(model: Model, dataset: Dataset) -> None:
    with pytest.raises(ModelError, match="LinearFloor needs all rows in one place"):
        LinearFloor()(model, federated(dataset), PLAN)


def test_a_federated_model_is_searched_certified_and_saved(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    """The main call with three shops: each keeps a part of train; dev and certify rows are the server's."""
    quick_measuring(monkeypatch)
    base = tiny_base(tmp_path / "base")
    rows = many_rows(1000, noise=0.02)
    train, dev, certify = (rows.take(range(a, b)) for a, b in ((0, 300), (300, 600), (600, 1000)))
    made: list[Federated] = []

    def shops(data: Dataset, folder: Path) -> Federated:
        clients = [Client(n, d, folder / n) for n, d in datasets(data, Dirichlet(3, 1.0)).items()]
        made.append(Federated(clients, data, folder, rounds=Rounds(2), privacy=None))
        return made[-1]

    options: dict[str, Any] = {"model": str(base), "max_drop": 5.0, "threads": 1, "runs": shops}
    result = optimize(train, dev=dev, certify=certify, out=tmp_path / "made.nw", **options)
    assert result.certificate.verdict == "certified"
    assert "linear" not in [key.removeprefix("point ") for key in journal(tmp_path / "made.nw")], "nobody could fit it"
    reports = made[0].reports
    assert {"fine-tune"} < {report.label for report in reports}
    assert all(len(report.standings) == 3 and report.worst for report in reports)
    assert len(load(tmp_path / "made.nw", threads=1).predict(["the zip was late"])) == 1


def test_a_private_simulation_is_a_job_without_rows_of_its_own(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    """As docs/federated.md has it: clients train the head with noise, all else is made of the pool."""
    quick_measuring(monkeypatch)
    rows = many_rows(1100, noise=0.02)
    mine, dev, certify, pool = (rows.take(range(a, b)) for a, b in ((0, 400), (400, 600), (600, 900), (900, 1100)))
    none = mine.take([])
    clients = [
        Client(name, Dataset(mine.take(range(i, 400, 2)), none, none, Sealed(none)), str(tmp_path / name))
        for i, name in enumerate(("north", "south"))
    ]
    teacher = Finetune(epochs=4, train="head", probe=False, learning_rate=1e-2)
    options = Options(model=str(tiny_base(tmp_path / "base")), threads=1, finetune=teacher)
    job = Job(Tables(None, dev=dev, certify=certify, pool=pool.unlabelled()), Budget(5.0), options, "2 rounds, private")
    made: list[Federated] = []

    def shops(data: Dataset, folder: Path) -> Federated:
        made.append(Federated(clients, data, str(folder), rounds=Rounds(2)))
        return made[-1]

    result = run(job, tmp_path / "made.nw", Silent(), shops)
    (report,) = made[0].reports
    assert report.label == "fine-tune"
    assert 0 < (report.epsilon or 0) <= 8
    assert result.certificate.verdict in ("certified", "not certified", "worse")
