"""Federated runs in one process: equal to local ones where they must be, and what happens when clients differ."""

from __future__ import annotations

import gc
import subprocess
import sys
from collections.abc import Callable, Mapping, Sequence
from dataclasses import replace
from pathlib import Path

import pytest
import torch
from torch import Tensor

from conftest import Killed, full_disk, tiny_rows
from netweight.data import Dataset, Rows
from netweight.data.rows import Sealed
from netweight.errors import OptionError
from netweight.loss import Supervised
from netweight.model import Model
from netweight.run import Local
from netweight.run.aggregate import Adam, Krum, Median, TrimmedMean
from netweight.run.federated import (
    Client,
    FedAdam,
    FedAvg,
    Federated,
    FedProx,
    InProcess,
    Int8,
    Rounds,
    Scaffold,
    TopK,
    Travel,
)
from netweight.run.federated.client import Kept
from netweight.run.federated.inprocess import Spilled
from netweight.run.federated.messages import Answer, FitTask, Fitted, Lost, Task
from netweight.run.federated.state import State
from netweight.testing import RunContract
from netweight.train import Plan

PLAN = Plan(epochs=2, batch_size=16, learning_rate=1e-3, precision="fp32")


def part(rows: Rows) -> Dataset:
    """A client's rows; the last tenth serves select."""
    cut = len(rows) - len(rows) // 10
    return Dataset(rows.take(range(cut)), rows.take(range(cut, len(rows))), rows.take([]), Sealed(rows.take([])))


