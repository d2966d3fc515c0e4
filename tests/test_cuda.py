"""What graphics cards compute is what the CPU computes. Skipped where there is none."""

from __future__ import annotations

from collections.abc import Iterator
from dataclasses import replace
from pathlib import Path

import pytest
import torch

from conftest import FAMILIES, Killed, Killer, tiny_model
from netweight.data import Dataset
from netweight.loss import Supervised
from netweight.model import Model
from netweight.run import Local, Parallel, Pool, Setup
from netweight.run.commands import Strategy
from netweight.run.federated import Client, Federated, Rounds, RowLevel
from netweight.run.local import logits_of
from netweight.seams import Seams
from netweight.techniques import Distill, Finetune, Static, Technique
from netweight.testing import RunContract, TechniqueContract
from netweight.train import Optimizer, Plan
from quick import TECHNIQUES, VARIANTS
from test_sharded import distance, still

pytestmark = pytest.mark.skipif(not torch.cuda.is_available(), reason="this machine has no graphics card")

PLAN = Plan(epochs=4, batch_size=16, precision="fp32", learning_rate=1e-3)  # 20 steps over 80 rows
STRATEGIES: tuple[Strategy, ...] = ("ddp", "fsdp", "tensor", "pipeline")


def on_cpu(data: Dataset, folder: Path | None = None) -> Local:
    return Local(data, folder, Seams())


def assert_alike(one: Model, other: Model, data: Dataset) -> None:
    """Cards add up in another order than processors do."""
    assert {t.device.type for t in one.network.state_dict().values()} == {"cpu"}
    assert distance(one, other) <= 1e-5
    tokens = one.encoder.encode(data.train.text)
    assert float((logits_of(one, tokens) - logits_of(other, tokens)).abs().max()) <= 1e-4


@pytest.mark.parametrize("family", FAMILIES)
def test_a_card_trains_to_what_the_cpu_does(family: str, dataset: Dataset) -> None:
    model = still(family)
    run = Local(dataset)
    assert run.seams.device.type == "cuda"
    made = run.fit(model, Supervised(model.task), PLAN)
    assert distance(made, model) > 1e-4
    assert_alike(made, on_cpu(dataset).fit(model, Supervised(model.task), PLAN), dataset)


def test_contract_of_a_run_on_a_card(dataset: Dataset) -> None:
    model = tiny_model()
    for precision in ("fp32", "bf16"):
        plan = replace(PLAN, precision=precision)
        RunContract(lambda: Local(dataset), model, Supervised(model.task), plan, dataset.train.text).check()


@pytest.mark.parametrize("technique", [*TECHNIQUES, *VARIANTS], ids=lambda t: type(t).__name__)
def test_contract_of_every_technique(technique: Technique, dataset: Dataset, tmp_path: Path) -> None:
    model = tiny_model(more=("spare",))  # a token for Vocab to drop
    TechniqueContract(technique, model, lambda: Local(dataset), PLAN, dataset.train.text).check(tmp_path)


def test_a_teacher_that_is_asked_in_every_step(dataset: Dataset) -> None:
    model = still()
    technique = Distill(1, match=("logits", "hidden", "relations"), epochs=2, splice=0.0)
    plan = replace(PLAN, precision="fp32")
    assert_alike(technique(model, Local(dataset), plan), technique(model, on_cpu(dataset), plan), dataset)
    assert next(model.network.parameters()).device.type == "cpu"


def test_a_table_of_which_few_rows_change(dataset: Dataset) -> None:
    model, technique = still(), Static(width=8, buckets=64, epochs=4, batch_size=16, splice=0.0)
    made, wanted = technique(model, Local(dataset), PLAN), technique(model, on_cpu(dataset), PLAN)
    assert distance(made, wanted) <= 1e-5


