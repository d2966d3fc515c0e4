"""Processes that each hold a part of the network train to what one process trains to."""

from __future__ import annotations

import math
from collections.abc import Iterator

import pytest
import torch

from conftest import tiny_model, tiny_rows
from netweight.data import Dataset
from netweight.data.rows import Sealed
from netweight.loss import Supervised
from netweight.model import Model
from netweight.run import Local
from netweight.run.divided import Divided
from netweight.run.local import logits_of
from netweight.run.pipelined import Pipelined
from netweight.run.sharded import Fsdp
from netweight.run.tensor import TensorParallel
from netweight.train import Plan
from processes import Team

PLAN = Plan(epochs=4, batch_size=16, precision="fp32", learning_rate=1e-3)  # 20 steps


def rows() -> Dataset:
    every = tiny_rows()
    parts = [every.take(range(a, b)) for a, b in ((0, 80), (80, 90), (90, 100), (100, 120))]
    return Dataset(parts[0], parts[1], parts[2], Sealed(parts[3]))


def still(family: str = "bert", layers: int = 2) -> Model:
    """A model without dropout."""
    model = tiny_model(family=family, layers=layers)
    for module in model.network.modules():
        if isinstance(module, torch.nn.Dropout):
            module.p = 0.0
        for name in ("attention_dropout", "dropout_prob"):
            if isinstance(getattr(module, name, None), float):
                setattr(module, name, 0.0)
    return model


def distance(one: Model, other: Model) -> float:
    """Relative L2 distance of all weights but the biases of keys: their true gradient is zero (softmax does not see
    what is added to all scores of a query), so Adam steps on the noise of rounding."""
    a, b = (dict(m.network.named_parameters()) for m in (one, other))
    assert a.keys() == b.keys()
    names = [name for name in a if not name.endswith(("key.bias", "k_lin.bias"))]
    apart = sum(float((a[n] - b[n]).detach().double().square().sum()) for n in names)
    return math.sqrt(apart / sum(float(a[n].detach().double().square().sum()) for n in names))


def close(one: Model, other: Model, limit: float = 1e-6) -> None:
    assert distance(one, other) <= limit
    tokens = one.encoder.encode(rows().train.text)
    assert float((logits_of(one, tokens) - logits_of(other, tokens)).abs().max()) <= 1e-5


def fitted(family: str, kind: type[Divided], options: dict[str, object]) -> dict[str, torch.Tensor]:
    torch.set_num_threads(1)
    model = still(family)
    new = Local(rows(), seams=kind(**options)).fit(model, Supervised(model.task), PLAN)  # type: ignore[arg-type]
    assert type(new.network) is type(model.network)
    return {name: value.numpy() for name, value in new.network.state_dict().items()}


def loaded(model: Model, state: dict[str, object]) -> Model:
    new = model.copy()
    new.network.load_state_dict({name: torch.as_tensor(value) for name, value in state.items()})
    return new


@pytest.fixture(scope="module")
def two() -> Iterator[Team]:
    with Team(2) as team:
        yield team


KINDS = {"fsdp": Fsdp, "tensor": TensorParallel, "pipeline": Pipelined}


@pytest.mark.parametrize("kind", KINDS)
@pytest.mark.parametrize("family", ["bert", "gpt2"])
def test_equals_local(two: Team, family: str, kind: str) -> None:
    model = still(family)
    alone = Local(rows()).fit(model, Supervised(model.task), PLAN)
    for state in two(fitted, family, KINDS[kind], {}):
        close(alone, loaded(model, state))
