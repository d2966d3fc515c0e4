"""Several processes that hold all rows together train as one does."""

from __future__ import annotations

from collections.abc import Iterator
from dataclasses import dataclass, replace
from pathlib import Path

import numpy as np
import pytest
import torch
from torch import nn

from conftest import tiny_model
from netweight.data import Dataset
from netweight.loss import Loss, Penalized, SoftTargets, Supervised
from netweight.model import Model
from netweight.run import Local, Parallel, Pool, Setup
from netweight.run.local import logits_of
from netweight.techniques import Distill, Finetune, LinearFloor, Quantize, Static, Technique
from netweight.testing import RunContract, TechniqueContract
from netweight.train import Plan
from quick import TECHNIQUES, VARIANTS, some

# Without balancing, the same seed gives the same bits.
SAME = Setup(balance=False, timeout=60)
PLAN = Plan(epochs=4, batch_size=16, precision="fp32", learning_rate=1e-3)  # 20 steps over 80 rows


@pytest.fixture(scope="module")
def pool() -> Iterator[Pool]:
    """Two processes for all tests that do not kill any."""
    with Pool(2) as made:
        yield made


def undropped(model: Model) -> Model:
    """Without dropout: processes draw their own."""
    for module in model.network.modules():
        if isinstance(module, nn.Dropout):
            module.p = 0.0
    return model


@pytest.fixture
def model() -> Model:
    return undropped(tiny_model())


def distance(one: Model, other: Model) -> float:
    """Relative L2 distance of all weights. Biases of attention keys are left out: softmax does not see them, so their
    true gradient is zero, and Adam makes whole steps of what rounding leaves."""
    a, b = (m.network.state_dict() for m in (one, other))
    names = [n for n, t in a.items() if t.is_floating_point() and "key.bias" not in n]
    apart = sum(float((a[n].double() - b[n].double()).square().sum()) for n in names)
    return float(np.sqrt(apart / sum(float(a[n].double().square().sum()) for n in names)))


def assert_equal(one: Model, other: Model, dataset: Dataset) -> None:
    assert distance(one, other) <= 1e-6
    tokens = one.encoder.encode(dataset.train.text)
    assert float((logits_of(one, tokens) - logits_of(other, tokens)).abs().max()) <= 1e-5


def weighted(dataset: Dataset) -> Dataset:
    weight = tuple(float(w) for w in np.random.default_rng(0).uniform(0.1, 3, len(dataset.train)))
    return replace(dataset, train=replace(dataset.train, weight=weight))


@dataclass(frozen=True)
class Case:
    loss: Loss
    plan: Plan = PLAN
    weighted: bool = False


def cases(model: Model) -> dict[str, Case]:
    task, teacher = model.task, undropped(tiny_model(seed=3))
    matrices = tuple(n for n, p in model.network.named_parameters() if "dense.weight" in n)
    return {
        "labels": Case(Supervised(task)),
        "class weights": Case(Supervised(task, smoothing=0.1, class_weights=(0.3, 2.0))),
        "weights of rows": Case(Supervised(task), weighted=True),
        "a teacher": Case(SoftTargets(task, (teacher,), hard=0.3)),
        "spliced rows": Case(SoftTargets(task, (teacher,)), replace(PLAN, splice=1.0)),
        "a penalty": Case(Penalized(Supervised(task), "l2", 1e-3, matrices)),
        "uneven batches": Case(Supervised(task), replace(PLAN, batch_size=27, epochs=7)),
        "fewer rows than processes": Case(Supervised(task), replace(PLAN, batch_size=1, epochs=0.25)),
        "several batches a step": Case(Supervised(task), replace(PLAN, batch_size=5, accumulate=3, epochs=3.5)),
        "plain gradients": Case(Supervised(task), replace(PLAN, optimizer="sgd", clip=0.0)),
    }


@pytest.mark.parametrize("name", list(cases(tiny_model())))
def test_two_processes_train_as_one(name: str, model: Model, dataset: Dataset, pool: Pool) -> None:
    case = cases(model)[name]
    data = weighted(dataset) if case.weighted else dataset
    with Parallel(data, setup=SAME, pool=pool) as run:
        made = run.fit(model, case.loss, case.plan)
    wanted = Local(data).fit(model, case.loss, case.plan)
    assert distance(made, model) > 1e-4
    assert_equal(made, wanted, dataset)


def test_a_table_of_which_few_rows_change(model: Model, dataset: Dataset, pool: Pool) -> None:
    technique = Static(width=8, buckets=64, epochs=4, batch_size=16, splice=0.0)
    with Parallel(dataset, setup=SAME, pool=pool) as run:
        assert_equal(technique(model, run, PLAN), technique(model, Local(dataset), PLAN), dataset)


def test_sums_and_outputs_are_those_of_one_process(model: Model, dataset: Dataset, pool: Pool, tmp_path: Path) -> None:
    local = Local(dataset)
    for folder in (None, tmp_path, tmp_path):
        with Parallel(dataset, setup=SAME, folder=folder, pool=pool) as run:
            assert torch.allclose(run.outputs(model), local.outputs(model), atol=1e-6)
            assert run.quality(model) == local.quality(model)
    assert len(list(tmp_path.glob("outputs-*"))) == 1


def test_contract_of_a_parallel_run(model: Model, dataset: Dataset, pool: Pool) -> None:
    run = lambda: Parallel(dataset, setup=SAME, pool=pool)  # noqa: E731
    RunContract(run, model, Supervised(model.task), PLAN, dataset.train.text).check()


@pytest.mark.slow
@pytest.mark.parametrize("technique", [*TECHNIQUES, *VARIANTS], ids=lambda t: type(t).__name__)
def test_whole_contract_of_every_technique(technique: Technique, dataset: Dataset, pool: Pool, tmp_path: Path) -> None:
    model = tiny_model(more=("spare",))  # a token for Vocab to drop
    data = replace(dataset, pool=dataset.select.unlabelled())
    run = lambda: Parallel(data, setup=SAME, pool=pool)  # noqa: E731
    TechniqueContract(technique, model, run, PLAN, dataset.train.text).check(tmp_path)


FEW = some(Finetune, Distill, Static, LinearFloor, Quantize)


@pytest.mark.parametrize("technique", FEW, ids=lambda t: type(t).__name__)
def test_contract_of_techniques(
    technique: Technique, model: Model, dataset: Dataset, pool: Pool, tmp_path: Path
) -> None:
    run = lambda: Parallel(dataset, setup=SAME, pool=pool)  # noqa: E731
    TechniqueContract(technique, model, run, PLAN, dataset.train.text).check(tmp_path)
