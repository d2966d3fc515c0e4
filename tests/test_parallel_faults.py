"""What happens to a parallel run when processes die, hang, fail or are slow, and when a program is killed."""

from __future__ import annotations

import os
import re
import signal
import subprocess
import sys
import time
from collections.abc import Callable, Iterator, Mapping
from concurrent.futures import ThreadPoolExecutor
from dataclasses import dataclass, replace
from datetime import timedelta
from pathlib import Path
from typing import Any

import pytest
import torch
import torch.distributed as dist
from torch import Tensor, nn

from conftest import Killed, Killer, tiny_model
from netweight.data import Dataset
from netweight.errors import MissingExtra, OptionError, RunError
from netweight.loss import Batch, Supervised
from netweight.model import Model
from netweight.reporter import Silent
from netweight.run import Local, Parallel, Pool, Setup, crew, ddp
from netweight.run.ddp import Ddp
from netweight.run.group import Join, backend
from netweight.seams import Lost, Seams, State
from test_parallel import PLAN, SAME, assert_equal, undropped


@pytest.fixture(scope="module")
def pool() -> Iterator[Pool]:
    """Three processes for tests that end none of them."""
    with Pool(3, restarts=0) as made:
        yield made


@pytest.fixture
def model() -> Model:
    return undropped(tiny_model())


class At(Silent):
    """Does something at a step, once, and keeps notes."""

    def __init__(self, step: int, act: Callable[[], object]) -> None:
        self.at, self.act, self.notes, self.done = step, act, list[str](), list[int]()
        self.starts: list[int] = []

    def start(self, label: str, steps: int, done: int) -> None:
        """Keep."""
        self.starts.append(done)

    def step(self, step: int, loss: float, rate: float) -> None:
        """Act."""
        self.done.append(step)
        if step == self.at:
            self.at = -1
            self.act()

    def note(self, message: str) -> None:
        """Keep."""
        self.notes.append(message)


@dataclass(frozen=True)
class Odd:
    """A supervised loss that does something else in one process, or in all (-1)."""

    supervised: Supervised
    rank: int
    what: str
    teachers: tuple[Model, ...] = ()
    unlabelled: bool = False

    def __call__(self, network: nn.Module, batch: Batch) -> Tensor:
        if self.rank in (-1, dist.get_rank()):
            if self.what == "option":
                raise OptionError("this loss wants another option.")
            if self.what == "extra":
                raise MissingExtra("a loss", "train")
            if self.what == "division":
                raise ZeroDivisionError("rows by none")
            os._exit(7)
        return self.supervised(network, batch)


@dataclass(frozen=True)
class Slow:
    """A supervised loss that takes longer per row in the second process, and writes down how many rows each had."""

    supervised: Supervised
    folder: str
    teachers: tuple[Model, ...] = ()
    unlabelled: bool = False

    def __call__(self, network: nn.Module, batch: Batch) -> Tensor:
        rank = dist.get_rank()
        rows = int((batch.weight > 0).sum())
        with (Path(self.folder) / str(rank)).open("a", encoding="utf-8") as file:
            file.write(f"{rows}\n")
        time.sleep(rows * (0.08 if rank == 1 else 0.015))
        return self.supervised(network, batch)


# --- killed programs ---


def test_checkpoints_go_on_under_any_number_of_processes(
    model: Model, dataset: Dataset, pool: Pool, tmp_path: Path
) -> None:
    loss = Supervised(model.task)
    whole = Local(dataset).fit(model, loss, PLAN)
    three = Parallel(dataset, setup=SAME, pool=pool).fit(model, loss, PLAN)
    runs: dict[str, Callable[[Path], Local | Parallel]] = {
        "one": lambda folder: Local(dataset, folder),
        "three": lambda folder: Parallel(dataset, setup=SAME, folder=folder, pool=pool),
    }
    for first in runs:
        for then in runs:
            folder = tmp_path / f"{first}-{then}"
            killer = Killer(at=7)
            plan = replace(PLAN, checkpoint_every=0, reporter=killer)
            with pytest.raises(Killed):
                runs[first](folder).fit(model, loss, plan)
            killer.at = -1
            run = runs[then](folder)
            made = run.fit(model, loss, plan)
            assert killer.resumed_at == 6
            assert_equal(made, whole, dataset)
            if first == then == "three":
                assert made.digest == three.digest, "going on changed bits"
            assert len(list(folder.glob("fit-*"))) == 1, "until the model is saved"
            run.forget()
            assert not list(folder.glob("fit-*"))


