"""What the planner predicts is what tensors take."""

from __future__ import annotations

import json
import re
import sys
from collections.abc import Iterator
from dataclasses import dataclass, replace
from pathlib import Path
from typing import Any

import pytest
import torch
import torch.distributed as dist
from torch import Tensor, nn
from torch.distributed.tensor import DTensor
from typer.testing import CliRunner

from conftest import FAMILIES, tiny_base, tiny_model
from netweight.cli import app
from netweight.cli.shared import size
from netweight.data import Dataset, Rows
from netweight.data.rows import Sealed
from netweight.errors import ModelError, OptionError
from netweight.loss import Batch, Supervised
from netweight.model import Model, pretrained, skeleton
from netweight.network import Linear, Transformer
from netweight.run import Local, Parallel, Pool, Setup
from netweight.run.commands import Strategy
from netweight.run.named import named
from netweight.run.planner import Job, Need, needs, recommended
from netweight.run.rehearsal import rehearse
from netweight.run.strategies import seams_of
from netweight.task import Classify
from netweight.train import Plan, _Loop

sys.path.append(str(Path(__file__).resolve().parents[1] / "benchmarks"))

from runs_planner import Peak


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
    predicted = {need.strategy: need for need in needs(model.network, 2, Job(length=32))}
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


def without(network: nn.Module) -> dict[int, int]:
    """The storages of a network's own tensors."""
    return {t.untyped_storage().data_ptr(): 0 for t in (*network.parameters(), *network.buffers())}


@pytest.mark.parametrize("family", FAMILIES)
def test_a_rehearsal_keeps_what_a_step_keeps(family: str) -> None:
    """Against the tensors that autograd really saves, each storage once."""
    model = tiny_model(family=family, layers=4)
    network, held = model.network.train(), without(model.network)
    assert isinstance(network, Transformer)
    ids = torch.ones((8, 32), dtype=torch.long)
    mask = ids.clone()
    mask[0, -1] = 0
    tensors: list[Tensor] = []  # alive, so that no storage's place is taken again

    def pack(tensor: Tensor) -> Tensor:
        tensors.append(tensor)
        storage = tensor.untyped_storage()
        held.setdefault(storage.data_ptr(), storage.nbytes())
        return tensor

    with torch.autograd.graph.saved_tensors_hooks(pack, lambda t: t):
        loss = Supervised(model.task)(network, Batch(ids, mask, 0 * ids, ids[:, 0], ids[:, 0].float()))
    assert loss.requires_grad
    kept = rehearse(network, 8, 32)
    assert kept.before + 4 * kept.layer + kept.behind == pytest.approx(sum(held.values()), rel=0.03)
    assert kept.state == 8 * 32 * 32 * 4
    assert 0.45 * kept.layer < rehearse(network, 8, 32, ways=2).layer < 0.8 * kept.layer


def test_precisions_and_devices_differ() -> None:
    """BERT drops out of attention, Qwen3 nowhere."""
    bert, qwen = (tiny_model(family=family).network for family in ("bert", "qwen3"))
    assert isinstance(bert, Transformer)
    assert isinstance(qwen, Transformer)
    whole, maps = rehearse(bert, 4, 32), 4 * 4 * 32 * 32 * 4
    assert rehearse(bert, 4, 32, half=True).layer < whole.layer
    # The map, what was dropped of it, and the rest; and the masks of two dropouts over hidden states are bytes.
    assert whole.layer - rehearse(bert, 4, 32, fused=True).layer > 3 * maps
    assert rehearse(qwen, 4, 32) == rehearse(qwen, 4, 32, fused=True)
    found = {device: needs(bert, 2, Job(4, 32, device=device))[0] for device in ("cpu", "cuda")}  # type: ignore[arg-type]
    assert found["cuda"].activations < found["cpu"].activations
    assert found["cuda"].held == found["cpu"].held


@pytest.mark.parametrize(("strategy", "again"), [("local", False), ("ddp", False), ("fsdp", False), ("fsdp", True)])
def test_predictions_are_near_what_is_allocated(strategy: Any, again: bool, pool: Pool) -> None:
    """Rows of 32 tokens. Both processes need the same; `local`: each trains by itself. The smaller figure counts: what
    a thread of gloo frees is not recorded."""
    model = tiny_model(layers=4)
    rows = Rows(tuple("the my was after " * 7 + "zip zip" for _ in range(48)), ("good", "bad") * 24)
    data = Dataset(rows, rows, rows, Sealed(rows))
    job = Job(16, 32, device="cpu", activation_checkpointing=again)
    (need,) = (n for n in needs(model.network, 2, job) if n.strategy == strategy)
    setup = Setup(balance=False, timeout=60, activation_checkpointing=again)
    command = Peak(model, Plan(batch_size=16, precision="fp32", epochs=1), 3, strategy, setup)
    with Parallel(data, pool=pool) as run:
        allocated = min(run._do(command)["peak"].tolist())
    assert need.total == pytest.approx(allocated, rel=0.15)


