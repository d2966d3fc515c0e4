"""What the planner predicts is what tensors take."""

from __future__ import annotations

import json
from collections.abc import Iterator
from dataclasses import dataclass, field
from pathlib import Path

import pytest
import torch
import torch.distributed as dist
from torch import Tensor, nn
from torch.distributed.tensor import DTensor
from typer.testing import CliRunner

from conftest import FAMILIES, tiny_base, tiny_model
from netweight.cli import app
from netweight.cli.plan import size
from netweight.data import Dataset
from netweight.errors import OptionError
from netweight.loss import Batch, Supervised
from netweight.model import Model
from netweight.run import Local, Parallel, Pool, Setup
from netweight.run.commands import Strategy
from netweight.run.planner import Job, needs, recommended
from netweight.run.strategies import seams_of
from netweight.train import Plan, _Loop


@pytest.fixture(scope="module")
def pool() -> Iterator[Pool]:
    with Pool(2) as made:
        yield made


def of(tensor: Tensor) -> int:
    local = tensor.to_local() if isinstance(tensor, DTensor) else tensor
    return local.numel() * local.element_size()


@dataclass(frozen=True)
class Held:
    """A command for each process: one step, then the bytes of what it holds. Gives the largest of all processes."""

    model: Model
    strategy: Strategy

    def __call__(self, local: Local) -> dict[str, Tensor]:
        loops: list[_Loop] = []
        plain = _Loop.update

        def update(loop: _Loop, groups: object) -> tuple[float, float]:
            loops[:] = [loop]
            return plain(loop, groups)  # type: ignore[arg-type]

        found: list[float] = []
        seams = seams_of(self.strategy, Setup(), torch.device("cpu"), None)
        finish = seams.finish

        def count(network: nn.Module) -> None:
            moments = sum(of(t) for o in loops[0].optimizers for s in o.state.values() for t in s.values() if t.ndim)
            held = list(network.parameters())
            found[:] = [sum(map(of, held)), sum(of(p.grad) for p in held if p.grad is not None), moments]
            finish(network)

        seams.finish = count  # type: ignore[method-assign]
        _Loop.update = update  # type: ignore[method-assign]
        local.seams = seams
        try:
            local.fit(self.model, Supervised(self.model.task), Plan(batch_size=80, epochs=1, precision="fp32"))
        finally:
            _Loop.update = plain  # type: ignore[method-assign]
        total = torch.tensor(found)
        dist.all_reduce(total, dist.ReduceOp.MAX)
        return {"held": total}


@pytest.mark.parametrize("family", ["bert", "gpt2"])
def test_parameters_gradients_and_optimizer_are_exact(family: str, dataset: Dataset, pool: Pool) -> None:
    model = tiny_model(family=family)
    predicted = {need.strategy: need for need in needs(model.network, 2, Job())}
    assert predicted["fsdp"].held <= 0.6 * predicted["local"].held
    # BERT's pooler is not asked for anything, so it has no gradient; the planner cannot know.
    unused = sum(of(p) for n, p in model.network.named_parameters() if "pooler" in n)
    for strategy in ("ddp", "fsdp", "tensor", "pipeline"):
        with Parallel(dataset, strategy=strategy, setup=Setup(timeout=60), pool=pool) as run:  # type: ignore[arg-type]
            held = run._do(Held(model, strategy))["held"].tolist()  # type: ignore[arg-type]
        need = predicted[strategy]  # type: ignore[index]
        assert held[0] == need.parameters, strategy
        lacking = unused / (2 if strategy == "fsdp" else 1)
        if strategy != "pipeline" or not unused:  # which stage is the largest depends on it
            assert held[1] == need.gradients - lacking, strategy
            assert held[2] == need.optimizer - 2 * lacking, strategy


@dataclass
class Kept:
    """Bytes that a forward pass keeps for the gradient, each storage once, without parameters."""

    known: set[int] = field(default_factory=set)
    total: int = 0

    def pack(self, tensor: Tensor) -> Tensor:
        storage = tensor.untyped_storage()
        if storage.data_ptr() not in self.known:
            self.known.add(storage.data_ptr())
            self.total += storage.nbytes()
        return tensor


@pytest.mark.parametrize("family", FAMILIES)
def test_activations_are_near(family: str) -> None:
    """In a network whose feed-forward is four times as wide as its hidden states, without dropout."""
    model = tiny_model(family=family, layers=4)
    for module in model.network.modules():
        if isinstance(module, nn.Dropout):
            module.p = 0.0
    network = model.network.eval()
    ids = torch.ones((8, 32), dtype=torch.long)
    kept = Kept({p.untyped_storage().data_ptr() for p in network.parameters()})
    tensors: list[Tensor] = []  # alive, so that no storage's place is taken again
    with torch.autograd.graph.saved_tensors_hooks(lambda t: tensors.append(t) or kept.pack(t), lambda t: t):
        loss = Supervised(model.task)(network, Batch(ids, ids, 0 * ids, ids[:, 0], ids[:, 0].float()))
    assert loss.requires_grad
    local = next(need for need in needs(network, 2, Job(batch=8, length=32)) if need.strategy == "local")
    assert 0.6 < local.activations / kept.total < 1.67


def test_recommendations() -> None:
    network = tiny_model(layers=4).network
    found = needs(network, 2, Job(batch=2, length=8))
    by = {need.strategy: need for need in found}
    assert recommended(found, 10**9) == by["ddp"]
    assert recommended(found, 1) is None
    assert by["pipeline"].held < by["local"].held
    assert by["tensor"].held < by["ddp"].held
    again = {n.strategy: n for n in needs(network, 2, Job(batch=2, length=8, activation_checkpointing=True))}
    assert again["local"].activations < by["local"].activations


def test_what_cannot_be_planned(tmp_path: Path) -> None:
    network = tiny_model().network
    with pytest.raises(OptionError, match="1 processes cannot divide anything"):
        needs(network, 1, Job())
    with pytest.raises(OptionError, match="planner divides transformers, and this network is a Linear"):
        needs(nn.Linear(1, 1), 2, Job())
    with pytest.raises(OptionError, match="batch is 0; use 1 or more"):
        Job(batch=0)
    with pytest.raises(OptionError, match="unknown optimizer 'lion'"):
        Job(optimizer="lion")  # type: ignore[arg-type]
    with pytest.raises(OptionError, match="memory 'much' is no size"):
        size("much")
    assert (size("24GB"), size("0.5 g"), size("512MB")) == (24 * 10**9, 5 * 10**8, 512 * 10**6)
    refused = {need.strategy: need.refused for need in needs(network, 3, Job())}
    assert "which 3 processes cannot divide evenly" in refused["tensor"]
    assert "2 layers cannot be divided into 3 stages" in refused["pipeline"]


def test_the_command(tmp_path: Path) -> None:
    base = tiny_base(tmp_path / "base", layers=2)
    said = CliRunner().invoke(app, ["plan", str(base), "--processes", "2", "--memory", "1GB"])
    assert said.exit_code == 0, said.output
    assert "Use ddp: the first that fits into 1GB." in said.output
    small = CliRunner().invoke(app, ["plan", str(base), "--memory", "1kB", "--json"])
    assert json.loads(small.output)["recommended"] is None