def test_early_stopping_is_that_of_one_process(model: Model, dataset: Dataset, pool: Pool) -> None:
    plan, loss = replace(PLAN, patience=0, learning_rate=3e-3), Supervised(model.task)
    told = [At(-1, print), At(-1, print)]
    one = Local(dataset).fit(model, loss, replace(plan, reporter=told[0]))
    many = Parallel(dataset, setup=SAME, pool=pool).fit(model, loss, replace(plan, reporter=told[1]))
    assert_equal(one, many, dataset)
    assert told[0].notes == told[1].notes
    assert told[0].done == told[1].done


# --- failures ---


@pytest.mark.parametrize("rank", [-1, 0, 2])
def test_errors_of_processes_are_those_of_the_program(rank: int, model: Model, dataset: Dataset, pool: Pool) -> None:
    run, loss = Parallel(dataset, setup=SAME, pool=pool), Supervised(model.task)
    with pytest.raises(OptionError, match=r"^this loss wants another option\.$"):
        run.fit(model, Odd(loss, rank, "option"), PLAN)
    with pytest.raises(MissingExtra, match=r"pip install '\.\[train\]'"):
        run.fit(model, Odd(loss, rank, "extra"), PLAN)
    with pytest.raises(RunError, match=rf"(?s)rank {max(rank, 0)} \(pid \d+\) failed with ZeroDivision.*raise Zero"):
        run.fit(model, Odd(loss, rank, "division"), PLAN)
    assert len(pool.pids) == 3, "a failure ends no process"
    assert_equal(run.fit(model, loss, PLAN), Local(dataset).fit(model, loss, PLAN), dataset)


def test_options_of_a_parallel_run_are_checked(dataset: Dataset) -> None:
    with pytest.raises(OptionError, match="0 processes of 1 threads are asked for; both must be 1 or more"):
        Parallel(dataset, processes=0)
    with pytest.raises(OptionError, match="unknown strategy 'magic'; use "):
        Parallel(dataset, strategy="magic")  # type: ignore[arg-type]


@pytest.mark.slow
def test_a_script_without_its_guard_is_told(tmp_path: Path) -> None:
    script = tmp_path / "script.py"
    script.write_text(
        "from netweight.run import Pool\nfrom netweight.reporter import Silent\nPool(1).do(0, None, Silent())\n"
    )
    said = subprocess.run([sys.executable, str(script)], capture_output=True, text=True, timeout=120, check=False)
    assert "rank 0" in said.stderr.splitlines()[-1]
    assert "`if __name__ == '__main__':`" in said.stderr.splitlines()[-1]


def test_a_group_that_never_meets_is_given_up(
    model: Model, dataset: Dataset, pool: Pool, monkeypatch: pytest.MonkeyPatch
) -> None:
    usual, run = Pool.joins, Parallel(dataset, setup=Setup(balance=False, timeout=1), pool=pool)

    def lonely(self: Pool, members: Any, timeout: float) -> Iterator[Join]:
        return (replace(join, size=join.size + 1) for join in usual(self, members, timeout))

    with monkeypatch.context() as patch:
        patch.setattr(Pool, "joins", lonely)
        with pytest.raises(
            RunError, match=r"^5 groups of processes failed one after the other: .* waited .* and then:"
        ):
            run.quality(model)
    assert run.quality(model) == Local(dataset).quality(model)


@pytest.mark.parametrize(("cards", "wanted"), [((True, True), "cpu:gloo,cuda:nccl"), ((True, False), "gloo")])
def test_machines_with_and_without_cards_take_the_same_backend(cards: tuple[bool, bool], wanted: str) -> None:
    store, wait = dist.HashStore(), timedelta(seconds=20)
    with ThreadPoolExecutor() as both:
        said = [both.submit(backend, store, rank, 2, has, wait) for rank, has in enumerate(cards)]
        assert [one.result() for one in said] == [wanted, wanted]
    with pytest.raises(RuntimeError, match="timeout"):
        backend(dist.HashStore(), 0, 2, True, timedelta(seconds=0.1))


def test_one_process_alone_does_not_recover() -> None:
    with pytest.raises(Lost, match="a process of this run is gone"):
        Seams().regroup(State({}, "{}"), (0, 0, 1))