def shops(n: int = 3, folder: Path | None = None, rows: int = 90) -> list[Client]:
    every = tiny_rows(rows)
    parts = [every.take(range(i * rows // n, (i + 1) * rows // n)) for i in range(n)]
    return [Client(f"shop{i}", part(p), folder and folder / f"shop{i}") for i, p in enumerate(parts)]


def fitted(run: Federated, model: Model, plan: Plan = PLAN) -> Model:
    return run.fit(model, Supervised(model.task), plan)


def values(model: Model) -> dict[str, Tensor]:
    return {name: p.detach() for name, p in model.network.named_parameters()}


@pytest.mark.parametrize("plan", [PLAN, replace(PLAN, patience=1), replace(PLAN, schedule="linear", optimizer="sgd")])
def test_one_client_and_one_round_equal_a_local_run(plan: Plan, model: Model) -> None:
    data = part(tiny_rows(80))
    run = Federated([Client("shop", data)], rounds=Rounds(1), privacy=None)
    assert fitted(run, model, plan).digest == Local(data).fit(model, Supervised(model.task), plan).digest
    assert run.report.rounds[0].took_part == ("shop",)


def test_a_mean_of_one_round_is_the_mean_of_local_fits(model: Model) -> None:
    clients = shops(3, rows=100)
    made = values(fitted(Federated(clients, rounds=Rounds(1), privacy=None), model))
    alone = [values(Local(c.data).fit(model, Supervised(model.task), PLAN)) for c in clients]
    rows = [len(c.data.train) for c in clients]
    for name, value in made.items():
        wanted = sum(v[name].double() * n for v, n in zip(alone, rows)) / sum(rows)
        torch.testing.assert_close(value.double(), wanted, rtol=1e-6, atol=1e-7)


def test_the_schedule_goes_on_over_rounds(model: Model) -> None:
    rates: list[float] = []

    class Rates:
        def start(self, label: str, steps: int, done: int) -> None:
            pass

        def step(self, step: int, loss: float, rate: float) -> None:
            rates.append(rate)

        def note(self, message: str) -> None:
            pass

    data = part(tiny_rows(80))
    plan = replace(PLAN, epochs=4, reporter=Rates())
    Local(data).fit(model, Supervised(model.task), plan)
    whole, rates = rates, []
    for i in range(4):
        Local(data).fit(model, Supervised(model.task), replace(plan, epochs=1, part=(i / 4, (i + 1) / 4)))
    assert rates == pytest.approx(whole, rel=1e-9)
    with pytest.raises(OptionError, match="part of a plan is"):
        Plan(part=(0.5, 0.5))


@pytest.mark.parametrize(
    "algorithm", [FedAvg(), FedProx(mu=0.1), FedAdam(server=Adam(rate=0.003)), Scaffold(), FedAvg(Median())], ids=repr
)
def test_contract_and_learning(algorithm: FedAvg, model: Model) -> None:
    rounds = Rounds(2)
    texts = [text for client in shops() for text in client.data.train.text]
    plan = replace(PLAN, epochs=1)
    RunContract(
        lambda: Federated(shops(), rounds=rounds, algorithm=algorithm, privacy=None),
        model,
        Supervised(model.task),
        plan,
        texts,
    ).check()


def test_learning_and_its_report(model: Model) -> None:
    run = Federated(shops(), rounds=Rounds(3), privacy=None)
    made = fitted(run, model, replace(PLAN, epochs=6, learning_rate=3e-3))
    assert run.quality(made) >= 0.9 > run.quality(model)
    report = run.report
    assert [r.round for r in report.rounds] == [0, 1, 2]
    assert [s.client for s in report.standings] == ["shop0", "shop1", "shop2"]
    assert report.worst is not None
    assert report.worst.quality == min(s.quality for s in report.standings if s.quality is not None)
    sent = sum(p.numel() * 4 for p in model.network.parameters())
    assert report.rounds[0].up == report.rounds[0].down == 3 * sent
    assert report.up == 9 * sent
    text = "\n".join(report.lines())
    assert all(f"shop{i}: 27 rows" in text for i in range(3))
    assert "(worst)" in text
    assert "privacy: OFF, as was asked for" in text


def test_what_takes_no_gradient_does_not_travel(model: Model) -> None:
    head = model.copy()
    head.network.requires_grad_(False)
    head.network.head.requires_grad_(True)  # type: ignore[union-attr]
    run = Federated(shops(), rounds=Rounds(1), privacy=None)
    fitted(run, head)
    assert run.report.up == 3 * 4 * (32 * 2 + 2)


class Killer:
    """Ends the server's process, as it were, when a round begins."""

    def __init__(self, clients: Sequence[Client], at: int) -> None:
        self.inner, self.at, self.seen = InProcess(clients), at, []

    def clients(self) -> tuple[str, ...]:
        return self.inner.clients()

    def exchange(self, tasks: Mapping[str, Task], seconds: float | None = None) -> dict[str, Answer | Lost]:
        answers = self.inner.exchange(tasks, seconds)
        task = next(iter(tasks.values()))
        if isinstance(task, FitTask):
            self.seen.append(task.round)
            if task.round == self.at:
                raise Killed
        return answers


@pytest.mark.parametrize(
    ("algorithm", "travel"),
    [(FedAdam(), Travel()), (Scaffold(), Travel()), (FedAvg(), Travel(TopK(0.1))), (FedAvg(), Travel(Int8(), True))],
    ids=repr,
)
def test_a_killed_server_goes_on_to_the_same_weights(
    algorithm: FedAvg, travel: Travel, model: Model, tmp_path: Path
) -> None:
    """It dies after the clients have finished round 2: they are asked for it again, and must not count it twice."""
    plan = replace(PLAN, epochs=2)
    options = {"rounds": Rounds(4, share=0.67), "algorithm": algorithm, "travel": travel}
    whole = fitted(Federated(shops(3), **options, privacy=None), model, plan)  # type: ignore[arg-type]
    killer = Killer(shops(3, tmp_path), at=2)
    with pytest.raises(Killed):
        fitted(Federated(killer, folder=str(tmp_path), **options, privacy=None), model, plan)  # type: ignore[arg-type]
    killer = Killer(shops(3, tmp_path), at=-1)
    assert fitted(Federated(killer, folder=tmp_path, **options, privacy=None), model, plan).digest == whole.digest  # type: ignore[arg-type]
    assert killer.seen == [2, 3]
    assert not list(tmp_path.glob("rounds-*.safetensors"))


@pytest.mark.parametrize("aggregate", [TrimmedMean(), Krum()])
def test_an_aggregation_of_too_few_is_refused_before_they_train(aggregate: TrimmedMean | Krum, model: Model) -> None:
    killer = Killer(shops(4), at=-1)
    with pytest.raises(OptionError, match=r"needs 5 updates, and 4 came; .*--minimum"):
        fitted(Federated(killer, rounds=Rounds(1), algorithm=FedAvg(aggregate), privacy=None), model)
    assert killer.seen == []
    assert fitted(Federated(shops(5), rounds=Rounds(1), algorithm=FedAvg(aggregate), privacy=None), model)


def test_what_simulated_clients_send_waits_in_files(model: Model) -> None:
    channel = InProcess(shops(3))
    task = FitTask("f" * 64, 0, model, Supervised(model.task), PLAN)
    answers = channel.exchange(dict.fromkeys(channel.clients(), task))
    folder = Path(channel._folder.name)
    first = answers["shop0"]
    assert isinstance(first, Fitted)
    assert len(list(folder.iterdir())) == 3
    assert torch.equal(first.tensors["head.bias"], first.tensors["head.bias"])
    with pytest.raises(KeyError):
        _ = first.tensors["tail.bias"]
    channel.exchange({"shop1": replace(task, round=1)})
    assert len(list(folder.iterdir())) == 1, "what was read is gone"
    del channel, answers, first
    gc.collect()
    assert not folder.exists()


@pytest.mark.parametrize(
    ("module", "write"),
    [
        ("client", lambda folder, task: Kept(folder).save(task, {"residual": {"w": torch.ones(2)}})),
        ("inprocess", lambda folder, task: Spilled.of({"w": torch.ones(2)}, folder / "0.update")),
        ("state", lambda folder, task: State({"w": torch.ones(2)}).save(folder / "fit.safetensors", task.fit)),
    ],
)
def test_a_full_disk_is_an_error_of_the_system(
    module: str,
    write: Callable[[Path, FitTask], object],
    model: Model,
    tmp_path: Path,
    monkeypatch: pytest.MonkeyPatch,
) -> None:
    monkeypatch.setattr(f"netweight.run.federated.{module}.save_file", full_disk)
    with pytest.raises(OSError, match=r"\.safetensors cannot be written: .*No space left on device"):
        write(tmp_path, FitTask("f" * 64, 0, model, Supervised(model.task), PLAN))
    assert not list(tmp_path.rglob("*.new"))


SCRIPT = """
import sys
sys.path[:0] = [{tests!r}]
import torch
torch.set_num_threads(1)
from pathlib import Path
from conftest import tiny_model
from test_federated import *
class Say:
    def start(self, label, steps, done): print("from", done, flush=True)
    def step(self, step, loss, rate): print("round", step, flush=True)
    def note(self, message): pass
folder = Path({folder!r})
run = Federated(shops(3, folder), folder=folder, rounds=Rounds(20), algorithm=Scaffold(), travel=Travel(TopK(0.1)), privacy=None)
print(fitted(run, tiny_model(), replace(PLAN, epochs=20, reporter=Say())).digest, flush=True)
"""


@pytest.mark.slow
def test_a_server_that_is_killed_goes_on_from_its_last_round(tmp_path: Path) -> None:
    """kill -9, in the middle of whatever it does; what it made before is not made again."""

    def started(folder: Path) -> subprocess.Popen[str]:
        script = SCRIPT.format(tests=str(Path(__file__).parent), folder=str(folder))
        return subprocess.Popen([sys.executable, "-c", script], stdout=subprocess.PIPE, text=True)

    said: list[list[str]] = []
    for folder, kill_at in ((tmp_path / "killed", "round 7\n"), (tmp_path / "killed", ""), (tmp_path / "whole", "")):
        process = started(folder)
        try:
            assert process.stdout is not None
            said.append([])
            for line in process.stdout:
                said[-1].append(line)
                if line == kill_at:
                    process.kill()
        finally:
            process.kill()
            process.wait()
    killed, again, whole = said
    assert killed[0] == whole[0] == "from 0\n"
    assert int(again[0].split()[1]) >= 7
    assert len(again) < 20
    assert again[-1] == whole[-1]
