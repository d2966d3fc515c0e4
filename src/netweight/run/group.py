"""A group of processes: how they meet, and what happens to those who wait for one that is gone."""

from __future__ import annotations

import gc
import json
import os
import sys
import time
import traceback
from collections.abc import Iterator, Mapping
from contextlib import contextmanager
from dataclasses import dataclass
from datetime import timedelta
from typing import Any, Protocol, cast

import torch
import torch.distributed as dist
from torch import Tensor

from netweight.errors import RunError
from netweight.seams import Lost


class Place(Protocol):
    """Where a group of so many meets: gives the store in which they find each other."""

    def __call__(self, size: int) -> Any: ...


@dataclass(frozen=True)
class File:
    """A file, for processes of one machine; they talk on loopback."""

    path: str

    def __call__(self, size: int) -> Any:
        _on_loopback()
        return cast(Any, dist).FileStore(self.path, size)


@dataclass(frozen=True)
class Port:
    """A store that listens there, on any machine; each group has its own name in it."""

    host: str
    port: int
    name: str

    def __call__(self, size: int) -> Any:
        stores = cast(Any, dist)
        return stores.PrefixStore(self.name, stores.TCPStore(self.host, self.port, is_master=False))


@dataclass(frozen=True)
class Join:
    """Where a group meets, and this one's rank in it.

    `timeout`: seconds after which a process that waits for another gives up.
    """

    place: Place
    rank: int
    size: int
    timeout: float

    def __call__(self) -> None:
        """Leave the group that there was, if any, and enter this one. Raises Lost where others do not come."""
        leave()
        with waiting():
            _met(self.place(self.size), self.rank, self.size, timedelta(seconds=self.timeout))


def launched() -> bool:
    """Whether torchrun, or another launcher that sets the same variables, started this program."""
    return all(name in os.environ for name in ("RANK", "WORLD_SIZE", "MASTER_ADDR", "MASTER_PORT"))


def enter(timeout: float) -> None:
    """The group of the processes that a launcher started; entered once. Raises RunError where they do not come."""
    if dist.is_initialized():
        return
    if os.environ["MASTER_ADDR"] in ("localhost", "127.0.0.1", "::1"):
        _on_loopback()
    with waiting():
        store, rank, size = next(cast(Any, dist).rendezvous("env://", timeout=timedelta(seconds=timeout)))
        _met(cast(Any, dist).PrefixStore("netweight", store), rank, size, timedelta(seconds=timeout))


def _on_loopback() -> None:
    os.environ.setdefault("GLOO_SOCKET_IFNAME", "lo0" if sys.platform == "darwin" else "lo")


def leave() -> None:
    """Leave the group; whoever waits for this process in it learns that at once."""
    if dist.is_initialized():
        dist.destroy_process_group()
        gc.collect()


def _met(store: Any, rank: int, size: int, timeout: timedelta) -> None:
    """In the group whose processes find each other in that store."""
    has = torch.cuda.device_count() >= beside(size)
    dist.init_process_group(
        backend(store, rank, size, has, timeout), store=store, rank=rank, world_size=size, timeout=timeout
    )


def backend(store: Any, rank: int, size: int, has: bool, timeout: timedelta) -> str:
    """NCCL between graphics cards where each process of every machine has one, and gloo else.

    All must take the same one, and each machine sees its own cards only, so they tell each other in the store whether
    they have enough (`has`). Raises RuntimeError where others do not say in time.
    """
    names = [f"cards of {other}" for other in range(size)]
    store.set(names[rank], str(has))
    store.wait(names, timeout)
    return "cpu:gloo,cuda:nccl" if all(store.get(name) == b"True" for name in names) else "gloo"


def beside(size: int) -> int:
    """How many of a group's processes are on this machine: what a launcher says, else all."""
    return int(os.environ.get("LOCAL_WORLD_SIZE", size))


def device_of(rank: int, kind: str = "auto") -> torch.device:
    """A graphics card for each process of this machine as far as there are some, and the CPU for the others."""
    local = int(os.environ.get("LOCAL_RANK", rank))
    if kind == "auto" and local < torch.cuda.device_count():
        return torch.device("cuda", local)
    return torch.device("cpu")


@contextmanager
def waiting() -> Iterator[None]:
    """A collective: when others are gone or silent, Lost says who waited, and for how long."""
    began = time.monotonic()
    try:
        yield
    except RuntimeError as problem:
        # Their variables hold the group, and others learn that this process has left when its last owner has gone.
        traceback.clear_frames(problem.__traceback__)
        who = f"rank {dist.get_rank()}" if dist.is_initialized() else "a process"
        lines = str(problem).strip().splitlines() or [type(problem).__name__]
        raise Lost(
            f"{who} (pid {os.getpid()}) waited {time.monotonic() - began:.1f} s for the others, and then: {lines[0]}"
        ) from None


def told(mine: Mapping[str, Tensor], source: int) -> dict[str, Tensor]:
    """The named tensors that the process `source` of all holds, in its order; what others give does not matter."""
    own = dist.get_rank() == source
    plan = json.dumps([[name, str(t.dtype).removeprefix("torch."), list(t.shape)] for name, t in mine.items()])
    header = torch.frombuffer(bytearray(plan.encode()), dtype=torch.uint8)
    with waiting():
        length = torch.tensor([len(header)])
        dist.broadcast(length, source)
        header = header if own else torch.empty(int(length), dtype=torch.uint8)
        dist.broadcast(header, source)
        found = {}
        for name, kind, shape in json.loads(bytes(header.tolist())):
            value = mine[name].cpu().contiguous() if own else torch.empty(shape, dtype=getattr(torch, kind))
            if value.numel():
                dist.broadcast(value, source)
            found[name] = value
    return found


def refused(what: str) -> RunError:
    """The error of a run that cannot go on."""
    return RunError(f"{what}; the fit goes on from its last checkpoint when it is started again.")
