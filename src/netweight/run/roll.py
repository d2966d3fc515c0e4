"""Who is missing when a program that a launcher started loses a process.

Errors of torch name an address, or nobody. So each process keeps the place where it is in the launcher's store; whoever
waits in vain notes that there too, and leaves the group, which ends the waiting of others. Who has noted nothing is
missing.
"""

from __future__ import annotations

import os
import platform
import time
from typing import Any, cast

import torch.distributed as dist

from netweight.reporter import Passing, Reporter
from netweight.run.group import refused
from netweight.seams import Lost

_SECONDS = 3.0  # that others have to note that they wait as well
_POLL = 0.05


class Roll:
    """This process among all, in a store of `torch.distributed` that they share."""

    def __init__(self, store: Any, rank: int, size: int) -> None:
        self.store, self.rank, self.size = store, rank, size

    def at(self, place: str) -> None:
        """Note where this process is."""
        self.store.set(f"at/{self.rank}", f"(pid {os.getpid()} on {platform.node()}), {place}")

    def lost(self, problem: RuntimeError | Lost) -> Exception:
        """What to raise for an error of a collective; takes some seconds while others note that they wait."""
        said = str(problem).strip().partition("\n")[0] or type(problem).__name__
        if not said.startswith(f"rank {self.rank} "):
            said = f"rank {self.rank} (pid {os.getpid()}) waited for the others, and then: {said}"
        try:
            missing = [f"rank {rank} {self._place(rank)}" for rank in self._silent()]
        except RuntimeError:  # of torch, when the store is gone
            missing = ["the process that holds the launcher's store"]
        return refused(f"{said}. Missing: {'; '.join(missing) or 'nobody, so a connection was lost'}")

    def _silent(self) -> list[int]:
        self.store.set(f"waits/{self.rank}", "")
        end, others = time.monotonic() + _SECONDS, [rank for rank in range(self.size) if rank != self.rank]
        while others and time.monotonic() < end:
            time.sleep(_POLL)
            others = [rank for rank in others if not self.store.check([f"waits/{rank}"])]
        return others

    def _place(self, rank: int) -> str:
        key = f"at/{rank}"
        return str(self.store.get(key), "utf-8") if self.store.check([key]) else "which never came"


def of_launcher() -> Roll:
    """The roll of the processes that torchrun, or another launcher, started."""
    env = os.environ
    stores = cast(Any, dist)
    store = stores.TCPStore(env["MASTER_ADDR"], int(env["MASTER_PORT"]), is_master=False)
    # torchrun keeps its store when it starts all again.
    again = env.get("TORCHELASTIC_RESTART_COUNT", "0")
    return Roll(stores.PrefixStore(f"netweight/{again}", store), int(env["RANK"]), int(env["WORLD_SIZE"]))


def of_group(problem: RuntimeError) -> bool:
    """Whether it is an error of a collective, in the words of gloo or the type of NCCL's."""
    return isinstance(problem, dist.DistError) or "gloo" in str(problem).lower()


class Noted(Passing):
    """A reporter that also notes each step."""

    def __init__(self, roll: Roll, reporter: Reporter) -> None:
        super().__init__(reporter)
        self._roll, self._label = roll, ""

    def start(self, label: str, steps: int, done: int) -> None:
        self._label = label
        self._roll.at(f"in {label}, after step {done}")
        super().start(label, steps, done)

    def step(self, step: int, loss: float, rate: float) -> None:
        self._roll.at(f"in {self._label}, after step {step}")
        super().step(step, loss, rate)
