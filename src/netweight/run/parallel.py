"""Several processes that own all rows together."""

from __future__ import annotations

import traceback
from dataclasses import replace
from pathlib import Path
from types import TracebackType
from typing import Any

import torch.distributed as dist
from torch import Tensor

from netweight.data import Dataset
from netweight.errors import OptionError
from netweight.loss import Loss
from netweight.model import Model
from netweight.reporter import Reporter, Silent
from netweight.run import group
from netweight.run.base import Statistic
from netweight.run.commands import Command, Fit, Forget, Open, Outputs, Quality, Reduce, Setup, Strategy
from netweight.run.crew import Crew
from netweight.run.local import Local, forget
from netweight.run.pool import Pool
from netweight.run.raytrain import RayPool
from netweight.run.roll import Noted, of_group, of_launcher
from netweight.run.strategies import check, seams_of
from netweight.seams import Lost, Seams
from netweight.train import Plan


class Parallel:
    """Trains and adds up on several processes; a `Run`, and a context manager that ends them.

    In a program that torchrun started, every process runs the program and makes the same calls; none is started, and
    each gets the trained model. So it is in the train function of a `TorchTrainer`. Elsewhere they are started by the
    first call.

    Args:
        data: as for `Local`.
        processes: how many; None: as many as torchrun started, else 2.
        strategy: "ddp": each process holds the whole network, and some rows of each batch. "fsdp": some rows, and a
            share of parameters, gradients and optimizer state. "tensor": a share of the heads and neurons of each
            layer. "pipeline": some of the layers. See docs/parallel.md for what works where.
        folder: as for `Local`; all processes must see it.
        threads: of each process.
        setup: how the processes work.
        pool: processes that are there already, a `Pool` or a `RayPool`; they stay when this run is closed.
        cluster: a Ray cluster on which workers of Ray Train are the processes: `local`, `auto`, HOST:PORT or
            ray://HOST:PORT; None: this machine.

    Raises OptionError for a strategy that is not known, for an option of the setup that the strategy or the cluster
    does not have, and where the number of processes is not the one that torchrun started, and MissingExtra for a
    cluster without Ray.
    """

    def __init__(
        self,
        data: Dataset,
        processes: int | None = None,
        strategy: Strategy = "ddp",
        folder: str | Path | None = None,
        threads: int = 1,
        setup: Setup | None = None,
        pool: Crew[Any] | None = None,
        cluster: str | None = None,
    ) -> None:
        folder = None if folder is None else Path(folder)
        self.data, self.folder, self.strategy, self.setup = data, folder, strategy, setup or Setup()
        self._local: Local | None = None
        self._number = -1
        if group.launched():
            group.enter(self.setup.timeout)
            if processes not in (None, dist.get_world_size()):
                raise OptionError(
                    f"{processes} processes are asked for, and the launcher started {dist.get_world_size()}; leave the "
                    "number out, or give the same to both."
                )
            check(strategy, self.setup, dist.get_world_size())
            self._local, self._roll = Local(data, folder), of_launcher()
            return
        started = 2 if processes is None else processes
        check(strategy, self.setup, pool.processes if pool else started)
        self._owned = pool is None
        self._pool = pool or self._made(started, threads, cluster)
        self._number = self._pool.open(Open(-1, data, folder, strategy, self.setup))

    def _made(self, processes: int, threads: int, cluster: str | None) -> Crew[Any]:
        if cluster is None:
            return Pool(processes, threads, self.setup.pin)
        if self.setup.pin:
            raise OptionError("pin gives each process a core of this machine; leave it out for a cluster.")
        return RayPool(cluster, processes, threads, cards=None if self.setup.device == "auto" else False)

    def __enter__(self) -> Parallel:
        return self

    def __exit__(self, kind: type[BaseException] | None, error: BaseException | None, at: TracebackType | None) -> None:
        self.close()

    def close(self) -> None:
        """End the processes that this run started."""
        if self._local is not None:
            return
        self._pool.shut(self._number)
        if self._owned:
            self._pool.close()

    def fit(self, model: Model, loss: Loss, plan: Plan, label: str = "fit") -> Model:
        """A trained copy of `model`. Raises as `Local.fit` does, and RunError where too few processes are left."""
        new = model.copy()
        new.network.load_state_dict(self._do(Fit(model, loss, plan, label), plan.reporter))
        new.network.eval()
        return new

    def forget(self) -> None:
        """As `Local.forget`, on whichever machine a process wrote them."""
        if self._local is None and not isinstance(self._pool, Pool):
            self._do(Forget())
        elif self._local is None or dist.get_rank() == 0:
            forget(self.folder)

    def reduce(
        self, model: Model, statistic: Statistic, limit: int | None = None, unlabelled: bool = False
    ) -> dict[str, Tensor]:
        """As `Local.reduce`; each process takes a stretch of the rows."""
        return self._do(Reduce(model, statistic, limit, unlabelled))

    def outputs(self, model: Model, unlabelled: bool = False, half: bool = False) -> Tensor:
        """As `Local.outputs`."""
        return self._do(Outputs(model, unlabelled, half))["logits"]

    def quality(self, model: Model) -> float:
        """As `Local.quality`."""
        return float(self._do(Quality(model))["quality"])

    def _do(self, command: Command, reporter: Reporter | None = None) -> dict[str, Tensor]:
        if self._local is None:
            if isinstance(command, Fit):
                command = replace(command, plan=replace(command.plan, reporter=Silent()))
            return self._pool.do(self._number, command, reporter or Silent())
        if not dist.is_initialized():
            raise group.refused("this run has lost a process, and left the others")
        rank = dist.get_rank()
        if isinstance(command, Fit):
            told = Silent() if rank else command.plan.reporter
            command = replace(command, plan=replace(command.plan, reporter=Noted(self._roll, told)))
        self._local.seams = seams_of(self.strategy, self.setup, group.device_of(rank, self.setup.device), None)
        self._roll.at(f"in {type(command).__name__.lower()}")
        try:
            return command(self._local)
        except Exception as problem:
            if not isinstance(problem, Lost) and not (isinstance(problem, RuntimeError) and of_group(problem)):
                self._roll.at(f"failed with {type(problem).__name__}: {problem}")
                raise
            lost = problem
        # Others learn that this process waits no more when nothing holds the group.
        traceback.clear_frames(lost.__traceback__)
        self._local.seams = Seams()
        group.leave()
        raise self._roll.lost(lost) from None
