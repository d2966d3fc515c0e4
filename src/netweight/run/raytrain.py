"""Processes of a Ray cluster, on any of its machines: the workers of a `ray.train.torch.TorchTrainer`.

They do what processes of a pool do. What is said between them and the program goes through Ray, and when one is lost
Ray Train ends all of them: the command begins again, from its last checkpoint, with new ones.
"""

from __future__ import annotations

import os
import socket
import tempfile
import time
from collections import deque
from collections.abc import Collection
from contextlib import ExitStack, suppress
from dataclasses import dataclass, field, replace
from typing import Any, cast

import torch
import torch.distributed as dist

from netweight.connect import Post, connected, machines, module
from netweight.errors import OptionError, RunError
from netweight.run.commands import Open
from netweight.run.crew import Crew
from netweight.run.group import Port, leave
from netweight.run.worker import Worker

_START = 300.0  # seconds until all workers must be there
_END = 30.0  # seconds that they may take to end by themselves
_PROGRAM = -1  # the program's box at the post; those of workers have their ranks


@dataclass(frozen=True)
class _Here:
    """What a worker says first; at its port others meet when its rank is 0."""

    pid: int
    host: str
    port: int
    actor: Any


@dataclass(eq=False)
class _Trainee:
    """A worker as the program sees it."""

    rank: int
    here: _Here
    pool: RayPool
    inbox: deque[Any] = field(default_factory=deque)

    @property
    def name(self) -> str:
        return f"rank {self.rank} (pid {self.here.pid} on {self.here.host})"

    def say(self, message: object) -> None:
        self.pool.send(message, [self.rank])

    def hear(self) -> Any:
        self.pool.ready([self], None)
        return self.inbox.popleft() if self.inbox else None