@pytest.mark.parametrize("there", ["a card", "the CPU"])
@pytest.mark.parametrize("optimizer", ["adamw", "adam", "sgd", "rmsprop"])
def test_a_killed_fit_goes_on(optimizer: Optimizer, there: str, dataset: Dataset, tmp_path: Path) -> None:
    """On a card to the same bits; what a card began, the CPU may end."""
    model = tiny_model() if there == "a card" else still()
    loss, plan = Supervised(model.task), replace(PLAN, optimizer=optimizer, checkpoint_every=0.0)
    with pytest.raises(Killed):
        Local(dataset, tmp_path).fit(model, loss, replace(plan, reporter=Killer(7)))
    seen = Killer(99)
    run = Local(dataset, tmp_path) if there == "a card" else on_cpu(dataset, tmp_path)
    made = run.fit(model, loss, replace(plan, reporter=seen))
    assert seen.resumed_at == 6
    wanted = Local(dataset).fit(model, loss, plan)
    if there == "a card":
        assert made.digest == wanted.digest
    else:
        assert_alike(made, wanted, dataset)


@pytest.fixture(scope="module")
def one() -> Iterator[Pool]:
    with Pool(1) as made:
        yield made


@pytest.fixture(scope="module")
def two() -> Iterator[Pool]:
    with Pool(2) as made:
        yield made


@pytest.mark.parametrize("again", [False, True])
@pytest.mark.parametrize("strategy", STRATEGIES)
def test_strategies_over_nccl(strategy: Strategy, again: bool, dataset: Dataset, one: Pool) -> None:
    if again and strategy == "ddp":
        pytest.skip("ddp keeps activations")
    model = still()
    setup = Setup(balance=False, timeout=60, activation_checkpointing=again)
    with Parallel(dataset, strategy=strategy, setup=setup, pool=one) as run:
        made = run.fit(model, Supervised(model.task), PLAN)
        half = run.fit(model, Supervised(model.task), replace(PLAN, precision="bf16"))
    wanted = on_cpu(dataset).fit(model, Supervised(model.task), PLAN)
    assert_alike(made, wanted, dataset)
    assert 1e-6 < distance(half, wanted) < 0.1


def test_parameters_that_wait_in_the_hosts_memory(dataset: Dataset, one: Pool) -> None:
    model = still()
    with Parallel(dataset, strategy="fsdp", setup=Setup(offload=True, timeout=60), pool=one) as run:
        made = run.fit(model, Supervised(model.task), PLAN)
    assert_alike(made, on_cpu(dataset).fit(model, Supervised(model.task), PLAN), dataset)


@pytest.mark.skipif(torch.cuda.device_count() != 1, reason="needs fewer cards than processes")
def test_a_card_and_a_processor_share_batches(dataset: Dataset, two: Pool) -> None:
    model = still()
    with Parallel(dataset, setup=Setup(balance=False, timeout=60), pool=two) as run:
        made = run.fit(model, Supervised(model.task), PLAN)
        outputs = run.outputs(made)
    wanted = on_cpu(dataset).fit(model, Supervised(model.task), PLAN)
    assert_alike(made, wanted, dataset)
    assert torch.allclose(outputs, on_cpu(dataset).outputs(made), atol=1e-5)


def test_clients_with_cards(dataset: Dataset) -> None:
    model = still()
    halves = [replace(dataset, train=dataset.train.take(range(i, len(dataset.train), 2))) for i in range(2)]
    clients = [Client(f"shop {i}", half) for i, half in enumerate(halves)]
    plain = Federated(clients, rounds=Rounds(1), privacy=None).fit(model, Supervised(model.task), PLAN)
    means = [on_cpu(half).fit(model, Supervised(model.task), PLAN).network.state_dict() for half in halves]
    for name, value in plain.network.state_dict().items():
        if value.is_floating_point() and "key.bias" not in name:
            assert torch.allclose(value, (means[0][name] + means[1][name]) / 2, atol=1e-4)


def test_privacy_on_cards(dataset: Dataset) -> None:
    model = tiny_model()
    rows = [replace(dataset, train=dataset.train.take(range(i, len(dataset.train), 4))) for i in range(4)]
    run = Federated([Client(f"shop {i}", part) for i, part in enumerate(rows)], privacy=RowLevel(100.0))
    Finetune(train="head", probe=False, epochs=4, learning_rate=0.1)(model, run, replace(PLAN, optimizer="sgd"))
    assert run.report.moved > 0
    assert 0 < run.report.epsilon <= 100