@pytest.mark.parametrize("rank", [0, 1, 2])
def test_processes_that_planned_fits_of_other_lengths_go_on_with_one(
    rank: int, monkeypatch: pytest.MonkeyPatch
) -> None:
    """All stand at one step, and the group broke after the first had heard how many fit into the time."""
    at = [(8, 0, 12), (8, 0, 40), (8, 0, 40)]
    held = [
        State({"model/w": torch.tensor(float(i))}, f'{{"epochs": {steps / 10}}}') for i, (*_, steps) in enumerate(at)
    ]

    def told(mine: Mapping[str, Tensor], source: int) -> dict[str, Tensor]:
        line = torch.tensor(list(held[source].progress.encode()), dtype=torch.uint8)
        return {**held[source].tensors, "progress": line}

    monkeypatch.setattr(dist, "get_rank", lambda: rank)
    monkeypatch.setattr(dist, "get_world_size", lambda: len(at))
    monkeypatch.setattr(Ddp, "collect", lambda self, mine: [{"at": torch.tensor(one)} for one in at])
    monkeypatch.setattr(ddp, "told", told)
    seams = Ddp(rejoin=lambda lost: None)
    assert seams.regroup(held[rank], at[rank]) == held[0], "the shorter one, which keeps within the time box"
    at[1:] = at[0], (9, 0, 40)
    assert seams.regroup(held[rank], at[rank]) == held[2], "the furthest has gone on already"
    at[:] = [(8, 0, 12)] * 3
    assert seams.regroup(held[rank], at[rank]) is held[rank], "nothing has to travel"


# --- slow and lost processes; these end some of the pool's ---


def test_rows_follow_speed(model: Model, dataset: Dataset, pool: Pool, tmp_path: Path) -> None:
    loss = Supervised(model.task)
    made = Parallel(dataset, setup=Setup(balance=True), pool=pool).fit(model, Slow(loss, str(tmp_path)), PLAN)
    fast, slow, also = ([int(n) for n in (tmp_path / str(rank)).read_text().split()] for rank in range(3))
    assert (fast[0], slow[0], also[0]) == (5, 6, 5)
    assert slow[-1] <= 3 < min(fast[-1], also[-1])
    assert all(sum(parts) == 16 for parts in zip(fast, slow, also, strict=True))
    assert_equal(made, Local(dataset).fit(model, loss, PLAN), dataset)


def test_a_silent_process_is_named_and_ended(model: Model, dataset: Dataset, pool: Pool) -> None:
    loss, stopped = Supervised(model.task), list[int]()

    def stop() -> None:
        stopped.append(pool.pids[1])
        os.kill(stopped[0], signal.SIGSTOP)

    told = At(6, stop)
    run = Parallel(dataset, setup=Setup(balance=False, timeout=4), pool=pool)
    made = run.fit(model, loss, replace(PLAN, reporter=told))
    ended = f"rank 1 (pid {stopped[0]}) did not answer for 4 s and was ended"
    assert told.notes == [f"{ended}: going on with 2 processes"]
    assert_equal(made, Local(dataset).fit(model, loss, PLAN), dataset)


def test_training_goes_on_without_killed_processes(model: Model, dataset: Dataset, pool: Pool) -> None:
    loss, run = Supervised(model.task), Parallel(dataset, setup=SAME, pool=pool)
    killed: list[int] = []

    def kill() -> None:
        killed.extend(pool.pids[:-1])
        for pid in killed:
            os.kill(pid, signal.SIGKILL)

    told = At(6, kill)
    made = run.fit(model, loss, replace(PLAN, reporter=told))
    assert len(pool.pids) == 1
    # Two that go at once are noticed together or one by one, in any order.
    named = re.findall(r"rank \d \(pid (\d+)\) was ended by signal 9", "; ".join(told.notes))
    assert sorted(map(int, named)) == sorted(killed)
    assert told.notes[-1].endswith("was ended by signal 9: going on with 1 process")
    assert [step for step in told.done if step > 7] == list(range(8, 21)), "no step is lost, and none begins anew"
    assert_equal(made, Local(dataset).fit(model, loss, PLAN), dataset)
    with pytest.raises(RunError, match=r"no process is left: rank 0 \(pid \d+\) ended with status 7; the fit goes on"):
        run.fit(model, Odd(loss, 0, "exit"), PLAN)
    assert not pool.pids
    assert_equal(run.fit(model, loss, PLAN), made, dataset)
    assert len(pool.pids) == 3, "the next command starts new ones"


def test_what_is_sharded_goes_on_from_the_checkpoint(
    model: Model, dataset: Dataset, pool: Pool, tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    monkeypatch.setattr(crew, "WHOLE", ())
    loss, run = Supervised(model.task), Parallel(dataset, setup=SAME, folder=tmp_path, pool=pool)
    told = At(7, lambda: os.kill(pool.pids[-1], signal.SIGKILL))
    pool.start()
    last = len(pool.pids) - 1
    made = run.fit(model, loss, replace(PLAN, checkpoint_every=0, reporter=told))
    assert re.fullmatch(
        rf"rank {last} \(pid \d+\) was ended by signal 9: going on with {last} process(es)?, from the last checkpoint",
        told.notes[0],
    )
    assert told.starts[0] == 0
    assert told.starts[1] in (6, 7)
    assert_equal(made, Local(dataset).fit(model, loss, PLAN), dataset)
