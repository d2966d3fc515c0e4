"""Whatever is computed on rows is computed where the network is: on a graphics card that is only pretended.

Under torch's fake tensors shapes and devices are real and numbers are not, and what mixes devices raises as on a card.
The card's type is one that torch leaves to others (PrivateUse1): this build may have no other than the CPU. Backward
passes need a real one; test_cuda.py has them.
"""

from __future__ import annotations

import copy
from collections.abc import Callable
from dataclasses import replace
from typing import Any

import numpy as np
import pytest
import torch
from numpy.typing import NDArray
from torch import Tensor, nn
from torch._subclasses.fake_tensor import (
    DataDependentOutputException,
    DynamicOutputShapeException,
    FakeTensorDeviceMismatchError,
    FakeTensorMode,
)
from torch.fx.experimental.symbolic_shapes import GuardOnDataDependentSymNode, ShapeEnv
from torch.utils import backend_registration

from conftest import FAMILIES, tiny_model
from netweight.data import Dataset, Rows
from netweight.loss import Batch, Loss, Penalized, Supervised
from netweight.matching import placed
from netweight.model import Model
from netweight.run import Local
from netweight.run.base import Statistic
from netweight.run.federated.client import Correcting
from netweight.run.federated.private import RowGradients, RowPrivate, Seen
from netweight.seams import Seams
from netweight.techniques import Distill, Finetune, Half, LinearFloor, Pretrain, Shrink, Static, Technique
from netweight.train import Plan
from quick import TECHNIQUES, VARIANTS

pytestmark = pytest.mark.skipif(
    not hasattr(backend_registration, "_setup_privateuseone_for_python_backend"),
    reason="this torch pretends no devices",
)

CARD = torch.device("privateuseone", 0)
# What hangs on numbers ends a rehearsal; so does what only a real card can do.
UNKNOWN = (DataDependentOutputException, DynamicOutputShapeException, GuardOnDataDependentSymNode)
ENGINE = "Cannot access accelerator device when none is available"
PLAN = Plan(epochs=1, batch_size=16, precision="fp32")


class Module(backend_registration._DummyBackendModule):
    """What autocast asks of a backend besides."""

    def get_amp_supported_dtype(self) -> list[torch.dtype]:
        return [torch.bfloat16]


@pytest.fixture(autouse=True, scope="module")
def pretended() -> None:
    backend_registration._setup_privateuseone_for_python_backend(backend_module=Module())


def fake() -> FakeTensorMode:
    return FakeTensorMode(allow_non_fake_inputs=True, shape_env=ShapeEnv())


def made(numbers: object, *, device: torch.device | None = None, _torch: Any = torch.tensor, **options: Any) -> Tensor:
    """torch.tensor, which knows nothing of fakes where it is given a device."""
    value = _torch(numbers, **options)
    return value if device is None else torch.empty(value.shape, dtype=value.dtype, device=device)


def there(tensor: Tensor) -> Tensor:
    """The same on the card; under a fake mode."""
    new = torch.empty(tensor.shape, dtype=tensor.dtype, device=CARD)
    return nn.Parameter(new, tensor.requires_grad) if isinstance(tensor, nn.Parameter) else new


def carried(model: Model) -> Model:
    network = model.network
    known: dict[int, Any] = {id(t): there(t) for t in (*network.parameters(), *network.buffers())}
    return replace(model, network=copy.deepcopy(network, known))


def batch_of(teachers: int, outputs: int) -> Batch:
    ids, mask, types = (torch.ones((8, 12), dtype=torch.int64, device=CARD) for _ in range(3))
    said = (torch.zeros(8, outputs, device=CARD),) * teachers
    return Batch(ids, mask, types, torch.zeros(8, dtype=torch.int64, device=CARD), torch.ones(8, device=CARD), said)


class OnCard(Local):
    """Computes on the pretended card what it is asked for, and then where it would."""

    def __init__(self, data: Dataset) -> None:
        super().__init__(data, seams=Seams())
        self.whole, self.parts = list[str](), list[str]()

    def pretend(self, name: str, compute: Callable[[], object]) -> None:
        with pytest.MonkeyPatch.context() as patch, fake():
            patch.setattr(Model, "on", lambda self, device: carried(self))
            patch.setattr(torch, "tensor", made)
            try:
                compute()
                self.whole.append(name)
            except UNKNOWN:
                self.parts.append(name)
            except RuntimeError as problem:
                if ENGINE not in str(problem):
                    raise
                self.parts.append(name)

    def fit(self, model: Model, loss: Loss, plan: Plan, label: str = "fit") -> Model:
        def compute() -> None:
            network = carried(model).network.train()
            value = placed(loss, CARD)(network, batch_of(len(loss.teachers), model.task.outputs))
            assert value.device == CARD

        self.pretend(type(loss).__name__, compute)
        return super().fit(model, loss, plan, label)

    def reduce(
        self, model: Model, statistic: Statistic, limit: int | None = None, unlabelled: bool = False
    ) -> dict[str, Tensor]:
        def compute() -> None:
            statistic(carried(model).network, batch_of(0, model.task.outputs))

        self.pretend(type(statistic).__name__, compute)
        return super().reduce(model, statistic, limit, unlabelled)