def test_recommendations() -> None:
    network = tiny_model(layers=4).network
    found = needs(network, 2, Job(batch=2, length=8))
    by = {need.strategy: need for need in found}
    assert recommended(found, 10**9) == by["ddp"]
    assert recommended(found, 1) is None
    assert by["pipeline"].held < by["local"].held
    assert by["tensor"].held < by["ddp"].held
    again = {n.strategy: n for n in needs(network, 2, Job(batch=2, length=8, activation_checkpointing=True))}
    assert again["ddp"] == by["ddp"], "has no such option"
    assert all(again[s].activations < by[s].activations for s in ("fsdp", "tensor", "pipeline"))  # type: ignore[index]


def test_what_cannot_be_planned(tmp_path: Path) -> None:
    network = tiny_model().network
    with pytest.raises(OptionError, match="1 processes cannot divide anything"):
        needs(network, 1, Job(length=32))
    with pytest.raises(OptionError, match="length is 41, and this model takes 40 tokens at most"):
        needs(network, 2, Job(length=41))
    with pytest.raises(OptionError, match="planner divides transformers, and this network is a Linear"):
        needs(nn.Linear(1, 1), 2, Job())
    with pytest.raises(OptionError, match="batch is 0; use 1 or more"):
        Job(batch=0)
    with pytest.raises(OptionError, match="unknown optimizer 'lion'"):
        Job(optimizer="lion")  # type: ignore[arg-type]
    with pytest.raises(OptionError, match="unknown device 'tpu'; use auto, cpu, cuda"):
        Job(device="tpu")  # type: ignore[arg-type]
    with pytest.raises(OptionError, match="unknown precision 'fp16'; use fp32, bf16"):
        Job(precision="fp16")  # type: ignore[arg-type]
    with pytest.raises(OptionError, match="memory '24' is no size; write 24GB"):
        size("24")
    with pytest.raises(OptionError, match="memory 'much' is no size"):
        size("much")
    assert (size("24GB"), size("0.5 g"), size("512MB")) == (24 * 10**9, 5 * 10**8, 512 * 10**6)
    assert (size("2GiB"), size("512Mi")) == (2 * 2**30, 512 * 2**20)
    refused = {need.strategy: need.refused for need in needs(network, 3, Job(length=32))}
    assert "which 3 processes cannot divide evenly" in refused["tensor"]
    assert "2 layers cannot be divided into 3 stages" in refused["pipeline"]


def test_the_command(tmp_path: Path) -> None:
    base = tiny_base(tmp_path / "base", layers=2)
    said = CliRunner().invoke(app, ["plan", str(base), "--length", "32", "--processes", "2", "--memory", "1GB"])
    assert said.exit_code == 0, said.output
    assert "Use --run ddp:2, the first that fits into 1GB." in said.output
    small = CliRunner().invoke(app, ["plan", str(base), "--length", "32", "--memory", "1kB", "--json"])
    assert json.loads(small.output)["recommended"] is None


def test_the_command_reads_a_saved_model(tmp_path: Path) -> None:
    base = tiny_base(tmp_path / "base", layers=2)
    pretrained(str(base), Classify(("bad", "good"))).save(tmp_path / "model")
    said = [
        CliRunner().invoke(app, ["plan", str(tmp_path / name), "--length", "32", "--json"]).output
        for name in ("base", "model")
    ]
    assert json.loads(said[0]) == json.loads(said[1])
    network = Linear(3, 5, 2)
    replace(tiny_model(), network=network).save(tmp_path / "linear")
    with pytest.raises(ModelError, match="linear holds a saved Linear; only an encoder can be divided"):
        skeleton(str(tmp_path / "linear"))


@pytest.mark.parametrize("again", [False, True])
def test_the_command_names_a_run_that_there_is(again: bool, tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    base = tiny_base(tmp_path / "base", layers=2)
    given = ["plan", str(base), "--length", "32", *(["--activation-checkpointing"] if again else [])]
    nothing = CliRunner().invoke(app, [*given, "--memory", "1kB"]).output
    assert ("or plan with --activation-checkpointing." in nothing) != again
    monkeypatch.setattr(Need, "fits", lambda need, _: need.strategy == "fsdp")
    found = re.search(r"Use --run (\S+), the first that fits", CliRunner().invoke(app, given).output)
    assert found
    assert found[1] == ("fsdp:2,activation-checkpointing" if again else "fsdp:2")
    assert callable(named(found[1]))