class RayPool(Crew[_Trainee]):
    """Workers of Ray Train; they start with the first command and end with `close`. Needs the extra `ray`.

    Args:
        address: as for `netweight.connect.connected`: `local`, `auto`, HOST:PORT, or ray://HOST:PORT.
        processes: how many. After a loss there are fewer where the cluster has no more room.
        threads: of each; it reserves as many CPUs.
        restarts: how often one command begins again from its last checkpoint when a worker is lost.
        cards: whether each reserves a graphics card; None: where the cluster has so many.

    Raises MissingExtra. The first command raises EndpointError where no cluster answers, OptionError where it has not
    so much room, and RunError where workers do not come.
    """

    def __init__(
        self,
        address: str = "auto",
        processes: int = 2,
        threads: int = 1,
        restarts: int = 3,
        cards: bool | None = None,
    ) -> None:
        super().__init__(processes, threads, restarts)
        module()
        self.address, self.cards = address, cards
        self._connection = ExitStack()
        self._post: Any = None
        self._fit: Any = None  # ends when the workers do
        self._letter: Any = None  # the next one for the program
        self._over = False

    def open(self, opened: Open) -> int:
        # Workers have other working folders.
        return super().open(replace(opened, folder=opened.folder.resolve() if opened.folder else None))

    def tell(self, message: object) -> None:
        if self.members:  # without, Ray would start a cluster to keep the message in
            self.send(message, [member.rank for member in self.members])

    def send(self, message: object, ranks: Collection[int]) -> None:
        """The message travels once to each machine, however many workers take it."""
        ray = module()
        kept = ray.put(message)
        with suppress(ray.exceptions.RayError):
            ray.get([self._post.put.remote(rank, [kept]) for rank in ranks])

    def ready(self, members: Collection[_Trainee], timeout: float | None) -> list[_Trainee]:
        until = None if timeout is None else time.monotonic() + timeout
        while True:
            found = [member for member in members if member.inbox or self._over]
            if found or (self._taken(until) is None and until is not None and time.monotonic() >= until):
                return found

    def lose(self, member: _Trainee, how: str | None = None) -> list[str]:
        if member not in self.members:
            return []
        if how is not None:
            module().kill(member.here.actor)
        fates = self._ended()
        lost = [f"{m.name} was lost ({fates[m.rank]})" for m in self.members if m.rank in fates]
        if how is not None:
            lost = [f"{member.name} {how}"]
        elif not lost:
            lost = [f"{member.name} was lost ({fates.get(_PROGRAM, 'Ray Train ended it')})"]
        self.members = []
        return lost

    def _place(self, number: int) -> Port:
        first = self.members[0].here
        return Port(first.host, first.port, f"group-{number}")

    def _started(self, fewer: bool) -> None:
        self._connection.enter_context(connected(self.address))
        size, cards = self._room(fewer)
        while why := self._missed(size, cards):
            # A machine that is gone counts as there until the cluster has missed its heartbeats.
            now, cards = self._room(fewer)
            if now == size:
                raise RunError(f"Ray Train did not start {size} workers on the cluster {self.address}: {why}.")
            self._let_go()
            size = now

    def _missed(self, size: int, cards: bool) -> str:
        """Start workers. Gives why not all came; nothing where they did."""
        ray = module()
        self._over = False
        self._post = ray.remote(num_cpus=0)(Post).remote()
        self._letter = self._post.take.remote(_PROGRAM)
        self._fit = ray.remote(num_cpus=0, max_retries=0)(_trained).remote(self._post, size, self.threads, cards)
        found: dict[int, _Here] = {}
        until = time.monotonic() + _START
        while len(found) < size:
            taken = self._taken(until)
            if taken is not None:
                found[taken[0]] = taken[1]
            elif self._over or time.monotonic() >= until:
                if not self._over:
                    return f"they took more than {_START:g} s"
                return "; ".join(self._ended().values()) or "they ended"
        self.members = [_Trainee(rank, found[rank], self) for rank in sorted(found)]
        return ""

    def _room(self, fewer: bool) -> tuple[int, bool]:
        """How many processes there will be, and whether each has a graphics card."""
        have = [(int(node.get("CPU", 0)) // self.threads, int(node.get("GPU", 0))) for node in machines()]
        cards = sum(card for _, card in have) >= self.processes if self.cards is None else self.cards
        room = sum(min(each, card) if cards else each for each, card in have)
        if room < (1 if fewer else self.processes):
            kind = " and a graphics card" if cards else ""
            raise OptionError(
                f"{self.processes} processes are asked for, each with {self.threads} CPUs{kind}, and the cluster "
                f"{self.address} has room for {room}; ask for fewer processes, or for fewer threads."
            )
        return min(self.processes, room), cards

    def _taken(self, until: float | None) -> tuple[int, Any] | None:
        """The next message and who sent it, which is in the sender's inbox as well. None where the time is over, and
        where the workers are."""
        ray = module()
        left = None if until is None else max(0.0, until - time.monotonic())
        waited = [ref for ref in (self._letter, self._fit) if ref is not None]
        done, _ = ray.wait(waited, timeout=left)
        if not done:
            return None
        if done[0] == self._fit:
            self._over = True
            return None
        try:
            rank, (kept,) = ray.get(self._letter)
            message = ray.get(kept)
            self._letter = self._post.take.remote(_PROGRAM)
        except _gone():  # the post, or who wrote; Ray Train ends the others
            self._letter = None
            return None
        for member in self.members:
            if member.rank == rank:
                member.inbox.append(message)
        return rank, message

    def _ended(self) -> dict[int, str]:
        """Why workers ended, by rank, and why Ray Train did; waits for the end of all."""
        ray = module()
        self._over = True
        why = ""
        for force in (False, True):  # first as Ctrl-C, on which Ray Train gives back what it has reserved
            try:
                fates: dict[int, str] = ray.get(self._fit, timeout=_END)
                return fates
            except ray.exceptions.GetTimeoutError as problem:
                why = _why(problem)
                ray.cancel(self._fit, force=force)
            except ray.exceptions.RayError as problem:
                return {_PROGRAM: _why(problem)}
        return {_PROGRAM: why}

    def _stopped(self) -> None:
        self._let_go()
        self._connection.close()

    def _let_go(self) -> None:
        """End the workers, and whatever waits for them."""
        if self._fit is not None:
            ray = module()
            with suppress(ray.exceptions.RayError):
                ray.get([self._post.put.remote(rank, None) for rank in range(self.processes)])
            self._ended()
            ray.kill(self._post)
        self._post = self._fit = self._letter = None


def _gone() -> tuple[type[Exception], ...]:
    """What Ray raises where an actor, or the owner of an object, is no more."""
    ray = module()
    return (ray.exceptions.RayActorError, ray.exceptions.ObjectLostError)


def _why(problem: BaseException) -> str:
    """The kind of an error and its first line."""
    cause = getattr(problem, "health_check_failure", None) or getattr(problem, "controller_failure", problem)
    lines = str(cause).strip().splitlines() or [""]
    return f"{type(cause).__name__}: {lines[0].strip()}".rstrip(": .")


# --- on the cluster ---


class _Line:
    """A worker's line to the program."""

    def __init__(self, post: Any, rank: int) -> None:
        self._post, self._rank, self._closed = post, rank, False

    def say(self, message: object) -> None:
        ray = module()
        self._asked(self._post.put.remote(_PROGRAM, (self._rank, [ray.put(message)])))

    def hear(self) -> Any:
        letter = None if self._closed else self._asked(self._post.take.remote(self._rank))
        if letter is None:
            self._closed = True
            raise EOFError
        return self._asked(letter[0])

    def _asked(self, ref: Any) -> Any:
        ray = module()
        try:
            return ray.get(ref)
        except _gone() as problem:  # whatever else it is, Ray Train tells the program
            raise OSError(str(problem)) from None


def _trained(post: Any, size: int, threads: int, cards: bool) -> dict[int, str]:
    """A task: Ray Train from its start to its end. Gives the ranks that failed, and why.

    It is no part of the program, because that may be outside the cluster.
    """
    from ray.train import FailureConfig, RunConfig, ScalingConfig, TrainingFailedError, WorkerGroupError
    from ray.train.backend import Backend
    from ray.train.torch import TorchConfig, TorchTrainer

    class Alone(Backend):  # type: ignore[misc]
        """Sets up no group: each command may need another one."""

        share_cuda_visible_devices = True

    class Config(TorchConfig):  # type: ignore[misc]
        @property
        def backend_cls(self) -> type[Alone]:
            return Alone

    with tempfile.TemporaryDirectory(prefix="netweight-") as folder:  # Ray Train wants one; checkpoints are ours
        trainer = TorchTrainer(
            _worked,
            train_loop_config={"post": post, "threads": threads, "cards": cards},
            torch_config=Config(),
            scaling_config=ScalingConfig(num_workers=size, use_gpu=cards, resources_per_worker={"CPU": threads}),
            run_config=RunConfig(storage_path=folder, failure_config=FailureConfig(controller_failure_limit=0)),
        )
        try:
            trainer.fit()
        except WorkerGroupError as problem:
            return {rank: _why(failure) for rank, failure in problem.worker_failures.items()}
        except TrainingFailedError as problem:
            return {_PROGRAM: _why(problem)}
    return {}


def _worked(given: dict[str, Any]) -> None:
    """The whole life of a worker."""
    import psutil  # comes with Ray
    from ray import train

    ray = module()
    context = train.get_context()
    rank, host = context.get_world_rank(), ray.util.get_node_ip_address()
    os.environ["LOCAL_RANK"] = str(context.get_local_rank())
    os.environ["LOCAL_WORLD_SIZE"] = str(context.get_local_world_size())
    if not given["cards"]:
        os.environ["CUDA_VISIBLE_DEVICES"] = ""  # those of the machine are not reserved
    # Gloo would take the address of the machine's name, which on many is one of loopback.
    for name, addresses in psutil.net_if_addrs().items():
        if any(one.address == host for one in addresses):
            os.environ.setdefault("GLOO_SOCKET_IFNAME", name)
    torch.set_num_threads(given["threads"])
    listens = socket.create_server((host, 0))
    port = listens.getsockname()[1]
    held = cast(Any, dist).TCPStore(
        host, port, is_master=True, wait_for_workers=False, master_listen_fd=listens.detach()
    )
    line = _Line(given["post"], rank)
    with suppress(EOFError, OSError):
        line.say(_Here(os.getpid(), host, port, ray.get_runtime_context().current_actor))
        Worker(line).serve()
    leave()
    del held  # groups met in it until now