# Rehearsed up to where they go backward, or read a number (the width of a learned range).
PARTS = {"Shrink": {"GateGradients"}, "QuantizeAware": {"SoftTargets"}}


@pytest.mark.parametrize("technique", [*TECHNIQUES, *VARIANTS], ids=lambda t: type(t).__name__)
def test_techniques(technique: Technique, dataset: Dataset) -> None:
    run = OnCard(replace(dataset, pool=Rows(dataset.train.text[:20])))
    technique(tiny_model(more=("spare",)), run, PLAN)
    assert set(run.parts) == PARTS.get(type(technique).__name__, set())
    assert run.whole or isinstance(technique, Half | LinearFloor)  # they ask for nothing but outputs


MORE: tuple[Technique, ...] = (
    Pretrain(epochs=1),
    Finetune(epochs=1, regularizer="r-drop", class_weights="balanced"),
    Finetune(epochs=1, regularizer="adversarial"),
    Distill(1, match=("logits", "hidden", "attention"), epochs=1, splice=0.0),
    Distill(1, match=("logits", "relations"), relation_heads=4, epochs=1, splice=0.0),
    Static(width=8, buckets=64, filters=8, epochs=1, splice=0.0),
)


@pytest.mark.parametrize("technique", MORE, ids=repr)
def test_losses(technique: Technique, dataset: Dataset) -> None:
    run = OnCard(dataset)
    technique(tiny_model(more=("[MASK]",)), run, PLAN)
    # An adversary goes backward to find its push.
    assert run.parts == (["Adversarial"] if "adversarial" in repr(technique) else [])
    assert run.whole or run.parts


@pytest.mark.parametrize("family", FAMILIES)
def test_families(family: str, dataset: Dataset) -> None:
    run = OnCard(dataset)
    Shrink(neurons=0.5, rows=16, epochs=1, splice=0.0)(tiny_model(family=family), run, PLAN)
    Finetune(epochs=1)(tiny_model(family=family), run, PLAN)
    assert run.whole == ["SoftTargets", "Moments", "Supervised"]


def test_a_penalty(dataset: Dataset) -> None:
    model = tiny_model()
    names = tuple(n for n, p in model.network.named_parameters() if "dense.weight" in n)
    run = OnCard(dataset)
    run.fit(model, Penalized(Supervised(model.task), "group", 1e-3, names), PLAN)
    assert run.whole == ["Penalized"]


def test_what_mixes_devices_is_found(dataset: Dataset) -> None:
    class Mixed(Supervised):
        def __call__(self, network: nn.Module, batch: Batch) -> Tensor:
            return self.of(network(batch.ids, batch.mask, batch.types) + torch.ones(2), batch)

    model = tiny_model()
    with pytest.raises(FakeTensorDeviceMismatchError):
        OnCard(dataset).fit(model, Mixed(model.task), PLAN)


class Drawn:
    """A source whose rows lie where a batch is made: on the CPU."""

    def __len__(self) -> int:
        return 8

    def epoch(self, size: int, rng: np.random.Generator) -> list[NDArray[np.int64]]:
        return [np.arange(8)]

    def batch(self, rows: NDArray[np.int64], rng: np.random.Generator, hide: float) -> Batch:
        ids, mask, types = (torch.ones((len(rows), 12), dtype=torch.int64) for _ in range(3))
        return Batch(ids, mask, types, torch.zeros(len(rows), dtype=torch.int64), torch.ones(len(rows)))


@pytest.mark.parametrize("kind", ["plain", "correcting", "private"])
def test_steps(kind: str) -> None:
    """From a batch to gradients that an optimizer may take, those of the backward pass given."""
    model = tiny_model()
    with fake():
        network = carried(model).network
        held = {name: there(p) for name, p in model.network.named_parameters()}
        mine = {name: torch.zeros(p.shape) for name, p in held.items()}
        seams = {
            "plain": lambda: Seams(CARD),
            "correcting": lambda: Correcting(network, 0.1, mine, mine, CARD),
            "private": lambda: RowPrivate(1.0, 1.0, 8, Correcting(network, 0.1, mine, mine, CARD), seed=0),
        }[kind]()
        batch = seams.share(Drawn(), np.arange(8), np.random.default_rng(0), 0.0)
        assert {t.device for t in (batch.ids, batch.mask, batch.weight)} == {CARD}
        network(batch.ids, batch.mask, batch.types)
        for parameter in network.parameters():
            parameter.grad = torch.zeros_like(parameter)
        if isinstance(seams, RowPrivate):
            seams.expected = 8.0
        seams.sync(network, 0.0)
        seams.correct(network)
        seams.clip(network.parameters(), 1.0)
        assert {p.grad.device for p in network.parameters() if p.grad is not None} == {CARD}
        if isinstance(seams, Correcting):
            assert {t.device.type for t in seams.variate().values()} == {"cpu"}
        whole = seams.gather({name: p.detach() for name, p in network.named_parameters()})
        assert {t.device.type for t in whole.values()} == {"cpu"}
        assert {t.device for t in seams.scatter(whole).values()} == {CARD}


def test_norms_of_rows() -> None:
    with fake():
        given, grad = torch.empty(4, 5, 3, device=CARD), torch.empty(4, 5, 2, device=CARD)
        assert RowGradients([Seen(nn.Linear(3, 2), [given], [grad])], 4).norms().device == CARD
